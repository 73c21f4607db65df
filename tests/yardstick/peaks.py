"""The largest sum of bytes that a run's tensors really took, by phase: torch's CPU allocator followed block by block."""

import json
import os
from dataclasses import dataclass

from tests.strategies import cases

SCALARS = 4096         # bytes between steps that belong to no item: the batch, the loss, DeepSpeed's scalars


def write_json(path, fields):
    path.write_text(json.dumps(fields))


@dataclass(frozen=True)
class Peak:
    """What one rank's run took from the allocator in one later step, device and host together, and what predicts it."""

    made: object           # tensors, config, ranks, ... of the run: see `measuring`
    rank: int
    phases: dict           # {"forward", "backward", "step": largest bytes}
    rest: int              # bytes when the step began


def measuring(changes):
    """Ranks of the program under torch's profiler, which reports each block that the CPU allocator gives or takes.

    It runs from before the model is made, so that no block is unknown; blocks that an accident of alignment adds are
    as they are. The last step counts.
    """
    made = cases.plan(**{"steps": 3, "seq": 16, "micro_batch": 1, "count": False, **changes})

    def rank():
        import torch
        from torch.profiler import ProfilerActivity, profile, record_function

        from real_model_example import train
        from yardstick import probe
        plain = probe.Probe._phase

        def marked(self, phase, *arguments):
            from contextlib import contextmanager

            @contextmanager
            def both():
                with record_function(f"phase {self.step + (phase == 'data')} {phase}"), plain(self, phase, *arguments):
                    yield
            return both()
        probe.Probe._phase = marked
        settle_collectives()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            train(made, finish=False)
        events = watched.profiler.kineto_results.events()
        blocks = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        spans = [(e.start_ns(), e.end_ns(), e.name().split()[2]) for e in events
                 if e.name().startswith(f"phase {made.settings['steps'] - 1} ")]
        begin = min(start for start, _, _ in spans)
        now, rest, phases = 0, 0, {}
        for when, nbytes in blocks:
            now += nbytes
            if when < begin:
                rest = now
            for start, end, phase in spans:
                if start <= when <= end:
                    phases[phase] = max(phases.get(phase, 0), now)
        return Peak({"tensors": made.tensors, "config": made.config, "ranks": made.world, "accumulation": made.accumulation,
                     "micro_batch": made.micro_batch, "seq": made.seq, "precision": made.precision}, int(os.environ["RANK"]),
                    phases, rest)
    return rank


def settle_collectives(seconds=0.004):
    """Let each collective end, and gloo's threads drop what they held of it, before the program goes on.

    A tensor whose last holder is such a thread is freed there, where the profiler does not look; and collectives that
    overlap hold gloo's own copies of several tensors at times that vary from run to run.
    """
    import time

    import torch.distributed as dist

    from yardstick.traffic import _PATCHED

    class Done:
        def wait(self, *_, **__):
            return True

        def is_completed(self):
            return True

    def settled(original):
        def collective(*arguments, **options):
            work = original(*arguments, **{**options, "async_op": True})
            if work is not None:
                work.wait()
            time.sleep(seconds)
            return Done() if options.get("async_op") else None
        return collective
    for name in _PATCHED:
        setattr(dist, name, settled(getattr(dist, name)))
