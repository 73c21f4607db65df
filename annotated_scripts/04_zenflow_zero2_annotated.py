"""Fine-tunes a Llama with ZeRO-2, the optimizer on the host, and ZenFlow, which steps the important columns first.

With the optimizer on the host the device waits in every step for the CPU's Adam. ZenFlow steps a tenth of each matrix's
columns, those of the largest gradients, at once and on the device. The gradients of the rest add up for some rounds (a
round is a forward and a backward) and are then stepped on the host, or, overlapped, by a worker process while the next
rounds run. What to learn here: which columns these are and what they carry of the gradient, when the others move, how
long step() stalls, and what the defects of 0.19.8 do to the result, each beside the lines that mend it.

    python annotated_scripts/04_zenflow_zero2_annotated.py
    python annotated_scripts/04_zenflow_zero2_annotated.py mode=overlapped rounds=200 dtype=bf16 seq=128
    python annotated_scripts/04_zenflow_zero2_annotated.py mode=sequential model=FOLDER data=FOLDER learning_rate=2e-5

The first command trains four times on the same batches and compares: without ZenFlow, with it at update interval 1, in
sequence, overlapped. The other modes train once and save. No GPU is needed; the defects are no matter of the CPU. A GPU
adds the gain in time, measured there, printed as not run elsewhere: on a CPU the worker takes its cores from the model.

Upstream: 112 lines, with a config beside it,
https://github.com/deepspeedai/DeepSpeedExamples/blob/45b4b71/training/DeepSpeed-ZenFlow/finetuning/finetune_llama.py
It trains weights that initialize has scrambled, saves on one rank, which dies of it, and ignores its learning rate.

Letters: B sequences of a micro-batch, T tokens, R rows and C columns of a matrix, E elements, P parameters, N ranks, U
update interval. More than 300 lines, because what ZenFlow promises and what is wrong with it are measured together.

Proof:
    rounds=12 warm_up=2 hidden=32 seq=16 micro_batch=2
    mode=overlapped rounds=12 warm_up=0 epoch=8 hidden=32 seq=16 micro_batch=2 dtype=bf16
    mode=sequential rounds=9 warm_up=1 hidden=32 seq=16 micro_batch=2 gradient_clipping=0.5
"""

import os
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from yardstick import data, program
from yardstick.settings import Choice, Either, SettingsError

import deepspeed
import numpy as np
import torch
from deepspeed import comm
from deepspeed.runtime.dataloader import RepeatingLoader
from deepspeed.runtime.zenflow import zenflow_utils


# == 1. What can be set? (upstream 95-112, zf_config.json 1-28) ==============================================
CONFIG = {
    "mode": Choice("compare", "overlapped", "sequential", "plain"),  #| the last three train once, and save
    "rounds": 20,                                                    #| forwards and backwards
    "update_interval": 4,                                            #| rounds from one host update to the next
    "warm_up": 4,                                                    #| rounds that step everything, at first
    "topk_ratio": 0.1,                                               #| share of the columns that is stepped at once
    "epoch": 32,                                                     #| rounds of one; each chooses columns anew
    "micro_batch": 4,                                                #| sequences of one rank and round
    "seq": 64,                                                       #| tokens of a sequence
    "hidden": 192,                                                   #| width of the Llama made where no model is given
    "model": Either(str),                                            #| folder or hub name of a causal LM to fine-tune
    "data": "embedded",                                              #| or a text file, a folder of them, hub:NAME
    "weight": "model.layers.0.mlp.down_proj.weight",                 #| the matrix that is looked at
    "dtype": Choice("fp32", "bf16"),                                 #| of weights and gradients on the device
    "learning_rate": 1e-3,                                           #| constant
    "gradient_clipping": 0.0,                                        #| largest norm of what waits; 0: none
    "output": Either(str),                                           #| folder of the run; None: a new one under runs/
    "record": Either(str),                                           #| LABEL: keep the record in results/LABEL/
}


