"""Pre-trains a BERT from scratch by masked language modelling, with every stage of ZeRO, and resumes it.

What to learn here: what a program hands to DeepSpeed (a config, `initialize`, `backward`, `step`, checkpoints), what
each of these lines runs in the library at each stage, and what a resumed run needs beside the weights.

    python annotated_scripts/01_hello_deepspeed_annotated.py
    python annotated_scripts/01_hello_deepspeed_annotated.py stage=0,1,2,3 steps=20 save_every=10
    python annotated_scripts/01_hello_deepspeed_annotated.py stage=3 dtype=bf16 offload=True output=runs/bert
    python annotated_scripts/01_hello_deepspeed_annotated.py resume=runs/bert steps=120

No GPU is needed; with GPUs the same program runs on all of them. It ends with a table: the loss, how far the losses of
a resumed run and of each stage lie from those of the whole run and the first stage, and the FLOPs of a forward pass by
formula and by DeepSpeed's profiler. `tensorboard --logdir runs` shows the curves.

Upstream is train_bert_ds.py (863 lines) in
https://github.com/deepspeedai/DeepSpeedExamples/tree/45b4b7156c8794a3452a5a7d03dbd8d797068569/training/HelloDeepSpeed
What it pins no longer installs beside a present torch. Ours differs where it goes wrong: there all ranks draw the same
batches, each rank names the folder of checkpoints by its own clock, the last checkpoint counts a step that was not
trained, and the gradient is clipped by a default that the config does not show.

Letters: B sequences of a micro-batch, T tokens of its longest, D hidden, H heads, V vocabulary, M masked places, P
parameters, N ranks. More than 300 lines, because masking and encoder are written out beside the training.

Proof:
    stage=0,1,2,3 steps=3 save_every=2 layers=1 hidden=32 heads=2 seq=32 micro_batch=2
    stage=2,3 dtype=bf16 offload=True steps=2 save_every=2 layers=1 hidden=32 heads=2 seq=32 micro_batch=2
"""

import json
import sys
import time
from itertools import count, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from yardstick import data, formulas, program
from yardstick.settings import Choice, Either, SettingsError, given
from yardstick.shapes import ModelShape

import deepspeed
import numpy as np
import torch
import torch.nn.functional as F
from deepspeed import comm
from deepspeed.profiling.flops_profiler import FlopsProfiler
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler


# == 1. What can be set? (upstream 595-671) ==================================================================
CONFIG = {
    "stage": "1",                                                    #| of ZeRO, 0 to 3; or several: 0,1,2,3 in turn
    "dtype": Choice("fp32", "bf16", "fp16"),                         #| of weights, gradients and their traffic
    "offload": False,                                                #| Adam on the host, by C++; in stages 1 to 3
    "steps": 60,                                                     #| optimizer steps, with those before a resume
    "save_every": 30,                                                #| steps from one checkpoint to the next
    "resume": Either(str),                                           #| folder of an earlier run, which goes on there
    "prove_resume": True,                                            #| train again from the first checkpoint, compare
    "micro_batch": 16,                                               #| sequences of one rank and step
    "seq": 64,                                                       #| most tokens of a sequence
    "layers": 4, "hidden": 128, "heads": 4,                          #| of the encoder; feed-forward four times as wide
    "dropout": 0.1,                                                  #| of hidden values and of attention
    "masked": 0.15,                                                  #| share of the tokens that are to be guessed
    "learning_rate": 1e-3,                                           #| constant
    "gradient_clipping": 1.0,                                        #| largest norm of the whole gradient; 0: none
    "data": "embedded",                                              #| or a text file, a folder of them, hub:NAME
    "seed": 1,                                                       #| of weights, order of data, masks, dropout
    "tensorboard": True,                                             #| write curves into the run's folder
    "output": Either(str),                                           #| folder of the run; None: a new one in runs/
    "record": Either(str),                                           #| LABEL: keep the record in results/LABEL/
}
FREE = {"steps", "resume", "prove_resume", "tensorboard",            #| may differ on resume; all else is read back, for
        "output", "record"}                                          #| another order of data would be another run
