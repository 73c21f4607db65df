"""Tunes a Llama on instructions over two axes at once: DeepSpeed's AutoTP cuts the layers, ZeRO cuts the optimizer.

What to learn here: which ranks share a layer and which a batch, how DeepSpeed cuts a model of transformers, what each
rank then holds, sends and must read, and how whole weights come out again.

    python annotated_scripts/07_tensor_parallel_annotated.py
    python annotated_scripts/07_tensor_parallel_annotated.py stage=0,1,2,3 steps=8
    RANKS=2 python annotated_scripts/07_tensor_parallel_annotated.py data=instructions.json
    python annotated_scripts/07_tensor_parallel_annotated.py model=Qwen/Qwen2.5-1.5B dtype=bf16 one_process=False

No GPU is needed: it starts four CPU ranks, two by two; with GPUs, two or more, the same program runs on them. It
prints losses, and how far those of one process on whole batches are, bytes beside their formulas, the loss of the saved
weights in a plain model, and what two common mistakes do. More than 300 lines, because the loop that upstream leaves to
a Trainer is written out. R ranks share a layer, N a batch of B sequences; T tokens, D hidden, V words, P parameters.

Upstream: 275 lines,
https://github.com/deepspeedai/DeepSpeedExamples/blob/45b4b7156c87/training/tensor_parallel/hf_integration/train.py
Its Trainer makes a mesh of `autotp_size` ranks, so its shell script starts no more: no data parallelism; ours has both.

Proof:
    stage=0,1,2,3 steps=2
    tensor=4 steps=2
"""

import json
import sys
from collections import Counter
from functools import partial
from itertools import count, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from yardstick import deepspeed_memory, ledger, program
from yardstick.data import END, TOKENIZER, VOCAB
from yardstick.deepspeed_traffic import traffic
from yardstick.settings import Choice, Either, SettingsError
from yardstick.traffic import Meter

import deepspeed
import torch
import transformers
from deepspeed import comm
from deepspeed.module_inject import layers
from deepspeed.utils import groups
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, DistributedSampler
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM)


# == 1. What can be set, and what is refused? (upstream 45-62) ===============================================
CONFIG = {
    "tensor": 2,                                                     #| R; the other axis follows, N = ranks / R
    "stage": "1",                                                    #| of ZeRO, 0 to 3; of several each in turn
    "steps": 24,                                                     #| the last one's traffic is counted
    "micro_batch": 4, "accumulation": 2,                             #| B a forward, the same on R ranks; forwards
    "max_tokens": 96,                                                #| longer examples lose their end
    "model": Either(str),                                            #| folder or hub name; None: a small new Llama
    "data": Either(str),                                             #| JSON, upstream's form; None: Python's docstrings
    "dtype": Choice("fp32", "bf16"),                                 #| of weights and of all that is sent
    "learning_rate": 1e-3, "seed": 1,                                #| constant; of weights and order
    "gradient_clipping": 1.0,                                        #| largest norm, over both axes; 0: none
    "one_process": True,                                             #| rank 0 trains the whole model, too
    "output": Either(str), "record": Either(str),                    #| folder, else a new one in runs/; record's label
}
LLAMA = {"hidden_size": 128, "intermediate_size": 352,
         "num_hidden_layers": 2, "num_attention_heads": 8,
         "num_key_value_heads": 4, "vocab_size": VOCAB}
LEAST = {"steps": 2, "micro_batch": 1, "accumulation": 1,
         "max_tokens": 1, "gradient_clipping": 0}


def check(run):
    s, R, plan = run.settings, run.settings["tensor"], {}
    try:
        if s["model"]:
            plan = transformers.AutoConfig.from_pretrained(
                s["model"]).base_model_tp_plan or {"": ""}           #| without one DeepSpeed guesses by names
        _, examples, size = prepare(run)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SettingsError(f"cannot use model={s['model']}, data="
            + " ".join(f"{s['data']}: {error}".split())) from None
    for wrong, text in (
        (R < 2 or run.world % R,
         f"tensor={R} does not cut {run.world} ranks into groups, "
         "two or more each. Give tensor=2 and RANKS=4."),
        (set(s["stage"].split(",")) - set("0123"),
         f"stage={s['stage']} is none of 0 to 3. Give stage=1."),
        ("0" in s["stage"] and s["dtype"] == "bf16",                 #| ds:engine.weight_norm (read: refused here)
         "stage=0 in bf16 clips by tensor rank 0; give stage=1."),
        (any(s[name] < least for name, least in LEAST.items()),
         f"a setting is too small. The least are {LEAST}."),
        (s["learning_rate"] <= 0, "learning_rate is not above 0."),
        (set(plan.values()) - {"colwise", "rowwise"},
         f"model={s['model']}: transformers has no plan of plain "
         "cuts for it. Give a Llama or a Qwen2."),
        (not examples, f"no step of {size} examples has answers "
         "in max_tokens. Raise it or lower micro_batch.")):
        if wrong:
            raise SettingsError(text)


