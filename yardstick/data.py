"""What models train on: the embedded corpus and its tokenizer, a user's own text, and exact batches.

    corpus = load()                                 # the standard library's source; or a file, folder, hub:NAME
    batches = Batches(corpus.train, window=128, global_batch=8, seed=0)
    rows = batches.step(3, rank=1, ranks=2, accumulation=2)     # [accumulation, micro_batch, window]

    python -m yardstick.data                        # what the corpus is; data=FILE for another
    python -m yardstick.data train [commit=True]    # trains the committed tokenizer again
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from yardstick.data_sources import END, REFERENCE, open_source
from yardstick.settings import Either, override

TOKENIZER = Path(__file__).with_name("data_tokenizer.json")
CACHE = Path(__file__).resolve().parents[1] / "runs" / "cache" / "data"
VOCAB = 4096                # of the embedded tokenizer
HELD_OUT = 0.05             # share of the tokens kept for validation
BATCH = 1 << 23             # characters tokenized at a time


@dataclass(frozen=True)
class Corpus:
    """Token ids of a text, and what the text is."""

    name: str
    train: np.ndarray       # unsigned [tokens], read from the cache file as needed
    validation: np.ndarray  # the held-out tail, likewise
    vocab: int              # largest id + 1
    tokenizer: Tokenizer
    sha256: str             # of the text
    documents: int
    text_bytes: int         # as UTF-8
    note: str | None = None                 # what makes this text, and so the losses, differ from the expected
    entropy_rate: float | None = None       # nats per token, exact: the lowest loss; synthetic sources only
    unigram_entropy: float | None = None    # nats per token, exact; synthetic sources only

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def load(source="embedded", tokenizer=None, cache=CACHE):
    """The Corpus of a source: "embedded", a text file, a folder of them, or "hub:NAME[:config][:split]".

    Text is UTF-8. Every file, and every row of a hub data set, is a document; "<|endoftext|>" inside a text
    ends one too. The text is read once for its hash, and again to be tokenized where the cache lacks it.
    tokenizer: None for the embedded one, or the folder or hub name of a tokenizer of transformers.
    Raises ValueError for what cannot be read as text, OSError where the cache cannot be written.
    """
    coder, end = _tokenizer(tokenizer)
    name, stream, size, note = open_source(os.fspath(source))
    digest, documents, text_bytes = hashlib.sha256(), 0, 0
    for piece in _shown(stream(), f"reading {name}", size):
        digest.update(piece.encode())
        documents += piece.count(END)
        text_bytes += len(piece.encode()) if piece != END else 0
    if not text_bytes:
        raise ValueError(f"data={source} holds no text. Give a text file, a folder of text files or hub:NAME.")
    sha256, reference = digest.hexdigest(), json.loads(REFERENCE.read_text())
    if source == "embedded" and sha256 != reference["sha256"]:
        note = (f"standard library of Python {platform.python_version()} differs from the reference "
                f"{reference['python']}: losses will differ" + (f"; {note}" if note else ""))

    vocab = max(coder.get_vocab().values()) + 1
    dtype = np.uint16 if vocab <= 1 << 16 else np.uint32
    key = f"{sha256[:16]}-{hashlib.sha256(coder.to_str().encode()).hexdigest()[:16]}"
    tokens = _cached(Path(cache) / f"{key}.npy", lambda: _encoded(
        _shown(stream(), f"tokenizing {name}", text_bytes), coder, end, dtype))
    # Validation begins HELD_OUT before the end, or where a document ends near there.
    low, cut, high = (round(len(tokens) * (1 - share * HELD_OUT)) for share in (1.5, 1, 0.5))
    ends = low + 1 + np.flatnonzero(tokens[low:high] == coder.token_to_id(end))
    cut = int(ends[np.abs(ends - cut).argmin()]) if len(ends) else cut
    return Corpus(name, tokens[:cut], tokens[cut:], vocab, coder, sha256, documents, text_bytes, note)


class Batches:
    """Shuffled windows of a text as the batches of numbered steps.

    A step is a function of its number: nothing is stored, and a run resumes at step k by asking for step k.
    The windows do not overlap. Those of all epochs form one line, each epoch in its own order drawn from the
    seed, and step k takes the k-th `global_batch` of it: within an epoch no window is lost or repeated, and a
    step may end one epoch and begin the next. Tokens behind the last whole window are not used.

    >>> batches = Batches(np.arange(10), window=2, global_batch=4)
    >>> batches.windows, batches.step(7, rank=1, ranks=2, accumulation=2).shape
    (5, (2, 1, 2))
    """

    def __init__(self, tokens, window, global_batch, seed=0):
        if window < 1 or global_batch < 1 or not 0 <= seed < 1 << 32:
            raise ValueError(f"window={window}, global_batch={global_batch} or seed={seed} is out of range: "
                             "window and global_batch are 1 or more, seed is in 0 ... 2**32 - 1.")
        if len(tokens) < window:
            raise ValueError(f"the text has {len(tokens)} tokens, fewer than one window of {window}. "
                             "Give a longer text or a shorter window.")
        self.tokens, self.window, self.global_batch, self.seed = tokens, window, global_batch, seed
        self.windows = len(tokens) // window        # of one epoch
        self._orders = {}                           # epoch -> order, of the last two that were asked for

    def step(self, k, rank=0, ranks=1, accumulation=1):
        """Token ids of one rank in step k (from 0): int64 [accumulation, micro_batch, window].

        The sequences of step k and their order do not depend on ranks and accumulation: rank r takes the r-th
        of `ranks` contiguous parts of the global batch, and its micro-steps are contiguous parts of that.
        """
        if k < 0 or not 0 <= rank < ranks or accumulation < 1:
            raise ValueError(f"step={k} must not be negative, rank={rank} must be in 0 ... {ranks - 1}, and "
                             f"accumulation={accumulation} 1 or more.")
        micro_batch, left = divmod(self.global_batch, parts := ranks * accumulation)
        if left:
            raise ValueError(f"global_batch={self.global_batch} is not divisible by ranks={ranks} * accumulation="
                             f"{accumulation} = {parts}. Use global_batch={(micro_batch + 1) * parts}"
                             + (f" or {micro_batch * parts}." if micro_batch else "."))
        first = k * self.global_batch + rank * accumulation * micro_batch
        chosen = np.array([self._window(n) for n in range(first, first + accumulation * micro_batch)])
        rows = self.tokens[chosen[:, None] * self.window + np.arange(self.window)]
        return rows.astype(np.int64).reshape(accumulation, micro_batch, self.window)

    def position(self, k):
        """(tokens, epochs) that lie before step k, the epochs with their fraction."""
        return k * self.global_batch * self.window, k * self.global_batch / self.windows

    def _window(self, n):
        epoch, place = divmod(n, self.windows)
        if epoch not in self._orders:
            # RandomState, because its stream is frozen: Generator's may change between releases of numpy.
            order = np.random.RandomState([self.seed, epoch]).permutation(self.windows)
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1} | {epoch: order}
        return self._orders[epoch][place]


def synthetic(vocab=64, seed=0, tokens=1 << 18):
    """A Corpus drawn from a fixed random Markov chain of order 1, whose entropies are known exactly.

    With the transition matrix P and its stationary distribution pi (pi P = pi), in nats per token:
    entropy_rate = -sum_i pi_i sum_j P_ij ln P_ij, unigram_entropy = -sum_i pi_i ln pi_i.
    On tokens a model has not seen, its expected loss is at least the entropy rate; that of a model that does
    not look at the previous token is at least the unigram entropy.
    """
    if vocab < 2 or tokens < 2:
        raise ValueError(f"vocab={vocab} and tokens={tokens} must be 2 or more.")
    draw = np.random.RandomState(seed)
    P = np.exp(3 * draw.standard_normal((vocab, vocab)))    # 3: far from uniform, yet every transition occurs
    P /= P.sum(axis=1, keepdims=True)
    balance = P.T - np.eye(vocab)
    balance[-1] = 1                                         # one equation is redundant; instead sum(pi) = 1
    pi = np.linalg.solve(balance, np.eye(vocab)[-1])
    upto, ids, state = P.cumsum(axis=1), np.empty(tokens, np.uint32), int(draw.choice(vocab, p=pi))
    upto[:, -1] = 1                                         # a sum may round to just under it
    for t, u in enumerate(draw.random_sample(tokens)):
        ids[t], state = state, int(upto[state].searchsorted(u))
    cut = round(tokens * (1 - HELD_OUT))
    numbers = Tokenizer(models.WordLevel({str(i): i for i in range(vocab)}, unk_token="0"))
    numbers.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Corpus(f"synthetic:{vocab}:{seed}:{tokens}", ids[:cut], ids[cut:], vocab, numbers,
                  hashlib.sha256(ids.tobytes()).hexdigest(), documents=1, text_bytes=0,
                  entropy_rate=float(-pi @ (P * np.log(P)).sum(axis=1)), unigram_entropy=float(-pi @ np.log(pi)))


def unigram_entropy(tokens):
    """Entropy of the frequencies of the tokens, nats per token.

    >>> unigram_entropy([0, 1, 0, 1]) == math.log(2)
    True
    """
    share = np.bincount(tokens) / len(tokens)
    return float(-(share[share > 0] @ np.log(share[share > 0])))


def train_tokenizer():
    """The embedded tokenizer, trained again: a byte-level BPE on the embedded text, the same every time."""
    coder = Tokenizer(models.BPE())
    coder.pre_tokenizer, coder.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = (piece for piece in open_source("embedded").stream() if piece != END)
    coder.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))      # all 256 bytes: any text encodes
    return coder


def _tokenizer(name):
    """A tokenizers.Tokenizer, and its token that ends a document ("" where it has none)."""
    if name is None:
        return Tokenizer.from_file(str(TOKENIZER)), END
    from transformers import AutoTokenizer
    try:
        coder = (hub := AutoTokenizer.from_pretrained(name)).backend_tokenizer
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"cannot load tokenizer={name} ({type(error).__name__}: {error}). Give the folder or hub "
                         "name of a fast tokenizer of transformers, or None for the embedded one.") from error
    coder.no_truncation()
    coder.no_padding()
    return coder, hub.eos_token or ""


def _shown(pieces, label, size):
    """The same pieces, with a progress bar on stderr when they take more than some seconds."""
    from tqdm import tqdm
    with tqdm(total=size, desc=label, unit="B", unit_scale=True, delay=3, mininterval=1, file=sys.stderr) as bar:
        for piece in pieces:
            yield piece
            bar.update(len(piece.encode()))


def _encoded(pieces, coder, end, dtype):
    """Token ids [tokens]; beside them only one BATCH of text is in memory."""
    parts, held, size = [], [], 0

    def encode():
        codes = coder.encode_batch_fast(held, add_special_tokens=False)
        parts.append(np.array([i for code in codes for i in code.ids], dtype))
    for piece in pieces:
        held.append(end if piece == END else piece)
        size += len(piece)
        if size >= BATCH:
            encode()
            held, size = [], 0
    encode()
    return np.concatenate(parts)


def _cached(path, make):
    """The array in the .npy file `path`; where that is missing or truncated, make() first gives its contents.

    A file appears whole, by os.replace. Of several processes one writes and the others wait, where the system
    has file locks (they end with their process); elsewhere each writes the same.
    """
    def read():
        with contextlib.suppress(OSError, ValueError, EOFError):
            return np.load(path, mmap_mode="r")

    if (found := read()) is not None:
        return found
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "wb") as lock:
            with contextlib.suppress(ImportError, OSError):
                import fcntl
                fcntl.flock(lock, fcntl.LOCK_EX)
            if (found := read()) is None:
                array = make()
                with open(part, "wb") as file:
                    np.save(file, array)
                os.replace(part, path)
                found = read()
    except OSError as error:
        raise OSError(f"cannot write the token cache {path} ({error}). Free some space, or give another folder "
                      "as cache.") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return found


def _main(arguments):
    if arguments[:1] == ["train"]:
        commit, coder = override({"commit": False}, arguments[1:], "yardstick.data")["commit"], train_tokenizer()
        same = TOKENIZER.is_file() and coder.to_str() == Tokenizer.from_file(str(TOKENIZER)).to_str()
        print(f"trained on Python {platform.python_version()}: {coder.get_vocab_size()} tokens, "
              f"{'the same as' if same else 'not the same as'} {TOKENIZER.name}")
        if commit:
            TOKENIZER.write_text(coder.to_str() + "\n")
            current = {"python": platform.python_version(), "sha256": load().sha256}
            REFERENCE.write_text(json.dumps(json.loads(REFERENCE.read_text()) | current, indent=1) + "\n")
        return
    settings = override({"data": "embedded", "tokenizer": Either(str), "window": 128}, arguments, "yardstick.data")
    corpus, window = load(settings["data"], settings["tokenizer"]), settings["window"]
    train, validation = len(corpus.train), len(corpus.validation)
    print(f"{corpus.name}: documents {corpus.documents:,}, vocabulary {corpus.vocab:,}\n"
          f"text: {corpus.text_bytes:,} bytes, {train + validation:,} tokens "
          f"({corpus.text_bytes / (train + validation):.2f} bytes per token)\n"
          f"training: {train:,} tokens, {train // window:,} windows of {window}\n"
          f"validation: {validation:,} tokens, {validation // window:,} windows of {window}\n"
          f"unigram entropy: {unigram_entropy(corpus.train):.4f} nats per token, the loss of a model that knows "
          f"frequencies alone (uniform: {math.log(corpus.vocab):.4f})\nsha256: {corpus.sha256}"
          + (f"\nnote: {corpus.note}" if corpus.note else ""))


if __name__ == "__main__":
    try:
        _main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"yardstick.data: {error}")