def check(run):
    s, U = run.settings, run.settings["update_interval"]
    epoch, least = s["epoch"], s["warm_up"] + 2 * U
    run.ops.append("cpu_adam")                                       #| the host's Adam, in C++

    def refuse(wrong, *text):
        if wrong:
            raise SettingsError(" ".join(text))
    for low, name in (1, "update_interval"), (1, "micro_batch"), (
            1, "seq"), (0, "warm_up"), (0, "gradient_clipping"):
        refuse(s[name] < low, f"{name}={s[name]} is below {low}.")
    refuse(s["learning_rate"] <= 0, "give learning_rate above 0.")
    refuse(not 0 < s["topk_ratio"] < 1, f"topk_ratio="               #| not 1.0: ds:config.zenflow (read: a class)
           f"{s['topk_ratio']} must be above 0 and below 1.")
    refuse(epoch < U, f"epoch={epoch} must be {U} or more.")
    refuse(s["hidden"] < 8 or s["hidden"] % 8, "hidden must be a",
           f"multiple of 8, as 64 is, not {s['hidden']}.")
    refuse(s["rounds"] < least, f"rounds={s['rounds']} end before",
           f"an update comes home. Give rounds={least} or more.")
    try:
        run.corpus = data.load(s["data"], tokenizer=s["model"])
        with torch.device("meta"):                                   #| names and shapes only
            model = llama(s, run.corpus.vocab)
    except (OSError, ValueError) as error:
        raise SettingsError(" ".join(str(error).split()))
    dims = {name: w.dim() for name, w in model.named_parameters()}
    refuse(dims.get(s["weight"]) != 2 or max(dims.values()) > 2,
           f"weight={s['weight']} is no matrix, or the model has",
           "convolutions. Its weights:", ", ".join(dims))
    need = epoch * s["micro_batch"] * s["seq"] * run.world
    refuse(need > len(run.corpus.train), f"epoch={epoch} takes",
           f"{need} tokens, of {len(run.corpus.train)}. Lower it.")


# == 2. What is trained, on what? (upstream 20-56) ===========================================================
def llama(s, vocab, trained=False):
    import transformers as hub
    if trained and s["model"]:
        return hub.AutoModelForCausalLM.from_pretrained(
            s["model"], dtype=torch.float32)                         #| the file's own dtype would be kept
    config = hub.LlamaConfig(
        vocab_size=vocab, hidden_size=s["hidden"],
        intermediate_size=3 * s["hidden"], num_attention_heads=4,
        num_hidden_layers=2, max_position_embeddings=s["seq"])
    if s["model"]:
        config = hub.AutoConfig.from_pretrained(s["model"])
    return hub.AutoModelForCausalLM.from_config(config)


# == 3. What does DeepSpeed have to be told? (upstream 58-68, zf_config.json 1-28) ===========================
def deepspeed_config(run, kind):
    s = run.settings
    U, warm_up = s["update_interval"], s["warm_up"]
    if kind == "interval_1":
        U, warm_up = 1, 0                                            #| every round steps everything: the split is left
    zero = {"stage": 2,                                              #| or 1, to the same end; 3 asks for CUDA by name
            "reduce_bucket_size": 5_000_000,                         #| elements of gradients reduced at once
            "offload_optimizer": {                                   #| 12 P / N bytes of masters and moments; ZenFlow
                "device": "cpu", "pin_memory": run.gpu}}             #| refuses to do without
    if kind != "plain":
        zero["zenflow"] = {
            "topk_ratio": s["topk_ratio"], "offload": False,         #| moments of chosen columns stay on the device
            "update_interval": U, "full_warm_up_rounds": warm_up,    #| whole: auto, the default, divides the loss by 0
            "select_strategy": "auto", "select_interval": "auto",    #| once in an epoch; a number beside auto raises
            "overlap_step": kind == "overlapped",
            "pt_reserved_cores_perc": 0.5}                           #| share of its cores that a rank keeps
    return {"train_micro_batch_size_per_gpu": s["micro_batch"],
            "gradient_accumulation_steps": 1,                        #| overwritten by U
            "gradient_clipping": s["gradient_clipping"],             #| chosen columns move before the norm is known,
            "bf16": {"enabled": s["dtype"] == "bf16"},               #| unclipped; so clipping ends equality with plain
            "zero_optimization": zero,
            "optimizer": {"type": "AdamW", "params": {               #| two of it are made; torch_adam here raises
                "lr": s["learning_rate"], "betas": [0.9, 0.999],
                "eps": 1e-8, "weight_decay": 0.01}}}


