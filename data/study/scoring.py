"""The scoring model: an autoregressive model, under which samples have their generative perplexity.

    python -m data.study.scoring --data text --out runs/text     train one; it is written to scoring.npz there
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from data import windows
from sample import find_model, pick_device, run
from scmdm import Config, Transformer, load, save
from train import DEFAULTS, optimise


def scoring_nll(model, x):
    """-log p(x) of each sequence x [B, L] under a causal model. [B], nats per sequence.

    Position i is predicted from the tokens before it, the first from the mask, which starts every sequence.
    """
    start = torch.full_like(x[:, :1], model.mask_id)
    logits = model(torch.cat((start, x[:, :-1]), dim=1)).float()  # [B, L, V]
    return F.cross_entropy(logits.flatten(0, 1), x.flatten(), reduction="none").view(x.shape).sum(1)


def load_scoring(folder, domain, device):
    """A function x [N, L] -> -log p(x), nats [N]: the causal model beside the others, or None."""
    paths = [find_model(folder, domain.name, name) for name in ("scoring", "judge")]  # the second: old files
    path = next((path for path in paths if path), None)
    if path is None:
        return None
    model = load(path, device).eval()
    if model.info.get("vocab") != domain.vocab:
        raise ValueError(f"{path}: not a scoring model of the tokens of {domain.name}")
    return partial(score, model)


@torch.no_grad()
def score(model, x):
    """-log p(x) of tokens x [N, L], NumPy. [N], nats per sequence, NumPy."""
    rows = torch.from_numpy(x.astype(np.int64)).to(next(model.parameters()).device).split(64)
    return torch.cat([scoring_nll(model, part) for part in rows]).cpu().numpy()


def main():  # fmt: off
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = p.add_argument
    a("--data", default="text", help=f"{', '.join(data.NAMES)}, or your own text or .npy of integers")
    a("--lines", action="store_true", help="your file is one sequence per line, not one long text")
    a("--length", type=int, help="your file: the window, or the longest line kept (default: 128)")
    a("--vocab", help="your .npy: a file with one token per line")
    a("--out", help="folder of scoring.npz (default: runs/NAME)")
    a("--resume", action="store_true", help="go on with a run that was stopped")
    a("--steps", type=int, default=4000, help="optimiser steps (default: 4000)")  # learns from each position
    a("--batch-size", type=int, help="sequences per step")
    a("--lr", type=float, default=2e-3, help="peak learning rate (default: 2e-3)")
    a("--weight-decay", type=float, default=0.05, help="of the matrices (default: 0.05)")
    a("--dim", type=int, help="width of the model")
    a("--depth", type=int, help="blocks")
    a("--heads", type=int, help="attention heads")
    a("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    a("--device", default="auto", help="auto, cpu, cuda or mps (default: auto, the fastest there is)")
    a("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matrix products")
    a("--compile", action="store_true", help="torch.compile")
    args = p.parse_args()
    for name in ("batch_size", "dim", "depth", "heads"):
        if getattr(args, name) is None:
            setattr(args, name, DEFAULTS.get(args.data, DEFAULTS["text"])[name])
    device = pick_device(args.device)
    domain = data.get(args.data, args.lines, args.length, args.vocab)
    out = Path(args.out or f"runs/{domain.name}")
    out.mkdir(parents=True, exist_ok=True)
    path, state = out / "scoring.npz", out / "scoring.state"
    if path.exists() or state.exists() and not args.resume:
        raise ValueError(f"{path} is there already, or begun: --resume goes on, another --out starts anew")
    train, val = domain.load()
    torch.manual_seed(args.seed)
    sizes = (len(domain.vocab), domain.length, args.dim, args.depth, args.heads)
    model = Transformer(Config(*sizes, positions=train.ndim == 2, causal=True)).to(device)
    loss_of = lambda model, x0, generator: scoring_nll(model, x0)  # noqa: E731
    what = {"data": domain.name, "seed": args.seed, "steps": args.steps, "batch_size": args.batch_size}
    what["shape"] = [args.dim, args.depth, args.heads]
    model = optimise(model, loss_of, train, args, args.steps, args.lr, args.seed, state, what)
    remembered = {key: getattr(domain, key) for key in ("vocab", "length", "end", "join", "source")}
    save(path, model.half(), data=domain.name, **remembered, made_from=what, lr=args.lr)
    state.unlink(missing_ok=True)
    nats = score(load(path, device).eval(), windows(val, domain.length, 256)).mean() / domain.length
    print(f"scoring: validation {nats:.4f} nats per token")


if __name__ == "__main__":
    run(main)
