"""SCMDM in plain NumPy, from its equations, and the check of golden.npz: the example for a port. No PyTorch.

    python -m data.golden       checks this port against every value of golden.npz, in the order a port should

A model's weights are a dict w {name: array}, under the names of its .npz. To port SCMDM, write `forward`,
`loss`, `sample` and `bound` anew, with the weights and the fixed random numbers of golden.npz, and go down
`check` below until each agrees to 1e-4. All for the linear schedule: a token is masked with probability t.
Shapes: B sequences, L positions, V tokens, D model dimensions; the mask is token V.
"""

import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("golden.npz")
TOLERANCE = dict(atol=1e-4, rtol=1e-4)


def layer_norm(h, weight):
    centred = h - h.mean(-1, keepdims=True)
    return weight * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotary(x):  # [B, H, L, K]
    L, K = x.shape[-2:]
    angle = np.arange(L)[:, None] / 10000 ** (np.arange(K // 2) * 2 / K)
    pair = x[..., : K // 2] + 1j * x[..., K // 2 :]  # a complex number: turning it is a product
    turned = pair * np.exp(1j * angle)
    return np.concatenate((turned.real, turned.imag), -1)


def forward(w, heads, xt, x0_prev=None, causal=False):
    """The Transformer, in float64. xt [B, L]; x0_prev [B, L, V] or None -> logits [B, L, V]."""
    E = w["embed.weight"]  # [V+1, D]; the last row is the mask
    V, D = E.shape[0] - 1, E.shape[1]
    B, L = xt.shape
    h = E[xt]
    if x0_prev is not None and "self_conditioning.W" in w:
        h = h + (xt == V)[..., None] * (x0_prev @ E[:V] @ w["self_conditioning.W"].T)
    if "position_embed.weight" in w:
        h = h + w["position_embed.weight"][:L]
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    for block in (f"blocks.{i}." for i in range(depth)):
        qkv = layer_norm(h, w[block + "norm1.weight"]) @ w[block + "qkv.weight"].T  # [B, L, 3D]
        q, k, v = qkv.reshape(B, L, 3, heads, D // heads).transpose(2, 0, 3, 1, 4)  # each [B, H, L, K]
        scores = rotary(q) @ rotary(k).transpose(0, 1, 3, 2) / np.sqrt(D // heads)  # [B, H, L, L]
        if causal:
            scores = np.where(np.tri(L, dtype=bool), scores, -np.inf)
        attended = (softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(B, L, D)
        h = h + attended @ w[block + "out.weight"].T
        z = layer_norm(h, w[block + "norm2.weight"]) @ w[block + "up.weight"].T  # [B, L, 4D]
        z = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))  # GELU
        h = h + z @ w[block + "down.weight"].T
    return layer_norm(h, w["norm.weight"]) @ w["head.weight"].T


def masked_nll(probs, x0, masked):
    """sum over masked i of -log p(x0_i). [B] nats."""
    return -(masked * np.log(np.take_along_axis(probs, x0[..., None], -1)[..., 0])).sum(1)


def loss(w, heads, x0, t, u_mask, given=True, unroll=1, u_passes=0.0, u_calls=0.5, constant=None):
    """SCMDM's loss at fixed times t [B] and uniforms u_mask [B, L]. [B] nats.

    given [B]: which sequences get the signal. unroll > 1: it is made by k passes, along the last k states of
    a sampler of T [B] calls. It is a constant for gradients: made with the weights `constant`, if given.
    """
    V, L = w["embed.weight"].shape[0] - 1, x0.shape[1]
    t = np.maximum(t, 1e-3)  # the floor
    xt = np.where(u_mask < t[:, None], V, x0)
    times, x0_prev = [t], None
    if unroll > 1:
        k, T = 1 + int(unroll * u_passes), L * 4 ** (2 * u_calls - 1)
        times = [t + i / T for i in range(k, 0, -1)]
    for time in times:
        x = np.where(u_mask < time[:, None], V, x0)
        x0_prev = softmax(forward(constant or w, heads, x, x0_prev))
        x0_prev = x0_prev * (time <= 1)[:, None, None]  # before t = 1 there was no call, so no signal
    x0_prev = x0_prev * np.reshape(given, (-1, 1, 1))
    probs = softmax(forward(w, heads, xt, x0_prev))
    return masked_nll(probs, x0, xt == V) / t  # the weight -alpha' / (1 - alpha) is 1 / t


def sample(w, heads, x, u_reveal, u_token):
    """Canvas x [B, L], fixed uniforms [steps, B, L] each -> tokens [B, L], predictions [steps, B, L, V]."""
    V, steps, x0_prev, predictions = w["embed.weight"].shape[0] - 1, len(u_reveal), None, []
    for k in range(steps):
        x0_prev = softmax(forward(w, heads, x, x0_prev))
        predictions.append(x0_prev)
        t, s = 1 - k / steps, 1 - (k + 1) / steps
        reveal = u_reveal[k] < (t - s) / t
        cdf = np.cumsum(x0_prev, -1)
        # the first that exceeds u; divided, and in float64, or rounding may leave the last one short of u
        token = (cdf / cdf[..., -1:] > u_token[k][..., None]).argmax(-1)
        x = np.where((x == V) & reveal, token, x)
    return x, np.stack(predictions)


def bound(w, heads, x0, u, steps):
    """The sampler's bound on -log p(x0), from fixed uniforms u [B, L]. [B] nats."""
    V, total, x0_prev = w["embed.weight"].shape[0] - 1, 0, None
    for k in range(steps):
        t, s = 1 - k / steps, 1 - (k + 1) / steps
        xt = np.where(u < t, V, x0)  # the same u at each call: the masks are nested
        x0_prev = softmax(forward(w, heads, xt, x0_prev))
        total = total + (t - s) / t * masked_nll(x0_prev, x0, xt == V)
    return total


def optimise(w, gradients, lr, warmup):
    """train.py's optimiser, from gradients {name: [K, ...]}; yields (weights, average) after each step."""
    steps, live, average = len(gradients["embed.weight"]), dict(w), dict(w)
    m, v = ({name: 0 for name in w} for _ in range(2))
    for k in range(steps):
        norm = np.sqrt(sum((g[k] ** 2).sum() for g in gradients.values()))  # of all parameters together
        rate = lr * min((k + 1) / warmup, 0.5 * (1 + np.cos(np.pi * k / steps)))
        for name in w:
            g = gradients[name][k] * min(1, 1 / norm)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.98 * v[name] + 0.02 * g**2
            weight_decay = 0.05 if g.ndim == 2 and "embed" not in name else 0
            adam = m[name] / (1 - 0.9 ** (k + 1)) / (np.sqrt(v[name] / (1 - 0.98 ** (k + 1))) + 1e-8)
            live[name] = live[name] * (1 - rate * weight_decay) - rate * adam
            decay = min(0.999, (k + 1) / (k + 10))
            average[name] = decay * average[name] + (1 - decay) * live[name]
        yield dict(live), dict(average)


def check(path=GOLDEN):
    """Print a line for each step; returns whether all of them agree."""
    with np.load(path, allow_pickle=False) as file:
        g = {name: file[name] for name in file.files}
    agree = []

    def compare(name, *pairs):
        agree.append(all(np.allclose(found, expected, **TOLERANCE) for found, expected in pairs))
        difference = max((np.abs(found - a) / np.maximum(1, np.abs(a))).max() for found, a in pairs)
        print(f"{name}: {'ok' if agree[-1] else 'WRONG'}, largest difference {difference:.0e}")

    def part(prefix):
        names = [name for name in g if name.startswith(prefix)]
        return {name.removeprefix(prefix): g[name].astype(np.float64) for name in names}

    w, heads = part("weights/"), int(g["heads"])
    xt, noise = g["forward/xt"], (g["loss/x0"], g["loss/t"], g["loss/u_mask"])
    compare("the Transformer", (forward(w, heads, xt), g["forward/logits_without_signal"]))
    compare("causal attention", (forward(w, heads, xt, causal=True), g["forward/logits_causal"]))
    compare("the adapter", (forward(w, heads, xt, g["forward/x0_prev"]), g["forward/logits_with_signal"]))
    compare("the loss, both passes", (loss(w, heads, *noise), g["loss/loss"]))
    half = loss(w, heads, *noise, given=g["loss/u_given"] < 0.5)
    compare("the loss at rate one half", (half, g["loss/loss_at_rate_half"]))
    chain = dict(unroll=4, u_passes=g["unroll/u_passes"][0], u_calls=g["unroll/u_calls"])
    compare("the loss, unrolled", (loss(w, heads, *noise, **chain), g["unroll/loss"]))

    def slope(name, direction):  # a finite difference, in which the signal stays as it is
        ends = (w | {name: w[name] + h * direction} for h in (1e-5, -1e-5))
        up, down = (loss(end, heads, *noise, constant=w).mean() for end in ends)
        return (up - down) / 2e-5

    pairs = []
    for name, gradient in part("loss/gradient/").items():
        direction = np.random.default_rng(0).standard_normal(gradient.shape)
        pairs.append((slope(name, direction), (gradient * direction).sum()))
    compare("the gradient, along one direction each", *pairs)

    tokens, predictions = sample(w, heads, g["sample/canvas"], g["sample/u_reveal"], g["sample/u_token"])
    compare("the sampler", (predictions, g["sample/x0_prev"]), (tokens, g["sample/tokens"]))
    compare("the sampler's bound", (bound(w, heads, g["loss/x0"], g["bound/u"], 6), g["bound/bound"]))

    after = list(optimise(w, part("optimiser/gradient/"), lr=1e-2, warmup=1))
    before = [w] + [live for live, _ in after[:-1]]
    losses = [loss(live, heads, *noise).mean() / noise[0].shape[1] for live in before]
    pairs = [(np.array(losses), g["optimiser/loss"])]
    for found, kind in zip(after[-1], ("live", "average")):
        pairs += [(found[name], expected) for name, expected in part(f"optimiser/{kind}/").items()]
    compare("three steps of the optimiser", *pairs)
    return all(agree)


if __name__ == "__main__":
    sys.exit(0 if check() else 1)
