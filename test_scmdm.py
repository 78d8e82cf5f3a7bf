"""The specification of SCMDM, executable: each test's docstring is one rule.

    python -m pytest                  all of it; tests of a GPU say that they were skipped where there is none
    python test_scmdm.py              write data/golden.npz again (only when the method's arithmetic is meant to change)

    1. oracles        a world so small that every sequence, mask and path can be enumerated
    2. the process    masking, the loss and the sampler, for any model
    3. the method     what self-conditioning must and must not do
    4. the model      against NumPy, written from the equations: the porter's example; golden values
    5. engineering    files, training, the command lines, bad input
"""

import copy
import dataclasses
import inspect
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import sample as sample_py
import scmdm
import train as train_py
from scmdm import (
    COSINE,
    LINEAR,
    Config,
    SelfConditioning,
    Transformer,
    add_self_conditioning,
    diffusion_loss,
    load,
    q_sample,
    sample,
    save,
    unmask_prob,
)

settings.register_profile("spec", derandomize=True, deadline=None, max_examples=30, database=None)
settings.load_profile("spec")
GOLDEN = Path(__file__).parent / "data" / "golden.npz"
SCHEDULES = {"linear": LINEAR, "cosine": COSINE}
schedules = st.sampled_from([LINEAR, COSINE])
seeds = st.integers(0, 2**31 - 1)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 6))  # B, L, V
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def rng(seed, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def toy(V, seed=0, scale=3.0, mask_id=None):
    """A denoiser of a few lines that depends on its neighbours, and on the signal at masked positions only."""
    mask_id = V if mask_id is None else mask_id
    g = rng(seed)
    A, N, S = (scale * torch.randn(size, generator=g) for size in ((V + 1, V), (V + 1, V), (V, V)))

    def denoiser(xt, x0_prev):
        logits = A[xt] + N[xt.roll(1, 1)]  # [B, L, V]
        if x0_prev is not None:
            logits = logits + torch.where((xt == mask_id)[..., None], x0_prev.to(S.dtype) @ S, 0)
        return logits

    return denoiser


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


# =============================================================================================
# 1. Oracles: a world of V tokens and L positions, all V^L sequences of it enumerated
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

    def denoiser(self, xt, x0_prev=None):
        """log p(x0_i = v | the visible tokens of xt), [B, L, V]; a visible token is as likely as its neighbours say."""
        states = list(itertools.product(range(self.V + 1), repeat=self.L))
        if not hasattr(self, "table"):
            S = torch.tensor(states)  # [states, L]
            agrees = ((S[:, None] == self.X) | (S[:, None] == self.V)).all(-1).double()  # [states, N]
            joint = torch.einsum("sn,n,nlv->slv", agrees, self.p, self.onehot)
            self.table = (joint / joint.sum(-1, keepdim=True)).clamp(min=1e-300).log()
        powers = torch.tensor([(self.V + 1) ** (self.L - 1 - i) for i in range(self.L)])
        return self.table[(xt * powers).sum(1)]

    def draw(self, n, seed):
        return self.X[torch.multinomial(self.p, n, replacement=True, generator=rng(seed))]


def masks_of(L):
    return torch.tensor(list(itertools.product([False, True], repeat=L)))[1:]  # [2^L - 1, L], never empty


def two_pass(denoiser):
    """What SCMDM's second pass computes: a denoiser of xt alone again, so the exact sums below apply to it."""
    return lambda xt, _=None: denoiser(xt, denoiser(xt, None).float().softmax(-1))


def exact_nelbo(denoiser, X, V):
    """The NELBO of each sequence of X, summed over every mask of k of L positions, which has the weight
    integral over t of (1/t) t^k (1-t)^(L-k) = (k-1)! (L-k)! / L!. No sampling and no schedule. [N] nats."""
    L = X.shape[1]
    total = torch.zeros(len(X), dtype=torch.float64)
    for mask in masks_of(L):
        k = int(mask.sum())
        weight = math.factorial(k - 1) * math.factorial(L - k) / math.factorial(L)
        logp = denoiser(torch.where(mask, V, X), None).double().log_softmax(-1)
        total -= weight * (logp.gather(-1, X[..., None])[..., 0] * mask).sum(1)
    return total


def any_order_nll(denoiser, X, V):
    """-log p(x) of X by the chain rule, once in every order of the positions. [orders, N] nats."""
    L = X.shape[1]
    rows = []
    for order in itertools.permutations(range(L)):
        nll, visible = torch.zeros(len(X), dtype=torch.float64), torch.zeros(L, dtype=torch.bool)
        for i in order:
            logp = denoiser(torch.where(visible, X, V), None).double().log_softmax(-1)
            nll -= logp[:, i].gather(-1, X[:, i, None])[:, 0]
            visible[i] = True
        rows.append(nll)
    return torch.stack(rows)


def loss_estimate(denoiser, x0, V, repeats, seed=0, **kw):
    """Mean of diffusion_loss over x0 [N, L] and its standard error, over independent repeats."""
    g = rng(seed)
    means = torch.stack([diffusion_loss(denoiser, x0, V, generator=g, **kw).double().mean() for _ in range(repeats)])
    return means.mean().item(), (means.std() / repeats**0.5).item()


def assert_fits(counts, p):
    """Pearson's chi-square of counts against probabilities, within 5 sigma (Wilson & Hilferty's normal form)."""
    counts, expected = torch.as_tensor(counts).double(), torch.as_tensor(p).double() * float(counts.sum())
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


def sampler_distribution(denoiser, V, L, steps, schedule):
    """The exact distribution over the V^L results of `steps` reverse steps, by following every state's probability."""
    states = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))  # [S, L]
    mass = torch.zeros(len(states), dtype=torch.float64)
    mass[-1] = 1  # all masked
    probs = denoiser(states, None).double().softmax(-1)  # [S, L, V]
    for step in range(steps):
        t, s = (torch.tensor(1 - k / steps, dtype=torch.float64) for k in (step, step + 1))
        a_t, a_s = schedule.alpha(t), schedule.alpha(s)
        r = (a_s - a_t) / (1 - a_t)
        # where each position of each state goes: a visible token stays; a mask stays with 1 - r, else becomes v with r p_v
        goes = torch.zeros(len(states), L, V + 1, dtype=torch.float64)
        goes.scatter_(2, states[..., None], 1.0)
        masked = (states == V)[..., None]
        goes = torch.where(masked, torch.cat((r * probs, (1 - r).expand(len(states), L, 1)), -1), goes)
        joint = mass[:, None]
        for i in range(L):  # the outer product over positions is a distribution over states
            joint = (joint[:, :, None] * goes[:, None, i]).flatten(1)
        mass = joint.sum(0)
    done = (states < V).all(1)
    assert mass[~done].sum() < 1e-12
    return mass[done]


@given(st.sampled_from([(2, 3), (3, 2), (3, 4), (2, 4)]), seeds)
@settings(max_examples=8)
def test_nelbo_of_the_exact_denoiser_is_the_entropy(size, seed):
    """The NELBO, summed exactly over all masks, equals the entropy of the data when the denoiser is exact."""
    world = World(*size, seed)
    assert (world.p * exact_nelbo(world.denoiser, world.X, world.V)).sum().item() == pytest.approx(world.entropy, abs=1e-9)


@given(st.sampled_from([(2, 3), (3, 3), (2, 4)]), seeds, st.booleans())
@settings(max_examples=8)
def test_nelbo_is_the_any_order_average_and_a_bound(size, seed, self_conditioned):
    """For any denoiser the NELBO is the mean over all orders of the chain-rule NLL, and at least the true NLL, of the model and of the data."""
    world = World(*size, seed)
    denoiser = toy(world.V, seed)
    denoiser = two_pass(denoiser) if self_conditioned else denoiser
    nelbo, orders = exact_nelbo(denoiser, world.X, world.V), any_order_nll(denoiser, world.X, world.V)
    assert torch.allclose(nelbo, orders.mean(0), atol=1e-5)
    assert (nelbo >= -torch.logsumexp(-orders, 0) + math.log(len(orders)) - 1e-5).all()  # the model's own likelihood
    assert (world.p * nelbo).sum() >= world.entropy - 1e-5


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_diffusion_loss_estimates_the_nelbo(rate, schedule):
    """diffusion_loss is an unbiased estimate of the exact NELBO, under either schedule, vanilla and self-conditioned."""
    V, L = 3, 4
    denoiser = toy(V, 7, scale=1.0)
    x0 = World(V, L, 1).draw(512, 2)
    exact = exact_nelbo(two_pass(denoiser) if rate else denoiser, x0, V).mean().item()
    mean, error = loss_estimate(denoiser, x0, V, 400, self_cond_rate=rate, schedule=SCHEDULES[schedule])
    assert error < 0.02 * exact
    assert abs(mean - exact) < 5 * error


def test_diffusion_loss_of_the_exact_denoiser_is_the_entropy():
    """With the exact denoiser and data from the world, the mean loss is the entropy of the world."""
    world = World(3, 4, 5)
    rows = (world.p * 4000).round().long()  # the data in proportion, so only the noise of t and the masks is left
    x0 = world.X.repeat_interleave(rows, 0)
    p = rows.double() / rows.sum()
    mean, error = loss_estimate(world.denoiser, x0, 3, 40, self_cond_rate=0.0)
    exact = -(p * world.p.log()).sum().item() + _dependence(world, p)
    assert abs(mean - exact) < 5 * error and error < 0.01 * exact


def _dependence(world, p):
    """The NELBO and -log p differ sequence by sequence, not in the mean over p; the rounding of p leaves this."""
    return (p * (exact_nelbo(world.denoiser, world.X, world.V) + world.p.log())).sum().item()


@given(st.integers(2, 50), st.integers(1, 9), st.integers(1, 64), schedules)
@settings(max_examples=10)
def test_uniform_model(V, L, B, schedule):
    """A model that knows nothing has an NELBO of L log V: the weight 1/t makes up for what is not masked."""
    x0 = torch.randint(V, (B * 200, L), generator=rng(V))
    loss = diffusion_loss(lambda xt, _: torch.zeros(*xt.shape, V), x0, V, schedule=schedule, generator=rng(L))
    assert loss.shape == (len(x0),)
    standard_error = loss.std().item() / len(x0) ** 0.5
    assert abs(loss.mean().item() - L * math.log(V)) < 5 * standard_error


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sampler_follows_the_process_exactly(steps, schedule):
    """At any number of steps the samples have exactly the distribution of the reverse process."""
    world, V, L = World(3, 3, 11), 3, 3
    x = sample(world.denoiser, torch.full((40000, L), V), V, steps, schedule=SCHEDULES[schedule], generator=rng(steps))
    p = sampler_distribution(world.denoiser, V, L, steps, SCHEDULES[schedule])
    assert_fits(count(x, V), p)


