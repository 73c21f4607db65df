"""Trains a GPT whose layers are DeepSpeed's Domino layers, or the same GPT in the stages of DeepSpeed's pipeline.

What to learn here: how a tensor-parallel layer hides its sums over ranks (one half of the batch computes while that of
the other travels), what a program with a model-parallel unit hands to DeepSpeed, and what a pipeline asks of a model.

    python annotated_scripts/06_domino_megatron_annotated.py
    python annotated_scripts/06_domino_megatron_annotated.py variant=intra hidden=256 steps=10
    python annotated_scripts/06_domino_megatron_annotated.py mode=pipeline zero=1

No GPU is needed; with GPUs the same program runs on them. It records a forward and a backward of two layers, shows what
ran while a sum travelled (timeline.png in the run's folder, and as letters), compares with torch's own layer, trains,
and compares with one process. On a CPU threads on the same cores make the sums: the order is a GPU's, the gain not.

Upstream is pretrain_gpt.py (114 lines), with its folder domino/ on a Megatron-LM of 2023, in
https://github.com/deepspeedai/DeepSpeedExamples/tree/45b4b7156c8794a3452a5a7d03dbd8d797068569/training/DeepSpeed-Domino
It does not start today: its Megatron-LM is an empty folder, it needs Apex, and it calls CUDA whatever the device. Ours
writes out what it needs of Megatron, keeps embedding and logits whole on each rank, and takes DeepSpeed's engine with a
model-parallel unit in place of Megatron's optimizer. The pipeline follows training/pipeline_parallelism/train.py there.

Letters: B sequences of a micro-batch, T tokens of each, D hidden, V vocabulary, N ranks that share a layer. More than
300 lines, because Megatron's part, the recording and both comparisons stand beside what DeepSpeed does.

Proof:
    zero=1 layers=2 hidden=64 seq=16 micro_batch=4 accumulation=2 steps=4 optimizer=SGD learning_rate=0.3
    variant=intra layers=2 hidden=64 seq=16 micro_batch=4 accumulation=2 steps=4
    mode=pipeline zero=1 layers=2 hidden=64 seq=16 micro_batch=4 accumulation=4 steps=4 optimizer=SGD learning_rate=0.3
    mode=pipeline layers=2 hidden=64 seq=16 micro_batch=4 accumulation=4 steps=4
    mode=pipeline model_parallel=1 layers=2 hidden=64 seq=16 micro_batch=4 accumulation=2 steps=4
"""

import math
import sys
import warnings
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from yardstick import data, program, timeline
from yardstick.settings import Choice, Either, SettingsError

import deepspeed
import deepspeed.comm as dist
import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.domino import transformer as domino
from deepspeed.runtime.pipe import topology
from torch import nn

# == 1. What can be set, and what is DeepSpeed told? (not upstream) ==========================================
CONFIG = {
    "mode": Choice("domino", "pipeline"),                            #| layers cut over ranks, or whole layers in stages
    "variant": Choice("inter", "intra"),                             #| domino: overlap across layers, or within each
    "model_parallel": 2,                                             #| ranks of one model; other ranks replicate it
    "zero": 0,                                                       #| stage 0, or 1 over ranks that hold equal weights
    "steps": 30,                                                     #| optimizer steps
    "micro_batch": 8,                                                #| B, even in domino mode, which halves it
    "accumulation": 4,                                               #| micro-batches of a step; a pipeline wants many
    "seq": 64,                                                       #| T
    "layers": 4,                                                     #| of attention and MLP
    "hidden": 128,                                                   #| D
    "heads": 4,                                                      #| of attention, shared out over a layer's ranks
    "optimizer": Choice("AdamW", "SGD"),                             #| SGD shows a wrong factor in gradients, Adam not
    "learning_rate": 2e-3,                                           #| constant
    "gradient_clipping": 1.0,                                        #| largest norm of the whole gradient; 0: none
    "seed": 1,                                                       #| of weights and data
    "reference": True,                                               #| each rank trains the model alone too, to compare
    "record": Either(str),                                           #| LABEL: keep the record under results/LABEL
    "output": Either(str),                                           #| folder of the run; None: a new one under runs/
}

