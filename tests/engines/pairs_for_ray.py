"""Metadata of pairs in shards, with every edge of the rules, and the numbers of the rows that a slow loop keeps.

    python tests/engines/pairs_for_ray.py OUT

makes OUT/*.parquet and OUT/kept.json.
"""

import json
import sys
from pathlib import Path

import pyarrow
from pyarrow import parquet


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.test_filtering import random_rows, slow_loop  # noqa: E402


ROWS, SHARDS, STAGE = 100_000, 10, 2


def main(folder: Path) -> None:
    rows = random_rows(ROWS)
    kept, _, _ = slow_loop(rows, STAGE)
    folder.mkdir(parents=True)
    rows = [{**row, "number": number} for number, row in enumerate(rows)]
    for shard in range(SHARDS):
        part = rows[shard * ROWS // SHARDS : (shard + 1) * ROWS // SHARDS]
        parquet.write_table(pyarrow.Table.from_pylist(part), folder / f"{shard:02d}.parquet")
    (folder / "kept.json").write_text(json.dumps(kept))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
