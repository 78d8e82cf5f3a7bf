"""Text: nine plays of Shakespeare, a character a token. Source and licence: data/README.md.

Copy this file to add a domain of your own, and its name to NAMES in data/__init__.py.
"""

import gzip
import re
from functools import cache
from pathlib import Path

import numpy as np

from data import Domain

FILE = Path(__file__).with_name("text.txt.gz")


@cache
def read():
    return gzip.decompress(FILE.read_bytes()).decode("utf-8")


@cache
def domain():
    vocab = sorted(set(read()))  # 61 characters
    length = 128  # characters in a window: some three lines of verse
    return Domain("text", vocab, length, load, score, "words")


@cache
def load():
    """(train, val): two unbroken streams [N] of tokens, cut into windows where they are used."""
    stream = np.array(domain().encode(read()), dtype=np.uint8)
    cut = len(stream) * 9 // 10  # the last tenth is mostly Julius Caesar, whose names are new
    return stream[:cut], stream[cut:]


@cache
def known_words():
    text = read()
    return frozenset(re.findall(r"[a-z']+", text[: len(text) * 9 // 10].lower()))


def score(samples, reference):
    """{measure: value} of samples [N, L]. words: the share of the words that occur in the training plays.
    A window's first and last word may be cut and do not count."""
    words = [word for row in samples for word in re.findall(r"[a-z']+", domain().decode(row).lower())[1:-1]]
    return {"words": sum(word in known_words() for word in words) / max(1, len(words))}
