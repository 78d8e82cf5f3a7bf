"""Other ways to make the signal, tried on Sudoku beside `unroll`. None is better enough to be kept
(data/study/README.md).

    python -m data.study.variants gradient train.py ...    train.py, or data.study.bench, with another signal

The loss below is the unrolled one of scmdm.py with its choices as arguments; the test compares the two.
"""

import itertools
import sys
from functools import partial

import torch

import sample
import scmdm
import train
from data.study import bench
from scmdm import LINEAR, T_MIN, masked_nll, q_sample, without_mask


def loss(
    denoiser, x0, mask_id, *, self_cond_rate, unroll, generator, t,
    calls=None, learning=0, growing=None,
):  # fmt: skip
    """diffusion_loss at rate 1, linear schedule, unroll > 1. [B] nats.

    calls: T, which sets how far apart the states are that the passes see; None: drawn, L/4 to 4L.
    learning: how many of the last passes that make the signal get a gradient.
    growing: (a counter of the steps, how many there are): the most passes grow from 1 to `unroll`.
    """
    (B, L), device = x0.shape, x0.device
    t = t.clamp(min=T_MIN)
    u = scmdm.uniform(x0.shape, device, generator)  # [B, L]
    scmdm.uniform((B,), device, generator)  # who gets the signal: all do
    if growing:
        counter, steps = growing
        unroll = 1 + unroll * next(counter) // steps
    k = 1 + int(unroll * scmdm.uniform((1,), device, generator))
    drawn = L * 4 ** (2 * scmdm.uniform((B,), device, generator) - 1)  # [B]
    T, x0_prev = calls or drawn, None
    for i in range(k, 0, -1):
        time = t + i / T  # [B]
        with torch.set_grad_enabled(torch.is_grad_enabled() and i <= learning):
            logits = denoiser(q_sample(x0, time.clamp(max=1), mask_id, u=u), x0_prev)
            x0_prev = without_mask(logits, mask_id).softmax(-1) * (time <= 1)[:, None, None]  # [B, L, V]
    xt = q_sample(x0, t, mask_id, u=u)
    nll = masked_nll(denoiser(xt, x0_prev), x0, xt == mask_id, mask_id)  # [B]
    return (-LINEAR.dalpha(t) / (1 - LINEAR.alpha(t))).to(nll.dtype) * nll


class Softened(scmdm.SelfConditioning):
    """The signal at temperature 2: less sure of itself, and of the unlikely tokens more is seen."""

    def forward(self, xt, x0_prev=None):
        if x0_prev is not None:
            x0_prev = x0_prev.sqrt()
            x0_prev = x0_prev / x0_prev.sum(-1, keepdim=True).clamp(min=1e-9)  # no signal stays none
        return super().forward(xt, x0_prev)


VARIANTS = {
    "calls9": partial(loss, calls=9),
    "calls36": partial(loss, calls=36),
    "calls144": partial(loss, calls=144),
    "gradient": partial(loss, learning=1),
    "growing": partial(loss, growing=(itertools.count(), 2000)),  # not to be resumed: it counts from 0
    "softened": scmdm.diffusion_loss,
}


if __name__ == "__main__":
    _, name, script, *sys.argv[1:] = sys.argv
    train.diffusion_loss = VARIANTS[name]
    if name == "softened":
        scmdm.SelfConditioning = Softened
    sample.run({"train.py": train, "data.study.bench": bench}[script].main)
