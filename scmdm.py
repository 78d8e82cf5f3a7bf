"""Self-Conditioned Masked Diffusion Models (SCMDM): the method, whole, in one file.

A masked diffusion model writes a sequence by starting from nothing but [MASK] and revealing tokens over a
number of steps. At each step it predicts every token, keeps the few that are revealed, and throws the other
predictions away: a position that stays masked is worked out again from its visible neighbours, and what the
last call had found out about it is lost. SCMDM (Cardei, Ta & Fioretto 2026, arXiv 2604.26985) feeds the
last call's predictions, `x0_prev`, back to the model: we call them the signal. It takes a pretrained model,
makes the smallest change that lets the signal in (here: one matrix), and trains a little longer. In
training, pass 1 makes the signal and pass 2, which gets it, is scored. Sampling needs no extra calls.

Read from top to bottom:
    1. the schedule         how much is masked at time t
    2. the forward process  clean tokens -> masked tokens
    3. the self-conditioning adapter, and the Transformer that carries it
    4. the loss             what training minimises, and where SCMDM differs
    5. the sampler          masked tokens -> clean tokens, and the likelihood bound of what it does
    6. save and load        one .npz, which any framework with numpy can read

From the paper: feeding the prediction back, adapting after pretraining, pass 1 without gradient. Ours: the
exact form of the injection (`SelfConditioning`), `unroll` and `sampler_bound`.

One convention for time, everywhere: t = 0 is clean, t = 1 is all masked, and s < t is the next, cleaner time.
Shapes: B sequences, L positions, V tokens, D model dimensions. Tokens are 0..V-1. In our Transformer the
mask is V (`mask_id`): it has an embedding and no logit, so that it can never be predicted. Where it is one
of the model's V tokens, as in BERT, see `without_mask`.
"""

import copy
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# --- 1. The schedule --------------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """A noise schedule: two functions of a tensor of times in [0, 1]."""

    alpha: Callable  # probability that a token is still visible at t: falls from alpha(0)=1 to alpha(1)=0
    dalpha: Callable  # its derivative in t


LINEAR = Schedule(lambda t: 1 - t, lambda t: -torch.ones_like(t))  # MDLM's "log-linear"
COSINE = Schedule(  # MaskGIT's (arXiv 2202.04200): few tokens at first, when little is known
    lambda t: 1 - torch.sin(math.pi / 2 * t),
    lambda t: -math.pi / 2 * torch.cos(math.pi / 2 * t),
)


def unmask_prob(s, t, schedule=LINEAR):
    """The probability that a position, masked at t > 0, is visible at s < t."""
    return (schedule.alpha(s) - schedule.alpha(t)) / (1 - schedule.alpha(t))


# --- 2. The forward process -------------------------------------------------------------------------------


def uniform(shape, device, generator=None):
    """Uniform numbers in [0, 1). Process, loss and sampler draw from nothing else, so that a port can replay
    them. In float64, because float32 is too coarse for rare tokens at many steps: one float32 draw over
    {tokens, mask} starves them (Zheng et al. 2024, arXiv 2409.02908). Apple's mps has only float32.
    """
    dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
    return torch.rand(shape, dtype=dtype, device=device, generator=generator)


def mask_tokens(x0, u, t, mask_id, frozen=None, schedule=LINEAR):
    """xt from uniforms u [B, L] at times t, [B] or a number. With the same u a larger t masks a superset."""
    t = torch.as_tensor(t, dtype=u.dtype, device=u.device).reshape(-1, 1)  # [B, 1] or [1, 1]
    masked = u < 1 - schedule.alpha(t)  # [B, L]
    if frozen is not None:
        masked = masked & ~frozen
    return torch.where(masked, mask_id, x0)


def q_sample(x0, t, mask_id, *, frozen=None, schedule=LINEAR, generator=None):
    """Draw xt from q(xt | x0): each token is kept with probability alpha(t), else it becomes the mask.

    x0 [B, L] int64 tokens; t a number or [B], one time for each sequence; frozen [B, L] bool, positions that
    are never masked. Returns xt [B, L].
    """
    return mask_tokens(x0, uniform(x0.shape, x0.device, generator), t, mask_id, frozen, schedule)


# --- 3. The denoiser --------------------------------------------------------------------------------------


