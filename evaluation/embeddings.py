"""Embeddings of images and texts by an `InternVLModel`."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor, PretrainedConfig, PreTrainedModel, ProcessorMixin

from ..modeling_internvl import MODES
from ..renaming_internvl import renamed_arguments, renamed_names


Item = TypeVar("Item")


@dataclass(frozen=True)
class ModelPlace:
    """Where a model is loaded from, and its type of numbers ("auto": that of the checkpoint)."""

    model: str
    subfolder: str = ""
    dtype: str = "auto"

    def load(self, device: str | torch.device = "cpu") -> tuple[PreTrainedModel, ProcessorMixin]:
        """Returns the model on a device, and its processor."""
        where = {"pretrained_model_name_or_path": self.model, "subfolder": self.subfolder}
        model = AutoModel.from_pretrained(**where, dtype=self.dtype).eval().to(device)
        return model, AutoProcessor.from_pretrained(**where)


def vector_size(config: PretrainedConfig, dims: int | None) -> int:
    """Returns the length of vectors.

    Raises:
        ValueError: The checkpoint was not trained to have its vectors cut to `dims`.
    """
    if dims is None:
        return config.clip_embed_dim
    trained = config.matryoshka_dims
    if not trained:
        raise ValueError(
            f"`dims` {dims}: this checkpoint was not trained to have its vectors cut, for its configuration has no "
            "`matryoshka_dims`. Leave `dims` out."
        )
    if dims not in trained:
        raise ValueError(f"`dims` must be one of {', '.join(map(str, trained))}, as in `matryoshka_dims`, got {dims}.")
    return dims


def modes_of(model: PreTrainedModel) -> tuple[str, ...]:
    """Returns InternVL-C, and InternVL-G if the model has queries."""
    return MODES if model.config.has_queries else MODES[:1]


def batches(items: Iterable[Item], batch_size: int, description: str) -> Iterator[list[Item]]:
    """Yields `batch_size` items at a time, with a progress bar on a terminal."""
    total = len(items) if isinstance(items, Sized) else None
    rest = iter(items)
    with tqdm(total=total, desc=description, leave=False, disable=None, delay=1) as progress:
        while batch := list(islice(rest, batch_size)):
            yield batch
            progress.update(len(batch))


def pixel_values_of(model: PreTrainedModel, processor: ProcessorMixin, images: Sequence[Image.Image]) -> torch.Tensor:
    """Returns pixel values (images, 3, H, W), one tile per image, on the model's device."""
    inputs = processor(images=list(images), mode="contrastive", max_num=1, return_tensors="pt")
    return inputs["pixel_values"].to(model.device)


@torch.inference_mode()
def embed_frames(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    frames: Sequence[Sequence[Image.Image]],
    modes: Sequence[str],
) -> dict[str, torch.Tensor]:
    """Embeds images or videos in several modes; the features of a video's frames are averaged before normalising.

    Args:
        model: An InternVL-C or -G.
        processor: Its processor.
        frames: Those of every video; an image is one frame.
        modes: Of `modes_of`.

    Returns:
        Unit vectors (videos, E) by mode, on the CPU.
    """
    pixels = pixel_values_of(model, processor, [image for of_video in frames for image in of_video])
    counts = [len(of_video) for of_video in frames]
    found = {}
    for mode in modes:
        parts = model.get_image_features(pixels, mode=mode).float().split(counts)
        found[mode] = F.normalize(torch.stack([part.mean(dim=0) for part in parts]), dim=-1).cpu()
    return found


@torch.inference_mode()
def embed_images_by_mode(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Iterable[Image.Image],
    modes: Sequence[str],
    batch_size: int = 64,
) -> dict[str, torch.Tensor]:
    """Embeds images, each as one tile, in several modes; every image is read once.

    Returns:
        Unit vectors (images, E) by mode, "InternVL-C" or "InternVL-G".
    """
    parts = [
        embed_frames(model, processor, [[image] for image in batch], modes)
        for batch in batches(images, batch_size, "embedding images")
    ]
    return {mode: torch.cat([part[mode] for part in parts]) for mode in modes}


@renamed_arguments(pictures="images")
def embed_images(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Iterable[Image.Image],
    mode: str = "InternVL-C",
    batch_size: int = 64,
) -> torch.Tensor:
    """Embeds images in one mode, see `embed_images_by_mode`; returns unit vectors (images, E)."""
    return embed_images_by_mode(model, processor, images, (mode,), batch_size)[mode]


@torch.inference_mode()
def embed_texts(
    model: PreTrainedModel, processor: ProcessorMixin, texts: Iterable[str], batch_size: int = 256
) -> torch.Tensor:
    """Embeds texts, to which the processor adds prefix and end token; returns unit vectors (texts, E)."""
    rows = []
    for batch in batches(texts, batch_size, "embedding texts"):
        inputs = processor(text=batch, mode="contrastive", padding=True, return_tensors="pt").to(model.device)
        features = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        rows.append(F.normalize(features.float(), dim=-1).cpu())
    return torch.cat(rows)


__getattr__ = renamed_names(globals(), embed_pictures="embed_images")
