"""The words of `yardstick.plan`: a table of the strategies, why each lost, one strategy in full, and the choice."""

import textwrap

from yardstick import deepspeed_peak, formulas

RESERVE = ("what the prediction leaves out: the CUDA context, NCCL's buffers, workspaces of kernels and fragmentation on a "
           "device; Python, its libraries and the data on the host")
PLACES = {"device": "memory of a device", "host": "host memory of a node", "nvme": "NVMe of a node"}
# what a moment of a step needs beyond rest, in the columns of the table
ACTIVATIONS = ("activations", "logits", "logits' gradients", "gradients of activations")
GATHERED = ("gathered weights", "last flat gather")
GRADIENTS = ("gradients", "own gradients", "averaged gradients", "gradients not yet reduced", "gradient larger than the bucket")
PARTS = {"compute": "arithmetic", "communication": "sent", "optimizer": "Adam", "pcie": "PCIe", "nvme": "files"}


def gb(nbytes, digits=1):
    return f"{nbytes / 1e9:,.{digits}f}"


def peak_of(job, option):
    """The moment in which a device holds most; on a CPU device and host are one."""
    return deepspeed_peak.largest(option.moments, "device" if job.gpu else None)


def columns(job, option):
    """{column: bytes} of one device at its peak, from weights to what is only passing; they sum up to it."""
    moment, sums = peak_of(job, option), dict.fromkeys(
        ("weights", "gradients", "Adam", "buffers", "gathered", "activations", "passing"), 0)
    places = ("device",) if job.gpu else ("device", "host")
    kinds = {"parameter": "weights", "gradient": "gradients", "master": "Adam", "optimizer": "Adam", "buffer": "buffers"}
    for item in option.items if moment.rest else ():
        if item.place in places and item.moment == "always":
            sums[kinds[item.kind]] += item.nbytes
    for (name, place), nbytes in moment.parts.items():
        if place in places:
            sums["activations" if name in ACTIVATIONS else "gathered" if name in GATHERED else
                 "gradients" if name in GRADIENTS else "passing"] += nbytes
    sums["passing"] += option.needed["device"] - sum(sums.values())       # ranks differ by their padding
    return sums


def heading(job):
    machine, free = job.machine, 1 - job.settings["reserve"]
    nodes = f"{machine.nodes} nodes of {machine.per_node}" if machine.nodes > 1 else "one node"
    lines = [f"{job.name}: {formulas.param_count(job.shape):,} parameters, {job.precision}, {job.seq} tokens a sequence, "
             f"{job.global_batch} sequences a step"
             + (", activation checkpointing" if job.settings["activation_checkpointing"] else "")
             + ("; infinity in bf16 always" if job.precision != "bf16" else ""),
             f"{machine.devices} x {job.device} with {gb(job.memory['device'])} GB on {nodes}"
             + (f", {gb(job.memory['host'])} GB of host memory a node" if job.gpu else "")
             + (f", {gb(job.memory['nvme'])} GB of NVMe a node" if job.memory["nvme"] else ", no NVMe (nvme=0)"),
             f"Of each {100 * free:.0f} % are planned with; the rest is for {RESERVE}."]
    lines += [f"Note: {note}." for note in job.notes]
    return "\n".join(textwrap.fill(line, 120) for line in lines)