SPOILT = (" is no whole checkpoint. Write the name of another one "
          "into the file latest of its stage, or remove folder "
          "zeroN: that stage then starts anew.")


# == 2. Which tokens are to be guessed, and when is that drawn? (upstream 93-213) ============================
class Texts:
    """Texts of uneven length -> tokens and labels, [length]."""
    def __init__(self, corpus, settings):
        self.settings, self.tokens = settings, corpus.train
        self.begin, self.end, self.mask, self.pad = range(
            corpus.vocab, corpus.vocab + 4)
        self.vocab = (corpus.vocab + 4 + 7) // 8 * 8                 #| V, a multiple of 8: tensor cores want tiles
        seq = settings["seq"]
        longest = seq - 2                                            #| begin and end take two places
        draw = np.random.RandomState(settings["seed"])
        self.lengths = draw.randint(longest // 2, longest + 1,       #| uneven as sentences, so there is something to
                                    3 * len(corpus.train) // seq)    #| pad; more of them than fit the corpus
        self.ends = self.lengths.cumsum()
        self.epoch = 0

    def __len__(self):
        return int((self.ends <= len(self.tokens)).sum())

    def __getitem__(self, index):
        end, s = self.ends[index], self.settings
        text = self.tokens[
            end - self.lengths[index]:end].astype(np.int64)
        rng = np.random.default_rng([s["seed"], self.epoch, index])  #| each epoch masks anew, and a resumed run
                                                                     #| masks as the whole one
        chosen = int(s["masked"] * len(text) + rng.random())         #| up as often as the fraction says: right mean
        places = rng.permutation(len(text))[:max(1, chosen)]         #| at least one: a mean over none is 0 / 0
        labels = np.full_like(text, -100)                            #| cross_entropy's mark for what does not count
        labels[places] = text[places]
        fate = rng.random(len(places))
        text[places[fate < 0.8]] = self.mask                         #| later use shows no mask, so a tenth stays
        other = places[fate >= 0.9]                                  #| and a tenth shows a random token
        text[other] = rng.integers(self.begin, size=len(other))
        text = np.r_[self.begin, text, self.end]
        labels = np.r_[-100, labels, -100]
        return torch.from_numpy(text), torch.from_numpy(labels)


# == 3. Who reads which batch? (upstream 68-90 and 219-290) ==================================================
def batches(texts, rank, s, first):
    """This rank's micro-batches from step `first` on, endless."""
    def padded(items):
        tokens, labels = zip(*items)
        join = nn.utils.rnn.pad_sequence                             #| [B, T], to the longest of this batch: T differs
        return (join(tokens, True, texts.pad),                       #| between steps and ranks, which ZeRO allows; it
                join(labels, True, -100))                            #| sends weights and gradients only

    sampler = DistributedSampler(texts, rank.world, rank.rank,       #| every N-th text of one common order; without it
                                 seed=s["seed"], drop_last=True)     #| all ranks draw the same: N do the work of one
    loader = DataLoader(texts, s["micro_batch"], sampler=sampler,
                        drop_last=True, collate_fn=padded)
    epoch, skipped = divmod(first, len(loader))                      #| a checkpoint knows no place in the data
    for epoch in count(epoch):
        sampler.set_epoch(epoch)                                     #| else each epoch has the order of the first
        texts.epoch = epoch
        yield from islice(loader, skipped, None)
        skipped = 0


# == 4. What is the model? (upstream 298-437) ================================================================
class Layer(nn.Module):
    def __init__(self, D, H, dropout):
        super().__init__()
        self.H, self.drop = H, nn.Dropout(dropout)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up = nn.Linear(D, 4 * D)
        self.down = nn.Linear(4 * D, D)
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x_BTD, seen_B11T):
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(                              #| stage 3 gathers it, ds:zero3.before_forward,
            B, T, 3, self.H, D // self.H).permute(2, 0, 3, 1, 4)     #| and frees them again, ds:zero3.after_forward
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen_B11T,                            #| only padding is hidden: a BERT looks at both
            dropout_p=self.drop.p * self.training)                   #| sides, a causal mask would make it a GPT
        mixed_BTD = mixed.transpose(1, 2).reshape(B, T, D)
        x_BTD = self.norm1(x_BTD + self.drop(self.out(mixed_BTD)))   #| norms and biases persist: nothing to gather
        wide_BTF = F.gelu(self.up(x_BTD))                            #| F.linear is stage 3's by now: ds:zero3.linear
        return self.norm2(x_BTD + self.drop(self.down(wide_BTF)))    #| stage 3 replaced it for the whole process


