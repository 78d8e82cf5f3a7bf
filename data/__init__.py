"""Finds a domain: by the name of a file in this folder, or made on the spot from a user's own file."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np

HERE = Path(__file__).parent
NAMES = sorted(p.stem for p in HERE.glob("*.py") if p.stem != "__init__")


def get(name, lines=False):
    """The domain `name`: one of NAMES, or the path of a file: UTF-8 text, one sequence a line with `lines`,
    or a .npy of integers [N, L]. Raises ValueError, in one line, for a file that cannot be used."""
    if name in NAMES:
        if lines:
            raise ValueError(f"--lines with --data {name}: it is for a file of your own")
        return importlib.import_module(f"data.{name}")
    path = Path(name)
    label = path.stem if path.stem not in NAMES else f"my-{path.stem}"  # never the name of a built-in domain
    if not path.is_file():
        raise ValueError(f"--data {name}: no such file, and not one of {', '.join(NAMES)}")
    if path.suffix == ".npy":
        return from_tokens(path, label)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"--data {name}: not UTF-8 text, expected a text file or a .npy of integers") from None
    return from_lines(path, label, text) if lines else from_text(path, label, text)


def from_vocab(vocab, length, name, end=None, join=""):
    """A domain that is only a vocabulary: all that sampling needs of a user's own data."""
    index = {token: i for i, token in enumerate(vocab)}

    def encode(string):
        return [index[token] for token in (string if join == "" else string.split())]

    def decode(tokens):
        tokens = [vocab[i] for i in tokens]
        return join.join(tokens[: tokens.index(end)] if end in tokens else tokens)

    return SimpleNamespace(
        __name__=name, vocab=vocab, length=length, end=end, join=join, encode=encode, decode=decode, score=lambda *_: {}
    )


def from_text(path, label, text, length=128):
    if len(text) < 20 * length:  # the last tenth must hold at least one window, and be more than one
        raise ValueError(f"--data {path}: {len(text)} characters, expected at least {20 * length}")
    domain = from_vocab(sorted(set(text)), length, label)
    stream = np.array(domain.encode(text), dtype=np.int32)
    domain.load = lambda: (stream[: len(stream) * 9 // 10], stream[len(stream) * 9 // 10 :])
    return domain


def split(rows):
    """Rows [N, L] -> (train, val), a tenth of them for val, shuffled first, because files are often sorted."""
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    cut = len(rows) - len(rows) // 10
    return rows[:cut], rows[cut:]


def from_lines(path, label, text, end="<end>"):
    lines = [line for line in text.split("\n") if line]
    if len(lines) < 20:
        raise ValueError(f"--data {path}: {len(lines)} lines that are not empty, expected at least 20")
    length = max(map(len, lines)) + 1  # room for the end token, which also pads, and is predicted like any other
    domain = from_vocab(sorted(set("".join(lines))) + [end], length, label, end)
    rows = np.full((len(lines), length), len(domain.vocab) - 1, dtype=np.int32)
    for row, line in zip(rows, lines):
        row[: len(line)] = domain.encode(line)
    domain.load = lambda: split(rows)
    return domain


def from_tokens(path, label):
    try:
        rows = np.load(path, allow_pickle=False)
    except Exception:  # a damaged file raises nearly anything
        raise ValueError(f"--data {path}: not an .npy file, or a damaged one") from None
    if not isinstance(rows, np.ndarray):
        raise ValueError(f"--data {path}: an .npz, expected an .npy file of integers")
    if rows.ndim != 2 or rows.dtype.kind not in "iu" or len(rows) < 20 or rows.shape[1] < 1:
        raise ValueError(f"--data {path}: {rows.dtype} {rows.shape}, expected integers [N >= 20, L]")
    if rows.min() < 0 or rows.max() >= 10**6:  # every token up to the largest has an embedding
        raise ValueError(f"--data {path}: tokens {rows.min()} to {rows.max()}, expected 0 to 10**6 - 1")
    domain = from_vocab([str(i) for i in range(int(rows.max()) + 1)], rows.shape[1], label, join=" ")
    domain.load = lambda: split(rows)
    return domain


def from_info(info):
    """The domain that a model was trained on, from what the model file remembers: no data file is needed."""
    if info["data"] in NAMES:
        return get(info["data"])
    return from_vocab(info["vocab"], info["length"], info["data"], info["end"], info.get("join", ""))
