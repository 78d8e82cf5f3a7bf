"""The runs behind "When does it help?" in README.md.

    python -m data.study.runs                train and measure whatever is missing, then print the tables
    python -m data.study.runs depth1 small   only these runs
    python -m data.study.runs --show         only the tables of what has been measured

A run is a folder in runs/study/. It is made by the commands that a user would type, which are printed, so it
goes on where it was stopped. Its rows are copied into results/runs.csv.
"""

import argparse
import itertools
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from data import sudoku
from data.study import files, results
from data.study.bench import fill, open_models
from data.study.metrics import difference
from data.study.variants import SIGNALS
from data.terminal import print_table, run
from sample import SHIPPED

FOLDER, TABLE = Path("runs/study"), results.HERE / "results" / "runs.csv"
BASE = SHIPPED / "sudoku" / "base.npz"  # 3 blocks, 4,000 iterations


@dataclass
class Run:
    """Commands that train, and what is measured. {out} is the run's folder, {seed} each of its seeds."""

    train: list[str] = field(default_factory=list)  # empty: the shipped models of Sudoku
    bench: list[str] = field(default_factory=lambda: ["--steps 36 144"])
    seeds: int = 1
    data: str = "sudoku"


SHORT = f"train.py --data sudoku -n 0 --init {BASE} --out {{out}} --seed {{seed}} --resume --iters"
ONCE = SHORT.replace("{seed}", "0")
OWN = "train.py --data sudoku -n 0 --out {out} --iters 2000 --unroll 16 --resume"  # from the folder's base
PRETRAIN = "train.py --data sudoku --stage pretrain --out {out} --resume"
GRIDS4 = f"{FOLDER}/grids4.npy"
FOUR = f"train.py --data {GRIDS4} --iters 2000 --out {{out}} --resume"
TEXT = "train.py --data text --out {out} --resume --compile"
SMALL = "--stage pretrain --dim 64 --depth 3"
CONFIDENCE = "--steps 36 --order confidence"

RUNS = {
    "steps": Run(bench=["--steps 6 12 18 36 72 144 288"]),
    "confidence": Run(bench=["--steps 12 18 36 72 144 --order confidence"]),
    "cosine": Run(bench=["--steps 36 144 --schedule cosine"]),
    "chains": Run([f"{SHORT} 2000 --unroll 1 2 4 8 16 32"]),
    "half": Run([f"{SHORT} 2000 --rates .5 --unroll 1 16",
                 "-m data.study.variants scratch --out {out} --rate .5 --unroll 1 --iters 6000"]),
    # a control that trains for as much time: of one iteration the forward pass costs 1, the backward pass 2,
    # and the signal (K + 1) / 2 more
    "long": Run([f"{SHORT} 7667 --rates 0"]),
    "lr2e-4": Run([f"{SHORT} 2000 --rates 0 --lr 2e-4"]),
    "lr5e-4": Run([f"{SHORT} 2000 --rates 0"]),
    "lr1e-3": Run([f"{SHORT} 2000 --unroll 1 16 --lr 1e-3"]),
    "lr4e-3": Run([f"{SHORT} 2000 --rates 1 --unroll 1 16 --lr 4e-3"]),
    "depth1": Run([f"{PRETRAIN} --depth 1", OWN], ["--steps 36 144", CONFIDENCE]),
    "depth2": Run([f"{PRETRAIN} --depth 2", OWN], ["--steps 36 144", CONFIDENCE]),
    "depth6": Run([f"{PRETRAIN} --depth 6", OWN], ["--steps 36 144", CONFIDENCE]),
    "base500": Run([f"{PRETRAIN} --iters 500", OWN]),
    "base12000": Run([f"{PRETRAIN} --iters 12000", OWN]),
    "iters500": Run([f"{SHORT} 500 --unroll 16"]),
    "iters14000": Run([f"{SHORT} 14000 --rates 1 --unroll 16", f"{ONCE} 14000 --rates 1 --unroll 8"],
                      ["--steps 36 72 144"], seeds=3),
    "unroll8": Run([f"{SHORT} 7000 --rates 1 --unroll 8"], seeds=3),
    "seeds": Run([f"{SHORT} 2000 --rates 1 --unroll 16"], seeds=3),  # to compare the variants with
    **{name: Run([f"-m data.study.variants {name} --out {{out}}"]) for name in SIGNALS},
    "softened": Run(["-m data.study.variants softened --out {out} --seed {seed}",
                     "-m data.study.variants softened --out {out} --unroll 1"], seeds=3),
    "small": Run([f"{FOUR} --stage pretrain --dim 32 --depth 1", f"{FOUR} -n 0 --rates 0",
                  f"{FOUR} -n 0 --rates 1 --unroll 1 16 --lr 2e-3"],
                 ["--steps 16 64"], data="grids4"),
    "text": Run([f"{TEXT} {SMALL} --iters 3000", f"{TEXT} -n 0 --rates 0 .5 1 --unroll 1",
                 "-m data.study.variants scratch --data text --out {out} --rate .5 --unroll 1 --iters 4000"
                 " --dim 64 --depth 3"], ["--steps 16 64"], data="text"),
    "text4000": Run([f"{TEXT} {SMALL} --iters 4000"], ["--steps 16 64"], data="text"),
}  # fmt: skip


def python(command):
    print("python", command, flush=True)
    subprocess.run([sys.executable, *command.split()], check=True)


