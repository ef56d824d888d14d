"""Fingerprints of images that survive recompression, another size, a mirror and a crop of a tenth of each side.

A fingerprint is the image on a grid of `SIDE` x `SIDE`, in shades of grey and two channels of colour. Of it come low
cosine coefficients of the whole or of a window, so that the crop of an image can be compared with what it was cut
from: signs of coefficients are a perceptual hash of 64 bits, whitened coefficients a vector for a search, and the
coefficients themselves tell at last whether two images are the same.
"""

from functools import cache
from itertools import product

import numpy as np
from PIL import Image


SIDE = 32
COEFFICIENTS = 10  # along each side, of which the first is the mean
LOW = 4  # likewise, of what must agree closely, in all channels: a window that is slightly off hardly changes these
LOW_TOLERANCE = 4.0  # how much less low coefficients may differ than all
HASH_BITS = 64
MAX_SEARCHED_ORDER = 8  # u + v of the coefficients in vectors
# A crop or another size moves fine detail from one point of the grid to the next, and with it the coefficients of what
# is nothing but detail: this share of its energy may differ, but never so much that unlike images would agree.
UNSEEN_TOLERANCE = 0.25
MAX_SLACK = 1.5  # of the energy of the coefficients: unlike images differ by at least 1 / 2.5 of it
FLAT = 4.0  # shades of grey: what differs by less than this on average is not told apart
# Cut away at the two ends of a side, as shares of it.
SEARCHED_CUTS = ((0.0, 0.0), (0.0, 0.07), (0.07, 0.0), (0.05, 0.05))
COMPARED_CUTS = tuple((a / 50, b / 50) for a, b in product(range(7), repeat=2) if a + b <= 6)


def fingerprint(image: Image.Image) -> np.ndarray:
    """Returns the channels Y, Cb and Cr of an image on a grid, (3, SIDE, SIDE), uint8."""
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX).convert("YCbCr")
    return np.asarray(small).transpose(2, 0, 1)


@cache
def _basis(start: float, end: float, count: int) -> np.ndarray:
    """Cosines over a window of a side, (count, SIDE): integrals over pixels, divided by the length of the window."""
    width = 1 - start - end
    edges = np.clip((np.arange(SIDE + 1) / SIDE - start) / width, 0, 1)  # of pixels, in the window
    order = np.arange(1, count)[:, None]
    waves = np.diff(np.sin(np.pi * order * edges) / (np.pi * order), axis=1) * np.sqrt(2)
    return np.concatenate([np.diff(edges)[None], waves]).astype(np.float32)


@cache
def _stacked(cuts: tuple[tuple[float, float], ...], count: int) -> np.ndarray:
    return np.concatenate([_basis(*cut, count) for cut in cuts])


def coefficients(
    channel: np.ndarray, cuts: tuple[tuple[float, float], ...] = ((0.0, 0.0),), count: int = COEFFICIENTS
) -> np.ndarray:
    """Computes the cosine coefficients of all windows with certain cuts.

    Args:
        channel: (..., SIDE, SIDE).
        cuts: At the ends of a side.
        count: Of coefficients along each side.

    Returns:
        (..., windows, count, count), in shades; the second-last axis is vertical.
    """
    basis = _stacked(cuts, count)
    found = basis @ channel.astype(np.float32) @ basis.T
    size = len(cuts)
    split = found.reshape(*channel.shape[:-2], size, count, size, count)
    return split.swapaxes(-3, -2).reshape(*channel.shape[:-2], size * size, count, count)


def _ordered() -> list[tuple[int, int]]:
    """Coefficients but the mean, low ones first."""
    pairs = product(range(COEFFICIENTS), range(COEFFICIENTS))
    return sorted((pair for pair in pairs if pair != (0, 0)), key=lambda pair: (sum(pair), pair))


ORDER = np.array(_ordered())
HASHED = ORDER[:HASH_BITS]
SEARCHED = ORDER[ORDER.sum(axis=1) <= MAX_SEARCHED_ORDER]
MIRRORED = np.where(np.arange(COEFFICIENTS) % 2, -1, 1).astype(np.float32)  # what a mirror makes of columns


def perceptual_hashes(values: np.ndarray) -> np.ndarray:
    """Returns perceptual hashes (B, 8) of coefficients (B, COEFFICIENTS, COEFFICIENTS): their signs, as bytes."""
    return np.packbits(values[:, HASHED[:, 0], HASHED[:, 1]] > 0, axis=1)


class Whitening:
    """Makes vectors of coefficients in which no coefficient outweighs the others.

    Args:
        values: (B, COEFFICIENTS, COEFFICIENTS) of the data at hand.
    """

    def __init__(self, values: np.ndarray) -> None:
        units = self._units(values)
        self.scale = np.sqrt((units**2).mean(axis=0)) + 1e-3

    def vectors(self, values: np.ndarray) -> np.ndarray:
        """Returns unit vectors (B, E)."""
        whitened = self._units(values) / self.scale
        return whitened / np.maximum(np.linalg.norm(whitened, axis=1, keepdims=True), 1e-6)

    @staticmethod
    def _units(values: np.ndarray) -> np.ndarray:
        chosen = values[:, SEARCHED[:, 0], SEARCHED[:, 1]]
        return chosen / np.maximum(np.linalg.norm(chosen, axis=1, keepdims=True), 1e-6)


def sameness(grids: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Says how alike images are, if one is a crop of the other or its mirror.

    Args:
        grids: (B, 3, SIDE, SIDE).
        others: Likewise.

    Returns:
        (B,), 1 for the same image, about 0 for one that has nothing to do with it.
    """
    unseen = _unseen(grids) + _unseen(others)
    return np.maximum(_as_crop(grids, others, unseen), _as_crop(others, grids, unseen))


def _as_crop(grids: np.ndarray, others: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    """The best over all windows of each image, of `others` being that window, or its mirror."""
    found = []
    for channels, count in ((slice(0, 1), COEFFICIENTS), (slice(0, 3), LOW)):
        windows = coefficients(grids[:, channels], COMPARED_CUTS, count)  # (B, channels, W, C, C)
        whole = coefficients(others[:, channels], count=count)  # (B, channels, 1, C, C)
        energies = (_energy(windows) + _energy(whole)).sum(axis=1)  # (B, W)
        slack = UNSEEN_TOLERANCE * unseen[:, channels].sum(axis=1)[:, None]
        if count == COEFFICIENTS:
            slack = np.minimum(slack, MAX_SLACK * energies)
        ways = (whole, whole * MIRRORED[:count])
        distances = np.stack([((windows - way) ** 2).sum(axis=(1, 3, 4)) for way in ways])
        found.append(distances / (energies + slack + FLAT**2))  # (ways, B, W)
    differing = np.maximum(found[0], LOW_TOLERANCE * found[1])
    return 1 - differing.min(axis=(0, 2))


def _energy(values: np.ndarray) -> np.ndarray:
    """The square of the contrast."""
    return (values**2).sum(axis=(-2, -1)) - values[..., 0, 0] ** 2


def _unseen(grids: np.ndarray) -> np.ndarray:
    """The square of the contrast of each channel that is finer than the coefficients, (B, channels)."""
    seen = _energy(coefficients(grids)[:, :, 0])
    return np.maximum(grids.var(axis=(2, 3), dtype=np.float32) - seen, 0)
