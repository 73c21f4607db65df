"""Figures show the numbers given to them, in the right unit, and are the same file when drawn again."""

import pytest
from matplotlib.colors import same_color, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from yardstick import figures

P = 500e6
MEMORY = {"zero2": {"parameter": P, "gradient": P / 2, "optimizer": P, "buffer": 0},
          "offload": {"parameter": P, "gradient@host": P / 2, "optimizer@host": P, "optimizer@nvme": P / 4}}
TRAFFIC = {"measured": {"all_reduce": P, "all_gather": P / 2}, "predicted": {"all_reduce": P, "all_gather": P / 2},
           "paper": {"reduce_scatter": P / 2, "all_gather": P / 2}, "weights_bytes": 2 * P}
RECORD = {"run": "strategies/3_zero_stage2", "settings": {"strategy": "zero2", "model": "tiny"},
          "machine": {"ranks": 2},
          "details": {"memory": {"rest": {"measured": MEMORY["zero2"], "predicted": MEMORY["zero2"]},
                                 "after_backward": {"measured": MEMORY["offload"], "paper": MEMORY["zero2"]}},
                      "traffic": TRAFFIC, "loss": [9.0, 8.5, 8.25]}}


@pytest.fixture
def axes():
    figures.style()
    return Figure(figsize=(10, 6)).subplots()


def bars(axes):
    """[(y of the middle, left, width, hatch)] of the bars drawn."""
    return [(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width(), bar.get_hatch())
            for bar in axes.patches]


def words(axes):
    return [text.get_text() for text in axes.texts] + [text.get_text() for text in axes.get_legend().get_texts()]


def test_memory_bars_show_the_bytes(axes):
    assert figures.memory_bars(axes, MEMORY, {"zero2": {"parameter": P * 1.01}}, title="Memory") is axes
    assert axes.get_xlabel() == "GB" and axes.get_title(loc="left") == "Memory"
    drawn = bars(axes)
    assert [b[1:3] for b in drawn if b[3] is None] == [   # device memory first, then host, then NVMe
        (0, 0.5), (0.5, 0.25), (0.75, 0.5), (0, 0.5), (0.5, 0.25), (0.75, 0.5), (1.25, 0.125)]
    assert [b[1:3] for b in drawn if b[3]] == [(0, pytest.approx(0.505))] and drawn[0][0] < drawn[-1][0]
    assert {"1.25 GB", "1.38 GB", "0.505 GB", "parameters", "optimizer states", "paler: in host memory",
            "paler: in NVMe files", "measured", "predicted"} <= set(words(axes))
    assert "buffers" not in words(axes)                   # zero bytes are no entry
    assert [label.get_text() for label in axes.get_yticklabels()] == ["zero2", "offload"]


def test_places_are_paler_colours_of_the_kind(axes):
    figures.memory_bars(axes, MEMORY)
    device, host, nvme = axes.patches[2], axes.patches[5], axes.patches[6]
    assert same_color(device.get_facecolor(), figures.KINDS["optimizer"])
    shades = [sum(to_rgb(bar.get_facecolor())) for bar in (device, host, nvme)]
    assert shades == sorted(set(shades))


def test_traffic_bars_have_lines_at_multiples_of_P(axes):
    figures.traffic_bars(axes, {"zero2": TRAFFIC["measured"]}, P=P)
    assert [line.get_xdata()[0] for line in axes.lines] == [500, 1000, 1500] and axes.get_xlabel() == "MB"
    assert {"1P", "2P", "3P", "all-reduce", "all-gather", "750 MB"} <= set(words(axes))
    assert axes.get_xlim()[1] > 1500


@pytest.mark.parametrize("most, unit", [(0, "bytes"), (999, "bytes"), (1e3, "kB"), (2.5e6, "MB"), (1e9, "GB"),
                                        (4e12, "TB")])
def test_unit(most, unit):
    assert figures._unit(most)[0] == unit


def test_curves_that_coincide_can_be_told_apart(axes):
    figures.curves(axes, {"dp": [3.0, 2.0], "zero1": [3.0, 2.0], "zero2": [3.0, 2.0]})
    looks = {(line.get_linewidth(), line.get_linestyle(), line.get_color()) for line in axes.lines}
    assert len(looks) == 3 and axes.lines[0].get_linewidth() > axes.lines[2].get_linewidth()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dp", "zero1", "zero2"]


