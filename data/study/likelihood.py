"""How loose is the sampler's bound? An estimate of -log p(x0) that is closer to it.

    python -m data.study.likelihood runs/novel --steps 64 -n 64 --orders 64

Given the order in which the positions are revealed, the chain rule gives p(x0 | order) exactly. p(x0) is its
mean over all orders. `sampler_bound` is the mean of -log p(x0 | order), which is larger than -log p(x0) by
Jensen's inequality, and much larger if a model can write x0 in some orders only. The logarithm of the mean
over M orders lies between the two. It falls towards -log p(x0) as M grows (Burda et al. 2016, arXiv
1509.00519).
"""

import argparse
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from data import BadInput, windows
from data.study import files, results
from data.study.bench import folder_for_results, open_models
from data.study.metrics import half_width
from data.terminal import Progress, number, run
from sample import pick_device
from scmdm import masked_nll, q_sample, uniform, without_mask


@torch.no_grad()
def cost_of_an_order(denoiser, x0, mask_id, steps, generator=None):
    """Return -log p(x0 | order) of `sample(..., steps)` for one random order of each x0 [B, L]. [B], nats."""
    u = uniform(x0.shape, x0.device, generator)  # [B, L]: a position is revealed when t falls to its u
    cost, x0_prev = 0, None
    for step in range(steps):
        xt = q_sample(x0, 1 - step / steps, mask_id, u=u)
        xs = q_sample(x0, 1 - (step + 1) / steps, mask_id, u=u)
        logits = denoiser(xt, x0_prev)  # [B, L, V]
        cost = cost + masked_nll(logits, x0, xt != xs, mask_id)
        x0_prev = without_mask(logits, mask_id).softmax(-1)
    return cost.double()


def over_orders(costs, m):
    """Return -log of the mean of exp(-cost) over m orders, averaged over groups of the costs [M, N]. [N]"""
    groups = costs[: len(costs) // m * m].reshape(-1, m, costs.shape[1])  # [M // m, m, N]
    return (math.log(m) - torch.logsumexp(-groups, 1)).mean(0)


def estimates(denoiser, x0, mask_id, steps, orders, progress):
    """Return {m: -log p [N] by m orders}, m = 1, 4, 16, ... up to `orders`. Each model gets the same ones."""
    generator, costs = torch.Generator(x0.device).manual_seed(0), []
    for done in range(orders):
        costs.append(cost_of_an_order(denoiser, x0, mask_id, steps, generator).cpu())
        progress(done + 1)
    costs = torch.stack(costs)  # [M, N]
    return {4**i: over_orders(costs, 4**i).numpy() for i in range(20) if 4**i <= orders}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a, count = p.add_argument, number(int, 1)
    a("folder", type=Path, help="the folder of the models, as train.py writes it")
    a("--steps", type=count, help="sampling steps (default: the domain's)")
    a("-n", type=number(int, 2), default=64, help="held-out sequences (default: 64)")
    a("--orders", type=count, default=256, help="M, the most orders for each (default: 256)")
    a("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    args = p.parse_args()
    device = pick_device(args.device)
    domain, paths, models = open_models(args.folder, device)
    if domain.load is None:
        raise BadInput(f"{domain.source.get('path')}: the data is no longer there to measure on")
    out = folder_for_results(args.folder, domain.name)
    out.mkdir(parents=True, exist_ok=True)
    x0 = torch.from_numpy(windows(domain.load()[1], domain.length, args.n).astype(np.int64)).to(device)
    steps, rows, base = args.steps or domain.steps, [], None
    progress = Progress("orders", len(models) * args.orders)
    for i, (name, model) in enumerate(models.items()):
        values = estimates(model, x0, len(domain.vocab), steps, args.orders,
                           lambda done, i=i: progress.update(i * args.orders + done))  # fmt: skip
        base = base or values
        kind, _, seed = name.partition("-seed")
        crc = f"crc{zlib.crc32(paths[name].read_bytes()):08x}"
        common = {"domain": domain.name, "model": kind, "file": crc, "seed": float(seed or 0)}
        common |= {"steps": float(steps), "n": float(args.n), "unit": "nats per sequence"}
        for m, value in values.items():
            minus = value - base[m]
            row = common | {"orders": float(m), "-log p": value.mean(), "minus base": minus.mean()}
            rows.append(row | {"half over sequences": half_width(minus)})
        files.add(out / "likelihood.csv", rows[-len(values):])
    results.report_orders(rows)


if __name__ == "__main__":
    run(main)