def test_one_step_is_the_product_of_marginals():
    """One step draws every position from its marginal, independently."""
    world = World(3, 3, 3)
    marginals = torch.einsum("n,nlv->lv", world.p, world.onehot)
    product = torch.einsum("a,b,c->abc", *marginals).flatten()
    x = sample(world.denoiser, torch.full((40000, 3), 3), 3, 1, generator=rng(0))
    assert_fits(count(x, 3), product)
    assert (product - world.p).abs().sum() > 0.2  # and that is not the joint


def test_one_token_at_a_time_is_the_joint():
    """With so many steps that tokens are revealed one by one, the samples have the joint distribution of the data."""
    world = World(3, 3, 3)
    x = sample(world.denoiser, torch.full((10000, 3), 3), 3, 800, generator=rng(1))
    assert_fits(count(x, 3), world.p)
    assert (sampler_distribution(world.denoiser, 3, 3, 800, LINEAR) - world.p).abs().sum() < 1e-3


def test_rare_tokens_come_out_at_their_rate():
    """Tokens of probability 1e-5 are drawn at their rate at 1000 steps.

    Counted over the first 250 steps, where a step reveals one mask in a thousand or so and one float32 Gumbel draw over
    {tokens, mask} finds almost none of them; in the last steps, which reveal most of what is left, it finds its share.
    """
    rare, V, B, repeats, first = 1e-5, 256, 250, 200, 250
    probs = torch.full((V,), rare)
    probs[0] = 1 - (V - 1) * rare
    logits, g, found = probs.log().expand(B, 1, V), rng(0), 0

    class Enough(Exception):
        pass

    def on_step(step, x, x0_prev):
        nonlocal found
        if step + 1 == first:
            found += ((x > 0) & (x < V)).sum().item()
            raise Enough

    for _ in range(repeats):  # in batches that fit the processor's cache
        with pytest.raises(Enough):
            sample(lambda xt, _: logits, torch.full((B, 1), V), V, 1000, generator=g, on_step=on_step)
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


@given(schedules, st.tuples(*[st.floats(0, 1)] * 3).map(sorted).filter(lambda v: v[2] > 0.01))
def test_chapman_kolmogorov(schedule, times):
    """A step from t to r is the same as one from t to s and another from s to r: the process has no memory of its steps."""
    r, s, t = (torch.tensor(v, dtype=torch.float64) for v in times)
    direct = 1 - unmask_prob(r, t, schedule)  # still masked at r, given masked at t
    through = (1 - unmask_prob(s, t, schedule)) * (1 - unmask_prob(r, s, schedule) if s > 0 else 1)
    assert direct.item() == pytest.approx(through.item() if s > 0 else 0.0, abs=1e-9)
    assert 0 <= unmask_prob(s, t, schedule) <= 1 and unmask_prob(torch.tensor(0.0).double(), t, schedule) == 1


@given(schedules, st.integers(2, 6))
@settings(max_examples=6)
def test_masks_left_follow_the_schedule(schedule, steps):
    """After the step to time s, each position is still masked with probability 1 - alpha(s)."""
    N, left = 20000, []
    sample(toy(2), torch.full((N, 1), 2), 2, steps, schedule=schedule, generator=rng(steps),
           on_step=lambda step, x, _: left.append((x == 2).sum().item()))  # fmt: skip
    for step, n in enumerate(left):
        p = 1 - schedule.alpha(torch.tensor(1 - (step + 1) / steps, dtype=torch.float64)).item()
        assert abs(n - N * p) <= 5 * math.sqrt(N * p * (1 - p)) + 1e-9


# =============================================================================================
# 2. The process: masking, the loss, the sampler, for any model
# =============================================================================================


@given(sizes, seeds, schedules, st.floats(0, 1), st.floats(0, 1))
def test_masking(size, seed, schedule, t1, t2):
    """xt is x0 or mask everywhere; nothing is masked at t = 0, all at t = 1; masks are nested in t; frozen positions stay."""
    B, L, V = size
    x0 = torch.randint(V, (B, L), generator=rng(seed))
    frozen = torch.rand(B, L, generator=rng(seed + 1)) < 0.3
    before = x0.clone(), frozen.clone()
    draw = lambda t, **kw: q_sample(x0, t, V, schedule=schedule, generator=rng(seed), **kw)  # noqa: E731
    early, late = (draw(torch.full((B,), t)) for t in sorted((t1, t2)))
    assert ((early == x0) | (early == V)).all() and early.dtype == x0.dtype
    assert ((early == V) <= (late == V)).all()
    assert torch.equal(draw(0.0), x0) and (draw(1.0) == V).all()
    assert torch.equal(draw(1.0, frozen=frozen) == V, ~frozen)
    assert torch.equal(draw(t1, frozen=frozen) == V, (draw(t1) == V) & ~frozen)
    assert torch.equal(x0, before[0]) and torch.equal(frozen, before[1])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_masking_rate(schedule):
    """Each position is masked with probability 1 - alpha(t), independently of the others, each row at its own t."""
    N, t = 20000, torch.tensor([0.1, 0.5, 0.9])
    x = q_sample(torch.zeros(3, N, dtype=torch.long), t, 1, schedule=SCHEDULES[schedule], generator=rng(0)).double()
    p = 1 - SCHEDULES[schedule].alpha(t.double())
    assert ((x.mean(1) - p).abs() < 5 * (p * (1 - p) / N).sqrt()).all()
    pairs = (x[:, ::2] * x[:, 1::2]).mean(1)  # both of two neighbours
    assert ((pairs - p**2).abs() < 5 * (p**2 * (1 - p**2) / (N / 2)).sqrt()).all()


def test_times_are_spread_evenly():
    """The times of a batch are antithetic, t_b = (u + b/B) mod 1: one in each of B equal bins, and never below the floor."""
    seen = []
    schedule = scmdm.Schedule(lambda t: (seen.append(t.clone()), 1 - t)[1], LINEAR.dalpha)
    for seed in range(20):
        diffusion_loss(toy(2), torch.zeros(16, 3, dtype=torch.long), 2, schedule=schedule, generator=rng(seed))
        t = seen[0].flatten()
        seen.clear()
        assert sorted((t * 16).long().tolist()) == list(range(16))
        gap = t - t[0] - torch.arange(16) / 16  # whole numbers, but for the floor
        assert (gap - gap.round()).abs().max() <= 1e-3 and t.min() >= 1e-3


def test_small_times_are_floored():
    """The weight never exceeds 1 / 0.001, also for times that are given; above the floor those are used as they are."""
    zero = lambda xt, _: torch.zeros(*xt.shape, 2)  # noqa: E731
    x0 = torch.zeros(20000, 1, dtype=torch.long)
    loss = diffusion_loss(zero, x0, 2, t=torch.zeros(len(x0)), generator=rng(0))
    assert loss.max().item() == pytest.approx(1000 * math.log(2), rel=1e-4)  # one masked position, weighed 1 / 0.001
    assert diffusion_loss(zero, x0[:5], 2, t=torch.ones(5)).tolist() == pytest.approx([math.log(2)] * 5)
    assert diffusion_loss(zero, x0, 2, t=torch.full((len(x0),), 0.5), generator=rng(0)).unique().tolist() == pytest.approx([0, 2 * math.log(2)])


@given(sizes, seeds, schedules, st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([1.0, 1e4]))
def test_loss_is_finite_and_per_sequence(size, seed, schedule, rate, scale):
    """The loss is finite at logits of ±1e4, not negative, zero where nothing is masked, and moved by nothing but the masked positions of its own row."""
    B, L, V = size
    x0 = torch.randint(V, (B, L), generator=rng(seed))
    denoiser = toy(V, seed, scale)
    kw = dict(self_cond_rate=rate, schedule=schedule)
    loss = diffusion_loss(denoiser, x0, V, generator=rng(seed), **kw)
    assert loss.shape == (B,) and torch.isfinite(loss).all() and (loss >= 0).all()
    assert (diffusion_loss(denoiser, x0, V, frozen=torch.ones(B, L, dtype=torch.bool), **kw) == 0).all()
    others = torch.cat((x0[:1], (x0[1:] + 1) % V))
    assert torch.equal(loss[0], diffusion_loss(denoiser, others, V, generator=rng(seed), **kw)[0]), "another row moved it"

    # other logits at the visible positions change nothing; a constant added to all logits changes nothing
    def disturbed(xt, x0_prev):
        logits = denoiser(xt, x0_prev)
        return torch.where((xt == V)[..., None], logits, torch.randn_like(logits) * 100)

    assert torch.equal(loss, diffusion_loss(disturbed, x0, V, generator=rng(seed), **kw))
    shifted = diffusion_loss(lambda xt, p: denoiser(xt, p) + 8.0, x0, V, generator=rng(seed), **kw)
    assert torch.allclose(loss, shifted, rtol=1e-4, atol=1e-2 * scale)


@given(sizes, seeds)
def test_frozen_positions_are_never_scored(size, seed):
    """A frozen position reaches the denoiser as it is and has no part in the loss, whatever the model says there."""
    B, L, V = size
    x0 = torch.randint(V, (B, L), generator=rng(seed))
    frozen = torch.rand(B, L, generator=rng(seed)) < 0.5
    seen = []

    def denoiser(xt, x0_prev):
        seen.append(xt)
        return torch.where(frozen[..., None], math.nan, toy(V)(xt, None))

    loss = diffusion_loss(denoiser, x0, V, frozen=frozen, generator=rng(seed), self_cond_rate=0.0)
    assert torch.isfinite(loss).all()
    assert all(torch.equal(xt[frozen], x0[frozen]) for xt in seen)


@given(sizes, seeds, schedules, st.integers(1, 12), st.sampled_from(["random", "confidence"]), st.sampled_from([0, 0.5, 1, 2]))
def test_sampler_rules(size, seed, schedule, steps, order, temperature):
    """Exactly `steps` calls; the prompt comes back as it is; a revealed token never changes; no mask is left, also for steps > L; a row does not depend on the others."""
    B, L, V = size
    canvas = torch.randint(V, (B, L), generator=rng(seed))
    canvas[torch.rand(B, L, generator=rng(seed)) < 0.6] = V
    before, calls, states = canvas.clone(), [], [canvas]

    def denoiser(xt, x0_prev):
        calls.append(xt.clone())
        return toy(V, seed)(xt, x0_prev)

    kw = dict(temperature=temperature, order=order, schedule=schedule)
    x = sample(denoiser, canvas, V, steps, generator=rng(seed), on_step=lambda k, x, _: states.append(x), **kw)
    others = torch.cat((canvas[:1], torch.full((B - 1, L), V)))
    assert torch.equal(sample(toy(V, seed), others, V, steps, generator=rng(seed), **kw)[0], x[0]), "another row changed it"
    assert len(calls) == steps and len(states) == steps + 1
    assert torch.equal(canvas, before), "the caller's canvas was changed"
    assert torch.equal(x[before != V], before[before != V]) and torch.equal(x, states[-1])
    assert x.dtype == canvas.dtype and x.min() >= 0 and x.max() < V, "a mask is left"
    for earlier, later, seen in zip(states, states[1:], calls):
        assert torch.equal(later[earlier != V], earlier[earlier != V]), "a revealed token changed"
        assert torch.equal(seen, earlier), "the denoiser was not given the current state"