def test_distances_to_the_first_curve(axes):
    figures._differences(axes, {"dp": [3.0, 2.0, 1.0], "zero1": [3.0, 2.0 + 1e-6, float("nan")], "zero2": [3.0]})
    assert axes.get_yscale() == "log" and axes.get_ylabel() == "distance to dp"
    first, second = (line.get_ydata() for line in axes.lines)
    floor = axes.get_ylim()[0]
    assert first[0] == floor and first[1] == pytest.approx(1e-6) and floor <= 1e-7 and list(second) == [floor]
    assert axes.get_yticklabels()[0].get_text() == "equal"


def test_who_holds_what(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    figures.who_holds_what(tmp_path / "a.png", 4, {"parameter": "full", "optimizer@host": "sharded"},
                           weights={"parameter": 2, "optimizer": 8}, title="Four ranks")
    axes, = drawn[0].axes
    filled = {kind: [p for p in axes.patches if same_color(p.get_facecolor(), figures.KINDS[kind])]
              for kind in ("parameter", "optimizer")}
    assert len(filled["parameter"]) == len(filled["optimizer"]) == 4
    whole, part = filled["parameter"][0], filled["optimizer"]
    assert part[0].get_width() == pytest.approx(whole.get_width() / 4)
    assert part[0].get_height() > whole.get_height()
    inside = [slice.get_x() - bar.get_x() for slice, bar in zip(part, filled["parameter"])]
    assert inside == pytest.approx([rank * whole.get_width() / 4 for rank in range(4)])
    texts = [text.get_text() for text in axes.texts]
    assert {"rank 3", "device\nmemory", "host\nmemory", "optimizer states\n8 bytes per parameter"} <= set(texts)
    with pytest.raises(ValueError, match="'half'"):
        figures.who_holds_what(tmp_path / "a.png", 2, {"parameter": "half"})


def test_figures_are_files_equal_when_drawn_again(tmp_path):
    draw = {"memory": lambda path: figures.memory_bars(path, MEMORY, MEMORY),
            "traffic": lambda path: figures.traffic_bars(path, {"zero2": TRAFFIC["paper"]}, P=P),
            "curves": lambda path: figures.curves(path, {"dp": [3.0, 2.0], "zero1": [3.0, 2.5]}),
            "who": lambda path: figures.who_holds_what(path, 2, {"parameter": "full", "gradient": "sharded"}),
            "run": lambda path: figures.run_figure(RECORD, path)}
    for name, function in draw.items():
        first, second = (function(tmp_path / folder / f"{name}.png") for folder in "ab")
        assert first.read_bytes() == second.read_bytes(), name
        assert len(first.read_bytes()) < 300_000 and imread(first).shape[1] >= 900
        assert b"Matplotlib" not in first.read_bytes()


@pytest.mark.parametrize("missing", ["memory", "traffic", "loss", "machine", "settings"])
def test_run_figure_draws_what_is_there(tmp_path, missing):
    record = {key: value for key, value in RECORD.items() if key != missing}
    record["details"] = {key: value for key, value in RECORD["details"].items() if key != missing}
    assert figures.run_figure(record, tmp_path / "run.png").exists()


def test_run_figure_of_one_rank_sends_nothing(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    traffic = {"measured": {}, "predicted": {}, "weights_bytes": P}
    details = {**RECORD["details"], "traffic": traffic}
    figures.run_figure({**RECORD, "machine": {"ranks": 1}, "details": details}, "")
    figures.run_figure(RECORD, "")
    alone, two = ([axes.get_title(loc="left") for axes in figure.axes] for figure in drawn)
    assert len(alone) == 2 and two[1] == "Sent by one rank in a step"
    assert [line.get_xdata()[0] for line in drawn[1].axes[1].lines] == [500, 1000, 1500]   # MB; half of the ring's


def test_run_figure_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="strategies/3_zero_stage2 has no details"):
        figures.run_figure({**RECORD, "details": {}}, tmp_path / "run.png")
    with pytest.raises(ValueError, match="no rows"):
        figures.memory_bars(tmp_path / "a.png", {})


def test_save_puts_figures_where_they_belong(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    assert figures.save(Figure(), "a", "strategies", commit=True) == tmp_path / "strategies/images/a.png"
    assert figures.save(Figure(), "a", tmp_path / "strategies") == tmp_path / "runs/figures/strategies/a.png"
    with pytest.raises(ValueError):
        figures.save(Figure(), "a", "/elsewhere", commit=True)


def test_colours_differ():
    for table in (figures.KINDS, figures.COLLECTIVES, figures.STRATEGIES):
        colours = [to_rgb(colour) for colour in table.values()]
        assert min(sum(abs(x - y) for x, y in zip(a, b)) for a in colours for b in colours if a is not b) > 0.3
