"""Feeds damaged and hostile input to every door of the package, the same for the same seed: `make fuzz`.

    python -m tests.fuzz [--seed N] [--only KIND,...]

Exit status 0: every input was accepted, or refused by a ValueError or an OSError that names it; none exceeded the time
limit, none started a program, and memory stayed within its bounds.
"""

import argparse
import faulthandler
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from transformers.utils import logging

from . import checkpoints, images, messages, requests, rows
from .watch import limit_memory, watch


SECONDS = 600
KINDS = {
    "images": lambda seed: images.inputs(seed, 309),  # of each of 25 files: 7,725
    "image tokens": lambda seed: messages.injections(),  # 7 in 23 places: 161
    "messages": lambda seed: messages.malformed(seed, 1000),
    "checkpoints": lambda seed: checkpoints.inputs(seed, 400),
    "rows": lambda seed: rows.inputs(seed, 1000),
    "requests": lambda seed: requests.inputs(seed, 400),
}


@contextmanager
def quiet_libraries() -> Iterator[IO[str]]:
    """Nothing of what libtiff writes about each damaged file; gives the standard error as it was."""
    with os.fdopen(os.dup(2), "w") as errors, open(os.devnull, "w", encoding="ascii") as nothing:
        os.dup2(nothing.fileno(), 2)
        try:
            yield errors
        finally:
            os.dup2(errors.fileno(), 2)


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the damage (default: 0)")
    parser.add_argument("--only", default=",".join(KINDS), metavar="KIND,...", help="kinds of input (default: all)")
    options = parser.parse_args()
    logging.set_verbosity(logging.CRITICAL)
    logging.get_logger("internvl").setLevel(logging.CRITICAL)
    limit_memory(8 * 2**30)
    with quiet_libraries() as errors:
        # What hangs within a decoder is not interrupted by a signal: the whole run ends, and says where.
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=errors)
        return run(options.only.split(","), options.seed)


def run(kinds: list[str], seed: int) -> int:
    """Prints a row for each kind and then all faults; returns the exit status."""
    start, faults = time.monotonic(), []
    print("| input | tried | accepted | refused by name | faults | slowest | memory grew by |")
    print("|---|---|---|---|---|---|---|")
    for kind in kinds:
        report = watch(kind, KINDS[kind](seed))
        print(report.row(), flush=True)
        faults += report.faults
    alike: dict[str, list[str]] = {}
    for fault in faults:
        alike.setdefault(re.sub(r"\W+|\d+|_", " ", fault)[:60], []).append(fault)
    for group in alike.values():
        print(f"{len(group)} x {group[0]}".encode("utf-8", "backslashreplace").decode())
    print(f"{len(faults)} faults in {time.monotonic() - start:.0f} s, seed {seed}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
