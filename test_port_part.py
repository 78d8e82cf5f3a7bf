"""The part of test_scmdm.py that is about ports: golden values, the kit data/golden.py, data/PORTING.md.

    python test_port_part.py    write data/golden.npz again (values that have not moved stay to the bit)
"""

import copy
import inspect
import itertools
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import scmdm
import train as train_py
from data import golden
from scmdm import Config, SelfConditioning, Transformer, add_self_conditioning, diffusion_loss, load
from scmdm import sample, sampler_bound

HERE = Path(__file__).parent
PORTING = HERE / "data" / "PORTING.md"


def tiny(V=5, length=6, seed=0, adapted=False, **kw):
    """A Transformer of random weights, large enough to matter; adapted: with a matrix W that is not zero."""
    torch.manual_seed(seed)
    model = Transformer(Config(V, length, dim=16, depth=2, heads=2, **kw))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.ndim == 1 else 0.0, 0.3)
    if adapted:
        model = add_self_conditioning(model)
        model.self_conditioning.W.data.normal_(0, 0.5)
    return model


# --- golden values -----------------------------------------------------------------------------------------


class Replay:
    """A generator that gives these arrays, one for each draw, each of the shape that is asked for."""

    def __init__(self, *uniforms):
        self.rest = [torch.as_tensor(u) for u in uniforms]

    def __call__(self, shape):
        assert self.rest[0].shape == tuple(shape)
        return self.rest.pop(0)


# --- (what stands above is in test_scmdm.py already) -------------------------------------------------------


def golden_model():
    """The tiny model of data/golden.npz, with position embeddings and an adapter that is not zero."""
    return tiny(V=5, length=8, seed=1, adapted=True, positions=True)


def trained(model, loss_of, iters):
    """Train model with train.py on loss_of(model, k) -> [b], at k = 0, 1, ...; returns the moving average."""
    settings, k = {"iters": iters, "batch_size": 1, "seed": 0, "dtype": "float32"}, itertools.count()
    rows = np.zeros((1, model.config.length))  # the loss does not look at them
    with tempfile.TemporaryDirectory() as folder:
        state, of_k = Path(folder) / "golden.state", lambda model, x0, noise: loss_of(model, next(k))
        return train_py.fit(model, of_k, rows, state, settings, 1e-2)


