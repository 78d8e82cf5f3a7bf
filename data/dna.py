"""DNA: genes of four bacteria, a base a token. Source: data/README.md.

A sequence is 42 codons, in the reading frame, of an open reading frame: ATG and what follows up to a stop.
"""

from functools import cache
from pathlib import Path

import numpy as np

from data import Domain

FILE = Path(__file__).with_name("dna.npz")
CODONS = 42  # in a sequence
SHORTEST = 200  # codons: a longer open reading frame is hardly ever there by chance
# The genetic code: the amino acid of each codon, AAA, AAC, AAG, AAT, ACA, ... TTT; * is a stop.
CODE = "KNKNTTTTRSRSIIMIQHQHPPPPRRRRLLLLEDEDAAAAGGGGVVVV*Y*YSSSS*CWCLFLF"
AMINO_ACIDS = sorted(set(CODE))  # 20 and the stop
AMINO_ACID = np.array([AMINO_ACIDS.index(letter) for letter in CODE])  # [64]
STOP = np.array([letter == "*" for letter in CODE])  # [64]
ATG = 14


def domain():
    return Domain("dna", list("ACGT"), 3 * CODONS, load, score, "open")


def codons(bases):
    """Bases [..., 3 n], A C G T = 0 to 3 -> codons [..., n], 0 to 63."""
    return bases.reshape(*bases.shape[:-1], -1, 3).astype(np.int64) @ np.array([16, 4, 1])


def open_reading_frames(bases):
    """[(first, last base + 1)] of each ATG...stop, stop excluded, of SHORTEST codons at least, in bases."""
    found = []
    for frame in range(3):
        c = codons(bases[frame:][: (len(bases) - frame) // 3 * 3])
        starts, stops = np.flatnonzero(c == ATG), np.flatnonzero(STOP[c])
        first = np.searchsorted(starts, np.concatenate(([0], stops[:-1] + 1)))  # the first ATG after a stop
        for start, stop in zip(np.append(starts, len(c))[first], stops):
            if stop - start >= SHORTEST:
                found.append((frame + 3 * start, frame + 3 * stop))
    return found


def genes(bases):
    """Sequences [N, 126] from both strands of bases: of frames that overlap, the longest is the gene."""
    strands, length = (bases, 3 - bases[::-1]), len(bases)  # the other strand: complement, read backwards
    frames = [(a, b, 0) for a, b in open_reading_frames(strands[0])]
    frames += [(a, b, 1) for a, b in open_reading_frames(strands[1])]
    taken, rows = np.zeros(length, dtype=bool), []
    for a, b, strand in sorted(frames, key=lambda frame: frame[0] - frame[1]):  # the longest first
        here = slice(a, b) if strand == 0 else slice(length - b, length - a)
        if not taken[here].any():
            taken[here] = True
            gene = strands[strand][a:b]
            rows.append(gene[: len(gene) // (3 * CODONS) * 3 * CODONS].reshape(-1, 3 * CODONS))
    return np.concatenate(rows)


@cache
def load():
    """(train, val): rows [N, 126] of tokens. The last tenth of each chromosome is val."""
    train, val = [], []
    with np.load(FILE, allow_pickle=False) as file:
        for species in file.files:
            packed = file[species]  # four bases in each byte, the first in the high bits
            bases = ((packed[:, None] >> np.array([6, 4, 2, 0], dtype=np.uint8)) & 3).reshape(-1)
            cut = len(bases) * 9 // 10
            train.append(genes(bases[:cut]))
            val.append(genes(bases[cut:]))
    return np.concatenate(train), np.concatenate(val)


def jensen_shannon(p, q):
    """Jensen-Shannon divergence of two distributions, in bits: 0 for equal, 1 for disjoint."""
    m = (p + q) / 2
    kl = [(a * np.log2(np.where(a > 0, a, 1) / np.where(m > 0, m, 1))).sum() for a in (p, q)]
    return float(sum(kl) / 2)


def shares(values, kinds):
    """The distribution [kinds] of integer values."""
    counts = np.bincount(values.reshape(-1), minlength=kinds)
    return counts / counts.sum()


def score(samples, reference):
    """{measure: value} of samples [N, 126]; divergences, in bits, from real sequences [M, 126].

    open: the share of sequences without a stop inside, as all real ones are. JS codons, JS amino acids: of
    the use of codons, and of pairs of neighbouring amino acids; a finite sample has a divergence of its own,
    the more the smaller it is: compare with as many real sequences.
    """
    a, b = codons(samples), codons(reference)
    pairs = [AMINO_ACID[x[:, :-1]] * 21 + AMINO_ACID[x[:, 1:]] for x in (a, b)]
    return {
        "open": float((~STOP[a]).all(1).mean()),
        "JS codons": jensen_shannon(shares(a, 64), shares(b, 64)),
        "JS amino acids": jensen_shannon(shares(pairs[0], 441), shares(pairs[1], 441)),
    }
