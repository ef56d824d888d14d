"""Rows of data that somebody else wrote: each bad one is counted and left out, or told in a line; none ends a run or
reads a file.
"""

import gzip
import io
import json
import os
import tarfile
import time
from pathlib import Path

import pytest

from internvl.rows.bad_rows import MAX_KINDS, BadRows, UnusableRowError
from internvl.rows.json_rows import JsonRows
from internvl.rows.pair_rows import MAX_CAPTION
from internvl.rows.row_tables import open_rows
from internvl.rows.shards import find_shards
from internvl.training.__main__ import main
from internvl.training.data.dialogues import read_dialogue
from internvl.training.data.filters import Filter, Funnel
from internvl.training.data.pairs import PairStream
from internvl.training.data.validate import find_invalid_rows

from .fixtures_dialogues import llava
from .fixtures_pairs import png, sample, write_parquet, write_tar


DEEP = "[" * 100_000 + "]" * 100_000


# ----------------------------------------------------------------------------------------------------------- dialogues
@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images inside of the data's folder, and one beside it."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for path in (folder / "a.png", folder / "images" / "b.png", tmp_path / "secret.png"):
        path.write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "inner.png").symlink_to(folder / "a.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    os.mkfifo(folder / "pipe.png")
    return folder


HOSTILE_ROWS = {
    "nested deeply": '{"conversations": ' + DEEP + "}",
    "objects nested deeply": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "a number of 5,000 digits": '{"query": "a", "response": "b", "id": ' + "9" * 5000 + "}",
    "a lone surrogate in a question": json.dumps(llava("\ud83d what?", "a")),
    "a lone surrogate in an answer": json.dumps(llava("what?", "a\udc00")),
    "a lone surrogate in the system message": json.dumps({**llava("what?", "a"), "system": "\udfff"}),
    "no UTF-8": b'{"query": "\xff", "response": "b"}',
    "a text of two megabytes": json.dumps(llava("what?", "word " * 400_000)),
    "an absolute path": json.dumps(llava("<image>", "a", image="/etc/passwd")),
    "a path to above": json.dumps(llava("<image>", "a", image="../secret.png")),
    "a link to above": json.dumps(llava("<image>", "a", image="link.png")),
    "a link to itself": json.dumps(llava("<image>", "a", image="circle.png")),
    "a pipe": json.dumps(llava("<image>", "a", image="pipe.png")),
    "a device": json.dumps(llava("<image>", "a", image="/dev/zero")),
    "a folder": json.dumps(llava("<image>", "a", image="images")),
    "NUL in a path": json.dumps(llava("<image>", "a", image="a\0.png")),
    "a surrogate in a path": json.dumps(llava("<image>", "a", image="\ud800.png")),
    "a path of a megabyte": json.dumps(llava("<image>", "a", image="a" * 2**20)),
    "an address of files": json.dumps(llava("<image>", "a", image="file:///etc/passwd")),
    "a number as image": json.dumps(llava("<image>", "a", image=5)),
    "true as image": json.dumps(llava("<image>", "a", image=True)),
    "lists as image": json.dumps(llava("<image>", "a", image=[[["a.png"]]])),
    "an object as image": json.dumps(llava("<image>", "a", image={"image": {"image": {}}})),
    "base64 of nothing": json.dumps(llava("<image>", "a", image={"base64": "!"})),
    "a number as messages": json.dumps({"messages": 5}),
    "null as message": json.dumps({"messages": [None, None]}),
    "a list as role": json.dumps({"messages": [{"role": ["user"], "content": "a"}]}),
    "an object as content": json.dumps({"messages": [{"role": "user", "content": {"text": "a"}}]}),
    "a number as text": json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}),
    "a number as history": json.dumps({"query": "a", "response": "b", "history": 5}),
    "a list as system": json.dumps({**llava("a", "b"), "system": [5]}),
}


