"""Pictures of samples that sample.py has saved.

    python sample.py --data images -n 20 --save images.jsonl
    python -m data.study.pictures images images.jsonl           images-base.png and others, for each model

Images are drawn by matplotlib, molecules by RDKit.
"""

import argparse
import json
from pathlib import Path

import numpy as np

import data
from data import molecules
from sample import run


def draw_images(texts, path):
    """Draw images, given as strings of grey levels, ten a row."""
    from matplotlib.image import imsave

    domain = data.get("images")
    across, size = min(10, len(texts)), domain.row + 1
    down = -(-len(texts) // across)
    grid = np.full((down * size, across * size), 8, dtype=np.uint8)  # grey lines between the images
    for i, text in enumerate(texts):
        y, x = i // across * size, i % across * size
        grid[y : y + domain.row, x : x + domain.row] = np.reshape(domain.encode(text), (domain.row, -1))
    imsave(path, grid.repeat(4, 0).repeat(4, 1), cmap="gray", vmin=0, vmax=15)
    return f"wrote {len(texts)} images: {path}"


def draw_molecules(texts, path):
    """Draw the valid ones of molecules, given as SMILES, eight a row."""
    from rdkit.Chem import MolFromSmiles
    from rdkit.Chem.Draw import MolsToGridImage

    valid = [text for text in texts[:40] if molecules.canonical(text)]
    if not valid:
        return "no picture: none of them is a molecule"
    drawn = list(map(MolFromSmiles, valid))
    MolsToGridImage(drawn, molsPerRow=8, subImgSize=(160, 130), legends=valid).save(path)
    return f"drew {len(valid)} molecules of the first {min(40, len(texts))}: {path}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("domain", choices=("images", "molecules"))
    p.add_argument("file", type=Path, help="what sample.py --save wrote, its name ending in .jsonl")
    args = p.parse_args()
    texts = {}
    for line in args.file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        texts.setdefault(record["model"], []).append(record["text"])
    draw = {"images": draw_images, "molecules": draw_molecules}[args.domain]
    for model, rows in texts.items():
        name = model.lower().replace(" ", "-")
        try:
            print(draw(rows, args.file.with_name(f"{args.domain}-{name}.png")))
        except ImportError as error:
            needed = {"images": "matplotlib", "molecules": "rdkit"}[args.domain]
            raise ValueError(f"pictures need {needed} ({error}): pip install {needed}") from None


if __name__ == "__main__":
    run(main)
