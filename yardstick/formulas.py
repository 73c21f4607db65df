"""What is exact on paper: parameters, FLOPs, bytes held and sent, each with its source and the paper's number.

Bytes are bytes, counts are counts; nothing here is measured. What DeepSpeed's present release does beyond
the papers is in `deepspeed_memory.py` and `deepspeed_traffic.py`. More than 300 lines, because a formula has one place.
"""

from yardstick.shapes import PAPER, Layout, ModelShape  # ModelShape: the doctests

GB, GiB, MB, MiB = 10**9, 2**30, 10**6, 2**20


def tensor_shapes(shape):
    """[(name, dims)] of every weight of `shape`, tied weights once, in the order of the released models.

    GPT-2 order is that of transformers' GPT2LMHeadModel, Llama's that of LlamaForCausalLM: sharding cuts
    through this order, so the bytes that one rank holds depend on it.

    >>> from yardstick.shapes import MODELS
    >>> tensor_shapes(MODELS["tiny"])[:2]
    [('wte', (4096, 512)), ('wpe', (256, 512))]
    """
    h, f, kv = shape.hidden, shape.ffn_width, shape.kv_hidden
    rows = [("wte", (shape.vocab, h))] + ([] if shape.gated else [("wpe", (shape.seq, h))])
    for i in range(shape.layers):
        if shape.gated:
            mlp = [("gate", (f, h)), ("up", (f, h)), ("down", (h, f))]
            attention = [("q", (h, h)), ("k", (kv, h)), ("v", (kv, h)), ("o", (h, h))]
            if shape.qkv_bias:
                attention = [row for name, dims in attention for row in
                             ((name, dims), (name + ".bias", dims[:1])) if row[0] != "o.bias"]
            norms = [("norm1", (h,)), ("norm2", (h,))]
        else:
            mlp = [("fc", (h, f)), ("fc.bias", (f,)), ("proj", (f, h)), ("proj.bias", (h,))]
            attention = [("qkv", (h, h + 2 * kv)), ("qkv.bias", (h + 2 * kv,)), ("o", (h, h)), ("o.bias", (h,))]
        if shape.experts:
            mlp = [("router", (shape.experts, h))] + [
                (f"expert{e}.{name}", dims) for e in range(shape.experts) for name, dims in mlp]
        if shape.gated:
            rows += [(f"{i}.{name}", dims) for name, dims in attention + mlp + norms]
        else:
            ln1, ln2 = [[(f"ln{k}", (h,)), (f"ln{k}.bias", (h,))] for k in (1, 2)]
            rows += [(f"{i}.{name}", dims) for name, dims in ln1 + attention + ln2 + mlp]
    rows += [("norm", (h,))] if shape.gated else [("ln_f", (h,)), ("ln_f.bias", (h,))]
    return rows + ([] if shape.tied else [("lm_head", (shape.vocab, h))])


def numel(dims):
    """Elements of a tensor of these dims."""
    count = 1
    for dim in dims:
        count *= dim
    return count


def param_count(shape):
    """Parameters of a model, tied weights once.

    >>> from yardstick.shapes import MODELS
    >>> [param_count(MODELS[m]) for m in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")]
    [124439808, 354823168, 774030080, 1557611200]
    >>> [param_count(MODELS[m]) for m in ("llama-2-7b", "llama-3.2-1b", "llama-3-8b", "llama-3-70b")]
    [6738415616, 1235814400, 8030261248, 70553706496]
    >>> [param_count(MODELS[m]) for m in ("llama-2-13b", "llama-2-70b", "mistral-7b", "qwen2.5-7b")]
    [13015864320, 68976648192, 7241732096, 7615616512]
    """
    return sum(numel(dims) for _, dims in tensor_shapes(shape))


