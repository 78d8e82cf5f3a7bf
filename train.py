"""Train: the optimisation, and nothing else. The method is in scmdm.py, what measures in data/study/.

    python train.py                       Sudoku from nothing: pretrain a base, adapt it
    python train.py --data text           adapt the text model that lies in data/models/
    python train.py --stage pretrain      only the vanilla masked diffusion model that everything starts from
    torchrun --nproc_per_node=8 train.py  any of these over several GPUs: the same batches, the same model

What a run makes lies in one folder, --out: base.npz and a file for each arm, that is, each way of training
on from the base. Its name says the rate (the share of sequences that get the signal; 0 is the control) and
the most passes that make it. --resume goes on with what is there; `python sample.py --models OUT` samples
from it.
"""

import argparse
import copy
import math
import os
import shlex
import shutil
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import scmdm
from data import windows
from sample import Progress, clock, fail, find_model, label, load_models, models_in, pick_device, run, show
from scmdm import Config, Transformer, add_self_conditioning, diffusion_loss, load, masked_nll, save
from scmdm import without_mask

# How each domain is trained by default; a file of your own is trained like text. Every flag below overrides.
# steps: of pretraining, of adaptation; unroll: the most passes that make a signal; lr: the peak learning rate
# of the arms that get one; calls: denoiser calls of the samples at the end.
COMMON = dict(dim=128, depth=4, heads=4, batch_size=32, unroll=8, lr=1e-3, calls=64)
DEFAULTS = {
    "sudoku": COMMON | dict(dim=64, depth=3, steps=(4000, 700), unroll=16, lr=2e-3, calls=144),
    "text": COMMON | dict(steps=(12000, 1000)),
    "molecules": COMMON | dict(steps=(8000, 1000), batch_size=128, calls=32),
    "images": COMMON | dict(steps=(4000, 750)),
    "dna": COMMON | dict(steps=(3000, 1000)),
}
STATE_EVERY = 60  # seconds: kill -9 loses at most this much
LR = {  # peak learning rates of models from nothing, and of the control
    "pretrain": 2e-3,  # small models like large steps
    "control": 5e-4,  # training on without a signal: what is large for the base undoes it
}


def parse():  # fmt: off
    def number(kind, low, high=math.inf):  # a range that argparse itself checks
        def check(text):
            if not low <= (value := kind(text)) <= high:
                raise argparse.ArgumentTypeError(f"{value} is not between {low} and {high}")
            return value

        return check

    positive, rate = number(int, 1), number(float, 0, 1)
    lrs = ", ".join(f"{lr:g} for {of}" for of, lr in LR.items())
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = p.add_argument
    a("--stage", choices=("pretrain", "adapt"), default="adapt",
      help="default: adapt, which pretrains a base first where there is none")
    a("--data", default="sudoku", help=f"{', '.join(data.NAMES)}, or your own text or .npy of integers")
    a("--lines", action="store_true", help="your file is one sequence per line, not one long text")
    a("--length", type=positive, help="your file: the window, or the longest line kept (default: 128)")
    a("--vocab", help="your .npy: a file with one token per line, to print samples as text")
    a("--out", help="folder of the trained models (default: runs/NAME)")
    a("--resume", action="store_true", help="go on in OUT: keep what is finished, continue what was not")
    a("--init", help="adapt: the base (default: OUT/base.npz, else the one in data/models/)")
    a("--rates", type=rate, nargs="+", metavar="RATE",
      help="adapt: rates of self-conditioning, an arm for each (default: 0 1); pretrain: one (0)")
    a("--unroll", type=positive, nargs="+", metavar="K",
      help="most passes that make the signal, an arm for each; 1: the paper's recipe (default: 1 16, or 1 8)")
    a("--steps", type=positive, help="optimiser steps; with adapt, of each arm")
    a("--batch-size", type=positive, help="sequences per step, over all processes")
    a("--lr", type=number(float, 1e-9),
      help=f"peak learning rate (default: {lrs}; with a signal 1e-3, Sudoku 2e-3)")
    a("--weight-decay", type=number(float, 0), default=0.05, help="of the matrices (default: 0.05)")
    a("--dim", type=positive, help="pretrain: width of the model")
    a("--depth", type=positive, help="pretrain: blocks")
    a("--heads", type=positive, help="pretrain: attention heads (default: 4)")
    a("--seed", type=number(int, 0, 2**31 - 1), default=0, help="of weights, batches and noise (default: 0)")
    a("--device", default="auto", help="auto, cpu, cuda or mps (default: auto, the fastest there is)")
    a("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matrix products")
    a("--compile", action="store_true", help="torch.compile: slow to start, then faster; needs a compiler")
    a("--no-table", action="store_true", help="adapt: no samples at the end")
    args = p.parse_args()
    given = {flag for flag, value in vars(args).items() if value is not None and value is not False}
    without_effect = {
        "pretrain": {"init", "no_table"},
        "adapt": {"dim", "depth", "heads"},
    }
    for flag in sorted(given & without_effect[args.stage]):
        name = "--" + flag.replace("_", "-")
        hint = ", which takes a base as it is: first --stage pretrain" if args.stage == "adapt" else ""
        p.error(f"{name} has no effect with --stage {args.stage}{hint}")
    if args.stage == "pretrain" and max(len(args.rates or []), len(args.unroll or [])) > 1:
        p.error("--stage pretrain trains one model: expected one of --rates and one of --unroll")
    if args.unroll and not any(args.rates or [args.stage == "adapt"]):
        p.error("--unroll has no effect at rate 0")
    args.default = DEFAULTS.get(args.data, DEFAULTS["text"])
    for name in ("dim", "depth", "heads", "batch_size"):
        if getattr(args, name) is None:
            setattr(args, name, args.default[name])
    return args


