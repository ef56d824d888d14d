"""The data funnel on one core: rows per second beside polars that runs the same expressions alone, a million hashes,
scoring beside embedding, and memory from ten thousand rows to ten million.

Rows are metadata as LAION has it, whose captions are words drawn at random: about half of the pairs are kept. It takes
2 GB in the temporary folder.
"""

from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import pyarrow
from pyarrow import parquet

from internvl.evaluation.embeddings import ModelPlace
from internvl.evaluation.generated import held_out_scenes
from internvl.evaluation.indexing import Embedder, Job, embed_data
from internvl.evaluation.vectors.sources import Columns
from internvl.rows.shards import find_shards
from internvl.synthetic.captions import caption
from internvl.synthetic.scenes import draw_scene
from internvl.training.data.filter_expressions import inputs_of, rule_expressions, table_inputs
from internvl.training.data.filtering import FilterJob, filter_data
from internvl.training.data.filters import FILTERS, Filter
from internvl.training.data.near_duplicates import hash_pairs
from internvl.training.data.scoring import ScoreJob, score_data

from .harness import Options, Row, in_fresh_process, interleave, memory_growth, one_core, row_of, seconds_of, speed_row


BUNDLED = Path(__file__).parents[1] / "internvl_g"
COUNT = 1_000_000
FEW, MANY = 10_000, 10_000_000
NUM_IMAGES = 192
NUM_NEAR = 1000  # of the hashes, others differ from in a few bits
WORDS = """a an the of on in with and red blue old new small large house street photo portrait view city river mountain
woman man child dog cat bird tree flower table chair window kitchen garden beach sunset winter morning wedding vintage
wooden leather cotton black white green yellow silver gold design pattern poster print book cover art train bus
bicycle bridge market church museum hotel restaurant 2019 London Paris""".split()


