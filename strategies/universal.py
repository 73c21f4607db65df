"""Loads a checkpoint on another number of ranks, by way of DeepSpeed's universal checkpoint: a file per tensor, without ranks."""

import os
import shutil
import subprocess
import sys
import time

TAG = "deepspeed"              # the folder of engine.save_checkpoint inside a checkpoint
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def load(engine, resume, folder, rank, watchdog):
    """Rank 0 writes the checkpoint anew into `folder`; all ranks load their shares of that. Collective."""
    import torch
    if rank.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _convert(resume, folder, rank, watchdog, of_stage3=engine.zero_optimization_stage() == 3)
    torch.distributed.barrier()
    engine.load_checkpoint(str(folder), tag=TAG)
    torch.distributed.barrier()
    if rank.rank == 0:                                       # what a failure leaves goes with the next save
        shutil.rmtree(folder, ignore_errors=True)


def _convert(resume, folder, rank, watchdog, of_stage3):
    words = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(resume.path / TAG),
             "--output_folder", str(folder / TAG), "--num_extract_workers", "1", "--num_merge_workers", "1",
             *([] if of_stage3 else ["--inject_missing_state"])]             # which stages 1 and 2 do not write
    environment = {key: value for key, value in os.environ.items() if key not in OF_RANKS}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment)
        while process.poll() is None:
            watchdog.moved("the conversion to a universal checkpoint")
            time.sleep(0.1)
    if process.returncode:
        last = (folder / "log").read_text(errors="replace").strip().splitlines()[-1:]
        raise SystemExit(f"{resume.path} could not be converted for {rank.world} ranks: {' '.join(last)}. Start with "
                         f"RANKS={resume.manifest['world']}, which needs no conversion.")
