"""Fine-tunes a Llama on prompts and answers with LoRA under ZeRO, merges the adapters, and saves weights that reload.

What to learn here: which weights an optimizer gets and what that saves, an optimizer and a schedule of one's own inside
DeepSpeed, a config built from arguments, and how weights that lie in shares over the ranks are changed and saved whole.

    python annotated_scripts/05_deepspeed_chat_sft_annotated.py
    python annotated_scripts/05_deepspeed_chat_sft_annotated.py train=rest stage=2 dtype=bf16
    python annotated_scripts/05_deepspeed_chat_sft_annotated.py train=all learning_rate=1e-3 epochs=1
    python annotated_scripts/05_deepspeed_chat_sft_annotated.py offload=True checkpointing=True accumulation=2

No GPU is needed; with GPUs the same program runs on all of them. Without model= the base is a tiny Llama with random
weights; model=FOLDER takes a pretrained causal LM, data=FILE.jsonl your own lines of {"prompt": ..., "answer": ...}.
The run ends with perplexities: before, after each epoch, after merging, and of the saved files in a fresh model.

Upstream is DeepSpeed-Chat/training/step1_supervised_finetuning/main.py (400 lines, helpers in DeepSpeed-Chat/dschat) in
https://github.com/deepspeedai/DeepSpeedExamples/tree/45b4b7156c8794a3452a5a7d03dbd8d797068569/applications
Its import and its export fail with transformers 5, and without a launcher it does not start. Ours differs also where it
trains on prompts, averages in evaluation the means of unequal batches, and pads each text to the limit. Left out are
HfDeepSpeedConfig, as the model fits on each rank until initialize cuts it, and the print of throughput, as a figure of
the machine.

Letters: B texts of a micro-batch, T tokens of its longest, D in and F out of a linear layer, R rank of an adapter, P
parameters, A those that train, N ranks. More than 300 lines, because data, adapters and export are written out.

Proof:
    stage=3 pairs=32 held_out=4 epochs=1 micro_batch=4 hidden=32 layers=1
    stage=0 pairs=32 held_out=4 epochs=1 micro_batch=4 hidden=32 layers=1
    stage=3 train=rest dtype=bf16 offload=True checkpointing=True pairs=20 held_out=4 epochs=1 micro_batch=4 hidden=32
"""

import json
import math
import sys
from itertools import permutations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from yardstick import data, program
from yardstick.settings import Choice, Either, SettingsError

import deepspeed
import numpy as np
import torch
import torch.nn.functional as F
from deepspeed import comm
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils.module_utils import recursive_setattr
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig,
    PreTrainedTokenizerFast, get_cosine_schedule_with_warmup)


# == 1. What can be set? (upstream 32-208) ===================================================================
CONFIG = {
    "model": "tiny",                                                 #| a random Llama; or a folder or hub name
    "hidden": 128, "layers": 2,                                      #| of the tiny Llama; four heads
    "train": Choice("lora", "rest", "all"),                          #| adapters; and what has none; or no adapters
    "lora_part": "layers.",                                          #| linear layers with this in their name get one
    "lora_dim": 8,                                                   #| R
    "lora_learning_rate": 1e-2,                                      #| peak, of adapters
    "learning_rate": 1e-3,                                           #| peak, of all else that trains
    "weight_decay": 0.01,                                            #| of matrices
    "gradient_clipping": 1.0,                                        #| largest norm of the whole gradient; 0: none
    "stage": 3,                                                      #| of ZeRO, 0 to 3
    "offload": False,                                                #| Adam on the host, by C++; stage 3: weights too
    "dtype": Choice("fp32", "bf16", "fp16"),                         #| of weights and gradients
    "checkpointing": False,                                          #| keep layers' inputs, compute the rest again
    "micro_batch": 8,                                                #| texts of a forward on one rank
    "accumulation": 1,                                               #| forwards of a step
    "epochs": 2,                                                     #| passes over the pairs
    "data": Either(str),                                             #| lines {"prompt", "answer"}; None: made here
    "pairs": 640,                                                    #| that are made, of all there are
    "held_out": 64,                                                  #| of all pairs, the first: they only measure
    "seq": 128,                                                      #| most tokens of a text; the rest is cut off
    "seed": 1,                                                       #| of weights, adapters, data and their order
    "output": Either(str),                                           #| folder of the run; None: a new one in runs/
    "record": Either(str),                                           #| LABEL: keep the record in results/LABEL/
}


