"""For section 5 of test_scmdm.py: the recipe for a foreign model, and data/adapt_hf.py."""

import copy
import runpy
import sys
import types

import pytest
import torch

from scmdm import Config, Transformer, add_self_conditioning, diffusion_loss, q_sample, sample, sampler_bound
from test_scmdm import Foreign, printed, rng

PAD, CLS, SEP, MASK = 0, 1, 2, 3
TOKENIZER = types.SimpleNamespace(mask_token_id=MASK, pad_token_id=PAD, all_special_ids=[PAD, CLS, SEP, MASK])


def recipe():
    """The recipe's two parts: the class Denoiser, and all that is done with it."""
    build, use = printed("Adapt your own model").split("\ndenoiser, ")
    return build, "denoiser, " + use


def recipe_denoiser(model, **other_ids):
    """A Denoiser of the recipe."""
    exec(recipe()[0], scope := {})
    ids = {"mask_id": MASK, "pad_id": PAD} | other_ids
    return scope["Denoiser"](model, **ids)


def masked_lm(kind="Bert", **kw):
    """A random masked language model of transformers, 24 tokens and 32 features."""
    hf = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    if kind == "Bart":
        sizes = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64)
        sizes |= dict(encoder_attention_heads=2, decoder_attention_heads=2, decoder_start_token_id=SEP)
    ids = dict(pad_token_id=PAD, bos_token_id=CLS, eos_token_id=SEP, cls_token_id=CLS, sep_token_id=SEP)
    if not hasattr(hf, f"{kind}Config"):
        pytest.skip(f"{kind} came after transformers {hf.__version__}")
    config = getattr(hf, f"{kind}Config")(vocab_size=24, max_position_embeddings=32, **sizes, **ids, **kw)
    torch.manual_seed(0)
    return hf.AutoModelForMaskedLM.from_config(config).eval()


def foreign(length=8):
    torch.manual_seed(0)
    return Foreign(Config(24, length, dim=32, depth=1, heads=2))


def eights_and_nines(batches=40):
    """Batches [batches, 16, 8] of five times 8 or five times 9, with special tokens around them."""
    torch.manual_seed(0)
    x0 = torch.randint(8, 10, (batches, 16, 1)).repeat(1, 1, 8)
    x0[..., 0], x0[..., 6], x0[..., 7] = CLS, SEP, PAD
    return x0


def plain(model, xt):
    return model(input_ids=xt, attention_mask=(xt != PAD).long()).logits


@pytest.mark.parametrize("kind", ["stand-in", "Bert", "ModernBert"])
def test_the_recipe_for_your_own_model_runs_as_printed(kind, tmp_path, monkeypatch):
    """README's recipe starts as the pretrained model and learns, W too. It can be saved and fills blanks."""
    monkeypatch.chdir(tmp_path)  # the recipe saves a file
    model = foreign() if kind == "stand-in" else masked_lm(kind)
    x0, losses = eights_and_nines(), []

    def batches():
        for x in x0:
            yield x
            losses.append(scope["loss"].item())

    build, use = recipe()
    assert len([line for line in (build + use).split("\n") if line and line[0] != "#"]) <= 25
    scope = dict(model=model, tokenizer=TOKENIZER, batches=batches())
    xt = q_sample(x0[0], 0.5, MASK, frozen=x0[0] < 4)
    exec(build, scope)
    with torch.no_grad():
        before = scope["Denoiser"](model, MASK, PAD)
        assert all(torch.equal(before(xt, p), plain(model, xt)) for p in (None, torch.rand(16, 8, 24)))
    exec(use.replace("lr=2e-5", "lr=1e-2"), scope)  # this model is not pretrained
    denoiser = scope["denoiser"].eval()
    assert denoiser.adapter.W.abs().max() > 5e-3 and sum(losses[:10]) > 2 * sum(losses[-10:])
    again = scope["Denoiser"](copy.deepcopy(model), MASK, PAD).eval()
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
        again.load_state_dict(torch.load("denoiser.pt", weights_only=True))
        assert torch.equal(again(xt, torch.ones(16, 8, 24)), denoiser(xt, torch.ones(16, 8, 24)))
    prompt = torch.tensor([[CLS, 11, MASK, MASK, 12, MASK, SEP, PAD]])
    mine = sample(denoiser, prompt, MASK, 8, temperature=0)
    for canvas, tokens in ((torch.where(x0[-1] >= 8, MASK, x0[-1]), scope["tokens"]), (prompt, mine)):
        blank = canvas == MASK
        assert not (tokens == MASK).any() and tokens[~blank].equal(canvas[~blank])
    assert set(mine[prompt == MASK].tolist()) <= {8, 9}


