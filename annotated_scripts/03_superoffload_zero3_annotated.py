"""Fine-tunes a causal language model by ZeRO-3 with its optimizer on the host, stepped after backward or during it.

What to learn here: what ZeRO-Offload moves to the host, and what a step then waits for; what SuperOffload changes (as
backward still runs, another process steps each tile of the weights whose gradient is there), what that costs when a
step overflows, and that the losses stay the same to the last bit.

    python annotated_scripts/03_superoffload_zero3_annotated.py
    python annotated_scripts/03_superoffload_zero3_annotated.py gradient_clipping=1.0 precision=bf16
    python annotated_scripts/03_superoffload_zero3_annotated.py overflow_step=10
    python annotated_scripts/03_superoffload_zero3_annotated.py model=moe leaf=MixtralSparseMoeBlock
    python annotated_scripts/03_superoffload_zero3_annotated.py model=FOLDER data=TEXTS learning_rate=1e-5 save=True

No GPU is needed. mode=both trains twice, each time with fresh ranks (an engine of stage 3 is not freed in its process),
and compares step by step. SuperOffload refuses all devices but CUDA: on a CPU three named shims (section 5) let it run,
which shows its order and its arithmetic. To save time it needs a GPU, which trains while the cores step the optimizer.

Upstream: 487 lines, with shell scripts that write two configs,
https://github.com/deepspeedai/DeepSpeedExamples/blob/45b4b7156c87/training/DeepSpeed-SuperOffload/finetune_zero3.py
Ours differs where that goes wrong: its attention needs a package that is not installed; its rate, decay and warm-up
never reach the optimizer; its configs set no clipping, and the default of 1.0 turns off the very step during backward;
its scripts run fewer steps than they leave untimed; its loss counts padding; it saves on rank 0 alone, where all must.
Our record replaces its wandb. More than 300 lines, because the trial of the worker, the shims and the comparison of
two modes stand beside the training.

Proof:
    model=gpt2 checkpointing=model overflow_step=4 steps=4 layers=1 hidden=32 seq=32
    model=moe leaf=MixtralSparseMoeBlock gradient_clipping=0.5 overflow_step=2 precision=bf16 save=True layers=1 steps=4
"""

import math
import sys
import time
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from yardstick import data, formulas, program, shapes
from yardstick.settings import Choice, Either, SettingsError

import deepspeed
import deepspeed.runtime.superoffload.superoffload_stage3 as so3
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.dataloader import RepeatingLoader
from deepspeed.utils import set_z3_leaf_modules
from transformers import AutoConfig, AutoModelForCausalLM

# == 1. What can be set? (upstream 382-487) ====================================================================
                                                                     #| B sequences, T tokens, P parameters, N ranks
CONFIG = {
    "mode": Choice("both", "zero_offload", "superoffload"),          #| both: in turn, and compared
    "model": "llama",                                                #| llama, gpt2, moe: random; or folder, hub name
    "layers": 4, "hidden": 128, "heads": 4,                          #| of llama, gpt2 and moe
    "attention": Choice("auto", "sdpa", "eager",                     #| auto: flash on a GPU that has the package,
                        "flash_attention_2"),                        #| else sdpa; eager keeps B*heads*T*T scores
    "leaf": Either(str),                                             #| class of blocks that are gathered whole
    "checkpointing": Choice("deepspeed", "model", "none"),           #| whose activation checkpointing
    "precision": Choice("auto", "fp32", "bf16"),                     #| auto: bf16 on a GPU
    "steps": 20, "untimed_steps": 3,                                 #| optimizer steps; the first of them, not timed
    "seq": 64, "micro_batch": 2, "accumulation": 2,                  #| T; B of a forward; forwards of a step
    "learning_rate": 3e-3, "warmup_steps": 5,                        #| its peak, and the steps up to it
    "weight_decay": 0.01, "seed": 1,                                 #| of matrices, not of biases; of the weights
    "gradient_clipping": 0.0,                                        #| largest norm of the gradient; 0: none, and only
                                                                     #| then SuperOffload steps during backward
    "sub_group_size": 50_000,                                        #| elements of a rank's share that make a tile
    "ratio": 1.0, "cores": 0.8,                                      #| share of tiles for the host, of cores for Adam
    "overflow_step": Either(int),                                    #| in it the last rank's loss is infinite
    "save": False, "data": "embedded",                               #| a checkpoint at the end; or a text file, folder
    "record": Either(str), "output": Either(str),                    #| label of a kept record; the run's folder
}
LOCAL = "llama", "gpt2", "moe"                                       #| built here; s, below, are the settings


