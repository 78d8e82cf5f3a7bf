"""Train: pretrain a base, adapt it with self-conditioning (the main job), or train the judge.

    python train.py                          adapt the shipped text model, print vanilla against SCMDM
    python train.py --stage pretrain         the vanilla masked diffusion model everything starts from
    python train.py --stage judge            an autoregressive model, for generative perplexity
    torchrun --nproc_per_node=8 train.py     any of these, over several GPUs or processes

This file is optimisation and nothing else: the method is in scmdm.py, the measures in sample.py.
"""

import argparse
import atexit
import copy
import math
import os
import shlex
import shutil
import signal
import statistics
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
from sample import (
    clock,
    draw_results,
    evaluate,
    fail,
    find_model,
    judge_nll,
    load_judge,
    mean_interval,
    pick_device,
    print_table,
    run,
    status,
    table_of,
    windows,
)
from scmdm import (
    Config,
    Transformer,
    add_self_conditioning,
    diffusion_loss,
    load,
    load_arrays,
    save,
    save_arrays,
)

# What each stage does by default, and why.
STEPS = {
    "pretrain": 12000,  # text: an hour on two cores; the validation bound still falls slowly at its end
    "adapt": 1000,  # the main job, with its table, in under ten minutes on two cores
    "judge": 4000,  # a causal model learns from every position at once, and needs fewer
}
LR = {
    "pretrain": 2e-3,  # small models like large steps
    "adapt": 1e-3,  # lower: the base is already good, and the new matrix starts at zero
    "judge": 2e-3,
}
ARMS = {  # name of the row: (self-conditioning rate, None for the base as it is; file)
    "vanilla": (None, "base"),
    "vanilla, trained on": (0.0, "continued"),
    "SCMDM rate 0.5": (0.5, "partial"),
    "SCMDM rate 1": (1.0, "scmdm"),
}


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = fail
    a = p.add_argument
    a("--stage", choices=STEPS, default="adapt", help="what to train (default: adapt)")
    a("--data", default="text", help=f"one of {', '.join(data.NAMES)}, or a file: UTF-8 text, or .npy [N, L]")
    a("--lines", action="store_true", help="the file is one sequence a line, not one long text")
    a("--arms", choices=("two", "all"), default="two", help="adapt: rate 1 alone, or also the controls (default: two)")
    a("--self-cond-rate", type=float, help="adapt: train this rate alone; 1 is the method, 0 is the control")
    a("--steps", type=int, help=f"optimiser steps (default: {', '.join(f'{v} to {k}' for k, v in STEPS.items())})")
    a("--batch-size", type=int, default=32, help="sequences a step, over all processes (default: 32)")
    a("--lr", type=float, help="peak learning rate (default: %s)" % ", ".join(f"{v:g} to {k}" for k, v in LR.items()))
    a("--weight-decay", type=float, default=0.05, help="of the matrices; for small data (default: 0.05)")
    a("--dim", type=int, default=128, help="pretrain, judge: width of the model (default: 128)")
    a("--depth", type=int, default=4, help="pretrain, judge: blocks (default: 4)")
    a("--heads", type=int, default=4, help="pretrain, judge: attention heads (default: 4)")
    a("--seed", type=int, default=0, help="of weights, batches and noise (default: 0)")
    a("--seeds", type=int, default=1, help="adapt: train with so many seeds, from --seed on, for one table (default: 1)")
    a("--device", default="auto", help="auto, cpu, cuda or mps (default: auto, the fastest there is)")
    a("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matrix products (default: float32)")
    a("--compile", action="store_true", help="torch.compile: a minute to start, a fifth faster; needs a C++ compiler")
    a("--init", help="adapt: the base to start from (default: OUT/base.npz, else the one shipped in data/)")
    a("--out", help="folder of the trained models (default: runs/NAME)")
    a("--resume", action="store_true", help="go on from the state that an interrupted run left in OUT")
    a("-n", type=int, default=32, help="adapt: sequences a seed in the table (default: 32)")
    a("--eval-seeds", type=int, default=3, help="adapt: sampling seeds in the table; 0 for no table (default: 3)")
    a("--eval-steps", type=int, nargs="+", default=[16, 64, 128], help="adapt: denoiser calls (default: 16 64 128)")
    args = p.parse_args()
    args.steps = STEPS[args.stage] if args.steps is None else args.steps
    args.lr = LR[args.stage] if args.lr is None else args.lr
    for flag in ("--steps", "--batch-size", "-n", "--dim", "--depth", "--heads", "--seeds"):
        value = getattr(args, flag.strip("-").replace("-", "_"))
        if value < 1:
            fail(f"{flag} is {value}, expected 1 or more")
    args.eval_steps = sorted(set(args.eval_steps))
    if min(args.eval_steps) < 1:
        fail(f"--eval-steps is {min(args.eval_steps)}, expected 1 or more")
    if not 0 < args.lr < math.inf:
        fail(f"--lr is {args.lr}, expected more than 0")
    if not 0 <= args.weight_decay < math.inf:
        fail(f"--weight-decay is {args.weight_decay}, expected 0 or more")
    if not 0 <= args.seed < 2**31:
        fail(f"--seed is {args.seed}, expected 0 to 2**31 - 1")
    if args.eval_seeds < 0:
        fail(f"--eval-seeds is {args.eval_seeds}, expected 0 or more")
    adapting = {"--self-cond-rate": args.self_cond_rate, "--init": args.init, "--seeds": args.seeds > 1, "--arms": args.arms == "all"}
    for flag, given in adapting.items():
        if given not in (None, False) and args.stage != "adapt":
            fail(f"{flag} with --stage {args.stage}: it is for --stage adapt")
    if args.self_cond_rate is not None and args.arms == "all":
        fail("--self-cond-rate with --arms all: expected one of the two")
    if args.self_cond_rate is not None and not 0 <= args.self_cond_rate <= 1:
        fail(f"--self-cond-rate is {args.self_cond_rate}, expected a number from 0 to 1")
    return args


