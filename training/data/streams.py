"""Streams of rows at web scale: shards in, samples out, a little at a time.

`RowStream` reads shards (see `shards`) through `datasets`' streaming, which splits them over processes and workers. On
top of it come what `datasets` leaves open: shuffling that can be resumed exactly (its own shuffle buffer is lost with
the process), and broken rows, which are counted and left out up to a stated rate. No more than one block of undecoded
rows is in memory, however long the data.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any, Self

import torch
from torch.utils.data import get_worker_info
from transformers.utils import logging

from ...extras import extra
from ...rows.bad_rows import BadRows
from ...rows.json_rows import Row
from ...rows.shards import Shard, find_shards, has_lines, pieces_of, read_shards


with extra("train"):
    import datasets
    from datasets.distributed import split_dataset_by_node


logger = logging.get_logger(__name__)


@dataclass
class _Position:
    """Where a stream stands.

    Args:
        epoch: Pass over the data.
        block: Blocks of this epoch that are done.
        source: State of the undecoded samples at the beginning of the block; None at the beginning of an epoch.
        taken: Samples of the shuffled block that are done.
    """

    epoch: int = 0
    block: int = 0
    source: dict[str, Any] | None = None
    taken: int = 0


class RowStream(torch.utils.data.IterableDataset):
    """Samples of rows, each once per epoch over all processes; a subclass makes them, by `_sample`.

    Every process builds the same stream with its own `rank`, and workers of a data loader share it among themselves.
    Readers divide the rows of a JSON or CSV file. The number of other shards should be a multiple of processes times
    workers: else every process reads all shards and keeps its part of the samples, and workers that have no shard
    stand idle, or with `divides_shards` every worker reads all and keeps its part.

    Shards come in a new order each epoch; samples are shuffled within blocks of `shuffle_buffer` of one worker.
    `state_dict` is the position after the last sample given, in each worker its own; `stream_batches` carries it to
    where checkpoints are written.

    Args:
        shards: Files, see `find_shards`.
        rank: Number of this process.
        world_size: Number of processes.
        seed: Decides the order, together with the epoch.
        shuffle_buffer: Samples that are shuffled together; 1 keeps the order of the shards.
        epochs: Passes over the data; None goes on for ever, which training on several processes needs, because their
            parts are not equally long.
        bad_rows: The limit on broken rows, and their count. Shards that end too early or cannot be read count as one
            row each.
        divides_shards: Leave no worker idle where the number of shards is no multiple of all workers.

    Raises:
        OSError: If there are no such files.
        ValueError: If a setting is impossible. While reading: if too many rows are broken, or if a whole epoch gives
            nothing.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        epochs: int | None = None,
        bad_rows: BadRows | None = None,
        divides_shards: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` must be in 0..`world_size` - 1, got {rank} of {world_size} processes.")
        if shuffle_buffer < 1 or (epochs is not None and epochs < 1):
            raise ValueError(
                f"`shuffle_buffer` and `epochs` must be at least 1, got {shuffle_buffer} and {epochs}. For a stream "
                "without end, leave `epochs` out."
            )
        self.shards = find_shards(shards)
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.epochs = epochs
        self.divides_shards = divides_shards
        self.bad_rows = bad_rows or BadRows()
        self._position = _Position()
        self._is_over = False  # the last pass; the next one begins with the next epoch
        num_whole = sum(not has_lines(shard) for shard in self.shards)
        if num_whole % world_size and not divides_shards:
            logger.warning(
                f"{num_whole} shards for {world_size} processes: every process reads all of them. Make the "
                "number of shards a multiple of the number of processes."
            )

    def _sample(self, row: Row) -> dict[str, Any] | None:
        """What a row becomes; None where it is left out. Counts the row."""
        raise NotImplementedError

    def from_the_beginning(self) -> Self:
        """The same stream as it was made, with counts of its own."""
        stream = copy(self)
        stream._position, stream._is_over = _Position(), False
        stream.bad_rows = BadRows(self.bad_rows.max_rate, self.bad_rows.grace, limit=self.bad_rows.limit)
        return stream

    def set_epoch(self, epoch: int) -> None:
        """Begins the next pass with this epoch, unless the stream is in the midst of it or never ends.

        Workers of a data loader are copies: without this call before each pass they begin with the same epoch.
        """
        if self.epochs is not None and (self._is_over or epoch != self._position.epoch):
            self._position, self._is_over = _Position(epoch), False

    def state_dict(self) -> dict[str, Any]:
        """The position after the last sample, for the same number of processes and workers."""
        return {
            "position": dict(vars(self._position)),
            "broken_rows": self.bad_rows.state_dict(),
            "readers": self._readers(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved position.

        Args:
            state: What `state_dict` gave.

        Raises:
            ValueError: If it was taken with another number of processes, workers or shards.
        """
        if state["readers"] != self._readers():
            raise ValueError(
                f"The saved position belongs to {state['readers']}, this stream has {self._readers()}. Resume with "
                "the same data on as many processes and workers."
            )
        self._position, self._is_over = _Position(**state["position"]), False
        self.bad_rows.load_state_dict(state["broken_rows"])

    def _readers(self) -> dict[str, int]:
        worker = get_worker_info()
        return {
            "rank": self.rank,
            "world_size": self.world_size,
            "worker": worker.id if worker else 0,
            "workers": worker.num_workers if worker else 0,
            "shards": len(self.shards),
            "shuffle_buffer": self.shuffle_buffer,
            "seed": self.seed,
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            if self._is_over:
                self._position, self._is_over = _Position(self._position.epoch + 1), False
            is_whole = self._position == _Position(self._position.epoch)
            num_rows = num_samples = 0
            for sample in self._epoch():
                num_rows += 1
                if sample is not None:
                    num_samples += 1
                    yield sample
            if is_whole and num_rows > 0 and num_samples == 0:
                raise ValueError(
                    f"None of {num_rows} samples is left to train on. "
                    + (
                        f"Broken: {self.bad_rows.told()}"
                        if self.bad_rows.reasons
                        else "Look at the rules of the funnel."
                    )
                )
            self._is_over = True
            is_idle = is_whole and num_rows == 0
            if is_idle and not _has_other_workers():
                self._check_has_samples()
                is_idle = self.epochs is not None  # an endless stream looks into the shards of its next epoch
            if is_idle or (self.epochs is not None and (self._position.epoch + 1) % self.epochs == 0):
                return

    def _epoch(self) -> Iterator[dict[str, Any] | None]:
        """What becomes of each sample of an epoch, from the position on: a sample, or None where it is left out."""
        source = self._source(self._position.epoch)
        if self._position.source is not None:
            source.load_state_dict(self._position.source)
        rows = iter(source)
        while block := list(islice(rows, self.shuffle_buffer)):
            self._shuffle(block)
            end = source.state_dict()
            del block[len(block) - self._position.taken :]
            while block:
                sample = self._sample(block.pop())
                self._position.taken += 1
                yield sample
            self._position = _Position(self._position.epoch, self._position.block + 1, end)

    def _shuffle(self, block: list[Row]) -> None:
        readers = "/".join(str(value) for value in self._readers().values())
        Random(f"{readers}/{self._position.epoch}/{self._position.block}").shuffle(block)

    def _source(self, epoch: int) -> datasets.IterableDataset:
        """This process's undecoded rows."""
        source = datasets.IterableDataset.from_generator(read_shards, gen_kwargs={"shards": self._order(epoch)})
        if self.world_size > 1:
            source = split_dataset_by_node(source, rank=self.rank, world_size=self.world_size)
        return source

    def _order(self, epoch: int) -> list[Shard]:
        """All shards in the order of an epoch, to which every process must come; readers share text files."""
        readers = self.world_size * max(self._readers()["workers"], 1)
        divides = self.divides_shards and len(self.shards) % readers > 0
        shards: list[Shard] = []
        for shard in self.shards:
            shards += pieces_of(shard, readers) if divides or has_lines(shard) else [shard]
        if self.shuffle_buffer > 1:
            Random(f"shards/{self.seed}/{epoch}").shuffle(shards)
        return shards

    def _check_has_samples(self) -> None:
        """Refuses a first epoch without samples; in later ones other shards may fall to this process."""
        if self._position.epoch == 0:
            shards = self._order(0)
            own = shards if len(shards) % self.world_size else shards[self.rank :: self.world_size]
            names = ", ".join(shard if isinstance(shard, str) else shard[0] for shard in own)
            raise ValueError(f"Process {self.rank} of {self.world_size} finds no sample in {names}.")


def _has_other_workers() -> bool:
    """Whether the samples that this worker lacks may be another's."""
    worker = get_worker_info()
    return worker is not None and worker.num_workers > 1