def turns(settings):
    return [{"mode": mode} for mode in CONFIG["mode"].words[1:]      #| fresh ranks for each; see program.main
            if settings["mode"] in (mode, "both")]


# == 2. Which model, which attention, what is kept for backward? (upstream 106-158) ============================
def model_config(s):
    """(transformers config, ModelShape or None if unknown)."""
    if s.model not in LOCAL:
        config, shape = AutoConfig.from_pretrained(s.model), None
        config.use_cache = False                                     #| keys and values serve generation only
        with suppress(ValueError):                                   #| FLOPs of this kind of model are not known
            shape, _ = shapes.from_config_json(config.to_dict())
            shape = replace(shape, seq=s.seq)
        return config, shape
    sizes = s.layers, s.hidden, s.heads, data.VOCAB, s.seq
    shape = shapes.ModelShape(*sizes, gated=s.model != "gpt2")
    fields = shapes.config_json(shape)
    fields["loss_type"] = "ForCausalLM"                              #| GPT-2's class has a name that does not tell
    if s.model == "moe":                                             #| a Mixtral: its router sends a token to two of
        shape = replace(shape, experts=4, top_k=2)                   #| four experts
        fields |= {"model_type": "mixtral", "num_local_experts": 4,
                   "num_experts_per_tok": 2}
    return AutoConfig.for_model(**fields), shape