def deepspeed_config(s):
    return {
        "train_micro_batch_size_per_gpu": s["micro_batch"],
        "gradient_accumulation_steps": s["accumulation"],            #| a pipeline has so many to fill its stages with
        "gradient_clipping": s["gradient_clipping"],                 #| left out, it would be 1.0
        "zero_optimization": {"stage": s["zero"]},                   #| a pipeline refuses 2 and 3
        "zero_allow_untested_optimizer": True}                       #| SGD is not on ZeRO's list

def optimizer_of(s, parameters):
    return getattr(torch.optim, s["optimizer"])(                     #| the caller's, as Megatron's is, of what this
        parameters, lr=s["learning_rate"], weight_decay=0)           #| rank holds: shards, or a stage

# == 2. What does the model compute? (upstream domino/language_model.py 123-320, domino/gpt_model.py 16-122) =
class Words(nn.Embedding):                                           #| V D, whole on each rank; Megatron cuts V
    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.02)

    def logits(self, x_TBD):
        return F.linear(x_TBD, self.weight).transpose(0, 1)          #| B T V: the same table, tied

class Places(nn.Module):
    def __init__(self, T, D):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(T, 1, D))

    def forward(self, x_BTD):
        return (x_BTD.transpose(0, 1) + self.weight).contiguous()    #| T B D: Megatron's order; a stage sends no view

class Block(nn.TransformerEncoderLayer):                             #| torch's own: to compare with, and for stages
    def __init__(self, D, heads):
        super().__init__(D, heads, 4 * D, dropout=0.0,
                         activation="gelu", norm_first=True)         #| norms before attention and MLP, as in GPT-2

    def forward(self, x_TBD, **_):                                   #| the masks that TransformerEncoder hands on
        causal = nn.Transformer.generate_square_subsequent_mask(
            len(x_TBD), x_TBD.device)
        return super().forward(x_TBD, causal, is_causal=True)

def unsplit(s, layers):
    return nn.TransformerEncoder(
        Block(s["hidden"], s["heads"]), layers,
        nn.LayerNorm(s["hidden"]), enable_nested_tensor=False)       #| its fast path is of no use when training

class GPT(nn.Module):
    def __init__(self, s, transformer):
        super().__init__()
        torch.manual_seed(s["seed"])                                 #| the same on all ranks: these are not cut
        self.words = Words(data.VOCAB, s["hidden"])
        self.places = Places(s["seq"], s["hidden"])
        self.transformer = transformer

    def forward(self, tokens, labels_BT):                            #| Megatron's: labels in, a loss per token out
        x_TBD = self.places(self.words(tokens))
        x_TBD = self.transformer(x_TBD, None)                        #| no mask: ds:domino.attention is always causal
        return token_losses(self.words.logits(x_TBD), labels_BT)

def token_losses(logits_BTV, labels_BT):
    return F.cross_entropy(logits_BTV.transpose(1, 2).float(),
                           labels_BT, reduction="none")

def masked_mean(mask_BT, losses):
    return (losses * mask_BT).sum() / mask_BT.sum().clamp(min=1)     #| of one micro-batch; a step is the mean of these

