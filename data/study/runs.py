"""When does it help? Every run behind the section of that name in data/study/README.md, as a list.

    python -m data.study.runs                train and measure whatever is missing, then print the tables
    python -m data.study.runs depth1 small   only these runs; two halves of the list can run at the same time

A run is a folder in runs/study/, made by train.py and the bench as a user would call them, so that each goes
on where it was stopped. The measured rows are gathered in data/study/study.csv.
"""

import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from data import sudoku
from data.study import results
from data.study.variants import VARIANTS
from sample import label

SHIPPED, FOLDER, TABLE = Path("data/models/sudoku"), Path("runs/study"), Path("data/study/study.csv")

SHORT = f"--no-table --init {SHIPPED}/base.npz --steps 2000"  # from the shipped base: 3 blocks, 4,000 steps
OWN = "--no-table --steps 2000 --unroll 16"  # from the base of the same folder
GRIDS4 = f"--data {FOLDER}/grids4.npy"
SUREST = "36 --order confidence"  # the surest cells first
TEXT, TINY = "--data text --compile", "--dim 64 --depth 3"
# name: (what train.py is called with, one call after another; denoiser calls, and again in another order).
# --seeds N at the end: with each of N seeds.
# Without a flag for it, an arm for the control is trained too, with its own learning rate, 5e-4 for 2e-3.
RUNS = {
    "calls": ([], "6 12 18 36 72 144 288"),  # the shipped models
    "confidence": ([], "12 18 36 72 144 --order confidence"),  # the same
    "chains": ([f"{SHORT} --unroll 1 2 4 8 16 32"], "36 144"),
    "half": ([f"{SHORT} --rates .5 --unroll 1 16", "--stage pretrain --rates .5 --steps 6000"], "36 144"),
    "long": ([f"{SHORT} --rates 0"], "36 144"),  # and rate0-long, below
    "lr2e-4": ([f"{SHORT} --rates 0 --lr 2e-4"], "36 144"),
    "lr1e-3": ([f"{SHORT} --unroll 1 16 --lr 1e-3"], "36 144"),
    "lr4e-3": ([f"{SHORT} --rates 1 --unroll 1 16 --lr 4e-3"], "36 144"),
    "depth1": (["--stage pretrain --depth 1", OWN], "36 144", SUREST),
    "depth2": (["--stage pretrain --depth 2", OWN], "36 144", SUREST),
    "depth6": (["--stage pretrain --depth 6", OWN], "36 144", SUREST),
    "base500": (["--stage pretrain --steps 500", OWN], "36 144"),
    "base12000": (["--stage pretrain --steps 12000", OWN], "36 144"),
    "steps500": ([f"{SHORT} --steps 500 --unroll 16"], "36 144"),
    "steps14000": ([f"{SHORT} --steps 14000 --rates 1 --unroll 8",
                    f"{SHORT} --steps 14000 --rates 1 --unroll 16 --seeds 3"], "36 72 144"),
    "unroll8": ([f"{SHORT} --steps 7000 --rates 1 --unroll 8 --seeds 3"], "36 144"),
    "cosine": ([], "36 144 --schedule cosine"),  # the shipped models
    "seeds": ([f"{SHORT} --rates 1 --unroll 16 --seeds 3"], "36 144"),  # to compare the next with
    "softened": ([f"{SHORT} --rates 1 --unroll 1", f"{SHORT} --rates 1 --unroll 16 --seeds 3"], "36 144"),
    **dict.fromkeys(VARIANTS.keys() - {"softened"}, ([f"{SHORT} --rates 1 --unroll 16"], "36 144")),
    "small": ([f"{GRIDS4} --stage pretrain --dim 32 --depth 1 --steps 2000",
               f"{GRIDS4} --no-table --steps 2000 --unroll 1 16"], "16 64"),
    "text": ([f"{TEXT} --stage pretrain {TINY} --steps 3000", f"{TEXT} --no-table --rates 0 .5 1 --unroll 1",
              f"{TEXT} --stage pretrain {TINY} --rates .5 --steps 4000"], "16 64"),
    "text4000": ([f"{TEXT} --stage pretrain {TINY} --steps 4000"], "16 64"),
}  # fmt: skip


def python(*words):
    print("python", *words, flush=True)
    subprocess.run([sys.executable, *map(str, words)], check=True)


def make(name):
    trainings, *evaluations = RUNS[name]
    out = FOLDER / name
    out.mkdir(parents=True, exist_ok=True)
    if name == "small":
        np.save(FOLDER / "grids4.npy", np.tile(grids4(), (100, 1)))  # held-out data is uniform too
    if name in ("calls", "confidence", "cosine"):
        for arm in ("base", "rate0", "rate1", "rate1-unroll16"):
            shutil.copy(SHIPPED / f"{arm}.npz", out)
    script = ["-m", "data.study.variants", name] if name in VARIANTS else []
    for flags in trainings:
        flags, _, seeds = flags.partition(" --seeds ")
        for seed in range(int(seeds or 1)):
            more = ["--seed", seed, "--out", out, "--resume"]
            python(*script, "train.py", *flags.split(), *more)
    if name == "long":
        long_control(out)
    for calls in evaluations:
        python(*script or ["-m"], "data.study.bench", out, "-n", 256, "--steps", *calls.split())
    rows = [{"run": name} | row for row in results.read_csv(out / "results.csv")]
    for row in rows:
        if name == "small" and row["model"] != "real" and not row.get("signal"):
            row |= count(out, row)
        elif name == "calls" and row["calls"] == 144 and "rate1" in row["model"]:
            row |= coincide(out, row)
        elif row.get("sampler") == "order=confidence" and row["calls"] == 36:
            row |= coincide(out, row, "confidence")
    kept = [row for row in results.read_csv(TABLE) if row["run"] != name] if TABLE.exists() else []
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(key for row in kept + rows for key in row))
        writer.writeheader()
        writer.writerows(kept + rows)


