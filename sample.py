"""Sample: generate, infill, watch, film, save and compare.

    python sample.py --watch -n 1                     base and SCMDM side by side, step by step, same seed
    python sample.py --data text --prompt "To ____"   fill the blanks, one token for each _, and write on
    python sample.py --data text --compare            bound and score of every model in the folder
    python sample.py --models runs/novel              models of your own

The method is in scmdm.py. Everything that measures more than --compare does is in data/study/.
"""

import argparse
import json
import math
import re
import shutil
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import torch

import data
from data import BadInput, windows
from data.film import film
from data.terminal import Progress, draw_frame, number, print_table, run, side_by_side
from scmdm import COSINE, LINEAR, load, sample, sampler_bound

SHIPPED = Path(__file__).parent / "data" / "models"


# --- Shared with train.py ----------------------------------------------------------------------------------


def pick_device(name):
    """Turn auto, cpu, cuda, cuda:N or mps into a torch.device."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(kind for kind in found if found[kind]) if name == "auto" else name
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError):
        raise BadInput(f"--device {name}: there is none on this machine, expected auto or cpu") from None
    return torch.device(name)


def read_model(path, device="cpu"):
    """Load a model file that the user named."""
    try:
        return load(path, device).eval()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise BadInput(str(error)) from None


def models_in(folder):
    """Return {name: path} of the models that train.py wrote into a folder, the base first."""
    paths = sorted(Path(folder).glob("*.npz"), key=lambda path: (path.stem != "base", path.stem))
    found = {path.stem: path for path in paths if path.stem.startswith(("base", "rate", "scratch"))}
    if "base" not in found:
        raise BadInput(f"{folder}: no base.npz there, expected a folder of models made by train.py")
    return found


def load_models(files, device):
    """Return (domain, {name: model}). All must have the base's vocabulary and be adapted from that base."""
    crc, models = zlib.crc32(files["base"].read_bytes()), {}
    for name, path in files.items():
        models[name] = model = read_model(path, device)
        info, first = model.info, models["base"]
        if "vocab" not in info:
            raise BadInput(f"{path}: a model that train.py did not make")
        if (info["vocab"], model.config.length) != (first.info["vocab"], first.config.length):
            raise BadInput(f"{path}: a model of other tokens, expected those of base.npz beside it")
        if name.startswith("rate") and info.get("made_from", {}).get("base") != crc:
            raise BadInput(f"{path}: adapted from another base than the base.npz beside it")
    return data.from_info(models["base"].info), models


def label(name):
    """Turn the file name of a model into what tables call it."""
    kind, _, seed = name.partition("-seed")
    rate, _, unroll = kind.removeprefix("rate").partition("-unroll")
    if rate == "1":
        kind = f"unroll={unroll}" if unroll else "the paper's recipe"
    elif rate != kind:  # it began with "rate"
        kind = "control" if rate == "0" else f"rate {rate}" + (f", unroll={unroll}" if unroll else "")
    return kind + (f", seed {seed}" if seed else "")


def largest_unroll(names):
    """Return the model to show beside the base: of rate 1, the one with the largest unroll; None without."""
    adapted = [name for name in names if re.fullmatch(r"rate1(-unroll\d+)?(-seed\d+)?", name)]
    return max(adapted, key=lambda name: int(re.search(r"-unroll(\d+)|$", name)[1] or 1), default=None)


# --- Compare -----------------------------------------------------------------------------------------------


def generate(denoiser, canvas, mask_id, steps, seed, batch_size=64, on_step=None, **options):
    """Fill the canvas [N, L], batch_size sequences at a time. Returns tokens [N, L].

    on_step is called for every batch. Another batch size gives other samples from the same seed.
    """
    generator = torch.Generator(canvas.device).manual_seed(seed)
    options |= {"generator": generator, "on_step": on_step}
    return torch.cat([sample(denoiser, x, mask_id, steps, **options) for x in canvas.split(batch_size)])


