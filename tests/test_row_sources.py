"""Data of one's own: dialogues in parquet, folders and data sets of the Hub; pairs as rows of JSON and CSV files."""

import json
from pathlib import Path

import datasets
import fsspec
import pyarrow
import pytest
import torch
from pyarrow import parquet
from torch.utils.data import DataLoader

from internvl.rows import row_tables
from internvl.rows.json_rows import stream_json_rows
from internvl.rows.row_tables import open_rows
from internvl.training.__main__ import main
from internvl.training.data.dialogue_rows import read_dialogue
from internvl.training.data.dialogues import DialogueDataset, DialogueEncoder
from internvl.training.data.pairs import PairStream

from .fixtures_dialogues import llava
from .fixtures_pairs import png
from .test_dialogues import make_processor


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """`datasets` keeps what it reads below the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def stored(number: int, **changes) -> dict:
    """A row as data sets on the Hub store it: columns of all forms, those of others null."""
    content = [{"type": "image", "text": None}, {"type": "text", "text": f"What is {number}?"}]
    turns = [("user", content), ("assistant", [{"type": "text", "text": f"It is {number}."}])]
    messages = [{"role": role, "content": parts} for role, parts in turns]
    return {"messages": messages, "images": [{"bytes": png(number), "path": None}], "query": None, **changes}


ROWS = [stored(0), stored(1, images=[]), stored(2)]


def write_rows(path: Path, rows: list[dict]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


# ----------------------------------------------------------------------------------------------------------- dialogues
def as_parquet(folder: Path) -> str:
    return str(write_rows(folder / "rows.parquet", ROWS))


def as_folder(folder: Path) -> str:
    (folder / "set").mkdir()
    write_rows(folder / "set" / "train-00000.parquet", ROWS)
    return str(folder / "set")


def as_saved(folder: Path) -> str:
    table = datasets.Dataset.from_list(ROWS)
    table = table.cast_column("images", datasets.List(datasets.Image()))
    datasets.DatasetDict({"train": table.select([0]), "other": table}).save_to_disk(folder / "set")
    return f"{folder / 'set'}:other"


@pytest.mark.parametrize("write", [as_parquet, as_folder, as_saved])
def test_a_stored_row_is_that_of_json(tmp_path, write):
    source = write(tmp_path)
    rows = open_rows(source)
    assert [rows.line(index) for index in range(len(rows))] == [1, 2, 3]
    encoder = DialogueEncoder(make_processor())
    dataset = DialogueDataset(source, encoder)
    for index in (0, 2):
        expected = encoder({"query": f"What is {index}?", "response": f"It is {index}.", "images": [png(index)]})
        encoded = dataset[index]
        assert encoded.keys() == expected.keys()
        assert all(torch.equal(encoded[key], value) for key, value in expected.items())
    dataset[1]
    assert dataset.bad_rows.broken == 1
    assert "The questions have * place" in next(iter(dataset.bad_rows.reasons))


def test_a_name_is_a_data_set_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*arguments, **settings):
        asked.append((arguments, settings))
        return datasets.Dataset.from_list([stored(0), stored(1, images=[{"bytes": None, "path": "/etc/passwd"}])])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("owner/chat.v2", "owner/chat:test", "owner/chat:small:test"):
        rows = open_rows(name)
        assert str(rows.path) == name
    assert asked == [
        (("owner/chat.v2",), {"split": "train"}),
        (("owner/chat",), {"split": "test"}),
        (("owner/chat", "small"), {"split": "test"}),
    ]
    encoder = DialogueEncoder(make_processor())
    dataset = DialogueDataset("owner/chat", encoder)
    assert "pixel_values" in dataset[0]
    with pytest.raises(ValueError, match="`/etc/passwd` is a path, and its row belongs to no folder"):
        read_dialogue(rows.read(1), rows.folder)
    (tmp_path / "a.png").write_bytes(png())
    row = {**rows.read(1), "images": [{"bytes": None, "path": "a.png"}]}
    assert read_dialogue(row, tmp_path)[0]["content"][0]["image"] == str(tmp_path / "a.png")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(OSError, match="no file `owner/chat`, and no such data set can be read from the Hub: offline"):
        open_rows("owner/chat")
    for missing in (tmp_path / "none.jsonl", "data/none.jsonl", "data/none.parquet"):
        with pytest.raises(OSError, match="none"):
            open_rows(missing)
    assert len(asked) == 4


def test_a_row_that_cannot_be_read_is_told_by_its_number(tmp_path, capsys, monkeypatch):
    offsets = b"".join(number.to_bytes(4, "little") for number in (0, 1, 2, 200))
    texts = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"a\xff" + b"c" * 198)]
    )
    table = pyarrow.table({"query": texts, "response": ["a", "b", "c"]})
    path = tmp_path / "rows.parquet"
    parquet.write_table(table, path)
    monkeypatch.setattr(row_tables, "MAX_ROW_BYTES", 100)
    assert main(["validate", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{path}:2: The row cannot be read: 'utf-8' codec can't decode byte 0xff")
    assert lines[1].startswith(f"{path}:3: The row cannot be read: it has ")
    assert lines[2] == "3 rows in 1 file, 2 bad."


def test_sequences_of_objects_and_texts_of_two_sides_are_dialogues():
    expected = read_dialogue(llava("a", "b", "c", "d"))
    stored_turns = {"from": ["human", "gpt"] * 2, "value": ["a", "b", "c", "d"]}
    assert read_dialogue({"conversations": stored_turns}) == expected
    texts = [{"user": "a", "assistant": "b", "source": "x"}, {"user": "c", "assistant": "d", "source": "x"}]
    assert read_dialogue({"texts": texts, "images": []}) == expected
    with pytest.raises(ValueError, match="list of objects with `user` and `assistant`"):
        read_dialogue({"texts": ["a"]})


# --------------------------------------------------------------------------------------------------------------- pairs
NUMBERS = range(23)


def write_pairs(path: Path, numbers=NUMBERS) -> Path:
    images = path.parent / "images"
    images.mkdir(exist_ok=True)
    for number in numbers:
        (images / f"{number}.png").write_bytes(png(number))
    rows = [{"image": f"images/{n}.png", "caption": f'caption {n}, "quoted",\nover lines'} for n in numbers]
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        lines = [separator.join(["title", "filepath"])]
        for row in rows:
            quoted = row["caption"].replace('"', '""')
            lines.append(f'"{quoted}"{separator}{row["image"]}')
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    return path


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv"])
def test_rows_of_a_file_are_pairs_each_once_over_ranks_and_workers(tmp_path, ending):
    path = write_pairs(tmp_path / f"pairs.{ending}")
    seen, shares = [], []
    for rank in range(2):
        stream = PairStream(str(path), rank=rank, world_size=2, shuffle_buffer=3, epochs=1)
        pairs = list(DataLoader(stream, batch_size=None, num_workers=2))
        shares.append(len(pairs))
        seen += pairs
    assert min(shares) >= 10
    assert sorted(int(pair["text"].split(",")[0].split()[1]) for pair in seen) == list(NUMBERS)
    for pair in seen:
        number = int(pair["text"].split(",")[0].split()[1])
        assert pair["text"] == f'caption {number}, "quoted",\nover lines'
        assert pair["image"].getpixel((0, 0)) == (number, 0, 7)


@pytest.mark.parametrize("ending", ["json", "csv"])
def test_a_stream_of_rows_resumes(tmp_path, ending):
    path = write_pairs(tmp_path / f"pairs.{ending}")
    whole = [pair["key"] for pair in PairStream(str(path), shuffle_buffer=4, epochs=2)]
    assert len(whole) == 2 * len(NUMBERS)
    first = PairStream(str(path), shuffle_buffer=4, epochs=2)
    pairs = iter(first)
    begun = [next(pairs)["key"] for _ in range(30)]
    second = PairStream(str(path), shuffle_buffer=4, epochs=2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + [pair["key"] for pair in second] == whole


def test_images_lie_below_the_folder_that_is_given(tmp_path):
    (tmp_path / "texts").mkdir()
    path = write_pairs(tmp_path / "pairs.jsonl", range(2)).rename(tmp_path / "texts" / "pairs.jsonl")
    assert len(list(PairStream(str(path), images=tmp_path, epochs=1))) == 2
    with pytest.raises(ValueError, match=r"None of 2 samples .* 2 x The image \* is missing"):
        list(PairStream(str(path), epochs=1))


BAD_LINES = {
    "csv": ["a.png", 'a.png,"a",b', f'a.png,"{"b" * 200_000}"', "z.png,a", "a.png,\udcff", "a.png,"],
    "jsonl": ["{", "[1]", '{"caption": "a"}', '{"image": "z.png", "caption": "a"}', '{"image": "/etc/passwd"}'],
}


@pytest.mark.parametrize("ending", BAD_LINES)
def test_each_bad_line_of_a_file_is_counted_with_its_place(tmp_path, ending, caplog):
    (tmp_path / "a.png").write_bytes(png())
    head = "image,caption\n" if ending == "csv" else ""
    good = "a.png,good\n" if ending == "csv" else '{"image": "a.png", "text": "good"}\n'
    for number, line in enumerate(BAD_LINES[ending]):
        path = tmp_path / f"{number}.{ending}"
        path.write_text(head + good + line + "\n" + good, errors="surrogateescape")
        stream = PairStream(str(path), epochs=1)
        assert [pair["text"] for pair in stream] == ["good", "good"], line[:100]
        assert stream.bad_rows.broken == 1
        assert f"The last one: {path}:{3 if ending == 'csv' else 2}: " in caplog.text


def test_json_is_streamed_without_reading_it_whole(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1},\n{"a": },\n{"a": 3}, {"a": 4}]')
    lines = [(line, row if isinstance(row, dict) else str(row)) for line, row in stream_json_rows(path)]
    assert lines == [(1, {"a": 1}), (2, "Broken JSON: Expecting value (line 2)."), (3, {"a": 3}), (3, {"a": 4})]
    assert [row for _, row in stream_json_rows(path, 1, 3)][1:] == []
    assert [row for _, row in stream_json_rows(path, 0, 3)] == [{"a": 1}, {"a": 4}]


def test_the_funnel_and_addresses(tmp_path, capsys):
    path = write_pairs(tmp_path / "pairs.csv", range(3))
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps([{"column": "aspect_ratio", "comparison": "<=", "value": 5, "stage": 1, "why": ""}]))
    assert main(["funnel", str(path), "--stage", "1", "--rules", str(rules)]) == 0
    assert "3 of 3 pairs are kept" in capsys.readouterr().out
    fsspec.filesystem("memory").pipe("/pairs.jsonl", b"{}")
    with pytest.raises(ValueError, match="must lie on disk, as JSON"):
        PairStream("memory://pairs.jsonl")
