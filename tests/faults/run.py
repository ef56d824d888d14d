"""`make faults`: processes are killed at random points of what they write, and nothing may be lost.

Every `*_kills.py` beside this file has a `main(kills, seed)` that raises where something was. `python
tests/faults/run.py conversion` runs one of them alone.
"""

import argparse
import importlib
import logging
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers


FOLDER = Path(__file__).resolve().parent
ENDING = "_kills"


def prepare() -> None:
    """Nothing is printed but tables, and no fork misses a thread of its parent."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def main() -> None:
    known = sorted(path.stem.removesuffix(ENDING) for path in FOLDER.glob(f"*{ENDING}.py"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--kills", type=int, default=50, help="of each (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(known))
    if unknown:
        parser.error(f"there is no {', '.join(unknown)}")
    prepare()
    sys.path.insert(0, str(FOLDER))
    sys.path.append(str(FOLDER.parents[1]))  # the tests' fixtures
    for name in options.names or known:
        start = time.monotonic()
        print(f"\n## {name}\n", flush=True)
        importlib.import_module(f"{name}{ENDING}").main(options.kills, options.seed)
        print(f"\n{options.kills} kills, seed {options.seed}, {time.monotonic() - start:.0f} s.", flush=True)


if __name__ == "__main__":
    main()
