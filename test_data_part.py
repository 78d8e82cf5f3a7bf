"""Data and files: for the last section of test_scmdm.py."""

import io
import math
import re
import zlib
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import data
from data import dna, images, molecules, sudoku, terminal, text
from data.film import PAPER, film
from sample import SHIPPED
from scmdm import load
from test_scmdm import assert_fits


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
