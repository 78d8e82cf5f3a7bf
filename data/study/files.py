"""Files of results: CSV, a row for each measurement. No accident while one is written loses a row."""

import csv
import os
import zlib
from pathlib import Path

from data import BadInput

KEY = ("run", "domain", "model", "signal", "file", "seed", "steps", "temperature", "n", "sampler", "orders")
KEY += ("passes", "t")


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


def read(path):
    """Return the rows of a results file, each {column: number or text} without its empty cells.

    A last line without a line end was cut off while it was written, and is left out.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    return [{key: number(cell) for key, cell in row.items() if cell} for row in csv.DictReader(whole)]


def key_of(row):
    """Return what tells a row from all others; two rows with the same key measured the same thing."""
    return tuple(row.get(column, "") for column in KEY)


def row_of(domain, name, path):
    """Return the cells that say which model a row is about: name is that of its file, with its seed."""
    model, _, seed = name.partition("-seed")
    crc = f"crc{zlib.crc32(Path(path).read_bytes()):08x}"
    return {"domain": domain.name, "model": model, "file": crc, "seed": float(seed or 0)}


def add(path, rows):
    """Add rows to a results file, and replace those with the same key.

    This is the only function that writes results. It writes the whole file under another name and renames
    it, so a full disk or a kill leaves the old file whole, whatever columns the new rows have.
    """
    path = Path(path)
    table = {key_of(row): row for row in [*(read(path) if path.exists() else []), *rows]}
    columns = dict.fromkeys(column for row in table.values() for column in row)
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(table.values())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; no row that was in it is lost") from None
    finally:
        temporary.unlink(missing_ok=True)
