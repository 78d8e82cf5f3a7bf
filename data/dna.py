"""DNA: the first 1.2 million bases of four bacterial chromosomes, a base a token. Source: data/README.md."""

from functools import cache
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("dna.npz")
length = 128  # bases a window
vocab = list("ACGT")
index = {base: i for i, base in enumerate(vocab)}


def encode(string):
    """A string of ACGT -> a list of tokens. Raises KeyError for another letter."""
    return [index[base] for base in string]


def decode(tokens):
    """Tokens -> a string."""
    return "".join(vocab[i] for i in tokens)


@cache
def load():
    """(train, val): two streams [N] of tokens, one species after the other. The last tenth of each species is val."""
    train, val = [], []
    with np.load(FILE, allow_pickle=False) as file:
        for species in file.files:
            packed = file[species]  # four bases a byte, the first in the high bits
            bases = ((packed[:, None] >> np.array([6, 4, 2, 0], dtype=np.uint8)) & 3).reshape(-1)
            cut = len(bases) * 9 // 10
            train.append(bases[:cut])
            val.append(bases[cut:][: (len(bases) - cut) // length * length])  # whole windows: none spans two species
    return np.concatenate(train), np.concatenate(val)


def kmers(rows, k):
    """The distribution [4^k] of the k-mers in rows [N, L]."""
    powers = 4 ** np.arange(k)[::-1]
    codes = np.lib.stride_tricks.sliding_window_view(rows, k, axis=1).astype(np.int64) @ powers
    counts = np.bincount(codes.reshape(-1), minlength=4**k)
    return counts / counts.sum()


def gc(rows):
    """The distribution [20] of the GC content of rows [N, L]: two of the species are poor in it, one is rich."""
    share = ((rows == index["C"]) | (rows == index["G"])).mean(1)
    counts = np.histogram(share, bins=20, range=(0, 1))[0]
    return counts / counts.sum()


def jensen_shannon(p, q):
    """Jensen-Shannon divergence of two distributions, in bits: 0 for equal, 1 for disjoint."""
    m = (p + q) / 2
    kl = lambda a: (a * np.log2(np.where(a > 0, a, 1) / np.where(m > 0, m, 1))).sum()  # noqa: E731
    return float((kl(p) + kl(q)) / 2)


def score(samples, reference):
    """{measure: value}: divergences, in bits, of samples [N, L] from reference [M, L], real windows; less is better.

    A finite sample has a divergence of its own, the more the smaller it is: compare with as many real windows.
    """
    values = {f"JS {k}-mers": jensen_shannon(kmers(samples, k), kmers(reference, k)) for k in (3, 6)}
    return values | {"JS GC": jensen_shannon(gc(samples), gc(reference))}
