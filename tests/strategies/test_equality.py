"""Every strategy trains the model that a plain torch loop in one process trains."""

import json

import numpy as np
import pytest

from tests.strategies import cases

FIVE = cases.ORDER[:5]                # infinity computes in bf16 only: it is compared with ZeRO-3 below
# the same 8 sequences a step however many ranks and micro-steps share them; buckets smaller than the model
BASE = {"steps": 20, "global_batch": 8, "seq": 64, "learning_rate": 1e-3, "warmup_steps": 5, "seed": 3,
        "gradient_clipping": 1.0, "reduce_bucket_size": 100_000, "count": False, "precision": "fp32"}
RATE = 0.5                                               # of plain SGD: parameters move visibly
AFTER = 3                                                # updates after which parameters are compared


def training(changes, environment=None):
    """Ranks of the program. Each returns losses, gradients before the first update, parameters after AFTER."""
    plan = cases.plan(**changes)

    def rank():
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

        from real_model_example import train
        gradients, parameters = [], []

        def look(engine, step):
            for p in engine.module.parameters():
                if step == 0:
                    gradients.append(safe_get_full_grad(p).float().numpy().copy())
                if step == AFTER:                        # stage 0 in fp32 has no other copy than the parameter
                    full = safe_get_full_fp32_param(p) if engine.zero_optimization_stage() else p.data
                    parameters.append(full.float().numpy().copy())
        return train(plan, look, finish=False)["loss"], gradients, parameters
    return rank


def plain_training(changes, ddp=False):
    """The loop written out: in one process, or on each rank of torch's own DistributedDataParallel.

    One process takes the micro-batches of all ranks one after another, so that the losses are rounded alike.
    """
    plan = cases.plan(**changes)

    def rank():
        import torch
        from transformers import AutoModelForCausalLM

        from real_model_example import learning_rate_factor
        from yardstick import data
        number, world, times = 0, 1, plan.accumulation
        torch.set_float32_matmul_precision("highest")
        torch.manual_seed(plan.settings["seed"])
        model = AutoModelForCausalLM.from_config(plan.model_config)
        if ddp:
            torch.distributed.init_process_group("gloo")
            number, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
            model = torch.nn.parallel.DistributedDataParallel(model)
        # rate and clipping as the run's settings have them, by whatever way they get into DeepSpeed's config
        given = {**plan.config["optimizer"]["params"], "lr": plan.settings["learning_rate"]}
        given.pop("torch_adam", None)
        clipping = plan.settings["gradient_clipping"]
        optimizer = getattr(torch.optim, plan.config["optimizer"]["type"])(model.parameters(), **given)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(plan.settings))
        batches = data.Batches(plan.corpus.train, plan.seq, plan.global_batch, plan.settings["seed"])
        losses, gradients, parameters = [], [], []
        for step in range(plan.settings["steps"]):
            if step == AFTER:
                parameters = [p.detach().numpy().copy() for p in model.parameters()]
            optimizer.zero_grad()
            mean = 0
            for k, rows in enumerate(batches.step(step, number, world, times)):
                if ddp:
                    model.require_backward_grad_sync = k == times - 1         # what no_sync() sets
                tokens_BT = torch.from_numpy(rows)
                loss = model(input_ids=tokens_BT, labels=tokens_BT).loss
                (loss / times).backward()
                mean += loss.item() / times              # in double precision
            gradients = gradients or [p.grad.numpy().copy() for p in model.parameters()]
            if clipping:
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clipping)
                assert step or norm > clipping, "nothing is clipped: the case tests less"
            optimizer.step()
            schedule.step()
            if ddp:
                means = [None] * world
                torch.distributed.all_gather_object(means, mean)
                mean = sum(means) / world
            losses.append(mean)
        return losses, gradients, parameters
    return rank


def apart(ours, theirs):
    """Largest difference between two lists of arrays, or of numbers."""
    assert len(ours) == len(theirs) > 0
    return max(float(np.abs(np.subtract(a, b)).max()) for a, b in zip(ours, theirs))


@pytest.fixture(scope="module")
def reference(server, models, tmp_path_factory):
    """reference(parts=micro-batches of a step, ...) -> (losses, gradients, parameters) of one process; kept."""
    known = {}

    def of(parts=4, **changes):
        changes = {**BASE, "model": models["small"], "strategy": "dp", "accumulation": parts, **changes}
        key = json.dumps(changes, sort_keys=True)
        if key not in known:
            folder = tmp_path_factory.mktemp("reference")
            known[key] = cases.launch(server, folder, plain_training, changes, ranks=1).good()[0]
        return known[key]
    return of


def check(ours, theirs, *, loss, gradient=1e-6):
    """Every rank's losses and gradients are those of one process."""
    for losses, gradients, _ in ours:
        assert apart(gradients, theirs[1]) <= gradient
        assert apart(losses, theirs[0]) <= loss
    assert theirs[0][-1] < theirs[0][0] - 0.5, "the reference does not learn: equal losses say little"


