"""The bench: samples and bounds of every model in a folder, as rows of a results file, a table and two figures.

    python -m data.study.bench runs/novel --steps 64 --temperature 0.8 1     measure models of your own
    python -m data.study.bench data/models/text --steps 64 -n 256 --seeds 3  measure the shipped ones

Rows are added to results.csv in the folder; those of the shipped models to one in the current directory.
"""

import argparse
import functools
import math
import time
import zlib
from pathlib import Path

import numpy as np
import torch

import data
from data import windows
from data.study import measures, results
from data.study.scoring import load_scoring
from sample import Progress, load_models, models_in, pick_device, run
from scmdm import COSINE, load, sample, sampler_bound, token_probs

GIVEN = {"sudoku": 0.4}  # share of a held-out sequence to hand over as a prompt, for a second measure


def generate(denoiser, canvas, mask_id, steps, seed, batch=64, on_step=None, progress=None, **options):
    """Fill the canvas [N, L], `batch` sequences at a time.

    Returns the tokens [N, L]; their predictive entropy in nats per token, the mean entropy of the
    distributions that they were drawn from (a lower temperature lowers it, and so does overconfidence); and
    seconds.
    """
    generator = torch.Generator(canvas.device).manual_seed(seed)
    rows, entropies, began = [], [], time.perf_counter()
    for x in canvas.split(batch):
        before = x

        def watch(step, x, x0_prev):
            nonlocal before
            revealed = (before == mask_id) & (x != mask_id)  # [B, L]
            logits = x0_prev[revealed].cpu().double().log()  # [R, V]
            p = token_probs(logits, options.get("temperature", 1), options.get("top_p", 1))
            entropies.append(torch.special.entr(p).sum(-1))  # [R]
            before = x
            if progress:
                progress.update(len(rows) * steps + step + 1)
            if on_step and not rows:
                on_step(step, x, x0_prev)

        rows.append(sample(denoiser, x, mask_id, steps, generator=generator, on_step=watch, **options))
    return torch.cat(rows), torch.cat(entropies).mean().item(), time.perf_counter() - began


def with_signal(model, kind):
    """The model with its signal replaced: by none, by that of other positions, or by a uniform one."""

    def denoiser(xt, x0_prev):
        if x0_prev is None or kind == "off":
            return model(xt, None)
        if kind == "uniform":
            return model(xt, torch.full_like(x0_prev, 1 / x0_prev.shape[-1]))
        return model(xt, x0_prev[:, torch.randperm(xt.shape[1], generator=torch.Generator().manual_seed(0))])

    return denoiser


