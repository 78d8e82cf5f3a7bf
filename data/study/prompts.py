"""Prompts: the first step has no signal although much is visible. Does one more call before it help?

    python -m data.study.prompts runs/sudoku --steps 36 144               measure, and print the table
    python -m data.study.prompts data/study/results/sudoku/prompts.csv    print the table of a file

A warm-up call sees the prompt and reveals nothing. Its prediction is the signal of the first step.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from data.study import files
from data.study.bench import GIVEN, Bench, fill, folder_for_results, open_models
from data.study.remask import table, with_seeds
from data.terminal import Progress, number, print_table, run
from scmdm import without_mask


def warmed(denoiser, mask_id):
    """Return the denoiser with a warm-up call before the first step, which is the one without a signal."""

    def other(xt, x0_prev):
        if x0_prev is None:
            x0_prev = without_mask(denoiser(xt, None), mask_id).softmax(-1)
        return denoiser(xt, x0_prev)

    return other


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a, count = p.add_argument, number(int, 1)
    a("source", type=Path, help="a folder of Sudoku models to measure, or a file of results to print")
    a("--steps", type=count, nargs="+", default=[36, 144], help="sampling steps (default: 36 144)")
    a("--seeds", type=count, default=3, help="sampling seeds of a model trained once (default: 3)")
    a("-n", type=count, default=256, help="grids for each seed (default: 256)")
    args = p.parse_args()
    path = args.source
    if path.suffix != ".csv":
        domain, paths, models = open_models(args.source, "cpu")
        path = folder_for_results(args.source, domain.name) / "prompts.csv"
        bench = Bench(domain, "cpu", args.n)
        path.parent.mkdir(parents=True, exist_ok=True)
        known = {files.key_of(row) for row in files.read(path)} if path.exists() else set()
        todo = [(*pair, k) for pair in with_seeds(models, args.seeds) for k in args.steps]
        progress = Progress("prompts: row", len(todo))
        for done, (name, seed, steps) in enumerate(todo):
            shown = np.random.default_rng(seed).random((args.n, domain.length)) < GIVEN[domain.name]
            canvas = torch.from_numpy(np.where(shown, bench.sequences(seed), bench.mask_id))
            row = files.row_of(domain, name, paths[name])
            row |= {"seed": float(seed), "steps": float(steps), "n": float(args.n)}
            warm = warmed(models[name], bench.mask_id)
            for denoiser, cells in ((models[name], {}), (warm, {"sampler": "warm-up"})):
                if files.key_of(row | cells) not in known:
                    x, _, _ = fill(denoiser, canvas, bench.mask_id, steps, seed)
                    completed = domain.score(x.numpy(), bench.reference)[domain.quality]
                    files.add(path, [row | cells | {"completed": completed}])
            progress.update(done + 1, f"{name}, {steps} steps")
    print("Completed grids without and with a warm-up call; ± is a 95% interval over training seeds.")
    print_table(table(files.read(path), "completed", "a warm-up call"))


if __name__ == "__main__":
    run(main)
