"""Embeddings of many pictures or texts by an `InternVLModel`, and what all evaluations share: batches and the command line."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin

from ..kinds import check_kind
from ..modeling_internvl import MODES


C_AND_G = ("InternVL-C", "InternVL-G")

Item = TypeVar("Item")


def modes_of(model: PreTrainedModel) -> tuple[str, ...]:
    """InternVL-C, and InternVL-G if the model has queries."""
    return MODES if model.config.has_queries else MODES[:1]


def batches(items: Sequence[Item], batch_size: int, doing: str) -> Iterator[Sequence[Item]]:
    """Yields `batch_size` items at a time; on a terminal, a progress bar says what is being done with them."""
    with tqdm(total=len(items), desc=doing, leave=False, disable=None, delay=1) as progress:
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            yield batch
            progress.update(len(batch))


@torch.inference_mode()
def embed_pictures(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pictures: Sequence[Image.Image],
    mode: str = "InternVL-C",
    batch_size: int = 64,
) -> torch.Tensor:
    """Unit vectors (pictures, E) of pictures, each seen as one tile.

    Args:
        model: An `InternVLModel`.
        processor: Its processor.
        pictures: The pictures.
        mode: "InternVL-C" or "InternVL-G".
        batch_size: Pictures per call.
    """
    rows = []
    for batch in batches(pictures, batch_size, "embedding pictures"):
        pixels = pixel_values_of(model, processor, batch)
        rows.append(F.normalize(model.get_image_features(pixels, mode=mode).float(), dim=-1).cpu())
    return torch.cat(rows)


def pixel_values_of(
    model: PreTrainedModel, processor: ProcessorMixin, pictures: Sequence[Image.Image]
) -> torch.Tensor:
    """(pictures, 3, H, W), one tile per picture, on the model's device."""
    inputs = processor(images=list(pictures), mode="contrastive", max_num=1, return_tensors="pt")
    return inputs["pixel_values"].to(model.device)


@torch.inference_mode()
def embed_texts(
    model: PreTrainedModel, processor: ProcessorMixin, texts: Sequence[str], batch_size: int = 256
) -> torch.Tensor:
    """Unit vectors (texts, E); the processor adds the prefix and the end token.

    Args:
        model: An `InternVLModel`.
        processor: Its processor.
        texts: The texts.
        batch_size: Texts per call.
    """
    rows = []
    for batch in batches(texts, batch_size, "embedding texts"):
        inputs = processor(text=list(batch), mode="contrastive", padding=True, return_tensors="pt").to(model.device)
        features = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        rows.append(F.normalize(features.float(), dim=-1).cpu())
    return torch.cat(rows)


def run_command(
    description: str, evaluate: Callable[..., dict[str, Any]], kinds: Sequence[str] = C_AND_G, **numbers: int
) -> None:
    """Runs an evaluation from the command line and writes its report.

    Args:
        description: What the command does.
        evaluate: Takes model, processor, and by name the numbers; gives the report.
        kinds: Of models that it takes, see `check_kind`.
        **numbers: Options of the command with their defaults.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m internvl.evaluation.{Path(sys.argv[0]).stem}", description=description
    )
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--subfolder", default="", help="where in the folder the model lies")
    for name, value in {"seed": 0, "batch_size": 64, **numbers}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--output", type=Path, help="write the report to this JSON file too")
    options = vars(parser.parse_args())
    where = {"pretrained_model_name_or_path": options.pop("model"), "subfolder": options.pop("subfolder")}
    output: Path | None = options.pop("output")
    try:
        folder, subfolder = where.values()
        check_kind(folder, *kinds, door="this evaluation", subfolder=subfolder)
        model = AutoModel.from_pretrained(**where).eval()
        report = evaluate(model, AutoProcessor.from_pretrained(**where), **options)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")
    text = json.dumps(report, indent=2)
    if output:
        output.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


__all__ = ["batches", "embed_pictures", "embed_texts", "modes_of", "pixel_values_of", "run_command"]
