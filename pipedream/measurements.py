"""Prints the tables of TEST_RESULTS.md and COMPARISON.md that come from records: equality, timelines, the peer, convergence, plans.

    python pipedream/measurements.py table=timeline label=cpu2

`python -m yardstick.results refresh` puts what this prints into the documents.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipedream.tables import table
from yardstick import results
from yardstick.settings import Choice, SettingsError, override, usage

CONFIG = {
    "table": Choice("equality", "simulator", "planner", "timeline", "peer", "convergence", "torch", "published", "profiles"),
    "label": "cpu2",                      # the records are those of results/LABEL/pipedream
}


def source(record):
    """Where a record comes from, one line."""
    machine, versions = record["machine"], record["versions"]
    dirty = ", with changes not committed" if record.get("dirty") else ""
    ranks = f"RANKS={machine['ranks']} " if machine["accelerator"] == "none" and machine["ranks"] > 1 else ""
    return (f"`{ranks}{record['command']}`, {record['date'][:10]}, commit {record.get('commit', 'unknown')[:10]}{dirty}; {machine['processor']}, "
            f"{machine['cpus']} processors, accelerator {machine['accelerator']}; torch {versions['torch']}.")


def several(name, label):
    """{ranks: record} of those that there are."""
    return {int(record["run"].rpartition("_")[2]): record for record in results.read_all(label, "pipedream")
            if record["run"].startswith(f"pipedream/{name}_")}


def equality(label):
    records = several("benchmark_equality", label)
    rows = {}
    for ranks, record in records.items():
        for mode, replicas, weights, losses, versions in record["details"]["rows"]:
            rows.setdefault((mode, replicas), {})[ranks] = weights, losses, versions
    head = ["mode", *(f"{ranks} ranks: {word}" for ranks in records for word in ("weights", "losses"))]
    body = [[mode + (f", replicas {replicas}" if replicas else ""), *(("0" if value == 0 else f"{value:.1e}") if ranks in found else "-"
             for ranks in records for value in found.get(ranks, (0, 0))[:2])] for (mode, replicas), found in rows.items()]
    return "\n\n".join([*("- " + source(record) for record in records.values()), table(head, body)]).replace(".\n\n- ", ".\n- ")


def simulator(label):
    record = results.read("pipedream/benchmark_simulator", label)
    rows = [[stages, f"{m:,}", f"{count:,}", f"{seconds:.3f}", f"{seconds / count * 1e6:.2f}"]
            for stages, m, count, seconds in record["details"]["rows"]]
    return (f"{source(record)}\n\n{table(['ranks', 'micro-batches', 'operations', 'seconds', 'microseconds each'], rows, 0)}\n\n"
            f"Seconds grow as operations to the power of {record['measured']['growth_ratio']:.2f}; the aim for the last row is 10 s.")


def planner(label):
    record = results.read("pipedream/benchmark_planner", label)
    rows = [["ResNet-50 on 16 machines", f"{record['measured']['resnet50_seconds']:.2f}", "5"],
            ["chain of 1,500 layers on 4 machines", f"{record['measured']['chain_seconds']:.2f}", "30"]]
    return f"{source(record)}\n\n{table(['plan', 'seconds', 'aim'], rows)}"


def timeline(label):
    rows, sources = [], []
    for ranks, record in several("benchmark_timeline", label).items():
        sources.append("- " + source(record))
        for mode, found in record["details"].items():
            mean = statistics.mean(found["ratios"])
            rows.append([ranks, mode, len(found["ratios"]), f"{mean:.3f}", f"{mean - found['interval']:.3f} to {mean + found['interval']:.3f}",
                         f"{min(found['ratios']):.3f} to {max(found['ratios']):.3f}", "met" if abs(mean - 1) <= 0.1 else "missed"])
    head = ["ranks", "mode", "runs", "measured / simulated", "95 % interval of the mean", "least to most", "aim 0.9 to 1.1"]
    return "\n".join(sources) + "\n\n" + table(head, rows)


def peer(label):
    record = results.read("pipedream/benchmark_peer", label)
    measured, pairs = record["measured"], record["details"]["pairs"]
    mean, half = measured["ratio_mean"], measured["interval_ratio"]
    rows = [[record["machine"]["ranks"], len(pairs), f"{1e3 * measured['ours_seconds_median']:.1f}", f"{1e3 * measured['torch_seconds_median']:.1f}",
             f"{statistics.median(a / b for a, b in pairs):.3f}", f"{mean:.3f}", f"{mean - half:.3f} to {mean + half:.3f}",
             "met" if mean + half <= 1 else "missed" if mean - half > 1 else "open: the interval holds 1"]]
    head = ["ranks", "pairs", "ours, ms (median)", "torch, ms (median)", "ratio, median", "ratio, mean", "95 % interval", "aim: at most 1"]
    return f"{source(record)}\n\n{table(head, rows, 0)}"


def convergence(label):
    record = results.read("pipedream/benchmark_convergence", label)
    rates = list(dict.fromkeys(name.split()[1] for name in record["details"]))
    rows = []
    for mode in dict.fromkeys(name.split()[0] for name in record["details"]):
        found = [record["measured"].get(f"{mode}_{rate}_nats".replace(".", "_")) for rate in rates]
        rows.append([mode, *("diverged" if value is None else f"{value:.4f}" for value in found)])
    count = record["settings"]["steps"] * record["settings"]["micro_batches"]
    return (f"{source(record)} {record['machine']['ranks']} stages, {count:,} micro-batches; mean loss in nats of the last tenth.\n\n"
            + table(["mode", *(f"learning rate {rate}" for rate in rates)], rows))


def torch(label):
    record = results.read("pipedream/torch_peer", label)
    measured, settings = record["measured"], record["settings"]
    return (f"{source(record)} torch's runtime ran our table of `{settings['schedule']}`, {measured['operations_count']} operations on "
            f"{record['machine']['ranks']} ranks; its gradients differ from one process by {measured['gradients_apart_ratio_max']:.1e} at most, in "
            "float64.")


def published(label):
    record = results.read("pipedream/benchmark_published", label)
    cases = {}
    for name, machines, bandwidths, paper, model, ratio, replicas, time, parallel in record["details"]["rows"]:
        key = (name, "x".join(map(str, machines)), ", ".join(f"{bandwidth / 1e9:g}" for bandwidth in bandwidths), paper or "-")
        cases.setdefault(key, []).append(f"{replicas} ({parallel / time:.2f})")
    head = ["profile", "machines", "GB/s", "paper", "released", "released, transfers charged", "paper's text", "corrected"]
    return f"{source(record)}\n\n" + table(head, [[*key, *found] for key, found in cases.items()], 8)


def profiles(label):
    rows, sources = [], []
    for record in results.read_all(label, "pipedream"):
        if record["run"].startswith("pipedream/profile_"):
            measured = record["measured"]
            sources.append("- " + source(record))
            rows.append([f"`pipedream/profiles/{record['settings']['network']}.txt`", record["settings"]["batch"], measured["layers_count"],
                         f"{1e3 * measured['forward_seconds']:,.0f}", f"{1e3 * measured['backward_seconds']:,.0f}",
                         f"{measured['parameter_bytes'] / 1e6:.1f}", f"{measured['activation_bytes'] / 1e6:.1f}"])
    return "\n".join(sources) + "\n\n" + table(["profile", "batch", "nodes", "forward, ms", "backward, ms", "weights, MB", "activations, MB"], rows)


TABLES = {function.__name__: function for function in (equality, simulator, planner, timeline, peer, convergence, torch, published, profiles)}


def main():
    if text := usage(sys.argv[1:], __file__):
        print(text)
        return
    settings = override(CONFIG, sys.argv[1:], "pipedream/measurements.py")
    results.check_label(settings["label"])
    print(TABLES[settings["table"]](settings["label"]))


if __name__ == "__main__":
    try:
        main()
    except (SettingsError, ValueError, OSError) as error:
        sys.exit(f"pipedream/measurements.py: {error}")