# == 2. What is an example? (upstream 128-149) ===============================================================
def questions(path):
    if path:
        rows = json.loads(Path(path).read_text())
        for n, x in enumerate(rows if type(rows) is list else "?"):
            if type(x) is not dict or {str} != {type(x.get(key))
                    for key in ("instruction", "output")}:
                raise ValueError(f"example {n}: give a list of "
                                 '{"instruction": "2 + 3?", '
                                 '"output": "5"}')
        return rows
    return [
        {"instruction": "What does this do in Python?",
         "input": f"{kind.__name__}.{name}",
         "output": getattr(kind, name).__doc__.split("\n\n")[0]}
        for kind in (str, bytes, int, float, list, dict, set)
        for name in dir(kind) if name[0] != "_"]                     #| some 150, the same on every rank


# == 3. Which tokens are learned? (upstream 20-43 and 89-125) ================================================
def encode(example, coder, limit):
    """(ids, labels) of an example, both [tokens]."""
    prompt = f"### Question\n{example['instruction']}\n"
    if example.get("input"):
        prompt += f"### Given\n{example['input']}\n"
    asked = coder(prompt + "### Answer\n").input_ids                 #| apart from the answer: in one text a token
    answer = coder(example["output"],                                #| may cross the border, and a mask counted
                   add_special_tokens=False).input_ids               #| on the prompt alone ends too early or late
    answer.append(coder.eos_token_id)                                #| learned too, or a model never stops
    labels = [-100] * len(asked) + answer                            #| cross_entropy leaves -100 out of sum and count
    return (torch.tensor((asked + answer)[:limit]),
            torch.tensor(labels[:limit]))


