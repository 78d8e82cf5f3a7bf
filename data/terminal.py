"""How samples look in a terminal: a state as lines of text, several states beside each other."""

import sys
import unicodedata

import numpy as np


def wide(text):
    """Columns that a text takes in a terminal."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def draw_frame(domain, x, guess, width):
    """A state x [L] as lines, `width` columns wide. A masked position shows its guess, dim (in a file, a
    dot); a broken rule is red (in a file, marked with !)."""
    lines, line, used, mask_id, terminal = [], "", 0, len(domain.vocab), sys.stdout.isatty()
    wrong = domain.wrong(x[None])[0] if domain.wrong else np.zeros(len(x), bool)
    for i, (token, likely) in enumerate(zip(x.tolist(), guess.tolist())):
        masked = token == mask_id
        shown = likely if masked else token
        if domain.end and domain.vocab[shown] == domain.end:
            if not masked:
                break  # what follows is padding
            cell = "."
        else:
            cell = domain.cell(shown) if domain.cell else domain.vocab[shown] + domain.join
        newline = cell == "\n" and not masked or domain.row and (i + 1) % domain.row == 0
        cell = cell.replace("\n", "↵" if masked else "").replace("\t", " ")
        if used + wide(cell) > width:
            lines.append(line + " " * (width - used))
            line, used = "", 0
        used += wide(cell)
        if masked:
            cell = f"\033[2m{cell}\033[0m" if terminal else "·" * wide(cell)
        elif wrong[i]:
            cell = f"\033[31m{cell}\033[0m" if terminal else cell.rstrip() + "!"
        line += cell
        if newline:
            lines.append(line + " " * (width - used))
            line, used = "", 0
    return [*lines, line + " " * (width - used)] if used or not lines else lines


def side_by_side(columns, width):
    """Lists of lines, each `width` wide -> one string, the lists beside each other."""
    height = max(map(len, columns))
    padded = [lines + [" " * width] * (height - len(lines)) for lines in columns]
    return "\n".join(" | ".join(row).rstrip() for row in zip(*padded))
