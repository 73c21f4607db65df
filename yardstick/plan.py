"""Which strategy for my model and machines: memory and time of all six, a ready config.json and the line that runs it.

    python -m yardstick.plan model=gpt2-xl devices=2 device_memory=24
    python -m yardstick.plan model=llama-3-8b devices=16 devices_per_node=8 device=H100 activation_checkpointing=True
    python -m yardstick.plan model=path/to/folder strategy=zero3 device=A100     # one strategy, every item

Standard library only: it works where torch is not installed. Bytes at rest are exact (deepspeed_memory), peaks good to a few
per cent (deepspeed_peak), bytes sent exact (deepspeed_traffic), seconds an estimate (step_time).
"""

import json
import shlex
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from yardstick import deepspeed_memory, deepspeed_peak, deepspeed_traffic, formulas, plan_text, shapes, step_time
from yardstick.plan_job import STRATEGIES, config_of, job_of
from yardstick.settings import Choice, Either, SettingsError, override, usage

CONFIG = {
    # the model: a name, a folder with a transformers config.json, or sizes
    "model": "gpt2",                      # gpt2 ... gpt2-xl, llama-3-8b ... (yardstick/shapes.py: MODELS), or a folder
    "layers": Either(int),                # given, with hidden, heads and vocab: a model of these sizes, in place of model
    "hidden": Either(int),                # width
    "heads": Either(int),                 # of attention
    "vocab": Either(int),                 # tokens
    "kv_heads": Either(int),              # None: heads; fewer are shared (Llama)
    "ffn": Either(int),                   # width of the MLP; None: 4 * hidden
    "gated": False,                       # True: Llama's layers; False: GPT-2's
    "tied": True,                         # the output layer is the embedding
    # the machines
    "devices": 2,                         # over all nodes
    "devices_per_node": Either(int),      # None: all on one node, 8 at most
    "device": "A100",                     # B200 H200 H100 A100 L40S L4 A10 V100 T4, "RTX 4090", "RTX 3090", or cpu
    "device_memory": Either(float),       # GB (1e9 bytes) of one device; None: of the data sheet; cpu: part of host_memory
    "host_memory": Either(float),         # GB of one node; None: 128 for each of its devices, on a CPU this machine's
    "nvme": 0.0,                          # GB free on one node's fast disks; 0: none
    "reserve": 0.08,                      # share of each memory that is left free, for what is not predicted
    "link": Either(float),                # bytes/s each way between devices of a node; None: the data sheet's
    "node_link": Either(float),           # bytes/s each way between nodes, all adapters of a node; None: see hardware.py
    "pcie": Either(float),                # bytes/s each way between a device and its host; None: the data sheet's
    "nvme_bandwidth": Either(float),      # bytes/s of one node's disks; None: of one common drive
    "peak": Either(float),                # FLOP/s of a device; None: the data sheet's
    "efficiency": step_time.EFFICIENCY,   # share of the peak that training reaches; see step_time.py
    # the training
    "strategy": Choice("all", "dp", "zero1", "zero2", "zero3", "offload", "infinity"),   # one: its items in full
    "global_batch": Either(int),          # sequences of one step over all devices; None: 8 for each
    "micro_batch": Either(int),           # of one forward on one device; None: the largest power of two that fits
    "seq": Either(int),                   # tokens of a sequence; None: 1024 (on a CPU 128), or the model's limit
    "precision": Choice("auto", "bf16", "fp16", "fp32"),   # auto: bf16; fp16 where there is none, fp32 on a CPU
    "activation_checkpointing": False,    # keep each layer's input only, compute the rest again in backward
    "cpp_ops": False,                     # DeepSpeed's compiled Adam in place of torch's: faster on a host, needs a compiler
    "output": Either(str),                # folder of the config; None: runs/plan/<model>-<devices>x<device>/<strategy>
}
NEAR = 1.05          # estimates that are nearer to each other than this say nothing about which is faster
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Option:
    """One strategy for a Job."""

    strategy: str
    config: dict               # the DeepSpeed config that is written
    micro_batch: int
    accumulation: int
    items: tuple               # deepspeed_memory.Item, of rank 0
    moments: tuple             # deepspeed_peak.Moment, of rank 0
    needed: dict               # {"device", "host", "nvme": bytes} at the peak: of one device, of one node, of one node
    short: dict                # {place: bytes} that are missing; empty: it fits
    traffic: tuple             # deepspeed_traffic.Collective
    seconds: dict              # of step_time.step_seconds

    @property
    def fits(self):
        return not self.short

    @property
    def ring_bytes(self):
        return self.seconds["ring_bytes"]


