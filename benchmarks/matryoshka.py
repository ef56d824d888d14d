"""What embeddings keep of their recall when they are cut or stored in fewer bits: `python -m
internvl.benchmarks.matryoshka`.

The bundled InternVL-G goes on with stage 1 on generated pairs, by a loss over several lengths (`matryoshka_dims`). R@1
is the mean of both directions on held-out pairs, before and after, and in brackets as a share of that of the whole
vectors of the same model. A run that was stopped goes on in `runs_output/matryoshka`; the table is in
`benchmarks/results/matryoshka.json`, too.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoProcessor

from internvl.evaluation.embeddings import embed_images, embed_texts
from internvl.evaluation.generated import held_out_scenes
from internvl.evaluation.metrics import recalls_both_ways
from internvl.evaluation.vectors.quantization import dequantize, quantize
from internvl.synthetic.captions import caption
from internvl.synthetic.scenes import draw_scene
from internvl.training.recipes import ContrastiveRecipe, phase_named, stage1_bundled
from internvl.training.stages import Run, run_stage1

from .harness import versions


BUNDLED = Path(__file__).parents[1] / "internvl_g"
RUN = Path("runs_output", "matryoshka")  # of the current folder, as the next
RESULTS = Path("benchmarks", "results", "matryoshka.json")
DIMS = (96, 48, 24)  # of 192
STEPS = 250
NUM_PAIRS = 1000
CANDIDATES = 10  # of a search by signs, which are compared whole
KEPT = 0.98  # target: of R@1, by an eighth of the dimensions


def nested_recipe(steps: int) -> ContrastiveRecipe:
    """The second phase of the bundled stage 1, which has scenes of all kinds and half of the patches, without a
    curve.
    """
    bundled = stage1_bundled()
    phase = replace(phase_named(bundled, "half"), steps=steps)
    return replace(bundled, phases=(phase,), eval_steps=None, matryoshka_dims=DIMS)


def recall(vectors: Iterable[torch.Tensor], captions: list[str]) -> float:
    """R@1 of vectors (B, E) of images and (T, E) of texts, the mean of both directions."""
    images, texts = vectors
    found = recalls_both_ways(images, texts, captions)
    return sum(part["R@1"] for part in found.values()) / len(found)


def by_signs(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Vectors (B, E) and (T, E) to similarities (B, T): whole ones of the best by signs, both ways, below all others
    for the rest.
    """
    signs = [torch.from_numpy(dequantize(quantize(rows.numpy(), "binary"), "binary")) for rows in (images, texts)]
    first = signs[0] @ signs[1].T
    is_candidate = torch.zeros_like(first, dtype=torch.bool)
    for dim in (0, 1):
        is_candidate.scatter_(dim, first.topk(min(CANDIDATES, first.shape[dim]), dim).indices, True)
    return (images @ texts.T).masked_fill(~is_candidate, -2.0)


def measured_recalls(folder: Path, num_pairs: int) -> Iterator[tuple[str, int, float]]:
    """What is kept of each vector, its bytes, and R@1 of the model in a folder."""
    model, processor = AutoModel.from_pretrained(folder).float().eval(), AutoProcessor.from_pretrained(folder)
    scenes = held_out_scenes(num_pairs)
    captions = [caption(scene) for scene in scenes]
    images = embed_images(model, processor, [draw_scene(scene) for scene in scenes], "InternVL-C")
    texts = embed_texts(model, processor, captions)
    size = images.shape[1]
    for dims in (size, *DIMS):
        cut = [F.normalize(rows[:, :dims], dim=-1) for rows in (images, texts)]
        yield f"{dims} of {size} in float32", 4 * dims, recall(cut, captions)
        narrow = [torch.from_numpy(dequantize(quantize(rows.numpy(), "int8"), "int8")) for rows in cut]
        yield f"{dims} of {size} in int8", dims, recall(narrow, captions)
        # Similarities are those of vectors and the unit matrix.
        found = recall((by_signs(*cut), torch.eye(len(captions))), captions)
        yield f"{dims} signs, {CANDIDATES} candidates whole", dims // 8, found


def main() -> int:
    """Trains, measures, prints the table and writes the file; 1 if the target is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m internvl.benchmarks.matryoshka", description="Embeddings that are cut."
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of training (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=NUM_PAIRS, help="held-out pairs (default: %(default)s)")
    options = parser.parse_args()
    run_stage1(nested_recipe(options.steps), None, Run(RUN, resume=True, num_workers=1), source=BUNDLED)
    folders = {"before": BUNDLED, "after": RUN}
    found = {name: list(measured_recalls(folder, options.pairs)) for name, folder in folders.items()}
    print(format_recalls(found))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {**versions(), "steps": options.steps, "pairs": options.pairs, "recall_at_1": found}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    recalls = {name: value for name, _, value in found["after"]}
    whole, *_, eighth = (value for name, value in recalls.items() if name.endswith("float32"))
    return int(eighth < KEPT * whole)


def format_recalls(found: dict[str, list[tuple[str, int, float]]]) -> str:
    """The table in Markdown: R@1, and in brackets the share of that of whole vectors."""
    lines = [
        f"| vectors | bytes | {' | '.join(f'R@1, {name}' for name in found)} |",
        f"|---|---|{'---|' * len(found)}",
    ]
    for rows in zip(*found.values(), strict=True):
        cells = [f"{row[2]:.1%} ({row[2] / first[0][2]:.1%})" for row, first in zip(rows, found.values(), strict=True)]
        lines.append(f"| {rows[0][0]} | {rows[0][1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
