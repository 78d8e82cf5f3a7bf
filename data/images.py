"""Images: Fashion-MNIST, 14 x 14 pixels of 16 grey levels, a pixel a token. Source: data/README.md.

    python -m data.images      train the small classifier again in whose features images are compared
"""

import lzma
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np

from data import Domain
from data.measures import frechet

FILE = Path(__file__).with_name("images.xz")
CLASSIFIER = Path(__file__).with_name("images_classifier.npz")
SIDE = 14  # pixels in each row, and rows
SHADES = " .:-=+*coahbdkwm"  # of the grey levels, in a terminal


def domain():
    return Domain(
        name="images",
        vocab=list("0123456789abcdef"),  # grey levels, 0 is black
        length=SIDE * SIDE,
        load=load,
        score=score,
        quality="Frechet",
        cell=lambda token: SHADES[token] * 2,  # two characters, which are about as wide as high
        row=SIDE,
        picture=picture,
    )


@cache
def read():
    """(images [24000, 196] of levels, labels [24000]): the first 20,000 are for training."""
    raw = np.frombuffer(lzma.decompress(FILE.read_bytes()), dtype=np.uint8)
    return raw[: 24000 * 196].reshape(24000, 196), raw[24000 * 196 :]


def load():
    """(train, val): rows [20000, 196] and [4000, 196] of tokens."""
    images, _ = read()
    return images[:20000], images[20000:]


# --- the Frechet distance, in the features of a small classifier ---


def features(images, weights):
    """The last hidden layer [N, 64] of a multilayer perceptron, in NumPy."""
    h = images / 15.0
    for i in (1, 2):
        h = np.maximum(0, h @ weights[f"w{i}"] + weights[f"b{i}"])
    return h


@cache
def classifier():
    with np.load(CLASSIFIER, allow_pickle=False) as file:
        return {name: file[name].astype(np.float64) for name in file.files}


def score(samples, reference):
    """{measure: value} of samples [N, 196] against reference [M, 196], real images.

    Frechet: the distance in the classifier's features; it grows as N falls: compare with as many real images.
    sure: the mean probability of the class that the classifier takes an image for; a garment is one thing.
    """
    w = classifier()
    z = features(samples, w) @ w["w3"] + w["b3"]
    p = np.exp(z - z.max(1, keepdims=True))
    sure = float((p / p.sum(1, keepdims=True)).max(1).mean())
    return {"Frechet": frechet(features(samples, w), features(reference, w)), "sure": sure}


def picture(samples, path):
    """Write samples [N, 196] as a PNG, ten a row, each pixel 4 x 4. Returns a line that says so."""
    across, size = min(10, len(samples)), SIDE + 1
    down = -(-len(samples) // across)
    grid = np.full((down * size, across * size), 8, dtype=np.uint8)  # grey lines between the images
    for i, image in enumerate(samples):
        y, x = i // across * size, i % across * size
        grid[y : y + SIDE, x : x + SIDE] = image.reshape(SIDE, SIDE)
    pixels = (grid * 17).repeat(4, 0).repeat(4, 1)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 0, 0, 0, 0)  # 8-bit grey
    body = zlib.compress(np.pad(pixels, ((0, 0), (1, 0))).tobytes())  # a line begins with its filter, 0: none
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    Path(path).write_bytes(png)
    return f"wrote {len(samples)} images: {path}"


if __name__ == "__main__":
    import torch

    torch.manual_seed(0)
    images, labels = (torch.from_numpy(a.copy()) for a in read())
    x, y = images.float() / 15, labels.long()
    sizes = (196, 256, 64, 10)
    layers = [torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
    relu, dropout = torch.nn.ReLU(), torch.nn.Dropout(0.3)
    model = torch.nn.Sequential(layers[0], relu, layers[1], relu, dropout, layers[2])
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    for epoch in range(20):
        for rows in torch.randperm(20000).split(128):
            loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimiser.zero_grad(), loss.backward(), optimiser.step()
    accuracy = (model.eval()(x[20000:]).argmax(1) == y[20000:]).float().mean().item()
    arrays = {}
    for i, layer in enumerate(layers, 1):
        arrays[f"w{i}"] = layer.weight.detach().T.numpy().astype(np.float16)
        arrays[f"b{i}"] = layer.bias.detach().numpy().astype(np.float16)
    np.savez(CLASSIFIER, **arrays)
    print(f"wrote {CLASSIFIER}: {accuracy:.1%} of the test images classified as they should be")
