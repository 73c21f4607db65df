"""Which functions of a package a program enters: how often, in which order, in which phase, from which of its lines.

    trace = CallTrace(package_folder, phases={"runtime/engine.py:DeepSpeedEngine.step": "step"})
    with trace:
        ...
    trace.entered["step"]["runtime/zero/stage3.py:DeepSpeedZeroOptimizer_Stage3.step"]     # [times in call 0, in call 1, ...]

It uses sys.setprofile, so a function counts when Python enters it; C++ below it is not seen, nor are other processes, nor a
body that functools.cache answers for. On a CPU autograd runs its hooks on the calling thread. On a GPU it has a thread of its
own: register `trace.arm` as a hook of the loss, loss.register_hook(trace.arm), and what runs there is seen as well.
"""

import os
import sys
import threading


class CallTrace:
    """phases: {"file:symbol": name}; what is entered while one runs counts for the innermost, else for "". A phase that is
    entered again is its next call. script: a program whose lines are noted too, in `lines`.
    """

    def __init__(self, package, phases=(), script=None):
        self.root, self.phases = os.path.join(str(package), ""), dict(phases)
        self.script, self.main = script, threading.get_ident()
        self.entered = {"": {}, **{name: {} for name in self.phases.values()}}   # phase: {symbol: [times in each of its calls]}
        self.lines = {}                    # symbol: lines of the script that stood on the stack when it was entered
        self._calls = {name: -1 for name in self.entered}
        self._calls[""] = 0
        self._stack, self._names = [""], {}

    def __call__(self, frame, event, _):
        if event != "call" and event != "return":
            return
        code = frame.f_code
        name = self._names.get(code)
        if name is None:
            name = self._names[code] = self._name(code)
        if not name:
            return
        phase = self.phases.get(name)
        if event == "return":
            if phase is not None and self._stack[-1] == phase:
                self._stack.pop()
            return
        if phase is not None and self._stack[-1] != phase:       # a wrapper of the same name is no second call
            self._calls[phase] += 1
            self._stack.append(phase)
        now = self._stack[-1]
        times = self.entered[now].setdefault(name, [])
        times += [0] * (self._calls[now] + 1 - len(times))
        times[-1] += 1
        if self.script:
            lines = self._script_lines(frame) or self._script_lines(sys._current_frames().get(self.main))
            self.lines.setdefault(name, set()).update(lines)

    def _name(self, code):
        """"file:symbol" of a function of the package, else ""; what has no name of its own (<lambda>) is not counted."""
        if not code.co_filename.startswith(self.root):
            return ""
        symbol = code.co_qualname.replace(".<locals>", "")
        return "" if "<" in symbol else f"{code.co_filename[len(self.root):]}:{symbol}"

    def _script_lines(self, frame):
        found = set()
        while frame is not None:
            if frame.f_code.co_filename == self.script:
                found.add(frame.f_lineno)
            frame = frame.f_back
        return found

    def arm(self, *_):
        """Begin to count on this thread, and on Python's threads that start later."""
        threading.setprofile(self)
        sys.setprofile(self)

    def disarm(self):
        threading.setprofile(None)
        sys.setprofile(None)

    def __enter__(self):
        self.arm()
        return self

    def __exit__(self, *_):
        self.disarm()
