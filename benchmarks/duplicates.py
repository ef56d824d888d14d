"""How well near duplicates are found: `python -m internvl.benchmarks.duplicates`, on 20,000 textured images.

Changed copies of a fifth of the images lie among them (JPEG of quality 40 to 95, half to twice the size, mirrored,
cropped by a tenth of each side at most), and copies of images of an evaluation set, changed likewise. For each
`--min-sameness` it prints the shares of copies and of leaks that are found, and of the images that would be left out
though they are like none, and writes `benchmarks/results/duplicates.json` with the curve.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from internvl.synthetic.textures import changed, texture
from internvl.training.data.fingerprints import fingerprint
from internvl.training.data.near_duplicates import MIN_SAMENESS, Fingerprints, groups_of, near_duplicates

from .harness import versions


RESULTS = Path("benchmarks", "results", "duplicates.json")  # of the current folder
THRESHOLDS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.875, MIN_SAMENESS, 0.925, 0.95, 0.975)
FOUND, FALSE_ALARMS = 0.99, 0.001  # targets at `MIN_SAMENESS`


def prints_of(seeds: Sequence[int]) -> np.ndarray:
    """Fingerprints of textures."""
    return np.stack([fingerprint(texture(seed)) for seed in tqdm(seeds, "images", leave=False, disable=None)])


def prints_of_copies(seeds: Sequence[int]) -> tuple[np.ndarray, list[str]]:
    """Fingerprints of changed copies of textures, and what was changed."""
    prints, kinds = [], []
    for seed in tqdm(seeds, "copies", leave=False, disable=None):
        kind, content = changed(texture(seed), seed)
        prints.append(fingerprint(Image.open(io.BytesIO(content))))
        kinds.append(kind)
    return np.stack(prints), kinds


@dataclass(frozen=True)
class Planted:
    """Changed copies among images.

    Args:
        pairs: (P, 2) numbers of the copy and of what it was made from.
        kinds: What was changed of each.
    """

    pairs: np.ndarray
    kinds: list[str]

    def among(self, pairs: np.ndarray) -> np.ndarray:
        """Which of some pairs are planted, (B,)."""
        planted = {frozenset(pair) for pair in self.pairs.tolist()}
        return np.array([frozenset(pair) in planted for pair in pairs.tolist()], bool)

    def found_in(self, pairs: np.ndarray) -> dict[str, float]:
        """Shares of the copies that some pairs have, by what was changed."""
        there = {frozenset(pair) for pair in pairs.tolist()}
        hits: dict[str, list[bool]] = {"all": []}
        for pair, kind in zip(self.pairs.tolist(), self.kinds, strict=True):
            for name in ("all", kind):
                hits.setdefault(name, []).append(frozenset(pair) in there)
        return {name: float(np.mean(values)) for name, values in hits.items()}


def num_left_out(count: int, pairs: np.ndarray) -> int:
    """How many of some images are left out: all but one of each group."""
    return count - len(np.unique(groups_of(count, pairs)))


def measured_curve(num_images: int, num_copies: int, num_leaks: int) -> dict[str, Any]:
    """The curve, and seconds of both searches."""
    data = prints_of(range(num_images))
    copies, kinds = prints_of_copies(range(num_copies))
    evaluation = Fingerprints(prints_of(range(num_images, num_images + num_leaks)))
    leaks, leak_kinds = prints_of_copies(range(num_images, num_images + num_leaks))
    images = Fingerprints(np.concatenate([data, copies, leaks]))
    own = np.arange(num_copies)
    among = Planted(np.stack([num_images + own, own], axis=1), kinds)
    numbers = np.arange(num_leaks)
    against = Planted(np.stack([num_images + num_copies + numbers, len(images) + numbers], axis=1), leak_kinds)

    start = time.perf_counter()
    pairs, scores = near_duplicates(images, min_sameness=min(THRESHOLDS))
    seconds = {"among each other": time.perf_counter() - start}
    start = time.perf_counter()
    leaked, leak_scores = near_duplicates(images, evaluation, min_sameness=min(THRESHOLDS))
    seconds["against the evaluation set"] = time.perf_counter() - start
    leaked[:, 1] += len(images)  # so that numbers tell images of both apart

    curve = []
    for threshold in THRESHOLDS:
        passing, leaking = pairs[scores >= threshold], leaked[leak_scores >= threshold]
        is_copy, is_leak = among.among(passing), against.among(leaking)
        wrong = num_left_out(len(images), passing) - num_left_out(len(images), passing[is_copy])
        wrong_leaks = len({*leaking[~is_leak, 0].tolist()} - {*leaking[is_leak, 0].tolist()})
        found = {"copies_found": among.found_in(passing), "leaks_found": against.found_in(leaking)}
        alarms = {"false_alarms": wrong / len(images), "false_leaks": wrong_leaks / len(images)}
        curve.append({"min_sameness": threshold, **found, **alarms})
    return {"images": len(images), "copies": num_copies, "leaks": num_leaks, "seconds": seconds, "curve": curve}


def format_curve(found: dict[str, Any]) -> str:
    """The curve as a table in Markdown."""
    lines = ["| min sameness | copies found | leaks found | false alarms | false leaks |", "|---|---|---|---|---|"]
    for row in found["curve"]:
        shares = [row["copies_found"]["all"], row["leaks_found"]["all"], row["false_alarms"], row["false_leaks"]]
        lines.append(f"| {row['min_sameness']:g} | " + " | ".join(f"{share:.3%}" for share in shares) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measures, prints the table and writes the file; 1 if a target is missed at the default."""
    parser = argparse.ArgumentParser(
        prog="python -m internvl.benchmarks.duplicates", description="How well near duplicates are found."
    )
    parser.add_argument("--images", type=int, default=20_000, help="textured images (default: %(default)s)")
    options = parser.parse_args()
    found = measured_curve(options.images, options.images // 5, options.images // 10)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({**versions(), **found}, indent=1) + "\n", encoding="utf-8")
    print(format_curve(found))
    (row,) = (row for row in found["curve"] if row["min_sameness"] == MIN_SAMENESS)
    is_met = min(row["copies_found"]["all"], row["leaks_found"]["all"]) >= FOUND
    return int(not is_met or max(row["false_alarms"], row["false_leaks"]) > FALSE_ALARMS)


if __name__ == "__main__":
    sys.exit(main())
