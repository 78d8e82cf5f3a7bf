"""The film: one sequence as it is denoised, call by call, by several models side by side. An animated SVG.

It plays wherever a browser shows a picture, as in a README: no script, no font of its own. Each call is a
layer, hidden until its turn, that paints the cells that changed over the layers below it. So what stays is
written once, and a viewer that does not animate, or a reader who asked for no motion, sees the end.
"""

from collections import defaultdict
from html import escape
from pathlib import Path

HOLD = 3.0  # seconds that the end stays, before the film starts again
MARGIN, HEAD, FOOT = 24, 42, 54  # pixels beside a canvas; above it, for the label; below it, for the count
PAPER = {"guess": "#e7edf9", "fixed": "#ffffff", "wrong": "#fdd3d3"}
INK = {"guess": "#8696b4", "fixed": "#111827", "wrong": "#c81e1e"}
SHADES = {"guess": ((140, 160, 205), (238, 243, 253)), "fixed": ((0, 0, 0), (255, 255, 255))}  # of an image


def film(path, columns, domain, seconds=8.0):
    """Write the film of columns {label: [(x [L], guess [L]), ...]}, a pair for each call, and return a line
    that says so. `guess` is the model's best token for each position, shown pale where x is masked.
    The column with the most calls takes `seconds`; a call takes as long in the others."""
    frames = max(map(len, columns.values()))
    cycle = seconds + HOLD
    rules = []
    for k in range(1, frames):
        start = 100 * (seconds / cycle) * (k / frames)  # of layer k, in percent of the cycle
        rules.append(f"@keyframes f{k}{{0%{{visibility:hidden}}{start:.2f}%{{visibility:visible}}}}")
    rules.append("@media(prefers-reduced-motion:reduce){g{animation:none!important}}")
    body, left = [], MARGIN
    for label, calls in columns.items():
        lines, width, height = draw(label, calls, domain, cycle)
        body += [f'<g transform="translate({left} {HEAD})">', *lines, "</g>"]
        left += max(width, 10 * len(label)) + MARGIN  # 10 pixels hold a character of the label
    size = f'width="{left}" height="{HEAD + height + FOOT}" viewBox="0 0 {left} {HEAD + height + FOOT}"'
    page = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">',
        "<style>\n" + "\n".join(rules) + "\n</style>",
        '<rect width="100%" height="100%" rx="10" fill="#ffffff"/>',  # light, on a dark page too
        "\n".join(body) + "\n</svg>\n",
    ]
    text = "\n".join(page)
    Path(path).write_text(text, encoding="utf-8")
    return f"film: {path} ({frames} frames, {len(text.encode()) / 1000:.0f} kB)"


def symbol(word, domain):
    return "" if word == domain.end else "↵" if word == "\n" else word


def look(x, guess, wrong, domain):
    """What each position shows: (colour of the cell, colour of the symbol, symbol)."""
    ended = False
    for token, best, bad in zip(x, guess, wrong):
        state = "guess" if token == len(domain.vocab) else "wrong" if bad else "fixed"
        token = best if state == "guess" else token
        word = domain.vocab[token]
        ended = ended or (state != "guess" and word == domain.end)
        if domain.grey:
            level = token / (len(domain.vocab) - 1)
            mix = (round(a + (b - a) * level) for a, b in zip(*SHADES[state]))
            yield "#{:02x}{:02x}{:02x}".format(*mix), "", ""
        else:
            ink = INK["guess" if word == "\n" else state]
            yield PAPER[state], ink, "" if ended else symbol(word, domain)


def draw(label, calls, domain, cycle):
    """(lines of SVG for one model, width and height of its canvas)."""
    length = len(calls[0][0])
    if domain.row:
        across, step, font = domain.row, max(16, 240 // domain.row), 20
        w = h = step
    else:  # cells for text too: a newline is a sign like any other, so that nothing moves
        step, font = 10, 16
        w, h = step * max(len(symbol(word, domain) + domain.join) for word in domain.vocab), 24
        across = min(length, max(1, 420 // w))
    width, height = across * w, -(-length // across) * h

    lines = [f'<text y="-14" font-weight="bold" fill="{INK["fixed"]}">{escape(label)}</text>']
    before = [None] * length
    for k, (x, guess) in enumerate(calls, 1):
        count, wrong = f"call {k} of {len(calls)}", [False] * length
        if domain.wrong and k == len(calls):
            wrong = domain.wrong(x[None])[0]
            count += f", {sum(wrong)} cells wrong"
        cells, xs, ys, letters = (defaultdict(str) for _ in range(4))  # by colour
        now = list(look(x, guess, wrong, domain))
        for i in range(length):
            if now[i] == before[i]:
                continue
            paper, ink, word = now[i]
            left, middle = i % across * w, i // across * h + h // 2
            cells[paper] += f"M{left} {middle}h{w}"
            for j, letter in enumerate(word):
                if letter.isprintable() and letter != " ":
                    xs[ink] += f"{left + j * step + step // 2} "
                    ys[ink] += f"{middle + font // 3} "
                    letters[ink] += escape(letter)
        before = now

        turn = f' style="animation:f{k - 1} {cycle:g}s step-end infinite"' if k > 1 else ""
        lines.append(f'<g shape-rendering="crispEdges"{turn}>')  # crisp: nothing shines through at an edge
        for paper, d in cells.items():
            lines.append(f'<path d="{d}" stroke="{paper}" stroke-width="{h}"/>')
        style = f'font-size="{font}" font-family="monospace" text-anchor="middle"'
        for ink, string in letters.items():
            lines.append(f'<text x="{xs[ink]}" y="{ys[ink]}" fill="{ink}" {style}>{string}</text>')
        done = width * k // len(calls)
        lines += [
            f'<path d="M0 {height + 34}h{width}" stroke="#ffffff" stroke-width="24"/>',
            f'<path d="M0 {height + 12}h{done}" stroke="#4f6bd8" stroke-width="4"/>',
            f'<text y="{height + 38}" font-size="14" fill="#4b5563">{count}</text></g>',
        ]
    if domain.name == "sudoku":  # thin lines between the cells, thick ones between the boxes of 2 x 3
        for right, down, thick in ((w, h, 0.5), (3 * w, 2 * h, 2)):
            d = "".join(f"M{x} 0v{height}" for x in range(0, width + 1, right))
            d += "".join(f"M0 {y}h{width}" for y in range(0, height + 1, down))
            lines.append(f'<path d="{d}" stroke="{INK["guess"]}" stroke-width="{thick}"/>')
    return lines, width, height
