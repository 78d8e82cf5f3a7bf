"""Train: a base, then from it the control and SCMDM, then a small table. The method is in scmdm.py.

    python train.py                       Sudoku from scratch; it takes minutes
    python train.py --data text           adapt the text model that is in data/models/
    python train.py --data novel.txt      your own file: a base first, which takes longer
    torchrun --nproc_per_node=2 train.py  several processes share each batch

The models of a run are in one folder, --out: base.npz, rate0.npz (the control: the base trained further for
as many iterations without a signal), rate1.npz (SCMDM as in the paper) and rate1-unroll8.npz (SCMDM,
unrolled). During training the state is kept once a minute in NAME.state, and --resume goes on from there.
"""

import argparse
import copy
import math
import os
import shlex
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
from data import BadInput, windows
from data.terminal import Progress, clock, number, run
from sample import SHIPPED, compare, load_models, models_in, pick_device, read_model
from scmdm import Config, Transformer, add_self_conditioning, diffusion_loss, masked_nll, save
from scmdm import uniform, without_mask

# --- Defaults ----------------------------------------------------------------------------------------------
# Options override them. A file of your own is trained like text.

DEFAULTS = {  # sizes of the model, sequences per iteration, and iterations of pretraining and adaptation
    "sudoku": dict(dim=64, depth=3, heads=4, batch_size=32, pretrain=4000, adapt=700),
    "text": dict(dim=128, depth=4, heads=4, batch_size=32, pretrain=12000, adapt=1000),
    "molecules": dict(dim=128, depth=4, heads=4, batch_size=128, pretrain=8000, adapt=1000),
    "images": dict(dim=128, depth=4, heads=4, batch_size=32, pretrain=4000, adapt=750),
    "dna": dict(dim=128, depth=4, heads=4, batch_size=32, pretrain=3000, adapt=1000),
}
UNROLL = [1, 8]  # the paper's recipe, and the value that we recommend
LR_PRETRAIN = 2e-3  # peak learning rates: small models like large ones
LR_CONTROL = 5e-4  # without a signal, a larger rate would undo what the base has learnt
LR_SIGNAL = {"sudoku": 2e-3}  # with a signal; elsewhere 1e-3
BETAS = (0.9, 0.98)  # the scale of the gradients is soon forgotten, because the weight 1/t makes it jump
WEIGHT_DECAY = 0.05  # of matrices, not of embeddings and norms
WARMUP = 200  # iterations, or a twentieth of the run if that is less
AVERAGE = 0.999  # decay of the moving average of the weights, which is what is kept
STATE_EVERY = 60  # seconds: a run that is killed loses at most this much


# --- The training loop -------------------------------------------------------------------------------------