@pytest.mark.parametrize("name", HOSTILE_ROWS)
def test_a_hostile_row_is_a_fault_of_its_own(name, folder, capsys):
    row = HOSTILE_ROWS[name]
    path, good = folder / "rows.jsonl", json.dumps(llava("<image>", "a", image="inner.png")).encode()
    path.write_bytes(good + b"\n" + (row if isinstance(row, bytes) else row.encode()) + b"\n" + good + b"\n")
    started = time.monotonic()
    assert main(["validate", str(path)]) == 1
    assert time.monotonic() - started < 5
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2, lines
    assert lines[0].startswith(f"{path}:2: ")
    assert len(lines[0]) < 1000
    assert lines[0].isprintable()
    with pytest.raises(ValueError, match=r"."):  # so does training, by the same functions
        read_row(path, 1)
    read_row(path, 0)


def read_row(path: Path, index: int) -> None:
    for message in read_dialogue(JsonRows(path).read(index), path.parent):
        for part in message["content"]:
            if part["type"] == "image":
                from internvl.image_loading_internvl import read_image

                read_image(part["image"], "An image", 10**6)


@pytest.mark.parametrize("source", ["a.png", "./a.png", "images/../a.png", "images/b.png", "inner.png"])
def test_images_below_the_folder_are_read_however_they_are_named(source, folder):
    for name in (source, str(folder / source)):
        messages = read_dialogue(llava("<image>", "a", image=name), folder)
        assert Path(messages[0]["content"][0]["image"]).read_bytes() == png()


def test_another_folder_is_allowed_by_saying_so(folder):
    row = llava("<image>", "a", image="data/link.png")
    assert read_dialogue(row, folder.parent)[0]["content"][0]["type"] == "image"