@pytest.mark.parametrize("strategy", FIVE)
def test_one_process_and_two_ranks_of_two_micro_steps(launch, models, reference, strategy):
    ours = launch(training, {**BASE, "model": models["small"], "strategy": strategy, "accumulation": 2}).good()
    check(ours, reference(), loss=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("ranks,accumulation", [(4, 1), (2, 1), (3, 1), (2, 4)])
@pytest.mark.parametrize("strategy", FIVE)
def test_other_numbers_of_ranks_and_micro_steps(launch, models, reference, strategy, ranks, accumulation):
    changes = {"global_batch": 9} if ranks == 3 else {}
    ours = launch(training, {**BASE, "model": models["small"], "strategy": strategy, "accumulation": accumulation,
                             **changes}, ranks=ranks).good()
    check(ours, reference(ranks * accumulation, **changes), loss=2e-6)


@pytest.mark.slow
@pytest.mark.timeout(1800)                               # the first time two ops are compiled
@pytest.mark.parametrize("strategy", FIVE)
def test_compiled_adams(launch, models, reference, compiled_adams, strategy):
    ours = launch(training, {**BASE, "model": models["small"], "strategy": strategy, "accumulation": 2,
                             "cpp_ops": True}).good()
    check(ours, reference(), loss=2e-5)


def sgd_config(strategy, folder):
    """The strategy's config.json with plain SGD; Adam divides a wrong scale of gradients out again."""
    path = cases.ROOT / "strategies" / cases.FOLDERS[strategy] / "config.json"
    config = json.loads(path.read_text())
    config["optimizer"] = {"type": "SGD", "params": {"lr": RATE}}
    config["zero_allow_untested_optimizer"] = True
    (folder / "sgd.json").write_text(json.dumps(config))
    return str(folder / "sgd.json")


@pytest.fixture(scope="module")
def sgd(tmp_path_factory):
    """The reference's config file; always the same one, so that its runs are kept."""
    return sgd_config("dp", tmp_path_factory.mktemp("sgd"))


@pytest.mark.parametrize("strategy,clipping", [
    *((strategy, 0.0) for strategy in FIVE), ("zero2", 0.5), ("zero3", 0.5),
    *(pytest.param(strategy, 0.5, marks=pytest.mark.slow) for strategy in ("dp", "zero1", "offload"))])
def test_parameters_after_plain_sgd(launch, models, reference, sgd, tmp_path, strategy, clipping):
    changes = {"steps": AFTER + 1, "gradient_clipping": clipping, "schedule": "constant", "warmup_steps": 0}
    ours = launch(training, {**BASE, **changes, "model": models["small"], "strategy": strategy, "accumulation": 2,
                             "learning_rate": RATE, "config": sgd_config(strategy, tmp_path)}).good()
    _, gradients, parameters = reference(**changes, learning_rate=RATE, config=sgd)
    _, _, before = reference(**changes, learning_rate=0.0, config=sgd)
    assert apart(parameters, before) > 0.01, "the parameters hardly move: their equality says little"
    for _, mine, after in ours:
        assert apart(mine, gradients) <= 1e-6
        assert apart(after, parameters) <= 2e-6


def test_stage_0_is_data_parallelism_of_torch(launch, models):
    changes = {**BASE, "model": models["small"], "strategy": "dp", "accumulation": 2}
    ours, ddp = launch(training, changes).good(), launch(plain_training, changes, True).good()
    for (losses, gradients, parameters), (their_losses, their_gradients, their_parameters) in zip(ours, ddp):
        assert apart(gradients, their_gradients) <= 1e-6
        assert apart(parameters, their_parameters) <= 1e-6
        assert apart(losses, their_losses) <= 1e-6


def swapping(changes):
    """Ranks of infinity: (losses, bytes in this rank's files of weights and of states, those predicted)."""
    plan = cases.plan(**changes)

    def rank():
        import os
        from pathlib import Path

        from real_model_example import train
        from yardstick import deepspeed_memory
        number = int(os.environ["RANK"])
        folder, sizes = Path("run").resolve(), {}

        def look(engine, step):
            if step:                                     # the optimizer's files appear with the first update
                for name in ("bfloat16params", "optimizer"):
                    files = list(folder.rglob(f"{name}/rank{number}/**/*.swp"))
                    sizes[name] = sum(file.stat().st_size for file in files)
        losses = train(plan, look, finish=False)["loss"]
        files = [item for item in deepspeed_memory.memory(plan.tensors, plan.config, ranks=plan.world, rank=number,
                                                          accumulation=plan.accumulation) if item.place == "nvme"]
        weights = sum(item.nbytes for item in files if item.kind == "parameter")
        return losses, sizes, {"bfloat16params": weights, "optimizer": sum(i.nbytes for i in files) - weights}
    return rank


@pytest.mark.timeout(1800)                               # the first time async_io is compiled
@pytest.mark.parametrize("steps,model", [(6, "wide"), pytest.param(20, "tiny", marks=pytest.mark.slow)])
def test_infinity_is_zero3_with_the_optimizer_on_the_host(launch, models, tmp_path, async_io, steps, model):
    base = {**BASE, "steps": steps, "seq": 32, "accumulation": 2, "precision": "bf16", "reduce_bucket_size": None,
            "model": models.get(model, model)}
    config = json.loads((cases.ROOT / "strategies/4_zero_stage3/config.json").read_text())
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    # sub-groups decide in which order the norm of the gradients is summed, and bf16 makes more of the last bit
    config["zero_optimization"]["sub_group_size"] = json.loads(
        (cases.ROOT / "strategies/6_zero_infinity/config.json").read_text())["zero_optimization"]["sub_group_size"]
    config["zero_force_ds_cpu_optimizer"] = False        # torch's Adam, as infinity's
    (tmp_path / "host.json").write_text(json.dumps(config))
    host = launch(training, {**base, "strategy": "zero3", "config": str(tmp_path / "host.json")}).good()
    nvme = launch(swapping, {**base, "strategy": "infinity"}, seconds=600).good()
    for (expected, _, _), (losses, files, predicted) in zip(host, nvme):
        assert apart(losses, expected) <= 1e-6
        assert files == predicted
        assert min(files.values()) > 2**20, "no weights, or no optimizer states, went into files"
    assert host[0][0][-1] < host[0][0][0] - 0.3
