"""Adapt a masked language model of Hugging Face transformers, and measure what the signal is worth.

    pip install transformers
    python -m data.adapt_hf MODEL TEXT            # MODEL: a folder, read by AutoModelForMaskedLM
    python -m data.adapt_hf MODEL TEXT --lines    # one sequence per line, such as a molecule or a protein

The program trains two models from MODEL, for the same number of iterations on the same batches and masks: the
control, without a signal, and SCMDM, with unroll=8. It compares them on a tenth of TEXT that is held out.

BERT was trained with 15% of the tokens masked. At first both models mostly learn to predict under many masks,
so only the control shows what the signal adds. It is saved in OUT/control as an ordinary transformers model,
and a second run can start from it. SCMDM is saved in OUT. To use it in a program of your own:

    from data.adapt_hf import load_denoiser
    denoiser, tokenizer = load_denoiser("OUT")    # denoiser(xt, x0_prev) -> logits, as scmdm.sample expects

What to expect: a ModernBERT of 0.35 million weights had been trained on Shakespeare's characters, 15% masked.
1,000 iterations with --lr 5e-4 --steps 32 took 6 minutes on one core. On 512 held-out sequences of 62
characters SCMDM's bound was 1.12 ± 0.17 nats below the control's, and 1.07 ± 0.16 in a second run, from
OUT/control. After 120 iterations it was 0.81 ± 0.31 below, on 64 sequences. For an ALBERT of 12 million
weights, on chemical reactions, that gave 0.27 ± 0.42, which settles nothing. Four times the sequences halve
the ±.

Models that need care:

- ESM and BART need the signal at another place than the token embedding, see `Denoiser.__init__`. Any other
  model of that kind stops with "W gets no gradient".
- PEFT goes on the model first, and not on its embedding: Denoiser(get_peft_model(model, ...), tokenizer).
  Around the denoiser it would freeze W. Before saving: denoiser.model = denoiser.model.merge_and_unload().
- Causal models: load an AutoModelForCausalLM and set model.config.is_causal = False, which transformers obeys
  from version 5.2 on. Add the tokens that it lacks, tokenizer.add_special_tokens({"mask_token": "[MASK]",
  "pad_token": "[PAD]"}), and call model.resize_token_embeddings(len(tokenizer)). Position i scores token
  i + 1, so `forward` returns torch.cat((logits[:, :1], logits[:, :-1]), 1), and `frozen` includes position 0.
  A test: if the model is still causal, its first prediction does not depend on the last token y, and
  denoiser(x)[:, 0].equal(denoiser(torch.cat((x[:, :-1], y), 1))[:, 0]) is True.
- Gradient checkpointing: call model.gradient_checkpointing_enable() first.
- Several processes: use DistributedDataParallel(denoiser), and draw other noise in each process.
"""

import argparse
import copy
import os
import random
from pathlib import Path

import torch

from data import BadInput
from data.own import strings
from data.terminal import Progress, number, run
from scmdm import SelfConditioning, diffusion_loss, sample, sampler_bound

try:
    from safetensors.torch import load_model, save_model
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer
except ModuleNotFoundError:
    raise SystemExit("data.adapt_hf needs transformers: pip install transformers") from None


class Denoiser(torch.nn.Module):
    """f(xt, x0_prev) -> logits: a model and its adapter, in one module, which is trained and saved whole."""

    def __init__(self, model, tokenizer):
        super().__init__()
        self.model = model
        self.mask_id, self.pad_id = tokenizer.mask_token_id, tokenizer.pad_token_id
        self.adapter = SelfConditioning(model.get_input_embeddings(), self.mask_id)
        self.register_buffer("special", torch.tensor(tokenizer.all_special_ids), persistent=False)
        place = model.get_input_embeddings()  # the module to whose output the signal is added
        if getattr(model.config, "token_dropout", False):
            place = model.esm.embeddings  # ESM would set what is added earlier to zero
        elif model.config.is_encoder_decoder:
            place = model.get_encoder().embed_tokens  # BART never calls its shared embedding
        self.place = (place,)  # in a tuple, so that it is not registered, and saved, twice

    def frozen(self, x0):
        """Return where tokens are never masked and never scored, [B, L] bool: padding, [CLS] and the like."""
        return torch.isin(x0, self.special)

    def forward(self, xt, x0_prev=None):
        """xt [B, L]; x0_prev [B, L, V] or None -> logits [B, L, V], -inf for special tokens."""
        # No dropout without a gradient, even if a trainer calls .train(): the signal is made as in sampling.
        self.model.train(self.training and torch.is_grad_enabled())

        def add_signal(module, args, h):
            return h + self.adapter(xt, x0_prev)  # [B, L, D]

        # The hook is there during this call only, so all other calls of the model are what they were.
        with self.place[0].register_forward_hook(add_signal):
            logits = self.model(xt, attention_mask=(xt != self.pad_id).long()).logits
        return logits.index_fill(-1, self.special, -torch.inf)


