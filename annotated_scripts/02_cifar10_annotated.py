"""Classifies CIFAR-10 images with a convolutional network whose upper layers are mixtures of experts, or plain ones.

What to learn here: where experts live and which ranks average what (expert parallelism), what a gate drops and why,
what the exchange of tokens costs in bytes, why ZeRO has to know of experts, how accuracy is added up over ranks.

    python annotated_scripts/02_cifar10_annotated.py
    python annotated_scripts/02_cifar10_annotated.py experts=4,8 top_k=2 noise=RSample precision=bf16 stage=1
    python annotated_scripts/02_cifar10_annotated.py experts=0,0 stage=3
    python annotated_scripts/02_cifar10_annotated.py images=cifar-10-batches-bin steps=2000 micro_batch=128

No GPU is needed; with GPUs the same program runs on all of them, in fp16 too. It draws images of ten classes unless
`images` names a folder with the real set. The default is PR-MoE (arXiv 2201.05596): layers with unequal numbers of
experts, each beside a plain MLP. It trains the first steps twice, with a set of experts on every rank and with one set
over all ranks, and ends with the accuracy of each class and a table of formulas beside what DeepSpeed did.

Shapes: B images of a micro-batch, T places of the feature map (the tokens), S = B * T, D hidden, E experts of a layer,
C places in an expert's buffer, K experts that a token asks, N ranks. More than 300 lines, because it holds both kinds
of network, the config of all precisions and stages, and the counts of what gates and exchanges do.

Upstream is cifar10_deepspeed.py (402 lines) in
https://github.com/deepspeedai/DeepSpeedExamples/tree/45b4b7156c8794a3452a5a7d03dbd8d797068569/training/cifar
Ours differs where it goes wrong or no longer runs: fp16 by default, a torchvision that does not install beside a CPU
torch, an auxiliary loss that is thrown away, one expert object for all layers (their residual MLPs are one), every
epoch in the same order, an accuracy that each rank counts for itself and that fails where the last batch is not full.

Proof:
    stage=2 steps=8 compare=6 images_made=128 micro_batch=8 hidden=16 clip=0.05 capacity_factor=0.8 noise=RSample
    stage=0 steps=4 compare=4 images_made=128 micro_batch=8 hidden=16 clip=0.05 experts=2 residual=False
    stage=1 steps=3 compare=3 images_made=128 micro_batch=8 hidden=16 experts=4 top_k=2 noise=Jitter precision=bf16
    stage=3 steps=3 images_made=128 micro_batch=8 hidden=16 experts=0,0
    stage=0 steps=2 compare=0 images_made=128 micro_batch=8 hidden=16 experts=2 residual=False precision=bf16
"""

import math
import sys
from contextlib import redirect_stdout
from io import StringIO
from itertools import count, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from yardstick import formulas, images, program
from yardstick.settings import Choice, Either, SettingsError
from yardstick.traffic import Meter

import deepspeed
import numpy as np
import torch
import torch.nn.functional as F
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import (
    is_moe_param,
    split_params_into_different_moe_groups_for_optimizer as split)
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.utils import safe_get_full_grad
from torch import nn
from torch.utils.data import TensorDataset

# == 1. What can be set? (upstream 14-108) ==============================================================
CONFIG = {
    "stage": Choice("2", "0", "1", "3"),                             #| of ZeRO; the last only without experts
    "precision": Choice("fp32", "bf16", "fp16"),                     #| of a device that has it
    "experts": "2,4",                                                #| of each layer; 0: a plain MLP in its place
    "expert_parallel": Either(int),                                  #| ranks that share a set; None: the most possible
    "top_k": 1,                                                      #| experts that a token asks
    "residual": True,                                                #| a plain MLP beside the experts of a layer
    "noise": Choice("None", "Jitter", "RSample"),                    #| of a gate: none, on its input, on its choice
    "capacity_factor": 1.25,                                         #| places of an expert, in mean shares of tokens
    "min_capacity": 4,                                               #| places of an expert, at least
    "auxiliary": 0.01,                                               #| weight of the loss that evens experts out
    "hidden": 64,                                                    #| channels of the feature map
    "steps": 80,                                                     #| updates
    "micro_batch": 32,                                               #| images of a step on one rank
    "learning_rate": 2e-3,                                           #| after the warm-up
    "warmup_steps": 10,                                              #| updates of the rise to it
    "clip": 1.0,                                                     #| largest norm of the whole gradient; 0: none
    "compare": 6,                                                    #| updates made first with a set on every rank
    "images": Either(str),                                           #| folder of the real set; None: drawn
    "images_made": 2048,                                             #| drawn to train with; a quarter of it for tests
    "seed": 1,                                                       #| of weights, images, order and gates
    "record": Either(str),                                           #| LABEL: keep the record under results/LABEL/
    "output": Either(str),                                           #| folder of the run; None: a new one in runs/
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16,
          "fp16": torch.float16}
