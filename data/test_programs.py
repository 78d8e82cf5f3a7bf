"""The tests of train.py and sample.py. Each docstring is one rule.

    1. The training loop
    2. Several processes
    3. The command lines
"""

import contextlib
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import sample as sample_py
import train as train_py
from data import terminal
from scmdm import Config, Transformer, diffusion_loss, load, save
from test_scmdm import HERE, ONE_THREAD, Spy, World, exact_nelbo, full_disk, nll_of, rng, same_weights
from test_scmdm import tiny, toy, two_pass

# =============================================================================================
# 1. The training loop
# =============================================================================================

STREAM = np.random.default_rng(0).integers(0, 5, 400)
SETTINGS = {"iters": 12, "batch_size": 4, "seed": 3, "dtype": "float32", "length": 6}


def loss_at(rate=1.0, unroll=1):
    def loss_of(model, x0, generator):
        return diffusion_loss(model, x0, 5, self_cond_rate=rate, unroll=unroll, generator=generator)

    return loss_of


def short_run(folder, loss_of=loss_at(), lr=1e-2, **more):
    """Train a tiny adapted model for a few iterations. Returns its average."""
    model, state = tiny(seed=4, adapted=True), folder / "rate1.state"
    return train_py.fit(model, loss_of, STREAM, state, SETTINGS | more, lr)


def loss_but(at, then):
    """The loss of SCMDM, in which iteration `at` is replaced by what then() gives."""
    iterations, plain = itertools.count(), loss_at()
    return lambda *args: plain(*args) * (then() if next(iterations) == at else 1)


def interrupt():
    raise KeyboardInterrupt


def test_a_resumed_run_equals_an_unbroken_one(tmp_path, monkeypatch):
    """A run that was stopped goes on from its last state to the same weights, bit for bit."""
    whole = short_run(tmp_path / "..")
    monkeypatch.setattr(train_py, "STATE_EVERY", 0)
    with pytest.raises(KeyboardInterrupt):
        short_run(tmp_path, loss_but(5, interrupt))
    assert torch.load(tmp_path / "rate1.state", weights_only=True)["iteration"] == 5
    assert same_weights(whole, short_run(tmp_path))


@pytest.mark.parametrize("setting", ["seed", "batch_size", "iters", "dtype", "length", "base"])
def test_a_state_of_another_run_is_refused(setting, tmp_path):
    """A state file of other settings is refused by the name of the one that differs; so is a damaged one."""
    with pytest.raises(KeyboardInterrupt):
        short_run(tmp_path, loss_but(0, interrupt))
    with pytest.raises(data.BadInput, match=f"{setting} is .*, now 8"):
        short_run(tmp_path, **{setting: 8})
    (tmp_path / "rate1.state").write_bytes(b"damaged")
    with pytest.raises(data.BadInput, match="rate1.state: not the state of a run, or a damaged one"):
        short_run(tmp_path)


def test_a_full_disk_does_not_stop_a_run(tmp_path, monkeypatch, capsys):
    """A state that cannot be written is a warning. Training goes on to the same end, and no rest is left."""
    whole = short_run(tmp_path / "..")
    monkeypatch.setattr(train_py, "STATE_EVERY", 0)
    with contextlib.ExitStack() as stack:
        from_now_on = loss_but(5, lambda: stack.enter_context(full_disk()) or 1)
        assert same_weights(whole, short_run(tmp_path, from_now_on))
    assert "rate1.state could not be written" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["rate1.state"]


def test_a_nan_stops_the_run_and_leaves_a_way_on(tmp_path, monkeypatch):
    """A gradient that is not finite changes no weight, and the run can go on from its last state."""
    monkeypatch.setattr(train_py, "STATE_EVERY", 0)
    with pytest.raises(data.BadInput, match="not finite at iteration 6 .*; --resume with a lower --lr"):
        short_run(tmp_path, loss_but(6, lambda: math.nan))
    state = torch.load(tmp_path / "rate1.state", weights_only=True)
    assert state["iteration"] == 6 and all(p.isfinite().all() for p in state["model"].values())
    assert all(p.isfinite().all() for p in short_run(tmp_path, lr=1e-3).parameters())


