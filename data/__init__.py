"""What a Domain is: one kind of data, built in or made from a user's own file."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module

import numpy as np

NAMES = ["sudoku", "text", "molecules", "images", "dna"]  # the built-in domains, each a file in this folder


class BadInput(Exception):
    """Something that the user gave cannot be used. The scripts print its message, one line, and stop."""


@dataclass
class Domain:
    """What the scripts know about a kind of data."""

    name: str
    vocab: list[str]  # the V tokens; the mask is not one of them
    length: int  # tokens in a sequence
    load: Callable | None = None  # () -> (train, val), streams [N] or rows [N, L]; None: no data at hand
    score: Callable = lambda samples, reference: {}  # tokens [N, L], real ones [M, L] -> {measure: value}
    quality: str = "unigram entropy"  # the measure to show first; the study computes this one for any domain
    steps: int | None = None  # sampling steps by default; None: one for each token, at most 64
    end: str | None = None  # the token that closes and pads a sequence; it is predicted like any other
    join: str = ""  # what is written between tokens: " " if they are words or numbers
    cell: Callable | None = None  # token -> how a terminal shows it; None: as it is in vocab
    row: int | None = None  # tokens in a row of a grid or an image; None: flowing text
    grey: bool = False  # whether the tokens are levels of grey, from black to white
    wrong: Callable | None = None  # tokens [N, L] -> bool [N, L], the positions that break a rule
    entropy: float | None = None  # of the data, in nats per sequence, if it is known exactly
    source: dict = field(default_factory=dict)  # of a user's file: "path", "lines", "vocab"

    def __post_init__(self):
        self.steps = self.steps or min(64, self.length)

    @cached_property
    def index(self):
        return {token: i for i, token in enumerate(self.vocab)}

    def encode(self, string):
        """A string -> the list of its tokens, without an end. Raises KeyError for one not in vocab."""
        return [self.index[token] for token in (string.split() if self.join else string)]

    def decode(self, tokens):
        """Tokens [L] -> the string before the first end token."""
        words = [self.vocab[token] for token in tokens]
        return self.join.join(words[: words.index(self.end)] if self.end in words else words)


def get(name, lines=False, length=None, vocab=None):
    """The domain `name`: one of NAMES, or the path of a user's own file. Raises BadInput.
    The other arguments are for such a file; data/own.py explains them."""
    if name not in NAMES:
        return import_module("data.own").from_file(name, lines, length, vocab)
    if lines or length or vocab:
        raise BadInput(f"--data {name}: --lines, --length and --vocab are for a file of your own")
    return import_module(f"data.{name}").domain()


def from_info(info):
    """The domain of a model, from what its file remembers (model.info). Without the data it has no load."""
    name, vocab, length, source = info["data"], info["vocab"], info["length"], info.get("source") or {}
    if name in NAMES:
        return get(name)
    if source:
        own = source.get("length", length - 1 if source["lines"] else length)  # older files do not have it
        try:
            return with_vocabulary_of(get(source["path"], source["lines"], own, source["vocab"]), info)
        except BadInput:  # the file was moved, or is no longer what it was
            pass
    return Domain(name, vocab, length, end=info["end"], join=info.get("join", ""), source=source)


def with_vocabulary_of(domain, info):
    """The domain in the tokens of a model of other data (model.info), so that the model can be adapted to it.

    Lines are padded to the model's length. Raises BadInput if the domain has tokens that the model has never
    seen, or sequences of another length.
    """
    vocab, length = info["vocab"], info["length"]
    if (domain.vocab, domain.length) == (vocab, length):
        return domain
    index = {token: i for i, token in enumerate(vocab)}
    if unknown := [token for token in domain.vocab if token not in index]:
        shown = ", ".join(map(repr, unknown[:20])) + ", ..." * (len(unknown) > 20)
        raise BadInput(f"{domain.name}: {len(unknown)} tokens that the model has never seen: {shown}")
    if domain.length != length and not (domain.end and domain.length < length):
        raise BadInput(f"{domain.name}: sequences of {domain.length} tokens, expected {length} (--length)")
    new = np.array([index[token] for token in domain.vocab], dtype=np.int32)  # [V], the model's tokens
    missing = ((0, 0), (0, length - domain.length))  # of rows [N, L]; a stream [N] has no end

    def load():
        parts = [new[part] for part in domain.load()]
        return [np.pad(part, missing[-part.ndim :], mode="edge") for part in parts]  # repeats the end

    return replace(domain, vocab=vocab, length=length, steps=None, load=load)


def split(tokens):
    """Tokens -> (train, val), nine tenths and one. Rows are shuffled first: files are often sorted."""
    if tokens.ndim == 2:
        tokens = tokens[np.random.default_rng(0).permutation(len(tokens))]
    cut = len(tokens) - len(tokens) // 10
    return tokens[:cut], tokens[cut:]


def windows(tokens, length, most=None):
    """Rows [N, L] as they are; a stream [N] as the rows [N // length, length] that it is cut into.
    If there are more than `most`, only that many, spread evenly from the first to the last."""
    if tokens.ndim == 1:
        tokens = tokens[: len(tokens) // length * length].reshape(-1, length)
    return tokens[np.linspace(0, len(tokens) - 1, min(len(tokens), most or len(tokens))).round().astype(int)]
