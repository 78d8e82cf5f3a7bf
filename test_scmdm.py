"""The specification of SCMDM, executable. The docstring of each test is one rule.

    python -m pytest -q           this, the tests in data/ and the study's; a skipped test says why with -rs
    python test_scmdm.py          write data/golden.npz again (only if the arithmetic is meant to change)

    1. Oracles        a world so small that every sequence, mask and path can be enumerated
    2. The process    masking, the loss and the sampler, for any denoiser
    3. The method     what self-conditioning must and must not do
    4. The model      against NumPy, written from the equations (data/golden.py); golden values
    5. README.md      its code runs as printed
    6. Model files    what is saved comes back, and nothing finished is lost
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import scmdm
import train as train_py
from data import golden
from scmdm import COSINE, LINEAR, Config, SelfConditioning, Transformer, add_self_conditioning, diffusion_loss
from scmdm import load, make_signal, q_sample, sample, sampler_bound, save, unmask_prob

settings.register_profile("spec", derandomize=True, deadline=None, max_examples=30, database=None)
settings.load_profile("spec")
HERE = Path(__file__).parent
README, PORTING = HERE / "README.md", HERE / "data" / "PORTING.md"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # for other processes
SCHEDULES = {"linear": LINEAR, "cosine": COSINE}
schedules = st.sampled_from([LINEAR, COSINE])
seeds = st.integers(0, 2**31 - 1)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 6))  # B, L, V
orders, kinds = st.sampled_from(["random", "confidence"]), st.sampled_from(["vanilla", "adapted", "causal"])
rates, nuclei = st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.3, 0.8, 1.0])
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def rng(seed, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def toy(V, seed=0, scale=3.0, mask_id=None):
    """A denoiser of a few lines that depends on its neighbours, and at masked positions on the signal."""
    mask_id = V if mask_id is None else mask_id
    g = rng(seed)
    A, N, S = (scale * torch.randn(size, generator=g) for size in ((V + 1, V), (V + 1, V), (V, V)))

    def denoiser(xt, x0_prev):
        logits = A[xt] + N[xt.roll(1, 1)]  # [B, L, V]
        if x0_prev is not None:
            logits = logits + torch.where((xt == mask_id)[..., None], x0_prev.to(S.dtype) @ S, 0)
        return logits

    return denoiser


def flat(V):
    """A denoiser that knows nothing."""
    return lambda xt, x0_prev: torch.zeros(*xt.shape, V)


def fixed(logits):
    """A denoiser that always answers the same."""
    return lambda xt, x0_prev: logits.expand(*xt.shape, logits.shape[-1])


def tiny(V=5, length=6, seed=0, adapted=False, **kw):
    """A Transformer of random weights, large enough to matter; adapted: with a matrix W that is not zero."""
    torch.manual_seed(seed)
    model = Transformer(Config(V, length, dim=16, depth=2, heads=2, **kw))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.ndim == 1 else 0.0, 0.3)
    if adapted:
        model = add_self_conditioning(model)
        model.self_conditioning.W.data.normal_(0, 0.5)
    return model


def ignoring_signal(denoiser):
    """The denoiser, never given a signal."""
    return lambda xt, x0_prev: denoiser(xt, None)


def disturbed(denoiser, mask_id):
    """The denoiser with other logits at the visible positions."""

    def other(xt, x0_prev):
        logits = denoiser(xt, x0_prev)
        return torch.where((xt == mask_id)[..., None], logits, torch.randn_like(logits) * 100)

    return other


class Spy:
    """A denoiser that remembers what it was given and what it answered, one entry for each call."""

    def __init__(self, denoiser):
        self.denoiser, self.xt, self.x0_prev, self.logits = denoiser, [], [], []

    def __call__(self, xt, x0_prev):
        self.xt.append(xt.clone())
        self.x0_prev.append(x0_prev)
        self.logits.append(self.denoiser(xt, x0_prev))
        return self.logits[-1]


def first_steps(n, denoiser, canvas, mask_id, steps, generator):
    """What sample() has made of the canvas after the first n of its steps."""

    def on_step(step, x, x0_prev):
        if step + 1 == n:
            raise StopIteration(x)

    with pytest.raises(StopIteration) as stop:
        sample(denoiser, canvas, mask_id, steps, generator=generator, on_step=on_step)
    return stop.value.value


class Replay:
    """A generator that gives these arrays, one for each draw, each of the shape that is asked for."""

    def __init__(self, *uniforms):
        self.rest = [torch.as_tensor(u) for u in uniforms]

    def __call__(self, shape):
        assert self.rest[0].shape == tuple(shape)
        return self.rest.pop(0)


# =============================================================================================
# 1. Oracles: a world of V tokens and L positions, with all V^L sequences enumerated
# =============================================================================================


class World:
    """A random joint distribution p [N] over all sequences X [N, L], and its exact conditional denoiser."""

    def __init__(self, V, L, seed):
        self.V, self.L = V, L
        self.X = torch.tensor(list(itertools.product(range(V), repeat=L)))  # [N, L]
        w = torch.rand(len(self.X), dtype=torch.float64, generator=rng(seed)) ** 2 + 0.03
        self.p = w / w.sum()  # [N]
        self.onehot = torch.nn.functional.one_hot(self.X, V).double()  # [N, L, V]
        self.entropy = -(self.p * self.p.log()).sum().item()
        states = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))  # [S, L]
        agrees = ((states[:, None] == self.X) | (states[:, None] == V)).all(-1).double()  # [S, N]
        joint = torch.einsum("sn,n,nlv->slv", agrees, self.p, self.onehot)
        self.table = (joint / joint.sum(-1, keepdim=True)).clamp(min=1e-300).log()  # [S, L, V]

    def denoiser(self, xt, x0_prev=None):
        """log p(x0_i = v | the visible tokens of xt), [B, L, V]."""
        powers = torch.tensor([(self.V + 1) ** (self.L - 1 - i) for i in range(self.L)])
        return self.table[(xt * powers).sum(1)]

    def draw(self, n, seed):
        return self.X[torch.multinomial(self.p, n, replacement=True, generator=rng(seed))]


def two_pass(denoiser):
    """Both passes of SCMDM as one denoiser of xt alone, so that the sums below apply to it."""
    return lambda xt, _=None: denoiser(xt, denoiser(xt, None).float().softmax(-1))


def nll_of(logits, X):
    """-log p(X_i) from logits [N, L, V], in float64. [N, L]."""
    return -logits.double().log_softmax(-1).gather(-1, X[..., None])[..., 0]


def exact_nelbo(denoiser, X, V):
    """The NELBO of each sequence of X, summed over every mask of k of L positions, which has the weight
    integral over t of (1/t) t^k (1-t)^(L-k) = (k-1)! (L-k)! / L!. No sampling and no schedule. [N] nats."""
    L = X.shape[1]
    total = torch.zeros(len(X), dtype=torch.float64)
    for mask in torch.tensor(list(itertools.product([False, True], repeat=L)))[1:]:
        k = int(mask.sum())
        weight = math.factorial(k - 1) * math.factorial(L - k) / math.factorial(L)
        total += weight * (nll_of(denoiser(torch.where(mask, V, X), None), X) * mask).sum(1)
    return total


def any_order_nll(denoiser, X, V):
    """-log p(x) of X by the chain rule, once in every order of the positions. [orders, N] nats."""
    L = X.shape[1]
    rows = []
    for order in itertools.permutations(range(L)):
        nll, visible = torch.zeros(len(X), dtype=torch.float64), torch.zeros(L, dtype=torch.bool)
        for i in order:
            nll += nll_of(denoiser(torch.where(visible, X, V), None), X)[:, i]
            visible[i] = True
        rows.append(nll)
    return torch.stack(rows)


def sampler_paths(denoiser, X, V, steps, schedule=LINEAR):
    """The probability [P] of each path (at which step is each position revealed?) and its cost to each
    sequence [N, P]. p(x) under `sample` sums probability * exp(-cost); the bound sums probability * cost."""
    L = X.shape[1]
    paths = torch.tensor(list(itertools.product(range(steps), repeat=L)))  # [P, L]
    masked = 1 - schedule.alpha(1 - torch.arange(steps + 1).double() / steps)  # share masked before each step
    weight = (masked[:-1] - masked[1:])[paths].prod(1)  # [P]
    rows, when = X.repeat_interleave(len(paths), 0), paths.repeat(len(X), 1)  # [N * P, L]
    cost, x0_prev = torch.zeros(len(rows), dtype=torch.float64), None
    for k in range(steps):
        logits = denoiser(torch.where(when >= k, V, rows), x0_prev)
        cost += (nll_of(logits, rows) * (when == k)).sum(1)
        x0_prev = logits.float().softmax(-1)
    return weight, cost.view(len(X), -1)


def assert_fits(counts, p):
    """Pearson's chi-square of counts against probabilities, within 5 sigma (Wilson & Hilferty's form)."""
    counts, expected = torch.as_tensor(counts).double(), torch.as_tensor(p).double() * float(sum(counts))
    assert expected.min() > 4, "too few samples for this test"
    df = len(counts) - 1
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    z = ((chi2 / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))
    assert z < 5, f"the counts do not fit the distribution: chi2 {chi2:.1f} on {df} degrees, {z:.1f} sigma"


def count(x, V):
    """How often each of the V^L sequences occurs in x [N, L], in the order of World.X."""
    L = x.shape[1]
    code = (x * torch.tensor([V ** (L - 1 - i) for i in range(L)])).sum(1)
    return torch.bincount(code, minlength=V**L)


@given(st.sampled_from([(2, 3), (3, 2), (3, 4), (2, 4)]), seeds)
@settings(max_examples=8)
def test_nelbo_of_the_exact_denoiser_is_the_entropy(size, seed):
    """The NELBO, summed exactly over all masks, equals the entropy of the data when the denoiser is exact."""
    world = World(*size, seed)
    nelbo = (world.p * exact_nelbo(world.denoiser, world.X, world.V)).sum().item()
    assert nelbo == pytest.approx(world.entropy, abs=1e-9)


@given(st.sampled_from([(2, 3), (3, 3), (2, 4)]), seeds, st.booleans())
@settings(max_examples=8)
def test_nelbo_is_the_any_order_average_and_a_bound(size, seed, self_conditioned):
    """For any denoiser the NELBO is the mean over all orders of the chain-rule NLL, and a bound."""
    world = World(*size, seed)
    denoiser = toy(world.V, seed)
    denoiser = two_pass(denoiser) if self_conditioned else denoiser
    nelbo, orders = (f(denoiser, world.X, world.V) for f in (exact_nelbo, any_order_nll))
    assert torch.allclose(nelbo, orders.mean(0), atol=1e-5)
    assert (nelbo >= -torch.logsumexp(-orders, 0) + math.log(len(orders)) - 1e-5).all()  # the model's own NLL
    assert (world.p * nelbo).sum() >= world.entropy - 1e-5


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_diffusion_loss_estimates_the_nelbo(rate, schedule):
    """diffusion_loss is an unbiased estimate of the NELBO, for either schedule, with and without signal."""
    V, g = 3, rng(0)
    denoiser = toy(V, 7, scale=1.0)
    x0 = World(V, 4, 1).draw(512, 2)
    exact = exact_nelbo(two_pass(denoiser) if rate else denoiser, x0, V).mean().item()
    kw = dict(self_cond_rate=rate, schedule=SCHEDULES[schedule], generator=g)
    means = torch.stack([diffusion_loss(denoiser, x0, V, **kw).mean() for _ in range(400)])
    error = means.std().item() / 20
    assert error < 0.02 * exact and abs(means.mean().item() - exact) < 5 * error


@given(st.integers(2, 50), st.integers(1, 9), st.integers(1, 64), schedules)
def test_uniform_model(V, L, B, schedule):
    """A model that knows nothing has an NELBO of L log V: the weight 1/t makes up for what is not masked."""
    x0 = torch.randint(V, (B * 200, L), generator=rng(V))
    loss = diffusion_loss(flat(V), x0, V, schedule=schedule, generator=rng(L))
    assert loss.shape == (len(x0),)
    assert abs(loss.mean().item() - L * math.log(V)) < 5 * loss.std().item() / len(x0) ** 0.5


@pytest.mark.parametrize("signal", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sampler_follows_the_process_exactly(steps, schedule, signal):
    """At any number of steps the samples have exactly the distribution of the process, signal included."""
    V, L, schedule = 3, 3, SCHEDULES[schedule]
    world = World(V, L, 11)
    denoiser = toy(V, 5, scale=0.7) if signal else world.denoiser
    weight, cost = sampler_paths(denoiser, world.X, V, steps, schedule)
    p = (-cost).exp() @ weight
    assert p.sum().item() == pytest.approx(1, abs=1e-6)
    x = sample(denoiser, torch.full((40000, L), V), V, steps, schedule=schedule, generator=rng(steps))
    assert_fits(count(x, V), p)


def test_one_step_is_the_marginals_and_many_are_the_joint():
    """One step draws each position from its marginal; many steps, one token at a time, from the joint."""
    world = World(3, 3, 3)
    product = torch.einsum("a,b,c->abc", *torch.einsum("n,nlv->lv", world.p, world.onehot)).flatten()
    assert (product - world.p).abs().sum() > 0.2
    for steps, n, p in ((1, 40000, product), (800, 10000, world.p)):
        x = sample(world.denoiser, torch.full((n, 3), 3), 3, steps, generator=rng(1))
        assert_fits(count(x, 3), p)


@pytest.mark.parametrize("V, L, steps", [(3, 3, 1), (3, 3, 5), (2, 4, 4), (4, 1, 7)])
@pytest.mark.parametrize("signal", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sampler_bound_is_exact(V, L, steps, signal, schedule):
    """Over all paths sampler_bound is the mean cost of drawing x, and so at least -log p(x) of `sample`."""
    X, schedule, full = World(V, L, 0).X, SCHEDULES[schedule], toy(V, 3, scale=1.0)
    vanilla = ignoring_signal(full)
    denoiser = full if signal else vanilla
    weight, cost = sampler_paths(denoiser, X, V, steps, schedule)
    # for each path the u that follow it: masked at the step that reveals, and no longer at the next
    masked = 1 - schedule.alpha(1 - torch.arange(steps + 1).double() / steps)
    u = torch.tensor(list(itertools.product((masked[:-1] + masked[1:]) / 2, repeat=L)))  # [P, L]
    options = {"schedule": schedule, "generator": Replay(u.repeat(len(X), 1))}
    found = sampler_bound(denoiser, X.repeat_interleave(len(u), 0), V, steps, **options)
    found = found.double().view(len(X), -1) @ weight
    assert torch.allclose(found, cost @ weight, atol=1e-5)
    assert (found >= -((-cost).exp() @ weight).log() - 1e-5).all()
    if signal and steps > 1:
        weight, cost = sampler_paths(vanilla, X, V, steps, schedule)
        assert ((found - cost @ weight).abs() > 1e-3).any(), "the signal must matter here"


def test_rare_tokens_come_out_at_their_rate():
    """Tokens of probability 1e-5 come out at their rate in the first 250 of 1000 steps, too, where one Gumbel
    draw over {tokens, mask} in float32 finds almost none."""
    rare, V, B, repeats, first = 1e-5, 256, 250, 200, 250
    probs = torch.full((V,), rare)
    probs[0] = 1 - (V - 1) * rare
    denoiser, g, found = fixed(probs.log()), rng(0), 0
    for _ in range(repeats):  # in batches that fit the processor's cache
        x = first_steps(first, denoiser, torch.full((B, 1), V), V, 1000, g)
        found += ((x > 0) & (x < V)).sum().item()
    expected = (V - 1) * rare * B * repeats * first / 1000  # 31.9
    assert abs(found - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_dalpha_is_the_derivative_of_alpha(schedule):
    """dalpha is the derivative of alpha; alpha falls from exactly 1 at t = 0 to exactly 0 at t = 1."""
    alpha, dalpha = SCHEDULES[schedule]
    t = torch.linspace(0, 1, 101, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(alpha(t).sum(), t)
    assert torch.allclose(slope, dalpha(t), atol=1e-12)
    assert alpha(t)[0] == 1 and alpha(t)[-1] == 0 and (alpha(t).diff() < 0).all()


@given(schedules, st.tuples(*[st.floats(0, 1)] * 3).map(sorted).filter(lambda times: times[1] > 1e-6))
def test_chapman_kolmogorov(schedule, times):
    """A step from t to r is one from t to s and one from s to r: the process has no memory of its steps."""
    r, s, t = (torch.tensor(v, dtype=torch.float64) for v in times)
    direct = 1 - unmask_prob(r, t, schedule)  # still masked at r, given masked at t
    through = (1 - unmask_prob(s, t, schedule)) * (1 - unmask_prob(r, s, schedule))
    assert direct.item() == pytest.approx(through.item(), abs=1e-9)
    assert 0 <= unmask_prob(s, t, schedule) <= 1 and unmask_prob(0 * t, t, schedule) == 1


# =============================================================================================
# 2. The process: masking, the loss and the sampler, for any denoiser
# =============================================================================================


@given(sizes, seeds, schedules, st.floats(0, 1), st.floats(0, 1))
def test_masking(size, seed, schedule, t1, t2):
    """xt is x0 or mask; nothing is masked at t = 0, all at t = 1; masks are nested in t; frozen stays."""
    B, L, V = size
    x0 = torch.randint(V, (B, L), generator=rng(seed))
    frozen = torch.rand(B, L, generator=rng(seed + 1)) < 0.3
    before = x0.clone(), frozen.clone()

    def draw(t, **kw):
        return q_sample(x0, t, V, schedule=schedule, generator=rng(seed), **kw)

    early, late = (draw(torch.full((B,), t)) for t in sorted((t1, t2)))
    assert ((early == x0) | (early == V)).all() and early.dtype == x0.dtype
    assert ((early == V) <= (late == V)).all()
    assert torch.equal(draw(0.0), x0) and (draw(1.0) == V).all()
    assert torch.equal(draw(1.0, frozen=frozen) == V, ~frozen)
    assert torch.equal(draw(t1, frozen=frozen) == V, (draw(t1) == V) & ~frozen)
    assert torch.equal(x0, before[0]) and torch.equal(frozen, before[1])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_masking_rate(schedule):
    """Each position is masked with probability 1 - alpha(t), independently, each row at its own t."""
    N, t, schedule = 20000, torch.tensor([0.1, 0.5, 0.9]), SCHEDULES[schedule]
    x = q_sample(torch.zeros(3, N, dtype=torch.long), t, 1, schedule=schedule, generator=rng(0)).double()
    p = 1 - schedule.alpha(t.double())
    assert ((x.mean(1) - p).abs() < 5 * (p * (1 - p) / N).sqrt()).all()
    pairs = (x[:, ::2] * x[:, 1::2]).mean(1)  # both of two neighbours
    assert ((pairs - p**2).abs() < 5 * (p**2 * (1 - p**2) / (N / 2)).sqrt()).all()


@given(st.integers(1, 9), st.floats(0, 1, exclude_max=True), schedules)
def test_times_are_spread_evenly(B, u, schedule):
    """The times of a batch are t_b = (u + b/B) mod 1, from one draw u, and never below the floor."""
    zeros = torch.zeros(B, 2, dtype=torch.float64)  # these uniforms mask everything at any time
    generator = Replay(torch.tensor([u], dtype=torch.float64), zeros, zeros[:, 0])
    loss = diffusion_loss(flat(3), zeros.long(), 3, schedule=schedule, generator=generator)  # [B]
    t = ((u + torch.arange(B).double() / B) % 1).clamp(min=1e-3)
    weight = -schedule.dalpha(t) / (1 - schedule.alpha(t))
    assert torch.allclose(loss.double(), weight * 2 * math.log(3), rtol=1e-4)


def test_small_times_are_floored():
    """The weight never exceeds 1 / 0.001. Times that are given are used as they are above that floor."""
    x0 = torch.zeros(20000, 1, dtype=torch.long)
    for t, weights in ((0.0, [0, 1000]), (0.5, [0, 2]), (1.0, [1])):  # times log 2: not masked, masked
        loss = diffusion_loss(flat(2), x0, 2, t=torch.full((len(x0),), t), generator=rng(0))
        assert (loss.unique() / math.log(2)).tolist() == pytest.approx(weights, rel=1e-4)


@given(sizes, seeds, schedules, rates, st.sampled_from([1, 3]), st.sampled_from([1.0, 1e4]))
def test_loss_is_finite_and_per_sequence(size, seed, schedule, rate, unroll, scale):
    """The loss is finite at logits of ±1e4, and moved by nothing but the masked positions of its own row."""
    B, L, V = size
    x0 = torch.randint(V, (B, L), generator=rng(seed))
    denoiser = toy(V, seed, scale)
    kw = dict(self_cond_rate=rate, unroll=unroll, schedule=schedule)
    loss = diffusion_loss(denoiser, x0, V, generator=rng(seed), **kw)
    assert loss.shape == (B,) and torch.isfinite(loss).all() and (loss >= 0).all()
    assert (diffusion_loss(denoiser, x0, V, frozen=torch.ones(B, L, dtype=torch.bool), **kw) == 0).all()
    others = torch.cat((x0[:1], (x0[1:] + 1) % V))
    moved = diffusion_loss(denoiser, others, V, generator=rng(seed), **kw)
    assert torch.equal(loss[0], moved[0]), "another row moved it"
    assert torch.equal(loss, diffusion_loss(disturbed(denoiser, V), x0, V, generator=rng(seed), **kw))
    shifted = diffusion_loss(lambda xt, p: denoiser(xt, p) + 8.0, x0, V, generator=rng(seed), **kw)
    assert torch.allclose(loss, shifted, rtol=1e-4, atol=1e-2 * scale), "a constant for all logits moved it"


@given(sizes, seeds, st.sampled_from(["loss", "unrolled", "bound"]))
def test_frozen_positions_are_never_scored(size, seed, kind):
    """A frozen position reaches the denoiser as it is, even a mask, and has no part in loss or bound."""
    B, L, V = size
    x0 = torch.randint(V, (B, L), generator=rng(seed))
    frozen = torch.rand(B, L, generator=rng(seed)) < 0.5
    x0[frozen & (torch.rand(B, L, generator=rng(seed + 1)) < 0.3)] = V  # the mask, as in the text "[MASK]"
    spy = Spy(lambda xt, p: torch.where(frozen[..., None], math.nan, toy(V)(xt, None)))
    kw = dict(frozen=frozen, generator=rng(seed))
    if kind == "bound":
        found = sampler_bound(spy, x0, V, 3, **kw)
    else:
        found = diffusion_loss(spy, x0, V, unroll=3 if kind == "unrolled" else 1, **kw)
    assert torch.isfinite(found).all() and (found[frozen.all(1)] == 0).all()
    assert all(torch.equal(xt[frozen], x0[frozen]) for xt in spy.xt)


@given(sizes, seeds, schedules, st.integers(1, 12), orders, st.sampled_from([0, 0.5, 1, 2]))
def test_sampler_rules(size, seed, schedule, steps, order, temperature):
    """The denoiser is called exactly `steps` times. Prompts come back as they are, a revealed token never
    changes, no mask is left, also for steps > L, and a row does not depend on the others."""
    B, L, V = size
    canvas = torch.randint(V, (B, L), generator=rng(seed))
    canvas[torch.rand(B, L, generator=rng(seed)) < 0.6] = V
    before, spy, states = canvas.clone(), Spy(toy(V, seed)), [canvas]
    kw = dict(temperature=temperature, order=order, schedule=schedule)
    x = sample(spy, canvas, V, steps, generator=rng(seed), on_step=lambda k, x, _: states.append(x), **kw)
    others = torch.cat((canvas[:1], torch.full((B - 1, L), V)))
    others = sample(toy(V, seed), others, V, steps, generator=rng(seed), **kw)
    assert torch.equal(others[0], x[0]), "another row changed it"
    assert len(spy.xt) == steps and len(states) == steps + 1
    assert torch.equal(canvas, before), "the caller's canvas was changed"
    assert torch.equal(x[before != V], before[before != V]) and torch.equal(x, states[-1])
    assert x.dtype == canvas.dtype and x.min() >= 0 and x.max() < V, "a mask is left"
    for earlier, later, seen in zip(states, states[1:], spy.xt):
        assert torch.equal(later[earlier != V], earlier[earlier != V]), "a revealed token changed"
        assert torch.equal(seen, earlier), "the denoiser was not given the current state"


def plain_sample(denoiser, x, mask_id, us, temperature, top_p, order, schedule):
    """The sampler as one would first write it, row by row, with a token drawn at every position."""
    x, x0_prev, wanted = x.clone(), None, (x == mask_id).sum(1)
    for k, (u_reveal, u_token) in enumerate(us):
        t, s = 1 - torch.tensor([k, k + 1]).double() / len(us)
        logits = scmdm.without_mask(denoiser(x, x0_prev), mask_id)
        x0_prev = logits.softmax(-1)
        drawn = scmdm.draw(scmdm.token_probs(logits.double(), temperature, top_p), u_token)  # [B, L]
        for b in range(len(x)):
            masks = [i for i in range(x.shape[1]) if x[b, i] == mask_id]
            if order == "random":
                chosen = [i for i in masks if u_reveal[b, i] < unmask_prob(s, t, schedule)]
            else:  # as many as the schedule expects, those whose drawn token is likeliest first
                left = int(((1 - schedule.alpha(s)) * wanted[b]).round())
                chosen = sorted(masks, key=lambda i: -x0_prev[b, i, drawn[b, i]])[: len(masks) - left]
            x[b, chosen] = drawn[b, chosen]
    return x


@given(sizes, seeds, schedules, st.integers(1, 6), orders, rates, nuclei, st.booleans())
@settings(max_examples=60)
def test_sampler_is_the_plain_one(size, seed, schedule, steps, order, temperature, top_p, own_mask):
    """Tokens, drawn only where a mask is revealed, are those of a sampler that draws one everywhere."""
    B, L, mask_id = size
    V = mask_id if own_mask else mask_id + 1  # else the mask is the last of the model's tokens
    denoiser = toy(V, seed, mask_id=mask_id)
    us = torch.rand(steps, 2, B, L, dtype=torch.float64, generator=rng(seed))
    canvas = torch.where(torch.rand(B, L, generator=rng(seed + 1)) < 0.8, mask_id, 0)
    rest = dict(temperature=temperature, top_p=top_p, order=order, schedule=schedule)
    x = sample(denoiser, canvas, mask_id, steps, generator=Replay(*us.flatten(0, 1)), **rest)
    assert torch.equal(x, plain_sample(denoiser, canvas, mask_id, us, **rest))


@given(sizes, seeds, st.integers(1, 5))
def test_same_seed_same_tokens(size, seed, steps):
    """The same seed gives the same tokens, loss and bound; another seed gives others."""
    B, L, V = size
    canvas = torch.full((B, L), V)
    x0 = torch.zeros_like(canvas)
    sampled, bound = (functools.partial(f, steps=steps) for f in (sample, sampler_bound))
    for f, x in ((sampled, canvas), (bound, x0), (functools.partial(diffusion_loss, unroll=4), x0)):
        assert torch.equal(*(f(toy(V, 1), x, V, generator=rng(seed)) for _ in range(2)))
    many = [sample(flat(5), torch.full((8, 8), 5), 5, steps, generator=rng(s)) for s in (seed, seed + 1)]
    assert not torch.equal(*many)


@cuda
def test_on_cuda():
    """A GPU computes the CPU's logits to 1e-4; draws are made there, the same at each run; results stay."""
    model, x = tiny(adapted=True), torch.randint(6, (3, 6), generator=rng(0))
    there = copy.deepcopy(model).cuda()
    for p in (None, torch.rand(3, 6, 5, generator=rng(1)).softmax(-1)):
        assert torch.allclose(model(x, p), there(x.cuda(), None if p is None else p.cuda()).cpu(), atol=1e-4)
    canvas = torch.full((4, 6), 5, device="cuda")
    draws = [sample(there, canvas, 5, 4, generator=rng(3, "cuda")) for _ in range(2)]
    assert torch.equal(*draws) and draws[0].is_cuda
    loss = diffusion_loss(there, draws[0], 5, unroll=3, generator=rng(3, "cuda"))
    bound = sampler_bound(there, draws[0], 5, 4, generator=rng(3, "cuda"))
    assert loss.is_cuda and bound.is_cuda and torch.isfinite(loss + bound).all()


