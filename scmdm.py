"""Self-Conditioned Masked Diffusion Models (SCMDM): the whole method, in one file.

A masked diffusion model writes a sequence by starting from nothing but [MASK] and revealing tokens over a
number of sampling steps. At each step it predicts every masked token, keeps the few predictions that are
revealed now, and throws the others away. The next step has to work them out again.

SCMDM (Cardei, Ta & Fioretto 2026, arXiv 2604.26985) gives each step the model's own previous prediction of
the clean tokens, `x0_prev`. We call it *the signal*. The method takes a pretrained model, adds one small
matrix that lets the signal in, and trains a little longer. A sampling step is still one call of the model:
its signal is the prediction of the step before. In training there is no step before. There, pass 1 makes the
signal without gradient, and pass 2 is given it and is trained.

Sections: 1. the process, 2. the adapter, 3. the Transformer, 4. the loss, 5. the sampler, 6. extensions,
7. files. Sections 1 to 5 are the paper's method, and the exact form of the adapter is our choice. Section 6
is ours, except for confidence order, which is MaskGIT's.

Time has one direction everywhere: t = 0 is clean, t = 1 is fully masked, and s < t is the next, cleaner time.
Shapes: B sequences, L positions, V tokens, D model dimensions. Tokens are 0..V-1. The mask of our Transformer
is V: it has an embedding and no logit. The mask of a foreign model may be one of its V tokens, as in BERT.
A denoiser is any function (xt [B, L], x0_prev [B, L, V] or None) -> logits [B, L, V], without dropout. "No
signal" is None, or zeros for those sequences of a batch that have none. A denoiser treats both alike.
"""

import copy
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


def expect(right, message):
    """Raise ValueError for an argument that would silently give a wrong result."""
    if not right:
        raise ValueError(message)


# --- 1. The process: clean tokens -> masked tokens ---------------------------------------------------------


class Schedule(NamedTuple):
    """A noise schedule: two functions of a tensor of times in [0, 1]."""

    alpha: Callable  # the probability that a token is still visible at t, from alpha(0) = 1 to alpha(1) = 0
    dalpha: Callable  # its derivative in t


LINEAR = Schedule(lambda t: 1 - t, lambda t: -torch.ones_like(t))  # MDLM calls it log-linear
COSINE = Schedule(  # MaskGIT's (arXiv 2202.04200): few tokens are revealed at first, when little is known
    lambda t: 1 - torch.sin(math.pi / 2 * t),
    lambda t: -math.pi / 2 * torch.cos(math.pi / 2 * t),
)


def unmask_prob(s, t, schedule=LINEAR):
    """Return the probability that a position that is masked at t > 0 is visible at s < t."""
    return (schedule.alpha(s) - schedule.alpha(t)) / (1 - schedule.alpha(t))


def uniform(shape, device, generator=None):
    """Draw uniform numbers in [0, 1). All draws of the process, the loss and the sampler come from here.

    `generator` is a torch.Generator, None for torch's global one, or a function shape -> uniforms, which
    replays known numbers. They are float64, except on Apple's mps, which has only float32.
    """
    if callable(generator):
        return torch.as_tensor(generator(shape), device=device)
    dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
    return torch.rand(shape, dtype=dtype, device=device, generator=generator)


def q_sample(x0, t, mask_id, *, u=None, frozen=None, schedule=LINEAR, generator=None):
    """Draw xt from q(xt | x0): each token is kept with probability alpha(t), and becomes the mask otherwise.

    x0 [B, L] integer tokens; t in [0, 1], a number or [B], one for each sequence; frozen [B, L] bool, where
    nothing is masked; u [B, L], the uniforms if they are not to be drawn. With the same u, what is masked at
    some t is also masked at any larger t. Returns a new xt [B, L]. Raises ValueError for a t outside [0, 1],
    and for a wrong shape of t or u.
    """
    if u is None:
        u = uniform(x0.shape, x0.device, generator)  # [B, L]
    t = torch.as_tensor(t, dtype=u.dtype, device=u.device)
    expect(mask_id >= 0, f"mask_id is {mask_id}, expected a token id")
    expect(t.shape in ((), x0.shape[:1]), f"t has shape {list(t.shape)}, expected a number or [{len(x0)}]")
    expect(((0 <= t) & (t <= 1)).all(), "t is outside [0, 1]")
    expect(u.shape == x0.shape, f"u has shape {list(u.shape)}, expected that of x0, {list(x0.shape)}")
    masked = u < 1 - schedule.alpha(t).reshape(-1, 1)  # [B, L]
    if frozen is not None:
        masked = masked & ~frozen
    return torch.where(masked, mask_id, x0)


