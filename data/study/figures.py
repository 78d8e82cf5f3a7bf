"""The figures of a results file: quality against predictive entropy, and the bound against sampling steps."""

from pathlib import Path

import numpy as np

from data import BadInput
from data.study.results import shown, words

COLOURS = {"base": "black", "rate0": "tab:gray", "rate1": "tab:blue", "rate1-unroll8": "tab:orange"}
OTHERS = ["tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:cyan", "tab:olive"]


def draw(rows, folder):
    """Draw frontier.png and bound.png of one domain's rows, as far as the rows allow it."""
    rows = [row for row in rows if "sampler" not in row and "signal" not in row]
    models = dict.fromkeys(row["model"] for row in rows if row["model"] != "real")
    others = iter(OTHERS * len(models))
    colours = {model: COLOURS.get(model) or next(others) for model in models}
    if len({row["temperature"] for row in rows}) > 1:
        frontier(rows, shown(rows)[0], colours, Path(folder) / "frontier.png")
    if len({row["steps"] for row in rows if "bound" in row}) > 1:
        bound(rows, colours, Path(folder) / "bound.png")


def blank_axes(xlabel, ylabel):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("figures need matplotlib: pip install matplotlib") from None
    axes = Figure(figsize=(7, 4.2), layout="constrained").subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return axes


def curves(axes, rows, colours, by, x, y):
    """Draw a line for each model through its means over seeds, at each value of `by`. Returns the points."""
    points = {}  # {(model, value): [(x, y) of each seed]}
    for row in sorted(rows, key=lambda row: row[by]):
        points.setdefault((row["model"], row[by]), []).append((row[x], row[y]))
    points = {key: tuple(np.mean(seeds, axis=0)) for key, seeds in points.items()}
    for model, colour in colours.items():
        if line := [point for key, point in points.items() if key[0] == model]:
            axes.plot(*zip(*line), marker=".", color=colour, label=words(model))
    return points


def finish(axes, path):
    axes.figure.legend(loc="outside upper center", ncols=3, frameon=False)
    axes.figure.savefig(path, dpi=100)  # 700 pixels wide
    print(f"figure: {path}")


def frontier(rows, quality, colours, path):
    """Draw quality against predictive entropy, because a colder sampler has more of the first for free.

    There is a curve for each model over its temperatures, at the number of steps with most of them. The large
    dot is temperature 1.
    """
    axes = blank_axes(f"predictive entropy, {rows[0]['unit']}", quality)
    real = [row for row in rows if row["model"] == "real" and quality in row]
    rows = [row for row in rows if "predictive entropy" in row and quality in row]
    warmth = {(row["steps"], row["temperature"]) for row in rows}
    steps = max((steps for steps, _ in warmth), key=lambda steps: (sum(s == steps for s, _ in warmth), steps))
    rows = [row for row in rows if row["steps"] == steps]
    points = curves(axes, rows, colours, "temperature", "predictive entropy", quality)
    for (model, temperature), point in points.items():
        if temperature == 1:
            axes.scatter(*point, s=80, color=colours[model], zorder=3)
    if real:
        y = np.mean([row[quality] for row in real])
        if "entropy" in real[0]:
            axes.plot(real[0]["entropy"], y, "*", markersize=14, color="tab:red", label="real data")
        else:
            axes.axhline(y, color="tab:red", linestyle="--", linewidth=1, label="real data")
    finish(axes, path)


def bound(rows, colours, path):
    """Draw the bound minus the base's against the number of sampling steps, with a dot for each seed."""
    axes = blank_axes("sampling steps", f"bound minus the base's,\n{rows[0]['unit']} (lower is better)")
    rows = [row for row in rows if "bound minus base" in row and row["model"] != "base"]
    axes.axhline(0, color=COLOURS["base"], linewidth=1, label="base")
    curves(axes, rows, colours, "steps", "steps", "bound minus base")
    for row in rows:
        axes.scatter(row["steps"], row["bound minus base"], s=6, alpha=0.6, color=colours[row["model"]])
    axes.set_xscale("log", base=2)
    ticks = sorted({row["steps"] for row in rows})
    axes.set_xticks(ticks, [f"{steps:g}" for steps in ticks])
    finish(axes, path)
