"""Once a step, between backward and update, all ranks agree: the mean loss, whether to stop, and what is not finite.

One all-reduce of three numbers, booked in the ledger as the program's own. What DeepSpeed does with a gradient that is
not finite depends on the stage: ZeRO, and any 16-bit training, skips the update without a word; stage 0 in fp32
takes it, and the weights are lost. Here it is said, with step and rank, and stage 0 skips it too.
"""

import math
import shutil
import sys

from yardstick import deepspeed_memory, ranks

LIMIT = 10             # updates skipped in a row that end the run; fp16 begins with a loss scale that is meant to overflow
LIMIT_FP16 = 50


class Control:
    """What the ranks of a run decide together. Every rank calls `agree` at each step."""

    def __init__(self, plan, engine, meter, rank):
        import torch
        self.plan, self.engine, self.meter, self.rank = plan, engine, meter, rank
        self.stop = False                                    # some rank was asked to stop
        self.skipped_in_a_row = 0
        self.bad = False                                     # some rank's gradient of this step is not finite
        self._swap = SwapSpace(plan, rank) if plan.swap else None
        self._sum = torch.zeros((), device=engine.device)    # not finite as soon as one gradient is not
        for parameter in engine.module.parameters():
            parameter.register_hook(self._look)
        if not hasattr(engine.optimizer, "overflow"):        # stage 0 in fp32: a plain optimizer
            self._skip_like_zero(engine.optimizer)

    def _look(self, gradient):
        """A gradient of this rank alone, before it is reduced: one pass over it, no wait for the device."""
        self._sum += gradient.detach().sum(dtype=self._sum.dtype)

    def _skip_like_zero(self, optimizer):
        update, optimizer.overflow = optimizer.step, False

        def step(*args, **kwargs):
            optimizer.overflow = self.bad                    # engine._take_model_step reads it, as of ZeRO's optimizers
            return None if self.bad else update(*args, **kwargs)
        step._wrapped_by_lr_sched = True                     # else torch's schedule warns that it was replaced
        optimizer.step = step

    def agree(self, step, losses):
        """The mean loss over ranks and micro-batches of `step` (counted from 0), a float; sets `stop` and `bad`.

        losses: this rank's, one for each micro-batch. Call it after the last backward and before engine.step.
        """
        import torch
        if self._swap:
            self._swap.check(f"step {step + 1}")
        mine = torch.stack(losses).float().mean()
        wrong = ~torch.isfinite(self._sum)
        with self.meter.named("control"):
            shared = torch.stack([mine, mine.new_tensor(ranks.stop_requested() is not None), wrong.to(mine)])
            torch.distributed.all_reduce(shared)             # DeepSpeed does not average losses
        total, asked, wrong = shared.tolist()
        self.stop, self.bad = asked > 0, wrong > 0
        if self.bad or not math.isfinite(total):
            self._report(step, mine.item())
        self._sum.zero_()
        return total / self.rank.world

    def _report(self, step, mine):
        import torch
        everyone = [None] * self.rank.world
        with self.meter.named("control"):
            torch.distributed.all_gather_object(everyone, (mine, bool(torch.isfinite(self._sum))))
        parts = []
        for rank, (loss, gradient) in enumerate(everyone):
            if not math.isfinite(loss):
                parts.append(f"the loss of rank {rank} is {loss}")
            elif not gradient:
                parts.append(f"the gradient of rank {rank} is not finite (its loss is {loss:.4f})")
        if self.rank.rank == 0:
            then = ("this update is skipped on every rank" if self.bad else "every gradient is finite: the update is taken")
            if self.plan.precision == "fp16" and self.bad:
                then += ", and the loss scale halved"
            print(f"step {step + 1}: {'; '.join(parts)}; {then}", file=sys.stderr, flush=True)

    def after_update(self, step):
        """End a run that does nothing but skip. Call it after engine.step."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if self.bad else 0
        limit = LIMIT_FP16 if self.plan.precision == "fp16" else LIMIT
        if self.skipped_in_a_row >= limit:
            if self.rank.rank:
                raise SystemExit(1)
            raise SystemExit(f"{limit} updates in a row were skipped, the last at step {step + 1}: the weights do not change any more. "
                             "Nothing was saved meanwhile. Start anew with a smaller learning_rate= or other data=; resume=auto steps=N "
                             "export=FOLDER, with the step N of the newest checkpoint, writes weights from before as a model to begin "
                             "with.")


class SwapSpace:
    """Foresees a full NVMe disk: DeepSpeed does not notice a short write, and its next read aborts the process in C.

    Files have their final sizes after the first update. Until then the disk must have room for what is missing.
    """

    def __init__(self, plan, rank):
        self.rank, self.folder = rank, plan.swap
        items = deepspeed_memory.memory(plan.tensors, plan.config, ranks=rank.world, rank=rank.rank)
        self.expected = sum(item.nbytes for item in items if item.place == "nvme")
        self.complete = False
        self.check("the start")

    def check(self, when):
        """End the run where the disk has too little left for this rank's files. Costs nothing once they are complete."""
        if self.complete:
            return
        present = sum(path.stat().st_size for path in self.folder.glob(f"**/rank{self.rank.rank}/*") if path.is_file())
        missing, free = self.expected - present, shutil.disk_usage(self.folder).free
        self.complete = missing <= 0
        if free < missing:
            raise SystemExit(f"[rank {self.rank.rank}/{self.rank.world}] the disk of {self.folder} is filling up: at {when} this rank's "
                             f"swap files still need {missing / 1e6:.0f} MB and {free / 1e6:.0f} MB are free. The run ends here, as "
                             "DeepSpeed would abort without a word. Free some, or give nvme_path= on a larger disk.")
