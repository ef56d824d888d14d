"""Texts that do not match an image: captions of other images, drawn from the whole data set.

The captions of all shards are read once, before training; with several processes each reads a part of the shards, and
all get all. Two captions belong to one image if the stored images are equal, byte by byte or by their path.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy
from accelerate.utils import gather_object

from ...rows.pair_rows import captions_in, image_source, metadata_of
from ...rows.shards import SHARD_ERRORS, read_shard
from .augmentation import sample_random
from .pairs import PairStream


# The place of a caption (number of the shard, number of the row), its sample and image as digests, and the caption.
Entry = tuple[int, int, int, int, str]


def _digest(content: bytes | str) -> int:
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _sample_digest(shard: str, key: str) -> int:
    return _digest(f"{shard}\n{key}")


class CaptionPool:
    """All captions of a data set, to draw those of other images from.

    Args:
        entries: One per caption.

    Raises:
        ValueError: If they are all about one image.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.captions = [entry[-1] for entry in entries]
        self.images = numpy.array([entry[3] for entry in entries], dtype=numpy.uint64)
        samples = numpy.array([entry[2] for entry in entries], dtype=numpy.uint64)
        self._order = samples.argsort(kind="stable")
        self._samples = samples[self._order]
        if len(numpy.unique(self.images)) < 2:
            raise ValueError(
                f"Random negatives are captions of other images, but the data has {len(self)} captions of "
                f'{len(numpy.unique(self.images))} image(s). Take `negatives` "similar", or more data.'
            )

    def __len__(self) -> int:
        return len(self.captions)

    @classmethod
    def read(cls, *streams: PairStream) -> "CaptionPool":
        """Read the captions of all shards of the streams; all processes must.

        Args:
            *streams: Of this process; their positions are left as they are.

        Raises:
            ValueError: If they are all about one image.
        """
        shards = [(stream, shard) for stream in streams for shard in stream.shards]
        numbers = range(streams[0].rank, len(shards), streams[0].world_size)
        entries = [entry for number in numbers for entry in _entries_of(*shards[number], number)]
        return cls(sorted(gather_object(entries)))

    def draw(self, pair: Mapping[str, Any], seed: int = 0) -> str:
        """Draw a caption of another image than that of a pair.

        Args:
            pair: As from `PairStream`.
            seed: Decides what is drawn, together with the sample and its epoch.
        """
        random, own = sample_random("negative", seed, pair), self._image_of(pair)
        while True:
            drawn = random.randrange(len(self))
            if own is None or self.images[drawn] != own:
                return self.captions[drawn]

    def _image_of(self, pair: Mapping[str, Any]) -> numpy.uint64 | None:
        sample = numpy.uint64(_sample_digest(str(pair.get("shard", "")), str(pair.get("key", ""))))
        place = int(self._samples.searchsorted(sample))
        if place == len(self) or self._samples[place] != sample:
            return None  # of a shard that could not be read before training
        return self.images[self._order[place]]


def _entries_of(stream: PairStream, shard: str, number: int) -> Iterator[Entry]:
    """The captions of a shard; what is broken in it is passed over, and counted where it is trained on."""
    try:
        for row_number, row in enumerate(read_shard(shard)):
            try:
                row = metadata_of(row)
                image = image_source(row, stream.image_columns, stream.images)
                captions = captions_in(row, stream.text_columns)
            except ValueError:
                continue
            sample = _sample_digest(row["__shard__"], row["__key__"])
            for caption in captions:
                yield number, row_number, sample, _digest(image), caption
    except SHARD_ERRORS:
        return
