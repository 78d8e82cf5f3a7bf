"""The paper's claims in one table: what it reports, what we measure with its recipe, and whether it holds.

    python -m data.study.claims                             print the table
    python -m data.study.claims --measure data/models/text  measure the two-pass bound and the cost of a call

A claim *holds* if the paper's recipe is better than the base and than the control, in both cases by more than
the interval over training seeds, and a share also by more than the number of samples explains. It *does not
hold* if it is no better than one of them. Otherwise it is *not settled*. The two-pass perplexity is exp of
the NELBO per token, where the model is given the prediction of a first pass at the same masked state (the
paper's zero-shot perplexity). Predictive entropy stands beside what comes from samples, because a lower one
makes samples better for free.
"""

import argparse
import math
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from data import windows
from data.study import files, results
from data.study.bench import open_models
from data.study.metrics import difference, over_seeds
from data.terminal import number, print_table, run
from train import validate

HERE = results.HERE / "results"
OURS = {"base": "base", "control": "rate0", "the paper's recipe": "rate1"}


def rows_of(name, steps=None):
    """Return {model: rows} of a results file, of all temperatures at one number of steps; {} if none."""
    found = {}
    for row in files.read(HERE / name) if (HERE / name).exists() else []:
        plain = not row.keys() & {"signal", "sampler", "orders"} and row["model"] != "real"
        if plain and row.get("steps") == steps:
            found.setdefault(row["model"], []).append(row)
    return found


def warm(rows):
    return [row for row in rows if row.get("temperature", 1) == 1]


def verdict(changes, better):
    """Judge the differences of the paper's recipe from others. better: +1 if more is better, else -1."""
    seeds = " (one seed)" if any(change.half is None for change in changes) else ""
    if not all(change.mean * better > 0 for change in changes):
        return "does not hold" + seeds
    settled = not seeds and all(abs(change.mean) > change.half for change in changes)
    return "holds" if settled else "not settled" + seeds


def line_of(claim, paper, models, metric, better, against=("base", "rate0"), write=None):
    """Return a line of the table. models {model: rows}; against: those that must be worse."""
    line, entropies = {"claim": claim, "the paper": paper}, []
    write = write or (lambda rows: over_seeds(rows, metric).text())
    models = {model: warm(rows) for model, rows in models.items()}
    for label, model in OURS.items():
        if rows := models.get(model):
            line[label] = write(rows)
            if entropy := over_seeds(rows, "predictive entropy"):
                entropies.append(entropy._replace(half=None).text())
    line["predictive entropy"] = ", ".join(entropies)
    if not all(models.get(model) for model in (*against, "rate1")):
        return line | {"verdict": "not measured yet"}
    changes = [difference(models["rate1"], models[other], metric) for other in against]
    if metric == "valid":
        errors = [sampling_error(models["rate1"], models[other], metric) for other in against]
        changes = [change if change.half is None else change._replace(half=max(change.half, error))
                   for change, error in zip(changes, errors)]  # fmt: skip
    return line | {"verdict": verdict(changes, better)}


def sampling_error(rows, others, share):
    """Return the 95% half width that a difference of two shares has if only the samples were drawn anew."""
    means = [(over_seeds(group, share).mean, sum(row["n"] for row in group)) for group in (rows, others)]
    return 1.96 * math.sqrt(sum(p * (1 - p) / n for p, n in means))


def at_equal_entropy(claim, models, metric):
    """Return the line of a metric minus the base's and the control's at the recipe's predictive entropy."""
    line, changes, found = {"claim": claim, "the paper": "not reported"}, [], []
    for label, other in (("base", "base"), ("control", "rate0")):
        curve = [results.on_curve(row, models[other], "predictive entropy", metric)
                 for row in warm(models["rate1"])]  # fmt: skip
        change = difference(warm(models["rate1"]), [row for row in curve if row], metric)
        found.append(f"minus {label} {change.text('+')}")
        changes.append(change)
    return line | {"the paper's recipe": ", ".join(found), "verdict": verdict(changes, -1)}


def as_perplexity(metric, base):
    """Return a function that writes exp of a bound in nats per token, and how it differs from the base's."""

    def write(rows):
        change = difference(rows, base, metric)
        text = f"{math.exp(over_seeds(rows, metric).mean):.3f}"
        if rows[0]["model"] == "base":
            return text
        half = "" if change.half is None else f" ± {100 * math.exp(change.mean) * change.half:.1f}"
        return f"{text} ({100 * math.expm1(change.mean):+.1f}{half}%)"

    return write


