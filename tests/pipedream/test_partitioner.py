"""The planner computes what the released code computes, its optimum is one, and bad profiles are refused."""

import itertools
import math
import random
import subprocess
import sys

import pytest

from pipedream.graph import Graph, Node, cuts, read_graph, write_graph
from pipedream.partitioner import partition
from yardstick.results import ROOT

PROFILES = ROOT.parent / "shared" / "data" / "pipedream_profiles"
shared = pytest.mark.skipif(not PROFILES.is_dir(), reason="the published profiles are not here")


def chain(seed, n=6):
    draw, graph = random.Random(seed), Graph()
    for k in range(n):
        graph.add(Node(f"n{k}", f"layer {k}", draw.uniform(1, 9), draw.uniform(1, 9), draw.uniform(1e6, 9e6), draw.uniform(1e6, 5e7)),
                  [f"n{k - 1}"] if k else [])
    return graph


def cost(model, where, stages, replicas, machines, bandwidth, memory, compression):
    """Seconds of a minibatch of one level's plan, written down anew from the text of pipedream/partitioner.py."""
    worst, behind = 0.0, machines
    for place, ((first, last), m) in enumerate(zip(stages, replicas)):
        time, activation, weights = (a - b for a, b in zip(where.whole[last - 1], where.whole[first - 1] if first else (0, 0, 0)))
        time /= 1000
        behind -= m
        versions = math.ceil(behind / m) + (model != "released")
        if memory and versions * (activation + weights) > memory:
            return math.inf
        if model == "released":
            worst = max(worst, (time + 4 * (m - 1) * weights / (bandwidth * m)) / m)
        elif model == "paper":
            worst = max(worst, max(time, 2 * (m - 1) * weights / bandwidth) / m)
        else:
            worst = max(worst, time / m, 2 * (m - 1) / m * weights / bandwidth / m)
        if model == "released" and compression is None:
            continue
        share = {"paper": 1}.get(model, m)
        inward = 2 * where.output[first - 1] / bandwidth / share / (compression or 1) if place else 0.0
        outward = 2 * where.output[last - 1] / bandwidth / share / (compression or 1) if last < len(where.whole) else 0.0
        if model == "released" and not place:
            outward = 0.0                                       # the released code charges a cut to the stage behind it
        worst = max(worst, inward, outward if model != "paper" else 0.0)
    return worst


def every_plan(n, machines, straight, fewer):
    for count in range(1, n + 1):
        for inside in itertools.combinations(range(1, n), count - 1):
            stages = list(zip((0, *inside), (*inside, n)))
            for replicas in itertools.product(range(1, 2 if straight else machines + 1), repeat=count):
                if sum(replicas) == machines or fewer and sum(replicas) <= machines:
                    yield stages, list(replicas)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("model, compression", [("released", None), ("released", 1), ("released", 3), ("paper", None), ("corrected", None)])
@pytest.mark.parametrize("straight, memory", [(False, None), (True, None), (False, 1.3e8)])
def test_no_plan_is_better(seed, model, compression, straight, memory):
    graph, machines, bandwidth = chain(seed), 4, 10 ** random.Random(seed).uniform(9, 10.5)
    where = cuts(graph)
    best = min(cost(model, where, *plan, machines, bandwidth, memory, compression)
               for plan in every_plan(len(where.whole), machines, straight, False))
    arguments = dict(machines=[machines], bandwidths=[bandwidth], memory=memory, straight=straight, model=model,
                     activation_compression_ratio=compression)
    if math.isinf(best):
        with pytest.raises(ValueError, match="fits memory"):
            partition(graph, **arguments)
        return
    plan = partition(graph, **arguments)
    assert plan.time == pytest.approx(best, rel=1e-12)
    assert cost(model, where, plan.stages, plan.replicas, machines, bandwidth, memory, compression) == pytest.approx(plan.time, rel=1e-12)
    assert plan.stages[0][0] == 0 and plan.stages[-1][1] == len(where.whole) and sum(plan.replicas) == machines


@pytest.mark.parametrize("seed", range(4))
def test_fewer_machines_are_taken_where_they_do(seed):
    graph = chain(seed, 4)
    where = cuts(graph)
    best = min(cost("released", where, *plan, 4, 1e8, None, 1) for plan in every_plan(4, 4, False, True))
    assert partition(graph, [4], [1e8], fewer_machines=True, activation_compression_ratio=1).time <= best * (1 + 1e-12)


@shared
@pytest.mark.parametrize("machines, bandwidth, replicas, first", [(4, 1e9, [3, 1], 17), (8, 12e9, [7, 1], None), (16, 3.125e9, [15, 1], None)])
def test_vgg16_as_the_authors_split_it(machines, bandwidth, replicas, first):
    plan = partition(read_graph(PROFILES / "vgg16.graph.txt"), [machines], [bandwidth], activation_compression_ratio=1)
    assert plan.replicas == replicas and (first is None or plan.stages[0] == (0, first))
    assert plan.data_parallel_time > plan.time


