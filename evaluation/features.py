"""Embeddings of many pictures or texts by an `InternVLModel`, and what the commands that need them share."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin

from ..modeling_internvl import MODES


def modes_of(model: PreTrainedModel) -> tuple[str, ...]:
    """InternVL-C, and InternVL-G if the model has queries."""
    return MODES if model.config.has_queries else MODES[:1]


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
    for start in range(0, len(pictures), batch_size):
        pixels = pixel_values_of(model, processor, pictures[start : start + batch_size])
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
    for start in range(0, len(texts), batch_size):
        inputs = processor(
            text=list(texts[start : start + batch_size]), mode="contrastive", padding=True, return_tensors="pt"
        ).to(model.device)
        features = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        rows.append(F.normalize(features.float(), dim=-1).cpu())
    return torch.cat(rows)


def run_command(description: str, evaluate: Callable[..., dict[str, Any]], **numbers: int) -> None:
    """Runs an evaluation from the command line and writes its report.

    Args:
        description: What the command does.
        evaluate: Takes model, processor, and by name the numbers; gives the report.
        **numbers: Options of the command with their defaults.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--subfolder", default="", help="where in the folder the model lies")
    for name, value in {**numbers, "seed": 0, "batch_size": 64}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--output", type=Path, help="write the report to this JSON file too")
    options = vars(parser.parse_args())
    where = {"pretrained_model_name_or_path": options.pop("model"), "subfolder": options.pop("subfolder")}
    output: Path | None = options.pop("output")
    model = AutoModel.from_pretrained(**where).eval()
    report = evaluate(model, AutoProcessor.from_pretrained(**where), **options)
    text = json.dumps(report, indent=2)
    if output:
        output.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


__all__ = ["embed_pictures", "embed_texts", "modes_of", "pixel_values_of", "run_command"]
