"""The most that one rank of DeepSpeed 0.19 holds at once: what it keeps, and what each moment of a step needs besides.

`deepspeed_memory` is exact and says what lies there between phases. This follows a step through its moments (start,
forward, backward, reduction, step) and adds what lives for a moment: saved activations, logits, gathered weights, gradients on
their way, copies for collectives, Adam's temporaries. Sums are right to a few per cent; tests measure them on a CPU.
Not modelled: the CUDA context, NCCL's buffers, workspaces of kernels, fragmentation, dropout's masks.
Sources are modules and symbols of the package deepspeed, and torch/optim/adam.py.
"""

import functools
from dataclasses import dataclass

from yardstick import deepspeed_memory as held
from yardstick.deepspeed_traffic import FALLBACK_BUCKET, buckets, stage3_keeps
from yardstick.formulas import numel, saved_bytes, saved_bytes_per_token, tensor_shapes


@dataclass(frozen=True)
class Moment:
    """What one rank holds at one moment; parts: what it holds beyond rest, {(name, place): bytes}."""

    name: str
    rest: dict             # {"device", "host": bytes} between steps
    parts: dict

    def bytes_on(self, place):
        return self.rest.get(place, 0) + sum(n for (_, where), n in self.parts.items() if where == place)

    @property
    def nbytes(self):
        """Device and host together: what a CPU's allocator sees."""
        return self.bytes_on("device") + self.bytes_on("host")


def largest(moments, place=None):
    """The moment with the most bytes on `place`, None: on device and host together."""
    return max(moments, key=lambda moment: moment.bytes_on(place) if place else moment.nbytes)


