"""The shapes of models, the layouts of ranks, and the recipes of bytes per parameter that formulas take."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer, as far as parameters, FLOPs and bytes depend on it.

    gated=False is GPT-2 (learned positions, biases, layer norms, two MLP matrices); gated=True is Llama
    (no biases, RMSNorm, three MLP matrices). ffn None: 4 * hidden. kv_heads None: heads. `tied`: the output
    layer is the embedding. experts > 0 replaces every MLP by that many, top_k of them active. qkv_bias, of a gated
    shape: q, k and v have biases (Qwen2).
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
    qkv_bias: bool = False

    def __post_init__(self):
        for name in ("layers", "hidden", "heads", "vocab", "seq", "kv_heads", "ffn"):
            value = getattr(self, name)
            if value is None and name in ("kv_heads", "ffn"):
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value} of a ModelShape must be a whole number, at least 1.")
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


def _llama(layers, hidden, heads, vocab, seq, kv_heads, ffn, tied=False, qkv_bias=False):
    return ModelShape(layers, hidden, heads, vocab, seq, kv_heads, ffn, gated=True, tied=tied, qkv_bias=qkv_bias)


MODELS = {
    # hidden 512 and more: under ZeRO-3 on two ranks a share of its matrices still is 1 MiB in bf16, the
    # least that DeepSpeed moves to NVMe
    "tiny": ModelShape(layers=4, hidden=512, heads=8, vocab=4096, seq=256),
    # Radford et al. 2019, table 2, with the layer counts and widths of the released weights
    "gpt2": ModelShape(layers=12, hidden=768, heads=12, vocab=50257, seq=1024),
    "gpt2-medium": ModelShape(layers=24, hidden=1024, heads=16, vocab=50257, seq=1024),
    "gpt2-large": ModelShape(layers=36, hidden=1280, heads=20, vocab=50257, seq=1024),
    "gpt2-xl": ModelShape(layers=48, hidden=1600, heads=25, vocab=50257, seq=1024),
    # the config.json beside the released weights: layers, hidden, heads, vocab, seq, kv_heads, ffn
    "llama-2-7b": _llama(32, 4096, 32, 32000, 4096, 32, 11008),
    "llama-2-13b": _llama(40, 5120, 40, 32000, 4096, 40, 13824),
    "llama-2-70b": _llama(80, 8192, 64, 32000, 4096, 8, 28672),
    "llama-3.2-1b": _llama(16, 2048, 32, 128256, 131072, 8, 8192, tied=True),
    "llama-3-8b": _llama(32, 4096, 32, 128256, 8192, 8, 14336),
    "llama-3-70b": _llama(80, 8192, 64, 128256, 8192, 8, 28672),
    "mistral-7b": _llama(32, 4096, 32, 32000, 32768, 8, 14336),
    "qwen2.5-7b": _llama(28, 3584, 28, 152064, 131072, 4, 18944, qkv_bias=True),
}


def config_json(shape):
    """The fields of the transformers config.json of a shape; no dropout, so that every strategy computes the same."""
    if shape.experts:
        raise ValueError("a shape with experts has no config.json here.")
    if not shape.gated:
        if shape.kv_heads not in (None, shape.heads):
            raise ValueError(f"kv_heads={shape.kv_heads}: GPT-2 has as many as heads={shape.heads}. Give gated=True for Llama.")
        # token 0 ends a document of the embedded text
        return {"model_type": "gpt2", "n_layer": shape.layers, "n_embd": shape.hidden, "n_head": shape.heads,
                "vocab_size": shape.vocab, "n_positions": shape.seq, "n_inner": shape.ffn, "bos_token_id": 0, "eos_token_id": 0,
                "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False, "tie_word_embeddings": shape.tied}
    return {"model_type": "qwen2" if shape.qkv_bias else "llama", "num_hidden_layers": shape.layers,
            "hidden_size": shape.hidden, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads or shape.heads, "vocab_size": shape.vocab,
            "max_position_embeddings": shape.seq, "intermediate_size": shape.ffn_width, "tie_word_embeddings": shape.tied,
            "bos_token_id": 0, "eos_token_id": 0, "attention_dropout": 0.0, "use_cache": False}


def from_config_json(fields):
    """(ModelShape, [notes]) of the fields of a transformers config.json: gpt2, llama, mistral or qwen2.

    Raises ValueError for another type of model, and for a field that changes weights in a way no ModelShape has. A note
    says what the shape leaves out.
    """
    kind = fields.get("model_type")

    def read(name, default=None):
        value = fields.get(name, default)
        if value is None:
            raise ValueError(f"{name} is missing in the config.json of a {kind} model.")
        return value
    notes = []
    if kind == "gpt2":
        if fields.get("add_cross_attention"):
            raise ValueError("add_cross_attention: weights between an encoder and a decoder are not understood.")
        shape = ModelShape(read("n_layer", 12), read("n_embd", 768), read("n_head", 12), read("vocab_size", 50257),
                           read("n_positions", 1024), ffn=fields.get("n_inner"), tied=fields.get("tie_word_embeddings", True))
        dropout = [fields.get(name, 0.1) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")]
    elif kind in ("llama", "mistral", "qwen2"):
        for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
            if fields.get(name):
                raise ValueError(f"{name}={fields[name]} of a {kind} model is not understood here; only false is.")
        heads, hidden = read("num_attention_heads"), read("hidden_size")
        if (fields.get("head_dim") or hidden // heads) * heads != hidden:
            raise ValueError(f"head_dim={fields['head_dim']} x num_attention_heads={heads} is not hidden_size={hidden}: "
                             "heads of another width than hidden / heads are not understood here.")
        shape = ModelShape(read("num_hidden_layers"), hidden, heads, read("vocab_size"), read("max_position_embeddings"),
                           fields.get("num_key_value_heads") or (8 if kind == "mistral" else heads), read("intermediate_size"),
                           gated=True, tied=fields.get("tie_word_embeddings", False), qkv_bias=kind == "qwen2")
        dropout = [fields.get("attention_dropout", 0.0)]
        window = fields.get("sliding_window", 4096) if kind == "mistral" else None
        if window:
            notes.append(f"attention is counted over the whole sequence, not over a window of {window}")
    else:
        raise ValueError(f"model_type={kind} is not understood; gpt2, llama, mistral and qwen2 are.")
    if any(dropout):
        notes.append("the model's dropout saves masks in forward, which are not counted")
    return shape, notes


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