def option_of(job, strategy, micro_batch, gathers="kept"):
    """The Option of a strategy with this micro-batch."""
    machine, settings = job.machine, job.settings
    accumulation = job.global_batch // machine.devices // micro_batch
    config = config_of(job, strategy, micro_batch, accumulation, gathers)
    tensors = deepspeed_memory.of_shape(job.shape)
    recompute = "full" if settings["activation_checkpointing"] else "none"
    every = [deepspeed_peak.peaks(job.shape, config, ranks=machine.devices, rank=rank, micro_batch=micro_batch, seq=job.seq,
                                  accumulation=accumulation, recompute=recompute, gpu=job.gpu)
             for rank in sorted({0, machine.devices - 1})]                    # the first and the last share differ most
    moments = max(every, key=lambda one: deepspeed_peak.largest(one, "device").bytes_on("device"))
    items = deepspeed_memory.memory(tensors, config, ranks=machine.devices, accumulation=accumulation)
    on_device = deepspeed_peak.largest(moments, "device" if job.gpu else None)
    on_host = deepspeed_peak.largest(moments, "host")
    needed = {"device": on_device.bytes_on("device") if job.gpu else on_device.nbytes,
              "host": machine.per_node * on_host.bytes_on("host") if job.gpu else 0,
              "nvme": machine.per_node * sum(item.nbytes for item in items if item.place == "nvme")}
    short = {place: round(needed[place] - job.memory[place] * (1 - settings["reserve"])) for place in needed
             if needed[place] > job.memory[place] * (1 - settings["reserve"])}
    rows = deepspeed_traffic.traffic(tensors, config, ranks=machine.devices, accumulation=accumulation)
    return Option(strategy, config, micro_batch, accumulation, tuple(items), tuple(moments), needed, short, tuple(rows),
                  _seconds(job, strategy, config, items, rows, tensors, accumulation, recompute))


def _seconds(job, strategy, config, items, rows, tensors, accumulation, recompute):
    """Estimated seconds of a step by part, with "ring_bytes" and "tokens_per_second"."""
    machine, stage = job.machine, STRATEGIES[strategy]
    s, zero = deepspeed_memory.element_bytes(config), config["zero_optimization"]
    share = tensors.count / (machine.devices if stage else 1)
    on_host = strategy in ("offload", "infinity")
    gathers = 2 * accumulation                                    # of each weight, forward and backward
    pcie = nvme = 0
    if strategy == "offload":      # fp32 gradients down, new weights up; between micro-steps gradients go down and come back
        pcie = (4 + s) * share + 2 * (accumulation - 1) * s * share
    if strategy == "infinity":     # weights up for each gather, fp32 gradients down; files: weights, and the optimizer both ways
        pcie = gathers * s * share + 4 * share
        in_files = {kind: sum(i.nbytes for i in items if i.place == "nvme" and i.kind == kind)
                    for kind in ("parameter", "gradient", "master", "optimizer")}
        nvme = machine.per_node * (in_files["parameter"] * (gathers + 1) + 2 * sum(
            in_files[kind] for kind in ("gradient", "master", "optimizer")))
    known = [replace(row, calls=row.calls or _calls(job, zero, row, s)) for row in rows]
    seconds = step_time.step_seconds(
        machine, flops=formulas.train_flops(replace(job.shape, seq=job.seq), job.global_batch, recompute=recompute),
        collectives=known, adam_device=0 if on_host else share, adam_host=share * machine.per_node if on_host else 0,
        pcie_bytes=pcie if job.gpu else 0, nvme_bytes=nvme, overlap=job.gpu and stage == 3 and zero["stage3_prefetch_bucket_size"] > 0)
    return {**seconds, "ring_bytes": sum(formulas.ring_bytes(r.kind, r.payload_bytes, machine.devices) for r in rows),
            "tokens_per_second": job.global_batch * job.seq / seconds["total"]}


def _calls(job, zero, row, s):
    """Calls where deepspeed_traffic knows only bytes: gathers of the prefetch bucket's size, or of one tensor each."""
    size = zero.get("stage3_prefetch_bucket_size") or zero.get("reduce_bucket_size", 5e8) // 12
    return max(1, round(row.payload_bytes / s / size))


def best_of(job, strategy):
    """The Option of a strategy: with micro_batch as given, or the largest power of two that fits (1 where none does)."""
    each = job.global_batch // job.machine.devices
    sizes = [job.settings["micro_batch"]] if job.settings["micro_batch"] else [
        2**power for power in reversed(range(each.bit_length())) if each % 2**power == 0]
    for size in sizes:
        for gathers in ("kept", "freed") if strategy == "zero3" else ("freed",):
            option = option_of(job, strategy, size, gathers)
            if option.fits:
                return option
    return option


def rank(job):
    """[Option] of all six strategies: those that fit by estimated seconds, then the others by what is missing.

    Estimates within NEAR of the fastest count as equal: there the simpler strategy comes first.
    """
    options = [best_of(job, strategy) for strategy in STRATEGIES
               if not (strategy == "infinity" and job.settings["precision"] in ("fp32", "fp16"))]
    fastest = min((option.seconds["total"] for option in options if option.fits), default=0.0)

    def place(option):
        if not option.fits:
            return 2, *(option.short.get(where, 0) for where in ("device", "host", "nvme"))     # the dearest first
        seconds = option.seconds["total"]
        return (0, 0.0) if seconds <= NEAR * fastest else (1, seconds)
    return sorted(options, key=place)                        # stable: the order of STRATEGIES where equal