# == 3. What of a layer is cut, and what has to be put right? (upstream domino/language_model.py 323-427) ====
def split_layers(s, grid, layers):
    torch.manual_seed(s["seed"] + 10_000 * (                         #| a seed per rank: with one for all, every rank
        1 + grid.get_slice_parallel_rank()))                         #| would draw the same shard
    normal = partial(nn.init.normal_, std=0.02)
    transformer = domino.DominoTransformer(                          #| ds:domino.init: 12 D D / N weights per layer
        SimpleNamespace(                                             #| all that it reads of Megatron's configuration
            num_layers=layers, hidden_size=s["hidden"],
            ffn_hidden_size=4 * s["hidden"],
            num_attention_heads=s["heads"],                          #| N has to divide them: ds:domino.heads
            kv_channels=s["hidden"] // s["heads"],
            params_dtype=torch.float32, layernorm_epsilon=1e-5,
            perform_initialization=True, init_method=normal,         #| but ds:domino.row_init leaves its biases
            output_layer_init_method=normal,                         #| as the memory was found
            add_bias_linear=True, gated_linear_unit=False,
            hidden_dropout=0.0, attention_dropout=0.0,               #| the second acts in evaluation too
            apply_residual_connection_post_layernorm=False,          #| True: backward adds to sums that still travel
            domino_intra_layer_overlap=s["variant"] == "intra"),
        grid, None, domino.ModelType.encoder_or_decoder              #| a global keeps the first group for all layers
    ).to(s["device"])                                                #| of the process: ds:domino.group
    for name, p in transformer.named_parameters():
        column = "query_key_value" in name or "linear_fc1" in name   #| outputs cut: their input gradients are summed
        row = name.endswith(("dense.weight", "linear_fc2.weight"))   #| inputs cut: their outputs are summed
        p.tensor_model_parallel = column or row                      #| Megatron's mark: its norm counts on every rank
        p.partition_dim = 0 if column else 1                         #| on this one; others on the first rank only
        if name.endswith(("dense.bias", "linear_fc2.bias")):
            nn.init.zeros_(p)
        if not p.tensor_model_parallel:                              #| what is not cut has to start equal, and then
            dist.broadcast(p.data, grid.slice_group[0],              #| stays equal; DeepSpeed sends weights only to
                           grid.get_slice_parallel_group())          #| replicas of a shard: ds:comm.timed
    return transformer

NAMES = {"input_layernorm": "norm1", "linear_fc1": "linear1",
         "self_attention.query_key_value.": "self_attn.in_proj_",
         "self_attention.dense": "self_attn.out_proj",
         "post_attention_layernorm": "norm2",
         "linear_fc2": "linear2", "final_layernorm": "norm"}

def whole(s, module, grid, of=lambda p: p):
    """{torch's name: full tensor} of shards or their gradients."""
    found = {}
    for name, p in module.named_parameters():
        full = of(p).detach().clone()
        if getattr(p, "tensor_model_parallel", False):
            all_of_it = [full.clone() for _ in grid.slice_group]
            dist.all_gather(all_of_it, full,                         #| N times the shard comes in
                            grid.get_slice_parallel_group())
            full = torch.cat(all_of_it, dim=p.partition_dim)
        if "query_key_value" in name:                                #| rows are q, k, v of a head, then of the next, so
            full = full.unflatten(0, (s["heads"], 3, -1))            #| that a shard has whole heads; torch's are all q,
            full = full.transpose(0, 1).flatten(0, 2)                #| all k, all v
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        found[name] = full
    return found

def gap(ours, theirs):
    """The largest difference, as a share of the largest value."""
    most = theirs.abs().max().clamp(min=1e-12)                       #| weights and gradients differ in size by orders
    return ((ours.to(most) - theirs).abs().max() / most).item()

# == 4. What runs while a sum travels, and is the result right? (not upstream) ===============================
PARTS = {
    "input_layernorm": "norm", "post_attention_layernorm": "norm",
    "self_attention.query_key_value": "qkv", "linear_fc1": "fc1",
    "self_attention.core_attention": "attention",
    "self_attention.dense": "dense", "linear_fc2": "fc2",
    "bias_dropout_add_func": "residual"}
LETTERS = dict(
    norm="n", qkv="q", attention="a", dense="d", fc1="1", gelu="g",
    fc2="2", residual="r", waits="w", sum="=")
PRODUCTS = {"qkv", "attention", "dense", "fc1", "fc2"}               #| of matrices: work that is worth hiding behind