@given(st.integers(1, 9), st.integers(1, 12), schedules, seeds, st.sampled_from([0, 2, 4]))
def test_confidence_order(L, steps, schedule, seed, mask_id):
    """order="confidence" leaves the number of masks that the schedule expects, and reveals the surest positions first."""
    V, probs, lefts = 4, [], []

    def denoiser(xt, _):
        logits = torch.randn(2, L, V, generator=rng(seed + len(probs))) * 3
        if mask_id < V:
            logits[..., mask_id] = -math.inf
        probs.append(logits.softmax(-1))
        return logits

    def on_step(k, x, _):
        lefts.append((x == mask_id).sum(1))
        revealed = (state[0] == mask_id) & (x != mask_id)
        confidence = probs[-1].max(-1).values
        for row in range(2):
            if revealed[row].any() and (x[row] == mask_id).any():
                assert confidence[row][revealed[row]].min() >= confidence[row][x[row] == mask_id].max()
        state[0] = x

    canvas = torch.full((2, L), mask_id)
    canvas[1, : L // 2] = 3
    state = [canvas]
    sample(denoiser, canvas, mask_id, steps, temperature=0, order="confidence", schedule=schedule, on_step=on_step)
    wanted = (canvas == mask_id).sum(1).double()
    for k, left in enumerate(lefts):
        s = torch.tensor(1 - (k + 1) / steps, dtype=torch.float64)
        assert ((left - (1 - schedule.alpha(s)) * wanted).abs() <= 0.5 + 1e-9).all()


@given(sizes, seeds, st.integers(1, 5))
def test_same_seed_same_tokens(size, seed, steps):
    """The same seed gives the same tokens and the same loss; another seed gives others."""
    B, L, V = size
    canvas = torch.full((B, L), V)
    draws = [sample(toy(V, 1), canvas, V, steps, generator=rng(seed)) for _ in range(2)]
    assert torch.equal(*draws)
    losses = [diffusion_loss(toy(V, 1), draws[0], V, generator=rng(seed)) for _ in range(2)]
    assert torch.equal(*losses)
    many = [sample(lambda xt, _: torch.zeros(*xt.shape, 5), torch.full((8, 8), 5), 5, steps, generator=rng(s)) for s in (seed, seed + 1)]
    assert not torch.equal(*many)


@cuda
def test_same_seed_same_tokens_on_cuda():
    """The same holds on a GPU, where the draws are made on the GPU, and the result stays there."""
    model = tiny(adapted=True).cuda()
    canvas = torch.full((4, 6), 5, device="cuda")
    draws = [sample(model, canvas, 5, 4, generator=rng(3, "cuda")) for _ in range(2)]
    assert torch.equal(*draws) and draws[0].is_cuda
    loss = diffusion_loss(model, draws[0], 5, generator=rng(3, "cuda"))
    assert loss.is_cuda and torch.isfinite(loss).all()


@cuda
def test_cuda_agrees_with_the_cpu():
    """The GPU computes the logits of the CPU to 1e-4, with and without signal."""
    model, x = tiny(adapted=True), torch.randint(6, (3, 6), generator=rng(0))
    signal_ = torch.rand(3, 6, 5, generator=rng(1)).softmax(-1)
    for p in (None, signal_):
        there = copy.deepcopy(model).cuda()(x.cuda(), None if p is None else p.cuda()).cpu()
        assert torch.allclose(model(x, p), there, atol=1e-4)


@given(sizes, seeds, st.integers(1, 4))
def test_temperature_zero_is_argmax(size, seed, steps):
    """temperature = 0 takes the likeliest token, and so does any temperature that is low enough."""
    B, L, V = size
    logits = torch.randn(B, L, V, generator=rng(seed))
    for temperature in (0, 1e-7, 1e-320):
        x = sample(lambda xt, _: logits, torch.full((B, L), V), V, steps, temperature=temperature, generator=rng(seed))
        assert torch.equal(x, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_shapes_the_draw(temperature):
    """Tokens are drawn from softmax(logits / temperature)."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    x = sample(lambda xt, _: logits.expand(*xt.shape, 4), torch.full((20000, 1), 4), 4, 2, temperature=temperature, generator=rng(0))
    assert_fits(count(x, 4), (logits / temperature).softmax(-1))


@given(st.integers(1, 8), seeds, st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_nucleus(V, seed, top_p):
    """top_p keeps the likeliest tokens, as few as have a mass of at least top_p, in their proportions, and at least one."""
    logits = torch.randn(1, 1, V, generator=rng(seed), dtype=torch.float64) * 2
    p, kept = logits.softmax(-1)[0, 0], scmdm.token_probs(logits, 1.0, top_p)[0, 0]
    order = p.argsort(descending=True)
    smallest = next((k for k in range(1, V) if p[order[:k]].sum() >= top_p), V)
    assert torch.equal((kept > 0).nonzero()[:, 0], order[:smallest].sort().values)
    assert torch.allclose(kept[kept > 0], p[kept > 0])


def test_top_p_is_applied():
    """No sampled token lies outside the nucleus, whose tokens all occur in their proportions."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    x = sample(lambda xt, _: logits.expand(*xt.shape, 4), torch.full((20000, 1), 4), 4, 1, top_p=0.79, generator=rng(0))
    assert x.max() == 1
    assert_fits(count(x, 4)[:2], torch.tensor([0.625, 0.375]))


@given(st.integers(1, 6), seeds)
def test_draw_inverts_the_cumulative_sum(V, seed):
    """A token is drawn when u falls in its slice of the cumulative sum; one of probability zero never, even at u = 0."""
    p = torch.rand(V, generator=rng(seed), dtype=torch.float64) * (torch.rand(V, generator=rng(seed + 1)) < 0.7)
    p[seed % V] += 0.1
    u = torch.cat((torch.rand(200, generator=rng(2), dtype=torch.float64), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)))
    token = scmdm.draw(p.expand(len(u), V), u)
    cdf = np.concatenate(([0], np.cumsum(p.numpy()) / p.sum().item()))
    assert (p[token] > 0).all()
    assert (cdf[token] <= u.numpy() + 1e-12).all() and (u.numpy() <= cdf[token + 1] + 1e-12).all()


@given(sizes, seeds, st.integers(0, 5), st.sampled_from(["random", "confidence"]))
def test_mask_among_the_tokens(size, seed, mask_id, order):
    """If the mask is one of the model's own tokens, it is never predicted, scored or fed back, and the caller's logits are not touched."""
    B, L, V = size
    V, mask_id = V + 1, mask_id % (V + 1)
    kept, signals = [], []
    base = toy(V, seed, mask_id=mask_id)

    def denoiser(xt, x0_prev):
        logits = base(xt, x0_prev)
        logits[..., mask_id] = 50.0  # this model loves the mask
        kept.append((logits, logits.clone()))
        signals.append(x0_prev)
        return logits

    x = sample(denoiser, torch.full((B, L), mask_id), mask_id, 3, order=order, generator=rng(seed))
    assert (x != mask_id).all()
    x0 = torch.randint(V - 1, (B, L), generator=rng(seed))
    x0 = x0 + (x0 >= mask_id)
    loss = diffusion_loss(denoiser, x0, mask_id, generator=rng(seed))
    assert torch.isfinite(loss).all() and loss.mean() < 1000 * 50 * L
    assert all(torch.equal(*pair) for pair in kept), "the caller's logits were changed"
    assert all((p[..., mask_id] == 0).all() for p in signals if p is not None), "the mask was fed back"

    def disturbed(xt, x0_prev):  # the same model, with other logits at the visible positions
        logits = denoiser(xt, x0_prev)
        return torch.where((xt == mask_id)[..., None], logits, torch.randn_like(logits) * 100)

    assert torch.equal(loss, diffusion_loss(disturbed, x0, mask_id, generator=rng(seed))), "a visible token was scored"

    def spared(xt, x0_prev):  # the same model, had it never heard of the mask
        return base(xt, x0_prev).index_fill(-1, torch.tensor(mask_id), -math.inf)

    assert torch.allclose(loss, diffusion_loss(spared, x0, mask_id, generator=rng(seed)))


@pytest.mark.parametrize(
    "kw, name",
    [
        (dict(steps=0), "steps"),
        (dict(temperature=-1), "temperature"),
        (dict(temperature=math.nan), "temperature"),
        (dict(temperature=math.inf), "temperature"),
        (dict(top_p=0), "top_p"),
        (dict(top_p=1.1), "top_p"),
        (dict(order="best"), "order"),
    ],
)
def test_sampler_refuses(kw, name):
    """A setting that makes no sense is refused by its name, before any call of the model."""
    with pytest.raises(ValueError, match=f"^{name} is "):
        sample(None, torch.full((1, 2), 3), 3, **{"steps": 1, **kw})


@pytest.mark.parametrize("order", ["random", "confidence"])
@pytest.mark.parametrize("wrong", [[0, math.nan, 0], [0, math.inf, 0], [-math.inf] * 3])
def test_logits_that_are_no_distribution_are_not_silent(wrong, order):
    """A denoiser that gives NaN, +inf, or -inf for every token gets an error, not a canvas with masks in it."""
    with pytest.raises(ValueError, match="NaN or infinite at step 0"):
        sample(lambda xt, _: torch.tensor(wrong).expand(*xt.shape, 3), torch.full((2, 4), 3), 3, 2, order=order)


def test_sampling_keeps_no_graph():
    """Nothing is kept from step to step but the tokens and the prediction: no gradient is recorded, so memory does not grow."""
    kept = []
    sample(tiny(adapted=True), torch.full((2, 6), 5), 5, 4, on_step=lambda k, x, x0_prev: kept.append(x0_prev))
    assert [p.requires_grad for p in kept] == [False] * 4


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_loss_refuses(rate):
    """A self-conditioning rate outside 0..1 is refused."""
    with pytest.raises(ValueError, match="^self_cond_rate is "):
        diffusion_loss(toy(2), torch.zeros(1, 2, dtype=torch.long), 2, self_cond_rate=rate)


# =============================================================================================
# 3. The method: self-conditioning
# =============================================================================================


@given(seeds, st.floats(0.1, 1e4))
@settings(max_examples=10)
def test_adapted_equals_base(seed, scale):
    """Before its first step the adapted model is the pretrained one, bit for bit, for any signal; the base is not touched."""
    base = tiny(seed=seed)
    adapted = add_self_conditioning(base)
    assert base.config.self_conditioning is False and adapted.config.self_conditioning is True
    assert all(p is not q for p in base.parameters() for q in adapted.parameters())
    x = torch.randint(6, (3, 6), generator=rng(seed))
    signal_ = torch.randn(3, 6, 5, generator=rng(seed)) * scale
    for p in (None, torch.zeros_like(signal_), signal_, signal_.softmax(-1)):
        assert torch.equal(base(x, None), adapted(x, p))
    assert torch.equal(base(x, signal_), base(x, None)), "a vanilla model ignores the signal"


def test_the_cost_is_one_matrix():
    """The adapter adds one D x D matrix, zero at the start, and nothing else; the embedding it reads stays the model's own, in copies too."""
    base = tiny()
    adapted = add_self_conditioning(base)
    new = set(adapted.state_dict()) - set(base.state_dict())
    assert new == {"self_conditioning.W"} and set(base.state_dict()) <= set(adapted.state_dict())
    assert adapted.self_conditioning.W.shape == (16, 16) and not adapted.self_conditioning.W.any()
    assert [p.shape for p in SelfConditioning(torch.nn.Embedding(9, 4), 8).parameters()] == [(4, 4)]
    for model in (adapted, copy.deepcopy(adapted), copy.deepcopy(adapted).double()):
        assert model.self_conditioning.shared[0] is model.embed
    for wrong in (adapted, tiny(causal=True)):
        with pytest.raises(ValueError, match="expected a vanilla, bidirectional model"):
            add_self_conditioning(wrong)


@given(seeds)
@settings(max_examples=10)
def test_no_signal_is_exactly_nothing(seed):
    """No signal, an all-zero tensor and None are the same: the adapter adds exactly zero. softmax(zeros) is a signal."""
    model = tiny(seed=seed, adapted=True)
    x = torch.randint(6, (2, 6), generator=rng(seed))
    x[0, 0] = 5
    zero = torch.zeros(2, 6, 5)
    assert not model.self_conditioning(x, zero).any() and not model.self_conditioning(x, None).any()
    assert model.self_conditioning(x, None).shape == (2, 6, 16)
    assert torch.equal(model(x, zero), model(x, None))
    assert not torch.equal(model(x, zero.softmax(-1)), model(x, None))


@given(seeds)
@settings(max_examples=10)
def test_visible_positions_get_nothing(seed):
    """The signal is ignored where the token is visible, whatever it is, even NaN."""
    model = tiny(seed=seed, adapted=True)
    x = torch.randint(5, (2, 6), generator=rng(seed))
    x[:, ::2] = 5
    signal_ = torch.rand(2, 6, 5, generator=rng(seed)).softmax(-1)
    other = signal_.clone()
    other[:, 1::2] = math.nan
    assert torch.equal(model(x, signal_), model(x, other))
    assert not model.self_conditioning(x, signal_)[:, 1::2].any() and model.self_conditioning(x, signal_)[:, ::2].any()
    with pytest.raises(ValueError, match=r"x0_prev is \(2, 3, 5\), expected \(2, 6\)"):
        model(x, signal_[:, :3])


@given(seeds, st.integers(1, 9))
@settings(max_examples=10)
def test_one_hot_signal_embeds_as_that_token(seed, V):
    """A one-hot signal adds W E[token]; a mixture adds the mixture. Also for an embedding with more rows than tokens."""
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
def test_each_call_gets_the_prediction_of_the_call_before(size, seed, steps, temperature):
    """Call 0 gets no signal; call k gets softmax of the logits of call k-1, untouched by temperature; nothing is kept from one sample() to the next."""
    B, L, V = size
    given_, made, shown = [], [], []

    def denoiser(xt, x0_prev):
        given_.append(x0_prev)
        made.append(toy(V, seed)(xt, x0_prev))
        return made[-1]

    for _ in range(2):
        sample(denoiser, torch.full((B, L), V), V, steps, temperature=temperature, generator=rng(seed),
               on_step=lambda k, x, p: shown.append((k, p)))  # fmt: skip
        assert given_[0] is None
        for k in range(steps):
            if k:
                assert torch.equal(given_[k], made[k - 1].softmax(-1))
            assert shown[k][0] == k and torch.equal(shown[k][1], made[k].softmax(-1))
        given_.clear(), made.clear(), shown.clear()


@given(sizes, seeds)
def test_rate_one_and_rate_zero(size, seed):
    """Rate 1 gives every sequence its own first prediction, from the same xt; rate 0 makes one call without signal; both see the same noise."""
    B, L, V = size
    x0 = torch.randint(V, (B, L), generator=rng(seed))
    calls = []

    def denoiser(xt, x0_prev):
        calls.append((xt, x0_prev, toy(V, seed)(xt, x0_prev)))
        return calls[-1][2]

    loss = diffusion_loss(denoiser, x0, V, generator=rng(seed))
    (xt1, p1, logits1), (xt2, p2, _) = calls
    assert p1 is None and torch.equal(xt1, xt2) and torch.equal(p2, logits1.softmax(-1))
    calls.clear()
    vanilla = diffusion_loss(denoiser, x0, V, self_cond_rate=0.0, generator=rng(seed))
    assert len(calls) == 1 and calls[0][1] is None and torch.equal(calls[0][0], xt1)
    ignoring = diffusion_loss(lambda xt, p: toy(V, seed)(xt, None), x0, V, generator=rng(seed))
    assert torch.equal(vanilla, ignoring), "a denoiser without signal has the vanilla loss at any rate"
    assert loss.shape == vanilla.shape


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.9])
def test_rate_is_a_binomial_fraction(rate):
    """At rate r each sequence is given its signal with probability r; the others get all zeros."""
    N, seen = 4000, []

    def denoiser(xt, x0_prev):
        seen.append(x0_prev)
        return torch.zeros(*xt.shape, 3)

    diffusion_loss(denoiser, torch.zeros(N, 2, dtype=torch.long), 3, self_cond_rate=rate, generator=rng(0))
    given_ = seen[1].flatten(1).any(1)
    assert torch.allclose(seen[1][given_].sum(-1), torch.tensor(1.0)) and not seen[1][~given_].any()
    assert abs(given_.sum().item() - N * rate) < 5 * math.sqrt(N * rate * (1 - rate))


