"""Trains a GPT-2 (or any causal LM of transformers) with one of six strategies of real DeepSpeed.

    python real_model_example.py                              # ZeRO-2 on every GPU, or on two CPU processes
    python real_model_example.py strategy=zero3 model=gpt2 steps=50 save_every=10
    python real_model_example.py strategy=zero3 resume=auto
    torchrun --nproc_per_node=2 real_model_example.py strategy=offload
    deepspeed --num_gpus=1 real_model_example.py

A strategy is a DeepSpeed config (strategies/N_name/config.json); the program is the same for all six. It ends with a
report: what the ranks held and sent, predicted beside counted, and how that differs from the ZeRO paper.
"""

import math
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))     # run from any directory, installed or not

from strategies import checks, commands, models
from yardstick import launchers, ranks
from yardstick.settings import Choice, Either, SettingsError, given, override, usage

CONFIG = {
    # what trains, and how it is distributed
    "strategy": Choice("zero2", "dp", "zero1", "zero3", "offload", "infinity"),  # offload: stage 2, Adam on the
                                          # host; infinity: stage 3, weights and optimizer in files
    "config": Either(str),                # DeepSpeed config; None: strategies/<strategy>/config.json
    "model": "auto",                      # auto (tiny on a CPU, gpt2 on a GPU), tiny, gpt2, gpt2-medium, gpt2-large,
                                          # gpt2-xl, or a folder or hub name of a causal LM
    "pretrained": False,                  # load that model's weights; False: random ones, drawn with the seed
    "precision": Choice("auto", "fp32", "bf16", "fp16"),   # auto: fp32 on a CPU, bf16 on a GPU and for infinity
    # one step: global_batch = micro_batch * accumulation * ranks; None: the config's, or what follows
    "steps": 20,                          # optimizer steps
    "global_batch": Either(int),          # sequences of one step, over all ranks
    "micro_batch": Either(int),           # sequences of one forward on one rank
    "accumulation": Either(int),          # forwards and backwards of one step
    "seq": Either(int),                   # tokens of a sequence; None: 128 on a CPU, 1024 on a GPU, or the model's limit
    # optimization
    "learning_rate": Either(float),       # peak; None: the config's
    "schedule": Choice("cosine", "linear", "constant"),     # after the warm-up; the first two fall to a tenth
    "warmup_steps": 5,                    # steps of linear rise
    "gradient_clipping": Either(float),   # largest norm of the whole gradient, 0: none; None: the config's
    "seed": 1,                            # of weights, order of data, and sampling
    "activation_checkpointing": False,    # keep each layer's input only, compute the rest again in backward
    "compile": False,                     # torch.compile (on a CPU it needs a C++ compiler)
    # data
    "data": "embedded",                   # the standard library's source; or a text file, a folder, hub:NAME
    "tokenizer": Either(str),             # folder or hub name; None: the embedded one, or the pretrained model's
    # DeepSpeed, where other than the config's; elements, not bytes
    "reduce_bucket_size": Either(int),    # gradients reduced at once
    "max_live": Either(int),              # stage 3: weights are not prefetched beyond so many gathered ones
    "max_reuse_distance": Either(int),    # stage 3: weights needed again within this stay gathered; with max_live=0, 0: none
    "persistence_threshold": Either(int), # stage 3: tensors up to this stay whole on every rank
    "sub_group_size": Either(int),        # stage 3: weights that the optimizer steps at once
    "nvme_path": Either(str),             # infinity: folder on the fast disk; None: the run's own folder
    "cpp_ops": False,                     # DeepSpeed's compiled Adam in place of torch's (built once, minutes)
    # checkpoints, in the run's folder
    "save_every": 0,                      # steps from one checkpoint to the next, and one at the end; 0: at Ctrl-C only
    "keep": 2,                            # checkpoints kept, the newest
    "resume": "none",                     # auto: go on with the newest run of this strategy, or of output=; or the folder
                                          # of a run or of one of its steps; none: begin anew
    "trust": Either(str),                 # folder of a checkpoint that this checkout did not write: loading it unpickles
    "export": Either(str),                # folder to write the trained model into, as transformers reads it
    # what is measured and kept
    "eval_batches": 4,                    # batches of held-out text at the end; 0: none
    "sample_tokens": 48,                  # tokens of generated text at the end; 0: none
    "count": True,                        # count bytes held and sent
    "tensorboard": False,                 # write loss, learning rate and speed for TensorBoard into the run's folder
    "record": Either(str),                # LABEL: write the record to results/LABEL/ (for commits)
    "output": Either(str),                # folder of the run; None: a new one under runs/
    "timeout_seconds": 600.0,             # the longest that a phase of a step, or a wait for another rank, may take
}


def learning_rate_factor(settings):
    """step -> share of the peak learning rate: linear warm-up, then the schedule down to a tenth."""
    warm, total = settings["warmup_steps"], settings["steps"]

    def factor(step):
        if step < warm:
            return (step + 1) / warm
        done = min(1.0, (step - warm) / max(1, total - warm))
        return {"constant": 1.0, "linear": 1 - 0.9 * done,
                "cosine": 0.1 + 0.45 * (1 + math.cos(math.pi * done))}[settings["schedule"]]
    return factor


