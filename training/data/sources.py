"""What a run trains on, by the names that are given to it: files, data sets, streams of them, and mixtures."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from copy import copy
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers.trainer_pt_utils import LengthGroupedSampler

from ...rows.bad_rows import BadRows, UnusableRowError
from ...rows.image_files import NO_FOLDER
from ...rows.json_rows import Row
from ...rows.row_tables import open_all_rows
from ...rows.shards import FAULT_COLUMN, find_shards, place_of_row, read_shards
from .augmentation import Augmentation
from .dialogues import DialogueDataset, DialogueEncoder
from .mixtures import MixtureSource, is_mixture, read_mixture
from .pairs import PairStream
from .streams import RowStream


class DialogueStream(RowStream):
    """Encoded rows of files that are too large to be indexed, or lie elsewhere; each once per epoch.

    Args:
        shards: Files, see `find_shards`.
        encoder: Makes the tensors.
        images: Folder of the images; None takes the folder of each file.
        **settings: Of `RowStream`.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        encoder: DialogueEncoder,
        images: str | Path | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(shards, **settings)
        self.encoder = encoder
        self.images = images

    def _sample(self, row: Row) -> dict[str, torch.Tensor] | None:
        place, shard = place_of_row(row), row["__shard__"]
        folder = NO_FOLDER if "://" in shard else Path(shard).parent
        sample = {"shard": shard, "key": row["__key__"], "epoch": self._position.epoch}
        try:
            if FAULT_COLUMN in row:
                raise UnusableRowError(row[FAULT_COLUMN])
            row = {name: value for name, value in row.items() if not name.startswith("__")}
            encoded = self.encoder(row, folder if self.images is None else self.images, sample)
        except UnusableRowError as error:
            self.bad_rows.count(place, error)
            return None
        self.bad_rows.count()
        return encoded