def fit(model, loss_of, train, state, settings, lr, compiled=False):
    """Minimise loss_of(model, x0 [b, L], generator) -> [b] nats. Returns the moving average of the model.

    train is a stream [N] of tokens, of which any window may be in a batch, or rows [N, L]. settings has the
    "iters", "batch_size", "seed" and "dtype". state is the file in which the run is kept. If it exists, and
    has the same settings, the run goes on from it, to the weights of an unbroken run. With several processes
    each takes its share of the batch.
    """
    rank, world = processes()
    iters, batch_size = settings["iters"], settings["batch_size"]
    device, L = next(model.parameters()).device, model.config.length
    if train.ndim == 1:
        train = np.lib.stride_tricks.sliding_window_view(train, L)  # [N - L + 1, L], a view
    average = copy.deepcopy(model).requires_grad_(False)
    optimiser = make_optimiser(model, lr)
    parts = {"model": model, "average": average, "optimiser": optimiser}
    first = begin(state, settings, parts)
    if compiled:
        model.compile()
    denoiser = DistributedDataParallel(model) if world > 1 else model
    live, kept = list(model.parameters()), list(average.parameters())
    progress, running, saved = Progress(f"{state.stem}: iteration", iters, batch_size * L), None, time.time()

    for k in range(first, iters):
        # 1. Batch. Its randomness depends on (seed, k, rank) alone, so a resumed run repeats nothing.
        pick, noise = generators(settings["seed"], k, rank, device)
        rows = torch.randint(len(train), (batch_size // world,), generator=pick).numpy()
        x0 = torch.from_numpy(train[rows].astype(np.int64)).to(device)  # [b, L]

        # 2. Loss, in nats per token.
        with torch.autocast(device.type, torch.bfloat16, enabled=settings["dtype"] == "bfloat16"):
            loss = loss_of(denoiser, x0, noise).mean() / L

        # 3. Gradient, clipped to norm 1. With several processes DDP averages their gradients in backward.
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(live, 1.0)
        if not torch.isfinite(norm):
            raise BadInput(
                f"{state.stem}: the loss became {loss.item():.3g} at iteration {k};"
                " --resume with a lower --lr goes on from the last state"
            )

        # 4. Update.
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(k, iters, lr)
        optimiser.step()

        # 5. Average. Its memory is short at first, to forget the initial weights.
        decay = min(AVERAGE, (k + 1) / (k + 10))
        torch._foreach_lerp_(kept, [p.detach() for p in live], 1 - decay)

        value = loss.item()
        running = value if running is None else 0.98 * running + 0.02 * value  # one batch says little
        if rank == 0:
            progress.update(k + 1, f"loss {running:.4f} nats per token")
            if time.time() - saved > STATE_EVERY:
                save_state(state, k + 1, settings, parts)
                saved = time.time()
    return average


def make_optimiser(model, lr):
    """AdamW, with weight decay on the matrices only."""
    decayed = {name: p.ndim == 2 and "embed" not in name for name, p in model.named_parameters()}
    matrices = [p for name, p in model.named_parameters() if decayed[name]]
    others = [p for name, p in model.named_parameters() if not decayed[name]]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS)


def learning_rate(k, iters, peak):
    """Linear warm-up, then a cosine to zero, at iteration k = 0, 1, ..."""
    warmup = max(1, min(iters // 20, WARMUP))
    return peak * min((k + 1) / warmup, 0.5 * (1 + math.cos(math.pi * k / iters)))


def generators(seed, k, rank, device):
    """Return the generators of iteration k: one that picks the batch, on the CPU, and one for the noise."""
    pick, noise = np.random.SeedSequence((seed, k, rank)).generate_state(2).tolist()
    return torch.Generator().manual_seed(pick), torch.Generator(device).manual_seed(noise)


def processes():
    """Return (which process this is, how many there are), as torchrun says in the environment."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# --- The state of a run ------------------------------------------------------------------------------------


def begin(path, settings, parts):
    """Return the first iteration: 0, or that of the state file, from which `parts` are then restored.

    A new run writes its state at once. So a folder that cannot be written is noticed before training, and a
    second run that is started in the same folder finds the file and stops.
    """
    resumed = path.exists()
    if dist.is_initialized():
        dist.barrier()  # all processes have looked before the first one writes
    if not resumed:
        if processes()[0] == 0:
            try:
                path.touch(exist_ok=False)
            except OSError as error:
                raise BadInput(f"{path}: {error.strerror}") from None
            save_state(path, 0, settings, parts)
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found, k = state["settings"], state["iteration"]
    except Exception as error:  # a damaged file raises nearly anything
        what = f"not the state of a run, or a damaged one ({type(error).__name__})"
        raise BadInput(f"{path}: {what}; delete it to start again") from None
    expect_settings(path, found, settings)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return k


def save_state(path, k, settings, parts):
    """Write the state under another name, then rename it. A full disk is a warning, and the run goes on."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    content = {name: part.state_dict() for name, part in parts.items()}
    content |= {"iteration": k, "settings": settings}
    try:
        torch.save(content, temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch's zip writer raises the second
        reason = str(error).splitlines()[0]
        print(f"\nwarning: {path} could not be written ({reason}); the run goes on", file=sys.stderr)
    finally:
        temporary.unlink(missing_ok=True)


def expect_settings(path, found, settings):
    """Stop if a file was made with other settings than those of this run; the learning rate may differ."""
    older = {"processes": 1, "iters": found.get("steps")}  # what older files call otherwise
    found = older | found
    differ = [f"{key} is {found.get(key)}, now {value}" for key, value in settings.items()
              if found.get(key) != value]  # fmt: skip
    if differ:
        raise BadInput(f"{path} belongs to another run: {'; '.join(differ)}. Another --out keeps both")


# --- Validation --------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(model, val, batch_size, draws=8):
    """Return the NELBO of val [N, L] in nats per token: of both passes if the model is adapted.

    Exactly k of the L positions are masked, with k = 1..L in turn, which varies less than a random time does.
    The weight of a sequence is 1/k: the chance that k are masked at t, times 1/t, integrated over t.
    All models are given the same masks.
    """
    device, (N, L), losses = next(model.parameters()).device, val.shape, []
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.from_numpy(val.astype(np.int64)).to(device)  # [N, L]
    for j in range(draws):
        ks = 1 + (torch.arange(N, device=device) * draws + j) % L  # [N]
        for x0, k in zip(rows.split(batch_size), ks.split(batch_size)):
            order = uniform(x0.shape, device, generator).argsort(1).argsort(1)  # [b, L]
            masked = order < k[:, None]  # [b, L]
            xt = torch.where(masked, model.mask_id, x0)
            x0_prev = None
            if model.config.self_conditioning:
                x0_prev = without_mask(model(xt), model.mask_id).softmax(-1)
            losses.append(masked_nll(model(xt, x0_prev), x0, masked, model.mask_id) / k)
    return torch.cat(losses).mean().item()


# --- The stages --------------------------------------------------------------------------------------------


def train_as(name, model, rate, unroll, domain, out, args, iters, lr, **made_from):
    """Train the model with the method's loss, write it to out/name.npz, and print its validation loss.

    A finished file is kept, if its settings are those of this run. made_from is added to the settings.
    """
    (rank, world), (train, val) = processes(), domain.load()
    path, state = out / f"{name}.npz", out / f"{name}.state"
    if (path.exists() or state.exists()) and not args.resume:
        raise BadInput(f"{path} is there or begun: --resume goes on with it, another --out starts anew")
    settings = {"data": domain.name, "content": checksum(train), "seed": args.seed, "iters": iters}
    settings |= {"batch_size": args.batch_size, "weight_decay": WEIGHT_DECAY, "dtype": args.dtype}
    settings |= {"processes": world, "rate": rate, "unroll": unroll} | made_from

    def loss_of(denoiser, x0, generator):
        signal = {"self_cond_rate": rate, "unroll": unroll}
        return diffusion_loss(denoiser, x0, model.mask_id, **signal, generator=generator)

    if not path.exists():
        average = fit(model, loss_of, train, state, settings, lr, args.compile)
        if rank == 0:
            keys = ("vocab", "length", "end", "join", "source")
            info = {"data": domain.name} | {key: getattr(domain, key) for key in keys}
            try:
                save(path, average.half(), **info, made_from=settings, lr=lr)
            except OSError as error:
                raise BadInput(f"{path}: {error.strerror}; --resume goes on when there is room") from None
            state.unlink(missing_ok=True)
    if rank == 0:
        model = read_model(path, next(model.parameters()).device)  # what is measured is what the file holds
        expect_settings(path, model.info.get("made_from", {}), settings)
        nats = validate(model, windows(val, domain.length, 256), args.batch_size)
        print(f"{name}: validation {nats:.4f} nats per token", flush=True)
    if world > 1:
        dist.barrier()


def checksum(tokens):
    return zlib.crc32(np.ascontiguousarray(tokens))


def pretrain(domain, out, args, device, iters, lr):
    """Train the base from scratch. Rows have a beginning, and get position embeddings; windows do not."""
    torch.manual_seed(args.seed)
    config = Config(len(domain.vocab), domain.length, args.dim, args.depth, args.heads)
    config.positions = domain.load()[0].ndim == 2
    shape = [args.dim, args.depth, args.heads]
    train_as("base", Transformer(config).to(device), 0, 1, domain, out, args, iters, lr, shape=shape)


def find_base(domain, out, args, device):
    """Return (the base, its checksum, the domain in the base's tokens), and leave a copy of the base in out.

    The base is --init, or out/base.npz, or the shipped one, or it is trained now, as Sudoku's always is.
    """
    ours, shipped = out / "base.npz", SHIPPED / domain.name / "base.npz"
    if not (args.init or ours.exists() or shipped.exists() and domain.name != "sudoku"):
        pretrain(domain, out, args, device, args.pretrain, LR_PRETRAIN)
    path = Path(args.init) if args.init else ours if ours.exists() else shipped
    base = read_model(path, device)
    if base.config.self_conditioning or base.config.causal or "vocab" not in base.info:
        raise BadInput(f"{path}: not a base that train.py made")
    domain = data.with_vocabulary_of(domain, base.info)
    if path == ours and base.info.get("made_from", {}).get("content") != checksum(domain.load()[0]):
        raise BadInput(f"{path}: a base of other data; --init takes it, another --out makes a new one")
    content = path.read_bytes()
    if processes()[0] == 0 and not ours.exists():
        ours.with_suffix(".tmp").write_bytes(content)
        ours.with_suffix(".tmp").replace(ours)
    if processes()[0] == 0 and ours.read_bytes() != content:
        raise BadInput(f"--init {path}: {ours} is another base, expected an --out without one")
    return base, zlib.crc32(content), domain


def adapt(domain, out, args, device):
    """Train the control and SCMDM on from one base, for as many iterations each, and print the table."""
    base, crc, domain = find_base(domain, out, args, device)
    names = ["base"]
    for rate in dict.fromkeys(args.rates or [0, 1]):
        for unroll in dict.fromkeys(args.unroll or UNROLL) if rate else [1]:
            name = f"rate{rate:g}" + (f"-unroll{unroll}" if unroll > 1 else "")
            names.append(name + (f"-seed{args.seed}" if args.seed else ""))
            model = (add_self_conditioning(base) if rate else copy.deepcopy(base)).train()
            lr = args.lr or (LR_SIGNAL.get(domain.name, 1e-3) if rate else LR_CONTROL)
            iters = args.iters or args.adapt
            train_as(names[-1], model, rate, unroll, domain, out, args, iters, lr, base=crc)
    if processes()[0] == 0 and args.n != 0:
        files = {name: path for name, path in models_in(out).items() if name in names}
        print()
        compare(*load_models(files, device), [domain.steps], args.n, args.seed)


# --- The command line --------------------------------------------------------------------------------------


def parse():  # fmt: off
    lrs = f"{LR_PRETRAIN:g} from scratch, {LR_CONTROL:g} for the control, 1e-3 with a signal, Sudoku 2e-3"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a, count, rate = p.add_argument, number(int, 1), number(float, 0, 1)
    a("--data", default="sudoku", help=f"{', '.join(data.NAMES)}, or a file: text, or .npy with integers")
    a("--lines", action="store_true", help="your file holds one sequence per line instead of one long text")
    a("--length", type=count, help="your file: tokens in a window, or in the longest line (default: 128)")
    a("--vocab", help="your .npy: a file with one token per line, so that samples are printed as text")
    a("--out", help="folder of the models (default: runs/NAME)")
    a("--resume", action="store_true", help="go on in OUT: keep what is finished, continue what is not")
    a("--stage", choices=("pretrain", "adapt"), default="adapt",
      help="pretrain: only the base; adapt: from a base, which is trained first if there is none (default)")
    a("--init", help="adapt: the base (default: OUT/base.npz, or else the one in data/models/)")
    a("--rates", type=rate, nargs="+", metavar="RATE",
      help="adapt: probability that a sequence gets its signal, a model for each (default: 0 1)")
    a("--unroll", type=count, nargs="+", metavar="K",
      help="adapt: most passes that make the signal, a model for each; 1: the paper's recipe (default: 1 8)")
    a("--iters", type=count, help="optimiser updates of each model")
    a("--batch-size", type=count, help="sequences per iteration, over all processes")
    a("--lr", type=number(float, 1e-9), help=f"peak learning rate (default: {lrs})")
    a("--dim", type=count, help="pretrain: width of the model")
    a("--depth", type=count, help="pretrain: number of blocks")
    a("--heads", type=count, help="pretrain: attention heads")
    a("--seed", type=number(int, 0, 2**31 - 1), default=0, help="of weights, batches and noise (default: 0)")
    a("--device", default="auto", help="auto, cpu, cuda or mps (default: auto, the fastest that is there)")
    a("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matrix products")
    a("--compile", action="store_true", help="torch.compile: slow to start, then faster; needs a compiler")
    a("-n", type=number(int, 0), help="adapt: sequences for the table; 0: no table (default: up to 512)")
    args = p.parse_args()
    wrong = {"adapt": ["dim", "depth", "heads"], "pretrain": ["init", "rates", "unroll", "n"]}
    for name in wrong[args.stage]:
        if getattr(args, name) is not None:
            p.error(f"{'-' if name == 'n' else '--'}{name} has no effect with --stage {args.stage}")
    for name, value in DEFAULTS.get(args.data, DEFAULTS["text"]).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.dim % (2 * args.heads):
        p.error(f"--dim is {args.dim}, expected a multiple of 2 * heads, {2 * args.heads}")
    return args


def main():
    args, began = parse(), time.time()
    device, (rank, world) = pick_device(args.device), processes()
    if args.batch_size % world:
        raise BadInput(f"--batch-size is {args.batch_size}, expected a multiple of the {world} processes")
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    domain = data.get(args.data, args.lines, args.length, args.vocab)
    out = Path(args.out or f"runs/{domain.name}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: {error.strerror}") from None
    if args.stage == "pretrain":
        pretrain(domain, out, args, device, args.iters or args.pretrain, args.lr or LR_PRETRAIN)
    else:
        adapt(domain, out, args, device)
    if rank == 0:
        print(f"\nIn all {clock(time.time() - began)}. Watch: python sample.py --models {out} --watch -n 1")
    if world > 1:
        dist.barrier()  # a process that ends early would take the others' connection with it
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        run(main)
    except KeyboardInterrupt:
        words = [word for word in sys.argv if word != "--resume"] + ["--resume"]
        print(f"interrupted; go on with:\n{shlex.join(['python', *words])}", file=sys.stderr)
        sys.exit(130)
