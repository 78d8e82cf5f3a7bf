"""Variants of SCMDM, trained on Sudoku: other ways to make the signal, and another way to let it in.

    python -m data.study.variants gradient --out runs/study/gradient     train one, beside a copy of the base

The first kind is a function that `diffusion_loss` takes in place of `make_signal`. The second is an
adapter that replaces `SelfConditioning` in the model; it has the same matrix W, so the files are alike.
"""

import argparse
import shutil
import zlib
from functools import partial
from pathlib import Path

import torch

import data
from data.study.training import new_model, train_to
from data.terminal import number, run
from sample import SHIPPED, pick_device, read_model
from scmdm import LINEAR, SelfConditioning, add_self_conditioning, diffusion_loss, earlier_times, make_signal
from scmdm import q_sample, uniform, without_mask
from train import DEFAULTS, LR_PRETRAIN, LR_SIGNAL

# --- Other ways to make the signal: the arguments and the result of scmdm.make_signal ----------------------


def walk(denoiser, x0, times, u, mask_id, frozen=None, schedule=LINEAR, learning=0):
    """Return the signal [B, L, V] that passes at the given times make, each given the prediction of the last.

    times: a list of [B]; a time above 1 lies before the first step and gives no signal. The last `learning`
    passes get a gradient.
    """
    x0_prev = None
    for i, time in enumerate(times):
        with torch.set_grad_enabled(torch.is_grad_enabled() and len(times) - i <= learning):
            xt = q_sample(x0, time.clamp(max=1), mask_id, u=u, frozen=frozen, schedule=schedule)
            x0_prev = without_mask(denoiser(xt, x0_prev), mask_id).softmax(-1) * (time <= 1)[:, None, None]
    return x0_prev


def spaced(denoiser, x0, t, u, mask_id, *, unroll, frozen=None, schedule=LINEAR, generator=None, steps):
    """make_signal at states spaced as by a sampler of `steps` steps, instead of a number that is drawn."""
    k = 1 + int(unroll * uniform((1,), x0.device, generator))
    times = [t + i / steps for i in range(k, 0, -1)]
    return walk(denoiser, x0, times, u, mask_id, frozen, schedule)


def learning(denoiser, x0, t, u, mask_id, *, unroll, frozen=None, schedule=LINEAR, generator=None):
    """make_signal with a gradient through the last pass that makes the signal."""
    times = earlier_times(t, x0.shape[1], unroll, generator)
    return walk(denoiser, x0, times, u, mask_id, frozen, schedule, learning=1)


class Growing:
    """make_signal whose largest number of passes grows from 1 to `unroll` during `iters` iterations."""

    def __init__(self, iters):
        self.iters, self.done = iters, 0

    def __call__(self, *args, unroll, **options):
        most = min(unroll, 1 + unroll * self.done // self.iters)
        self.done += 1
        return make_signal(*args, unroll=most, **options)


# --- Another way to let it in ------------------------------------------------------------------------------


class Softened(SelfConditioning):
    """Sees the signal at temperature 2, so that it is less certain and unlikely tokens count more."""

    def forward(self, xt, x0_prev=None):
        if x0_prev is not None:
            x0_prev = x0_prev.sqrt()
            x0_prev = x0_prev / x0_prev.sum(-1, keepdim=True).clamp(min=1e-9)  # no signal stays no signal
        return super().forward(xt, x0_prev)


def with_adapter(model, variant):
    """Put a variant's adapter into an adapted model, with the W that it has. Returns the model."""
    if variant == "softened":
        adapter = Softened(model.embed, model.mask_id)
        adapter.W = model.self_conditioning.W
        model.self_conditioning = adapter
    return model


def as_trained(model):
    """Return a loaded model with the adapter that it was trained with."""
    return with_adapter(model, model.info.get("made_from", {}).get("variant"))


# --- Training ----------------------------------------------------------------------------------------------


def signal_of(variant, iters):
    """Return the make_signal of a variant."""
    if variant.startswith("spaced"):
        return partial(spaced, steps=int(variant.removeprefix("spaced")))
    return {"gradient": learning, "growing": Growing(iters)}.get(variant, make_signal)


SIGNALS = ("spaced9", "spaced36", "spaced144", "gradient", "growing")
VARIANTS = (*SIGNALS, "softened", "scratch")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a, count = p.add_argument, number(int, 1)
    a("variant", choices=VARIANTS, help="scratch: trained from scratch with a signal, at --rate")
    a("--data", default="sudoku", help="as train.py's (default: sudoku)")
    a("--out", type=Path, required=True, help="folder of the model, and of a copy of the base")
    a("--init", type=Path, help="the base (default: the shipped one)")
    a("--unroll", type=count, default=16, help="most passes that make the signal (default: 16)")
    a("--rate", type=number(float, 0, 1), default=1.0, help="share of sequences with a signal (default: 1)")
    a("--iters", type=count, default=2000, help="optimiser updates (default: 2000)")
    a("--dim", type=count, help="scratch: width of the model")
    a("--depth", type=count, help="scratch: number of blocks")
    a("--seed", type=number(int, 0), default=0, help="of batches and noise (default: 0)")
    a("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    args = p.parse_args()
    domain, device = data.get(args.data), pick_device(args.device)
    sizes = DEFAULTS.get(domain.name, DEFAULTS["text"]) | {
        key: value for key in ("dim", "depth") if (value := getattr(args, key))
    }
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"rate{args.rate:g}" + (f"-unroll{args.unroll}" if args.unroll > 1 else "")
    name += f"-seed{args.seed}" if args.seed else ""
    settings = {"iters": args.iters, "batch_size": sizes["batch_size"], "seed": args.seed, "rate": args.rate}
    settings |= {"unroll": args.unroll, "variant": args.variant}
    if args.variant == "scratch":
        model = new_model(domain, sizes, device, args.seed, self_conditioning=True)
        name, lr = f"scratch-{name}", LR_PRETRAIN
        settings["shape"] = [sizes["dim"], sizes["depth"], sizes["heads"]]
    else:
        base = args.out / "base.npz"
        if not base.exists():
            shutil.copy(args.init or SHIPPED / domain.name / "base.npz", base)
        model = with_adapter(add_self_conditioning(read_model(base, device)), args.variant).train()
        lr, settings["base"] = LR_SIGNAL.get(domain.name, 1e-3), zlib.crc32(base.read_bytes())
    path = args.out / f"{name}.npz"
    if args.variant == "growing":  # it counts iterations from the start, so a stopped run starts again
        path.with_suffix(".state").unlink(missing_ok=True)
    signal = signal_of(args.variant, args.iters)

    def loss_of(denoiser, x0, generator):
        options = {"self_cond_rate": args.rate, "unroll": args.unroll, "make_signal": signal}
        return diffusion_loss(denoiser, x0, model.mask_id, **options, generator=generator)

    train_to(path, model, loss_of, domain, lr=lr, **settings)
    print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
