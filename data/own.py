"""A user's own file: text, FASTA, FASTQ, SMILES, or an .npy of integers."""

import re
import sys
import zipfile
from pathlib import Path

import numpy as np

from data import NAMES, BadInput, Domain, split

MOST_IDS = 300_000  # the largest vocabularies in use have 262,144 tokens; one absurd id would fill the memory
BINARY = (
    "not text in UTF-8. iconv converts UTF-16 and Latin-1; token ids, as in a train.bin, become an .npy by"
    " numpy.save('ids.npy', numpy.fromfile(path, numpy.uint16))"
)
TABLES = {  # suffix -> a command that prints one column of such a file
    ".csv": "cut -d, -f1 {0} | tail -n +2",
    ".tsv": "cut -f1 {0} | tail -n +2",
    ".json": "jq -r '.[].text' {0}",
    ".jsonl": "jq -r .text {0}",
}


def expect(right, message):
    if not right:
        raise BadInput(message)


def from_file(name, lines=False, length=None, vocab=None):
    """The Domain of the file called `name`. Raises BadInput.

    Text in UTF-8 is one long stream of characters or, with `lines`, one sequence per line. FASTA and FASTQ
    are read without their headers. An .npy holds a stream [N] or rows [N, L] of integers, and the file
    `vocab` may say what they stand for, one token per line. `length` is the window that a stream is cut into,
    or the longest line that is kept (default: 128).
    """
    path, is_array = Path(name), name.lower().endswith((".npy", ".npz"))
    expect(not (lines and is_array), f"{path}: --lines is for text; in an .npy each row is a sequence")
    expect(is_array or not vocab, f"{path}: --vocab is for an .npy; the tokens of a text are its characters")
    try:
        if is_array:
            domain, tokens = from_array(path, length, vocab)
        else:
            domain, tokens = (from_lines if lines else from_text)(path, length or 128)
    except OSError as error:
        takes = f"--data takes a file, or one of {', '.join(NAMES)}"
        raise BadInput(f"{error.filename}: {error.strerror}; {takes}") from None
    unit, least = ("tokens", 40 * domain.length) if tokens.ndim == 1 else ("sequences", 40)
    expect(len(tokens) >= least, f"{path}: {len(tokens)} {unit}, expected at least {least}")
    if domain.name in NAMES:  # that name would mean the built-in domain and its models
        domain.name = f"my-{domain.name}"
    vocab = vocab and str(Path(vocab).resolve())
    domain.source = {"path": str(path.resolve()), "lines": lines, "length": length, "vocab": vocab}
    domain.load = lambda: split(tokens)
    return domain


def read(path):
    """The text of a file."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    expect("\0" not in text, f"{path}: {BINARY}")
    return text


def strings(path):
    """The lines of a text, or the bare sequences of a FASTA, FASTQ or .smi file."""
    text, suffix = read(path), path.suffix.lower()
    if suffix in TABLES:
        command = f"{TABLES[suffix].format(path.name)} > {path.stem}.txt"
        raise BadInput(f"{path}: a table, expected only the sequences. For example: {command}")
    first = text.lstrip()[:1]
    if suffix in (".fa", ".fas", ".fasta", ".fna", ".ffn", ".faa") and first == ">":
        return ["".join(part.split()) for part in re.split("(?m)^>.*", text)[1:]]  # may be wrapped
    if suffix in (".fq", ".fastq") and first == "@":
        return text.strip().split("\n")[1::4]  # a read is a header, its sequence, a plus sign and its quality
    if suffix == ".smi":
        text = re.sub(r"(?m)[ \t].*", "", text)  # a SMILES, then perhaps its name
    return text.split("\n")


def from_text(path, length):
    """A text -> its domain and the stream [N] of its characters."""
    text = "\n".join(strings(path))
    domain = Domain(path.stem, sorted(set(text)), length)
    return domain, np.array(domain.encode(text), dtype=np.int32)


def from_lines(path, longest, end="<end>"):
    """A text -> its domain and a row [L] for each line, closed and padded by an end token: [N, L]."""
    lines = [line for line in strings(path) if line]
    kept = [line for line in lines if len(line) <= longest]
    if len(kept) < len(lines):
        left_out = f"{path}: {len(lines) - len(kept)} of {len(lines)} lines are longer than {longest}"
        longer = f"--length {max(map(len, lines))} keeps all of them, without --lines the file is one stream"
        expect(2 * len(kept) >= len(lines), f"{left_out}; {longer}")
        print(f"{left_out} and are left out", file=sys.stderr)
    length = max(map(len, kept), default=0) + 1
    domain = Domain(path.stem, [*sorted(set("".join(kept))), end], length, end=end)
    rows = np.full((len(kept), length), domain.index[end], dtype=np.int32)
    for row, line in zip(rows, kept):
        row[: len(line)] = domain.encode(line)
    return domain, rows


def from_array(path, length, vocab):
    """An .npy -> its domain and its stream [N] or rows [N, L]."""
    try:
        tokens = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile):  # no array, or a truncated one
        tokens = None
    integers = isinstance(tokens, np.ndarray) and tokens.dtype.kind in "iu"
    right = integers and tokens.ndim in (1, 2) and tokens.size > 0
    expect(right, f"{path}: expected integers, a stream [N] or rows [N, L], as numpy.save writes them")
    low, high = int(tokens.min()), int(tokens.max())
    expect(low >= 0, f"{path}: a token {low}, expected 0 or more")
    if vocab:
        words = read(vocab).removesuffix("\n").split("\n")
        expect(high < len(words), f"{vocab}: {len(words)} lines, expected one for each token, 0 to {high}")
    else:
        expect(high < MOST_IDS, f"{path}: a token {high}, expected less than {MOST_IDS:,} without --vocab")
        words = [str(i) for i in range(high + 1)]
    if tokens.ndim == 2:
        own = tokens.shape[1]
        expect(length in (None, own), f"{path}: --length {length}, expected that of the rows, {own}")
        length = own
    return Domain(path.stem, words, length or 128, join=" "), tokens
