"""The meters of bytes: each storage once, under an owner, and none hidden; saved tensors while they live."""

from types import SimpleNamespace

import pytest

from yardstick import ledger


def in_a_process(maker):
    """A test that runs `maker` as one rank: its tensors are the only ones of that process."""
    def test(launch):
        launch(maker, ranks=1).good()
    test.__doc__ = maker.__doc__
    return test


def engine(module, **attributes):
    """Stands in for DeepSpeed's: a module, an optimizer of torch, a device."""
    import torch
    optimizer = torch.optim.AdamW(module.parameters())
    for name, value in attributes.items():
        setattr(optimizer, name, value)
    return SimpleNamespace(module=module, optimizer=optimizer, device=torch.device("cpu"))


def kinds():
    def rank():
        import torch
        one = engine(torch.nn.Linear(10, 5))
        weights = 4 * 55
        assert ledger.totals(ledger.held(one)[0]) == {"parameter": weights}
        one.module(torch.ones(10)).sum().backward()
        assert ledger.totals(ledger.held(one)[0]) == {"parameter": weights, "gradient": weights}
        one.optimizer.step()
        one.optimizer.zero_grad(set_to_none=True)
        assert ledger.totals(ledger.held(one)[0]) == {"parameter": weights, "optimizer": 2 * weights + 2 * 4}
        one.module.register_buffer("mask", torch.ones(7, dtype=torch.bool))
        assert ledger.totals(ledger.held(one)[0])["buffer"] == 7
    return rank


def once():
    def rank():
        import torch
        flat = torch.zeros(60)
        module = torch.nn.Linear(10, 5)
        module.weight.data, module.bias.data = flat[:50].view(5, 10), flat[50:55]
        rows, _ = ledger.held(engine(module, bit16_groups_flat=[flat], averaged_gradients={0: [flat[3:5], None]}))
        assert rows == [ledger.Row("parameter", "device", "optimizer.bit16_groups_flat", 240)]
    return rank


def hidden():
    def rank():
        import torch
        one = engine(torch.nn.Linear(10, 5))
        assert ledger.held(one)[1] == []
        one.somewhere = [{"deep": torch.zeros(1000, dtype=torch.float16)}]
        view = torch.zeros(300)[5:7]                     # the storage behind a view counts, not the view
        unnamed = sorted((nbytes, dtype) for _, dtype, nbytes in ledger.held(one)[1])
        assert unnamed == [(1200, "float32"), (2000, "float16")]
        del view, one.somewhere
        assert ledger.held(one)[1] == []
    return rank


def offloaded():
    def rank():
        import torch
        master = torch.zeros(20, requires_grad=True)
        master.grad = torch.ones(20)
        one = engine(torch.nn.Linear(10, 5), single_partition_of_fp32_groups=[master])
        one.zero_offload_optimizer = lambda: SimpleNamespace(device="cpu", nvme_path=None)
        assert ledger.totals(ledger.held(one)[0]) == {"parameter": 220, "master@host": 80, "gradient@host": 80}
    return rank


def files(folder):
    def rank():
        import torch
        sizes = {"bfloat16params/rank0/0_param.tensor.swp": 10, "bfloat16params/rank1/0_param.tensor.swp": 99,
                 "optimizer/rank0/1.tensor.swp": 20, "optimizer/rank0/exp_avg_1.tensor.swp": 30,
                 "optimizer/rank0/exp_avg_sq_1.tensor.swp": 40, "optimizer/rank0/1_gradient_0_20.tensor.swp": 50,
                 "optimizer/rank0/notes.txt": 60}
        for name, size in sizes.items():
            path = ledger.Path(folder, "zero_stage_3", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(size))
        one = engine(torch.nn.Linear(10, 5))
        one.zero_offload_optimizer = lambda: SimpleNamespace(device="nvme", nvme_path=str(folder))
        assert ledger.swap_folder(one) == ledger.Path(folder, "zero_stage_3")
        assert ledger.totals(ledger.held(one)[0]) == {"parameter": 220, "parameter@nvme": 10, "master@nvme": 20,
                                                      "optimizer@nvme": 70, "gradient@nvme": 50}
    return rank


