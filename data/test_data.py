"""The tests of what is in data/: the domains, a user's own files, the port kit, a foreign model.

    1. The domains, and files that people have
    2. The port kit        data/golden.py and data/PORTING.md
    3. A foreign model     README's recipe, and data/adapt_hf.py (needs transformers)
"""

import copy
import inspect
import io
import math
import re
import runpy
import subprocess
import sys
import types
import zlib
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import data
import scmdm
from data import dna, golden, images, molecules, sudoku, terminal, text
from data.film import PAPER, film
from sample import SHIPPED
from scmdm import Config, Transformer, add_self_conditioning, diffusion_loss, load, q_sample, sample
from scmdm import sampler_bound
from test_scmdm import HERE, assert_fits, printed, rng

PORTING = HERE / "data" / "PORTING.md"

# =============================================================================================
# 1. The domains, and files that people have
# =============================================================================================


def encoded(domain, *strings):
    """Strings -> rows [N, L], padded by end tokens where the domain has one."""
    rows = [domain.encode(string) for string in strings]
    end = [domain.index[domain.end]] if domain.end else []
    return np.array([row + end * (domain.length - len(row)) for row in rows])


def test_sudoku_score_sees_each_rule():
    """A grid that breaks only the rule of the rows, of the columns or of the boxes is not valid."""
    right = encoded(data.get("sudoku"), "123456456123231564564231312645645312")
    row, column, box = right.copy(), right.copy(), (np.arange(6)[:, None] + np.arange(6)).reshape(1, 36) % 6
    row[0, [0, 6]] = right[0, [6, 0]]  # swapped within one column and one box
    column[0, [0, 1]] = right[0, [1, 0]]  # swapped within one row and one box
    assert sudoku.score(right, None) == {"valid": 1, "different": 1}
    for broken, cells in ((row, 4), (column, 4), (box, 24)):
        grids = np.concatenate((right, broken, broken))
        assert sudoku.score(grids, None) == {"valid": 1 / 3, "different": 2 / 3}
        assert sudoku.wrong(grids).sum(1).tolist() == [0, cells, cells]
    assert not sudoku.wrong(np.full((1, 36), 6)).any(), "a mask is not a digit"