GRID = 4                                                             #| places of the feature map along a side

# == 2. What is the network, and where do its experts live? (upstream 166-209) =========================
class Mlp(nn.Sequential):
    def __init__(self, D):
        super().__init__(nn.Linear(D, 2 * D), nn.GELU(),
                         nn.Linear(2 * D, D))

class Network(nn.Module):
    """Convolutions, residual layers over their map, its mean."""

    def __init__(self, s, ep, ep_rank):
        super().__init__()
        D, self.dtype = s["hidden"], DTYPES[s["precision"]]
        self.stem = nn.Sequential()
        for inputs, outputs in (3, D // 2), (D // 2, D), (D, D):
            self.stem.extend([
                nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
                nn.GroupNorm(1, outputs), nn.GELU()])                #| BatchNorm: each rank's own images' statistics
        self.layers = nn.ModuleList(Mlp(D) if E == 0 else MoE(       #| ds:moe.layer, ds:moe.copies: E / ep experts are
            D, Mlp(D), E, ep, s["top_k"],                            #| copies of the MLP; itself it is the residual
            capacity_factor=s["capacity_factor"],                    #| branch. Given to two layers, it is one branch
            eval_capacity_factor=2 * s["capacity_factor"],           #| in both
            min_capacity=s["min_capacity"],
            use_residual=s["residual"],                              #| the two are mixed by learned weights
            noisy_gate_policy=s["noise"],
            drop_tokens=True,                                        #| False: C is the fullest one's, by an all-reduce
            use_rts=True,                                            #| top-1 draws who stays; else the first do
            top2_2nd_expert_sampling=s["noise"] == "RSample"         #| always True, evaluation has noise too
        ) for E in counts_of(s))
        self.norms = nn.ModuleList(
            nn.LayerNorm(D) for _ in self.layers)
        self.head = nn.Linear(D, len(images.CLASSES))
        for number, layer in enumerate(self.layers, 1):
            own = [] if isinstance(layer, Mlp) else list(
                layer.deepspeed_moe.experts.deepspeed_experts)
            for index, one in enumerate(own, ep_rank * len(own)):    #| its number in the layer, whatever ep is: so
                torch.manual_seed(s["seed"] + number * 999 + index)  #| any ep draws one network. Else all experts,
                one[0].reset_parameters()                            #| here and on other ranks, begin as copies
                one[2].reset_parameters()

    def forward(self, pixels):
        pixels = pixels.to(self.dtype) / 127.5 - 1                   #| the engine casts weights, the caller inputs
        x_BTD = self.stem(pixels).flatten(2).transpose(1, 2)
        auxiliary = torch.zeros((), device=pixels.device)
        for norm, layer in zip(self.norms, self.layers):
            out = layer(norm(x_BTD))                                 #| ds:moe.forward, ds:moe.route. ds:moe.gate scores
                                                                     #| in fp32; ds:moe.top1 or ds:moe.top2 choose, with
                                                                     #| ds:moe.jitter or ds:moe.gumbel; ds:moe.capacity
                                                                     #| is C, ds:moe.slots drops the rest, ds:moe.pack
                                                                     #| fills [E, C, D], ds:moe.exchange sends it, full
                                                                     #| or not, to ds:moe.experts and ds:moe.unpack
            if isinstance(layer, MoE):
                out, uneven, _ = out                                 #| least where all experts have equal shares
                auxiliary = auxiliary + uneven
            x_BTD = x_BTD + out                                      #| out is 0, or the branch, of a dropped token
        return self.head(x_BTD.mean(1)), auxiliary

# == 3. Hand it over: who averages which gradients, by which config? (upstream 111-163, 316-343) =======
def start(run, rank, ep):
    """The engine, the batches of this rank, the schedule."""
    s, (train, _) = run.settings, run.sets
    torch.manual_seed(s["seed"])
    network = Network(s, ep, rank.rank % ep)                         #| ranks 0 to ep - 1 hold one set, the next ep one
    groups = split(
        {"params": list(network.parameters()), "name": "all"})       #| ds:moe.split_groups; without a name: KeyError
    engine, _, loader, schedule = deepspeed.initialize(              #| ds:init.initialize, ds:init.engine
        model=network,                                               #| ds:init.model, ds:init.broadcast: an expert to
        model_parameters=groups,                                     #| its holders: ds:moe.groups, ds:moe.make_groups
        training_data=TensorDataset(*train),                         #| ds:init.loader, ds:init.sampler: 1/N per rank
        config={                                                     #| ds:config.load, ds:config.read: other keys pass
            "train_micro_batch_size_per_gpu": s["micro_batch"],
            "gradient_accumulation_steps": 1,                        #| ds:config.batch: times N, the global batch
            "gradient_clipping": s["clip"],                          #| ds:config.clipping; left out, it is not 0
            "prescale_gradients": False,                             #| ds:config.prescale: True divides before the sum
            "dataloader_drop_last": True,                            #| ds:config.drop_last; else the last S is smaller
            "log_level": "error",                                    #| ds:config.log_level; else ds:init.warmup warns
                                                                     #| that no rate is set yet
            "optimizer": {"type": "Adam", "params": {                #| ds:moe.param_groups: splits, unless we have
                "lr": s["learning_rate"], "eps": 1e-8,
                "betas": [0.9, 0.999], "weight_decay": 0.0,
                "torch_adam": True,                                  #| ds:init.adam_kind; else a kernel is compiled
                "adam_w_mode": True}},                               #| the default: Adam by name, AdamW by nature
            "scheduler": {"type": "WarmupLR", "params": {            #| ds:init.schedule
                "warmup_min_lr": 0.0,
                "warmup_max_lr": s["learning_rate"],
                "warmup_num_steps": s["warmup_steps"],
                "warmup_type": "log"}},                              #| the default: steep at first
            "bf16": {"enabled": s["precision"] == "bf16"},
            "fp16": {"enabled": s["precision"] == "fp16",
                     "loss_scale": 0, "initial_scale_power": 15,     #| 0: by ds:engine.fp16_scale (read: fp16 only)
                     "loss_scale_window": 500, "hysteresis": 2,
                     "min_loss_scale": 1},
            "zero_optimization": {
                "stage": int(s["stage"]),                            #| ds:init.zero_optimizer; with 3, ds:moe.refused
                                                                     #| looks for experts
                "reduce_scatter": True,                              #| ds:moe.zero wants these two, and cuts experts
                "contiguous_gradients": True,                        #| over their holders only
                "overlap_comm": True,                                #| a second bucket fills while one is reduced
                "reduce_bucket_size": 5_000_000,                     #| elements
                "allgather_bucket_size": 5_000_000}})
    torch.manual_seed(s["seed"] + 1 + rank.rank)                     #| of gates: by rank, not by ep
    engine.train()                                                   #| gates: noise, and the tighter capacity
    return engine, endless(loader), schedule

def endless(loader):
    for epoch in count():
        loader.data_sampler.set_epoch(epoch)                         #| DeepSpeed never does: each epoch in one order
        yield from loader                                            #| ds:init.workers: two new processes per rank

# == 4. A step: what travels, and what do the gates drop? (upstream 345-392) ===========================
def fit(run, rank, meter, ep, steps, watched):
    """Train -> the engine, and what was seen."""
    s = run.settings
    with redirect_stdout(StringIO()):                                #| each rank tells of the groups that it makes
        engine, batches, schedule = start(run, rank, ep)
    gates = watch_gates(engine.module)
    losses, rates, both = [], [], []
    meter.clear()
    meter.counting = True
    batches = islice(batches, steps)
    for step, (pixels, labels) in enumerate(batches, 1):
        rates.append(schedule.get_last_lr()[0])                      #| of the coming update, set by the last step
        logits, uneven = engine(pixels.to(engine.device))            #| ds:engine.forward; ds:zero3.fetch in stage 3
        labels = labels.to(engine.device)
        loss = F.cross_entropy(logits.float(), labels)
        engine.backward(loss + s["auxiliary"] * uneven)              #| ds:engine.backward; ds:moe.exchange_back sends
                                                                     #| as much again. Then dense gradients are summed
                                                                     #| over N ranks, an expert's over its holders, all
                                                                     #| divided by N: ds:zero12.average, ds:zero3.hook,
                                                                     #| or ds:moe.reduce_plain without ZeRO
        if step == watched and s["precision"] != "fp16":             #| there the loss scale is in them
            both = norms(engine, ep, rank)
        engine.step()                                                #| ds:engine.step, ds:engine.update:
                                                                     #| ds:zero12.norm, ds:moe.norms, ds:zero12.clip and
                                                                     #| ds:zero12.gather; in stage 0 ds:engine.clip or
                                                                     #| ds:engine.unfused_step in 16 bits. Next rate by
                                                                     #| ds:init.linear_warmup
        given = engine.get_global_grad_norm()                        #| stage 0: None in fp32; in 16 bits, no experts
        if both and given and step == watched:
            both[1] = float(given)
        mean = over_ranks(loss.detach() / rank.world).item()
        if not math.isfinite(mean):                                  #| alike on all ranks, so all end here
            sys.exit("the loss is no number any more: lower the "
                     "learning_rate" if rank.rank == 0 else 1)
        losses.append(mean)
        if rank.rank == 0 and step % min(20, -(-steps // 5)) == 0:
            print(f"expert parallel {ep}, step {step} of {steps}: "
                  f"loss {mean:.4f}", file=sys.stderr)
    meter.counting = False
    sent = sum(row[2] * calls for row, calls in meter.rows.items()
               if row[1] == "all_to_all")
    experts = sum(p.numel() for p in engine.module.parameters()
                  if is_moe_param(p))                                #| looks at a mark that copying an expert made
    return engine, {
        "losses": losses, "rates": rates, "gates": gates,
        "norms": both, "bytes": sent, "experts": experts}

def watch_gates(network):
    """Of each gate, by step: C, choices dropped, those over C."""
    def look(gate, _, out):
        C, choices_KS, counts_E = out[1], out[3], out[6]             #| counts are from before the dropping; a choice
        if gate.training:                                            #| that was dropped is negative
            over = (counts_E - C).clamp(min=0).sum()
            gate.seen.append(
                [int(C), int((choices_KS < 0).sum()), int(over)])
    gates = [layer.deepspeed_moe.gate for layer in network.layers
             if isinstance(layer, MoE)]
    for gate in gates:
        gate.seen = []
        gate.register_forward_hook(look)
    return [gate.seen for gate in gates]

def norms(engine, ep, rank):
    """[the norm of the whole gradient, stage 0's in fp32]."""
    squares = torch.zeros(2, device=engine.device)
    for p in engine.module.parameters():                             #| on all ranks in one order: each gradient is put
        gradient = safe_get_full_grad(p).float()                     #| together by a collective, ds:access.gradient
        is_expert = is_moe_param(p)                                  #| marked so by DeepSpeed, or not
        squares[int(is_expert)] += gradient.square().sum()
    dense, experts = (over_ranks(squares) / rank.world).tolist()
    both = [math.sqrt(dense + ep * experts), 0.0]                    #| each expert is on 1 / ep of the ranks
    if engine.zero_optimization_stage() == 0:                        #| else DeepSpeed says its own after the step
        both[1] = float(clip_grad_norm_(                             #| ds:engine.clip_norm: a mean over ranks of norms
            engine.module.parameters(), math.inf))                   #| with the own experts only, below the whole
    return both

def over_ranks(tensor):
    comm.all_reduce(tensor)                                          #| a sum, in place: ds:comm.all_reduce
    return tensor

# == 5. Which classes does it know? (upstream 212-277) =================================================
def evaluate(engine, run, rank):
    """[[right], [all]] images of each class, over all ranks."""
    _, (pixels, labels) = run.sets
    B, classes = run.settings["micro_batch"], len(images.CLASSES)
    counted = torch.zeros(2, classes, device=engine.device)
    engine.eval()                                                    #| gates: no noise, the wider capacity
    with torch.no_grad():
        for first in range(0, len(labels), B * rank.world):
            places = first + rank.rank * B + torch.arange(B)
            own, rows = places < len(labels), places % len(labels)   #| past the end a rank takes images once more, and
            logits, _ = engine(pixels[rows].to(engine.device))       #| does not count them: with fewer or smaller
            truth, best = labels[rows], logits.argmax(1).cpu()       #| forwards the others' all-to-all waits or fails
            for row, it in enumerate((own & (truth == best), own)):
                counted[row] += torch.bincount(
                    truth[it], minlength=classes).to(counted)
    return over_ranks(counted).tolist()                              #| counts; a mean of ranks' means weighs wrongly

# == 6. Both trainings, and what expert parallelism costs (upstream 280-314, 394-402) ==================
def train(run):
    s, ep, steps = run.settings, run.ep, run.settings["steps"]
    meter = Meter().install()                                        #| before DeepSpeed looks torch's collectives up
    rank = run.join()                                                #| ds:init.process_group
    compare = min(s["compare"], steps) if ep > 1 else 0
    watched = compare or steps
    if compare:
        engine, alone = fit(run, rank, meter, 1, compare, watched)
        engine.destroy()                                             #| ds:engine.destroy lets go of its buffers
    engine, seen = fit(run, rank, meter, ep, steps, watched)
    right, number = evaluate(engine, run, rank)
    losses, accuracy = seen["losses"], sum(right) / sum(number)

    rows = {"idle_steps": (min(2, steps), seen["rates"].count(0))}   #| rate 0 before the schedule's step; at it, log 1
    exchanged = 0
    layers = enumerate(zip(run.experts, seen["gates"]), 1)
    for n, (E, gates) in layers:
        share = np.float32(s["micro_batch"] * GRID**2 / E)
        factor = np.float32(s["capacity_factor"] * s["top_k"])
        C = max(s["min_capacity"], math.ceil(share * factor))
        exchanged += E * C * s["hidden"]
        sums = torch.tensor(gates, device=engine.device).sum(0)
        both = over_ranks(sums).tolist()[1:]
        rows[f"layer_{n}_capacity_tokens"] = C, gates[-1][0]
        rows[f"layer_{n}_dropped_tokens"] = both[::-1]
    if seen["norms"]:
        rows["gradient_norm"] = seen["norms"]
    if compare:
        exchanged *= 4 * DTYPES[s["precision"]].itemsize             #| there and back, in forward and in backward
        rows["sent_per_step_bytes"] = [
            formulas.ring_bytes("all_to_all", payload, ep)           #| 1 / ep of a buffer stays on its rank
            for payload in (exchanged, seen["bytes"] / steps)]
        held = alone["experts"] // ep, seen["experts"]
        apart = max(abs(a - b) for a, b in                           #| summed in another order, no more; in 16 bits
                    zip(alone["losses"], losses))                    #| each rank's part is rounded before it is added
        rows |= {"expert_parameters": held,
                 "loss_difference_nats_max": (0.0, apart)}
    if rank.rank == 0:
        print(f"stage {s['stage']}, {s['precision']}, ranks "
              f"{run.world}, experts {s['experts']}, expert "
              f"parallel {ep}: loss {losses[0]:.4f} -> "
              f"{losses[-1]:.4f}, accuracy {accuracy:.3f}")
        for name, good, of in zip(images.CLASSES, right, number):
            print(f"  {name:<12}{good:5.0f} of {of:.0f}")
        print(f"{'':<32}{'formula':>14}{'DeepSpeed':>14}")
        for key, (formula, found) in rows.items():
            print(f"{key.replace('_', ' '):<32}"
                  f"{formula:>14,.7g}{found:>14,.7g}")
    measured = {key: row[1] for key, row in rows.items()} | {
        "loss_nats_first": losses[0], "loss_nats_last": losses[-1],
        "accuracy_fraction": accuracy}
    run.record(
        rank, measured, {key: row[0] for key, row in rows.items()},
        details={**seen, "right": right, "images": number})

# == 7. What can be wrong before a rank starts? (not upstream) =========================================
def counts_of(s):
    words = s["experts"].split(",")
    if not all(word.isdecimal() for word in words):
        raise SettingsError(
            f"experts={s['experts']} is not one number per layer. "
            "Give experts=2,4, or experts=0,0.")
    return [int(word) for word in words]

def check(run):
    s, world = run.settings, run.world
    given = f"experts={s['experts']}"
    for low, high, keys in (                                         #| what is larger fills a machine's memory
            (0, 10**9, "clip compare min_capacity auxiliary seed"),
            (0, 100, "capacity_factor"), (2, 1024, "hidden"),
            (1, 10**6, "steps warmup_steps expert_parallel top_k"),
            (1, 20_000, "images_made"), (1, 1000, "micro_batch")):
        for key in keys.split():
            if s[key] is not None and not low <= s[key] <= high:
                raise SettingsError(f"{key}={s[key]} is no number "
                                    f"from {low} to {high}.")
    run.experts = [E for E in counts_of(s) if E]
    held = sum(E + 1 for E in counts_of(s))                          #| MLPs of a rank, where it holds all
    most = math.gcd(world, *run.experts) if run.experts else 1
    run.ep = s["expert_parallel"] or most
    sets = images.load(s["images"], s["images_made"], s["seed"])
    run.sets = [tuple(map(torch.from_numpy, one)) for one in sets]
    S, made = s["micro_batch"] * GRID**2, len(run.sets[0][1])
    usable = get_accelerator().supported_dtypes()                    #| fp16 on a processor: where oneDNN has it
    for is_wrong, text in (
            (held > 1000 or held * s["hidden"]**2 > 25_000_000,      #| of an MLP 4 D D weights
             f"{given} with hidden={s['hidden']} are too many "
             "weights. Give experts=2,4 hidden=64."),
            (run.experts and s["stage"] == "3",                      #| DeepSpeed would raise on every rank
             f"stage=3 with {given}: DeepSpeed refuses experts in "
             "ZeRO-3. Give stage=2, or experts=0,0."),
            (most % run.ep,
             f"expert_parallel={run.ep} does not divide {world} "
             f"ranks and {given}. Give expert_parallel={most}."),
            (s["top_k"] > min(run.experts, default=s["top_k"]),
             f"top_k={s['top_k']} is more than a layer of {given} "
             "has. Give top_k=1."),
            (run.experts and S * max(S * s["capacity_factor"]        #| elements of a gate's masks [S, E, C]
             * s["top_k"], held * s["min_capacity"]) > 10**8,
             f"micro_batch={s['micro_batch']} with these experts "
             "makes masks too large. Give micro_batch=32."),
            (s["noise"] == "RSample" and s["top_k"] > 2,
             "noise=RSample does nothing for a top_k above 2. "
             "Give noise=Jitter."),
            (run.experts and s["min_capacity"] > S,
             f"min_capacity={s['min_capacity']} is more than the "
             f"{S} tokens of a micro-batch. Give min_capacity=4."),
            (DTYPES[s["precision"]] not in usable,
             f"precision={s['precision']}: this device does not "
             "compute in it. Give precision=fp32."),
            (made < s["micro_batch"] * world,
             f"{made} images are too few for micro_batch="
             f"{s['micro_batch']} on {world} ranks. Give less.")):
        if is_wrong:
            raise SettingsError(text)

if __name__ == "__main__":
    program.main(__file__, CONFIG, train, check)
