"""Sample: generate, infill, watch, evaluate.

    python sample.py                                    vanilla and SCMDM side by side: same seed, same number of calls
    python sample.py --prompt "To be, or ____ to be"    fill the blanks, one token for each _, and write on after the end
    python sample.py --watch                            see the masks become text
    python sample.py --evaluate                         measure both, and SCMDM with its signal switched off
    python sample.py --data molecules -n 1000           another domain; --models DIR for models of your own

This file is sampling and its measures: the method is in scmdm.py, the domains are in data/.
"""

import argparse
import itertools
import math
import re
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from scmdm import COSINE, LINEAR, load, sample

SHIPPED = Path(__file__).parent / "data" / "models"
TIMES = ("ms/call", "outside, %")  # wall time of a denoiser call with all around it; the share that is not the denoiser
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 95%, for 2 to 10 seeds


# ---------------------------------------------------------------------------------------------
# Shared with train.py
# ---------------------------------------------------------------------------------------------


def fail(message):
    """What bad input gets: one line and exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def run(main):
    """Call main(); what it finds wrong with its input becomes one line."""
    try:
        main()
    except (ValueError, OSError) as error:
        fail(" ".join(str(error).split()))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate" not in str(error):
            raise
        fail("out of memory, expected a smaller batch, model or number of sequences")
    except KeyboardInterrupt:
        sys.exit(130)


def pick_device(name):
    """auto, cpu, cuda, cuda:N or mps -> torch.device. Raises ValueError for one that is not there."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if found[kind])
    kind, _, number = name.partition(":")
    if kind not in found or name != kind and not (kind == "cuda" and number.isdigit()):
        raise ValueError(f"--device is {name!r}, expected auto, cpu, cuda, cuda:N or mps")
    if not found[kind] or number and int(number) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there is none on this machine, expected auto or cpu")
    return torch.device(name)


def find_model(folder, name, kind):
    """The path of the model `kind` (base, scmdm, judge): in the folder, else the one shipped for the domain, else None."""
    for path in (Path(folder) / f"{kind}.npz", SHIPPED / name / f"{kind}.npz"):
        if path.exists():
            return path


def load_judge(folder, domain, name, device):
    """The causal model that measures generative perplexity, or None if there is none for these tokens."""
    path = find_model(folder, name, "judge")
    judge = load(path, device) if path else None
    if judge and not (judge.config.causal and judge.info.get("vocab") == domain.vocab):
        raise ValueError(f"{path}: not a judge of the tokens of {name}")
    return judge


def status(line, last=False):
    """One line that is written over in a terminal, never wider than it; in a log file a line of its own."""
    if sys.stdout.isatty():
        line = "\r\033[K" + line[: shutil.get_terminal_size().columns - 1]
    print(line, end="" if sys.stdout.isatty() and not last else "\n", flush=True)


def clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m{seconds:02}s"


def windows(rows, length, most=None):
    """A stream [N] cut into windows [N // length, length], end to end; rows [N, L] as they are.
    If there are more than `most`, that many, spread evenly from the first to the last."""
    if rows.ndim == 1:
        rows = rows[: len(rows) // length * length].reshape(-1, length)
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), most or len(rows))).round().astype(int)]


# ---------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------


def judge_nll(judge, x):
    """-log p(x) of each sequence x [B, L] under a causal model. [B], nats a sequence.

    Position i is predicted from the tokens before it; the first from the mask token, which starts every sequence.
    """
    start = torch.full_like(x[:, :1], judge.mask_id)
    logits = judge(torch.cat((start, x[:, :-1]), dim=1)).float()  # [B, L, V]
    return F.cross_entropy(logits.flatten(0, 1), x.flatten(), reduction="none").view(x.shape).sum(1)


def unigram_entropy(x):
    """Entropy, in nats, of the distribution of the tokens within each sequence of x [N, L], averaged over the sequences.

    It falls when samples repeat themselves, which generative perplexity rewards.
    """
    counts = np.stack([(x == token).sum(1) for token in np.unique(x)], axis=1)  # [N, tokens in use]
    p = counts / x.shape[1]
    return float(-(p * np.log(np.where(p > 0, p, 1))).sum(1).mean())


def distinct(x, n=4):
    """Share of the n-grams in x [N, L] that are different from one another. It falls when samples repeat each other."""
    n = min(n, x.shape[1])
    grams = np.lib.stride_tricks.sliding_window_view(x, n, axis=1).reshape(-1, n)
    return len(np.unique(grams, axis=0)) / len(grams)