# ---------------------------------------------------------------------------------------------
# One optimisation run
# ---------------------------------------------------------------------------------------------


def processes():
    """(which process this is, of how many), as torchrun says in the environment."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def diffusion_at(rate, unroll=1):
    """The loss of one arm: (model, x0 [b, L], generator) -> [b] nats per sequence.

    Several processes share one batch of B = b * world sequences. Each draws the noise of the whole batch and
    keeps its own rows, so that any number of processes trains the same model.
    """
    (rank, world), draw = processes(), scmdm.uniform

    def own_rows(shape, device, generator=None):
        if shape == (1,):  # one draw for the whole batch
            return draw(shape, device, generator)
        return draw((shape[0] * world, *shape[1:]), device, generator)[rank::world]

    def loss_of(model, x0, generator):
        B = len(x0) * world
        u = draw((1,), x0.device, generator)
        t = (u + torch.arange(rank, B, world, device=x0.device, dtype=u.dtype) / B) % 1  # [b], spread over B
        scmdm.uniform = own_rows
        try:
            options = {"self_cond_rate": rate, "unroll": unroll, "generator": generator, "t": t}
            return diffusion_loss(model, x0, model.mask_id, **options)
        finally:
            scmdm.uniform = draw

    return loss_of


def optimise(model, loss_of, train, args, steps, lr, seed, state, what):
    """Minimise loss_of(model, x0 [b, L], generator) -> [b] nats per sequence. Returns the moving average.

    AdamW, warm-up and cosine decay, gradient clipping. The randomness of step k is a function of (seed, k)
    alone, so that a resumed run equals one that was never stopped. `state`: the file in which the run is
    kept, once a minute; `what` {name: value}: what a run must have in common with the one it resumes (lr
    need not).
    """
    rank, world = processes()
    device, length = next(model.parameters()).device, model.config.length
    if train.ndim == 1:  # a stream: any window of it may be in a batch
        train = np.lib.stride_tricks.sliding_window_view(train, length)  # [N - L + 1, L], a view
    parameters = list(model.parameters())
    average = copy.deepcopy(model).requires_grad_(False)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.98),  # the scale of the gradients is soon forgotten: the weight 1/t makes it jump
    )
    parts = {"model": model, "average": average, "optimiser": optimiser}
    first = load_state(state, what, parts) if state.exists() else 0
    if args.compile:
        model.compile()
    denoiser = model
    if world > 1:
        denoiser = DistributedDataParallel(model)
        denoiser.config, denoiser.mask_id = model.config, model.mask_id
    batches, noise = torch.Generator(), torch.Generator(device)  # batches are always drawn on the CPU
    warmup = max(1, min(steps // 20, 200))
    progress, running, saved = Progress(state.stem, steps, args.batch_size * length), None, time.time()

    for step in range(first, steps):
        for kind, g in enumerate((batches, noise)):
            g.manual_seed(int(np.random.SeedSequence((seed, kind, step)).generate_state(1)[0]))

        # 1. Batch: all processes draw the same, each takes its rows.
        rows = torch.randint(len(train), (args.batch_size,), generator=batches)[rank::world].numpy()
        x0 = torch.from_numpy(train[rows].astype(np.int64)).to(device)  # [b, L]

        # 2. Loss, in nats per token.
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = loss_of(denoiser, x0, noise).mean() / length

        # 3. Backward. With several processes DDP takes the mean of their gradients here.
        optimiser.zero_grad()
        loss.backward()

        # 4. Clip. A norm that is not finite stops the run before anything has been changed.
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not torch.isfinite(norm):
            raise ValueError(
                f"{state.stem}: stopped at step {step}, loss {loss.item()}; --resume with a lower --lr goes"
                " on from the state of the last minute, or else from the start"
            )

        # 5. Step: linear warm-up, then a cosine to zero.
        for group in optimiser.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimiser.step()

        # 6. Average: a moving average of the weights is what is kept. Its memory is short at first, to forget
        #    the initial ones.
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in parameters], 1 - decay)

        value = loss.item()
        running = value if running is None else 0.98 * running + 0.02 * value  # one batch says little
        if rank == 0:
            progress.update(step + 1, f"loss {running:.4f} nats per token")
            if time.time() - saved > STATE_EVERY:
                save_state(state, step + 1, what, parts)
                saved = time.time()
    return average


def save_state(path, step, what, parts):
    """Keep a run: written under another name, then renamed. A full disk is a warning; the run goes on."""
    temporary = path.with_suffix(".tmp")
    content = {"step": step, "what": what} | {name: part.state_dict() for name, part in parts.items()}
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer raises the second
        reason = str(error).splitlines()[0]
        print(f"\nwarning: {path} could not be written ({reason}); the run goes on", file=sys.stderr)


def load_state(path, what, parts):
    """Put a run back as it was; returns its step."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found, step = state["what"], state["step"]
    except Exception as error:  # a damaged file raises nearly anything
        fail(f"{path}: not the state of a run, or damaged ({type(error).__name__}); delete it to start again")
    same_run(path, found, what)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return step