# ---------------------------------------------------------------------------------------------
# One optimisation run
# ---------------------------------------------------------------------------------------------


def processes():
    """(which process this is, of how many), as torchrun says in the environment."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def batch_of(train, length, size, generator):
    """A random batch [size, length] of int64 tokens: windows of a stream [N], or rows of [N, L]."""
    if train.ndim == 1:
        start = torch.randint(len(train) - length + 1, (size,), generator=generator).numpy()
        rows = train[start[:, None] + np.arange(length)]
    else:
        rows = train[torch.randint(len(train), (size,), generator=generator).numpy()]
    return torch.from_numpy(rows.astype(np.int64))


def state_arrays(parameters, averages, optimiser):
    """What a state file holds of a run, a plain .npz too: for each parameter its value, average and Adam's two moments."""
    arrays = {}
    for (n, p), e in zip(parameters.items(), averages):
        arrays |= {f"value/{n}": p.data, f"average/{n}": e}
        arrays |= {f"{k}/{n}": optimiser.state[p][k] for k in ("exp_avg", "exp_avg_sq")}
    return arrays


def save_state(path, step, run, *of):
    arrays = {name: tensor.cpu().numpy() for name, tensor in state_arrays(*of).items()}
    save_arrays(path, arrays, {"step": step, "run": run})