@shared
def test_what_the_released_planner_gives_for_resnet50_is_a_hybrid():
    """SOSP'19 table 1 says data parallel on 16 machines; its own profile gives less time to a hybrid."""
    graph = read_graph(PROFILES / "resnet50.graph.txt")
    assert len(cuts(graph).whole) == 240
    plan = partition(graph, [4, 4], [12e9, 1.25e9], activation_compression_ratio=1)
    assert len(plan.stages) > 1 and 1.02 <= plan.data_parallel_time / plan.time <= 1.21


@shared
@pytest.mark.parametrize("name, nodes, states, seconds, megabytes, gigabytes", [
    ("alexnet", 22, 22, 0.0853, 244.4, 1.12), ("vgg16", 40, 40, 0.6725, 553.4, 14.68), ("resnet50", 176, 240, 0.4434, 102.2, 19.23)])
def test_published_profiles_are_read_as_they_are(name, nodes, states, seconds, megabytes, gigabytes, tmp_path):
    graph = read_graph(PROFILES / f"{name}.graph.txt")
    where = cuts(graph)
    milliseconds, activation, parameters = where.whole[-1]
    assert (len(where.whole), len(where.nodes[-1])) == (states, nodes)
    assert (round(milliseconds / 1e3, 4), round(parameters / 1e6, 1), round(activation / 1e9, 2)) == (seconds, megabytes, gigabytes)
    write_graph(graph, tmp_path / "again.txt")
    assert str(read_graph(tmp_path / "again.txt")) == str(graph)


def test_a_branch_is_cut_with_all_that_crosses():
    """a -> b -> d, a -> c -> d: behind {b, a}, what a sends to c crosses too."""
    graph = Graph()
    for name, inputs in (("a", ()), ("b", "a"), ("c", "a"), ("d", "bc")):
        graph.add(Node(name, name, 1, 1, {"a": 1, "b": 10, "c": 100, "d": 1000}[name], 0), list(inputs))
    where = cuts(graph)
    crossing = {frozenset(nodes): out for nodes, out in zip(where.nodes, where.output)}
    assert crossing == {frozenset("a"): 1, frozenset("ab"): 11, frozenset("ac"): 101, frozenset("abc"): 110, frozenset("abcd"): 1000} or (
        crossing[frozenset("ab")] == 11 and crossing[frozenset("abcd")] == 1000)
    assert where.whole[-1][0] == 8


def test_levels_multiply_and_every_layer_has_a_stage():
    graph = chain(3, 8)
    plan = partition(graph, [2, 2], [1e10, 1e9], activation_compression_ratio=1)
    assert sum(plan.replicas) >= 4 and set(plan.nodes) == set(graph.nodes)
    assert sorted(set(plan.nodes.values())) == list(range(len(plan.stages)))
    flat = partition(graph, [4], [1e9], activation_compression_ratio=1)
    assert flat.time >= plan.time * 0.5                                    # a faster network inside does not make it slower


NODE = "n1 -- A -- forward_compute_time=1, backward_compute_time=2, activation_size=3, parameter_size=4"


@pytest.mark.parametrize("text, says", [
    ("", "holds no node"), (NODE.replace("parameter_size=4", ""), ":1: a node is NAME"), (NODE.replace("=2", "=x"), "is no number"),
    (NODE.replace("=3", "=-3"), "is negative"), (NODE + "\n\tn1 -- n2", "names n2"), (NODE + "\n\tn1", ":2: an edge is"),
    (f"{NODE}\n{NODE.replace('n1', 'n2')}\n\tn1 -- n2\n\tn2 -- n1", "has a cycle: n"), (NODE[:40], "is the file cut off?"),
])
def test_a_bad_profile_is_one_message(text, says, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text(text)
    done = subprocess.run([sys.executable, "pipedream/partitioner.py", f"profile={path}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_lists_of_activations_are_summed(tmp_path):
    (tmp_path / "p.txt").write_text(NODE.replace("=3", "=[3.0; 4.5]"))
    assert read_graph(tmp_path / "p.txt").nodes["n1"].activation == 7.5


@pytest.mark.parametrize("arguments, says", [
    (dict(machines=[4, 4]), "as long as each other"), (dict(machines=[0]), "whole numbers from 1"), (dict(bandwidths=[0]), "above zero"),
    (dict(memory=1.0, model="corrected"), "no plan of"), (dict(model="best"), "none of released"), (dict(memory=-1), "above zero"),
])
def test_bad_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        partition(chain(1), **arguments)