def saved():
    def rank():
        import torch

        from yardstick.probe import SavedTensors
        first, second = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 4, bias=False)
        module = torch.nn.Sequential(first, second)
        x = torch.randn(3, 8)
        watch = SavedTensors(module)
        with watch:
            module(x).sum()                              # the input of each layer; weights are parameters
        assert watch.peak == 4 * (3 * 8 + 3 * 16) and watch.now == 0
        watch = SavedTensors(module)
        with watch:
            for _ in range(3):                           # what dies does not count when the next is made
                module(x).sum()
        assert watch.peak == 4 * (3 * 8 + 3 * 16)
        watch = SavedTensors(module)
        with watch:
            kept = [module(torch.randn(3, 8)).sum() for _ in range(3)]
        assert watch.peak == watch.now == 3 * 4 * (3 * 8 + 3 * 16)
        del kept
        assert watch.now == 0
    return rank


test_each_kind_of_a_training_step = in_a_process(kinds)
test_a_storage_with_many_names_counts_once = in_a_process(once)
test_a_tensor_that_nobody_owns_is_shown = in_a_process(hidden)
test_an_offloaded_optimizer_lies_on_the_host = in_a_process(offloaded)
test_saved_tensors_count_while_they_live = in_a_process(saved)


def test_files_of_this_rank_by_their_names(launch, tmp_path):
    launch(files, tmp_path, ranks=1).good()


def test_totals_are_by_kind_and_place():
    rows = [ledger.Row("gradient", "device", "a", 1), ledger.Row("gradient", "device", "b", 2),
            ledger.Row("gradient", "host", "c", 4), ledger.Row("master", "nvme", "d", 8)]
    assert ledger.totals(rows) == {"gradient": 3, "gradient@host": 4, "master@nvme": 8}


def metered():
    def rank():
        import torch
        import torch.distributed as dist

        from yardstick import op_cache, ranks
        from yardstick.traffic import Meter
        plain = dist.all_reduce
        meter = Meter().install()
        op_cache.do_without("deepspeed_shm_comm")
        joined = ranks.join(gpu=False, seconds=60)
        dist.all_reduce(torch.ones(1000))                # not counting yet
        meter.counting, meter.phase = True, "backward"
        full, part = torch.ones(6), torch.zeros(3)
        for _ in range(2):
            dist.all_reduce(full)
        dist.all_reduce(tensor=full, async_op=True).wait()
        dist.all_gather_into_tensor(full, part)
        dist.reduce_scatter_tensor(part, full)
        dist.reduce_scatter_tensor(output=part, input=full)
        with meter.named("loss"):
            dist.broadcast(torch.ones(2, dtype=torch.uint8), 0)
        rows = {(row["kind"], row["phase"], row["what"]): (row["calls"], row["payload_bytes"], row["ring_bytes"])
                for row in meter.per_step(2, joined.world)}
        assert meter.blocked["backward"] > 0
        meter.remove()
        assert dist.all_reduce is plain
        return rows
    return rank


def test_collectives_are_counted_by_the_full_tensor(launch):
    assert launch(metered).good() == 2 * [{
        ("all_reduce", "backward", ""): (1.5, 36, 36), ("all_gather", "backward", ""): (0.5, 12, 6),
        ("reduce_scatter", "backward", ""): (1.0, 24, 12), ("broadcast", "backward", "loss"): (0.5, 1, 0.5)}]


def test_kernels_of_nccl_in_a_profile():
    from yardstick.probe import communication_kernels
    rows = [SimpleNamespace(key="ncclDevKernel_AllReduce_Sum_f32_RING_LL", self_device_time_total=2e6),
            SimpleNamespace(key="nccl:all_reduce", self_device_time_total=5e6),
            SimpleNamespace(key="ampere_sgemm_128x64", self_device_time_total=7e6)]
    assert communication_kernels(rows) == pytest.approx(2.0)
