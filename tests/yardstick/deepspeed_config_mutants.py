"""Good DeepSpeed configs with one mistake each, judged by the linter, by DeepSpeedConfig and by deepspeed.initialize.

    python tests/yardstick/deepspeed_config_mutants.py [record=LABEL]

prints the mistakes that DeepSpeed takes without a word; with record= they are written to
results/LABEL/deepspeed_config/silent.json. A judgement is "" where nothing is wrong, else the message in one line.
"""

import copy
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from yardstick import deepspeed_config, op_cache, ranks, results

ROOT = Path(__file__).resolve().parents[2]
SEED, COUNT, DRAWN = 20260823, 500, 20
ADAM = {"type": "AdamW",
        "params": {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01, "torch_adam": True}}
BASE = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0, "optimizer": ADAM}
WARMUP = {"type": "WarmupDecayLR",
          "params": {"total_num_steps": 100, "warmup_num_steps": 10, "warmup_min_lr": 0, "warmup_max_lr": 3e-4}}
# As in DeepSpeed's documentation: what people write.
DOCUMENTED = {
    "zero2 cpu offload": {
        **BASE, "train_batch_size": 8, "gradient_accumulation_steps": 4, "scheduler": WARMUP, "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "allgather_partitions": True,
            "allgather_bucket_size": 2e8, "overlap_comm": True, "reduce_scatter": True, "reduce_bucket_size": 2e8,
            "contiguous_gradients": True}},
    "zero3 nvme": {
        **BASE, "bf16": {"enabled": True}, "wall_clock_breakdown": False, "steps_per_print": 2000,
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "swap", "pin_memory": True, "buffer_count": 4},
            "offload_param": {"device": "nvme", "nvme_path": "swap", "pin_memory": True, "buffer_count": 5,
                              "buffer_size": 2e6, "max_in_cpu": 1e6},
            "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": 1e6,
            "stage3_prefetch_bucket_size": 1e6, "stage3_param_persistence_threshold": 1e4, "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True},
        "aio": {"block_size": 262144, "queue_depth": 32, "intra_op_parallelism": 1, "single_submit": False}},
    "zenflow": {
        "train_batch_size": 8, "bf16": {"enabled": True}, "gradient_accumulation_steps": 4, "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.0}},
        "zero_optimization": {
            "stage": 2, "reduce_bucket_size": 5e6, "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "zenflow": {"topk_ratio": 0.1, "update_interval": 4, "full_warm_up_rounds": 0, "overlap_step": True}}},
    "around training": {
        **BASE, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}, "communication_data_type": "fp32",
        "prescale_gradients": False, "gradient_predivide_factor": 1.0, "dataloader_drop_last": True, "log_level": "error",
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e6, "round_robin_gradients": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "flops_profiler": {"enabled": False, "profile_step": 1, "module_depth": -1, "top_modules": 1, "detailed": True},
        "comms_logger": {"enabled": False, "verbose": False, "prof_all": True, "prof_ops": ["all_reduce"]},
        "csv_monitor": {"enabled": False, "output_path": "logs", "job_name": "run"},
        "tensorboard": {"enabled": False, "output_path": "logs"},
        "checkpoint": {"tag_validation": "Warn", "load_universal": False, "parallel_write": {"pipeline_stage": False}},
        "timers": {"throughput": {"enabled": True, "synchronized": False}}, "compile": {"deepcompile": False},
        "data_efficiency": {"enabled": False, "seed": 1234, "data_sampling": {"enabled": False, "num_epochs": 1}},
        "autotuning": {"enabled": False, "metric": "throughput"}, "torch_autocast": {"enabled": False, "dtype": "bfloat16"}},
    "fp16": {
        **BASE, "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 12, "loss_scale_window": 500,
                         "hysteresis": 2, "min_loss_scale": 1},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e6}, "pipeline": {"activation_checkpoint_interval": 0},
        "tensor_parallel": {"autotp_size": 0}, "hybrid_engine": {"enabled": False}},
}
REMOVED = ["nebula", "amp", "sparse_gradients", "elasticity", "curriculum_learning", "progressive_layer_drop", "eigenvalue",
           "zero_optimization.mics_shard_size", "zero_optimization.zeropp_loco_param", "optimizer.params.max_grad_norm"]


