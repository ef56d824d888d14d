"""Kills conversions: OUT is absent, or the whole old or new folder, and the next run succeeds."""

import random
import shutil
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

from forks import finished, killed

from internvl.conversion import convert
from tests.fixtures_conversions import state_of


GOLDEN = Path(__file__).resolve().parents[1] / "golden"
# Several files with weights, so that a kill may fall between them.
SETTINGS = {"show_progress": False, "max_shard_size": "150KB", "image_token_id": 520}
replace = partial(convert, overwrite=True, **SETTINGS)


def main(kills: int, seed: int) -> None:
    """Raises AssertionError where a kill lost something.

    Args:
        kills: How many.
        seed: Of the moments.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = Path(shutil.copytree(GOLDEN / "chat_qwen2_v2", folder / "source"))
        before = state_of(source)
        convert(source, folder / "whole", **SETTINGS)  # imports what is imported when it is needed
        took = sorted(finished(partial(replace, source, folder / "whole")) for _ in range(5))[2]
        whole = state_of(folder / "whole")
        shutil.rmtree(folder / "whole")
        seen: Counter[tuple[str, str]] = Counter()
        left = 0
        for number in range(kills):
            is_there = number % 2 == 1
            out = folder / "out"
            if is_there:
                out.mkdir()
                (out / "old.txt").write_text("old")
            killed(partial(replace, source, out), rng.uniform(0, 1.2 * took))
            seen["folder" if is_there else "nothing", found_at(out, whole, is_there)] += 1
            left += len(beside(folder))
            assert state_of(source) == before, f"kill {number} changed the source"
            finished(partial(replace, source, out))
            assert state_of(out) == whole, f"the run after kill {number} gave another result"
            assert not beside(folder), f"the run after kill {number} left {beside(folder)}"
            shutil.rmtree(out)
    print("| OUT before | OUT after the kill | times |\n|---|---|---|")
    for (was, now), count in sorted(seen.items()):
        print(f"| {was} | {now} | {count} |")
    print(
        f"\nAn unbroken run takes {took:.2f} s. {left} kills left a folder beside OUT, and the run after each took it "
        "away."
    )


def found_at(out: Path, whole: dict[str, str], is_there: bool) -> str:
    """What OUT is after a kill; raises where it is anything but what it may be."""
    if not out.exists():
        assert not is_there, "the old folder is gone"
        return "nothing"
    found = state_of(out)
    if found == whole:
        return "the new folder, whole"
    assert is_there, f"half a result: {sorted(found)}"
    assert found.keys() == {"old.txt"}, f"half a result: {sorted(found)}"
    return "the old folder, whole"


def beside(folder: Path) -> list[str]:
    """Names of what lies beside source and result."""
    return sorted({path.name for path in folder.iterdir()} - {"source", "whole", "out"})