def two_layers(run, s, grid):
    split, known = split_layers(s, grid, 2), unsplit(s, 2)
    known.to(s["device"]).load_state_dict(whole(s, split, grid))     #| the gathered shards fill torch's layers exactly
    torch.manual_seed(s["seed"])
    x, gradient = torch.randn(2, s["seq"], s["micro_batch"],
                              s["hidden"]).to(s["device"])
    x_known = x.clone().requires_grad_()
    y_known = known(x_known)
    y_known.backward(gradient)
    tape, original = timeline.Recorder(), dist.all_reduce
    for layer in split.layers:
        tape.modules(layer, PARTS)
        layer.mlp_activation_func = tape.timed("gelu", F.gelu)       #| a function, no module; fixed by Domino
    dist.all_reduce = tape.sending(original, "sum")                  #| the name by which Domino calls it
    y = tape.passes(split, (x.requires_grad_(), None), gradient)     #| ds:domino.row starts no sum, the schedule does;
                                                                     #| backward begins with the latest node, so halves
                                                                     #| alternate: ds:domino.column starts a sum, and
                                                                     #| ds:domino.wait is where ds:domino.wait_node was
    dist.all_reduce = original
    gradients = whole(s, split, grid, lambda p: p.grad)              #| what is not cut has its whole gradient as well
    measured = {
        "output_gap_ratio": gap(y, y_known),
        "input_gradient_gap_ratio": gap(x.grad, x_known.grad),
        "weight_gradient_gap_ratio_max": max(
            gap(gradients[name], p.grad)
            for name, p in known.named_parameters()),
        "all_reduce_count": len(tape.sent),
        "all_reduce_bytes": sum(one.bytes for one in tape.sent),
        **{f"{phase}_hidden_count": tape.hidden(phase, PRODUCTS)
           for phase in tape.phases}}
    if dist.get_rank() == 0:                                         #| of all ranks: each recorded its own, alike
        print(timeline.report(tape, LETTERS, PRODUCTS, "half {}",
            run.folder / "timeline.png",
            f"Two Domino layers, {s['variant']}-layer overlap"))
    return measured, {
        "all_reduce_count": 2 * 8,                                   #| 2 forward and 2 backward, for each half
        "all_reduce_bytes": 2 * 4 * x.nbytes}                        #| as without halves: twice as many, half as big

# == 5. What does Megatron's loop ask of a model? (upstream 59-110, domino/training.py 654-726) ==============
def windows(s, part, parts):
    batches = data.Batches(
        s["tokens"], window=s["seq"] + 1, seed=s["seed"],
        global_batch=s["micro_batch"] * s["accumulation"] * parts)
    for step in range(s["steps"]):
        yield from torch.from_numpy(batches.step(
            step, part, parts, s["accumulation"]))

def unpack(s, window_BT1):
    tokens, labels = window_BT1[:, :-1], window_BT1[:, 1:]
    return tokens, labels, (tokens != s["end"]).float()              #| how the next text begins is not learnt

def forward_step(s, batches, engine):
    window = torch.empty(s["micro_batch"], s["seq"] + 1,
                         dtype=torch.int64, device=s["device"])
    if batches:
        window.copy_(next(batches))                                  #| only the first rank of a layer has batches
    dist.broadcast(window, engine.mpu.slice_group[0],                #| one reader for the ranks of a layer: different
                   engine.mpu.get_slice_parallel_group())            #| tokens would be summed without an error
    tokens, labels, mask = unpack(s, window)
    return engine(tokens, labels), partial(masked_mean, mask)        #| ds:engine.forward, in it ds:domino.forward or
                                                                     #| ds:domino.intra with ds:domino.layer

def train_step(step, batches, engine):
    total, mpu = torch.zeros((), device=engine.device), engine.mpu
    micro_batches = engine.gradient_accumulation_steps()             #| ds:engine.accumulation
    for _ in range(micro_batches):
        output, loss_function = step(batches, engine)                #| apart, so that a last stage alone could make it
        loss = loss_function(output)
        engine.backward(loss)                                        #| ds:engine.backward divides by micro-batches
        engine.step()                                                #| ds:engine.step, its norm by ds:engine.shard_mark
        total += loss.detach() / micro_batches
    dist.all_reduce(total, group=mpu.get_data_parallel_group())      #| one number, for the log
    return total.item() / mpu.get_data_parallel_world_size()         #| ranks of a layer have one loss

