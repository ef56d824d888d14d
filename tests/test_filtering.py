"""`filter` and `funnel`: whole columns are judged as one row after the other, in every format, and a run that was
stopped goes on."""

import csv
import json
import math
import random
import time

import pyarrow
import pytest
from pyarrow import parquet

from internvl.rows.bad_rows import TooManyBadRowsError
from internvl.rows.shards import read_shards
from internvl.training.__main__ import main
from internvl.training.data import filtering, pair_files
from internvl.training.data.caption_patterns import CAPTION_PATTERNS
from internvl.training.data.filters import (
    FILTERS,
    PAPER_PAIRS,
    PAPER_SOURCES,
    Filter,
    Funnel,
    MissingColumnError,
    metadata_row,
    paper_share,
    with_optional,
)

from .fixtures_pairs import sample, write_tar


WORDS = (
    "a red bus on busy street photo of the old house Vector art 2019 New York \u2014 na\u00efve Stra\u00dfe".split()
)
EDGES = (
    *("IMG_1234 is here now", "lorem ipsum one two", "click here to read", "Home | Shop | Contact | About us", "  "),
    *("<b>bold</b> text of it", "BIG RED BUSES FOR SALE NOW", "two words", "a photo of the", "the end is not\u2026"),
    *("\x1f a thing with blanks \x1c", "\u56fe\u7247 \u7f8e\u4e3d\u7684\u98ce\u666f", "bus bus bus bus bus bus"),
    *("12 34 56 78 90 99", "what the fuck is this", "Scunthorpe station in the rain", "it is bcdfghjk abc"),
    *("x" * 31 + " a b c", "image 12", "", "{a: 1} const x", "see https://a.b.c now", "a\x1db\x1dc d e"),
    *("K\u212anown click here\u017f", "\uff21\uff22 full width caption", "\u01c5 title case letters", "a" * 301),
    *("bus \U0001f600 street \U0001f600", "no image available", "a b c\n\nd e", "b " * 501, "x" * 20_001),
    *("blank at the end\u00a0", "oooooh a red bus", "next line\x85is here too"),
)


def random_rows(count, seed=0):
    """Rows with missing values, numbers on the border of rules, and edges of the rules on captions."""
    rng = random.Random(seed)

    def number(low, high, *borders):
        return rng.choice((None, math.nan, *borders)) if rng.random() < 0.1 else rng.uniform(low, high)

    def caption():
        if rng.random() < 0.7:
            return " ".join(rng.choices(WORDS, k=rng.randint(3, 15)))
        return rng.choice((None, *EDGES)) if rng.random() < 0.5 else f"{rng.choice(EDGES)} {rng.choice(WORDS)}"

    return [
        {
            "similarity": number(0.18, 0.6, 0.2, 0.28), "pwatermark": number(0, 0.6, 0.5, 0.95),
            "punsafe": number(0, 0.3, 0.5), "aesthetic": number(4, 8, 3, 4.5),
            "width": rng.choice((640, 640, 640, 2000, 224, 223, 64, 0, None)), "height": rng.choice((480, 225, 1.5)),
            "caption": caption(),
        }
        for _ in range(count)
    ]  # fmt: skip


def slow_loop(rows, stage, rules=FILTERS):
    """Numbers of the kept rows, the report, and how many rows are broken."""
    funnel, kept, broken = Funnel(stage, rules), [], 0
    for number, row in enumerate(rows):
        try:
            if funnel.keeps(metadata_row({**row, "__shard__": "a.parquet", "__key__": str(number)})):
                kept.append(number)
        except MissingColumnError:
            raise
        except ValueError:
            broken += 1
    return kept, funnel.report(), broken


def write_shard(path, rows):
    rows = [{**row, "number": number} for number, row in enumerate(rows)]
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=70)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        contents = [
            {"__key__": f"{row['number']:06d}", "json": json.dumps({**row, "caption": None}).encode()}
            | ({} if row["caption"] is None else {"txt": row["caption"].encode()})
            for row in rows
        ]
        with pair_files.pair_writer(path) as write:
            write(contents)
    return str(path)


def kept_numbers(folder):
    found = []
    for row in read_shards(sorted(str(file) for file in (folder / "pairs").iterdir())):
        found.append(int(row["number"] if "number" in row else json.loads(row["json"])["number"]))
    return found


def job(shards, output=None, **settings):
    return filtering.FilterJob(tuple(shards), output=None if output is None else str(output), **settings)