def read_model(name):
    """Return the model in float32, and its tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForMaskedLM.from_pretrained(name).float()  # bfloat16 is too coarse for small updates
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{name}: not a masked language model with its tokenizer: {reason}") from None
    if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
        raise BadInput(f"{name}: the tokenizer lacks a mask token or a pad token")
    return model, tokenizer


def read_rows(path, tokenizer, length, lines):
    """Return training and held-out sequences, each int64 [N, length], padded on the right."""
    try:
        texts = strings(path)  # the lines of a text, the sequences of a FASTA
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    if lines:
        texts = list(dict.fromkeys(texts))  # once each: no held-out line is trained on
        random.Random(0).shuffle(texts)  # files are often sorted
    else:
        texts = ["\n".join(texts)]
    tokenizer.padding_side = "right"
    options = dict(truncation=True, max_length=length, padding="max_length", return_overflowing_tokens=True)
    rows = torch.tensor(tokenizer(texts, **options)["input_ids"])  # [N, length]: a long text makes many rows
    special = torch.tensor(tokenizer.all_special_ids)
    rows = rows[~torch.isin(rows, special).all(1)]  # those that have a token to predict
    if len(rows) < 40:
        raise BadInput(f"{path}: {len(rows)} sequences of {length} tokens, expected at least 40")
    cut = len(rows) - len(rows) // 10
    return rows[:cut], rows[cut:]


def train(denoiser, rows, rate, args):
    """Train in place: SCMDM at rate 1, the control at rate 0."""
    W = denoiser.adapter.W.requires_grad_(rate > 0)  # DDP refuses a parameter that gets no gradient
    groups = [{"params": denoiser.model.parameters(), "lr": args.lr}, {"params": [W], "lr": args.lr_w}]
    optimizer, warmup, mean = torch.optim.AdamW(groups), 1 + args.iters // 20, None
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warmup, 1 - i / args.iters))
    batches, noise = torch.Generator().manual_seed(args.seed), torch.Generator(rows.device)
    torch.manual_seed(args.seed)  # of dropout
    progress = Progress(f"{'SCMDM' if rate else 'control'}: iteration", args.iters)
    denoiser.train()
    for i in range(args.iters):
        x0 = rows[torch.randint(len(rows), (args.batch_size,), generator=batches)]  # [B, L]
        frozen = denoiser.frozen(x0)  # [B, L]
        noise.manual_seed(args.seed + i)  # the same masks for both models
        options = dict(self_cond_rate=rate, unroll=8, frozen=frozen, generator=noise)
        nats = diffusion_loss(denoiser, x0, denoiser.mask_id, **options)  # [B]
        loss = nats.sum() / (~frozen).sum()  # per token
        if not loss.isfinite():
            raise BadInput(f"the loss is {loss.item()} at iteration {i}, expected a number: try a lower --lr")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        decay.step()
        if rate > 0 and i == 9 and not W.any():  # not at once, because a small batch may have no mask
            raise RuntimeError("W gets no gradient, so the signal is not used: see Denoiser.__init__")
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()  # one batch says little
        progress.update(i + 1, f"loss {mean:.3f} nats per token")
    denoiser.eval()


def save_denoiser(folder, denoiser, tokenizer):
    """Write all of the denoiser; model.save_pretrained would leave W out."""
    denoiser.model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_model(denoiser, folder / "denoiser.tmp")  # unlike save_file it allows weights that are shared
    os.replace(folder / "denoiser.tmp", folder / "denoiser.safetensors")


def load_denoiser(folder):
    """Return (denoiser, tokenizer) as `save_denoiser` wrote them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(folder)).float()
    denoiser = Denoiser(model, tokenizer).eval()
    load_model(denoiser, Path(folder) / "denoiser.safetensors")
    return denoiser, tokenizer


