"""Probes of a frozen InternViT: a linear head on class token and mean of the patches (paper table 22), or attention
pooling under a linear head (published classification/), on folders as ImageNet has them.

Features lie on disk, so that every probe after the first costs minutes. As published an image is another random crop
in every epoch: `views` says how many crops of each image are stored; 0 takes one centre crop. The published runs also
mixed images (mixup, cutmix), of which table 22 says nothing and which stored features do not allow.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save
from torch import nn
from tqdm import tqdm

from ..kinds import is_whole_safetensors
from ..layers_internvl import InternVLAttentionPooling
from ..writing import write_whole
from .data.items import Item, check_items, taken
from .feature_store import FeatureStore, fingerprint_of_items, fingerprint_of_model, rows_at_random
from .metrics import check_finite
from .protocols.protocol import POOLINGS
from .runs import TaskRun


SWEPT_RATES = (0.05, 0.1, 0.2, 0.4, 0.8)
HELD_OUT = 10  # every tenth training image measures the rates of a sweep
CROP_AREAS, CROP_RATIOS, CROP_TRIALS = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of torchvision's RandomResizedCrop
TOP = 5


@dataclass(frozen=True, kw_only=True)
class ProbeRecipe:
    """How a probe is trained.

    Args:
        pooling: "linear" or "attention".
        epochs: Passes over the images, of which the first `warmup_epochs` raise the learning rate linearly; from
            there it falls as a cosine over all epochs.
        warmup_epochs: See `epochs`.
        batch_size: Images of a step; fewer where there are fewer.
        learning_rate: Peak, at 1,024 images of a step, to which it is in proportion.
        momentum: Of SGD, Nesterov's as in the published code. There is no weight decay.
        max_grad_norm: Of the published code.
        views: Random crops of each training image; 0 for its centre.
        seed: Decides crops, order and the first weights.
    """

    pooling: str = "linear"
    epochs: int = 10
    warmup_epochs: int = 1
    batch_size: int = 1024
    learning_rate: float = 0.2
    momentum: float = 0.9
    max_grad_norm: float = 5.0
    views: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"`pooling` must be one of {', '.join(POOLINGS)}, got {self.pooling!r}.")
        if self.epochs < 1 or self.views < 0:
            raise ValueError(f"`epochs` must be above 0 and `views` not below, got {self.epochs} and {self.views}.")


class Probe(nn.Module):
    """The head; its parameters are called as in `InternViTForImageClassification`.

    Args:
        config: Configuration of the tower.
        num_classes: Number of classes.
        pooling: "linear" or "attention".
    """

    def __init__(self, config: Any, num_classes: int, pooling: str) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn_pooling = None
        if pooling == "attention":
            self.attn_pooling = InternVLAttentionPooling(config, width, config.num_attention_heads, width)
            self.attn_pooling.cross_attn.init_biases()
        pooled_width = width if pooling == "attention" else 2 * width
        self.norm = nn.BatchNorm1d(pooled_width, eps=1e-6)
        self.head = nn.Linear(pooled_width, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, 2 D), or (B, N, D) for attention pooling, -> (B, classes)."""
        pooled = features if self.attn_pooling is None else self.attn_pooling(features)
        return self.head(self.norm(pooled))


# ------------------------------------------------------------------------------------------------------------ features
def random_crop(image: Image.Image, side: int, rng: torch.Generator) -> Image.Image:
    """Crops an image at random as torchvision's RandomResizedCrop does, resizes it to a square, and mirrors it half
    of the time.
    """
    width, height = image.size
    box = None
    for _ in range(CROP_TRIALS):
        area, ratio, left, top, _ = torch.rand(5, generator=rng).tolist()
        area = width * height * (CROP_AREAS[0] + (CROP_AREAS[1] - CROP_AREAS[0]) * area)
        ratio = math.exp(math.log(CROP_RATIOS[0]) + (math.log(CROP_RATIOS[1]) - math.log(CROP_RATIOS[0])) * ratio)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            x, y = int(left * (width - crop_width + 1)), int(top * (height - crop_height + 1))
            box = (x, y, x + crop_width, y + crop_height)
            break
    if box is None:
        square = min(width, height)
        x, y = (width - square) // 2, (height - square) // 2
        box = (x, y, x + square, y + square)
    crop = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    is_mirrored = bool(torch.rand((), generator=rng) < 0.5)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_mirrored else crop


@torch.inference_mode()
def tower_features(tower: Any, pixel_values: torch.Tensor, pooling: str) -> torch.Tensor:
    """Returns class token and mean of the patches (B, 2 D), or for attention pooling all tokens (B, N, D)."""
    tokens = tower(pixel_values.to(tower.device), return_dict=True).last_hidden_state
    if pooling == "attention":
        return tokens
    return torch.cat([tokens[:, 0], tokens[:, 1:].float().mean(dim=1).to(tokens.dtype)], dim=1)