@given(sizes, seeds, st.integers(1, 4))
def test_temperature_zero_is_argmax(size, seed, steps):
    """temperature = 0 takes the likeliest token, and so does any temperature that is low enough."""
    B, L, V = size
    logits = torch.randn(B, L, V, generator=rng(seed))
    for temperature in (0, 1e-7, 1e-320):
        x = sample(fixed(logits), torch.full((B, L), V), V, steps, temperature=temperature)
        assert torch.equal(x, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_shapes_the_draw(temperature):
    """Tokens are drawn from softmax(logits / temperature)."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    canvas = torch.full((20000, 1), 4)
    x = sample(fixed(logits), canvas, 4, 2, temperature=temperature, generator=rng(0))
    assert_fits(count(x, 4), (logits / temperature).softmax(-1))


@given(st.integers(1, 8), seeds, st.floats(0.01, 1.0), st.sampled_from([0.5, 1.0, 2.0]))
def test_top_p_keeps_the_smallest_nucleus(V, seed, top_p, temperature):
    """top_p keeps the likeliest tokens after the temperature, as few as have that mass, in proportion."""
    logits = torch.randn(1, 1, V, generator=rng(seed), dtype=torch.float64) * 2
    p = (logits / temperature).softmax(-1)[0, 0]
    kept = scmdm.token_probs(logits, temperature, top_p)[0, 0]
    order = p.argsort(descending=True)
    smallest = next((k for k in range(1, V) if p[order[:k]].sum() >= top_p), V)
    assert torch.equal((kept > 0).nonzero()[:, 0], order[:smallest].sort().values)
    assert torch.allclose(kept[kept > 0], p[kept > 0])  # the cumulative sum divides them by their mass later


@given(st.integers(1, 6), seeds)
def test_draw_inverts_the_cumulative_sum(V, seed):
    """A token is drawn when u falls in its slice of the cumulative sum; one of probability zero never is."""
    p = torch.rand(V, generator=rng(seed), dtype=torch.float64)
    p[torch.rand(V, generator=rng(seed + 1)) < 0.3] = 0
    p[seed % V] += 0.1
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    u = torch.cat((torch.rand(200, generator=rng(2), dtype=torch.float64), ends))
    token = scmdm.draw(p.expand(len(u), V), u)
    cdf = np.concatenate(([0], np.cumsum(p.numpy()) / p.sum().item()))
    assert (p[token] > 0).all()
    assert (cdf[token] <= u.numpy() + 1e-12).all() and (u.numpy() <= cdf[token + 1] + 1e-12).all()


@given(sizes, seeds, st.integers(0, 5), orders)
def test_mask_among_the_tokens(size, seed, mask_id, order):
    """A mask that is one of the tokens is never drawn, scored or fed back; the caller's logits are left."""
    B, L, V = size
    V, mask_id = V + 1, mask_id % (V + 1)
    base, kept, signals = toy(V, seed, mask_id=mask_id), [], []

    def denoiser(xt, x0_prev):
        logits = base(xt, x0_prev)
        logits[..., mask_id] = 50.0  # this model loves the mask
        kept.append((logits, logits.clone()))
        signals.append(x0_prev)
        return logits

    def spared(xt, x0_prev):  # the same model, had it never heard of the mask
        return base(xt, x0_prev).index_fill(-1, torch.tensor(mask_id), -math.inf)

    x = sample(denoiser, torch.full((B, L), mask_id), mask_id, 3, order=order, generator=rng(seed))
    assert (x != mask_id).all()
    x0 = torch.randint(V - 1, (B, L), generator=rng(seed))
    x0 = x0 + (x0 >= mask_id)
    for score in (diffusion_loss, functools.partial(sampler_bound, steps=3)):
        denoisers = denoiser, spared, disturbed(denoiser, mask_id)
        found, without, other = (score(f, x0, mask_id, generator=rng(seed)) for f in denoisers)
        assert torch.isfinite(found).all() and torch.allclose(found, without)
        assert torch.equal(found, other), "a visible token was scored"
    assert all(torch.equal(*pair) for pair in kept), "the caller's logits were changed"
    assert all((p[..., mask_id] == 0).all() for p in signals if p is not None), "the mask was fed back"


CARELESS = {  # the result of each call would be silently wrong: {what the message says: the call}
    "steps is 0": lambda x: sample(None, x, 3, 0),
    "temperature is -1": lambda x: sample(None, x, 3, 1, temperature=-1),
    "temperature is nan": lambda x: sample(None, x, 3, 1, temperature=math.nan),
    "top_p is 0": lambda x: sample(None, x, 3, 1, top_p=0),
    "top_p is 1.1": lambda x: sample(None, x, 3, 1, top_p=1.1),
    "order is 'best'": lambda x: sample(None, x, 3, 1, order="best"),
    "mask_id is -1": lambda x: sample(None, x, -1, 1),
    "mask_id is -2": lambda x: sampler_bound(None, x, -2, 1),
    "mask_id is -3": lambda x: diffusion_loss(None, x, -3),
    "mask_id is -4": lambda x: q_sample(x, 0.5, -4),
    "mask_id is -5": lambda x: SelfConditioning(torch.nn.Embedding(4, 2), -5),
    "self_cond_rate is 1.1": lambda x: diffusion_loss(None, x, 3, self_cond_rate=1.1),
    "unroll is 0": lambda x: diffusion_loss(None, x, 3, unroll=0),
    r"t has shape \[2, 1\]": lambda x: diffusion_loss(None, x, 3, t=torch.ones(2, 1)),
    r"t has shape \[1, 2\]": lambda x: q_sample(x, torch.ones(1, 2), 3),
    r"t is outside \[0, 1\]": lambda x: diffusion_loss(None, x, 3, t=torch.tensor([0.5, 1.5])),
    r"t is outside \[0, 1\]$": lambda x: q_sample(x, math.nan, 3),
    r"u has shape \[2\]": lambda x: q_sample(x, 0.5, 3, u=torch.rand(2)),
    "steps is -1": lambda x: sampler_bound(None, x, 3, -1),
    "x0 contains the mask, 2, at a position that is not frozen": lambda x: diffusion_loss(None, x, 2),
    "x0 contains the mask, 2": lambda x: sampler_bound(None, x, 2, 1, frozen=x == 1),
}


@pytest.mark.parametrize("message", CARELESS)
def test_careless_calls_are_refused(message):
    """A call whose result would be silently wrong is a ValueError, before the model is called."""
    with pytest.raises(ValueError, match=f"^{message}"):
        CARELESS[message](torch.tensor([[1, 2, 0], [1, 1, 1]]))


@pytest.mark.parametrize("order", ["random", "confidence"])
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("wrong", [[0, math.nan, 0], [0, math.inf, 0], [-math.inf] * 3])
def test_logits_that_are_no_distribution_are_not_silent(wrong, step, order):
    """A denoiser that gives NaN, +inf, or -inf for every token, at any step, gets an error."""
    logits = iter([torch.zeros(3)] * step + [torch.tensor(wrong)])
    with pytest.raises(ValueError, match=f"NaN or infinite logits at step {step}"):
        sample(lambda xt, x0_prev: next(logits).expand(2, 4, 3), torch.full((2, 4), 3), 3, 2, order=order)


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_a_denoiser_may_write_into_its_input(order):
    """A denoiser that overwrites xt changes neither the prompt nor the loss nor the bound."""
    clean = toy(3)

    def careless(xt, x0_prev):
        logits = clean(xt, x0_prev)
        xt.fill_(0)
        return logits

    canvas = torch.tensor([[1, 3, 3, 2], [3, 2, 3, 3]])
    given_ = canvas != 3
    x = sample(careless, canvas, 3, 4, order=order, generator=rng(0))
    assert torch.equal(x, sample(clean, canvas, 3, 4, order=order, generator=rng(0)))
    assert torch.equal(x[given_], torch.tensor([1, 2, 2]))
    for score in (functools.partial(diffusion_loss, unroll=3), functools.partial(sampler_bound, steps=3)):
        assert torch.equal(*(score(f, x, 3, generator=rng(0)) for f in (careless, clean)))


def test_confidence_order_fills_all_even_if_probabilities_underflow():
    """A drawn token whose probability is 0 in float32 still comes before any visible position."""
    canvas = torch.tensor([[0, 0, 2, 2, 2], [2, 2, 0, 2, 0]])
    steep = fixed(torch.tensor([0.0, -200.0]))  # exp(-200) is 0 in float32
    x = sample(steep, canvas, 2, 3, order="confidence", temperature=1e4, generator=rng(0))
    assert (x < 2).all() and (x == 1).any()


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


def test_another_default_dtype(tmp_path):
    """With float64 as torch's default the loss, the bound and a loaded model are what they are in float32."""
    save(tmp_path / "m.npz", tiny(adapted=True))
    x0 = torch.randint(5, (3, 6), generator=rng(0))

    def values():
        model = load(tmp_path / "m.npz")
        assert all(p.dtype == torch.float32 for p in model.parameters())
        kw = dict(generator=rng(1))
        return diffusion_loss(model, x0, 5, unroll=3, **kw), sampler_bound(model, x0, 5, 4, **kw)

    expected = values()
    with default_dtype(torch.float64):
        found = values()
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(found, expected))