def table(job, options):
    """All strategies, ranked, with memory by item, bytes sent and estimated time; then why each is where it is."""
    names = list(columns(job, options[0]))
    rows = [["strategy", "micro", "peak", "free", "in", *names, "host", "NVMe", "sent", "step s", "tokens/s"]]
    unit, name = (1e9, "GB = 1e9") if max(option.needed["device"] for option in options) >= 1e9 else (1e6, "MB = 1e6")
    cell = lambda nbytes: f"{nbytes / unit:,.1f}"
    for option in options:
        sums, moment = columns(job, option), peak_of(job, option)
        rows.append([option.strategy, str(option.micro_batch), cell(option.needed["device"]),
                     cell(job.memory["device"] * (1 - job.settings["reserve"]) - option.needed["device"]), moment.name,
                     *(cell(sums[column]) for column in names), cell(option.needed["host"]), cell(option.needed["nvme"]),
                     cell(option.ring_bytes), f"{option.seconds['total']:.2f}", f"{option.seconds['tokens_per_second']:,.0f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) if i in (0, 4) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
             for row in rows]
    legend = (f"{name} bytes. micro: sequences of one forward on a device. peak: the most that one device holds, in which moment of a "
              "step, and its items; passing: copies for collectives, Adam's temporaries and the like. host, NVMe: of one node. "
              "sent: by one device in one step. Seconds are an estimate (yardstick/step_time.py).")
    return "\n".join([heading(job), "", *lines, "", textwrap.fill(legend, 120), "", *why(job, options)])


def why(job, options):
    """One line for each strategy: what chose it, what makes it slower than the first, or what does not fit."""
    first, lines = options[0], []
    for option in options:
        if option.short:
            line = "does not fit: " + "; ".join(shortage(job, option, place) for place in option.short)
        elif len(options) == 1:
            line = "fits: " + times(option)
        elif option is first:
            line = "fits, and none that does is faster by more than 5 %: " + times(option)
        else:
            more = {part: _spent(option, part) - _spent(first, part) for part in PARTS}
            worst = max(more, key=more.get)
            slower = option.seconds["total"] / first.seconds["total"]
            line = (f"fits; {slower:.2f} times the step of {first.strategy}, most by {PARTS[worst]} "
                    f"(+{more[worst]:.2f} s): {times(option)}") if slower > 1.0005 else (
                        f"fits, {slower:.2f} times the step of {first.strategy}, which is simpler: {times(option)}")
        lines.append(textwrap.fill(f"{option.strategy:<9} {line}", 120, subsequent_indent=" " * 10))
    return lines


def _spent(option, part):
    return option.seconds[part] - (option.seconds["hidden"] if part == "communication" else 0)


def times(option):
    said = [f"{words} {_spent(option, part):.2f} s" for part, words in PARTS.items() if option.seconds[part]]
    if option.seconds["hidden"]:
        said.append(f"{option.seconds['hidden']:.2f} s of sending beside arithmetic")
    return ", ".join(said)


def shortage(job, option, place):
    """What does not fit on a place, by how much, and the largest items there."""
    have = job.memory[place]
    if place == "nvme" and not have:
        return f"needs {gb(option.needed[place])} GB of NVMe a node, and there is none (nvme=)"
    text = f"{gb(option.short[place])} GB of {PLACES[place]} too little ({gb(option.needed[place])} needed, {gb(have)} there)"
    if place == "nvme":
        return text
    if place == "device":
        sums = columns(job, option)
        moment, factor = peak_of(job, option).name, 1
    else:
        top = deepspeed_peak.largest(option.moments, "host")
        moment, factor = top.name, job.machine.per_node
        sums = {name: nbytes for (name, where), nbytes in top.parts.items() if where == "host"}
        for item in option.items if top.rest else ():
            if item.place == "host" and item.moment == "always":
                sums[item.name] = sums.get(item.name, 0) + item.nbytes
    most = sorted(sums.items(), key=lambda pair: -pair[1])[:2]
    return f"{text}, at {moment}: " + ", ".join(f"{name} {gb(factor * nbytes)}" for name, nbytes in most if nbytes)


def in_full(job, option):
    """One strategy: every item that is kept, every moment of a step, every collective, the seconds by part."""
    lines = [heading(job), "", f"{option.strategy}: micro_batch {option.micro_batch} x accumulation {option.accumulation} x "
             f"{job.machine.devices} devices. Rank 0, MB = 1e6 bytes:", "", "kept (after backward: only then)"]
    for item in sorted(option.items, key=lambda item: (item.place, -item.nbytes)):
        when = " (after backward)" if item.moment == "gradients" else ""
        lines.append(f"  {item.nbytes / 1e6:12,.2f}  {item.place:<7} {item.kind:<10} {item.name}{when}")
    for moment in option.moments:
        total = ", ".join(f"{place} {moment.bytes_on(place) / 1e6:,.2f}" for place in ("device", "host")
                          if moment.bytes_on(place))
        lines += ["", f"{moment.name}: {total}" + (", beyond rest:" if moment.rest else ":")]
        lines += [f"  {nbytes / 1e6:12,.2f}  {place:<7} {name}"
                  for (name, place), nbytes in sorted(moment.parts.items(), key=lambda pair: -pair[1])]
    lines += ["", f"sent by one device in one step: {gb(option.ring_bytes, 3)} GB"]
    lines += [f"  {row.payload_bytes / 1e6:12,.2f}  {row.kind:<15} {row.phase:<9} {row.why}" for row in option.traffic]
    lines += ["", f"estimated: {option.seconds['total']:.3f} s a step, {option.seconds['tokens_per_second']:,.0f} tokens/s", "",
              *why(job, [option])]
    return "\n".join(lines)


def choice(job, option, path, line):
    text = [f"Choice: {option.strategy}. Its config is {path}; from the root of the repository",
            "", "    " + line, ""]
    if job.machine.nodes > 1:
        text += [f"on each of the {job.machine.nodes} nodes, with the first one's name for FIRST_NODE; or once, with a hostfile "
                 "and ssh:", "", "    deepspeed --hostfile hostfile " + line[line.index("real_model_example.py"):], ""]
    return "\n".join(text + ["trains with it (steps=, data= and the other settings of real_model_example.py may follow)."])


def nothing_fits(job, options, remedies):
    """remedies: [(setting as the user would give it, Option that then fits)]."""
    near = options[0]
    lines = [f"No strategy fits. Least is missing with {near.strategy}: "
             + "; ".join(shortage(job, near, place) for place in near.short) + "."]
    lines += [f"With {change} {option.strategy} fits (micro_batch={option.micro_batch}, {option.seconds['total']:.2f} s a step)."
              for change, option in remedies]
    if not remedies:
        lines.append("Nor does any with activation_checkpointing=True, with up to 64 times the devices, or with NVMe; a smaller model or "
                     "sequence would, or more memory.")
    return "\n".join(textwrap.fill(line, 120) for line in lines)