def golden_training(x0, t, u_mask, u_given):
    """Three iterations on the loss, each at the same noise. {name: array}"""
    model, losses = golden_model(), []
    gradients = {name: [] for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():  # before they are clipped
        p.register_post_accumulate_grad_hook(lambda p, kept=gradients[name]: kept.append(p.grad.clone()))

    def loss_of(model, k):
        losses.append(diffusion_loss(model, x0, 5, t=t, generator=Replay(u_mask, u_given)))
        return losses[-1]

    average = trained(model, loss_of, 3)
    arrays = {"optimiser/loss": torch.stack(losses).mean(1) / x0.shape[1]}
    arrays |= {f"optimiser/gradient/{name}": torch.stack(kept) for name, kept in gradients.items()}
    for name in ("embed.weight", "self_conditioning.W", "blocks.0.qkv.weight"):
        arrays[f"optimiser/live/{name}"] = model.get_parameter(name)
        arrays[f"optimiser/average/{name}"] = average.get_parameter(name)
    return arrays


def golden_recipe(rand, model):
    """Forty gradients, of norms from 0.1 to 10, for an array of each kind. {name: [40, ...]}"""
    names = ["embed.weight", "position_embed.weight", "blocks.0.norm1.weight", "blocks.0.norm2.weight"]
    names += ["norm.weight", "head.weight", "self_conditioning.W"]
    gradients = {name: rand.standard_normal((40, *model.get_parameter(name).shape)) for name in names}
    gradients["embed.weight"][:, 0] *= 1e-6  # one row so small that epsilon matters
    norms = np.sqrt(sum((g.reshape(40, -1) ** 2).sum(1) for g in gradients.values()))  # [40]
    scale = 10 ** rand.uniform(-1, 1, 40) / norms  # [40]
    return {name: (g.T * scale).T.astype(np.float32) for name, g in gradients.items()}


def trained_with(gradients):
    """What train.py makes of these gradients: (weights, their average), {name: array}."""
    model = golden_model()

    def loss_of(model, k):  # linear in the weights, so that its gradient is the given one
        terms = [(model.get_parameter(name) * torch.as_tensor(g[k])).sum() for name, g in gradients.items()]
        return model.config.length * sum(terms)[None]  # which train.py divides by the length

    average = trained(model, loss_of, 40)
    return tuple({name: m.get_parameter(name) for name in gradients} for m in (model, average))


def other_mask(model, mask_id):
    """The model, with one of its V tokens as the mask, as BERT has it."""
    model = copy.deepcopy(model)
    W = model.self_conditioning.W
    model.self_conditioning = SelfConditioning(model.embed, mask_id)
    model.self_conditioning.W = W
    return model


def make_golden():
    """The arrays of data/golden.npz; STEPS in data/golden.py says what each is for."""
    model, rand = golden_model(), np.random.default_rng(0)
    # the inputs
    xt = rand.integers(0, 6, (2, 8))
    xt[:, ::3] = 5
    x0_prev = golden.softmax(2 * rand.standard_normal((2, 8, 5))).astype(np.float32)
    u_given = np.array([0.2, 0.7, 0.4, 0.9])
    x0, t, u_mask = rand.integers(0, 5, (4, 8)), np.array([0.0004, 0.4, 0.65, 0.9]), rand.random((4, 8))
    u_mask[0, 3] = 0.0006  # masked only because the first time is raised to 0.001
    canvas = np.full((2, 8), 5)
    canvas[1, 2:4] = 1, 3
    u_reveal, u_token = rand.random((2, 6, 2, 8))
    u_token[5, 0, 2] = 1 - 2**-53  # the last token, in float64 and if the sum is divided by its end
    u_passes, u_calls = np.array([0.6]), np.array([0.3, 0.1, 0.5, 0.95])  # 3 passes; T from 2.6 to 28
    u_bound = rand.random((4, 8))
    rand = np.random.default_rng(2)  # what was added later has its own numbers
    frozen = rand.random((4, 8)) < 0.4
    frozen_x0 = np.where(frozen & (rand.random((4, 8)) < 0.5), 5, x0)  # the mask stands at some of them
    inside_x0, inside_canvas = np.where(x0 == 2, 4, x0), np.where(canvas == 5, 2, canvas)  # 2 is the mask
    u_reveal4, u_token4 = rand.random((2, 4, 2, 8))
    arrays = {f"weights/{name}": p for name, p in model.state_dict().items()} | {"heads": np.array(2)}
    arrays |= {"forward/xt": xt, "forward/x0_prev": x0_prev, "loss/x0": x0, "loss/t": t}
    arrays |= {"loss/u_mask": u_mask, "loss/u_given": u_given}
    arrays |= {"unroll/u_passes": u_passes, "unroll/u_calls": u_calls}
    arrays |= {"sample/canvas": canvas, "sample/u_reveal": u_reveal, "sample/u_token": u_token}
    arrays |= {"bound/u": u_bound, "frozen/x0": frozen_x0, "frozen/frozen": frozen}
    arrays |= {"inside/mask_id": np.array(2), "inside/x0": inside_x0, "inside/canvas": inside_canvas}
    arrays |= {"confidence/u_reveal": u_reveal4, "confidence/u_token": u_token4}

    # what is made of them: the model
    autoregressive = copy.deepcopy(model)
    for block in autoregressive.blocks:
        block.causal = True
    xt, x0_prev, x0, t = (torch.tensor(a) for a in (xt, x0_prev, x0, t))
    arrays |= {"forward/logits_without_signal": model(xt), "forward/logits_with_signal": model(xt, x0_prev)}
    arrays |= {"forward/logits_causal": autoregressive(xt)}

    # the loss
    def loss(x0=x0, model=model, mask_id=5, unroll=1, **options):
        draws = Replay(u_mask, u_given, u_passes, u_calls) if unroll > 1 else Replay(u_mask, u_given)
        return diffusion_loss(model, x0, mask_id, t=t, unroll=unroll, generator=draws, **options)

    hold = {"x0": torch.tensor(frozen_x0), "frozen": torch.tensor(frozen)}
    inside = {"model": other_mask(model, 2), "x0": torch.tensor(inside_x0), "mask_id": 2}
    arrays |= {"loss/loss": loss(), "loss/loss_at_rate_half": loss(self_cond_rate=0.5)}
    arrays |= {"unroll/loss": loss(unroll=4), "unroll/loss_at_rate_half": loss(unroll=4, self_cond_rate=0.5)}
    arrays |= {"frozen/loss": loss(**hold), "frozen/loss_unrolled": loss(**hold, unroll=4)}
    arrays |= {"inside/loss": loss(**inside)}
    arrays["loss/loss"].mean().backward()
    for name in golden.PASS_1_MATTERS:
        arrays[f"loss/gradient/{name}"] = model.get_parameter(name).grad

    # the sampler
    def sampled(name, model=model, canvas=canvas, u_reveal=u_reveal, u_token=u_token, mask_id=5, **options):
        draws, signals = Replay(*(u for pair in zip(u_reveal, u_token) for u in pair)), []
        keep = lambda step, x, x0_prev: signals.append(x0_prev)  # noqa: E731
        canvas, steps = torch.tensor(canvas), len(u_reveal)
        tokens = sample(model, canvas, mask_id, steps, generator=draws, on_step=keep, **options)
        return {f"{name}/tokens": tokens, f"{name}/x0_prev": torch.stack(signals)}

    tied = copy.deepcopy(model)
    torch.nn.init.zeros_(tied.head.weight)
    four = {"u_reveal": u_reveal4, "u_token": u_token4, "order": "confidence", "temperature": 0.5}
    arrays |= sampled("sample") | sampled("nucleus", temperature=0.6, top_p=0.9)
    arrays |= sampled("argmax", temperature=0) | sampled("confidence", **four) | sampled("tied", tied, **four)
    arrays |= sampled("inside", inside["model"], inside_canvas, mask_id=2)

    # the bound, and training
    def bound(x0=x0, model=model, mask_id=5, **options):
        return sampler_bound(model, x0, mask_id, 6, generator=Replay(u_bound), **options)

    arrays |= {"bound/bound": bound(), "frozen/bound": bound(**hold), "inside/bound": bound(**inside)}
    arrays |= golden_training(x0, t, u_mask, u_given)
    gradients = golden_recipe(rand, model)
    live, average = trained_with(gradients)
    for name, gradient in gradients.items():
        arrays |= {f"recipe/weights/{name}": model.get_parameter(name), f"recipe/gradient/{name}": gradient}
        arrays |= {f"recipe/live/{name}": live[name], f"recipe/average/{name}": average[name]}
    return {name: a.detach().numpy() if torch.is_tensor(a) else a for name, a in arrays.items()}


def same(stored, made):
    scale = max(1, np.abs(made).max())  # a loss at t = 0.001 weighs 1000
    return stored.shape == made.shape and np.allclose(stored, made, atol=1e-5 * scale, rtol=0)


def write_golden():
    """Write data/golden.npz. A value that has moved by no more than rounding stays as it is, to the bit."""
    old = dict(np.load(golden.GOLDEN))
    kept = {name: old[name] if name in old and same(old[name], a) else a for name, a in make_golden().items()}
    np.savez(golden.GOLDEN, **kept)
    print(f"wrote {golden.GOLDEN}")


def test_golden_values_have_not_moved():
    """This code computes what data/golden.npz says: a port that agrees with the file agrees with the code."""
    file, arrays = dict(np.load(golden.GOLDEN)), make_golden()
    assert set(file) == set(arrays) and golden.GOLDEN.stat().st_size < 400_000
    for name, array in arrays.items():
        assert same(file[name], array), name


def test_golden_draws_are_no_close_calls():
    """Logits that are wrong by 0.005 give the golden tokens, so rounding does not decide about a port."""
    g, noise = dict(np.load(golden.GOLDEN)), torch.Generator().manual_seed(0)
    for title, function, inputs, options, expected, *_ in golden.STEPS:
        if function != "sample" or expected[0] == "tied/tokens":  # those confidences are equal on purpose
            continue
        options = {name: golden.resolve(g, value) for name, value in options.items()}
        mask_id = options.pop("mask_id", 5)
        canvas, u_reveal, u_token = (g[name] for name in inputs[2:])
        exact = other_mask(golden_model(), mask_id)
        draws = (u for pair in zip(u_reveal, u_token) for u in pair)

        def disturbed(xt, x0_prev, exact=exact):
            return exact(xt, x0_prev) + 5e-3 * torch.randn(2, 8, 5, generator=noise)

        steps = len(u_reveal)
        found = sample(disturbed, torch.tensor(canvas), mask_id, steps, generator=Replay(*draws), **options)
        assert (found.numpy() == g[expected[0]]).all(), title


def test_optimiser_is_the_documented_one():
    """From the same gradients, train.py and the recipe of data/PORTING.md in NumPy make the same weights."""
    model, g = golden_model(), dict(np.load(golden.GOLDEN))
    gradients = golden.resolve(g, "recipe/gradient/")
    documented = golden.optimise(golden.resolve(g, "recipe/weights/"), gradients, 1e-2)
    for found, expected in zip(trained_with(gradients), documented):
        for name in gradients:
            assert not np.allclose(expected[name], model.get_parameter(name).detach().numpy(), atol=1e-2)
            assert np.abs(found[name].detach().numpy() - expected[name]).max() < 1e-5, name


# --- the kit -----------------------------------------------------------------------------------------------


def numpy_port():
    """The text of the NumPy port, without the kit: what a porter writes."""
    return Path(golden.__file__).read_text(encoding="utf-8").split("# --- 5. The kit")[0]


def run_kit(*arguments):
    """python -m data.golden, where PyTorch cannot be imported. Returns (exit status, lines on stdout)."""
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_module('data.golden', None, '__main__')"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines()


def test_a_port_can_check_itself_step_by_step(tmp_path):
    """The kit runs without PyTorch, on the port in data/golden.py and on one in a file of its own."""
    status, lines = run_kit()
    assert status == 0 and lines[-1] == "all right: 22 steps"
    assert all(line.startswith("ok ") for line in lines[:-1]) and len(lines) == 23
    (tmp_path / "helper.py").write_text(numpy_port())
    (tmp_path / "my_port.py").write_text("from helper import forward, loss, sample, bound")
    status, lines = run_kit(tmp_path / "my_port.py")
    assert status == 0 and lines[-1] == "all right: 19 steps, 3 skipped"
    assert run_kit(tmp_path / "none.py") == (2, [])


def test_the_kit_says_what_it_could_not_check(capsys):
    """What is optional is skipped. A missing function, an error, a wrong shape and NaN are failures."""

    def forward(w, heads, xt, x0_prev=None):
        return golden.forward(w, heads, xt, x0_prev)[:, 1:]

    def bound(w, heads, x0, u, steps, frozen=False):
        if np.any(frozen):
            raise NotImplementedError("later")
        return golden.bound(w, heads, x0, u, steps) * np.nan

    assert golden.check({"forward": forward, "bound": bound, "loss": golden.loss}) == 10
    printed = capsys.readouterr().out
    for remark in (
        "FAILED  the Transformer: Traceback",
        "ValueError: the shape is [2, 7, 5], expected [2, 8, 5]",
        "skipped causal attention: forward got an unexpected keyword argument 'causal'",
        "skipped the gradient: there is no function gradient",
        "FAILED  the sampler: there is no function sample",
        "FAILED  the bound: largest difference nan, tolerance 1e-04\n        look here: the same u",
        "FAILED  the bound, frozen: NotImplementedError('later')\n",
        "skipped the bound, mask inside: bound got an unexpected keyword argument 'mask_id'",
        "\n10 of 22 steps failed, 5 skipped\n",
    ):
        assert remark in printed


def test_a_wrong_golden_value_is_seen(tmp_path, capsys):
    """A golden value that is wrong by 0.01 makes its step fail, and no other."""
    arrays = dict(np.load(golden.GOLDEN))
    arrays["bound/bound"][2] += 0.01
    np.savez(tmp_path / "other.npz", **arrays)
    port = {name: f for name, f in vars(golden).items() if name != "gradient"}  # the slowest step
    assert golden.check(port, tmp_path / "other.npz") == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("FAILED")] == ["FAILED  the bound"]
    assert lines[-1] == "1 of 22 steps failed, 1 skipped"


