"""The call-order tables are those of a real run: one strategy is traced again, and what the records say is in the order it must be."""

import json
import subprocess
import sys

import pytest

from strategies import call_order
from yardstick import deepspeed_map, results
from yardstick.results import ROOT
from yardstick.settings import SettingsError


def entered(strategy):
    """{phase: [names of the anchors entered, in order]} by the committed record."""
    phases = results.read(f"deepspeed_map/calls_{strategy}", "cpu2")["details"]["entered"]
    return {phase: list(call_order.anchors_of(symbols).values()) for phase, symbols in phases.items()}


def test_a_run_traced_now_enters_what_the_record_says():
    done = subprocess.run([sys.executable, "strategies/call_order.py", "strategy=dp"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = ROOT / done.stdout.splitlines()[-1].rpartition("; ")[2]
    now = json.loads(path.read_text())
    kept = results.read("deepspeed_map/calls_dp", "cpu2")
    assert now["settings"] == kept["settings"]
    for phase, symbols in now["details"]["entered"].items():
        known = call_order.anchors_of(symbols)
        assert list(known.values()) == entered("dp")[phase]
        assert {known[s]: times for s, times in symbols.items() if s in known and known[s] != "init.accelerator"} == {
            known[s]: times for s, times in kept["details"]["entered"][phase].items() if s in known and known[s] != "init.accelerator"}


@pytest.mark.parametrize("strategy, phase, order", [
    ("dp", "backward", "engine.backward engine.reduce engine.reduce_plain engine.reduce_bucket comm.all_reduce"),
    ("dp", "step", "engine.step engine.update engine.unfused_step"),
    ("zero1", "backward", "zero12.hook zero12.process engine.reduce zero12.reduce_all zero12.fill_bucket zero12.flush"),
    ("zero2", "backward", "zero12.hook zero12.process zero12.fill_bucket zero12.flush zero12.average zero12.all_reduce engine.reduce"),
    ("zero2", "step", "zero12.step zero12.overflow zero12.norm zero12.clip zero12.adam zero12.gather zero12.views"),
    ("zero3", "forward", "zero3.before_forward zero3.fetch zero3.gather zero3.after_forward zero3.release"),
    ("zero3", "backward", "zero3.before_backward zero3.hook zero3.fill_bucket zero3.flush zero3.reduce_scatter zero3.keep_share"),
    ("zero3", "step", "zero3.step zero3.norm zero3.prepare zero3.clip zero3.adam zero3.write_back zero3.after_step"),
    ("offload", "backward", "zero12.keep_own offload.accumulate offload.norm offload.copy"),
    ("offload", "step", "offload.total_norm zero12.clip zero12.adam offload.adam zero12.gather"),
    ("infinity", "step", "nvme.tile_in nvme.read_states nvme.pwrite nvme.pread offload.adam nvme.weights_out "
     "nvme.write_states"),                                            # the first write is of gradients that wait in buffers
])
def test_order_of_first_entry(strategy, phase, order):
    found, wanted = entered(strategy)[phase], order.split()
    assert [name for name in found if name in wanted] == wanted


def test_what_only_the_boundary_does_and_what_only_one_stage_does():
    def times(strategy, phase, name):
        symbols = results.read(f"deepspeed_map/calls_{strategy}", "cpu2")["details"]["entered"][phase]
        known = call_order.anchors_of(symbols)
        return next((numbers for symbol, numbers in symbols.items() if known.get(symbol) == name), [0] * 6)
    assert times("zero2", "step", "zero12.step") == [0, 1] * 3                # of two micro-batches the last one updates
    assert times("zero1", "backward", "zero12.flush")[::2] == [0, 0, 0]       # stage 1 reduces at the boundary only
    assert all(times("zero2", "backward", "zero12.flush"))                    # stage 2 every micro-batch
    assert not any(times("dp", "step", "zero12.gather")) and not any(times("zero3", "step", "zero12.gather"))
    assert times("zero3", "forward", "zero3.same_order")[2:] == [0] * len(times("zero3", "forward", "zero3.same_order")[2:])


def test_tables_say_what_the_records_say():
    for strategy in call_order.FOLDERS:
        rows = call_order.table(strategy).splitlines()[2:]
        assert [row.split("`ds:")[1].split("`")[0] for row in rows] == [
            name for names in entered(strategy).values() for name in names]
    assert call_order.table("read").count("`ds:") == sum("read" in anchor for anchor in deepspeed_map.ANCHORS.values())
    assert call_order.table("drift").count("\n") >= 4


def test_bad_settings_are_one_message():
    with pytest.raises(SettingsError, match="none of dp, zero1"):
        call_order.table("zero4")
    done = subprocess.run([sys.executable, "strategies/call_order.py", "table=dp", "label=none"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("strategies/call_order.py: no record")