def same_run(path, found, what):
    """Stop if `found`, what a file was made from, is not `what` is wanted now."""
    differs = [f"{k} is {found.get(k)}, now {v}" for k, v in what.items() if found.get(k) != v]
    if differs:
        fail(f"{path} is of another run: {'; '.join(differs)}. Another --out keeps both")


# ---------------------------------------------------------------------------------------------
# Validation
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(model, val, draws=8):
    """Nats per token of val [N, L]: the NELBO, of two passes if adapted.

    Exactly k of the L positions are masked, k = 1..L in turn, which has less noise than a
    random time: the chance that k are masked at t, times the weight 1/t, is 1/k when integrated over t. All
    models get the same masks.
    """
    device, (N, L), losses = next(model.parameters()).device, val.shape, []
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.from_numpy(val.astype(np.int64)).to(device)  # [N, L]
    for draw in range(draws):
        ks = 1 + (torch.arange(N, device=device) * draws + draw) % L  # [N]
        for x0, k in zip(rows.split(64), ks.split(64)):
            masked = scmdm.uniform(x0.shape, device, generator).argsort(1).argsort(1) < k[:, None]  # [b, L]
            xt = torch.where(masked, model.mask_id, x0)
            x0_prev = None
            if model.config.self_conditioning:
                x0_prev = without_mask(model(xt), model.mask_id).softmax(-1)
            losses.append(masked_nll(model(xt, x0_prev), x0, masked, model.mask_id) / k)
    return torch.cat(losses).mean().item()


# ---------------------------------------------------------------------------------------------
# The stages
# ---------------------------------------------------------------------------------------------


def arms_of(args):
    """[(file name, rate, unroll, steps)] of what is to be trained."""
    (pretrain, adapt), unroll = args.default["steps"], args.default["unroll"]
    if args.stage == "pretrain":
        rate, K = (args.rates or [0])[0], (args.unroll or [1])[0]
        name = f"scratch-rate{rate:g}" if rate else "base"
        return [(name + (f"-unroll{K}" if K > 1 else ""), rate, K, args.steps or pretrain)]
    arms, chains, steps = [], args.unroll or [1, unroll], args.steps or adapt
    for rate in args.rates or [0, 1]:
        for K in chains if rate else [1]:
            arms.append((f"rate{rate:g}" + (f"-unroll{K}" if K > 1 else ""), rate, K, steps))
    return arms


