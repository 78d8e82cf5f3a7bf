"""The results: one CSV file, and from its rows a table, a sentence and two figures. Knows no models."""

import csv
from pathlib import Path

import numpy as np

from data.study.measures import mean_interval
from sample import SHIPPED, best, label

STUDY = Path(__file__).parent


def folder_for(models):
    """The folder for the results of a folder of models: it, but the current one for the shipped models."""
    models = Path(models)
    return Path() if SHIPPED.resolve() in models.resolve().parents else models


def shipped(name):
    """The results file of a domain's shipped models."""
    return STUDY / "results" / name / "results.csv"


# --- the file ---


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


def read_csv(path):
    """The rows of a results file as {column: float or text}. A row has no key for a cell left empty."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: number(text) for key, text in row.items() if text} for row in csv.DictReader(file)]


def append_csv(path, row):
    """Add a row to a results file, which is made if need be; a column that it lacks is added to all rows."""
    path, old = Path(path), []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            old = list(csv.DictReader(file))
    columns = list(dict.fromkeys(key for r in [*old, row] for key in r))
    append = old and len(columns) == len(old[0])
    with path.open("a" if append else "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if not append:
            writer.writeheader()
            writer.writerows(old)
        writer.writerow(row)


# --- the table ---


def print_table(rows):
    """Rows of {column: value} as a Markdown table, aligned to be read as it is."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[str(row.get(key, "")) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    cells.insert(1, ["-" * width for width in widths])
    for line in cells:
        print(" | ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def less_base(rows):
    """(bound minus base, half of its 95% interval) over rows of several seeds, each of its own sequences."""
    half = sum(row["half"] ** 2 for row in rows) ** 0.5 / len(rows)
    return np.mean([row["minus base"] for row in rows]), half


def report(rows, domain, quality):
    """Print the table of rows at temperature 1, means over their seeds, and a sentence of what it says.

    Columns: the sampler's bound; its paired difference from the base's; `quality`; predictive entropy.
    Other measures are in the file. ± is a 95% interval: of the bound over the sequences, of the rest over
    the seeds.
    """
    unit, groups, table = rows[0]["unit"], {}, []  # groups: {(model, signal, calls): rows of its seeds}
    for row in rows:
        if row["temperature"] == 1:
            groups.setdefault((row["model"], row.get("signal"), row["calls"]), []).append(row)
    for (model, signal, calls), group in groups.items():
        if signal:
            continue
        line = {"model": label(model), "calls": f"{calls:g}" if calls else "", "bound": "", "minus base": ""}
        if "bound" in group[0]:
            line["bound"] = f"{np.mean([row['bound'] for row in group]):.4g}"
            line["minus base"] = "{:+.3f} ± {:.3f}".format(*less_base(group)) if model != "base" else ""
        for measure, name in ((quality, quality), ("completed", "completed"), ("path entropy", "entropy")):
            if measure in group[0] and not (model == "real" and name == "entropy"):
                line[name] = mean_interval([row[measure] for row in group], digits=3)
        table.append(line)
    if domain.entropy:
        truth = {"bound": f"{domain.entropy:.4g}", quality: "1.000", "entropy": f"{domain.entropy:.3f}"}
        table.append({"model": "the truth"} | truth)
    print_table(table)
    print(f"bound: of -log p, under the sampler, lower is better; entropy: of what is drawn from. {unit}.")
    others, most = {}, max(calls for _, _, calls in groups)  # {model: how it fares with each other signal}
    for (model, signal, calls), group in groups.items():
        if signal and calls == most:
            others.setdefault(model, []).append(f"{signal} {less_base(group)[0]:+.3f}")
    for model, words in others.items():
        print(f"{label(model)} with another signal than its own, bound minus base: {', '.join(words)}.")
    conclude(groups, quality)


def conclude(groups, quality):
    """Print one sentence of what the table says of the best arm at the most calls."""
    calls = max(calls for _, _, calls in groups)
    last = {model: group for (model, signal, c), group in groups.items() if c == calls and not signal}
    arm = best(last)
    if arm is None or "bound" not in last[arm][0]:
        return
    gain, half = less_base(last[arm])
    ours, base = (np.mean([row[quality] for row in last[model]]) for model in (arm, "base"))
    compared = "lower than" if gain < -half else "higher than" if gain > half else "no different from"
    print(f"At {calls:g} calls {label(arm)} has {quality} {ours:.3f} where the base has {base:.3f};")
    print(f"its bound is {compared} the base's ({gain:+.3f} ± {half:.3f} {last[arm][0]['unit']}).")


# --- figures, of the rows of a results file: model, seed, calls, temperature, and measures ---

COLOURS = {"base": "black", "rate0": "tab:gray", "rate1": "tab:blue", "rate1-unroll16": "tab:orange"}
OTHERS = ["tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:cyan", "tab:olive"]


def blank_axes(xlabel, ylabel):
    """Axes to draw on; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    axes = Figure(figsize=(7, 4.2), layout="constrained").subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return axes


def draw_curves(axes, rows, colours, by, x, y):
    """A line for each model, through its means over seeds at each value of `by`. Returns the means."""
    points = {}  # {(model, value): (x, y)}
    for row in sorted(rows, key=lambda row: row[by]):
        points.setdefault((row["model"], row[by]), []).append((row[x], row[y]))
    points = {key: tuple(np.mean(seeds, axis=0)) for key, seeds in points.items()}
    for model in colours:
        if line := [point for key, point in points.items() if key[0] == model]:
            axes.plot(*zip(*line), marker=".", color=colours[model], label=label(model))
    return points


def colours_of(rows):
    """{model: colour}, the same in both figures."""
    models, others = dict.fromkeys(row["model"] for row in rows if row["model"] != "real"), OTHERS * len(rows)
    return {model: COLOURS.get(model) or others.pop(0) for model in models}


def save_figure(axes, path):
    axes.figure.legend(loc="outside upper center", ncols=3, frameon=False)
    axes.figure.savefig(path, dpi=100)  # 700 pixels wide
    return f"figure: {path}"


NO_FIGURE = "no figure: it needs matplotlib (pip install matplotlib)"


def plot_bound(rows, path):
    """The sampler's bound less the base's, against the number of calls; a dot for each seed."""
    ylabel = f"sampler's bound less the base's,\n{rows[0]['unit']} (lower: better)"
    axes = blank_axes("denoiser calls", ylabel)
    if axes is None:
        return NO_FIGURE
    colours = colours_of(rows)
    rows = [row for row in rows if "bound" in row and "signal" not in row and row["model"] != "base"]
    axes.axhline(0, color=COLOURS["base"], linewidth=1, label=label("base"))
    draw_curves(axes, rows, colours, "calls", "calls", "minus base")
    for row in rows:
        axes.scatter(row["calls"], row["minus base"], s=6, alpha=0.6, color=colours[row["model"]])
    axes.set_xscale("log", base=2)
    ticks = sorted({row["calls"] for row in rows})
    axes.set_xticks(ticks, [f"{calls:g}" for calls in ticks])
    return save_figure(axes, path)


def plot_frontier(rows, quality, path):
    """A measure against the predictive entropy: a curve for each model over temperatures, 1 the large dot, at
    the number of calls that has most of them. A quality alone says little: colder sampling gets more."""
    axes = blank_axes(f"predictive entropy, {rows[0]['unit']}", quality)
    if axes is None:
        return NO_FIGURE
    colours = colours_of(rows)
    rows = [row for row in rows if quality in row]
    real = [row for row in rows if row["model"] == "real"]
    rows = [row for row in rows if row["model"] != "real" and "path entropy" in row]
    warmth = {(row["calls"], row["temperature"]) for row in rows}
    calls = max((calls for calls, _ in warmth), key=lambda calls: (sum(c == calls for c, _ in warmth), calls))
    rows = [row for row in rows if row["calls"] == calls]
    points = draw_curves(axes, rows, colours, "temperature", "path entropy", quality)
    for (model, temperature), point in points.items():
        if temperature == 1:
            axes.scatter(*point, s=80, color=colours[model], zorder=3)
    if real:
        y = np.mean([row[quality] for row in real])
        if "path entropy" in real[0]:
            axes.plot(real[0]["path entropy"], y, "*", markersize=14, color="tab:red", label="real data")
        else:
            axes.axhline(y, color="tab:red", linestyle="--", linewidth=1, label="real data")
    return save_figure(axes, path)


def at_equal(measure, rows, quality):
    """Each arm's quality beside those of base and control at the same predictive entropy, or share of
    different 4-grams, as rows of a table: what is left of a gain without sharpening, which is free. Theirs
    are read from straight lines between their temperatures; outside is nothing to compare with."""
    points, table = {}, []  # points: {(calls, model, temperature): (measure, quality) of each seed}
    for row in rows:
        if quality in row and measure in row and row["model"] != "real":
            key = row["calls"], row["model"], row["temperature"]
            points.setdefault(key, []).append((row[measure], row[quality]))
    points = {key: np.mean(seeds, axis=0).tolist() for key, seeds in sorted(points.items())}
    for (calls, model, temperature), (x, value) in points.items():
        line = {"model": label(model), "calls": f"{calls:g}", "temperature": temperature}
        line |= {measure: f"{x:.3f}", quality: f"{value:.4g}"}
        for other in ("base", "rate0"):
            curve = sorted(point for key, point in points.items() if key[:2] == (calls, other))
            if model != other and curve and curve[0][0] <= x <= curve[-1][0]:
                line[f"the {label(other)}'s there"] = f"{np.interp(x, *zip(*curve)):.4g}"
        if model != "base" and len(line) > 5:
            table.append(line)
    return table


def everything(rows, domain, folder):
    """Draw both figures in the folder, and print the table and the sentence. What is shown of the samples is
    generative perplexity if there was a scoring model, else the domain's quality (without RDKit: closed)."""
    known = ("gen. ppl", domain.quality, "closed", "unigram entropy")
    quality = next(name for name in known if name in rows[0])
    figures = [plot_frontier(rows, quality, Path(folder) / "frontier.png")]
    if any("bound" in row for row in rows):
        figures.append(plot_bound(rows, Path(folder) / "bound.png"))
    print("\n".join(dict.fromkeys(figures)) + "\n")  # without matplotlib, both say the same
    report(rows, domain, quality)
    for measure in ("path entropy", "distinct-4"):
        if table := at_equal(measure, rows, quality):
            print()
            print_table(table)


if __name__ == "__main__":  # python -m data.study.results FOLDER DOMAIN: its table and figures
    import sys

    from data import get

    folder = Path(sys.argv[1])
    rows = [row for row in read_csv(folder / "results.csv") if "sampler" not in row]  # another order, say
    most = max(row["n"] for row in rows)
    everything([row for row in rows if row["n"] == most], get(sys.argv[2]), folder)