def test_sudoku_is_exactly_uniform():
    """There are 39,168 grids with the first row 1 to 6; a tenth is held out, with all relabellings."""
    grids = sudoku.enumerate_grids()
    assert grids.shape == np.unique(grids, axis=0).shape == (39168, 36) and not sudoku.wrong(grids).any()
    assert math.exp(data.get("sudoku").entropy) == pytest.approx(39168 * math.factorial(6))
    train, val = sudoku.load()

    def originals(rows):  # the grids with the first row 1 to 6 that the rows are relabelled from
        return [bytes(x) for x in np.take_along_axis(np.argsort(rows[:, :6]).astype(np.uint8), rows, axis=1)]

    of_train, of_val = originals(train), originals(val)
    assert set(of_train) <= set(map(bytes, grids)) and not set(of_train) & set(of_val)
    for kinds, drawn in ((39168 * 9 // 10, of_train), (720, list(map(bytes, train[:, :6])))):
        _, counts = np.unique(drawn, return_counts=True)
        assert len(counts) == kinds
        assert_fits(counts, np.full(kinds, 1 / kinds))  # each grid and each relabelling is equally frequent


def test_text_score():
    """The score of text is the share of known words, except for the first and last, which may be cut off."""
    domain = data.get("text")
    rows = encoded(domain, "xqz King is dead, xqz", "xqz King quee dead xq")
    assert text.score(rows, None) == {"words": 5 / 6} and text.score(rows[:, -5:], None) == {"words": 0}
    assert text.score(encoded(domain, "a Casca a"), None) == {"words": 0}, "held-out words are not known"


def test_molecules_closed():
    """Open ring bonds, open brackets and brackets in the wrong order are seen without RDKit."""
    closed = ["CCO", "C1CC1", "CC(C)O", "C[NH3+]", "C1CC2CC12", "[NH3+]C1CC1"]
    opened = ["C1CC", "CC(C", "CC)C(", "C[N+", "CN+]", "C1CC12", "[NH3+]C5"]
    assert all(map(molecules.closed, closed)) and not any(map(molecules.closed, opened))
    rows = encoded(data.get("molecules"), *closed, *opened)
    assert molecules.score(rows, None)["closed"] == len(closed) / len(rows)


def test_molecules_valid_unique_and_novel():
    """RDKit counts the valid molecules, the different ones among them, and the new ones among these."""
    pytest.importorskip("rdkit")
    known = molecules.read()[0]
    rows = encoded(data.get("molecules"), known, known, "C(C)(C)(C)(C)C", "ONONONO", "ONONONO", "")
    expected = {"closed": 1, "valid": 4 / 6, "unique": 2 / 4, "novel": 1 / 2, "all": 1 / 6}
    assert molecules.score(rows, None) == pytest.approx(expected)
    assert molecules.canonical("OCC") == molecules.canonical("C(C)O") == "CCO"


def test_dna_score_reads_in_frame():
    """A stop codon counts in the reading frame only; divergences are of codons and of amino acid pairs."""
    domain = data.get("dna")
    inside, across = "AAA" * 20 + "TAA" + "AAA" * 21, "AAA" * 20 + "ATAAGA" + "AAA" * 20
    rows = encoded(domain, across, inside, inside.replace("TAA", "TAG"), inside.replace("TAA", "TGA"))
    assert dna.score(rows, rows) == {"open": 1 / 4, "JS codons": 0, "JS amino acids": 0}
    assert dna.score(rows[:1], rows)["open"] == 1 and dna.score(rows[1:], rows)["open"] == 0
    real, same_acid, other_acid = (encoded(domain, codon * 42) for codon in ("AAA", "AAG", "GCG"))
    assert dna.score(real, same_acid) == {"open": 1, "JS codons": 1, "JS amino acids": 0}
    assert dna.score(real, other_acid) == {"open": 1, "JS codons": 1, "JS amino acids": 1}
    mixed, sorted_ = encoded(domain, "AAAGCG" * 21, "AAA" * 21 + "GCG" * 21)[:, None]
    assert dna.score(mixed, sorted_)["JS codons"] == 0 and dna.score(mixed, sorted_)["JS amino acids"] > 0.5
    assert dna.jensen_shannon(np.array([1, 0]), np.array([0.5, 0.5])) == pytest.approx(0.311278, abs=1e-6)


def test_genes():
    """Genes are the longest frames from ATG to a stop on both strands, as a regular expression finds them."""
    bases = np.random.default_rng(0).integers(0, 4, 60000)
    starts, string = {}, data.get("dna").decode(bases)  # {the end of a frame: its first ATG}
    for match in re.finditer("(?=(ATG(?:(?!TAA|TAG|TGA)...)*)(?:TAA|TAG|TGA))", string):
        starts.setdefault(match.end(1), match.start(1))
    expected = sorted((start, end) for end, start in starts.items() if end - start >= 3 * 42)
    assert sorted(dna.open_reading_frames(bases, shortest=42)) == expected and len(expected) > 20
    strands, taken, rows = (bases, 3 - bases[::-1]), set(), []
    frames = [(a, b, s) for s in (0, 1) for a, b in dna.open_reading_frames(strands[s], shortest=42)]
    for start, end, strand in sorted(frames, key=lambda frame: frame[0] - frame[1]):
        places = set(range(start, end) if strand == 0 else range(60000 - end, 60000 - start))
        if not places & taken:
            taken |= places
            rows += [strands[strand][i : i + 126].tolist() for i in range(start, end - 125, 126)]
    assert dna.genes(bases, shortest=42).tolist() == rows and len(rows) > 40
    codons = dna.codons(encoded(data.get("dna"), "ATGTGGAAATTTTAATAGTGA"))[0]
    assert "".join(dna.CODE[codon] for codon in codons) == "MWKF***" and codons[0] == dna.ATG


def test_images_score():
    """The Frechet distance of two Gaussians has its closed form; it is larger for noisier images."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((1000, 2))
    z = (z - z.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T))).T  # mean 0 and covariance 1, exactly
    P, Q = np.array([[2.0, 0], [1, 1]]), np.array([[1.0, 3], [0, 1]])
    A, B = P @ P.T, Q @ Q.T  # covariances that do not commute
    cross = math.sqrt(np.trace(A @ B) + 2 * math.sqrt(np.linalg.det(A @ B)))  # tr (A B)^(1/2), 2 x 2
    distance = images.frechet(z @ P.T + [3, 4], z @ Q.T)
    assert distance == pytest.approx(25 + np.trace(A + B) - 2 * cross)
    real, other = images.load()[1][:500], images.load()[1][500:1000]
    noisy = [np.where(rng.random(real.shape) < share, 15 - real, real) for share in (0, 0.1, 0.3)]
    near, further, far = (images.score(x, other) for x in noisy)
    assert near["Frechet"] < further["Frechet"] < far["Frechet"] and near["sure"] > far["sure"]


@pytest.mark.parametrize("name", data.NAMES)
def test_domains(name):
    """A domain loads exactly what its shipped models were trained on; encode undoes decode."""
    domain = data.get(name)
    train, val = domain.load()
    assert len(val) < len(train) and max(train.max(), val.max()) < len(domain.vocab)
    for path in (SHIPPED / name).glob("*.npz"):
        info = load(path).info
        assert (info["vocab"], info["length"], info["end"]) == (domain.vocab, domain.length, domain.end)
        assert data.from_info(info).name == name and domain.steps == min(64, domain.length)
        assert info["made_from"].get("content", zlib.crc32(train)) == zlib.crc32(np.ascontiguousarray(train))
    rows = data.windows(val, domain.length)[:20]
    for row in rows:
        known = domain.encode(domain.decode(row))
        assert known == row[: len(known)].tolist() and (row[len(known) :] == row[-1]).all()
    assert all(map(math.isfinite, domain.score(rows[:10], rows[10:]).values()))


def test_windows():
    """A stream is cut from its start, rows stay as they are, and `most` of them are spread evenly."""
    rows = np.arange(20).reshape(10, 2)
    assert data.windows(np.arange(11), 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert (data.windows(rows, 2) == rows).all() and data.windows(rows, 2, 4)[:, 0].tolist() == [0, 6, 12, 18]
    train, val = data.split(rows)
    assert len(val) == 1 and sorted([*train.tolist(), *val.tolist()]) == rows.tolist()
    assert [x.tolist() for x in data.split(np.arange(10))] == [list(range(9)), [9]]


def npy(array, save=np.save):
    file = io.BytesIO()
    save(file, array)
    return file.getvalue()


FASTA = ">first A->G\nACG\nTTA\n>second\nGG\n" * 20
NUMBERS = np.arange(420).reshape(70, 6) % 7
LINES = {"lines": True}
OWN = {  # file name: content, arguments, what is read (a stream, or the set of its rows)
    "tale.txt": (b"\xef\xbb\xbf" + "é a\r\n".encode() * 20, {"length": 2}, "é a\n" * 20),
    "text.txt": ("ab" * 40, {"length": 2}, "ab" * 40),
    "lines.txt": ("hello\n\nbee\n" * 20 + "longer\n", LINES | {"length": 5}, {"hello", "bee"}),
    "stream.fasta": (FASTA, {"length": 2}, "\n".join(["ACGTTA", "GG"] * 20)),
    "GENES.FA": (FASTA, LINES, {"ACGTTA", "GG"}),
    "farsi.fa": ("a > b\n" * 40, LINES, {"a > b"}),
    "reads.fastq": ("@read\nACGT\n+\n>@>@\n" * 40, LINES, {"ACGT"}),
    "drugs.smi": ("CCO ethanol\nC\tmethane\nN\n" * 20, LINES, {"CCO", "C", "N"}),
    "rows.npy": (npy(NUMBERS), {}, {" ".join(map(str, row)) for row in NUMBERS}),
    "STREAM.NPY": (npy(NUMBERS.flatten()), {"length": 3, "vocab": "words"}, " ".join("abcdefg" * 60)),
}
BAD = {  # file name: content, arguments, what the message says
    "missing.txt": (None, {}, "missing.txt: No such file or directory; --data takes a file, or one of sudo"),
    "": (None, {}, "Is a directory"),
    "empty.txt": ("", {}, "0 tokens, expected at least 5120"),
    "short.txt": ("ab\n" * 39, LINES, "39 sequences, expected at least 40"),
    "latin.txt": ("é".encode("latin-1") * 9999, {}, "not text in UTF-8. iconv"),
    "utf16.txt": ("ab".encode("utf-16-le") * 9999, {}, "not text in UTF-8. iconv"),
    "train.bin": (NUMBERS.astype(np.uint16).tobytes(), {}, "numpy.fromfile(path, numpy.uint16)"),
    "long.txt": ("ab\n" * 40 + "abcd\n" * 41, LINES | {"length": 3}, "41 of 81 lines are longer than 3"),
    "genes.fna": (FASTA, LINES | {"length": 1}, "--length 6 keeps all of them"),
    "mols.csv": ("smiles,id\nC,1\n" * 40, LINES, "cut -d, -f1 mols.csv | tail -n +2 > mols.txt"),
    "mols.jsonl": ('{"text": "C"}\n' * 40, LINES, "jq -r .text mols.jsonl > mols.txt"),
    "vocab.txt": ("ab\n" * 9999, {"vocab": "words"}, "--vocab is for an .npy"),
    "lines.npy": (npy(NUMBERS), LINES, "--lines is for text"),
    "nowords.npy": (npy(NUMBERS), {"vocab": "nowhere"}, "nowhere: No such file"),
    "few.npy": (npy(NUMBERS + 1), {"vocab": "words"}, "words: 7 lines, expected one for each token, 0 to 7"),
    "length.npy": (npy(NUMBERS), {"length": 5}, "--length 5, expected that of the rows, 6"),
    "huge.npy": (npy(np.append(NUMBERS, 300_000)), {}, "a token 300000, expected less than 300,000"),
    "negative.npy": (npy(NUMBERS - 1), {}, "a token -1, expected 0 or more"),
    "floats.npy": (npy(NUMBERS / 2), {}, "expected integers, a stream [N] or rows [N, L]"),
    "empty.npy": (npy(NUMBERS[:0]), {}, "expected integers"),
    "renamed.npy": (npy(NUMBERS, np.savez), {}, "expected integers"),
    "damaged.npy": (npy(NUMBERS, np.savez)[:-9], {}, "expected integers"),
    "cut.npy": (npy(NUMBERS)[:-9], {}, "expected integers"),
    "text.npy": ("ab\n" * 9999, {}, "expected integers"),
    "sudoku": (None, {"length": 36}, "--lines, --length and --vocab are for a file of your own"),
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes a file in the current directory, which is an empty one."""
    monkeypatch.chdir(tmp_path)
    Path("words").write_text("\n".join("abcdefg") + "\n")
    return lambda name, text: Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())


def read(domain):
    """All that a domain loads: the string of a stream, or the set of the strings of its rows."""
    both = np.concatenate(domain.load())
    return domain.decode(both) if both.ndim == 1 else set(map(domain.decode, both))


def info_of(domain):
    """What a model file remembers of its domain."""
    keys = ("vocab", "length", "end", "join", "source")
    return {"data": domain.name} | {key: getattr(domain, key) for key in keys}


@pytest.mark.parametrize("name", OWN)
def test_own_files(name, write, capsys):
    """A file is read without what does not belong to its sequences, and again from what a model remembers."""
    content, arguments, expected = OWN[name]
    write(name, content)
    domain = data.get(name, **arguments)
    assert read(domain) == expected and domain.name not in data.NAMES
    assert ("1 of 41 lines are longer than 5" in capsys.readouterr().err) == (name == "lines.txt")
    info = info_of(domain)
    old = info | {"source": {key: info["source"][key] for key in ("path", "lines", "vocab")}}
    assert [read(data.from_info(info)), read(data.from_info(old))] == [expected, expected]
    assert info_of(data.from_info(info)) == info
    Path(name).unlink()
    assert data.from_info(info).load is None and info_of(data.from_info(info)) == info


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name, write):
    """Whatever is wrong with a user's file is BadInput, in one line."""
    content, arguments, message = BAD[name]
    if content is not None:
        write(name, content)
    with pytest.raises(data.BadInput, match=re.escape(message)) as error:
        data.get(name, **arguments)
    assert "\n" not in str(error.value)


