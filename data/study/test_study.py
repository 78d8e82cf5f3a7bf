"""The tests of the study: each docstring is one rule. python -m pytest data/study"""

import functools
import itertools
import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch

import data
import sample as sample_py
import train as train_py
from data import golden
from data.study import bench, likelihood, measures, pictures, results, scoring, variants
from scmdm import SelfConditioning, diffusion_loss
from test_scmdm import World, call, fixed, nll_of, numpy_weights, replay, rng, sampler_paths, tiny, toy

SMALL = "--dim 16 --depth 1 --heads 2 --steps 3 --batch-size 4".split()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with a user's own text, and what three steps of each stage made of it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "novel.txt").write_text("a quick brown fox jumps over the lazy dog_\n" * 640)
    common = ["x", "--data", str(folder / "novel.txt"), "--length", "24", "--out", str(folder)]
    adapt = "--steps 3 --batch-size 4 --no-table --rates 0 0.5 1 --unroll 1 3".split()
    with pytest.MonkeyPatch.context() as patch:
        for script, words in ((train_py, ["--stage", "pretrain", *SMALL]), (scoring, SMALL), (train_py, adapt)):
            patch.setattr(sys, "argv", [*common, *words])
            sample_py.run(script.main)
    return folder


def test_the_likelihood_of_all_orders_is_exact():
    """likelihood.py: the cost of each order is exact, of all orders -log p(x); fewer orders give more."""
    X, denoiser = World(3, 3, 0).X, toy(3, 3, scale=1.0)
    weight, cost = sampler_paths(denoiser, X, 3, 4)
    u = torch.tensor(list(itertools.product([0.875, 0.625, 0.375, 0.125], repeat=3)))  # [64, L]
    with replay(u.double().repeat(len(X), 1)):
        found = likelihood.cost_of_an_order(denoiser, X.repeat_interleave(len(u), 0), 3, 4)
    costs = found.view(len(X), -1).T  # [64, N]
    assert torch.allclose(costs, cost.T, atol=1e-5)
    exact = -((-cost).exp() @ weight).log()
    bounds = [likelihood.of_m_orders(costs, m) for m in (1, 2, 8, 64)]
    assert torch.allclose(bounds[0], cost @ weight, atol=1e-5)
    assert torch.allclose(bounds[-1], exact, atol=1e-5)
    assert all((fewer >= more - 1e-9).all() for fewer, more in zip(bounds, bounds[1:]))


def test_variants_change_what_they_say():
    """variants.py: its loss is diffusion_loss but for one choice; `learning` changes only gradients."""
    model, x0 = tiny(adapted=True, length=12), torch.randint(5, (8, 12), generator=rng(0))
    t = torch.rand(8).double()

    def value_and_gradient(loss, **choice):
        model.zero_grad()
        values = loss(model, x0, 5, self_cond_rate=1.0, unroll=4, generator=rng(3), t=t, **choice)
        values.sum().backward()
        return values.detach(), model.self_conditioning.W.grad

    value, gradient = value_and_gradient(diffusion_loss)
    for choice in ({}, {"growing": (itertools.count(99), 100)}):
        same = value_and_gradient(variants.loss, **choice)
        assert torch.equal(same[0], value) and torch.equal(same[1], gradient), choice
    learnt = value_and_gradient(variants.loss, learning=1)
    assert torch.equal(learnt[0], value) and not torch.allclose(learnt[1], gradient)
    for choice in ({"calls": 3}, {"growing": (itertools.count(), 100)}):
        assert not torch.allclose(value_and_gradient(variants.loss, **choice)[0], value), choice
    soft, plain = (kind(model.embed, 5) for kind in (variants.Softened, SelfConditioning))
    soft.W.data = plain.W.data = torch.eye(16)
    xt, signal = torch.full((1, 1), 5), lambda *p: torch.tensor([[[*p, 0, 0, 0]]])
    assert torch.allclose(soft(xt, signal(0.2, 0.8)), plain(xt, signal(1 / 3, 2 / 3)))
    assert torch.equal(soft(xt, signal(0.0, 0.0)), torch.zeros(1, 1, 16))


def test_measures():
    """Entropy is each sequence's own, distinct-4 the share of different 4-grams, an interval Student's."""
    x = np.array([[0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1]])
    assert measures.unigram_entropy(x) == pytest.approx(math.log(2) / 2)
    assert measures.distinct(x) == pytest.approx(3 / 6)  # 0000, 0101, 1010
    assert measures.mean_interval([2.0, 4.0]) == "3.000 ± 12.710"
    assert measures.mean_interval([123.4]) == "123.4"
    assert measures.paired([1, 2, 3], [0, 0, 0]) == pytest.approx((2, 4.30 / math.sqrt(3)))


def test_a_scoring_model_scores_by_the_chain_rule():
    """A scoring model scores a sequence by the chain rule, each token given those before it, the first the mask."""
    model, tokens = tiny(causal=True), torch.randint(5, (3, 6), generator=rng(0))
    shifted = np.concatenate((np.full((3, 1), 5), tokens.numpy()[:, :-1]), 1)
    logits = torch.from_numpy(golden.forward(numpy_weights(model), 2, shifted, causal=True))
    expected = nll_of(logits, tokens).sum(1).float()
    assert torch.allclose(scoring.scoring_nll(model, tokens), expected, atol=1e-4)


