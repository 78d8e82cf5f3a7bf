"""The terminal: a sequence as lines of text, tables, how far a long job is, and what is said of bad input."""

import argparse
import math
import os
import shutil
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np

from data import BadInput


def wide(text):
    """The columns that a text takes in a terminal."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def draw_frame(domain, x, likely, width):
    """A sequence x [L] as lines that are `width` columns wide.

    A masked position shows its most likely token, dim, or a dot where there are no colours (in a file). A
    token that breaks a rule is red, or marked with an exclamation mark.
    """
    colours, masked = sys.stdout.isatty(), x == len(domain.vocab)
    wrong = domain.wrong(x[None])[0] if domain.wrong else np.zeros(len(x), bool)
    lines, line, room = [], "", width
    for i, token in enumerate(np.where(masked, likely, x)):
        word = domain.vocab[token]
        ends = word == domain.end
        if ends and not masked[i]:
            break  # what follows is padding
        cell = "." if ends else domain.cell(token) if domain.cell else word + domain.join
        newline = (cell == "\n" and not masked[i]) or (domain.row and (i + 1) % domain.row == 0)
        cell = cell.replace("\n", "↵" if masked[i] else "").replace("\t", " ")
        if wide(cell) > room:
            lines.append(line + " " * room)
            line, room = "", width
        room -= wide(cell)
        if masked[i]:
            cell = f"\033[2m{cell}\033[0m" if colours else "·" * wide(cell)
        elif wrong[i]:
            cell = f"\033[31m{cell}\033[0m" if colours else cell.rstrip() + "!"
        line += cell
        if newline:
            lines.append(line + " " * room)
            line, room = "", width
    return [*lines, line + " " * room] if room < width or not lines else lines


def side_by_side(columns, width):
    """Several lists of lines, each line `width` columns wide -> one string with the lists side by side."""
    height = max(map(len, columns))
    padded = [lines + [" " * width] * (height - len(lines)) for lines in columns]
    return "\n".join(" | ".join(row).rstrip() for row in zip(*padded))


def clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m{seconds:02}s"


class Progress:
    """How far a long job is, on stderr: one line that changes in a terminal, a new one now and then in a log.

    `what` is what is counted up to `total`, for example "base: iteration". `tokens` is how many tokens one of
    them is, to show a speed.
    """

    def __init__(self, what, total, tokens=0):
        self.what, self.total, self.tokens, self.first = what, total, tokens, None

    def update(self, done, text=""):
        now, terminal = time.time(), sys.stderr.isatty()
        if self.first is None:  # the clock starts here, because a compilation may have slowed the first one
            self.first, self.began, self.shown = done, now, now
            return
        last = done == self.total and now - self.began > 2
        if last or now - self.shown > (0.5 if terminal else 20):
            each = (now - self.began) / max(1, done - self.first)  # seconds
            line = f"{self.what} {done}/{self.total}  {clock(each * (self.total - done))} left  {text}"
            line += f"  {self.tokens / each:,.0f} tokens/s" if self.tokens else ""
            if terminal:
                line = "\r\033[K" + line[: shutil.get_terminal_size().columns - 1]
            print(line, end="" if terminal and done < self.total else "\n", file=sys.stderr, flush=True)
            self.shown = now


def print_table(rows):
    """Print rows of {column: text} as a Markdown table, aligned so that it can be read as it is."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[str(row.get(key, "")) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    cells.insert(1, ["-" * width for width in widths])
    for line in cells:
        print(" | ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def run(main):
    """Call main(). Bad input becomes one line and exit status 2; any other error keeps its traceback."""
    sys.stdout.reconfigure(errors="replace")  # for an ASCII terminal
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except BadInput as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def number(kind, low, high=math.inf):
    """Return a type for argparse that checks a range."""

    def check(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not between {low} and {high}")
        return value

    check.__name__ = kind.__name__  # argparse names it for what is no number
    return check