def metadata(num_rows: int) -> pyarrow.Table:
    """Rows without images: addresses, captions, sizes and scores, some of which are missing."""
    rng = np.random.default_rng(0)
    words = np.array(WORDS, object)
    lengths = rng.integers(2, 16, num_rows)
    drawn, ends = words[rng.integers(len(words), size=lengths.sum())], lengths.cumsum()
    captions = [" ".join(drawn[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
    scores = {
        "similarity": rng.normal(0.3, 0.05, num_rows),
        "pwatermark": rng.beta(1, 4, num_rows),
        "punsafe": rng.beta(1, 12, num_rows),
        "aesthetic": rng.normal(5, 0.7, num_rows),
    }
    columns = {name: pyarrow.array(values, mask=rng.random(num_rows) < 0.01) for name, values in scores.items()}
    sides = {side: rng.integers(100, 2000, num_rows) for side in ("width", "height")}
    addresses = [f"https://images.example/{number:09d}.jpg" for number in range(num_rows)]
    return pyarrow.table({"url": addresses, "caption": captions, **sides, **columns})


def write_metadata(folder: Path, num_rows: int, files: int = 1) -> list[str]:
    """Parquet files of as many rows each; the later ones are links to the first."""
    paths = [folder / f"{number:03d}.parquet" for number in range(files)]
    parquet.write_table(metadata(num_rows // files), paths[0], row_group_size=100_000)
    for path in paths[1:]:
        path.hardlink_to(paths[0])
    return list(map(str, paths))


# -------------------------------------------------------------------------------------------------------------- filter
def bare(shard: str, rules: tuple[Filter, ...], output: Path | None) -> None:
    """Polars alone: the rows that pass, counted or written by its streaming engine."""
    table = pl.scan_parquet(shard)
    schema = table.collect_schema()
    inputs = table_inputs(table, schema, rules)
    holds = pl.all_horizontal(pl.col("fault").is_null(), *(rule_expressions(rule, schema)[1] for rule in rules))
    if output is None:
        inputs.select(holds.sum()).collect(engine="streaming")
    else:
        kept = pl.concat([table, inputs.select(holds.alias("holds"))], how="horizontal").filter("holds").drop("holds")
        kept.sink_parquet(output, compression="snappy")


def is_on_numbers(rule: Filter) -> bool:
    """Whether a rule reads nothing of the caption."""
    others = inputs_of([rule], ())[1:]  # than the caption, which every row must have
    return bool(others) and not any(one.is_text for one in others)


def filter_rows(options: Options) -> Iterator[Row]:
    """Rules on numbers, and all rules, counting and writing."""
    on_numbers = tuple(rule for rule in FILTERS if is_on_numbers(rule))
    for rules, name, rate in ((on_numbers, "rules on numbers", 1.0), (FILTERS, "all rules", 0.2)):
        for way in ("counting", "writing"):
            row = filter_row(f"{name}, {way}", rules, way == "writing", options.at_most(5))
            yield row
            found = COUNT / row.details["median_seconds"]["ours"] / 1e6
            yield Row(f"{name}, {way}: million rows per second on one core", found, rate)


def filter_row(name: str, rules: tuple[Filter, ...], writes: bool, options: Options) -> Row:
    """Speed of `filter` or `funnel` against polars alone."""
    with TemporaryDirectory() as folder, one_core():
        (shard,) = write_metadata(Path(folder), COUNT)
        outputs = count()

        def ours() -> None:
            output = str(Path(folder, str(next(outputs)))) if writes else None
            filter_data(FilterJob((shard,), rules=rules, output=output))

        peer = partial(bare, shard, rules, Path(folder, "bare.parquet") if writes else None)
        return speed_row(f"{name}: speed against polars alone", ours, peer, options, target=0.9, warmups=1)


def bytes_held(folder: str) -> int:
    """Bytes held while rows are filtered and written by all rules; to be called in a fresh process."""
    shards = tuple(find_shards([f"{folder}/*.parquet"]))
    return memory_growth(partial(filter_data, FilterJob(shards, output=f"{folder}/kept")))


def memory_rows() -> Iterator[Row]:
    """The most that ten million rows hold, over a million, which fill a batch, and over ten thousand, which do not."""
    found = {}
    for num_rows in (FEW, COUNT, MANY):
        with TemporaryDirectory() as folder:
            write_metadata(Path(folder), num_rows, files=max(1, num_rows // COUNT))
            found[num_rows] = in_fresh_process(bytes_held, folder)
    for fewer, target in ((COUNT, 1.25), (FEW, None)):
        name = f"{MANY:,} rows filtered and written: memory against {fewer:,}"
        yield Row(name, found[MANY] / found[fewer], target, is_lower_better=True, details={"bytes": found})


# ------------------------------------------------------------------------------------------------------------ the rest
def hash_row() -> Row:
    """A million hashes compared with each other, of which some are planted near others."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (COUNT, 8), dtype=np.uint8)
    bits = np.unpackbits(hashes[:NUM_NEAR], axis=1)
    bits[np.arange(NUM_NEAR)[:, None], rng.integers(64, size=(NUM_NEAR, 3))] ^= 1
    hashes[-NUM_NEAR:] = np.packbits(bits, axis=1)
    found: list[Any] = []
    with one_core():
        seconds = seconds_of(lambda: found.append(hash_pairs(hashes, hashes)))
    pairs = set(map(tuple, found[0].tolist()))
    planted = sum((number, COUNT - NUM_NEAR + number) in pairs for number in range(NUM_NEAR))
    return Row(
        f"{COUNT:,} hashes compared with each other: seconds on one core",
        seconds,
        60.0,
        is_lower_better=True,
        details={"planted": NUM_NEAR, "found": planted},
    )


def score_row(options: Options) -> Row:
    """`score` against `evaluation embed` of the same pairs by the bundled InternVL-C."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        lines = []
        for number, scene in enumerate(held_out_scenes(NUM_IMAGES)):
            draw_scene(scene).save(folder / f"{number}.png")
            lines.append({"file_name": f"{number}.png", "caption": caption(scene)})
        shard = str(folder / "pairs.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(lines), shard)
        place = ModelPlace(str(BUNDLED))
        model, processor = place.load("cpu")
        outputs = count()

        def score() -> None:
            job = ScoreJob((shard,), str(folder / f"score{next(outputs)}"), place, images=name)
            score_data(job, Embedder(model, processor, Job((), "", batch_size=job.batch_size)))

        def embed() -> None:
            job = Job((shard,), str(folder / f"embed{next(outputs)}"), columns=Columns(folder=name))
            embed_data(model, processor, job, place)

        seconds = interleave({"ours": score, "peer": embed}, options.at_most(5), warmups=1)
        return row_of(f"{NUM_IMAGES} pairs scored: speed against embedding them", seconds, target=1.0)


def rows(options: Options) -> Iterator[Row]:
    """The work is the CPU's."""
    options = Options("cpu", options.rounds)
    yield from filter_rows(options)
    yield hash_row()
    yield score_row(options)
    yield from memory_rows()
