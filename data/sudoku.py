"""Sudoku of 6 x 6 cells: each row, column and box (2 rows of 3 cells) holds the digits 1 to 6.

This is the main example, because everything about it is known. The data is exactly uniform over all
28,200,960 grids, so that its entropy is known, and a sample is either right or wrong. A token is the digit of
one cell; the cells are read row by row.
"""

import math
from functools import cache
from itertools import permutations

import numpy as np

from data import Domain

CELL = np.arange(36)
ROW, COLUMN = CELL // 6, CELL % 6
BOX = ROW // 2 * 2 + COLUMN // 3
SHARE = sum(unit[:, None] == unit for unit in (ROW, COLUMN, BOX)) > 0  # [36, 36]: two cells share a unit
np.fill_diagonal(SHARE, False)  # with another cell, not with themselves


def domain():
    return Domain(
        name="sudoku",
        vocab=list("123456"),
        length=36,
        load=load,
        score=score,
        quality="valid",
        cell=lambda token: "123456"[token] + " ",  # in a terminal, two characters are about as wide as high
        row=6,
        wrong=wrong,
        entropy=math.log(28_200_960),
    )


def enumerate_grids():
    """The 39,168 grids [N, 36] whose first row is 1 to 6. Relabelling their digits gives all other grids."""
    rows = np.array(list(permutations(range(6))), dtype=np.uint8)  # [720, 6], all that a row can be
    fits_columns = (rows[:, None] != rows).all(2)  # [720, 720]: the two rows differ in each column
    half = rows[:, :3]  # if the left box has no digit twice, neither has the right one
    fits_box = (half[:, None, :, None] != half[:, None]).all((2, 3))  # [720, 720]
    grids = np.zeros((1, 1), dtype=int)  # [N, rows so far], as indices into `rows`; index 0 is the row 1 to 6
    free = fits_columns[:1]  # [N, 720]: what fits the columns of the rows so far
    for i in range(1, 6):
        fits = free & fits_box[grids[:, -1]] if i % 2 else free  # rows 0 and 1 share their boxes, and so on
        old, new = fits.nonzero()
        grids, free = np.column_stack((grids[old], new)), free[old] & fits_columns[new]
    return rows[grids].reshape(-1, 36)


@cache
def load():
    """(train, val): rows [400000, 36] and [4096, 36], drawn uniformly.

    A tenth of the enumerated grids is held out, with all its relabellings.
    """
    rng = np.random.default_rng(0)
    grids = rng.permutation(enumerate_grids())
    cut = len(grids) * 9 // 10

    def draw(grids, n):
        digits = rng.permuted(np.tile(np.arange(6, dtype=np.uint8), (n, 1)), axis=1)  # [n, 6], new labels
        return np.take_along_axis(digits, grids[rng.integers(len(grids), size=n)], axis=1)  # [n, 36]

    return draw(grids[:cut], 400_000), draw(grids[cut:], 4_096)


def wrong(grids):
    """The cells of grids [N, 36] whose digit occurs again in its row, column or box. A mask is no digit."""
    same = grids[:, :, None] == grids[:, None]  # [N, 36, 36]
    return (same & SHARE).any(2) & (grids < 6)  # [N, 36]


def score(samples, reference):
    """The share of samples [N, 36] that are valid grids, and of those that differ from all others."""
    return {
        "valid": float((~wrong(samples).any(1)).mean()),
        "different": len(np.unique(samples, axis=0)) / len(samples),
    }
