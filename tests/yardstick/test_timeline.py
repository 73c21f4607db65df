"""A recorder notes what ran, in which lane, and what travelled meanwhile; the picture shows that."""

import datetime

import pytest
import torch
import torch.distributed as dist
from matplotlib.image import imread
from torch import nn

from yardstick import timeline

LETTERS = {"first": "1", "second": "2", "gelu": "g", "waits": "w", "sum": "="}


class Halves(nn.Module):
    """Two halves of a batch through two linears; the first half is summed while the second computes."""

    def __init__(self, all_reduce):
        super().__init__()
        self.first, self.second, self.gelu, self.all_reduce = nn.Linear(8, 16), nn.Linear(16, 8), nn.GELU(), all_reduce

    def forward(self, x):
        one, two = x.chunk(2)
        one = self.second(self.gelu(self.first(one)))
        handle = self.all_reduce(one.detach(), async_op=True)
        two = self.second(self.gelu(self.first(two)))
        handle.wait()
        return torch.cat([one, two])


@pytest.fixture
def recorder():
    group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, datetime.timedelta(seconds=20))
    recorder = timeline.Recorder()
    model = Halves(recorder.sending(lambda tensor, async_op: group.allreduce([tensor]), "sum"))
    recorder.modules(model, {"first": "first", "second": "second"})
    model.gelu.forward = recorder.timed("gelu", model.gelu.forward)
    x = torch.randn(6, 8, requires_grad=True)
    output = recorder.passes(model, (x,), torch.ones(6, 8))
    assert output.shape == (6, 8) and x.grad.abs().sum() > 0
    return recorder


def order(recorder, phase):
    begin, end = recorder.phases[phase]
    return [(recorder.lanes[node], name) for name, node, at, _ in recorder.ran if begin <= at < end]


def test_what_ran_is_in_its_lane_and_in_its_order(recorder):
    parts = ["first", "gelu", "second"]
    assert order(recorder, "forward") == [(lane, name) for lane in (0, 1) for name in parts]
    assert order(recorder, "backward") == [(lane, name) for lane in (1, 0) for name in parts[::-1]]   # the latest node is first
    ends = [end for _, _, _, end in recorder.ran]
    assert ends == sorted(ends) and all(begin <= end for _, _, begin, end in recorder.ran)


def test_what_was_sent_is_hidden_behind_the_other_lane(recorder):
    one, = recorder.sent
    assert (one.name, one.after, one.bytes) == ("sum", "second", 3 * 8 * 4) and recorder.lanes[one.node] == 0
    assert one.issued <= one.waits <= one.goes_on and one.issued <= one.done
    assert recorder.of("forward") == [one] and recorder.of("backward") == []
    assert recorder.behind(one, {"first", "second"}) == [(1, "first"), (1, "second")]
    assert recorder.hidden("forward", {"second"}) == 1 and recorder.hidden("forward", {"third"}) == 0


def test_one_pass_is_kept(recorder):
    assert len(recorder.ran) == 2 * 6 and len(recorder.sent) == 1


def test_the_report_names_it_and_the_figure_is_the_same_when_drawn_again(recorder, tmp_path):
    said = timeline.report(recorder, LETTERS, {"first", "second"}, "half {}", tmp_path / "a" / "timeline.png", "Two halves")
    assert [line.split(" |")[0].rstrip() for line in said.splitlines() if line.endswith("|")] == [
        "half 0 computes", "half 0 sends", "half 1 computes", "half 1 sends"] * 2
    assert said.splitlines()[-1].endswith("half 1 first, half 1 second")
    timeline.report(recorder, LETTERS, (), "half {}", tmp_path / "b.png", "Two halves")
    first, second = (tmp_path / "a" / "timeline.png").read_bytes(), (tmp_path / "b.png").read_bytes()
    assert first == second and len(first) < 300_000 and imread(tmp_path / "b.png").shape[1] >= 900


def test_a_letter_stands_where_its_work_took_most_of_the_time():
    rows = {"a": [(0, 1.0, "first"), (1.0, 1.1, "gelu"), (2, 4, "second")], "b": [(3.2, 4, "waits")]}
    assert timeline.text(rows, LETTERS, columns=4) == ["a |1-22|", "b |---w|"]