def load_state(path, run, parameters, averages, optimiser):
    """Put a state back where it was saved from; returns its step. Raises ValueError if it is not of this `run`."""
    arrays, header = load_arrays(path)
    found, step = header.get("run"), header.get("step")
    if not isinstance(found, dict) or type(step) is not int:
        raise ValueError(f"--resume: {path} is not the state of a run")
    if differs := {k: f"{found.get(k)}, expected {v}" for k, v in run.items() if found.get(k) != v}:
        raise ValueError(f"--resume: {path} is of another run: {differs}")
    for p in parameters.values():
        optimiser.state[p] = {"step": torch.tensor(float(step))} | {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
    tensors = state_arrays(parameters, averages, optimiser)
    if {name: array.shape for name, array in arrays.items()} != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ValueError(f"--resume: {path} does not hold the arrays of this model")
    for name, tensor in tensors.items():
        tensor.copy_(torch.from_numpy(arrays[name]))
    return step


def optimise(model, loss_of, train, args, name, out, **more):
    """Minimise loss_of(model, x0 [B, L], generator) -> [B] nats a sequence. Returns the model's moving average.

    AdamW, warm-up and cosine decay, gradient clipping. The randomness of step k is a function of
    (seed, k, process) alone, so a resumed run is equal to one that was never stopped. Hosts that train
    together share the folder `out`. `more` is what else a run must have in common with the one it resumes.
    """
    rank, world = processes()
    device = next(model.parameters()).device
    length = model.config.length
    generators = torch.Generator(), torch.Generator(device)  # of batches (always on the CPU), of noise
    average = copy.deepcopy(model).requires_grad_(False)
    parameters, averages = dict(model.named_parameters()), list(average.parameters())
    matrices = {n: p for n, p in parameters.items() if p.ndim == 2 and "embed" not in n}
    others = {n: p for n, p in parameters.items() if n not in matrices}
    optimiser = torch.optim.AdamW(
        [
            {"params": matrices.values(), "weight_decay": args.weight_decay},
            {"params": others.values(), "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(0.9, 0.98),  # a short memory of squared gradients: the 1/t weight makes them uneven
    )

    state = out / f"{name}.state.npz"
    # What a run must have in common with the one it resumes. The learning rate may change: after a NaN, say.
    run = {k: getattr(args, k) for k in ("stage", "steps", "batch_size", "weight_decay", "seed", "dtype")}
    run |= {"config": asdict(model.config), "data": zlib.crc32(np.ascontiguousarray(train)), "processes": world} | more
    first = 0
    if args.resume and state.exists():
        first = load_state(state, run, parameters, averages, optimiser)
        if rank == 0:
            print(f"{name}: resumed at step {first}")
    elif state.exists():
        raise ValueError(f"{state}: an interrupted run; go on with --resume, or delete it, or choose another --out")
    elif args.resume and rank == 0:
        print(f"{name}: nothing to resume in {out}, from the start")

    # ^C is heard between two steps, so that what is saved is the state after a whole one; a second ^C at once.
    # SIGTERM too: it is how torchrun passes ^C on.
    stopped = torch.zeros(1)

    def hear_again():
        for number, handler in heard.items():
            signal.signal(number, handler)

    def stop(*_):
        stopped.fill_(1)
        hear_again()

    heard = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}

    if args.compile:
        if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            raise ValueError("--compile: no C++ compiler found, expected g++, clang++ or the one that CXX names")
        model.compile()
    warmup = max(1, min(args.steps // 20, 200))
    running, last_line = None, 0.0
    for step in range(first, args.steps):
        for kind, g in enumerate(generators):  # hashed, because PyTorch's CPU generator reads only the low 32 bits of a seed
            g.manual_seed(int(np.random.SeedSequence((args.seed, kind, step, rank)).generate_state(1)[0]))
        x0 = batch_of(train, length, args.batch_size // world, generators[0]).to(device)

        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = loss_of(model, x0, generators[1]).mean() / length  # nats a token
        optimiser.zero_grad()
        loss.backward()
        if world > 1:  # in one message: the mean gradient over the processes, and whether one of them was stopped
            flat = torch.cat([*(p.grad.flatten() for p in parameters.values()), stopped.to(device)])
            dist.all_reduce(flat)
            for p, g in zip(parameters.values(), flat.split([p.numel() for p in parameters.values()] + [1])):
                p.grad.copy_(g.view_as(p) / world)
            stopping = bool(flat[-1])
        else:
            stopping = bool(stopped)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        if not torch.isfinite(norm):  # nothing has been changed yet: the state before this step is good
            if first < step and rank == 0:
                save_state(state, step, run, parameters, averages, optimiser)
            kept = f"the last good state is in {state}" if step > 0 else "nothing was saved"
            hear_again()
            found = f"loss {loss.item()}, gradient {norm.item()}"
            raise ValueError(f"{name}: stopped at step {step}, {found}; {kept}; --resume with a lower --lr may do better")

        lr = args.lr * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimiser.param_groups:
            group["lr"] = lr
        optimiser.step()
        decay = min(0.999, (step + 1) / (step + 10))  # shorter at first, to forget where it started
        torch._foreach_lerp_(averages, [p.detach() for p in parameters.values()], 1 - decay)

        stopping = stopping and step + 1 < args.steps  # after the last step there is nothing to go on with
        if rank == 0 and step + 1 < args.steps and ((step + 1) % 500 == 0 or stopping):
            save_state(state, step + 1, run, parameters, averages, optimiser)

        # One status line: the loss is a moving average, because that of one batch says little.
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        now = time.time()
        every = 0.5 if sys.stdout.isatty() else 20  # seconds; a log file needs fewer lines
        if step == first:
            began = now  # the first step, slower by a compilation at times, says nothing of the others
        elif rank == 0 and (now - last_line > every or step + 1 == args.steps):
            speed = (step - first) / (now - began)
            status(
                f"{name} step {step + 1}/{args.steps}  {clock((args.steps - step - 1) / speed)} left  loss {running:.4f} nats/token"
                f"  {speed * args.batch_size * length:,.0f} tokens/s  {1000 / speed:.0f} ms/step",
                last=step + 1 == args.steps,
            )
            last_line = now
        if stopping:
            if rank == 0:
                words = shlex.join([sys.executable, *(w for w in sys.argv if w != "--resume")])
                words = words if world == 1 else "the same command and"
                print(f"\nsaved {state}; go on with: {words} --resume")
            sys.exit(130)
    hear_again()
    return average


# ---------------------------------------------------------------------------------------------
# Validation
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(model, val, rate, seed=0, batch=64, bins=10):
    """(NELBO in nats a token, [bins] of it by time) over the windows val [N, L], at rate 0 or 1.

    The times are spread evenly, (i + u) / N, and shuffled over the windows; times, masks and windows
    are the same for every model. The bound of a bin of times is the mean loss, in nats, of a masked token there.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    rng = np.random.default_rng(seed)
    t = (rng.permutation(len(val)) + rng.random(len(val))) / len(val)
    t = torch.tensor(t, dtype=torch.float32, device=device)  # [N]
    losses = []
    for i in range(0, len(val), batch):
        x0 = torch.from_numpy(val[i : i + batch].astype(np.int64)).to(device)
        losses.append(
            diffusion_loss(model, x0, model.mask_id, self_cond_rate=rate, generator=generator, t=t[i : i + batch])
        )
    losses = torch.cat(losses) / val.shape[1]  # [N] nats a token
    by_time = [losses[(t * bins).long() == k].mean().item() for k in range(bins)]  # NaN for a bin without windows
    return losses.mean().item(), by_time


@torch.no_grad()
def validate_judge(model, val, batch=64):
    """Cross-entropy of a causal model over val [N, L], nats a token."""
    device = next(model.parameters()).device
    rows = torch.from_numpy(val.astype(np.int64)).to(device)
    return torch.cat([judge_nll(model, x) for x in rows.split(batch)]).mean().item() / val.shape[1]


def report(name, nelbo, by_time):
    print(f"{name}: validation NELBO {nelbo:.4f} nats/token = {nelbo / math.log(2):.4f} bits/token")
    print("   by time, t = 0 (clean) to 1 (all masked): " + " ".join("-" if math.isnan(b) else f"{b:.2f}" for b in by_time))


# ---------------------------------------------------------------------------------------------
# The stages
# ---------------------------------------------------------------------------------------------


def diffusion_at(rate):
    return lambda model, x0, generator: diffusion_loss(
        model, x0, model.mask_id, self_cond_rate=rate, generator=generator
    )


def main():
    args = parse()
    device = pick_device(args.device)
    rank, world = processes()
    if args.batch_size % world:
        fail(f"--batch-size is {args.batch_size}, expected a multiple of the {world} processes")
    if world > 1:
        # The optimiser imports this. After the group is made, it would keep the group alive past its
        # end, and with it Gloo's threads: of which one may still hold a tensor when the interpreter goes.
        from torch import _dynamo  # noqa: F401

        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    domain = data.get(args.data, args.lines)
    name = domain.__name__.removeprefix("data.")
    out = Path(args.out or f"runs/{name}")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        fail(f"--out {out}: cannot be written to")
    train, val = domain.load()
    held_out = windows(val, domain.length)
    val = windows(val, domain.length, 1000)  # as many as validation has time for
    # what the model file remembers, so that sampling needs no data file
    info = {"data": name, "vocab": domain.vocab, "length": domain.length, "end": getattr(domain, "end", None)}
    info["join"] = getattr(domain, "join", "")
    info |= {"stage": args.stage, "steps": args.steps, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
    torch.manual_seed(args.seed)

    def finish(model, folder, file, **more):
        model.half()  # half the size; what is measured from here on is what the file holds
        if rank == 0:
            save(folder / f"{file}.npz", model, **info, **more)
            (folder / f"{file}.state.npz").unlink(missing_ok=True)
            print(f"saved {folder / file}.npz")
        model.float().eval()

    if args.stage in ("pretrain", "judge"):
        causal = args.stage == "judge"
        config = Config(len(domain.vocab), domain.length, args.dim, args.depth, args.heads, causal=causal)
        config.positions = train.ndim == 2  # rows have a beginning, windows of a stream do not
        model = Transformer(config).to(device)
        size = sum(p.numel() for p in model.parameters())
        if rank == 0:
            print(f"{args.stage} on {name}: {size:,} parameters, {train.size:,} tokens, {args.steps} steps on {device}")
        if causal:
            model = optimise(model, lambda m, x0, _: judge_nll(m, x0), train, args, "judge", out)
            finish(model, out, "judge")
            loss = validate_judge(model, val)
            if rank == 0:
                print(f"judge: validation {loss:.4f} nats/token, perplexity {math.exp(loss):.3f}")
        else:
            model = optimise(model, diffusion_at(0.0), train, args, "base", out)
            finish(model, out, "base")
            if rank == 0:
                report("base", *validate(model, val, 0.0))
        return

    # --- adapt: the main job ---
    path = args.init or find_model(out, name, "base")
    if path is None:
        fail(f"no base to adapt in {out}: train one with --stage pretrain, or name one with --init")
    base = load(path, device).eval()
    if base.config.self_conditioning or base.config.causal:
        fail(f"--init {path}: a model of stage {base.info.get('stage')}, expected a base")
    if base.info.get("vocab") != domain.vocab or base.config.length != domain.length:
        fail(f"--init {path}: of other tokens than --data {args.data}, or of another length; with or without --lines?")
    content, ours = Path(path).read_bytes(), out / "base.npz"
    info |= {"weight_decay": args.weight_decay, "dtype": args.dtype, "base": zlib.crc32(content)}
    judge = load_judge(out, domain, name, device)

    arms = {arm: row for arm, row in ARMS.items() if args.arms == "all" or arm in ("vanilla", "SCMDM rate 1")}
    if args.self_cond_rate is not None:
        known = {rate: arm for arm, (rate, _) in ARMS.items()}
        arm = known.get(args.self_cond_rate, f"SCMDM rate {args.self_cond_rate:g}")
        arms = {"vanilla": ARMS["vanilla"], arm: ARMS.get(arm, (args.self_cond_rate, "scmdm"))}
    began = time.time()
    if rank == 0:
        if not ours.exists():  # sample.py --models OUT compares with the base that was adapted
            ours.with_suffix(".tmp").write_bytes(content)
            ours.with_suffix(".tmp").replace(ours)
        elif ours.read_bytes() != content:
            fail(f"--init {path}: {ours} is another base, expected an --out without one")
        runs = (len(arms) - 1) * args.seeds
        print(f"adapt {path}: {runs} run(s) of {args.steps} steps on {device}, then a table of {len(arms)} models.")
        print("With the defaults this takes at most 10 minutes on two CPU cores; ^C saves and says how to resume.")

    trained, nelbos = {}, {}
    for seed in range(args.seed, args.seed + args.seeds):
        folder = out if seed == args.seed else out / f"seed{seed}"
        folder.mkdir(exist_ok=True)
        settings = argparse.Namespace(**{**vars(args), "seed": seed})
        info["seed"] = seed
        models = trained[seed] = {"vanilla": base}
        for arm, (rate, file) in arms.items():
            done = folder / f"{file}.npz"
            if rate is not None and args.resume and done.exists() and not (folder / f"{file}.state.npz").exists():
                models[arm] = load(done, device).eval()  # a resumed run does not train again what it had finished
                if not {**info, "self_cond_rate": rate}.items() <= models[arm].info.items():
                    fail(f"--resume: {done} is of a run with other settings; without --resume it is trained again")
            elif rate is not None:
                model = add_self_conditioning(base) if rate > 0 else copy.deepcopy(base)
                more = {"rate": rate, "base": info["base"]}
                models[arm] = optimise(model, diffusion_at(rate), train, settings, file, folder, **more)
                finish(models[arm], folder, file, self_cond_rate=rate)
            elif arm in nelbos:
                continue  # the base is one model, whatever the seed
            nelbo, by_time = validate(models[arm], val, 1.0 if rate else 0.0)
            nelbos.setdefault(arm, []).append(nelbo)
            if rank == 0:
                report(arm, nelbo, by_time)
                if rate:
                    report(f"{arm}, signal switched off", *validate(models[arm], val, 0.0))

    if rank == 0 and args.eval_seeds:
        results = {}
        for seed, models in trained.items():
            sampling = range(seed * args.eval_seeds, (seed + 1) * args.eval_seeds)
            for key, rows in evaluate(models, domain, held_out, judge, args.n, args.eval_steps, sampling, device).items():
                if args.seeds > 1:  # one value a training seed, so that the interval is over those
                    rows = [{measure: statistics.mean(row[measure] for row in rows) for measure in rows[0]}]
                results.setdefault(key, []).extend(rows)
        print()
        bounds = {arm: mean_interval(values, digits=4) for arm, values in nelbos.items()}
        print_table([{"model": row["model"], "NELBO": bounds.get(row["model"], "")} | row for row in table_of(results)])
        seeds = f"{args.seeds} training" if args.seeds > 1 else f"{args.eval_seeds} sampling"
        print(f"NELBO in nats a token; intervals are 95%, over {seeds} seeds. In all: {clock(time.time() - began)}")
        print(draw_results(results, out / "results.png"))
        if "SCMDM rate 1" in arms:
            script = str(Path(__file__).with_name("sample.py"))
            print(f"Look at what it writes: {shlex.join([sys.executable, script, '--models', str(out)])}")


if __name__ == "__main__":
    run(main)
