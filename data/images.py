"""Images: Fashion-MNIST, 14 x 14 pixels of 16 grey levels, a pixel a token. Source: data/README.md."""

import lzma
from functools import cache
from pathlib import Path

import numpy as np

from data import Domain

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
        grey=True,
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


# --- the Frechet distance, in the features of a small classifier (data/study/train_classifier.py) ---


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

    Frechet: the distance in the classifier's features; it grows as N falls: compare with as many real images.
    sure: the mean probability of the class that the classifier takes an image for; a garment is one thing.
    """
    w = classifier()
    z = features(samples, w) @ w["w3"] + w["b3"]
    p = np.exp(z - z.max(1, keepdims=True))
    sure = float((p / p.sum(1, keepdims=True)).max(1).mean())
    return {"Frechet": frechet(features(samples, w), features(reference, w)), "sure": sure}
