"""Forms of the injection: does it matter how the signal enters the model? Sudoku, unroll=8.

    python -m data.study.forms            train and measure whatever is missing, then print the table
    python -m data.study.forms --show     only print the table of what has been measured

Each form is an adapter that replaces `SelfConditioning`. Like it, a form adds something at masked positions,
adds exactly nothing without a signal, and starts as the base. All are trained in the same way, with the same
batches and noise, for three training seeds.
"""

import argparse
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

import data
from data.study import files, results
from data.study.bench import Bench, evaluate
from data.study.metrics import difference
from data.study.runs import summary
from data.terminal import number, print_table, run
from sample import SHIPPED, read_model
from scmdm import Config, SelfConditioning, Transformer, add_self_conditioning, diffusion_loss, save
from train import DEFAULTS, LR_SIGNAL, WEIGHT_DECAY, checksum, fit

FOLDER, TABLE = Path("runs/study/forms"), results.HERE / "results" / "sudoku" / "forms.csv"
ITERS, UNROLL = 2000, 8


class SoftMask(SelfConditioning):
    """One scalar a: a masked position is embedded as (1 - a) E[MASK] + a x0_prev @ E[:V].

    This is the form of soft-masked diffusion models (arXiv 2510.17206), with a constant a that is learnt.
    """

    def __init__(self, model):
        super().__init__(model.embed, model.mask_id)
        self.W = nn.Parameter(torch.zeros((), device=model.embed.weight.device))  # a

    def forward(self, xt, x0_prev):
        E, V = self.shared[0].weight, x0_prev.shape[-1]
        h = x0_prev.to(E.dtype) @ E[:V] - given(x0_prev) * E[self.mask_id]  # [B, L, D]
        return torch.where((xt == self.mask_id)[..., None], self.W * h, 0)


class LogProbs(SelfConditioning):
    """Sees log-probabilities, at least log 1e-4, minus their mean over tokens: unlikely tokens count more."""

    def __init__(self, model):
        super().__init__(model.embed, model.mask_id)

    def forward(self, xt, x0_prev):
        logp = x0_prev.clamp(min=1e-4).log()  # [B, L, V]
        return super().forward(xt, given(x0_prev) * (logp - logp.mean(-1, keepdim=True)))


class WithHidden(SelfConditioning):
    """Adds the last hidden state too, by a second matrix U: h = ... + hidden @ U.T.

    The hidden state is what the model's head saw in the call that made the signal. The adapter remembers it,
    because a denoiser returns logits only. So each call must be given the prediction of the call before it,
    as `sample`, `sampler_bound` and `make_signal` do.
    """

    def __init__(self, model):
        super().__init__(model.embed, model.mask_id)
        self.U = nn.Parameter(torch.zeros_like(self.W))
        self.hidden = None
        model.norm.register_forward_hook(self.remember)

    def remember(self, norm, args, h):
        self.hidden = h.detach()  # [B, L, D]

    def forward(self, xt, x0_prev):
        h = given(x0_prev) * self.hidden.to(self.U.dtype) @ self.U.T  # [B, L, D]
        return super().forward(xt, x0_prev) + torch.where((xt == self.mask_id)[..., None], h, 0)


def given(x0_prev):
    """Return 1 where there is a signal, which sums to one, and 0 where there is none. [B, L, 1]"""
    return x0_prev.sum(-1, keepdim=True)


FORMS = {"present": None, "soft mask": SoftMask, "log-probabilities": LogProbs,
         "prediction and hidden state": WithHidden}  # fmt: skip


def with_form(model, form):
    """Put a form's adapter into an adapted model. Returns the model."""
    if FORMS[form]:
        model.self_conditioning = FORMS[form](model)
    return model


def read_form(path):
    """Read a model whose adapter is a form, which `load` does not know."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    header = json.loads(arrays.pop("header").tobytes())
    model = with_form(Transformer(Config(**header["config"])), header["info"]["made_from"]["form"])
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    model.info = header["info"]
    return model.eval()


def train_form(form, seed, iters=ITERS, folder=FOLDER):
    """Train a form from the shipped base, unless its file exists. Returns the file's path."""
    path = Path(folder) / form.replace(" ", "-") / f"rate1-unroll{UNROLL}-seed{seed}.npz"
    path = path.with_name(path.name.replace("-seed0", ""))
    path.parent.mkdir(parents=True, exist_ok=True)
    base = path.with_name("base.npz")
    if not base.exists():
        shutil.copy(SHIPPED / "sudoku" / "base.npz", base)
    if not path.exists():
        domain, model = data.get("sudoku"), with_form(add_self_conditioning(read_model(base)), form).train()
        train, size = domain.load()[0], DEFAULTS["sudoku"]["batch_size"]
        settings = {"data": "sudoku", "content": checksum(train), "length": domain.length, "seed": seed}
        settings |= {"iters": iters, "batch_size": size, "weight_decay": WEIGHT_DECAY, "dtype": "float32"}
        settings |= {"rate": 1.0, "unroll": UNROLL, "form": form, "base": zlib.crc32(base.read_bytes())}

        def loss_of(denoiser, x0, generator):
            return diffusion_loss(denoiser, x0, model.mask_id, unroll=UNROLL, generator=generator)

        state = path.with_suffix(".state")
        average = fit(model, loss_of, train, state, settings, LR_SIGNAL["sudoku"])
        save(path, average, made_from=settings)
        state.unlink(missing_ok=True)
    return path


def measure_form(form, folder=FOLDER, n=256, steps=(36, 144)):
    """Measure the trainings of a form as the bench does, and return its rows."""
    folder = Path(folder) / form.replace(" ", "-")
    paths = {path.stem: path for path in sorted(folder.glob("*.npz"))}
    models = {name: read_model(path) if name == "base" else read_form(path) for name, path in paths.items()}
    out = folder / "results.csv"
    shipped = results.HERE / "results" / "sudoku" / "results.csv"  # where the base has been measured
    known = [row for path in (shipped, out) if path.exists() for row in files.read(path)]
    rows = evaluate(Bench(data.get("sudoku"), "cpu", n), paths, models, out, known, steps)
    own = [row for row in rows if row["model"] != "real" and "signal" not in row]
    return [{"run": form} | row for row in own]


def against_present(rows):
    """Return the table of each form's paired differences from the present form."""
    found, table = {}, []  # found: {(form, steps): rows}
    for row in rows:
        if row["model"] != "base":
            found.setdefault((row["run"], row["steps"]), []).append(row)
    for (form, steps), group in found.items():
        if form != "present":
            line = {"form": form, "minus": "present", "steps": f"{steps:g}"}
            for column in ("bound", "valid", "completed"):
                change = difference(group, found["present", steps], column)
                line |= {"seeds": change.seeds, column: f"{change.text('+')}, {change.verdict()}"}
            table.append(line)
    return table


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=number(int, 1), default=3, help="trainings of each form (default: 3)")
    p.add_argument("--show", action="store_true", help="only print the table")
    args = p.parse_args()
    if not args.show:
        for seed in range(args.seeds):
            for form in FORMS:
                train_form(form, seed)
        for form in FORMS:
            files.add(TABLE, measure_form(form))
    table = []
    for line in summary(files.read(TABLE)):
        if line["model"] != "base" or line["run"] == "present":  # there is one base
            form = line.pop("run")
            table.append({"form": "base" if line.pop("model") == "base" else form} | line)
    print_table(table)
    print()
    print_table(against_present(files.read(TABLE)))


if __name__ == "__main__":
    run(main)
