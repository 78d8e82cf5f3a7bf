"""Draw samples that sample.py has saved. Images need matplotlib, molecules need RDKit.

    python sample.py --data images -n 20 --save images.jsonl
    python -m data.study.pictures images images.jsonl      one PNG for each model, beside the file
"""

import argparse
import json
from pathlib import Path

import numpy as np

import data
from data import BadInput, molecules
from data.terminal import run


def draw_images(texts, path):
    """Draw images, each a string of grey levels, ten in a row."""
    from matplotlib.image import imsave

    domain = data.get("images")
    across, size = min(10, len(texts)), domain.row + 1
    down = -(-len(texts) // across)
    grid = np.full((down * size, across * size), 8, dtype=np.uint8)  # grey lines between the images
    for i, text in enumerate(texts):
        y, x = i // across * size, i % across * size
        grid[y : y + domain.row, x : x + domain.row] = np.reshape(domain.encode(text), (domain.row, -1))
    imsave(path, grid.repeat(4, 0).repeat(4, 1), cmap="gray", vmin=0, vmax=15)
    return len(texts)


def draw_molecules(texts, path):
    """Draw the valid ones of the first 40 molecules, each a SMILES string, eight in a row."""
    from rdkit.Chem import MolFromSmiles
    from rdkit.Chem.Draw import MolsToGridImage

    valid = [text for text in texts[:40] if molecules.canonical(text)]
    if valid:
        drawn = [MolFromSmiles(text) for text in valid]
        MolsToGridImage(drawn, molsPerRow=8, subImgSize=(160, 130), legends=valid).save(path)
    return len(valid)


def read_samples(path):
    """Return {model: its samples, as text} of a file that `sample.py --save` wrote as JSON lines."""
    texts = {}
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            texts.setdefault(record["model"], []).append(record["text"])
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{path}: not what sample.py --save writes into a file that ends in .jsonl") from None
    return texts


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("domain", choices=("images", "molecules"))
    p.add_argument("file", type=Path, help="what sample.py --save wrote; its name ends in .jsonl")
    args = p.parse_args()
    draw = {"images": draw_images, "molecules": draw_molecules}[args.domain]
    for model, texts in read_samples(args.file).items():
        path = args.file.with_name(f"{args.domain}-{model.lower().replace(' ', '-')}.png")
        try:
            print(f"{path}: {draw(texts, path)} of {len(texts)} drawn")
        except ImportError as error:
            needed = {"images": "matplotlib", "molecules": "rdkit"}[args.domain]
            raise BadInput(f"this needs {needed} ({error}): pip install {needed}") from None


if __name__ == "__main__":
    run(main)
