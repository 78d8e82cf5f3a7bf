"""The tests of the study. Each docstring is one rule.

    python -m pytest data/study

    1. intervals    over training seeds, on numbers made by hand
    2. files        what a results file survives
    3. the bench    what is the same for every model that is measured
    4. likelihood, variants, scoring model, runs
    5. the write-up what README.md shows is what the files say
    6. evidence     repeated passes, remasking, prompts, forms of the injection, the paper's claims
"""

import functools
import importlib
import itertools
import json
import math
import re
import resource
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import sample as sample_py
import train as train_py
from data.study import bench, claims, files, forms, likelihood, metrics, passes, pictures, prompts, remask
from data.study import results, runs, scoring, variants
from scmdm import COSINE, LINEAR, add_self_conditioning, diffusion_loss
from scmdm import earlier_times, make_signal, sample, sampler_bound, save
from test_scmdm import Spy, World, assert_fits, count, rng, tiny

HERE = Path(__file__).parent
TOP = HERE.parent.parent


def models_of_own_data(folder, name="novel", text="a quick brown fox jumps over the lazy dog\n"):
    """Write a user's own text and untrained models of it into a folder, as train.py would."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.txt"
    path.write_text(text * 400)
    domain = data.get(str(path), length=24)
    V = len(domain.vocab)
    keys = ("vocab", "length", "end", "join", "source")
    info = {"data": name} | {key: getattr(domain, key) for key in keys}
    save(folder / "base.npz", tiny(V, 24), **info, made_from={})
    crc = zlib.crc32((folder / "base.npz").read_bytes())
    for i, model in enumerate(("rate0", "rate0-seed1", "rate1", "rate1-seed1", "rate1-unroll8")):
        model_of_kind = tiny(V, 24, i + 1, adapted=model.startswith("rate1"))
        save(folder / f"{model}.npz", model_of_kind, **info, made_from={"base": crc})
    return domain


def add_scoring_model(folder, domain, name="scoring", seed=9):
    model = tiny(len(domain.vocab), 24, seed, causal=True)
    save(folder / f"{name}.npz", model, vocab=domain.vocab)


# --- 1. Intervals ------------------------------------------------------------------------------------------


def row(model, seed, file, **values):
    common = {"domain": "sudoku", "model": model, "file": file, "seed": float(seed), "steps": 36.0}
    return common | {"temperature": 1.0, "n": 8.0, "unit": "nats per sequence"} | values


BASE = [row("base", 0, "b", valid=0.1, bound=20.0), row("base", 1, "b", valid=0.3, bound=22.0)]
CONTROL = [row("rate0", 0, "c0", valid=0.2, bound=19.0), row("rate0", 1, "c1", valid=0.3, bound=22.0)]
OURS = [row("rate1", 0, "r0", valid=0.5, bound=18.0), row("rate1", 1, "r1", valid=0.9, bound=21.0)]


def test_the_interval_is_students():
    """Half the width of an interval is t * sd / sqrt(n), with t = 4.303 for three values, done by hand."""
    # 1, 2, 3: the mean is 2, the standard deviation 1, so half the width is 4.303 / 1.732 = 2.484
    assert metrics.half_width([1.0, 2.0, 3.0]) == pytest.approx(2.4843, abs=1e-3)
    assert metrics.half_width([2.0, 4.0]) == pytest.approx(12.706, abs=1e-3)
    assert len(metrics.T95) == 29, "for 2 to 30 values"
    assert metrics.half_width(np.arange(31.0)) == pytest.approx(1.96 * 9.0921 / math.sqrt(31), rel=1e-4)


def test_the_interval_is_over_training_seeds():
    """A model's rows are first averaged within each training seed. More sampling seeds do not narrow ±."""
    rows = [row("rate1", 0, "r0", valid=0.4), row("rate1", 1, "r0", valid=0.6)]
    rows.append(row("rate1", 2, "r1", valid=0.8))
    found = metrics.over_seeds(rows, "valid")
    assert found.mean == pytest.approx(0.65) and found.seeds == 2, "means of 0.5 and 0.8"
    assert found.half == pytest.approx(12.706 * 0.3 / math.sqrt(2) / math.sqrt(2), abs=1e-3)
    assert metrics.over_seeds(rows[:2], "valid") == (0.5, None, 1), "one training seed has no interval"
    assert metrics.over_seeds(rows, "completed") is None


def test_a_difference_is_paired_by_seed():
    """The difference from another model is taken seed by seed, and its interval is over those differences."""
    found = metrics.difference(OURS, BASE, "valid")  # 0.4 and 0.6
    assert found.mean == pytest.approx(0.5) and found.half == pytest.approx(12.706 * 0.1, abs=1e-3)
    found = metrics.difference(OURS, CONTROL, "bound")  # -1 and -1
    assert found == (-1, 0, 2) and found.verdict() == "lower"
    one_control = [r | {"file": "c0"} for r in CONTROL]
    assert metrics.difference(OURS, one_control, "bound") == (-1, None, 1), "a control that was trained once"
    assert metrics.difference(OURS, BASE[:1], "valid") == (pytest.approx(0.4), None, 1), "only pairs count"
    assert metrics.difference(OURS, [row("rate0", 7, "c7", valid=0.0)], "valid") is None


def test_what_is_within_the_interval_is_no_gain():
    """A difference within ± is never called higher or lower, and neither is one of a single seed."""
    for mean, verdict in ((-0.7, "lower"), (-0.5, "within ±"), (0.6, "within ±"), (0.7, "higher")):
        assert metrics.Estimate(mean, 0.6, 3).verdict() == verdict
    assert metrics.Estimate(-5.0, None, 1).verdict() == "one seed"
    assert metrics.Estimate(18.304, 0.4529, 3).text() == "18.30 ± 0.45"
    assert metrics.Estimate(0.674, None, 1).text("+") == "+0.674"