class Bert(nn.Module):
    """Tokens, labels [B, T] -> mean loss of M masked places."""
    def __init__(self, settings, vocab, pad):
        super().__init__()
        D, self.pad = settings["hidden"], pad
        self.tokens = nn.Embedding(vocab, D)
        self.places = nn.Embedding(settings["seq"], D)
        self.layers = nn.ModuleList([
            Layer(D, settings["heads"], settings["dropout"])
            for _ in range(settings["layers"])])
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, D)
        self.head_norm = nn.LayerNorm(D)
        self.bias = nn.Parameter(torch.zeros(vocab))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)             #| torch's normal of 1 makes huge tied logits

    def forward(self, tokens_BT, labels_BT):
        place_BT = torch.ones_like(tokens_BT).cumsum(1) - 1
        x_BTD = self.norm(self.tokens(tokens_BT)
                          + self.places(place_BT))
        seen_B11T = (tokens_BT != self.pad)[:, None, None]           #| one mask for all heads and all queries
        for layer in self.layers:
            x_BTD = layer(x_BTD, seen_B11T)
        masked = labels_BT >= 0
        x_MD = self.head_norm(F.gelu(self.head(x_BTD[masked])))      #| select, then project: M V logits, not B T V
        logits_MV = F.linear(x_MD, self.tokens.weight, self.bias)    #| tied. Stage 3 has cut this weight again by now:
                                                                     #| ds:zero3.read_weight gathers it on the spot and
                                                                     #| notes a second user of it, ds:zero3.external
        return F.cross_entropy(logits_MV.float(),                    #| the sum over V in fp32: bf16 has 8 bits
                               labels_BT[masked])


# == 5. What is written beside the checkpoints? (upstream 445-527 and 672-752) ===============================
def recall(run):
    """Take over the settings of the run to be resumed."""
    s, folder = run.settings, Path(run.settings["resume"])
    file, names = folder / "settings.json", s.keys() - FREE
    refuse(s["output"], f"output={s['output']}: a resumed run has "
           f"its folder, {folder}. Leave output out.")
    try:
        kept = json.loads(file.read_text())                          #| rank 0 wrote it, in section 11
        ours = all(type(kept[x]) is type(s[x]) for x in names)
        ranks = kept["ranks"]
    except (OSError, ValueError, LookupError, TypeError):
        ours = False
    refuse(not ours, f"{file} is missing, or not as this program "
           "writes it. Give resume a folder that its run left.")
    refuse(ranks != run.world, f"resume={folder}: it trained on "    #| each has its share; DeepSpeed refuses another N:
           f"{ranks} ranks, not {run.world}. Set RANKS={ranks}.")    #| ds:ckpt.load_zero (read: refused here already)
    for name in names:
        differs = s[name] != kept[name]
        refuse(differs and name in given(sys.argv[1:]),
               f"{name}={s[name]}: the run in {folder} has "
               f"{name}={kept[name]}. Leave it out.")
        s[name] = kept[name]
    run.folder = folder.resolve()


def step_of(folder):
    """The step that a stage's folder goes on from; 0: none."""
    if not any(folder.glob("step*")):
        return 0
    latest = folder / "latest"                                       #| rank 0 writes the newest tag into this file
    tag = latest.read_text().strip() if latest.is_file() else ""
    files = list(folder.glob(f"{tag or 'no'}/*.pt"))
    refuse(not files or not tag[4:].isdecimal(),
           f"{folder / tag if tag else latest}{SPOILT}")
    return int(tag[4:])