class SelfConditioning(nn.Module):
    """All that is added to a model: one D x D matrix W, without bias.

        h = E[xt] + 1[xt is MASK] * x0_prev @ E[:V] @ W.T

    This form is ours; the paper asks for a minimal change. The previous prediction x0_prev, a distribution
    over tokens, becomes the mean embedding of those tokens, and W says how to mix it in. W starts at zero, so
    the adapted model is exactly the pretrained one until it is trained. A visible token gets nothing.

    embedding is the model's own nn.Embedding, of at least V rows. It stays the model's (it is not among this
    module's parameters, and learns through both its uses); if the model replaces it, make the adapter anew.
    Works with any model without a time input: add the result to its token embeddings.
    """

    def __init__(self, embedding, mask_id):
        super().__init__()
        self.shared = (embedding,)  # in a tuple, so that it is not registered, and saved, twice
        self.mask_id = mask_id
        dim = embedding.embedding_dim
        self.W = nn.Parameter(embedding.weight.new_zeros(dim, dim))

    def forward(self, xt, x0_prev=None):
        """xt [B, L]; x0_prev [B, L, V] probabilities -> [B, L, D]. No signal, None or zeros, gives zero."""
        E = self.shared[0].weight  # [at least V, D]
        if x0_prev is None:
            return E.new_zeros(*xt.shape, E.shape[1])
        V = x0_prev.shape[-1]
        h = x0_prev.to(E.dtype) @ E[:V] @ self.W.T  # [B, L, D]
        return torch.where((xt == self.mask_id)[..., None], h, 0)


@dataclass
class Config:
    """What a Transformer is. Raises ValueError if the heads do not divide dim into pairs of features."""

    vocab_size: int  # V, without the mask
    length: int  # the longest sequence, in tokens
    dim: int = 128
    depth: int = 4
    heads: int = 4
    causal: bool = False  # True: an autoregressive model (a judge, to score samples), else a denoiser
    self_conditioning: bool = False
    positions: bool = False  # learn an embedding of each position too: for data with a fixed start, as a grid

    def __post_init__(self):
        if self.dim % (2 * self.heads):
            raise ValueError(f"Config.dim is {self.dim}, expected a multiple of 2 * heads = {2 * self.heads}")


