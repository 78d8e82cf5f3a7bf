"""Metrics of samples, and 95% intervals over training seeds."""

import math
from statistics import mean
from typing import NamedTuple

import numpy as np

# Student's t for a 95% interval of the mean of 2 to 30 values; 1.96 for more
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145]
T95 += [2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048]
T95 += [2.045]


# --- Samples -----------------------------------------------------------------------------------------------


def unigram_entropy(x):
    """Return the entropy of the tokens within each sequence of x [N, L], averaged over sequences, in nats.

    It falls when samples repeat themselves, which generative perplexity rewards.
    """
    counts = np.stack([(x == token).sum(1) for token in np.unique(x)], axis=1)  # [N, tokens in use]
    p = counts / x.shape[1]
    return float(-(p * np.log(np.where(p > 0, p, 1))).sum(1).mean())


def distinct(x, n=4):
    """Return the share of the n-grams in x [N, L] that are different. It falls when samples repeat."""
    n = min(n, x.shape[1])
    grams = np.lib.stride_tricks.sliding_window_view(x, n, axis=1).reshape(-1, n)
    return len(np.unique(grams, axis=0)) / len(grams)


def measure(domain, x, reference, nll=None):
    """Return {metric: value} of sequences x [N, L].

    reference [M, L] are real sequences. nll is a scoring model: x -> -log p(x), nats [N]. With it there is
    the generative perplexity, exp of the nats per token.
    """
    values = {}
    if nll:  # capped, because an untrained scoring model can exceed what a float holds
        values["generative perplexity"] = math.exp(min(float(np.mean(nll(x))) / x.shape[1], 700))
    if domain.row is None:  # in a grid, neighbours in the sequence are no n-grams
        values |= {"unigram entropy": unigram_entropy(x), "distinct-4": distinct(x)}
    return values | domain.score(x, reference)


# --- Intervals ---------------------------------------------------------------------------------------------


def half_width(values):
    """Return half the width of the 95% interval of the mean of n >= 2 independent values."""
    n = len(values)
    return (T95[n - 2] if n <= 30 else 1.96) * float(np.std(values, ddof=1)) / math.sqrt(n)


class Estimate(NamedTuple):
    """A mean over training seeds, with half the width of its 95% interval: None if there is one seed."""

    mean: float
    half: float | None
    seeds: int

    def text(self, sign=""):
        """Write it with four digits; sign="+" writes the sign of positive numbers too."""
        size = abs(self.mean)
        digits = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 4 if 0 < size < 0.01 else 3
        return f"{self.mean:{sign}.{digits}f}" + ("" if self.half is None else f" ± {self.half:.{digits}f}")

    def verdict(self):
        """Say what a difference shows. One that is within its interval shows nothing."""
        if self.half is None:
            return "one seed"
        return "within ±" if abs(self.mean) <= self.half else "lower" if self.mean < 0 else "higher"


def training_seed(row):
    """Return which training a row's model comes from: the checksum of its file, or its seed."""
    return row.get("file", row.get("seed"))


def estimate(values):
    """Return the Estimate from {training seed: its values}. Each seed counts once, with its own mean."""
    means = [mean(of_one_seed) for of_one_seed in values.values()]
    return Estimate(mean(means), half_width(means) if len(means) > 1 else None, len(means))


def over_seeds(rows, column):
    """Return the Estimate of a column over the training seeds of one model's rows, None without values."""
    values = {}
    for row in rows:
        if column in row:
            values.setdefault(training_seed(row), []).append(row[column])
    return estimate(values) if values else None


def difference(rows, others, column):
    """Return the Estimate of the paired difference between two models' rows, None without pairs.

    Rows with the same seed are a pair: they saw the same sequences, masks and draws, and of two adapted
    models both were trained with that seed. The base exists once. All models are adapted from it, so the
    interval is over their own trainings. Against another adapted model that was trained once there is no
    interval, because the chance in its training is not known.
    """
    partners = {row["seed"]: row for row in others if column in row}
    values, trainings = {}, set()
    for row in rows:
        if column in row and row["seed"] in partners:
            partner = partners[row["seed"]]
            values.setdefault(training_seed(row), []).append(row[column] - partner[column])
            trainings.add(training_seed(partner))
    if not values:
        return None
    found = estimate(values)
    if others[0]["model"] != "base" and len(trainings) == 1:
        return found._replace(half=None, seeds=1)
    return found
