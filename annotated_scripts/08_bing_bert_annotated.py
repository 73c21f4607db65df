"""Pre-trains a BERT in two phases with Adam, LAMB or 1-bit Adam, as a long job that is stopped and goes on.

What to learn here: a loop in which the boundary of accumulation decides what an iteration does, a learning rate set by
the program, batches made by a thread, checkpoints that carry what DeepSpeed does not keep, and how one's own optimizer
takes over the traffic: LAMB needs each layer whole, 1-bit Adam needs gradients that nobody has averaged.

    python annotated_scripts/08_bing_bert_annotated.py
    python annotated_scripts/08_bing_bert_annotated.py optimizer=onebit sends=momentum output=runs/bing

The last one, stopped and started again, goes on. No GPU is needed; with GPUs it runs on all. It shows losses, speeds,
bytes, and what 1-bit Adam promises: it is Adam while it warms up, then close to it for 1/32 of the bytes. Upstream's
deepspeed_train.py (600 lines), in
https://github.com/deepspeedai/DeepSpeedExamples/tree/45b4b7156c8794a3452a5a7d03dbd8d797068569/training/bing_bert
runs on GPUs only, in fp16; an error in its thread leaves the main thread waiting. More than 300 lines, because two
optimizers are written out. B sequences, T tokens, D hidden, V words, M predictions, P parameters, N ranks, C a share.

Proof:
    epochs_128=3 epochs_512=2 epoch_steps=12 hidden=32 layers=1
"""

import json
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from pathlib import Path
from types import SimpleNamespace
from zipfile import is_zipfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from yardstick import data, program, results
from yardstick.formulas import ring_bytes
from yardstick.settings import Choice, Either, SettingsError
from yardstick.traffic import Meter

import deepspeed
import numpy as np
import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from transformers import BertConfig, BertForPreTraining


# == 1. What can be set? (upstream 294-363) ==================================================================
CONFIG = {
    "optimizer": Choice("all", "adam", "lamb", "onebit"),            #| all: one after another, and compared
    "epochs_128": 3, "epochs_512": 2,                                #| phases by tokens; an epoch ends in a checkpoint
    "epoch_steps": 20, "accumulation": 2,                            #| steps of an epoch, micro-batches of a step
    "global_batch": 16,                                              #| sequences of a step; half as many at 512 tokens
    "layers": 2, "hidden": 64,                                       #| of the encoder; heads of 32, feed-forward 4 * D
    "learning_rate": Either(float), "weight_decay": 0.01,            #| highest, None: as in KINDS; of matrices only
    "warmup": 0.4,                                                   #| share of a phase: the rate rises, 1-bit waits
    "sends": Choice("update", "momentum"),                           #| what 1-bit Adam turns into signs: section 5
    "prefetch": 3, "seed": 1,                                        #| micro-batches a thread is ahead; weights, data
    "data": "embedded",                                              #| FILE,FOLDER or hub:NAME: two texts, one halved
    "output": Either(str), "record": Either(str),                    #| folder: a run there goes on; a record's label
}
FREE = {"optimizer", "prefetch", "output", "record"}                 #| may differ when a run goes on
CLS, SEP, MASK, PAD = range(data.VOCAB, data.VOCAB + 4)
V = data.VOCAB + 8                                                   #| four are unused: a multiple of 8 makes tiles
BLOCK = 2048                                                         #| 1-bit Adam: elements of a scale, 4 bytes to 256


def phases(s, at=0):                                                 #| what is left of the two after `at` steps
    first, found = 0, []
    for T, M, part in ((128, 20, 1), (512, 80, 2)):                  #| attention costs T * T: most steps are short, the
        n = s["epoch_steps"] * s[f"epochs_{T}"]                      #| long ones teach the far positions
        found.append(SimpleNamespace(
            T=T, M=M, batch=s["global_batch"] // part, first=first,
            end=first + n, warmup=max(1, round(s["warmup"] * n))))
        first += n
    return [p for p in found if p.end > max(at, p.first)]