# ------------------------------------------------------------------------------------------------------------ the rows
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv", "tar"])
def test_the_rows_and_counts_are_those_of_a_slow_loop(tmp_path, ending, stage, monkeypatch):
    rows = random_rows(600, seed=stage)
    kept, report, broken = slow_loop(rows, stage)
    assert 30 < len(kept) < 500
    assert broken >= 5
    assert all(row["failing"] for row in report["rules"] if row["column"] not in ("unsafe", "watermark"))
    monkeypatch.setattr(filtering, "MAX_BATCH_ROWS", 64)
    monkeypatch.setattr(filtering, "ROWS_AT_ONCE", 50)
    shard = write_shard(tmp_path / f"a.{ending}", rows)
    found = filtering.filter_data(job([shard], tmp_path / "out", stage=stage, max_bad_rate=1))
    assert kept_numbers(tmp_path / "out") == kept
    assert found["rules"] == report["rules"]
    assert (found["seen"], found["kept"], found["broken"]) == (len(rows) - broken, len(kept), broken)
    counted = filtering.filter_data(job([shard], stage=stage, max_bad_rate=1))
    assert counted == found


def test_tables_are_judged_by_columns_and_not_row_by_row(tmp_path, monkeypatch):
    shard = write_shard(tmp_path / "a.parquet", random_rows(50))
    monkeypatch.setattr(filtering, "row_inputs", None)
    assert filtering.filter_data(job([shard], max_bad_rate=1))["seen"]


@pytest.mark.parametrize("wrong", [b"bytes", ["a list"], {"a": "struct"}, "a text", "1,5", "0x1"])
def test_values_of_a_wrong_type_are_broken_rows(tmp_path, wrong):
    row = {key: value for key, value in GOOD.items() if key != "similarity"}
    shard = write_shard(tmp_path / "a.parquet", [{**row, "similarity": wrong}, {**row, "similarity": None}])
    found = filtering.filter_data(job([shard], max_bad_rate=1))
    assert (found["seen"], found["broken"], found["rules"][0]["missing"]) == (1, 1, 1)


@pytest.mark.parametrize("text", ["0.35", " 3.5e-1", "+.35", "1e999", "35."])
def test_numbers_may_be_texts(tmp_path, text):
    shard = write_shard(tmp_path / "a.parquet", [{**GOOD, "similarity": text}])
    assert filtering.filter_data(job([shard]))["kept"] == Funnel(2).keeps({**GOOD, "similarity": text}) == 1


GOOD = {
    "similarity": 0.35, "pwatermark": 0.1, "punsafe": 0.01, "aesthetic": 6.0, "width": 640, "height": 480,
    "caption": "a red bus on a busy street",
}  # fmt: skip


def test_the_first_name_with_a_value_is_taken(tmp_path):
    rows = [
        {**GOOD, "similarity": None, "clip_similarity": 0.4},
        {**GOOD, "clip_similarity": 0.1},
        {**GOOD, "similarity": math.nan, "clip_similarity": 0.1},
    ]
    shard = write_shard(tmp_path / "a.parquet", rows)
    filtering.filter_data(job([shard], tmp_path / "out"))
    assert kept_numbers(tmp_path / "out") == [0, 1] == slow_loop(rows, 2)[0]


def test_rules_on_texts_of_a_table_of_ones_own(tmp_path):
    rows = [{**GOOD, "language": value} for value in ("en", "de", None, "fr ")]
    rules = [Filter("language", "has", "^(?:en|fr)$", 1, "mine"), Filter("language", "!=", "fr ", 2, "mine")]
    shard = write_shard(tmp_path / "a.parquet", rows)
    for stage in (1, 2):
        found = filtering.filter_data(job([shard], stage=stage, rules=tuple(rules)))
        assert found["kept"] == len(slow_loop(rows, stage, rules)[0]) == 3 - stage


def test_sizes_are_read_from_images_where_the_table_lacks_them(tmp_path):
    images = [sample(number)["png"] for number in range(3)]
    table = pyarrow.table({"image": [*images, b"no image"], "caption": ["a red bus on a street"] * 4})
    parquet.write_table(table, tmp_path / "a.parquet")
    rules = (Filter("shorter_side", ">=", 1, 1, "test"),)
    found = filtering.filter_data(job([str(tmp_path / "a.parquet")], tmp_path / "out", rules=rules))
    assert (found["kept"], found["broken"]) == (3, 1)
    assert parquet.read_table(tmp_path / "out" / "pairs" / "000000.parquet").equals(table.slice(0, 3))


