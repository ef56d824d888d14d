"""`python -m internvl.training validate`: file, line and reason of each bad row, summary, exit code."""

import io
import json
import sys
from pathlib import Path

import pytest

from internvl.rows.bad_rows import UnusableRowError
from internvl.rows.json_rows import JsonRows
from internvl.training.__main__ import main

from .fixtures_dialogues import BAD_ROWS, llava
from .fixtures_text import make_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_image(32, 32).save(tmp_path / "a.png")
    make_image(32, 32).save(tmp_path / "b.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


GOOD = llava("<image>\nWhat?", "A bus.", image="a.png")


def validate(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, list[str], str]:
    code = main(["validate", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def as_lines(rows: list) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


# ------------------------------------------------------------------------------------------------------------ reports
class Terminal(io.StringIO):
    """Standard error of somebody who looks on."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "is_shown"), [(Terminal(), True), (io.StringIO(), False)])
def test_progress_is_shown_on_a_terminal_only(folder, monkeypatch, stream, is_shown):
    path = folder / "rows.jsonl"
    path.write_text(as_lines([GOOD] * 3))
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(["validate", str(path)]) == 0
    assert ("rows.jsonl:   0%" in stream.getvalue()) == is_shown


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_good_files_pass(folder, capsys, ending):
    path = folder / f"rows.{ending}"
    rows = [GOOD, llava("Hello", "Hi")]
    path.write_text(json.dumps(rows, indent=2) if ending == "json" else as_lines(rows))
    assert validate(capsys, path) == (0, ["2 rows in 1 file, none bad."], "")


def test_every_bad_row_is_named_with_its_line_and_reason(folder, capsys):
    path = folder / "rows.jsonl"
    rows = [
        GOOD,
        llava("<image>", "a", image="z.png"),
        "",
        '{"conversations": [',
        llava("<image><image>", "a", image="a.png"),
        llava("a", ""),
        llava("a", "b", "c"),
        llava("<image>", "a", image="broken.png"),
        "[1]",
        llava("<image>", "a", image="text.png"),
        GOOD,
    ]
    path.write_text(as_lines(rows))
    code, lines, _ = validate(capsys, path)
    assert code == 1
    expected = {
        2: "The image `z.png` is missing: there is no file",
        4: "Broken JSON: Expecting value (line 4)",
        5: "The questions have 2 place(s) for images",
        6: "The answer in message 2 is empty",
        7: "The last message must be an answer",
        8: "broken.png` cannot be read as an image",
        9: "A row must be a JSON object, got list",
        10: "text.png` cannot be read as an image",
    }
    assert [int(line.removeprefix(f"{path}:").partition(":")[0]) for line in lines[:-1]] == list(expected)
    for line, reason in zip(lines, expected.values(), strict=False):
        assert reason in line
    assert lines[-1] == "10 rows in 1 file, 8 bad."


@pytest.mark.parametrize("name", BAD_ROWS)
def test_every_bad_row_is_found(folder, capsys, name):
    path = folder / "rows.json"
    path.write_text(json.dumps([GOOD, BAD_ROWS[name][0]], indent=1))
    code, lines, _ = validate(capsys, path)
    assert code == 1
    assert len(lines) == 2
    line = next(
        number for number, text in enumerate(path.read_text().splitlines(), 1) if number > 2 and text[:2] == " {"
    )
    assert lines[0].startswith(f"{path}:{line}: ")


def test_several_files_and_a_folder_of_images(folder, capsys):
    other = folder / "data"
    other.mkdir()
    for number in range(2):
        (other / f"{number}.json").write_text(json.dumps([GOOD]))
    files = [other / "0.json", other / "1.json"]
    assert validate(capsys, *files)[0] == 1
    assert validate(capsys, *files, "--images", folder) == (0, ["2 rows in 2 files, none bad."], "")


def test_a_model_finds_rows_that_are_too_long(folder, capsys, root):
    path = folder / "rows.jsonl"
    path.write_text(as_lines([GOOD, llava("Hello", "word " * 200), llava("<image>", "a", image="broken.png")]))
    code, lines, _ = validate(capsys, path, "--model", root, "--max-length", 150)
    assert code == 1
    assert [line.removeprefix(f"{path}:").partition(":")[0] for line in lines[:-1]] == ["2", "3"]
    assert "tokens, `max_length` is 150" in lines[0]
    assert "cannot be read as an image" in lines[1]
    path.write_text(as_lines([llava("Hello", "word " * 5000)]))
    assert "`max_length` is 4096" in validate(capsys, path, "--model", root)[1][0]


def test_empty_files_are_bad(folder, capsys):
    for content in ("", "[]", "\n \n"):
        path = folder / "rows.json"
        path.write_text(content)
        code, lines, _ = validate(capsys, path)
        assert code == 1
        assert lines[0] == f"{path}:1: There is no row in this file."


def test_impossible_arguments_are_refused(folder, capsys):
    code, _, errors = validate(capsys, folder / "missing.json")
    assert code == 2
    assert "missing.json" in errors
    path = folder / "rows.json"
    path.write_text(json.dumps([GOOD]))
    code, _, errors = validate(capsys, path, "--max-length", 5)
    assert code == 2
    assert "`--model` must be given" in errors
    with pytest.raises(SystemExit):
        main([])


# --------------------------------------------------------------------------------------------------- JSON of all kinds
ROWS = [{"a": 1}, {"b": ['[{"', "}]", "\\", '\\"']}, {"c": {"d": [[], {}]}}, {"é": "猫\n"}]


@pytest.mark.parametrize("indent", [None, 0, 4])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b" \n\t"])
def test_arrays_are_read_in_any_layout(tmp_path, indent, mark):
    path = tmp_path / "rows.json"
    path.write_bytes(mark + json.dumps(ROWS, indent=indent, ensure_ascii=False).encode() + b"\n")
    rows = JsonRows(path)
    assert [rows.read(index) for index in range(len(rows))] == ROWS


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("end", [True, False])
def test_lines_are_read_in_any_layout(tmp_path, newline, end):
    path = tmp_path / "rows.json"
    path.write_bytes(newline.join(json.dumps(row).encode() for row in ROWS) + newline * 2 * end)
    rows = JsonRows(path)
    assert [rows.read(index) for index in range(len(rows))] == ROWS
    assert [rows.line(index) for index in range(len(rows))] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("content", "outcomes"),
    [
        ('[{"a": 1},\n{"a": },\n{"a": 3}]', [{"a": 1}, (2, "Broken JSON: Expecting value (line 2)"), {"a": 3}]),
        ('[{"a": 1}\n{"a": 2}]', [{"a": 1}, (2, "expected one `,`"), {"a": 2}]),
        ('[{"a": 1},\n,{"a": 2}]', [{"a": 1}, (2, "expected one `,`"), {"a": 2}]),
        ('[{"a": 1},\n null,\n{"a": 2}]', [{"a": 1}, (2, "expected one `,`"), {"a": 2}]),
        ('[1,\n{"a": 2}]', [(1, "expected one `,`"), {"a": 2}]),
        ('[{"a": 1},\n]', [{"a": 1}, (2, "expected one `,`")]),
        ('[{"a": 1}]\n]', [{"a": 1}, (2, "something follows")]),
        ('[{"a": 1}}\n]', [{"a": 1}, (1, "`}` closes the array")]),
        ('[{"a": 1},\n"text"]', [{"a": 1}, (2, "must be a JSON object, got str")]),
        ('[{"a": 1},\n[2]]', [{"a": 1}, (2, "must be a JSON object, got list")]),
        ('[{"a": 1},\n{"a": 2', [{"a": 1}, (2, "what begins here has no end")]),
        ('[{"a": 1},\n{"a": "2}]', [{"a": 1}, (2, "what begins here has no end")]),
        ('[{"a": 1}', [{"a": 1}, (1, "what begins here has no end")]),
        ('[{"a": 1,\n"b":\n!}]', [(1, "Broken JSON: Expecting value (line 3)")]),
        ('{"a": 1}\n{"a": \n{"a": 3}', [{"a": 1}, (2, "Broken JSON"), {"a": 3}]),
    ],
)
def test_broken_json_hides_no_other_row(tmp_path, content, outcomes):
    path = tmp_path / "rows.json"
    path.write_text(content)
    rows = JsonRows(path)
    assert len(rows) == len(outcomes)
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, dict):
            assert rows.read(index) == outcome
            continue
        assert rows.line(index) == outcome[0]
        with pytest.raises(UnusableRowError) as caught:
            rows.read(index)
        assert outcome[1] in str(caught.value)


def test_text_in_another_encoding_is_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "\xe9"}\n{"a": 1}\n')
    rows = JsonRows(path)
    with pytest.raises(UnusableRowError, match=r"Not UTF-8: .* at byte 7 of the file"):
        rows.read(0)
    assert rows.read(1) == {"a": 1}
