"""What accelerators can do on paper: peak arithmetic, memory, links; each number with its source."""

import re

# Dense FLOP/s of matrix products with fp32 accumulation, without sparsity, from NVIDIA's data sheets of each card:
# "16" for bf16 and fp16, "32" for fp32 outside the tensor cores.
PEAK_FLOPS = {
    "B200": {"16": 2250e12, "32": 75e12},           # NVIDIA HGX B200 data sheet, per GPU
    "H200": {"16": 989.4e12, "32": 66.9e12},        # NVIDIA H200 data sheet (with sparsity: twice)
    "H100 PCIe": {"16": 756e12, "32": 51.2e12},     # NVIDIA H100 data sheet, PCIe column
    "H100": {"16": 989.4e12, "32": 66.9e12},        # the same, SXM column
    "A100": {"16": 312e12, "32": 19.5e12},          # NVIDIA A100 data sheet
    "L40S": {"16": 362e12, "32": 91.6e12},          # NVIDIA L40S data sheet
    "L4": {"16": 121e12, "32": 30.3e12},            # NVIDIA L4 data sheet
    "A10": {"16": 125e12, "32": 31.2e12},           # NVIDIA A10 data sheet
    "V100": {"16": 125e12, "32": 15.7e12},          # NVIDIA V100 data sheet, SXM2; fp16 alone
    "T4": {"16": 65e12, "32": 8.1e12},              # NVIDIA T4 data sheet; fp16 alone
    "RTX 4090": {"16": 165.2e12, "32": 82.6e12},    # NVIDIA Ada architecture white paper, table 2
    "RTX 3090": {"16": 71e12, "32": 35.6e12},       # NVIDIA GA102 white paper, table 3
}

# Bytes of memory, bytes/s of that memory, bytes/s to the next device and to the host, each way: the same data sheets. Where a
# card comes in two sizes, the larger. Sheets give links in both directions together; here is half. A card without
# NVLink reaches the next one over PCIe. PCIe x16: 3.0 15.75, 4.0 31.5, 5.0 63 GB/s each way (PCI-SIG, encoding included).
_PCIE3, _PCIE4, _PCIE5 = 15.75e9, 31.5e9, 63e9
DEVICES = {
    "B200": (180e9, 7.7e12, 900e9, _PCIE5),         # NVLink 5, 1.8 TB/s both ways; HGX
    "H200": (141e9, 4.8e12, 450e9, _PCIE5),         # NVLink 4, 900 GB/s both ways
    "H100 PCIe": (80e9, 2.0e12, _PCIE5, _PCIE5),
    "H100": (80e9, 3.35e12, 450e9, _PCIE5),         # NVLink 4
    "A100": (80e9, 2.039e12, 300e9, _PCIE4),        # NVLink 3, 600 GB/s both ways; SXM
    "L40S": (48e9, 0.864e12, _PCIE4, _PCIE4),
    "L4": (24e9, 0.3e12, _PCIE4, _PCIE4),
    "A10": (24e9, 0.6e12, _PCIE4, _PCIE4),
    "V100": (32e9, 0.9e12, 150e9, _PCIE3),          # NVLink 2, 300 GB/s both ways; SXM2
    "T4": (16e9, 0.32e12, _PCIE3, _PCIE3),
    "RTX 4090": (24e9, 1.008e12, _PCIE4, _PCIE4),   # no NVLink
    "RTX 3090": (24e9, 0.936e12, _PCIE4, _PCIE4),   # without the NVLink bridge
}
NO_BF16 = ("V100", "T4")                            # before Ampere: fp16 alone

# Links between nodes, bytes/s each way that one node's adapters carry together.
NODE_LINKS = {"B200": 400e9, "H200": 400e9, "H100": 400e9,       # 8 adapters of 400 Gbit/s: NVIDIA DGX H100, B200 data sheets
              "A100": 200e9,                                      # 8 of 200 Gbit/s: DGX A100 data sheet
              "V100": 50e9}                                       # 4 of 100 Gbit/s: DGX-1 data sheet
ETHERNET = 1.25e9                                                 # 10 Gbit/s, for all others
NVME_BYTES_PER_SECOND = 3.2e9        # one PCIe 3.0 x4 drive, writing: Samsung 970 EVO Plus data sheet, 3,300 MB/s, rounded down

# Seconds that a message waits at one hop of a ring: NCCL, src/graph/tuning.cc, hwLat, ring with the Simple protocol.
HOP_SECONDS = {"nvlink": 3.4e-6, "pcie": 5.7e-6, "network": 14.0e-6}

# Seconds of Adam per parameter on a node's two Xeon 8168: ZeRO-Offload, arXiv 2101.06840, table 4, 1 B parameters.
HOST_ADAM_SECONDS = {"torch": 1.39e-9, "deepspeed": 0.22e-9}


def device_named(name):
    """The key of PEAK_FLOPS and DEVICES that a device's name holds, or None."""
    return next((known for known in DEVICES if re.search(rf"(?<!\w){re.escape(known)}(?!\d|S\b)", name)), None)


def peak_flops(name, precision):
    """Peak FLOP/s of a GPU by its name, or None for one that the table lacks.

    >>> peak_flops("NVIDIA H100 80GB HBM3", "bf16"), peak_flops("NVIDIA A100-SXM4-40GB", "fp32")
    (989400000000000.0, 19500000000000.0)
    >>> peak_flops("NVIDIA L40S", "fp16"), peak_flops("unknown", "bf16")
    (362000000000000.0, None)
    """
    known = device_named(name)
    return PEAK_FLOPS[known]["32" if precision == "fp32" else "16"] if known else None
