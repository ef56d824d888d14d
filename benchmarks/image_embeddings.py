"""Images to unit vectors at one shape of ViT, that of InternViT-300M and CLIP's ViT-L/14, against open_clip and
sentence-transformers.

Images of mixed sizes are cropped to 224 px, embedded in batches and normalised, each library by its own transforms and
loop. All weights are random, and the towers differ in what is small: how they pool, and whether a norm comes first.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
)

from internvl import InternVLConfig, InternVLModel
from internvl.evaluation.embeddings import embed_images
from internvl.image_processing_internvl import InternVLImageProcessor

from .harness import Options, Row, interleave, row_of, sizes_of
from .images import SIZES, draw_images


BUNDLED = Path(__file__).parents[1] / "internvl_g"
SIDE, PATCH, WIDTH = 224, 14, 768  # WIDTH of the vectors
VISION = sizes_of(1024, 4096, 24, 16)
SMALL_TEXT = sizes_of(64, 64, 1, 1, vocab_size=64)  # of towers that nobody asks
NUM_IMAGES, BATCH_SIZE = 16, 8
PEERS = {"open_clip": "open_clip", "sentence-transformers": "sentence_transformers"}

Embed = Callable[[Sequence[Image.Image]], torch.Tensor]


def by_internvl(device: str) -> Embed:
    """Vectors (B, E) of an InternVL-C, as `python -m internvl.evaluation embed` makes them."""
    settings = {"image_size": SIDE, "patch_size": PATCH, "norm_type": "layer_norm", "qk_normalization": False}
    config = InternVLConfig(
        vision_config={**VISION, **settings, "qkv_bias": True},
        qllama_config={**SMALL_TEXT, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0},
        clip_embed_dim=WIDTH,
        num_query_token=0,
    )
    model = InternVLModel(config).eval().to(device)
    processor = AutoProcessor.from_pretrained(BUNDLED)
    processor.image_processor = InternVLImageProcessor(size=SIDE, crop_size=SIDE, resize_mode="crop")
    return lambda images: embed_images(model, processor, images, "InternVL-C", BATCH_SIZE)


def by_open_clip(device: str) -> Embed:
    """Vectors (B, E) of open_clip's vision tower after its transforms."""
    from open_clip.transform import image_transform
    from open_clip.transformer import VisionTransformer

    heads, ratio = VISION["num_attention_heads"], VISION["intermediate_size"] / VISION["hidden_size"]
    depth, width = VISION["num_hidden_layers"], VISION["hidden_size"]
    model = VisionTransformer(SIDE, PATCH, width, depth, heads, ratio, output_dim=WIDTH).eval().to(device)
    transform = image_transform(SIDE, is_train=False)

    @torch.inference_mode()
    def embed(images: Sequence[Image.Image]) -> torch.Tensor:
        found = []
        for start in range(0, len(images), BATCH_SIZE):
            pixels = torch.stack([transform(image) for image in images[start : start + BATCH_SIZE]])
            found.append(F.normalize(model(pixels.to(device)), dim=-1).cpu())
        return torch.cat(found)

    return embed


def by_sentence_transformers(device: str) -> Embed:
    """Vectors (B, E) of transformers' CLIP by `SentenceTransformer.encode`."""
    from sentence_transformers import SentenceTransformer

    vision = CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, projection_dim=WIDTH)
    text = CLIPTextConfig(**SMALL_TEXT, projection_dim=WIDTH, bos_token_id=0, eos_token_id=0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor = CLIPProcessor(CLIPImageProcessor(), AutoProcessor.from_pretrained(BUNDLED).tokenizer)
        processor.save_pretrained(folder)
        encoder = SentenceTransformer(folder, device=device)
    settings: dict[str, Any] = {"batch_size": BATCH_SIZE, "convert_to_tensor": True, "show_progress_bar": False}
    return lambda images: encoder.encode(list(images), normalize_embeddings=True, **settings).cpu()


MAKERS = {"open_clip": by_open_clip, "sentence-transformers": by_sentence_transformers}


def require_unit_vectors(found: torch.Tensor) -> None:
    """There is nothing to compare in calls that give something else."""
    if found.shape != (NUM_IMAGES, WIDTH) or not torch.allclose(found.norm(dim=-1), torch.ones(NUM_IMAGES), atol=1e-3):
        raise SystemExit(f"{NUM_IMAGES} unit vectors of {WIDTH} components were expected, got {tuple(found.shape)}.")


def rows(options: Options) -> Iterator[Row]:
    """A row for each peer that is installed."""
    images = draw_images(SIZES[:NUM_IMAGES])
    for name, package in PEERS.items():
        title = f"{NUM_IMAGES} images to vectors, ViT-L/14 at {SIDE} px, against {name}"
        if importlib.util.find_spec(package) is None:
            yield Row(title, skipped=f"{package} is not installed")
            continue
        calls = {
            "ours": partial(by_internvl(options.device), images),
            "peer": partial(MAKERS[name](options.device), images),
        }
        for call in calls.values():
            require_unit_vectors(call())
        yield row_of(title, interleave(calls, options.at_most(5), warmups=0), target=1.0)