def test_the_hook_of_the_recipe_is_the_same_adapter():
    """README's hook gives the built-in adapter's logits and gradient; a copy's hook is the copy's own."""
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=7, length=6, dim=16, depth=1, heads=2))
    built_in, other = add_self_conditioning(model), Foreign(model.config)
    other.load_state_dict(model.state_dict())
    hooked = recipe_denoiser(other, mask_id=7, pad_id=-1)
    copied = copy.deepcopy(hooked)
    W = torch.nn.init.normal_(built_in.self_conditioning.W)
    copied.adapter.load_state_dict({"W": W})
    x0, xt, x0_prev = torch.randint(0, 7, (4, 6)), torch.randint(5, 8, (4, 6)), torch.rand(4, 6, 7)
    for given in (None, x0_prev, None):
        assert torch.equal(copied(xt, given), built_in(xt, given))
        assert torch.equal(hooked(xt, given), built_in(xt))
    for denoiser in (copied, built_in):
        diffusion_loss(denoiser, x0, 7, unroll=3, generator=rng(1)).sum().backward()
    assert torch.equal(copied.adapter.W.grad, W.grad) and W.grad.norm() > 0 and hooked.adapter.W.grad is None


@pytest.mark.parametrize("of", ["recipe", "program"])
def test_the_hook_is_gone_after_each_call(of):
    """Nothing of a signal is left for the model's next call or another denoiser, after an error either."""
    if of == "recipe":
        model, make = foreign(), recipe_denoiser
    else:
        model, make = masked_lm(), lambda model: adapt_hf().Denoiser(model, TOKENIZER).eval()
    first, second = make(model).eval(), make(model).eval()
    torch.nn.init.normal_(first.adapter.W)
    xt, x0_prev = q_sample(eights_and_nines()[0], 0.5, MASK, generator=rng(0)), torch.rand(16, 8, 24)
    with torch.no_grad():
        pretrained, untrained = plain(model, xt), second(xt, x0_prev)
        assert not torch.equal(first(xt, x0_prev), untrained)
        assert torch.equal(plain(model, xt), pretrained) and torch.equal(second(xt, x0_prev), untrained)
        with pytest.raises(RuntimeError):
            first(xt, x0_prev[:, :-1])  # a signal of the wrong length
        assert torch.equal(plain(model, xt), pretrained)


class Deaf(Foreign):
    """A model that looks its embeddings up without calling the embedding module, as BART does."""

    def get_input_embeddings(self):
        return torch.nn.Embedding.from_pretrained(self.embed.weight, freeze=False)


def test_a_model_that_drops_the_signal_is_not_trained():
    """The recipe stops at its first iteration, the program at its tenth, if W gets no gradient."""
    scope = dict(model=Deaf(foreign().config), tokenizer=TOKENIZER, batches=eights_and_nines())
    with pytest.raises(AssertionError, match="got no gradient"):
        exec("\n".join(recipe()), scope)
    hf, model = adapt_hf(), masked_lm("Bart")
    denoiser = hf.Denoiser(model, TOKENIZER)
    denoiser.place = (model.get_input_embeddings(),)
    with pytest.raises(RuntimeError, match="gets no gradient"):
        hf.train(denoiser, eights_and_nines().flatten(0, 1), 1, options(iters=20))


