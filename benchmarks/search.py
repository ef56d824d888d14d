"""Search over many vectors: recall@10, bytes and time of narrow vectors and indexes, against whole ones in float32;
and what several vectors for an image find that one does not.

Two sets of a million vectors are searched by vectors drawn in the same way: with a spectrum that decays, as those of
trained models have, and without any structure, which is the hardest there is: all neighbours are nearly as far.
It takes 12 GB of disk in the temporary folder.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor

from internvl.evaluation.embeddings import embed_images, embed_texts
from internvl.evaluation.generated import held_out_scenes
from internvl.evaluation.multi_vectors import embed_queries
from internvl.evaluation.vectors.files import Description, EmbeddingFolder
from internvl.evaluation.vectors.indexes import StoredVectors, max_similarity, search_vectors
from internvl.evaluation.vectors.quantization import quantize
from internvl.evaluation.vectors.sources import EmbeddedItem
from internvl.synthetic.captions import caption
from internvl.synthetic.scenes import draw_scene

from .harness import Options, Row, interleave, row_of


BUNDLED = Path(__file__).parents[1] / "internvl_g"
COUNT, SIZE = 1_000_000, 768
BLOCK = 2**15
NUM_QUERIES = 100
TOP = 10
DECAY = {
    "decaying spectrum": 0.5,
    "no structure": 0.0,
}  # deviation of component i before rotation: i to the power of -this
# Name, stored precision, index, candidates; and the recall that the decaying spectrum must reach.
SEARCHES = (
    ("float16", "float16", "flat", 0, 0.99),
    ("8-bit index", "float16", "int8", 0, 0.95),
    ("signs, 10 candidates each compared in float16", "float16", "binary", 10, None),
    ("signs, 40 candidates each compared in float16", "float16", "binary", 40, None),
    ("signs, 100 candidates each compared in float16", "float16", "binary", 100, 0.95),
    ("signs alone", "binary", "binary", 100, None),
)


NUM_SCENES = 300


def draw_vectors(decay: float) -> Iterator[np.ndarray]:
    """Blocks of unit vectors, the queries first; the same whenever they are drawn."""
    generator = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(generator.standard_normal((SIZE, SIZE)).astype(np.float32))
    rotation *= np.arange(1, SIZE + 1, dtype=np.float32)[:, None] ** -decay
    sizes = [NUM_QUERIES, *[BLOCK] * (COUNT // BLOCK), COUNT % BLOCK]
    for size in filter(None, sizes):
        vectors = generator.standard_normal((size, SIZE), dtype=np.float32) @ rotation
        yield vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_vectors(folder: Path, precision: str, blocks: Iterator[np.ndarray]) -> StoredVectors:
    """The vectors as those of images in a folder of embeddings."""
    found = EmbeddingFolder(folder, Description("", "InternVL-C", precision, SIZE, 1, BLOCK, 1, ""))
    number = 0
    for number, vectors in enumerate(blocks):
        items = [EmbeddedItem(str(row), "", "image") for row in range(len(vectors))]
        found.write_block(0, number, items, {"image": quantize(vectors[:, None], precision)}, 0)
    found.mark_done(0, number + 1, COUNT)
    return StoredVectors(found, "image")


def bytes_of(vectors: StoredVectors, index: str, candidates: int) -> int:
    """Bytes that a search of one query reads."""
    if index == "flat":
        return vectors.stored.nbytes
    of_index = (vectors.path / f"{index}.faiss").stat().st_size
    return of_index + vectors.stored.nbytes // len(vectors) * min(len(vectors), candidates * TOP)


def rows(options: Options) -> Iterator[Row]:
    """Recall, bytes and time of every search, on each set of vectors. The work is always the CPU's."""
    yield from part_rows()
    options = Options("cpu", options.at_most(3).rounds)
    for name, decay in DECAY.items():
        with TemporaryDirectory() as folder:
            yield from _rows_of_set(Path(folder), name, decay, options)


def _rows_of_set(folder: Path, name: str, decay: float, options: Options) -> Iterator[Row]:
    blocks = draw_vectors(decay)
    queries = next(blocks)
    stored = {"float32": write_vectors(folder / "float32", "float32", blocks)}
    for precision in dict.fromkeys(search[1] for search in SEARCHES):
        parts = (block[:, 0] for _, block in stored["float32"].blocks())
        stored[precision] = write_vectors(folder / precision, precision, parts)
    whole = partial(search_vectors, queries, stored["float32"], TOP, "flat")
    _, exact = whole()
    for what, precision, index, candidates, target in SEARCHES:
        title = f"{COUNT:,} x {SIZE}, {name}: {what}"
        search = partial(search_vectors, queries, stored[precision], TOP, index, max(candidates, 1))
        _, found = search()  # makes the index
        shares = [len({*some} & {*best}) / TOP for some, best in zip(found.tolist(), exact.tolist(), strict=True)]
        size = bytes_of(stored[precision], index, candidates)
        yield Row(f"{title}: recall@{TOP}", float(np.mean(shares)), None if decay == 0 else target)
        yield Row(
            f"{title}: bytes read, against float32",
            size / stored["float32"].stored.nbytes,
            is_lower_better=True,
            details={"bytes": size},
        )
        for number in (1, NUM_QUERIES):
            calls = {
                "ours": partial(search_vectors, queries[:number], *search.args[1:]),
                "peer": partial(search_vectors, queries[:number], *whole.args[1:]),
            }
            yield row_of(
                f"{title}: speed of {number} quer{'y' if number == 1 else 'ies'} at once, against float32",
                interleave(calls, options, warmups=1),
                queries=number,
            )


# --------------------------------------------------------------------------------------- several vectors for an image
def part_rows() -> Iterator[Row]:
    """One vector for each query of the bundled InternVL-G against one for the image, over generated scenes.

    Phrases name one object, such as "a red star"; right is every scene that has it. Captions name all that there is.
    """
    model = AutoModel.from_pretrained(BUNDLED, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(BUNDLED)
    scenes = held_out_scenes(NUM_SCENES)
    images = [draw_scene(scene) for scene in scenes]
    one = embed_images(model, processor, images, "InternVL-G", 32)[:, None]
    sets = torch.cat(
        [embed_queries(model, processor, images[start : start + 32]) for start in range(0, len(images), 32)]
    )
    shown = [{(item.colour, item.value) for item in scene.objects if item.kind == "shape"} for scene in scenes]
    phrases = {f"a {colour} {shape}": (colour, shape) for colour, shape in sorted(set().union(*shown))}
    is_right = np.array([[wanted in of_scene for of_scene in shown] for wanted in phrases.values()])
    captions = [caption(scene) for scene in scenes]
    for name, texts, right in (
        (f"{len(phrases)} phrases of one object", list(phrases), is_right),
        (f"{len(captions)} captions", captions, np.eye(len(captions), dtype=bool)),
    ):
        embeds = embed_texts(model, processor, texts)[:, None].numpy()
        first = [max_similarity(embeds, vectors.numpy()).argmax(axis=1) for vectors in (one, sets)]
        of_one, of_sets = (float(right[np.arange(len(texts)), rows].mean()) for rows in first)
        yield Row(
            f"{name}, {len(scenes)} scenes: first image right by a vector for each query, against one vector",
            of_sets / of_one if of_one else None,
            details={"one": of_one, "sets": of_sets},
            skipped=None if of_one else "one vector finds none",
        )
