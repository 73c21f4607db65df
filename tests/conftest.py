"""Fixtures of all tests: fresh processes that have torch, DeepSpeed and transformers imported already."""

import json
import multiprocessing
import os
from multiprocessing import forkserver

import pytest

from tests.strategies import cases
from yardstick import deepspeed_proof, op_cache

# Imported once, by the server that forks every case: it takes seconds, a fork takes none.
PRELOAD = ["torch", "deepspeed", "transformers", "transformers.models.gpt2.modeling_gpt2", "torch.distributed.nn",
           "torch.utils.cpp_extension", "pytest", "psutil", "real_model_example", "tests.strategies.cases",
           "yardstick.report", "yardstick.probe", "yardstick.data"]
# Ranks of tests compute on the CPU whatever the machine has, in one thread each: sums are the same every time.
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
               "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "RANKS": "2",
               "PYTHONPATH": str(cases.ROOT)}


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The multiprocessing context of a server that forks processes with PRELOAD imported; it joins no group."""
    extensions = tmp_path_factory.mktemp("extensions")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    before = dict(os.environ)
    for name in cases.OF_LAUNCHERS:
        os.environ.pop(name, None)
    os.environ.update(ENVIRONMENT, TORCH_EXTENSIONS_DIR=str(extensions))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    yield context
    assert not list(extensions.iterdir()), "DeepSpeed compiled an op by itself, which takes minutes"


@pytest.fixture
def launch(server, tmp_path):
    """launch(maker, *arguments, ranks=2, ...) -> cases.Outcome: see cases.launch."""
    def call(maker, *arguments, **options):
        return cases.launch(server, tmp_path, maker, *arguments, **options)
    return call


@pytest.fixture(scope="session")
def async_io():
    """DeepSpeed's asynchronous I/O, compiled once into the checkout's cache; skips where its tools are missing."""
    _compiled("async_io")


@pytest.fixture(scope="session")
def compiled_adams():
    _compiled("cpu_adam", "fused_adam")


def _compiled(*ops):
    lacking = None if op_cache.ready(ops) else op_cache.missing_tools(ops)
    if lacking:
        pytest.skip(lacking)
    op_cache.prepare(ops)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """{"small", "odd", "wide": folder}, for the setting model=."""
    return {name: cases.model_folder(tmp_path_factory.mktemp(name), **getattr(cases, name.upper()))
            for name in ("small", "odd", "wide")}


@pytest.fixture(scope="session")
def counts(server, models, tmp_path_factory):
    known = {}

    def of(ranks, dispatch, changes):
        key = json.dumps([ranks, dispatch, changes], sort_keys=True)
        if key not in known:
            changes = {**changes, "model": models.get(changes["model"], changes["model"])}
            folder = tmp_path_factory.mktemp("counted")
            known[key] = cases.launch(server, folder, cases.counting, changes, dispatch, ranks=ranks).good()
        return known[key]
    return of


@pytest.fixture
def counted(request, counts):
    """counted(strategy, ranks=2, ...) -> [cases.Count of each rank]; runs are kept, so tests of them share one.

    The odd model with a small bucket, unless asked for another; infinity takes a model with something to swap, and
    the bucket of its config.
    """
    def of(strategy, ranks=2, dispatch=False, **changes):
        if strategy == "infinity":
            request.getfixturevalue("async_io")
        usual = {"model": "odd", "reduce_bucket_size": cases.BUCKET}
        if strategy == "infinity":
            usual = {"model": "wide"}
        return counts(ranks, dispatch, {"strategy": strategy, **({} if "model" in changes else usual), **changes})
    return of


@pytest.fixture(scope="session")
def proved():
    """proved("01") -> ([(citation, "traced", "read" or "")], [record of each proof run]) of that annotated script, run once."""
    known = {}

    def of(number):
        if number not in known:
            script, = deepspeed_proof.FOLDER.glob(f"{number}_*_annotated.py")
            notes, _, records = deepspeed_proof.prove(script)
            known[number] = notes, records
        return known[number]
    return of
