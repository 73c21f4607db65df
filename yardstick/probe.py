"""When to look at a running engine: phases of a step, their seconds, and one step whose bytes are counted.

    probe = Probe(engine, meter, watchdog, steps=..., accumulation=...)
    with probe("data", step): ...    # data begins a step; then forward, backward, step: timed, collectives booked under it

The step `probe.looked` is looked at: activations during its first forward, what the engine holds after its last
backward and after its update. Traffic and times count from `probe.first` on, when stage 3 has learnt the
order of the modules.
"""

import statistics
import time
import weakref
from collections import defaultdict
from contextlib import contextmanager

from yardstick import ledger

WARM_UP = 2        # steps: stage 3 records the order of modules in the first forward and compares it in the second
APART = 10         # on a GPU one step in so many waits for the device after each phase, to time the phases; the others do not


class Probe:
    """Times every step; counts bytes once. `counting=False` leaves all counting out, for runs that time themselves."""

    def __init__(self, engine, meter, watchdog, *, steps, accumulation, counting=True):
        self.engine, self.meter, self.watchdog = engine, meter, watchdog
        self.accumulation, self.counting = accumulation, counting
        self.first = min(WARM_UP, max(0, steps - 1))
        self.looked = self.first if counting else -1
        self.step, self.forwards, self.backwards = -1, 0, 0
        self.seconds = defaultdict(list)                 # {phase: [(step, seconds)]}, "total" of each counted step
        self.moments = {}                                # {"gradients" or "always": (rows, unnamed)}
        self.activations = None
        self._looking, self._now, self._profile = 0.0, None, None
        self.gpu, self.apart = engine.device.type == "cuda", True
        # on a GPU one further step runs under torch's profiler: only the kernels tell how long communication takes
        self.profiled = self.first + 1 if counting and self.gpu and steps > self.first + 1 else -1
        self.kernel_seconds = None

    def __call__(self, phase, step=None):
        return self._phase(phase, step)

    @contextmanager
    def _phase(self, phase, step=None):
        if phase == "data":
            self.of_run = step
            self._begin_step()
        self.forwards += phase == "forward"
        self.backwards += phase == "backward"
        self.meter.phase = phase
        self.watchdog.moved(f"{phase} of step {self.of_run + 1}")
        watch = None
        if self.step == self.looked and phase == "forward" and self.forwards == 1:
            watch = SavedTensors(self.engine.module)
            watch.__enter__()
        blocked, begin = self.meter.blocked[phase], time.perf_counter()
        yield
        if self.apart:
            self._synchronize()
        if watch:
            watch.__exit__(None, None, None)
            self.activations = watch.peak
        spent, sent = time.perf_counter() - begin, self.meter.blocked[phase] - blocked
        self._now[phase] += spent - sent                 # net of communication on a CPU, where the host waits for it
        self._now["communication"] += sent
        if self.step == self.looked and phase == "backward" and self.backwards == self.accumulation:
            self._look("gradients")

    def _begin_step(self):
        self.end_step()
        self.step += 1
        self.forwards = self.backwards = 0
        self._now = defaultdict(float)
        self.apart = not self.gpu or self.step == self.first or (self.step - self.first) % APART == 2
        if self.apart:
            self._synchronize()              # what is left of the step before is not this one's
        self._started, self._looking = time.perf_counter(), 0.0
        if self.step == self.first and self.counting:
            self.meter.clear()
            self.meter.counting = True
        if self.step == self.profiled:
            from torch.profiler import ProfilerActivity, profile
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.__enter__()

    def end_step(self):
        """Close the step under way; called by the next one's "data" phase, and once after the last step."""
        if self.step < 0 or self._now is None:
            return
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            self.kernel_seconds = communication_kernels(self._profile.key_averages())
            self._profile = None
        if self.step >= self.first:
            total = time.perf_counter() - self._started - self._looking
            for phase in ("data", "forward", "backward", "step", "communication") if self.apart else ():
                self.seconds[phase].append((self.step, self._now[phase]))
            self.seconds["total"].append((self.step, total))
        if self.step == self.looked:
            self._look("always")
        self._now = None

    def _look(self, moment):
        begin = time.perf_counter()
        self.moments[moment] = ledger.held(self.engine)
        self._looking += time.perf_counter() - begin

    def _synchronize(self):
        if self.gpu:
            import torch
            torch.cuda.synchronize()

    def counted_steps(self):
        return self.step + 1 - self.first

    def median(self, phase):
        """Median seconds of a phase over the counted steps; those under observation are left out if others remain.

        On a GPU phases are timed in some steps only, and the whole step ("total") in the others.
        """
        values = self.seconds[phase]
        dear = {self.looked, self.profiled}
        usual = [(step, value) for step, value in values if step not in dear] or values
        if self.gpu and phase == "total":
            timed = {step for step, _ in self.seconds.get("forward", ())}
            usual = [(step, value) for step, value in usual if step not in timed] or usual
        return statistics.median(value for _, value in usual)


def communication_kernels(averages):
    """Seconds of NCCL's kernels in a profile's key_averages(); they may overlap with computing ones."""
    return sum(row.self_device_time_total for row in averages if row.key.startswith("nccl") and "Kernel" in row.key) / 1e6


class SavedTensors:
    """Bytes that autograd saves for backward, parameters left out: `peak` is the largest sum alive at once."""

    def __init__(self, module):
        self.module, self.alive, self.now, self.peak = module, {}, 0, 0

    def __enter__(self):
        import torch
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *details):
        self._hooks.__exit__(*details)

    def _pack(self, tensor):
        key = tensor.untyped_storage().data_ptr()
        if key not in self.alive and not self._is_parameter(key):
            self.now += tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self.now)
            self.alive[key] = [0, tensor.untyped_storage().nbytes()]
        held = _Held(tensor)
        if key in self.alive:
            self.alive[key][0] += 1
            weakref.finalize(held, self._drop, key)
        return held

    def _drop(self, key):
        entry = self.alive[key]
        entry[0] -= 1
        if not entry[0]:
            self.now -= entry[1]
            del self.alive[key]

    def _is_parameter(self, key):
        # asked afresh each time: stage 3 gathers weights into new storages and frees them, whose addresses
        # activations may get later
        return any(key == p.data.untyped_storage().data_ptr() for p in self.module.parameters())


class _Held:
    def __init__(self, tensor):
        self.tensor = tensor