def folder_of(job, option):
    if job.settings["output"]:
        return Path(job.settings["output"])
    name = f"{job.name}-{job.machine.devices}x{job.device}".replace(" ", "_").replace("/", "_")
    return Path("runs/plan") / name / option.strategy


def write(job, option):
    """Write the config, and the model's where it is given by sizes; return (path of the config, the line that runs it)."""
    folder = folder_of(job, option)
    there = folder if folder.is_absolute() else ROOT / folder
    try:
        there.mkdir(parents=True, exist_ok=True)
        (there / "config.json").write_text(json.dumps(option.config, indent=2) + "\n")
    except OSError as error:
        raise SettingsError(f"the config cannot be written to {there} ({error.strerror}). Give another folder as output=.") from None
    model = job.given_folder or job.name
    if job.settings["layers"] is not None:
        (there / "model").mkdir(exist_ok=True)
        (there / "model" / "config.json").write_text(json.dumps(shapes.config_json(job.shape), indent=2) + "\n")
        model = folder / "model"
    words = [f"strategy={option.strategy}", f"config={folder}/config.json", f"model={model}", f"seq={job.seq}",
             f"global_batch={job.global_batch}", f"micro_batch={option.micro_batch}"]
    if option.strategy != "infinity":
        words.append(f"precision={job.precision}")
    if job.settings["activation_checkpointing"]:
        words.append("activation_checkpointing=True")
    machine = job.machine
    words = ["real_model_example.py", *map(shlex.quote, words)]
    if machine.nodes == 1:
        start = [f"RANKS={machine.devices}", *(["DS_ACCELERATOR=cpu"] if not job.gpu else []), "python"]
    else:
        start = ["torchrun", f"--nnodes={machine.nodes}", f"--nproc_per_node={machine.per_node}", "--rdzv_backend=c10d",
                 "--rdzv_endpoint=FIRST_NODE:29500"]
    return folder / "config.json", " ".join([*start, *words])


def remedies(job):
    """[(settings as a user gives them, the Option that fits with them)] where nothing fits; the smallest of each kind."""
    found, settings = [], job.settings
    tries = [[("micro_batch", None)]] if settings["micro_batch"] else []
    tries += [[("activation_checkpointing", True)]] if not settings["activation_checkpointing"] else []
    for change in tries:
        found += _first([change], settings)
    for checkpointing in sorted({settings["activation_checkpointing"], True}):
        more = [[("devices", devices), ("devices_per_node", max(job.machine.per_node, min(8, devices))), ("global_batch", None),
                 ("micro_batch", None), ("activation_checkpointing", checkpointing)]
                for devices in (job.machine.devices * factor for factor in (2, 4, 8, 16, 32, 64))]
        found += _first(more, settings)[:1]
    if not settings["nvme"] and settings["strategy"] in ("all", "infinity"):
        needed = best_of(job_of({**settings, "nvme": 1e9}), "infinity").needed["nvme"]
        found += _first([[("nvme", float(-(-needed * 1.2 // 1e9)))]], settings)
    return found


def _first(changes, settings):
    """The first of `changes` ([(key, value)]) with which a strategy fits, as [(words, Option)], or []."""
    for change in changes:
        try:
            job = job_of({**settings, **dict(change)})
            names = STRATEGIES if settings["strategy"] == "all" else [settings["strategy"]]
            if not any(option_of(job, name, job.settings["micro_batch"] or 1, "freed").fits for name in names):
                continue
            options = rank(job) if settings["strategy"] == "all" else [best_of(job, settings["strategy"])]
        except SettingsError:
            continue
        if options[0].fits:
            words = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in change
                     if value is not None and value != settings[key]]
            return [(" ".join(words) or "a smaller micro-batch", options[0])]
    return []


def main(arguments):
    if text := usage(arguments, __file__):
        print(text)
        return 0
    job = job_of(override(CONFIG, arguments, where="yardstick/plan.py"))
    one = job.settings["strategy"]
    options = rank(job) if one == "all" else [best_of(job, one)]
    print(plan_text.table(job, options) if one == "all" else plan_text.in_full(job, options[0]))
    if not options[0].fits:
        print("\n" + plan_text.nothing_fits(job, options, remedies(job)))
        return 1
    print("\n" + plan_text.choice(job, options[0], *write(job, options[0])))
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)    # `| head` closes early; that is no error
    try:
        sys.exit(main(sys.argv[1:]))
    except SettingsError as error:
        sys.exit(f"yardstick.plan: {error}")