def test_half_precision_models():
    """A bfloat16 model is sampled from, scored and trained; loss and bound are near those of float32."""
    model = tiny(adapted=True)
    low = copy.deepcopy(model).bfloat16()
    x0 = torch.randint(5, (64, 6), generator=rng(0))
    for score in (functools.partial(diffusion_loss, unroll=3), functools.partial(sampler_bound, steps=4)):
        exact, rough = (score(f, x0, 5, generator=rng(1)).mean() for f in (model, low))
        assert rough.dtype == torch.float32 and abs(rough - exact) < 0.05 * exact
    diffusion_loss(low, x0, 5, generator=rng(1)).mean().backward()
    assert low.self_conditioning.W.grad.dtype == torch.bfloat16 and low.self_conditioning.W.grad.any()
    assert sample(low, torch.full((2, 6), 5), 5, 4).max() < 5


def test_uniforms_are_fine_and_angles_exact():
    """Uniforms have float64's resolution; rotary angles are exact far into a sequence, whatever the model's
    precision."""
    u = scmdm.uniform((1000,), "cpu", rng(0))
    assert u.dtype == torch.float64 and not torch.equal(u, u.float().double())
    x = torch.randn(1, 1, 1000, 16, generator=rng(0))
    assert (scmdm.rotate(x.bfloat16()).float() - scmdm.rotate(x)).abs().max() < 0.05


