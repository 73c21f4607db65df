"""Profiles a torch model for the partitioner: time of each layer's forward and backward, sizes of activations and weights.

    python pipedream/profiler.py network=gpt batch=4                    # writes runs/pipedream/gpt.txt
    python pipedream/profiler.py network=vgg16 batch=2 repeats=5 write=vgg.txt

Each node of the model's graph (torch.fx) runs by itself, as SOSP'19 section 3.1 asks for: forward, then the gradients of its inputs and
weights, synchronised with the device, the median of several. The graph is written in PipeDream's text format (pipedream/graph.py).
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipedream.graph import Graph, Node, read_graph, write_graph  # noqa: F401  read_graph is this module's, too
from yardstick import results
from yardstick.settings import Choice, Either, SettingsError, override, usage

CONFIG = {
    "network": Choice("gpt", "vgg16", "resnet50"),       # of pipedream/networks.py
    "batch": 4,                           # samples in a minibatch: images of 224 x 224, or sequences
    "warm_up": 2,                         # runs of each layer that do not count
    "repeats": 5,                         # runs of which the median counts
    "write": Either(str),                 # the profile's file; None: runs/pipedream/NETWORK.txt
    "record": Either(str),                # LABEL: keep the record in results/LABEL/pipedream
}


def profile(model, inputs, warm_up=2, repeats=5, tell=lambda done, total: None):
    """The Graph of a model for one minibatch: times in milliseconds, sizes in bytes.

    model: an nn.Module that torch.fx can trace; its leaves are the modules of torch.nn and the layers of yardstick.model. inputs: a
    tensor on the model's device. tell(done, total) is called after each node. Raises ValueError where the model cannot be traced.
    """
    import torch
    from torch import fx, nn

    from yardstick.model import Block, Embedding, Head

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, (Block, Embedding, Head)) or module.__module__.startswith("torch.nn") and not isinstance(
                module, nn.Sequential)
    try:
        graph = Tracer().trace(model)
    except Exception as error:             # fx raises many kinds: control flow on values, unsupported calls
        raise ValueError(f"torch.fx cannot trace {type(model).__name__} ({error}). A model whose forward depends on values must be cut "
                         "into modules whose forward does not.") from error
    modules, values, found = dict(model.named_modules()), {}, Graph()
    nodes = [node for node in graph.nodes if node.op != "output"]
    for done, node in enumerate(nodes):
        before = [source.name for source in node.all_input_nodes]
        if node.op == "placeholder":
            values[node.name] = inputs
            found.add(Node(node.name, f"Input{done}", activation=float(inputs.nbytes)))
            continue
        module = modules.get(node.target) if node.op == "call_module" else None
        if module is None and node.op not in ("call_function", "call_method"):
            raise ValueError(f"{node.name}: {node.op} of {node.target} is no layer that can be timed.")
        weights = [weight for weight in module.parameters() if weight.requires_grad] if module else []

        def run():
            args = fx.node.map_arg(node.args, lambda source: _leaf(values[source.name]))
            kwargs = fx.node.map_arg(node.kwargs, lambda source: _leaf(values[source.name]))
            _synchronize(inputs)
            begun = time.perf_counter()
            if node.op == "call_method":
                out = getattr(args[0], node.target)(*args[1:], **kwargs)
            else:
                out = (module or node.target)(*args, **kwargs)
            _synchronize(inputs)
            middle = time.perf_counter()
            leaves = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.requires_grad]
            if leaves + weights and out.requires_grad:
                gradient = torch.ones_like(out)
                _synchronize(inputs)
                again = time.perf_counter()
                torch.autograd.grad(out, leaves + weights, gradient)
                _synchronize(inputs)
                return out.detach(), middle - begun, time.perf_counter() - again
            return out.detach(), middle - begun, 0.0
        for _ in range(warm_up):
            run()
        timed = [run() for _ in range(repeats)]
        out, forward, backward = timed[-1][0], *(statistics.median(one[place] for one in timed) for place in (1, 2))
        if weights and not backward > 0:
            raise ValueError(f"{node.name}: its backward took no time, which cannot be.")
        values[node.name] = out
        name = f"{type(module).__name__}({module.extra_repr()})" if module else getattr(node.target, "__name__", str(node.target))
        found.add(Node(node.name, name, 1e3 * forward, 1e3 * backward, float(out.nbytes), float(sum(weight.nbytes for weight in weights))), before)
        tell(done + 1, len(nodes))
    return found


def _leaf(value):
    return value.detach().requires_grad_() if value.is_floating_point() else value


def _synchronize(tensor):
    if tensor.is_cuda:
        import torch
        torch.cuda.synchronize(tensor.device)


def main():
    if text := usage(sys.argv[1:], __file__):
        print(text)
        return
    settings = override(CONFIG, sys.argv[1:], "pipedream/profiler.py")
    for key, least in (("batch", 1), ("warm_up", 0), ("repeats", 1)):
        if settings[key] < least:
            raise SettingsError(f"{key}={settings[key]} must be at least {least}.")
    results.check_label(settings["record"])
    import torch
    from tqdm import tqdm

    from pipedream.networks import NETWORKS, samples
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, size = NETWORKS[settings["network"]]()
    with tqdm(unit="layer", desc=settings["network"], disable=not sys.stderr.isatty()) as bar:
        def tell(done, total):
            bar.total = total
            bar.update(done - bar.n)
        graph = profile(model.to(device).train(), samples(size, settings["batch"]).to(device), settings["warm_up"], settings["repeats"], tell)
    path = Path(settings["write"] or results.ROOT / "runs" / "pipedream" / f"{settings['network']}.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_graph(graph, path)
    nodes = graph.nodes.values()
    total = {key: sum(getattr(node, key) for node in nodes) for key in ("forward", "backward", "activation", "parameters")}
    print(f"{settings['network']}, {settings['batch']} samples on {device}: {len(graph.nodes)} nodes, forward {total['forward']:.1f} ms, backward "
          f"{total['backward']:.1f} ms, weights {total['parameters'] / 1e6:.1f} MB, activations {total['activation'] / 1e6:.1f} MB\nwritten: {path}")
    if settings["record"]:
        from yardstick.ranks import gpu_name
        results.write(f"pipedream/profile_{settings['network']}", label=settings["record"], settings=settings, predicted={},
                      machine={"accelerator": gpu_name() if device == "cuda" else "none", "ranks": 1},
                      measured={"forward_seconds": total["forward"] / 1e3, "backward_seconds": total["backward"] / 1e3, "layers_count": len(graph.nodes),
                                "parameter_bytes": total["parameters"], "activation_bytes": total["activation"]})


if __name__ == "__main__":
    try:
        main()
    except (SettingsError, ValueError, OSError) as error:
        sys.exit(f"pipedream/profiler.py: {error}")