def test_other_data_in_the_vocabulary_of_a_model(write):
    """Other data is read in the tokens of a model, or refused if the model has never seen some of them."""
    write("first", "abcd\n" * 40)
    write("second", "da\nb\n" * 40 + "abc\n")
    first, second = data.get("first", lines=True), data.get("second", lines=True, length=2)
    adapted = data.with_vocabulary_of(second, info_of(first))
    assert (adapted.vocab, adapted.length, adapted.steps) == (first.vocab, 5, 5) and second.length == 3
    assert read(adapted) == read(data.from_info(info_of(adapted))) == {"da", "b"}
    assert (adapted.load()[0][:, 2:] == first.index["<end>"]).all()
    assert data.with_vocabulary_of(first, info_of(first)) is first
    stream, own = data.get("first", length=4), data.get("second", length=4)
    assert read(data.with_vocabulary_of(own, info_of(stream))) == "da\nb\n" * 40 + "abc\n"
    for domain, info, message in (
        (first, info_of(second), "first: 1 tokens that the model has never seen: 'c'"),
        (first, info_of(first) | {"length": 4}, "first: sequences of 5 tokens, expected 4"),
        (data.get("first", length=3), info_of(stream), "first: sequences of 3 tokens, expected 4"),
        (data.get("text"), info_of(data.get("dna")), "57 tokens that the model has never seen: '\\n', ' ', "),
    ):
        with pytest.raises(data.BadInput, match=re.escape(message)):
            data.with_vocabulary_of(domain, info)


