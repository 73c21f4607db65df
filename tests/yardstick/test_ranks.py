"""Ranks start together and end together: what a rank's failure, a signal, and the death of the parent come to."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from yardstick import op_cache, ranks

# A maker runs in a fresh process; the function that it returns is what each rank runs (tests/strategies/cases.py).


def join(seconds=60):
    op_cache.do_without("deepspeed_shm_comm")
    return ranks.join(gpu=False, seconds=seconds)


def groups():
    def rank():
        import torch
        joined = join()
        total = torch.tensor([10 ** joined.rank])
        torch.distributed.all_reduce(total)
        return joined, total.item(), torch.get_num_threads(), os.environ["LOCAL_WORLD_SIZE"]
    return rank


@pytest.mark.parametrize("count", [1, 3])
def test_ranks_join_one_group(launch, count):
    out = launch(groups, ranks=count)
    assert out.good() == [(ranks.Rank(rank, count, rank, "cpu"), int("1" * count), 1, str(count))
                          for rank in range(count)]
    assert not out.good()[0][0].gpu


def failing(how):
    """Ranks of which the last ends badly, while the others wait for it in a collective."""
    ranks.GRACE_SECONDS = 2

    def rank():
        import torch
        if (joined := join()).rank == joined.world - 1:
            if how == "raise":
                raise RuntimeError("the loss is not a number")
            sys.exit(how)
        torch.distributed.all_reduce(torch.zeros(1))
    return rank


# twice each: the survivor fails a moment later, and must not be named in place of the cause
@pytest.mark.parametrize("repeat", range(2))
@pytest.mark.parametrize("how,code,message", [
    ("raise", 1, r"\[rank 1/2\] \d\d:\d\d:\d\d failed:\nTraceback[^\0]*RuntimeError: the loss is not a number"),
    (3, 3, ""), ("no such disk", 1, "no such disk\n")])
def test_a_rank_that_ends_badly_is_named(launch, how, code, message, repeat):
    out = launch(failing, how, seconds=60)
    assert out.code == code and out.ranks == [None, None]
    assert f"rank 1 of 2 ended with exit code {code}; ending the other rank\n" in out.log
    assert re.search(message, out.log)


def killed_in_a_collective():
    def rank():
        import threading

        import torch
        joined, tensor = join(), torch.zeros(50_000_000)

        def die():
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        if joined.rank == 1:
            threading.Thread(target=die, daemon=True).start()
        while True:
            torch.distributed.all_reduce(tensor)
    return rank


@pytest.mark.parametrize("count", [2, 3])
def test_a_rank_killed_in_the_middle_of_an_all_reduce(launch, count):
    out = launch(killed_in_a_collective, ranks=count, seconds=60)
    assert out.code == 128 + signal.SIGKILL and out.seconds < 30
    others = "rank" if count == 2 else "ranks"
    assert f"rank 1 of {count} was ended by SIGKILL; ending the other {others}\n" in out.log
    assert "[rank 0/" in out.log                                   # gloo told the survivors


def deaf(folder):
    """A rank dies while the others sit outside of any collective, and would for ever."""
    ranks.GRACE_SECONDS = 1

    def rank():
        (Path(folder) / os.environ["RANK"]).write_text(str(os.getpid()))
        if os.environ["RANK"] == "2":
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)
    return rank


def test_ranks_that_do_not_notice_are_ended(launch, tmp_path):
    out = launch(deaf, tmp_path, ranks=3, seconds=60)
    assert out.code == 128 + signal.SIGTERM and out.seconds < 20
    assert "rank 2 of 3 was ended by SIGTERM; ending the other ranks" in out.log
    assert not [pid for pid in pids(tmp_path, 3) if alive(pid)]


def absent():
    """Rank 1 never comes to the collective."""
    ranks.GRACE_SECONDS = 1

    def rank():
        import torch
        if join(seconds=3).rank == 0:
            torch.distributed.all_reduce(torch.zeros(1))
        time.sleep(600)
    return rank


def test_a_collective_waits_no_longer_than_it_is_told(launch):
    out = launch(absent, seconds=60)
    assert out.code == 1 and out.seconds < 30 and "rank 0 of 2 ended with exit code 1" in out.log
    assert "imed out" in out.log


def pids(folder, count):
    return [int((folder / str(rank)).read_text()) for rank in range(count)]


def alive(pid):
    """True while a process runs; one that has ended and is not yet collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def waiting(folder):
    def rank():
        (Path(folder) / f"{os.environ['RANK']}.part").write_text(str(os.getpid()))
        (Path(folder) / f"{os.environ['RANK']}.part").rename(Path(folder) / os.environ["RANK"])
        time.sleep(600)
    return rank


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends ranks with their parent on Linux only")
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_ranks_end_with_their_parent(launch, tmp_path, sign):
    def disturb(process):
        until = time.monotonic() + 60
        while not all((tmp_path / str(rank)).exists() for rank in range(2)):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert all(alive(pid) for pid in pids(tmp_path, 2))
        os.kill(process.pid, sign)
    out = launch(waiting, tmp_path, seconds=30, started=disturb)
    assert out.code != 0
    until = time.monotonic() + 10
    while [pid for pid in pids(tmp_path, 2) if alive(pid)]:
        assert time.monotonic() < until, "ranks outlive their parent"
        time.sleep(0.05)


def environment(count):
    def rank():
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "STARTED_BY")
        return {name: os.environ.get(name) for name in names}
    return rank


def test_the_environment_is_that_of_a_launcher(launch):
    assert launch(environment, 2).good() == [
        {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
         "STARTED_BY": "yardstick.ranks"} for rank in range(2)]


def test_how_many_ranks(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("RANKS", raising=False)
    assert ranks.gpu_count() == 0 and ranks.default_world() == 2
    monkeypatch.setenv("RANKS", "5")
    assert ranks.default_world() == 5
    for text in ("", "0", "two", "-2", "1.5"):
        monkeypatch.setenv("RANKS", text)
        with pytest.raises(ValueError, match=f"RANKS={text} is not a number of ranks. Give RANKS=2"):
            ranks.default_world()
    monkeypatch.setattr(ranks, "gpu_count", lambda: 1)
    monkeypatch.setenv("RANKS", "2")
    with pytest.raises(ValueError, match="this machine has 1 GPU. Give RANKS=1, or DS_ACCELERATOR=cpu"):
        ranks.default_world()
    monkeypatch.delenv("RANKS")
    assert ranks.default_world() == 1


def test_a_launchers_process_is_a_rank(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not ranks.is_rank()
    monkeypatch.setenv("RANK", "0")
    assert ranks.is_rank()


def test_a_free_port_can_be_taken():
    import socket
    port = ranks.free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        assert ranks.free_port() != port