@pytest.mark.parametrize("of", ["recipe", "program"])
def test_dropout_only_where_there_is_a_gradient(of):
    """Only the pass that is scored is in training mode, whatever a trainer calls; after .eval() none is."""
    if of == "recipe":
        denoiser = recipe_denoiser(foreign())
    else:
        denoiser = adapt_hf().Denoiser(masked_lm(), TOKENIZER)
    x0, modes = eights_and_nines()[0], []
    embedding = denoiser.model.get_input_embeddings()
    embedding.register_forward_hook(lambda *_: modes.append(denoiser.model.training))
    denoiser.train()
    diffusion_loss(denoiser, x0, MASK, unroll=8, frozen=x0 < 4, generator=rng(3))
    assert modes == [False] * (len(modes) - 1) + [True] and len(modes) > 2
    sample(denoiser, x0, MASK, 2)
    sampler_bound(denoiser, x0, MASK, 2, frozen=x0 < 4)
    denoiser.eval()
    diffusion_loss(denoiser, x0, MASK, frozen=x0 < 4)
    assert sum(modes) == 1


def test_padding_of_the_recipe():
    """Padding changes no loss and gives no NaN. No text in a batch, a NaN or no pad token stop the recipe."""
    denoiser = recipe_denoiser(masked_lm()).eval()
    torch.nn.init.normal_(denoiser.adapter.W)
    x0 = eights_and_nines()[0]
    losses = []
    for width in (7, 8, 12):
        x = torch.nn.functional.pad(x0[:, :7], (0, width - 7), value=PAD)
        u = torch.nn.functional.pad(torch.rand(16, 7, generator=rng(0)), (0, width - 7))
        replay = iter((u, torch.zeros(16)))
        options = dict(t=torch.linspace(0.1, 1, 16), generator=lambda shape: next(replay))
        losses.append(diffusion_loss(denoiser, x, MASK, frozen=x < 4, **options))
    assert torch.allclose(losses[0], losses[1], rtol=1e-4) and torch.allclose(losses[0], losses[2], rtol=1e-4)
    x0[:2] = PAD
    loss = diffusion_loss(denoiser, x0, MASK, frozen=x0 < 4, unroll=8)
    loss.sum().backward()
    assert (loss[:2] == 0).all() and all(p.grad.isfinite().all() for p in denoiser.parameters())
    broken = foreign()
    torch.nn.init.constant_(broken.head.weight, torch.inf)
    for model, batch, error, message in (
        (foreign(), torch.full((4, 8), PAD), AssertionError, "no gradient"),
        (broken, eights_and_nines()[0], RuntimeError, "non-finite"),
    ):
        with pytest.raises(error, match=message):
            exec("\n".join(recipe()), dict(model=model, tokenizer=TOKENIZER, batches=[batch]))
    with pytest.raises(TypeError):
        recipe_denoiser(foreign(), pad_id=None)(x0)


# --- data/adapt_hf.py ---


def adapt_hf():
    pytest.importorskip("transformers")
    from data import adapt_hf

    return adapt_hf


def options(**kw):
    return types.SimpleNamespace(**dict(iters=12, batch_size=16, lr=1e-3, lr_w=1e-2, seed=0) | kw)


@pytest.mark.parametrize("kind", ["Bert", "Esm", "Bart"])
def test_the_program_finds_where_to_add_the_signal(kind):
    """ESM, which sets the embeddings of masks to zero, and BART start as pretrained too, and W learns."""
    hf, rows = adapt_hf(), eights_and_nines().flatten(0, 1)
    model = masked_lm(kind, **(dict(token_dropout=True, mask_token_id=MASK) if kind == "Esm" else {}))
    denoiser, text = hf.Denoiser(model, TOKENIZER).eval(), slice(4, None)  # before 4 are the special tokens
    xt = q_sample(rows[:16], 0.5, MASK, frozen=rows[:16] < 4)
    with torch.no_grad():
        for x0_prev in (None, torch.rand(16, 8, 24)):
            assert torch.equal(denoiser(xt, x0_prev)[..., text], plain(model, xt)[..., text])
            assert (denoiser(xt, x0_prev)[..., :4] == -torch.inf).all()
    hf.train(denoiser, rows, 1, options())
    with torch.no_grad():
        x0_prev = torch.rand(16, 8, 24)
        assert not torch.equal(denoiser(xt, x0_prev)[..., text], plain(model, xt)[..., text])