def test_frames_show_what_is_decoded():
    """A frame ends with its sequence, marks masks and wrong cells, and gives a wide character two columns."""
    domain, chinese = data.get("molecules"), data.Domain("c", ["你", "\t"], 3)
    E, M = domain.index["<end>"], len(domain.vocab)
    c, n = domain.encode("CN")

    def frame(x, likely, width=6, domain=domain):
        return terminal.draw_frame(domain, np.array(x), np.array(likely), width)

    assert frame([c, c, E, n, E], [0] * 5) == ["CC    "] and frame([E], [0]) == [" " * 6]
    assert frame([c, M, M, n, E], [0, n, E, 0, 0]) == ["C··N  "]
    assert frame([c] * 7, [0] * 7, 3) == ["CCC", "CCC", "C  "]
    assert frame([0, 1, 0], [0] * 3, domain=chinese) == ["你 你 "]
    assert frame([0, 0, 1, 6, 6, 6] * 6, [2] * 36, 12, data.get("sudoku"))[0] == "1!1!2!······"
    assert terminal.side_by_side([["a ", "b "], ["c "]], 2) == "a  | c\nb  |"


def test_progress(capsys):
    """A log is told how far a job is, how long it will take, and its speed."""
    progress = terminal.Progress("base: iteration", 10, tokens=100)
    progress.update(2)
    progress.began -= 8  # seconds ago
    progress.update(4)  # prints nothing, because a log gets a line every 20 seconds
    progress.shown -= 30
    progress.update(6, "loss 1")
    assert capsys.readouterr().err == "base: iteration 6/10  0m08s left  loss 1  50 tokens/s\n"
    assert [terminal.clock(s) for s in (5, 3599, 7260)] == ["0m05s", "59m59s", "2h01m"]


