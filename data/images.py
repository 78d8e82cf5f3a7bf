"""Images: Fashion-MNIST, 14 x 14 pixels of 16 grey levels. A token is a pixel.
Source and licence: data/README.md."""

import lzma
from functools import cache
from pathlib import Path

import numpy as np

from data import Domain

FILE = Path(__file__).with_name("images.xz")
CLASSIFIER = Path(__file__).with_name("images_classifier.npz")
SIDE = 14  # pixels in a row, and rows
SHADES = " .:-=+*coahbdkwm"  # how a terminal shows the grey levels


def domain():
    return Domain(
        name="images",
        vocab=list("0123456789abcdef"),  # 0 is black
        length=SIDE * SIDE,
        load=load,
        score=score,
        quality="Frechet",
        cell=lambda token: SHADES[token] * 2,  # in a terminal, two characters are about as wide as high
        row=SIDE,
        grey=True,
    )


@cache
def read():
    """(images [24000, 196] of tokens, labels [24000])"""
    raw = np.frombuffer(lzma.decompress(FILE.read_bytes()), dtype=np.uint8)
    return raw[: 24000 * 196].reshape(24000, 196), raw[24000 * 196 :]


def load():
    """(train, val): rows [20000, 196] and [4000, 196] of tokens."""
    images, _ = read()
    return images[:20000], images[20000:]


@cache
def classifier():
    """{name: array} of a multilayer perceptron with layers of 196, 256, 64 and 10, trained on the labels."""
    with np.load(CLASSIFIER, allow_pickle=False) as file:
        return {name: file[name].astype(np.float64) for name in file.files}


def features(images):
    """What the classifier's last hidden layer makes of images [N, 196]. [N, 64]."""
    w, h = classifier(), images / 15.0
    h = np.maximum(0, h @ w["w1"] + w["b1"])
    return np.maximum(0, h @ w["w2"] + w["b2"])


def frechet(a, b):
    """The Frechet distance of two sets of features [N, F] and [M, F], each taken as a Gaussian.

    With the covariances A and B it is |mean(a) - mean(b)|^2 + tr(A + B - 2 (A B)^(1/2)).
    """
    A, B = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(A)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T  # A^(1/2)
    # root @ B @ root has the eigenvalues of A B and is symmetric; rounding may make them slightly negative.
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ B @ root), 0)).sum()  # tr (A B)^(1/2)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * cross)


def score(samples, reference):
    """Measures of samples [N, 196] against real images [M, 196].

    Frechet: the Frechet distance in the features of the classifier. It grows as N falls, so that only
    distances for the same N can be compared. sure: the mean probability that the classifier gives to the
    class it chooses, which is high if a sample looks like one garment.
    """
    w, own = classifier(), features(samples)
    logits = own @ w["w3"] + w["b3"]  # [N, 10]
    p = np.exp(logits - logits.max(1, keepdims=True))
    sure = (p / p.sum(1, keepdims=True)).max(1)
    return {"Frechet": frechet(own, features(reference)), "sure": float(sure.mean())}