def main():
    launchers.adopt()                      # srun's variables become torchrun's
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    if text := usage(arguments, __file__):
        print(text)
        return 0
    settings = override(CONFIG, arguments, where="real_model_example.py")
    plan = checks.check(settings, given(arguments))     # imports, refuses what cannot work; before any rank starts
    if ranks.is_rank():
        ranks.listen()
        return train(plan)["code"]
    try:
        code = ranks.start(lambda: sys.exit(train(plan)["code"]), plan.world, gpu=plan.gpu, graceful=True)
        if code not in (0, 130, 143):
            commands.what_is_left(plan)
        return code
    finally:
        if plan.swap:                      # however the ranks ended; they are of no use to a later run
            shutil.rmtree(plan.swap, ignore_errors=True)


def train(plan, after_backward=None, finish=True):
    """One rank's run of a checked Plan: {"loss": [mean loss of each step], "rank", "folder", "code": to exit with}.

    after_backward(engine, step): called before each update, on every rank; tests compare gradients there.
    """
    import deepspeed
    import torch

    from strategies.checkpoints import Checkpoints
    from strategies.control import Control
    from yardstick import data, matmul, op_cache, report
    from yardstick.probe import Probe
    from yardstick.progress import Log
    from yardstick.traffic import Meter
    from yardstick.watchdog import Watchdog

    settings = plan.settings
    meter = Meter().install()              # before DeepSpeed makes its backend
    op_cache.do_without("deepspeed_shm_comm")
    op_cache.load(plan.ops)
    rank = ranks.join(plan.gpu, settings["timeout_seconds"])
    watchdog = Watchdog(rank, settings["timeout_seconds"]).start()
    precision = matmul.choose(rank)
    torch.manual_seed(settings["seed"])
    model = models.build(plan)
    engine, _, _, scheduler = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=plan.config,
        lr_scheduler=lambda adam: torch.optim.lr_scheduler.LambdaLR(adam, learning_rate_factor(settings)))
    del model
    torch.manual_seed(settings["seed"] + 1 + rank.rank)     # dropout: each rank's own draws
    checkpoints = Checkpoints(plan, engine, rank, watchdog)
    first, history = checkpoints.load(plan.resume) if plan.resume else (0, [])
    batches = data.Batches(plan.corpus.train, plan.seq, plan.global_batch, settings["seed"])
    probe = Probe(engine, meter, watchdog, steps=settings["steps"] - first, accumulation=plan.accumulation,
                  counting=settings["count"])
    control = Control(plan, engine, meter, rank)
    log = Log(plan, rank)

    engine.train()
    step = first - 1                       # a finished run may be resumed for its export alone
    for step in log.progress(range(first, settings["steps"])):
        with probe("data", step):
            rows = batches.step(step, rank.rank, rank.world, plan.accumulation)      # [accumulation, micro_batch, seq]
            tokens_ABT = torch.from_numpy(rows).to(engine.device)
        rate, losses = scheduler.get_last_lr()[0], []
        for tokens_BT in tokens_ABT:
            with probe("forward"):
                loss = engine(input_ids=tokens_BT, labels=tokens_BT).loss            # mean over B * (T-1) targets
            with probe("backward"):
                engine.backward(loss)          # divides by accumulation; reduces gradients as the stage does
            losses.append(loss.detach())
            last = engine.is_gradient_accumulation_boundary()
            if last and after_backward:
                after_backward(engine, step)
            with probe("step"):
                if last:
                    history.append(control.agree(step, losses))      # the mean over all ranks; stop or skip, all alike
                engine.step()                  # updates after the last micro-batch only; clips, steps the schedule
        control.after_update(step)
        log.step(step, history[-1], rate)
        if checkpoints.due(step, skipped=control.bad) or control.stop:
            probe.end_step()
            with meter.paused():
                folder = checkpoints.save(step, history)
            if control.stop:
                break
    probe.end_step()
    meter.counting = False

    stopped = step + 1 < settings["steps"]
    if stopped:
        log.stopped(step, folder, commands.resume(plan))
    if finish and not stopped and step >= first:
        evaluation = models.evaluate(engine, plan, rank, watchdog)
        sample = models.sample(engine, plan, watchdog)
        watchdog.moved("the report")
        report.finish(plan, rank, engine, probe, meter, history, precision, evaluation, sample)
    if settings["export"] and not stopped:
        watchdog.moved("the export")
        models.export(engine, plan, rank)
    log.close()
    watchdog.stop()
    engine.destroy()
    return {"loss": history, "rank": rank, "folder": plan.folder, "code": ranks.stop_code() if stopped else 0}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SettingsError as error:
        sys.exit(f"real_model_example.py: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"real_model_example.py: this Python ({sys.executable}) has no module {error.name}. Start by "
                 "strategies/3_zero_stage2/run.sh, which makes what is missing, or run `source env.sh` first, or "
                 "pip install -r requirements.txt.")
    except KeyboardInterrupt:
        sys.exit(130)
