"""Starting, in fresh interleaved processes: `import internvl` against importing transformers' base class alone."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from .harness import Options, Row, interleave, row_of


CALLS = {
    "internvl": ["-c", "import internvl"],
    "transformers": ["-c", "from transformers import PreTrainedModel"],
    "help": ["-m", "internvl.chat", "--help"],
}


def start(arguments: list[str]) -> None:
    """Runs Python and waits for its end."""
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def rows(options: Options) -> Iterator[Row]:
    """The import, then a command that has nothing to do."""
    seconds = interleave({name: partial(start, call) for name, call in CALLS.items()}, options.at_most(7), warmups=1)
    peer = "from transformers import PreTrainedModel"
    for name, call, target in (("import internvl", "internvl", 1.1), ("python -m internvl.chat --help", "help", 0.1)):
        title = f"time of `{name}` against `{peer}`"
        yield row_of(title, seconds, "transformers", call, target, is_lower_better=True)
