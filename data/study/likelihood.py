"""How loose is the sampler's bound? -log p itself, approached from above by many orders of revealing.

    python -m data.study.likelihood data/models/sudoku --calls 144

Given the order in which the positions are revealed, the chain rule gives p(x0 | order) exactly, and p(x0) is
its mean over orders. `sampler_bound` is the mean of -log p(x0 | order), which is above -log p(x0) by Jensen's
inequality: by much, if a model can write x0 in some orders only. The log of the mean over M orders lies
between, and falls towards -log p(x0) as M grows (Burda et al. 2016, arXiv 1509.00519).
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch

import data
import scmdm
from data import windows
from data.study import measures, results
from sample import Progress, label, load_models, models_in, pick_device, run
from scmdm import load, masked_nll, q_sample, without_mask


@torch.no_grad()
def cost_of_an_order(denoiser, x0, mask_id, steps, generator=None):
    """-log p(x0 | order) of `sample(..., steps)` for one random order of each x0 [B, L]. [B], nats."""
    u = scmdm.uniform(x0.shape, x0.device, generator)  # [B, L]: a position is revealed when t falls to its u
    cost, x0_prev = 0, None
    for step in range(steps):
        xt = q_sample(x0, 1 - step / steps, mask_id, u=u)
        revealed = (xt == mask_id) & (q_sample(x0, 1 - (step + 1) / steps, mask_id, u=u) != mask_id)
        logits = denoiser(xt, x0_prev)  # [B, L, V]
        cost = cost + masked_nll(logits, x0, revealed, mask_id)
        x0_prev = without_mask(logits, mask_id).softmax(-1)
    return cost.double()


def of_m_orders(costs, m):
    """-log of the mean of exp(-cost) over m orders, from costs [M, N]: mean over the M // m groups. [N]."""
    groups = costs[: len(costs) // m * m].reshape(-1, m, costs.shape[1])  # [M // m, m, N]
    return (math.log(m) - torch.logsumexp(-groups, 1)).mean(0)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="of models, as train.py makes it")
    p.add_argument("--calls", type=int, default=64, help="denoiser calls (default: 64)")
    p.add_argument("-n", type=int, default=64, help="held-out sequences (default: 64)")
    p.add_argument("--orders", type=int, default=256, help="M, the most orders for each (default: 256)")
    args = p.parse_args()
    files, device = models_in(args.folder), pick_device("auto")
    domain = data.from_info(load(files["base", 0]).info)
    models = load_models(files, domain, device)
    x0 = torch.from_numpy(windows(domain.load()[1], domain.length, args.n).astype(np.int64)).to(device)
    progress, table, base = Progress("orders", len(models) * args.orders), [], {}
    for i, ((arm, seed), model) in enumerate(models.items()):
        generator, costs = torch.Generator(device).manual_seed(0), []  # the same orders for every model
        for order in range(args.orders):
            costs.append(cost_of_an_order(model, x0, len(domain.vocab), args.calls, generator).cpu())
            progress.update(i * args.orders + order + 1, arm)
        m = 1
        while m <= args.orders:
            values = of_m_orders(torch.stack(costs), m).numpy()  # [N]
            difference, half = measures.paired(values, base.setdefault(m, values))
            row = {"model": arm, "seed": seed, "calls": args.calls, "n": args.n, "orders": m}
            row |= {"-log p": values.mean(), "minus base": difference, "half": half}
            results.append_csv(results.folder_for(args.folder) / "likelihood.csv", row)
            line = {"model": label(arm), "seed": seed, "orders": m, "-log p": f"{values.mean():.3f}"}
            table.append(line | {"minus base": f"{difference:+.3f} ± {half:.3f}" if arm != "base" else ""})
            m *= 4
    results.print_table(table)


if __name__ == "__main__":
    run(main)
