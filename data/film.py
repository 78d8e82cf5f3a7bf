"""The film: how one sequence is denoised, step by step, by several models side by side. An animated SVG.

A browser plays it wherever it shows a picture, as in a README: it has no script and no font of its own. Each
sampling step is a layer that is hidden until its turn and then paints the cells that changed over the layers
below it. So what stays is written only once, and a viewer that does not animate shows the end.
"""

from collections import defaultdict
from html import escape
from pathlib import Path

HOLD = 3.0  # seconds that the end stays before the film starts again
MARGIN, HEAD, FOOT = 24, 42, 54  # pixels beside a canvas; above it, for the label; below it, for the count
PAPER = {"masked": "#e7edf9", "known": "#ffffff", "wrong": "#fdd3d3"}
INK = {"masked": "#8696b4", "known": "#111827", "wrong": "#c81e1e"}
GREYS = {"masked": ((140, 160, 205), (238, 243, 253)), "known": ((0, 0, 0), (255, 255, 255))}  # dark, light


def film(path, columns, domain, seconds=8.0):
    """Write the film of {label: states} to `path` and return a line that says so.

    `states` has a pair for each sampling step: x [L], the sequence, and likely [L], the most likely token of
    each position, which is shown pale where x is masked. The model with the most steps takes `seconds`.
    """
    steps, cycle = max(map(len, columns.values())), seconds + HOLD
    rules = []
    for k in range(1, steps):
        percent = 100 * (seconds / cycle) * (k / steps)  # of the cycle, when layer k appears
        rules.append(f"@keyframes f{k}{{0%{{visibility:hidden}}{percent:.2f}%{{visibility:visible}}}}")
    rules.append("@media(prefers-reduced-motion:reduce){g{animation:none!important}}")
    body, left = [], MARGIN
    for label, states in columns.items():
        lines, width, height = draw_model(label, states, domain, cycle)
        body += [f'<g transform="translate({left} {HEAD})">', *lines, "</g>"]
        left += max(width, 10 * len(label)) + MARGIN  # a character of the label takes up to 10 pixels
    height += HEAD + FOOT
    page = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left}" height="{height}"'
        f' viewBox="0 0 {left} {height}" font-family="sans-serif">',
        "<style>\n" + "\n".join(rules) + "\n</style>",
        '<rect width="100%" height="100%" rx="10" fill="#ffffff"/>',  # light, on a dark page too
        "\n".join(body) + "\n</svg>\n",
    ]
    Path(path).write_text("\n".join(page), encoding="utf-8")
    return f"film: {path} ({steps} frames, {Path(path).stat().st_size / 1000:.0f} kB)"


def symbol(word, domain):
    return "" if word == domain.end else "↵" if word == "\n" else word


def look(x, likely, wrong, domain):
    """How each position is shown: (colour of the cell, colour of the symbol, symbol)."""
    ended = False
    for token, best, bad in zip(x, likely, wrong):
        masked = token == len(domain.vocab)
        state, token = ("masked", best) if masked else ("wrong" if bad else "known", token)
        word = domain.vocab[token]
        ended = ended or (word == domain.end and not masked)
        if domain.grey:
            level = token / (len(domain.vocab) - 1)
            rgb = (round(dark + (light - dark) * level) for dark, light in zip(*GREYS[state]))
            yield "#{:02x}{:02x}{:02x}".format(*rgb), "", ""
        else:
            ink = INK["masked" if word == "\n" else state]
            yield PAPER[state], ink, "" if ended else symbol(word, domain)


def draw_model(label, states, domain, cycle):
    """(lines of SVG, width, height) of the canvas of one model."""
    length = len(states[0][0])
    if domain.row:
        across, w, font = domain.row, max(16, 240 // domain.row), 20
        h = letter = w  # cells are squares of one letter each
    else:  # text has cells too, and a newline is a sign like any other, so that nothing moves
        letter, font, h = 10, 16, 24
        w = letter * max(len(symbol(word, domain) + domain.join) for word in domain.vocab)
        across = min(length, max(1, 420 // w))
    width, height = across * w, -(-length // across) * h
    lines = [f'<text y="-14" font-weight="bold" fill="{INK["known"]}">{escape(label)}</text>']
    before = [None] * length
    for k, (x, likely) in enumerate(states, 1):
        count, wrong = f"step {k} of {len(states)}", [False] * length
        if domain.wrong and k == len(states):
            wrong = domain.wrong(x[None])[0]
            count += f", {sum(wrong)} cells wrong"
        turn = f' style="animation:f{k - 1} {cycle:g}s step-end infinite"' if k > 1 else ""
        lines.append(f'<g shape-rendering="crispEdges"{turn}>')  # crisp: nothing shines through at an edge
        # The cells that changed are one path for each colour, their symbols one text.
        now = list(look(x, likely, wrong, domain))
        cells, xs, ys, letters = (defaultdict(str) for _ in range(4))  # colour -> SVG
        for i in range(length):
            if now[i] != before[i]:
                paper, ink, word = now[i]
                left, middle = i % across * w, i // across * h + h // 2
                cells[paper] += f"M{left} {middle}h{w}"
                for j, character in enumerate(word):
                    if character.isprintable() and character != " ":
                        xs[ink] += f"{left + j * letter + letter // 2} "
                        ys[ink] += f"{middle + font // 3} "
                        letters[ink] += escape(character)
        before = now
        for paper, d in cells.items():
            lines.append(f'<path d="{d}" stroke="{paper}" stroke-width="{h}"/>')
        style = f'font-size="{font}" font-family="monospace" text-anchor="middle"'
        for ink, string in letters.items():
            lines.append(f'<text x="{xs[ink]}" y="{ys[ink]}" fill="{ink}" {style}>{string}</text>')

        # Below the canvas: a bar, and the count over a white stroke that hides the last one.
        lines += [
            f'<path d="M0 {height + 34}h{width}" stroke="#ffffff" stroke-width="24"/>',
            f'<path d="M0 {height + 12}h{width * k // len(states)}" stroke="#4f6bd8" stroke-width="4"/>',
            f'<text y="{height + 38}" font-size="14" fill="#4b5563">{count}</text></g>',
        ]
    if domain.name == "sudoku":  # thin lines between the cells, thick ones between the boxes of 2 x 3
        for right, down, thick in ((w, h, 0.5), (3 * w, 2 * h, 2)):
            d = "".join(f"M{x} 0v{height}" for x in range(0, width + 1, right))
            d += "".join(f"M0 {y}h{width}" for y in range(0, height + 1, down))
            lines.append(f'<path d="{d}" stroke="{INK["masked"]}" stroke-width="{thick}"/>')
    return lines, width, height