class FeatureSource:
    """Features of images by one tower, from disk where they are there.

    Args:
        model: The tower, or a model with one.
        processor: Of the model.
        folder: Of the features.
        pooling: "linear" or "attention".
        batch_size: Images at a time.
        seed: Of random crops.
    """

    def __init__(
        self, model: Any, processor: Any, folder: Path, pooling: str, batch_size: int = 64, seed: int = 0
    ) -> None:
        self.tower = getattr(model, "vision_model", model)
        self.image_processor = getattr(processor, "image_processor", processor)
        self.side = int(self.image_processor.size["height"])
        self.folder = folder
        self.pooling = pooling
        self.batch_size = batch_size
        self.seed = seed
        self.fingerprint = fingerprint_of_model(self.tower)
        self._known: list[tuple[Sequence[Item], str]] = []  # images with their fingerprints

    def key(self, items: Sequence[Item], view: int) -> dict[str, Any]:
        """What decides the features of images; `view` is the number of a random crop from 1 on, or 0."""
        return {
            "model": self.fingerprint,
            "images": self._fingerprint_of(items),
            "image_size": self.side,
            "pooling": self.pooling,
            "view": view,
            "seed": self.seed if view else None,
        }

    def _fingerprint_of(self, items: Sequence[Item]) -> str:
        found = next((fingerprint for known, fingerprint in self._known if known is items), None)
        if found is None:
            found = fingerprint_of_items(items)
            self._known.append((items, found))
        return found

    def features(self, items: Sequence[Item], view: int = 0) -> torch.Tensor:
        """Returns features (images, ...)."""
        store = FeatureStore(self.folder, self.key(items, view))
        return store.features(items, lambda batch: self._compute(batch, view), self.batch_size)

    def _compute(self, batch: Sequence[Item], view: int) -> torch.Tensor:
        images = [item.read()[0].convert("RGB") for item in batch]
        if view:
            images = [
                random_crop(image, self.side, _generator(self.seed, view, item.name))
                for image, item in zip(images, batch, strict=True)
            ]
        settings = {"resize_mode": "crop", "size": self.side, "crop_size": self.side}
        pixels = self.image_processor(images, return_tensors="pt", **settings)["pixel_values"]
        return tower_features(self.tower, pixels, self.pooling)


