"""The bench: bounds and samples of every model in a folder, as a results file and its tables.

    python -m data.study.bench runs/novel --steps 64 --temperature 0.8 1      models that you trained
    python -m data.study.bench data/models/text --steps 64 -n 256 --seeds 3   the shipped models

Each measurement is added to OUT/results.csv as soon as it is made, and is not made again for the same model
file. So a bench that was stopped goes on where it stopped. Intervals are over training seeds: train each
model with several (train.py --seed 1, 2) into the same folder.
"""

import argparse
import math
import time
import zlib
from pathlib import Path

import numpy as np
import torch

from data import BadInput, windows
from data.study import files, results
from data.study.figures import draw
from data.study.metrics import half_width, measure
from data.study.scoring import find_scoring, scoring_nll
from data.study.variants import as_trained
from data.terminal import Progress, number, run
from sample import SHIPPED, load_models, models_in, pick_device
from scmdm import COSINE, sample, sampler_bound, token_probs

GIVEN = {"sudoku": 0.4}  # the share of a held-out sequence that is given when a model completes the rest
SIGNALS = ("off", "shuffled", "uniform")  # what a model's own signal is replaced with


def held_out(domain):
    """Split the held-out sequences into (reference, measured): rows [M, L] and [N, L] that share no sequence.

    Samples are scored against the reference. Bounds are measured on the other rows, and scores of real data
    too, so that they are not compared with themselves.
    """
    if domain.load is None:
        raise BadInput(f"{domain.source.get('path')}: the data is no longer there to compare with")
    rows = windows(domain.load()[1], domain.length)
    first = np.unique(rows, axis=0, return_index=True)[1]  # of equal rows only the first
    rows = np.random.default_rng(0).permutation(rows[np.sort(first)])
    reference, measured = np.array_split(rows, 2)
    return reference, measured


def fill(denoiser, canvas, mask_id, steps, seed, batch_size=64, **options):
    """Fill the canvas [N, L]. Returns tokens [N, L], their predictive entropy in nats per token, and seconds.

    Predictive entropy is the entropy of the distributions that the tokens were drawn from, averaged over
    tokens. A lower temperature lowers it, and so does overconfidence.
    """
    generator = torch.Generator(canvas.device).manual_seed(seed)
    entropies, began = [], time.perf_counter()

    def watch(step, x, x0_prev):
        nonlocal before
        revealed = (before == mask_id) & (x != mask_id)  # [B, L]
        logits = x0_prev[revealed].cpu().double().log()  # [R, V]
        p = token_probs(logits, options.get("temperature", 1), options.get("top_p", 1))
        entropies.append(torch.special.entr(p).sum(-1))  # [R], one for each token
        before = x

    rows = []
    for before in canvas.split(batch_size):
        rows.append(sample(denoiser, before, mask_id, steps, generator=generator, on_step=watch, **options))
    return torch.cat(rows), torch.cat(entropies).mean().item(), time.perf_counter() - began


def with_signal(denoiser, kind):
    """Return the denoiser with its signal replaced: by none, that of other positions, or a uniform one."""

    def other(xt, x0_prev):
        if x0_prev is None or kind == "off":
            return denoiser(xt, None)
        if kind == "uniform":
            return denoiser(xt, torch.full_like(x0_prev, 1 / x0_prev.shape[-1]))
        positions = torch.randperm(xt.shape[1], generator=torch.Generator().manual_seed(0))
        return denoiser(xt, x0_prev[:, positions])

    return other


