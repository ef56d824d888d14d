"""A folder in the layout of ADE20K: rectangles of one colour per class."""

from pathlib import Path

import numpy as np
from PIL import Image


NAMES = ["wall", "building, edifice", "sky", "floor, flooring"]
COLOURS = np.array([(0, 0, 0), (220, 30, 30), (30, 200, 40), (40, 40, 230), (240, 240, 240)])  # of 0, no class, too


def write_ade20k(root: Path, sizes, split: str = "validation", suffix: str = ".png", seed: int = 0) -> Path:
    """Writes an image of each (height, width); three bands of classes, and a corner without one."""
    rng = np.random.default_rng(seed)
    for kind in ("images", "annotations"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    for number, (height, width) in enumerate(sizes):
        labels = np.zeros((height, width), dtype=np.uint8)
        first, second = sorted(rng.choice(np.arange(1, 4), 2, replace=False) * width // 4)
        labels[:, :first], labels[:, first:second], labels[:, second:] = rng.permutation([1, 2, 3, 4])[:3]
        labels[: height // 8, : width // 8] = 0
        name = f"ADE_{split[:3]}_{number:08d}"
        Image.fromarray(COLOURS[labels].astype(np.uint8)).save(root / "images" / split / f"{name}{suffix}")
        Image.fromarray(labels).save(root / "annotations" / split / f"{name}.png")
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    lines += [f"{number}\t0.1\t10\t2\t1\t{name}" for number, name in enumerate(NAMES, start=1)]
    (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    return root