def bounds(denoiser, rows, steps, signal="on"):
    """Return the sampler's bound for each of rows [N, L], in nats, at the same masks for every model. [N]"""

    def given(xt, x0_prev):
        if x0_prev is None or signal == "off":
            return denoiser(xt)
        if signal == "shuffled":  # each masked position gets the prediction for another one
            x0_prev = x0_prev.clone()
            for row, masked in zip(x0_prev, xt == denoiser.mask_id):  # [L, V], [L]
                row[masked] = row[masked][torch.randperm(int(masked.sum()))]
        return denoiser(xt, x0_prev)

    noise, costs = torch.Generator(rows.device).manual_seed(0), []
    progress = Progress("bound: sequence", len(rows))
    for x0 in rows.split(32):
        frozen = denoiser.frozen(x0)
        costs.append(sampler_bound(given, x0, denoiser.mask_id, steps, frozen=frozen, generator=noise))
        progress.update(sum(map(len, costs)))
    return torch.cat(costs).double()


def show(name, cost, less, other):
    """Print a row of the table: a model's bounds [N], and how far they are below another's."""
    difference = cost - other  # [N], paired
    mean, half = difference.mean().item(), 1.96 * difference.std().item() / len(difference) ** 0.5
    print(f"{name:24}{cost.mean().item():10.3f}{mean:+12.3f} ± {half:.3f} minus {less}")
    return mean, half


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a, count = p.add_argument, number(int, 1)
    a("model", help="folder or name of a masked language model, with its tokenizer")
    a("text", type=Path, help="UTF-8 text: one long text, or with --lines one sequence per line")
    a("--lines", action="store_true", help="one sequence per line")
    a("--out", type=Path, default=Path("runs/adapted"), help="folder to save in (default: runs/adapted)")
    a("--length", type=count, default=64, help="tokens in a sequence (default: 64)")
    a("--iters", type=count, default=1000, help="iterations for each of the two models (default: 1000)")
    a("--batch-size", type=count, default=16, help="sequences in a batch (default: 16)")
    a("--lr", type=float, default=5e-5, help="peak learning rate of the model (default: 5e-5)")
    a("--lr-w", type=float, default=1e-3, help="peak learning rate of W (default: 1e-3)")
    a("-n", type=number(int, 2), default=512, help="most held-out sequences to measure (default: 512)")
    a("--steps", type=count, help="sampling steps (default: as many as tokens in a sequence)")
    a("--prompt", default="_" * 16, help="a text to fill, where each _ is one token (default: 16 of them)")
    a("--seed", type=int, default=0, help="of batches, masks and dropout (default: 0)")
    args = p.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = read_model(args.model)
    steps = args.steps or args.length
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", args.length))
    if args.length > longest:
        raise BadInput(f"--length is {args.length}, expected at most {longest} for this model")
    rows, held_out = (x.to(device) for x in read_rows(args.text, tokenizer, args.length, args.lines))
    held_out = held_out[: args.n]
    denoiser = Denoiser(model, tokenizer).to(device).eval()
    base = bounds(denoiser, held_out, steps)  # [N]

    control = copy.deepcopy(denoiser)
    train(control, rows, 0, args)
    control.model.save_pretrained(args.out / "control")
    tokenizer.save_pretrained(args.out / "control")
    vanilla = bounds(control, held_out, steps)

    train(denoiser, rows, 1, args)
    save_denoiser(args.out, denoiser, tokenizer)
    denoiser = load_denoiser(args.out)[0].to(device)  # what is measured is what was saved
    on, shuffled, off = (bounds(denoiser, held_out, steps, signal) for signal in ("on", "shuffled", "off"))

    tokens = (~denoiser.frozen(held_out)).sum() / len(held_out)
    print(f"Trained on {len(rows)} sequences. {len(held_out)} held-out sequences of {tokens:.1f} tokens:")
    print(f"the sampler's bound with {steps} steps, nats per sequence; lower is better.")
    print("±: 95% over held-out sequences, for one training seed.\n")
    print(f"{'base':24}{base.mean().item():10.3f}")
    show("control", vanilla, "base", base)
    mean, half = show("SCMDM", on, "control", vanilla)
    show("  its signal shuffled", shuffled, "SCMDM", on)
    show("  its signal off", off, "SCMDM", on)
    if 0 < abs(mean) < half:
        n = len(held_out) * (half / mean) ** 2
        print(f"Not settled: to tell {mean:+.3f} from zero takes about {n:.0f} held-out sequences.")

    prompt = args.prompt.replace("_", tokenizer.mask_token)
    canvas = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)  # [1, L]
    tokens = sample(denoiser, canvas, denoiser.mask_id, steps)
    print(f"\nSaved: SCMDM in {args.out}, the control in {args.out / 'control'}. SCMDM fills the prompt:")
    print(f"{args.prompt}\n{tokenizer.decode(tokens[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    run(main)