# == 6. What does DeepSpeed have to be told? (upstream 778-798) ==============================================
def deepspeed_config(run, stage, name):
    s = run.settings
    adam = {"lr": s["learning_rate"], "betas": [0.9, 0.999],
            "eps": 1e-8, "weight_decay": 0.01,
            "torch_adam": not s["offload"]}                          #| else a fused kernel would have to be compiled
    zero = {"stage": int(stage),
            "reduce_bucket_size": 5_000_000,                         #| elements, not bytes; with overlap held twice
            "stage3_param_persistence_threshold": 4 * s["hidden"]}   #| norms and layers' biases stay whole; by default,
                                                                     #| 100,000, all but the word embedding does
    if s["offload"]:
        zero["offload_optimizer"] = {"device": "cpu",                #| 12 P / N bytes of masters and moments move, and
                                     "pin_memory": run.gpu}          #| 4 P / N of gradients follow in each step
    return {
        "train_micro_batch_size_per_gpu": s["micro_batch"],
        "gradient_accumulation_steps": 1,
        "gradient_clipping": s["gradient_clipping"],                 #| left out it is 1.0 now; before 0.19.3 it was 0
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": zero,
        **({} if s["dtype"] == "fp32"
           else {s["dtype"]: {"enabled": True}}),                    #| fp16 brings a loss scale, bf16 needs none
        "tensorboard": {"enabled": s["tensorboard"],
                        "output_path": str(run.folder / "curves"),
                        "job_name": name}}


# == 7. What changes hands in initialize? (upstream 753-777 and 799-804) =====================================
def build(run, stage, texts, seed, name):
    torch.manual_seed(seed)
    model = Bert(run.settings, texts.vocab, texts.pad)
    engine, _, _, _ = deepspeed.initialize(                          #| ds:init.initialize, the one door
        model=model,                                                 #| rank 0's weights go to all: ds:init.broadcast
        model_parameters=model.parameters(),                         #| Adam over them: ds:init.adam_kind says which
        config=deepspeed_config(run, stage, name))                   #| unknown keys pass silently, ds:config.read, but
                                                                     #| not those of ZeRO, ds:config.zero_section
                                                                     #| the global batch follows, ds:config.batch
                                                                     #| stages 1 and 2 flatten all weights and keep an
                                                                     #| fp32 share of 4 P / N bytes, ds:zero12.init
                                                                     #| stage 3 keeps 1 / N of each weight, frees the
                                                                     #| rest: ds:zero3.convert, ds:zero3.partition
                                                                     #| hooks: ds:zero12.make_hooks, ds:zero3.hooks
    return engine


# == 8. What does a checkpoint bring back? (upstream 805-812) ================================================
def load(engine, folder, tag=None):
    try:
        _, client = engine.load_checkpoint(                          #| all ranks; no tag: the newest, ds:ckpt.load
            str(folder), tag=tag)                                    #| weights and counters, ds:ckpt.load_model, then
                                                                     #| from stage 1 on a share: ds:ckpt.load_zero
                                                                     #| pickles, so only one's own: ds:ckpt.read_file
        return client["step"], client["losses"]
    except Exception as error:                                       #| of any kind, as the file has been spoilt
        raise SystemExit(f"{folder}{SPOILT} ({error!r:.150})")