def test_control_and_scmdm_see_the_same_noise():
    """Batches, masks and dropout of the two trainings are the same: without updates, predictions are too."""
    hf, rows, logits = adapt_hf(), torch.randint(4, 24, (50, 8), generator=rng(0)), {}
    for rate, denoiser in [(rate, hf.Denoiser(masked_lm(), TOKENIZER)) for rate in (0, 1)]:
        passes = logits[rate] = []
        keep = lambda model, args, out, passes=passes: passes.append(out.logits) if model.training else None
        denoiser.model.register_forward_hook(keep)
        hf.train(denoiser, rows, rate, options(iters=3, lr=0, lr_w=0))
    assert len(logits[0]) == 3 and not torch.equal(logits[0][0], logits[0][1])
    assert all(torch.equal(a, b) for a, b in zip(logits[0], logits[1], strict=True))


def test_the_signal_on_shuffled_and_off():
    """bounds() is sampler_bound with the signal, with the same signals moved among the masks, or without."""
    hf, rows = adapt_hf(), torch.randint(3, 24, (16, 8), generator=rng(0))
    denoiser = hf.Denoiser(masked_lm(initializer_range=0.5), TOKENIZER).eval()
    torch.nn.init.normal_(denoiser.adapter.W)
    frozen, seen = rows < 4, []
    expected = sampler_bound(denoiser, rows, MASK, 4, frozen=frozen, generator=rng(0))
    off = sampler_bound(lambda xt, x0_prev: denoiser(xt), rows, MASK, 4, frozen=frozen, generator=rng(0))
    assert torch.allclose(hf.bounds(denoiser, rows, 4).float(), expected)
    assert torch.allclose(hf.bounds(denoiser, rows, 4, "off").float(), off)
    assert not torch.allclose(off, expected)
    denoiser.adapter.register_forward_hook(lambda module, args, h: seen.append(args))
    on, shuffled = hf.bounds(denoiser, rows, 4), hf.bounds(denoiser, rows, 4, "shuffled")
    assert not torch.allclose(on, shuffled)
    (xt, x0_prev), (_, moved) = seen[1], seen[5]  # the second step of each: the first has no signal
    assert torch.equal(seen[1][0], seen[5][0]) and not torch.equal(x0_prev, moved)
    assert torch.equal(x0_prev[xt != MASK], moved[xt != MASK])
    for a, b, masked in zip(x0_prev, moved, xt == MASK):
        assert torch.equal(a[masked].sort(0).values, b[masked].sort(0).values)