# --- 2. The adapter: how the signal enters a model ---------------------------------------------------------


class SelfConditioning(nn.Module):
    """All that SCMDM adds to a model: one D x D matrix W, without bias.

        h = E[xt] + 1[xt is MASK] * (x0_prev @ E[:V] @ W.T)

    The signal is a distribution over tokens at each position. Its average token embedding, weighted by
    probability, is mapped by W and added at masked positions. A visible position gets nothing. W starts at
    zero, so the adapted model is exactly the pretrained one until it is trained.

    Works with any model: add the result to its token embeddings. `embedding` is the model's own nn.Embedding,
    or anything with a `weight` [at least V, D]. It stays the model's parameter, and is trained both as the
    input embedding and as part of the signal. If the model replaces it, make a new adapter.
    """

    def __init__(self, embedding, mask_id):
        super().__init__()
        expect(mask_id >= 0, f"mask_id is {mask_id}, expected a token id")
        self.shared = (embedding,)  # in a tuple, so that it is not registered, and saved, twice
        self.mask_id = mask_id
        dim = embedding.weight.shape[1]
        self.W = nn.Parameter(embedding.weight.new_zeros(dim, dim))

    def forward(self, xt, x0_prev=None):
        """Return what to add to E[xt], [B, L, D]. xt [B, L]; x0_prev [B, L, V] probabilities, or None.

        No signal is None or all zeros, and adds exactly zero.
        """
        E = self.shared[0].weight  # [at least V, D]
        if x0_prev is None:
            return E.new_zeros(*xt.shape, E.shape[1])
        V = x0_prev.shape[-1]
        h = x0_prev.to(E.dtype) @ E[:V] @ self.W.T  # [B, L, D]
        return torch.where((xt == self.mask_id)[..., None], h, 0)


# --- 3. The Transformer ------------------------------------------------------------------------------------


@dataclass
class Config:
    """The sizes of a Transformer. dim must be a multiple of 2 * heads: rotary positions turn pairs."""

    vocab_size: int  # V, without the mask
    length: int  # the longest sequence, in tokens
    dim: int = 128
    depth: int = 4
    heads: int = 4
    causal: bool = False  # True: an autoregressive model, which can score samples; False: a denoiser
    self_conditioning: bool = False
    positions: bool = False  # learn an embedding for each position too

    def __post_init__(self):
        pairs = 2 * self.heads
        expect(self.dim % pairs == 0, f"Config.dim is {self.dim}, expected a multiple of 2 * heads = {pairs}")


def rotate(x):
    """Apply rotary positions (Su et al. 2021) to x [B, H, L, K]: turn each pair of features by an angle."""
    L, K = x.shape[-2:]
    frequency = 10000 ** (-torch.arange(0, K, 2, device=x.device, dtype=torch.float32) / K)  # [K/2]
    angle = torch.arange(L, device=x.device)[:, None] * frequency  # [L, K/2], float32 for any x
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)  # feature i is paired with feature i + K/2
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Block(nn.Module):
    """Attention and an MLP, each normalised first and added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        D = config.dim
        self.heads, self.causal = config.heads, config.causal
        self.norm1, self.norm2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.up = nn.Linear(D, 4 * D, bias=False)
        self.down = nn.Linear(4 * D, D, bias=False)

    def forward(self, h):
        B, L, D = h.shape
        qkv = self.qkv(self.norm1(h)).view(B, L, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, L, K], K = D / H
        a = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=self.causal)
        h = h + self.out(a.transpose(1, 2).reshape(B, L, D))
        return h + self.down(F.gelu(self.up(self.norm2(h)), approximate="tanh"))


class Transformer(nn.Module):
    """A plain Transformer. Unless it is causal, it is the denoiser f(xt, x0_prev) -> logits.

    It has no time input. For masked ("absorbing") diffusion the distribution of the clean tokens given xt
    does not depend on t, because xt itself shows what is masked (Ou et al. 2024, arXiv 2406.03736).

    Rotary positions encode only distances, which suits a window of a longer text. Where the absolute position
    matters, as in a grid, set `config.positions`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.mask_id = config.vocab_size
        self.info = {}  # what `load` found in the file beside the weights
        self.embed = nn.Embedding(config.vocab_size + 1, config.dim)  # the last row is the mask
        self.position_embed = nn.Embedding(config.length, config.dim) if config.positions else None
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.dim, bias=False)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)  # no logit for the mask
        self.self_conditioning = None
        for name, p in self.named_parameters():
            if p.ndim == 2:
                # GPT-2's initialisation: smaller for the 2 * depth layers that write to the residual stream
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.depth) if residual else 0.02)
        if config.self_conditioning:
            self.self_conditioning = SelfConditioning(self.embed, self.mask_id)  # its W stays zero

    def forward(self, xt, x0_prev=None):
        """Return logits [B, L, V] of the clean tokens. xt [B, L] tokens or mask; x0_prev [B, L, V] or None.

        A vanilla model ignores x0_prev. Raises ValueError if L is more than config.length.
        """
        L = xt.shape[1]
        expect(L <= self.config.length, f"xt has {L} positions, expected at most {self.config.length}")
        h = self.embed(xt)  # [B, L, D]
        if self.self_conditioning is not None and x0_prev is not None:
            h = h + self.self_conditioning(xt, x0_prev)
        if self.position_embed is not None:
            h = h + self.position_embed.weight[:L]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))  # [B, L, V]