def build(s):
    """(model, ModelShape or None), whole on this rank."""
    config, shape = model_config(s)
    dtype = "bfloat16" if s.precision == "bf16" else "float32"
    options = {"dtype": dtype, "attn_implementation": s.attention}
    torch.manual_seed(s.seed)
    if s.model in LOCAL:                                             #| 2P or 4P bytes per rank until initialize cuts
        model = AutoModelForCausalLM.from_config(config, **options)  #| it; in zero.Init random weights would lose
    else:                                                            #| the deviations that transformers gives them
        model = AutoModelForCausalLM.from_pretrained(
            s.model, config=config, **options)
    if s.leaf:
        set_z3_leaf_modules(model, [s.leaf])                         #| ds:zero3.leaf: the block in one gather; experts
                                                                     #| that are modules would stall where ranks differ
    if s.checkpointing == "deepspeed":
        deepspeed.checkpointing.configure(                           #| ds:observe.checkpointing_options, left to the
            None, partition_activations=False,                       #| caller by the engine. Each of these two
            checkpoint_in_cpu=False,                                 #| empties the input, so a residual outside the
            contiguous_checkpointing=False)                          #| unit would add garbage: ours is a decoder
        model._set_gradient_checkpointing(                           #| layer, both residuals in it. DeepSpeed's is
            True, deepspeed.checkpointing.checkpoint)                #| our default: it alone can cut or move inputs
    elif s.checkpointing == "model":                                 #| the model's own is torch's: the same losses,
        model.gradient_checkpointing_enable(                         #| and no graph within the graph
            gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, shape


# == 3. Two configs, one key apart (upstream finetune_llama-8b_1gpu.sh 60-102) =================================
def deepspeed_config(s, gpu):
    return {
        "train_micro_batch_size_per_gpu": s.micro_batch,
        "gradient_accumulation_steps": s.accumulation,
        "gradient_clipping": s.gradient_clipping,                    #| left out it is 1.0, not 0
        "bf16": {"enabled": s.precision == "bf16"},                  #| no fp16: its scale would still be in early tiles
        "scheduler": {"type": "WarmupLR", "params": {
            "warmup_min_lr": s.learning_rate / s.warmup_steps,
            "warmup_max_lr": s.learning_rate,
            "warmup_num_steps": s.warmup_steps,
            "warmup_type": "linear"}},
        "zero_force_ds_cpu_optimizer": True,                         #| refuses a slower Adam of torch on the host
        "dataloader_drop_last": True, "steps_per_print": None,
        "log_level": "error",                                        #| after an overflow it would warn that weights
        "wall_clock_breakdown": False,                               #| "were not updated" (section 8). Upstream's True
        "zero_optimization": {                                       #| synchronises at each phase
            "stage": 3, "overlap_comm": False,
            "reduce_bucket_size": 500_000,                           #| elements of gradients that travel at once
            "stage3_prefetch_bucket_size": 500_000,
            "stage3_param_persistence_threshold": 1000,              #| by default 100000: small models stay whole
            "stage3_max_live_parameters": 10**9,
            "stage3_max_reuse_distance": 10**9,
            "sub_group_size": s.sub_group_size,                      #| by default 1e9: one tile, nothing overlaps
            "offload_optimizer": {                                   #| fp32 share, gradient and moments on the host:
                "device": "cpu",                                     #| 16P/N bytes
                "pin_memory": gpu,                                   #| by default True; it is for a GPU's copies
                "ratio": s.ratio,                                    #| a GPU's tiles get a torch AdamW, whose first
                                                                     #| group keeps the rate it is built with
                "cpuadam_cores_perc": s.cores,
                "super_offload": s.mode == "superoffload"}}}         #| the key; below stage 3 it is ignored


# == 4. What cannot work is refused before a rank starts (upstream 453-471) ====================================
def check(run):
    chosen, s = run.settings, SimpleNamespace(**run.settings)
    flash = run.gpu and find_spec("flash_attn") is not None
    if s.precision == "auto":
        s.precision = "bf16" if run.gpu else "fp32"
    if s.attention == "auto":
        s.attention = "flash_attention_2" if flash else "sdpa"
    chosen |= vars(s)

    def demand(key, right, why):
        if not right:
            raise SettingsError(f"{key}={chosen[key]} {why}.")

    for key in ("layers", "hidden", "heads", "seq", "micro_batch",
                "accumulation", "warmup_steps", "sub_group_size",
                "learning_rate", "cores"):
        demand(key, chosen[key] > 0, "must be above 0")
    for key in "gradient_clipping", "weight_decay", "seed":
        demand(key, chosen[key] >= 0, "must be 0 or more")
    demand("cores", s.cores <= 1, "must be at most 1")
    demand("untimed_steps", 0 <= s.untimed_steps < s.steps,
           f"leaves none of steps={s.steps} to be timed")
    demand("overflow_step", 1 <= (s.overflow_step or 1) <= s.steps,
           f"is none of the steps 1 to {s.steps}")
    demand("ratio", s.ratio == 1 or run.gpu and 0 <= s.ratio < 1,    #| without one DeepSpeed ignores it, unsaid
           "must lie between 0 and 1, and be 1 without a GPU")
    demand("attention", flash or s.attention in ("sdpa", "eager"),
           "needs a GPU and flash_attn; give attention=auto")
    demand("model", not Path(s.model).is_dir()
           or any(Path(s.model).glob("*.safetensors")),
           "is a folder without *.safetensors")
    try:
        with torch.device("meta"):                                   #| no storage: it is only asked what it has
            config, _ = model_config(s)
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=s.attention)
        text = windows(s)
    except (OSError, ValueError, ImportError) as error:
        first = str(error).partition("\n")[0].rstrip(". ")
        demand("model", False, f"with data={s.data}: {first}")
    blocks = {type(block).__name__ for block in model.modules()}
    demand("leaf", s.leaf in (None, *blocks),
           f"is none of the model's {', '.join(sorted(blocks))}")
    most = model.config.max_position_embeddings
    demand("seq", s.seq <= most, f"is above the model's {most}")
    demand("data", len(text) >= run.world * s.micro_batch,
           f"has {len(text)} windows of {s.seq} tokens, too few")
    run.ops.append("cpu_adam")                                       #| compiled once, before any rank starts