def test_sizes_of_images_that_rows_name_are_read_below_the_folder_of_images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(sample(0)["png"])
    (tmp_path / "a.csv").write_text("image,caption\na.png,a red bus on a street\nb.png,a red bus on a street\n")
    shards, rules = [str(tmp_path / "a.csv")], (Filter("shorter_side", ">=", 1, 1, "test"),)
    for images, kept in ((str(folder), 1), (None, 0)):
        found = filtering.filter_data(job(shards, rules=rules, images=images, max_bad_rate=1))
        assert (found["kept"], found["broken"]) == (kept, 2 - kept)


# ----------------------------------------------------------------------------------------------------- bad captions
BAD_CAPTIONS = {
    "one or two words": ["bus", "red bus"],
    "a cut end": ["a photo of the", "a red bus...", "a red bus and its driver (", "a red bus \u2026"],
    "long words": ["see abcdefghijklmnopqrstuvwxyz0123456789 here"],
    "capitals alone": ["BIG RED BUSES FOR SALE"],
    "gibberish": [
        "this is sdfghjkl again",
        "a file IMG_2041 of it",
        "sooooooo many red buses",
        "id 00ff00ff00ff00ff here",
    ],
    "boilerplate": ["click here to see more", "Home > Shop > Bags > Red bags", "All rights reserved, the shop"],
    "offensive words": ["this fucking red bus", "XXX on a red bus"],
    "placeholders": ["lorem ipsum and so on", "no image available for it", "Image 12", "Your logo here, please"],
    "source code": ["<b>a red bus</b>", "a bus &amp; a car on it", "function() { return }", "the file bus-red.jpg"],
}
GOOD_CAPTIONS = (
    *("a red bus on a busy street", "Scunthorpe's shuttle bus, 1998", "The White House, Washington D.C."),
    *("\u56fe\u7247", "\u4e00\u8f86\u7ea2\u8272\u7684\u516c\u5171", "Ein roter Bus auf der Stra\u00dfe"),
    *('A sign that reads "LOG OFF" on a wall', "Men's 3-in-1 jacket, size XL", "An image of a cat (Felis catus)"),
    "USA: the NASA building at night",
)


def test_every_kind_of_bad_caption_is_found_by_its_pattern():
    assert set(BAD_CAPTIONS) == set(CAPTION_PATTERNS)
    for kind, captions in BAD_CAPTIONS.items():
        rule = Filter("caption", "lacks", CAPTION_PATTERNS[kind].expression, 1, "test")
        assert [text for text in captions if Funnel(1, [rule]).keeps({"caption": text})] == []


@pytest.mark.parametrize("caption", GOOD_CAPTIONS)
def test_good_captions_stay(caption):
    rules = [rule for rule in FILTERS if rule.stage == 2 and rule.column != "caption_length"]
    funnel = Funnel(2, rules)
    assert funnel.keeps({**GOOD, "caption": caption}), [r["name"] for r in funnel.report()["rules"] if r["failing"]]


def test_no_pattern_takes_long_for_a_hostile_caption():
    hostile = ["A" * 20_000 + "a", "<a " * 6_600, "| " * 10_000 + ".", "(" * 20_000, "a " * 10_000, "Ab" * 10_000]
    rules = [Filter("caption", "lacks", pattern.expression, 1, "test") for pattern in CAPTION_PATTERNS.values()]
    start = time.process_time()
    for caption in hostile:
        Funnel(1, rules).keeps({"caption": caption})
    assert time.process_time() - start < 5


def test_the_paper_s_sources_add_up_to_its_totals():
    for stage in (0, 1, 2):
        total = sum(counts[stage] for counts in PAPER_SOURCES.values())
        assert total == pytest.approx(PAPER_PAIRS[stage], rel=0.02)
    shares = {"laion-en": (84.3, 4.0), "coyo": (71.6, 26.8), "laion-multi": (85.0, 4.5), "wukong": (69.4, 69.4)}
    for source, printed in shares.items():
        assert [100 * paper_share(stage, source) for stage in (1, 2)] == pytest.approx(printed, abs=0.1)


# ------------------------------------------------------------------------------------------------------- the command
def shards_of(tmp_path, count=3):
    return [
        write_shard(tmp_path / f"{number}.parquet", [GOOD] * 4 + [{**GOOD, "similarity": 0}])
        for number in range(count)
    ]