def test_predictive_entropy_is_of_what_was_drawn():
    """generate() gives the mean entropy of the distributions that it drew from, temperature included."""
    logits, canvas = torch.tensor([0.0, 1.0, 2.0]), torch.full((5, 4), 3)
    for temperature in (1.0, 0.5):
        x, entropy, _ = bench.generate(fixed(logits), canvas, 3, 6, 0, temperature=temperature, batch=2)
        p = (logits / temperature).softmax(-1)
        assert x.max() < 3 and entropy == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)


def test_what_sharpening_gives_for_free_is_taken_out():
    """An arm is compared with base and control at its own entropy; outside their entropies not at all."""

    def row(model, temperature, entropy, valid):
        what = {"model": model, "calls": 4.0, "temperature": temperature}
        return what | {"path entropy": entropy, "valid": valid}

    rows = [row("base", 1.2, 30, 0.1), row("base", 1.0, 20, 0.2), row("base", 0.8, 10, 0.6)]
    rows.append({"model": "real", "valid": 1})
    rows += [row("rate1", 1.0, 14, 0.5), row("rate1", 1.0, 16, 0.7), row("rate1", 0.8, 9, 0.9)]
    line = {"model": "SCMDM (paper)", "calls": "4", "temperature": 1.0}
    line |= {"path entropy": "15.000", "valid": "0.6"}
    base = line | {"the base's there": "0.4"}
    assert results.at_equal("path entropy", rows, "valid") == [base]
    assert results.at_equal("path entropy", rows[1:2] + rows[3:], "valid") == []
    rows += [row("rate0", 1.0, 40, 0.1), row("rate0", 0.8, 5, 0.8)]
    assert base | {"the control's there": "0.6"} in results.at_equal("path entropy", rows, "valid")


def first_column(printed):
    """The first column of the first table in what was printed, without its head."""
    lines = [line for line in printed.split("\nbound: ")[0].splitlines() if " | " in line]
    cells = [line.split(" | ")[0].strip() for line in lines]
    assert cells[:2] == ["model", "-" * max(map(len, cells))]
    return cells[2:]


def test_own_models_are_measured(own, call, monkeypatch):
    """The bench measures every model of a folder: real data, each temperature, and other signals."""
    use = functools.partial(call, bench, own, "--steps", 4)
    out = use("-n", 4, "--temperature", 0.8, 1)
    arms = ["SCMDM rate 0.5", "SCMDM rate 0.5 unroll 3", "SCMDM (paper)", "SCMDM unroll 3"]
    assert first_column(out) == ["real", "base", "control", *arms]
    rows = results.read_csv(own / "results.csv")
    assert len(rows) == 1 + 6 * 2 + 4 * 3, "real data, each model at each temperature, three other signals"
    assert all(row["gen. ppl"] > 1 for row in rows if "signal" not in row) and "another signal" in out
    use("-n", 4, "--order", "confidence")  # the bound is of random order
    rows = [row for row in results.read_csv(own / "results.csv") if "sampler" in row]
    assert len(rows) == 1 + 6 and all("gen. ppl" in row and "bound" not in row for row in rows)
    sizes = []
    for name in ("sample", "sampler_bound"):
        monkeypatch.setattr(bench, name, lambda f, x, *rest, of=getattr(bench, name), **more: (
            sizes.append((of.__name__, len(x))), of(f, x, *rest, **more))[1])  # fmt: skip
    use("-n", 3, "--batch-size", 2)
    assert set(sizes) == {("sample", 2), ("sample", 1), ("sampler_bound", 2), ("sampler_bound", 1)}
    monkeypatch.setattr(bench, "generate", None)  # what is in the file is not measured again
    assert use("-n", 4, "--temperature", 0.8, 1) == out


def test_the_bench_measures_what_is_missing(own, call, monkeypatch, tmp_path):
    """It measures anew what had no scoring model, takes no held-out row twice, leaves what is shipped."""
    for name in ("base.npz", "rate1.npz"):
        shutil.copy(own / name, tmp_path)
    use = functools.partial(call, bench, tmp_path, "--steps", 1, "-n")
    assert "gen. ppl" not in use(2)
    shutil.copy(own / "scoring.npz", tmp_path)
    assert "gen. ppl" in use(2)
    use(57), use(130)  # 57 windows are held out to measure on
    rows = results.read_csv(tmp_path / "results.csv")
    halves = [row["half"] for row in rows if row["model"] == "rate1" and row["n"] > 2 and "signal" not in row]
    assert halves[0] == halves[1]
    assert "SCMDM (paper)" in call(likelihood, tmp_path, "--calls", 2, "-n", 2, "--orders", 1)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    before = results.shipped("sudoku").read_bytes()
    call(bench, sample_py.SHIPPED / "sudoku", "--steps", 1, "-n", 2)
    assert results.shipped("sudoku").read_bytes() == before and results.read_csv("results.csv")


def test_pictures(call, tmp_path):
    """Images that sample.py saved become a PNG for each model, of the right greys."""
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "images.jsonl"
    rows = [{"model": name, "text": "0f" * 98} for name in ["base"] * 12 + ["SCMDM unroll 8"]]
    path.write_text("\n".join(map(json.dumps, rows)))
    call(pictures, "images", path)
    pixels = image.imread(tmp_path / "images-base.png")
    assert pixels.shape[:2] == (2 * 15 * 4, 10 * 15 * 4) and pixels[0, 0, 0] == 0 and pixels[0, 4, 0] == 1
    assert (tmp_path / "images-scmdm-unroll-8.png").exists()
