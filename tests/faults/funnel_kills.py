"""Kills `filter` and `dedup`: what a run has written is whole, and the run after it keeps every pair once."""

import random
import shutil
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

from forks import finished, killed

from internvl.synthetic.textures import changed, texture
from internvl.training.data.dedup import DedupJob, dedup_data
from internvl.training.data.filtering import FilterJob, filter_data
from internvl.training.data.pair_files import pair_writer
from tests.fixtures_conversions import state_of
from tests.fixtures_pairs import write_textures
from tests.test_filtering import random_rows, write_shard


FILES, ROWS = 3, 500  # of each format, and of each file
TEXTURES, COPIES, ROWS_OF_SHARD = 40, 20, 10


def main(kills: int, seed: int) -> None:
    """Raises AssertionError where a kill lost something.

    Args:
        kills: How many.
        seed: Of the moments.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = folder / "data"
        data.mkdir()
        jobs = {"filter": filter_of(data), "dedup": dedup_of(data)}
        before = state_of(data)
        whole, took = {}, {}
        for name, job in jobs.items():
            took[name] = sorted(finished(partial(job, folder / f"{name}{number}")) for number in range(3))[1]
            whole[name] = pairs_in(folder / f"{name}0")
        seen: Counter[tuple[str, str]] = Counter()
        for number in range(kills):
            name, out = list(jobs)[number % 2], folder / "out"
            killed(partial(jobs[name], out), rng.uniform(0, 1.2 * took[name]))
            seen[name, found_at(out, whole[name])] += 1
            finished(partial(jobs[name], out))
            assert pairs_in(out) == whole[name], f"the run after kill {number} gave another result"
            assert state_of(data) == before, f"kill {number} changed the data"
            shutil.rmtree(out)
    print("| command | files of kept pairs after the kill | times |\n|---|---|---|")
    for (name, left), count in sorted(seen.items()):
        print(f"| {name} | {left} | {count} |")
    print(f"\nUnbroken runs take {took['filter']:.2f} s (filter), {took['dedup']:.2f} s (dedup).")


def filter_of(data: Path):
    """Filters shards of every format into a folder."""
    endings = ("parquet", "tar", "jsonl", "csv")
    shards = [
        write_shard(data / f"{number}.{ending}", random_rows(ROWS, seed=number))
        for number in range(FILES)
        for ending in endings
    ]
    return lambda out: filter_data(FilterJob(tuple(shards), output=str(out), max_bad_rate=1))


def dedup_of(data: Path):
    """Leaves near duplicates out into a folder."""
    images = write_textures(data / "images", range(TEXTURES))
    for number in range(COPIES):
        _, content = changed(texture(number), number)
        (images / f"copy{number}.png").write_bytes(content)
    names = sorted(path.name for path in images.iterdir())
    shards = []
    for start in range(0, len(names), ROWS_OF_SHARD):
        shards.append(str(data / f"{start}.jsonl"))
        with pair_writer(Path(shards[-1])) as write:
            write([{"file_name": name, "caption": "a thing"} for name in names[start : start + ROWS_OF_SHARD]])
    return lambda out: dedup_data(DedupJob(tuple(shards), str(out), images=str(images)))


def pairs_in(out: Path) -> dict[str, str]:
    """Checksums of the files of kept pairs, unfinished ones included."""
    return state_of(out / "pairs")


def found_at(out: Path, whole: dict[str, str]) -> str:
    """What a kill left; raises where it is anything but a part of the whole."""
    found = {name: checksum for name, checksum in pairs_in(out).items() if name in whole}
    assert found.items() <= whole.items(), "half a file under its final name"
    if not found:
        return "none"
    return "all" if found == whole else "some"