def test_every_iteration_sees_another_batch_and_other_noise(tmp_path):
    """No batch and no noise of a run comes twice, over all processes."""
    batches, noises = set(), set()
    for k, rank in itertools.product(range(12), range(3)):
        pick, noise = train_py.generators(3, k, rank, "cpu")
        batches.add(tuple(torch.randint(400, (4,), generator=pick).tolist()))
        noises.add(torch.rand(1, generator=noise).item())
    assert len(batches) == len(noises) == 36
    other, _ = train_py.generators(4, 0, 0, "cpu")
    assert tuple(torch.randint(400, (4,), generator=other).tolist()) not in batches


class OneWeight(torch.nn.Module):
    """A model of one weight. If that is the loss, each update of AdamW lowers it by the learning rate."""

    def __init__(self):
        super().__init__()
        self.weight, self.config = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)), Config(5, 6)


def test_the_learning_rate_and_the_average_are_their_formulas(tmp_path):
    """The learning rate rises over a twentieth of the run, at most 200 iterations, then falls as a cosine.
    The average forgets the initial weights fast, and later has a decay of 0.999."""
    seen, iters, lr = [], 1200, 1e-2

    def loss_of(model, x0, generator):
        seen.append(model.weight.item())
        return 6 * model.weight.expand(len(x0))  # 6 tokens: the loss per token is the weight

    settings = SETTINGS | {"iters": iters}
    average = train_py.fit(OneWeight(), loss_of, STREAM, tmp_path / "x.state", settings, lr)
    k = np.arange(iters)
    rate = lr * np.minimum((k + 1) / 60, 0.5 * (1 + np.cos(np.pi * k / iters)))
    assert np.allclose(-np.diff(seen), rate[:-1], rtol=1e-6)
    expected, weights = 0.0, -np.cumsum(rate)  # after each update
    for k, weight in enumerate(weights):
        decay = min(0.999, (k + 1) / (k + 10))
        expected = decay * expected + (1 - decay) * weight
    assert average.weight.item() == pytest.approx(expected, rel=1e-6)
    assert train_py.learning_rate(99, 10000, 1.0) == pytest.approx(0.5)
    assert train_py.learning_rate(0, 5, 1.0) == 1, "a short run has no warm-up"


def test_training_learns(tmp_path):
    """Training lowers the loss: on sequences that count upwards, to nearly what cannot be known."""
    rows = (np.arange(6) + np.arange(5)[:, None]) % 5
    torch.manual_seed(0)
    model = Transformer(Config(5, 6, dim=32, depth=2, heads=2))
    before = train_py.validate(model, np.repeat(rows, 8, 0), 64)
    settings = SETTINGS | {"iters": 300, "batch_size": 32}
    average = train_py.fit(model, loss_at(0.0), rows, tmp_path / "x.state", settings, 5e-3)
    after = train_py.validate(average, np.repeat(rows, 8, 0), 64)
    assert before > 1.4 and after < 1.3 * math.log(5) / 6  # one token tells all: log 5 nats for each sequence


@pytest.mark.parametrize("adapted", [False, True])
def test_validation_is_the_exact_nelbo(adapted):
    """validate() estimates the NELBO that enumeration gives, in nats per token, whatever the batch size."""
    V, L, copies, draws = 2, 3, 300, 9
    model, X = tiny(V, L, adapted=adapted), World(V, L, 0).X
    denoiser = two_pass(model) if adapted else model
    with torch.no_grad():
        exact = exact_nelbo(denoiser, X, V).mean().item() / L
        by_mask = []  # what a sequence may cost: its masked positions, over their number
        for mask in torch.tensor(list(itertools.product([False, True], repeat=L)))[1:]:
            cost = (nll_of(denoiser(torch.where(mask, V, X), None), X) * mask).sum(1)
            by_mask.append(cost / mask.sum())
    sigma = torch.stack(by_mask).std().item() / (len(X) * copies * draws) ** 0.5
    for batch_size in (64, 7):
        found = train_py.validate(model, X.repeat(copies, 1).numpy(), batch_size, draws)
        assert abs(found - exact) < 5 * sigma


# =============================================================================================
# 2. Several processes
# =============================================================================================

