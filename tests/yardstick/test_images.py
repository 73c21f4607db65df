"""The reader of CIFAR-10's two formats, held to files made here, and the drawn images."""

import os
import pickle
import struct

import numpy as np
import pytest

from yardstick import images
from yardstick.settings import SettingsError

NAMES = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]


class Python2(pickle._Pickler):
    """Writes bytes as Python 2 wrote its text, which is how the public files came to be."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_bytes(self, text):
        self.write(pickle.BINSTRING + struct.pack("<i", len(text)) + text)
    dispatch[bytes] = save_bytes


def write(folder, name, pixels, labels, binary):
    rows = pixels.reshape(len(labels), -1)
    if binary:
        (folder / f"{name}.bin").write_bytes(np.concatenate([labels[:, None].astype(np.uint8), rows], axis=1).tobytes())
    else:
        with open(folder / name, "wb") as file:
            Python2(file, protocol=2).dump({b"data": rows, b"labels": labels.tolist(), b"batch_label": b"one of a few"})


@pytest.fixture(params=[False, True], ids=["python", "binary"])
def folder(request, tmp_path):
    for n, name in enumerate(NAMES):
        write(tmp_path, name, *images.draw(6, seed=n), binary=request.param)
    return tmp_path


def test_both_formats_are_read(folder):
    (train, train_labels), (test, test_labels) = images.load(folder)
    wanted = [images.draw(6, seed=n) for n in range(6)]
    assert np.array_equal(train, np.concatenate([pixels for pixels, _ in wanted[:5]]))
    assert np.array_equal(train_labels, np.concatenate([labels for _, labels in wanted[:5]]))
    assert np.array_equal(test, wanted[5][0]) and np.array_equal(test_labels, wanted[5][1])
    assert train.dtype == np.uint8 and train.shape == (30, 3, 32, 32) and train_labels.dtype == np.int64


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
def test_what_is_no_part_of_the_set_is_refused(folder, name):
    path = next(folder.glob(f"{name}*"))
    whole = path.read_bytes()
    for damaged in (whole[:-100], b"", None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(SettingsError, match="cannot be read"):
            images.load(folder)


def test_labels_of_another_set_are_refused(tmp_path):
    for n, name in enumerate(NAMES):
        pixels, labels = images.draw(6, seed=n)
        write(tmp_path, name, pixels, labels + 95, binary=True)
    with pytest.raises(SettingsError, match="10 classes"):
        images.load(tmp_path)


def test_a_pickle_that_calls_something_is_refused(tmp_path):
    class Call:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "called"),)
    for name in NAMES:
        (tmp_path / name).write_bytes(pickle.dumps({b"data": Call(), b"labels": [1]}))
    with pytest.raises(SettingsError, match="mkdir is no part of an array"):
        images.load(tmp_path)
    assert not (tmp_path / "called").exists()


def test_drawn_images_follow_the_seed_and_hold_every_class():
    (train, labels), (test, _) = images.load(made=400, seed=3)
    again, _ = images.draw(400, seed=3)
    other, _ = images.draw(400, seed=4)
    assert np.array_equal(train, again) and not np.array_equal(train, other)
    assert len(test) == 100 and set(labels) == set(range(10))