def test_film(tmp_path):
    """The layers of a film, painted one over the other, end in its last state; images are shown in grey."""
    domain, (x, y) = data.get("sudoku"), sudoku.load()[1][:2].astype(int)
    last = np.concatenate(((x[:1] + 1) % 6, x[1:20], [6] * 16))  # a wrong digit, and 16 masks
    wrong = domain.wrong(last[None])[0]
    film(tmp_path / "film.svg", {"A & B": [(y, y), (last, y)]}, domain)
    root = ElementTree.parse(tmp_path / "film.svg").getroot()
    digits, colours = [""] * 36, [""] * 36
    for mark in root.iter():
        for left, down in re.findall(r"M(\d+) (\d+)h40", mark.get("d", "")):  # cells of 40 pixels
            colours[int(down) // 40 * 6 + int(left) // 40] = mark.get("stroke")
        for left, down, digit in zip(*(mark.get(k, "").split() for k in "xy"), mark.text or ""):
            digits[int(down) // 40 * 6 + int(left) // 40] = digit
    kinds = np.where(last == 6, "masked", np.where(wrong, "wrong", "known"))
    assert "".join(digits) == domain.decode(np.where(last == 6, y, last))
    assert colours == [PAPER[kind] for kind in kinds] and set(kinds) == set(PAPER)
    labels = [mark.text for mark in root.iter() if mark.tag.endswith("text") and not mark.get("x")]
    assert labels == ["A & B", "step 1 of 2", f"step 2 of 2, {wrong.sum()} cells wrong"]
    film(tmp_path / "film.svg", {"base": [(np.arange(196) % 16,) * 2]}, data.get("images"))
    greys = re.findall('stroke="(#.{6})" stroke-width="17"', (tmp_path / "film.svg").read_text())
    assert greys == [f"#{3 * f'{17 * level:02x}'}" for level in range(16)]


# =============================================================================================
# 2. The port kit
# =============================================================================================


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
    under = ("base.npz`,", "rate1.npz` without a signal,", "rate1.npz` when a first pass")
    for z, model in zip(logits, under):
        nll = scmdm.masked_nll(z, x0, xt == mask_id, mask_id).item()
        assert f"{nll:.2f} nats under `models/text/{model}" in page


# =============================================================================================
# 3. A foreign model
# =============================================================================================


class Foreign(Transformer):
    """Ours, called as a masked language model of transformers is."""

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None):
        return types.SimpleNamespace(logits=super().forward(input_ids))


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

        def keep(model, args, out, passes=passes):
            if model.training:
                passes.append(out.logits)

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
    for model, name, message in (
        ("bert", "missing", "No such file"),
        ("bert", "binary", "not text in UTF-8"),
        ("bert", "short", "expected at least 40"),
        ("empty", "short", "not a masked language model"),
        ("no mask", "short", "lacks a mask token"),
    ):
        with pytest.raises(hf.BadInput, match=message):
            hf.main([str(tmp_path / model), str(tmp_path / name), "--length", "10"])
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
