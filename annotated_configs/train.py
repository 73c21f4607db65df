"""Trains a small language model by a DeepSpeed config file as it stands, so that what a key does can be seen.

    python annotated_configs/train.py
    python annotated_configs/train.py config=annotated_configs/zero3_nvme_offload_annotated.json
    RANKS=1 python annotated_configs/train.py config=annotated_configs/zero2_zenflow_annotated.json steps=2

The path goes to deepspeed.initialize, which reads the file itself; nothing in it is changed. Change a key in a copy and start
again: the losses, the bytes that rank 0 holds by kind and place, and the files on NVMe follow. The model has weights large
enough to go to files on up to two ranks; the text is the embedded corpus. Swap files are removed at the end.
"""

import shutil
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from yardstick import program  # before deepspeed: it chooses the device
from yardstick import data, deepspeed_config, deepspeed_memory, ledger
from yardstick.settings import Either, SettingsError

HERE = Path(__file__).resolve().parent
CONFIG = {
    "config": Either(str),      # DeepSpeed config file; None: zero3_cpu_offload_annotated.json
    "steps": 8,                 # optimizer steps
    "seq": 64,                  # tokens of a sequence
    "seed": 1,                  # of weights and order of data
    "repair_zenflow": False,    # undo the transposition of weights by which release 0.19.8 spoils ZenFlow
    "record": Either(str),      # LABEL: write the record to results/LABEL/ (for commits)
    "output": Either(str),      # folder of the run's record; None: a new one under runs/
}
HIDDEN, FFN = 512, 2048


def path_of(settings):
    return Path(settings["config"] or HERE / "zero3_cpu_offload_annotated.json")


def check(run):
    """Refuse what cannot train, before a rank starts; name the C++ ops that the config needs."""
    for name in ("steps", "seq"):
        if run.settings[name] < (2 if name == "seq" else 1):
            raise SettingsError(f"{name}={run.settings[name]} is too few. Give {name}={CONFIG[name]}, for example.")
    if "config=" in [argument.lstrip("-") for argument in sys.argv[1:]]:
        raise SettingsError("config= names no file. Give the path of a DeepSpeed config, or leave config= out.")
    path = path_of(run.settings)
    try:
        config = deepspeed_config.read(path)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    for finding in deepspeed_config.lint(config, ranks=run.world, accelerator=None if run.gpu else "cpu"):
        if finding.level == "error" or finding.fails:
            raise SettingsError(f"{path}: {finding.key}: {finding.message}")
    if isinstance(config.get("zero_optimization"), bool):
        raise SettingsError(f"{path}: zero_optimization is true or false, an old form. Write {{\"stage\": 1}}, for example.")
    if run.settings["repair_zenflow"] and not (config.get("zero_optimization") or {}).get("zenflow"):
        raise SettingsError(f"{path} has no zenflow section, so there is nothing to repair. Leave repair_zenflow= out.")
    if not run.gpu and (config.get("fp16") or {}).get("enabled"):
        raise SettingsError(f"{path}: fp16 needs a GPU here. Enable bf16 in its place.")
    run.corpus = data.load()
    zero, _, *places = deepspeed_memory.sections(config)
    share = deepspeed_memory.ceil_div(run.corpus.vocab * HIDDEN, run.world)
    size = (zero.get("offload_param") or {}).get("buffer_size", 10**8)
    if places[1] == "nvme" and size < share:
        raise SettingsError(f"{path}: zero_optimization.offload_param.buffer_size: {size} is less than the largest share of this model, "
                            f"{share} elements. Give at least that.")
    run.ops += ["async_io"] * ("nvme" in places)
    optimizer = deepspeed_config.implementation("optimizer", config)
    run.ops += {"DeepSpeedCPUAdam": ["cpu_adam"], "FusedAdam": ["fused_adam"]}.get(optimizer, [])


def build(vocab):
    """Embedding, two residual blocks, logits: each weight has at least HIDDEN * FFN elements."""
    import torch

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = torch.nn.LayerNorm(HIDDEN), torch.nn.Linear(HIDDEN, FFN), torch.nn.Linear(FFN, HIDDEN)

        def forward(self, x_BTD):
            return x_BTD + self.down(torch.nn.functional.gelu(self.up(self.norm(x_BTD))))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(vocab, HIDDEN), torch.nn.Linear(HIDDEN, vocab, bias=False)
            self.blocks = torch.nn.ModuleList(Block() for _ in range(2))

        def forward(self, tokens_BT):
            x_BTD = self.embedding(tokens_BT)
            for block in self.blocks:
                x_BTD = block(x_BTD)
            logits = self.head(x_BTD[:, :-1]).float()
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten())
    return Model()


def views(self, group):
    """Replaces ZenFlowZeroOptimizer._update_model_bit16_weights: ZenFlow lays matrices out in the flat buffer column by column, and
    the method that it inherits takes them out of it row by row."""
    for weight, meta, offset in zip(self.round_robin_bit16_groups[group], self.round_robin_bit16_meta[group],
                                    self.round_robin_bit16_offsets[group]):
        flat = self.bit16_groups_flat[group].narrow(0, offset, meta.numel())
        weight.data = flat.view(meta.shape[::-1]).t() if meta.dim() == 2 else flat.view(meta.shape)
    for weight, place in zip(self.bit16_groups[group], self.round_robin_bit16_indices[group]):
        weight.data = self.round_robin_bit16_groups[group][place].data