def _generator(*parts: Any) -> torch.Generator:
    digest = hashlib.sha256("/".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# ------------------------------------------------------------------------------------------------------------ training
def cosine_with_warmup(step: int, steps: int, warmup_steps: int) -> float:
    """Returns the share of the learning rate at a step (timm's cosine, which the published code uses)."""
    if step < warmup_steps:
        return step / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def fit_probe(
    config: Any,
    features: Callable[[int], torch.Tensor],
    labels: torch.Tensor,
    num_classes: int,
    recipe: ProbeRecipe,
    device: Any = "cpu",
    chosen: torch.Tensor | None = None,
) -> Probe:
    """Trains a probe.

    Args:
        config: Configuration of the tower.
        features: Returns the features (images, ...) of an epoch.
        labels: (images,).
        num_classes: Number of classes.
        recipe: The recipe.
        device: Where the probe is trained.
        chosen: Places of the images to train on; None takes all.
    """
    chosen = torch.arange(len(labels)) if chosen is None else chosen
    torch.manual_seed(recipe.seed)
    probe = Probe(config, num_classes, recipe.pooling).to(device).train()
    batch_size = min(recipe.batch_size, len(chosen))
    per_epoch = len(chosen) // batch_size
    steps, warmup_steps = recipe.epochs * per_epoch, recipe.warmup_epochs * per_epoch
    rate = recipe.learning_rate * batch_size / 1024
    optimizer = torch.optim.SGD(probe.parameters(), lr=rate, momentum=recipe.momentum, nesterov=True)
    step = 0
    for epoch in tqdm(range(recipe.epochs), desc="training the probe", leave=False, disable=None):
        rows = features(epoch)
        for places in rows_at_random(len(chosen), batch_size, recipe.seed + epoch):
            optimizer.param_groups[0]["lr"] = rate * cosine_with_warmup(step, steps, warmup_steps)
            taken_rows = chosen[places]
            logits = probe(rows[taken_rows].to(device).float())
            F.cross_entropy(logits, labels[taken_rows].to(device)).backward()
            nn.utils.clip_grad_norm_(probe.parameters(), recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return probe.eval()


@torch.inference_mode()
def probe_logits(probe: Probe, features: torch.Tensor, batch_size: int = 1024) -> torch.Tensor:
    """Returns the scores of features, (images, classes)."""
    device = probe.head.weight.device
    parts = [
        probe(features[start : start + batch_size].to(device).float()) for start in range(0, len(features), batch_size)
    ]
    return torch.cat(parts).cpu()


def best_rate(
    fit: Callable[[ProbeRecipe, torch.Tensor], Probe],
    features: torch.Tensor,
    labels: torch.Tensor,
    recipe: ProbeRecipe,
) -> float:
    """Returns the learning rate with the most right answers on every tenth training image, of `SWEPT_RATES`.

    Args:
        fit: Trains a probe on the images in these places.
        features: Of all training images.
        labels: Of all training images.
        recipe: The recipe, whose rate is changed.
    """
    places = torch.arange(len(labels))
    held_out = places % HELD_OUT == HELD_OUT - 1
    if not held_out.any():
        raise ValueError(f"A sweep holds out every {HELD_OUT}th training image, but there are {len(labels)}.")
    found = {}
    for rate in SWEPT_RATES:
        probe = fit(replace(recipe, learning_rate=rate), places[~held_out])
        answers = probe_logits(probe, features[held_out]).argmax(dim=1)
        found[rate] = float((answers == labels[held_out]).float().mean())
    return max(found, key=lambda rate: found[rate])


# ------------------------------------------------------------------------------------------------------------ the task
def recipe_of(options: dict[str, Any]) -> ProbeRecipe:
    """Returns the recipe with what a command line or protocol changes."""
    names = ("pooling", "epochs", "views")
    return ProbeRecipe(**{name: options[name] for name in names if options.get(name) is not None})


def trained_probe(run: TaskRun, source: FeatureSource, recipe: ProbeRecipe, does_sweep: bool) -> Probe:
    """Trains the probe of a run, or reads the one that another run with the same images has trained."""
    items = taken(run.data.training, run.options.get("training_limit"))
    labels = torch.tensor([item.labels[0] for item in items])
    num_classes = len(run.data.classes)
    views = [source.key(items, view) for view in range(1, recipe.views + 1)] or [source.key(items, 0)]
    known = {"recipe": asdict(recipe), "sweep": does_sweep, "classes": num_classes, "features": views}
    name = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:20]
    path = source.folder / f"{name}.probe.safetensors"
    config, device = source.tower.config, source.tower.device
    if path.is_file() and is_whole_safetensors(path):  # what a full disk or a crash cut off is trained again
        probe = Probe(config, num_classes, recipe.pooling)
        probe.load_state_dict(load_file(path))
        return probe.to(device).eval()
    check_items(items, f"{run.data.place}, training images")
    if len(set(labels.tolist())) < 2:
        raise ValueError(f"{run.data.place}: the training images are of {len(set(labels.tolist()))} classes.")

    def features(epoch: int) -> torch.Tensor:
        return source.features(items, 1 + epoch % recipe.views if recipe.views else 0)

    def fit(changed: ProbeRecipe, chosen: torch.Tensor | None = None) -> Probe:
        return fit_probe(config, features, labels, num_classes, changed, device, chosen)

    if does_sweep:
        recipe = replace(recipe, learning_rate=best_rate(fit, source.features(items), labels, recipe))
    probe = fit(recipe)
    weights = {name: tensor.contiguous() for name, tensor in probe.state_dict().items()}
    for name, tensor in weights.items():
        check_finite(tensor, f"{name} of the probe")
    write_whole(path, save(weights))
    return probe


def measure_probe(run: TaskRun) -> None:
    """Trains a probe on the training images of a data set, or takes one from disk, and measures it on the others.

    Every sample has the scores "POOLING/top-1" and "POOLING/top-5". Where the data have a part of the classes, as
    ImageNet-A and -R have, the others are no answers.
    """
    recipe = recipe_of(run.options)
    folder = Path(run.options.get("features") or run.log.path.parent / "features")
    source = FeatureSource(run.model, run.processor, folder, recipe.pooling, run.batch_size, recipe.seed)
    probe = trained_probe(run, source, recipe, bool(run.options.get("sweep")))
    logits = probe_logits(probe, source.features(run.data.items))
    check_finite(logits, "A score of the probe")
    candidates = torch.tensor(run.data.candidates or range(len(run.data.classes)))
    best = candidates[logits[:, candidates].topk(min(TOP, len(candidates)), dim=1).indices]
    for item, answers in zip(run.data.items, best.tolist(), strict=True):
        if item.name not in run.log.done:
            is_right = [answer in item.labels for answer in answers]
            run.log.add(
                {
                    "id": item.name,
                    "image": str(item.source) if isinstance(item.source, Path) else "",
                    "answer": run.data.classes[answers[0]],
                    "expected": [run.data.classes[label] for label in item.labels],
                    "scores": {
                        f"{recipe.pooling}/top-1": float(is_right[0]),
                        f"{recipe.pooling}/top-{TOP}": float(any(is_right)),
                    },
                }
            )