def add_self_conditioning(model):
    """Return a copy of a pretrained vanilla Transformer with the adapter added, exactly equal until trained.

    Raises ValueError for a model that has an adapter already, or that is causal.
    """
    vanilla = not (model.config.self_conditioning or model.config.causal)
    expect(vanilla, f"add_self_conditioning got {model.config}, expected a vanilla, bidirectional model")
    model = copy.deepcopy(model)
    model.config.self_conditioning = True
    model.self_conditioning = SelfConditioning(model.embed, model.mask_id)
    return model


# --- 4. The loss -------------------------------------------------------------------------------------------

T_MIN = 1e-3  # smaller times are raised to this: a rare mask with the weight 1/t makes the loss noisy


def without_mask(logits, mask_id):
    """Return logits [..., V] in float32. If the mask is one of the V tokens, its logit becomes -inf."""
    logits = logits.float()
    if mask_id < logits.shape[-1]:
        logits = logits.index_fill(-1, torch.tensor(mask_id, device=logits.device), -math.inf)
    return logits


def masked_nll(logits, x0, masked, mask_id):
    """Return the sum over masked positions i of -log p(x0_i), p from logits [B, L, V]. [B], nats."""
    nll = torch.zeros(x0.shape, dtype=torch.float32, device=x0.device)  # [B, L]
    nll[masked] = F.cross_entropy(without_mask(logits[masked], mask_id), x0[masked].long(), reduction="none")
    return nll.sum(1)


@torch.no_grad()
def make_signal(denoiser, x0, t, u, mask_id, *, unroll=1, frozen=None, schedule=LINEAR, generator=None):
    """Return the signal for pass 2, [B, L, V]. Pass 2 sees x0 masked at times t [B] by the uniforms u [B, L].

    unroll=1 is the paper's recipe: one pass, at the state at t itself, without a signal. A larger unroll runs
    k passes at k earlier, more masked states, as a sampler would (see `earlier_times`). Each gets the
    prediction of the pass before it. The same u masks all states, so they are nested.
    Example: t = 0.5, T = 10 and k = 3 visit the states at 0.8, 0.7 and 0.6. The state at 0.5 is scored.
    """
    times = [t] if unroll == 1 else earlier_times(t, x0.shape[1], unroll, generator)
    x0_prev = None
    for time in times:  # [B]
        xt = q_sample(x0, time.clamp(max=1), mask_id, u=u, frozen=frozen, schedule=schedule)  # [B, L]
        x0_prev = without_mask(denoiser(xt, x0_prev), mask_id).softmax(-1)  # [B, L, V]
        x0_prev *= (time <= 1)[:, None, None]  # a sampler starts at 1, so above it there is no signal
    return x0_prev