def rotate(x):
    """Rotary positions (Su et al. 2021): turn each pair of features of x [B, H, L, K] by an angle."""
    L, K = x.shape[-2:]
    frequency = 10000 ** (-torch.arange(0, K, 2, device=x.device) / K)  # [K/2]
    angle = torch.arange(L, device=x.device)[:, None] * frequency  # [L, K/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)  # feature i is paired with feature i + K/2
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

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
    """The denoiser f(xt, x0_prev) -> logits: a plain bidirectional Transformer with V logits.

    It has no time input. For masked ("absorbing") diffusion the distribution of the clean tokens given xt
    does not depend on t: xt already shows what is masked (Ou et al. 2024, RADD, arXiv 2406.03736).

    Rotary positions say how far apart two positions are, not where they stand, so that a sequence of nothing
    but masks looks the same everywhere. That is right for a window of a longer text; for anything that has a
    first position, set config.positions.
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
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.self_conditioning = None
        for name, p in self.named_parameters():
            if p.ndim == 2:
                # GPT-2's initialisation: smaller for the 2 * depth layers that write to the residual stream
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.depth) if residual else 0.02)
        if config.self_conditioning:
            self.self_conditioning = SelfConditioning(self.embed, self.mask_id)  # its W stays zero

    def forward(self, xt, x0_prev=None):
        """xt [B, L] tokens or mask; x0_prev [B, L, V] or None -> logits [B, L, V] of the clean tokens.

        A vanilla model ignores x0_prev. Raises ValueError if L is more than config.length.
        """
        if xt.shape[1] > self.config.length:
            raise ValueError(f"xt has {xt.shape[1]} positions, expected at most {self.config.length}")
        h = self.embed(xt)  # [B, L, D]
        if self.self_conditioning is not None and x0_prev is not None:
            h = h + self.self_conditioning(xt, x0_prev)
        if self.position_embed is not None:
            h = h + self.position_embed.weight[: xt.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))  # [B, L, V]


def add_self_conditioning(model):
    """A copy of a pretrained vanilla Transformer, with the adapter added: exactly equal until trained."""
    if model.config.self_conditioning or model.config.causal:
        raise ValueError(f"add_self_conditioning got {model.config}, expected a vanilla, bidirectional model")
    model = copy.deepcopy(model)
    model.config.self_conditioning = True
    model.self_conditioning = SelfConditioning(model.embed, model.mask_id)
    return model


# --- 4. The loss ------------------------------------------------------------------------------------------


T_MIN = 1e-3  # the smallest time the loss looks at: towards t = 0 ever rarer masks weigh ever more, 1/t


def without_mask(logits, mask_id):
    """logits [..., V] in float32, and if the mask is one of the V tokens (as in BERT), never the mask."""
    logits = logits.float()
    if mask_id < logits.shape[-1]:
        logits = logits.index_fill(-1, torch.tensor(mask_id, device=logits.device), -math.inf)
    return logits


def masked_nll(logits, x0, masked, mask_id):
    """sum over masked i of -log p(x0_i), the p from logits [B, L, V]. [B], nats for each sequence."""
    nll = torch.zeros(x0.shape, device=x0.device)  # [B, L]
    nll[masked] = F.cross_entropy(without_mask(logits[masked], mask_id), x0[masked].long(), reduction="none")
    return nll.sum(1)


def diffusion_loss(
    denoiser, x0, mask_id, *,
    self_cond_rate=1.0, unroll=1, frozen=None, schedule=LINEAR, generator=None, t=None,
):  # fmt: skip
    """Estimate of the NELBO (negative evidence lower bound), which bounds -log p(x0) from above. [B], nats.

        E_t [ weight(t) * sum over masked i of -log p(x0_i | xt, x0_prev) ],  weight = -alpha' / (1 - alpha)

    What it means: the average, over all orders in which the tokens could be revealed, of the chain-rule cost
    of the sequence. The weight is the rate at which masks are lifted, unmask_prob(t - dt, t) = weight(t) dt,
    so that each token is paid for once, when it is revealed. For the linear schedule it is 1/t. With unroll=1
    the value does not depend on the schedule (MD4, arXiv 2406.04329; MDLM, Sahoo et al. 2024, 2406.07524).

    denoiser: any callable (xt [B, L], x0_prev [B, L, V] or None) -> logits [B, L, V]. Nothing hands it a
        time: a model with a time input is given a constant one, or loses it.
    x0 [B, L]: tokens, none of them the mask. frozen [B, L] bool: positions never masked and never scored.
    self_cond_rate: the probability, for each sequence, that the denoiser is given its own prediction: 1 is
        SCMDM, 0.5 the habit when training from scratch, 0 vanilla training.
    unroll: the most passes that make the signal. 1 is the paper's recipe; more is ours, see pass 1 below.
    t [B]: the times, if they are not to be drawn (the floor T_MIN applies to them too).
    Order of the draws: times (1,) if not given, masks (B, L), who gets the signal (B,), and with unroll > 1
    and a rate above 0 the number of passes (1,) and of calls (B,).
    Raises ValueError if self_cond_rate is outside [0, 1].

    Train on this, quote `sampler_bound`: this bounds what the denoiser can do with a signal made as here.
    """
    if not 0 <= self_cond_rate <= 1:
        raise ValueError(f"self_cond_rate is {self_cond_rate}, expected a number from 0 to 1")
    B, L = x0.shape

    # 1. One time for each sequence: one draw, spread evenly over the batch, for a calmer loss.
    if t is None:
        u = uniform((1,), x0.device, generator)
        t = (u + torch.arange(B, device=x0.device, dtype=u.dtype) / B) % 1  # [B]
    t = t.clamp(min=T_MIN)

    # 2. Mask.
    u = uniform(x0.shape, x0.device, generator)  # [B, L]
    xt = mask_tokens(x0, u, t, mask_id, frozen, schedule)  # [B, L]

    # 3. Pass 1, the method: the model's own prediction becomes the signal. No gradient goes through it, or
    #    pass 1 could become a code for pass 2 instead of an estimate of x0. The paper makes it by one pass at
    #    xt itself, from no signal. Sampling makes it at the state before, more masked than xt, with a signal
    #    that was made with a signal, and so on. unroll > 1 (ours; the idea is SUNDAE's, Savinov et al. 2022,
    #    arXiv 2112.06749) imitates that on x0: k passes, at the k states before xt, each given the last. How
    #    far apart they are depends on the number of calls, T, that one will sample with: it is drawn too.
    given = uniform((B,), x0.device, generator) < self_cond_rate  # [B]
    x0_prev = None
    if self_cond_rate > 0:
        if unroll == 1:
            times = [t]
        else:
            k = 1 + int(unroll * uniform((1,), x0.device, generator))  # 1..unroll, one for the batch
            T = L * 4 ** (2 * uniform((B,), x0.device, generator) - 1)  # [B] calls, log-uniform, L/4 to 4L
            times = [t + i / T for i in range(k, 0, -1)]  # k times [B]; some are above 1
        with torch.no_grad():
            for time in times:
                x = mask_tokens(x0, u, time, mask_id, frozen, schedule)  # the same u: the masks are nested
                x0_prev = without_mask(denoiser(x, x0_prev), mask_id).softmax(-1)  # [B, L, V]
                x0_prev *= (time <= 1)[:, None, None]  # a time above 1 is before the first call: zeros
            x0_prev *= given[:, None, None]
        # Older PyTorch, under autocast, would reuse pass 1's casts of the weights, which carry no gradient.
        torch.clear_autocast_cache()

    # 4. Pass 2, at xt: score the masked positions, weigh by time.
    nll = masked_nll(denoiser(xt, x0_prev), x0, xt == mask_id, mask_id)  # [B]
    weight = -schedule.dalpha(t) / (1 - schedule.alpha(t))  # [B]
    return weight.to(nll.dtype) * nll


# --- 5. The sampler ---------------------------------------------------------------------------------------


def draw(probs, u):
    """Draw a token from each row of probs [..., V] by u [...]: the first whose cumulative sum exceeds u."""
    cdf = probs.cumsum(-1)
    return torch.searchsorted(cdf / cdf[..., -1:], u[..., None], right=True)[..., 0]


def token_probs(logits, temperature, top_p):
    """What tokens are drawn from: softmax(logits / temperature), cut to the smallest nucleus of top_p."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    # the largest is subtracted first, so that dividing by a small temperature cannot give +inf
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p < 1:
        p, token = probs.sort(dim=-1, descending=True, stable=True)
        keep = p.cumsum(-1) - p < top_p  # while the mass of the more likely ones is still too little
        probs = torch.zeros_like(probs).scatter(-1, token, torch.where(keep, p, 0))
    return probs