def held_out(domain):
    """Split the held-out sequences into two halves: rows to measure on, and the reference of the scores."""
    if domain.load is None:
        raise BadInput(f"{domain.source.get('path')}: the data is no longer there to compare with")
    rows = np.random.default_rng(0).permutation(windows(domain.load()[1], domain.length))  # [N, L]
    return np.array_split(rows, 2)


def bounds(denoiser, x0, mask_id, steps, seed, batch_size=64):
    """Return the sampler's bound of each sequence of x0 [N, L], [N] nats. Every model gets the same masks."""
    generator = torch.Generator(x0.device).manual_seed(seed)
    parts = [sampler_bound(denoiser, x, mask_id, steps, generator=generator) for x in x0.split(batch_size)]
    return torch.cat(parts).cpu().double().numpy()


def difference(a, b):
    """Return the mean of a - b [N] and half the width of its 95% interval over the N sequences."""
    d = a - b
    return d.mean(), 1.96 * d.std(ddof=1) / math.sqrt(len(d))


def compare(domain, models, all_steps, n=None, seed=0, batch_size=64):
    """Print a table of all models at each number of sampling steps, and two sentences about the largest.

    The same for every model: the held-out sequences and their masks, the number of sampling steps, the number
    of samples, and the sampling seed. n: how many sequences; by default 32,768 tokens' worth, at most 512.
    """
    rows, reference = held_out(domain)
    rows = rows[: n or max(2, min(512, 2**15 // domain.length))]
    mask_id, device = len(domain.vocab), next(models["base"].parameters()).device
    x0 = torch.from_numpy(rows.astype(np.int64)).to(device)  # [N, L]
    real, table = domain.score(rows, reference), []
    progress = Progress("compare", len(all_steps) * len(models))
    for steps in all_steps:
        bound, score = {}, {}
        for name, model in models.items():
            bound[name] = bounds(model, x0, mask_id, steps, seed, batch_size)
            minus, half = difference(bound[name], bound["base"])
            row = {"model": label(name), "steps": steps, "bound": f"{bound[name].mean():.2f}"}
            row["minus base"] = "" if name == "base" else f"{minus:+.2f} ± {half:.2f}"
            if real:  # a file of one's own has no score
                x = generate(model, torch.full_like(x0, mask_id), mask_id, steps, seed, batch_size)
                score[name] = domain.score(x.cpu().numpy(), reference)
                row |= {key: f"{value:.3f}" for key, value in score[name].items()}
            table.append(row)
            progress.update(len(table), f"{label(name)}, {steps} steps")
    truth = {"bound": f"{domain.entropy:.2f}"} if domain.entropy else {}
    table.append({"model": "real data"} | truth | {key: f"{value:.3f}" for key, value in real.items()})
    print_table(table)
    print(f"bound: an upper bound on -log p under this sampler, in nats, averaged over {len(rows)} held-out")
    print("sequences. ± is a 95% interval over these sequences; the training seed is not varied.")
    if real:
        print(f"The other columns are the scores of {len(rows)} samples.")
    updates = {model.info["made_from"].get("iters") for name, model in models.items() if name != "base"}
    if len(updates) > 1:
        print("Note: these models were not all trained for the same number of iterations.")
    conclude(domain, steps, bound, score)


def conclude(domain, steps, bound, score):
    """Print what the table says about SCMDM beside the base and the control of the same training seed."""
    best = largest_unroll(bound)
    if best is None:
        return
    control = "rate0" + best[best.index("-seed") :] if "-seed" in best else "rate0"
    others = {"the base": "base"} | ({"the control": control} if control in bound else {})
    words = ""
    if score and domain.quality in score[best]:
        rest = " and ".join(f"{score[name][domain.quality]:.2f} for {who}" for who, name in others.items())
        words = f"With {steps} sampling steps, {domain.quality} is {score[best][domain.quality]:.2f} for"
        words += f" SCMDM ({label(best)}), {rest}. "
    verdicts = []
    for who, name in others.items():
        minus, half = difference(bound[best], bound[name])
        word = "below" if minus < -half else "above" if minus > half else "no different from"
        verdicts.append(f"{word} that of {who} ({minus:+.2f} ± {half:.2f} nats)")
    words += f"The bound of SCMDM is {' and '.join(verdicts)}. "
    words += "There is one training seed, and ± is over held-out sequences."
    print("\n" + textwrap.fill(words, 100))


# --- Show --------------------------------------------------------------------------------------------------


def canvas_of(prompt, domain, length):
    r"""Turn a prompt into a canvas [length]: a mask for each _ (a literal one is \_), and masks after it."""
    if domain.row and length != domain.length:
        raise BadInput(f"--length {length}: a {domain.name} sample is a grid of {domain.length} tokens")
    canvas, mask_id = [], len(domain.vocab)
    for piece in re.split(r"((?<!\\)_+)", prompt):
        try:
            blank = piece.startswith("_")
            canvas += [mask_id] * len(piece) if blank else domain.encode(piece.replace("\\_", "_"))
        except KeyError as error:
            known = repr(domain.join.join(token for token in domain.vocab if token != domain.end))
            known = known if len(known) < 200 else f"{len(domain.vocab)} others"
            unknown = f"--prompt has {error.args[0]!r}, which the model has never seen"
            raise BadInput(f"{unknown}; it knows {known}") from None
    if len(canvas) > length:
        raise BadInput(f"--prompt has {len(canvas)} tokens, expected at most {length}")
    return torch.tensor(canvas + [mask_id] * (length - len(canvas)))


def show(domain, models, canvas, steps, seed, batch_size=64, watch=False, film_path=None, **options):
    """Fill the canvas [N, L] with each model and print the samples side by side. Returns {label: tokens}."""
    columns = shutil.get_terminal_size((100, 24)).columns
    samples, films, width = {}, {}, min(56, (columns + 1) // len(models) - 3)
    for name, model in models.items():
        states, progress = [], Progress(f"{label(name)}: step", steps * math.ceil(len(canvas) / batch_size))

        def on_step(step, x, x0_prev):
            states.append((x[0].cpu().numpy(), x0_prev[0].argmax(-1).cpu().numpy()))
            progress.update(len(states))

        x = generate(model, canvas, len(domain.vocab), steps, seed, batch_size, on_step, **options)
        samples[label(name)], films[label(name)] = x.cpu().numpy(), states[:steps]  # of the first sequence
    terminal = sys.stdout.isatty()
    for step in range(steps if watch else 0):
        print("\033[H\033[J" if terminal else "")
        print(" | ".join(f"{name}, step {step + 1}"[:width].ljust(width) for name in samples))
        frames = [draw_frame(domain, *states[step], width) for states in films.values()]
        print(side_by_side(frames, width), flush=True)
        time.sleep(max(0.03, 4 / steps) if terminal else 0)  # the whole takes about four seconds
    if film_path:
        print(film(film_path, films, domain))
    print(" | ".join(name[:width].ljust(width) for name in samples).rstrip())
    for rows in zip(*samples.values()):
        print(" | ".join(["-" * width] * len(models)))
        print(side_by_side([draw_frame(domain, x, x, width) for x in rows], width))
    return samples


def save_samples(path, samples, domain):
    """Write one sample per line, as JSON with the model's name."""
    with open(path, "w", encoding="utf-8") as file:
        for name, rows in samples.items():
            for x in rows:
                record = {"model": name, "text": domain.decode(x.tolist())}
                print(json.dumps(record, ensure_ascii=False), file=file)


# --- The command line --------------------------------------------------------------------------------------


def parse():  # fmt: off
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a, count = p.add_argument, number(int, 1)
    a("--data", choices=data.NAMES, help="use the shipped models of this domain (default: sudoku)")
    a("--models", metavar="FOLDER", help="use the models that train.py wrote into this folder")
    a("--model", nargs="+", metavar="NAME",
      help="which models, by file name (default: the base and the largest unroll; with --compare all)")
    a("--compare", action="store_true", help="print a table of bounds and scores instead of the samples")
    a("--prompt", default="",
      help="known tokens, with a _ for each blank (a literal one is \\_); the model also writes what follows")
    a("--length", type=count,
      help="tokens in a sample (default: the model's length); the prompt's own length fills only its blanks")
    a("-n", type=count, help="number of sequences (default: 2; with --compare up to 512, and at least 2)")
    a("--steps", type=count, nargs="+",
      help="sampling steps; --compare takes several numbers (default: one for each token, at most 64)")
    a("--batch-size", type=count, default=64, help="sequences at a time; it changes the draws (default: 64)")
    a("--temperature", type=number(float, 0, 1e6), default=1.0,
      help="below 1 is sharper, 0 takes the most likely token (default: 1)")
    a("--top-p", type=number(float, 1e-9, 1), default=1.0,
      help="draw only from the most likely tokens whose probabilities add up to this (default: 1)")
    a("--order", choices=("random", "confidence"), default="random",
      help="which masks are filled first: random, as in the diffusion process, or the most confident ones,"
      " which breaks fewer rules but repeats itself (default: random)")
    a("--schedule", choices=("linear", "cosine"), default="linear", help="how many are filled at each step")
    a("--seed", type=number(int, 0, 2**31 - 1), default=0,
      help="the same seed on the same device gives the same tokens (default: 0)")
    a("--device", default="auto", help="auto, cpu, cuda or mps (default: auto, the fastest that is there)")
    a("--watch", action="store_true", help="play the steps; a masked position shows its prediction, dim")
    a("--film", metavar="FILE.svg", help="write the steps as an animated picture")
    a("--save", metavar="FILE.jsonl", help="write the samples, one per line, as JSON")
    args = p.parse_args()
    free = ("prompt", "length", "watch", "film", "save", "temperature", "top_p", "order", "schedule")
    if args.compare and any(getattr(args, name) != p.get_default(name) for name in free):
        p.error(f"--compare measures free samples: it does not go with any of {', '.join(free)}")
    if args.compare and args.n == 1:
        p.error("--compare needs two or more sequences")
    if args.steps and len(args.steps) > 1 and not args.compare:
        p.error("several --steps are for --compare")
    return args


def main():
    args = parse()
    device = pick_device(args.device)
    files = models_in(args.models or SHIPPED / (args.data or "sudoku"))
    best = largest_unroll(files)
    wanted = args.model or (files if args.compare else [best] if best else [])
    if missing := set(wanted) - set(files):
        raise BadInput(f"{files['base'].parent}: no {', '.join(sorted(missing))}.npz there")
    files = {name: path for name, path in files.items() if name == "base" or name in wanted}
    domain, models = load_models(files, device)
    if args.data not in (None, domain.name):
        raise BadInput(f"{args.models}: models of {domain.name}, expected {args.data}")
    steps = args.steps or [domain.steps]
    if args.compare:
        compare(domain, models, sorted(set(steps)), args.n, args.seed, args.batch_size)
        return
    length = args.length or domain.length
    if length > domain.length:
        raise BadInput(f"--length is {length}, expected at most the model's {domain.length}")
    canvas = canvas_of(args.prompt, domain, length).expand(args.n or 2, length).to(device)
    options = {"temperature": args.temperature, "top_p": args.top_p, "order": args.order}
    options["schedule"] = COSINE if args.schedule == "cosine" else LINEAR
    how = (steps[0], args.seed, args.batch_size, args.watch, args.film)
    for path in filter(None, (args.save, args.film)):  # before the work, not after it
        try:
            open(path, "a").close()
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror}") from None
    samples = show(domain, models, canvas, *how, **options)
    if args.save:
        save_samples(args.save, samples, domain)


if __name__ == "__main__":
    try:
        run(main)
    except KeyboardInterrupt:
        sys.exit(130)
