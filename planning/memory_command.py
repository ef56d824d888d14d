"""`python -m internvl.memory MODEL`, the old name of `python -m internvl.planning memory MODEL`."""

import sys

from .__main__ import main


if __name__ == "__main__":
    sys.exit(main(["memory", *sys.argv[1:]]))