# == 2. What is learned, and which tokens count? (upstream 267-294) ==========================================
ANIMALS = """ant bear beetle crab crocodile dog dolphin eagle fox
elephant giraffe hen hippopotamus horse kangaroo lion mosquito owl
panther pig rabbit rat salamander seal spider swallow""".split()


def lines_of(file):
    number = 0
    try:
        with open(file, encoding="utf-8") as rows:
            for number, row in enumerate(rows, 1):
                pair = json.loads(row)
                yield {name: pair[name] + ""
                       for name in ("prompt", "answer")}
    except OSError as error:
        raise SettingsError(f"data={file}: {error}") from None
    except (ValueError, LookupError, TypeError):
        raise SettingsError(f"data={file}, line {number}: needs "
                            '"prompt" and "answer"') from None


def pairs(s):
    if s["data"]:
        return list(lines_of(s["data"]))
    every = list(permutations(ANIMALS, 2))                           #| none twice, so none of the held out trains
    draw, made = np.random.RandomState(s["seed"]), []
    for place in draw.permutation(len(every))[:s["pairs"]]:
        one, two = every[place]
        best = max(one, two, key=len)
        made.append({
            "prompt": f"Which word is longer, {one} or {two}?\n",
            "answer": f"{best} is the longer word: {len(best)}."})
    return made


class Chat:
    """The pairs as token ids and labels, [(ids, labels)]."""

    def __init__(self, s):
        if s["model"] == "tiny":
            self.coder = PreTrainedTokenizerFast(
                tokenizer_file=str(data.TOKENIZER),
                eos_token="<|endoftext|>")
        else:
            self.coder = AutoTokenizer.from_pretrained(s["model"])
        self.settings, self.end = s, self.coder.eos_token_id
        texts = [self.encoded(**pair) for pair in pairs(s)]
        self.held_out = texts[:s["held_out"]]
        self.train = texts[s["held_out"]:]

    def encoded(self, prompt, answer):
        limit = self.settings["seq"]
        asked = self.coder(prompt).input_ids[:limit - 1]
        told = self.coder(answer, add_special_tokens=False)
        ids = (asked + told.input_ids + [self.end])[:limit]          #| without an end it never learns to stop
        labels = [-100] * len(asked) + ids[len(asked):]              #| the loss is of the answer: no one asks it to
        return torch.tensor(ids), torch.tensor(labels)               #| write questions

    def batches(self, texts, **order):
        def padded(rows):
            ids, labels = zip(*rows)
            join = nn.utils.rnn.pad_sequence                         #| right, to the longest of the batch: [B, T]
            seen = [torch.ones_like(row) for row in ids]             #| by place: where pad is the end token, a mask by
            return {"input_ids": join(ids, True, self.end),          #| token hides the end that is to be learned
                    "attention_mask": join(seen, True, 0),
                    "labels": join(labels, True, -100)}
        return DataLoader(texts, self.settings["micro_batch"],
                          collate_fn=padded, **order)


# == 3. Where do the adapters go? (upstream 242-265 and dschat/utils/module/lora.py) =========================
class Lora(nn.Module):
    """A frozen linear layer, and two thin matrices that train."""

    def __init__(self, base, dim):
        super().__init__()
        self.base, self.scale = base, 2.0
        base.weight.requires_grad_(False)                            #| D F weights without gradient, master, moments;
        self.lora_in = nn.Parameter(                                 #| R (D + F) have them instead
            torch.empty(dim, base.in_features))
        self.lora_out = nn.Parameter(                                #| zero: training begins at the base model
            torch.zeros(base.out_features, dim))
        nn.init.kaiming_uniform_(self.lora_in, a=5**0.5)

    def forward(self, x_BTD):
        x_BTR = F.linear(x_BTD, self.lora_in)
        return (self.base(x_BTD)                                     #| stage 3 gathers D F values here that it will
                + self.scale * F.linear(x_BTR, self.lora_out))       #| never update: ds:zero3.before_forward


def build(s, coder, weights=True):
    """The whole model, alike on every rank; initialize cuts it."""
    torch.manual_seed(s["seed"])
    if s["model"] != "tiny" and weights:
        model = AutoModelForCausalLM.from_pretrained(
            s["model"], dtype=torch.float32)
    else:
        config = config_of(s, coder)
        model = AutoModelForCausalLM.from_config(config)
    if s["train"] == "all":
        return model
    model.requires_grad_(s["train"] == "rest")                       #| rest: embeddings, norms and head train beside
    for name, layer in list(model.named_modules()):
        if s["lora_part"] in name and isinstance(layer, nn.Linear):
            recursive_setattr(model, name,                           #| by its dotted name: ds:lora.set
                              Lora(layer, s["lora_dim"]))
    return model