@given(seeds, st.sampled_from([0.5, 1.0]))
@settings(max_examples=8)
def test_no_gradient_through_pass_one(seed, rate):
    """The gradients are those with the signal held constant, for every parameter."""
    model = tiny(seed=seed, adapted=True)
    x0 = torch.randint(5, (4, 6), generator=rng(seed))
    diffusion_loss(model, x0, 5, self_cond_rate=rate, generator=rng(seed)).sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    signals = []
    diffusion_loss(lambda xt, p: (signals.append((xt, p)), model(xt, p))[1], x0, 5, self_cond_rate=rate, generator=rng(seed))
    constant = signals[1][1].detach().clone()
    second = lambda xt, p: model(xt, None if p is None else constant)  # noqa: E731
    diffusion_loss(second, x0, 5, self_cond_rate=rate, generator=rng(seed)).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(found, model.parameters()))


def test_the_new_matrix_learns_at_once():
    """The zero matrix receives gradient at its first step, at rate 1 and 0.5, and training moves it."""
    for rate in (0.5, 1.0):
        model = add_self_conditioning(tiny())
        x0 = torch.randint(5, (16, 6), generator=rng(0))
        diffusion_loss(model, x0, 5, self_cond_rate=rate, generator=rng(0)).sum().backward()
        assert model.self_conditioning.W.grad.abs().max() > 1e-3
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_bfloat16_autocast():
    """Under bfloat16 autocast the gradients are those of float32 within 5%, and none is missing, though pass 1 runs without gradient first."""
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
    """Weights that were cast and cached under no_grad, as older PyTorch's autocast did, are cast again for pass 2, with gradient."""
    model, cache = tiny(adapted=True), {}

    def denoiser(xt, x0_prev):  # casts its head on first use and keeps it, until the cache is cleared
        if "head" not in cache:
            cache["head"] = model.head.weight.bfloat16()
        h = model.embed(xt) if x0_prev is None else model.embed(xt) + model.self_conditioning(xt, x0_prev)
        return h @ cache["head"].float().T

    monkeypatch.setattr(torch, "clear_autocast_cache", cache.clear)
    diffusion_loss(denoiser, torch.randint(5, (8, 6), generator=rng(0)), 5, generator=rng(0)).sum().backward()
    assert model.head.weight.grad is not None and model.head.weight.grad.any()


def test_a_foreign_model_can_be_adapted():
    """The adapter and the two functions work with any model that has an nn.Embedding: adapting one lowers its loss."""
    torch.manual_seed(0)
    V, D, L = 4, 16, 5
    embedding, body = torch.nn.Embedding(V + 1, D), torch.nn.Sequential(torch.nn.Linear(D * L, 64), torch.nn.ReLU(), torch.nn.Linear(64, V * L))
    adapter = SelfConditioning(embedding, V)
    denoiser = lambda xt, p=None: body((embedding(xt) + adapter(xt, p)).flatten(1)).view(-1, L, V)  # noqa: E731
    x0 = torch.arange(L) * torch.randint(1, V, (512, 1), generator=rng(0)) % V
    parameters = [*embedding.parameters(), *body.parameters(), *adapter.parameters()]
    optimiser = torch.optim.Adam(parameters, 3e-3)
    g, losses = rng(1), []
    for _ in range(150):
        loss = diffusion_loss(denoiser, x0, V, generator=g).mean()
        optimiser.zero_grad(), loss.backward(), optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:5]) and adapter.W.abs().max() > 0.01
    x = sample(denoiser, torch.full((64, L), V), V, 8, generator=g)
    assert x.shape == (64, L) and x.max() < V


def test_public_names():
    """The names that ports and other programs rely on, with their arguments and defaults, stay as they are."""
    noise = "frozen=None, schedule=LINEAR, generator=None"
    assert {name: str(inspect.signature(getattr(scmdm, name))).replace(str(LINEAR), "LINEAR") for name in (
        "q_sample", "diffusion_loss", "sample", "save", "load", "add_self_conditioning", "SelfConditioning", "Transformer")} == {
        "q_sample": f"(x0, t, mask_id, *, {noise})",
        "diffusion_loss": f"(denoiser, x0, mask_id, *, self_cond_rate=1.0, {noise}, t=None)",
        "sample": "(denoiser, x, mask_id, steps, *, temperature=1.0, top_p=1.0, order='random', schedule=LINEAR, generator=None, on_step=None)",
        "save": "(path, model, **info)",
        "load": "(path, device='cpu')",
        "add_self_conditioning": "(model)",
        "SelfConditioning": "(embedding, mask_id)",
        "Transformer": "(config)",
    }  # fmt: skip
    assert [(f.name, f.default) for f in dataclasses.fields(Config)][2:] == [
        ("dim", 128), ("depth", 4), ("heads", 4), ("causal", False), ("self_conditioning", False), ("positions", False)]  # fmt: skip


# =============================================================================================
# 4. The model, against NumPy: the equations, and the porter's example
# =============================================================================================


