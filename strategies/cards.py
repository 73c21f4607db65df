"""Prints the generated blocks of the strategies' cards: what a run printed and measured, numbers of the exercises.

    python strategies/cards.py table=measured strategy=zero3 label=cpu2

`python -m yardstick.results refresh` puts what this prints into the README.md files of this folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from strategies.effective import FOLDERS
from yardstick import documents, formulas, results, shapes
from yardstick.deepspeed_memory import element_bytes, memory, of_shape
from yardstick.deepspeed_traffic import traffic
from yardstick.settings import Choice, override

CONFIG = {
    "table": Choice("measured", "report", "exercises", "losses", "comparison"),
                                          # measured: a record beside its predictions; report: its run's report;
                                          # exercises: the formulas' numbers; losses, comparison: of all strategies
    "strategy": Choice("zero2", "dp", "zero1", "zero3", "offload", "infinity"),   # whose card
    "label": "cpu2",                      # the records are those of results/LABEL
}
MB = 10**6
# Lines of the report that no card repeats: sample text, this machine's times, rows that table=measured has
LEFT_OUT = ("sample", "activations", "communication", "Time", "weights  ", "gradients  ", "fp32 master  ",
            "Adam's moments", "buffers  ")
ROWS = {                                  # number of a record, in bytes: row of the card
    "parameter": "weights", "gradient": "gradients", "master": "fp32 master", "optimizer": "Adam's moments",
    "buffer": "buffers", "device": "all on the device", "host": "all on the host", "nvme": "all in files",
    "rest_device": "between steps: on the device", "rest_host": "between steps: on the host",
    "rest_nvme": "between steps: in files", "payload": "in a step: full tensors of its collectives",
    "ring": "in a step: sent by a rank", "activation": "in a forward: activations saved (predicted: an estimate)"}


class Case:
    """What the formulas say of one line of the exercises: the tiny model, a record's config with changes."""

    def __init__(self, config, ranks=2, accumulation=1, bf16=False, **zero):
        config = {**config, "zero_optimization": {**config.get("zero_optimization", {}), **zero},
                  **({"bf16": {"enabled": True}} if bf16 else {})}
        tensors, self.ranks = of_shape(shapes.MODELS["tiny"]), ranks
        self.items = memory(tensors, config, ranks=ranks, accumulation=accumulation)          # of rank 0
        self.sends = traffic(tensors, config, ranks=ranks, accumulation=accumulation)
        self.ring = sum(formulas.ring_bytes(row.kind, row.payload_bytes, ranks) for row in self.sends)
        self.P = formulas.ring_bytes("all_gather", element_bytes(config) * tensors.count, ranks)

    def held(self, words="", kind="", place=""):
        """MB of the items with `words` in their name, of one kind, in one place; "": of any."""
        return sum(item.nbytes for item in self.items
                   if words in item.name and kind in ("", item.kind) and place in ("", item.place)) / MB


FIRST = {"held by rank 0, MB": Case.held}
LAST = {"sent, MB": lambda c: c.ring / MB, "sent, P": lambda c: c.ring / c.P}
COLUMNS = {                               # of the exercises' table, between FIRST and LAST
    "dp": {},
    "zero1": {"copy and moments, MB": lambda c: c.held(kind="master") + c.held(kind="optimizer"),
              "all-reduces of gradients": lambda c: sum(row.calls for row in c.sends if row.phase == "backward")},
    "zero2": {"share of gradients, MB": lambda c: c.held("averaged"),
              "straddling, MB": lambda c: c.held("straddle")},
    "zero3": {"persistent, MB": lambda c: c.held("persistent"), "bucket, MB": lambda c: c.held("bucket")},
    "offload": {"on device, MB": lambda c: c.held(place="device"), "on host, MB": lambda c: c.held(place="host"),
                "on host, times ranks, MB": lambda c: c.ranks * c.held(place="host"),
                "accumulated, MB": lambda c: c.held("accumulated")},
    "infinity": {"weights in files, MB": lambda c: c.held(kind="parameter", place="nvme"),
                 "optimizer's swap buffers, MB": lambda c: c.held("swap buffers of the optimizer"),
                 "on host, MB": lambda c: c.held(place="host")},
}
EXERCISES = {                             # number of the exercise and what it changes: the arguments of Case
    "dp": {"1: four ranks": {"ranks": 4}, "2: four micro-steps": {"accumulation": 4}, "3: bf16": {"bf16": True}},
    "zero1": {"1: four ranks": {"ranks": 4}, "2: two micro-steps": {"accumulation": 2},
              "3: smaller buckets": {"reduce_bucket_size": 2_500_000}},
    "zero2": {"1: four micro-steps": {"accumulation": 4}, "2: four ranks": {"ranks": 4}},
    "zero3": {"1: nothing stays": {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0},
              "2: two micro-steps": {"accumulation": 2},
              "3: threshold": {"stage3_param_persistence_threshold": 100_000},
              "4: larger bucket": {"reduce_bucket_size": 50_000_000}},
    "offload": {"1: two micro-steps": {"accumulation": 2}, "2: bf16": {"bf16": True},
                "3: four ranks": {"ranks": 4}},
    "infinity": {"1: four ranks": {"ranks": 4}, "2: one sub-group": {"sub_group_size": 20_000_000}},
}