def config_of(s, coder):
    if s["model"] != "tiny":
        return AutoConfig.from_pretrained(s["model"])
    return LlamaConfig(
        vocab_size=len(coder), hidden_size=s["hidden"],
        intermediate_size=3 * s["hidden"], num_attention_heads=4,
        num_hidden_layers=s["layers"], initializer_range=0.1,        #| as large as trained ones; at 0.02 a frozen head
        bos_token_id=None, eos_token_id=coder.eos_token_id)          #| cannot tell tokens apart, whatever adapters do


# == 4. How do arguments become a config? (upstream 211-240 and dschat/utils/ds_utils.py 13-75) ==============
def deepspeed_config(run):
    s = run.settings
    zero = {"stage": s["stage"],
            "stage3_param_persistence_threshold": s["hidden"],       #| tiny's norms stay whole, adapters from R = 2 not
            "stage3_max_live_parameters": 30_000_000,                #| elements gathered at once, prefetch included
            "stage3_prefetch_bucket_size": 30_000_000,
            "stage3_gather_16bit_weights_on_model_save": True,       #| without it save_16bit_model writes nothing
            "memory_efficient_linear": False}                        #| True replaces F.linear for the whole process
    if s["offload"]:
        host = {"device": "cpu", "pin_memory": run.gpu}
        zero["offload_optimizer"] = host                             #| 12 A / N bytes leave the device
        if s["stage"] == 3:
            zero["offload_param"] = {**host}                         #| so do all P / N, and come at each gather
    return {
        "train_batch_size":
            s["micro_batch"] * s["accumulation"] * run.world,        #| the accumulation follows from these two
        "train_micro_batch_size_per_gpu": s["micro_batch"],
        "zero_optimization": zero,
        "gradient_clipping": s["gradient_clipping"],                 #| left out it is 1.0 now; before 0.19.3 it was 0
        "prescale_gradients": False,                                 #| True divides before the sum, against overflow
        "wall_clock_breakdown": False,                               #| True waits for the device at each phase
        **({} if s["dtype"] == "fp32"
           else {s["dtype"]: {"enabled": True}})}                    #| upstream's bfloat16 is the old name of bf16


# == 5. Which weights train how? (upstream 317-333) ==========================================================
def optimizer_of(s, model):
    matrices, thin, vectors = [], [], []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            kind = thin if "lora_" in name else matrices
            (kind if weight.ndim > 1 else vectors).append(weight)
    groups = [{"params": matrices},
              {"params": thin, "lr": s["lora_learning_rate"]},       #| they start at 0 and have further to go
              {"params": vectors, "weight_decay": 0.0}]              #| norms and biases are not pulled to 0
    groups = [group for group in groups if group["params"]]          #| DeepSpeed drops empty ones: the schedule raises
    kind = DeepSpeedCPUAdam if s["offload"] else torch.optim.AdamW
    return kind(groups, lr=s["learning_rate"], betas=(0.9, 0.95),    #| with offload DeepSpeed refuses torch's, and
                weight_decay=s["weight_decay"])                      #| ds:offload.adam_init loads the C++ one