@dataclass(frozen=True)
class Mutant:
    """kind: which mutation; key: the key that it touched, dotted; text: the file."""

    kind: str
    key: str
    text: str


def good():
    """{name: config} of all that mutants are made of: the six strategies and DOCUMENTED."""
    paths = sorted((ROOT / "strategies").glob("*/config.json"))
    return {**{path.parent.name: json.loads(path.read_text()) for path in paths}, **copy.deepcopy(DOCUMENTED)}


def mutants(seed=SEED, count=COUNT):
    """`count` mutants, the same for the same seed."""
    draw, made, configs = random.Random(seed), [], list(good().values())
    while len(made) < count:
        config = copy.deepcopy(draw.choice(configs))
        kind = draw.choice(list(KINDS))
        key = KINDS[kind](config, draw)
        if key:
            text = json.dumps(config, indent=1)
            made.append(Mutant(kind, key, doubled(text, draw) if kind == "doubled" else text))
    return made


def places(config, prefix=""):
    """[(section, name, dotted key)] of every key at every level."""
    found = []
    for name, value in config.items():
        found.append((config, name, prefix + name))
        if isinstance(value, dict):
            found += places(value, f"{prefix}{name}.")
    return found


def at(config, key):
    """(section, name) of a dotted key, its sections made where they lack."""
    *sections, name = key.split(".")
    for section in sections:
        config = config.setdefault(section, {})
        if not isinstance(config, dict):
            return None, name
    return config, name


def replace(section, old, new):
    """Rename a key in its place."""
    items = [(new if name == old else name, value) for name, value in section.items()]
    section.clear()
    section.update(items)


def misspelt(config, draw):
    section, name, key = draw.choice(places(config))
    where = draw.randrange(len(name))
    before, after = name[:where], name[where + 1:]
    new = draw.choice([before + after, before + name[where] + name[where:], f"{before}x{after}", name.replace("_", "", 1),
                       name.upper(), name.replace("z", "s", 1), f"{name}s"])
    if new == name or not new or new in section:
        return None
    replace(section, name, new)
    return f"{key.rpartition('.')[0]}.{new}".lstrip(".")


def renamed(config, draw):
    names = {known: field.rpartition(".")[2] for field, known in deepspeed_config.FIELDS.items()}
    found = [(section, name, key) for section, name, key in places(config) if key in names]
    if not found:
        return None
    section, name, key = draw.choice(found)
    if draw.random() < 0.3:                                       # both names at once
        section[names[key]] = section[name]
    else:
        replace(section, name, names[key])
    return f"{key.rpartition('.')[0]}.{names[key]}".lstrip(".")


def outdated(config, draw):
    key = draw.choice([key for key, spec in deepspeed_config.KEYS.items() if "deprecated" in spec])
    section, name = at(config, key)
    if section is None:
        return None
    section[name] = draw.choice([True, False]) if deepspeed_config.KEYS[key]["type"] == "bool" else 5
    return key


def wrong_type(config, draw):
    section, name, key = draw.choice(places(config))
    old = section[name]
    section[name] = draw.choice(["many", "", [], [1, "x"], {}, {"value": 1}, None, 1.5, True, 3, "3", "true"])
    return key if type(section[name]) is not type(old) else None


def out_of_range(config, draw):
    section, name, key = draw.choice([p for p in places(config) if type(p[0][p[1]]) in (int, float, str)])
    old = section[name]
    section[name] = draw.choice(["other", "NONE", old.upper(), f"{old}s"] if isinstance(old, str)
                                else [-1, 0, -0.5, 1.5, 4, 1e30, 2 ** 70])
    return key


def moved(config, draw):
    section, name, key = draw.choice(places(config))
    others = [config, *(s[n] for s, n, _ in places(config) if isinstance(s[n], dict))]
    to = draw.choice([other for other in others if other is not section and other is not section[name]] or [None])
    if to is None or name in to or isinstance(section[name], dict):
        return None
    to[name] = section.pop(name)
    return next(k for s, n, k in places(config) if s is to and n == name)