def block(table, strategy, label):
    """The text of one block."""
    if table == "losses":
        return losses(label)
    if table == "comparison":
        first = results.read("strategies/compare/dp_fp32", label)
        return f"These records: {origin(first)}. A CPU's milliseconds say nothing about a GPU's."
    record = results.read(f"strategies/{FOLDERS[strategy]}", label)
    if table == "exercises":
        return exercises(strategy, record["details"]["config"])
    if table == "measured":
        return measured(record)
    lines = record["details"]["report"]
    return documents.code("\n".join(line for line in lines if not line.lstrip().startswith(LEFT_OUT)))


def origin(record):
    """Command, date, commit, machine and versions of a record."""
    machine, versions = record["machine"], record["versions"]
    return (f"`{record['command']}`, {record['date'][:10]}, commit {record['commit'][:10]}"
            f"{' and changes' if record.get('dirty') else ''}; {machine['processor']}, {machine['cpus']} "
            f"processors, GPU: {machine['accelerator']}; DeepSpeed {versions['deepspeed']}, torch "
            f"{versions['torch']}")


def measured(record):
    got, predicted, loss = record["measured"], record["predicted"] | record["estimated"], record["details"]["loss"]
    rows = [(name, *(f"{numbers[f'{key}_bytes'] / MB:,.2f}" for numbers in (got, predicted)))
            for key, name in ROWS.items() if f"{key}_bytes" in got.keys() & predicted.keys()]
    where = "CPU, which says nothing about a GPU" if record["machine"]["accelerator"] == "none" else "machine"
    return (f"{origin(record)}; {record['machine']['ranks']} ranks, {record['settings']['precision']}.\n\n"
            f"{grid(('after backward, largest over ranks, MB', 'measured', 'predicted'), rows)}\n\n"
            f"Loss {loss[0]:.4f} at the first and {got['loss_nats']:.4f} at the last of {len(loss)} steps, "
            f"{got['evaluation_loss_nats']:.4f} nats per token on held-out text. A step takes "
            f"{1e3 * got['step_seconds_median']:,.0f} ms in the median on this {where}.")


def exercises(strategy, config):
    columns, rows = FIRST | COLUMNS[strategy] | LAST, []
    for name, changes in {"as above": {}, **EXERCISES[strategy]}.items():
        case = Case(config, **changes)
        numbers = [column(case) for column in columns.values()]
        rows.append((name, *(f"{n:,}" if isinstance(n, int) else f"{n:,.2f}" for n in numbers)))
    return grid(("", *columns), rows)


def losses(label):
    names = ("dp", "zero1", "zero2", "zero3")
    curves = [results.read(f"strategies/compare/{name}_bf16", label)["details"]["loss"] for name in names]
    return grid(("loss, bf16", "step 1", "step 2", "step 3", "step 4"),
                [(name, *(f"{loss:.6f}" for loss in curve[:4])) for name, curve in zip(names, curves)])


def grid(heading, rows):
    """A table of Markdown: words in the first column, numbers in the others."""
    first, *others = (f"| {' | '.join(row)} |" for row in (heading, *rows))
    return "\n".join([first, "|---|" + "---:|" * (len(heading) - 1), *others])


if __name__ == "__main__":
    try:
        print(block(**override(CONFIG, sys.argv[1:], where="strategies/cards.py")))
    except (OSError, ValueError) as error:
        sys.exit(f"cards.py: {error}")