def write_bert(folder, **kw):
    """A random BERT in bfloat16 whose words are 20 letters, with its tokenizer."""
    tokenizers, hf = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    vocab = {token: i for i, token in enumerate([*names.values(), *"abcdefghijklmnopqrs", "[UNK]"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    ends = [("[CLS]", CLS), ("[SEP]", SEP)]
    template = tokenizers.processors.TemplateProcessing
    words.post_processor = template(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **names | kw)
    tokenizer.save_pretrained(folder)
    masked_lm().bfloat16().save_pretrained(folder)
    return tokenizer


def test_the_program_end_to_end(tmp_path, capsys):
    """A folder and a text become a table of paired differences, two saved models and a filled prompt."""
    hf = adapt_hf()
    write_bert(tmp_path / "bert")
    (tmp_path / "text").write_text("a b c d e f g h " * 400, encoding="utf-8")
    sizes = ["--length", "10", "--iters", "40", "--lr", "1e-2", "--lr-w", "1e-2", "--steps", "6"]
    places = [str(tmp_path / "bert"), str(tmp_path / "text"), "--out", str(tmp_path / "out")]
    hf.main([*places, *sizes, "--prompt", "a b _ _ e"])
    table = capsys.readouterr().out.split("\n")
    names = ["base", "control", "SCMDM", "  its signal shuffled", "  its signal off"]
    value = {name: line[len(name) :].split() for name in names for line in table if line.startswith(name)}
    bound = {name: float(value[name][0]) for name in names}
    for name, less in zip(names[1:], ["base", "control", "SCMDM", "SCMDM"]):
        assert value[name][-1] == less and value[name][2] == "±"
        assert abs(float(value[name][1]) - (bound[name] - bound[less])) < 2e-3
    assert bound["control"] < bound["base"] - 3
    denoiser, tokenizer = hf.load_denoiser(tmp_path / "out")
    assert denoiser.adapter.W.any() and {p.dtype for p in denoiser.parameters()} == {torch.float32}
    _, held_out = hf.read_rows(tmp_path / "text", tokenizer, 10, False)
    assert abs(hf.bounds(denoiser, held_out, 6).mean().item() - bound["SCMDM"]) < 2e-3
    control = hf.Denoiser(hf.read_model(tmp_path / "out" / "control")[0], tokenizer).eval()
    assert abs(hf.bounds(control, held_out, 6).mean().item() - bound["control"]) < 2e-3
    blank, filled = (line.split() for line in table[-3:-1])
    assert blank == ["a", "b", "_", "_", "e"] and len(filled) == 5
    assert filled[:2] + filled[4:] == ["a", "b", "e"] and set(filled) <= set("abcdefghijklmnopqrs")


def test_lines_are_padded_and_held_out_once(tmp_path):
    """--lines makes a sequence of each line. No line is in both parts, and no row is all padding."""
    hf, tokenizer = adapt_hf(), write_bert(tmp_path)
    lines = [" ".join(a + b) for a in "abcdefgh" for b in "ijklmnop"]
    (tmp_path / "text").write_text("\n".join(lines * 3 + ["", "?"]), encoding="utf-8")
    train, held_out = hf.read_rows(tmp_path / "text", tokenizer, 6, True)
    assert train.shape == (58, 6) and held_out.shape == (6, 6)
    rows = torch.cat((train, held_out))
    assert len(rows.unique(dim=0)) == 64
    assert (rows[:, [0, 3, 4, 5]] == torch.tensor([CLS, SEP, PAD, PAD])).all()


def test_bad_input_to_the_program(tmp_path, monkeypatch, capsys):
    """What cannot be used is one line and exit status 2."""
    hf = adapt_hf()
    write_bert(tmp_path / "bert")
    write_bert(tmp_path / "no mask", mask_token=None)
    (tmp_path / "short").write_text("a b c", encoding="utf-8")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "empty").mkdir()
    for model, text, message in (
        ("bert", "missing", "No such file"),
        ("bert", "binary", "not text in UTF-8"),
        ("bert", "short", "expected at least 40"),
        ("empty", "short", "not a masked language model"),
        ("no mask", "short", "lacks a mask token"),
    ):
        with pytest.raises(hf.BadInput, match=message):
            hf.main([str(tmp_path / model), str(tmp_path / text), "--length", "10"])
    with pytest.raises(hf.BadInput, match="at most 32"):
        hf.main([str(tmp_path / "bert"), str(tmp_path / "short"), "--length", "33"])
    denoiser = hf.Denoiser(masked_lm(), TOKENIZER)
    torch.nn.init.constant_(denoiser.model.get_input_embeddings().weight, torch.inf)
    with pytest.raises(hf.BadInput, match="loss is nan at iteration 0"):
        hf.train(denoiser, eights_and_nines()[0], 0, options())
    monkeypatch.setattr(sys, "argv", ["adapt_hf.py", str(tmp_path / "bert"), str(tmp_path), "--length", "9"])
    monkeypatch.delitem(sys.modules, "data.adapt_hf")  # or runpy warns
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("data.adapt_hf", run_name="__main__")
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert exit_.value.code == 2 and error.startswith("adapt_hf.py: ") and "Is a directory" in error
