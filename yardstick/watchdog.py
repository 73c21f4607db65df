"""Ends a rank that has stopped moving, after printing where each of its threads stands.

    watchdog = Watchdog(rank, seconds).start()
    watchdog.moved("forward of step 3")        # at each phase; longer than `seconds` without it, and the run ends
    watchdog.stop()

A rank that waits in a collective is late because another is: the two end with different codes, so that whoever started
them can name the one that hangs. A thread looks twice a second at most; should the main thread keep Python's lock for itself,
faulthandler's own thread, which needs none, ends the process a little later.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from pathlib import Path

HANGS, WAITS = 75, 76          # exit codes: stands still by itself; stands in a collective that another rank does not enter
SLACK_SECONDS = 5              # what faulthandler leaves this thread to speak first
LAST_WORDS_SECONDS = 2         # between the stacks and the end: the other ranks stand still as long, and print theirs


def _collective(stack):
    """What a thread waits for other ranks in, or None: a call of torch.distributed, or the handle of one."""
    for frame in reversed(stack):
        if frame.filename.endswith("distributed_c10d.py") and frame.name != "wrapper" and not frame.name.startswith("_"):
            return frame.name
        if frame.name == "wait" and {"deepspeed", "torch"} & set(Path(frame.filename).parts):
            return "a collective begun before"
    return None


class Watchdog:
    """Watches the process that makes it. `seconds` is the longest that one phase may take."""

    def __init__(self, rank, seconds):
        self.name, self.seconds = f"[rank {rank.rank}/{rank.world}]", seconds
        self.where, self.at = "start", time.monotonic()
        self._armed = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def moved(self, where):
        """Say that this rank goes on, and with what. Costs an assignment: call it as often as you like."""
        self.where, self.at = where, time.monotonic()

    def start(self):
        self.moved(self.where)
        self._thread.start()
        return self

    def stop(self):
        self._end.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self):
        while True:
            if self._armed != self.at:                   # it moved: faulthandler counts anew
                self._armed = self.at
                left = self.at + self.seconds - time.monotonic()
                faulthandler.dump_traceback_later(max(0.1, left) + SLACK_SECONDS, exit=True)
            if self._end.wait(min(0.5, self.seconds / 4)):
                return
            if time.monotonic() - self.at > self.seconds:
                self._give_up()

    def _give_up(self):
        frames = {thread: frame for thread, frame in sys._current_frames().items() if thread != threading.get_ident()}
        stacks = {thread: traceback.extract_stack(frame) for thread, frame in frames.items()}
        waits = next(filter(None, (_collective(stack) for stack in stacks.values())), None)
        doing = f"waits for other ranks in {waits}" if waits else "hangs"
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        lines = [f"{self.name} {time.strftime('%H:%M:%S')} {doing}, in {self.where}: it has not moved for {self.seconds:g} s "
                 "(timeout_seconds=). Its stacks, the innermost call last:"]
        for thread, stack in stacks.items():
            lines += [f"thread {names.get(thread, thread)}:", *(line.rstrip("\n") for line in traceback.format_list(stack))]
        os.write(2, ("\n".join(lines) + "\n").encode())
        time.sleep(LAST_WORDS_SECONDS)                   # a lost peer would take the others' turn to speak
        os._exit(WAITS if waits else HANGS)
