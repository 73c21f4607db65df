"""Starts ranks once and runs several pipelines on them: python tests/pipedream/pipelines.py RANKS FILE, settings and results as JSON."""

import json
import os
import sys
from pathlib import Path

from pipedream import pipedream_simple
from yardstick import program, ranks
from yardstick.settings import defaults

TINY = {"layers": 8, "hidden": 16, "heads": 2, "seq": 8, "micro_batch": 1, "steps": 2, "dtype": "float64"}


def main(world, path):
    path = Path(path)
    wanted = json.loads(path.read_text())
    found = []

    def rank_of():
        for number, given in enumerate(wanted):
            settings = {**defaults(pipedream_simple.CONFIG), **TINY, **given}
            run = program.Run("pipedream/pipedream_simple", settings, world, False, path.parent / str(number))
            pipedream_simple.check(run)
            rank = run.join(60, deepspeed=False) if not number else rank            # noqa: F821  one group for all of them
            ended = pipedream_simple.pipeline(run, rank)
            found.append(ended and ended["measured"])
        if rank.rank == 0:
            path.write_text(json.dumps(found))
    os.environ["OMP_NUM_THREADS"] = "1"
    return ranks.start(rank_of, world)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2]))
