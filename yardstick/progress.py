"""What a run says while it lasts: a bar on a terminal, lines elsewhere, TensorBoard where asked for."""

import resource
import sys
import time


class Log:
    """Progress of rank 0: a bar on a terminal, else a line for each tenth of the steps."""

    def __init__(self, plan, rank):
        self.plan, self.rank, self.bar = plan, rank, None
        self.steps = plan.settings["steps"]
        self.begun = time.perf_counter()
        self.writer = None
        if plan.settings["tensorboard"] and rank.rank == 0:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(plan.folder / "tensorboard")

    def progress(self, steps):
        if self.rank.rank == 0 and sys.stderr.isatty() and not self.plan.brief:
            from tqdm import tqdm
            self.bar = tqdm(steps, unit="step", dynamic_ncols=True, initial=steps.start, total=steps.stop)
            return self.bar
        return steps

    def step(self, step, loss, learning_rate):
        """Show one finished step: mean loss over ranks, tokens per second, memory of this process."""
        if self.rank.rank:
            return
        now = time.perf_counter()
        speed = self.plan.global_batch * self.plan.seq / (now - self.begun)
        self.begun = now
        line = not self.plan.brief and (step in (0, self.steps - 1) or (step + 1) % max(1, self.steps // 10) == 0)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s, {memory_in_use(self.rank) / 1e9:.2f} GB")
        elif line:
            print(f"step {step + 1}/{self.steps}  loss {loss:.4f}  {speed:,.0f} tokens/s  {memory_in_use(self.rank) / 1e9:.2f} GB",
                  file=sys.stderr, flush=True)
        if self.writer:
            for name, value in (("loss", loss), ("learning_rate", learning_rate), ("tokens_per_second", speed)):
                self.writer.add_scalar(name, value, step + 1)

    def stopped(self, step, checkpoint, command):
        """What a run that was asked to stop leaves, and how it goes on."""
        if self.rank.rank:
            return
        if self.bar is not None:
            self.bar.close()
        print(f"stopped after step {step + 1} of {self.steps}; checkpoint: {checkpoint}\ncontinue with: "
              f"{command}", file=sys.stderr, flush=True)

    def close(self):
        if self.writer:
            self.writer.close()


def memory_in_use(rank):
    """Bytes of this process's device: what CUDA's allocator holds, else the resident memory."""
    if rank.gpu:
        import torch
        return torch.cuda.memory_allocated()
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
