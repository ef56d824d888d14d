"""Semantic segmentation: mean IoU of a segmentation model over the validation images of a data set like ADE20K.

Models are InternViT with the published linear head (`InternViTForSemanticSegmentation`) and transformers' UperNet over
an InternViT backbone, as `python -m internvl.training segmentation` writes them.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation, PreTrainedModel

from ..kinds import check_folder
from .corpus_intervals import at_most_one, interval_of_sums
from .data.ade20k import SegmentedImage
from .data.items import EvaluationData
from .embeddings import batches
from .metrics import check_finite, class_areas, class_ious, mean_accuracy, mean_iou, pixel_accuracy
from .reports import metrics_of
from .runs import TaskRun
from .samples import Sample, SampleLog
from .sliding_window import SlidingWindow, best_classes, fit_to_window, window_scores


PUBLISHED_SIDE, PUBLISHED_STRIDE = 504, 322  # of the window, published segmentation/configs
UPERNET = "upernet"
TOWER = "intern_vit_6b"
METHOD_KEY = "segmentation_method"  # of the configuration of what this package trains


def is_segmenter(folder: str, subfolder: str = "") -> bool:
    """Returns whether a folder, or a name on the Hub, is of an InternViT with a head for segmentation.

    Raises:
        OSError: If there is no model.
        ValueError: If its model has to be converted first.
    """
    check_folder(folder, subfolder)
    config = AutoConfig.from_pretrained(folder, subfolder=subfolder)
    backbone = getattr(config, "backbone_config", None)
    if config.model_type == UPERNET:
        return getattr(backbone, "model_type", None) == TOWER
    return config.model_type == TOWER and any("Segmentation" in name for name in config.architectures or [])


def check_segmenter(folder: str, subfolder: str = "") -> Any:
    """Reads the configuration of a segmentation model.

    Raises:
        OSError: If there is none.
        ValueError: If it is another model.
    """
    is_fit = is_segmenter(folder, subfolder)
    config = AutoConfig.from_pretrained(folder, subfolder=subfolder)
    if not is_fit:
        what = ", ".join(config.architectures or [config.model_type])
        raise ValueError(
            f"{folder} holds {what}, but segmentation needs an InternViT with a segmentation head: `python -m "
            "internvl.training segmentation` trains one."
        )
    return config


def check_classes(config: Any, data: EvaluationData) -> None:
    """Raises a ValueError if a model has other classes than the data."""
    if config.num_labels != len(data.classes):
        raise ValueError(f"The model knows {config.num_labels} classes, and {data.place} has {len(data.classes)}.")


def tower_config(config: Any) -> Any:
    """Returns the configuration of the InternViT in that of a segmentation model."""
    return config.backbone_config if config.model_type == UPERNET else config


def window_of(config: Any, side: int | None = None) -> SlidingWindow:
    """Returns the published window, or one of another side with a stride in proportion, in whole patches."""
    patch = tower_config(config).patch_size
    side = PUBLISHED_SIDE if side is None else side
    return SlidingWindow(side, side * PUBLISHED_STRIDE // PUBLISHED_SIDE, patch)


def load_segmenter(folder: str, subfolder: str = "", dtype: Any = "auto") -> tuple[PreTrainedModel, Any]:
    """Loads a segmentation model, in evaluation mode, and its image processor."""
    where = {"pretrained_model_name_or_path": folder, "subfolder": subfolder}
    model = AutoModelForSemanticSegmentation.from_pretrained(**where, dtype=dtype).eval()
    return model, AutoImageProcessor.from_pretrained(**where)


def segment_image(
    model: Any, image_processor: Any, pixels: torch.Tensor, window: SlidingWindow, batch_size: int = 8
) -> torch.Tensor:
    """Segments one image.

    Args:
        model: The segmentation model.
        image_processor: Its mean and deviation are used.
        pixels: (3, height, width), 0 to 255.
        window: The sliding window.
        batch_size: Windows at a time.

    Returns:
        Class indices (height, width).
    """
    mean, deviation = (
        torch.tensor(values).view(3, 1, 1) for values in (image_processor.image_mean, image_processor.image_std)
    )
    values = (fit_to_window(pixels, window) / 255 - mean) / deviation
    scores = window_scores(model, values.to(model.device, model.dtype), window, batch_size)
    check_finite(scores, "A score of a pixel")
    return best_classes(scores, pixels.shape[-2], pixels.shape[-1]).cpu()


def measure_image(
    model: Any, image_processor: Any, item: SegmentedImage, window: SlidingWindow, batch_size: int = 8
) -> torch.Tensor:
    """Segments an image and counts its pixels, (3, classes), see `class_areas`.

    Raises:
        ValueError: If the image and its annotation cannot be read or differ in size.
    """
    num_classes = model.config.num_labels
    pixels, labels = item.read_pixels(), item.read_labels(num_classes)
    if pixels.shape[-2:] != labels.shape:
        sizes = [f"{shape[-1]} x {shape[-2]}" for shape in (pixels.shape, labels.shape)]
        raise ValueError(f"The image {item.image} is {sizes[0]} pixels large, and its annotation {sizes[1]}.")
    return class_areas(segment_image(model, image_processor, pixels, window, batch_size), labels, num_classes)


def count_areas(
    model: Any,
    image_processor: Any,
    items: Iterable[SegmentedImage],
    window: SlidingWindow,
    log: SampleLog | None = None,
    batch_size: int = 8,
) -> np.ndarray:
    """Segments images and counts their pixels.

    Args:
        model: The segmentation model.
        image_processor: Its image processor.
        items: The images.
        window: The sliding window.
        log: Takes the samples; those that it has are not measured again.
        batch_size: Windows at a time.

    Returns:
        (images, 3, classes), see `class_areas`.
    """
    areas = []
    if log is not None:
        log.check_done(["areas"])
    for (item,) in batches(items, 1, "segmenting"):
        if log is not None and item.name in log.done:
            areas.append(_areas_of(log.done[item.name], model.config.num_labels))
            continue
        found = measure_image(model, image_processor, item, window, batch_size).numpy()
        if log is not None:
            log.add(_sample(item, found))
        areas.append(found)
    return np.stack(areas)


def _sample(item: SegmentedImage, areas: np.ndarray) -> Sample:
    """An image with what is seen in it; only classes that are there are listed."""
    present = np.flatnonzero(areas.any(axis=0)).tolist()
    scores = {"pixel accuracy of the image": float(pixel_accuracy(areas)), "mIoU of the image": float(mean_iou(areas))}
    return {
        "id": item.name,
        "image": str(item.image),
        "scores": {name: score for name, score in scores.items() if np.isfinite(score)},
        "areas": {str(index): areas[:, index].tolist() for index in present},
    }


def _areas_of(sample: Sample, num_classes: int) -> np.ndarray:
    areas = np.zeros((3, num_classes), dtype=np.int64)
    for index, column in sample["areas"].items():
        areas[:, int(index)] = column
    return areas


def measure_segmentation(run: TaskRun) -> dict[str, dict[str, Any]]:
    """Segments the images of a data set in the layout of ADE20K.

    Every sample has the scores "pixel accuracy of the image" and "mIoU of the image", and the areas of its classes.

    Returns:
        "METHOD/mIoU", "METHOD/mean accuracy", "METHOD/pixel accuracy" of the whole set, with the IoU of each class as
        `classes` of the first. METHOD is how the head was trained; without a record of it there is no prefix.

    Raises:
        ValueError: If the model has other classes than the data.
    """
    config, names = run.model.config, run.data.classes
    check_classes(config, run.data)
    images = [SegmentedImage.at(Path(str(item.source))) for item in run.data.items]
    window = window_of(config, run.processor.size["height"])
    areas = count_areas(run.model, run.processor, images, window, run.log, run.batch_size)
    method = getattr(config, METHOD_KEY, None)
    prefix = f"{method}/" if method else ""
    of_set = {f"{prefix}{name}": metric for name, metric in summarise_segmentation(areas, names).items()}
    return {**at_most_one(metrics_of(run.log.done.values())), **of_set}


def summarise_segmentation(areas: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Computes the figures of a set of images, and intervals by drawing images.

    Args:
        areas: (images, 3, classes).
        names: Of the classes.

    Returns:
        "mIoU" (with the IoU of every class that is there, as "classes"), "mean accuracy" and "pixel accuracy".
    """
    total = areas.sum(axis=0)
    metrics: dict[str, dict[str, Any]] = {}
    if not total.any():
        raise ValueError("No pixel of the annotations has a class: nothing can be measured.")
    for name, figure in {"mIoU": mean_iou, "mean accuracy": mean_accuracy, "pixel accuracy": pixel_accuracy}.items():
        interval = interval_of_sums(figure, areas)
        metrics[name] = {"value": float(figure(total)), "interval": interval, "samples": len(areas)}
    by_class = zip(names, class_ious(total), strict=True)
    metrics["mIoU"]["classes"] = {name: float(iou) for name, iou in by_class if np.isfinite(iou)}
    return metrics
