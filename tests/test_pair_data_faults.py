"""`filter`, `score` and `dedup` over hostile tables and rules, in folders of several processes, and after kills."""

import datetime
import decimal
import json
import math
import os
from multiprocessing import get_context

import pyarrow
import pytest
from pyarrow import parquet

from internvl.training.data import dedup, pair_files
from internvl.training.data.filtering import FilterJob, filter_data
from internvl.training.data.filters import Filter


RULE = Filter("similarity", ">=", 0.2, 1, "a rule of these tests")
CAPTIONS = ["a first caption", "a second caption", "a third caption"]
SCORES = [0.1, 0.5, 0.6]


def table(path, **columns):
    given = {"caption": CAPTIONS, "similarity": SCORES, **columns}
    parquet.write_table(
        pyarrow.Table.from_arrays([pyarrow.array(value) for value in given.values()], list(given)), path
    )
    return path


def job(shard, folder, **settings):
    settings = {"max_bad_rate": 1.0, "rules": (RULE,), **settings}
    return FilterJob((str(shard),), 1, output=str(folder), **settings)


def kept(folder):
    return parquet.read_table(folder / "pairs" / "000000.parquet")["caption"].to_pylist()


FOREIGN = {
    "a time zone that does not exist": pyarrow.array([1, 2, 3], pyarrow.timestamp("ns", "Mars/Phobos")),
    "a list of wide decimals": pyarrow.array([[decimal.Decimal(1)]] * 3, pyarrow.list_(pyarrow.decimal256(60, 2))),
    "views of lists": pyarrow.array([[1.0]] * 3, pyarrow.list_view(pyarrow.float64())),
    "dates": pyarrow.array([datetime.date(2026, 1, 1)] * 3),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_column_of_a_foreign_type_breaks_only_what_reads_it(name, tmp_path):
    report = filter_data(job(table(tmp_path / "a.parquet", other=FOREIGN[name]), tmp_path / "beside"))
    assert (report["kept"], report["broken"]) == (2, 0)
    report = filter_data(job(table(tmp_path / "a.parquet", similarity=FOREIGN[name]), tmp_path / "compared"))
    assert (report["kept"], report["broken"]) == (0, 3)


@pytest.mark.parametrize(
    "columns",
    [
        {"similarity": pyarrow.array(map(decimal.Decimal, ("0.1", "0.5", "0.6")), pyarrow.decimal256(60, 2))},
        {"caption": pyarrow.array(CAPTIONS).cast(pyarrow.string_view())},
    ],
    ids=["wide decimals", "string views"],
)
def test_types_that_a_library_lacks_are_judged_and_written(columns, tmp_path):
    filter_data(job(table(tmp_path / "a.parquet", **columns), tmp_path / "out"))
    assert kept(tmp_path / "out") == CAPTIONS[1:]


def test_a_shard_with_a_column_twice_is_damaged(tmp_path, caplog):
    arrays = [pyarrow.array(CAPTIONS), pyarrow.array(SCORES), pyarrow.array(SCORES)]
    twice = pyarrow.Table.from_arrays(arrays, ["caption", "similarity", "similarity"])
    parquet.write_table(twice, tmp_path / "a.parquet")
    report = filter_data(job(tmp_path / "a.parquet", tmp_path / "out"))
    assert report["reasons"] == {"The shard is damaged": 1}
    assert "The shard is damaged: two columns have the name `similarity`" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"column": ["similarity"]}, "`column` must be a text"),
        ({"why": None}, "`why` must be a text"),
        ({"is_optional": "false"}, "`is_optional` must be true or false"),
        ({"stage": True}, "`stage` must be one of"),
        ({"value": math.nan}, "`value` must be a finite number"),
        ({"value": 10**400}, "`value` must be a finite number"),
    ],
)
def test_rules_of_wrong_types_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Filter(**{"column": "similarity", "comparison": ">=", "value": 1, "stage": 1, "why": "", **changes})