# == 5. What a CPU lacks: three shims (not upstream) ===========================================================
def stand_in():
    """Let SuperOffload run without CUDA; no GPU calls this."""
    so3._validate_superoffload_accelerator = lambda: None            #| 1. ds:superoffload.check (read: branch of CUDA)
    get_accelerator().current_stream = lambda *_: SimpleNamespace(   #| 2. None on a CPU; a GPU waits on it until the
        synchronize=lambda: None)                                    #| gradient of a tile has reached the host
    worker = so3.SuperOffloadCPUOptimizer
    worker._set_cpu_affinity = lambda *_: None                       #| 3. ds:superoffload.cores (read: branch of CUDA):
                                                                     #| 0.8 of two cores leaves training the empty list,
                                                                     #| which psutil takes for all


# == 6. The data (upstream 81-103, 171-205) ====================================================================
def windows(s):
    """The text as [windows, T] token ids, still in its file."""
    tokenizer = None if s.model in LOCAL else s.model
    text = data.load(s.data, tokenizer).train
    return text[:len(text) // s.seq * s.seq].reshape(-1, s.seq)      #| upstream fills short samples with padding and
                                                                     #| trains on that as well; here is none


# == 7. The worker alone: a step, and taking it back (not upstream) ============================================
def try_worker(engine, rate):
    """Adam and its rollback on a tile of our own -> {measured}."""
    worker = engine.optimizer.superoffload_cpu_optimizer
    size = min(1000, engine.optimizer.max_grad_numel)                #| its buffer holds no larger gradient
    weights = torch.linspace(-1, 1, size)
    gradient, before = weights.cos(), weights.clone()
    gradient[size // 3] = math.inf
    began, seconds = time.perf_counter(), []
    for rollback in (False, True):
        worker.async_step(0, -1, weights, gradient,                  #| ds:superoffload.submit; -1 is no tile of the
                          rollback=rollback, lr=rate)                #| model, so it gets moments of its own
        while worker.get_result() is None:                           #| ds:superoffload.result; the weights went to
            time.sleep(0.01)                                         #| shared memory when sent, and change there
        seconds.append(time.perf_counter() - began)                  #| the first: until it has imported everything.
    lost = (weights == 0) & (before != 0)                            #| Untried, the first step of training would wait
    apart = (weights - before)[~lost].abs().max()                    #| for that, and give up after 60 s
    return {"worker_start_seconds": seconds[0],                      #| ds:superoffload.adam_rollback (read: C++ there)
            "rollback_zeroed_count": lost.sum().item(),              #| inverts Adam to within a rounding; a weight that
            "rollback_difference_ratio": apart.item()}               #| Adam has made NaN becomes 0


# == 8. Where does the optimizer run, and who waits for it? (upstream 288-360) =================================
def fit(engine, batches, s, rank):
    """Train -> (losses, seconds, seconds in step, {measured})."""
    from tqdm import tqdm
    optimizer, measured, lost = engine.optimizer, {}, {}
    early = s.mode == "superoffload"
    losses, seconds, waits = [], [], []
    for step in tqdm(range(1, s.steps + 1), s.mode, mininterval=1,
                     disable=rank.rank > 0):
        overflow = step == s.overflow_step
        before = zeros(optimizer) if overflow else 0
        began, mean = now(), torch.zeros((), device=engine.device)
        for _ in range(s.accumulation):
            x_BT = next(batches).to(engine.device)                   #| ds:init.repeat: each epoch in the same order
            loss = engine(input_ids=x_BT, labels=x_BT).loss          #| ds:engine.forward. A module is gathered by
                                                                     #| ds:zero3.before_forward, ds:zero3.fetch_impl and
                                                                     #| ds:zero3.gather and cut by ds:zero3.release;
                                                                     #| ds:observe.checkpointing keeps a layer's input
            if overflow and rank.rank == rank.world - 1:
                loss = loss * math.inf
            mean += loss.detach() / s.accumulation
            engine.backward(loss)                                    #| ds:engine.backward. ds:observe.recompute: a
                                                                     #| layer runs again, gathered twice more
                                                                     #| (ds:zero3.before_backward). ds:zero3.hook,
                                                                     #| ds:zero3.fill_bucket, ds:zero3.reduce_scatter
                                                                     #| cut its gradient; ds:zero3.keep_share and
                                                                     #| ds:offload.boundary3 take it to the host, 4P/N.
                                                                     #| ds:superoffload.backward does too, and gives a
                                                                     #| complete tile away (ds:superoffload.submit)
            last = engine.is_gradient_accumulation_boundary()        #| ds:engine.boundary
            if early and last:
                sent = len(optimizer._submitted_cpu_sub_groups)
                back = sent - optimizer.async_cpuadam_num
                measured = {"stepped_in_backward_count": sent,
                            "of_them_back_before_step_count": back}
            updating = now()
            engine.step()                                            #| ds:engine.step, ds:engine.update. In
                                                                     #| ds:zero3.step ds:zero3.norms, then by tile
                                                                     #| ds:zero3.clip, ds:offload.adam (a GPU idles),
                                                                     #| ds:zero3.write_back. ds:superoffload.step awaits
                                                                     #| tiles under way (ds:superoffload.wait) and
                                                                     #| writes them back (ds:superoffload.unclipped).
                                                                     #| With clipping the norm is first and Adam is here
                                                                     #| (ds:superoffload.clipped, ds:superoffload.sync),
                                                                     #| without it is late: ds:superoffload.rollback
        seconds.append(now() - began)
        waits.append(now() - updating)
        comm.all_reduce(mean)                                        #| ds:comm.all_reduce
        losses.append((mean / rank.world).item())
        if overflow:
            lost = {"zeroed_count": zeros(optimizer) - before}
        if broken(s, engine.skipped_steps):
            break
    lost["skipped_steps"] = engine.skipped_steps
    return losses, seconds, waits, measured | lost


def broken(s, skipped):
    return (skipped and s.mode == "superoffload"                     #| the rollback has lost fp32 weights; one step
            and not s.gradient_clipping)                             #| later those that compute are NaN, for ever


def now():
    get_accelerator().synchronize()                                  #| upstream reads the clock while a GPU computes
    return time.perf_counter()


def zeros(optimizer):
    return sum(int((tile == 0).sum()) for tile in                    #| of this rank's fp32 weights
               optimizer.fp32_partitioned_groups_flat)


# == 9. One mode, from model to checkpoint (upstream 161-168, 225-265, 363-380) ================================
def train(run):
    s, rank = SimpleNamespace(**run.settings), run.join()            #| ds:init.process_group, ds:init.accelerator
    program.watch_workers()                                          #| DeepSpeed waits a minute for a dead one
    early = s.mode == "superoffload"
    if early and not run.gpu:
        stand_in()
    model, shape = build(s)
    thin = [p for p in model.parameters() if p.dim() < 2]
    wide = [p for p in model.parameters() if p.dim() > 1]
    adam = DeepSpeedCPUAdam(                                         #| ds:offload.adam_init. The worker makes its own
        [{"params": wide, "weight_decay": s.weight_decay},           #| by each group's rate, betas, eps and decay,
         {"params": thin, "weight_decay": 0.0}],                     #| not by the arguments: always AdamW with bias
        lr=s.learning_rate)                                          #| correction and fp32 moments
    engine, *_ = deepspeed.initialize(                               #| ds:init.initialize, ds:config.load,
        model=model, optimizer=adam,                                 #| ds:config.clipping, ds:init.optimizer,
        config=deepspeed_config(s, run.gpu))                         #| ds:init.schedule. ds:init.zero_optimizer picks
                                                                     #| ds:zero3.class_init or ds:superoffload.init.
                                                                     #| ds:zero3.attach cuts the model; its share is cut
                                                                     #| by ds:zero3.sub_groups or ds:superoffload.tiles
                                                                     #| and copied to the host by ds:zero3.master.
                                                                     #| ds:superoffload.start spawns the worker
    measured = try_worker(engine, s.learning_rate) if early else {}
    loader = engine.deepspeed_io(                                    #| ds:init.loader, ds:init.sampler: a rank's own
        windows(s), pin_memory=run.gpu, num_local_io_workers=0,      #| windows, cut by two processes unless told
        collate_fn=lambda rows: torch.tensor(
            [row.tolist() for row in rows]))
    losses, seconds, waits, counts = fit(
        engine, iter(RepeatingLoader(loader)), s, rank)              #| ds:init.workers
    sizes = [p.ds_numel for p in model.parameters()]                 #| p.numel() is 0 where p is cut
    measured |= {**counts, "model_parameters": sum(sizes),
                 "tiles_count": len(engine.optimizer.fp16_groups)}
    if s.save and not broken(s, engine.skipped_steps):
        engine.save_checkpoint(str(run.folder), s.mode)              #| ds:ckpt.save, ds:ckpt.save_zero: every rank, for
        file, = (run.folder / s.mode).glob(                          #| its barriers. It writes what this process has;
            f"*zero_pp_rank_{rank.rank}_*_optim_states.pt")          #| SuperOffload's moments are in the worker, and a
        measured["saved_optimizer_bytes"] = file.stat().st_size      #| run that resumes begins without them
    if early:
        engine.optimizer.superoffload_cpu_optimizer.close()          #| ds:superoffload.close: nobody else ends it.
        del engine.optimizer.superoffload_cpu_optimizer              #| With it go the semaphores of its queues
    if rank.rank == 0:
        report(run, rank, measured, losses, seconds, waits, shape)


# == 10. How fast, and is it the same? (upstream 59-78, 208-222, 267-286) ======================================
def report(run, rank, measured, losses, seconds, waits, shape):
    """Print and record this mode, beside the other if it ran."""
    s = SimpleNamespace(**run.settings)
    timed = slice(s.untimed_steps, None)                             #| untimed: buffers are made, the order of modules
    if seconds[timed]:                                               #| is recorded; stage 3 prefetches from the second
        middle = median(seconds[timed])                              #| forward on
        batch = s.micro_batch * s.accumulation * rank.world
        measured |= {
            "step_seconds_median": middle,
            "in_engine_step_seconds_median": median(waits[timed]),
            "tokens_per_second": batch * s.seq / middle}
        if shape:                                                    #| once forward, twice backward, no recomputation;
            flops = formulas.train_flops(shape, batch)               #| upstream counts that and the embedding's look-up
            measured["tflops_per_second"] = flops / middle / 1e12
    if known := [loss for loss in losses if math.isfinite(loss)]:
        measured |= {"loss_nats_first": known[0],
                     "loss_nats_last": known[-1]}
    losses = [loss if loss in known else None for loss in losses]
    modes = run.beside({"measured": measured, "losses": losses})
    print(program.columns({mode: one["measured"]
                           for mode, one in modes.items()}))
    if len(modes) == 2:
        pairs = zip(*(one["losses"] for one in modes.values()))
        apart = [abs(a - b) for a, b in pairs if a and b]
        most = max(apart, default=0)
        print(f"{len(apart)} losses differ by {most:.3g} at most")
        measured |= {"compared_steps": len(apart),
                     "loss_difference_nats_max": most}
    run.record(rank, measured, {} if not shape else {
        "model_parameters": formulas.param_count(shape)},
        details={"modes": modes})
    if broken(s, measured["skipped_steps"]):
        end = print if s.overflow_step else sys.exit
        end(f"Step {len(losses)} overflowed: the rollback lost "
            "weights, the run ends. Clipping prevents that.")


# == 11. The worker imports this file too (upstream 475-487) ===================================================
if __name__ == "__mp_main__":                                        #| the file's name in a process that is spawned:
    program.worker(["cpu_adam"])                                     #| ds:superoffload.worker (read: worker process)
if __name__ == "__main__":                                           #| ends with its rank. Unguarded, the next line
    program.main(__file__, CONFIG, train, check, turns=turns)        #| would train there too