def np_layer_norm(h, weight):
    centred = h - h.mean(-1, keepdims=True)
    return weight * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def np_softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def np_rotary(x):  # [B, H, L, K]
    L, K = x.shape[-2:]
    angle = np.arange(L)[:, None] / 10000 ** (np.arange(K // 2) * 2 / K)
    pair = x[..., : K // 2] + 1j * x[..., K // 2 :]  # a pair of features is a complex number: turning it is a product
    turned = pair * np.exp(1j * angle)
    return np.concatenate((turned.real, turned.imag), -1)


def np_forward(w, heads, xt, x0_prev=None, causal=False):
    """The Transformer, from its equations, in float64. w {name: array}; xt [B, L]; x0_prev [B, L, V] -> logits [B, L, V]."""
    E = w["embed.weight"]  # [V+1, D]; the last row is the mask
    V, D = E.shape[0] - 1, E.shape[1]
    h = E[xt]
    if x0_prev is not None and "self_conditioning.W" in w:
        h = h + (xt == V)[..., None] * (x0_prev @ E[:V] @ w["self_conditioning.W"].T)
    B, L = xt.shape
    if "position_embed.weight" in w:
        h = h + w["position_embed.weight"][:L]
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    for block in (f"blocks.{i}." for i in range(depth)):
        qkv = np_layer_norm(h, w[block + "norm1.weight"]) @ w[block + "qkv.weight"].T  # [B, L, 3D]
        q, k, v = (part.reshape(B, L, heads, D // heads).transpose(0, 2, 1, 3) for part in np.split(qkv, 3, -1))
        scores = np_rotary(q) @ np_rotary(k).transpose(0, 1, 3, 2) / np.sqrt(D // heads)  # [B, H, L, L]
        if causal:
            scores = np.where(np.tri(L, dtype=bool), scores, -np.inf)
        attended = (np_softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(B, L, D)
        h = h + attended @ w[block + "out.weight"].T
        z = np_layer_norm(h, w[block + "norm2.weight"]) @ w[block + "up.weight"].T  # [B, L, 4D]
        z = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))  # GELU
        h = h + z @ w[block + "down.weight"].T
    return np_layer_norm(h, w["norm.weight"]) @ w["head.weight"].T


def np_loss(w, heads, x0, t, u_mask, given=True, frozen_w=None):
    """SCMDM's loss at fixed times t [B] and uniforms u_mask [B, L], linear schedule. [B] nats.

    given [B]: which sequences get the signal. Pass 1 is a constant for gradients: frozen_w are its weights, if not w.
    """
    V = w["embed.weight"].shape[0] - 1
    t = np.maximum(t, 1e-3)  # the floor
    xt = np.where(u_mask < t[:, None], V, x0)  # 1 - alpha(t) = t
    x0_prev = np_softmax(np_forward(frozen_w or w, heads, xt)) * np.reshape(given, (-1, 1, 1))
    logp = np.log(np_softmax(np_forward(w, heads, xt, x0_prev)))
    nll = -np.take_along_axis(logp, x0[..., None], -1)[..., 0]
    return ((xt == V) * nll).sum(1) / t  # -alpha' / (1 - alpha) = 1 / t


def np_sample(w, heads, x, u_reveal, u_token):
    """SCMDM's sampler, linear schedule, from fixed uniforms [steps, B, L]. The canvas x [B, L] -> tokens [B, L], predictions [steps, B, L, V]."""
    V, steps, x0_prev, predictions = w["embed.weight"].shape[0] - 1, len(u_reveal), None, []
    for k in range(steps):
        x0_prev = np_softmax(np_forward(w, heads, x, x0_prev))
        predictions.append(x0_prev)
        t, s = 1 - k / steps, 1 - (k + 1) / steps
        reveal = u_reveal[k] < (t - s) / t
        cdf = np.cumsum(x0_prev, -1)
        token = (cdf / cdf[..., -1:] > u_token[k][..., None]).argmax(-1)  # divided, or rounding may leave it short of u
        x = np.where((x == V) & reveal, token, x)
    return x, np.stack(predictions)


def numpy_weights(model):
    return {name: p.detach().numpy().astype(np.float64) for name, p in model.state_dict().items()}


@given(seeds, st.sampled_from(["vanilla", "self-conditioned", "causal"]), st.booleans(), st.sampled_from([1, 2, 5, 40]))
@settings(max_examples=25)
def test_transformer_is_its_equations(seed, kind, positions, length):
    """The Transformer computes what its equations say, to 1e-5: vanilla, self-conditioned and causal, at any length up to its own."""
    model = tiny(length=40, seed=seed, adapted=kind == "self-conditioned", causal=kind == "causal", positions=positions)
    xt = torch.randint(6, (3, length), generator=rng(seed))
    x0_prev = torch.randn(3, length, 5, generator=rng(seed)).softmax(-1) if kind == "self-conditioned" else None
    expected = np_forward(numpy_weights(model), 2, xt.numpy(), None if x0_prev is None else x0_prev.numpy(), kind == "causal")
    found = model(xt, x0_prev).detach().numpy()
    assert found.shape == (3, length, 5)
    assert np.abs(found - expected).max() < 1e-5 * max(1, np.abs(expected).max())


@given(seeds, st.integers(0, 5))
@settings(max_examples=10)
def test_rows_are_independent_and_causal_is_causal(seed, position):
    """A row's logits do not depend on the other rows; a causal model's do not depend on later positions, and a denoiser's do."""
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
@settings(max_examples=10)
def test_only_position_embeddings_tell_where_a_mask_stands(seed):
    """To a sequence of nothing but masks the model answers the same everywhere, unless it has position embeddings."""
    masks = torch.full((1, 6), 5)
    for positions in (False, True):
        logits = tiny(seed=seed, positions=positions)(masks)[0]
        same = torch.isclose(logits, logits[:1], atol=1e-5).all(1)
        assert not same[1:].any() if positions else same.all()


def test_initialisation():
    """A new model is small and nearly uniform: matrices of standard deviation 0.02, those that add to the residual stream less, norms of one."""
    torch.manual_seed(0)
    model = Transformer(Config(50, 8, dim=128, depth=4, heads=4))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == 1).all()
        else:
            expected = 0.02 / math.sqrt(8) if name.endswith(("out.weight", "down.weight")) else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.05)
    assert model.mask_id == 50 and model.embed.weight.shape == (51, 128) and model.head.weight.shape == (50, 128)
    assert sum(p.numel() for p in model.parameters()) == 51 * 128 + 50 * 128 + 4 * (12 * 128**2 + 2 * 128) + 128


@pytest.mark.parametrize("kw", [dict(vocab_size=0), dict(length=0), dict(length=2.0), dict(length=10**7 + 1),
                                dict(dim=10**9), dict(dim=12, heads=4), dict(heads=0), dict(depth=True)])  # fmt: skip
def test_impossible_models_are_refused(kw):
    """A Config that cannot be is refused by the name of its field; so is a sequence longer than the model's length."""
    with pytest.raises(ValueError, match=f"Config.{next(iter(kw))} is "):
        Config(**{"vocab_size": 3, "length": 4, **kw})
    assert Config(10**7, 1).vocab_size == 10**7
    with pytest.raises(ValueError, match="Config.dim is 20, expected a multiple of 2 \\* heads = 6"):
        Config(3, 4, dim=20, heads=3)
    with pytest.raises(ValueError, match="xt has 7 positions, expected at most config.length = 6"):
        tiny()(torch.zeros(1, 7, dtype=torch.long))


def replay(uniforms):
    """Stands in for scmdm.uniform: hands out the given arrays, one a call."""
    stack = [torch.as_tensor(u) for u in uniforms]
    return lambda shape, device, generator=None: stack.pop(0)


GRADIENTS = ("self_conditioning.W", "embed.weight")  # which of them golden.npz has: those that pass 1 could get wrong


def make_golden():
    """The arrays of data/golden.npz: see the README for what each is."""
    model, rand = tiny(V=5, length=8, seed=1, adapted=True, positions=True), np.random.default_rng(0)
    w = {name: p.detach().numpy() for name, p in model.state_dict().items()}
    xt = rand.integers(0, 6, (2, 8))
    xt[:, ::3] = 5
    x0_prev = np_softmax(2 * rand.standard_normal((2, 8, 5))).astype(np.float32)
    u_given = np.array([0.2, 0.7, 0.4, 0.9])
    x0, t, u_mask = rand.integers(0, 5, (4, 8)), np.array([0.0004, 0.4, 0.65, 0.9]), rand.random((4, 8))
    u_mask[0, 3] = 0.0006  # masked only because the first time is raised to the floor
    canvas = np.full((2, 8), 5)
    canvas[1, 2:4] = 1, 3
    u_reveal, u_token = rand.random((2, 6, 2, 8))
    predictions = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scmdm, "uniform", replay([u_mask, u_given] * 2))
        half = diffusion_loss(model, torch.tensor(x0), 5, t=torch.tensor(t), self_cond_rate=0.5)
        loss = diffusion_loss(model, torch.tensor(x0), 5, t=torch.tensor(t))
        loss.mean().backward()
        patch.setattr(scmdm, "uniform", replay([u for pair in zip(u_reveal, u_token) for u in pair]))
        tokens = sample(model, torch.tensor(canvas), 5, 6, on_step=lambda k, x, x0_prev: predictions.append(x0_prev))
        logits, signal_ = model(torch.tensor(xt)), model(torch.tensor(xt), torch.tensor(x0_prev))
        for block in model.blocks:
            block.causal = True
        causal = model(torch.tensor(xt))
    arrays = {"weights/" + name: p for name, p in w.items()}
    arrays |= {"heads": np.array(2), "forward/xt": xt, "forward/x0_prev": x0_prev}
    arrays |= {"forward/logits_without_signal": logits, "forward/logits_with_signal": signal_, "forward/logits_causal": causal}
    arrays |= {"loss/x0": x0, "loss/t": t, "loss/u_mask": u_mask, "loss/loss": loss}
    arrays |= {"loss/u_given": u_given, "loss/loss_at_rate_half": half}
    arrays |= {f"loss/gradient/{name}": p.grad for name, p in model.named_parameters() if name in GRADIENTS}
    arrays |= {"sample/canvas": canvas, "sample/u_reveal": u_reveal, "sample/u_token": u_token}
    arrays |= {"sample/x0_prev": torch.stack(predictions), "sample/tokens": tokens}
    return {name: a.detach().numpy() if torch.is_tensor(a) else a for name, a in arrays.items()}


def test_golden_values_have_not_moved():
    """This code computes what data/golden.npz says, so a port that agrees with the file agrees with the code."""
    with np.load(GOLDEN, allow_pickle=False) as file:
        arrays = make_golden()
        assert set(file.files) == set(arrays)
        for name, array in arrays.items():
            assert np.allclose(file[name], array, atol=1e-5, rtol=1e-5), name


def test_a_port_can_check_itself_step_by_step():
    """A port in plain NumPy, without torch, reproduces every value of data/golden.npz, in the order of the README."""
    with np.load(GOLDEN, allow_pickle=False) as file:
        g = {name: file[name] for name in file.files}
    w = {name.removeprefix("weights/"): a.astype(np.float64) for name, a in g.items() if name.startswith("weights/")}
    heads = int(g["heads"])
    close = dict(atol=1e-4, rtol=1e-4)
    assert np.allclose(np_forward(w, heads, g["forward/xt"]), g["forward/logits_without_signal"], **close)
    assert np.allclose(np_forward(w, heads, g["forward/xt"], g["forward/x0_prev"]), g["forward/logits_with_signal"], **close)
    assert np.allclose(np_forward(w, heads, g["forward/xt"], causal=True), g["forward/logits_causal"], **close)
    noise = g["loss/x0"], g["loss/t"], g["loss/u_mask"]
    assert np.allclose(np_loss(w, heads, *noise), g["loss/loss"], **close)
    assert np.allclose(np_loss(w, heads, *noise, given=g["loss/u_given"] < 0.5), g["loss/loss_at_rate_half"], **close)
    for name in GRADIENTS:  # each along a random direction, by a finite difference in which pass 1 stays as it is
        direction = np.random.default_rng(0).standard_normal(w[name].shape)
        up, down = (np_loss(w | {name: w[name] + h * direction}, heads, *noise, frozen_w=w).mean() for h in (1e-5, -1e-5))
        assert np.isclose((up - down) / 2e-5, (g[f"loss/gradient/{name}"] * direction).sum(), rtol=1e-3)
    tokens, predictions = np_sample(w, heads, g["sample/canvas"], g["sample/u_reveal"], g["sample/u_token"])
    assert np.array_equal(tokens, g["sample/tokens"]) and np.allclose(predictions, g["sample/x0_prev"], **close)


# =============================================================================================
# 5. Engineering: files, training, the command lines, bad input
# =============================================================================================


@pytest.mark.parametrize("kind", ["vanilla", "adapted", "causal", "half"])
def test_save_and_load(tmp_path, kind):
    """A model comes back from its file bit for bit, with its config and what was to be remembered; load always computes in float32."""
    model = tiny(adapted=kind == "adapted", causal=kind == "causal")
    model = model.half() if kind == "half" else model
    save(tmp_path / "m.npz", model, vocab=list("añ\n☃é"), steps=3)
    again = load(tmp_path / "m.npz")
    assert again.config == model.config and again.info == {"vocab": list("añ\n☃é"), "steps": 3}
    save(tmp_path / "m.npz", model if kind == "half" else again, **({"vocab": list("añ\n☃é")} if kind == "half" else {}), steps=4)
    assert load(tmp_path / "m.npz").info == {"vocab": list("añ\n☃é"), "steps": 4}, "what was remembered is forgotten"
    if kind == "adapted":
        assert again.self_conditioning.shared[0] is again.embed
    assert list(again.state_dict()) == list(model.state_dict())
    for p, q in zip(model.parameters(), again.parameters()):
        assert q.dtype == torch.float32 and q.requires_grad and torch.equal(p.float(), q)
    x = torch.randint(6, (2, 6), generator=rng(0))
    signal_ = torch.rand(2, 6, 5)
    assert torch.equal(model.float()(x, signal_), again(x, signal_))
    assert [f.name for f in tmp_path.iterdir()] == ["m.npz"], "a temporary file was left"
    with np.load(tmp_path / "m.npz", allow_pickle=False) as file:  # no pickle: numpy itself refuses one here
        assert file["embed.weight"].dtype == (np.float16 if kind == "half" else np.float32)
        assert json.loads(str(file["header"]))["config"]["length"] == 6


def test_bfloat16_models_are_saved_as_float32(tmp_path):
    """NumPy has no bfloat16: such a model is saved in float32, without loss."""
    model = tiny().bfloat16()
    save(tmp_path / "m.npz", model)
    assert torch.equal(load(tmp_path / "m.npz").embed.weight, model.embed.weight.float())


def test_byte_order_does_not_matter(tmp_path):
    """Arrays written by a machine of the other byte order are read as the same numbers."""
    path = damaged(tmp_path, lambda arrays, header: arrays.update({name: a.astype(">f4") for name, a in arrays.items()}))
    assert all(torch.equal(p, q) for p, q in zip(load(path).parameters(), tiny().parameters()))


def damaged(tmp_path, change):
    """A model file with `change` made to its arrays and header."""
    save(tmp_path / "m.npz", tiny())
    arrays, header = scmdm.load_arrays(tmp_path / "m.npz")
    change(arrays, header)
    np.savez(tmp_path / "m.npz", header=np.array(json.dumps(header)), **arrays)
    return tmp_path / "m.npz"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda a, h: a["head.weight"].__setitem__((0, 0), math.nan), "array head.weight has a value that is not finite"),
        (lambda a, h: a.update({"head.weight": a["head.weight"][:2]}), "array head.weight is .*expected floats"),
        (lambda a, h: a.update({"head.weight": a["head.weight"].astype(int)}), "array head.weight is .*expected floats"),
        (lambda a, h: a.update({"head.weight": a["head.weight"] > 0}), "array head.weight is bool .*expected floats"),
        (lambda a, h: a.pop("norm.weight"), "array norm.weight is nothing None, expected"),
        (lambda a, h: a.update(extra=np.zeros(3)), "array extra is float64 .*expected floats None"),
        (lambda a, h: h["config"].update(depth=10**6), "not a model file .*depth"),
        (lambda a, h: h["config"].update(dim=-3), "not a model file .*dim"),
        (lambda a, h: h["config"].update(colour=3), "not a model file"),
        (lambda a, h: h.pop("config"), "not a model file"),
        (lambda a, h: h.update(info=3), "not a model file"),
    ],
)
def test_a_wrong_model_file_is_refused(tmp_path, change, says):
    """A file whose arrays are not those of its config, or not finite, is refused in one line that names the file and the array."""
    path = damaged(tmp_path, change)
    with pytest.raises(ValueError, match=f"m.npz: {says}") as error:
        load(path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    """A missing, empty, truncated, foreign or pickled file is refused in one line, and nothing in it is ever run."""
    path = tmp_path / "m.npz"
    save(path, tiny())
    whole, ran = path.read_bytes(), tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return (ran.touch, ())

    pickled, array, foreign = io.BytesIO(), io.BytesIO(), io.BytesIO()
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
    for i in range(0, len(whole), len(whole) // 60):  # one wrong byte: refused, or in a field that does not matter
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1 :])
        try:
            assert torch.equal(load(path).head.weight, tiny().head.weight)
        except ValueError as error:
            assert "m.npz" in str(error) and "\n" not in str(error)
    assert not ran.exists(), "the file was unpickled"
    with pytest.raises(ValueError, match="gone.npz: No such file"):
        load(tmp_path / "gone.npz")


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    """If writing fails at any point, a full disk say, the file that was there stays as it was, and nothing else is left; what could not be read again is not written."""
    path = tmp_path / "m.npz"
    save(path, tiny(seed=1))
    before = path.read_bytes()
    model = tiny()
    model.head.weight.data[0, 0] = 1e5  # more than float16 holds
    with pytest.raises(ValueError, match="m.npz: not written, array head.weight has a value that is not finite"):
        save(path, model.half())

    def full_disk(f, **arrays):
        f.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="No space left on device: .*m.npz"):
        save(path, tiny(seed=2))
    assert path.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["m.npz"]


