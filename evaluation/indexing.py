"""Embeds data into parquet files, on one device, several (`accelerate launch`) or many machines (Ray Data).

Blocks of rows are embedded and written one by one (see `vectors.files`), and what is written is not done again.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

from ..extras import extra
from ..image_loading_internvl import read_image, to_pil
from ..modeling_internvl import MODES, check_mode
from ..rows.bad_rows import BadRows
from .checkpoints import checkpoint_state
from .embeddings import ModelPlace, batches, embed_images, embed_texts, vector_size
from .multi_vectors import embed_queries
from .vectors.files import SIDES, Description, EmbeddingFolder
from .vectors.quantization import check_precision, dtype_of, quantize, stored_size
from .vectors.sources import Columns, EmbeddedItem, Part, find_parts, fingerprint_of


QUERIES = "queries"
ROWS_PER_FILE = 4096
DECODED_AHEAD = 2  # batches


@dataclass(frozen=True)
class Job:
    """What is embedded, and how.

    Args:
        data: See `find_parts`.
        output: Folder of the embeddings.
        mode: "InternVL-C", "InternVL-G", or "queries" for a set of vectors per image.
        precision: In which vectors are stored.
        dims: Length to which they are cut; None leaves them whole.
        sides: "image", "text" or both.
        columns: Of rows.
        rows_per_file: Rows that are written, and lost in a kill, at once.
        batch_size: Images at a time.
        max_bad_rate: Largest share of rows that cannot be used.
    """

    data: tuple[str, ...]
    output: str
    mode: str = "InternVL-C"
    precision: str = "float32"
    dims: int | None = None
    sides: tuple[str, ...] = SIDES
    columns: Columns = field(default_factory=Columns)
    rows_per_file: int = ROWS_PER_FILE
    batch_size: int = 64
    max_bad_rate: float = 0.01


def check_job(job: Job, config: PretrainedConfig) -> None:
    """Raises a ValueError for what a model of this configuration cannot do."""
    if job.mode != QUERIES:
        check_mode(job.mode)
    if job.mode != MODES[0] and not config.has_queries:
        raise ValueError(f"Mode {job.mode} needs a model with queries, an InternVL-G; this one is an InternVL-C.")
    if job.rows_per_file < 1 or job.batch_size < 1:
        raise ValueError("`rows_per_file` and `batch_size` must be at least 1.")
    BadRows(max_rate=job.max_bad_rate, limit="`--max-bad-rate`")
    check_precision(job.precision, vector_size(config, job.dims))


def begin(job: Job, place: ModelPlace, config: PretrainedConfig) -> tuple[EmbeddingFolder, list[Part]]:
    """Finds the data, and makes the folder or checks that it belongs to the same job.

    Raises:
        OSError: If there are no such data.
        ValueError: If something does not fit.
    """
    check_job(job, config)
    parts = find_parts(job.data, job.columns, job.rows_per_file)
    settings = {"sides": job.sides, "columns": asdict(job.columns), "dtype": place.dtype}
    description = Description(
        model=place.model,
        subfolder=place.subfolder,
        mode=job.mode,
        precision=job.precision,
        size=vector_size(config, job.dims),
        vectors=config.num_query_token if job.mode == QUERIES else 1,
        rows_per_file=job.rows_per_file,
        parts=len(parts),
        data=fingerprint_of(parts, settings),
        state=checkpoint_state(place.model, place.subfolder) or "",
    )
    return EmbeddingFolder(job.output, description), parts


# ------------------------------------------------------------------------------------------------------------ the work
class Embedder:
    """Embeds items in the way of a job.

    Args:
        model: An InternVL-C or -G.
        processor: Its processor.
        job: What is wanted.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, job: Job) -> None:
        self.model = model
        self.processor = processor
        self.job = job
        self.size = vector_size(model.config, job.dims)
        self.bad_rows = BadRows(max_rate=job.max_bad_rate, limit="`--max-bad-rate`")

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Returns unit vectors (images, M, E)."""
        if self.job.mode == QUERIES:
            vectors = embed_queries(self.model, self.processor, images)
        else:
            vectors = embed_images(self.model, self.processor, images, self.job.mode, len(images))[:, None]
        return self._cut(vectors)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns unit vectors (texts, 1, E)."""
        return self._cut(embed_texts(self.model, self.processor, texts, self.job.batch_size)[:, None])

    def _cut(self, vectors: torch.Tensor) -> np.ndarray:
        return F.normalize(vectors[..., : self.size], dim=-1).numpy()

    def embed(self, items: Iterable[EmbeddedItem]) -> tuple[list[EmbeddedItem], dict[str, np.ndarray], int]:
        """Embeds items.

        Returns:
            The items that could be read, what is stored for those of them that have an image, or a text, by side, and
            how many could not be read.

        Raises:
            TooManyBadRowsError: If they are too many.
        """
        kept: list[EmbeddedItem] = []
        found: dict[str, list[np.ndarray]] = {side: [] for side in self.job.sides}
        bad_rows = 0
        for batch in batches(self._decoded(items), self.job.batch_size, "embedding"):
            good = [(item, image) for item, image, fault in batch if not fault]
            for item, _, fault in batch:
                self.bad_rows.count(item.id if fault else None, fault)
            bad_rows += len(batch) - len(good)
            kept += [item for item, _ in good]
            images = [image for _, image in good if image is not None]
            texts = [item.text for item, _ in good if item.text is not None]
            if images:
                found["image"].append(quantize(self.images(images), self.job.precision))
            if texts:
                found["text"].append(quantize(self.texts(texts), self.job.precision))
        return kept, {side: self._stacked(side, rows) for side, rows in found.items()}, bad_rows

    def _stacked(self, side: str, rows: list[np.ndarray]) -> np.ndarray:
        vectors = self.model.config.num_query_token if side == "image" and self.job.mode == QUERIES else 1
        empty = (0, vectors, stored_size(self.size, self.job.precision))
        return np.concatenate(rows) if rows else np.zeros(empty, dtype_of(self.job.precision))

    def _decoded(self, items: Iterable[EmbeddedItem]) -> Iterator[tuple[EmbeddedItem, Image.Image | None, str]]:
        """Yields items with their image and fault; images are decoded in threads while the model computes."""
        with ThreadPoolExecutor() as pool:
            ahead: deque[Future] = deque()
            for item in items:
                ahead.append(pool.submit(self._decode, item))
                if len(ahead) > DECODED_AHEAD * self.job.batch_size:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _decode(self, item: EmbeddedItem) -> tuple[EmbeddedItem, Image.Image | None, str]:
        if item.fault or item.image is None:
            return item, None, item.fault
        processor = self.processor.image_processor
        limit = processor.max_image_pixels
        try:
            image = read_image(item.image, "The image", limit)
            return item, to_pil(image, "The image", limit, True, None, processor.background_color), ""
        except ValueError as error:
            return item, None, str(error)


