"""The tables that are printed from a results file.

    python -m data.study.results data/study/results/sudoku/results.csv     of the bench; or likelihood.csv

A file has a row for each model, seed, number of sampling steps and temperature. Every ± that is printed is a
95% interval over training seeds, and is missing where a model was trained once.
"""

import argparse
import re
from pathlib import Path

import numpy as np

from data import BadInput
from data.study.files import read
from data.study.metrics import difference, over_seeds
from data.terminal import print_table, run
from sample import label

HERE = Path(__file__).parent
SHOWN = {  # the metrics in the tables, with the quality first; the files hold more
    "sudoku": ("valid", "completed"),
    "text": ("generative perplexity", "distinct-4"),
    "molecules": ("valid", "novel", "all"),
    "images": ("Frechet",),
    "grids4": ("valid", "-log p", "entropy of the grids"),  # 4 x 4 Sudoku, counted
    "dna": ("open", "JS codons", "JS amino acids"),
}
SHOWN_ELSE = ("generative perplexity", "unigram entropy", "distinct-4")  # a file of your own: two of these

# --- The tables --------------------------------------------------------------------------------------------


def words(model):
    """Return what a reader calls a model: the label of its file name."""
    return f"from scratch, {label(model[8:])}" if model.startswith("scratch-") else label(model)


def place(model):
    """Return a model's place in tables: the base, the control, then by rate and unroll."""
    return model.startswith("scratch"), [float(part) for part in re.findall(r"[\d.]+", model)]


def groups(rows):
    """Return {(model, steps): its rows}: temperature 1, the model's own signal, no real data."""
    found = {}
    for row in sorted(rows, key=lambda row: (row["steps"], place(row["model"]))):
        if row["model"] != "real" and "signal" not in row and row.get("temperature", 1) == 1:
            found.setdefault((row["model"], row["steps"]), []).append(row)
    return found


def shown(rows):
    """Return the columns of metrics to show, of those that the rows have."""
    present = {column for row in rows for column in row}
    default = [column for column in SHOWN_ELSE if column in present][:2]
    return [column for column in SHOWN.get(rows[0]["domain"], ()) if column in present] or default


def means(rows):
    """Return the table of each model's bound, metrics and predictive entropy."""
    table, metrics, of_models = [], shown(rows), groups(rows)
    present = {column for group in of_models.values() for row in group for column in row}
    columns = [column for column in ("bound", *metrics, "predictive entropy") if column in present]
    for (model, steps), group in of_models.items():
        line = {"model": words(model), "steps": f"{steps:g}"}
        line["seeds"] = len({row.get("file", row["seed"]) for row in group})
        for column in columns:
            found = over_seeds(group, column)
            line[column] = found.text() if found else ""
        table.append(line)
    real = [row for row in rows if row["model"] == "real"]
    if real:
        values = {column: over_seeds(real, column) for column in metrics}
        exact = [key for key in ("bound", "predictive entropy") if key in columns]  # what the data itself has
        values |= {key: over_seeds(real, "entropy") for key in exact}
        # nothing was trained, so an interval would mean something else
        texts = {column: value._replace(half=None).text() for column, value in values.items() if value}
        table.append({"model": "real data"} | texts)
    return table


def differences(rows):
    """Return the table of each model's paired differences from the base and from the control."""
    table, found = [], groups(rows)
    for (model, steps), group in found.items():
        for other in ("base", "rate0"):
            if model in ("base", other) or (other, steps) not in found:
                continue
            line = {"model": words(model), "minus": words(other), "steps": f"{steps:g}"}
            for column in ("bound", *shown(rows), "predictive entropy"):
                change = difference(group, found[other, steps], column)
                if change:
                    line |= {"seeds": change.seeds, column: f"{change.text('+')}, {change.verdict()}"}
            table.append(line)
    return table


def other_signals(rows):
    """Return the table of the bound minus the base's when a model's own signal is replaced. First seed."""
    own = {(row["model"], row["steps"]): row for row in reversed(rows) if "bound minus base" in row
           and "signal" not in row and row["seed"] == 0}  # fmt: skip
    table = {}
    for row in rows:
        key = row["model"], row["steps"]
        if "signal" in row and key in own:
            line = {"model": words(row["model"]), "steps": f"{row['steps']:g}"}
            line["own signal"] = f"{own[key]['bound minus base']:+.3f}"
            table.setdefault(key, line)[row["signal"]] = f"{row['bound minus base']:+.3f}"
    return list(table.values())