def diffusion_loss(
    denoiser, x0, mask_id, *,
    self_cond_rate=1.0, unroll=1, frozen=None, schedule=LINEAR, generator=None, t=None,
    make_signal=make_signal,
):  # fmt: skip
    """Return an estimate of the NELBO (negative evidence lower bound), a bound on -log p(x0). [B], nats.

        E [ weight(t) * sum over masked i of -log p(x0_i | xt, x0_prev) ],  weight = -alpha' / (1 - alpha)

    The mean is over the time t and over which positions are masked. For the linear schedule the weight is 1/t
    (MD4, arXiv 2406.04329; MDLM, arXiv 2406.07524). It is the rate at which masks are revealed at t. A token
    is masked with probability 1 - alpha(t). Times the weight this integrates to 1, so each token is paid for
    once. The loss is the chain-rule cost of the sequence, averaged over all orders of revealing its tokens.

    x0 [B, L] tokens. frozen [B, L] bool: positions that are never masked and never scored, whatever token
    stands there. self_cond_rate: the probability that a sequence is given its signal; 1 is SCMDM, 0.5 the
    usual habit when training from scratch, 0 vanilla training. unroll: see `make_signal`, the function,
    another of which may be passed. t [B]: the times, if they are not to be drawn.
    Raises ValueError for an argument out of range, and for a mask among the free tokens of x0.
    Draws, in this order: times (1,) unless given; masks (B, L); who gets the signal (B,); make_signal's.
    """
    B = len(x0)
    expect(0 <= self_cond_rate <= 1, f"self_cond_rate is {self_cond_rate}, expected a number from 0 to 1")
    expect(unroll >= 1, f"unroll is {unroll}, expected 1 or more")
    expect_tokens(x0, mask_id, frozen)
    if t is not None:
        expect(t.shape == (B,), f"t has shape {list(t.shape)}, expected [{B}], one time for each sequence")
        expect(((0 <= t) & (t <= 1)).all(), "t is outside [0, 1]")

    # 1. One time for each sequence, evenly spaced from one draw, so that the batch's mean varies less.
    if t is None:
        u = uniform((1,), x0.device, generator)
        t = (u + torch.arange(B, device=x0.device, dtype=u.dtype) / B) % 1  # [B]
    t = t.clamp(min=T_MIN)

    # 2. Mask.
    u = uniform(x0.shape, x0.device, generator)  # [B, L]
    xt = q_sample(x0, t, mask_id, u=u, frozen=frozen, schedule=schedule)  # [B, L]
    masked = xt != x0  # [B, L]

    # 3. Pass 1: the model's own prediction becomes the signal. No gradient goes through it. Otherwise pass 1
    #    could be trained to hide a message for pass 2 in it, and in sampling the signal is a prediction.
    given = uniform((B,), x0.device, generator) < self_cond_rate  # [B]
    x0_prev = None
    if self_cond_rate > 0:
        options = dict(unroll=unroll, frozen=frozen, schedule=schedule, generator=generator)
        x0_prev = make_signal(denoiser, x0, t, u, mask_id, **options)  # [B, L, V]
        x0_prev = x0_prev * given[:, None, None]
        torch.clear_autocast_cache()  # else older PyTorch reuses weights that pass 1 cast without gradient

    # 4. Pass 2 is given the signal: score its masked positions, and weigh by time.
    nll = masked_nll(denoiser(xt, x0_prev), x0, masked, mask_id)  # [B]
    weight = -schedule.dalpha(t) / (1 - schedule.alpha(t))  # [B]
    return weight.to(nll.dtype) * nll


def expect_tokens(x0, mask_id, frozen):
    """Raise ValueError if mask_id is no token id, or stands at a position of x0 that may be masked."""
    expect(mask_id >= 0, f"mask_id is {mask_id}, expected a token id")
    stray = x0 == mask_id if frozen is None else (x0 == mask_id) & ~frozen  # [B, L]
    expect(not stray.any(), f"x0 contains the mask, {mask_id}, at a position that is not frozen")


# --- 5. The sampler ----------------------------------------------------------------------------------------


