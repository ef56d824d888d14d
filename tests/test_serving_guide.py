"""docs/serving.md is followed top to bottom; `make serving` follows what needs an engine, in its environment."""

import json
import os
import sys
from pathlib import Path

import pytest

from .conftest import ROOT
from .engines.table import COLUMNS, table_of
from .guide import Reader, blocks_of, copy_by_links, sections


GUIDE = sections((ROOT / "docs" / "serving.md").read_text(encoding="utf-8"))
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return copy_by_links(tmp_path_factory.mktemp("guide") / "clone")


# Of these everything but the text itself is tested elsewhere.
SLOW = ("Embeddings", "On the Hub", "Export")


FOLLOWED = [name for name, text in GUIDE.items() if blocks_of(text)]


@pytest.mark.parametrize(
    "section", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FOLLOWED]
)
def test_the_guide_is_right(section, clone):
    reader = Reader(clone, Path(sys.executable), OFFLINE)
    reader.follow(GUIDE[section])
    if reader.lacking:
        pytest.skip(f"what needs {', '.join(sorted(set(reader.lacking)))} was left out")


SAMPLE = """
<!-- serves -->
```bash
python -c 'import sys; from http.server import *; HTTPServer(("", int(sys.argv[2])), \
    SimpleHTTPRequestHandler).serve_forever()' --port 8000
```

```python
from urllib.request import urlopen

page = urlopen("http://127.0.0.1:8000/LICENSE").read()
```

<!-- needs a_module_that_is_nowhere -->
```bash
false
```

```python
print(page.decode().split()[0], "\\n")
```

```text
{printed}
```
"""


def test_following_sees_servers_needs_and_what_is_printed(clone):
    reader = Reader(clone, Path(sys.executable), OFFLINE)
    assert reader.follow(SAMPLE.format(printed="MIT")) == [0, 1, 3]
    assert reader.lacking == ["a_module_that_is_nowhere"]
    for wrong in (SAMPLE.format(printed="GPL"), "```bash\nfalse\n```\n", "```python\n1 / 0\n```\n"):
        with pytest.raises(AssertionError):
            reader.follow(wrong)


def test_every_command_of_the_guide_is_followed():
    """A block in any other language would be shown and never run."""
    assert {block.language for text in GUIDE.values() for block in blocks_of(text)} <= {"bash", "python"}


def test_the_table_of_chat_servers_is_what_make_serving_found():
    results = json.loads((ROOT / "benchmarks" / "results" / "serving.json").read_text(encoding="utf-8"))
    lines = [line for report in results["engines"].values() for line in report["lines"]]
    assert not [report for report in results["engines"].values() if "failed" in report]
    assert not [line for line in lines if line["equal"] != line["of"] or not line["of"]]
    assert {line["asked"] for line in lines} > set(COLUMNS)
    shown = [line for line in GUIDE["Chat"].splitlines() if line.startswith("|")]
    assert shown == table_of(results)