def on_sides(item: EmbeddedItem, sides: Sequence[str]) -> EmbeddedItem | None:
    """Returns the item with what is wanted of it; None where that is nothing."""
    image, text = (getattr(item, side) if side in sides else None for side in SIDES)
    if not item.fault and image is None and text is None:
        return None
    return EmbeddedItem(item.id, item.path, image, text, item.fault)


def embed_part(embedder: Embedder, folder: EmbeddingFolder, part: Part, number: int, rank: int, world: int) -> None:
    """Embeds the blocks of a part that are not there yet.

    Args:
        embedder: With the model.
        folder: Where they are written.
        part: What is read.
        number: Of the part.
        rank: Of `world` readers that share the blocks of the part.
        world: How many there are.
    """
    size = folder.description.rows_per_file
    rows, block, count = part.read(), 0, 0
    while items := list(islice(rows, size)):
        if block % world == rank and not folder.block_file(number, block).is_file():
            wanted = (on_sides(item, embedder.job.sides) for item in items)
            folder.write_block(number, block, *embedder.embed(item for item in wanted if item is not None))
        block, count = block + 1, count + len(items)
    folder.mark_done(number, block, count)


def share_of(parts: Sequence[Part], rank: int, world: int) -> list[tuple[int, int, int]]:
    """Divides parts among processes.

    Returns:
        For each part that process `rank` of `world` reads, its number, and the rank and number of the readers that
        share its blocks: one for parts that are read slowly, such as shards of tar files, if there are as many parts
        as processes; else all.
    """
    is_whole = [not part.is_shared for part in parts]
    divides = sum(is_whole) < world
    found, turn = [], 0
    for number, whole in enumerate(is_whole):
        if divides or not whole:
            found.append((number, (rank - number) % world, world))
        elif turn % world == rank:
            found.append((number, 0, 1))
        turn += whole
    return found


def embed_data(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    job: Job,
    place: ModelPlace,
    rank: int = 0,
    world: int = 1,
) -> EmbeddingFolder:
    """Embeds what is left of a job, or of this process's share of it.

    Args:
        model: An InternVL-C or -G, in evaluation mode.
        processor: Its processor.
        job: What is embedded, and how.
        place: What the model is called; a search loads it from there.
        rank: Number of this process.
        world: Number of processes.

    Returns:
        The folder.

    Raises:
        OSError: If there are no such data.
        ValueError: If the job is impossible, the folder belongs to another one, or too many rows cannot be used.
    """
    folder, parts = begin(job, place, model.config)
    embedder = Embedder(model, processor, job)
    for number, reader, readers in tqdm(
        share_of(parts, rank, world), desc="parts", leave=False, disable=None, delay=1
    ):
        if not folder.is_done(number):
            embed_part(embedder, folder, parts[number], number, reader, readers)
    return folder


# ------------------------------------------------------------------------------------------------------------ Ray Data
class RayEmbedder:
    """An actor of Ray Data: embeds parts by their numbers, with a model of its own.

    Args:
        job: What is embedded, and how; data and output lie where every machine finds them.
        place: Of the model.
    """

    def __init__(self, job: Job, place: ModelPlace) -> None:
        model, processor = place.load("cuda" if torch.cuda.is_available() else "cpu")
        self.folder, self.parts = begin(job, place, model.config)
        self.embedder = Embedder(model, processor, job)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Embeds the parts in column "part"; returns them."""
        for number in batch["part"].tolist():
            embed_part(self.embedder, self.folder, self.parts[number], number, 0, 1)
        return batch


def embed_by_ray(job: Job, place: ModelPlace, config: PretrainedConfig, workers: int, gpus: float) -> EmbeddingFolder:
    """Embeds what is left of a job by workers of Ray Data, on the cluster that `ray.init` finds.

    Args:
        job: What is embedded, and how.
        place: Of the model.
        config: Of the model.
        workers: How many load the model.
        gpus: Of each; 0 for CPUs.

    Raises:
        MissingLibraryError: If Ray is not installed.
        OSError: If there are no such data.
        ValueError: As in `embed_data`.
    """
    with extra("ray"):
        import ray

    folder, _ = begin(job, place, config)
    missing = folder.unfinished_parts()
    if missing:
        parts = ray.data.from_items([{"part": number} for number in missing], override_num_blocks=len(missing))
        settings: dict[str, Any] = {"num_gpus": gpus} if gpus else {"num_cpus": 1}
        done = parts.map_batches(
            RayEmbedder, fn_constructor_args=(job, place), concurrency=workers, batch_size=1, **settings
        )
        done.materialize()
    return folder