SETTINGS = dict(stage="adapt", data="x", steps=12, batch_size=4, lr=1e-2, weight_decay=0.1, seed=3, dtype="float32", compile=False)


def run_optimise(out, rate=1.0, loss_of=None, data_seed=0, **changes):
    args = types.SimpleNamespace(**{**SETTINGS, "resume": False, **changes})
    stream = np.random.default_rng(data_seed).integers(0, 5, 400)
    model = add_self_conditioning(tiny(seed=4))
    return train_py.optimise(model, loss_of or train_py.diffusion_at(rate), stream, args, "scmdm", out, rate=rate)


def test_a_resumed_run_equals_an_unbroken_one(tmp_path, capsys):
    """^C saves the state after a whole step and says how to go on; the resumed run ends in the same weights, bit for bit."""
    whole, calls = run_optimise(tmp_path), []

    def interrupted(model, x0, generator):
        calls.append(x0)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return train_py.diffusion_at(1.0)(model, x0, generator)

    with pytest.raises(SystemExit) as stop:
        run_optimise(tmp_path, loss_of=interrupted)
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().out
    again = run_optimise(tmp_path, resume=True)
    assert "resumed at step 5" in capsys.readouterr().out and len(calls) == 5
    for p, q in zip(whole.parameters(), again.parameters()):
        assert torch.equal(p, q)
    for changes, says in (
        (dict(batch_size=8), "'batch_size': '4, expected 8'"),
        (dict(rate=0.5), "'rate': '1.0, expected 0.5'"),
        (dict(data_seed=1), "'data': '.*, expected .*'"),
    ):
        with pytest.raises(ValueError, match=f"--resume: .*state.npz is of another run: {{{says}}}"):
            run_optimise(tmp_path, resume=True, **changes)
    with pytest.raises(ValueError, match="state.npz: an interrupted run; go on with --resume"):
        run_optimise(tmp_path)
    arrays, header = scmdm.load_arrays(tmp_path / "scmdm.state.npz")
    for broken in ({k: a for k, a in arrays.items() if k != "exp_avg/head.weight"}, arrays | {"value/norm.weight": np.zeros(1)}):
        scmdm.save_arrays(tmp_path / "scmdm.state.npz", broken, header)
        with pytest.raises(ValueError, match="state.npz does not hold the arrays of this model"):
            run_optimise(tmp_path, resume=True)
    scmdm.save_arrays(tmp_path / "scmdm.state.npz", arrays, header | {"step": "5"})
    with pytest.raises(ValueError, match="state.npz is not the state of a run"):
        run_optimise(tmp_path, resume=True)
    scmdm.save_arrays(tmp_path / "scmdm.state.npz", arrays, header)
    run_optimise(tmp_path, resume=True, lr=3e-3)  # after a NaN, say


def test_every_step_sees_another_batch():
    """The batches and the noise of a run do not repeat, and another seed gives others."""
    seen = []
    for seed in (0, 1):
        run_optimise(Path("/nonexistent"), seed=seed, loss_of=lambda m, x0, g: (
            seen.append((tuple(x0.flatten().tolist()), torch.rand(1, generator=g).item())), diffusion_loss(m, x0, 5, generator=g))[1])  # fmt: skip
    batches, noises = zip(*seen)
    assert len(set(batches)) == len(set(noises)) == 2 * SETTINGS["steps"]


def test_a_loss_that_turns_nan_stops_the_run(tmp_path):
    """When the loss turns NaN the run stops with one line, and the state file holds the last good weights."""
    calls = []

    def failing(model, x0, generator):
        calls.append(1)
        loss = train_py.diffusion_at(1.0)(model, x0, generator)
        return loss * math.nan if len(calls) == 7 else loss

    with pytest.raises(ValueError, match="scmdm: stopped at step 6, loss nan.*last good state is in"):
        run_optimise(tmp_path, loss_of=failing)
    arrays, header = scmdm.load_arrays(tmp_path / "scmdm.state.npz")  # which refuses a NaN
    assert header["step"] == 6 and "value/self_conditioning.W" in arrays


