"""The scoring model: an autoregressive model, under which samples get their generative perplexity.

    python -m data.study.scoring --data text --out runs/text     train one, and write it to OUT/scoring.npz

The bench uses the scoring.npz that is in the folder of the models, or else the shipped one for the domain.
"""

import argparse
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from data import BadInput, windows
from data.study.training import new_model, train_to
from data.terminal import number, run
from sample import SHIPPED, pick_device, read_model
from train import DEFAULTS

ITERS = 4000  # a causal model learns from every position at once, so it needs fewer iterations than a base
LR = 2e-3


def causal_nll(model, x):
    """Return -log p(x) of sequences x [B, L] under a causal model. [B], nats per sequence.

    Position i is predicted from the tokens before it. The first one is predicted from the mask, which starts
    every sequence.
    """
    start = torch.full_like(x[:, :1], model.mask_id)
    logits = model(torch.cat((start, x[:, :-1]), dim=1)).float()  # [B, L, V]
    return F.cross_entropy(logits.flatten(0, 1), x.flatten(), reduction="none").view(x.shape).sum(1)


@torch.no_grad()
def scoring_nll(model, x):
    """Return -log p(x) of tokens x [N, L], a NumPy array. [N], nats per sequence."""
    rows = torch.from_numpy(x.astype(np.int64)).to(next(model.parameters()).device)
    return torch.cat([causal_nll(model, part) for part in rows.split(64)]).cpu().numpy()


def find_scoring(folder, domain, device):
    """Return (scoring model, checksum of its file), or (None, "") if there is none for these models."""
    places = [folder / name for folder in (Path(folder), SHIPPED / domain.name)
              for name in ("scoring.npz", "judge.npz")]  # fmt: skip  # the second is its old name
    path = next((path for path in places if path.exists()), None)
    if path is None:
        return None, ""
    model = read_model(path, device)
    if model.info.get("vocab") != domain.vocab or not model.config.causal:
        raise BadInput(f"{path}: not a scoring model for the tokens of {domain.name}")
    return model, f"crc{zlib.crc32(path.read_bytes()):08x}"


def main():  # fmt: off
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a, count = p.add_argument, number(int, 1)
    a("--data", default="text", help=f"{', '.join(data.NAMES)}, or a file: text, or .npy with integers")
    a("--lines", action="store_true", help="your file holds one sequence per line instead of one long text")
    a("--length", type=count, help="your file: tokens in a window, or in the longest line (default: 128)")
    a("--vocab", help="your .npy: a file with one token per line")
    a("--out", help="folder of scoring.npz (default: runs/NAME)")
    a("--iters", type=count, default=ITERS, help=f"optimiser updates (default: {ITERS})")
    a("--batch-size", type=count, help="sequences per iteration")
    a("--lr", type=number(float, 1e-9), default=LR, help=f"peak learning rate (default: {LR:g})")
    a("--dim", type=count, help="width of the model")
    a("--depth", type=count, help="number of blocks")
    a("--heads", type=count, help="attention heads")
    a("--seed", type=number(int, 0, 2**31 - 1), default=0, help="of weights and batches (default: 0)")
    a("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    a("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matrix products")
    a("--compile", action="store_true", help="torch.compile: slow to start, then faster; needs a compiler")
    args = p.parse_args()
    sizes = {name: getattr(args, name) or DEFAULTS.get(args.data, DEFAULTS["text"])[name]
             for name in ("dim", "depth", "heads", "batch_size")}
    domain = data.get(args.data, args.lines, args.length, args.vocab)
    path = Path(args.out or f"runs/{domain.name}") / "scoring.npz"
    model = new_model(domain, sizes, pick_device(args.device), args.seed, causal=True)
    settings = {"iters": args.iters, "lr": args.lr, "batch_size": sizes["batch_size"], "seed": args.seed,
                "dtype": args.dtype, "compiled": args.compile,
                "shape": [sizes["dim"], sizes["depth"], sizes["heads"]]}
    model = train_to(path, model, lambda model, x0, generator: causal_nll(model, x0), domain, **settings)
    nats = scoring_nll(model, windows(domain.load()[1], domain.length, 256)).mean() / domain.length
    print(f"{path}: validation {nats:.4f} nats per token")


if __name__ == "__main__":
    run(main)