class Alive(TorchDispatchMode):
    """The most memory, `peak`, that large tensors hold at once, in units of one [B, L, V] of float32."""

    def __init__(self, unit):
        super().__init__()
        self.unit, self.alive, self.peak = unit, {}, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() > self.unit / 8:
                storage = tensor.untyped_storage()
                self.alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()) / self.unit)
        return out


@pytest.mark.parametrize("B, L", [(8, 128), (1, 1024)])
def test_memory_at_a_large_vocabulary(B, L):
    """At V = 50,257 sampling holds little but the logits and the signal, and training the signal and what the
    cross-entropy of the masked positions and its gradient need (`pytest -k memory -s` prints it)."""
    V = 50257
    torch.manual_seed(0)
    model = add_self_conditioning(Transformer(Config(V, L, dim=8, depth=1, heads=1)))
    x0 = torch.randint(V, (B, L), generator=rng(0))
    t = (torch.arange(B) + 0.5) / B  # half of the positions are masked
    peaks = {}
    for unroll in (1, 3):
        with Alive(4 * B * L * V) as alive:
            diffusion_loss(model, x0, V, unroll=unroll, t=t, generator=rng(1)).mean().backward()
        peaks[f"training, unroll {unroll}"] = alive.peak
    with Alive(4 * B * L * V) as alive:  # 3 steps of 32; the others are like them
        first_steps(3, model, torch.full((B, L), V), V, 32, rng(0))
    peaks["sampling"] = alive.peak
    for what, peak in peaks.items():
        print(f"V 50257, B {B}, L {L}, {what}: {peak:.2f} tensors [B, L, V] of float32 at the peak")
    assert peaks["sampling"] < 2.5 and max(peaks.values()) < 3.6


