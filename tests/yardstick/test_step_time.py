"""Estimated seconds: small cases by hand, limits, and what must grow with what."""

from dataclasses import replace

import pytest

from yardstick import hardware, step_time
from yardstick.deepspeed_traffic import Collective
from yardstick.step_time import Machine, collective_seconds, step_seconds

FOUR = Machine(devices=4, per_node=4, peak=1e12, efficiency=0.5, memory=1e11, link=1e9, node_link=1e8, pcie=1e9, nvme=1e9,
               hop=1e-3, node_hop=1e-2, host_adam=1e-9)
REDUCE = Collective("all_reduce", "backward", 2, 4 * 10**8, "")
GATHER = Collective("all_gather", "step", None, 4 * 10**8, "")


def test_a_ring_by_hand():
    """Two all-reduces of together 0.4 GB over 4 ranks: 2 * 3/4 of it at 1 GB/s, and 2 * 3 hops each."""
    assert collective_seconds("all_reduce", 4e8, FOUR, calls=2) == pytest.approx(0.6 + 2 * 6 * 1e-3)
    assert collective_seconds("all_gather", 4e8, FOUR) == pytest.approx(0.3 + 3e-3)


def test_a_ring_over_two_nodes_runs_at_the_slowest_link():
    two = replace(FOUR, per_node=2)
    # of the four links of the ring two cross: a hop takes (2 * 10 + 2 * 1) / 4 ms on average
    assert collective_seconds("all_gather", 4e8, two) == pytest.approx(0.3e9 / 1e8 + 3 * 5.5e-3)
    alone = replace(FOUR, per_node=1, link=1.0)
    assert collective_seconds("all_gather", 4e8, alone) == pytest.approx(0.3e9 / 1e8 + 3 * 10e-3)


def test_parts_of_a_step_by_hand():
    parts = step_seconds(FOUR, flops=4e12, collectives=[REDUCE, GATHER], adam_device=10**9, adam_host=10**9, pcie_bytes=2e9,
                         nvme_bytes=3e9)
    assert parts == pytest.approx({"compute": 2.0, "communication": 0.612 + 0.303, "hidden": 0.0,
                                   "optimizer": step_time.ADAM_BYTES / 100 + 1.0, "pcie": 2.0, "nvme": 3.0,
                                   "total": 2.0 + 0.915 + 1.28 + 5.0})


def test_overlap_hides_what_arithmetic_covers_and_no_more():
    plain, beside = (step_seconds(FOUR, flops=4e12, collectives=[REDUCE, GATHER], overlap=overlap) for overlap in (False, True))
    assert beside["total"] == pytest.approx(plain["total"] - 0.612)           # the step's gather is not hidden
    short = step_seconds(FOUR, flops=2e11, collectives=[REDUCE], overlap=True)
    assert short["hidden"] == short["compute"] and short["total"] == pytest.approx(0.612)


def test_one_device_sends_nothing():
    assert collective_seconds("all_reduce", 1e9, replace(FOUR, devices=1)) == 0
    assert step_seconds(replace(FOUR, devices=1), flops=1e12, collectives=[REDUCE])["communication"] == 0


@pytest.mark.parametrize("field", ["link", "pcie", "nvme", "memory", "peak", "efficiency"])
def test_faster_is_never_slower(field):
    totals = [step_seconds(replace(FOUR, **{field: getattr(FOUR, field) * factor}), flops=1e12, collectives=[REDUCE], pcie_bytes=1e9,
                           nvme_bytes=1e9, adam_device=10**9)["total"] for factor in (1, 2, 1e9)]
    assert totals[0] > totals[1] > totals[2]


def test_infinitely_fast_links_leave_latency():
    assert collective_seconds("all_gather", 1e9, replace(FOUR, link=1e30), calls=5) == pytest.approx(15e-3)


def test_tables_of_devices_agree():
    assert set(hardware.DEVICES) == set(hardware.PEAK_FLOPS)
    for name, (memory, speed, link, pcie) in hardware.DEVICES.items():
        assert hardware.device_named(f"NVIDIA {name}") == name
        assert 10e9 < memory < 300e9 and speed > link >= pcie
    assert hardware.device_named("something") is None and set(hardware.NO_BF16) < set(hardware.DEVICES)