class _Step:
    """The moments of one step of one rank; `note` keeps of each name the largest."""

    def __init__(self, shape, config, ranks, rank, accumulation, micro_batch, seq, recompute, gpu):
        self.shape, self.ranks, self.accumulation, self.gpu = shape, ranks, accumulation, gpu
        self.zero, self.stage, self.offload, _ = held.sections(config)
        self.s, self.tensors = held.element_bytes(config), held.of_shape(shape)
        self.torch_adam = config.get("optimizer", {}).get("params", {}).get("torch_adam", False)
        self.items = held.memory(self.tensors, config, ranks=ranks, rank=rank, accumulation=accumulation)
        self.rest = {place: sum(i.nbytes for i in self.items if i.place == place and i.moment == "always")
                     for place in ("device", "host")}
        self.bucket = int(self.zero.get("reduce_bucket_size", 5e8))
        self.start, self.end, _ = held.partition_bounds(self.tensors, ranks, rank)
        self.tokens, self.recompute = micro_batch * seq, recompute
        self.saved = saved_bytes(shape, micro_batch=micro_batch, seq=seq, element_bytes=self.s, recompute=recompute)
        layer, head = saved_bytes_per_token(shape, self.s)
        self.layer_whole = layer * self.tokens             # of one layer without recomputation
        self.head = head * self.tokens
        self.layer_kept = shape.hidden * self.s * self.tokens if recompute == "full" else self.layer_whole
        # elements of the tensors before, in, and after the layers, in the order of module.parameters()
        groups = {}
        for name, dims in tensor_shapes(shape):
            index = name.partition(".")[0]
            groups.setdefault(int(index) if index.isdecimal() else -1 if name in ("wte", "wpe") else shape.layers,
                              []).append(numel(dims))
        self.groups = groups
        self.owned = sum(n for at, n in self._positions() if at < self.end and at + n > self.start)
        threshold = self.zero.get("stage3_param_persistence_threshold", 100_000)
        self.one_gather = max((n for n in self.tensors.numels if n > threshold), default=0)     # elements
        self.keeps = stage3_keeps(self.tensors, self.zero)
        self.best, self.most = {}, {}

    def _positions(self):
        position = 0
        for n in self.tensors.numels:
            yield position, n
            position += n

    def note(self, name, parts, host=None):
        """Keep this as the moment `name` if it is its largest yet. parts, host: {what: bytes} on the device, on the host."""
        beyond = sum(parts.values()) + sum((host or {}).values())
        if beyond > self.most.get(name, -1):
            self.most[name] = beyond
            self.best[name] = Moment(name, self.rest, {
                **{(key, "device"): round(n) for key, n in parts.items() if n},
                **{(key, "host"): round(n) for key, n in (host or {}).items() if n}})

    # What stage 3 has gathered

    def gathered(self, remaining):
        """Bytes of whole weights beside the shares when `remaining` elements are still needed in backward."""
        if self.stage != 3:
            return 0
        if self.keeps == "none":
            return self.s * min(remaining, self.one_gather)
        if self.keeps == "all":
            return self.s * remaining
        # kept where the next use, at twice the distance to the loss, lies within max_reuse_distance
        reuse = self.zero.get("stage3_max_reuse_distance", 10**9) // 2
        return self.s * min(remaining, reuse + max(self.prefetch, self.one_gather))

    @functools.cached_property
    def prefetch(self):
        return min(self.zero.get("stage3_prefetch_bucket_size", 5 * 10**7), self.zero.get("stage3_max_live_parameters", 10**9))

    # The moments

    def forward(self):
        """At the loss everything is saved, the logits stand beside their fp32 copy and the log-probabilities.

        In stage 3 also in the last layer: prefetching gathers several tensors into one flat buffer, copies each out of it, and
        drops it when the last of them is used (partition_parameters.py: AllGatherCoalescedHandle).
        """
        count = self.tensors.count
        logits = self.tokens * self.shape.vocab * (4 if self.s == 4 else 6)
        gathered = {"gathered weights": self.gathered(count)}
        self.note("forward", {**self.kept, "activations": self.saved, "logits": logits, **gathered})
        if self.stage == 3:
            self.note("forward", {**self.kept, "activations": self.saved - self.head, **gathered,
                                  "last flat gather": self.s * min(self.prefetch, count)})

    @functools.cached_property
    def kept(self):
        """{what: bytes} of gradients that earlier micro-steps have left."""
        if self.accumulation == 1:
            return {}
        return {0: {"gradients": self.s * self.tensors.count},
                1: {"gradients": self.s * self.tensors.count, "bucket of gradients": self.s * self.bucket},
                2: {"gradients": 0 if self.offload != "none" else self.s * self.owned}, 3: {}}[self.stage]

    def backward(self):
        """Down through the layers: activations go as gradients come and are reduced."""
        s, tokens, vocab = self.s, self.tokens, self.shape.vocab
        grads, count = _Gradients(self), self.tensors.count
        wte = self.groups[-1][0]
        pending = s * wte if self.shape.tied else 0      # the output layer's part of a tied gradient waits for the embedding's
        late = {"gradients kept for the files": sum(i.nbytes for i in self.items
                                                    if i.place == "host" and i.moment == "gradients")} if self.stage == 3 else {}

        def now(extra, saved, remaining, new=0):
            self.note("backward", {**grads.parts(), "activations": saved, "gathered weights": self.gathered(remaining),
                                   "gradients on their way": new + pending, **extra}, late)

        pending, waiting = 0, pending
        now({"logits' gradients": 8 * tokens * vocab}, self.saved, count)
        saved, pending = self.saved - self.head, waiting
        now({"logits' gradients": s * tokens * vocab}, saved, count)
        at, remaining = count, count
        for index in sorted(self.groups, reverse=True):
            group = self.groups[index]
            inside = 0 <= index < self.shape.layers
            remaining = 0 if index < 0 else remaining
            work = 2 * tokens * self.shape.ffn_width * s if inside else 0        # gradients of activations inside a layer
            again = self.layer_whole if inside and self.recompute == "full" else 0
            for n in reversed(group):
                at -= n
                if index < 0 and at == 0:
                    # a tied gradient is the sum of two: for a moment there are three; in stage 3 AccumulateGrad calls aten::sum,
                    # for which a CPU makes an fp32 copy of 16-bit numbers (seen in torch's profiler)
                    now({}, saved, remaining, s * n * (2 if self.shape.tied else 1))
                    if self.stage == 3 and self.shape.tied and s == 2 and not self.gpu:
                        now({"fp32 copy of the tied gradient": 4 * n}, saved, remaining, s * n)
                grads.take(at, n, lambda extra: now({"gradients of activations": work, **extra}, saved + again, remaining, s * n))
                part = n / sum(group)
                saved -= self.layer_kept * part if inside else 0
                again -= again * part
            remaining -= sum(group) if inside else 0
        pending = 0
        grads.finish(lambda extra, name="backward": self.note(
            name, {**grads.parts(), "gathered weights": self.gathered(sum(self.groups[-1])), **extra}, late))

    def step(self):
        """Norm, clipping, Adam, and the weights' way back; per sub-group in stage 3."""
        s, numels = self.s, self.tensors.numels
        on_host = self.offload != "none"
        if self.stage == 0:
            grads = {"gradients": s * sum(numels), "fp32 gradients": 4 * sum(numels) if s == 2 else 0}
            temps = self._adam(sum(numels), max(numels))
            return self.note("step", {**grads, "Adam's temporaries": temps})
        if self.stage == 3:
            shares = [held.ceil_div(n, self.ranks) for n in numels]
            size = max(sum(shares[i] for i in group) for group in
                       held.sub_groups(shares, self.zero.get("sub_group_size", 10**9)))
        else:
            size = self.end - self.start
        if on_host:
            return self.note("step", {}, {"Adam's temporaries": 8 * size if self.torch_adam else 0})
        if self.stage < 3:
            averaged = {"averaged gradients": s * self.owned}
            inside = max([min(at + n, self.end) - max(at, self.start) for at, n in self._positions()], default=0)
            self.note("step", {**averaged, "fp64 copy for the norm": 8 * max(0, inside)})
            self.note("step", {**averaged, "flat gradients": s * size, "fp32 gradients": 4 * size if s == 2 else 0})
        else:
            self.note("step", {"fp64 copy for the norm": 8 * max(shares)})
        self.note("step", {"fp32 gradients": 4 * size, "Adam's temporaries": self._adam(size, size)})

    def _adam(self, count, largest_tensor):
        """torch/optim/adam.py: on a CPU tensor by tensor, the root and its quotient; on a GPU all at once, the root alone."""
        if not self.torch_adam:
            return 0
        return 4 * count if self.gpu else 8 * largest_tensor

    def build(self):
        """The program builds the model whole, in fp32, on every rank's host before DeepSpeed shares it out."""
        self.best["start"] = Moment("start", {}, {("the model built in fp32", "host"): 4 * self.tensors.count})