def test_sampling_keeps_no_graph():
    """No gradient is recorded in sampling or in its bound, so that memory does not grow with the steps."""
    spy = Spy(tiny(adapted=True))
    sampler_bound(spy, sample(spy, torch.full((2, 6), 5), 5, 4), 5, 4)
    assert [logits.requires_grad for logits in spy.logits] == [False] * 8


# =============================================================================================
# 3. The method: self-conditioning
# =============================================================================================


@given(seeds, st.floats(0.1, 1e4))
def test_adapted_equals_base(seed, scale):
    """Before its first iteration the adapted model is the pretrained one, bit for bit, for any signal."""
    base = tiny(seed=seed)
    adapted = add_self_conditioning(base)
    assert base.config.self_conditioning is False and adapted.config.self_conditioning is True
    assert all(p is not q for p in base.parameters() for q in adapted.parameters())
    x = torch.randint(6, (3, 6), generator=rng(seed))
    wild = torch.randn(3, 6, 5, generator=rng(seed)) * scale
    for p in (None, torch.zeros_like(wild), wild, wild.softmax(-1)):
        assert torch.equal(base(x, None), adapted(x, p))
    assert torch.equal(base(x, wild), base(x, None)), "a vanilla model ignores the signal"


def test_the_cost_is_one_matrix():
    """The adapter adds one D x D matrix, zero at the start; the embedding it reads is the model's own."""
    base = tiny()
    adapted = add_self_conditioning(base)
    assert set(adapted.state_dict()) - set(base.state_dict()) == {"self_conditioning.W"}
    assert set(base.state_dict()) <= set(adapted.state_dict())
    assert adapted.self_conditioning.W.shape == (16, 16) and not adapted.self_conditioning.W.any()
    for dtype in (torch.float64, torch.bfloat16):
        (W,) = SelfConditioning(torch.nn.Embedding(9, 4, dtype=dtype, device="meta"), 8).parameters()
        assert W.shape == (4, 4) and W.dtype == dtype and W.device.type == "meta", "as the embedding"
    for model in (adapted, copy.deepcopy(adapted), copy.deepcopy(adapted).double()):
        assert model.self_conditioning.shared[0] is model.embed
    for wrong in (adapted, tiny(causal=True)):
        with pytest.raises(ValueError, match="expected a vanilla, bidirectional model"):
            add_self_conditioning(wrong)


@given(seeds)
def test_no_signal_is_exactly_nothing(seed):
    """The adapter adds exactly zero for None, for all zeros, and where the token is visible, even for NaN."""
    model, zero = tiny(seed=seed, adapted=True), torch.zeros(2, 6, 5)
    x = torch.randint(5, (2, 6), generator=rng(seed))
    x[:, ::2] = 5
    assert not model.self_conditioning(x, zero).any() and not model.self_conditioning(x, None).any()
    assert model.self_conditioning(x, None).shape == (2, 6, 16)
    assert torch.equal(model(x, zero), model(x, None))
    assert not torch.equal(model(x, zero.softmax(-1)), model(x, None)), "a uniform signal is a signal"
    x0_prev = torch.rand(2, 6, 5, generator=rng(seed)).softmax(-1)
    added = model.self_conditioning(x, x0_prev)
    assert not added[:, 1::2].any() and added[:, ::2].any()
    other = x0_prev.clone()
    other[:, 1::2] = math.nan
    assert torch.equal(model(x, x0_prev), model(x, other))


@given(seeds, st.integers(1, 9))
def test_one_hot_signal_embeds_as_that_token(seed, V):
    """A one-hot signal adds W E[token]; a mixture the mixture. Also for an embedding of more rows."""
    torch.manual_seed(seed)
    embedding = torch.nn.Embedding(V + 3, 8)
    adapter = SelfConditioning(embedding, V)
    adapter.W.data.normal_()
    tokens = torch.randint(V, (2, 4), generator=rng(seed))
    onehot = torch.nn.functional.one_hot(tokens, V).float()
    masked = torch.full((2, 4), V)
    expected = embedding(tokens) @ adapter.W.T
    assert torch.allclose(adapter(masked, onehot), expected, atol=1e-5)
    mixed = adapter(masked, 0.25 * onehot + 0.75 * onehot.flip(1))
    assert torch.allclose(mixed, 0.25 * expected + 0.75 * expected.flip(1), atol=1e-5)


@given(sizes, seeds, st.integers(1, 6), st.floats(0, 2))
def test_each_step_gets_the_prediction_of_the_step_before(size, seed, steps, temperature):
    """Step 0 of the sampler gets no signal, step k the softmax of step k-1's logits, at any temperature."""
    B, L, V = size
    spy, shown, canvas = Spy(toy(V, seed)), [], torch.full((B, L), V)
    sample(spy, canvas, V, steps, temperature=temperature, on_step=lambda k, x, p: shown.append((k, p)))
    assert spy.x0_prev[0] is None and len(spy.xt) == len(shown) == steps
    for k in range(steps):
        assert k == 0 or torch.equal(spy.x0_prev[k], spy.logits[k - 1].softmax(-1))
        assert shown[k][0] == k and torch.equal(shown[k][1], spy.logits[k].softmax(-1))
    sample(spy, canvas, V, steps)
    assert spy.x0_prev[steps] is None, "something was kept from one sample() to the next"


@given(sizes, seeds)
def test_rate_one_and_rate_zero(size, seed):
    """Rate 1 gives every sequence its own first prediction, from the same xt. Rate 0 makes one pass, without
    a signal. Both see the same noise."""
    B, L, V = size
    x0 = torch.randint(V, (B, L), generator=rng(seed))
    full, vanilla = Spy(toy(V, seed)), Spy(toy(V, seed))
    diffusion_loss(full, x0, V, generator=rng(seed))
    assert len(full.xt) == 2 and full.x0_prev[0] is None and torch.equal(*full.xt)
    assert torch.equal(full.x0_prev[1], full.logits[0].softmax(-1))
    loss = diffusion_loss(vanilla, x0, V, self_cond_rate=0.0, generator=rng(seed))
    assert len(vanilla.xt) == 1 and vanilla.x0_prev[0] is None and torch.equal(vanilla.xt[0], full.xt[0])
    same = diffusion_loss(ignoring_signal(toy(V, seed)), x0, V, generator=rng(seed))
    assert torch.equal(loss, same), "a denoiser without signal has the vanilla loss at any rate"


@pytest.mark.parametrize("unroll", [1, 3])
@pytest.mark.parametrize("rate", [0.25, 0.9])
def test_rate_is_a_binomial_fraction(rate, unroll):
    """At rate r each sequence is given its signal with probability r; the others get all zeros."""
    N, spy = 4000, Spy(flat(3))
    kw = dict(self_cond_rate=rate, unroll=unroll, t=torch.zeros(N), generator=rng(0))
    diffusion_loss(spy, torch.zeros(N, 20, dtype=torch.long), 3, **kw)
    given_ = spy.x0_prev[-1].flatten(1).any(1)
    assert torch.allclose(spy.x0_prev[-1][given_].sum(-1), torch.tensor(1.0))
    assert abs(given_.sum().item() - N * rate) < 5 * math.sqrt(N * rate * (1 - rate))


@given(sizes, seeds, st.integers(2, 6), schedules, st.sampled_from([0.3, 1.0]))
def test_unrolled_passes_walk_as_the_sampler_does(size, seed, unroll, schedule, rate):
    """With unroll the signal is made by k passes at the times t + i/T, i = k..1, of one u. Each pass is given
    the prediction of the one before, and the first none. Above time 1 the signal is exactly zero."""
    B, L, V = size
    x0, spy = torch.randint(V, (B, L), generator=rng(seed)), Spy(toy(V, seed))
    shapes = enumerate((B, (B, L), B, 1, B))
    draws = [torch.rand(shape, dtype=torch.float64, generator=rng(seed + i)) for i, shape in shapes]
    t, u, u_given, u_passes, u_steps = draws
    kw = dict(unroll=unroll, self_cond_rate=rate, schedule=schedule)
    loss = diffusion_loss(spy, x0, V, t=t, generator=Replay(u, u_given, u_passes, u_steps), **kw)
    k, T = math.floor(unroll * u_passes.item()) + 1, L / 4 * 16**u_steps  # from L/4 to 4L
    t = t.clamp(min=1e-3)
    assert len(spy.xt) == k + 1 and spy.x0_prev[0] is None
    for call, i in enumerate(range(k, -1, -1)):  # the last one, i = 0, is pass 2
        time, earlier = t + i / T, t + (i + 1) / T
        on = time <= 1  # a state above 1 is made for the whole batch's sake, and its prediction thrown away
        expected = torch.where(u < 1 - schedule.alpha(time)[:, None], V, x0)
        assert torch.equal(spy.xt[call][on], expected[on])
        if call:
            kept = (earlier <= 1) if i else (earlier <= 1) & (u_given < rate)
            assert torch.equal(spy.x0_prev[call], spy.logits[call - 1].softmax(-1) * kept[:, None, None])
            assert ((spy.xt[call] == V) <= (spy.xt[call - 1] == V))[earlier <= 1].all(), "masks are nested"
    nll = (nll_of(spy.logits[-1], x0) * (spy.xt[-1] == V)).sum(1)
    weight = -schedule.dalpha(t) / (1 - schedule.alpha(t))
    assert torch.allclose(loss / weight, nll, rtol=1e-4, atol=1e-5), "only the last pass is scored"