class Bench:
    """Measures models in the same way: the same sequences, masks, seeds and batches for each of them.

    Seed j chooses n held-out sequences and their masks, and is the seed of n samples.
    """

    def __init__(self, domain, device, n, batch_size=64, nll=None, **options):
        self.domain, self.device, self.n, self.batch_size = domain, device, n, batch_size
        self.nll, self.options = nll, options  # nll: a scoring model; options: of `sample`
        self.reference, self.measured = held_out(domain)
        self.mask_id = len(domain.vocab)
        stream = domain.load()[1].ndim == 1
        self.per, self.unit = (domain.length, "nats per token") if stream else (1, "nats per sequence")
        self.bounded = not options.keys() - {"schedule"}  # the bound is of random order and temperature 1

    def sequences(self, seed):
        """Return the n held-out sequences of a seed, [n, L]. Seeds follow one another through all of them."""
        return self.measured[(seed * self.n + np.arange(self.n)) % len(self.measured)].astype(np.int64)

    def bound(self, denoiser, steps, seed):
        """Return the sampler's bound of each of the seed's sequences, none of them twice, in `unit`. [n]"""
        generator = torch.Generator(self.device).manual_seed(seed)  # the same masks for every model
        rows = torch.from_numpy(self.sequences(seed)[: len(self.measured)]).to(self.device)
        options = self.options | {"generator": generator}
        batches = rows.split(self.batch_size)
        parts = [sampler_bound(denoiser, x, self.mask_id, steps, **options) for x in batches]
        return torch.cat(parts).cpu().double().numpy() / self.per

    def samples(self, denoiser, steps, temperature, seed):
        """Return {metric: value} of n samples."""
        L = self.domain.length
        options = (self.mask_id, steps, seed, self.batch_size)

        def filled(canvas):
            canvas = torch.from_numpy(canvas).to(self.device)
            x, entropy, seconds = fill(denoiser, canvas, *options, temperature=temperature, **self.options)
            return x.cpu().numpy(), entropy, seconds

        x, entropy, seconds = filled(np.full((self.n, L), self.mask_id))
        values = measure(self.domain, x, self.reference, self.nll)
        values["predictive entropy"] = entropy * L / self.per
        values["ms per step"] = 1000 * seconds / steps / math.ceil(self.n / self.batch_size)
        if self.domain.name in GIVEN and temperature == 1:
            shown = np.random.default_rng(seed).random((self.n, L)) < GIVEN[self.domain.name]
            x, _, _ = filled(np.where(shown, self.sequences(seed), self.mask_id))
            values["completed"] = self.domain.score(x, self.reference)[self.domain.quality]
        return values

    def real(self, seed):
        """Return {metric: value} of the seed's held-out sequences."""
        values = measure(self.domain, self.sequences(seed), self.reference, self.nll)
        return values | ({"entropy": self.domain.entropy} if self.domain.entropy else {})


def evaluate(bench, paths, models, out, known, all_steps, temperatures=(1.0,), seeds=1, scoring=""):
    """Measure every model with the bench, and return a row for each model, seed, steps and temperature.

    paths {name: path}, models {name: denoiser}. Seed j measures the model that was trained with seed j, or if
    there is none, the one with the lowest seed. known: rows that need not be measured again; scoring: the
    checksum of the scoring model. New rows are added to the results file `out`.
    """
    by_seed, crc = {}, {}  # {model: {training seed: name}}, {name: checksum}
    for name, path in paths.items():
        model, _, seed = name.partition("-seed")
        by_seed.setdefault(model, {})[int(seed or 0)] = name
        crc[name] = f"crc{zlib.crc32(path.read_bytes()):08x}"
    seeds = range(max(seeds, *(seed + 1 for names in by_seed.values() for seed in names)))
    options = {key: "cosine" if value is COSINE else value for key, value in bench.options.items()}
    sampler = " ".join(f"{key}={value}" for key, value in options.items())

    todo = [("real", "", 0, 1.0, seed) for seed in seeds]
    for steps in all_steps:
        for model, names in by_seed.items():
            todo += [(model, "", steps, temperature, seed) for seed in seeds for temperature in temperatures]
            adapted = models[names[min(names)]].config.self_conditioning
            if adapted and steps == max(all_steps) and 1 in temperatures and bench.bounded:
                todo += [(model, signal, steps, 1.0, 0) for signal in SIGNALS]

    # rows from before there was this scoring model, or RDKit, are measured again
    quality = {bench.domain.quality} & bench.real(0).keys()
    current = [row for row in known if row.get("scoring", "") == scoring and quality <= row.keys()]
    known = {files.key_of(row): row for row in known if "signal" in row or row in current}
    base_bounds, rows, progress = {}, [], Progress("bench: row", len(todo))
    for done, (model, signal, steps, temperature, seed) in enumerate(todo):
        names = by_seed.get(model, {})
        name = names.get(seed, names[min(names)] if names else None)
        row = {"domain": bench.domain.name, "model": model, "signal": signal, "file": crc.get(name, "")}
        row |= {"seed": float(seed), "steps": float(steps), "temperature": float(temperature)}
        row |= {"n": float(bench.n), "sampler": sampler}
        if files.key_of(row) not in known:
            row |= {"scoring": "" if signal else scoring, "unit": bench.unit}
            if model == "real":
                row |= bench.real(seed)
            elif not signal:
                row |= bench.samples(models[name], steps, temperature, seed)
            if model != "real" and temperature == 1 and bench.bounded:
                if (steps, seed) not in base_bounds:
                    base_bounds[steps, seed] = bench.bound(models["base"], steps, seed)
                denoiser = with_signal(models[name], signal) if signal else models[name]
                bound = bench.bound(denoiser, steps, seed)
                minus = bound - base_bounds[steps, seed]  # paired: the same sequences and masks
                row |= {"bound": bound.mean(), "bound minus base": minus.mean()}
                row |= {"half over sequences": half_width(minus)} if len(minus) > 1 else {}
            row = {column: value for column, value in row.items() if value != ""}
            files.add(out, [row])
            known[files.key_of(row)] = row
        rows.append(known[files.key_of(row)])
        progress.update(done + 1, f"{results.words(model)}, {steps} steps")
    return rows


