"""Remasking: a sampler that needs no training and may take tokens back. Does it replace the signal?

    python -m data.study.remask runs/sudoku --steps 36 144 --seeds 3      measure, and print the table
    python -m data.study.remask data/study/results/sudoku/remask.csv      print the table of a file

`remask_sample` is ReMDM (Wang et al. 2025, arXiv 2503.00307) with its cap: at each step a visible token is
masked again with probability sigma = min(eta, (1 - alpha(s)) / alpha(t)). More masks are revealed to make up
for it, so that the share of masked tokens follows the schedule as before.
"""

import argparse
from pathlib import Path

import torch

from data.study import files, results
from data.study.bench import folder_for_results, held_out, open_models
from data.study.metrics import difference, over_seeds
from data.terminal import Progress, number, print_table, run
from scmdm import LINEAR, draw, uniform, without_mask


def remask_probs(s, t, eta, schedule=LINEAR):
    """Return (sigma, the probability that a masked position is revealed) of the step from t to s.

    A position is visible at t with probability alpha(t), and stays so with 1 - sigma. What is missing to
    alpha(s) comes from the masked ones: reveal = (alpha(s) - (1 - sigma) alpha(t)) / (1 - alpha(t)).
    """
    a_t, a_s = schedule.alpha(t), schedule.alpha(s)
    sigma = (1 - a_s).clamp(max=eta * a_t) / a_t if a_t > 0 else torch.zeros_like(t)  # nothing visible at 1
    return sigma, (a_s - (1 - sigma) * a_t) / (1 - a_t)


@torch.no_grad()
def remask_sample(denoiser, x, mask_id, steps, *, eta=0.1, schedule=LINEAR, generator=None, on_step=None):
    """Fill the canvas x [B, L] as `scmdm.sample` does in random order, with remasking. Returns [B, L].

    The signal is carried in the same way, and the known tokens of the canvas are never masked. With eta = 0
    the result is that of `sample`. Draws, at each step: which masks to reveal, or which visible tokens to
    mask (B, L), then the tokens (B, L).
    """
    free, x0_prev = x == mask_id, None  # [B, L]
    for step in range(steps):
        logits = without_mask(denoiser(x.clone(), x0_prev), mask_id)  # [B, L, V]
        x0_prev = logits.softmax(-1)
        u, u_token = (uniform(x.shape, x.device, generator) for _ in range(2))  # [B, L] each
        t, s = (torch.tensor(1 - k / steps, dtype=u.dtype, device=x.device) for k in (step, step + 1))
        sigma, reveal = remask_probs(s, t, eta, schedule)
        masked = x == mask_id
        chosen, taken_back = masked & (u < reveal), free & ~masked & (u < sigma)
        x = torch.where(taken_back, mask_id, x)
        x[chosen] = draw(logits[chosen].to(u.dtype).softmax(-1), u_token[chosen]).to(x.dtype)
        if on_step is not None:
            on_step(step, x, x0_prev, chosen)
    return x


def measure_remasking(denoiser, domain, reference, steps, eta, seed, n, batch_size=64):
    """Return {metric: value} of n samples.

    Predictive entropy, in nats per sequence, is left out with remasking: a token that is drawn again is drawn
    when nearly all others are visible, so it would be close to zero for any model.
    """
    generator, rows, entropies = torch.Generator().manual_seed(seed), [], []

    def watch(step, x, x0_prev, chosen):
        entropies.append(torch.special.entr(x0_prev[chosen].double()).sum())

    for canvas in torch.full((n, domain.length), len(domain.vocab)).split(batch_size):
        how = {"eta": eta, "generator": generator, "on_step": watch}
        rows.append(remask_sample(denoiser, canvas, len(domain.vocab), steps, **how))
    values = domain.score(torch.cat(rows).numpy(), reference)
    return values | ({} if eta else {"predictive entropy": sum(entropies).item() / n})


def with_seeds(names, seeds):
    """Return (name, sampling seed) pairs: a training's own seed, or several for a model trained once."""
    pairs = []
    for name in names:
        model, _, own = name.partition("-seed")
        several = any(other.startswith(f"{model}-seed") for other in names)
        pairs += [(name, j) for j in ([int(own or 0)] if several else range(seeds))]
    return pairs


def table(rows, quality, what="remasking"):
    """Return the table of each model's quality without and with remasking, and its difference from the base.

    Rows with it have a "sampler". The base exists once, so its two numbers are means over sampling seeds,
    without an interval.
    """
    found, lines = {}, []
    for row in sorted(rows, key=lambda row: (row["steps"], results.place(row["model"]))):
        found.setdefault((row["model"], row["steps"]), {}).setdefault("sampler" in row, []).append(row)
    for (model, steps), of_model in found.items():
        if len(of_model) < 2:
            continue
        line = {"model": results.words(model), "steps": f"{steps:g}"}
        line["seeds"] = over_seeds(of_model[True], quality).seeds
        for key, name in ((False, "without"), (True, "with")):
            line[f"{quality}, {name}"] = over_seeds(of_model[key], quality).text()
        change = difference(of_model[True], of_model[False], quality)
        line[f"{what} adds"] = f"{change.text('+')}, {change.verdict()}"
        if model != "base":
            minus = difference(of_model[True], found["base", steps][True], quality)
            line["with, minus base with"] = f"{minus.text('+')}, {minus.verdict()}"
        if entropy := over_seeds(of_model[False], "predictive entropy"):
            line["entropy, without"] = entropy.text()
        lines.append(line)
    return lines


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a, count = p.add_argument, number(int, 1)
    a("source", type=Path, help="a folder of models to measure, or a file of results to print")
    a("--steps", type=count, nargs="+", default=[36, 144], help="sampling steps (default: 36 144)")
    a("--eta", type=number(float, 0, 1), default=0.1, help="the most likely a token is masked (default: 0.1)")
    a("--seeds", type=count, default=3, help="sampling seeds of a model trained once (default: 3)")
    a("-n", type=count, default=256, help="samples for each seed (default: 256)")
    a("--out", type=Path, help="folder of remask.csv (default: the models', or runs/shipped/NAME)")
    args = p.parse_args()
    path = args.source
    if path.suffix != ".csv":
        domain, paths, models = open_models(args.source, "cpu")
        out = args.out or folder_for_results(args.source, domain.name)
        out.mkdir(parents=True, exist_ok=True)
        path, reference = out / "remask.csv", held_out(domain)[0]
        known = {files.key_of(row) for row in files.read(path)} if path.exists() else set()
        seeded = with_seeds(models, args.seeds)
        todo = [(*pair, k, eta) for pair in seeded for k in args.steps for eta in (0, args.eta)]
        progress = Progress("remask: row", len(todo))
        for done, (name, seed, steps, eta) in enumerate(todo):
            row = files.row_of(domain, name, paths[name])
            row |= {"seed": float(seed), "steps": float(steps), "n": float(args.n)}
            row |= {"sampler": f"remask={eta:g}"} if eta else {}
            if files.key_of(row) not in known:
                how = (domain, reference, steps, eta, seed, args.n)
                files.add(path, [row | measure_remasking(models[name], *how)])
            progress.update(done + 1, f"{name}, {steps} steps")
    rows = files.read(path)
    print("Without and with remasking; ± is a 95% interval over training seeds.")
    print_table(table(rows, results.SHOWN[rows[0]["domain"]][0]))


if __name__ == "__main__":
    run(main)