WAYS = [(0.0, 1), (0.5, 1), (1.0, 1), (1.0, 4)]  # rate, unroll
PER_RANK = 2  # sequences for each of two processes


def fit_each_way(folder):
    """What each process does: train in every way, and keep the weights, which a barrier lets all finish."""
    torch.distributed.init_process_group("gloo")
    rank, weights = train_py.processes()[0], []
    for i, way in enumerate(WAYS):
        model = tiny(seed=4, adapted=way[0] > 0)
        train_py.fit(model, loss_at(*way), STREAM, Path(folder) / f"{i}.state", SETTINGS, 1e-2)
        weights.append(model.state_dict())
    torch.save(weights, Path(folder) / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def averaged_gradients(rate, unroll, world=2):
    """The weights that a single process gets if it averages the gradients of `world` ranks."""
    model = tiny(seed=4, adapted=rate > 0)
    optimiser, windows = train_py.make_optimiser(model, 1e-2), torch.from_numpy(STREAM).unfold(0, 6, 1)
    for k in range(SETTINGS["iters"]):
        optimiser.zero_grad()
        for rank in range(world):
            pick, noise = train_py.generators(SETTINGS["seed"], k, rank, "cpu")
            x0 = windows[torch.randint(len(windows), (PER_RANK,), generator=pick)]
            (loss_at(rate, unroll)(model, x0, noise).mean() / 6 / world).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = train_py.learning_rate(k, SETTINGS["iters"], 1e-2)
        optimiser.step()
    return model.state_dict()


def test_several_processes_average_their_gradients(tmp_path):
    """Two processes hold the same weights, which are those of one process that averages their gradients."""
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 --no-python".split()
    code = f"from data.test_programs import fit_each_way; fit_each_way({str(tmp_path)!r})"
    worker = [sys.executable, "-c", code]
    command = [sys.executable, *torchrun, *worker]
    done = subprocess.run(command, cwd=HERE, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for way, first, second in zip(WAYS, *ranks, strict=True):
        one = averaged_gradients(*way)
        assert all(torch.equal(first[name], second[name]) for name in one), way
        assert all(torch.allclose(one[name], first[name], atol=1e-5) for name in one), way
        assert not torch.allclose(one["embed.weight"], tiny(seed=4).embed.weight), "nothing was trained"


# =============================================================================================
# 3. The command lines
# =============================================================================================

SMALL = "--stage pretrain --dim 16 --depth 1 --heads 2 --iters 3 --batch-size 4".split()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with a user's own text, a base, and three iterations of each way to adapt it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "novel.txt").write_text("a quick brown fox jumps over the lazy dog_\n" * 640)
    common = ["train.py", "--data", str(folder / "novel.txt"), "--length", "24", "--out", str(folder)]
    adapt = "--iters 3 --batch-size 4 -n 0 --rates 0 0.5 1 1 --unroll 1 3".split()
    with pytest.MonkeyPatch.context() as patch:
        for words in (SMALL, adapt):
            patch.setattr(sys, "argv", [*common, *words])
            terminal.run(train_py.main)
    return folder


def first_column(printed):
    """The first column of the table in what was printed, without its head."""
    lines = [line for line in printed.splitlines() if " | " in line]
    assert lines[0].startswith("model") and lines[1].startswith("---")
    return [line.split(" | ")[0].strip() for line in lines[2:]]


def test_own_text_end_to_end(own, call, tmp_path):
    """One's own text is trained on, adapted at every rate, sampled, infilled, filmed, saved and compared."""
    ways = {"rate0", "rate0.5", "rate0.5-unroll3", "rate1", "rate1-unroll3"}
    assert {f.name for f in own.iterdir()} == {"novel.txt", "base.npz"} | {f"{way}.npz" for way in ways}
    adapted = {way: load(own / f"{way}.npz").config.self_conditioning for way in ways}
    assert adapted == {way: way != "rate0" for way in ways}, "the control has no adapter"
    use = functools.partial(call, sample_py, "--models", own, "--steps", 4)
    film, samples = tmp_path / "x.svg", tmp_path / "x.jsonl"
    out = use("--prompt", r"fox ____ dog\_", "-n", 3, "--batch-size", 2, "--save", samples, "--film", film)
    assert "base" in out and "unroll=3" in out and out.count("fox ") >= 6
    texts = [json.loads(line)["text"] for line in samples.read_text().splitlines()]
    assert len(texts) == 6 and film.read_text().startswith("<svg")
    assert all(text.startswith("fox ") and text[8:13] == " dog_" and len(text) == 24 for text in texts)
    out = use("--prompt", "fox ____ dog", "--length", 12, "-n", 1, "--model", "rate0.5", "--watch")
    assert "rate 0.5" in out and "step 4" in out and "step 5" not in out
    out = use("--compare", "-n", 4)
    names = ["base", "control", "rate 0.5", "rate 0.5, unroll=3", "the paper's recipe", "unroll=3"]
    assert first_column(out) == [*names, "real data"]
    assert use("--compare", "-n", 4) == out, "the same seed gives the same table"
    assert use("--compare", "-n", 4, "--seed", 1) != out


def test_the_comparison_is_fair(own):
    """The held-out sequences are never also the reference, and every model gets the same masks."""
    val = np.arange(600).reshape(150, 4)  # no two sequences are alike
    rows, reference = sample_py.held_out(data.Domain("x", list("abc"), 4, load=lambda: (val, val)))
    assert len(rows) == len(reference) == 75
    assert sorted(np.concatenate((rows, reference)).tolist()) == val.tolist()
    x0 = torch.randint(3, (5, 4), generator=rng(0))
    spies = Spy(toy(3, 1)), Spy(toy(3, 2))
    values = [sample_py.bounds(spy, x0, 3, 6, seed=7, batch_size=2) for spy in spies]
    assert all(torch.equal(a, b) for a, b in zip(spies[0].xt, spies[1].xt, strict=True))
    assert values[0].shape == (5,) and not np.allclose(*values)
    assert not np.allclose(values[0], sample_py.bounds(spies[0], x0, 3, 6, seed=8))


def test_generate_is_seeded_and_batched():
    """The same seed and batch size give the same samples, and no batch is larger than was asked for."""
    spy, canvas = Spy(toy(3)), torch.full((5, 6), 3)
    x = sample_py.generate(spy, canvas, 3, 2, seed=1, batch_size=2)
    assert [len(xt) for xt in spy.xt] == [2, 2, 2, 2, 1, 1]
    assert torch.equal(x, sample_py.generate(toy(3), canvas, 3, 2, seed=1, batch_size=2))
    assert not torch.equal(x, sample_py.generate(toy(3), canvas, 3, 2, seed=2, batch_size=2))


def test_a_difference_and_its_interval():
    """A difference is a paired mean, with 1.96 standard errors as half of its 95% interval."""
    mean, half = sample_py.difference(np.array([3.0, 5.0, 7.0, 9.0]), np.array([2.0, 3.0, 6.0, 7.0]))
    assert mean == pytest.approx(1.5)  # of 1, 2, 1, 2, whose standard deviation is the root of 1/3
    assert half == pytest.approx(1.96 * math.sqrt(1 / 3) / 2)


def test_a_difference_within_its_interval_is_no_gain(capsys):
    """The closing sentences compare with base and control, and call only a clear difference a difference."""
    base = np.linspace(17, 21, 50)
    noise = np.tile([-1.0, 1.0], 25)
    bound = {"base": base, "rate0": base - 0.1 + noise, "rate1": base + 9, "rate1-unroll8": base - 0.2}
    score = {name: {"valid": 0.1} for name in bound} | {"rate1-unroll8": {"valid": 0.3}}
    sample_py.conclude(data.get("sudoku"), 36, bound, score)
    assert " ".join(capsys.readouterr().out.split()) == (
        "With 36 sampling steps, valid is 0.30 for SCMDM (unroll=8), 0.10 for the base and 0.10 for the"
        " control. The bound of SCMDM is below that of the base (-0.20 ± 0.00 nats) and no different from"
        " that of the control (-0.10 ± 0.28 nats). There is one training seed, and ± is over held-out sequences."
    )


def test_nothing_finished_is_destroyed(own, call, tmp_path):
    """A finished model is never written over; --resume keeps it, if data, base and settings are the same."""
    common = ["--data", own / "novel.txt", "--length", 24, "--out", own, "-n", 0, "--batch-size", 4]
    train = functools.partial(call, train_py, *common, "--rates", 1, "--unroll", 1, "--iters")
    before = (own / "rate1.npz").read_bytes()
    assert "rate1.npz exists, or its training has begun: --resume" in train(3, status=2)
    assert "iters is 3, now 4" in train(4, "--resume", status=2)
    assert "validation" in train(3, "--resume")
    assert (own / "rate1.npz").read_bytes() == before
    other = tmp_path / "base.npz"
    model = load(own / "base.npz")
    model.head.weight.data += 0.1
    save(other, model)
    assert "is another base" in train(3, "--resume", "--init", other, status=2)
    same_name = tmp_path / "novel.txt"
    same_name.write_text("the lazy dog_ jumps over a quick brown fox\n" * 640)
    assert "trained on other data" in train(3, "--data", same_name, status=2)
    (tmp_path / "rate1.npz").write_bytes(before)
    assert "adapted from another base" in call(sample_py, "--models", tmp_path, status=2)


def test_a_model_file_holds_the_average(own, tmp_path):
    """What a training writes is the moving average of its weights in float16, not the last weights."""
    file, domain = load(own / "base.npz"), data.get(str(own / "novel.txt"), length=24)

    def loss_of(model, x0, generator):
        return diffusion_loss(model, x0, file.mask_id, self_cond_rate=0.0, generator=generator)

    torch.manual_seed(0)
    model, settings = Transformer(file.config), file.info["made_from"]
    state = tmp_path / "x.state"
    average = train_py.fit(model, loss_of, domain.load()[0], state, settings, file.info["lr"])
    assert same_weights(file, average.half().float()) and not same_weights(file, model.half().float())


def test_a_second_run_in_a_folder_stops(own, call, tmp_path):
    """A run leaves its state as soon as it begins, and a second one in that folder stops before training."""
    shutil.copy(own / "base.npz", tmp_path)
    words = ["--data", own / "novel.txt", "--length", 24, "--out", tmp_path, "--rates", 0, "--iters", 3]
    (tmp_path / "rate0.state").touch()  # of the first run
    assert "rate0.npz exists, or its training has begun" in call(train_py, *words, status=2)
    assert not (tmp_path / "rate0.npz").exists()


def test_a_model_that_does_not_fit_on_the_disk_can_be_finished_later(own, call, tmp_path):
    """If the finished model cannot be written, the state of the run stays, and --resume writes the model."""
    shutil.copy(own / "base.npz", tmp_path)
    words = ["--data", own / "novel.txt", "--length", 24, "--out", tmp_path, "--rates", 0, "--iters", 3]
    words += ["--batch-size", 4, "-n", 0]
    (tmp_path / f"rate0.npz.{os.getpid()}.tmp").mkdir()  # the way is blocked
    with pytest.raises(IsADirectoryError):
        save(tmp_path / "rate0.npz", tiny())
    assert "rate0.npz: Is a directory" in call(train_py, *words, status=2)
    assert (tmp_path / "rate0.state").exists() and not (tmp_path / "rate0.npz").exists()
    (tmp_path / f"rate0.npz.{os.getpid()}.tmp").rmdir()
    call(train_py, *words, "--resume")
    assert (tmp_path / "rate0.npz").exists() and not (tmp_path / "rate0.state").exists()


def test_the_main_job(call, monkeypatch, tmp_path):
    """train.py alone pretrains on Sudoku, adapts, and ends with a table, two sentences and a command."""
    small = dict(dim=16, depth=1, heads=4, batch_size=4, pretrain=3, adapt=2)
    monkeypatch.setitem(train_py.DEFAULTS, "sudoku", small)
    out = call(train_py, "--out", tmp_path, "-n", 8)
    assert first_column(out) == ["base", "control", "the paper's recipe", "unroll=8", "real data"]
    assert "17.15" in [line for line in out.splitlines() if line.startswith("real data")][0]
    values = r"valid is .* SCMDM \(unroll=8\), .* base and .* control"
    words = " ".join(out.split())
    assert re.search(rf"With 36 sampling steps, {values}\. The bound of SCMDM is ", words)
    assert re.search(r"that of the base \(.*\) and .* that of the control \(.* nats\)\. There is one", words)
    table = out[out.index("model ") : out.index("In all")]
    assert max(map(len, table.splitlines())) <= 110 and "sample.py --models" in out.splitlines()[-1]
    again = call(train_py, "--out", tmp_path, "-n", 8, "--resume")
    first, second = (words[words.index("rate0: ") : words.index("In all")] for words in (out, again))
    assert first == second
    call(train_py, "--out", tmp_path, "--seed", 1, "--rates", 1, "--unroll", 1, "-n", 0)
    out = call(sample_py, "--models", tmp_path, "--model", "rate1-seed1", "--steps", 2)
    assert "the paper's recipe, seed 1" in out


def test_a_bug_keeps_its_traceback(monkeypatch, capsys):
    """Only bad input becomes one line. Any other exception, as of someone's edit, is raised as it is."""

    def wrong():
        _, _ = (1, 2, 3)

    with pytest.raises(ValueError, match="too many values"):
        terminal.run(wrong)

    def bad_input():
        raise data.BadInput("data.txt: no such file")

    with pytest.raises(SystemExit) as stop:
        terminal.run(bad_input)
    assert stop.value.code == 2 and capsys.readouterr().err.endswith(": data.txt: no such file\n")


BAD_INPUT = {  # OWN is the folder of the fixture
    "train --iters 0": "argument --iters: 0 is not between 1 and inf",
    "train --rates 1.5": "argument --rates: 1.5 is not between 0 and 1",
    "train --iters many": "argument --iters: invalid int value: 'many'",
    "train --stage pretrain --unroll 4": "--unroll has no effect with --stage pretrain",
    "train --dim 8": "--dim has no effect with --stage adapt",
    "train --stage pretrain --dim 30": "--dim is 30, expected a multiple of 2 * heads",
    "train --data missing.txt": "missing.txt",
    "train --out file/below": "--out file/below: Not a directory",
    "train --init missing.npz": "missing.npz: No such file",
    "train --init OWN/base.npz": "tokens that the model has never seen",
    "train --data OWN/novel.txt --length 24 --init OWN/rate1.npz": "not a base",
    "train --data OWN/novel.txt --length 20 --init OWN/base.npz": "sequences of 20 tokens, expected 24",
    "sample --compare --watch": "--compare measures free samples",
    "sample --compare --order confidence": "--compare measures free samples",
    "sample --compare -n 1": "--compare needs two or more sequences",
    "sample --models nowhere": "no base.npz there",
    "sample --models OWN --data dna": "models of novel, expected dna",
    "sample --models OWN --model rate7": "no rate7.npz there",
    "sample --models OWN --prompt Zoë": "--prompt has 'Z', which the model has never seen",
    "sample --models OWN --prompt _________________________": "--prompt has 25 tokens, expected at most 24",
    "sample --models OWN --length 25": "--length is 25, expected at most the model's 24",
    "sample --models OWN --temperature -1": "argument --temperature: -1.0 is not between 0",
    "sample --models OWN --steps 2 --save nowhere/x.jsonl": "nowhere/x.jsonl: No such file",
    "sample --models OWN --steps 2 --film nowhere/x.svg": "nowhere/x.svg: No such file",
    "sample --models OWN --device tpu": "--device tpu: there is none",
    "sample --prompt 12____ --length 6": "--length 6: a sudoku sample is a grid of 36 tokens",
    "sample --data images --length 10": "--length 10: a images sample is a grid of 196 tokens",
    "sample --models broken": "base.npz: not a model file",
    "sample --models foreign": "base.npz: a model that train.py did not make",
    "sample --models mixed": "rate1.npz: a model of other tokens",
}


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input(command, own, call, tmp_path, monkeypatch):
    """Bad input gets exit status 2, a line that names it, and no traceback."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for name in ("broken", "foreign", "mixed"):
        Path(name).mkdir()
    Path("broken/base.npz").write_bytes((own / "base.npz").read_bytes()[:-200])
    save("foreign/base.npz", tiny())
    shutil.copy(own / "rate1.npz", "mixed")
    shutil.copy(sample_py.SHIPPED / "sudoku" / "base.npz", "mixed")
    script, *words = (word.replace("OWN", str(own)) for word in command.split())
    assert BAD_INPUT[command] in call({"train": train_py, "sample": sample_py}[script], *words, status=2)


def test_a_second_text_takes_the_vocabulary_of_the_base(own, call, tmp_path):
    """A text of some of the base's characters is adapted with the base's vocabulary; others are named."""
    second = tmp_path / "second.txt"
    second.write_text("a lazy fox\n" * 640)
    words = ["--length", 24, "--init", own / "base.npz", "-n", 0]
    words += ["--rates", 1, "--unroll", 1, "--iters", 2]
    call(train_py, "--data", second, "--out", tmp_path / "out", *words)
    model = load(tmp_path / "out" / "rate1.npz")
    assert model.info["vocab"] == load(own / "base.npz").info["vocab"]
    assert "base" in call(sample_py, "--models", tmp_path / "out", "--prompt", "quick", "--steps", 2)
    second.write_text("a lazy fox & Zoë\n" * 640)
    error = call(train_py, "--data", second, "--out", tmp_path / "other", *words, status=2)
    assert all(character in error for character in "&Zë")


@pytest.mark.parametrize("kind", ["lines", "rows", "stream"])
def test_own_sequences(kind, call, tmp_path):
    """One sequence per line, rows of integers and one stream of them are trained on and sampled like text."""
    path, words = tmp_path / "data.npy", tmp_path / "words.txt"
    numbers = np.random.default_rng(0).integers(0, 12, (60, 7))
    if kind == "lines":
        path, prompt, flags = tmp_path / "data.txt", "he__o", ["--lines", "--length", 7]
        path.write_text("\n".join(["hello", "bee", "a", "seventh", "much too long"] * 10))
    elif kind == "rows":
        prompt, flags = "3 11 __ 4", []
        np.save(path, numbers)
    else:
        prompt, flags = "w3 w11 __ w4", ["--length", 7, "--vocab", words]
        np.save(path, numbers.flatten())
        words.write_text("\n".join(f"w{i}" for i in range(12)))
    call(train_py, "--data", path, "--out", tmp_path, *flags, *SMALL)
    assert load(tmp_path / "base.npz").config.length == (8 if kind == "lines" else 7)
    use = functools.partial(call, sample_py, "--models", tmp_path)
    assert use("--prompt", prompt, "--steps", 3, "-n", 70).count("\n" + prompt.split("_")[0]) == 70
    assert first_column(use("--compare", "-n", 2, "--steps", 2)) == ["base", "real data"]
    path.unlink()
    use("--steps", 2)  # sampling needs no data
    assert "the data is no longer there" in use("--compare", status=2)


def test_scripts_run_as_commands(own):
    """From a shell: --help is a page, an ASCII terminal and `| head` do no harm, ^C says how to go on."""
    python = f"PYTHONIOENCODING=ascii {sys.executable} {HERE}"
    done = subprocess.run(f"{python}/train.py --help", shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and "--rates" in done.stdout
    watched = f"{python}/sample.py --models {own} --steps 2 --watch -n 200 | head -n 1"
    done = subprocess.run(watched, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Error" not in done.stderr
    words = [sys.executable, HERE / "train.py", "--out", own / "stopped", "--device", "cpu"]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # after `&` it is ignored
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=ONE_THREAD, preexec_fn=heard)
    while process.poll() is None and not (own / "stopped" / "base.state").exists():
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and err.rstrip().endswith("--resume") and "Traceback" not in err, err


@pytest.mark.parametrize("name", data.NAMES)
def test_shipped_models(name):
    """Every domain ships a base and its adaptations, of its own tokens; each is better than guessing."""
    domain, models = sample_py.load_models(sample_py.models_in(sample_py.SHIPPED / name), torch.device("cpu"))
    assert domain.name == name and len(models) >= 2
    assert any(model.config.self_conditioning for model in models.values())
    rows = torch.from_numpy(data.windows(domain.load()[1], domain.length, 16).astype(np.int64))
    for model in models.values():
        loss = diffusion_loss(model, rows, model.mask_id, generator=rng(0)).mean()
        assert loss < domain.length * math.log(len(domain.vocab))