def folder_for_results(models, name):
    """Return where the results of a folder of models go: into it, but for the shipped models into runs/."""
    shipped = SHIPPED.resolve() in Path(models).resolve().parents
    return Path("runs/shipped", name) if shipped else Path(models)


def open_models(folder, device):
    """Return (domain, {name: path}, {name: model}) of a folder, each model with its own adapter."""
    paths = models_in(folder)
    domain, models = load_models(paths, device)
    return domain, paths, {name: as_trained(model) for name, model in models.items()}


def main():  # fmt: off
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a, count = p.add_argument, number(int, 1)
    a("folder", type=Path, help="the folder of the models, as train.py writes it")
    a("-n", type=count, default=256, help="sequences for each seed (default: 256)")
    a("--steps", type=count, nargs="+", help="sampling steps, one or more (default: the domain's)")
    a("--temperature", type=number(float, 0, 1e6), nargs="+", default=[1.0], help="one or more (default: 1)")
    a("--top-p", type=number(float, 1e-9, 1), default=1.0, help="draw from the fewest tokens of this mass")
    a("--order", choices=("random", "confidence"), default="random", help="which masks are filled first")
    a("--schedule", choices=("linear", "cosine"), default="linear", help="how many are filled at each step")
    a("--seeds", type=count, default=1, help="at least this many seeds (default: those of the training)")
    a("--batch-size", type=count, default=64, help="sequences at a time; it changes the draws (default: 64)")
    a("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    a("--out", type=Path, help="folder of the results (default: the models', or runs/shipped/NAME)")
    a("--figures", action="store_true", help="draw frontier.png and bound.png in OUT; needs matplotlib")
    args = p.parse_args()
    device = pick_device(args.device)
    domain, paths, models = open_models(args.folder, device)
    out = args.out or folder_for_results(args.folder, domain.name)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: {error.strerror}") from None
    options = {"top_p": args.top_p} if args.top_p != 1 else {}
    options |= {"order": args.order} if args.order != "random" else {}
    options |= {"schedule": COSINE} if args.schedule == "cosine" else {}
    scorer, scoring = find_scoring(args.folder, domain, device)
    nll = None if scorer is None else lambda x: scoring_nll(scorer, x)
    bench = Bench(domain, device, args.n, args.batch_size, nll, **options)
    shipped = results.HERE / "results" / domain.name / "results.csv"
    known = [row for path in (shipped, out / "results.csv") if path.exists() for row in files.read(path)]
    steps = sorted(set(args.steps or [domain.steps]))
    sizes = (steps, sorted(set(args.temperature)), args.seeds, scoring)
    rows = evaluate(bench, paths, models, out / "results.csv", known, *sizes)
    results.report(rows)
    if args.figures:
        draw(rows, out)


if __name__ == "__main__":
    run(main)
