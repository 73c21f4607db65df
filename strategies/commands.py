"""The commands that repeat a run, or continue it, as a user types them."""

import os
import shlex
import sys

from strategies import checkpoints, effective
from yardstick import ranks


def repeat(settings, world):
    """The command that repeats this run, with no path of this machine: run.sh and what differs from its defaults."""
    personal = ("--", "strategy=", "output=", "nvme_path=", "resume=", "trust=", "export=")
    words = [a for a in sys.argv[1:] if "=" in a and not a.startswith(personal)]
    given = os.environ.get("RANKS") or ranks.is_rank()       # a launcher chose their number in its own words
    ranks_given = f"RANKS={world} " if given else ""
    return ranks_given + shlex.join(["bash", f"strategies/{effective.FOLDERS[settings['strategy']]}/run.sh", *words])


def resume(plan):
    """What continues a stopped run, as a user types it."""
    world = f"RANKS={plan.world} " if os.environ.get("RANKS") else ""
    where = [f"output={plan.settings['output']}"] if plan.settings["output"] else []
    return world + shlex.join(["bash", f"strategies/{effective.FOLDERS[plan.settings['strategy']]}/run.sh", "resume=auto", *where])


def what_is_left(plan):
    """Say, after a run that failed, from where it can go on."""
    done = checkpoints.steps_in(plan.folder / "checkpoints")
    if done:
        print(f"the newest checkpoint is {checkpoints.shown(done[-1])}; continue with: {resume(plan)}", file=sys.stderr, flush=True)
