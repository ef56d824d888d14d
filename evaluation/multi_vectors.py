"""Images as sets of vectors: each query of QLLaMA, pooled alone.

The pooling of InternVL-G takes a weighted mean of what it makes of every query. Of one query alone it makes one vector
of the joint space, so that an image becomes M vectors, each of which a text may match (MaxSim) where their mean blurs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from .embeddings import pixel_values_of


@torch.inference_mode()
def embed_queries(model: PreTrainedModel, processor: ProcessorMixin, images: Sequence[Image.Image]) -> torch.Tensor:
    """Embeds one batch of images by an InternVL-G; returns unit vectors (images, M, E) on the CPU."""
    queries = model.get_query_features(pixel_values_of(model, processor, images))  # (B, M, D)
    vectors = model.clip_projector2(queries.flatten(0, 1)[:, None])  # (B * M, E)
    return F.normalize(vectors.float(), dim=-1).unflatten(0, queries.shape[:2]).cpu()