def claims():
    """Return the lines of the table."""
    text, molecules = rows_of("text/results.csv", 64), rows_of("molecules/results.csv", 32)
    images, dna = rows_of("images/results.csv", 64), rows_of("dna/results.csv", 64)
    cost = rows_of("text/two_pass.csv")
    perplexity, lines = "generative perplexity", []

    claim = "text: lower generative perplexity at equal steps"
    lines.append(line_of(claim, "42.89 to 23.72", text, perplexity, -1))
    lines.append(at_equal_entropy("the same at equal predictive entropy", text, perplexity))
    for name, paper, models, half, metric, better in (
        ("text", "37.04 to 23.72", text, rows_of("text/half.csv", 64), perplexity, -1),
        ("molecules", "not reported", molecules, rows_of("molecules/half.csv", 32), "valid", 1),
    ):  # rate 0.5 takes the place of the control
        pair, claim = {"rate0": half.get("rate0.5", []), "rate1": models["rate1"]}, "rate 1 beats rate 0.5"
        line = line_of(f"{name}: {claim}", paper, pair, metric, better, against=("rate0",))
        lines.append(line | ({"control": f"rate 0.5: {line['control']}"} if "control" in line else {}))
    for name, title in (("text", "text"), ("sudoku", "Sudoku")):
        models = rows_of(f"{name}/two_pass.csv")
        if models:  # all seeds have the same sequences and masks, so the base is the partner of each
            models["base"] = [models["base"][0] | {"seed": row["seed"]} for row in models["rate1"]]
        write = as_perplexity("two-pass bound", models.get("base", []))
        paper = "1.9 to 6.1% lower" if name == "text" else "not reported"
        claim = f"{title}: lower two-pass perplexity"
        lines.append(line_of(claim, paper, models, "two-pass bound", -1, write=write))
    write = as_perplexity("bound", warm(text["base"]))
    claim = "text: lower perplexity by the sampler's bound"
    line = line_of(claim, "not reported", text, "bound", -1, write=write)
    lines.append(line | {"predictive entropy": ""})
    line = {"claim": "no extra cost while sampling", "the paper": "one call for each step"}
    if cost:
        flops = {model: over_seeds(rows, "flops").mean for model, rows in cost.items()}
        more = f"one call, {100 * (flops['rate1'] / flops['base'] - 1):.1f}% more arithmetic"
        line |= {"base": "one call", "control": "one call", "the paper's recipe": more, "verdict": "holds"}
    lines.append({"verdict": "not measured yet"} | line)
    paper = "0.580 ± 0.009 to 0.604 ± 0.013"
    lines.append(line_of("molecules: more are valid", paper, molecules, "valid", 1))
    lines.append(line_of("images: smaller Fréchet distance", "86.48 to 78.59", images, "Frechet", -1))
    lines.append(line_of("genomics: closer distribution of codons", "closer", dna, "JS codons", -1))
    lines.append(line_of("genomics: closer distribution of amino acids", "closer", dna, "JS amino acids", -1))
    lines.append({"claim": "text: better score under a large language model", "the paper": "33.1 to 36.5",
                  "verdict": "not measured"})  # fmt: skip
    return lines


def measure(folder, n, batch_size=64):
    """Return rows with each model's NELBO, of both passes if it is adapted, and the FLOPs of one call."""
    domain, paths, models = open_models(folder, "cpu")
    val, rows = windows(domain.load()[1], domain.length, n), []
    for name, model in models.items():
        row = files.row_of(domain, name, paths[name])
        xt = torch.full((1, domain.length), model.mask_id)
        with FlopCounterMode(display=False) as counter:
            model(xt, torch.full((*xt.shape, model.mask_id), 1 / model.mask_id))
        row |= {"n": float(len(val)), "unit": "nats per token", "flops": float(counter.get_total_flops())}
        rows.append(row | {"two-pass bound": validate(model, val, batch_size)})
        print(f"{name}: {rows[-1]['two-pass bound']:.4f} nats per token", flush=True)
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--measure", type=Path, metavar="FOLDER", help="measure the models of a folder first")
    p.add_argument("-n", type=number(int, 1), default=1024, help="at most so many held-out sequences")
    p.add_argument("--out", type=Path, help="file of what is measured (default: results/DOMAIN/two_pass.csv)")
    args = p.parse_args()
    if args.measure:
        rows = measure(args.measure, args.n)
        files.add(args.out or HERE / rows[0]["domain"] / "two_pass.csv", rows)
    print("The predictive entropies are those of the numbers before them; ± is over training seeds.")
    print_table(claims())


if __name__ == "__main__":
    run(main)