def domino_trainer(s, grid, replicas):
    model = GPT(s, split_layers(s, grid, s["layers"]))
    engine, *_ = deepspeed.initialize(                               #| ds:init.initialize ds:init.engine
        model=model, config=deepspeed_config(s), mpu=grid,           #| ds:config.batch counts replicas, not ranks
        optimizer=optimizer_of(s, model.parameters()))               #| ds:init.broadcast within the replicas of a shard
    batches, part = None, grid.get_data_parallel_rank()              #| a replica reads its own part
    if grid.get_slice_parallel_rank() == 0:                          #| others get it by a broadcast
        batches = windows(s, part, replicas)
    step = partial(forward_step, s)
    return (lambda: train_step(step, batches, engine),
            lambda: whole(s, model, grid))

# == 6. And a pipeline? (not upstream) =======================================================================
def pipeline_trainer(s, stages, replicas, names):
    D, heads = s["hidden"], s["heads"]
    words = partial(TiedLayerSpec, "words", Words, data.VOCAB, D)
    net = PipelineModule(                                            #| ds:pipe.grid: ranks of a stage are neighbours
        [words(), LayerSpec(Places, s["seq"], D),                    #| a spec is built where its stage is:
         *[LayerSpec(Block, D, heads)] * s["layers"],                #| ds:pipe.build ds:pipe.spec
         LayerSpec(nn.LayerNorm, D),                                 #| a tied layer has a copy on each of its stages:
         words(forward_fn=Words.logits)],                            #| ds:pipe.tied ds:pipe.tied_start
        num_stages=stages, loss_fn=lambda x, answer: masked_mean(
            answer[1], token_losses(x, answer[0])),
        partition_method="parameters", seed_layers=True,             #| ds:pipe.partition
        base_seed=s["seed"], seed_fn=lambda number:
            torch.manual_seed(int(number)))                          #| its own function refuses the number it is given
    for p in net.parameters():                                       #| for ZeRO 0: ZeRO 1 counts all stages unasked;
        p.model_parallel = not p.ds_pipe_replicated                  #| without it all stages clip by the first's norm
    engine, *_ = deepspeed.initialize(                               #| ds:pipe.engine, as this is a PipelineModule, of
        model=net, config=deepspeed_config(s),                       #| which it takes the grid as mpu
        optimizer=optimizer_of(s, net.parameters()))
    part = engine.mpu.get_data_parallel_rank()                       #| first and last stage read the same batches
    batches = ((tokens, answer) for tokens, *answer in (
        unpack(s, each) for each in windows(s, part, replicas)))
    def weights():
        held = [None] * stages * replicas
        dist.all_gather_object(held, [
            p.detach().cpu() for p in net.parameters()
            if not p.ds_pipe_replicated])                            #| the last stage's copy of the words is left out
        held = chain.from_iterable(held[::replicas])
        return dict(zip(names, held, strict=True))                   #| stages hold their layers in the model's order
    return lambda: engine.train_batch(batches).item(), weights       #| ds:pipe.train_batch: ds:pipe.schedule and in
                                                                     #| ds:pipe.execute ds:pipe.load ds:pipe.forward
                                                                     #| ds:pipe.send ds:pipe.receive ds:pipe.backward
                                                                     #| ds:pipe.send_gradient (both B T D values), last
                                                                     #| ds:pipe.tied_gradients ds:pipe.reduce
                                                                     #| ds:pipe.update ds:engine.clip_norm ds:pipe.loss

# == 7. Does one process train the same model? (upstream 113-114) ============================================
def one_process(s, model, replicas):
    count = s["accumulation"] * replicas
    batches = windows({**s, "accumulation": count}, 0, 1)            #| the same micro-batches, those of all replicas
    optimizer = optimizer_of(s, model.parameters())
    for _ in range(s["steps"]):
        losses = []
        for each in islice(batches, count):
            tokens, labels, mask = unpack(s, each.to(s["device"]))
            losses.append(masked_mean(mask, model(tokens, labels)))
            (losses[-1] / count).backward()                          #| as engine.backward does, over all replicas
        nn.utils.clip_grad_norm_(model.parameters(), (
            s["gradient_clipping"] or float("inf")))
        optimizer.step()
        optimizer.zero_grad()
        yield torch.stack(losses).mean().item()