def prepare(run):
    """Tokenizer, encoded examples, and how many a step has."""
    s, coder = run.settings, transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(TOKENIZER), eos_token=END)
    if s["model"]:
        coder = AutoTokenizer.from_pretrained(s["model"])
    if coder.pad_token is None:
        coder.add_special_tokens({"pad_token": "[PAD]"})             #| a row of V that no answer reads
    pairs = [encode(example, coder, s["max_tokens"])
             for example in questions(s["data"])]
    pairs = [pair for pair in pairs if any(pair[1][-1:] >= 0)]       #| the others are cut before their answer
    N = run.world // max(1, s["tensor"])                             #| R ranks read the same rows
    size = max(1, s["micro_batch"] * s["accumulation"] * N)
    return coder, pairs[:len(pairs) // size * size], size            #| no step spans two epochs


# == 4. How do uneven examples become batches, and whose? (upstream 169-192) =================================
def endless(examples, size, N, n, seed, pad, device):
    """ids, labels and mask, [size, T], for data rank n of N."""
    def collate(pairs):
        ids, labels = zip(*pairs)                                    #| T may differ between data ranks: only the R
        fill = partial(pad_sequence, batch_first=True)               #| ranks of a layer exchange activations
        return {"labels": fill(labels, padding_value=-100),
                "input_ids": fill(ids, padding_value=pad),
                "attention_mask": fill(                              #| by length; by `is it pad?`, as upstream's, it
                    [torch.ones_like(one) for one in ids])}          #| hides the end where one token is both
    sampler = DistributedSampler(examples, N, n, seed=seed)          #| each N-th of one order: N batches are a batch
    loader = DataLoader(examples, size, sampler=sampler,             #| of one rank, as of the one process below
                        collate_fn=collate)
    for epoch in count():
        sampler.set_epoch(epoch)                                     #| else each epoch has the order of the first
        for batch in loader:
            yield {k: rows.to(device) for k, rows in batch.items()}


# == 5. Which model, and how long is its vocabulary? (upstream 65-86 and 195-225) ============================
def build(s, coder, seed):
    """The whole model, in fp32, on the host."""
    torch.manual_seed(seed)                                          #| one seed on all ranks: R of them cut one model
    model = AutoModelForCausalLM.from_pretrained(
        s["model"], dtype=torch.float32) if s["model"] else \
        LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    model.resize_token_embeddings(                                   #| before initialize: later the head is a part
        max(len(coder), model.config.vocab_size),
        pad_to_multiple_of=s["tensor"],                              #| upstream's V + 1 is cut unevenly, and padded
        mean_resizing=False)                                         #| each time that logits are gathered
    return model


# == 6. What is DeepSpeed told? (upstream configs/ds_config_temp.json) =======================================
def deepspeed_config(s, stage):
    return {
        "train_micro_batch_size_per_gpu": s["micro_batch"],          #| with a train_batch_size of N ranks it is
        "gradient_accumulation_steps": s["accumulation"],            #| refused: all R x N count as data ranks
        "gradient_clipping": s["gradient_clipping"],                 #| left out, it is 1.0
        "tensor_parallel": {
            "autotp_size": s["tensor"],                              #| this alone switches AutoTP on
            "tp_overlap_comm": False,                                #| True: backward's sums beside its products
            "vocab_parallel_lm_head": False},                        #| True: no rank sees all V logits; None: so where
        "zero_optimization": {                                       #| head and embedding are one
            "stage": stage, "reduce_bucket_size": 5_000_000,         #| elements of gradient, sent to N ranks at once
            "stage3_param_persistence_threshold": 1000,              #| elements; smaller parts are not cut once more
            "stage3_gather_16bit_weights_on_model_save": True},      #| upstream's name lacks stage3_: both are read
        "optimizer": {"type": "AdamW", "params": {
            "lr": s["learning_rate"], "betas": [0.9, 0.95],
            "torch_adam": True, "weight_decay": 0.0,                 #| eps above the noise of fp32 sums, about 1e-8,
            "eps": 1e-6}},                                           #| which Adam would blow up to whole steps
        "bf16": {"enabled": s["dtype"] == "bf16"}}


# == 7. What happens in a step, on both axes? (upstream 254-264) =============================================
def one_step(engine, batches, meter, N):
    """Train on a step's micro-batches -> (loss, norm)."""
    others, total = groups.get_data_parallel_group(), 0              #| the N ranks with this part and other rows
    answers = sum((b["labels"] != -100).sum() for b in batches)
    comm.all_reduce(answers, group=others)                           #| ds:comm.all_reduce; a mean of uneven means is
    mean = answers / (N * len(batches))                              #| another mean: divide all by the mean count
    meter.clear()
    meter.counting = True
    for batch in batches:
        meter.phase = "forward"
        loss = engine(**batch, num_items_in_batch=mean).loss         #| ds:engine.forward; R ranks compare their first
                                                                     #| rows: ds:autotp.same_batch. Column layers send
                                                                     #| nothing: ds:autotp.column; row layers B T D over
                                                                     #| R: ds:autotp.row, ds:autotp.row_sum; the head
                                                                     #| B T V logits: ds:autotp.gather_output
        meter.phase = "backward"
        engine.backward(loss)                                        #| ds:engine.backward; ds:autotp.column_sum: B T D
                                                                     #| over R a column layer. P / R over N: stage 1
                                                                     #| the last, ds:zero12.reduce_all, 2 at each batch,
                                                                     #| ds:zero12.hook, and 3: ds:zero3.reduce_scatter
        meter.phase = "step"
        engine.step()                                                #| ds:engine.update; the norm has parts of all R
                                                                     #| and whole tensors once: ds:zero12.norm_direct,
                                                                     #| ds:engine.clip_norm; Adam on P / R / N, then a
                                                                     #| gather over N: ds:zero12.adam, ds:zero12.gather
        total = total + loss.detach() / (N * len(batches))
    meter.counting = False
    comm.all_reduce(total, group=others)                             #| not over R, where all have this loss
    return total.item(), float(engine.get_global_grad_norm() or 0)   #| 0 in stage 0, which clips and forgets it


# == 8. What does a rank hold and send? (upstream 226-253) ===================================================
def look(engine, config, meter, batches, N):
    """This rank's place, cuts and bytes: [counted, by formula]."""
    cut, sent, counted = {}, Counter(), Counter()
    parts = {name: getattr(p, "ds_shape", p.shape)                   #| stage 3 cuts once more; this is before that
             for name, p in engine.module.named_parameters()}
    tensors = deepspeed_memory.Tensors(
        tuple(map(torch.Size.numel, parts.values())))                #| P / R and some: embedding, norms are not cut
    place = [groups.get_tensor_model_parallel_rank(),                #| rank % R: neighbours share a layer, whose
             groups.get_data_parallel_rank()]                        #| sums are many, and each is waited for
    held = deepspeed_memory.by_kind(deepspeed_memory.memory(         #| ZeRO's own formula, with P / R and N
        tensors, config, ranks=N, rank=place[1]))
    held.pop("buffer", None)
    size = deepspeed_memory.element_bytes(config) * sum(
        b["input_ids"].numel() for b in batches)                     #| of one column of activations, padding too
    for name, layer in engine.module.named_modules():                #| each has made its own cut
        if not isinstance(layer, layers.TensorParallel_Layer):
            continue
        rows, columns = layer._orig_weight_shape
        cut[name] = [(rows, columns), parts[name + ".weight"]]
        if isinstance(layer, layers.LinearAllreduce):                #| o and down
            sent["tensor_forward_all_reduce"] += size * rows
        else:                                                        #| q, k, v, gate, up, head; the head is gathered
            sent["tensor_backward_all_reduce"] += size * columns
            sent["tensor_forward_all_gather"] += (
                size * rows * layer.gather_output)
    for one in traffic(tensors, config, ranks=max(N, 2),
                       accumulation=len(batches)):
        key = f"_{one.phase}_{one.kind}"
        for axis in ["data"] * (N > 1) + ["tensor"] * (
                key == "_step_all_reduce"):                          #| squares of the norm, the flag of an overflow
            sent[axis + key] += one.payload_bytes
    for (phase, kind, nbytes, axis), times in meter.rows.items():
        counted[f"{axis}_{phase}_{kind}"] += times * nbytes
    return {"place": place, "cut": cut, "sent": [counted, +sent],
            "held": [ledger.totals(ledger.held(engine)[0]), held]}


# == 9. How do whole weights come out? (upstream 266-271) ====================================================
def save(engine, folder, batch, rank):
    """Save whole weights; on rank 0 what that comes to."""
    engine.eval()                                                    #| a module's: no dropout
    with torch.no_grad():
        before = engine(**batch).loss.item()                         #| by all ranks: a layer needs all R of them
    engine.save_16bit_model(str(folder), "by_deepspeed.bin")         #| below stage 3 rank 0 writes its parts as all:
                                                                     #| ds:ckpt.save_16bit; in 3 ds:ckpt.gather_16bit
    whole = engine._consolidated_16bit_state_dict()                  #| by all ranks, to rank 0's host: ds:ckpt.whole,
                                                                     #| ds:autotp.consolidate, ds:autotp.whole_layer,
                                                                     #| ds:autotp.gather_part, ds:autotp.cut_again
    if rank.rank:
        return {}
    AutoModelForCausalLM.from_config(engine.module.config) \
        .save_pretrained(folder, state_dict=dict(whole))             #| it empties the dict that it is given
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=next(iter(whole.values())).dtype)
    with torch.no_grad():
        after = plain.to(engine.device)(**batch).loss.item()
    theirs = torch.load(folder / "by_deepspeed.bin")
    parts = sum(theirs[n].shape != whole[n].shape for n in whole)
    return {"saved_parts_count": parts, "loaded_loss_nats": after,
            "saved_loss_nats": before}