DECAYED, FORTY = 'array.ndim == 2 and "embed" not in name', "the optimiser, 40 iterations"
MISTAKES = {  # a mistake: what stands in the NumPy port, what it becomes, the first step to fail, the advice
    "erf": ("np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))", "np.vectorize(math.erf)(z / 2**0.5)",
            "the Transformer", "0.001 may be the erf form of GELU"),
    "masked before the time is raised": ("t = np.maximum(t, T_MIN)\n    k",
            "u, t = np.where(u < t[:, None], u, 1), np.maximum(t, T_MIN)\n    k",
            "the loss", "t is raised to 0.001 before masking"),
    "frozen positions are masked in pass 1": ("xt, _ = q_sample(w, x0, time, u, frozen, mask_id)",
            "xt, _ = q_sample(w, x0, time, u, False, mask_id)",
            "the loss, frozen", "a frozen position is never masked"),
    "pass 1 has a gradient": ("constant=True", "constant=False",
            "the gradient", "likely mistake: the gradient flows through pass 1"),
    "halves are rounded up": ("np.round(s * blanks)", "np.floor(s * blanks + 0.5)",
            "the sampler, confidence order", "of 4.5 and 1.5 masks 4 and 2 are left"),
    "beta2 is 0.999": ("(0.9, 0.98)", "(0.9, 0.999)",
            "the optimiser, 3 iterations", "likely mistake: beta2 is 0.999, not 0.98"),
    "gradients are always scaled": ("min(1, 1 / norm)", "1 / norm",
            FORTY, "likely mistake: a gradient of norm below 1 is scaled up to 1"),
    "there is no warm-up": ("warmup = warmup or max(1, min(n // 20, 200))", "warmup = 1",
            FORTY, "likely mistake: there is no warm-up"),
    "position_embed is decayed": (DECAYED, 'array.ndim == 2 and name != "embed.weight"',
            FORTY, "likely mistake: position_embed is decayed"),
    "norms are decayed": (DECAYED, '"embed" not in name', FORTY, "likely mistake: norms are decayed"),
    "head is not decayed": (DECAYED, DECAYED + ' and "head" not in name',
            FORTY, "likely mistake: head is not decayed"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_kit_catches_typical_mistakes(mistake, tmp_path, capsys):
    """A mistake in a copy of the port fails at the step that is about it, and the kit says where to look."""
    right, wrong, step, advice = MISTAKES[mistake]
    assert numpy_port().count(right) == 1
    (tmp_path / "my_port.py").write_text("import math\n" + numpy_port().replace(right, wrong))
    port = runpy.run_path(tmp_path / "my_port.py", run_name="port")
    if step != "the gradient":
        del port["gradient"]  # the slowest step
    assert golden.check(port) > 0
    first, after = capsys.readouterr().out.split("FAILED  ")[1].splitlines()[:2]
    assert first.startswith(f"{step}: largest difference") and advice in after


def test_every_golden_value_is_checked_and_documented():
    """The kit uses each array but optimiser/loss, which is for training loops, and PORTING.md names each."""
    file, page, used = dict(np.load(golden.GOLDEN)), PORTING.read_text(encoding="utf-8"), {"optimiser/loss"}
    for title, _, inputs, options, expected, *_ in golden.STEPS:
        assert f"| {title} |" in page, title
        for name in (*inputs, *options.values(), *(expected if isinstance(expected, tuple) else [expected])):
            used |= {n for n in file if n == name or str(name).endswith("/") and n.startswith(str(name))}
    assert used == set(file)
    for name in file:
        pattern = re.sub(r"^(weights|loss/gradient|optimiser/\w+|recipe/\w+)/.*", r"\1/*", name)
        assert f"`{name}`" in page or name in page or pattern in page, name


def test_the_functions_that_porting_asks_for_are_those_of_the_port():
    """The table of functions in PORTING.md has the names, keywords and defaults of data/golden.py."""
    rows = re.findall(r"^\| `(\w+)(\(w, .*?\))`", PORTING.read_text(encoding="utf-8"), re.M)
    assert [name for name, _ in rows] == ["forward", "loss", "sample", "bound", "gradient", "optimise"]
    for name, asked in rows:
        scope = {}
        exec(f"def asked{asked}: pass", scope)
        ours = inspect.signature(getattr(golden, name)).parameters
        for parameter, want in inspect.signature(scope["asked"]).parameters.items():
            found = ours[parameter]
            assert (found.kind, found.default) == (want.kind, want.default), (name, parameter)


def test_the_numbers_that_porting_gives():
    """PORTING.md says where the held-out text begins, and three losses of it under the shipped models."""
    page, domain = " ".join(PORTING.read_text(encoding="utf-8").split()), data.get("text")
    train, held_out = domain.load()
    assert f"{len(train) + len(held_out):,} characters" in page
    assert f"offset {len(train):,} (N × 9 // 10)" in page
    assert "`ious drab of`, a line break, and `a sleeve-less errand.`" in page
    assert domain.decode(held_out[:34]) == "ious drab of\na sleeve-less errand."
    x0, mask_id = torch.from_numpy(held_out[:128].astype(np.int64))[None], len(domain.vocab)
    xt = x0.clone()
    xt[:, 1::2] = mask_id
    base, adapted = (load(HERE / "data" / "models" / "text" / f"{name}.npz") for name in ("base", "rate1"))
    with torch.no_grad():
        logits = [base(xt), adapted(xt), adapted(xt, adapted(xt).softmax(-1))]
    under = ("base.npz`,", "rate1.npz` without a signal,", "rate1.npz` with two passes")
    for z, model in zip(logits, under):
        nll = scmdm.masked_nll(z, x0, xt == mask_id, mask_id).item()
        assert f"{nll:.2f} nats under `models/text/{model}" in page


if __name__ == "__main__":
    write_golden()