@torch.no_grad()
def sample(
    denoiser, x, mask_id, steps, *,
    temperature=1.0, top_p=1.0, order="random", schedule=LINEAR, generator=None, on_step=None,
):  # fmt: skip
    """Fill every mask of the canvas x [B, L] in exactly `steps` calls of the denoiser; returns [B, L].

    x holds mask_id where tokens are wanted and known tokens elsewhere, which come back as they are:
    prompts, suffixes and infilling are all just canvases. Call k is given the prediction of call
    k-1, and call 0 none. The prediction is fed back as it is, whatever the temperature and top_p.

    order: "random" follows the diffusion process; "confidence" reveals as many as the schedule expects, those
    whose drawn token the model thinks likeliest first (as MaskGIT, arXiv 2202.04200, without the noise it
    adds to the confidence). It prefers what is safe: fewer rules are broken, but text repeats itself.
    on_step(step, x, x0_prev): called after each step with the new state and the prediction it was drawn from.
    Order of the draws at each step: which masks to reveal (B, L), then the tokens (B, L).
    Raises ValueError for steps < 1, temperature < 0, top_p outside (0, 1], an unknown order, or logits
    that are no distribution (NaN, +inf, or all -inf).
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected 1 or more")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected 0 or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, expected more than 0 and at most 1")
    if order not in ("random", "confidence"):
        raise ValueError(f"order is {order!r}, expected 'random' or 'confidence'")

    blanks = (x == mask_id).sum(1, keepdim=True)  # [B, 1] masks in the canvas
    x0_prev = None
    for step in range(steps):
        # The signal changes at every call, so the call is made even if no token has changed.
        logits = denoiser(x, x0_prev)  # [B, L, V]
        del x0_prev  # of [B, L, V] only the logits and the new signal stay alive
        x0_prev = without_mask(logits, mask_id).softmax(-1)  # [B, L, V]: what the next call is given
        if x0_prev.sum(-1).isnan().any():
            raise ValueError(f"the denoiser gave logits that are NaN or infinite at step {step}")

        u_reveal = uniform(x.shape, x.device, generator)  # [B, L]
        u_token = uniform(x.shape, x.device, generator)  # [B, L]
        t = torch.tensor(1 - step / steps, dtype=u_token.dtype, device=x.device)
        s = torch.tensor(1 - (step + 1) / steps, dtype=u_token.dtype, device=x.device)
        masked = x == mask_id  # [B, L]

        # Whether a mask is revealed, and which token it becomes, are two separate draws. At s = 0 all are
        # revealed. Tokens are drawn only where one may be revealed, in float64.
        reveal = masked & (u_reveal < unmask_prob(s, t, schedule)) if order == "random" else masked
        candidates = without_mask(logits[reveal], mask_id).to(u_token.dtype)  # [R, V]
        drawn = x.clone()
        drawn[reveal] = draw(token_probs(candidates, temperature, top_p), u_token[reveal]).to(x.dtype)
        del logits

        if order == "confidence":  # of all that was drawn, keep what the model thinks likeliest
            confidence = x0_prev.gather(-1, torch.where(masked, drawn, 0)[..., None].long())[..., 0]  # [B, L]
            confidence = confidence.masked_fill(~masked, -1)
            rank = confidence.argsort(dim=-1, descending=True, stable=True).argsort(-1)  # 0 = the surest
            left = ((1 - schedule.alpha(s)) * blanks).round()  # [B, 1] masks that the schedule leaves at s
            reveal = masked & (rank < masked.sum(1, keepdim=True) - left)
        x = torch.where(reveal, drawn, x)
        if on_step is not None:
            on_step(step, x, x0_prev)
    return x


@torch.no_grad()
def sampler_bound(denoiser, x0, mask_id, steps, *, frozen=None, schedule=LINEAR, generator=None):
    """Estimate of the bound on -log p(x0) under `sample(..., steps)`. [B], nats per sequence. Ours.

    diffusion_loss says what the denoiser can do; this says what the sampler does, with its few steps and
    its carried signal (order="random", temperature 1). It is computed on given data, so that sharper
    samples cannot better it. It walks the sampler's own path to x0, with nested masks from one u. At each
    call a mask would be revealed with probability unmask_prob(s, t) and then cost -log p(x0_i): every mask
    is charged that expectation.

    In the mean it is the mean over orders of revealing of -log p(x0 | order), which is far above -log p(x0)
    if the model settles early, on something else in each order: data/likelihood.py comes closer.
    """
    u = uniform(x0.shape, x0.device, generator)  # [B, L]
    bound, x0_prev = 0, None
    for step in range(steps):
        t, s = (torch.tensor(1 - k / steps, dtype=u.dtype, device=u.device) for k in (step, step + 1))
        xt = mask_tokens(x0, u, t, mask_id, frozen, schedule)  # [B, L]
        logits = denoiser(xt, x0_prev)  # [B, L, V]
        cost = masked_nll(logits, x0, xt == mask_id, mask_id)  # [B]
        bound = bound + unmask_prob(s, t, schedule).to(cost.dtype) * cost
        x0_prev = without_mask(logits, mask_id).softmax(-1)
    return bound


# --- 6. Save and load -------------------------------------------------------------------------------------


def save(path, model, **info):
    """Write a Transformer and any metadata (`info`: JSON values) to one .npz.

    The metadata that it was loaded with are kept. One array for each parameter, under its PyTorch name and
    in its own precision (bfloat16, which numpy lacks, as float32; model.half() makes a small file), and
    `header`: config and info, UTF-8 JSON as a uint8 array. Written under another name and then renamed, so
    that a crash leaves an older file whole. Raises OSError if it cannot be written.
    """
    arrays = {}
    for name, p in model.state_dict().items():
        arrays[name] = (p.float() if p.dtype == torch.bfloat16 else p).cpu().numpy()
    header = json.dumps({"config": asdict(model.config), "info": model.info | info}, ensure_ascii=False)
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            np.savez(f, header=np.frombuffer(header.encode("utf-8"), dtype=np.uint8), **arrays)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:  # a full disk does not say for which file
        raise OSError(e.errno, e.strerror, os.fspath(path)) from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def load(path, device="cpu"):
    """Read a Transformer from an .npz, in float32; model.info is what `save` was given. Never unpickles.

    Raises ValueError, in one line, for a file that is missing, damaged, or not one of ours.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = arrays.pop("header")  # uint8; in files of the first version a Unicode string
        header = json.loads(header.tobytes().decode("utf-8") if header.dtype == np.uint8 else str(header))
        model = Transformer(Config(**header["config"]))
        model.load_state_dict({name: torch.from_numpy(a.astype(np.float32)) for name, a in arrays.items()})
        model.info = dict(header["info"])
    except (FileNotFoundError, PermissionError) as e:
        raise ValueError(f"{path}: {e.strerror}") from None
    except Exception as e:  # a damaged zip raises nearly anything
        raise ValueError(f"{path}: not a model file, or a damaged one ({type(e).__name__})") from None
    return model.to(device)
