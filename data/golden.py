"""SCMDM in plain NumPy, written from its equations, and the kit that checks a port. PyTorch is not needed.

    python -m data.golden               check the port in this file
    python -m data.golden my_port.py    check yours: functions of the same names, NumPy in and NumPy out

data/PORTING.md says what each function must compute. The kit calls the functions with the golden values of
data/golden.npz, step by step. For each step it prints the largest difference, and the likely mistake where it
recognises one. The exit status is 1 if a step failed.

w {name: array} holds a model's weights, under the names of its .npz. Everything uses the linear schedule, so
a token is masked with probability t. All randomness is handed over as uniforms, called u or u_...
Shapes: B sequences, L positions, V tokens, D model dimensions, K features of a head. mask_id None means V.
"""

import argparse
import inspect
import runpy
import sys
import traceback
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("golden.npz")
TOLERANCE, OPTIMISER_TOLERANCE = 1e-4, 1e-5  # of |found - expected| / max(1, |expected|)
OPTIONAL = ("gradient", "optimise")  # functions that a port may lack
PASS_1_MATTERS = ("self_conditioning.W", "embed.weight")  # weights whose gradient pass 1 could make wrong
T_MIN = 1e-3  # the smallest time in training


# --- 1. The port: the model --------------------------------------------------------------------------------


