"""Which version of the weights each forward and backward uses, and how many versions a rank must keep.

A version is the number of updates that the weights have had. What the simulator draws, pipedream_simple.py does on real ranks.
"""

from collections import Counter

SEMANTICS = ("flush", "stash", "naive", "vertical_sync", "2bw")


def versions(schedule, semantics=None):
    """Per rank, for each operation, the version of the weights it uses.

    semantics: "flush": one version for all of a step. "stash" (SOSP'19, section 3.3): a forward takes the newest, its backward the
    same. "naive": each takes the newest. "vertical_sync": every stage takes what the first took. "2bw" (arXiv 2006.09503): that of
    the last update but one. None: the schedule's own. A stage of n replicas updates once for n micro-batches.
    """
    semantics = semantics or {"pipedream": "stash", "pipedream_2bw": "2bw"}.get(schedule.name, "flush")
    if semantics not in SEMANTICS:
        raise ValueError(f"semantics={semantics!r} is none of {', '.join(SEMANTICS)}.")
    if semantics in ("flush", "2bw"):
        delay = semantics == "2bw"
        return [[max(0, op.micro_batch // schedule.per_update - delay) for op in ops] for ops in schedule]
    found, first = [], {}                              # first: what stage 0, whose ranks come first, took for a micro-batch
    for rank, ops in enumerate(schedule):
        updates, row, taken = 0, [], {}
        for kind, k, _ in ops:
            if kind == "F":
                taken[k] = updates
                if schedule.stage_of[rank][0] == 0:
                    first[k] = updates
            if semantics == "vertical_sync":           # the first stage's micro-batches, in updates of this one
                row.append(first[k] * schedule.replicas[0] // schedule.replicas[schedule.stage_of[rank][0]])
            else:
                row.append(taken[k] if semantics == "stash" else updates)
            updates += kind == "B"
        found.append(row)
    return found


def held_versions(schedule, semantics=None):
    """Per rank, the most versions of the weights there must be at once: the newest, and those that a backward still needs."""
    semantics = semantics or {"pipedream": "stash", "pipedream_2bw": "2bw"}.get(schedule.name, "flush")
    if semantics in ("flush", "naive"):
        return [1] * len(schedule)
    most = []
    for rank, (ops, used) in enumerate(zip(schedule, versions(schedule, semantics))):
        waits, peak, updates, ended = Counter(), 1, 0, 0
        for op, version in zip(ops, used):
            if op.kind == "F":
                waits[version] += 1
                oldest = version if semantics == "vertical_sync" else min(waits)      # later forwards start from it, too
                peak = max(peak, updates - oldest + 1 if semantics != "stash" else len({*waits, updates}))
            else:
                waits[version] -= 1
                if not waits[version]:
                    del waits[version]
                ended += 1
                updates = ended if semantics != "2bw" else (op.micro_batch + 1) // schedule.per_update
        most.append(peak)
    return most