def evaluate(folder, out, domain, device, n, calls, temperatures=(1.0,), seeds=1, batch=64, **options):
    """Measure every model in the folder: a row for each model, seed, number of calls and temperature.

    Seed j is a model's j-th training seed, where it has several, and the seed of n samples, of n held-out
    sequences and of their masks: the same for all models. Rows are added to results.csv in `out` as they are
    made; what is there already, or in the results of the shipped models, of the same model file, is not measured again.
    """
    files, path = models_in(folder), Path(out) / "results.csv"
    models, scoring = load_models(files, domain, device), load_scoring(folder, domain, device)
    _, val = domain.load()
    per, unit = (domain.length, "nats per token") if val.ndim == 1 else (1, "nats per sequence")
    # one half of the held-out data to compare with; the other half is measured as samples are, and bounded
    reference, rest = np.array_split(np.random.default_rng(0).permutation(windows(val, domain.length)), 2)
    mask_id = len(domain.vocab)
    bounded = not options.keys() - {"schedule"}  # what is sampled otherwise has no such bound

    def held_out(seed):
        return rest[(seed * n + np.arange(n)) % len(rest)].astype(np.int64)  # [n, L]

    @functools.cache
    def bound_of(denoiser, steps, seed):
        """The sampler's bound of each held-out sequence, at the same masks for every model. [n], NumPy."""
        same = {"generator": torch.Generator(device).manual_seed(seed)} | options
        rows = torch.from_numpy(held_out(seed)[: len(rest)]).to(device).split(batch)  # none of them twice
        parts = [sampler_bound(denoiser, x, mask_id, steps, **same) for x in rows]
        return torch.cat(parts).cpu().double().numpy() / per

    def bounds(denoiser, steps, seed):
        """The bound, and its paired difference from the base's with half the width of its 95% interval."""
        own, base = (bound_of(f, steps, seed) for f in (denoiser, models["base", 0]))
        difference, half = measures.paired(own, base)
        return {"bound": own.mean(), "minus base": difference, "half": half}

    def samples(denoiser, steps, temperature, seed):
        def fill(canvas):
            canvas = torch.from_numpy(canvas).to(device)
            return generate(denoiser, canvas, mask_id, steps, seed, batch, temperature=temperature, **options)

        x, entropy, seconds = fill(np.full((n, domain.length), mask_id))
        values = measures.measure(domain, x.cpu().numpy(), reference, scoring)
        values["path entropy"] = entropy * domain.length / per
        values["ms per call"] = 1000 * seconds / steps / math.ceil(n / batch)
        if domain.name in GIVEN and temperature == 1:  # with a part of a held-out sequence as the prompt
            shown = np.random.default_rng(seed).random((n, domain.length)) < GIVEN[domain.name]
            x, _, _ = fill(np.where(shown, held_out(seed), mask_id))
            values["completed"] = domain.score(x.cpu().numpy(), reference)[domain.quality]
        return values

    seeds_of = {}  # {arm: its training seeds}
    for arm, seed in files:
        seeds_of.setdefault(arm, []).append(seed)
    seeds = range(max(seeds, *(seed + 1 for _, seed in files)))
    todo = [("real", "", seed, 0, 1.0) for seed in seeds]
    for steps in calls:
        for arm in seeds_of:
            todo += [(arm, "", seed, steps, temperature) for seed in seeds for temperature in temperatures]
            last = steps == max(calls) and 1 in temperatures and bounded
            if last and models[arm, seeds_of[arm][0]].config.self_conditioning:
                todo += [(arm, signal, 0, steps, 1.0) for signal in ("off", "shuffled", "uniform")]
    keys = ("model", "signal", "seed", "calls", "temperature", "n", "sampler", "file")
    csvs = [csv for csv in {path, results.shipped(domain.name)} if csv.exists()]
    old_rows = [row for csv in csvs for row in results.read_csv(csv)]
    if scoring:  # what was measured before there was one is measured again
        old_rows = [row for row in old_rows if "gen. ppl" in row or "signal" in row]
    known = {tuple(str(row.get(key, "")) for key in keys): row for row in old_rows}
    sampler = " ".join(f"{name}={'cosine' if value is COSINE else value}" for name, value in options.items())
    progress, rows = Progress("evaluate", len(todo)), []
    for done, (arm, signal, seed, steps, temperature) in enumerate(todo):
        file = None if arm == "real" else (arm, seed if seed in seeds_of[arm] else seeds_of[arm][0])
        crc = f"crc{zlib.crc32(files[file].read_bytes()):08x}" if file else ""
        row = dict(zip(keys, (arm, signal, float(seed), float(steps), temperature, float(n), sampler, crc)))
        key = tuple(map(str, row.values()))
        if key not in known:
            row["unit"] = unit
            if arm == "real":
                row |= measures.measure(domain, held_out(seed), reference, scoring)
                row |= {"path entropy": domain.entropy} if domain.entropy else {}
            elif signal:
                row |= bounds(with_signal(models[file], signal), steps, seed)
            else:
                row |= samples(models[file], steps, temperature, seed)
                row |= bounds(models[file], steps, seed) if temperature == 1 and bounded else {}
            known[key] = {column: value for column, value in row.items() if value != ""}
            results.append_csv(path, known[key])
        rows.append(known[key])
        progress.update(done + 1, f"{arm}, {steps} calls")
    return rows


def main():  # fmt: off
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = p.add_argument
    a("folder", type=Path, help="of models, as train.py makes it")
    a("-n", type=int, default=256, help="how many sequences for each seed (default: 256)")
    a("--steps", type=int, nargs="+", default=[64], help="sampling steps, one or several (default: 64)")
    a("--temperature", type=float, nargs="+", default=[1.0], help="one or several (default: 1)")
    a("--top-p", type=float, default=1.0, help="draw from the fewest tokens of this mass (default: 1)")
    a("--order", choices=("random", "confidence"), default="random", help="which masks first")
    a("--schedule", choices=("linear", "cosine"), default="linear", help="how many per step")
    a("--seeds", type=int, default=1, help="how many seeds (default: those of the training)")
    a("--batch-size", type=int, default=64, help="sequences at a time; it changes the draws (default: 64)")
    a("--device", default="auto", help="auto, cpu, cuda or mps (default: auto, the fastest there is)")
    args = p.parse_args()
    if min(args.n, args.seeds, args.batch_size, *args.steps) < 1:
        p.error("-n, --steps, --seeds and --batch-size are 1 or more")
    device, out = pick_device(args.device), results.folder_for(args.folder)
    domain = data.from_info(load(models_in(args.folder)["base", 0]).info)
    if domain.load is None:
        raise ValueError(f"{domain.source.get('path')}: the data is no longer there to compare with")
    options = {"top_p": args.top_p} if args.top_p != 1 else {}
    options |= {"order": args.order} if args.order != "random" else {}
    options |= {"schedule": COSINE} if args.schedule == "cosine" else {}
    steps = sorted(set(args.steps))
    sizes = (args.n, steps, args.temperature, args.seeds, args.batch_size)
    results.everything(evaluate(args.folder, out, domain, device, *sizes, **options), domain, out)


if __name__ == "__main__":
    run(main)
