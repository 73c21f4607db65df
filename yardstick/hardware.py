"""What accelerators can do on paper: peak arithmetic, each number with its source."""

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


def peak_flops(name, precision):
    """Peak FLOP/s of a GPU by its name, or None for one that the table lacks.

    >>> peak_flops("NVIDIA H100 80GB HBM3", "bf16"), peak_flops("NVIDIA A100-SXM4-40GB", "fp32")
    (989400000000000.0, 19500000000000.0)
    >>> peak_flops("NVIDIA L40S", "fp16"), peak_flops("unknown", "bf16")
    (362000000000000.0, None)
    """
    for known, peaks in PEAK_FLOPS.items():
        if re.search(rf"(?<!\w){re.escape(known)}(?!\d|S\b)", name):
            return peaks["32" if precision == "fp32" else "16"]
    return None