OTHER_FILES = {
    "parquet": (lambda path: write_parquet(path, [0, 1]), "is a parquet file"),
    "tar": (lambda path: write_tar(path, [sample(0)]), "is a tar archive"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"{}")), "is a gzip archive"),
    "image": (lambda path: path.write_bytes(png()), "is a PNG image"),
    "UTF-16": (lambda path: path.write_bytes('{"a": 1}'.encode("utf-16")), "is text in UTF-16"),
    "UTF-16 without a mark": (lambda path: path.write_bytes('{"a": 1}'.encode("utf-16-le")), "is a binary file"),
    "numbers": (lambda path: path.write_bytes(bytes(range(256)) * 9), "is a binary file"),
    "pipe": (os.mkfifo, "is no regular file"),
    "folder": (Path.mkdir, "doesn't contain any data files"),
    "damaged parquet": (
        lambda path: path.write_bytes(b"PAR1" + bytes(900)),
        "corrupted or this is not a parquet file",
    ),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_what_is_no_json_is_told_in_one_line(name, tmp_path, capsys):
    path = tmp_path / ("rows.parquet" if name == "damaged parquet" else "rows.json")
    make, message = OTHER_FILES[name]
    make(path)
    assert main(["validate", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_rows_beyond_the_limit_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("internvl.rows.json_rows.MAX_ROW_BYTES", 100)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a": "b" * 200}) + '\n{"a": 1}\n')
    rows = JsonRows(path)
    with pytest.raises(UnusableRowError, match="has 209 bytes, at most 100"):
        rows.read(0)
    assert rows.read(1) == {"a": 1}


def test_messages_for_a_terminal_hold_nothing_that_steers_it(folder):
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(llava("<image>", "a", image="\x1b[2J\u202e\r\nx.png")) + "\n")
    (fault,) = find_invalid_rows(JsonRows(path))
    assert str(fault).isprintable()
    assert r"\x1b[2J\u202e" in str(fault)


def test_the_kinds_of_faults_that_are_counted_apart_are_bounded():
    rows = BadRows(max_rate=1.0)
    for number in range(3 * MAX_KINDS):
        rows.count("a row", "fault " + chr(ord("a") + number % 26) * (1 + number // 26))
    assert len(rows.reasons) <= MAX_KINDS + 1
    assert rows.reasons.total() == 3 * MAX_KINDS


# --------------------------------------------------------------------------------------------------------------- pairs
HOSTILE_SAMPLES = {
    "metadata nested deeply": sample(1, json=DEEP.encode()),
    "metadata that is no object": sample(1, json=b"[1]"),
    "metadata with a number of 5,000 digits": sample(1, json=b'{"a": ' + b"9" * 5000 + b"}"),
    "a lone surrogate": sample(1, txt=None, json=json.dumps({"caption": "a\ud800"}).encode()),
    "no UTF-8": sample(1, txt=b"\xff\xfe"),
    "a caption of two megabytes": sample(1, txt=b"word " * 400_000),
    "a caption that is none": sample(1, txt=None, json=b'{"caption": 5}'),
    "any local file": sample(1, png=None, json=b'{"image": "/etc/passwd"}'),
    "a file above": sample(1, png=None, json=b'{"image": "../secret.png"}'),
    "a link to above": sample(1, png=None, json=b'{"image": "link.png"}'),
    "a file in an object": sample(1, png=None, json=b'{"image": {"path": "/etc/passwd"}}'),
    "a device": sample(1, png=None, json=b'{"image": "/dev/zero"}'),
    "a number as image": sample(1, png=None, json=b'{"image": 5}'),
    "a list as image": sample(1, png=None, json=b'{"image": ["a.png"]}'),
    "words as width": sample(1, json=b'{"width": "wide", "height": 4}'),
    "a list as height": sample(1, json=b'{"width": 4, "height": [4]}'),
    "an endless width": sample(1, json=b'{"width": ' + b"9" * 4000 + b', "height": 4}'),
}
FILTERS = (Filter("aspect_ratio", "<=", 5, 1, ""), Filter("caption_length", ">=", 1, 1, ""))


@pytest.mark.parametrize("name", HOSTILE_SAMPLES)
def test_a_hostile_sample_is_counted_and_left_out(name, folder, capsys):
    shard = write_tar(folder / "pairs.tar", [sample(0), HOSTILE_SAMPLES[name], sample(2)])
    stream = PairStream(str(shard), epochs=1, shuffle_buffer=1, funnel=Funnel(1, FILTERS))
    assert [pair["text"] for pair in stream] == ["caption 0", "caption 2"]
    assert stream.bad_rows.broken == 1
    rules = folder / "rules.json"
    rules.write_text(json.dumps([{"column": "aspect_ratio", "comparison": "<=", "value": 5, "stage": 1, "why": ""}]))
    assert main(["funnel", str(shard), "--stage", "1", "--rules", str(rules)]) == 0
    assert "2 of 2 pairs are kept (100.00%), 1 broken." in capsys.readouterr().out


def test_images_beside_a_local_shard_may_be_named(folder):
    row = sample(0, png=None, json=b'{"image": "images/b.png"}')
    shard = write_tar(folder / "pairs.tar", [row])
    (pair,) = PairStream(str(shard), epochs=1)
    assert pair["image"].size == (4, 4)


def test_captions_up_to_the_limit_are_read(tmp_path):
    shard = write_tar(
        tmp_path / "pairs.tar", [sample(0, txt=b"a" * MAX_CAPTION), sample(1, txt=b"a" * (MAX_CAPTION + 1))]
    )
    (pair,) = PairStream(str(shard), epochs=1)
    assert len(pair["text"]) == MAX_CAPTION


def write_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("kind", ["a file with a hole", "a sparse member"])
def test_a_member_of_64_gigabytes_is_left_out_at_once(kind, tmp_path):
    path, size = tmp_path / "big.tar", 64 * 2**30
    with path.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            write_member(archive, "0.png", png())
            write_member(archive, "0.txt", b"first")
            place = file.tell()
        file.seek(place)
        header = tarfile.TarInfo("1.png")
        header.size = size
        if kind == "a sparse member":
            header.size, header.type = 512, tarfile.GNUTYPE_SPARSE
            block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
            block[386:410] = b"00000000000\0" + b"00000001000\0"  # one piece: at 0, of 512 bytes
            block[483:495] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
            block[148:156] = b"        "
            block[148:156] = b"%06o\0 " % sum(block)
            file.write(bytes(block) + b"\0" * 512)
        else:
            file.write(header.tobuf(tarfile.GNU_FORMAT))
            file.seek(size, io.SEEK_CUR)
        with tarfile.open(fileobj=file, mode="w") as archive:
            write_member(archive, "1.txt", b"second")
            write_member(archive, "2.png", png())
            write_member(archive, "2.txt", b"third")
    started = time.monotonic()
    stream = PairStream(str(path), epochs=1, shuffle_buffer=1)
    assert [pair["text"] for pair in stream] == ["first", "third"]
    assert time.monotonic() - started < 5
    assert "too large" in next(iter(stream.bad_rows.reasons))


def test_names_and_attributes_of_members_are_bounded(tmp_path):
    path = tmp_path / "long.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        write_member(archive, "0.png", png())
        write_member(archive, "0.txt", b"first")
        write_member(archive, "1.txt", b"without an image, and not known to be whole")
        member = tarfile.TarInfo("2.txt")
        member.pax_headers = {"comment": "a" * 2**21}
        archive.addfile(member, io.BytesIO())
    stream = PairStream(str(path), epochs=1)
    assert [pair["text"] for pair in stream] == ["first"]
    assert "The shard is damaged" in next(iter(stream.bad_rows.reasons))


def test_a_sample_cannot_say_where_it_comes_from(folder):
    hostile = {**sample(0, png=None, json=b'{"image": "/etc/passwd"}'), "__shard__": b"/etc/x.tar", "__key__": b"x"}
    stream = PairStream(str(write_tar(folder / "pairs.tar", [hostile, sample(1)])), epochs=1)
    (pair,) = stream
    assert pair["shard"] == str(folder / "pairs.tar")
    assert stream.bad_rows.broken == 1


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["pipe", "folder"])
def test_a_shard_that_is_no_file_is_told(make, tmp_path):
    make(tmp_path / "pairs.tar")
    with pytest.raises(OSError, match="is no regular file, and no shard"):
        find_shards(str(tmp_path / "*.tar"))


@pytest.mark.parametrize("content", [b"PAR1" + bytes(99) + b"PAR1", b"PAR1" + b"\xff" * 99 + b"PAR1", b"text", b""])
def test_a_broken_parquet_file_is_told_by_its_name(content, tmp_path):
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises((OSError, ValueError), match=r"rows\.parquet"):
        open_rows(tmp_path / "rows.parquet")


def test_a_row_of_parquet_that_cannot_be_read_hides_no_other(tmp_path):
    import pyarrow
    from pyarrow import parquet

    texts = pyarrow.array([b"good", b"\xff", b"fine"], pyarrow.binary()).view(pyarrow.utf8())
    images = pyarrow.array([png()] * 3)
    parquet.write_table(pyarrow.table({"image": images, "caption": texts}), tmp_path / "pairs.parquet")
    stream = PairStream(str(tmp_path / "pairs.parquet"), epochs=1, shuffle_buffer=1)
    assert [pair["text"] for pair in stream] == ["good", "fine"]
    assert stream.bad_rows.broken == 1


# -------------------------------------------------------------------------------------------------------- command line
def test_a_rule_that_was_skipped_is_shown_as_skipped(tmp_path, capsys):
    shard = write_tar(tmp_path / "pairs.tar", [sample(30), sample(31, json=b'{"width": 4, "height": 4}')])
    rules = [
        {"column": "similarity", "comparison": ">=", "value": 0.2, "stage": 1, "why": ""},
        {"column": "watermark", "comparison": "<=", "value": 0.5, "stage": 1, "why": ""},
    ]
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    options = ["--rules", tmp_path / "rules.json", "--without", "watermark", "--without", "similarity"]
    assert (
        main([str(option) for option in ["funnel", shard, "--stage", 1, *options, "--output", tmp_path / "r.json"]])
        == 0
    )
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first.endswith("removed         0 ( 0.00%), 1 without a value passed")
    assert second.endswith("skipped: the data has no such column")
    report = json.loads((tmp_path / "r.json").read_text())
    assert [rule["skipped"] for rule in report["rules"]] == [False, True]
