"""Trains what train.py does not: with another loss, model or signal. The loop is train.py's own, `fit`."""

from pathlib import Path

import torch

from data import BadInput
from sample import read_model
from scmdm import Config, Transformer, save
from train import WEIGHT_DECAY, checksum, fit


def new_model(domain, sizes, device, seed=0, **kind):
    """Return a Transformer with random weights.

    sizes has "dim", "depth" and "heads"; kind are other fields of Config.
    """
    torch.manual_seed(seed)
    config = Config(len(domain.vocab), domain.length, sizes["dim"], sizes["depth"], sizes["heads"], **kind)
    config.positions = domain.load()[0].ndim == 2  # rows have a beginning, windows of a stream do not
    return Transformer(config).to(device)


def train_to(
    path, model, loss_of, domain, *,
    iters, lr, batch_size, seed=0, dtype="float32", compiled=False, **made_from,
):  # fmt: skip
    """Train the model, write it to path, and return it. loss_of(denoiser, x0 [B, L], generator) -> [B] nats.

    A run that was stopped goes on. A finished file is returned as it is. made_from is added to the settings,
    which are kept in the file.
    """
    path, train = Path(path), domain.load()[0]
    settings = {"data": domain.name, "content": checksum(train), "seed": seed, "iters": iters}
    settings |= {"batch_size": batch_size, "weight_decay": WEIGHT_DECAY, "dtype": dtype} | made_from
    device = next(model.parameters()).device
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        average = fit(model, loss_of, train, path.with_suffix(".state"), settings, lr, compiled)
        keys = ("vocab", "length", "end", "join", "source")
        info = {"data": domain.name} | {key: getattr(domain, key) for key in keys}
        try:
            save(path, average.half(), **info, made_from=settings, lr=lr)
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror}; the same command goes on when there is room") from None
        path.with_suffix(".state").unlink(missing_ok=True)
    trained = read_model(path, device)
    found = trained.info.get("made_from", {})
    if differ := [key for key in settings if found.get(key) != settings[key]]:
        raise BadInput(f"{path}: made with other settings ({', '.join(differ)}); another --out keeps both")
    return trained