def test_training_learns():
    """Training lowers the loss: on sequences that count upwards, nearly to zero; and the average of the weights is what is returned."""
    args = types.SimpleNamespace(**{**SETTINGS, "steps": 300, "lr": 5e-3, "batch_size": 32, "resume": False})
    rows = (np.arange(6) + np.arange(5)[:, None]) % 5
    torch.manual_seed(0)
    model = Transformer(Config(5, 6, dim=32, depth=2, heads=2))
    before, _ = train_py.validate(model, np.repeat(rows, 20, 0), 0.0)
    average = train_py.optimise(model, train_py.diffusion_at(0.0), rows, args, "base", Path("/nonexistent"))
    after, by_time = train_py.validate(average, np.repeat(rows, 20, 0), 0.0)
    # one token tells all: log 5 nats a sequence is what cannot be known
    assert before > 1.4 and after < 1.3 * math.log(5) / 6 and by_time[0] < 0.1 < by_time[-1]


def run_command(monkeypatch, capsys, script, *words):
    """A command line, run in this process: (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, words)])
    code = 0
    try:
        sample_py.run(script.main)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


SMALL = ["--dim", "16", "--depth", "1", "--heads", "2", "--steps", "3", "--batch-size", "4"]


@pytest.fixture(scope="module")
def own_model(tmp_path_factory):
    """A folder with a user's own text and the models of a three-step training on it."""
    folder = tmp_path_factory.mktemp("own")
    text = folder / "novel.txt"
    text.write_text("a quick brown fox jumps over the lazy dog.\n" * 640)
    with pytest.MonkeyPatch.context() as patch:
        for words in (["pretrain", *SMALL], ["judge", *SMALL], ["adapt", "--steps", "3", "--arms", "all", "--eval-seeds", "0"]):
            patch.setattr(sys, "argv", ["train.py", "--data", str(text), "--out", str(folder), "--stage", *words])
            sample_py.run(train_py.main)
    return folder


def test_own_text_end_to_end(own_model, monkeypatch, capsys):
    """A user's own text is trained on, adapted, sampled, infilled and watched like the built-in one; sampling needs no data file."""
    files = {"base.npz", "judge.npz", "scmdm.npz", "continued.npz", "partial.npz", "novel.txt"}
    assert {f.name for f in own_model.iterdir()} == files
    text = (own_model / "novel.txt").read_text()
    (own_model / "novel.txt").unlink()
    code, out, _ = run_command(monkeypatch, capsys, sample_py, "--models", own_model, "--prompt", "fox ____ dog", "--steps", 4, "-n", 3)
    assert code == 0 and "vanilla" in out and "SCMDM" in out and out.count("fox ") == out.count(" dog") >= 6
    code, out, _ = run_command(monkeypatch, capsys, sample_py, "--models", own_model, "--watch", "--steps", 4, "-n", 1)
    assert code == 0 and "call 4" in out and "call 5" not in out and "·" in out
    (own_model / "novel.txt").write_text(text)


def test_main_job_prints_its_table(own_model, monkeypatch, capsys):
    """The main job ends with a table: each model, its bound, and its samples measured at each number of calls beside real data."""
    words = ["--data", own_model / "novel.txt", "--out", own_model, "--steps", 2, "-n", 4, "--eval-seeds", 2, "--eval-steps", 2, 3]
    code, out, err = run_command(monkeypatch, capsys, train_py, *words)
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| ")]
    table = [{k.strip(): v.strip() for k, v in zip(rows[0], row)} for row in rows[1:]]
    assert code == 0, err
    assert [(r["model"], r["calls"]) for r in table] == [("real, held out", ""), *[(m, c) for c in "23" for m in ("vanilla", "SCMDM rate 1")]]
    for row in table:
        assert float(row["gen. ppl"].split(" ± ")[0]) > 1 and "±" in row["gen. ppl"] and "±" in row["entropy"]
    assert "signal switched off: validation NELBO" in out and "by time" in out and "tokens/s" in out and "ms/step" in out


def test_several_training_seeds(own_model, tmp_path, monkeypatch, capsys):
    """--seeds trains each arm once a seed, in a folder of its own, from the one base; the table's intervals are over these runs."""
    seen = {}
    monkeypatch.setattr(train_py, "draw_results", lambda results, path: seen.update(results) or "")
    words = ["--data", own_model / "novel.txt", "--init", own_model / "base.npz", "--out", tmp_path, "--seeds", 2, "--seed", 5, "--steps", 2]
    code, out, err = run_command(monkeypatch, capsys, train_py, *words, "-n", 4, "--eval-seeds", 3, "--eval-steps", 2)
    assert code == 0 and "over 2 training seeds" in out and out.count("vanilla: validation") == 1, err
    assert all(len(values) == 2 for values in seen.values())
    one, two = (load(tmp_path / folder / "scmdm.npz") for folder in ("", "seed6"))
    assert (one.info["seed"], two.info["seed"]) == (5, 6) and not torch.equal(one.head.weight, two.head.weight)
    alone = tmp_path / "alone"
    run_command(monkeypatch, capsys, train_py, *words[:4], "--out", alone, "--seed", 6, "--steps", 2, "--eval-seeds", 0)
    assert torch.equal(load(alone / "scmdm.npz").head.weight, two.head.weight), "a seed's run depends on the others"


def test_a_resumed_main_job_does_not_train_again(own_model, monkeypatch, capsys):
    """--resume takes an arm that was finished as it is; what is measured is always what the file holds, so the results are the same."""
    seen, validate = [], train_py.validate
    monkeypatch.setattr(train_py, "validate", lambda model, *rest: (seen.append(model.head.weight.clone()), validate(model, *rest))[1])
    words = ["--data", own_model / "novel.txt", "--out", own_model / "again", "--init", own_model / "base.npz", "--steps", 2, "--eval-seeds", 0]
    assert "step 2/2" in run_command(monkeypatch, capsys, train_py, *words)[1]
    assert (own_model / "again" / "base.npz").read_bytes() == (own_model / "base.npz").read_bytes(), "the base goes with its adaptation"
    code, out, err = run_command(monkeypatch, capsys, train_py, *words, "--resume")
    assert code == 0 and "step" not in out.replace("steps", ""), err
    assert len(seen) == 6 and torch.equal(seen[1], seen[4]) and not torch.equal(seen[0], seen[1])
    code, _, err = run_command(monkeypatch, capsys, train_py, *words, "--resume", "--lr", "0.5")
    assert code == 2 and "--resume" in err


@pytest.mark.parametrize("suffix", ["lines", "npy"])
def test_own_sequences_end_to_end(tmp_path, monkeypatch, capsys, suffix):
    """One sequence a line, or integers [N, L] in a .npy, are trained on and sampled too."""
    if suffix == "npy":
        path = tmp_path / "tokens.npy"
        np.save(path, np.random.default_rng(0).integers(0, 12, (40, 7)))
    else:
        path = tmp_path / "words.txt"
        path.write_text("\n".join(["hello", "bee", "a", "seventh"] * 9))
    more = ["--lines"] if suffix == "lines" else []
    code, out, err = run_command(monkeypatch, capsys, train_py, "--data", path, "--stage", "pretrain", "--out", tmp_path, *SMALL, *more)
    assert code == 0, err
    model = load(tmp_path / "base.npz")
    assert (model.config.vocab_size, model.config.length) == ((12, 7) if suffix == "npy" else (len(set("hellobeeaseventh")) + 1, 8))
    prompt = "3 11 __ 4" if suffix == "npy" else "he__o"
    code, out, err = run_command(monkeypatch, capsys, sample_py, "--models", tmp_path, "--prompt", prompt, "--steps", 3, "-n", 70, "--watch")
    assert code == 0 and ("3 11 " if suffix == "npy" else "he") in out and out.count(", call ") == 3, err


TRAIN, SAMPLE = train_py, sample_py