def train(run):
    from tqdm import trange as bar
    warnings.filterwarnings("ignore", message="c10d::")              #| that autograd does not know the gradient of a
    rank, corpus = run.join(), data.load()                           #| sum in place: it is 1, as Domino wants it
    end = corpus.tokenizer.token_to_id(data.END)
    s = {**run.settings, "tokens": corpus.train, "end": end,
         "device": rank.device}
    n, measured, predicted = s["model_parallel"], {}, {}
    replicas = run.world // n
    known = GPT(s, unsplit(s, s["layers"])).to(rank.device)
    names = dict(known.named_parameters())
    if s["mode"] == "domino":
        grid = topology.PipelineParallelGrid(                        #| DeepSpeed's own mpu: neighbours share layers,
            topology.PipeModelDataParallelTopology(                  #| every N-th rank is a replica; all ranks make all
                num_pp=1, num_mp=n, num_dp=replicas))                #| groups, in one order
        grid.get_tensor_model_parallel_group = (                     #| a name that Domino asks for, and this mpu lacks
            grid.get_slice_parallel_group)
        measured, predicted = two_layers(run, s, grid)
        step, weights = domino_trainer(s, grid, replicas)
    else:
        step, weights = pipeline_trainer(s, n, replicas, names)
    known.load_state_dict(weights())                                 #| one process starts from the gathered weights
    losses = [step() for _ in bar(s["steps"], disable=rank.rank)]
    measured["loss_nats_first"] = losses[0]
    measured["loss_nats_last"] = losses[-1]
    if s["reference"]:
        alone, ours = one_process(s, known, replicas), weights()
        measured["loss_gap_nats_max"] = max(
            abs(a - b) for a, b in zip(losses, alone, strict=True))
        measured["weight_gap_ratio_max"] = max(                      #| far with AdamW: the keys' bias has no gradient,
            gap(ours[name], p) for name, p in names.items())         #| so that its step is noise over noise
    if rank.rank == 0:
        shown = losses[::max(1, s["steps"] // 10)]
        print("loss", *(f"{loss:.3f}" for loss in shown))
        print(program.columns(
            {"measured": measured, "predicted": predicted}))
    run.record(rank, measured, predicted, None, {"losses": losses})

def check(run):
    s, cut = run.settings, run.settings["mode"] == "domino"
    n, heads, L = s["model_parallel"], s["heads"], s["layers"]
    most = {"micro_batch * heads * seq * seq": 10**8,                #| of one attention's scores: all fit in memory
            "micro_batch * seq": 10**8 // data.VOCAB,                #| V logits each
            "layers * hidden * hidden": 10**8 // 12,                 #| of 12 D D weights
            "micro_batch * accumulation * seq": 10**8}               #| tokens that a step reads at once
    least = {"learning_rate": 0, "gradient_clipping": 0, "seed": 0}
    least |= dict.fromkeys("steps micro_batch accumulation seq "
                           "layers hidden heads".split(), 1)
    for wrong, text in (
        *((not s[k] >= low, f"{k}={s[k]}: give {low} or more")
          for k, low in least.items()),
        (s["seed"] >> 32, f"seed={s['seed']} is not below 2**32"),
        (s["zero"] not in (0, 1), f"zero={s['zero']}: give 0, 1"),
        (n < 1 or run.world % n, f"model_parallel={n} does not "
         f"divide {run.world} ranks: give another, or more RANKS"),
        (heads > 0 and s["hidden"] % heads, f"heads={heads} does "
         f"not divide hidden={s['hidden']}: change one of them"),
        (n > 0 and cut and heads % n, f"model_parallel={n} does "
         f"not divide heads={heads}: change one of them"),
        (cut and s["micro_batch"] % 2, "micro_batch="
         f"{s['micro_batch']} cannot be halved: give an even one"),
        (not cut and n > L + 2, f"model_parallel={n}: give at "
         f"most {L + 2} stages for layers={L}"),
        *(((size := math.prod(map(s.get, of.split(" * ")))) > high,
           f"{of} is {size:,}, above {high:,}: lower one of them")
          for of, high in most.items())):
        if wrong:
            raise SettingsError(text + ".")

if __name__ == "__main__":
    program.main(__file__, CONFIG, train, check)