# == 4. What does initialize do to the weights? (upstream 58-68) =============================================
def build(run, rank, kind):
    """-> engine, batches, and what initialize did, mended."""
    s, size = run.settings, run.settings["epoch"] * rank.world
    torch.manual_seed(1)
    model = llama(s, run.corpus.vocab, trained=True)
    before = [one.detach().clone() for one in model.parameters()]
    tokens = run.corpus.train[:size * s["micro_batch"] * s["seq"]]
    rows_ST = tokens.astype(np.int64).reshape(-1, s["seq"])          #| S = epoch B N: the loader's length is the epoch
    engine, optimizer, loader, _ = deepspeed.initialize(             #| ds:init.initialize; accumulation becomes U:
        model=model,                                                 #| ds:zenflow.configure. In sequence or overlapped:
        model_parameters=model.parameters(),                         #| ds:zenflow.create. Adam of all, on the host:
        training_data=list(torch.from_numpy(rows_ST)),               #| ds:zenflow.adam_init; of chosen: ds:zenflow.init
        config=deepspeed_config(run, kind))                          #| matrices, packed by column, ds:zenflow.pack, and
                                                                     #| seen by row, ds:zero12.views, are scrambled
    loader.num_local_io_workers, loader.pin_memory = 0, run.gpu      #| else two processes per rank load these rows
    tokens_BT = next(iter(loader)).to(rank.device)                   #| ds:init.workers

    def changed():
        pairs = zip(model.parameters(), before)
        return [(now, was.to(now)) for now, was in pairs
                if not torch.equal(now, was.to(now))]
    wrong = changed()
    facts = {"transposed_count": sum(
        torch.equal(now.flatten(), was.t().flatten())
        for now, was in wrong)}
    with torch.no_grad():
        loss = model(input_ids=tokens_BT, labels=tokens_BT).loss
    facts["transposed_loss_nats_first"] = mean(rank, loss).item()
    if wrong:
        look_by_columns(optimizer)
    facts["mended_changed_count"] = len(changed())
    facts["accumulation_steps"] = (
        engine.gradient_accumulation_steps())                        #| ds:engine.accumulation: U
    return engine, RepeatingLoader(loader), facts                    #| in one order, each epoch


def look_by_columns(optimizer):
    """Make weights views of the buffer as packed, by column."""
    def views(group):
        flat = optimizer.bit16_groups_flat[group]
        for weight, start in zip(
                optimizer.round_robin_bit16_groups[group],
                optimizer.round_robin_bit16_offsets[group]):
            packed = flat.narrow(0, start, weight.numel())
            if weight.dim() == 2:                                    #| no copy. Gradients are packed by column too,
                packed = packed.view(weight.shape[::-1]).t()         #| so without this updates miss their weights
            weight.data = packed
    optimizer._update_model_bit16_weights = views                    #| called again at each update
    for group in range(len(optimizer.bit16_groups)):
        views(group)