@pytest.mark.parametrize(
    "script, words, says",
    [
        (TRAIN, ["--steps", "0"], "--steps is 0, expected"),
        (TRAIN, ["--batch-size", "-1"], "--batch-size is -1"),
        (TRAIN, ["--seeds", "0"], "--seeds is 0, expected"),
        (TRAIN, ["--self-cond-rate", "1.5"], "--self-cond-rate is 1.5"),
        (TRAIN, ["--self-cond-rate", "nan"], "--self-cond-rate is nan"),
        (TRAIN, ["--lr", "0"], "--lr is 0"),
        (TRAIN, ["--stage", "dance"], "argument --stage: invalid choice: 'dance'"),
        (TRAIN, ["--data", "missing.txt"], "--data missing.txt: no such file"),
        (TRAIN, ["--data", "{tmp}/empty.txt", "--stage", "pretrain"], "0 characters, expected at least"),
        (TRAIN, ["--data", "{tmp}/short.txt", "--stage", "pretrain"], "5 characters, expected at least"),
        (TRAIN, ["--data", "{tmp}/binary.txt"], "not UTF-8 text"),
        (TRAIN, ["--data", "{tmp}/empty.txt", "--lines"], "0 lines that are not empty"),
        (TRAIN, ["--data", "{tmp}/floats.npy"], "expected integers"),
        (TRAIN, ["--data", "{tmp}/negative.npy"], "tokens -1 to -1, expected 0 to"),
        (TRAIN, ["--data", "{tmp}/huge.npy"], "tokens 1000000000000 to 1000000000000, expected 0 to"),
        (TRAIN, ["--data", "{tmp}/bad.npy"], "not an .npy file"),
        (TRAIN, ["--data", "{tmp}/zipped.npy"], "an .npz, expected an .npy"),
        (TRAIN, ["--data", "{tmp}/few.npy"], "int64 (3, 4), expected integers [N >= 20, L]"),
        (TRAIN, ["--data", "text", "--lines"], "--lines with --data text"),
        (TRAIN, ["--stage", "pretrain", "--self-cond-rate", "0.5"], "--self-cond-rate with --stage pretrain"),
        (TRAIN, ["--arms", "all", "--self-cond-rate", "0.5"], "expected one of the two"),
        (TRAIN, ["--data", "{own}/novel.txt", "--init", "{own}/base.npz", "--out", "{mixed}"], "is another base"),
        (TRAIN, ["--init", "missing.npz"], "missing.npz: No such file"),
        (TRAIN, ["--init", "{own}/base.npz"], "base.npz: of other tokens than --data text"),
        (TRAIN, ["--data", "{own}/novel.txt", "--init", "{own}/scmdm.npz"], "scmdm.npz: a model of stage adapt, expected a base"),
        (TRAIN, ["--data", "{own}/novel.txt", "--out", "{tmp}"], "no base to adapt"),
        (TRAIN, ["--stage", "pretrain", "--dim", "30"], "Config.dim is 30"),
        (TRAIN, ["--out", "{tmp}/empty.txt"], "empty.txt"),
        (SAMPLE, ["--steps", "0"], "--steps is 0, expected"),
        (SAMPLE, ["--temperature", "-1"], "--temperature is -1"),
        (SAMPLE, ["--top-p", "0"], "--top-p is 0"),
        (SAMPLE, ["-n", "0"], "-n is 0"),
        (SAMPLE, ["-n", "1", "--evaluate"], "-n is 1, expected 2 or more to evaluate"),
        (SAMPLE, ["--models", "{own}", "--data", "molecules"], "--data is molecules, but the models in"),
        (SAMPLE, ["--device", "cpu:"], "--device is 'cpu:'"),
        (SAMPLE, ["--seed", "-1"], "--seed is -1"),
        (SAMPLE, ["--data", "nothing"], "--data is 'nothing', expected one of"),
        (SAMPLE, ["--models", "{tmp}/nowhere"], "no such folder"),
        (SAMPLE, ["--models", "{tmp}"], "no base.npz or scmdm.npz"),
        (SAMPLE, ["--models", "{own}", "--prompt", "Zoë"], "--prompt has 'Z', which the model has never seen"),
        (SAMPLE, ["--models", "{own}", "--prompt", "_" * 129], "--prompt has 129 tokens, expected at most 128"),
        (SAMPLE, ["--models", "{broken}"], "base.npz: not a model file"),
        (SAMPLE, ["--models", "{mixed}"], "a model of other tokens"),
        (SAMPLE, ["--models", "{own}", "--device", "tpu"], "--device is 'tpu'"),
        (SAMPLE, ["--models", "{own}", "--steps", "2", "3"], "expected one number without --evaluate"),
        pytest.param(SAMPLE, ["--device", "cuda"], "--device cuda: there is none", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")),
    ],
    ids=lambda v: " ".join(v)[:50] if isinstance(v, list) else "",
)
def test_bad_input_gets_one_line(own_model, tmp_path, monkeypatch, capsys, script, words, says):
    """Bad input gets exit status 2 and one line that names it; no traceback."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("hello")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "bad.npy").write_text("hello")
    np.save(tmp_path / "floats.npy", np.zeros((30, 4)))
    np.save(tmp_path / "few.npy", np.zeros((3, 4), dtype=int))
    np.save(tmp_path / "negative.npy", np.full((30, 4), -1))
    np.save(tmp_path / "huge.npy", np.full((30, 4), 10**12))
    np.savez(tmp_path / "z.npz", np.zeros((30, 4), dtype=int))
    (tmp_path / "z.npz").rename(tmp_path / "zipped.npy")
    broken, mixed = tmp_path / "broken", tmp_path / "mixed"
    broken.mkdir(), mixed.mkdir()
    (broken / "base.npz").write_bytes((own_model / "base.npz").read_bytes()[:-200])
    save(mixed / "base.npz", tiny(), data="x", vocab=list("abcde"), length=6, end=None)
    (mixed / "scmdm.npz").write_bytes((own_model / "scmdm.npz").read_bytes())
    places = dict(tmp=tmp_path, own=own_model, broken=broken, mixed=mixed)
    monkeypatch.chdir(tmp_path)
    code, _, err = run_command(monkeypatch, capsys, script, *(word.format(**places) for word in words))
    assert code == 2 and says in err and err.count("\n") == 1 and "Traceback" not in err, err


def test_scripts_run_as_commands(own_model):
    """The scripts run from a shell, in another folder, on a machine with or without a GPU; --help is a page."""
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, here / "sample.py", "--models", own_model, "--steps", "0"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "sample.py: --steps is 0, expected 1 or more\n"
    done = subprocess.run([sys.executable, here / "train.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--self-cond-rate" in done.stdout
    assert sample_py.pick_device("auto").type in ("cpu", "cuda", "mps") and sample_py.pick_device("cpu").type == "cpu"


def test_two_processes(own_model, tmp_path):
    """torchrun over two processes trains one model: with the batch split between them, and the mean of their gradients."""
    here = Path(__file__).parent
    words = ["--data", own_model / "novel.txt", "--stage", "pretrain", "--out", tmp_path, "--device", "cpu", *SMALL]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launch, here / "train.py", *map(str, words)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved") == 1 and torch.isfinite(load(tmp_path / "base.npz").head.weight).all()


def test_measures():
    """Entropy is that of each sequence's tokens; distinct-4 the share of different 4-grams; the judge scores by the chain rule, from the mask as the start."""
    x = np.array([[0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1]])
    assert sample_py.unigram_entropy(x) == pytest.approx(math.log(2) / 2)
    assert sample_py.distinct(x) == pytest.approx(3 / 6)  # 0000, 0101, 1010
    judge = tiny(causal=True)
    tokens = torch.randint(5, (3, 6), generator=rng(0))
    shifted = np.concatenate((np.full((3, 1), 5), tokens.numpy()[:, :-1]), 1)
    logp = np.log(np_softmax(np_forward(numpy_weights(judge), 2, shifted, causal=True)))
    expected = -np.take_along_axis(logp, tokens.numpy()[..., None], -1)[..., 0].sum(1)
    assert np.allclose(sample_py.judge_nll(judge, tokens).detach().numpy(), expected, atol=1e-4)
    assert sample_py.mean_interval([2.0, 4.0]) == "3.000 ± 12.710" and sample_py.mean_interval([123.4]) == "123.4"


def test_frames_show_what_is_decoded():
    """A sequence is shown up to its end token; a masked position shows its guess, marked; a line is never wider than asked."""
    domain, E, M = data.get("molecules"), data.get("molecules").vocab.index("<end>"), len(data.get("molecules").vocab)
    c, n = domain.encode("CN")
    frame = lambda x, guess, width=6: sample_py.draw_frame(domain, torch.tensor(x), torch.tensor(guess), M, width, False)  # noqa: E731
    assert frame([c, c, E, n, E], [0] * 5) == ["CC    "] and frame([E], [0]) == [" " * 6]
    assert frame([c, M, M, n, E], [0, n, E, 0, 0]) == ["C··N  "]
    assert frame([c] * 7, [0] * 7, 3) == ["CCC", "CCC", "C  "]
    black = torch.zeros(196, dtype=torch.long)
    image = sample_py.draw_frame(data.get("images"), black, black, 16, 56, False)
    assert image == [" " * 56] * 14


def test_generation_makes_the_calls_it_says():
    """generate() fills any canvas in batches, makes `steps` calls a batch, and measures the time within the denoiser."""
    calls = []
    denoiser = lambda xt, p: (calls.append((len(xt), p is None)), toy(3)(xt, p))[1]  # noqa: E731
    x, seconds, inside = sample_py.generate(denoiser, torch.full((5, 4), 3), 3, 3, 0, batch=2)
    assert x.shape == (5, 4) and x.max() < 3 and 0 < inside < seconds
    assert calls == [(n, k == 0) for n in (2, 2, 1) for k in range(3)], "the signal is dropped at each new batch"


def test_held_out_data_is_of_all_its_parts():
    """What is measured on held-out data is spread over all of it: the reference and the row of real data are not one half each."""
    stream = np.arange(100 * 7)  # 100 windows that go from the first of four species to the last
    assert (sample_py.windows(stream, 7) == stream.reshape(100, 7)).all()
    assert (sample_py.windows(stream, 7, 1000) == stream.reshape(100, 7)).all()
    some = sample_py.windows(stream, 7, 12)
    assert some.shape == (12, 7) and set(np.diff(some[:, 0]) // 7) == {9} and some[0, 0] == 0 and some[-1, -1] == 699
    domain = types.SimpleNamespace(vocab="abcd", score=lambda x, reference: {"bias": abs(x.mean() - reference.mean())})
    val = np.repeat(np.arange(4), 200)[:, None].repeat(6, 1)
    real = sample_py.evaluate({}, domain, val, None, 200, [4], range(2), torch.device("cpu"))["real, held out", ""]
    assert len(real) == 2 and max(row["bias"] for row in real) < 5 * math.sqrt(1.25 * (1 / 200 + 1 / 400)), "4 species, variance 1.25"
    seen = []  # the rows of real data of several seeds have no window in common; where there are too few, the table says so
    domain.score = lambda x, reference: seen.append(x[:, 0].tolist()) or {}
    for n, label in ((100, "real, held out"), (150, "real, held out (133 each)")):
        assert [*sample_py.evaluate({}, domain, np.arange(800)[:, None], None, n, [4], range(3), torch.device("cpu"))] == [(label, "")]
        assert len(set(sum(seen, []))) == sum(map(len, seen)) == 3 * min(n, 133)
        seen.clear()


def test_validation_is_the_nelbo():
    """validate() is the mean of diffusion_loss over times spread evenly: for a uniform model log V a token, at all times alike."""
    class Uniform(torch.nn.Module):
        mask_id = 5
        def __init__(self):
            super().__init__()
            self.zero = torch.nn.Parameter(torch.zeros(5))
        def forward(self, xt, x0_prev=None):
            return self.zero.expand(*xt.shape, 5)

    val = np.random.default_rng(0).integers(0, 5, (4000, 20))
    for rate in (0.0, 1.0):
        nelbo, by_time = train_py.validate(Uniform(), val, rate)
        assert nelbo == pytest.approx(math.log(5), rel=0.05) and np.mean(by_time) == pytest.approx(nelbo, rel=1e-3)
        assert by_time[1:] == pytest.approx([math.log(5)] * 9, rel=0.1)


@pytest.mark.parametrize("name", data.NAMES)
def test_domains(name):
    """Every domain loads its data as tokens of its vocabulary, held-out data apart, and decode undoes encode."""
    domain = data.get(name)
    train, val = domain.load()
    assert train.dtype.kind in "iu" and len(val) < len(train) and train.ndim == val.ndim
    assert train.max() < len(domain.vocab) and val.max() < len(domain.vocab) and train.min() >= 0
    rows = sample_py.windows(val, domain.length)[:20]
    assert rows.shape == (20, domain.length)
    for row in rows:
        string = domain.decode(row.tolist())
        tokens = domain.encode(string)
        assert tokens == row[: len(tokens)].tolist() and domain.decode(tokens) == string
        assert (row[len(tokens) :] == row[-1]).all(), "what decode leaves out is padding"
    score = domain.score(rows[:10], rows[10:])
    assert score and all(math.isfinite(v) for v in score.values())
    with pytest.raises(KeyError):
        domain.encode("\x00")


@pytest.mark.parametrize("name", data.NAMES)
def test_shipped_models(name):
    """A domain ships a base and its adaptation, of its own tokens, whose bound beats guessing; the signal helps the adapted one."""
    domain = data.get(name)
    val = sample_py.windows(domain.load()[1], domain.length, 32768 // domain.length)
    base, adapted = (load(sample_py.SHIPPED / name / f"{kind}.npz") for kind in ("base", "scmdm"))
    assert base.info["vocab"] == adapted.info["vocab"] == domain.vocab
    assert not base.config.self_conditioning and adapted.config.self_conditioning
    vanilla, off, on = (train_py.validate(m, val, rate)[0] for m, rate in ((base, 0.0), (adapted, 0.0), (adapted, 1.0)))
    assert on < off and max(on, vanilla) < math.log(len(domain.vocab))


if __name__ == "__main__":
    np.savez(GOLDEN, **make_golden())
    print(f"wrote {GOLDEN}")
