"""Sample: generate, infill, watch, film.

    python sample.py --watch                            base and SCMDM side by side, from the same seed
    python sample.py --data text --prompt "To ____ or"  fill the blanks, one token for each _, and write on
    python sample.py --models runs/novel                models of your own

This file runs the sampler and looks at what comes out. The method is in scmdm.py, what measures in data/study/.
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch

import data
from data.film import film
from data.terminal import draw_frame, side_by_side
from scmdm import COSINE, load, sample

SHIPPED = Path(__file__).parent / "data" / "models"


# ---------------------------------------------------------------------------------------------
# Shared with train.py
# ---------------------------------------------------------------------------------------------


def fail(message, status=2):
    """What bad input gets: one line and exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


def run(main):
    """Call main(). What it finds wrong with its input becomes one line; `| head` ends it quietly."""
    sys.stdout.reconfigure(errors="replace")  # for an ASCII terminal
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        fail(" ".join(str(error).split()))


def pick_device(name):
    """auto, cpu, cuda, cuda:N or mps -> torch.device. Raises ValueError for one that is not there."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(kind for kind in found if found[kind]) if name == "auto" else name
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: there is none on this machine, expected auto or cpu") from None
    return torch.device(name)


def clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m{seconds:02}s"


class Progress:
    """How far a long job is, on stderr: one line in a terminal, now and then a new one in a log."""

    def __init__(self, what, total, tokens=0):
        self.what, self.total, self.tokens, self.began, self.shown = what, total, tokens, None, time.time()

    def update(self, done, text=""):
        now, terminal = time.time(), sys.stderr.isatty()
        if self.began is None:  # the first does not count: a compilation may slow it
            self.began, self.first = now, done
        elif now - self.shown > (0.5 if terminal else 20) or done == self.total and now - self.began > 2:
            each = (now - self.began) / max(1, done - self.first)
            line = f"{self.what} {done}/{self.total}  {clock(each * (self.total - done))} left  {text}"
            line += f"  {self.tokens / each:,.0f} tokens/s" if self.tokens else ""
            if terminal:
                line = "\r\033[K" + line[: shutil.get_terminal_size().columns - 1]
            print(line, end="" if terminal and done < self.total else "\n", file=sys.stderr, flush=True)
            self.shown = now


def find_model(folder, name, kind):
    """The path of kind.npz: in the folder, else the one shipped for the domain, else None."""
    for path in (Path(folder) / f"{kind}.npz", SHIPPED / (name or "none") / f"{kind}.npz"):
        if path.exists():
            return path


def models_in(folder):
    """{(arm, seed): path} of the models in a folder, named like rate1-unroll16-seed2.npz, the base first."""
    found = {}
    for path in sorted(Path(folder).glob("*.npz"), key=lambda path: (path.stem != "base", path.stem)):
        arm, _, seed = path.stem.partition("-seed")
        if arm == "base" or arm.startswith(("rate", "scratch-")):
            found[arm, int(seed or 0)] = path
    if ("base", 0) not in found:
        raise ValueError(f"{folder}: no base.npz there, expected a folder of models made by train.py")
    return found


def load_models(files, domain, device):
    """{(arm, seed): model}, all of this domain, and adapted from the base that lies beside them."""
    crc, models = zlib.crc32(files["base", 0].read_bytes()), {}
    for key, path in files.items():
        models[key] = model = load(path, device).eval()
        if (model.info.get("vocab"), model.config.length) != (domain.vocab, domain.length):
            raise ValueError(f"{path}: a model of other tokens, expected those of {domain.name}")
        if key[0].startswith("rate") and model.info.get("made_from", {}).get("base") != crc:
            raise ValueError(f"{path}: adapted from another base than the base.npz beside it")
    return models


# ---------------------------------------------------------------------------------------------
# Generate
# ---------------------------------------------------------------------------------------------


def generate(denoiser, canvas, mask_id, steps, seed, batch=64, on_step=None, progress=None, **options):
    """Fill the canvas [N, L], `batch` sequences at a time. Returns the tokens [N, L], and seconds."""
    generator = torch.Generator(canvas.device).manual_seed(seed)
    rows, began = [], time.perf_counter()
    for x in canvas.split(batch):

        def watch(step, x, x0_prev):
            if progress:
                progress.update(len(rows) * steps + step + 1)
            if on_step and not rows:
                on_step(step, x, x0_prev)

        rows.append(sample(denoiser, x, mask_id, steps, generator=generator, on_step=watch, **options))
    return torch.cat(rows), time.perf_counter() - began


NAMES = {  # what a reader calls the parts of a model's file name, replaced in this order
    "scratch-rate0.": "scratch, rate 0.",
    "scratch-rate1": "scratch, rate 1",
    "rate0.": "SCMDM rate 0.",
    "rate0-long": "control, as long",
    "rate0": "control",
    "rate1-unroll": "SCMDM unroll ",
    "rate1": "SCMDM (paper)",
    "-unroll": " unroll ",
}


def label(model):
    for part, words in NAMES.items():
        model = model.replace(part, words)
    return model


def best(arms):
    """The arm to show beside the base: of rate 1, the longest chain; None if there is no arm."""
    chain = lambda arm: int(arm.partition("-unroll")[2] or 1)  # noqa: E731
    arms = [arm for arm in arms if arm.startswith("rate")]
    return max(arms, key=lambda arm: (arm.startswith("rate1"), chain(arm), arm), default=None)


# ---------------------------------------------------------------------------------------------
# The terminal
# ---------------------------------------------------------------------------------------------


def canvas_of(prompt, domain, length):
    """A prompt -> a canvas [length]: a mask for each _ (a literal one is \\_), and masks after the end."""
    canvas, mask_id = [], len(domain.vocab)
    for piece in re.split(r"((?<!\\)_+)", prompt):
        try:
            blank = piece.startswith("_")
            canvas += [mask_id] * len(piece) if blank else domain.encode(piece.replace("\\_", "_"))
        except KeyError as error:
            tokens = domain.join.join(token for token in domain.vocab if token != domain.end)
            tokens = repr(tokens) if len(tokens) < 200 else f"{len(domain.vocab)} others"
            unknown = f"--prompt has {error.args[0]!r}, which the model has never seen"
            raise ValueError(f"{unknown}; it knows {tokens}") from None
    if len(canvas) > length:
        raise ValueError(f"--prompt has {len(canvas)} tokens, expected at most {length}")
    return torch.tensor(canvas + [mask_id] * (length - len(canvas)))


def show(models, domain, canvas, steps, seed, batch=64, watch=False, film_path=None, **options):
    """Fill the canvas [N, L] with each of {label: model}, print the samples side by side, return them."""
    columns = shutil.get_terminal_size((100, 24)).columns
    samples, films, width = {}, {}, min(56, (columns + 1) // len(models) - 3)
    for label, model in models.items():
        frames = films[label] = []  # of the first sequence

        def on_step(step, x, x0_prev):
            frames.append((x[0].cpu().numpy(), x0_prev[0].argmax(-1).cpu().numpy()))

        progress = Progress(f"{label}: call", steps * math.ceil(len(canvas) / batch))
        watched = {"on_step": on_step, "progress": progress}
        x, seconds = generate(model, canvas, len(domain.vocab), steps, seed, batch, **watched, **options)
        samples[label] = x.cpu().numpy()
        print(f"{label}: {steps} calls, {seconds:.1f} seconds", file=sys.stderr)
    terminal = sys.stdout.isatty()
    for step in range(steps if watch else 0):
        print("\033[H\033[J" if terminal else "")
        print(" | ".join(f"{label}, call {step + 1}"[:width].ljust(width) for label in models))
        states = [draw_frame(domain, *frames[step], width) for frames in films.values()]
        print(side_by_side(states, width), flush=True)
        time.sleep(max(0.03, 4 / steps) if terminal else 0)  # the whole takes some four seconds
    if film_path:
        print(film(film_path, films, domain))
    print(" | ".join(label[:width].ljust(width) for label in models).rstrip())
    for rows in zip(*samples.values()):
        print(" | ".join(["-" * width] * len(models)))
        print(side_by_side([draw_frame(domain, x, x, width) for x in rows], width))
    return samples


def save_samples(path, samples, domain):
    """Write samples unwrapped, one record per line: JSON lines where the name ends in .jsonl, else text."""
    with open(path, "w", encoding="utf-8") as file:
        for label, rows in samples.items():
            for x in rows:
                text = domain.decode(x.tolist())
                record = json.dumps({"model": label, "text": text}, ensure_ascii=False)
                print(record if str(path).endswith(".jsonl") else text.replace("\n", "\\n"), file=file)


def parse():  # fmt: off
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = p.add_argument
    a("--data", choices=data.NAMES, help="whose shipped models (default: sudoku)")
    a("--models", help="a folder of models made by train.py, instead")
    a("--model", nargs="+", metavar="NAME", help="which, by file name (default: the base and the best SCMDM)")
    a("--prompt", default="",
      help="known tokens, with a _ for each blank (a literal one is \\_); what follows it is written too")
    a("--length", type=int, help="tokens, at most the model's (default); the prompt's own: infilling alone")
    a("-n", type=int, default=2, help="how many sequences (default: 2)")
    a("--steps", type=int, default=64, help="denoiser calls (default: 64)")
    a("--batch-size", type=int, default=64, help="sequences at a time; it changes the draws (default: 64)")
    a("--temperature", type=float, default=1.0, help="below 1 sharper, 0 the likeliest token (default: 1)")
    a("--top-p", type=float, default=1.0, help="draw from the fewest tokens of this mass (default: 1)")
    a("--order", choices=("random", "confidence"), default="random",
      help="which masks first: random, as the process has it (default), or the surest; that prefers what is"
      " safe: fewer rules are broken, but text repeats itself")
    a("--schedule", choices=("linear", "cosine"), default="linear", help="how many per step")
    a("--seed", type=int, default=0, help="same seed, same device, same tokens (default: 0)")
    a("--device", default="auto", help="auto, cpu, cuda or mps (default: auto, the fastest there is)")
    a("--watch", action="store_true", help="play the steps; a masked position shows its current guess, dim")
    a("--film", metavar="FILE.svg", help="the same as an animated picture")
    a("--save", metavar="FILE", help="write the samples, one per line; as JSON lines if it ends in .jsonl")
    args = p.parse_args()
    if min(args.n, args.batch_size, args.length or 1) < 1 or args.seed < 0:
        p.error("-n, --batch-size and --length are 1 or more, --seed is 0 or more")
    return args


def main():
    args = parse()
    device = pick_device(args.device)
    folder = Path(args.models or SHIPPED / (args.data or "sudoku"))
    files = models_in(folder)
    info = load(files["base", 0]).info
    if "data" not in info:
        raise ValueError(f"{files['base', 0]}: a model that train.py did not make")
    domain = data.from_info(info)
    if args.data not in (None, domain.name):
        raise ValueError(f"{folder}: models of {domain.name}, expected {args.data}")
    options = {"top_p": args.top_p} if args.top_p != 1 else {}
    options |= {"order": args.order} if args.order != "random" else {}
    options |= {"schedule": COSINE} if args.schedule == "cosine" else {}

    arm = best([arm for arm, _ in files])
    wanted = args.model or [path.stem for key, path in files.items() if key[0] == arm][:1]  # its first seed
    if missing := set(wanted) - {path.stem for path in files.values()}:
        raise ValueError(f"{folder}: no {', '.join(sorted(missing))}.npz there")
    files = {key: path for key, path in files.items() if path.stem in ["base", *wanted]}
    models = {
        label(arm) + (f", seed {seed}" if seed else ""): model
        for (arm, seed), model in load_models(files, domain, device).items()
    }
    length = args.length or domain.length
    if length > domain.length:
        raise ValueError(f"--length is {length}, expected at most the model's {domain.length}")
    canvas = canvas_of(args.prompt, domain, length).expand(args.n, length).to(device)
    options["temperature"] = args.temperature
    how = (args.steps, args.seed, args.batch_size, args.watch, args.film)
    samples = show(models, domain, canvas, *how, **options)
    if args.save:
        save_samples(args.save, samples, domain)


if __name__ == "__main__":
    try:
        run(main)
    except KeyboardInterrupt:
        sys.exit(130)