@torch.no_grad()
def measure(domain, x, reference, judge):
    """{measure: value} of the sequences x [N, L]: those of every domain, then the domain's own."""
    values = {}
    if judge is not None:
        rows = torch.from_numpy(x.astype(np.int64)).to(next(judge.parameters()).device)
        nll = torch.cat([judge_nll(judge, part) for part in rows.split(64)]).sum().item()
        values["gen. ppl"] = math.exp(min(nll / x.size, 700))  # an untrained judge can be more surprised than a float holds
    values |= {"entropy": unigram_entropy(x), "distinct-4": distinct(x)}
    return values | domain.score(x, reference)


def mean_interval(values, digits=None):
    """'mean ± half the width of the 95% interval of the mean', the values being one a seed; by default with four digits."""
    mean = statistics.mean(values)
    if digits is None:
        digits = max(0, 3 - max(0, math.floor(math.log10(abs(mean))))) if mean else 3
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    half = T95[min(len(values) - 2, len(T95) - 1)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def generate(denoiser, canvas, mask_id, steps, seed, batch=64, **options):
    """Fill the canvas [N, L] in batches -> (tokens [N, L], seconds, seconds in the denoiser)."""
    inside = 0.0

    def wait():  # a GPU runs behind: its time is known once it is done
        if canvas.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def timed(xt, x0_prev):
        nonlocal inside
        began = wait()
        logits = denoiser(xt, x0_prev)
        inside += wait() - began
        return logits

    generator = torch.Generator(canvas.device).manual_seed(seed)
    began = wait()
    rows = [sample(timed, x, mask_id, steps, generator=generator, **options) for x in canvas.split(batch)]
    return torch.cat(rows), wait() - began, inside


def evaluate(denoisers, domain, val, judge, n, calls, seeds, device, **options):
    """{(model, calls): [{measure: value}, one a seed]}: real data first, then each denoiser at each number of calls.

    denoisers {name: callable}; n sequences a seed. Every model gets the same seeds and the same number of calls, and
    they take turns, so that a machine that slows down slows them all. val [N, L] are real windows: one half is the
    reference, and the row of the other, a part of it a seed, says what the measures give when nothing is wrong.
    """
    mask_id, length = len(domain.vocab), val.shape[1]
    val = np.random.default_rng(0).permutation(val)  # or its two halves would be different plays, or species
    reference, rest = np.array_split(val, 2)
    most = max(1, len(rest) // len(seeds))
    parts = np.random.default_rng(seeds[0]).permutation(rest)[: min(n, most) * len(seeds)]
    label = "real, held out" if n <= most else f"real, held out ({most} each)"
    results = {(label, ""): [measure(domain, x, reference, judge) for x in np.array_split(parts, min(len(seeds), len(parts)))]}
    canvas = torch.full((n, length), mask_id, device=device)
    total, done, began = len(seeds) * len(denoisers) * sum(calls), 0, time.time()
    for steps, seed in itertools.product(calls, seeds):
        for name, denoiser in denoisers.items():
            x, seconds, inside = generate(denoiser, canvas, mask_id, steps, seed, **options)
            values = measure(domain, x.cpu().numpy(), reference, judge)
            batches = math.ceil(n / 64)
            values |= {"ms/call": 1000 * seconds / steps / batches, "outside, %": 100 * (1 - inside / seconds)}
            results.setdefault((name, steps), []).append(values)
            done += steps
            if sys.stdout.isatty():
                left = clock((time.time() - began) / done * (total - done))
                status(f"evaluate  {left} left  {name}, {steps} calls, seed {seed}")
    if sys.stdout.isatty():
        print("\r\033[K", end="")
    return results


def table_of(results):
    """What evaluate() returns as rows of {column: text}: the mean over the seeds and its 95% interval; times as medians."""
    return [
        {"model": name, "calls": steps}
        | {key: mean_interval([v[key] for v in values]) for key in values[0] if key not in TIMES}
        | {key: f"{statistics.median(v[key] for v in values):.1f}" for key in TIMES if key in values[0]}
        for (name, steps), values in results.items()
    ]


def draw_results(results, path):
    """Plot the first measure against the number of calls, one dot a seed, if matplotlib is there. Returns a line that says so."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return "no figure: it needs matplotlib (pip install matplotlib)"
    (_, real), *others = results.items()
    measure_name = next(iter(real[0]))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.axhline(statistics.mean(v[measure_name] for v in real), color="grey", linestyle="--", label="real, held out")
    for name in dict.fromkeys(name for (name, _), _ in others):
        points = [(steps, [v[measure_name] for v in values]) for (label, steps), values in others if label == name]
        (line,) = axes.plot(*zip(*[(steps, statistics.mean(values)) for steps, values in points]), label=name)
        axes.scatter(*zip(*[(steps, value) for steps, values in points for value in values]), s=9, color=line.get_color())
    ticks = [steps for steps, _ in points]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, ticks)
    axes.set(xlabel="denoiser calls", ylabel=measure_name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    return f"figure: {path}"


def print_table(rows):
    """Rows of {column: value} as a Markdown table, aligned to be read as it is."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[str(row.get(key, "")) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for number, line in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


# ---------------------------------------------------------------------------------------------
# The terminal
# ---------------------------------------------------------------------------------------------


def canvas_of(prompt, domain, length):
    """A prompt -> a canvas [L] of tokens: one mask for each _, and masks after the end."""
    canvas = []
    for piece in re.split("(_+)", prompt):
        try:
            canvas += [len(domain.vocab)] * len(piece) if piece.startswith("_") else domain.encode(piece)
        except KeyError as error:
            known = [token for token in domain.vocab if token != getattr(domain, "end", None)]
            known = getattr(domain, "join", "").join(known) if len(known) < 200 else f"{len(known)} others"
            raise ValueError(f"--prompt has {error.args[0]!r}, which the model has never seen; it knows {known!r}")
    if len(canvas) > length:
        raise ValueError(f"--prompt has {len(canvas)} tokens, expected at most {length}, the model's length")
    return torch.tensor(canvas + [len(domain.vocab)] * (length - len(canvas)))


def draw_frame(domain, x, guess, mask_id, width, colour):
    """A state x [L] as lines of text, each `width` wide. A masked position shows its current guess, dim."""
    lines, line, used = [], "", 0
    end = domain.vocab.index(domain.end) if getattr(domain, "end", None) else None
    for i, (token, likely) in enumerate(zip(x.tolist(), guess.tolist())):
        masked = token == mask_id
        shown = likely if masked else token
        cell = domain.cell(shown) if hasattr(domain, "cell") else domain.decode([shown])
        if shown == end:
            if not masked:
                break  # what follows is padding
            cell = "."  # a guess that the sequence ends here
        end_of_row = cell == "\n" and not masked or (i + 1) % getattr(domain, "row", len(x) + 1) == 0
        cell = cell.replace("\n", "↵" if masked else "") + getattr(domain, "join", "")
        if used + len(cell) > width:
            lines.append(line + " " * (width - used))
            line, used = "", 0
        used += len(cell)
        if masked:
            cell = f"\033[2m{cell}\033[0m" if colour else "·" * len(cell)
        line += cell
        if end_of_row:
            lines.append(line + " " * (width - used))
            line, used = "", 0
    return [*lines, line + " " * (width - used)] if used or not lines else lines


def side_by_side(columns, width):
    """Lists of lines, each `width` wide -> one string, the lists beside each other."""
    rows = itertools.zip_longest(*columns, fillvalue=" " * width)
    return "\n".join(" | ".join(row).rstrip() for row in rows)


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = fail
    a = p.add_argument
    a("--data", help=f"whose shipped models: {', '.join(data.NAMES)} (default: text)")
    a("--models", help="folder of models trained with train.py, instead: base.npz, scmdm.npz, judge.npz")
    a("--model", choices=("both", "base", "scmdm"), default="both", help="which of them (default: both)")
    a("--prompt", help="known tokens, with a _ for each blank; what follows its end is written too")
    a("-n", type=int, help="how many sequences; with --evaluate, for each seed (default: 2; 64 to evaluate)")
    a("--steps", type=int, nargs="+", default=[64], help="denoiser calls; several to evaluate at each (default: 64)")
    a("--temperature", type=float, default=1.0, help="below 1 sharper, 0 the likeliest token (default: 1)")
    a("--top-p", type=float, default=1.0, help="draw from the smallest set of tokens of this mass (default: 1, all)")
    a("--order", choices=("random", "confidence"), default="random", help="which masks first (default: random)")
    a("--schedule", choices=("linear", "cosine"), default="linear", help="how many at each step (default: linear)")
    a("--seed", type=int, default=0, help="same seed, same device, same tokens (default: 0)")
    a("--seeds", type=int, default=3, help="evaluate: how many seeds, from --seed on (default: 3)")
    a("--device", default="auto", help="auto, cpu, cuda or mps (default: auto, the fastest there is)")
    a("--watch", action="store_true", help="play the steps; a masked position shows its current guess, dim")
    a("--evaluate", action="store_true", help="print the table of measures, not the samples")
    args = p.parse_args()
    args.n = (64 if args.evaluate else 2) if args.n is None else args.n
    for name, values in (("-n", [args.n]), ("--steps", args.steps), ("--seeds", [args.seeds])):
        if min(values) < 1:
            fail(f"{name} is {min(values)}, expected 1 or more")
    if not 0 <= args.temperature < math.inf:
        fail(f"--temperature is {args.temperature}, expected 0 or more")
    if not 0 < args.top_p <= 1:
        fail(f"--top-p is {args.top_p}, expected more than 0 and at most 1")
    if not 0 <= args.seed < 2**31:
        fail(f"--seed is {args.seed}, expected 0 to 2**31 - 1")
    if args.data not in (None, *data.NAMES) and not args.models:
        fail(f"--data is {args.data!r}, expected one of {', '.join(data.NAMES)}; for models of your own, --models DIR")
    if args.evaluate and args.n < 2:
        fail(f"-n is {args.n}, expected 2 or more to evaluate")
    args.steps = sorted(set(args.steps))
    if len(args.steps) > 1 and not args.evaluate:
        fail(f"--steps is {args.steps}, expected one number without --evaluate")
    return args


def main():
    args = parse()
    device = pick_device(args.device)
    folder = Path(args.models or SHIPPED / (args.data or "text"))
    if not folder.is_dir():
        if not args.models:
            raise ValueError(f"--data {args.data}: no models are shipped for it; train.py makes them, --models takes them")
        raise ValueError(f"--models {folder}: no such folder")

    # The first model says what the tokens are.
    first = next((path for kind in ("scmdm", "base") if (path := folder / f"{kind}.npz").exists()), None)
    info = load(first).info if first else {}
    if not {"vocab", "data", "length", "end"} <= info.keys():  # what train.py saves with a model
        raise ValueError(f"{folder}: no base.npz or scmdm.npz made by train.py")
    domain = data.from_info(info)
    name, length = info["data"], info["length"]
    if args.data not in (None, name):
        fail(f"--data is {args.data}, but the models in {folder} are of {name}")
    models = {}
    for kind, label in (("base", "vanilla"), ("continued", "vanilla, trained on"), ("scmdm", "SCMDM")):
        if kind == "continued" and not (args.evaluate and (folder / "continued.npz").exists()):
            continue  # the control, trained as much longer as SCMDM but without the signal, is only measured
        if args.model in ("both", kind) and (path := folder / f"{kind}.npz").exists():
            models[label] = model = load(path, device).eval()
            config, tokens = model.config, model.info.get("vocab")
            if tokens != domain.vocab or config.vocab_size != len(tokens) or config.length != length or config.causal:
                raise ValueError(f"{path}: a model of other tokens, expected those of {name}, {length} long")
    if not models:
        raise ValueError(f"{folder}: no {args.model}.npz, see train.py")
    options = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "order": args.order,
        "schedule": {"linear": LINEAR, "cosine": COSINE}[args.schedule],
    }

    if args.evaluate:
        if args.prompt:
            fail("--prompt with --evaluate: the measures are of free samples, expected one of the two")
        if not hasattr(domain, "load"):
            fail(f"--evaluate: {name} is not in data/, so there is no real data to compare with")
        judge = load_judge(folder, domain, name, device)
        if "SCMDM" in models:
            adapted = models["SCMDM"]
            models["SCMDM, signal off"] = lambda xt, x0_prev: adapted(xt, None)
        val = windows(domain.load()[1], length)
        seeds = range(args.seed, args.seed + args.seeds)
        print(f"{name}: {args.n} sequences of {length} tokens for each of {args.seeds} seeds, on {device}")
        print_table(table_of(evaluate(models, domain, val, judge, args.n, args.steps, seeds, device, **options)))
        return

    mask_id = len(domain.vocab)
    canvas = canvas_of(args.prompt or "", domain, length).expand(args.n, length).to(device)
    columns = shutil.get_terminal_size((120, 24)).columns
    samples, films, width = {}, [], min(56, (columns + 1) // len(models) - 3)
    for label, model in models.items():
        film = []  # the frames of the first sequence

        def on_step(step, x, x0_prev):
            if len(film) < args.steps[0]:  # not those of the batches after the first
                film.append(draw_frame(domain, x[0], x0_prev[0].argmax(-1), mask_id, width, sys.stdout.isatty()))

        watch = {"on_step": on_step} if args.watch else {}
        samples[label], seconds, _ = generate(model, canvas, mask_id, args.steps[0], args.seed, **options, **watch)
        films.append(film)
        print(f"{label}: {args.steps[0]} calls, {seconds:.1f} seconds", file=sys.stderr)

    if args.watch:
        for step, columns in enumerate(zip(*films)):
            title = " | ".join(f"{label}, call {step + 1}".ljust(width) for label in models)
            print(("\033[H\033[J" if sys.stdout.isatty() else "\n") + title)
            print(side_by_side(columns, width), flush=True)
            if sys.stdout.isatty():
                time.sleep(max(0.03, 4 / args.steps[0]))  # the whole film takes some four seconds
        print()
    print(" | ".join(label.ljust(width) for label in models).rstrip())
    for i in range(args.n):
        columns = [draw_frame(domain, x[i], x[i], mask_id, width, False) for x in samples.values()]
        print(" | ".join(["-" * width] * len(columns)))
        print(side_by_side(columns, width))
    for label, x in samples.items():
        if hasattr(domain, "picture"):
            print(domain.picture(x.cpu().numpy(), f"{name}-{label.lower()}.png"))


if __name__ == "__main__":
    run(main)
