"""Networks to profile, built without downloads: VGG-16, ResNet-50 and a GPT, each as the graph that PipeDream cuts.

Layers and sizes are those of the papers (arXiv 1409.1556, table 1 D; 1512.03385, table 1); weights are random, which times do not see.
"""

import torch
from torch import nn

from yardstick.model import layers
from yardstick.shapes import ModelShape


def vgg16(classes=1000):
    """(network, size of one sample): 13 convolutions of 3 x 3 in five blocks, three linear layers."""
    found, channels = [], 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            found += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        found.append(nn.MaxPool2d(2))
    found += [nn.Flatten(), nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(),
              nn.Linear(4096, classes)]
    return nn.Sequential(*found), (3, 224, 224)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 convolutions around which the input is added; the first of a stage changes its size."""

    def __init__(self, inside, outside, stride, inner):
        super().__init__()
        self.reduce, self.norm1 = nn.Conv2d(inside, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.middle, self.norm2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.expand, self.norm3 = nn.Conv2d(inner, outside, 1, bias=False), nn.BatchNorm2d(outside)
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False) if stride != 1 or inside != outside else None
        self.norm4 = nn.BatchNorm2d(outside) if self.shortcut else None

    def forward(self, x):
        y = self.relu1(self.norm1(self.reduce(x)))
        y = self.norm3(self.expand(self.relu2(self.norm2(self.middle(y)))))
        return self.relu3(y + (x if self.shortcut is None else self.norm4(self.shortcut(x))))


def resnet50(classes=1000):
    """(network, size of one sample): stages of 3, 4, 6, 3 bottlenecks."""
    found, inside = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)], 64
    for stage, count in enumerate((3, 4, 6, 3)):
        inner = 64 * 2**stage
        for block in range(count):
            found.append(Bottleneck(inside, 4 * inner, 2 if stage and not block else 1, inner))
            inside = 4 * inner
    return nn.Sequential(*found, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes)), (3, 224, 224)


def gpt(shape=ModelShape(layers=12, hidden=256, heads=8, vocab=4096, seq=256, tied=False)):
    """(network, None): yardstick.model's layers, each a node of the graph; a sample is a sequence of shape.seq tokens."""
    return nn.Sequential(*layers(shape)), shape


NETWORKS = {"vgg16": vgg16, "resnet50": resnet50, "gpt": gpt}


def samples(size, count):
    """A batch of random images, or of random tokens for a ModelShape."""
    draw = torch.Generator().manual_seed(0)
    if isinstance(size, ModelShape):
        return torch.randint(size.vocab, (count, size.seq), generator=draw)
    return torch.randn((count, *size), generator=draw)