def zero_state_bytes(*, params, ranks, stage, recipe=PAPER):
    """Bytes per rank of weights, gradients and optimizer states: ZeRO, arXiv 1910.02054, figure 1 and table 1.

    Stage 1 divides the optimizer states by the ranks, stage 2 the gradients too, stage 3 all three.
    The paper's example, 7.5 B parameters on 64 ranks, in GB:

    >>> [round(zero_state_bytes(params=7.5e9, ranks=64, stage=s) / GB, 1) for s in range(4)]
    [120.0, 31.4, 16.6, 1.9]
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"stage={stage} is no ZeRO stage; use 0, 1, 2 or 3.")
    if ranks < 1 or params < 0:
        raise ValueError(f"params={params}, ranks={ranks}: params must not be negative, ranks at least 1.")
    return sum(zero_state_bytes_by_kind(params=params, ranks=ranks, stage=stage, recipe=recipe).values())


def zero_state_bytes_by_kind(*, params, ranks, stage, recipe=PAPER):
    """The summands of `zero_state_bytes`: {"parameter", "gradient", "master", "optimizer"}, bytes per rank."""
    return {"parameter": recipe.parameter * params / (ranks if stage == 3 else 1),
            "gradient": recipe.gradient * params / (ranks if stage >= 2 else 1),
            "master": recipe.master * params / (ranks if stage >= 1 else 1),
            "optimizer": recipe.states * params / (ranks if stage >= 1 else 1)}


def ring_bytes(collective, payload, ranks):
    """Bytes that each rank sends for one collective by the ring algorithm, averaged over ranks.

    payload: bytes of the full tensor (all_gather: the output, reduce_scatter: the input). An all-reduce is a
    reduce-scatter followed by an all-gather (Patarasuk and Yuan 2009), each of (n-1)/n of the payload. A
    broadcast or reduce passes the tensor along a chain of n ranks: n-1 sends for n ranks.

    >>> ring_bytes("all_reduce", 1000, 4), ring_bytes("all_gather", 1000, 4)
    (1500.0, 750.0)
    """
    passes = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1, "reduce": 1,
              "all_to_all": 1}[collective]
    return passes * payload * (ranks - 1) / ranks


def zero_traffic_in_parameters(stage):
    """Bytes sent per step, in units of P (bytes of the weights): ZeRO, arXiv 1910.02054, section 7.

    Data parallelism and stages 1 and 2: a reduce-scatter and an all-gather, 2P. Stage 3 gathers the weights
    in forward and in backward and reduce-scatters the gradients, 3P: half as much again. In the limit of many
    ranks; at n ranks each is times (n-1)/n.

    >>> [zero_traffic_in_parameters(s) for s in range(4)]
    [2, 2, 2, 3]
    """
    return 3 if stage == 3 else 2


def train_flops(shape, batch, recompute="none"):
    """FLOPs of one optimizer step over `batch` sequences of shape.seq tokens.

    Two per weight and token in each matrix product of the forward pass, twice that in backward; attention
    scores and their use are counted in full (no causal halving), 4 * seq * hidden per token and layer
    forward. Norms, biases, softmax and activations are left out. recompute "full" repeats the layers
    (not the logits) in backward, "selective" the attention scores alone. This is Narayanan et al.
    (arXiv 2104.04473), equation 3, written out; its equation reads
    96 B s l h^2 (1 + s / 6h + V / 16lh) with full recomputation:

    >>> gpt3 = ModelShape(layers=96, hidden=12288, heads=96, vocab=51200, seq=2048)
    >>> s, l, h, V, B = 2048, 96, 12288, 51200, 1536
    >>> equation = 96 * B * s * l * h**2 * (1 + s / (6 * h) + V / (16 * l * h))
    >>> abs(train_flops(gpt3, B, recompute="full") / equation - 1) < 1e-12
    True
    """
    h, f, kv = shape.hidden, shape.ffn_width, shape.kv_hidden
    mlp = 2 * (3 if shape.gated else 2) * h * f * (shape.top_k if shape.experts else 1)
    mlp += 2 * h * shape.experts                                    # the router
    scores = 4 * shape.seq * h                                      # q k^T and probabilities times v
    layer = 2 * (2 * h * h + 2 * h * kv) + mlp + scores             # q and o are h x h, k and v h x kv
    logits = 2 * h * shape.vocab
    again = {"none": 0, "selective": scores, "full": layer}
    if recompute not in again:
        raise ValueError(f"recompute={recompute!r} is none of {', '.join(again)}.")
    tokens = batch * shape.seq
    return tokens * (shape.layers * (3 * layer + again[recompute]) + 3 * logits)


def activation_bytes(shape, layout=Layout(), recompute="none", sequence_parallel=False):
    """Bytes of activations of all layers of one micro-batch on one rank, 16-bit, with dropout masks.

    Korthikanti et al. (arXiv 2205.05198), equations 1 to 6, per layer in units of s*b*h bytes: 34 + 5as/h
    whole; with t-way tensor parallelism 10 + 24/t + 5as/ht; the 10 divided as well under sequence
    parallelism; selective recomputation drops the 5as/h, full keeps the layer's input, 2. Pipeline stages
    hold their own layers. Logits and embeddings are not counted, as in the paper's table.

    >>> gpt3 = ModelShape(layers=96, hidden=12288, heads=96, vocab=51200, seq=2048)
    >>> round(activation_bytes(gpt3) / (2048 * 12288 * 96), 1)         # 34 + 5 * 96 * 2048 / 12288
    114.0
    >>> round(activation_bytes(gpt3, Layout(tp=8), "selective", True) / (2048 * 12288 * 96), 2)   # 34 / 8
    4.25
    """
    if recompute not in ("none", "selective", "full"):
        raise ValueError(f"recompute={recompute!r} is none of none, selective, full.")
    a, s, h, t = shape.heads, shape.seq, shape.hidden, layout.tp
    unit = s / layout.cp * layout.micro_batch * h
    if recompute == "full":
        layer = 2 / (t if sequence_parallel else 1)
    else:
        layer = 10 / (t if sequence_parallel else 1) + 24 / t
        layer += 5 * a * s / layout.cp / (h * t) if recompute == "none" else 0
    return unit * layer * shape.layers / layout.pp


def saved_bytes_per_token(shape, element_bytes):
    """(of one layer, after the last layer): bytes per token that autograd saves in transformers' GPT-2 or Llama, without dropout.

    Weights are left out. GPT-2, in units of hidden: both layer norms' inputs (2) and outputs (2), q k v (3), the
    attention's output (1), and 5 of width ffn around GELU written out in elementary operations. Llama: each RMSNorm
    keeps its input in fp32, what it normalized and what it scaled; q, k, v and the attention's output; gate,
    its SiLU, up and their product of width ffn. Scaled-dot-product attention saves no scores, but 4 bytes a head;
    the loss saves its log-probabilities in fp32.
    """
    s, h, f = element_bytes, shape.hidden, shape.ffn_width
    if shape.gated:
        norm = (2 * s + 4) * h + 4                                                  # and the inverse of its root mean square
        return 2 * norm + (2 * h + 2 * shape.kv_hidden + 4 * f) * s + 4 * shape.heads, norm + 4 * shape.vocab
    return (8 * h + 5 * f) * s + 4 * (4 + shape.heads), 2 * h * s + 4 * shape.vocab        # norms' statistics in fp32


def saved_bytes(shape, *, micro_batch, seq, element_bytes, recompute="none"):
    """Bytes that autograd saves in one forward; recompute "full": each layer keeps its input alone.

    Llama's tables of cosines and sines, one for all layers and sequences, are counted where layers save them.
    """
    layer, head = saved_bytes_per_token(shape, element_bytes)
    tables = 2 * seq * shape.hidden // shape.heads * element_bytes if shape.gated else 0
    if recompute == "full":
        layer, tables = shape.hidden * element_bytes, 0
    return micro_batch * seq * (shape.layers * layer + head) + tables


def bubble_seconds(schedule, stages, micro_batches, chunks=1, forward=1.0, input_grad=1.0, weight_grad=1.0):
    """(b, c): seconds a rank idles in one step of a pipeline, and those between its own first and last operation.

    forward, input_grad, weight_grad: F, I and W, seconds of a rank's whole part of the model for one micro-batch, equal on all
    ranks; sends cost nothing. Where the backward is split, for W <= F, W <= I and micro-batches enough to fill the pipeline; Chimera
    for a backward no shorter than a forward; Hanayo for micro_batches = stages and I + W = 2 F; DualPipe for F = I = W. Sources: arXiv 2104.04473, section
    2.2 (1F1B, interleaved); 2401.10241, sections 2 and 6 (zero bubble: ZB-H2's and ZB-V's bubble is zero by a rank's own span
    alone); 2107.06925, table 2 (Chimera); 2308.15762 (Hanayo); DualPipe's repository counts an overlapped pair F & B as one
    operation, `dualpipe_bubble_seconds`, this runs one after the other. tests/pipedream/test_simulator.py replays each.
    Raises ValueError where there is no closed form: simulate it (pipedream/simulator.py).

    Eight stages, F = I = W, as figure 1 of the zero-bubble paper draws them: 1F1B, ZB-H1, ZB-H2, ZB-V.

    >>> [bubble_seconds(name, 8, 24) for name in ("1f1b", "zb_h1", "zb_h2", "zb_v")]
    [(21.0, 21.0), (7.0, 7.0), (7.0, 0.0), (3.5, 0.0)]
    """
    F, I, W, p, m, v = forward, input_grad, weight_grad, stages, micro_batches, chunks
    B, fill = I + W, {"zb_h2": 2 * p - 1, "zb_v": 2 * p, "dualpipe": 2 * p, "dualpipe_v": 2 * p}.get(schedule, p)
    if schedule in ("gpipe", "1f1b", "pipedream", "pipedream_2bw"):
        found = (p - 1) * (F + B)
    elif schedule == "interleaved_1f1b" and m % p == 0:
        found = (p - 1) * (F + B) / v
    elif schedule == "chimera" and B >= F and m % p == 0:
        found = (p - 2) * (B + (m // p - 1) * (B - F))
    elif schedule == "hanayo" and m == p and B == 2 * F:
        found = 4 * (p - 1) * F / max(v, 2)
    elif schedule in ("dualpipe", "dualpipe_v") and m >= fill and F == I == W:
        found = (p - 2 if schedule == "dualpipe" else p - 1) * F / 2
    elif schedule in ("zb_h1", "zb_h2", "interleaved_zero_bubble", "zb_v") and m >= fill and W <= min(F, I):
        if schedule == "zb_h2":
            own = float((p - 1) * (F + I - 2 * W))
            return max(own, float((p - 1) * F)), own
        if schedule == "zb_v":
            own = float((p - 1) * (I - W))
            return max(own, (p - 1) * I / 2), own
        found = (p - 1) * (F + I - W) / v
    else:
        raise ValueError(f"the bubble of {schedule} has no closed form here for stages={p}, micro_batches={m}, F={F}, I={I}, W={W}: "
                         "simulate it (python pipedream/simulator.py).")
    return float(found), float(found)


def bubble_fraction(schedule, stages, micro_batches, chunks=1, **times):
    """Idle share of the whole step; times as in `bubble_seconds`, F = I = W by default.

    (p-1) / (m+p-1) for 1F1B; Megatron and others print the same over the ideal time, `bubble_over_ideal`, and the zero-bubble
    papers over a rank's own span, `bubble_fraction_of_span`.

    >>> bubble_fraction("1f1b", 4, 8) == 3 / 11, bubble_over_ideal("1f1b", 4, 8) == 3 / 8
    (True, True)
    """
    idle, _ = bubble_seconds(schedule, stages, micro_batches, chunks, **times)
    return idle / (_work(micro_batches, **times) + idle)


def bubble_fraction_of_span(schedule, stages, micro_batches, chunks=1, **times):
    """Idle share of the longest time from a rank's first operation to its last: the zero-bubble papers' bubble rate (section 5.3)."""
    _, idle = bubble_seconds(schedule, stages, micro_batches, chunks, **times)
    return idle / (_work(micro_batches, **times) + idle)


def bubble_over_ideal(schedule, stages, micro_batches, chunks=1, **times):
    """Idle time over the time of the work alone: arXiv 2104.04473, section 2.2, (p-1) / m for 1F1B and that / v interleaved."""
    idle, _ = bubble_seconds(schedule, stages, micro_batches, chunks, **times)
    return idle / _work(micro_batches, **times)


def _work(micro_batches, forward=1.0, input_grad=1.0, weight_grad=1.0):
    return micro_batches * (forward + input_grad + weight_grad)


def dualpipe_bubble_seconds(parts, forward, backward, weight_grad, overlapped):
    """The bubble column of DualPipe's README for PP = `parts` model parts: (PP/2 - 1) (F&B + B - 3W), B the whole backward.

    A replay whose pairs are one operation gives it as the idle time of the ranks in the middle, which overlap most, for I = F and
    W <= F (pipedream.simulator.simulate, pair=). F&B: seconds of an overlapped pair, `overlapped`.

    >>> dualpipe_bubble_seconds(8, forward=1, backward=2, weight_grad=1, overlapped=3)
    6.0
    """
    return (parts / 2 - 1) * (overlapped + backward - 3.0 * weight_grad)


def activations_in_flight(schedule, stages, micro_batches, rank, chunks=1):
    """The most chunk activations that a rank holds at once, each from the start of its F to the end of its B or W.

    >>> [activations_in_flight("1f1b", 4, 8, rank) for rank in range(4)], activations_in_flight("zb_h2", 4, 8, 0)
    ([4, 3, 2, 1], 7)
    """
    p, m, v = stages, micro_batches, chunks
    group = m // max(1, m // p)
    if schedule == "gpipe":
        return m
    if schedule in ("1f1b", "pipedream", "pipedream_2bw"):
        return min(m, p - rank)
    if schedule == "interleaved_1f1b":
        return min(m * v, (v - 1) * group + 2 * (p - 1 - rank) + 1)
    if schedule in ("zb_h1", "interleaved_zero_bubble"):
        return min(m * v, (v - 1) * group + p)
    if schedule == "zb_h2":
        return min(m, 2 * p - 1)
    if schedule in ("zb_v", "dualpipe_v", "dualpipe") and m >= 2 * p:
        return {"zb_v": 2 * p, "dualpipe_v": 2 * p + 1, "dualpipe": p + 1}[schedule]
    raise ValueError(f"the activations of {schedule} have no closed form here for stages={p}, micro_batches={m}: simulate it.")


def pipedream_versions(replicas, stage):
    """Versions of the weights that a stage keeps: ceil(ranks of it and of the stages behind it / its own ranks), SOSP'19 section 3.3.

    >>> [pipedream_versions([1, 1, 1, 1], s) for s in range(4)], [pipedream_versions([9, 5, 1, 1], s) for s in range(4)]
    ([4, 3, 2, 1], [2, 2, 2, 1])
    """
    return -(-sum(replicas[stage:]) // replicas[stage])


def staleness(semantics, stages, stage):
    """Updates that lie between the weights of a gradient and those it is added to, in steady state and without replicas.

    >>> [staleness("stash", 4, s) for s in range(4)], staleness("vertical_sync", 4, 2), staleness("2bw", 4, 0)
    ([3, 2, 1, 0], 3, 1)
    """
    return {"flush": 0, "stash": stages - 1 - stage, "naive": stages - 1 - stage, "vertical_sync": stages - 1, "2bw": 1}[semantics]


def pipeline_bytes(schedule, stages, micro_batches, message, chunks=1):
    """Bytes that all ranks send in a step: each activation once over each boundary between parts on two ranks, its gradient back.

    message: bytes of one micro-batch's activation at a boundary. In a V the turn at its foot costs nothing.

    >>> pipeline_bytes("1f1b", 4, 8, message=100), pipeline_bytes("zb_v", 4, 8, message=100, chunks=2)
    (4800, 9600)
    """
    p, v = stages, chunks
    boundaries = p * v - 1 if schedule in ("interleaved_1f1b", "interleaved_zero_bubble") else p - 1
    if schedule in ("zb_v", "dualpipe_v", "hanayo"):
        boundaries = max(v, 2) * (p - 1)
    return 2 * boundaries * micro_batches * message
