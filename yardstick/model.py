"""The reference GPT of one process, as a list of layers that pipelines cut and other folders compare themselves with.

    parts = layers(ModelShape(layers=4, hidden=64, heads=4, vocab=4096, seq=128, tied=False), torch.float64, seed=1)
    logits = torch.nn.Sequential(*parts)(tokens)              # [B, T] -> [B, T, V]

GPT-2 as yardstick.shapes has it: learned positions, biases, layer norms before attention and MLP, GELU, no dropout. Each layer draws
its weights from a seed of its own place, so that any cut of the list is the same model.
Letters: B sequences, T tokens, D hidden, H heads, V vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional as F

SPREAD = 0.02                  # standard deviation of the weights at the start (Radford et al. 2019)


class Embedding(nn.Module):
    """Tokens [B, T] -> [B, T, D]: the vector of the token plus that of its place."""

    def __init__(self, shape):
        super().__init__()
        self.token, self.place = nn.Embedding(shape.vocab, shape.hidden), nn.Embedding(shape.seq, shape.hidden)

    def forward(self, tokens_BT):
        return self.token(tokens_BT) + self.place.weight[:tokens_BT.shape[1]]


class Block(nn.Module):
    """[B, T, D] -> [B, T, D]: causal attention, then an MLP, each behind a layer norm and added to its input."""

    def __init__(self, shape):
        super().__init__()
        D = shape.hidden
        self.heads = shape.heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.norm2, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, shape.ffn_width), nn.Linear(shape.ffn_width, D)

    def forward(self, x_BTD):
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(self.norm1(x_BTD)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)   # each [B, H, T, D/H]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, D)
        x_BTD = x_BTD + self.out(mixed)
        return x_BTD + self.down(F.gelu(self.up(self.norm2(x_BTD)), approximate="tanh"))


class Head(nn.Module):
    """[B, T, D] -> logits [B, T, V]."""

    def __init__(self, shape):
        super().__init__()
        self.norm, self.logits = nn.LayerNorm(shape.hidden), nn.Linear(shape.hidden, shape.vocab, bias=False)

    def forward(self, x_BTD):
        return self.logits(self.norm(x_BTD))


def layers(shape, dtype=torch.float32, seed=0):
    """[Embedding, Block, ..., Head] of a ModelShape that is not gated, has no experts and no tied output.

    Raises ValueError for another shape: a tied output would need the first and the last layer on one rank.
    """
    if shape.gated or shape.experts or shape.tied:
        raise ValueError("yardstick.model builds GPT-2 with an output layer of its own: give ModelShape(gated=False, tied=False, experts=0).")
    found = [Embedding(shape), *(Block(shape) for _ in range(shape.layers)), Head(shape)]
    for place, layer in enumerate(found):
        draw = torch.Generator().manual_seed(seed * 1000 + place)
        for name, weight in layer.named_parameters():
            with torch.no_grad():
                if weight.dim() > 1:
                    weight.copy_(torch.randn(weight.shape, generator=draw, dtype=torch.float64) * SPREAD)
                else:
                    weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        layer.to(dtype)
    return found


def loss_of(logits_BTV, tokens_BT):
    """Mean cross entropy of each next token, in nats: T - 1 targets a sequence."""
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