def main():
    args = parse()
    device = pick_device(args.device)
    rank, world = processes()
    if args.batch_size % world or world > 1 and args.batch_size == world:
        fail(f"--batch-size is {args.batch_size}, expected a multiple of {world}, 2 or more for each process")
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    domain = data.get(args.data, args.lines, args.length, args.vocab)
    out = Path(args.out or f"runs/{domain.name}")
    out.mkdir(parents=True, exist_ok=True)
    train, val = domain.load()
    val = windows(val, domain.length, 256)
    began, content = time.time(), zlib.crc32(np.ascontiguousarray(train))

    def train_as(name, model, loss_of, steps, lr, seed, **made_from):
        """Train the model and save it under this name in OUT, unless that has been done; then validate it."""
        path, state = out / f"{name}.npz", out / f"{name}.state"
        if (path.exists() or state.exists()) and not args.resume:
            fail(f"{path} is there already, or begun: --resume goes on with it, another --out starts anew")
        settings = {key: getattr(args, key) for key in ("batch_size", "weight_decay", "dtype")}
        what = {"data": domain.name, "content": content, "seed": seed, "steps": steps} | settings | made_from
        if not path.exists():
            model = optimise(model.to(device), loss_of, train, args, steps, lr, seed, state, what)
            if rank == 0:
                keys = ("vocab", "length", "end", "join", "source")
                remembered = {"data": domain.name} | {key: getattr(domain, key) for key in keys}
                save(path, model.half(), **remembered, made_from=what, lr=lr)
                state.unlink(missing_ok=True)
            if world > 1:
                dist.barrier()
        model = load(path, device).eval()  # what is measured is what the file holds
        same_run(path, model.info.get("made_from", {}), what)
        if rank == 0:
            print(f"{name}: validation {validate(model, val):.4f} nats per token")

    def new(**kind):
        """A model from nothing. Rows have a beginning, windows of a stream do not."""
        torch.manual_seed(args.seed)
        sizes = (len(domain.vocab), domain.length, args.dim, args.depth, args.heads)
        return Transformer(Config(*sizes, positions=train.ndim == 2, **kind))

    shape = {"shape": [args.dim, args.depth, args.heads]}
    if args.stage == "pretrain":
        (name, rate, K, steps), lr = arms_of(args)[0], args.lr or LR["pretrain"]
        model, made_from = new(self_conditioning=rate > 0), {"rate": rate, "unroll": K} | shape
        train_as(name, model, diffusion_at(rate, K), steps, lr, args.seed, **made_from)
        return

    # --- adapt, the main job. First a base: Sudoku's is made from nothing, which takes minutes ---
    ours = out / "base.npz"
    path = args.init or find_model(out, None if domain.name == "sudoku" else domain.name, "base")
    if path is None:
        made_from = {"rate": 0, "unroll": 1} | shape
        steps, lr = args.default["steps"][0], LR["pretrain"]
        train_as("base", new(), diffusion_at(0), steps, lr, args.seed, **made_from)
        path = ours
    base, crc = load(path, device), zlib.crc32(Path(path).read_bytes())
    if base.config.self_conditioning or base.config.causal:
        fail(f"{path}: not a base, but a model that is adapted already, or a causal one")
    if base.info.get("vocab") != domain.vocab or base.config.length != domain.length:
        lengths = f"length {base.config.length} where {domain.length} is expected"
        fail(f"{path}: a base of other tokens than {args.data}, or of another length ({lengths})")
    if path == ours and base.info.get("made_from", {}).get("content") != content:
        fail(f"{path}: a base of other data of the same name; --init takes it, another --out makes a new one")
    if rank == 0:  # a copy of the base in OUT, so that the models there can be compared with it
        if not ours.exists():
            shutil.copy(path, ours.with_suffix(".tmp"))
            ours.with_suffix(".tmp").replace(ours)
        if zlib.crc32(ours.read_bytes()) != crc:
            fail(f"--init {path}: {ours} is another base, expected an --out without one")

    # --- then each arm from that base ---
    for name, rate, K, steps in arms_of(args):
        name += f"-seed{args.seed}" if args.seed else ""
        model = add_self_conditioning(base) if rate else copy.deepcopy(base)
        lr = args.lr or (args.default["lr"] if rate else LR["control"])
        train_as(name, model, diffusion_at(rate, K), steps, lr, args.seed, rate=rate, unroll=K, base=crc)

    # --- and a sample of all that lies in OUT ---
    if rank == 0 and not args.no_table:
        models = load_models(models_in(out), domain, device)
        shown = {label(arm): model for (arm, seed), model in models.items() if seed in (0, args.seed)}
        canvas = torch.full((1, domain.length), len(domain.vocab), device=device)
        show(shown, domain, canvas, args.default["calls"], args.seed)
        print(f"\nIn all {clock(time.time() - began)}. Measure it: python -m data.study.bench {out}")


if __name__ == "__main__":
    try:
        run(main)
    except KeyboardInterrupt:
        words = [word for word in sys.argv if word != "--resume"] + ["--resume"]
        command = shlex.join(["python", *words])
        fail(f"interrupted, at most a minute of training is lost; go on with:\n{command}", 130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
