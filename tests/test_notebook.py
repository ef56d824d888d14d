"""The notebooks in `examples/` give the outputs that are saved in them; their code cells are run as plain Python."""

import base64
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from PIL import Image


NOTEBOOKS = [
    pytest.param(file, id=file.name, marks=[pytest.mark.slow] if file.name == "finetune.ipynb" else [])
    for file in sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.ipynb"))
]


def saved_outputs(cell: dict) -> list:
    """Printed text, or the size of an image that is shown, in order."""
    outputs = []
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            outputs.append("".join(output["text"]))
        else:
            outputs.append(Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"]))).size)
    return outputs


@pytest.mark.parametrize("file", NOTEBOOKS)
def test_a_notebook_gives_the_outputs_that_are_saved_in_it(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    cells = [cell for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells
    printed, shown = io.StringIO(), []
    names = {"display": lambda image: shown.append(image.size)}
    for number, cell in enumerate(cells):
        with redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"{file.name}[{number}]", "exec"), names)
        expected = saved_outputs(cell)
        assert printed.getvalue() == "".join(output for output in expected if isinstance(output, str))
        assert shown == [output for output in expected if not isinstance(output, str)]
        printed.truncate(printed.seek(0))
        shown.clear()
