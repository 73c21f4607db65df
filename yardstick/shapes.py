"""The shapes of models, the layouts of ranks, and the recipes of bytes per parameter that formulas take."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer, as far as parameters, FLOPs and bytes depend on it.

    gated=False is GPT-2 (learned positions, biases, layer norms, two MLP matrices); gated=True is Llama
    (no biases, RMSNorm, three MLP matrices). ffn None: 4 * hidden. kv_heads None: heads. `tied`: the output
    layer is the embedding. experts > 0 replaces every MLP by that many, top_k of them active.
    """

    layers: int
    hidden: int
    heads: int
    vocab: int
    seq: int
    kv_heads: int | None = None
    ffn: int | None = None
    gated: bool = False
    tied: bool = True
    experts: int = 0
    top_k: int = 0

    def __post_init__(self):
        for name in ("layers", "hidden", "heads", "vocab", "seq"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} of a ModelShape must be at least 1.")
        if self.hidden % self.heads:
            raise ValueError(f"heads={self.heads} does not divide hidden={self.hidden}.")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}.")
        if self.experts and not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k} must lie between 1 and experts={self.experts}.")

    @property
    def ffn_width(self):
        return self.ffn or 4 * self.hidden

    @property
    def kv_hidden(self):
        """Width of the keys (and of the values): hidden unless heads share them."""
        return self.hidden // self.heads * (self.kv_heads or self.heads)


MODELS = {
    # hidden 512 and more: under ZeRO-3 on two ranks a share of its matrices still is 1 MiB in bf16, the
    # least that DeepSpeed moves to NVMe
    "tiny": ModelShape(layers=4, hidden=512, heads=8, vocab=4096, seq=256),
    # Radford et al. 2019, table 2, with the layer counts and widths of the released weights
    "gpt2": ModelShape(layers=12, hidden=768, heads=12, vocab=50257, seq=1024),
    "gpt2-medium": ModelShape(layers=24, hidden=1024, heads=16, vocab=50257, seq=1024),
    "gpt2-large": ModelShape(layers=36, hidden=1280, heads=20, vocab=50257, seq=1024),
    "gpt2-xl": ModelShape(layers=48, hidden=1600, heads=25, vocab=50257, seq=1024),
}


@dataclass(frozen=True)
class Layout:
    """How many ranks stand on each axis, and how one rank works through its batch.

    The world is dp * cp * tp * pp; ep divides dp * cp, a second factorisation of the same ranks. `zero` is
    the ZeRO stage over the data-parallel ranks, `micro_batch` the sequences of one forward on one rank.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    cp: int = 1
    zero: int = 0
    micro_batch: int = 1
    accumulation: int = 1
    chunks: int = 1

    def __post_init__(self):
        for name in ("dp", "tp", "pp", "ep", "cp", "micro_batch", "accumulation", "chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} of a Layout must be at least 1.")
        if (self.dp * self.cp) % self.ep:
            raise ValueError(f"ep={self.ep} does not divide dp * cp = {self.dp * self.cp}.")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"zero={self.zero} is no ZeRO stage; use 0, 1, 2 or 3.")

    @property
    def world(self):
        return self.dp * self.cp * self.tp * self.pp


@dataclass(frozen=True)
class Recipe:
    """Bytes per parameter: the weights that compute, their gradients, and what the optimizer keeps."""

    name: str
    parameter: int
    gradient: int
    master: int        # a copy in higher precision that the optimizer updates
    states: int        # Adam: two moments of 4 bytes

    @property
    def optimizer(self):
        """K of the ZeRO paper: all that the optimizer keeps, 12 in mixed precision with Adam."""
        return self.master + self.states

    @property
    def total(self):
        return self.parameter + self.gradient + self.optimizer


PAPER = Recipe("mixed precision, ZeRO paper", parameter=2, gradient=2, master=4, states=8)   # arXiv 1910.02054, 3.1
MIXED = Recipe("bf16 or fp16", parameter=2, gradient=2, master=4, states=8)
FP32 = Recipe("fp32", parameter=4, gradient=4, master=0, states=8)   # the weights are their own master copy