def train(run):
    """One rank."""
    import deepspeed
    import torch
    import torch.distributed as dist

    settings, rank = run.settings, run.join()
    if settings["repair_zenflow"]:
        from deepspeed.runtime.zenflow.zenflow_stage_1_and_2 import ZenFlowZeroOptimizer
        ZenFlowZeroOptimizer._update_model_bit16_weights = views
    torch.manual_seed(settings["seed"])
    model = build(run.corpus.vocab)
    tensors = deepspeed_memory.Tensors(tuple(p.numel() for p in model.parameters()))
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=str(path_of(settings)))
    del model
    accumulation = engine.gradient_accumulation_steps()                # ZenFlow has put its own there
    batch = engine.train_micro_batch_size_per_gpu() * accumulation * rank.world
    batches = data.Batches(run.corpus.train, settings["seq"], batch, settings["seed"])
    history, seconds = [], []

    def mean(losses):                                                  # over the ranks too
        total = torch.stack(losses).mean().float()
        dist.all_reduce(total)
        return total.item() / rank.world

    def first_batch():
        engine.eval()
        with torch.no_grad():
            losses = [engine(torch.from_numpy(rows).to(engine.device)) for rows in batches.step(0, rank.rank, rank.world, accumulation)]
        engine.train()
        return mean(losses)

    before = first_batch()
    for step in range(settings["steps"]):
        begin, losses = time.perf_counter(), []
        for rows in batches.step(step, rank.rank, rank.world, accumulation):
            loss = engine(torch.from_numpy(rows).to(engine.device))
            engine.backward(loss)
            engine.step()                                              # updates after the last of the step
            losses.append(loss.detach())
        history.append(mean(losses))
        seconds.append(time.perf_counter() - begin)
        if rank.rank == 0:
            print(f"step {step + 1:>3}  loss {history[-1]:.4f}  {seconds[-1]:6.2f} s", flush=True)
    after = first_batch()
    if rank.rank == 0:
        print(f"the first batch, without an update and at the end: {before:.4f}, {after:.4f}")
    report(run, rank, engine, tensors, {"loss_nats_first": before, "loss_nats_last": after,
                                        "step_seconds_median": sorted(seconds)[len(seconds) // 2]}, history)
    dist.barrier()
    zero = deepspeed_memory.sections(deepspeed_config.read(path_of(settings)))[0]
    for section in ("offload_param", "offload_optimizer"):
        if folder := (zero.get(section) or {}).get("nvme_path"):
            for own in Path(folder).glob(f"zero_stage_3/*/rank{rank.rank}"):
                shutil.rmtree(own, ignore_errors=True)
    engine.destroy()


def report(run, rank, engine, tensors, measured, history):
    """Print and record what rank 0 holds between steps, beside what yardstick.deepspeed_memory predicts; collective."""
    config, accumulation = deepspeed_config.read(path_of(run.settings)), engine.gradient_accumulation_steps()
    rows, unnamed = ledger.held(engine)
    items = deepspeed_memory.memory(tensors, config, ranks=rank.world, rank=rank.rank, accumulation=accumulation)
    if config.get("zero_optimization", {}).get("zenflow"):              # that module does not know its buffers
        items = []
    counted, predicted = Counter(), Counter()
    for sums, held in ((counted, rows), (predicted, [item for item in items if item.moment == "always"])):
        for one in held:
            sums[f"{one.kind}_{one.place}"] += one.nbytes
    files = {row.name: row.nbytes for row in rows if row.place == "nvme"}
    others = sum(nbytes for _, _, nbytes in unnamed)
    if rank.rank == 0:
        print(f"\n{tensors.count:,} parameters; held by rank 0 of {rank.world} between steps, MB:\n\n  {'':24}{'counted':>9}{'predicted':>11}")
        for key in sorted({*counted, *predicted}):
            print(f"  {key.replace('_', ' on '):24}{counted[key] / 1e6:>9.2f}" + (f"{predicted[key] / 1e6:>11.2f}" if items else f"{'-':>11}"))
        print(f"  {'other tensors':24}{others / 1e6:>9.2f}\n")
        if files:
            print(f"{len(files)} swap files below {ledger.swap_folder(engine)}, the largest {max(files.values()) / 1e6:.2f} MB")
    run.record(rank, predicted={f"{key}_bytes": value for key, value in predicted.items()},
               measured={**measured, "parameters_count": tensors.count, "other_bytes": others,
                         **{f"{key}_bytes": value for key, value in counted.items()}},
               details={"loss": history, "files": files, "accumulation": accumulation, "engine": type(engine.optimizer).__name__,
                        "optimizer": type(getattr(engine.optimizer, "optimizer", engine.optimizer)).__name__})


if __name__ == "__mp_main__":
    program.worker(["cpu_adam"])                                       # the process that ZenFlow's overlap spawns
if __name__ == "__main__":
    program.main(__file__, CONFIG, train, check)
