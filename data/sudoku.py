"""Sudoku, 6 x 6: each row, column and box of 2 x 3 cells holds 1 to 6. One token per cell, row by row.

The main example: the data is exactly uniform over 28,200,960 grids, so its entropy is known, and a sample is
right or wrong. One cell may need all the others to be thought through, which is what the signal is for.
"""

import math
from functools import cache
from itertools import permutations

import numpy as np

from data import Domain

CELL = np.arange(36)
ROW, COLUMN = CELL // 6, CELL % 6
BOX = ROW // 2 * 2 + COLUMN // 3
PEERS = sum(unit[:, None] == unit for unit in (ROW, COLUMN, BOX)) > 0  # [36, 36]: cells that share a unit
np.fill_diagonal(PEERS, False)  # a cell is not its own peer


def domain():
    return Domain(
        name="sudoku",
        vocab=list("123456"),
        length=36,
        load=load,
        score=score,
        quality="valid",
        cell=lambda token: "123456"[token] + " ",  # two characters, which are about as wide as high
        row=6,
        wrong=wrong,
        entropy=math.log(28_200_960),
    )


def enumerate_grids():
    """The 39,168 grids [N, 36] whose first row is 1 to 6. Any grid is one of these, its digits relabelled."""
    rows = np.array(list(permutations(range(6))), dtype=np.uint8)  # [720, 6]: what a row may be
    apart = (rows[:, None] != rows).all(2)  # [720, 720]: rows that have no digit in the same column
    left = rows[:, :3]  # what is in the left box; where that fits, the rest fits in the right box
    share_boxes = (left[:, None, :, None] != left[:, None]).all((2, 3))  # [720, 720]: no digit twice in a box
    grids = np.zeros((1, 1), dtype=int)  # [N, rows so far], as indices into rows; first the one row 1 to 6
    free = apart[:1]  # [N, 720]: rows that fit the columns so far
    for i in range(1, 6):
        fits = free & share_boxes[grids[:, -1]] if i % 2 else free  # two rows share a box
        old, new = fits.nonzero()
        grids, free = np.column_stack((grids[old], new)), free[old] & apart[new]
    return rows[grids].reshape(-1, 36)


@cache
def load():
    """(train, val): rows [400000, 36] and [4096, 36], drawn uniformly, each with random digits.
    A tenth of the enumerated grids is kept for val, whatever their digits."""
    rng = np.random.default_rng(0)
    grids = rng.permutation(enumerate_grids())
    cut = len(grids) * 9 // 10

    def draw(grids, n):
        digits = rng.permuted(np.tile(np.arange(6, dtype=np.uint8), (n, 1)), axis=1)  # [n, 6]
        return np.take_along_axis(digits, grids[rng.integers(len(grids), size=n)], axis=1)  # [n, 36]

    return draw(grids[:cut], 400_000), draw(grids[cut:], 4_096)


def wrong(grids):
    """The cells of grids [N, 36] whose digit occurs again in the row, column or box. A mask is no digit."""
    same = grids[:, :, None] == grids[:, None]  # [N, 36, 36]
    return (same & PEERS).any(2) & (grids < 6)  # [N, 36]


def score(samples, reference):
    """{measure: value} of samples [N, 36], shares of N: without a wrong cell; different from one another."""
    return {
        "valid": float((~wrong(samples).any(1)).mean()),
        "different": len(np.unique(samples, axis=0)) / len(samples),
    }