def test_the_example_of_unrolling():
    """With t = 0.5, T = 10 and k = 3 the passes see the states at 0.8, 0.7 and 0.6; that at 0.5 is scored."""
    u = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)[None]  # t = 0.8 masks 8 of these 10 positions
    u_passes, u_steps = torch.tensor([0.3]), torch.tensor([0.5])  # k = 1 + floor(8 * 0.3); T = L
    spy, x0 = Spy(flat(2)), torch.zeros(1, 10, dtype=torch.long)
    generator = Replay(u, torch.zeros(1), u_passes, u_steps)
    diffusion_loss(spy, x0, 2, unroll=8, t=torch.tensor([0.5]).double(), generator=generator)
    assert [(xt == 2).sum().item() for xt in spy.xt] == [8, 7, 6, 5]


def test_passes_and_steps_are_drawn_evenly():
    """The number of passes is uniform in 1..unroll, and that of sampling steps log-uniform in L/4..4L."""
    N, L, unroll, g, passes = 4000, 8, 4, rng(0), []
    for _ in range(2000):
        passes.append(len(scmdm.earlier_times(torch.zeros(1), L, unroll, g)))
    assert_fits(torch.bincount(torch.tensor(passes), minlength=5)[1:], torch.ones(4) / 4)
    nearest = scmdm.earlier_times(torch.zeros(N).double(), L, unroll, g)[-1]  # 1/T
    ratio = (1 / nearest / L).log() / math.log(4)
    assert ratio.abs().max() <= 1
    assert_fits(torch.histc(ratio.float(), 10, -1, 1), torch.ones(10) / 10)


def test_another_way_to_make_the_signal():
    """diffusion_loss takes the function that makes the signal, which gets t, u and the loss's own options."""
    V, x0, seen = 3, torch.randint(3, (4, 5), generator=rng(0)), []

    def uniform_signal(denoiser, x0, t, u, mask_id, **options):
        seen.append((q_sample(x0, t, mask_id, u=u), options["unroll"]))
        return torch.full((*x0.shape, V), 1 / V)

    spy = Spy(toy(V))
    diffusion_loss(spy, x0, V, unroll=5, make_signal=uniform_signal, generator=rng(1))
    assert len(spy.xt) == 1 and (spy.x0_prev[0] == 1 / V).all()
    assert torch.equal(seen[0][0], spy.xt[0]) and seen[0][1] == 5
    t, u = torch.rand(4, generator=rng(2)).double(), torch.rand(4, 5, generator=rng(3)).double()
    first = make_signal(toy(V), x0, t, u, V)
    assert torch.equal(first, toy(V)(q_sample(x0, t, V, u=u), None).softmax(-1)) and not first.requires_grad


@given(seeds, st.sampled_from([0.5, 1.0]), st.sampled_from([1, 4]))
def test_no_gradient_through_the_signal(seed, rate, unroll):
    """The gradients are those with the signal held constant, however many passes made it."""
    model = tiny(seed=seed, adapted=True)
    x0, kw = torch.randint(5, (4, 6), generator=rng(seed)), dict(self_cond_rate=rate, unroll=unroll)
    spy = Spy(model)
    diffusion_loss(spy, x0, 5, generator=rng(seed), **kw).sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    assert [logits.requires_grad for logits in spy.logits] == [False] * (len(spy.xt) - 1) + [True]
    model.zero_grad()
    constant, calls = spy.x0_prev[-1].detach().clone(), iter(range(len(spy.xt)))

    def held(xt, x0_prev):
        return model(xt, constant if next(calls) == len(spy.xt) - 1 else x0_prev)

    diffusion_loss(held, x0, 5, generator=rng(seed), **kw).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(found, model.parameters()))


def test_the_new_matrix_learns_at_once():
    """The zero matrix gets a gradient at the first iteration, at rates 1 and 0.5, with one pass and more."""
    for kw in (dict(self_cond_rate=0.5), dict(), dict(unroll=3)):
        model = add_self_conditioning(tiny())
        x0 = torch.randint(5, (16, 6), generator=rng(0))
        diffusion_loss(model, x0, 5, generator=rng(0), **kw).sum().backward()
        assert model.self_conditioning.W.grad.abs().max() > 1e-3
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_bfloat16_autocast():
    """Under bfloat16 autocast the gradients are those of float32 within 5%, and none is missing."""
    model = tiny(adapted=True)
    x0 = torch.randint(5, (64, 6), generator=rng(0))
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = diffusion_loss(model, x0, 5, generator=rng(0))
        assert loss.dtype == torch.float32
        loss.mean().backward()
        assert all(p.grad is not None for p in model.parameters()), "a gradient is missing"
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        assert (a - b).norm() < 0.05 * a.norm()


def test_casts_cached_in_pass_one_are_dropped(monkeypatch):
    """Weights cast and cached without gradient, as by older PyTorch's autocast, are cast again for pass 2."""
    model, cache = tiny(adapted=True), {}

    def denoiser(xt, x0_prev):  # casts its head on first use and keeps it, until the cache is cleared
        if "head" not in cache:
            cache["head"] = model.head.weight.bfloat16()
        return (model.embed(xt) + model.self_conditioning(xt, x0_prev)) @ cache["head"].float().T

    monkeypatch.setattr(torch, "clear_autocast_cache", cache.clear)
    diffusion_loss(denoiser, torch.randint(5, (8, 6), generator=rng(0)), 5, generator=rng(0)).sum().backward()
    assert model.head.weight.grad is not None and model.head.weight.grad.any()


def test_public_names():
    """The names that ports and other programs rely on stay as they are, with arguments and defaults."""
    noise = "frozen=None, schedule=LINEAR, generator=None"
    expected = {
        "add_self_conditioning": "(model)",
        "Transformer": "(config)",
        "SelfConditioning": "(embedding, mask_id)",
        "unmask_prob": "(s, t, schedule=LINEAR)",
        "q_sample": f"(x0, t, mask_id, *, u=None, {noise})",
        "make_signal": f"(denoiser, x0, t, u, mask_id, *, unroll=1, {noise})",
        "diffusion_loss": f"(denoiser, x0, mask_id, *, self_cond_rate=1.0, unroll=1, {noise}, t=None, "
        "make_signal=make_signal)",
        "sampler_bound": f"(denoiser, x0, mask_id, steps, *, {noise})",
        "sample": "(denoiser, x, mask_id, steps, *, temperature=1.0, top_p=1.0, order='random', "
        "schedule=LINEAR, generator=None, on_step=None)",
        "save": "(path, model, **info)",
        "load": "(path, device='cpu')",
    }
    for name, signature in expected.items():
        found = str(inspect.signature(getattr(scmdm, name))).replace(str(LINEAR), "LINEAR")
        assert re.sub("<function make_signal .*>", "make_signal", found) == signature, name
    assert Config(3, 4) == Config(3, 4, 128, 4, 4, causal=False, self_conditioning=False, positions=False)
    fields = [field.name for field in dataclasses.fields(Config)]
    assert fields[:5] == ["vocab_size", "length", "dim", "depth", "heads"]
    assert tiny(V=5).mask_id == 5 and LINEAR._fields == ("alpha", "dalpha")


# =============================================================================================
# 4. The model, against NumPy: the equations of data/golden.py, and golden values for ports
# =============================================================================================


def numpy_weights(model):
    return {name: p.detach().numpy().astype(np.float64) for name, p in model.state_dict().items()}


@given(seeds, kinds, st.booleans(), st.sampled_from([1, 2, 5, 40]))
def test_transformer_is_its_equations(seed, kind, positions, length):
    """The Transformer computes its equations: vanilla, adapted and causal, at any length up to its own."""
    adapted, causal = kind == "adapted", kind == "causal"
    model = tiny(length=40, seed=seed, adapted=adapted, causal=causal, positions=positions)
    xt = torch.randint(6, (3, length), generator=rng(seed))
    x0_prev = torch.randn(3, length, 5, generator=rng(seed)).softmax(-1)
    expected = golden.forward(numpy_weights(model), 2, xt.numpy(), x0_prev.numpy(), causal)
    found = model(xt, x0_prev).detach().numpy()
    assert found.shape == (3, length, 5)
    assert np.abs(found - expected).max() < 1e-5 * max(1, np.abs(expected).max())


@given(seeds, st.integers(0, 5))
def test_rows_are_independent_and_causal_is_causal(seed, position):
    """Logits do not depend on other rows; a causal model's not on later positions, and a denoiser's do."""
    x = torch.randint(6, (3, 6), generator=rng(seed))
    for causal in (False, True):
        model = tiny(seed=seed, causal=causal)
        logits = model(x)
        assert torch.allclose(logits[1], model(x[1:2])[0], atol=1e-5)
        later = x.clone()
        later[:, position] = (later[:, position] + 1) % 6
        changed = (model(later) - logits).abs().amax((0, 2)) > 1e-6
        assert changed[position:].all() if causal else changed.all()
        assert not (causal and changed[:position].any())