def test_a_run_that_was_stopped_goes_on_with_the_next_shard(tmp_path, monkeypatch):
    shards, output = shards_of(tmp_path), tmp_path / "out"
    whole = filtering.filter_data(job(shards, tmp_path / "whole"))
    judge = filtering.judge_inputs
    calls = []

    def failing_judge(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return judge(*arguments)

    monkeypatch.setattr(filtering, "judge_inputs", failing_judge)
    with pytest.raises(KeyboardInterrupt):
        filtering.filter_data(job(shards, output))
    assert sorted(file.name for file in (output / "pairs").iterdir()) == ["000000.parquet"]
    assert filtering.filter_data(job(shards, output)) == whole
    assert len(calls) == 4
    assert kept_numbers(output) == kept_numbers(tmp_path / "whole") == [0, 1, 2, 3] * 3


def test_an_error_of_writing_is_not_taken_for_a_damaged_shard(tmp_path, monkeypatch):
    def full(self, pairs):
        raise OSError("no space left")

    monkeypatch.setattr(pair_files._ParquetWriter, "write", full)
    with pytest.raises(OSError, match="no space left"):
        filtering.filter_data(job(shards_of(tmp_path, 1), tmp_path / "out"))
    assert not list((tmp_path / "out" / "done").iterdir())


def test_a_damaged_shard_is_counted_and_the_others_are_read(tmp_path):
    shards = shards_of(tmp_path)
    (tmp_path / "1.parquet").write_bytes(b"PAR1 no table")
    found = filtering.filter_data(job(shards, tmp_path / "out"))
    assert (found["kept"], found["broken"]) == (8, 1)
    tallies = [{"removed": 0, "failing": 0, "missing": 0}] * len(FILTERS)
    count = filtering.ShardCount(10, 8, 1, tallies, {"damaged": 1})
    with pytest.raises(TooManyBadRowsError, match="1 of 11 rows"):
        filtering.filter_report(job(shards, max_bad_rate=0), [count])


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "tar"])
def test_a_job_that_misses_a_column_can_be_asked_for_again_without_it(kind, tmp_path):
    row = {"caption": "a caption", "similarity": 0.5}
    shard = write_shard(tmp_path / f"a.{kind}", [row] * 2)
    rules = tuple(Filter(column, ">=", 0.2, 1, "test") for column in ("similarity", "first", "second"))
    with pytest.raises(MissingColumnError, match="--without first --without second`"):
        filtering.filter_data(job([shard], tmp_path / "out", rules=rules))
    assert not (tmp_path / "out").exists()
    rules = with_optional(rules, ["first", "second"])
    assert filtering.filter_data(job([shard], tmp_path / "out", rules=rules))["kept"] == 2


def test_columns_may_come_with_later_rows(tmp_path):
    shard = tmp_path / "a.jsonl"
    rows = [{"caption": "a caption"}, {"caption": "a caption", "similarity": 0.5}]
    shard.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rules = (Filter("similarity", ">=", 0.2, 1, "test"),)
    assert filtering.filter_data(job([str(shard)], tmp_path / "out", rules=rules, max_bad_rate=1))["kept"] == 1


def test_another_job_in_the_same_folder_is_refused(tmp_path):
    shards = shards_of(tmp_path, 1)
    filtering.filter_data(job(shards, tmp_path / "out"))
    with pytest.raises(ValueError, match=r"other data or by other rules: .* other values of the rules, `--stage`\."):
        filtering.filter_data(job(shards, tmp_path / "out", stage=1))
    with pytest.raises(ValueError, match="other data or by other rules"):
        filtering.filter_data(job(shards, tmp_path / "out", images=str(tmp_path)))
    with pytest.raises(ValueError, match="is not empty"):
        filtering.filter_data(job(shards, tmp_path))


def test_the_command_writes_pairs_report_and_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    shards, output, plot = shards_of(tmp_path), tmp_path / "out", tmp_path / "plot.png"
    assert main(["filter", *shards, "--output", str(output), "--plot", str(plot), "--source", "coyo"]) == 0
    report = json.loads((output / "report.json").read_text())
    assert (report["kept"], report["seen"], report["source"]) == (12, 15, "coyo")
    assert report["paper_kept_share"] == pytest.approx(0.268, abs=1e-3)
    assert plot.stat().st_size > 5000
    assert "12 of 15 pairs are kept (80.00%), 0 broken.\nThe paper kept 26.77% of coyo." in capsys.readouterr().out


def test_kept_pairs_of_tar_files_are_read_by_training_as_before(tmp_path):
    shard = str(write_tar(tmp_path / "a.tar", [sample(number) for number in range(4)]))
    rules = (Filter("similarity", ">=", 0.02, 1, "test"),)
    report = filtering.filter_data(job([shard], tmp_path / "out", rules=rules))
    rows = list(read_shards([shard]))
    kept = [row for row in rows if Funnel(1, rules).keeps(metadata_row(row))]
    found = list(read_shards([str(tmp_path / "out" / "pairs" / "000000.tar")]))
    assert 0 < report["kept"] < 4
    assert [{**row, "__shard__": ""} for row in found] == [{**row, "__shard__": ""} for row in kept]
