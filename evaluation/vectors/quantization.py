"""Unit vectors in fewer bits, and back.

- float16: half of the bytes of float32.
- int8: a quarter. Every vector is scaled so that its largest component is 127; because it has unit length, no scale
  is kept.
- binary: a 32nd, the signs, eight to a byte, as faiss and sentence-transformers ("ubinary") pack them.
"""

import numpy as np
import torch


PRECISIONS = ("float32", "float16", "int8", "binary")
LARGEST = 127


def check_precision(precision: str, size: int) -> None:
    """Raises a ValueError unless vectors of `size` components can be stored in a precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    if precision == "binary" and size % 8:
        raise ValueError(f"Binary vectors need a multiple of 8 components, and these have {size}.")


def dtype_of(precision: str) -> np.dtype:
    """Returns what the components are stored in."""
    return np.dtype("uint8" if precision == "binary" else precision)


def stored_size(size: int, precision: str) -> int:
    """Returns how many numbers a vector of `size` components is stored in."""
    return size // 8 if precision == "binary" else size


def quantize(vectors: np.ndarray, precision: str) -> np.ndarray:
    """Returns unit vectors (..., E) as they are stored, (..., E), or (..., E / 8) in binary.

    Raises:
        ValueError: An unknown precision, one that these vectors cannot have, or a component that is not finite.
    """
    check_precision(precision, vectors.shape[-1])
    if not np.isfinite(vectors).all():
        raise ValueError("A vector has components that are not finite: the model computes in too narrow a type.")
    if precision == "binary":
        return np.packbits(vectors > 0, axis=-1)
    if precision == "int8":
        largest = np.maximum(np.abs(vectors).max(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
        return np.rint(vectors / largest * LARGEST).astype(np.int8)
    return vectors.astype(dtype_of(precision))


def dequantize(stored: np.ndarray, precision: str) -> np.ndarray:
    """Returns unit vectors (..., E) in float32 for what `quantize` gave.

    Components of binary ones are +-E**-0.5. The length of those in float16 is off by a few ten-thousandths.
    """
    if precision == "float32":
        return np.asarray(stored, dtype=np.float32)
    if precision == "binary":
        signs = np.unpackbits(stored, axis=-1).astype(np.float32)
        return (signs * 2 - 1) / np.float32(np.sqrt(signs.shape[-1]))
    vectors = torch.from_numpy(np.ascontiguousarray(stored)).float().numpy()  # many times as fast as NumPy's own
    if precision == "int8":
        length = np.sqrt(np.einsum("...e,...e->...", vectors, vectors))[..., None]
        vectors /= np.maximum(length, np.finfo(np.float32).tiny)
    return vectors


__all__ = ["PRECISIONS", "check_precision", "dequantize", "dtype_of", "quantize", "stored_size"]