def at_equal(column, rows, quality):
    """Return the table of each model's quality minus that of base and control at equal predictive entropy.

    A gain that a lower temperature would give the base too is sharpening. What is left at equal predictive
    entropy (or at an equal value of another column, such as the share of distinct 4-grams) is not. The
    quality of base and control there is read from straight lines between their temperatures, for each seed.
    Outside of their temperatures there is no comparison.
    """
    points, table = {}, []  # points: {(model, steps): rows at all temperatures}
    for row in rows:
        if quality in row and column in row and row["model"] != "real" and "signal" not in row:
            points.setdefault((row["model"], row["steps"]), []).append(row)
    for (model, steps), of_model in points.items():
        for temperature in sorted({row["temperature"] for row in of_model}):
            group = [row for row in of_model if row["temperature"] == temperature]
            line = {"model": words(model), "steps": f"{steps:g}", "temperature": f"{temperature:g}"}
            line |= {name: over_seeds(group, name).text() for name in (column, quality)}
            compared = False
            for other in ("base", "rate0"):
                there = [on_curve(row, points.get((other, steps), []), column, quality) for row in group]
                change = difference(group, [row for row in there if row], quality)
                if change and model not in ("base", other):
                    line[f"minus {words(other)} there"] = f"{change.text('+')}, {change.verdict()}"
                    compared = True
            if compared:
                table.append(line)
    return table


def on_curve(row, others, column, quality):
    """Return what another model would have at the row's value of the column: a row like that, or None."""
    others = [other for other in others if other["seed"] == row["seed"]]
    curve = sorted((other[column], other[quality]) for other in others)
    if len(curve) < 2 or not curve[0][0] <= row[column] <= curve[-1][0]:
        return None
    return others[0] | {quality: float(np.interp(row[column], *zip(*curve)))}


def report(rows):
    """Print all tables of the rows of one domain."""
    plain = [row for row in rows if "sampler" not in row] or rows
    for sampler in sorted({row.get("sampler", "") for row in rows}):
        of_sampler = [row for row in rows if row.get("sampler", "") == sampler]
        if not groups(of_sampler):
            continue
        unit = rows[0]["unit"].capitalize()
        print(f"\n{sampler or 'Random order'}. {unit}; ± is a 95% interval over training seeds.")
        print_table(means(of_sampler))
        if table := differences(of_sampler):
            print("\nPaired differences. A difference within ± is no gain, and one seed has no ±.")
            print_table(table)
    if table := other_signals(plain):
        print("\nThe bound minus the base's with another signal than the model's own. One seed.")
        print_table(table)
    quality = shown(rows)[0]
    for column in ("predictive entropy", "distinct-4"):
        if table := at_equal(column, plain, quality) if column != quality else None:
            print(f"\n{quality} at equal {column}: what is left of a gain without sharpening.")
            print_table(table)


def report_orders(rows):
    """Print the table of -log p by several orders, from the rows that likelihood.py writes."""
    found, table = {}, []
    for row in sorted(rows, key=lambda row: (row["steps"], place(row["model"]), row["orders"])):
        found.setdefault((row["model"], row["steps"], row["orders"]), []).append(row)
    for (model, steps, orders), group in found.items():
        line = {"model": words(model), "steps": f"{steps:g}", "orders": f"{orders:g}"}
        line |= {"seeds": over_seeds(group, "-log p").seeds, "-log p": over_seeds(group, "-log p").text()}
        for other, name in (("base", "minus base"), ("rate0", "minus control")):
            others = found.get((other, steps, orders), [])
            if others and other == "base":  # all seeds have the same sequences, so it is everyone's partner
                others = [others[0] | {"seed": row["seed"]} for row in group]
            change = difference(group, others, "-log p") if model not in ("base", other) else None
            line[name] = f"{change.text('+')}, {change.verdict()}" if change else ""
        if model != "base":
            line["± over sequences"] = f"{np.mean([row['half over sequences'] for row in group]):.3f}"
        table.append(line)
    unit = rows[0]["unit"].capitalize()
    print(f"{unit}; ± is a 95% interval over training seeds, except for ± over sequences.")
    print_table(table)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", type=Path, help="a results file, as the bench writes it")
    p.add_argument("--figures", action="store_true", help="draw frontier.png and bound.png beside it")
    args = p.parse_args()
    try:
        rows = read(args.file)
    except OSError as error:
        raise BadInput(f"{args.file}: {error.strerror}") from None
    for run_, domain in dict.fromkeys((row.get("run"), row["domain"]) for row in rows):
        print(f"\n## {run_ or domain}")
        of_run = [row for row in rows if (row.get("run"), row["domain"]) == (run_, domain)]
        report_orders(of_run) if "orders" in of_run[0] else report(of_run)
    if args.figures:
        from data.study.figures import draw  # which imports this module

        draw(rows, args.file.parent)


if __name__ == "__main__":
    run(main)