# == 9. What happens in a step? (upstream 814-856) ===========================================================
def train_from(run, rank, engine, texts, start, folder=None):
    """Train and save -> losses, seconds, (FLOPs, by formula)."""
    from tqdm import tqdm
    s, (first, losses) = run.settings, start
    seconds = []
    profiler = FlopsProfiler(engine.module, engine)                  #| started by the config it misses the logits
    stream = batches(texts, rank, s, first)
    engine.train()                                                   #| dropout is on
    for done in tqdm(range(first + 1, s["steps"] + 1), delay=3,
                     mininterval=2, disable=rank.rank > 0):
        begun = time.perf_counter()
        tokens_BT, labels_BT = (part.to(engine.device)
                                for part in next(stream))
        torch.manual_seed((s["seed"] * 2**20 + done)                 #| dropout is a function of step and rank: no
                          * run.world + rank.rank)                   #| checkpoint keeps torch's random state
        if done == first + 1:
            profiler.start_profile()                                 #| ds:observe.flops
        loss = engine(tokens_BT, labels_BT)                          #| ds:engine.forward hangs a hook on the loss; in
                                                                     #| stage 3 modules fetch, P in all: ds:zero3.fetch
        if done == first + 1:
            flops = (profiler.get_total_flops(),                     #| linear layers count twice in stage 3, as they do
                     forward_flops(s, texts.vocab, labels_BT))       #| a matmul that counts too: ds:observe.total_flops
            profiler.end_profile()                                   #| torch's own functions are back
        engine.backward(loss)                                        #| hooks send under autograd: ds:engine.backward
                                                                     #| stage 0 P at the end: ds:engine.reduce_plain
                                                                     #| 1 too, once per step: ds:zero12.reduce_all
                                                                     #| 2 early, ds:zero12.hook, and drops what others
                                                                     #| own, ds:zero12.drop; ds:zero12.reduce_scatter is
                                                                     #| an all-reduce still, in 1 and 2. 3 gathers P
                                                                     #| again, ds:zero3.before_backward, and scatters:
                                                                     #| ds:zero3.hook, ds:zero3.reduce_scatter
        engine.step()                                                #| ds:engine.update; gradients become None
                                                                     #| stage 0 steps P on each rank: ds:engine.clip
                                                                     #| 1, 2 P / N, ds:zero12.step, and ds:zero12.gather
                                                                     #| 3 P / N, gathered by the next use: ds:zero3.step
                                                                     #| offload: C++ on the host: ds:offload.adam
        mean = loss.detach().float()
        comm.all_reduce(mean)                                        #| each rank has its own loss: ds:comm.all_reduce
        losses = losses + [mean.item() / rank.world]
        seconds.append(time.perf_counter() - begun)
        engine.monitor.write_events([                                #| writes on rank 0 alone: ds:observe.tensorboard
            ("Train/loss", losses[-1], engine.global_samples)])      #| step() wrote the learning rate
        due = done % s["save_every"] == 0 or done == s["steps"]
        if folder and due:
            engine.save_checkpoint(                                  #| all ranks, or those that call wait: ds:ckpt.save
                str(folder), tag=f"step{done}",                      #| weights from one rank, in stage 3 from each:
                client_state={"step": done, "losses": losses})       #| ds:ckpt.save_model; each its 12 P / N bytes of
                                                                     #| master and moments: ds:ckpt.save_zero
    return losses, float(np.median(seconds)), flops


# == 10. How many FLOPs is that? (not upstream) ==============================================================
def forward_flops(s, V, labels_BT):
    D, M = s["hidden"], (labels_BT >= 0).sum().item()
    B, T = labels_BT.shape
    shape = ModelShape(s["layers"], D, s["heads"], V, T)
    forward = formulas.train_flops(shape, B) / 3                     #| of three parts, backward is two
    return forward - 2 * D * V * (B * T - M) + 2 * D * D * M         #| logits at M places only, a D x D layer before


