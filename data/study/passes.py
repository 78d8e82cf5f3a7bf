"""Repeated passes at one masked state: what a model does with its own signal, and why unrolling works.

    python -m data.study.passes runs/sudoku --t 0.6 -n 512               measure, print the tables, draw
    python -m data.study.passes data/study/results/sudoku/passes.csv     print the tables of a file

The model is called again and again while the masked sequence stays the same. Each call is given the last
call's prediction. Pass 1 has no signal, pass 2 is what the paper's recipe trains. In sampling the signal has
come through one pass for each step. The nats per masked token say how good the predictions are, the share
that is right says how good their most likely tokens are, and the predictive entropy how certain they are.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from data import BadInput
from data.study import files, results
from data.study.bench import folder_for_results, held_out, open_models
from data.study.metrics import over_seeds
from data.terminal import Progress, number, print_table, run
from scmdm import q_sample, without_mask

METRICS = ("nats per masked token", "right", "predictive entropy")


@torch.no_grad()
def repeat(denoiser, x0, xt, mask_id, passes):
    """Call the denoiser `passes` times at xt [N, L]. Returns [passes, N, 3] sums over the masked tokens.

    The three are -log p of the clean tokens x0 in nats, how many most likely tokens are right, and the
    entropy of the predictions in nats.
    """
    masked, x0_prev, sums = xt == mask_id, None, []
    for _ in range(passes):
        logits = without_mask(denoiser(xt, x0_prev), mask_id)  # [N, L, V]
        x0_prev = logits.softmax(-1)
        nll = -logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0]  # [N, L]
        right, entropy = (logits.argmax(-1) == x0).float(), torch.special.entr(x0_prev).sum(-1)
        sums.append((torch.stack((nll, right, entropy), -1) * masked[..., None]).sum(1))
    return torch.stack(sums)


def measure_passes(denoiser, rows, t, passes, mask_id, batch_size=64):
    """Return {metric: value for each pass} of held-out rows [N, L], masked at t. All models see one state."""
    x0 = torch.from_numpy(rows.astype(np.int64))
    xt = q_sample(x0, t, mask_id, generator=torch.Generator().manual_seed(0))
    batches = zip(x0.split(batch_size), xt.split(batch_size))
    sums = torch.cat([repeat(denoiser, a, b, mask_id, passes) for a, b in batches], 1).double().sum(1)
    return dict(zip(METRICS, (sums / (xt == mask_id).sum()).T.tolist()))


def tables(rows, columns=(1, 2, 3, 5, 9, 17, 33)):
    """Return {metric: table} with a line for each model and a column for each of some numbers of passes."""
    found, by_model = {}, {}
    for row in sorted(rows, key=lambda row: results.place(row["model"])):
        by_model.setdefault(row["model"], []).append(row)
    for metric in METRICS:
        found[metric] = []
        for model, group in by_model.items():
            line = {"model": results.words(model), "seeds": over_seeds(group, metric).seeds}
            for passes in columns:
                at = [row for row in group if row["passes"] == passes]
                line |= {f"{passes}": over_seeds(at, metric).text()} if at else {}
            found[metric].append(line)
    return found


def draw(rows, path):
    """Draw nats per masked token and the share right against the number of passes, with 95% intervals."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("figures need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 3.6), layout="constrained", facecolor="white")
    colours = {"base": "black", "rate0": "tab:gray", "rate1": "tab:blue"}
    titles = ("nats per masked token (lower is better)", "most likely tokens that are right, %")
    for axes, metric, title, scale in zip(figure.subplots(1, 2), METRICS, titles, (1, 100)):
        for model in dict.fromkeys(row["model"] for row in rows):
            group = [row for row in rows if row["model"] == model]
            xs = sorted({row["passes"] for row in group})
            points = [over_seeds([row for row in group if row["passes"] == x], metric) for x in xs]
            mean, half = scale * np.array([(point.mean, point.half or 0) for point in points]).T
            colour = colours.get(model, "tab:orange")
            axes.plot(xs, mean, color=colour, marker=".", label=results.words(model))
            axes.fill_between(xs, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="passes at the same masked state", xscale="log")
        axes.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylim(bottom=0)
    figure.axes[1].set_ylim(50, 100)
    lines = figure.axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=100)
    print(f"figure: {path}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a, count = p.add_argument, number(int, 1)
    a("source", type=Path, help="a folder of models to measure, or a file of results to print")
    a("--model", nargs="+", metavar="MODEL", help="only these, without their seeds (default: all)")
    a("--t", type=number(float, 1e-3, 1), default=0.6, help="the share of masked tokens (default: 0.6)")
    a("--passes", type=count, default=33, help="passes at each state (default: 33)")
    a("-n", type=count, default=512, help="held-out sequences, the same for all models (default: 512)")
    a("--out", type=Path, help="folder of passes.csv (default: the models', or runs/shipped/NAME)")
    a("--figure", action="store_true", help="draw passes.png beside the results; needs matplotlib")
    args = p.parse_args()
    path = args.source
    if path.suffix != ".csv":
        domain, paths, models = open_models(args.source, "cpu")
        out = args.out or folder_for_results(args.source, domain.name)
        out.mkdir(parents=True, exist_ok=True)
        path, mask_id, held = out / "passes.csv", len(domain.vocab), held_out(domain)[1][: args.n]
        names = [name for name in models if not args.model or name.partition("-seed")[0] in args.model]
        progress = Progress("passes: model", len(names))
        for done, name in enumerate(names):
            values = measure_passes(models[name], held, args.t, args.passes, mask_id)
            row = files.row_of(domain, name, paths[name]) | {"t": args.t, "n": float(len(held))}
            at = [{metric: values[metric][i] for metric in METRICS} for i in range(args.passes)]
            files.add(path, [row | {"passes": float(i + 1)} | at[i] for i in range(args.passes)])
            progress.update(done + 1, name)
    rows = files.read(path)
    for metric, table in tables(rows).items():
        print(f"\n{metric}, by the number of passes; ± is a 95% interval over training seeds.")
        print_table(table)
    if args.figure:
        draw(sorted(rows, key=lambda row: results.place(row["model"])), path.with_suffix(".png"))


if __name__ == "__main__":
    run(main)
