"""All benchmarks, one table: `python -m internvl.benchmarks [TOPIC ...] [--rounds 15] [--device cpu]`.

Every topic is a module here with a function `rows(options)`. Each writes `benchmarks/results/TOPIC-DEVICE.json`: the
calibration of its run, the versions, and its rows as they come. `conversion` and `real_sizes` are commands of their
own, which need 40 GB of disk; `search` needs 12 GB in the temporary folder, `funnel` 2. `gpu` is a command of its own
too (see the folder of that name).
"""

import argparse
import importlib
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging

from internvl.writing import write_whole

from .harness import Options, Row, describe_processor, format_row, matrix_rate, versions


RESULTS = Path("benchmarks", "results")  # of the current folder
TOPICS = (
    "start_up",
    "vision",
    "memory",
    "chat",
    "loading",
    "images",
    "pairs",
    "image_embeddings",
    "qllama",
    "connectors",
    "quantizers",
    "contrastive",
    "fine_tuning",
    "funnel",
    "search",
)


def measure_topic(topic: str, options: Options) -> list[Row]:
    """The rows of a topic, each written to its file as soon as it was measured."""
    rows = importlib.import_module(f".{topic}", __package__).rows(options)
    content: dict[str, Any] = {"calibration": matrix_rate(options), **versions(), "rows": []}
    found = []
    for row in tqdm(rows, desc=topic, unit="row", leave=False):
        found.append(row)
        content["rows"].append({**asdict(row), "met": row.is_met})
        write_whole(RESULTS / f"{topic}-{options.device}.json", json.dumps(content, indent=1) + "\n")
    return found


def format_table(rows: Iterable[Row]) -> str:
    """The rows as a table in Markdown."""
    lines = ["| row | ratio | interquartile range | target | reached |", "|---|---|---|---|---|"]
    lines += map(format_row, rows)
    return "\n".join(lines)


def main() -> None:
    """Measure the topics named, or all; `gpu` is a command of its own."""
    if sys.argv[1:2] == ["gpu"]:
        logging.disable_progress_bar()
        sys.exit(importlib.import_module(".gpu.command", __package__).main(sys.argv[2:]))
    parser = argparse.ArgumentParser(
        prog="python -m internvl.benchmarks", description="Runs benchmarks and prints one table."
    )
    parser.add_argument("topics", nargs="*", help=f"of {', '.join(TOPICS)}; all of these unless named")
    parser.add_argument("--rounds", type=int, default=Options.rounds, help="of each row (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    logging.disable_progress_bar()  # of loading and saving; that of the rows stays
    options = Options(arguments.device, arguments.rounds)
    found = [row for topic in arguments.topics or TOPICS for row in measure_topic(topic, options)]
    where = describe_processor() if options.device == "cpu" else torch.cuda.get_device_name()
    print(f"{where}, {torch.get_num_threads()} threads\n\n{format_table(found)}")


if __name__ == "__main__":
    main()