# == 11. Is the resumed run the same run, and each stage the same training? (not upstream) ===================
def train(run):
    rank, s = run.join(), run.settings                               #| ds:init.process_group; gloo, on GPUs NCCL
    texts = Texts(data.load(s["data"]), s)
    if rank.rank == 0:
        run.folder.mkdir(parents=True, exist_ok=True)                #| one name, from the process that starts the
        (run.folder / "settings.json").write_text(json.dumps(        #| ranks: by their own clocks they may save one
            {**s, "ranks": run.world}))                              #| checkpoint into two folders
    measured, predicted, every = {}, {}, []
    for stage in s["stage"].split(","):
        name, folder = f"zero{stage}", run.folder / f"zero{stage}"
        done = step_of(folder) if s["resume"] else 0
        if done >= s["steps"]:
            continue
        engine = build(run, stage, texts, s["seed"], name)
        start = load(engine, folder) if done else (0, [])
        losses, seconds, (counted, formula) = train_from(
            run, rank, engine, texts, start, folder)
        engine.destroy()                                             #| takes its hooks off: ds:engine.destroy
        every.append(losses)
        row = {"loss_nats_first": losses[0],
               "loss_nats_last": losses[-1],
               "from_first_stage_nats_max": np.abs(np.subtract(
                   losses, every[0])).max(),
               "step_seconds": seconds, "forward_flops": counted}
        saved = (start[0] // s["save_every"] + 1) * s["save_every"]
        if s["prove_resume"] and saved < s["steps"]:
            engine = build(run, stage, texts, s["seed"] + 1,         #| other weights: what agrees, the file brought
                           f"{name}_resumed")
            start = load(engine, folder, f"step{saved}")
            again = train_from(run, rank, engine, texts, start)[0]
            engine.destroy()                                         #| as above
            row["resumed_apart_nats_max"] = np.abs(                  #| 0: the very same losses
                np.subtract(losses, again)).max()
        measured |= {f"{name}_{key}": row[key] for key in row}
        predicted[f"{name}_forward_flops"] = formula
        if rank.rank == 0:
            print(f"ZeRO-{stage}", *(f"{row[key]:<11.5g} {key}"
                  for key in row), f"{formula:<11.5g} by formula",
                  sep="\n    ")
    run.record(rank, measured, predicted, details={"loss": every})


# == 12. What is refused before any rank starts? (upstream 859-863) ==========================================
def refuse(wrong, text):
    if wrong:
        raise SettingsError(text)


def check(run):
    s = run.settings
    if s["resume"]:
        recall(run)
    chosen = s["stage"].split(",")
    refuse(not set(chosen) <= set("0123"), f"stage={s['stage']}: "
           "give 0, 1, 2 or 3, or several of them, as stage=1,3.")
    refuse(s["offload"] and "0" in chosen, "offload=True needs a "
           "ZeRO optimizer: use stages 1 to 3, or offload=False.")
    for name, least, below in (
            ("steps", 1, 2**32), ("save_every", 1, 2**32),
            ("micro_batch", 1, 2**32), ("seq", 8, 2**32),
            ("seed", 0, 2**32), ("gradient_clipping", 0, 2**32),     #| numpy seeds by 32 bits
            ("learning_rate", 1e-12, 1), ("masked", 0, 1),
            ("dropout", 0, 1)):
        refuse(not least <= s[name] < below, f"{name}={s[name]} "
               f"must be {least} or more, and below {below}.")
    fp16 = deepspeed.get_accelerator().is_fp16_supported()           #| ds:init.accelerator (read: no rank runs yet)
    refuse(s["dtype"] == "fp16" and not fp16, "dtype=fp16: this "
           "device does not compute in fp16. Use dtype=bf16.")
    try:
        ModelShape(s["layers"], s["hidden"], s["heads"], 1, 1)
        texts = len(Texts(data.load(s["data"] or "(empty)"), s))
    except (ValueError, OSError) as error:
        raise SettingsError(str(error)) from None
    refuse(texts < s["micro_batch"] * run.world, "micro_batch="
           f"{s['micro_batch']}: {run.world} ranks share {texts} "
           "texts. Use a smaller one.")
    if s["resume"]:
        at = [step_of(run.folder / f"zero{x}") for x in chosen]
        refuse(not 0 < max(at) or min(at) >= s["steps"],
               f"stage={s['stage']} is at {at} in {run.folder}:"
               " give steps above, or where all are 0 no resume.")
    if s["offload"]:
        run.ops.append("cpu_adam")                                   #| compiled once, before the ranks start


if __name__ == "__main__":
    program.main(__file__, CONFIG, train, check)