# == 2. Who makes which batch, and when? (upstream data_worker.py 6-37, turing/dataset.py 252-390) ===========
def batches(s, phase, steps, rank, world):                           #| the micro-batches of a rank
    texts = [data.load(one).train for one in s["data"].split(",")]
    if len(texts) == 1:
        texts = np.split(texts[0], [len(texts[0]) // 2])
    sets = [data.Batches(text, phase.T, phase.batch, s["seed"])
            for text in texts]
    for step in steps:
        own, turn = divmod(step - phase.first, len(sets))            #| the sets in turn: in one step all ranks and
        for number, words in enumerate(sets[turn].step(              #| micro-batches read the same one
                own, rank, world, s["accumulation"])):
            yield pairs(words, phase.M, np.random.RandomState(       #| a batch is a function of its number: nothing of
                [s["seed"], step, number, rank]))                    #| thread and queue has to be saved


def pairs(words, M, draw):                                           #| [B, T] -> what Bert.forward takes
    (B, T), at = words.shape, np.arange(words.shape[1])
    apart = draw.randint(2, size=B)                                  #| 1: a row's second part does not follow the first
    ends = np.where(draw.rand(B, 1) < 0.1,
                    draw.randint(T // 4, T, (B, 1)), T)              #| else training never sees what padding is
    cut = (ends * draw.uniform(0.25, 0.75, (B, 1))).astype(int)
    other = words[(np.arange(B) + apart) % B]                        #| the same row goes on, or another one does
    special = [at == 0, at == cut, at >= ends, at == ends - 1]
    tokens = np.select(special, [CLS, SEP, PAD, SEP],
                       np.where(at > cut, other, words))
    order = draw.rand(B, T) + sum(special)                           #| an order in which special tokens come last
    places = order.argsort(1)[:, :M]                                 #| the cap: logits are B M V values, not B T V, and
    used = np.arange(M) < np.rint(0.15 * ends)                       #| as many in each batch
    hidden = np.take_along_axis(tokens, places, 1)
    fate, noise = draw.rand(B, M), draw.randint(CLS, size=(B, M))
    shown = np.select([~used | (fate > 0.9), fate < 0.8],            #| a tenth random, a tenth left: later use shows
                      [hidden, MASK], noise)                         #| no [MASK]
    np.put_along_axis(tokens, places, shown, 1)
    return [torch.from_numpy(part) for part in (
        tokens, ((at > cut) & (at < ends)).astype(int), ends[:, 0],
        places, np.where(used, hidden, -1), apart)]


def prefetched(items, ahead):                                        #| what an iterator yields, made by a thread
    with ThreadPoolExecutor(1) as thread:                            #| one, so in order. Leaving joins it, even when
        ready = deque(thread.submit(next, items, None)               #| the caller fails and closes us
                      for _ in range(ahead))                         #| the bound is memory: `ahead` batches, no more
        while (one := ready.popleft().result()) is not None:         #| an error of the thread is raised here; kept
            ready.append(thread.submit(next, items, None))           #| there, we would wait for ever
            yield one


# == 3. What does the model predict? (upstream nvidia/modelingpreln.py 559-656 and 1065-1157) ================
class Bert(BertForPreTraining):
    def forward(self, words, parts, ends, places, labels, apart):
        T = torch.arange(words.shape[1], device=words.device)
        x_BTD, pooled = self.bert(words, T < ends[:, None], parts,
                                  return_dict=False)
        x_BMD = x_BTD.gather(1, places[:, :, None].expand(
            -1, -1, x_BTD.shape[2]))                                 #| only M places meet V columns; these are tied to
        logits_BMV, pair = self.cls(x_BMD, pooled)                   #| the embedding: all words have gradients always
        masked = F.cross_entropy(logits_BMV.flatten(0, 1),
                                 labels.flatten(), ignore_index=-1)
        return masked + F.cross_entropy(pair, apart)


# == 4. LAMB: how far may a layer move in one step? (not upstream) ===========================================
class Lamb(torch.optim.AdamW):                                       #| You et al., arXiv 1904.00962. DeepSpeed's own is
    """AdamW whose step is, in a layer, as long as its weights."""   #| CUDA: ds:init.fused_lamb (read: not on a CPU)
    @torch.no_grad()
    def step(self, closure=None):
        old = [(p, p.clone(), group["lr"]) for group in
               self.param_groups for p in group["params"]]
        super().step()                                               #| by lr (Adam's update + decay p): LAMB's way
        for p, w, lr in old:
            way, size = w - p, w.norm()                              #| of a layer. With ZeRO p would be a share, cut
            trust = torch.where(                                     #| through layers; it asks for leave first:
                (size > 0) & (way.norm() > 0),                       #| ds:init.supported (read: not in stage 0)
                size * lr / way.norm(), 1.0).clamp(0.01, 0.3)        #| upstream's limits: a bias of zeros has no size
            p.copy_(w - trust * way)                                 #| moves lr times the layer's own size


# == 5. 1-bit Adam: what is left of 32 bits when the variance stands still? (not upstream) ===================
class OneBitAdam(torch.optim.AdamW):                                 #| Tang et al., arXiv 2102.02888
    """Adam for `warmup` steps, then signs and scales travel."""
    warmup, sends, errors = 1, "update", None
    @property
    def local(self):
        own = next(iter(self.state.values()), {"step": 0})           #| whether the next step wants this rank's own
        return own["step"] >= self.warmup                            #| gradients; from what a checkpoint brings back
    def freeze(self):
        N = dist.get_world_size()                                    #| of deepspeed.comm, which hands on to torch
        self.owners = [(p, self.state[p], group) for group in
                       self.param_groups for p in group["params"]]
        v = torch.cat([own["exp_avg_sq"].flatten()
                       for _, own, _ in self.owners])                #| alike on all ranks, made of averaged gradients
        C = -(-len(v) // (N * BLOCK)) * BLOCK                        #| a rank's share: whole blocks, the last is padded
        self.powers = 2 ** torch.arange(8, device=v.device).byte()
        self.seen = F.pad((v > 0).float(),                           #| 0 where no gradient was, as at positions past
                          (0, N * C - len(v))).view(N, C)            #| 128: a sign cannot say 0, and 0 would divide it
        v /= 1 - self.defaults["betas"][1] ** self.warmup
        self.deviation = v.sqrt() + self.defaults["eps"]
        self.unit = self.deviation if self.sends == "update" else 1
        self.errors = [torch.zeros_like(self.seen),                  #| 4 P bytes: what this rank's signs left untold
                       torch.zeros_like(self.seen[:1])]              #| 4 P / N: the same of the means it answers with
    def tell(self, a, error, seen):                                  #| a + error in few bytes; error: what they miss
        a = (a + error) * seen
        live = seen.view(len(a), -1, BLOCK).sum(2).clamp(min=1)
        scale = a.abs().view(len(a), -1, BLOCK).sum(2) / live        #| signs come out as large as what they say
        signs = ((a >= 0).view(len(a), -1, 8) * self.powers).sum(2)
        row = torch.cat([scale.view(torch.uint8), signs.byte()], 1)  #| eight signs in a byte
        error.copy_(a - self.hear(row, seen))                        #| untold now is told later: nothing is lost
        return row
    def hear(self, row, seen):
        cut = seen.shape[1] // BLOCK * 4
        scale = row[:, :cut].view(torch.float32)
        signs = (row[:, cut:, None] & self.powers) > 0
        signs = signs.view(*scale.shape, BLOCK) * 2.0 - 1.0
        return (signs * scale[:, :, None]).flatten(1) * seen
    def average(self, x):                                            #| x [P] -> the mean over ranks, as far as told
        rows = F.pad(x, (0, self.seen.numel() - len(x)))
        mine = self.seen[dist.get_rank():][:1]                       #| this rank serves the elements of its row
        row = self.tell(rows.view_as(self.seen),
                        self.errors[0], self.seen)
        parts = torch.empty_like(row)
        dist.all_to_all_single(parts, row)                           #| ds:comm.all_to_all; P / 8 bytes: each rank hears
        mean = self.hear(parts, mine).mean(0, keepdim=True)          #| what all tell of its share
        row = self.tell(mean, self.errors[1], mine)
        dist.all_gather_into_tensor(parts, row)                      #| ds:comm.all_gather; P / 8 more: the mean, told.
        return self.hear(parts, self.seen).flatten()[:len(x)]        #| An all-reduce: 4 P, twice. Each x (N - 1) / N
    @torch.no_grad()
    def step(self, closure=None):
        if not self.local:
            return super().step()                                    #| Adam to the bit, on averaged gradients
        if self.errors is None:
            self.freeze()
        x = torch.cat([own["exp_avg"].lerp(
            p.grad, 1 - group["betas"][0]).flatten()                 #| the common momentum, this rank's gradient
            for p, own, group in self.owners])
        x = self.average(x / self.unit) * self.unit                  #| over the deviation all elements are alike, and
        at = 0                                                       #| one scale fits a block; the paper sends x as it
        for p, own, group in self.owners:                            #| is, where a scale too large for a rare word is
            part = slice(at, at := at + p.numel())                   #| divided by that word's small deviation
            own["step"] += 1
            own["exp_avg"].copy_(x[part].view_as(p))
            u = (x[part] / self.deviation[part]).view_as(p)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(u, alpha=group["lr"] / (
                1 - group["betas"][0] ** own["step"].item()))


KINDS = {"adam": (torch.optim.AdamW, 1e-3), "lamb": (Lamb, 2e-2),    #| with their rates; LAMB's is a share of a layer's
         "onebit": (OneBitAdam, 1e-3)}                               #| own size


# == 6. What changes hands in initialize? (upstream 366-496) =================================================
def build(job, phase):
    s = job.s
    torch.manual_seed(s["seed"])
    model = Bert(BertConfig(
        vocab_size=V, pad_token_id=PAD, hidden_size=s["hidden"],     #| padding is 0 by default: a word never learnt
        num_hidden_layers=s["layers"],
        num_attention_heads=s["hidden"] // 32,
        intermediate_size=4 * s["hidden"], hidden_dropout_prob=0.0,  #| no dropout: a checkpoint would owe its random
        attention_probs_dropout_prob=0.0))                           #| state, and the optimizers would differ by luck
    groups = [{"params": [p for p in model.parameters()
                          if (p.ndim > 1) == decays],                #| biases and norms do not: decay pulls to 0, where
               "weight_decay": s["weight_decay"] * decays}           #| a norm's factor does not belong
              for decays in (True, False)]
    kind, rate = KINDS[job.name]
    job.peak = s["learning_rate"] or rate
    own = job.optimizer = kind(groups, lr=0.0, eps=1e-6)             #| the loop sets the rate before each step
    own.warmup, own.sends = phase.warmup, s["sends"]
    job.engine, _, _, _ = deepspeed.initialize(                      #| ds:init.initialize reads a dict, ds:config.load,
        model=model, optimizer=own,                                  #| and refuses removed features, ds:config.removed.
        config={                                                     #| Rank 0's weights go to all: ds:init.broadcast
            "train_batch_size": phase.batch,                         #| The micro-batch follows: ds:config.batch
            "gradient_accumulation_steps": s["accumulation"],        #| Nothing wraps our optimizer in fp32:
            "gradient_clipping": 0.0,                                #| ds:init.optimizer_check. Unsaid it clips at 1.0,
            "zero_optimization": {"stage": 0}})                      #| ds:config.clipping, by the mean of local norms


# == 7. What must a checkpoint hold, and what does it bring back? (upstream 35-69 and 499-540) ===============
def save(job):
    tag = job.folder / f"step{job.done['step']:06d}"
    if job.name == "onebit":
        tag.mkdir(parents=True, exist_ok=True)                       #| ours first, as rank 0 ends by writing `latest`
        torch.save(job.optimizer.errors, tag / job.errors)           #| one a rank; DeepSpeed saves one rank's optimizer
    job.engine.save_checkpoint(str(job.folder), tag=tag.name,        #| in stage 0, ds:ckpt.save_model, and our counts;
                               client_state=job.done)                #| all ranks must call: ds:ckpt.save


def load(job, phase, at):
    tag, same = job.folder / f"step{at:06d}", at > phase.first
    _, client = job.engine.load_checkpoint(                          #| ds:ckpt.load; ds:ckpt.load_model brings weights,
        str(job.folder), tag=tag.name, load_optimizer_states=same)   #| counters; moments within a phase: what short
    job.done = {key: client[key] for key in job.done}                #| rows left says little of long ones
    if same and (errors := job.name == "onebit" and torch.load(
            tag / job.errors, job.engine.device)):
        job.optimizer.freeze()
        job.optimizer.errors = errors


def reached(run, name):
    latest, tag = run.folder / name / "latest", "step000000"
    if latest.is_file():
        tag = latest.read_text(errors="replace").strip()
        files = (latest.parent / tag).glob("*.pt")                   #| zips: one cut short lacks the table at its end
        if sum(map(is_zipfile, files)) < 1 + run.world * (
                name == "onebit") or not tag[4:].isdecimal():
            raise SettingsError(
                f"{latest.parent}/{tag} cannot be read: write an "
                "earlier tag into latest or give another output=")
    return int(tag[4:])


# == 8. What does an iteration do, and when? (upstream 132-291 and 543-600) ==================================
def pretrain(job, phase, stream):                                    #| stream: batches, which end with the phase
    s, engine, done, losses = job.s, job.engine, job.done, [0.0]
    begun, T = time.perf_counter(), phase.T
    for batch in stream:
        local = getattr(job.optimizer, "local", False)
        job.meter.phase = "signs" if local else "whole"
        batch = [part.to(engine.device) for part in batch]
        loss = engine(*batch)                                        #| ds:engine.forward, ds:engine.output_hooks
        with engine.no_sync() if local else nullcontext():           #| ds:engine.no_sync (stages 0, 1): nothing is sent
            engine.backward(loss)                                    #| ds:engine.backward; else ds:engine.reduce_bucket
        losses[-1] += loss.detach() / s["accumulation"]              #| sends 4 P bytes, flat, in a step's last backward
        if engine.is_gradient_accumulation_boundary():               #| ds:engine.boundary: will step() act, or count?
            up = (done["step"] + 1 - phase.first) / phase.warmup
            down = (phase.end - done["step"]) / (
                phase.end - phase.first - phase.warmup + 1)
            for group in job.optimizer.param_groups:                 #| no schedule in the config: nobody else writes it
                group["lr"] = job.peak * min(up, down)
            done["step"] += 1
            done["samples"] += phase.batch                           #| trained, not made: the thread is ahead
            job.steps[job.meter.phase] += 1
            losses.append(0.0)
        engine.step()                                                #| ds:engine.step counts, ds:engine.update acts
        if len(losses) > s["epoch_steps"]:
            job.meter.phase = ""
            done["epoch"] += 1
            means = torch.stack(losses[:-1]) / job.rank.world
            dist.all_reduce(means)                                   #| ds:comm.all_reduce, once an epoch
            job.losses += means.tolist()
            if not means.isfinite().all():
                raise SystemExit("the loss is no number any more. "
                                 "Give a lower learning_rate=.")
            seconds = time.perf_counter() - begun                    #| the wait for data counts, unlike in the engine's
            speed = len(means) * phase.batch / seconds               #| log, ds:observe.throughput (read: stops in step)
            job.facts[f"{job.name}_{T}_samples_per_second"] = speed
            if job.rank.rank == 0:
                print(job.name, done, f"loss {means.mean():.4f}",
                      f"samples/s {speed:.4g} tokens/s "
                      f"{speed * T:.5g}", file=sys.stderr)
            save(job)
            begun, losses = time.perf_counter(), [0.0]


# == 9. What is refused, and is each optimizer what it says? (not upstream) ==================================
def check(run):
    s, file = run.settings, run.folder / "settings.json"
    now = {**s, "ranks": run.world}                                  #| other ranks would lack the errors of these
    try:
        kept = {**now, **json.loads(
            file.read_text() if file.is_file() else "{}")}
    except (ValueError, TypeError):
        raise SettingsError(f"{file} is broken: change output=.")
    other = [f"{key}={kept.get(key)}" for key in now
             if key not in FREE and kept.get(key) != now[key]]
    least, name = min((s[key], key) for key in (
        "epoch_steps", "accumulation", "layers", "prefetch"))
    rows = 4 * run.world * max(1, s["accumulation"])
    rate = 1 if s["learning_rate"] is None else s["learning_rate"]
    for wrong, text in (
            (other, f"give {' '.join(other)} or another output=."),
            (least < 1, f"{name}={least} must be 1 or more."),
            (s["global_batch"] < 1 or s["global_batch"] % rows,
             f"global_batch={s['global_batch']} is no multiple of "
             f"{rows} = 4 x ranks x accumulation."),                 #| two rows at least: one is the other's stranger
            (s["hidden"] < 32 or s["hidden"] % 32,
             f"hidden={s['hidden']} is no multiple of 32."),
            (not 0 < s["warmup"] < 1,
             f"warmup={s['warmup']} is not between 0 and 1."),
            (rate <= 0 or s["weight_decay"] < 0,
             "give learning_rate above 0, weight_decay 0 or more"),
            (not phases(s) or phases(s)[0].first < 0,
             "give epochs_128=3 or epochs_512=2, none below 0.")):
        if wrong:
            raise SettingsError(text)
    for phase in phases(s):
        next(batches(s, phase, [phase.first], 0, run.world))
    for name in KINDS:
        s["optimizer"] in ("all", name) and reached(run, name)


def train(run):
    meter, predicted = Meter().install(), {}                         #| it counts where DeepSpeed calls torch
    rank, s, measured, loss = run.join(), run.settings, {}, {}       #| ds:init.process_group
    me, N, meter.counting = rank.rank, rank.world, True
    if me == 0:
        results.replace_file(run.folder / "settings.json",
                             json.dumps({**s, "ranks": N}))
    for name in [*KINDS] if s["optimizer"] == "all" else [
            s["optimizer"]]:
        meter.clear()
        job = SimpleNamespace(
            s=s, rank=rank, meter=meter, name=name, losses=[],
            folder=run.folder / name, errors=f"errors{me}.pt",
            facts=measured, steps=Counter(),
            done={"epoch": 0, "step": 0, "samples": 0})
        at = reached(run, name)
        for phase in phases(s, at):
            build(job, phase)                                        #| another batch, so another engine
            if at:
                load(job, phase, at)
            made = batches(s, phase, range(at, phase.end), me, N)
            with closing(prefetched(made, s["prefetch"])) as ready:
                pretrain(job, phase, ready)
            at = phase.end
            job.engine.destroy()                                     #| ds:engine.destroy
        if not job.losses:
            continue
        for kind, steps in job.steps.items():
            measured[f"{name}_{kind}_bytes"] = sum(
                x["ring_bytes"] for x in meter.per_step(steps, N)
                if x["phase"] == kind)                               #| all that was sent between two batches
        curve = loss[name] = np.array(job.losses)
        measured[f"{name}_loss_nats_first"] = curve[0]
        measured[f"{name}_loss_nats_last"] = curve[-10:].mean()
        P = sum(p.numel() for p in job.engine.parameters())
        row = N * -(-P // (N * BLOCK)) * (BLOCK // 8 + 4)
        predicted = {
            "whole_bytes": ring_bytes("all_reduce", 4 * P, N),
            "signs_bytes": 2 * ring_bytes("all_gather", row, N)}
    if [*map(len, loss.values())] == 3 * [phases(s)[-1].end]:
        gap = loss["onebit"] - loss["adam"]
        measured["onebit_warmup_gap_nats_max"] = abs(
            gap[:phases(s)[0].warmup]).max()
        measured["onebit_last_gap_nats_mean"] = gap[-10:].mean()
    if me == 0:
        print("\n".join(f"{value:<12.6g} {key}" for key, value in (
            measured | predicted).items()) or "all steps are done")
    if measured:
        run.record(rank, measured, predicted, None, {"loss": loss})


if __name__ == "__main__":
    program.main(__file__, CONFIG, train, check)