@pytest.mark.parametrize("pattern", ["(?<=a)b", r"(a)\1", "(?P<a>x)(?P<a>y)"])
def test_a_pattern_that_columns_cannot_be_searched_for_is_refused_before_anything_is_read(pattern, tmp_path):
    rules = (Filter("caption", "has", pattern, 1, "a rule of these tests"),)
    with pytest.raises(ValueError, match="is not for whole columns: regex"):
        filter_data(job(table(tmp_path / "a.parquet"), tmp_path / "out", rules=rules))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["data", "images"])
def test_a_run_does_not_go_on_with_other_data_under_the_same_name(change, tmp_path):
    shard = table(tmp_path / "a.parquet")
    filter_data(job(shard, tmp_path / "out"))
    assert filter_data(job(shard, tmp_path / "out"))["kept"] == 2
    if change == "data":
        table(shard, similarity=[0.5, 0.6, 0.1])  # of the same size
    with pytest.raises(ValueError, match="holds pairs of other data or by other rules"):
        filter_data(job(shard, tmp_path / "out", images=str(tmp_path) if change == "images" else None))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"seen": 1}'])
def test_a_count_that_a_crash_damaged_is_made_again(content, tmp_path):
    shard = table(tmp_path / "a.parquet")
    expected = filter_data(job(shard, tmp_path / "out"))
    (tmp_path / "out" / "done" / "000000.json").write_text(content)
    assert filter_data(job(shard, tmp_path / "out")) == expected


def test_what_a_kill_left_of_the_description_is_in_no_way(tmp_path):
    shard = table(tmp_path / "a.parquet")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".filter.json.1").write_text("{")
    assert filter_data(job(shard, tmp_path / "out"))["kept"] == 2


@pytest.mark.parametrize("content", ["", "{", "3"])
def test_a_description_that_a_crash_damaged_is_no_other_job(content, tmp_path):
    (tmp_path / "filter.json").write_text(content)
    with pytest.raises(ValueError, match=r"filter\.json` is damaged"):
        filter_data(job(table(tmp_path / "a.parquet"), tmp_path))


def begin(folder, content, start):
    start.wait()
    try:
        pair_files.begin_output(folder, "job.json", {"content": content})
    except ValueError as error:
        os._exit(3 if "other data" in str(error) else 4)


@pytest.mark.parametrize("contents", [("a", "a", "a", "a"), ("a", "b", "a", "b")], ids=["the same", "others"])
def test_processes_may_begin_a_folder_at_the_same_time(contents, tmp_path):
    context = get_context("fork")
    for number in range(10):
        start = context.Event()
        folder = tmp_path / str(number)
        processes = [context.Process(target=begin, args=(folder, content, start)) for content in contents]
        for process in processes:
            process.start()
        start.set()
        for process in processes:
            process.join()
        first = json.loads((folder / "job.json").read_text())["content"]
        assert [process.exitcode for process in processes] == [0 if content == first else 3 for content in contents]
        assert sorted(entry.name for entry in folder.iterdir()) == ["done", "job.json", "pairs"]


def test_begun_at_once_even_by_a_process_that_looked_before_the_others_wrote(tmp_path, monkeypatch):
    link, description = os.link, {"content": "a"}

    def slow_link(source, target):
        target.write_text(json.dumps({"content": "b"}))
        link(source, target)

    monkeypatch.setattr(os, "link", slow_link)
    with pytest.raises(ValueError, match="holds pairs of other data"):
        pair_files.begin_output(str(tmp_path), "job.json", description)


def test_dedup_keeps_no_part_of_a_shard_that_a_network_cut_off(tmp_path, monkeypatch):
    rows = [
        {"__shard__": "hf://a.tar", "__key__": "a", "png": b""},
        {"__shard__": "hf://a.tar", "__key__": "", "__fault__": "The shard is damaged: no route to host"},
    ]
    for module in (dedup, pair_files):
        monkeypatch.setattr(module, "read_shards", lambda shards: iter(rows))
    with pytest.raises(OSError, match=r"no route to host\. Try again"):
        dedup.dedup_data(dedup.DedupJob(("hf://a.tar",), str(tmp_path / "out"), max_bad_rate=1.0))
    assert not list((tmp_path / "out").glob("fingerprints/*"))
    with pytest.raises(OSError, match=r"no route to host\. Try again"):
        pair_files.copy_rows("hf://a.tar", {0}, lambda rows: None)
