"""What a domain is, and how it is found: by its name, or made on the spot from a user's own file."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

NAMES = ["sudoku", "text", "molecules", "images", "dna"]  # the built-in ones: a file in this folder for each


@dataclass
class Domain:
    """What the scripts know of a kind of data. A built-in domain and a user's file are the same type."""

    name: str
    vocab: list[str]  # the V tokens; the mask is not one of them
    length: int  # tokens in a sequence
    load: Callable | None = None  # () -> (train, val), streams [N] or rows [N, L]; None: no data at hand
    score: Callable = lambda samples, reference: {}  # tokens [N, L], real ones [M, L] -> {measure: value}
    quality: str = "unigram entropy"  # the measure that tables and figures show where there is no scoring model
    end: str | None = None  # the token that closes and pads a sequence, predicted like any other
    join: str = ""  # written between tokens; " " for tokens that are words or numbers
    cell: Callable | None = None  # token id -> how a terminal shows it; None: as it is written
    row: int | None = None  # tokens in each line of a picture or grid; None: flowing text
    grey: bool = False  # tokens are levels of grey, from black to white
    wrong: Callable | None = None  # tokens [N, L] -> bool [N, L]: the positions that break a rule
    entropy: float | None = None  # of the data, exactly, nats per sequence, where it is known
    source: dict = field(default_factory=dict)  # of a user's file: "path", "lines", "vocab"

    @cached_property
    def index(self):
        return {token: i for i, token in enumerate(self.vocab)}

    def encode(self, string):
        """A string -> a list of tokens, without the end. Raises KeyError for one that is not in vocab."""
        return [self.index[token] for token in (string.split() if self.join else string)]

    def decode(self, tokens):
        """Tokens -> the string before the first end token."""
        tokens = [self.vocab[i] for i in tokens]
        return self.join.join(tokens[: tokens.index(self.end)] if self.end in tokens else tokens)


def get(name, lines=False, length=None, vocab=None):
    """The domain `name`: one of NAMES, or the path of one's own file. Raises ValueError, in one line.

    A file is UTF-8 text, one long stream of characters, or with `lines` one sequence per line; or .npy
    integers, a stream [N] or rows [N, L], and `vocab`, a file with a token per line, says what they mean.
    `length` is the window of a stream, or the longest line that is kept (128); rows have their own.
    """
    if name in NAMES:
        if lines or length or vocab:
            raise ValueError(f"--data {name}: --lines, --length and --vocab are for a file of your own")
        return importlib.import_module(f"data.{name}").domain()
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"--data {name}: no such file, and not one of {', '.join(NAMES)}")
    label = f"my-{path.stem}" if path.stem in NAMES else path.stem  # never the name of a built-in domain
    if path.suffix == ".npy":
        domain, tokens = from_tokens(label, path, length, vocab)
    elif lines:
        domain, tokens = from_lines(label, path, length or 128)
    else:
        domain, tokens = from_text(label, path, length or 128)
    least = 40 if tokens.ndim == 2 else 40 * domain.length  # so that the last tenth holds four windows
    unit = "tokens" if tokens.ndim == 1 else "sequences"
    expect(len(tokens) >= least, path, f"{len(tokens)} {unit}", f"at least {least}")
    vocab = vocab and str(Path(vocab).resolve())
    domain.source = {"path": str(path.resolve()), "lines": lines, "vocab": vocab}
    domain.load = lambda: split(tokens)
    return domain


def expect(right, path, found, expected):
    if not right:
        raise ValueError(f"{path}: {found}, expected {expected}")


def split(tokens):
    """Tokens -> (train, val). A tenth is val: a stream's end; random rows, since rows are often sorted."""
    if tokens.ndim == 2:
        tokens = tokens[np.random.default_rng(0).permutation(len(tokens))]
    cut = len(tokens) - len(tokens) // 10
    return tokens[:cut], tokens[cut:]


def read(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8, expected a text file or an .npy of integers") from None


def from_text(name, path, length):
    text = read(path)
    domain = Domain(name, sorted(set(text)), length)
    return domain, np.array(domain.encode(text), dtype=np.int32)  # [N]


def from_lines(name, path, longest, end="<end>"):
    lines = [line for line in read(path).split("\n") if line]
    kept = [line for line in lines if len(line) <= longest]
    if len(kept) < len(lines):
        left_out = f"{len(lines) - len(kept)} of {len(lines)} lines are longer than {longest}, left out"
        print(f"{path}: {left_out}", file=sys.stderr)
    length = max(map(len, kept), default=0) + 1  # room for the end
    domain = Domain(name, [*sorted(set("".join(kept))), end], length, end=end)
    rows = np.full((len(kept), length), domain.index[end], dtype=np.int32)  # [N, L]
    for row, line in zip(rows, kept):
        row[: len(line)] = domain.encode(line)
    return domain, rows


def from_tokens(name, path, length, vocab):
    try:
        tokens = np.load(path, allow_pickle=False)  # [N] or [N, L]
    except (ValueError, EOFError):
        raise ValueError(f"{path}: damaged, or not an .npy file of integers") from None
    right = tokens.dtype.kind in "iu" and tokens.ndim in (1, 2) and tokens.size
    expect(right, path, f"{tokens.dtype} {tokens.shape}", "integers, a stream [N] or rows [N, L]")
    low, high = int(tokens.min()), int(tokens.max())
    expect(low >= 0, path, f"a token {low}", "0 or more")
    words = read(vocab).removesuffix("\n").split("\n") if vocab else [str(i) for i in range(high + 1)]
    expect(high < len(words), vocab, f"{len(words)} lines", f"one for each token, 0 to {high}")
    if tokens.ndim == 2:
        own = tokens.shape[1]
        expect(length in (None, own), path, f"--length {length}", f"that of the rows, {own}")
        length = own
    return Domain(name, words, length or 128, join=" "), tokens


def from_info(info):
    """The domain of a model, from what the model file remembers. Without the data it has no load."""
    name, vocab, length, source = info["data"], info["vocab"], info["length"], info.get("source", {})
    if name in NAMES:
        return get(name)
    try:
        longest = length - 1 if source["lines"] else length  # the end token was added
        domain = get(source["path"], source["lines"], longest, source["vocab"])
        if (domain.vocab, domain.length) == (vocab, length):
            return domain
    except (KeyError, ValueError, OSError):  # the file was moved, or is no longer what it was
        pass
    return Domain(name, vocab, length, end=info["end"], join=info.get("join", ""), source=source)


def windows(rows, length, most=None):
    """A stream [N] cut into windows [N // length, length], end to end; rows [N, L] as they are.
    If there are more than `most`, that many, spread evenly from the first to the last."""
    if rows.ndim == 1:
        rows = rows[: len(rows) // length * length].reshape(-1, length)
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), most or len(rows))).round().astype(int)]