def deleted(config, draw):
    section, name, key = draw.choice(places(config))
    del section[name]
    return key


def auto(config, draw):
    section, name, key = draw.choice(places(config))
    section[name] = "auto"
    return key


def removed(config, draw):
    key = draw.choice(REMOVED)
    section, name = at(config, key)
    if section is None:
        return None
    section[name] = draw.choice([{}, {"enabled": True}, 1, False])
    return key


def stage(config, draw):
    zero = config.setdefault("zero_optimization", {})
    zero["stage"] = draw.choice([0, 1, 2, 3, 4, -1, 2.0, "3"])
    return "zero_optimization.stage"


def batch(config, draw):
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        config.pop(key, None)
        if draw.random() < 0.6:
            config[key] = draw.choice([1, 2, 3, 4, 8, 12])
    return "train_batch_size"


def added(config, draw):
    """Another key that DeepSpeed knows, with one of the values that the map allows."""
    known = deepspeed_config.KEYS
    key = draw.choice([key for key, spec in known.items() if "*" not in key and spec["type"] != "section"])
    values = {"bool": [True, False], "int": [1, 2, 10 ** 6], "number": [0.5, 1]}
    value = draw.choice([*known[key].get("choices", []), known[key]["default"],
                         *(v for kind, some in values.items() if kind in known[key]["type"] for v in some)])
    section, name = at(config, key)
    if section is None:
        return None
    section[name] = value
    return key


def comment(config, draw):
    section, _, key = draw.choice(places(config))
    name = draw.choice(["_comment", "// note", "#", "comment"])
    section[name] = "why"
    return f"{key.rpartition('.')[0]}.{name}".lstrip(".")


def repeated(config, draw):
    return draw.choice(places(config))[2]


def doubled(text, draw):
    """The text of a file with one of its lines twice."""
    lines = text.split("\n")
    choice = draw.choice([i for i, line in enumerate(lines) if re.match(r' *"\w+": [^{\[]*,$', line)])
    return "\n".join([*lines[:choice + 1], *lines[choice:]])


KINDS = {"misspelt": misspelt, "renamed": renamed, "outdated": outdated, "wrong type": wrong_type, "out of range": out_of_range,
         "moved": moved, "deleted": deleted, "auto": auto, "removed": removed, "stage": stage, "batch": batch, "added": added,
         "comment": comment, "doubled": repeated}


# Judgements

def judge(path, world=1):
    """(errors, warnings) of the linter, each a list of texts, on a machine without a GPU."""
    try:
        found = deepspeed_config.lint(deepspeed_config.read(path), ranks=world, accelerator="cpu")
    except ValueError as error:
        return [str(error)], []
    return [str(f) for f in found if f.level == "error"], [str(f) for f in found if f.level == "warning"]


def judgements(made, folder):
    """`judge` of each mutant, as a file."""
    path, found = Path(folder) / "linted.json", []
    for mutant in made:
        path.write_text(mutant.text)
        found.append(judge(path))
    return found


def one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def constructed(texts, folder):
    """What DeepSpeedConfig says of each text as a file, in a process without a process group: one rank."""
    from deepspeed.runtime.config import DeepSpeedConfig
    said = []
    for text in texts:
        path = Path(folder) / "config.json"
        path.write_text(text)
        try:
            DeepSpeedConfig(str(path))
            said.append("")
        except Exception as error:                 # whatever DeepSpeed raises is its answer
            said.append(one_line(error))
    return said


def compiles(config):
    """Whether initialisation may compile an op: DeepSpeed's Adam or its like, or asynchronous I/O where it is not ready."""
    name = deepspeed_config.implementation("optimizer", config) or "torch.optim."
    files = ['"writer"'] + ['"nvme"'] * (not op_cache.ready(["async_io"]))
    return not name.startswith("torch.optim.") or any(word in json.dumps(config) for word in files)


