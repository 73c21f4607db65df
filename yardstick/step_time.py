"""What is estimated: the seconds of a training step, from FLOPs, bytes and links, each constant with its source.

Every number here is an estimate. Arithmetic is FLOPs over peak times efficiency; a collective is latency plus bytes
over bandwidth (the alpha-beta model) of a ring, which runs at the speed of its slowest link; whatever passes memory,
PCIe or a disk is bytes over bandwidth. Parts add up, except communication that the strategy runs beside arithmetic: of
that counts what arithmetic does not cover. Left out: kernels' launch times, data loading, stragglers, contention.
"""

from dataclasses import dataclass

from yardstick import hardware
from yardstick.formulas import ring_bytes

# Share of the peak that large language models reach in training: published are 0.44 to 0.52 for 1.7 B to 1 T
# parameters on A100s (Narayanan et al., arXiv 2104.04473, table 1) and 0.46 for PaLM 540B (Chowdhery et al., arXiv
# 2204.02311, table 3), both tuned by their makers. A plain transformers model without fused kernels reaches less.
EFFICIENCY = 0.4
ADAM_BYTES = 28         # per parameter: reads gradient, master, two moments; writes the last three, all fp32


@dataclass(frozen=True)
class Machine:
    """Devices and what connects them; bytes/s each way, seconds a hop.

    node_link: what one node sends to the next through all its adapters together. host_adam: seconds per parameter of an
    optimizer on the host, the whole node's processors working on it. nvme: one node's drives together.
    """

    devices: int
    per_node: int
    peak: float
    efficiency: float = EFFICIENCY
    memory: float = 1e12
    link: float = hardware.DEVICES["A100"][2]
    node_link: float = hardware.ETHERNET
    pcie: float = hardware.DEVICES["A100"][3]
    nvme: float = hardware.NVME_BYTES_PER_SECOND
    hop: float = hardware.HOP_SECONDS["nvlink"]
    node_hop: float = hardware.HOP_SECONDS["network"]
    host_adam: float = hardware.HOST_ADAM_SECONDS["torch"]

    @property
    def nodes(self):
        return -(-self.devices // self.per_node)


def collective_seconds(kind, payload, machine, ranks=None, calls=1):
    """Seconds of `calls` ring collectives of `payload` bytes together, over `ranks` (default: all devices).

    One ring through all ranks, node by node: every link carries the same bytes, so the slowest sets the pace; of the hops of
    one round as many cross to another node as there are nodes.

    >>> from dataclasses import replace
    >>> pair = Machine(devices=2, per_node=2, peak=1e12, link=1e9, hop=0.0)
    >>> collective_seconds("all_reduce", 1e9, pair), collective_seconds("all_gather", 1e9, pair)
    (1.0, 0.5)
    >>> collective_seconds("all_reduce", 1e9, replace(pair, per_node=1, node_link=1e8, node_hop=0.0))
    10.0
    """
    ranks = ranks or machine.devices
    if ranks == 1:
        return 0.0
    nodes = -(-ranks // machine.per_node)
    speed = min(machine.link if machine.per_node > 1 else machine.node_link, machine.node_link if nodes > 1 else machine.link)
    across = nodes if nodes > 1 else 0
    hops = (across * machine.node_hop + (ranks - across) * machine.hop) * (ranks - 1) / ranks
    return ring_bytes(kind, payload, ranks) / speed + calls * hops * (2 if kind == "all_reduce" else 1)


def step_seconds(machine, *, flops, collectives=(), adam_device=0, adam_host=0, pcie_bytes=0, nvme_bytes=0, overlap=False):
    """{"compute", "communication", "hidden", "optimizer", "pcie", "nvme", "total"}: seconds of one step, estimated.

    flops: of the step, over all devices. collectives: of deepspeed_traffic or alike (kind, phase, calls, payload_bytes);
    where calls is None one is taken. adam_device: parameters that a device updates; adam_host: those that a node's
    processors update. pcie_bytes: to and from the host, of one device; nvme_bytes: to and from the files, of one node.
    overlap: collectives of forward and backward run beside arithmetic; "hidden" is what that saves, and
    "communication" is the whole.

    >>> machine = Machine(devices=1, per_node=1, peak=1e12, efficiency=0.5)
    >>> step_seconds(machine, flops=1e12, pcie_bytes=machine.pcie)["total"]
    3.0
    """
    parts = {"compute": flops / machine.devices / (machine.peak * machine.efficiency)}
    seconds = {"step": 0.0, "beside": 0.0}
    for row in collectives:
        where = "step" if row.phase == "step" else "beside"
        seconds[where] += collective_seconds(row.kind, row.payload_bytes, machine, calls=row.calls or 1)
    parts["communication"] = seconds["step"] + seconds["beside"]
    parts["hidden"] = min(parts["compute"], seconds["beside"]) if overlap else 0.0
    parts["optimizer"] = adam_device * ADAM_BYTES / machine.memory + adam_host * machine.host_adam
    parts["pcie"] = pcie_bytes / machine.pcie
    parts["nvme"] = nvme_bytes / machine.nvme
    parts["total"] = sum(parts.values()) - 2 * parts["hidden"]
    return parts