def float64(w):
    return {name: array.astype(np.float64) for name, array in w.items()}


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(h, weight):
    centred = h - h.mean(-1, keepdims=True)
    return weight * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def rotary(x):  # [B, H, L, K]
    L, K = x.shape[-2:]
    angle = np.arange(L)[:, None] / 10000 ** (np.arange(K // 2) * 2 / K)  # [L, K/2]
    pair = x[..., : K // 2] + 1j * x[..., K // 2 :]  # a complex number: a product turns it by an angle
    turned = pair * np.exp(1j * angle)
    return np.concatenate((turned.real, turned.imag), -1)


def mask_of(w, mask_id):
    """Return the token that means masked: V, which has no logit, unless one of the V tokens is given."""
    return len(w["head.weight"]) if mask_id is None else mask_id


def forward(w, heads, xt, x0_prev=None, causal=False, mask_id=None):
    """Return the Transformer's logits [B, L, V]. xt [B, L] tokens; x0_prev [B, L, V] the signal, or None."""
    w = float64(w)
    E, (V, D), (B, L) = w["embed.weight"], w["head.weight"].shape, xt.shape
    h = E[xt]  # [B, L, D]
    if x0_prev is not None and "self_conditioning.W" in w:
        masked = xt == mask_of(w, mask_id)  # [B, L]
        h = h + masked[..., None] * (x0_prev @ E[:V] @ w["self_conditioning.W"].T)
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
        z = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))  # GELU, in its tanh form
        h = h + z @ w[block + "down.weight"].T
    return layer_norm(h, w["norm.weight"]) @ w["head.weight"].T


def predict(w, heads, xt, x0_prev, mask_id):
    """Return logits [B, L, V] in which the mask is impossible, if it is one of the V tokens."""
    logits = forward(w, heads, xt, x0_prev, mask_id=mask_id)
    if mask_of(w, mask_id) < logits.shape[-1]:
        logits[..., mask_id] = -np.inf
    return logits


# --- 2. The port: the loss and its gradient ----------------------------------------------------------------


def q_sample(w, x0, t, u, frozen, mask_id):
    """Return (xt, masked), both [B, L]. A position is masked where u < t, unless it is frozen."""
    masked = (u < np.reshape(t, (-1, 1))) & np.logical_not(frozen)
    return np.where(masked, mask_of(w, mask_id), x0), masked


def masked_nll(logits, x0, masked):
    """Return the sum over masked positions i of -log p(x0_i). [B], nats."""
    token = np.where(masked, x0, 0)  # at a frozen position x0 may be the mask, which has no logit
    p = np.take_along_axis(softmax(logits), token[..., None], -1)[..., 0]  # [B, L]
    return -np.log(np.where(masked, p, 1)).sum(1)


def loss(
    w, heads, x0, t, u, *,
    rate=1.0, u_given=0.0, unroll=1, u_k=(0.0,), u_T=0.5, frozen=False, mask_id=None, signal_w=None,
):  # fmt: skip
    """Return SCMDM's loss at times t [B], masked by uniforms u [B, L]. [B], nats per sequence.

    A sequence gets its signal if u_given [B] < rate. unroll > 1: the signal is made by k passes (u_k [1]), at
    the last k states of a sampler of T steps (u_T [B]). frozen [B, L] bool. signal_w: the weights that make
    the signal, if not w; a port with automatic differentiation has no use for it.
    """
    t = np.maximum(t, T_MIN)
    k, T = 1 + int(unroll * u_k[0]), x0.shape[1] * 4 ** (2 * u_T - 1)
    x0_prev = None
    for time in [t] if unroll == 1 else [t + i / T for i in range(k, 0, -1)]:  # [B]
        xt, _ = q_sample(w, x0, time, u, frozen, mask_id)
        x0_prev = softmax(predict(signal_w or w, heads, xt, x0_prev, mask_id))  # [B, L, V]
        x0_prev = x0_prev * (time <= 1)[:, None, None]  # before t = 1 no step was made, so there is no signal
    x0_prev = x0_prev * np.reshape(u_given < rate, (-1, 1, 1))
    xt, masked = q_sample(w, x0, t, u, frozen, mask_id)
    return masked_nll(predict(w, heads, xt, x0_prev, mask_id), x0, masked) / t  # -alpha' / (1 - alpha) = 1/t


def gradient(w, heads, x0, t, u, *, constant=True):
    """Return {name: array}, the gradient of loss(...).mean(), for which the signal is a constant.

    Optional in a port, which uses its framework's. This one takes central differences, for two arrays only.
    """
    found = {name: np.empty(w[name].shape) for name in PASS_1_MATTERS}
    for name in found:
        for index in np.ndindex(w[name].shape):
            change = np.zeros(w[name].shape)
            change[index] = 1e-5
            ends = (w | {name: w[name] + change}, w | {name: w[name] - change})
            up, down = (loss(end, heads, x0, t, u, signal_w=w if constant else end).mean() for end in ends)
            found[name][index] = (up - down) / 2e-5
    return found


# --- 3. The port: the sampler and its bound ----------------------------------------------------------------


def token_probs(logits, temperature, top_p):
    """Return what tokens are drawn from [B, L, V]. It need not sum to 1."""
    if temperature == 0:
        return np.eye(logits.shape[-1])[logits.argmax(-1)]
    probs = softmax(logits / temperature)
    likely = (-probs).argsort(-1, kind="stable")  # tokens, the most likely first
    p = np.take_along_axis(probs, likely, -1)
    np.put_along_axis(probs, likely, np.where(np.cumsum(p, -1) - p < top_p, p, 0), -1)
    return probs


def sample(w, heads, x, u_reveal, u_token, *, order="random", temperature=1.0, top_p=1.0, mask_id=None):
    """Fill the masks of x [B, L]; u_... [steps, B, L]. Returns tokens [B, L], signals [steps, B, L, V]."""
    mask, steps, x0_prev, signals = mask_of(w, mask_id), len(u_reveal), None, []
    blanks = (x == mask).sum(1, keepdims=True)  # [B, 1]
    for k in range(steps):
        logits = predict(w, heads, x, x0_prev, mask_id)
        x0_prev = softmax(logits)  # whatever the temperature
        signals.append(x0_prev)
        t, s, masked = 1 - k / steps, 1 - (k + 1) / steps, x == mask
        cdf = np.cumsum(token_probs(logits, temperature, top_p), -1)
        # the first that exceeds u; divided, and in float64, or rounding may leave the last one short of u
        token = (cdf / cdf[..., -1:] > u_token[k][..., None]).argmax(-1)  # [B, L]
        reveal = masked & (u_reveal[k] < (t - s) / t)
        if order == "confidence":
            p = np.take_along_axis(x0_prev, token[..., None], -1)[..., 0]  # [B, L]
            rank = np.where(masked, -p, 1).argsort(-1, kind="stable").argsort(-1)  # 0: the most confident
            left = np.round(s * blanks)  # halves are rounded to the even number
            reveal = masked & (rank < masked.sum(1, keepdims=True) - left)
        x = np.where(reveal, token, x)
    return x, np.stack(signals)


def bound(w, heads, x0, u, steps, *, frozen=False, mask_id=None):
    """Return the sampler's bound on -log p(x0), masked by uniforms u [B, L]. [B], nats per sequence."""
    total, x0_prev = 0, None
    for k in range(steps):
        t, s = 1 - k / steps, 1 - (k + 1) / steps
        xt, masked = q_sample(w, x0, t, u, frozen, mask_id)  # the same u, so that the masks are nested
        logits = predict(w, heads, xt, x0_prev, mask_id)
        total = total + (t - s) / t * masked_nll(logits, x0, masked)
        x0_prev = softmax(logits)
    return total


# --- 4. The port: training ---------------------------------------------------------------------------------


def is_decayed(name, array):
    return array.ndim == 2 and "embed" not in name


def optimise(
    w, gradients, lr, *,
    betas=(0.9, 0.98), correct=True, decay=0.05, decayed=is_decayed, warmup=None,
    clip=lambda norm: min(1, 1 / norm),
):  # fmt: skip
    """Train for n iterations with gradients {name: [n, ...]}, which are not clipped yet. Optional in a port.

    Returns the weights and their moving average, both {name: array}. A port needs none of the keywords; with
    them the kit makes the mistakes that it recognises.
    """
    live, gradients, n = float64(w), float64(gradients), len(next(iter(gradients.values())))
    average, m, v = dict(live), dict.fromkeys(w, 0), dict.fromkeys(w, 0)
    warmup = warmup or max(1, min(n // 20, 200))
    for k in range(n):
        scale = clip(np.sqrt(sum((g[k] ** 2).sum() for g in gradients.values())))  # one norm for all arrays
        rate = lr * min((k + 1) / warmup, (1 + np.cos(np.pi * k / n)) / 2)
        unbias1, unbias2 = (1 - beta ** (k + 1) if correct else 1 for beta in betas)
        follow = min(0.999, (k + 1) / (k + 10))
        for name in live:
            g = scale * gradients[name][k]
            m[name] = betas[0] * m[name] + (1 - betas[0]) * g
            v[name] = betas[1] * v[name] + (1 - betas[1]) * g**2
            adam = m[name] / unbias1 / (np.sqrt(v[name] / unbias2) + 1e-8)
            live[name] = live[name] * (1 - rate * decay * decayed(name, live[name])) - rate * adam
            average[name] = follow * average[name] + (1 - follow) * live[name]
    return live, average


# --- 5. The kit --------------------------------------------------------------------------------------------

# Strings are names in data/golden.npz. One that ends in / is a dict, of all the values whose names begin so.
MODEL = ("weights/", "heads")
LOSS = (*MODEL, "loss/x0", "loss/t", "loss/u_mask")
FROZEN_LOSS, INSIDE_LOSS = ((*MODEL, f"{x0}/x0", "loss/t", "loss/u_mask") for x0 in ("frozen", "inside"))
HALF = {"rate": 0.5, "u_given": "loss/u_given"}
UNROLL = {"unroll": 4, "u_k": "unroll/u_passes", "u_T": "unroll/u_calls"}
FROZEN, INSIDE = {"frozen": "frozen/frozen"}, {"mask_id": "inside/mask_id"}
DRAWS = ("sample/u_reveal", "sample/u_token")
FOUR_STEPS = ("sample/canvas", "confidence/u_reveal", "confidence/u_token")
CONFIDENCE, WARM = {"order": "confidence", "temperature": 0.5}, {"temperature": 0.6, "top_p": 0.9}

# Typical mistakes: {what was done: the options with which the function above does it}
NO_SIGNAL, ALL_GIVEN = {"pass 2 is given no signal": {"rate": 0}}, {"u_given is ignored": {"rate": 1}}
ONE_PASS, RANDOM = {"one pass makes the signal": {"unroll": 1}}, {"the order is random": {"order": "random"}}
NOT_WARM = {"the temperature is ignored": {"temperature": 1}, "top_p is ignored": {"top_p": 1}}
ADAMW = {
    "beta2 is 0.999, not 0.98": {"betas": (0.9, 0.999)},
    "there is no bias correction": {"correct": False},
    "there is no warm-up": {"warmup": 1},
    "gradients are not clipped": {"clip": lambda norm: 1},
    "a gradient of norm below 1 is scaled up to 1": {"clip": lambda norm: 1 / norm},
    "there is no weight decay": {"decay": 0},
    "everything is decayed": {"decayed": lambda name, array: True},
    "norms are decayed": {"decayed": lambda name, array: "embed" not in name},
    "embeddings are decayed": {"decayed": lambda name, array: array.ndim == 2},
    "position_embed is decayed": {"decayed": lambda name, array: array.ndim == 2 and name != "embed.weight"},
    "head is not decayed": {"decayed": lambda name, array: is_decayed(name, array) and "head" not in name},
    "W is not decayed": {"decayed": lambda name, array: is_decayed(name, array) and "self" not in name},
}

# fmt: off
STEPS = [  # title, function, inputs, options, what it must return, where to look if not, typical mistakes
    ("the Transformer", "forward", (*MODEL, "forward/xt"), {}, "forward/logits_without_signal",
     "0.001 may be the erf form of GELU; more: the rotary pairs, the order q, k, v, or position_embed", {}),
    ("causal attention", "forward", (*MODEL, "forward/xt"), {"causal": True}, "forward/logits_causal",
     "position i attends to 0..i, and the input is not shifted", {"causal is ignored": {"causal": False}}),
    ("the adapter", "forward", (*MODEL, "forward/xt", "forward/x0_prev"), {}, "forward/logits_with_signal",
     "W is transposed, and the signal is added at masked positions only", {}),
    ("the loss", "loss", LOSS, {}, "loss/loss",
     "a sum over masked positions, divided by t; t is raised to 0.001 before masking", NO_SIGNAL),
    ("the loss at rate 0.5", "loss", LOSS, HALF, "loss/loss_at_rate_half",
     "no signal is all zeros, not a uniform distribution", ALL_GIVEN | NO_SIGNAL),
    ("the loss, unrolled", "loss", LOSS, UNROLL, "unroll/loss",
     "k = 1 + floor(4 u_k); the same u masks all states; the signal of a time above 1 is zero", ONE_PASS),
    ("the loss, unrolled, rate 0.5", "loss", LOSS, UNROLL | HALF, "unroll/loss_at_rate_half",
     "all sequences go through the passes; then the signal of some is set to zero", ALL_GIVEN | NO_SIGNAL),
    ("the loss, frozen", "loss", FROZEN_LOSS, FROZEN, "frozen/loss",
     "a frozen position is never masked and never scored, even if the mask stands there", NO_SIGNAL),
    ("the loss, frozen, unrolled", "loss", FROZEN_LOSS, FROZEN | UNROLL, "frozen/loss_unrolled",
     "a frozen position is masked in none of the passes", ONE_PASS),
    ("the loss, mask inside", "loss", INSIDE_LOSS, INSIDE, "inside/loss",
     "the mask's logit is -inf in both passes; the signal is added where xt is mask_id", NO_SIGNAL),
    ("the gradient", "gradient", LOSS, {}, "loss/gradient/",
     "it is that of the mean over the batch; embed.weight also learns through x0_prev @ E[:V]",
     {"the gradient flows through pass 1": {"constant": False}}),
    ("the sampler", "sample", (*MODEL, "sample/canvas", *DRAWS), {}, ("sample/tokens", "sample/x0_prev"),
     "the signal is carried; cumulative sums are float64, and divided by the last", {}),
    ("the sampler, temperature and top_p", "sample", (*MODEL, "sample/canvas", *DRAWS), WARM,
     ("nucleus/tokens", "nucleus/x0_prev"),
     "the token that reaches top_p is kept; tokens stay in the vocabulary's order", NOT_WARM),
    ("the sampler, temperature 0", "sample", (*MODEL, "sample/canvas", *DRAWS), {"temperature": 0},
     ("argmax/tokens", "argmax/x0_prev"), "the most likely token; the signal has no temperature", NOT_WARM),
    ("the sampler, confidence order", "sample", (*MODEL, *FOUR_STEPS), CONFIDENCE,
     ("confidence/tokens", "confidence/x0_prev"),
     "the probability of the token that was drawn; of 4.5 and 1.5 masks 4 and 2 are left", RANDOM),
    ("the sampler, equal confidences", "sample", ("tied/weights/", "heads", *FOUR_STEPS), CONFIDENCE,
     ("tied/tokens", "tied/x0_prev"), "of equals, the first position comes first", RANDOM),
    ("the sampler, mask inside", "sample", (*MODEL, "inside/canvas", *DRAWS), INSIDE,
     ("inside/tokens", "inside/x0_prev"), "the mask's logit is -inf, for the signal too", {}),
    ("the bound", "bound", (*MODEL, "loss/x0", "bound/u", 6), {}, "bound/bound",
     "the same u at each step; (t - s) / t times the sum over masked positions; the signal is carried", {}),
    ("the bound, frozen", "bound", (*MODEL, "frozen/x0", "bound/u", 6), FROZEN, "frozen/bound",
     "a frozen position is never masked and never scored", {}),
    ("the bound, mask inside", "bound", (*MODEL, "inside/x0", "bound/u", 6), INSIDE, "inside/bound",
     "the mask's logit is -inf, for the signal too", {}),
    ("the optimiser, 3 iterations", "optimise", ("weights/", "optimiser/gradient/", 1e-2), {},
     ("optimiser/live/", "optimiser/average/"), "one norm for all arrays; decoupled decay; average", ADAMW),
    ("the optimiser, 40 iterations", "optimise", ("recipe/weights/", "recipe/gradient/", 1e-2), {},
     ("recipe/live/", "recipe/average/"), "epsilon is 1e-8, outside the root; what is decayed", ADAMW),
]
# fmt: on


def resolve(golden, value):
    """Return value with golden values in place of their names."""
    if isinstance(value, tuple):
        return tuple(resolve(golden, part) for part in value)
    if isinstance(value, str) and value.endswith("/"):
        return {name.removeprefix(value): golden[name] for name in golden if name.startswith(value)}
    if isinstance(value, str) and value in golden:
        return golden[value] if golden[value].ndim else golden[value].item()
    return value


def difference(found, expected, scale=None):
    """Return the largest |found - expected| / max(1, scale) of an array, or of a tuple or dict of arrays.

    The scale is |expected|. In a dict, of weights or gradients, it is the largest of the whole array.
    """
    if isinstance(expected, tuple):
        return np.max([difference(*pair) for pair in zip(found, expected, strict=True)])
    if isinstance(expected, dict):
        return np.max([difference(found[name], a, np.abs(a).max()) for name, a in expected.items()])
    found = np.asarray(found, dtype=np.float64)
    if found.shape != expected.shape:
        raise ValueError(f"the shape is {list(found.shape)}, expected {list(expected.shape)}")
    return np.max(np.abs(found - expected) / np.maximum(1, np.abs(expected) if scale is None else scale))


def attempt(step, port, golden, tolerance, brief):
    """Run one golden step. Returns its outcome, which is ok, FAILED or skipped, and a remark.

    brief: leave out the traceback of an error, which is often the same at all later steps.
    """
    _, name, inputs, options, expected, hint, mistakes = step
    if name not in port:
        return "skipped" if name in OPTIONAL else "FAILED", f"there is no function {name}"
    try:
        inspect.signature(port[name]).bind_partial(**options)
    except TypeError as error:  # it does not have this keyword
        return "skipped", f"{name} {error}"
    inputs, expected = resolve(golden, inputs), resolve(golden, expected)
    options = {option: resolve(golden, value) for option, value in options.items()}
    limit, advice = OPTIMISER_TOLERANCE if name == "optimise" else tolerance, f"\n        look here: {hint}"
    try:
        found = port[name](*inputs, **options)
        if name == "gradient":  # the other arrays are compared if the port returns them
            expected = {key: a for key, a in expected.items() if key in PASS_1_MATTERS or key in found}
        off = difference(found, expected)
    except Exception as error:
        return "FAILED", (repr(error).splitlines()[0] if brief else traceback.format_exc().rstrip()) + advice
    remark = f"largest difference {off:.0e}, tolerance {limit:.0e}"
    if off <= limit:  # NaN is not
        return "ok", remark
    for mistake, change in mistakes.items():
        if difference(found, globals()[name](*inputs, **options | change)) <= limit:
            return "FAILED", f"{remark}\n        the likely mistake: {mistake}"
    return "FAILED", remark + advice


def check(port, path=GOLDEN, tolerance=TOLERANCE):
    """Print a line for each golden step of port {name: function}, and a last one. Returns how many failed."""
    with np.load(path, allow_pickle=False) as file:
        golden = {name: file[name] for name in file.files}
    L = golden["loss/x0"].shape[1]
    for name, array in resolve(golden, "weights/").items():
        # two more: the gradient for the other arrays, and a model for which all tokens are equally likely
        golden.setdefault(f"loss/gradient/{name}", L * golden[f"optimiser/gradient/{name}"][0])
        golden[f"tied/weights/{name}"] = 0 * array if name == "head.weight" else array
    failed = skipped = 0
    for step in STEPS:
        outcome, remark = attempt(step, port, golden, tolerance, brief=failed > 0)
        failed, skipped = failed + (outcome == "FAILED"), skipped + (outcome == "skipped")
        print(f"{outcome:8}{step[0]}: {remark}", flush=True)
    if failed:
        print("Later steps build on earlier ones, so begin with the first that failed.")
        print(f"{failed} of {len(STEPS)} steps failed, {skipped} skipped")
    else:
        print(f"all right: {len(STEPS) - skipped} steps" + f", {skipped} skipped" * bool(skipped))
    return failed


def main():
    parser = argparse.ArgumentParser(prog="python -m data.golden", description="Check a port of SCMDM.")
    parser.add_argument("port", nargs="?", help="a Python file (default: the NumPy port in data/golden.py)")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="of all steps but the optimiser's")
    args = parser.parse_args()
    port = globals()
    if args.port:
        if not Path(args.port).is_file():
            parser.error(f"{args.port}: no such file")
        sys.path.insert(0, str(Path(args.port).parent))  # a port may import files beside it
        port = runpy.run_path(args.port, run_name="port")
    sys.exit(1 if check(port, tolerance=args.tolerance) else 0)


if __name__ == "__main__":
    main()
