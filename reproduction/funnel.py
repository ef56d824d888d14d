"""What the data funnel is worth: `python -m internvl.reproduction funnel --output DIR [--resume]`.

Stage 1 is trained on generated pairs polluted as those of the web are (`polluted_pairs`), for as many steps on what
the rules of stage 1 keep, on what those of stage 2 keep, on that without near duplicates, and on all pairs. Each model
classifies the same clean held-out images without training examples, and finds the same held-out pairs. `funnel.json`
holds, by seed, how many pairs of each pollution every variant trained on, and its results; `funnel.md` has the means
over the seeds and the differences to all pairs, whatever they are.

The scorer is the bundled InternVL-C, which was trained on clean scenes of the same kind: better than CLIP is on the
web. Its cosines have another scale than CLIP's, so the cut-offs of similarity are shares of clean pairs here.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin

from ..extras import extra
from ..synthetic.tokenizer import caption_tokenizer
from ..training.curves import RetrievalCurve, ZeroShotCurve
from ..training.data.dedup import DedupJob, dedup_data
from ..training.data.filtering import FilterJob, filter_data
from ..training.data.filters import FILTERS, Filter, with_optional
from ..training.recipes import ContrastiveRecipe, stage1_bundled
from ..training.stages import run_stage1
from .polluted_pairs import CLEAN, POLLUTIONS, polluted_pairs, with_similarity, write_polluted_shards
from .run import stage_in


with extra("train"):
    from pyarrow import parquet

SCORER = Path(__file__).resolve().parents[1] / "internvl_g"
ALL = "all pairs"
WITHOUT_DUPLICATES = ", no duplicates"
# Name to the stage whose rules are applied; duplicates are looked for where the name says so.
VARIANTS_OF_DATA: dict[str, int | None] = {
    ALL: None,
    "rules of stage 1": 1,
    "rules of stage 2": 2,
    f"rules of stage 2{WITHOUT_DUPLICATES}": 2,
}
# Share of clean pairs whose similarity lies below the cut-off, by the stage of the rule.
LOST_CLEAN_PAIRS = {1: 0.01, 2: 0.05}
CALIBRATION_SEED = -1
UNSCORED = ("unsafe", "aesthetic")  # generated scenes have neither
TITLES = {
    "zero_shot_digit": "digits",
    "zero_shot_shape": "shapes",
    "zero_shot_colour": "colours",
    "recall_at_1_InternVL-C": "InternVL-C, R@1",
}
REPORT_NAME, PAGE_NAME = "funnel.json", "funnel.md"


@dataclass(frozen=True)
class FunnelAblation:
    """The size of an ablation.

    Args:
        pairs: Polluted pairs of a seed.
        steps: Steps of every training.
        images: Held-out images of each kind, and pairs.
        calibration: Clean pairs by which the cut-offs of similarity are chosen.
        batch_size: Pairs of a step.
        use_bf16: As in the recipe.
    """

    pairs: int = 8000
    steps: int = 600
    images: int = 300
    calibration: int = 500
    batch_size: int = 64
    use_bf16: bool = True

    def recipe(self, seed: int) -> ContrastiveRecipe:
        """The bundled stage 1, on pairs of files, all steps in one phase."""
        bundled = stage1_bundled()
        phase = replace(
            bundled.phases[0],
            name="pairs",
            steps=self.steps,
            warmup_steps=min(bundled.phases[0].warmup_steps, self.steps // 4),
            batch_size=self.batch_size,
            batches=(),
        )
        return replace(bundled, phases=(phase,), eval_steps=None, seed=seed, use_bf16=self.use_bf16)


def calibrated_rules(model: PreTrainedModel, processor: ProcessorMixin, calibration: int) -> tuple[Filter, ...]:
    """The table of rules with cut-offs of similarity for this scorer, and without rules on scores that are not there.

    `calibration` is the least number of pairs that are drawn to find clean ones.
    """
    clean = [pair for pair in polluted_pairs(2 * calibration, CALIBRATION_SEED) if pair["pollution"] == CLEAN]
    scored = with_similarity(clean[:calibration], model, processor)
    cosines = torch.tensor([pair["similarity"] for pair in scored])
    rules = with_optional(FILTERS, UNSCORED)
    return tuple(
        replace(rule, value=round(float(cosines.quantile(LOST_CLEAN_PAIRS[rule.stage])), 4))
        if rule.column == "similarity"
        else rule
        for rule in rules
    )


def pollution_of(shards: Sequence[str]) -> dict[str, int]:
    """Counts the pairs of each pollution."""
    found: Counter = Counter()
    for shard in shards:
        found.update(parquet.read_table(shard, columns=["pollution"])["pollution"].to_pylist())
    return dict(sorted(found.items()))


def kept_shards(
    shards: Sequence[str], stage: int | None, rules: tuple[Filter, ...], folder: Path, with_duplicates: bool = True
) -> list[str]:
    """Writes what the rules up to a stage keep, and returns the files; without a stage these are all."""
    if stage is None:
        return list(shards)
    filter_data(FilterJob(tuple(shards), stage, rules, str(folder)))
    kept = _pairs_in(folder)
    if with_duplicates:
        return kept
    # Scenes are plain: a part of one is like parts of many others, so crops are not looked for.
    dedup_data(DedupJob(tuple(kept), str(folder / "dedup"), crops=False))
    return _pairs_in(folder / "dedup")


def _pairs_in(folder: Path) -> list[str]:
    return sorted(str(file) for file in (folder / "pairs").iterdir())


def measured(folder: Path, images: int) -> dict[str, float]:
    """Zero-shot accuracy by kind and R@1 of the model in a folder, on clean held-out scenes, in English."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    return {
        **ZeroShotCurve(processor, images)(model),
        **RetrievalCurve.of_scenes(processor, images)(model),
    }