@given(seeds)
def test_only_position_embeddings_tell_where_a_mask_stands(seed):
    """To nothing but masks the model answers the same everywhere, unless it has position embeddings."""
    for positions in (False, True):
        logits = tiny(seed=seed, positions=positions)(torch.full((1, 6), 5))[0]
        same = torch.isclose(logits, logits[:1], atol=1e-5).all(1)
        assert not same[1:].any() if positions else same.all()


def test_initialisation():
    """New matrices have standard deviation 0.02, less where they add to the residual stream; norms are 1."""
    torch.manual_seed(0)
    model = Transformer(Config(50, 8, dim=128, depth=4, heads=4))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == 1).all()
        else:
            expected = 0.02 / math.sqrt(8) if name.endswith(("out.weight", "down.weight")) else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.05)
    assert model.embed.weight.shape == (51, 128) and model.head.weight.shape == (50, 128)
    assert sum(p.numel() for p in model.parameters()) == 101 * 128 + 4 * (12 * 128**2 + 2 * 128) + 128


def test_what_does_not_fit_is_refused():
    """Heads that do not divide dim into pairs of features are refused; so is too long a sequence."""
    with pytest.raises(ValueError, match="Config.dim is 20, expected a multiple of 2 \\* heads = 6"):
        Config(3, 4, dim=20, heads=3)
    with pytest.raises(ValueError, match="xt has 7 positions, expected at most 6"):
        tiny()(torch.zeros(1, 7, dtype=torch.long))


# --- golden values ---


def golden_model():
    """The tiny model of data/golden.npz, with position embeddings and an adapter that is not zero."""
    return tiny(V=5, length=8, seed=1, adapted=True, positions=True)


def trained(model, loss_of, iters):
    """Train model with train.py on loss_of(model, k) -> [b], at k = 0, 1, ...; returns the moving average."""
    settings, k = {"iters": iters, "batch_size": 1, "seed": 0, "dtype": "float32"}, itertools.count()
    rows = np.zeros((1, model.config.length))  # the loss does not look at them
    with tempfile.TemporaryDirectory() as folder:
        state, of_k = Path(folder) / "golden.state", lambda model, x0, noise: loss_of(model, next(k))
        return train_py.fit(model, of_k, rows, state, settings, 1e-2)


def golden_training(x0, t, u_mask, u_given):
    """Three iterations on the loss, each at the same noise. {name: array}"""
    model, losses = golden_model(), []
    gradients = {name: [] for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():  # before they are clipped
        p.register_post_accumulate_grad_hook(lambda p, kept=gradients[name]: kept.append(p.grad.clone()))

    def loss_of(model, k):
        losses.append(diffusion_loss(model, x0, 5, t=t, generator=Replay(u_mask, u_given)))
        return losses[-1]

    average = trained(model, loss_of, 3)
    arrays = {"optimiser/loss": torch.stack(losses).mean(1) / x0.shape[1]}
    arrays |= {f"optimiser/gradient/{name}": torch.stack(kept) for name, kept in gradients.items()}
    for name in ("embed.weight", "self_conditioning.W", "blocks.0.qkv.weight"):
        arrays[f"optimiser/live/{name}"] = model.get_parameter(name)
        arrays[f"optimiser/average/{name}"] = average.get_parameter(name)
    return arrays


def golden_recipe(rand, model):
    """Forty gradients, of norms from 0.1 to 10, for an array of each kind. {name: [40, ...]}"""
    names = ["embed.weight", "position_embed.weight", "blocks.0.norm1.weight", "blocks.0.norm2.weight"]
    names += ["norm.weight", "head.weight", "self_conditioning.W"]
    gradients = {name: rand.standard_normal((40, *model.get_parameter(name).shape)) for name in names}
    gradients["embed.weight"][:, 0] *= 1e-6  # one row so small that epsilon matters
    norms = np.sqrt(sum((g.reshape(40, -1) ** 2).sum(1) for g in gradients.values()))  # [40]
    scale = 10 ** rand.uniform(-1, 1, 40) / norms  # [40]
    return {name: (g.T * scale).T.astype(np.float32) for name, g in gradients.items()}


def trained_with(gradients):
    """What train.py makes of these gradients: (weights, their average), {name: array}."""
    model = golden_model()

    def loss_of(model, k):  # linear in the weights, so that its gradient is the given one
        terms = [(model.get_parameter(name) * torch.as_tensor(g[k])).sum() for name, g in gradients.items()]
        return model.config.length * sum(terms)[None]  # which train.py divides by the length

    average = trained(model, loss_of, 40)
    return tuple({name: m.get_parameter(name) for name in gradients} for m in (model, average))


def other_mask(model, mask_id):
    """The model, with one of its V tokens as the mask, as BERT has it."""
    model = copy.deepcopy(model)
    W = model.self_conditioning.W
    model.self_conditioning = SelfConditioning(model.embed, mask_id)
    model.self_conditioning.W = W
    return model


def make_golden():
    """The arrays of data/golden.npz; STEPS in data/golden.py says what each is for."""
    model, rand = golden_model(), np.random.default_rng(0)
    # the inputs
    xt = rand.integers(0, 6, (2, 8))
    xt[:, ::3] = 5
    x0_prev = golden.softmax(2 * rand.standard_normal((2, 8, 5))).astype(np.float32)
    u_given = np.array([0.2, 0.7, 0.4, 0.9])
    x0, t, u_mask = rand.integers(0, 5, (4, 8)), np.array([0.0004, 0.4, 0.65, 0.9]), rand.random((4, 8))
    u_mask[0, 3] = 0.0006  # masked only because the first time is raised to 0.001
    canvas = np.full((2, 8), 5)
    canvas[1, 2:4] = 1, 3
    u_reveal, u_token = rand.random((2, 6, 2, 8))
    u_token[5, 0, 2] = 1 - 2**-53  # the last token, in float64 and if the sum is divided by its end
    u_passes, u_calls = np.array([0.6]), np.array([0.3, 0.1, 0.5, 0.95])  # 3 passes; T from 2.6 to 28
    u_bound = rand.random((4, 8))
    rand = np.random.default_rng(2)  # what was added later has its own numbers
    frozen = rand.random((4, 8)) < 0.4
    frozen_x0 = np.where(frozen & (rand.random((4, 8)) < 0.5), 5, x0)  # the mask stands at some of them
    inside_x0, inside_canvas = np.where(x0 == 2, 4, x0), np.where(canvas == 5, 2, canvas)  # 2 is the mask
    u_reveal4, u_token4 = rand.random((2, 4, 2, 8))
    arrays = {f"weights/{name}": p for name, p in model.state_dict().items()} | {"heads": np.array(2)}
    arrays |= {"forward/xt": xt, "forward/x0_prev": x0_prev, "loss/x0": x0, "loss/t": t}
    arrays |= {"loss/u_mask": u_mask, "loss/u_given": u_given}
    arrays |= {"unroll/u_passes": u_passes, "unroll/u_calls": u_calls}
    arrays |= {"sample/canvas": canvas, "sample/u_reveal": u_reveal, "sample/u_token": u_token}
    arrays |= {"bound/u": u_bound, "frozen/x0": frozen_x0, "frozen/frozen": frozen}
    arrays |= {"inside/mask_id": np.array(2), "inside/x0": inside_x0, "inside/canvas": inside_canvas}
    arrays |= {"confidence/u_reveal": u_reveal4, "confidence/u_token": u_token4}

    # what is made of them: the model
    autoregressive = copy.deepcopy(model)
    for block in autoregressive.blocks:
        block.causal = True
    xt, x0_prev, x0, t = (torch.tensor(a) for a in (xt, x0_prev, x0, t))
    arrays |= {"forward/logits_without_signal": model(xt), "forward/logits_with_signal": model(xt, x0_prev)}
    arrays |= {"forward/logits_causal": autoregressive(xt)}

    # the loss
    def loss(x0=x0, model=model, mask_id=5, unroll=1, **options):
        draws = Replay(u_mask, u_given, u_passes, u_calls) if unroll > 1 else Replay(u_mask, u_given)
        return diffusion_loss(model, x0, mask_id, t=t, unroll=unroll, generator=draws, **options)

    hold = {"x0": torch.tensor(frozen_x0), "frozen": torch.tensor(frozen)}
    inside = {"model": other_mask(model, 2), "x0": torch.tensor(inside_x0), "mask_id": 2}
    arrays |= {"loss/loss": loss(), "loss/loss_at_rate_half": loss(self_cond_rate=0.5)}
    arrays |= {"unroll/loss": loss(unroll=4), "unroll/loss_at_rate_half": loss(unroll=4, self_cond_rate=0.5)}
    arrays |= {"frozen/loss": loss(**hold), "frozen/loss_unrolled": loss(**hold, unroll=4)}
    arrays |= {"inside/loss": loss(**inside)}
    arrays["loss/loss"].mean().backward()
    for name in golden.PASS_1_MATTERS:
        arrays[f"loss/gradient/{name}"] = model.get_parameter(name).grad

    # the sampler
    def sampled(name, model=model, canvas=canvas, u_reveal=u_reveal, u_token=u_token, mask_id=5, **options):
        draws, signals = Replay(*(u for pair in zip(u_reveal, u_token) for u in pair)), []
        keep = lambda step, x, x0_prev: signals.append(x0_prev)  # noqa: E731
        canvas, steps = torch.tensor(canvas), len(u_reveal)
        tokens = sample(model, canvas, mask_id, steps, generator=draws, on_step=keep, **options)
        return {f"{name}/tokens": tokens, f"{name}/x0_prev": torch.stack(signals)}

    tied = copy.deepcopy(model)
    torch.nn.init.zeros_(tied.head.weight)
    four = {"u_reveal": u_reveal4, "u_token": u_token4, "order": "confidence", "temperature": 0.5}
    arrays |= sampled("sample") | sampled("nucleus", temperature=0.6, top_p=0.9)
    arrays |= sampled("argmax", temperature=0) | sampled("confidence", **four) | sampled("tied", tied, **four)
    arrays |= sampled("inside", inside["model"], inside_canvas, mask_id=2)

    # the bound, and training
    def bound(x0=x0, model=model, mask_id=5, **options):
        return sampler_bound(model, x0, mask_id, 6, generator=Replay(u_bound), **options)

    arrays |= {"bound/bound": bound(), "frozen/bound": bound(**hold), "inside/bound": bound(**inside)}
    arrays |= golden_training(x0, t, u_mask, u_given)
    gradients = golden_recipe(rand, model)
    live, average = trained_with(gradients)
    for name, gradient in gradients.items():
        arrays |= {f"recipe/weights/{name}": model.get_parameter(name), f"recipe/gradient/{name}": gradient}
        arrays |= {f"recipe/live/{name}": live[name], f"recipe/average/{name}": average[name]}
    return {name: a.detach().numpy() if torch.is_tensor(a) else a for name, a in arrays.items()}


def same(stored, made):
    scale = max(1, np.abs(made).max())  # a loss at t = 0.001 weighs 1000
    return stored.shape == made.shape and np.allclose(stored, made, atol=1e-5 * scale, rtol=0)


def write_golden():
    """Write data/golden.npz. A value that has moved by no more than rounding stays as it is, to the bit."""
    old = dict(np.load(golden.GOLDEN))
    kept = {name: old[name] if name in old and same(old[name], a) else a for name, a in make_golden().items()}
    np.savez(golden.GOLDEN, **kept)
    print(f"wrote {golden.GOLDEN}")


def test_golden_values_have_not_moved():
    """This code computes what data/golden.npz says: a port that agrees with the file agrees with the code."""
    file, arrays = dict(np.load(golden.GOLDEN)), make_golden()
    assert set(file) == set(arrays) and golden.GOLDEN.stat().st_size < 400_000
    for name, array in arrays.items():
        assert same(file[name], array), name


def test_golden_draws_are_no_close_calls():
    """Logits that are wrong by 0.005 give the golden tokens, so rounding does not decide about a port."""
    g, noise = dict(np.load(golden.GOLDEN)), torch.Generator().manual_seed(0)
    for title, function, inputs, options, expected, *_ in golden.STEPS:
        if function != "sample" or expected[0] == "tied/tokens":  # those confidences are equal on purpose
            continue
        options = {name: golden.resolve(g, value) for name, value in options.items()}
        mask_id = options.pop("mask_id", 5)
        canvas, u_reveal, u_token = (g[name] for name in inputs[2:])
        exact = other_mask(golden_model(), mask_id)
        draws = (u for pair in zip(u_reveal, u_token) for u in pair)

        def disturbed(xt, x0_prev, exact=exact):
            return exact(xt, x0_prev) + 5e-3 * torch.randn(2, 8, 5, generator=noise)

        steps = len(u_reveal)
        found = sample(disturbed, torch.tensor(canvas), mask_id, steps, generator=Replay(*draws), **options)
        assert (found.numpy() == g[expected[0]]).all(), title


def test_optimiser_is_the_documented_one():
    """From the same gradients, train.py and the recipe of data/PORTING.md in NumPy make the same weights."""
    model, g = golden_model(), dict(np.load(golden.GOLDEN))
    gradients = golden.resolve(g, "recipe/gradient/")
    documented = golden.optimise(golden.resolve(g, "recipe/weights/"), gradients, 1e-2)
    for found, expected in zip(trained_with(gradients), documented):
        for name in gradients:
            assert not np.allclose(expected[name], model.get_parameter(name).detach().numpy(), atol=1e-2)
            assert np.abs(found[name].detach().numpy() - expected[name]).max() < 1e-5, name


# =============================================================================================
# 5. README.md: its code runs as printed
# =============================================================================================


def printed(title, n=0):
    """The n-th block of Python in a section of README.md."""
    section = README.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)[n]