# == 6. What does the engine do with an optimizer of ours? (upstream 335-344) ================================
def engine_of(run, model, steps):
    s, optimizer = run.settings, optimizer_of(run.settings, model)
    schedule = get_cosine_schedule_with_warmup(
        optimizer, steps // 10, steps)
    engine, _, _, _ = deepspeed.initialize(                          #| ours, not the config's: ds:init.optimizer
        model=model, optimizer=optimizer,                            #| of a type that ZeRO knows: ds:init.supported
        lr_scheduler=schedule, config=deepspeed_config(run))         #| called at boundaries: ds:init.schedule
                                                                     #| B and accumulation: ds:config.batch
                                                                     #| all P are cut, ds:zero3.convert_model; what
                                                                     #| trains has masters, 4 A / N bytes in fp32,
                                                                     #| ds:zero3.master, a hook, ds:zero3.make_hooks,
                                                                     #| and a place in our groups: ds:zero3.sub_groups
    if s["checkpointing"]:
        engine.gradient_checkpointing_enable(                        #| no method of the engine; it asks the model,
            gradient_checkpointing_kwargs={"use_reentrant": False})  #| ds:init.unknown_attribute. The reentrant kind
                                                                     #| has no gradients behind frozen embeddings
    return engine


# == 7. How good is it? (upstream 296-315) ===================================================================
@torch.no_grad()
def evaluate(model, chat, rank=None):
    """Mean loss of the held-out answers, nats per token."""
    texts = chat.held_out
    if rank:
        texts = texts[rank.rank::rank.world]                         #| as many on each rank: in stage 3 every module
    total = torch.zeros(2, device=model.device)                      #| gathers, and a rank with more would wait
    model.eval()
    for batch in chat.batches(texts):
        batch = {key: part.to(model.device)
                 for key, part in batch.items()}
        mean = model(**batch, use_cache=False).loss
        count = (batch["labels"][:, 1:] != -100).sum()               #| sums: a mean of means favours short answers
        total += torch.stack([mean.float() * count, count])
    if rank:
        comm.all_reduce(total)                                       #| two numbers: ds:comm.all_reduce
    return (total[0] / total[1]).item()


# == 8. What does a step touch? (upstream 346-382) ===========================================================
def train_epoch(engine, chat, rank, epoch):
    """-> mean loss over the ranks of each micro-batch."""
    from tqdm import tqdm
    sampler = DistributedSampler(chat.train, rank.world, rank.rank,
                                 seed=chat.settings["seed"])
    sampler.set_epoch(epoch)                                         #| else each epoch has the order of the first
    engine.train()                                                   #| evaluation has switched it off
    losses = []
    for batch in tqdm(chat.batches(chat.train, sampler=sampler),
                      f"epoch {epoch + 1}", delay=3, mininterval=2,
                      disable=rank.rank > 0):
        batch = {key: part.to(engine.device)
                 for key, part in batch.items()}
        loss = engine(**batch, use_cache=False).loss                 #| all P travel, frozen or not: ds:engine.forward,
                                                                     #| ds:zero3.fetch, ds:zero3.gather
        engine.backward(loss)                                        #| and once more: ds:zero3.before_backward, for
                                                                     #| gradients pass through frozen layers
                                                                     #| ds:engine.backward sends only A back:
                                                                     #| ds:zero3.hook, ds:zero3.reduce_scatter
                                                                     #| stage 0 all-reduces A: ds:engine.reduce_plain
        engine.step()                                                #| at the boundary: ds:engine.update; A / N on each
                                                                     #| rank: ds:zero3.step, by ds:zero3.adam
                                                                     #| or in C++ on the host: ds:offload.adam
        mean = loss.detach().float()
        comm.all_reduce(mean)                                        #| each rank has its own: ds:comm.all_reduce
        losses.append(mean.item() / rank.world)
        if not math.isfinite(losses[-1]):
            raise SystemExit(1 if rank.rank else "the loss is no"
                             " number any more: lower learning_"
                             "rate and lora_learning_rate.")
    return losses


# == 9. How are shares changed, and saved whole? (upstream 384-400) ==========================================
def adapters(model):
    return [m for m in model.modules() if isinstance(m, Lora)]


@torch.no_grad()
def merge(engine, rank):
    """Add each adapter to its layer and zero it; the last act."""
    for lora in adapters(engine.module):
        cut = hasattr(lora.base.weight, "ds_id")                     #| stage 3; below it nothing is sent, so all add
        with deepspeed.zero.GatheredParameters(                      #| a layer whole on each rank: ds:zero3.gathered;
                [lora.base.weight, lora.lora_in, lora.lora_out],     #| then rank 0's values are sent to all and cut:
                modifier_rank=0):                                    #| ds:zero3.gathered_exit
            if rank.rank == 0 or not cut:
                product = lora.lora_out @ lora.lora_in
                lora.base.weight += lora.scale * product             #| bf16 keeps 8 bits of the sum
                lora.lora_out.zero_()                                #| its fp32 master still holds the old values


def save(run, rank, engine, chat):
    """Rank 0 writes a folder that transformers reads; all call."""
    engine.save_16bit_model(str(run.folder), "gathered.bin")         #| of any dtype: ds:ckpt.save_16bit; stage 3 goes
                                                                     #| by module, yet all P end in the host memory of
                                                                     #| rank 0: ds:ckpt.gather_16bit
    if rank.rank:
        return
    file = run.folder / "gathered.bin"
    weights = {name.replace(".base.", "."): weight for name, weight
               in torch.load(file, weights_only=True).items()
               if "lora_" not in name}                               #| the names of a model without adapters
    model = AutoModelForCausalLM.from_config(
        engine.module.config, dtype=engine.module.dtype)
    model.load_state_dict(weights)
    model.save_pretrained(run.folder / "model")
    chat.coder.save_pretrained(run.folder / "model")
    file.unlink()


# == 10. What did it cost, and is the saved model the trained one? (not upstream) ============================
def train(run):
    rank, s = run.join(), run.settings                               #| ds:init.process_group; gloo, on GPUs NCCL
    chat = Chat(s)
    model = build(s, chat.coder)
    trained = sum(weight.numel() for weight in model.parameters()
                  if weight.requires_grad)
    thin = sum(s["lora_dim"] * sum(lora.base.weight.shape)           #| R (D + F) each
               for lora in adapters(model))
    batches = math.ceil(len(chat.train)                              #| the sampler fills up, so ranks have as many
                        / (s["micro_batch"] * run.world))
    steps = s["epochs"] * batches // s["accumulation"]               #| forwards left over at the end train nothing
    engine = engine_of(run, model, steps)
    nats, losses = {"before": evaluate(engine, chat, rank)}, []
    for epoch in range(s["epochs"]):
        losses += train_epoch(engine, chat, rank, epoch)
        nats[f"epoch{epoch + 1}"] = evaluate(engine, chat, rank)
    states = engine.basic_optimizer.state.values()                   #| ours; ZeRO has put its shares in
    moments = sum(part.nbytes for state in states for part
                  in state.values() if getattr(part, "ndim", 0))
    merge(engine, rank)
    nats["merged"] = evaluate(engine, chat, rank)
    save(run, rank, engine, chat)
    counts = {"trained_parameters": trained,
              "moments_bytes": moments}
    predicted = {"moments_bytes":                                    #| two of fp32 for A / N; below stage 1 for A
                 8 * trained / (run.world if s["stage"] else 1)}
    if s["train"] == "lora":
        predicted["trained_parameters"] = thin
    if rank.rank == 0:
        fresh = AutoModelForCausalLM.from_pretrained(
            run.folder / "model", dtype="auto").to(engine.device)
        nats["reloaded"] = evaluate(fresh, chat)
        for name in nats:
            print(f"{name:<10} {nats[name]:.6f} nats per token, "
                  f"perplexity {math.exp(nats[name]):.4g}")
        for name in predicted:
            print(f"{name} {counts[name]:,}, by formula "
                  f"{predicted[name]:,.0f}")
    counts |= {f"{name}_nats": nats[name] for name in nats}
    run.record(rank, counts, predicted, details={"losses": losses})


# == 11. What is refused before any rank starts? (not upstream) ==============================================
def refuse(wrong, text):
    if wrong:
        raise SettingsError(text)


def check(run):
    s = run.settings
    refuse(not 0 <= s["stage"] < 4, f"stage={s['stage']}: 0 to 3.")
    refuse(s["offload"] and not s["stage"], "offload=True needs "
           "ZeRO: use stage=1, 2 or 3.")
    for least, names in {
            1: "micro_batch accumulation epochs layers hidden "
               "lora_dim held_out pairs", 2: "seq",
            0: "seed weight_decay gradient_clipping",
            1e-12: "learning_rate lora_learning_rate"}.items():
        for name in names.split():
            refuse(s[name] < least, f"{name}={s[name]} must be "
                   f"{least} or more.")
    refuse(s["hidden"] % 8 or s["hidden"] > 8192, "hidden="
           f"{s['hidden']}: give a multiple of 8, at most 8192.")
    refuse(s["held_out"] % run.world, "give as held_out a multiple"
           f" of {run.world} ranks, not {s['held_out']}.")
    left = max(0, len(pairs(s)) - s["held_out"])
    step = s["micro_batch"] * s["accumulation"] * run.world
    refuse(left < step, f"{left} pairs train: fewer than a step, "
           f"{step}. Give more pairs, or a smaller micro_batch.")
    fp16 = deepspeed.get_accelerator().is_fp16_supported()           #| ds:init.accelerator (read: no rank runs yet)
    refuse(s["dtype"] == "fp16" and not fp16, "dtype=fp16: this "
           "device does not compute in fp16. Use dtype=bf16.")
    try:
        chat = Chat(s)
        with torch.device("meta"):
            found = adapters(build(s, chat.coder, weights=False))
    except (OSError, ValueError, TypeError) as error:
        raise SettingsError(f"model={s['model']}: "
                            + str(error).splitlines()[0]) from None
    refuse(s["train"] != "all" and not found, "lora_part="
           f"{s['lora_part']} is in no name of a linear layer.")
    if s["offload"]:
        run.ops.append("cpu_adam")                                   #| compiled once, before the ranks start


if __name__ == "__main__":
    program.main(__file__, CONFIG, train, check)