# == 10. What would one process do? (not upstream) ===========================================================
def one_process(s, coder, examples, size, device):
    """Train the whole model in plain torch -> [(loss, norm)]."""
    model = build(s, coder, s["seed"]).to(device)
    told, rows = [], endless(examples, size, 1, 0, s["seed"],
                             coder.pad_token_id, device)
    adam = torch.optim.AdamW(
        model.parameters(), s["learning_rate"], betas=(0.9, 0.95),
        eps=1e-6, weight_decay=0.0)
    for batch in islice(rows, s["steps"]):
        loss = model(**batch).loss                                   #| T of the longest of all: more padding only
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(                       #| adds up in fp32, 1e-5 off for the embedding;
            model.parameters(), s["gradient_clipping"] or 1e9)       #| DeepSpeed's in fp64
        adam.step()
        adam.zero_grad()
        told.append((loss.item(), norm.item()))
    return told


# == 11. Which two mistakes are easily made, and who notices? (not upstream) =================================
def mistakes(s, coder, rank):
    """A seed for each rank, and a sampler over all ranks."""
    seed = s["seed"] + rank.rank
    model = build({**s, "model": None}, coder, seed)                 #| 1: each rank keeps its part of its own model
    ids, refused = torch.arange(64).view(2, 32), ""
    sampler = DistributedSampler(range(64))                          #| 2: by default over all ranks
    with torch.no_grad():
        own = model(ids, labels=ids).loss.item()
        engine, _, _, _ = deepspeed.initialize(                      #| N ranks get one part, ds:init.broadcast; R
            model=model, config=deepspeed_config(s, 1))              #| ranks are not compared
        ids = ids.to(engine.device)
        try:
            engine(ids[:1] + sampler.rank, labels=ids[:1])           #| raises on all R ranks: ds:autotp.same_batch,
        except AssertionError as error:                              #| which looks at the first forward only
            refused = str(error)
        mixed = engine(ids, labels=ids).loss.item()                  #| parts of two models: nobody objects. Embeddings
    engine.destroy()                                                 #| now differ in R; rank 0's are saved
    return own, mixed, refused