def test_the_method_in_readme_runs_as_printed(capsys):
    """README's method runs when pasted, prints the number that it says, leaves no mask, and has
    diffusion_loss's value at the same noise."""
    exec(printed("The method"), scope := {})
    assert capsys.readouterr().out.strip() == re.search("# prints (.*)", printed("The method"))[1]
    x, x0, f, V = (scope[name] for name in ("x", "x0", "f", "MASK"))
    assert x.shape == x0.shape and x.max() < V and f.self_conditioning.W.grad is not None
    u = torch.where(scope["xt"] == V, 0.0, 1.0).double()
    replayed = Replay(u, torch.zeros(len(x0)))
    expected = diffusion_loss(f, x0, V, t=scope["t"][:, 0], generator=replayed)
    assert torch.allclose(scope["loss"], expected.mean(), rtol=1e-4)


# =============================================================================================
# 6. Model files
# =============================================================================================


def same_weights(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@contextlib.contextmanager
def full_disk(most=2000):
    """Within it no file can grow beyond `most` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["vanilla", "adapted", "causal", "half", "bfloat16"])
def test_save_and_load(tmp_path, kind):
    """A model comes back bit for bit, in float32, with its config and metadata. No random number is drawn."""
    model, path = tiny(adapted=kind == "adapted", causal=kind == "causal"), tmp_path / "m.npz"
    model = model.half() if kind == "half" else model.bfloat16() if kind == "bfloat16" else model
    save(path, model, vocab=list("añ\n☃é"), iters=3)
    state = torch.get_rng_state()
    again = load(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.config == model.config and again.info == {"vocab": list("añ\n☃é"), "iters": 3}
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in again.parameters())
    assert same_weights(model.float(), again)
    x, x0_prev = torch.randint(6, (2, 6), generator=rng(0)), torch.rand(2, 6, 5)
    assert torch.equal(model(x, x0_prev), again(x, x0_prev))
    assert np.load(path)["embed.weight"].dtype == (np.float16 if kind == "half" else np.float32)
    save(path, again, iters=4)
    assert load(path).info == {"vocab": list("añ\n☃é"), "iters": 4}, "older metadata are forgotten"
    assert [f.name for f in tmp_path.iterdir()] == ["m.npz"], "a temporary file was left"


def test_the_header_opens_anywhere(tmp_path):
    """The header is UTF-8 JSON in a uint8 array, which any language reads. Older files still load: those with
    a Unicode string for a header, and arrays of the other byte order."""
    path = tmp_path / "m.npz"
    save(path, tiny(), vocab=["ñ", "☃"])
    arrays = dict(np.load(path))
    header = arrays.pop("header")
    assert header.dtype == np.uint8 and header.ndim == 1 and "ñ".encode() in header.tobytes()
    header = json.loads(header.tobytes().decode("utf-8"))
    assert set(header) == {"config", "info"} and header["config"]["length"] == 6
    del header["config"]["positions"]  # older still
    arrays = {name: a.astype(">f4") for name, a in arrays.items()}
    np.savez(path, header=np.array(json.dumps(header)), **arrays)
    model = load(path)
    assert model.info == {"vocab": ["ñ", "☃"]} and model.config == tiny().config
    assert same_weights(model, tiny())


def test_a_file_that_is_no_model_is_refused(tmp_path):
    """A truncated, foreign or pickled file is refused in one line that names it, and nothing in it is run."""
    path, ran = tmp_path / "m.npz", tmp_path / "ran"
    save(path, tiny())
    whole = path.read_bytes()

    class Hostile:
        def __reduce__(self):
            return (ran.touch, ())

    pickled, array, foreign = (io.BytesIO() for _ in range(3))
    np.savez(pickled, header=np.array([Hostile()], dtype=object))
    np.save(array, np.zeros(3))
    with zipfile.ZipFile(foreign, "w") as z:
        z.writestr("header", "hello")
    cases = [b"", b"hello", whole[:100], whole[: len(whole) // 2], whole[:-1]]
    for content in cases + [f.getvalue() for f in (pickled, array, foreign)]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="m.npz: not a model file") as error:
            load(path)
        assert "\n" not in str(error.value)
    assert not ran.exists(), "the file was unpickled"
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "gone.npz")


def test_a_missing_or_unexpected_array_is_named(tmp_path):
    """A file that lacks an array, or has one too many or of another shape, is refused by the array's name."""
    path = tmp_path / "m.npz"
    save(path, tiny())
    whole = dict(np.load(path))
    short = {"head.weight": whole["head.weight"][:2]}
    for name, arrays in {
        "blocks.1.qkv.weight": {k: a for k, a in whole.items() if k != "blocks.1.qkv.weight"},
        "self_conditioning.W": whole | {"self_conditioning.W": np.zeros((16, 16))},
        "head.weight": whole | short,
    }.items():
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=f"m.npz: .*{name}") as error:
            load(path)
        assert "\n" not in str(error.value)


def test_a_failed_write_leaves_the_old_file_whole(tmp_path):
    """If the disk is full, the file that was there stays as it was, and nothing else is left."""
    path = tmp_path / "m.npz"
    save(path, tiny(seed=1))
    before = path.read_bytes()
    with full_disk(), pytest.raises(OSError):
        save(path, tiny(seed=2))
    assert path.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["m.npz"]
    with path.open("rb") as reader:
        save(path, tiny(seed=2))
        assert reader.read() == before, "it was written in place, where a crash would leave half of it"


def save_often(path, seed):
    for _ in range(100):
        save(path, tiny(seed=seed))


def test_two_processes_may_save_to_one_path(tmp_path):
    """Two processes that save to the same path do not disturb each other."""
    path, context = tmp_path / "m.npz", multiprocessing.get_context("fork")
    writers = [context.Process(target=save_often, args=(path, seed)) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert any(same_weights(load(path), tiny(seed=seed)) for seed in (1, 2))
    assert [f.name for f in tmp_path.iterdir()] == ["m.npz"]


if __name__ == "__main__":
    write_golden()
