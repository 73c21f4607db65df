"""The models that measure_gpu.py tries: GPT-2s from small to large, and the memory predicted for each strategy."""

import re

from strategies import effective
from yardstick import deepspeed_memory, deepspeed_peak, formulas, shapes
from yardstick.settings import SettingsError, defaults

VOCAB = 50257                                  # GPT-2's
FOLDER = "runs/measure_gpu"                    # of the models, relative to the checkout


def ladder_of(text):
    """ModelShapes, from small to large.

    >>> [(shape.layers, shape.hidden, shape.heads) for shape in ladder_of("2x64,4x256")]
    [(2, 64, 1), (4, 256, 4)]
    >>> [f"{formulas.param_count(shape) / 1e9:.1f}" for shape in ladder_of("auto")][::5]
    ['0.8', '4.3', '13.1']
    """
    if text == "auto":
        text = ",".join(f"{layers}x{64 * layers}" for layers in (*range(24, 64, 4), *range(64, 104, 8)))
    sizes = [re.fullmatch(r"(\d+)x(\d+)", one) for one in text.split(",")]
    if not all(sizes) or any(int(one[2]) % 64 for one in sizes):
        raise SettingsError(f"ladder={text} is no list of LAYERSxHIDDEN with HIDDEN a multiple of 64. Give ladder=24x1536,28x1792, for "
                            "example.")
    every = [shapes.ModelShape(int(one[1]), int(one[2]), int(one[2]) // 64, VOCAB, 1024) for one in sizes]
    return sorted(every, key=formulas.param_count)


def name_of(shape):
    """As its folder is called."""
    return f"gpt2-{shape.layers}x{shape.hidden}"


def shape_of(name):
    """The ModelShape of a name of yardstick.shapes or of `name_of`; None for another.

    >>> shape_of("gpt2-24x1536").hidden, shape_of("gpt2").hidden, shape_of("mine")
    (1536, 768, None)
    """
    sizes = re.fullmatch(r"gpt2-(\d+x\d+)", name)
    return ladder_of(sizes[1])[0] if sizes else shapes.MODELS.get(name)


def config_of(shape, strategy, ranks, gpu, cpp_ops=False):
    """The DeepSpeed config that real_model_example.py makes for a shape: one sequence a forward, one forward a step."""
    import real_model_example
    chosen = {**defaults(real_model_example.CONFIG), "strategy": strategy, "cpp_ops": cpp_ops}
    return effective.effective(chosen, effective.read(strategy), micro=1, accumulation=1, nvme_path="nvme",
                               precision="bf16" if gpu or strategy == "infinity" else "fp32",
                               largest_share=-(-max(deepspeed_memory.of_shape(shape).numels) // ranks))


def needed(shape, config, ranks, gpu, *, micro_batch, seq, recompute):
    """Predicted {"device", "host", "disk": bytes}: of one device at its peak, of all ranks on the host, of their files."""
    tensors = deepspeed_memory.of_shape(shape)
    moments = deepspeed_peak.peaks(shape, config, ranks=ranks, micro_batch=micro_batch, seq=seq, recompute=recompute, gpu=gpu)
    on_device = deepspeed_peak.largest(moments, "device" if gpu else None)
    files = sum(item.nbytes for item in deepspeed_memory.memory(tensors, config, ranks=ranks) if item.place == "nvme")
    # each rank builds the model whole, in fp32, on the host
    return {"device": on_device.bytes_on("device") if gpu else on_device.nbytes, "disk": ranks * files,
            "host": ranks * max(4 * tensors.count, deepspeed_peak.largest(moments, "host").bytes_on("host") if gpu else 0)}
