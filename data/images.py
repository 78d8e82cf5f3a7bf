"""Images: Fashion-MNIST, 14 x 14 pixels of 16 grey levels, a pixel a token, row by row. Source: data/README.md.

    python data/images.py      train the small classifier again in whose features images are compared
"""

import lzma
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("images.xz")
CLASSIFIER = Path(__file__).with_name("images_classifier.npz")
row = 14  # pixels a row of the picture: where the terminal breaks the line
length = row * row
vocab = list("0123456789abcdef")  # grey levels, 0 is black
index = {level: i for i, level in enumerate(vocab)}
SHADES = " .:-=+*coahbdkwm"  # of the levels, in a terminal


def encode(string):
    """A string of grey levels, 0 to f -> a list of tokens. Raises KeyError for anything else."""
    return [index[level] for level in string]


def decode(tokens):
    """Tokens -> a string of grey levels, 0 to f."""
    return "".join(vocab[i] for i in tokens)


def cell(token):
    """How the terminal shows a pixel: two characters, which are about as wide as high."""
    return SHADES[token] * 2


@cache
def read():
    """(images [24000, 196] of levels, labels [24000]): the first 20,000 are for training."""
    raw = np.frombuffer(lzma.decompress(FILE.read_bytes()), dtype=np.uint8)
    return raw[: 24000 * length].reshape(24000, length), raw[24000 * length :]


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


def frechet(a, b):
    """Frechet distance of two sets of features [N, F], [M, F], each taken for a Gaussian:
    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B their covariances."""
    A, B = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(A)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T  # A^(1/2)
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ B @ root), 0)).sum()  # tr (A B)^(1/2)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * cross)


def score(samples, reference):
    """{measure: value} of samples [N, 196] against reference [M, 196], real images.

    Frechet: the distance in the classifier's features; it grows as N falls, so compare with as many real images.
    sure: the mean probability of the class that the classifier takes an image for; a garment is one thing.
    """
    w = classifier()
    z = features(samples, w) @ w["w3"] + w["b3"]
    p = np.exp(z - z.max(1, keepdims=True))
    sure = float((p / p.sum(1, keepdims=True)).max(1).mean())
    return {"Frechet": frechet(features(samples, w), features(reference, w)), "sure": sure}


def picture(samples, path):
    """Write samples [N, 196] as a PNG, ten a row, each pixel 4 x 4. Returns a line that says so."""
    across = min(10, len(samples))
    down = -(-len(samples) // across)
    grid = np.full((down * (row + 1), across * (row + 1)), 8, dtype=np.uint8)  # grey lines between the images
    for i, image in enumerate(samples):
        y, x = i // across * (row + 1), i % across * (row + 1)
        grid[y : y + row, x : x + row] = image.reshape(row, row)
    pixels = (grid * 17).repeat(4, 0).repeat(4, 1)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 0, 0, 0, 0)  # 8-bit grey
    lines = np.pad(pixels, ((0, 0), (1, 0))).tobytes()  # each line begins with its filter, 0: none
    with open(path, "wb") as f:
        f.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))
    return f"wrote {len(samples)} images: {path}"


if __name__ == "__main__":
    import torch

    torch.manual_seed(0)
    images, labels = (torch.from_numpy(a.copy()) for a in read())
    x, y = images.float() / 15, labels.long()
    sizes = (length, 256, 64, 10)
    layers = [torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), torch.nn.Dropout(0.3), layers[2])
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    for epoch in range(20):
        for rows in torch.randperm(20000).split(128):
            loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimiser.zero_grad(), loss.backward(), optimiser.step()
    accuracy = (model.eval()(x[20000:]).argmax(1) == y[20000:]).float().mean().item()
    arrays = {f"w{i + 1}": layer.weight.detach().T.numpy().astype(np.float16) for i, layer in enumerate(layers)}
    arrays |= {f"b{i + 1}": layer.bias.detach().numpy().astype(np.float16) for i, layer in enumerate(layers)}
    np.savez(CLASSIFIER, **arrays)
    print(f"wrote {CLASSIFIER}: {accuracy:.1%} of the test images classified as they should be")
