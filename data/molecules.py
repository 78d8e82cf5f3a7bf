"""Molecules: QM9, molecules of at most nine heavy atoms, as SMILES strings. A token is a character.
Source and licence: data/README.md."""

import gzip
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np

from data import Domain

FILE = Path(__file__).with_name("molecules.txt.gz")
END = "<end>"


def domain():
    return Domain(
        name="molecules",
        vocab=[*"#()+-12345=CFHNO[]", END],
        length=32,  # the longest string has 28 characters
        load=load,
        score=score,
        quality="valid",
        end=END,
    )


@cache
def read():
    """All SMILES strings, shuffled, because the file is sorted by size."""
    lines = gzip.decompress(FILE.read_bytes()).decode().split()
    return [lines[i] for i in np.random.default_rng(0).permutation(len(lines))]


@cache
def load():
    """(train, val): rows [N, 32] of tokens. The last tenth is val."""
    this = domain()
    rows = np.full((len(read()), this.length), this.index[END], dtype=np.uint8)
    for row, smiles in zip(rows, read()):
        row[: len(smiles)] = this.encode(smiles)
    cut = len(rows) * 9 // 10
    return rows[:cut], rows[cut:]


@cache
def rdkit():
    """RDKit's Chem module without its warnings, or None if RDKit is not installed."""
    try:
        from rdkit import Chem, RDLogger
    except ImportError:
        print("molecules: validity, uniqueness and novelty need RDKit: pip install rdkit", file=sys.stderr)
        return None
    RDLogger.DisableLog("rdApp.*")
    return Chem


def canonical(smiles):
    """RDKit's own string for a molecule, which can be written in many ways. None if it is not a molecule."""
    molecule = rdkit().MolFromSmiles(smiles) if smiles else None
    return molecule and rdkit().MolToSmiles(molecule)


@cache
def known():
    """The molecules of the training set, as canonical strings."""
    return frozenset(map(canonical, read()[: len(read()) * 9 // 10]))


def closed(smiles):
    """Whether brackets match and ring bonds are closed. A molecule needs both, and RDKit is not needed."""
    outside = re.sub(r"\[[^][]*\]", "", smiles)  # inside [...] a digit counts hydrogens
    depth = 0
    for character in outside:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth < 0:
            return False
    rings = all(outside.count(digit) % 2 == 0 for digit in "12345")
    return depth == 0 and rings and not set("[]") & set(outside)


def score(samples, reference):
    """Shares of samples [N, 32], counted as in the literature.

    closed: see above. The others need RDKit. valid: molecules. unique: different ones among the valid.
    novel: those of the unique that are not in the training set. all: the product of these three, which is
    the share of N that is all of it at once.
    """
    strings = list(map(domain().decode, samples))
    values = {"closed": sum(map(closed, strings)) / len(strings)}
    if rdkit():
        valid = [molecule for molecule in map(canonical, strings) if molecule]
        unique = set(valid)
        novel = unique - known()
        values["valid"] = len(valid) / len(strings)
        values["unique"] = len(unique) / max(1, len(valid))
        values["novel"] = len(novel) / max(1, len(unique))
        values["all"] = len(novel) / len(strings)
    return values
