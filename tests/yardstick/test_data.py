"""Data: batches split exactly over ranks, sources and cache that do not lie, entropies that are known."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from yardstick import data, data_sources

ROOT = Path(data.__file__).resolve().parents[1]
TEXT = "".join(f"line {i}: naïve text, 東京, \t and tabs  \n" for i in range(400))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    return data.load(cache=tmp_path_factory.mktemp("embedded"))


# Batches

@pytest.mark.parametrize("ranks, accumulation", [(1, 1), (2, 1), (1, 4), (2, 3), (4, 3), (12, 1), (3, 2)])
def test_ranks_and_micro_steps_together_are_the_batch_of_one_process(ranks, accumulation):
    batches = data.Batches(np.arange(1000, dtype=np.uint16), window=7, global_batch=12, seed=3)
    for k in (0, 11, 25):                       # an epoch has 142 windows: step 11 spans two
        whole = batches.step(k)
        assert whole.shape == (1, 12, 7) and whole.dtype == np.int64
        parts = [batches.step(k, rank, ranks, accumulation) for rank in range(ranks)]
        assert all(part.shape == (accumulation, 12 // ranks // accumulation, 7) for part in parts)
        np.testing.assert_array_equal(np.concatenate(parts).reshape(12, 7), whole[0])


@pytest.mark.parametrize("global_batch", [1, 4, 10, 23])
def test_an_epoch_has_every_window_once(global_batch):
    batches = data.Batches(np.arange(103), window=10, global_batch=global_batch)
    steps = -(-3 * 10 // global_batch)
    rows = np.concatenate([batches.step(k)[0] for k in range(steps)])
    assert (np.diff(rows) == 1).all()           # consecutive tokens of the text
    epochs = [rows[first:first + 10, 0] for first in (0, 10, 20)]
    assert all(sorted(starts) == list(range(0, 100, 10)) for starts in epochs)
    assert len({tuple(starts) for starts in epochs}) == 3


def test_a_resumed_run_continues_as_if_it_had_not_stopped():
    tokens = np.arange(640)
    running = data.Batches(tokens, 8, 6, seed=1)
    history = [running.step(k) for k in range(40)]
    for k in (39, 20, 21, 0):                   # in any order, each by a fresh object
        np.testing.assert_array_equal(data.Batches(tokens, 8, 6, seed=1).step(k), history[k])
        np.testing.assert_array_equal(running.step(k), history[k])
    assert running.position(40) == (40 * 6 * 8, 3.0)


def test_the_seed_orders_the_windows_and_the_order_is_frozen():
    first = [data.Batches(np.arange(80), 8, 10, seed).step(0)[0, :, 0] // 8 for seed in (0, 0, 1)]
    assert (first[0] == first[1]).all() and (first[0] != first[2]).any()
    assert first[0].tolist() == [3, 7, 6, 4, 1, 0, 2, 8, 5, 9]      # else recorded losses are of another run


@pytest.mark.parametrize("make, words", [
    (lambda: data.Batches(np.arange(9), 10, 1), "9 tokens, fewer than one window of 10"),
    (lambda: data.Batches(np.arange(9), 0, 1), "window=0"),
    (lambda: data.Batches(np.arange(9), 3, 1, seed=-1), "seed=-1"),
    (lambda: data.Batches(np.arange(9), 3, 10).step(0, 0, 2, 2), "Use global_batch=12 or 8"),
    (lambda: data.Batches(np.arange(9), 3, 1).step(0, 0, 2), "Use global_batch=2."),
    (lambda: data.Batches(np.arange(9), 3, 2).step(0, 2, 2), "rank=2 must be in 0 ... 1"),
    (lambda: data.Batches(np.arange(9), 3, 2).step(-1), "step=-1"),
    (lambda: data.synthetic(vocab=1), "vocab=1"),
])
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value)


# The synthetic source

def test_the_entropies_of_the_synthetic_source_are_those_of_its_tokens():
    corpus = data.synthetic(vocab=24, seed=5, tokens=300_000)
    tokens = corpus.train
    assert data.unigram_entropy(tokens) == pytest.approx(corpus.unigram_entropy, abs=0.01)
    pairs = np.bincount(tokens[:-1].astype(int) * 24 + tokens[1:], minlength=24 * 24).reshape(24, 24)
    model = (pairs + 1e-3) / (pairs + 1e-3).sum(axis=1, keepdims=True)      # bigrams, counted on the training part
    fresh = corpus.validation
    loss = -np.log(model[fresh[:-1], fresh[1:]])
    margin = 4 * loss.std() / len(loss) ** 0.5
    assert corpus.entropy_rate - margin < loss.mean() < corpus.entropy_rate + margin + 0.01
    assert corpus.entropy_rate < corpus.unigram_entropy - 0.5 < np.log(24)


def test_the_synthetic_source_is_a_corpus():
    corpus, same, other = (data.synthetic(vocab=9, seed=seed, tokens=1000) for seed in (0, 0, 1))
    assert corpus.sha256 == same.sha256 != other.sha256
    assert len(corpus.train) == 950 and len(corpus.validation) == 50 and corpus.train.max() < corpus.vocab == 9
    assert corpus.encode(corpus.decode([8, 0, 3])) == [8, 0, 3]


# The embedded text and its tokenizer

def test_the_tokenizer_gives_back_any_text(embedded):
    rng = np.random.default_rng(0)
    points = rng.integers(1, 0x110000, 20000)
    texts = ["", "\x00\r\n\t", "  \n\n   x  ", data.END + "a" + data.END, bytes(range(256)).decode("latin1"), TEXT,
             "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)]
    for text in texts:
        ids = embedded.encode(text)
        assert embedded.decode(np.array(ids, np.uint16)) == text and max(ids, default=0) < embedded.vocab
    assert embedded.vocab == data.VOCAB == 4096
    assert embedded.encode(data.END) == [embedded.tokenizer.token_to_id(data.END)]


def test_the_embedded_corpus_is_the_reference_or_says_that_it_is_not(embedded):
    reference = json.loads(data.REFERENCE.read_text())
    assert (embedded.note is None) == (embedded.sha256 == reference["sha256"])
    if embedded.note:
        assert reference["python"] in embedded.note and "losses will differ" in embedded.note
    share = len(embedded.validation) / (len(embedded.train) + len(embedded.validation))
    assert 0.025 < share < 0.075
    end = embedded.encode(data.END)[0]
    assert embedded.train[-1] == embedded.validation[-1] == end         # cut between documents
    assert (embedded.train == end).sum() + (embedded.validation == end).sum() == embedded.documents


def test_another_python_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "pathlib").mkdir()
    (tmp_path / "pathlib" / "test").mkdir()
    for name in ("argparse.py", "pathlib/__init__.py", "pathlib/_local.py", "pathlib/test/left_out.py"):
        (tmp_path / name).write_text(f"# {name}\n" * 50)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = data.load(cache=tmp_path / "cache")
    assert "differs from the reference" in corpus.note and "missing modules: __future__, " in corpus.note
    assert corpus.documents == 3 and "left_out" not in corpus.decode(np.append(corpus.train, corpus.validation))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python311.zip")})
    with pytest.raises(ValueError, match="has no .py sources"):
        data.load(cache=tmp_path / "cache")


def test_training_gives_the_committed_tokenizer(embedded):
    if embedded.note:
        pytest.skip(embedded.note)
    shown = subprocess.run([sys.executable, "-m", "yardstick.data", "train"], cwd=ROOT, text=True, check=True,
                           capture_output=True).stdout
    assert "4096 tokens, the same as data_tokenizer.json" in shown


# Sources

def whole(corpus):
    return corpus.decode(np.append(corpus.train, corpus.validation))


def test_a_file_and_a_folder_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr(data_sources, "PIECE", 100)
    monkeypatch.setattr(data, "BATCH", 1000)
    folder, cache = tmp_path / "my texts", tmp_path / "cache"
    (folder / "sub" / ".git").mkdir(parents=True)
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    one = data.load(folder / "a.txt", cache=cache)
    assert whole(one) == TEXT + data.END and one.name == "a.txt" and one.documents == 1 and one.note is None
    assert one.text_bytes == len(TEXT.encode()) and len(one.validation) > 0

    (folder / "sub" / "b.md").write_bytes(b"\xef\xbb\xbf" + b"windows\r\nlines\r\n")
    (folder / "sub" / "c.bin").write_bytes(b"\x00\x01")
    (folder / "sub" / "empty").touch()
    (folder / "sub" / ".git" / "config").write_text("hidden")
    many = data.load(str(folder), cache=cache)
    assert many.documents == 2 and "2 files" in many.note and many.name == "my texts"
    assert sorted(whole(many).split(data.END)) == sorted(["", TEXT, "windows\nlines\n"])


@pytest.mark.parametrize("text", ["word " * 3000, "x" * 9000, "a story" + data.END + "\nand another\n"])
def test_text_without_lines_and_text_with_its_own_ends(tmp_path, monkeypatch, text):
    monkeypatch.setattr(data_sources, "PIECE", 1000)
    (tmp_path / "t.txt").write_text(text)
    assert whole(data.load(tmp_path / "t.txt", cache=tmp_path)) == text + data.END


@pytest.mark.parametrize("content, words", [
    (b"", "is empty"), (b"\xef\xbb\xbf", "is empty"), (b"abc\x00def", "is a binary file"),
    (b"caf\xe9\n", "not UTF-8 text (byte 0xe9"), (b"ok\n" * 50000 + b"\xff", "not UTF-8 text (byte 0xff"),
    (None, "does not exist")])
def test_what_is_no_text_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "some.file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        data.load(path, cache=tmp_path / "cache")
    assert words in str(error.value) and str(path) in str(error.value)
    if content is not None and len(content) < 100:
        with pytest.raises(ValueError, match="has no UTF-8 text file"):
            data.load(tmp_path, cache=tmp_path / "cache")


def test_a_hub_data_set(tmp_path, monkeypatch):
    class Rows(list):
        column_names = ["text", "label"]

    asked = []

    def load_dataset(*arguments, split):
        if arguments[0] == "nobody/nothing":
            raise ConnectionError("no route to the hub")
        asked.append((*arguments, split))
        return Rows({"text": text, "label": 0} for text in ("one story", "", "another"))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for source in ("hub:org/set", "hub:org/set:en", "hub:org/set::test", "hub:org/set:en:test"):
        corpus = data.load(source, cache=tmp_path)
        assert whole(corpus) == f"one story{data.END}another{data.END}" and corpus.documents == 2
    assert asked == [("org/set", None, "train"), ("org/set", "en", "train"), ("org/set", None, "test"),
                     ("org/set", "en", "test")]
    with pytest.raises(ValueError, match="no route to the hub"):
        data.load("hub:nobody/nothing", cache=tmp_path)
    Rows.column_names = ["content"]
    with pytest.raises(ValueError, match='no column "text" but content'):
        data.load("hub:org/set", cache=tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        data.load("hub:org/set", cache=tmp_path)


def test_a_tokenizer_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    embedded = Tokenizer.from_file(str(data.TOKENIZER))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=embedded, eos_token=data.END)
    fast.save_pretrained(tmp_path / "own")
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    ours = data.load(tmp_path / "a.txt", cache=tmp_path)
    theirs = data.load(tmp_path / "a.txt", tokenizer=tmp_path / "own", cache=tmp_path)
    np.testing.assert_array_equal(ours.train, theirs.train)
    assert theirs.vocab == 4096 and whole(theirs) == whole(ours)
    with pytest.raises(ValueError, match="cannot load tokenizer="):
        data.load(tmp_path / "a.txt", tokenizer=str(tmp_path / "missing"), cache=tmp_path)


# The cache

def test_the_cache_is_used_and_a_damaged_one_is_written_again(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    encoded, calls = data._encoded, []
    monkeypatch.setattr(data, "_encoded", lambda *a: calls.append(1) or encoded(*a))
    expected = whole(data.load(tmp_path / "a.txt", cache=tmp_path / "cache"))
    data.load(tmp_path / "a.txt", cache=tmp_path / "cache")
    assert len(calls) == 1
    file, = (tmp_path / "cache").glob("*.npy")
    for size in (file.stat().st_size - 1, 200, 20, 0):
        os.truncate(file, size)
        calls.clear()
        assert whole(data.load(tmp_path / "a.txt", cache=tmp_path / "cache")) == expected and len(calls) == 1
    (tmp_path / "a.txt").write_text(TEXT + "more", encoding="utf-8")
    assert whole(data.load(tmp_path / "a.txt", cache=tmp_path / "cache")) == TEXT + "more" + data.END


def test_of_several_processes_one_tokenizes(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT * 100, encoding="utf-8")
    program = ("import sys; from yardstick import data; encoded = data._encoded; folder = sys.argv[1]\n"
               "data._encoded = lambda *a: print('tokenizes') or encoded(*a)\n"
               "print(len(data.load(folder + '/a.txt', cache=folder + '/cache').train))")
    processes = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, text=True,
                                  stdout=subprocess.PIPE) for _ in range(4)]
    shown = [process.communicate()[0].split() for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert len({words[-1] for words in shown}) == 1
    pytest.importorskip("fcntl", reason="no file locks on this system: each process tokenizes")
    assert sum("tokenizes" in words for words in shown) == 1
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".npy", ".lock"}


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    with pytest.raises(OSError, match="cannot write the token cache .*a.txt.*give another folder"):
        data.load(tmp_path / "a.txt", cache=tmp_path / "a.txt")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    pytest.importorskip("resource")
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    program = ("import sys, resource; from yardstick import data; folder = sys.argv[1]\n"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
               "data.load(folder + '/a.txt', cache=folder + '/cache')")
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, text=True, capture_output=True)
    assert run.returncode == 1 and "OSError: cannot write the token cache" in run.stderr
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_the_command_says_what_the_corpus_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    data._main([f"data={tmp_path / 'a.txt'}", "window=32"])
    shown = capsys.readouterr().out
    assert "a.txt: documents 1" in shown and "windows of 32" in shown and "unigram entropy" in shown
