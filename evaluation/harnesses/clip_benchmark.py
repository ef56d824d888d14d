"""The model type `internvl` of clip-benchmark (https://github.com/LAION-AI/CLIP_benchmark).

    python -m internvl.evaluation.harnesses.clip_benchmark eval --model_type internvl --model InternVL-G \
        --pretrained FOLDER --task zeroshot_retrieval --dataset flickr30k --dataset_root ... --output result.json

is the command `clip_benchmark` with one more model type; its options stay. `--pretrained` is the folder of a
checkpoint or its name on the Hub. `--model` is "InternVL-C" or "InternVL-G", for images prepared as the checkpoint
says, or one of the names of the published code, which decide that too: `internvl_c_classification_hf` crops,
`internvl_g_retrieval_hf` squashes. `--dtype float32 --no_amp` computes in full precision; without them weights stay as
they were saved, and clip-benchmark computes in half precision.
"""

import argparse
import sys
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin

from ... import register
from ...console import exit_status
from ...kinds import check_kind
from . import harness


# `--model` -> (mode, `resize_mode` of the image processor or None for the checkpoint's own)
MODEL_NAMES: dict[str, tuple[str, str | None]] = {
    "InternVL-C": ("InternVL-C", None),
    "InternVL-G": ("InternVL-G", None),
    **{
        f"internvl_{letter.lower()}_{task}{suffix}": (f"InternVL-{letter}", resize_mode)
        for letter in "CG"
        for task, resize_mode in (("classification", "crop"), ("retrieval", "squash"))
        for suffix in ("", "_hf")
    },
}


class ClipBenchmarkModel(torch.nn.Module):
    """An `InternVLModel` with the two methods that clip-benchmark calls."""

    def __init__(self, model: PreTrainedModel, mode: str) -> None:
        super().__init__()
        self.model = model
        self.mode = mode

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embeds pixel values (B, 3, H, W); the embeddings (B, E) are not normalised."""
        return self.model.get_image_features(pixel_values.to(self.model.dtype), mode=self.mode)

    def encode_text(self, texts: Any) -> torch.Tensor:
        """Embeds what the tokenizer of `load_internvl` returns; the embeddings (B, E) are not normalised."""
        return self.model.get_text_features(texts["input_ids"], texts["attention_mask"])


class ImageTransform:
    """Turns an image into pixel values (3, H, W); a class, because workers of a data loader may have to pickle it."""

    def __init__(self, processor: ProcessorMixin, **settings: Any) -> None:
        self.processor = processor
        self.settings = {"max_num": 1, **settings}

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Prepares one image, as one tile."""
        pixels = self.processor(images=[image], mode="contrastive", return_tensors="pt", **self.settings)
        return pixels["pixel_values"][0]


class TextTransform:
    """Tokenizes texts as the checkpoint's processor does, with the prefix and the end token."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor

    def __call__(self, texts: list[str]) -> Any:
        """Returns ids and mask, padded to the longest text, with a method `to(device)`."""
        return self.processor(text=list(texts), mode="contrastive", padding=True, return_tensors="pt")


def load_internvl(
    model_name: str,
    pretrained: str,
    cache_dir: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str = "auto",
) -> tuple[ClipBenchmarkModel, ImageTransform, TextTransform]:
    """Loads a checkpoint for clip-benchmark, which calls this for the model type `internvl`.

    Args:
        model_name: A key of `MODEL_NAMES`.
        pretrained: Folder or Hub name of an InternVL-C or InternVL-G.
        cache_dir: Where downloads go.
        device: Where the model computes.
        dtype: As in `from_pretrained`: "auto" is that of the weights.

    Returns:
        The model, what prepares an image, and what prepares texts.

    Raises:
        OSError: If there is no such checkpoint.
        ValueError: If there is no model of this name, or the checkpoint is of another kind.
    """
    if model_name not in MODEL_NAMES:
        raise ValueError(f"`--model` is one of {', '.join(MODEL_NAMES)} with this model type, not {model_name!r}.")
    mode, resize_mode = MODEL_NAMES[model_name]
    register()
    kinds = ("InternVL-G",) if mode == "InternVL-G" else ("InternVL-C", "InternVL-G")
    check_kind(pretrained, *kinds, door=f"`--model {model_name}`")
    model = AutoModel.from_pretrained(pretrained, cache_dir=cache_dir, dtype=dtype).to(device).eval()
    processor = AutoProcessor.from_pretrained(pretrained, cache_dir=cache_dir)
    settings = {} if resize_mode is None else {"resize_mode": resize_mode}
    return ClipBenchmarkModel(model, mode), ImageTransform(processor, **settings), TextTransform(processor)


def as_float(value: Any) -> float:
    """Converts a number or an array of one element.

    clip-benchmark 1.6 ends a classification with `float` of such arrays, which NumPy 2.4 and later refuse.
    """
    return float(value.item() if isinstance(value, np.ndarray) else value)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line of clip-benchmark with the model type `internvl`; returns its exit status."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dtype", default="auto")
    own, rest = parser.parse_known_args(arguments)

    def command() -> int | None:
        with harness("clip-benchmark"):
            from clip_benchmark import cli, models
            from clip_benchmark.metrics import zeroshot_classification
        if "internvl" not in models.MODEL_TYPES:
            models.MODEL_TYPES.append("internvl")  # the list that the command line offers
        models.TYPE2FUNC["internvl"] = partial(load_internvl, dtype=own.dtype)
        vars(zeroshot_classification).setdefault("float", as_float)
        sys.argv[1:] = rest  # clip-benchmark reads no other arguments
        return cli.main()

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