# == 5. Which columns are important? (not upstream) ==========================================================
def choose_among_matrices(optimizer):
    """Take vectors out of a bucket before columns are chosen."""
    choose = optimizer.update_selected_channels                      #| it leaves out their places: wrong columns result
    def without_vectors(bucket_E, size, dtype):
        bucket, end, parts = optimizer.ipg_buckets[dtype], 0, []
        params, bucket.params = bucket.params, []
        for group, index, number in params:
            weight = optimizer.bit16_groups[group][index]
            end += weight.numel()
            if weight.dim() == 2:
                bucket.params.append((group, index, number))
                parts.append(bucket_E[end - weight.numel():end])
        if parts:
            choose(torch.cat(parts), size, dtype)                    #| ds:zenflow.choose
        bucket.params = params
    optimizer.update_selected_channels = without_vectors             #| harmless where the count is right


# == 6. What has to be done for a worker, and after it? (not upstream) =======================================
def prepare_for_worker(optimizer, s, waits):
    optimizer.first_update_round_after_warmup = s["warm_up"] > 0     #| else without warm-up a wait is left out, and all
    split = zenflow_utils._compute_zf_pt_affinity                    #| later ones end too early, perhaps mid-update
    mine = sorted(os.sched_getaffinity(0))

    def cores(optimizer):
        found = split(optimizer)                                     #| ds:zenflow.cores; fewer cores than ranks give an
        return found if all(found) else (mine, mine)                 #| empty list, for psutil all cores of the machine
    zenflow_utils._compute_zf_pt_affinity = cores
    wait = optimizer._wait_for_optimizer_process

    def timed():
        begun = time.perf_counter()
        wait()                                                       #| ds:zenflow.wait_worker
        waits.append(time.perf_counter() - begun)
    optimizer._wait_for_optimizer_process = timed


def bring_home(optimizer):
    """Take the worker's update over, but for chosen columns."""
    groups = optimizer.bit16_groups
    optimizer.selective_optimizer.temp_copy_param(                   #| ds:zenflow.keep_columns
        dict(enumerate(groups)))
    optimizer.wait_last_update_and_copy()                            #| ds:zenflow.wait, ds:zero12.gather
    optimizer.first_update_round_after_warmup = True                 #| the next boundary has nothing to wait for
    for weight in (weight for group in groups for weight in group):
        chosen = (weight.selected_indices if weight.dim() == 2
                  else slice(None))                                  #| a vector is chosen whole
        weight.data[..., chosen] = weight.temp_selected_param        #| newer than the worker's