def initialized(texts, folder, seconds=60):
    """What deepspeed.initialize says of each text, each in a fresh process of one rank; no end in `seconds` is an answer too."""
    # what takes seconds to import, and what every child would import
    import deepspeed.runtime.superoffload.superoffload_stage3
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    said = []
    for number, text in enumerate(texts):
        answer = Path(folder) / f"answer{number}"
        child = os.fork()
        if not child:
            _initialize(text, answer, folder)
        end = time.monotonic() + seconds
        while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
            time.sleep(0.02)
        if not done[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        ended = f"ended with status {done[1]}" if done[0] else f"no end within {seconds} s"
        said.append(answer.read_text() if answer.exists() else ended)
    return said


def _initialize(text, answer, folder):
    """Never returns: the process ends with its answer written."""
    try:
        os.chdir(folder)
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ranks.free_port()))
        import deepspeed
        import torch
        op_cache.do_without("deepspeed_shm_comm")
        if op_cache.ready(["async_io"]):
            op_cache.load(["async_io"])
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        path = Path(f"{answer}.json")
        path.write_text(text)
        said = ""
        try:
            deepspeed.initialize(model=model, model_parameters=model.parameters(), config=str(path))
        except BaseException as error:
            said = one_line(error)
        answer.with_suffix(".part").write_text(said.replace(str(folder), "."))
        answer.with_suffix(".part").rename(answer)
    finally:
        os._exit(0)


def main(arguments):
    label = dict(a.partition("=")[::2] for a in arguments).get("record")
    results.check_label(label)
    os.environ.update(DS_ACCELERATOR="cpu")
    import deepspeed  # noqa: F401, imported once, before the forks
    made = mutants()
    with tempfile.TemporaryDirectory() as folder:
        said = constructed([m.text for m in made], folder)
        errors = [judged[0] for judged in judgements(made, folder)]
        silent = {}                                # by mutation and by the message without its names and values
        for mutant, found, refusal in zip(made, errors, said):
            if found and not refusal:
                key, _, why = found[0].partition(": ")[2].partition(": ")
                shape = re.sub(r'"[^"]*"|[\d.,+-]+|null|true|false', "", why)
                silent.setdefault((mutant.kind, shape), []).append((mutant, key, why))
        runs = [found[0][0].text for found in silent.values() if not compiles(json.loads(found[0][0].text))]
        after = dict(zip(runs, initialized(runs, folder)))
    rows = []
    for (kind, _), found in silent.items():
        mutant, key, why = found[0]
        does = after.get(mutant.text, "not run, it needs a compiled op")
        does = does if does.startswith("not run") else f"initialize fails: {does}" if does else "initializes"
        rows.append({"mutation": kind, "times": len(found), "key": key, "linter": why, "deepspeed": does})
    rows.sort(key=lambda row: (row["mutation"], -row["times"], row["key"]))
    pairs = [(bool(found), bool(refusal)) for found, refusal in zip(errors, said)]
    counts = {"mutants_count": len(made), "accepted_by_both_count": pairs.count((False, False)),
              "refused_by_both_count": pairs.count((True, True)), "silent_count": pairs.count((True, False)),
              "missed_count": pairs.count((False, True))}
    print("\n".join(table(rows)), counts, sep="\n")
    if label:
        print(results.write("deepspeed_config/silent", settings={"seed": SEED}, measured=counts,
                            predicted={"missed_count": 0}, details={"silent": rows, "table": table(rows)},
                            machine={"accelerator": "none", "ranks": 1}, label=label))


def table(rows):
    """The lines of a Markdown table, short enough to be read."""
    def cell(text, length=110):
        text = text if len(text) <= length else text[:length].rpartition(" ")[0] + " ..."
        return text.replace("|", "\\|").replace("<", "&lt;")
    return ["| mutation | times | example | the linter | DeepSpeed |", "|---|---|---|---|---|",
            *(f"| {row['mutation']} | {row['times']} | `{row['key']}` | {cell(row['linter'])} | {cell(row['deepspeed'])} |"
              for row in rows)]


if __name__ == "__main__":
    main(sys.argv[1:])