def long_control(out, steps=2000, unroll=16):
    """rate0-long: the control, trained for as much time as `steps` of this unroll take."""
    # of the cost of a step, forward is 1, backward 2, and the signal (K + 1) / 2 more
    steps = round(steps * (3 + (unroll + 1) / 2) / 3)
    folder = out / "long"
    python("train.py", *SHORT.split(), "--rates", 0, "--steps", steps, "--out", folder, "--resume")
    shutil.copy(folder / "rate0.npz", out / "rate0-long.npz")


def grids4():
    """The 288 grids [288, 16] of 4 x 4 Sudoku, boxes of 2 x 2."""
    rows = list(itertools.permutations(range(4)))
    grids = np.array(list(itertools.product(rows, repeat=4)))  # [24^4, 4, 4]
    boxes = grids.reshape(-1, 2, 2, 2, 2).swapaxes(2, 3).reshape(-1, 4, 4)
    right = [(np.sort(units, axis=2) == np.arange(4)).all((1, 2)) for units in (grids.swapaxes(1, 2), boxes)]
    return grids[right[0] & right[1]].reshape(-1, 16)


def drawn(folder, calls, n, order="random"):
    """{model: n samples, as text} of the models in the folder, kept in a file there."""
    path = folder / f"{calls:g}.jsonl"
    if not path.exists():
        arms, new = sorted(path.stem for path in folder.glob("rate*.npz")), folder / "new.jsonl"
        words = ["--models", folder, "--model", *arms, "-n", n, "--steps", f"{calls:g}", "--save", new]
        words += ["--order", order]
        subprocess.run([sys.executable, "sample.py", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
        os.replace(new, path)
    samples = {}
    for record in map(json.loads, path.open(encoding="utf-8")):
        samples.setdefault(record["model"], []).append(record["text"])
    return samples


def count(folder, row):
    """What a 4 x 4 model draws, counted: the sampler's own distribution over the 288 grids.

    valid: the mass on them. -log p: its mean over them, which the bound is above, in nats. entropy of the
    grids: of the distribution within them; ln 288 = 5.663 if all are as likely.
    """
    samples = drawn(folder, row["calls"], 20_000)[label(row["model"])]
    x, grids = np.array([text.split() for text in samples], dtype=int), grids4()  # [N, 16], [288, 16]
    code = 4 ** np.arange(16)  # a grid as one number
    counts = (np.sort(grids @ code)[:, None] == x @ code).sum(1)  # [288]
    p = counts / counts.sum()
    inner = -(p * np.log(np.where(p > 0, p, 1))).sum()
    return {"valid": counts.sum() / len(x), "-log p": -np.log(np.maximum(counts, 0.5) / len(x)).mean(),
            "entropy of the grids": inner, "never drawn": (counts == 0).sum()}  # fmt: skip


def coincide(folder, row, order="random"):
    """How often two valid grids of 6 x 6 are the same, digits aside, over how often they would be if all
    39,168 were as likely: 1 for a sampler that has no favourites, 2 for one that draws from half of them."""
    samples = drawn(folder, row["calls"], 2000, order)[label(row["model"])]
    x = np.array([list(text) for text in samples], dtype=int) - 1  # [N, 36]
    x = x[~sudoku.wrong(x).any(1)]
    _, counts = np.unique(np.take_along_axis(np.argsort(x[:, :6], 1), x, 1), axis=0, return_counts=True)
    found, expected = (counts * (counts - 1) / 2).sum(), len(x) * (len(x) - 1) / 2 / 39168
    return {"coincide": found / expected, "coincide, half": 1.96 * found**0.5 / expected}


def show():
    table = []
    for row in results.read_csv(TABLE):
        if row["model"] == "real" or row.get("signal"):
            continue
        line = {"run": f"{row['run']} {row.get('sampler', '')}", "model": label(row["model"])}
        line |= {"seed": f"{row['seed']:g}", "calls": f"{row['calls']:g}"}
        line["bound"] = f"{row['bound']:.3f}" if "bound" in row else ""
        if "bound" in row and row["model"] != "base":
            line["minus base"] = f"{row['minus base']:+.3f} ± {row['half']:.3f}"
        counted = ("-log p", "entropy of the grids", "never drawn", "coincide")
        for key in ("valid", "completed", "gen. ppl", "path entropy", *counted):
            line[key] = f"{row[key]:.3f}" if key in row else ""
        table.append(line)
    results.print_table(table)


if __name__ == "__main__":
    for name in sys.argv[1:] or RUNS:
        make(name)
    show()