class StreamMixture(IterableDataset):
    """An endless stream that takes each sample from one of several streams, drawn by weight.

    Which one is drawn depends on the seed and the number of the sample, so that the mixture goes on exactly from its
    position, which is that of all its streams.

    Args:
        streams: Endless ones, of the same process.
        weights: One for each.
        seed: Decides about the order.
        augments: What is done to the images of each one's pairs besides what is done to all.
    """

    def __init__(
        self,
        streams: Sequence[RowStream],
        weights: Sequence[float],
        seed: int = 0,
        augments: Sequence[Augmentation | None] = (),
    ) -> None:
        super().__init__()
        self.streams = list(streams)
        self.weights = list(weights)
        self.seed = seed
        self.augments = list(augments) or [None] * len(self.streams)
        self._taken = 0

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.streams[0].rank

    @rank.setter
    def rank(self, rank: int) -> None:
        for stream in self.streams:
            stream.rank = rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.streams[0].world_size

    @world_size.setter
    def world_size(self, world_size: int) -> None:
        for stream in self.streams:
            stream.world_size = world_size

    def __iter__(self) -> Iterator[Any]:
        samples = [iter(stream) for stream in self.streams]
        while True:
            (number,) = Random(f"mixture/{self.seed}/{self._taken}").choices(range(len(samples)), self.weights)
            sample = next(samples[number], None)
            if sample is None:
                self._check_end(self.streams[number])
                return
            self._taken += 1
            augment = self.augments[number]
            # By the image as it is stored, retrieval knows captions of one image.
            yield sample if augment is None else {**sample, "stored": sample["image"], "image": augment(sample)}

    @staticmethod
    def _check_end(stream: RowStream) -> None:
        """Refuses the end of an endless stream: a worker that has none of its shards would change all shares."""
        if stream.epochs is None:
            raise ValueError(
                f"{', '.join(stream.shards)}: too few rows for all workers of a mixture, of which each needs one. "
                "Give more rows, or fewer `--workers`."
            )

    def from_the_beginning(self) -> "StreamMixture":
        """The same stream as it was made, with counts of its own."""
        stream = copy(self)
        stream.streams, stream._taken = [each.from_the_beginning() for each in self.streams], 0
        return stream

    def state_dict(self) -> dict[str, Any]:
        """The position after the last sample."""
        return {"taken": self._taken, "streams": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved position."""
        self._taken = state["taken"]
        for stream, position in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(position)


class DialogueMixture(Dataset):
    """Rows of several data sets, each as often as its repeat or weight says.

    With weights, an epoch is as long as it takes to see every row at least once. Which rows are seen once more where
    a number of passes is no whole one is drawn by the seed. The copies of a row are augmented differently.

    Args:
        datasets: The data sets.
        sources: What the mixture says about each.
        seed: Decides which rows are drawn.
    """

    def __init__(self, datasets: Sequence[DialogueDataset], sources: Sequence[MixtureSource], seed: int = 0) -> None:
        self.datasets = list(datasets)
        counts = _counts([len(rows) for rows in datasets], sources)
        self._ends = list(accumulate(counts))
        self._drawn = [
            Random(f"mixture/{seed}/{number}").sample(range(len(rows)), count % len(rows))
            for number, (rows, count) in enumerate(zip(datasets, counts, strict=True))
        ]
        if not len(self):
            raise ValueError("The repeats of the mixture leave no row.")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Encodes a row of one of the data sets."""
        number, row, copy_number = self._locate(index)
        return self.datasets[number].encoded(row, copy_number)

    def _locate(self, index: int) -> tuple[int, int, int]:
        """The data set, the row there, and which copy of it."""
        if not 0 <= index < len(self):
            raise IndexError(f"Row {index} of {len(self)}.")
        number = bisect_right(self._ends, index)
        copy_number, row = divmod(index - (self._ends[number - 1] if number else 0), len(self.datasets[number]))
        count = self._ends[number] - (self._ends[number - 1] if number else 0)
        if copy_number == count // len(self.datasets[number]):
            row = self._drawn[number][row]
        return number, row, copy_number

    @cached_property
    def lengths(self) -> list[int]:
        """About how many tokens each row has, for `group_by_length`."""
        places = (self._locate(index) for index in range(len(self)))
        return [self.datasets[number].lengths[row] for number, row, _ in places]


class LengthGroups(LengthGroupedSampler):
    """The sampler of `Trainer` that groups rows by length; its order is that of the seed and the epoch.

    That of transformers draws from all random numbers before it, so that a resumed run would see other rows.

    Args:
        batch_size: Rows of a step.
        lengths: Of the rows.
        seed: Of the run.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Begins the order of an epoch."""
        self.generator.manual_seed((self.seed << 20) + epoch)


# ----------------------------------------------------------------------------------------------------------- the doors
def sources_of(files: Sequence[str], images: str | Path | None = None) -> tuple[MixtureSource, ...]:
    """The sources of a mixture file, or what is given as one source.

    Raises:
        ValueError: If a mixture file is broken, or stands beside others.
    """
    mixtures = [file for file in files if is_mixture(file)]
    if not mixtures:
        return (MixtureSource("data", tuple(map(str, files)), None if images is None else str(images)),)
    if len(files) > 1 or images is not None:
        raise ValueError(f"{mixtures[0]} is a mixture file: it names all data and folders of images itself.")
    return read_mixture(mixtures[0])


def dialogue_data(
    files: Sequence[str],
    encoder: DialogueEncoder,
    images: str | Path | None = None,
    is_streamed: bool = False,
    seed: int = 0,
    max_bad_rate: float = 0.01,
    **settings: Any,
) -> Dataset:
    """Dialogues to train on.

    Args:
        files: Files, names of data sets, or one mixture file.
        encoder: Makes the tensors, with the settings of a source where it has some.
        images: Folder of the images; None takes the folder of each file.
        is_streamed: Read the rows front to back, without an index of them.
        seed: Decides the order of a stream, and what a mixture draws.
        max_bad_rate: Largest share of the rows of a source that cannot be used.
        **settings: Of `RowStream`, for a stream.

    Returns:
        A `DialogueDataset`, `DialogueMixture`, `DialogueStream` or `StreamMixture`.
    """
    sources = sources_of(files, images)
    encoders = [encoder_of(encoder, source, seed) for source in sources]
    if is_streamed:
        settings |= {"seed": seed, "divides_shards": True}
        streams = [
            DialogueStream(source.data, own, source.images, bad_rows=_allowed(max_bad_rate), **settings)
            for source, own in zip(sources, encoders, strict=True)
        ]
        return streams[0] if len(streams) == 1 else StreamMixture(streams, _weights(sources), seed)
    datasets = [
        DialogueDataset(source.data, own, source.images, bad_rows=_allowed(max_bad_rate))
        for source, own in zip(sources, encoders, strict=True)
    ]
    is_plain = len(sources) == 1 and sources[0].repeat == 1
    return datasets[0] if is_plain else DialogueMixture(datasets, sources, seed)


def pair_data(
    files: Sequence[str],
    images: str | Path | None = None,
    seed: int = 0,
    max_bad_rate: float = 0.01,
    **settings: Any,
) -> PairStream | StreamMixture:
    """Pairs to train on.

    Args:
        files: Shards or files of rows, or one mixture file.
        images: Folder of the images that rows name by a path; None takes the folder of each file.
        seed: Decides the order.
        max_bad_rate: Largest share of the rows of a source that cannot be used.
        **settings: Of `PairStream`.
    """
    sources = sources_of(files, images)
    augments = [source.augmentation(seed) for source in sources]
    is_plain = len(sources) == 1 and augments[0] is None
    settings |= {"seed": seed, "divides_shards": not is_plain}
    streams = [
        PairStream(source.data, images=source.images, bad_rows=_allowed(max_bad_rate), **settings)
        for source in sources
    ]
    if is_plain:
        return streams[0]
    for source in sources:
        if source.max_tiles is not None or source.video_frames is not None:
            raise ValueError(f"Source `{source.name}`: pairs have neither `max_tiles` nor `video_frames`.")
    return StreamMixture(streams, _weights(sources), seed, augments)


def _allowed(max_bad_rate: float) -> BadRows:
    return BadRows(max_rate=max_bad_rate, limit="`--max-bad-rate`")


def num_rows(files: Sequence[str], is_streamed: bool = False) -> int:
    """The samples of one pass over the data.

    Args:
        files: As for `dialogue_data` or `pair_data`.
        is_streamed: Rows are read front to back, as those of pairs are.

    Raises:
        ValueError: If there is no row.
    """
    sources = sources_of(files)
    if is_streamed:
        lengths = [sum(1 for _ in read_shards(find_shards(source.data))) for source in sources]
    else:
        lengths = [sum(map(len, open_all_rows(source.data))) for source in sources]
    for source, length in zip(sources, lengths, strict=True):
        if not length:
            raise ValueError(f"There is no row in {', '.join(source.data)}.")
    return sum(_counts(lengths, sources))


def _counts(lengths: Sequence[int], sources: Sequence[MixtureSource]) -> list[int]:
    """Samples of each source in an epoch."""
    if sources[0].weight is None:
        return [round(length * source.repeat) for length, source in zip(lengths, sources, strict=True)]
    weights = [source.weight or 0.0 for source in sources]
    epoch = max(length / weight for length, weight in zip(lengths, weights, strict=True))
    return [max(round(epoch * weight), length) for length, weight in zip(lengths, weights, strict=True)]


def encoder_of(encoder: DialogueEncoder, source: MixtureSource, seed: int) -> DialogueEncoder:
    """The encoder with the settings of a source; `seed` decides how its images are augmented."""
    own = copy(encoder)
    own.augment = source.augmentation(seed) or encoder.augment
    own.video_frames = source.video_frames or encoder.video_frames
    if source.max_tiles is not None:
        own.settings = {**encoder.settings, "max_num": source.max_tiles, "use_thumbnail": source.max_tiles > 1}
    return own


def _weights(sources: Sequence[MixtureSource]) -> list[float]:
    """Weights of streams, whose rows are not counted."""
    for source in sources:
        if source.repeat != 1:
            raise ValueError(f"Source `{source.name}` has a `repeat`, but streams are not counted: give `weight`.")
    return [1.0 if source.weight is None else source.weight for source in sources]
