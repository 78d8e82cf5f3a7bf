"""DNA: genes of four bacteria. A token is a base. Source and licence: data/README.md.

A gene is taken to be a long open reading frame: ATG and the codons that follow, up to a stop codon. It is cut
into sequences of 42 codons.
"""

from functools import cache
from pathlib import Path

import numpy as np

from data import Domain

FILE = Path(__file__).with_name("dna.npz")
CODONS = 42  # in a sequence
SHORTEST = 200  # codons in a gene; a frame of this length is hardly ever open by chance
# The genetic code: the amino acid of the codons AAA, AAC, AAG, AAT, ACA, ... TTT. An asterisk is a stop.
CODE = "KNKNTTTTRSRSIIMIQHQHPPPPRRRRLLLLEDEDAAAAGGGGVVVV*Y*YSSSS*CWCLFLF"
AMINO_ACIDS = sorted(set(CODE))  # 20 of them, and the stop
AMINO_ACID = np.array([AMINO_ACIDS.index(letter) for letter in CODE])  # [64]
STOP = np.array([letter == "*" for letter in CODE])  # [64]
ATG = 14  # as a codon


def domain():
    return Domain("dna", list("ACGT"), length=3 * CODONS, load=load, score=score, quality="open")


def codons(bases):
    """Bases [..., 3 n] -> codons [..., n], 0 to 63."""
    return bases.reshape(*bases.shape[:-1], -1, 3).astype(np.int64) @ np.array([16, 4, 1])


def open_reading_frames(bases, shortest=SHORTEST):
    """[(start, end)] of each ATG...stop of at least `shortest` codons in bases [N], without its stop."""
    found = []
    for frame in range(3):
        c = codons(bases[frame:][: (len(bases) - frame) // 3 * 3])
        starts, stops = np.flatnonzero(c == ATG), np.flatnonzero(STOP[c])
        after = np.searchsorted(starts, np.concatenate(([0], stops[:-1] + 1)))  # the first ATG after a stop
        for start, stop in zip(np.append(starts, len(c))[after], stops):
            if stop - start >= shortest:
                found.append((frame + 3 * start, frame + 3 * stop))
    return found


def genes(bases, shortest=SHORTEST):
    """The genes on both strands of bases [N], cut into sequences [M, 126]. Where two overlap, the longer
    one is the gene."""
    strands = (bases, 3 - bases[::-1])  # the other strand has the complements and is read backwards
    frames = [(*frame, s) for s in (0, 1) for frame in open_reading_frames(strands[s], shortest)]
    taken = np.zeros(len(bases), dtype=bool)
    places = (taken, taken[::-1])  # two views of the same array
    rows = []
    for start, end, s in sorted(frames, key=lambda frame: frame[0] - frame[1]):  # the longest first
        if not places[s][start:end].any():
            places[s][start:end] = True
            whole = (end - start) // (3 * CODONS) * 3 * CODONS
            rows.append(strands[s][start : start + whole].reshape(-1, 3 * CODONS))
    return np.concatenate(rows)


@cache
def load():
    """(train, val): rows [N, 126] of tokens. The last tenth of each chromosome is held out."""
    train, val = [], []
    with np.load(FILE, allow_pickle=False) as file:
        for species in file.files:
            packed = file[species]  # four bases in each byte, the first in the high bits
            bases = ((packed[:, None] >> np.array([6, 4, 2, 0], dtype=np.uint8)) & 3).reshape(-1)
            cut = len(bases) * 9 // 10
            train.append(genes(bases[:cut]))
            val.append(genes(bases[cut:]))
    return np.concatenate(train), np.concatenate(val)


def shares(values, kinds):
    """How often each of the integers 0 to kinds - 1 occurs in values, as a distribution [kinds]."""
    counts = np.bincount(values.reshape(-1), minlength=kinds)
    return counts / counts.sum()


def jensen_shannon(p, q):
    """The Jensen-Shannon divergence of two distributions, in bits: 0 if they are equal, 1 if disjoint."""
    m = (p + q) / 2
    kl = [(a * np.log2(np.where(a > 0, a, 1) / np.where(m > 0, m, 1))).sum() for a in (p, q)]
    return float(sum(kl) / 2)


def score(samples, reference):
    """Measures of samples [N, 126] against real sequences [M, 126].

    open: the share of samples that have no stop codon, as all real ones have none. JS codons and JS amino
    acids: the Jensen-Shannon divergence, in bits, of the use of codons and of pairs of neighbouring amino
    acids. Both grow as N falls, so that only divergences for the same N can be compared.
    """
    a, b = codons(samples), codons(reference)  # [N, 42]
    pairs = [AMINO_ACID[c[:, :-1]] * len(AMINO_ACIDS) + AMINO_ACID[c[:, 1:]] for c in (a, b)]  # [N, 41]
    return {
        "open": float((~STOP[a]).all(1).mean()),
        "JS codons": jensen_shannon(shares(a, 64), shares(b, 64)),
        "JS amino acids": jensen_shannon(*(shares(p, len(AMINO_ACIDS) ** 2) for p in pairs)),
    }