# == 12. One stage, from a whole model to a saved one (upstream 195-275) =====================================
def train_stage(run, rank, stage, meter, coder, examples):
    s, steps, ranks = run.settings, [], [None] * run.world
    R, config = s["tensor"], deepspeed_config(s, int(stage))
    N = run.world // R
    engine, _, _, _ = deepspeed.initialize(                          #| ds:init.initialize; keys: ds:config.load,
        model=build(s, coder, s["seed"]),                            #| ds:config.autotp_section, ds:config.batch,
        config=config)                                               #| ds:autotp.merge. ds:autotp.configure: a mesh,
                                                                     #| ds:autotp.groups, ds:autotp.mesh; the plan,
                                                                     #| ds:autotp.model_plan, ds:autotp.plan; layers,
                                                                     #| ds:autotp.apply, ds:autotp.replace; whole heads,
                                                                     #| ds:autotp.sizes; their rows or columns,
                                                                     #| ds:autotp.cut_column, ds:autotp.cut_row. ZeRO
                                                                     #| gets P / R: ds:zero12.init, ds:zero3.convert
    rows = endless(examples, s["micro_batch"], N, rank.rank // R,    #| by data rank: R neighbours read the same rows
                   s["seed"], coder.pad_token_id, engine.device)
    meter.axes = {                                                   #| the Meter tells calls apart by their group
        groups.get_data_parallel_group(): "data",
        groups.get_tensor_model_parallel_group(): "tensor"}
    for step in range(s["steps"]):
        batches = list(islice(rows, s["accumulation"]))
        steps.append(one_step(engine, batches, meter, N))
        if rank.rank == 0 and step % 8 == 0:
            print("step", step, steps[-1][0], file=sys.stderr)
    comm.all_gather_object(                                          #| ds:comm.timed
        ranks, look(engine, config, meter, batches, N))
    folder = run.folder / f"stage{stage}"
    counts = save(engine, folder, batches[0], rank) | {
        "loss_nats_first": steps[0][0],
        "loss_nats_last": steps[-1][0],
        "train_batch_size_count": engine.train_batch_size()}         #| R times too many: all ranks count as data ranks
    engine.destroy()                                                 #| ds:engine.destroy
    return {"steps": steps, "ranks": ranks, "counts": counts}


# == 13. The run, and what it says (not upstream) ============================================================
def train(run):
    meter = Meter().install()                                        #| before DeepSpeed keeps torch's functions
    rank, s = run.join(), run.settings
    transformers.utils.logging.disable_progress_bar()
    coder, examples, size = prepare(run)
    stages = {n: train_stage(run, rank, n, meter, coder, examples)
              for n in s["stage"].split(",")}
    own, mixed, refused = mistakes(s, coder, rank)
    if rank.rank:
        return comm.barrier()                                        #| waits for rank 0: ds:comm.timed
    alone = (one_process(s, coder, examples, size, rank.device)
             if s["one_process"] else [])
    measured, predicted = {"whole_model_loss_nats": own,
                           "seed_per_rank_loss_nats": mixed}, {}
    for n, one in stages.items():
        here, first = f"stage{n}_", one["ranks"][0]
        measured |= {here + k: v for k, v in one["counts"].items()}
        predicted[here + "train_batch_size_count"] = size
        if alone:
            measured[here + "one_process_gap_nats_max"] = max(abs(   #| in fp32 1e-5 at most: R and N ranks add in
                a[0] - b[0]) for a, b in zip(one["steps"], alone))   #| another order, which rounds at 6e-8 of a value
        for what in ("held", "sent"):
            for key, nbytes in first[what][1].items():
                name = f"{here}{what}_{key}_bytes"
                measured[name] = first[what][0].get(key, 0)
                predicted[name] = nbytes
    for name, (whole, part) in first["cut"].items():
        if ".layers." not in name or ".layers.0." in name:
            print(f"{name:34} {whole} -> {tuple(part)}")
    print(f"{'':46}{'counted':>14}{'by formula':>14}")
    for key, value in measured.items():
        print(f"{key:46}{round(value, 7):14,}",
              f"{predicted[key]:13,}" if key in predicted else "")
    print("a sampler over all ranks:", refused)
    run.record(rank, measured, predicted, details={
        "stages": stages, "alone": alone, "refused": refused})
    comm.barrier()                                                   #| ds:comm.timed


if __name__ == "__main__":
    program.main(__file__, CONFIG, train, check, cpu_ranks=4)
