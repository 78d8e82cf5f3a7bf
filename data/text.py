"""Text: nine plays of Shakespeare, a character a token. Copy this file to add a domain of your own.

A domain file says everything about its domain and knows nothing of models: `vocab`, `length`,
`load() -> (train, val)`, `encode`, `decode`, and `score`, its own measure of quality. Source and
licence: data/README.md.
"""

import gzip
import re
from functools import cache
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("text.txt.gz")
length = 128  # characters a window: some three lines of verse


@cache
def read():
    return gzip.decompress(FILE.read_bytes()).decode("utf-8")


vocab = sorted(set(read()))  # 61 characters
index = {character: i for i, character in enumerate(vocab)}


def encode(string):
    """A string -> a list of tokens. Raises KeyError for a character that the plays do not have."""
    return [index[character] for character in string]


def decode(tokens):
    """Tokens -> a string."""
    return "".join(vocab[i] for i in tokens)


def load():
    """(train, val): two unbroken streams [N] of tokens, cut into windows by whoever uses them. The last tenth is val."""
    stream = np.array(encode(read()), dtype=np.uint8)
    cut = len(stream) * 9 // 10  # the end of the last plays: mostly Julius Caesar, whose names are new
    return stream[:cut], stream[cut:]


@cache
def known_words():
    text = read()
    return frozenset(re.findall(r"[a-z']+", text[: len(text) * 9 // 10].lower()))


def score(samples, reference):
    """{measure: value} of samples [N, L]. reference [M, L], real windows, is not needed here.

    words: the share of the words that occur in the training plays. A window's first and last word
    may be cut and do not count.
    """
    words = [word for row in samples for word in re.findall(r"[a-z']+", decode(row).lower())[1:-1]]
    return {"words": sum(word in known_words() for word in words) / max(1, len(words))}