def ablate_funnel(
    size: FunnelAblation,
    output: Path,
    seeds: Sequence[int],
    resume: bool = False,
    variants: Iterable[str] = VARIANTS_OF_DATA,
) -> dict[str, Any]:
    """Trains and measures all pairs, and the other `variants` of `VARIANTS_OF_DATA`, with every seed.

    Returns:
        By seed and variant "pairs", the number of each pollution, and "results"; `output/funnel.json` holds it too,
        after each of them.

    Raises:
        ValueError: The folder holds something, and `resume` is not wanted; or a variant is unknown.
    """
    if unknown := [name for name in variants if name not in VARIANTS_OF_DATA]:
        raise ValueError(f"`variants` are of {list(VARIANTS_OF_DATA)}, got {unknown}.")
    if not resume and output.exists() and any(output.iterdir()):
        raise ValueError(f"`output` must be an empty folder, but {output} is not; go on with it by `--resume`.")
    output.mkdir(parents=True, exist_ok=True)
    file = output / REPORT_NAME
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    model, processor = AutoModel.from_pretrained(SCORER).float().eval(), AutoProcessor.from_pretrained(SCORER)
    rules = calibrated_rules(model, processor, size.calibration)
    caption_tokenizer().save_pretrained(output / "tokenizer")
    for seed in seeds:
        folder = output / f"seed_{seed}"
        shards = write_polluted_shards(folder / "raw", size.pairs, seed, model, processor)
        for name in dict.fromkeys([ALL, *variants]):
            stage, found = VARIANTS_OF_DATA[name], report.setdefault(str(seed), {})
            if name in found:
                continue
            short = name.replace(",", "").replace(" ", "_")
            kept = kept_shards(shards, stage, rules, folder / f"kept_{short}", not name.endswith(WITHOUT_DUPLICATES))
            run_stage1(size.recipe(seed), kept, stage_in(folder / short, resume=True), output / "tokenizer")
            found[name] = {"pairs": pollution_of(kept), "results": measured(folder / short, size.images)}
            file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def summary_of(report: dict[str, Any]) -> list[str]:
    """Lines of a Markdown table: results of the variants that each seed has, and their differences to all pairs."""
    seeds = list(report.values())
    variants = [name for name in VARIANTS_OF_DATA if all(name in seed for seed in seeds)]
    names = list(seeds[0][ALL]["results"])
    titles = [TITLES.get(name, name) for name in names]
    lines = [f"| trained on | pairs | {' | '.join(titles)} |", f"|---|---|{'---|' * len(names)}"]
    for variant in variants:
        pairs = mean(sum(seed[variant]["pairs"].values()) for seed in seeds)
        cells = []
        for name in names:
            values = [seed[variant]["results"][name] for seed in seeds]
            gains = [value - seed[ALL]["results"][name] for value, seed in zip(values, seeds, strict=True)]
            cells.append(f"{100 * mean(values):.1f} %" + ("" if variant == ALL else f" ({_with_deviation(gains)})"))
        lines.append(f"| {variant} | {pairs:,.0f} | {' | '.join(cells)} |")
    kinds = [CLEAN, *POLLUTIONS]
    lines += ["", f"| pairs that are kept | {' | '.join(kinds)} |", f"|---|{'---|' * len(kinds)}"]
    for variant in variants:
        counts = [mean(seed[variant]["pairs"].get(kind, 0) for seed in seeds) for kind in kinds]
        lines.append(f"| {variant} | {' | '.join(f'{count:,.0f}' for count in counts)} |")
    return lines


def _with_deviation(gains: Sequence[float]) -> str:
    deviation = f" ± {100 * stdev(gains):.1f}" if len(gains) > 1 else ""
    return f"{100 * mean(gains):+.1f}{deviation}"


def run(options: argparse.Namespace) -> None:
    """Runs the ablation, as the command line says; `--seed` is the first of the seeds."""
    size = FunnelAblation(options.raw_pairs, options.steps, options.images, use_bf16=not options.fp32)
    seeds = range(options.seed, options.seed + options.seeds)
    report = ablate_funnel(size, options.output, seeds, options.resume, options.variants or VARIANTS_OF_DATA)
    (options.output / PAGE_NAME).write_text("\n".join(summary_of(report)) + "\n", encoding="utf-8")
