"""Molecules: QM9, at most nine heavy atoms, as SMILES, a character a token, with an end token.
Source: data/README.md."""

import gzip
import re
from functools import cache
from pathlib import Path

import numpy as np

from data import Domain

FILE = Path(__file__).with_name("molecules.txt.gz")
END = "<end>"


@cache
def domain():
    vocab = [*"#()+-12345=CFHNO[]", END]
    length = 32  # the longest has 28 characters
    return Domain("molecules", vocab, length, load, score, "valid", end=END)


@cache
def read():
    """All molecules, shuffled: the file is sorted by size."""
    lines = gzip.decompress(FILE.read_bytes()).decode().split()
    return [lines[i] for i in np.random.default_rng(0).permutation(len(lines))]


@cache
def load():
    """(train, val): rows [N, 32] of tokens. A tenth is val."""
    rows = np.full((len(read()), 32), domain().index[END], dtype=np.uint8)
    for row, smiles in zip(rows, read()):
        row[: len(smiles)] = domain().encode(smiles)
    cut = len(rows) * 9 // 10
    return rows[:cut], rows[cut:]


@cache
def rdkit():
    """RDKit's Chem module, silenced; None, and one line that says so, if it is not installed."""
    try:
        from rdkit import Chem, RDLogger
    except ImportError:
        print("molecules: validity, uniqueness and novelty need RDKit: pip install rdkit")
        return None
    RDLogger.DisableLog("rdApp.*")
    return Chem


def canonical(smiles):
    """RDKit's canonical form, None if it is no molecule. One molecule has many SMILES: compare these."""
    molecule = rdkit().MolFromSmiles(smiles) if smiles else None
    return molecule and rdkit().MolToSmiles(molecule)


@cache
def known():
    return frozenset(map(canonical, read()[: len(read()) * 9 // 10]))


def closed(smiles):
    """Whether brackets match and ring bonds are closed: needed for validity, and checked without RDKit."""
    depth, smiles = 0, re.sub(r"\[[^][]*\]", "", smiles)  # in brackets a digit counts hydrogens
    for character in smiles:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0 and not set("[]") & set(smiles) and all(smiles.count(ring) % 2 == 0 for ring in "12345")


def score(samples, reference):
    """{measure: value} of samples [N, 32], all shares of N, as molecules are counted in the literature.

    closed: brackets and ring bonds match. By RDKit, if it is there: valid, a molecule at all; unique,
    the different ones among the valid; novel, those of them that are not in the training set; all, the
    product of the three, which is the share of N that is valid, unique and novel at once.
    """
    strings = [domain().decode(row) for row in samples]
    values = {"closed": sum(map(closed, strings)) / len(strings)}
    if rdkit():
        valid = [c for c in map(canonical, strings) if c]
        unique = set(valid)
        novel = unique - known()
        values |= {
            "valid": len(valid) / len(strings),
            "unique": len(unique) / max(1, len(valid)),
            "novel": len(novel) / max(1, len(unique)),
            "all": len(novel) / len(strings),
        }
    return values
