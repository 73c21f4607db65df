"""Images of ten classes, 32 x 32 in three colours: CIFAR-10 from a folder, or drawn.

    (images, labels), (test_images, test_labels) = load("cifar-10-batches-py")     # or -bin; None: drawn
    images.shape, images.dtype                                                     # (50000, 3, 32, 32), uint8
"""

import pickle
from pathlib import Path

import numpy as np

from yardstick.settings import SettingsError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
RECORD = 1 + 3 * SIDE**2            # bytes of the binary version: a label, then a plane of each colour


def load(folder=None, made=2048, seed=1):
    """(images, labels) to train with, and to test with.

    folder: the public set, unpacked, in its python or its binary version; None: `made` images drawn with the seed, and a quarter
    of that for the test. Raises SettingsError where the folder holds something else.
    """
    if folder is None:
        return draw(made, seed), draw(max(1, made // 4), seed + 1)
    ending = ".bin" if Path(folder, "test_batch.bin").exists() else ""
    try:
        *train, test = [read(Path(folder, name + ending)) for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch")]
    except Exception as error:                                        # a damaged pickle may raise anything
        raise SettingsError(f"images={folder} cannot be read as the unpacked folder cifar-10-batches-py or cifar-10-batches-bin: "
                            f"{type(error).__name__}: {error}. Unpack it again, or leave images out.") from None
    return tuple(np.concatenate(parts) for parts in zip(*train)), test


def read(path):
    """One file of the set -> images [n, 3, 32, 32], labels [n]. Of a pickle only arrays, numbers and texts are unpickled."""
    if path.suffix == ".bin":
        rows = np.fromfile(path, np.uint8).reshape(-1, RECORD)
        labels, pixels = rows[:, 0], rows[:, 1:]
    else:
        with open(path, "rb") as file:
            held = _Arrays(file, encoding="bytes").load()             # written by Python 2, whose text is bytes
        labels, pixels = np.array(held[b"labels"]), held[b"data"]
    images = np.array(pixels, np.uint8).reshape(len(labels), 3, SIDE, SIDE)
    if not len(labels) or labels.max() >= len(CLASSES):
        raise ValueError(f"{path.name} has no labels of {len(CLASSES)} classes")
    return images, labels.astype(np.int64)


class _Arrays(pickle.Unpickler):
    """Refuses to build what is no array: a pickle may name any function of any module, to be called."""

    def find_class(self, module, name):
        known = {"ndarray": np.ndarray, "dtype": np.dtype, "_reconstruct": np.empty(0).__reduce__()[0]}
        if module.partition(".")[0] != "numpy" or name not in known:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return known[name]


def draw(number, seed):
    """Stripes in five directions and two widths under noise, of random colours and phases: no pixel by itself tells the class.

    >>> images, labels = draw(20, seed=1)
    >>> images.shape, images.dtype, int(labels.max()) < len(CLASSES)
    ((20, 3, 32, 32), dtype('uint8'), True)
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(CLASSES), number)
    angle, waves = np.pi / 5 * (labels % 5), 4 + 3 * (labels // 5)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    cycles = np.multiply.outer(waves * np.cos(angle), x) + np.multiply.outer(waves * np.sin(angle), y)
    stripes = np.sin(2 * np.pi * (cycles + rng.random((number, 1, 1))))
    pixels = 128 + rng.uniform(10, 45, (number, 3, 1, 1)) * stripes[:, None] + rng.normal(0, 70, (number, 3, SIDE, SIDE))
    return pixels.clip(0, 255).astype(np.uint8), labels