def make(name):
    """Train and measure a run, as far as that has not been done, and copy its rows into the table."""
    what, out = RUNS[name], FOLDER / name
    out.mkdir(parents=True, exist_ok=True)
    if name == "small":
        np.save(GRIDS4, np.tile(grids4(), (100, 1)))  # so that the held-out data is uniform too
    if not what.train:
        for model in ("base", "rate0", "rate1", "rate1-unroll8"):
            shutil.copy(SHIPPED / "sudoku" / f"{model}.npz", out)
    for command in what.train:
        for seed in range(what.seeds if "{seed}" in command else 1):
            python(command.format(out=out, seed=seed))
    for options in what.bench:
        python(f"-m data.study.bench {out} -n 256 {options}")
    rows = [{"run": name} | row for row in files.read(out / "results.csv")]
    for row in rows:
        if row["model"] == "real" or "signal" in row:
            continue
        if name == "small":
            row |= count(draw(out, row, 20_000))
        elif row["steps"] == 36 and row.get("sampler") == "order=confidence":
            row |= coincide(draw(out, row, 2000))
        elif name == "steps" and row["steps"] == 144 and "rate1" in row["model"]:
            row |= coincide(draw(out, row, 2000))
    files.add(TABLE, rows)


def draw(folder, row, n):
    """Return n samples of a row's model [n, L], at its number of steps and in its order."""
    domain, _, models = open_models(folder, "cpu")
    mask_id, order = len(domain.vocab), row.get("sampler", "order=random").removeprefix("order=")
    canvas = torch.full((n, domain.length), mask_id)
    x, _, _ = fill(models[row["model"]], canvas, mask_id, int(row["steps"]), seed=0, order=order)
    return x.numpy()


def grids4():
    """Return the 288 grids [288, 16] of 4 x 4 Sudoku, with boxes of 2 x 2."""
    rows = np.array(list(itertools.permutations(range(4))))  # [24, 4]
    grids = rows[np.indices((24,) * 4).reshape(4, -1).T]  # [24^4, 4, 4]
    boxes = grids.reshape(-1, 2, 2, 2, 2).swapaxes(2, 3).reshape(-1, 4, 4)
    right = [(np.sort(units, axis=2) == np.arange(4)).all((1, 2)) for units in (grids.swapaxes(1, 2), boxes)]
    return grids[right[0] & right[1]].reshape(-1, 16)


def count(x):
    """Return what samples x [N, 16] of 4 x 4 Sudoku say about the sampler's distribution over the 288 grids.

    valid: the mass on them. -log p: its mean over them, in nats, which the bound exceeds. entropy of the
    grids: of the distribution among them, ln 288 = 5.663 if all are equally likely.
    """
    grids, code = grids4(), 4 ** np.arange(16)  # a grid as one number
    counts = (np.sort(grids @ code)[:, None] == x @ code).sum(1)  # [288]
    p = counts / counts.sum()
    inner = -(p * np.log(np.where(p > 0, p, 1))).sum()
    return {"valid": counts.sum() / len(x), "-log p": -np.log(np.maximum(counts, 0.5) / len(x)).mean(),
            "entropy of the grids": inner, "never drawn": (counts == 0).sum()}  # fmt: skip


def coincide(x):
    """Return how much more often two valid grids among samples x [N, 36] are equal than by chance.

    Grids are compared without regard to which digit is which. 1 means that all 39,168 are equally likely, 2
    that the sampler draws from half of them.
    """
    x = x[~sudoku.wrong(x).any(1)]
    _, counts = np.unique(np.take_along_axis(np.argsort(x[:, :6], 1), x, 1), axis=0, return_counts=True)
    found, expected = (counts * (counts - 1) / 2).sum(), len(x) * (len(x) - 1) / 2 / 39168
    return {"coincide": found / expected, "coincide, half over grids": 1.96 * found**0.5 / expected}


def summary(rows):
    """Return the table of all runs of one domain: each model's means, and its bound minus the base's."""
    table = []
    for name, sampler in dict.fromkeys((row["run"], row.get("sampler", "")) for row in rows):
        of_run = [row for row in rows if (row["run"], row.get("sampler", "")) == (name, sampler)]
        found = results.groups(of_run)
        lines = results.means([row for row in of_run if row["model"] != "real"])
        for (model, steps), line in zip(found, lines):
            order = ", confidence order" if sampler == "order=confidence" and name != "confidence" else ""
            line = {"run": name + order} | line
            change = difference(found[model, steps], found["base", steps], "bound")
            change = f"{change.text('+')}, {change.verdict()}" if change and model != "base" else ""
            bound = {"bound": line.pop("bound"), "minus base": change} if "bound" in line else {}
            table.append({key: line.pop(key) for key in ("run", "model", "steps", "seeds")} | bound | line)
    return table


def show(names):
    """Print what the runs measured: a table for each domain, and how often valid grids coincide."""
    rows = [row for row in files.read(TABLE) if row["run"] in names]
    rows.sort(key=lambda row: names.index(row["run"]))
    for domain in dict.fromkeys(row["domain"] for row in rows):
        of_domain = [row for row in rows if row["domain"] == domain]
        print(f"\n{domain}: {of_domain[0]['unit']}; ± is a 95% interval over training seeds.")
        print("minus base: the bound minus the base's.")
        print_table(summary(of_domain))
    for row in rows:
        if "coincide" in row:
            ratio = f"{row['coincide']:.2f} ± {row['coincide, half over grids']:.2f}"
            print(f"{row['run']}, {results.words(row['model'])}, {row['steps']:g} steps: valid grids coincide"
                  f" {ratio} times as often as by chance")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="*", metavar="RUN", help=f"which (default: all): {', '.join(RUNS)}")
    p.add_argument("--show", action="store_true", help="only print the tables of what has been measured")
    args = p.parse_args()
    if unknown := set(args.runs) - set(RUNS):
        p.error(f"unknown runs: {', '.join(sorted(unknown))}")
    names = args.runs or list(RUNS)
    for name in names if not args.show else []:
        make(name)
    show(names)


if __name__ == "__main__":
    run(main)
