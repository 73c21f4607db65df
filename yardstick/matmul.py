"""Which library multiplies fp32 matrices: the faster one where it is as accurate, the same on every rank."""

import hashlib
import os
import time

from yardstick import ranks


def choose(rank):
    """Send fp32 matrix products to the faster library where it is as accurate; return the torch setting used.

    torch.mm in fp32 goes to MKL, which takes a slow path on some processors; the setting "medium" sends it to
    oneDNN. Rank 0 decides, by a probe whose result is kept, so that the runs of a machine compute alike.
    """
    import torch
    choice = "highest"
    if not rank.gpu:
        answer = torch.tensor([rank.rank == 0 and _probed() == "medium"], dtype=torch.int32)
        if rank.world > 1:
            torch.distributed.broadcast(answer, 0)
        choice = "medium" if answer.item() else "highest"
    torch.set_float32_matmul_precision(choice)
    return choice


def _probed(folder=ranks.ROOT / "runs" / "cache" / "matmul"):
    """"medium" where that is faster than "highest" and as accurate; probed once for a torch, a processor and its threads.

    A library may compute in bf16 under "medium" (processors with AMX). fp32 keeps 24 bits and bf16 8, so an error of a few
    times that of "highest" is fp32, a thousand times is not.
    """
    import torch
    key = hashlib.sha256(f"{torch.__version__} {ranks.processor()} {torch.get_num_threads()}".encode()).hexdigest()[:12]
    kept = folder / key
    try:
        if kept.read_text() in ("highest", "medium"):
            return kept.read_text()
    except (OSError, UnicodeDecodeError):                # not there yet, or damaged: probed again
        pass
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    seconds, error = {"highest": [], "medium": []}, {}
    for _ in range(15):                                  # in turn, and the least of each: other work comes and goes
        for precision, times in seconds.items():
            torch.set_float32_matmul_precision(precision)
            begin = time.perf_counter()
            product = a @ b
            times.append(time.perf_counter() - begin)
            error[precision] = (product.double() - exact).abs().max()
    faster = min(seconds["medium"]) < 0.9 * min(seconds["highest"])
    choice = "medium" if faster and error["medium"] <= 8 * error["highest"] else "highest"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(f".{os.getpid()}")
        temporary.write_text(choice)
        os.replace(temporary, kept)
    except OSError:                                      # it is only a memory: the next run probes again
        pass
    return choice