def token_probs(logits, temperature, top_p):
    """Return softmax(logits / temperature), kept only for the fewest likely tokens of total mass top_p."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    # the largest is subtracted first, so that dividing by a small temperature cannot give +inf
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p < 1:
        p, token = probs.sort(dim=-1, descending=True, stable=True)
        keep = p.cumsum(-1) - p < top_p  # keep a token if the more likely ones have less than top_p in total
        probs = torch.zeros_like(probs).scatter(-1, token, torch.where(keep, p, 0))
    return probs


def draw(probs, u):
    """Draw a token from each row of probs [..., V] by u [...]: the first whose cumulative sum exceeds u."""
    cdf = probs.cumsum(-1)
    return torch.searchsorted(cdf / cdf[..., -1:], u[..., None], right=True)[..., 0]


@torch.no_grad()
def sample(
    denoiser, x, mask_id, steps, *,
    temperature=1.0, top_p=1.0, order="random", schedule=LINEAR, generator=None, on_step=None,
):  # fmt: skip
    """Fill every mask of the canvas x [B, L] in exactly `steps` calls of the denoiser. Returns tokens [B, L].

    The canvas holds mask_id where a token is wanted. All other tokens are kept, so it may contain a prompt, a
    suffix or gaps. The first step gets no signal. Each later step gets the prediction of the step before,
    unchanged by temperature and top_p.

    temperature 0 takes the most likely token; top_p draws from the fewest tokens of that mass. order "random"
    follows the diffusion process; "confidence" is MaskGIT's (see `most_confident`).
    on_step(step, x, x0_prev) is called after each step with the new state and the prediction it came from.
    Raises ValueError for an option out of range, and for logits that are NaN, +inf, or all -inf.
    Draws, at each step: which masks to reveal (B, L), then the tokens (B, L).
    """
    expect(mask_id >= 0, f"mask_id is {mask_id}, expected a token id")
    expect(steps >= 1, f"steps is {steps}, expected 1 or more")
    expect(0 <= temperature < math.inf, f"temperature is {temperature}, expected 0 or more")
    expect(0 < top_p <= 1, f"top_p is {top_p}, expected more than 0 and at most 1")
    expect(order in ("random", "confidence"), f"order is {order!r}, expected 'random' or 'confidence'")

    blanks = (x == mask_id).sum(1, keepdim=True)  # [B, 1] masks in the canvas
    x0_prev = None
    for step in range(steps):
        # 1. Predict. The call is made even if no token has changed, because the signal has.
        logits = denoiser(x.clone(), x0_prev)  # [B, L, V]; a clone, in case the denoiser writes into it
        del x0_prev  # only the logits and the new signal stay in memory
        x0_prev = without_mask(logits, mask_id).softmax(-1)  # [B, L, V]
        fine = not x0_prev.sum(-1).isnan().any()
        expect(fine, f"the denoiser gave NaN or infinite logits at step {step}")

        # 2. Which masks are revealed. This draw and that of the tokens are separate, and float64. One joint
        #    draw over {tokens, mask} scales each token by the small chance of revealing, and in float32 rare
        #    tokens are then hardly ever drawn (Zheng et al. 2024, arXiv 2409.02908).
        u_reveal = uniform(x.shape, x.device, generator)  # [B, L]
        u_token = uniform(x.shape, x.device, generator)  # [B, L]
        t = torch.tensor(1 - step / steps, dtype=u_token.dtype, device=x.device)
        s = torch.tensor(1 - (step + 1) / steps, dtype=u_token.dtype, device=x.device)  # 0 at the last step
        masked = x == mask_id  # [B, L]
        random = masked & (u_reveal < unmask_prob(s, t, schedule))  # at s = 0 all masks
        chosen = random if order == "random" else masked  # confidence order draws for all, and keeps some

        # 3. Which token each becomes.
        candidates = without_mask(logits[chosen], mask_id).to(u_token.dtype)  # [number chosen, V]
        del logits
        drawn = x.clone()
        drawn[chosen] = draw(token_probs(candidates, temperature, top_p), u_token[chosen]).to(x.dtype)
        if order == "confidence":
            left = ((1 - schedule.alpha(s)) * blanks).round()  # [B, 1] masks that the schedule leaves at s
            chosen = most_confident(drawn, x0_prev, masked, masked.sum(1, keepdim=True) - left)
        x = torch.where(chosen, drawn, x)
        if on_step is not None:
            on_step(step, x, x0_prev)
    return x


# --- 6. Extensions -----------------------------------------------------------------------------------------


def earlier_times(t, L, unroll, generator=None):
    """Return k times [B] above t, from the most masked state to the least, for `make_signal`. Ours.

    A sampler's signal comes from an earlier, more masked state, and was made with a signal itself. The
    paper's recipe never shows the model such a signal in training. Here k is uniform in 1..unroll, and the
    times are t + i/T for i = k..1: the states that a sampler of T steps visits before t. T is drawn too. The
    idea of unrolling is SUNDAE's (Savinov et al. 2022, arXiv 2112.06749). Draws: k (1,), then T (B,).
    """
    k = 1 + int(unroll * uniform((1,), t.device, generator))  # one for the batch
    T = L * 4 ** (2 * uniform(t.shape, t.device, generator) - 1)  # [B], log-uniform in L/4..4L
    return [t + i / T for i in range(k, 0, -1)]


@torch.no_grad()
def sampler_bound(denoiser, x0, mask_id, steps, *, frozen=None, schedule=LINEAR, generator=None):
    """Return an estimate of the bound on -log p(x0) under `sample(..., steps)`. [B], nats per sequence. Ours.

    diffusion_loss is a bound for very many steps, with a signal made as in training. This one is for `steps`
    steps, with the signal carried as in `sample` (random order, temperature 1). It is the cost of given data,
    so samples that merely become less diverse do not improve it.

    It walks the sampler's path to x0. Each position has one uniform for the whole walk, so masks only
    disappear. Each step adds, for every masked position, the probability that it is revealed now times
    -log p(x0_i). If a model settles early, on something else in each order of revealing, the bound is loose.
    Raises ValueError for steps < 1 or a mask among the free tokens of x0. Draws: masks (B, L).
    """
    expect(steps >= 1, f"steps is {steps}, expected 1 or more")
    expect_tokens(x0, mask_id, frozen)
    u = uniform(x0.shape, x0.device, generator)  # [B, L]
    bound, x0_prev = 0, None
    for step in range(steps):
        t = torch.tensor(1 - step / steps, dtype=u.dtype, device=u.device)
        s = torch.tensor(1 - (step + 1) / steps, dtype=u.dtype, device=u.device)
        xt = q_sample(x0, t, mask_id, u=u, frozen=frozen, schedule=schedule)  # [B, L]
        masked = xt != x0  # [B, L]
        logits = denoiser(xt, x0_prev)  # [B, L, V]
        cost = masked_nll(logits, x0, masked, mask_id)  # [B]
        bound = bound + unmask_prob(s, t, schedule).to(cost.dtype) * cost
        x0_prev = without_mask(logits, mask_id).softmax(-1)
    return bound


def most_confident(drawn, x0_prev, masked, count):
    """Return the `count` [B, 1] masked positions [B, L] whose drawn tokens are most likely by x0_prev.

    This is MaskGIT's order (arXiv 2202.04200) without the noise that it adds. It makes fewer errors in a
    Sudoku, but text becomes repetitive. Of equal positions the first comes first.
    """
    token = torch.where(masked, drawn, 0)[..., None].long()  # 0: a visible token may be out of range
    confidence = x0_prev.gather(-1, token)[..., 0]  # [B, L]
    confidence = confidence.masked_fill(~masked, -1)  # below any probability, even one that underflows to 0
    rank = confidence.argsort(dim=-1, descending=True, stable=True).argsort(-1)  # 0 is the most confident
    return masked & (rank < count)


# --- 7. Files ----------------------------------------------------------------------------------------------


def save(path, model, **info):
    """Write a Transformer and any metadata (`info`: JSON values) to one .npz, which numpy alone can read.

    There is one array for each parameter, under its PyTorch name and in its own precision (bfloat16, which
    numpy lacks, becomes float32). `header` is UTF-8 JSON in a uint8 array, with the config and the metadata:
    model.info, updated with info. The file is written under another name and then renamed, so that a crash
    leaves an older file whole. Raises OSError if it cannot be written.
    """
    header = json.dumps({"config": asdict(model.config), "info": model.info | info}, ensure_ascii=False)
    arrays = {"header": np.frombuffer(header.encode("utf-8"), dtype=np.uint8)}
    for name, p in model.state_dict().items():
        arrays[name] = (p.float() if p.dtype == torch.bfloat16 else p).cpu().numpy()
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path, device="cpu"):
    """Read a Transformer from an .npz, in float32. model.info is the metadata that `save` was given.

    Nothing in the file is executed, and no random numbers are drawn. Raises OSError for a file that cannot be
    opened, and ValueError for one that is damaged, is no model, or lacks an array, which is then named.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = arrays.pop("header")  # uint8, or a Unicode string in the oldest files
        header = json.loads(header.tobytes().decode("utf-8") if header.dtype == np.uint8 else str(header))
        weights = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
        with torch.device("meta"):  # only shapes, no random weights
            model = Transformer(Config(**header["config"]))
        model.info = dict(header["info"])
    except OSError:
        raise
    except Exception as error:  # a damaged zip raises nearly anything
        raise ValueError(f"{path}: not a model file, or a damaged one ({type(error).__name__})") from None
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    return model.to(device)