class _Gradients:
    """Where gradients are between being made and the end of backward, for each stage."""

    def __init__(self, step):
        self.step, self.filled, self.first, self.large = step, 0, 0, 0
        self.at = []                                          # (position, elements) in the bucket
        self.whole = 0                                        # bytes of gradients that stay as they were made
        self.own = 0                                          # bytes of the own share's gradients

    def parts(self):
        step = self.step
        parts = dict(step.kept)
        if step.stage in (1, 2):
            parts["bucket of gradients"] = step.s * step.bucket
        parts["gradients"] = parts.get("gradients", 0) + self.whole
        return {**parts, "own gradients": self.own, "gradient larger than the bucket": self.large}

    def take(self, at, n, note):
        """A gradient of n elements, the tensor at position `at`, has been made; note(extra) tells of a moment."""
        step = self.step
        note({})
        if step.stage < 2:
            self.whole += step.s * n if step.accumulation == 1 else 0
            return
        if self.at and self.filled + n > step.bucket:
            self.reduce(note)
        self.at.append((at, n))
        self.filled += n
        self.large += step.s * n if n > step.bucket else 0

    def reduce(self, note):
        """Send a bucket: a copy of it where it is not one piece, then the own part is put aside."""
        step, s = self.step, self.step.s
        if step.stage == 3:
            cat = s * self.filled if len(self.at) > 1 else 0
            note({"bucket interleaved for the collective": cat, "gloo's clone of it": 0 if step.gpu else s * self.filled})
            if step.offload != "none":
                note({"bucket interleaved for the collective": cat,
                      "fp32 gradients to offload": 4 * held.ceil_div(self.filled, step.ranks)})
        else:
            share = (step.end - step.start) or 1
            owners = {at // share for at, _ in self.at} | {(at + n - 1) // share for at, n in self.at}
            note({"copy of the bucket": s * self.filled if len(owners) > 1 else 0})
            inside = [min(at + n, step.end) - max(at, step.start) for at, n in self.at]
            mine = max(inside, default=0) > 0
            if step.offload != "none":
                note({"fp64 copy for the norm": 8 * max(0, *inside)})
            elif mine:
                self.own = s * step.owned
                note({})
        self.at, self.filled, self.large = [], 0, 0

    def finish(self, note):
        """What is left when all gradients are made; stages 0 and 1 reduce them now."""
        step, s = self.step, self.step.s
        if step.stage >= 2:
            if self.at:
                self.reduce(note)
            return
        numels = step.tensors.numels
        if step.stage == 0:
            return note({"flat copy for the all-reduce": s * max(buckets(numels, FALLBACK_BUCKET))}, "reduction")
        total, moved, position, own, group = s * sum(numels), 0, 0, 0, []
        self.whole = -step.kept.get("gradients", 0)
        for n in (*numels, None):
            if n is None or (group and sum(g for _, g in group) + n > step.bucket):
                size = sum(g for _, g in group)
                moved += s * size if size <= step.bucket else 0
                share = (step.end - step.start) or 1
                owners = {at // share for at, _ in group} | {(at + g - 1) // share for at, g in group}
                note({"gradients not yet reduced": total - moved, "own gradients": own,
                      "copy of the bucket": s * size if len(owners) > 1 else 0}, "reduction")
                if any(at < step.end and at + g > step.start for at, g in group):
                    own = s * step.owned
                note({"gradients not yet reduced": total - moved, "own gradients": own}, "reduction")
                group = []
            if n is not None:
                group.append((position, n))
                position += n


def peaks(shape, config, *, ranks, micro_batch, seq, rank=0, accumulation=1, recompute="none", gpu=True):
    """[Moment] of one rank's training step, the largest of each name: start, forward, backward, reduction, step.

    shape: a ModelShape; config: the effective DeepSpeed config; recompute: "none" or "full" (activation checkpointing of
    each layer). gpu=False: torch's and gloo's ways on a CPU.
    """
    step = _Step(shape, config, ranks, rank, accumulation, micro_batch, seq, recompute, gpu)
    step.build()
    step.forward()
    step.backward()
    step.step()
    return list(step.best.values())