def test_the_tables_say_how_many_seeds(capsys):
    """The printed tables give the number of training seeds, paired differences and their verdicts."""
    results.report(BASE + CONTROL + OURS)
    lines = [re.split(r" +\| *", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert ["base", "36", "1", "21.00", "0.200"] in lines
    assert ["the paper's recipe", "36", "2", "19.50 ± 19.06", "0.700 ± 2.541"] in lines
    ours, seeds = "the paper's recipe", ["36", "2"]
    assert [ours, "base", *seeds, "-1.500 ± 6.353, within ±", "+0.500 ± 1.271, within ±"] in lines
    assert [ours, "control", *seeds, "-1.000 ± 0.000, lower", "+0.450 ± 1.906, within ±"] in lines
    results.report(BASE + OURS[:1])
    assert "-2.000, one seed" in capsys.readouterr().out


def test_sharpening_is_taken_out():
    """A model is compared with base and control at its own predictive entropy, seed by seed. Outside of the
    entropies that they have at any temperature there is no comparison."""

    def at(model, seed, temperature, entropy, valid):
        what = row(model, seed, f"{model}{seed if model != 'base' else ''}", valid=valid)
        return what | {"temperature": temperature, "predictive entropy": entropy}

    rows = [at("base", 0, 1.2, 30, 0.1), at("base", 0, 1.0, 20, 0.2), at("base", 0, 0.8, 10, 0.6)]
    rows += [at("base", 1, 1.0, 20, 0.4), at("base", 1, 0.8, 10, 0.8)]
    rows += [at("rate1", 0, 1.0, 15, 0.5), at("rate1", 1, 1.0, 15, 0.7), at("rate1", 0, 0.8, 9, 0.9)]
    # base at 15: 0.4 and 0.6, so the differences are 0.1 and 0.1
    line = {"model": "the paper's recipe", "steps": "36", "temperature": "1"}
    line |= {"predictive entropy": "15.00 ± 0.00", "valid": "0.600 ± 1.271"}
    line |= {"minus base there": "+0.100 ± 0.000, higher"}
    at_equal = functools.partial(results.at_equal, "predictive entropy", quality="valid")
    assert at_equal(rows) == [line]
    assert at_equal(rows[1:2] + rows[5:]) == [], "one temperature is no curve"
    rows += [at("rate0", 0, 1.0, 40, 0.1), at("rate0", 0, 0.8, 5, 0.8)]
    assert "minus control there" in at_equal(rows)[-1]


# --- 2. Files ----------------------------------------------------------------------------------------------


def test_rows_come_back_and_replace_each_other(tmp_path):
    """A row with the same key replaces the old one. Other models, domains and checksums are other rows, and a
    new column leaves old rows as they are."""
    path = tmp_path / "results.csv"
    files.add(path, BASE[:1])
    files.add(path, [BASE[0] | {"valid": 0.7}])
    changes = ({"file": "b2"}, {"domain": "text"}, {"signal": "off"}, {"seed": 5.0})
    others = [BASE[0] | change for change in changes]
    files.add(path, [others[0] | {"new, with a comma": "x"}, *others[1:]])
    rows = files.read(path)
    assert rows[0] == BASE[0] | {"valid": 0.7} and rows[2:] == others[1:] and len(rows) == 5
    assert rows[1]["new, with a comma"] == "x" and "new, with a comma" not in rows[0]
    assert [f.name for f in tmp_path.iterdir()] == ["results.csv"], "a temporary file was left"


def test_a_line_that_was_cut_is_not_glued_to_the_next(tmp_path):
    """A last line without an end is left out when a file is read, so the next row gets a line of its own."""
    path = tmp_path / "results.csv"
    files.add(path, BASE)
    path.write_bytes(path.read_bytes()[:-3])
    assert files.read(path) == BASE[:1]
    files.add(path, CONTROL[:1])
    assert files.read(path) == [BASE[0], CONTROL[0]]


ADD_ROWS = """
import itertools, sys
from data.study import files
for i in itertools.count():
    files.add(sys.argv[1], [{"model": "base", "seed": float(i), "text": "x" * 400}])
    print(i, flush=True)
"""


def add_rows(path, **options):
    words, pipe = [sys.executable, "-c", ADD_ROWS, str(path)], subprocess.PIPE
    return subprocess.Popen(words, cwd=TOP, stdout=pipe, stderr=pipe, text=True, **options)


def test_a_full_disk_loses_no_rows(tmp_path):
    """When the file cannot be written, every row that was in it is still there, and the message names it."""

    def small_disk():  # files can have 5,000 bytes
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error, as from a full disk, instead of a signal
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    path = tmp_path / "results.csv"
    out, err = add_rows(path, preexec_fn=small_disk).communicate()
    rows = files.read(path)
    assert len(rows) == len(out.split()) > 5 and [r["seed"] for r in rows] == list(range(len(rows)))
    assert f"{path}: File too large; no row that was in it is lost" in err
    assert [f.name for f in tmp_path.iterdir()] == ["results.csv"]


def test_a_kill_loses_no_rows(tmp_path):
    """kill -9 at any moment loses at most the row that was being written."""
    for i in range(3):
        path = tmp_path / f"{i}.csv"
        process = add_rows(path)
        written = [process.stdout.readline() for _ in range(20 + i)]
        process.kill()
        written += process.communicate()[0].split()
        rows = files.read(path)
        assert [r["seed"] for r in rows] == list(range(len(rows)))
        assert len(written) <= len(rows) <= len(written) + 1 and all(len(r["text"]) == 400 for r in rows)


# --- 3. The bench ------------------------------------------------------------------------------------------


def a_bench(tokens, length=6, n=4, V=5, **options):
    domain = data.Domain("test", [str(i) for i in range(V)], length, lambda: (tokens, tokens))
    return bench.Bench(domain, torch.device("cpu"), n, **options)


def test_held_out_sequences_are_not_the_reference():
    """No sequence is both measured and in the reference, even if the data contains it several times."""
    rows = np.random.default_rng(0).integers(0, 2, (200, 6))  # 64 different ones
    test = a_bench(rows, V=2)
    reference, measured = ({bytes(x) for x in part} for part in (test.reference, test.measured))
    assert not reference & measured and reference | measured == {bytes(x) for x in rows}
    assert len(test.measured) == len(measured) and abs(len(reference) - len(measured)) <= 1
    stream = a_bench(np.arange(61), V=61)
    assert sorted(np.r_[stream.reference, stream.measured].flatten()) == list(range(60))


def test_seeds_go_through_all_held_out_sequences():
    """Successive seeds measure successive sequences, and a bound never counts one of them twice."""
    test = a_bench(np.arange(120).reshape(20, 6), V=120, n=4)  # ten of them are measured
    seen = np.concatenate([test.sequences(seed)[:, 0] for seed in range(3)])
    assert list(seen) == list(test.measured[[*range(10), 0, 1], 0])
    wide = a_bench(np.arange(120).reshape(20, 6), V=120, n=25)
    assert len(wide.bound(lambda xt, x0_prev: torch.zeros(*xt.shape, 120), 2, seed=0)) == 10


def test_all_models_get_the_same_sequences_and_masks():
    """Each model is given the same held-out sequences and masks, whatever was measured before it."""
    test = a_bench(np.random.default_rng(0).integers(0, 5, (40, 6)), n=9, batch_size=4)
    spies = [Spy(tiny(seed=0)), Spy(tiny(seed=1)), Spy(tiny(seed=2, adapted=True))]
    for spy in spies:
        test.bound(spy, 3, seed=1)
        assert [len(x) for x in spy.xt] == [4, 4, 4, 4, 4, 4, 1, 1, 1], "batches of 4, 3 steps each"
        assert all(torch.equal(a, b) for a, b in zip(spy.xt, spies[0].xt))
        test.samples(spy, 2, 1.0, seed=1)  # draws other numbers in between
    other = Spy(tiny(seed=0))
    test.bound(other, 3, seed=0)
    assert not all(torch.equal(a, b) for a, b in zip(other.xt, spies[0].xt)), "another seed, other masks"


def test_a_bound_is_the_samplers():
    """The bench's bound of a model that knows nothing is L log V in nats, and log V per token of a stream."""
    flat = lambda xt, x0_prev: torch.zeros(*xt.shape, 5)  # noqa: E731
    rows = np.random.default_rng(0).integers(0, 5, (40, 6))
    for tokens, unit, tokens_in_it in ((rows, "sequence", 6), (rows.flatten(), "token", 1)):
        test = a_bench(tokens, n=20)
        # in expectation each token is charged exactly once; the mean over many masks is close to that
        found = np.mean([test.bound(flat, 6, seed).mean() for seed in range(60)])
        assert found == pytest.approx(tokens_in_it * math.log(5), rel=0.02)
        assert test.unit == f"nats per {unit}"


def test_predictive_entropy_is_averaged_over_tokens():
    """It is the mean over tokens, not over steps, of the entropy of what each was drawn from, at the
    temperature that it was drawn at."""
    revealed = []

    def denoiser(xt, x0_prev):  # certain while more than half is masked, uniform over 4 tokens after that
        revealed.append((xt != 4).sum().item())
        certain = (xt == 4).float().mean() > 0.5
        return torch.tensor([9e9 if certain else 0.0, 0, 0, 0]).expand(*xt.shape, 4)

    canvas = torch.full((1, 30), 4)
    x, entropy, _ = bench.fill(denoiser, canvas, 4, 5, seed=0)
    counts = np.diff([*revealed, 30])  # the tokens that each step revealed
    certain = [n for n, seen in zip(counts, revealed) if seen < 15]
    assert len(set(counts)) > 1 and 0 < sum(certain) < 30
    assert entropy == pytest.approx((30 - sum(certain)) / 30 * math.log(4))
    logits = torch.tensor([0.0, 1.0, 2.0])
    for temperature in (1.0, 0.5):
        always = lambda xt, x0_prev: logits.expand(*xt.shape, 3)  # noqa: E731
        _, entropy, _ = bench.fill(always, torch.full((5, 4), 3), 3, 6, 0, 2, temperature=temperature)
        p = (logits / temperature).softmax(-1)
        assert entropy == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)


def test_fill_is_the_sampler():
    """The samples that are measured are those that `sample` draws, batch after batch from one generator."""
    model, generator, canvas = tiny(adapted=True), rng(3), torch.full((5, 6), 5)
    x, _, _ = bench.fill(model, canvas, 5, 4, seed=3, batch_size=2)
    batches = [sample(model, part, 5, 4, generator=generator) for part in canvas.split(2)]
    assert torch.equal(x, torch.cat(batches))


def test_other_signals():
    """off gives no signal, uniform equal shares, shuffled the model's own from other positions."""
    model, signal = Spy(tiny(adapted=True)), torch.rand(2, 6, 5, generator=rng(0)).softmax(-1)
    xt = torch.full((2, 6), 5)
    for kind in bench.SIGNALS:
        bench.with_signal(model, kind)(xt, signal)
        assert bench.with_signal(model, kind)(xt, None) is not None and model.x0_prev[-1] is None
    off, uniform, shuffled = (model.x0_prev[i] for i in (0, 4, 2))
    assert off is None and torch.equal(uniform, torch.full((2, 6, 5), 0.2))
    assert sorted(shuffled[0].tolist()) == sorted(signal[0].tolist()) and not torch.equal(shuffled, signal)


def test_metrics_of_samples():
    """Unigram entropy is each sequence's own. distinct-4 is the share of 4-grams that are different.
    Generative perplexity is exp of the scoring model's nats per token."""
    x = np.array([[0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1]])
    assert metrics.unigram_entropy(x) == pytest.approx(math.log(2) / 2)
    assert metrics.distinct(x) == pytest.approx(3 / 6)  # 0000, 0101, 1010
    domain = data.Domain("test", ["a", "b"], 6, score=lambda samples, reference: {"quality": 7})
    values = metrics.measure(domain, x, x, lambda x: np.array([6.0, 12.0]))
    assert values["quality"] == 7 and values["generative perplexity"] == pytest.approx(math.exp(1.5))


def test_the_bench_measures_a_folder(call, tmp_path):
    """It writes a row for real data and for each model, seed and temperature, and for each other signal; its
    tables name the models as readers know them; what is in the file is not measured again."""
    domain = models_of_own_data(tmp_path)
    add_scoring_model(tmp_path, domain)
    use = functools.partial(call, bench, tmp_path, "--steps", 3, "-n", 4, "--device", "cpu")
    out = use("--temperature", 0.8, 1)
    for model, seeds in (("base", 1), ("control", 2), ("the paper's recipe", 2), ("unroll=8", 1)):
        assert re.search(rf"^{model} +\| 3 +\| {seeds} ", out, re.M), model
    rows = files.read(tmp_path / "results.csv")
    assert len(rows) == 2 + 4 * 2 * 2 + 2 * 3
    plain = [r for r in rows if r["model"] != "real" and "signal" not in r]
    assert all(r["generative perplexity"] > 1 and r["predictive entropy"] > 0 for r in plain)
    assert all(("bound" in r) == (r["temperature"] == 1) for r in plain)
    assert len({(r["model"], r["file"]) for r in plain}) == 6, "a missing seed is measured on the first"
    before = (tmp_path / "results.csv").read_bytes()
    assert use("--temperature", 0.8, 1) == out and (tmp_path / "results.csv").read_bytes() == before
    use("--order", "confidence")
    others = [r for r in files.read(tmp_path / "results.csv") if "sampler" in r]
    assert len(others) == 2 + 4 * 2 and not any("bound" in r for r in others), "the bound is of random order"
    (tmp_path / "novel.txt").unlink()
    assert "the data is no longer there" in use(status=2)


def test_two_domains_in_one_folder_of_results(call, tmp_path):
    """The results of models of different data can be in one file: their rows do not mix."""
    alone, tables = tmp_path / "alone", []
    for name, text in (("one", "to be or not to be\n"), ("two", "a rose is a rose is a rose\n")):
        models_of_own_data(tmp_path / name, name, text)
        use = functools.partial(call, bench, tmp_path / name, "--steps", 2, "-n", 3, "--device", "cpu")
        tables.append((use("--out", tmp_path / "both"), use("--out", alone / name)))
    assert all(both == of_one for both, of_one in tables)
    rows = files.read(tmp_path / "both" / "results.csv")
    assert len(rows) == sum(len(files.read(alone / name / "results.csv")) for name in ("one", "two"))


def test_a_scoring_model_that_is_trained_later_is_used(call, tmp_path):
    """Samples that were measured without a scoring model, or with another one, are measured again; the file
    judge.npz, as it used to be called, still works."""
    domain = models_of_own_data(tmp_path)
    use = functools.partial(call, bench, tmp_path, "--steps", 2, "-n", 3, "--device", "cpu")
    assert "generative perplexity" not in use()
    add_scoring_model(tmp_path, domain, "judge")
    first = use()
    assert "generative perplexity" in first and first == use()
    add_scoring_model(tmp_path, domain, seed=10)
    assert use() != first
    rows = files.read(tmp_path / "results.csv")
    assert len({files.key_of(r) for r in rows}) == len(rows) == 2 + 4 * 2 + 2 * 3, "replaced, not added"
    save(tmp_path / "scoring.npz", tiny(3, causal=True), vocab=["x"])
    assert "not a scoring model" in use(status=2)


def test_what_could_not_be_scored_is_measured_again(tmp_path):
    """Samples that were measured without the domain's own quality, as without RDKit, are measured again."""
    rows, scores = np.random.default_rng(0).integers(0, 5, (40, 6)), {}
    test = a_bench(rows)
    test.domain.quality, test.domain.score = "valid", lambda samples, reference: scores
    save(tmp_path / "base.npz", tiny())
    options = [{"base": tmp_path / "base.npz"}, {"base": tiny()}, tmp_path / "results.csv"]
    before = bench.evaluate(test, *options, [], [2])
    assert bench.evaluate(test, *options, before, [2]) == before
    scores["valid"] = 0.5
    again = bench.evaluate(test, *options, before, [2])
    assert [row["valid"] for row in again] == [0.5, 0.5] and files.read(options[2]) == again


def test_shipped_models_and_results_stay_as_they_are(call, tmp_path, monkeypatch):
    """Results of the shipped models go to runs/shipped/. What is shipped is not changed or measured again."""
    monkeypatch.chdir(tmp_path)
    shipped = HERE / "results" / "dna" / "results.csv"
    before = shipped.read_bytes()
    out = call(bench, sample_py.SHIPPED / "dna", "--steps", 64, "-n", 1024, "--seeds", 2)
    assert "unroll=8" in out and "0.963" in out
    assert not Path("runs/shipped/dna/results.csv").exists(), "all of it is in the shipped results"
    call(bench, sample_py.SHIPPED / "dna", "--steps", 1, "-n", 2)
    assert files.read("runs/shipped/dna/results.csv") and not list(sample_py.SHIPPED.glob("*/*.csv"))
    assert shipped.read_bytes() == before


# --- 4. Likelihood, variants, scoring model, runs ----------------------------------------------------------


def test_the_likelihood_of_all_orders_is_exact():
    """The cost of an order is exact. Over all orders the estimate is -log p(x), as counted on the sampler's
    own tree, and fewer orders give more."""
    L, V, steps = 3, 3, 4
    model = tiny(V, L, 3, adapted=True)
    X = torch.tensor(list(itertools.product(range(V), repeat=L)))  # all 27 sequences
    # each position is revealed at a step that is uniform, independently: 64 equally likely orders
    when = torch.tensor(list(itertools.product(range(steps), repeat=L)))
    u = 1 - (when + 0.5) / steps  # revealed between the times 1 - when/steps and 1 - (when+1)/steps
    X_u, u_X = X.repeat_interleave(len(u), 0), u.double().repeat(len(X), 1)
    with torch.no_grad():
        costs = likelihood.cost_of_an_order(model, X_u, V, steps, lambda shape: u_X).view(len(X), -1).T
        p = torch.zeros(len(X), dtype=torch.float64)  # the chain rule, order by order and step by step
        for order in when:
            x, x0_prev, path = torch.full_like(X, V), None, torch.ones(len(X), dtype=torch.float64)
            for step in range(steps):
                x0_prev = model(x, x0_prev).softmax(-1)
                for i in (order == step).nonzero().flatten():
                    path *= x0_prev[torch.arange(len(X)), i, X[:, i]]
                x = torch.where(order == step, X, x)
            p += path / len(when)
    assert p.sum().item() == pytest.approx(1, abs=1e-5), "a distribution over all sequences"
    bounds = [likelihood.over_orders(costs, m) for m in (1, 2, 8, 64)]
    assert torch.allclose(bounds[0], costs.mean(0)) and torch.allclose(bounds[-1], -p.log(), atol=1e-4)
    assert all((fewer >= more - 1e-9).all() for fewer, more in zip(bounds, bounds[1:]))


def test_likelihood_of_a_folder(call, tmp_path):
    """The command gives every model the same orders, adds its rows to likelihood.csv, and prints intervals
    over training seeds."""
    models_of_own_data(tmp_path)
    out = call(likelihood, tmp_path, "--steps", 2, "-n", 4, "--orders", 4, "--device", "cpu")
    rows = files.read(tmp_path / "likelihood.csv")
    assert len(rows) == 6 * 2 and {r["orders"] for r in rows} == {1, 4}
    assert all(r["minus base"] == 0 for r in rows if r["model"] == "base")
    assert re.search(r"^the paper's recipe +\| 2 +\| 4 +\| 2 +\| \S+ ± \S+ +\| \S+ ± \S+, ", out, re.M)
    spies = [Spy(tiny(seed=i, adapted=True)) for i in range(2)]
    for spy in spies:
        likelihood.estimates(spy, torch.zeros(3, 6, dtype=torch.int64), 5, 2, 4, lambda done: None)
    assert all(torch.equal(a, b) for a, b in zip(*(spy.xt for spy in spies)))


def walk_as_drawn(denoiser, x0, t, u, mask_id, *, unroll, frozen, schedule, generator):
    times = earlier_times(t, x0.shape[1], unroll, generator)
    return variants.walk(denoiser, x0, times, u, mask_id, frozen, schedule)


def signal_and_gradient(make, **options):
    """What a make_signal gives to one batch, and the gradient that the loss then has for W."""
    model, x0 = tiny(adapted=True, length=12), torch.randint(5, (8, 12), generator=rng(0))
    spy = Spy(model)
    options = {"unroll": 4, "generator": rng(3), "t": torch.rand(8, generator=rng(5)).double()} | options
    diffusion_loss(spy, x0, 5, make_signal=make, **options).sum().backward()
    return spy.x0_prev[-1].detach(), model.self_conditioning.W.grad, spy.xt


def test_variants_change_what_they_say():
    """Walking the states of scmdm.py gives its signal. A gradient through it changes gradients only. Other
    spacings visit other states. A growing number of passes begins with one."""
    signal, gradient, _ = signal_and_gradient(make_signal)
    learnt = signal_and_gradient(variants.learning)
    assert torch.equal(learnt[0], signal) and not torch.allclose(learnt[1], gradient)
    finished = variants.Growing(100)
    finished.done = 100
    for same in (finished, walk_as_drawn):
        found = signal_and_gradient(same)
        assert torch.equal(found[0], signal) and torch.equal(found[1], gradient)
    one_pass = signal_and_gradient(make_signal, unroll=1)[0]
    assert torch.equal(signal_and_gradient(variants.Growing(100))[0], one_pass)

    def uniforms(shape):  # four passes; position i is masked above t = i/12
        return torch.full(shape, 0.99) if shape == (1,) else torch.arange(shape[-1]).expand(shape) / 12 + 0.01

    options = {"t": torch.full((8,), 0.5).double(), "generator": uniforms}
    _, _, states = signal_and_gradient(variants.signal_of("spaced4", 1), **options)
    # at t + 4/4, 3/4, 2/4 and 1/4, where a time above 1 masks everything, and the scored state at t
    assert [(x == 5).sum(1)[0].item() for x in states] == [12, 12, 12, 9, 6]


def test_softened():
    """softened sees the signal at temperature 2. No signal adds exactly nothing."""
    embedding, xt = torch.nn.Embedding(6, 16), torch.tensor([[5, 5, 1]])
    signal = torch.tensor([[[0.2, 0.8, 0, 0, 0], [0, 0, 0, 0, 0], [0.2, 0.8, 0, 0, 0]]])
    adapter = variants.Softened(embedding, 5)
    adapter.W.data = torch.eye(16)
    found = adapter(xt, signal)
    expected = torch.tensor([1 / 3, 2 / 3, 0, 0, 0]) @ embedding.weight[:5]
    assert torch.allclose(found[0, 0], expected, atol=1e-6)
    assert not found[0, 1:].any() and not adapter(xt, None).any()


def test_a_variant_is_trained_and_measured_as_what_it_is(call, tmp_path):
    """A trained variant gets its own adapter back when it is loaded. A finished one is not trained again, and
    other settings are refused."""
    options = ["--out", tmp_path, "--device", "cpu", "--unroll", 2, "--iters"]
    use = functools.partial(call, variants, "softened", *options)
    use(2)
    before = (tmp_path / "rate1-unroll2.npz").read_bytes()
    use(2)
    assert (tmp_path / "rate1-unroll2.npz").read_bytes() == before and "iters" in use(3, status=2)
    _, _, models = bench.open_models(tmp_path, "cpu")
    adapter = models["rate1-unroll2"].self_conditioning
    assert type(adapter) is variants.Softened and adapter.W.any()
    assert not (tmp_path / "rate1-unroll2.state").exists()
    scratch = ("--unroll", 1, "--rate", 0.5, "--iters", 1, "--dim", 16, "--depth", 1, "--device", "cpu")
    call(variants, "scratch", "--out", tmp_path, *scratch)
    assert "from scratch, rate 0.5" in call(bench, tmp_path, "--steps", 1, "-n", 2, "--device", "cpu")


def test_a_scoring_model_scores_by_the_chain_rule():
    """The probabilities of all sequences sum to one, and a token's cost does not depend on later tokens."""
    model = tiny(3, 4, causal=True)
    X = np.array(list(itertools.product(range(3), repeat=4)))
    nll = scoring.scoring_nll(model, X)
    assert nll.shape == (81,) and np.exp(-nll).sum() == pytest.approx(1, abs=1e-4)
    first = scoring.scoring_nll(model, X[:, :1])  # the cost of the first token alone
    rest = np.exp(-nll.reshape(3, 27)).sum(1)  # what all that follows it sums to
    assert np.allclose(np.exp(-first.reshape(3, 27)[:, 0]), rest, atol=1e-5)


def test_a_scoring_model_is_trained(call, tmp_path):
    """The command trains a causal model that is better than guessing, and goes on where it was stopped."""
    domain = models_of_own_data(tmp_path)
    words = ["--data", tmp_path / "novel.txt", "--length", 24, "--out", tmp_path, "--iters", 60]
    words += ["--dim", 16, "--depth", 1, "--heads", 2, "--batch-size", 8, "--lr", 1e-2, "--device", "cpu"]
    nats = float(call(scoring, *words).split()[-4])
    assert nats < math.log(len(domain.vocab)) - 0.3
    model, crc = scoring.find_scoring(tmp_path, domain, "cpu")
    assert model.config.causal and crc.startswith("crc") and f"{nats:.4f}" in call(scoring, *words)


def test_every_run_is_a_command_that_exists(call, monkeypatch):
    """Each command of the runs is accepted by the script that it calls."""
    for name, what in runs.RUNS.items():
        for command in what.train:
            script, *words = command.format(out="x", seed=1).split()
            if script == "train.py":
                monkeypatch.setattr(sys, "argv", [script, *words])
                train_py.parse()
            else:
                assert [script, words[0]] == ["-m", "data.study.variants"], name
                assert words[1] in variants.VARIANTS, name
    assert "unknown runs: nothing" in call(runs, "nothing", status=2)


def test_grids_are_counted():
    """There are 288 grids of 4 x 4. Counting gives the mass on them and -log p. Two grids of 6 x 6 coincide
    if they are the same up to a relabelling of the digits."""
    grids = runs.grids4()
    assert grids.shape == np.unique(grids, axis=0).shape == (288, 16)
    found = runs.count(np.r_[grids, np.zeros_like(grids)])
    assert found["valid"] == 0.5 and found["-log p"] == pytest.approx(math.log(576))
    assert found["entropy of the grids"] == pytest.approx(math.log(288)) and found["never drawn"] == 0
    row, column = np.arange(36) // 6, np.arange(36) % 6
    six = (3 * (row % 2) + row // 2 + column) % 6  # a valid grid
    other = (3 * (row % 2) + (row // 2 + 1) % 3 + column) % 6  # another: its bands in another order
    digits = np.array([3, 1, 2, 0, 5, 4])
    pair = runs.coincide(np.stack([six, digits[six], other, np.zeros_like(six)]))
    assert pair["coincide"] == pytest.approx(39168 / 3), "one pair of the three of valid grids"


def test_pictures(call, tmp_path):
    """Images that sample.py has saved become a PNG for each model, with the right greys."""
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "images.jsonl"
    rows = [{"model": name, "text": "0f" * 98} for name in ["base"] * 12 + ["unroll=8"]]
    path.write_text("\n".join(map(json.dumps, rows)))
    call(pictures, "images", path)
    pixels = image.imread(tmp_path / "images-base.png")
    assert pixels.shape[:2] == (2 * 15 * 4, 10 * 15 * 4) and pixels[0, 0, 0] == 0 and pixels[0, 4, 0] == 1
    assert (tmp_path / "images-unroll=8.png").exists()
    path.write_text("{")
    assert "not what sample.py --save writes" in call(pictures, "images", path, status=2)


def test_figures(call, tmp_path):
    """A results file with several temperatures and numbers of steps gives both figures."""
    pytest.importorskip("matplotlib")
    shutil.copy(HERE / "results" / "text" / "results.csv", tmp_path)
    call(results, tmp_path / "results.csv", "--figures")
    assert {path.name for path in tmp_path.glob("*.png")} == {"frontier.png", "bound.png"}


# --- 5. The write-up ---------------------------------------------------------------------------------------


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def is_part(line, whole):
    """Whether the cells of a line are among those of another, in the same order."""
    rest = iter(cells(whole))
    return all(cell in rest for cell in cells(line) if cell)


def tables_of(text):
    """Yield (commands, lines) of each table that names the commands that print it."""
    for commands, table in re.findall(r"<!-- (python -m .*?) -->\n\n((?:\|.*\n)+)", text):
        yield commands.split("; "), [line for line in table.splitlines() if not set(line) <= set("|- ")]


@pytest.fixture
def printed(call):
    """A function that returns the lines of the tables that a command prints."""

    @functools.cache
    def printed(command):
        module, *words = command.removeprefix("python -m ").split()
        words = [TOP / word if word.endswith(".csv") else word for word in words]
        return [line for line in call(importlib.import_module(module), *words).splitlines() if " | " in line]

    return printed


def test_readme_shows_what_the_files_say(printed):
    """Each row of a table in a README that names its command is among the rows that the command prints."""
    checked = 0
    for readme in (HERE / "README.md", TOP / "README.md"):
        for commands, lines in tables_of(readme.read_text(encoding="utf-8")):
            for line in lines if len(commands) == 1 else []:
                assert any(is_part(line, whole) for whole in printed(commands[0])), f"{commands}: {line}"
                checked += 1
    assert checked > 200


@pytest.mark.parametrize("name", ["README.md", "data/README.md", "data/PORTING.md", "data/study/README.md"])
def test_links_lead_somewhere(name):
    """Each relative link in a page names a file that exists, and each fragment a heading of that file."""

    def fragments(page):
        text = re.sub("```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        titles = re.findall("^#+ (.*)", text, re.M)
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

    page = TOP / name
    links = re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8"))
    assert links
    for path, fragment in links:
        target = page.parent / path if path else page
        assert target.exists() and (not fragment or fragment in fragments(target)), (path, fragment)


def numbers(text):
    """Return the numbers of a text, each as (its value, half a unit of its last digit); without `code`."""
    text = re.sub(r"`.*?`|\]\(.*?\)", "", text)
    found = re.findall(r"(?<![\w.,])[-+]?\d+(?:\.\d+)?(?!\w|,\d)", text)
    return [(float(word), 0.5 * 10.0 ** -len(word.partition(".")[2])) for word in found]


def rounds(text, exact):
    """Whether the numbers of a text are those that another begins with, rounded, or as percentages."""
    pairs, wanted = list(zip(numbers(text), numbers(exact))), len(numbers(text))
    return len(pairs) == wanted and any(
        all(abs(y * scale - x) <= half * 1.001 for (x, half), (y, _) in pairs) for scale in (1, 100)
    )


def test_readme_rounds_what_the_files_say(printed):
    """Each cell of a table in the main README that several commands print rounds a cell of the same model.

    In the sections about results, each number rounds one that their commands print, whatever its sign.
    """
    text, checked = (TOP / "README.md").read_text(encoding="utf-8"), 0
    for commands, lines in tables_of(text):
        whole = [cells(line) for command in commands for line in printed(command)]
        for label, *values in map(cells, lines[1:] if len(commands) > 1 else []):
            of_model = [line for line in whole if line[0] == re.sub(r"`| \(.*", "", label)]
            for value in filter(None, values):
                found = any(rounds(value, cell) for line in of_model for cell in line[1:])
                assert found, f"{label}: {value} is not printed"
                checked += 1
    assert checked > 20
    section = text.split("## Does it reproduce the paper?\n")[1].split("\n## ")[0]
    section += text.split("## Why it works, and what helps\n")[1].split("\n## ")[0]
    commands = set("; ".join(re.findall(r"<!-- (python -m .*?) -->", section)).split("; "))
    prose = " ".join(line for line in section.splitlines() if not line.startswith(("|", "<", "!")))
    exact = numbers(" ".join(line for command in commands for line in printed(command)))
    for x, half in numbers(prose):
        near = any(abs(abs(y) * scale - abs(x)) <= half * 1.001 for y, _ in exact for scale in (1, 100))
        assert near, f"{x} is not printed"


# --- 6. Evidence: repeated passes, remasking, forms, claims ------------------------------------------------


def test_repeated_passes_at_one_state(call, tmp_path):
    """Every pass sees the same state and the prediction of the pass before it. The sums are over masked
    tokens only. The exact denoiser, which needs no signal, gives the same in every pass."""
    world = World(3, 4, 0)
    spy, x0 = Spy(tiny(3, 4, adapted=True)), world.draw(50, 1)
    xt = torch.where(torch.rand(50, 4, generator=rng(2)) < 0.6, 3, x0)
    xt[:, 0] = 3
    sums = passes.repeat(spy, x0, xt, 3, 3)
    assert all(torch.equal(seen, xt) for seen in spy.xt) and spy.x0_prev[0] is None
    for k in range(3):
        p = spy.denoiser(xt, spy.x0_prev[k]).softmax(-1).detach()
        assert k == 2 or torch.equal(spy.x0_prev[k + 1], p)
        for n in range(3):
            at = [(n, j) for j in range(4) if xt[n, j] == 3]
            by_hand = [(-p[i][x0[i]].log(), p[i].argmax() == x0[i], -(p[i] * p[i].log()).sum()) for i in at]
            by_hand = [float(sum(column)) for column in zip(*by_hand)]
            assert sums[k, n].tolist() == pytest.approx(by_hand, abs=1e-4)
    values = passes.measure_passes(world.denoiser, world.draw(4000, 3).numpy(), 0.5, 3, 3)
    nats, _, entropy = (values[metric] for metric in passes.METRICS)
    assert nats[0] == nats[2] and nats[0] == pytest.approx(entropy[0], abs=0.02), "calibrated, as it is exact"
    flat = passes.measure_passes(lambda xt, x0_prev: torch.zeros(*xt.shape, 3), world.X.numpy(), 0.5, 1, 3)
    assert flat["nats per masked token"] == [pytest.approx(math.log(3))], "a mean over masked tokens"
    models_of_own_data(tmp_path)
    out = call(passes, tmp_path, "-n", 4, "--passes", 3, "--model", "base", "rate1", "--t", 1)
    assert re.search(r"^the paper's recipe +\| 2 +\| \S+ ± \S+ +\| \S+ ± \S+ +\| ", out, re.M)
    assert out == call(passes, tmp_path / "passes.csv") and len(files.read(tmp_path / "passes.csv")) == 9


def test_remasking_none_is_the_sampler():
    """With eta = 0 the tokens are those of `sample`. With any eta the signal is carried and known tokens
    stay."""
    for steps, schedule in itertools.product((1, 5), (LINEAR, COSINE)):
        spy, canvas = Spy(tiny(adapted=True)), torch.full((40, 6), 5)
        canvas[:, 2] = torch.arange(40) % 5
        plain = sample(spy.denoiser, canvas, 5, steps, schedule=schedule, generator=rng(1))
        same = remask.remask_sample(spy, canvas, 5, steps, eta=0, schedule=schedule, generator=rng(1))
        assert torch.equal(plain, same)
        spy.xt, spy.x0_prev = [], []
        x = remask.remask_sample(spy, canvas, 5, steps, eta=0.5, schedule=schedule, generator=rng(1))
        assert torch.equal(x[:, 2], canvas[:, 2]) and (x < 5).all() and len(spy.xt) == steps
        for i in range(1, steps):
            assert torch.equal(spy.x0_prev[i], spy.denoiser(spy.xt[i - 1], spy.x0_prev[i - 1]).softmax(-1))


@pytest.mark.parametrize("eta", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("schedule", [LINEAR, COSINE])
def test_remasking_is_its_chain(eta, schedule):
    """What comes out fits the distribution that the chain over all states gives, and at every step the share
    of masked tokens is the schedule's, though tokens are taken back."""
    world, steps = World(2, 3, 0), 4
    states = torch.tensor(list(itertools.product(range(3), repeat=3)))  # [27, 3]; 2 is the mask
    p, shares = (states == 2).all(1).double(), []
    for step in range(steps):
        a_t, a_s = (schedule.alpha(torch.tensor(1 - k / steps)).item() for k in (step, step + 1))
        sigma = min(eta, (1 - a_s) / a_t) if step else 0
        table = world.denoiser(states).exp()  # [27, 3, 2]
        step_to = torch.ones(27, 27, dtype=torch.float64)
        for i in range(3):
            for a, b in itertools.product(range(27), repeat=2):
                before, after = states[a, i].item(), states[b, i].item()
                left = (1 - a_s - a_t * sigma) / (1 - a_t)  # of the masks
                if before == 2:
                    step_to[a, b] *= left if after == 2 else (1 - left) * table[a, i, after].item()
                else:
                    step_to[a, b] *= sigma if after == 2 else (1 - sigma) * (before == after)
        p = p @ step_to
        shares.append((p[:, None] * (states == 2)).sum().item() / 3)
        assert shares[-1] == pytest.approx(1 - a_s, abs=1e-6)
    seen, taken_back, n = [], [], 20_000

    def watch(step, x, x0_prev, chosen):
        seen.append((x == 2).double().mean().item())
        taken_back.append(step > 0 and bool(((before[-1] != 2) & (x == 2)).any()))
        before.append(x)

    before, canvas = [], torch.full((n, 3), 2)
    x = remask.remask_sample(world.denoiser, canvas, 2, steps, eta=eta, schedule=schedule, generator=rng(0),
                             on_step=watch)  # fmt: skip
    assert np.allclose(seen, shares, atol=5 * (0.25 / (3 * n)) ** 0.5) and any(taken_back)
    full = (states < 2).all(1)
    assert_fits(count(x, 2), p[full])


def test_remasking_of_a_folder(call, tmp_path):
    """The command measures every model without and with remasking, each training with its own seed, and
    prints paired differences. Predictive entropy is that of the bench, and left out with remasking."""
    for name in ("base", "rate1", "rate1-seed1"):
        shutil.copy(sample_py.SHIPPED / "sudoku" / f"{name}.npz", tmp_path)
    out = call(remask, tmp_path, "--steps", 3, "-n", 8, "--seeds", 2)
    rows = files.read(tmp_path / "remask.csv")
    assert len(rows) == 2 * (2 + 2) and out == call(remask, tmp_path / "remask.csv")
    assert out == call(remask, tmp_path, "--steps", 3, "-n", 8, "--seeds", 2), "measured once"
    domain, _, models = bench.open_models(tmp_path, "cpu")
    _, entropy, _ = bench.fill(models["base"], torch.full((8, 36), 6), 6, 3, 1)
    mine = [r for r in rows if r["model"] == "base" and r["seed"] == 1 and "sampler" not in r]
    assert sum("predictive entropy" in r for r in rows) == len(rows) / 2
    assert mine[0]["predictive entropy"] == pytest.approx(36 * entropy, rel=1e-6)
    assert re.search(r"^the paper's recipe +\| 3 +\| 2 +\| .* ± ", out, re.M)


def test_a_warm_up_call_comes_before_the_first_step(call, tmp_path):
    """The first step is given the prediction of a call at the same canvas. Later calls are as ever."""
    spy, canvas = Spy(tiny(adapted=True)), torch.tensor([[0, 5, 5, 3, 5, 5]] * 4)
    sample(prompts.warmed(spy, 5), canvas, 5, 3, generator=rng(0))
    assert len(spy.xt) == 4 and torch.equal(spy.xt[0], canvas) and torch.equal(spy.xt[1], canvas)
    for i in range(3):
        assert torch.equal(spy.x0_prev[i + 1], spy.denoiser(spy.xt[i], spy.x0_prev[i]).softmax(-1))
    for name in ("base", "rate1"):
        shutil.copy(sample_py.SHIPPED / "sudoku" / f"{name}.npz", tmp_path)
    out = call(prompts, tmp_path, "--steps", 12, "-n", 16, "--seeds", 1)
    completed = {(r["model"], "sampler" in r): r["completed"] for r in files.read(tmp_path / "prompts.csv")}
    assert len(completed) == 4 and completed["base", False] == completed["base", True]
    found = bench.Bench(data.get("sudoku"), "cpu", 16)
    _, _, models = bench.open_models(tmp_path, "cpu")
    assert completed["rate1", False] == found.samples(models["rate1"], 12, 1, 0)["completed"] > 0
    assert out == call(prompts, tmp_path / "prompts.csv")


def test_forms_start_as_the_base_and_learn():
    """A form is exactly the base until it is trained, adds exactly nothing without a signal and at visible
    positions, and all that is new in it gets a gradient at once."""
    base, x0 = tiny(length=12), torch.randint(5, (8, 12), generator=rng(0))
    xt = torch.where(torch.rand(8, 12, generator=rng(1)) < 0.5, 5, x0)
    signal = torch.rand(8, 12, 5, generator=rng(2)).softmax(-1)
    for form in forms.FORMS:
        model = forms.with_form(add_self_conditioning(base), form)
        with torch.no_grad():
            assert torch.equal(model(xt), base(xt)) and torch.equal(model(xt, signal), base(xt))
        diffusion_loss(model, x0, 5, unroll=4, generator=rng(3)).sum().backward()
        new = dict(model.self_conditioning.named_parameters())
        assert all(p.grad.any() for p in new.values()), form
        with torch.no_grad():
            for p in new.values():
                p.add_(0.3)
            added = model.self_conditioning(xt, signal)
            assert torch.equal(added.any(-1), xt == 5), form
            assert not model.self_conditioning(xt, torch.zeros_like(signal)).any(), form


def test_forms_are_their_formulas():
    """The soft mask mixes the mask's embedding with the expected one. Log-probabilities are centred. The
    hidden state is what the head saw in the call before."""
    model, xt = tiny(), torch.tensor([[5, 5, 1]])
    E, signal = model.embed.weight, torch.tensor([[[0.2, 0.8, 0, 0, 0]] * 3])
    soft = forms.SoftMask(model)
    soft.W.data.fill_(0.3)
    mixed = 0.7 * E[5] + 0.3 * (0.2 * E[0] + 0.8 * E[1])
    assert torch.allclose(E[5] + soft(xt, signal)[0, 0], mixed, atol=1e-6)
    logs = forms.LogProbs(model)
    logs.W.data = torch.eye(16)
    logp = torch.tensor([math.log(0.2), math.log(0.8), *[math.log(1e-4)] * 3])
    assert torch.allclose(logs(xt, signal)[0, 1], (logp - logp.mean()) @ E[:5], atol=1e-4)
    model = forms.with_form(add_self_conditioning(tiny()), "prediction and hidden state")
    model.self_conditioning.U.data.normal_(0, 0.5)
    seen = []
    model.norm.register_forward_hook(lambda norm, args, h: seen.append(h))
    with torch.no_grad():
        model(torch.tensor([[0, 5, 5]]))
        added = model.self_conditioning(xt, signal)
    assert torch.allclose(added[0, :2], (seen[0] @ model.self_conditioning.U.T)[0, :2], atol=1e-6)


def test_a_form_is_trained_read_and_measured(tmp_path):
    """The file of a trained form gives the model back, with the parameters that only the form has."""
    path = forms.train_form("prediction and hidden state", 1, 2, tmp_path)
    before = path.stat().st_mtime_ns
    again = forms.train_form("prediction and hidden state", 1, 2, tmp_path)
    assert again.stat().st_mtime_ns == before, "a finished file is kept"
    model = forms.read_form(path)
    assert model.self_conditioning.U.any() and model.self_conditioning.W.any() and not model.training
    rows = forms.measure_form("prediction and hidden state", tmp_path, 2, [2])
    ours = [r for r in rows if r["model"] == "rate1-unroll8" and r["seed"] == 1]
    held = torch.from_numpy(bench.Bench(data.get("sudoku"), "cpu", 2).sequences(1))
    assert ours[0]["bound"] == pytest.approx(sampler_bound(model, held, 6, 2, generator=rng(1)).mean().item())


def test_forms_are_compared_with_the_present_one():
    """Forms are paired by training seed, at the same number of steps."""
    worse = [own | {"run": "soft mask", "valid": own["valid"] - 0.1, "bound": own["bound"] + 2} for own in OURS]
    rows = [row | {"completed": 0.5} for row in [own | {"run": "present"} for own in OURS] + worse + BASE]
    (line,) = forms.against_present(rows)
    assert (line["form"], line["steps"], line["seeds"]) == ("soft mask", "36", 2)
    assert line["valid"] == "-0.100 ± 0.000, lower" and line["bound"] == "+2.000 ± 0.000, higher"


def test_verdicts():
    """A claim holds if it is clear of both intervals, and does not hold if one difference has the wrong
    sign. In between, and with one seed, it is not settled."""
    clear, within, wrong = (metrics.Estimate(mean, 0.6, 3) for mean in (-0.7, -0.5, 0.7))
    assert claims.verdict([clear, clear], -1) == "holds" and claims.verdict([wrong], 1) == "holds"
    assert claims.verdict([clear, within], -1) == "not settled"
    assert claims.verdict([clear, wrong], -1) == "does not hold" == claims.verdict([clear], 1)
    one = metrics.Estimate(-5.0, None, 1)
    assert claims.verdict([one, clear], -1) == "not settled (one seed)"
    assert claims.verdict([one], 1) == "does not hold (one seed)"
    line = claims.line_of("valid grids", "", {"base": BASE, "rate0": CONTROL, "rate1": OURS}, "valid", 1)
    assert line["base"] == "0.200 ± 1.271" or line["base"] == "0.200", line
    assert line["the paper's recipe"] == "0.700 ± 2.541" and line["verdict"] == "not settled"
    assert claims.line_of("x", "", {"base": BASE}, "valid", 1)["verdict"] == "not measured yet"
    alike = {"rate0": [row("rate0", i, f"c{i}", valid=0.50 + i / 10) for i in range(3)],
             "rate1": [row("rate1", i, f"r{i}", valid=0.51 + i / 10) for i in range(3)]}  # fmt: skip
    expected = 1.96 * math.sqrt((0.6 * 0.4 + 0.61 * 0.39) / 24)
    assert claims.sampling_error(*alike.values(), "valid") == pytest.approx(expected)
    judge = functools.partial(claims.line_of, "valid", "", alike, against=("rate0",))
    assert judge("valid", 1)["verdict"] == "not settled", "eight samples cannot show 0.01"
    line = [row("base", 0, "b", bound=math.log(8))]
    write = claims.as_perplexity("bound", line)
    lower = [line[0] | {"model": "rate1", "bound": math.log(6)}]
    assert write(line) == "8.000" and write(lower) == "6.000 (-25.0%)"


def test_the_two_pass_bound_of_a_folder(call, tmp_path):
    """The command measures what train.py calls validation, and the arithmetic of a call with its signal."""
    domain = models_of_own_data(tmp_path)
    call(claims, "--measure", tmp_path, "-n", 8, "--out", tmp_path / "two_pass.csv")
    rows = {(r["model"], r["seed"]): r for r in files.read(tmp_path / "two_pass.csv")}
    _, _, models = bench.open_models(tmp_path, "cpu")
    val = data.windows(domain.load()[1], 24, 8)
    assert rows["rate1", 1]["two-pass bound"] == train_py.validate(models["rate1-seed1"], val, 64)
    V, D, L = len(domain.vocab), 16, 24
    more = rows["rate1", 0]["flops"] - rows["base", 0]["flops"]
    assert more == 2 * L * D * (V + D) and rows["rate0", 0]["flops"] == rows["base", 0]["flops"]
