"""What samples are measured by. No models: a scoring model is a function."""

import math
import statistics

import numpy as np

# Student's t for a 95% interval of 2 to 30 values
T95 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12]
T95 += [2.11, 2.10, 2.09, 2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05]


def unigram_entropy(x):
    """Entropy, in nats, of the tokens within each sequence of x [N, L], averaged over the sequences.
    It falls when samples repeat themselves, which generative perplexity rewards."""
    counts = np.stack([(x == token).sum(1) for token in np.unique(x)], axis=1)  # [N, tokens in use]
    p = counts / x.shape[1]
    return float(-(p * np.log(np.where(p > 0, p, 1))).sum(1).mean())


def distinct(x, n=4):
    """Share of the n-grams in x [N, L] that are different. It falls when samples repeat each other."""
    n = min(n, x.shape[1])
    grams = np.lib.stride_tricks.sliding_window_view(x, n, axis=1).reshape(-1, n)
    return len(np.unique(grams, axis=0)) / len(grams)


def measure(domain, x, reference, scoring=None):
    """{measure: value} of sequences x [N, L]; reference [M, L] is real; scoring: x -> -log p(x), nats [N]."""
    values = {}
    if scoring:  # the cap: an untrained one can be more surprised than a float holds
        values["gen. ppl"] = math.exp(min(float(np.mean(scoring(x))) / x.shape[1], 700))
    if domain.row is None:  # in a picture or grid, neighbours in the sequence are not n-grams
        values |= {"unigram entropy": unigram_entropy(x), "distinct-4": distinct(x)}
    return values | domain.score(x, reference)


def half_width(values):
    """Half the width of the 95% interval of the mean of n >= 2 values."""
    n = len(values)
    return (T95[n - 2] if n <= 30 else 1.96) * float(np.std(values, ddof=1)) / math.sqrt(n)


def mean_interval(values, digits=None):
    """'mean ± half the width of its 95% interval', by default with four digits; of one value, the value."""
    mean = statistics.mean(values)
    if digits is None:
        digits = max(0, 3 - max(0, math.floor(math.log10(abs(mean))))) if mean else 3
    return f"{mean:.{digits}f}" + (f" ± {half_width(values):.{digits}f}" if len(values) > 1 else "")


def paired(a, b):
    """(mean of a - b, half the width of its 95% interval), a and b being of the same sequences."""
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    return float(difference.mean()), half_width(difference)
