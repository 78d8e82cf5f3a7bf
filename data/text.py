"""Text: nine plays of Shakespeare. A token is a character. Source and licence: data/README.md.

To add a domain, copy this file and add its name to NAMES in data/__init__.py.
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
    return Domain(
        name="text",
        vocab=sorted(set(read())),  # 61 characters
        length=128,  # about three lines of verse
        load=load,
        score=score,
        quality="words",
    )


@cache
def load():
    """(train, val): two streams [N] of tokens. They are cut into windows where they are used."""
    stream = np.array(domain().encode(read()), dtype=np.uint8)
    cut = len(stream) * 9 // 10  # the last tenth is mostly Julius Caesar, whose names are new
    return stream[:cut], stream[cut:]


def words_of(text):
    return re.findall(r"[a-z']+", text.lower())


@cache
def known_words():
    """The words of the training plays."""
    text = read()
    return frozenset(words_of(text[: len(text) * 9 // 10]))


def score(samples, reference):
    """The share of the words in samples [N, L] that occur in the training plays.
    The first and the last word of a sample may be cut off, so they do not count."""
    words = [word for row in samples for word in words_of(domain().decode(row))[1:-1]]
    return {"words": sum(word in known_words() for word in words) / max(1, len(words))}
