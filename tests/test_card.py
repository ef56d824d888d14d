"""The model card (README.md) and docs/ show what the bundled checkpoint answers and what was measured."""

import json
import re
import runpy
import shutil
import sys
from functools import partial
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import internvl  # noqa: F401
from internvl.chat import Conversation
from internvl.modeling_internvl import MODES
from internvl.reproduction import cards

from .conftest import ROOT


CARD = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [path for path in ROOT.rglob("*.md") if not path.relative_to(ROOT).parts[0].startswith((".", "build"))]


def snippets(text: str) -> list:
    return [compile(code, "README.md", "exec") for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


def rows(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_it_is_valid_and_its_first_command_comes_early():
    card = ModelCard.load(ROOT / "README.md")
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "image-text-to-text")
    assert next(i for i, line in enumerate(card.text.splitlines(), 1) if line.startswith("make ")) <= 15


def test_the_cards_hold_the_results_as_the_command_writes_them(tmp_path):
    for folder in cards.CARDS:
        (tmp_path / folder).mkdir(exist_ok=True)
        text = (ROOT / folder / "README.md").read_text()
        changed = re.sub(r"value: [\d.]+", "value: 1.0", text, count=1)
        assert changed != text
        (tmp_path / folder / "README.md").write_text(changed)
    (tmp_path / cards.RESULTS).parent.mkdir(parents=True)
    shutil.copyfile(ROOT / cards.RESULTS, tmp_path / cards.RESULTS)
    cards.write_results(tmp_path)
    for folder in cards.CARDS:
        assert (tmp_path / folder / "README.md").read_text() == (ROOT / folder / "README.md").read_text()
    found = {result.metric_name: result.metric_value for result in ModelCard(CARD).data.eval_results}
    assert found["all questions"] == 94.4
    assert len(found) == 8


def test_the_examples_of_the_widget_are_answered_as_the_card_says():
    conversation = Conversation(ROOT, max_new_tokens=16)
    for example in ModelCard(CARD).data.widget:
        ((image, text),) = [message["content"] for message in example["messages"]]
        conversation.restart()
        assert conversation.ask(text["text"], [str(ROOT / image["image_url"]["url"])]) == example["output"]["text"]


def test_its_answers_are_those_of_the_model():
    conversation = Conversation(ROOT, max_new_tokens=16)
    shown = rows(CARD, "| <img ")
    assert len(shown) == 2
    for row in shown:
        image = ROOT / re.search(r'src="(.*?)"', row)[1]
        for question, answer in re.findall(r"([^|>]+\?) \*\*(.*?)\*\*", row):
            conversation.restart()
            assert conversation.ask(question.strip(), [str(image)]) == answer


def test_snippets_run_and_are_right(monkeypatch, capsys):
    ask, compare = snippets(CARD)
    (compile_tower,) = snippets((ROOT / "docs" / "usage.md").read_text())
    monkeypatch.chdir(ROOT)
    # Whole graphs, but no generated code, which takes long.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    names: dict[str, Any] = {}
    exec(ask, names)
    exec(compare, {})
    exec(compile_tower, names)
    assert names["model"].vision_model._compiled_call_impl is not None
    assert torch.equal(names["model"].generate(**names["inputs"], max_new_tokens=16), names["output"])
    assert capsys.readouterr().out.splitlines() == ["4", "a red star", "a red star at the left"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_and_prose_is_wrapped(document):
    text = document.read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if len(line) > 119 and not re.search(r"^\s*\||https?://", line)]
    for link in re.findall(r"\]\((?!https?:)(.*?)\)", text):
        file, _, heading = link.partition("#")
        target = document.parent / file if file else document
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link


def test_the_table_of_files_has_every_file():
    table = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    names = {file.name for file in ROOT.glob("*.py")} | {
        f"{file.parent.name}/" for file in ROOT.glob("[a-z]*/__init__.py")
    }
    assert not [name for name in names if f"`{name}`" not in table]


def commands_in(documents: list) -> dict[tuple[str, str], set[str]]:
    """Options by command and sub-command, of everything that the documents run by `python -m internvl`."""
    found: dict[tuple[str, str], set[str]] = {}
    for document in documents:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        for name, rest in re.findall(r"-m (internvl\.[a-z_.]*[a-z_])((?: [^`\n#]*)?)", text):
            words = re.sub(r"[\[\]']", " ", rest).split()
            takes_a_path = name in ("internvl.chat", "internvl.demo") or (
                name == "internvl.conversion" and words[:1] != ["assemble"]
            )
            first = words[0] if words and not takes_a_path else ""
            for command in first.split("|") if re.fullmatch(r"[a-z_0-9|]+", first) else [""]:
                options = found.setdefault((name, command), set())
                options |= {word.partition("=")[0] for word in words if word.startswith("--")}
    return found


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_commands_that_the_documents_show_exist(monkeypatch, capsys):
    commands = commands_in([document for document in DOCUMENTS if document.name != "CHANGELOG.md"])
    assert len(commands) > 8
    for (name, command), options in commands.items():
        if ".harnesses." in name:
            continue  # command lines of other libraries, which are in no environment of the tests
        monkeypatch.setattr(sys, "argv", [name, *([command] if command else []), "--help"])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        shown = capsys.readouterr().out
        assert not stopped.value.code, (name, command)
        assert not [option for option in options if option not in shown], (name, command)


def test_it_shows_what_was_measured():
    results = ROOT / "reproduction" / "results"
    page = (results / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", page)) == {file.name for file in results.glob("*.png")}
    measured = json.loads((results / "results.json").read_text())
    for stage, tiles in measured["dialogue"].items():
        report = tiles["with_tiles"]
        shares = [*(kind["accuracy"] for kind in report["by_kind"].values()), report["accuracy"]]
        (row,) = rows(CARD, f"| {stage} |")
        assert re.findall(r"[\d.]+ %", row) == [f"{100 * share:.1f} %" for share in shares]
    for variant, seeds in measured["ablation"].items():
        (row,) = rows(page, f"| {variant} |")
        assert len(seeds) == 3
        found = [float(number) for number in re.findall(r"([\d.]+) \u00b1", row)]
        values = [[part["accuracy"] for part in seeds.values()]]
        values += [[part["recall_at_1"][mode] for part in seeds.values()] for mode in MODES]
        assert found == pytest.approx([100 * sum(value) / 3 for value in values], abs=0.051)