# == 7. What does a round do? (upstream 70-87) ===============================================================
def train_one(run, rank, kind):
    s = run.settings
    engine, batches, facts = build(run, rank, kind)
    optimizer = engine.optimizer
    weight = dict(engine.module.named_parameters())[s["weight"]]     #| the parameter stays, what it views will change
    row, seen = {"facts": facts, **{name: [] for name in (
        "losses", "stall", "seconds", "due", "moved", "share",
        "choices", "waits")}}, {}
    weight.register_hook(lambda grad: seen.update(RC=grad.clone()))  #| before DeepSpeed packs it and lets it go
    if kind in ("sequential", "overlapped"):
        choose_among_matrices(optimizer)
    if kind == "overlapped":
        prepare_for_worker(optimizer, s, row["waits"])

    for n, tokens_BT in zip(range(s["rounds"]), batches):            #| ds:init.repeat
        tokens_BT = tokens_BT.to(rank.device)
        was, begun = weight.detach().clone(), clock(rank)
        if kind == "overlapped" and s["warm_up"] < n and not (       #| to choose makes the masters copies of the
                n % s["epoch"]):                                     #| weights: an update still out would be lost
            bring_home(optimizer)                                    #| ds:zenflow.wait
        loss = engine(input_ids=tokens_BT, labels=tokens_BT).loss    #| ds:engine.forward
        engine.backward(loss)                                        #| ds:engine.backward, over U; ds:zenflow.round. If
                                                                     #| ds:zenflow.choose_now: masters become weights,
                                                                     #| ds:zenflow.refill, moments 0, ds:zenflow.clear
                                                                     #| a bucket, ds:zero12.fill_bucket, is reduced,
                                                                     #| ds:zenflow.average; owners ds:zenflow.choose,
                                                                     #| send, ds:zenflow.important, all step columns,
                                                                     #| ds:zenflow.group_step. Others: host adds up,
                                                                     #| ds:offload.accumulate, takes fp32 of the sum,
                                                                     #| ds:offload.copy, overlapped ds:zenflow.copy
        row["due"] += [engine.is_gradient_accumulation_boundary()]   #| ds:zenflow.boundary
        halted = clock(rank)
        engine.step()                                                #| ds:engine.step. In sequence: norm, C++ Adam on
                                                                     #| P / N, copy, gather: ds:zero12.step,
                                                                     #| ds:zenflow.step_in_sequence, ds:zero12.gather;
                                                                     #| plain, each round: ds:offload.adam
                                                                     #| overlapped, ds:zenflow.step_overlapped: fetch
                                                                     #| what was asked U rounds ago, ds:zenflow.wait,
                                                                     #| ask anew, ds:zenflow.submit, ds:zenflow.worker,
                                                                     #| chosen columns: ds:zenflow.selective_step
        row["stall"].append(clock(rank) - halted)
        row["seconds"].append(clock(rank) - begun)
        row["losses"].append(mean(rank, loss).item())
        look(row, weight, was, mean(rank, seen["RC"]))
        if rank.rank == 0 and (n + 1) % -(-s["rounds"] // 4) == 0:
            print(f"{kind}: round {n + 1} of {s['rounds']}, loss"
                  f" {row['losses'][-1]:.4f}", file=sys.stderr)

    if kind == "overlapped":
        row["cores"] = [sorted(os.sched_getaffinity(pid)) for pid
                        in (0, optimizer.process.pid)]
        bring_home(optimizer)                                        #| DeepSpeed leaves the last one: ds:zenflow.wait
        optimizer.zf_op.zenflow_adam_ctrl_exit(                      #| DeepSpeed itself never ends
            optimizer.zf_ctrl.data_ptr())                            #| ds:zenflow.process (read: runs in the worker)
        optimizer.process.join(10)
    if s["mode"] != "compare":
        row["kept"] = save(run, engine)
    engine.destroy()                                                 #| ds:engine.destroy
    facts |= {
        "loss_nats_first": row["losses"][0],
        "loss_nats_last": row["losses"][-1],
        "updates_count": sum(others for _, others in row["moved"]),
        "stall_seconds_total": sum(row["stall"][1:]),                #| without the round that starts the worker
        "wait_seconds_total": sum(row["waits"]),
        "round_seconds_median": float(np.median(row["seconds"]))}
    return row


def look(row, weight, was, grad_RC):
    """Note what is chosen, what that carries, and what moved."""
    chosen_C = torch.zeros_like(grad_RC[0], dtype=torch.bool)
    first = {"gradient_norm_first": grad_RC.norm().item()}
    if getattr(weight, "selected_indices", None) is not None:
        chosen_C[weight.selected_indices.long()] = True
        columns = chosen_C.nonzero().flatten().tolist()
        if columns not in [one for _, one in row["choices"][-1:]]:
            row["choices"].append((len(row["losses"]), columns))
        best = grad_RC.abs().sum(0).topk(len(columns)).indices       #| where ranks share a matrix each takes its own
        right = len(set(columns) & set(best.tolist()))               #| largest, and not all of these are of them
        energy_C = grad_RC.square().sum(0) / grad_RC.square().sum()
        row["share"].append(energy_C[chosen_C].sum().item())
        first |= {"largest_chosen_fraction": right / len(columns),
                  "chosen_share_fraction_first": row["share"][0]}
    facts = row["facts"]
    facts |= {**first, **facts}                                      #| what is of the first round stays
    if row["share"]:
        facts["chosen_share_fraction_mean"] = np.mean(row["share"])
    moved_C = (weight != was).any(0)
    row["moved"].append((bool(moved_C[chosen_C].any()),
                         bool(moved_C[~chosen_C].any())))


def mean(rank, tensor):
    total = tensor.detach().float().clone(                           #| a gradient comes as strided as its weight
        memory_format=torch.contiguous_format)
    comm.all_reduce(total)                                           #| ds:comm.all_reduce
    return total / rank.world


def clock(rank):
    if rank.gpu:
        torch.cuda.synchronize()                                     #| else the stall is the time to queue it
    return time.perf_counter()


# == 8. What does a checkpoint hold? (upstream 89-93) ========================================================
def save(run, engine):
    folder = run.folder / "checkpoint"
    engine.save_checkpoint(str(folder), tag="last")                  #| by all ranks: ds:ckpt.save, ds:ckpt.save_zero.
    kept = torch.load(folder / "last/mp_rank_00_model_states.pt",    #| Masters lie by column, old in chosen ones, so
                      map_location="cpu")["module"]                  #| ds:ckpt.to_fp32 (read: other process) is wrong;
    now = engine.module.cpu().state_dict()                           #| the worker's moments are in no file. Read the
    return all(torch.equal(kept[name], now[name]) for name in now)   #| model's file and begin Adam anew


# == 9. What came out? (not upstream) ========================================================================
def report(run, rank, rows):
    s, every = run.settings, list(rows.values())
    names = "".join(f"{kind:12}" for kind in rows)
    print("\nround   stall of step(), ms".ljust(len(names) + 9)
          + f"columns moved\n{'':8}{names}{names}")
    for n in range(s["warm_up"] + 2 * s["update_interval"]):
        cells = [f"{one['stall'][n] * 1e3:.1f}" for one in every]
        cells += ["all" if one["moved"][n][1] else "chosen"
                  for one in every]
        print(f"{n + 1:4} {'*' if every[-1]['due'][n] else '':3}"
              + "".join(f"{cell:12}" for cell in cells))
    print("* the host is asked. In sequence all columns move then,"
          "\n  overlapped, after the warm-up, one update later.\n")
    facts = {kind: rows[kind]["facts"] for kind in rows}
    for one in every if s["mode"] == "compare" else ():
        pairs = zip(one["losses"], rows["plain"]["losses"])
        one["facts"]["apart_from_plain_nats_max"] = max(
            abs(a - b) for a, b in pairs)
    print(" " * 32 + "".join(f"{kind:>12}" for kind in rows))
    for key in {key: 0 for one in facts.values() for key in one}:
        print(f"{key:32}" + "".join(
            f"{format(one[key], '.6g') if key in one else '':>12}"
            for one in facts.values()))
    for n, columns in every[-1]["choices"]:
        print(f"round {n}: columns of {s['weight']} chosen,",
              f"{len(columns)}:", *columns[:12], "...")
    measured = {f"{kind}_{key}": one[key]
                for kind, one in facts.items() for key in one}
    gain = "not run (it takes a GPU and mode=compare)"
    if run.gpu and s["mode"] == "compare":
        gain = measured["overlapped_gain_ratio"] = (
            facts["plain"]["round_seconds_median"]
            / facts["overlapped"]["round_seconds_median"])
    print("rounds per second, overlapped to plain:", gain)
    run.record(rank, measured=measured, details=rows)


def train(run):
    rank = run.join()                                                #| ds:init.process_group
    program.watch_workers()                                          #| DeepSpeed waits for a dead one up to ten minutes
    warnings.filterwarnings("ignore", message=".*is_compiling")
    mode = run.settings["mode"]
    rows = {kind: train_one(run, rank, kind) for kind in (
        ("plain", "interval_1", "sequential", "overlapped")
        if mode == "compare" else [mode])}
    if rank.rank == 0:
        report(run, rank, rows)


if __name__ == "__mp_main__":                                        #| the worker: multiprocessing has it import this
    program.worker(["cpu_adam"])                                     #| file. It ends with its rank, whatever ends that
if __name__ == "__main__":                                           #| else it would start ranks too, and so on
    program.main(__file__, CONFIG, train, check)
