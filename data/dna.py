"""DNA: the first 1.2 million bases of four bacterial chromosomes, a base a token. Source: data/README.md."""

from functools import cache
from pathlib import Path

import numpy as np

from data import Domain
from data.measures import jensen_shannon

FILE = Path(__file__).with_name("dna.npz")
LENGTH = 128  # bases in a window


def domain():
    return Domain("dna", list("ACGT"), LENGTH, load, score, "JS 3-mers")


@cache
def load():
    """(train, val): streams [N] of tokens, one species after the other. A tenth of each, its end, is val."""
    train, val = [], []
    with np.load(FILE, allow_pickle=False) as file:
        for species in file.files:
            packed = file[species]  # four bases in each byte, the first in the high bits
            bases = ((packed[:, None] >> np.array([6, 4, 2, 0], dtype=np.uint8)) & 3).reshape(-1)
            cut = len(bases) * 9 // 10
            train.append(bases[:cut])
            val.append(bases[cut:][: (len(bases) - cut) // LENGTH * LENGTH])  # no window spans two species
    return np.concatenate(train), np.concatenate(val)


def kmers(rows, k):
    """The distribution [4^k] of the k-mers in rows [N, L]."""
    powers = 4 ** np.arange(k)[::-1]
    codes = np.lib.stride_tricks.sliding_window_view(rows, k, axis=1).astype(np.int64) @ powers
    counts = np.bincount(codes.reshape(-1), minlength=4**k)
    return counts / counts.sum()


def gc(rows):
    """The distribution [20] of the GC content of rows [N, L]: two species are poor in it, one is rich."""
    share = ((rows == 1) | (rows == 2)).mean(1)  # C or G
    counts = np.histogram(share, bins=20, range=(0, 1))[0]
    return counts / counts.sum()


def score(samples, reference):
    """{measure: value}: divergences, in bits, of samples [N, L] from real windows [M, L]; less is better.
    A finite sample has one of its own, the more the smaller it is: compare with as many real windows."""
    values = {f"JS {k}-mers": jensen_shannon(kmers(samples, k), kmers(reference, k)) for k in (3, 6)}
    return values | {"JS GC": jensen_shannon(gc(samples), gc(reference))}
