"""Collectives counted where torch.distributed is called: kind, calls, payload, ring bytes, seconds, phase.

`Meter.install()` replaces the functions of the module torch.distributed that move tensors. DeepSpeed looks
most of them up at each call but all_gather_into_tensor and reduce_scatter_tensor when its backend is made
(comm/torch.py: TorchBackend.__init__), so install before `deepspeed.init_distributed`.
"""

import time
from collections import defaultdict
from contextlib import contextmanager

from yardstick.formulas import ring_bytes

# torch's name -> (kind, which argument is the full tensor: all_gather's output, reduce_scatter's input)
_PATCHED = {"all_reduce": ("all_reduce", 0), "all_gather_into_tensor": ("all_gather", 0),
            "reduce_scatter_tensor": ("reduce_scatter", 1), "broadcast": ("broadcast", 0), "reduce": ("reduce", 0),
            "all_to_all_single": ("all_to_all", 0), "all_gather": ("all_gather", 0),
            "reduce_scatter": ("reduce_scatter", 1)}


class Meter:
    """Counts what this rank sends while `counting`; `phase` names what the caller is doing.

    rows: {(phase, kind, bytes of the tensor, what): calls}, where `what` is "control" for a call inside `named(...)`, else the
    name that axes, {process group: name}, gives the call's group, or "". blocked: {phase: seconds that the host spent in calls
    and in waiting for them}; on a GPU those only enqueue kernels, so blocked says nothing there.
    """

    def __init__(self):
        self.rows = defaultdict(int)
        self.blocked = defaultdict(float)
        self.counting, self.phase, self.what = False, "", ""
        self.axes = {}

    def install(self):
        import torch.distributed as dist
        for name, (kind, where) in _PATCHED.items():
            original = getattr(dist, name)
            if not hasattr(original, "unmetered"):
                wrapped = self._wrap(original, kind, where)
                wrapped.unmetered = original
                setattr(dist, name, wrapped)
        return self

    def remove(self):
        import torch.distributed as dist
        for name in _PATCHED:
            setattr(dist, name, getattr(getattr(dist, name), "unmetered", getattr(dist, name)))

    def _wrap(self, original, kind, where):
        def collective(*args, **kwargs):
            if not self.counting:
                return original(*args, **kwargs)
            names = {"all_gather": "output_tensor", "all_to_all": "output", "reduce_scatter": "input"}
            tensor = args[where] if len(args) > where else kwargs.get(names.get(kind, "tensor"))
            tensors = tensor if isinstance(tensor, (list, tuple)) else [tensor]
            what = self.what or self.axes.get(kwargs.get("group"), "")
            self.rows[self.phase, kind, sum(t.numel() * t.element_size() for t in tensors), what] += 1
            begin = time.perf_counter()
            work = original(*args, **kwargs)
            self.blocked[self.phase] += time.perf_counter() - begin
            return work if work is None else _TimedWork(work, self)
        return collective

    def named(self, what):
        """A context in which calls are the program's own (the mean of the loss, say), not the strategy's."""
        return _Named(self, what)

    @contextmanager
    def paused(self):
        """A context in which nothing is counted: what is sent there is no part of a step."""
        counting, self.counting = self.counting, False
        try:
            yield
        finally:
            self.counting = counting

    def per_step(self, steps, world):
        """[{kind, phase, what, calls, payload_bytes, ring_bytes}] of one of `steps` counted steps, per rank."""
        sums = defaultdict(lambda: [0, 0])
        for (phase, kind, size, what), calls in self.rows.items():
            sums[phase, kind, what][0] += calls
            sums[phase, kind, what][1] += calls * size
        return [{"kind": kind, "phase": phase, "what": what, "calls": calls / steps, "payload_bytes": size / steps,
                 "ring_bytes": ring_bytes(kind, size / steps, world)}
                for (phase, kind, what), (calls, size) in sorted(sums.items())]

    def clear(self):
        self.rows.clear()
        self.blocked.clear()


class _TimedWork:
    """The handle of an asynchronous collective; waiting for it counts as blocked time."""

    def __init__(self, work, meter):
        self._work, self._meter = work, meter

    def wait(self, *args, **kwargs):
        begin = time.perf_counter()
        try:
            return self._work.wait(*args, **kwargs)
        finally:
            self._meter.blocked[self._meter.phase] += time.perf_counter() - begin

    def __getattr__(self, name):
        return getattr(self._work, name)


class _Named:
    def __init__(self, meter, what):
        self.meter, self.what = meter, what

    def __enter__(self):
        self.before, self.meter.what = self.meter.what, self.what

    def __exit__(self, *_):
        self.meter.what = self.before
