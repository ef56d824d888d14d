"""Batches of a stream, with the place of a process in it, so that a resumed run reads nothing a second time.

Workers of a data loader read ahead of the training, so where they stand is not where the training stands. Each batch
therefore brings the positions that its worker had after it. The place of a process is made of the positions of the
batches that it has handed out, and a resumed run starts its workers there.

A run may go on with fewer processes where each takes the streams of several earlier ones: the batches of all
processes together then hold the same samples in the same order.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import TrainingArguments


# Makes a batch. Its `prepare`, where it has one, is given each sample as soon as it was read, and the batch is made of
# what that returns: a decoded image is resized before the next one takes its place in the processor's cache.
Collator = Callable[[Sequence[Any]], Any]


@runtime_checkable
class Stream(Protocol):
    """An endless `IterableDataset` that knows its position, in a worker as in the process itself."""

    rank: int
    world_size: int

    def __iter__(self) -> Iterator[Any]:
        """Go on from the position."""

    def from_the_beginning(self) -> "Stream":
        """Return a copy without a position."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last sample as plain JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""


class StreamBatches(IterableDataset):
    """Batches of the streams of one process.

    After a resumption the first items are None, one for each batch of the earlier run: what `Trainer` passes over.

    Args:
        streams: One stream, or those of several earlier processes, whose samples each batch has one after the other.
        collator: Makes a batch.
        rows: Samples of one stream in a batch.
        places: Places of the streams to go on from, in the same order; None begins anew.
        num_workers: Processes that make the batches.
        **settings: Further settings of the loader.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        collator: Collator,
        rows: int,
        places: Sequence[dict[str, Any]] | None = None,
        num_workers: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.streams = streams
        self.collator = collator
        self.rows = rows
        self.num_workers = num_workers
        self.settings = settings
        self._places = deepcopy(list(places or self._first_places()))
        self._has_begun = False

    def _first_places(self) -> list[dict[str, Any]]:
        return [
            {
                "rank": stream.rank,
                "world_size": stream.world_size,
                "rows": self.rows,
                "num_workers": self.num_workers,
                "num_batches": 0,
                "last_worker": -1,
                "positions": {},
            }
            for stream in self.streams
        ]

    def __iter__(self) -> Iterator[Any]:
        if self._has_begun:
            self._places = self._first_places()
        self._has_begun = True
        yield from [None] * self._places[0]["num_batches"]
        batches = _WorkerBatches(self.streams, self.collator, self.rows, self._places)
        loader = DataLoader(batches, None, num_workers=self.num_workers, collate_fn=_as_it_is, **self.settings)
        for item in loader:
            if item is None:  # a worker whose turn was in the earlier run
                continue
            worker, positions, batch = item
            for place, position in zip(self._places, json.loads(positions), strict=True):
                place["num_batches"] += 1
                place["last_worker"] = worker
                place["positions"][str(worker)] = position
            yield batch

    def places(self) -> list[dict[str, Any]]:
        """Return the place in each stream after the last batch, as plain JSON."""
        return self._places


class _WorkerBatches(IterableDataset):
    """What one worker makes: its number, the positions of its streams afterwards as JSON, and the batch."""

    def __init__(
        self, streams: Sequence[Stream], collator: Collator, rows: int, places: Sequence[dict[str, Any]]
    ) -> None:
        super().__init__()
        self.streams = streams
        self.collator = collator
        self.rows = rows
        self.places = places

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        for stream, place in zip(self.streams, self.places, strict=True):
            if (position := place["positions"].get(str(worker))) is not None:
                stream.load_state_dict(position)
        # Loaders ask their workers in turn, beginning with the first.
        if info is not None and worker <= self.places[0]["last_worker"]:
            yield None
        prepare = getattr(self.collator, "prepare", _as_it_is)
        samples = [map(prepare, stream) for stream in self.streams]
        while True:
            rows = [row for iterator in samples for row in islice(iterator, self.rows)]
            if len(rows) < self.rows * len(samples):
                return
            positions = [stream.state_dict() for stream in self.streams]
            yield worker, json.dumps(positions), self.collator(rows)


def _as_it_is(item: Any) -> Any:
    return item


def places_for(places: Sequence[dict[str, Any]], rank: int, world_size: int, rows: int) -> list[dict[str, Any]]:
    """Choose the places that a process goes on from.

    Args:
        places: Of all streams of the earlier run, by rank.
        rank: The process.
        world_size: Number of processes now.
        rows: Samples that a process now puts into a batch.

    Returns:
        The places, by rank.

    Raises:
        ValueError: If the earlier run had so many streams, or so many rows in a batch, that no exact continuation
            exists.
    """
    share, rest = divmod(len(places), world_size)
    if rest:
        raise ValueError(
            f"The run was begun with {len(places)} processes, each with its own part of the data. It can go on with "
            f"as many, or with a number that divides {len(places)}; {world_size} processes would read samples twice "
            "or not at all."
        )
    if rows != share * places[0]["rows"]:
        raise ValueError(
            f"The run was begun with {len(places)} processes and {places[0]['rows']} samples of each in a batch. On "
            f"{world_size} processes a batch has {rows}, and must have {share * places[0]['rows']} to go on with the "
            "same samples in each step."
        )
    return list(places[rank * share : (rank + 1) * share])


def stream_loader(
    stream: Any, collator: Collator, arguments: TrainingArguments, places: Sequence[dict[str, Any]] | None = None
) -> DataLoader:
    """Make the loader to return from `Trainer.get_train_dataloader`.

    `Trainer`'s own would split the stream over the processes a second time, and each would see but a part of its part.

    Args:
        stream: With the `rank` and `world_size` of this process (`arguments.process_index`, `arguments.world_size`).
        collator: Makes the batches.
        arguments: Batch size and workers.
        places: What `places_for` chose, whose number of workers is then taken; None begins anew.

    Returns:
        A loader of `StreamBatches` that accelerate takes as it is.
    """
    rows, num_workers, streams = arguments.per_device_train_batch_size, arguments.dataloader_num_workers, [stream]
    if places is not None:
        rows, num_workers = places[0]["rows"], places[0]["num_workers"]
        streams = [_stream_at(stream, place) for place in places]
    batches = StreamBatches(
        streams,
        collator,
        rows,
        places,
        num_workers,
        pin_memory=arguments.dataloader_pin_memory and torch.cuda.is_available(),
        prefetch_factor=arguments.dataloader_prefetch_factor if num_workers else None,
        persistent_workers=arguments.dataloader_persistent_workers and num_workers > 0,
        multiprocessing_context=arguments.dataloader_multiprocessing_context if num_workers else None,
    )
    # A generator of its own, so that this loader draws none of the random numbers of the training.
    return DataLoader(batches, None, collate_fn=_as_it_is, generator=torch.Generator())


def _stream_at(stream: Any, place: dict[str, Any]) -> Any:
    stream = stream.from_the_beginning()
    stream.rank, stream.world_size = place["rank"], place["world_size"]
    return stream


__all__ = ["Stream", "StreamBatches", "places_for", "stream_loader"]
