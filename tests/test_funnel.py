"""The data funnel: rules as a table, what each removes, and what data without a column means."""

import json
import math

import pytest

from internvl.rows.bad_rows import BadRows
from internvl.training.__main__ import main
from internvl.training.data.filters import (
    COLUMNS,
    DERIVED,
    FILTERS,
    PAPER_PAIRS,
    Filter,
    Funnel,
    MissingColumnError,
    metadata_rows,
    read_filters,
    with_optional,
)
from internvl.training.data.plots import plot_report

from .fixtures_pairs import sample, write_tar


GOOD = {
    "similarity": 0.35, "pwatermark": 0.1, "punsafe": 0.01, "aesthetic": 6.0, "width": 640, "height": 480,
    "caption": "a red bus on a busy street",
}  # fmt: skip
BAD = {
    "similarity": {"similarity": 0.1},
    "watermark": {"pwatermark": 0.99},
    "unsafe": {"punsafe": 0.99},
    "aesthetic": {"aesthetic": 1.0},
    "shorter_side": {"width": 50},
    "aspect_ratio": {"width": 6000},
    "caption_length": {"caption": "a"},
}


def slow_funnel(rows, rules):
    """Every row asks every rule: no early exit, no shared state, no aliases."""
    compare = {">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b}
    removed = [0] * len(rules)
    kept = []
    for row in rows:
        failed = [i for i, rule in enumerate(rules) if not compare[rule.comparison](row[rule.column], rule.value)]
        if failed:
            removed[failed[0]] += 1
        else:
            kept.append(row)
    return kept, removed


# ---------------------------------------------------------------------------------------------------------- the table
def test_every_rule_of_the_table_says_why_and_is_on_a_known_column():
    for rule in FILTERS:
        assert rule.column in {*COLUMNS, *DERIVED}
        assert len(rule.why) > 20
    assert {rule.column for rule in FILTERS if rule.stage == 1} == set(BAD)
    of_captions = {"caption", "symbol_share", "distinct_word_share"}
    assert {rule.column for rule in FILTERS if rule.stage == 2} == set(BAD) | of_captions


def test_stage_2_is_stricter_in_every_column():
    first, second = ({(r.column, r.comparison): r.value for r in FILTERS if r.stage == stage} for stage in (1, 2))
    assert set(first) <= set(second)
    for (column, comparison), value in first.items():
        assert (second[column, comparison] > value) == (comparison == ">=")


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("column", BAD)
def test_each_column_can_remove_a_row(stage, column):
    funnel = Funnel(stage)
    assert funnel.keeps(GOOD)
    assert not funnel.keeps({**GOOD, **BAD[column]})
    (rule,) = [row for row in funnel.report()["rules"] if row["removed"]]
    assert rule["column"] == column
    assert rule["stage"] == 1


def test_stage_1_keeps_what_stage_2_removes():
    row = {**GOOD, "similarity": 0.22, "caption": "bus.jpg"}
    assert Funnel(1).keeps(row)
    assert not Funnel(2).keeps(row)


@pytest.mark.parametrize(
    ("comparison", "kept"),
    [(">=", [2, 3]), ("<=", [1, 2]), (">", [3]), ("<", [1]), ("==", [2]), ("!=", [1, 3])],
)
def test_comparisons(comparison, kept):
    funnel = Funnel(1, [Filter("score", comparison, 2, 1, "test")])
    assert [row["score"] for row in funnel({"score": score} for score in (1, 2, 3))] == kept


# ---------------------------------------------------------------------------------------------------------- the report
def test_the_report_equals_a_slow_count():
    rules = [Filter("a", ">=", 3, 1, "test"), Filter("b", "<=", 6, 1, "test"), Filter("a", ">=", 5, 2, "test")]
    rows = [{"a": a, "b": b} for a in range(10) for b in range(9)]
    funnel = Funnel(2, rules)
    kept, removed = slow_funnel(rows, rules)
    assert list(funnel(rows)) == kept
    report = funnel.report()
    assert [row["removed"] for row in report["rules"]] == removed
    assert [row["failing"] for row in report["rules"]] == [27, 20, 45]
    assert report["rules"][-1]["left"] == report["kept"] == len(kept)
    assert report["kept_share"] == len(kept) / len(rows)
    assert [row["removed_share"] for row in report["rules"]] == [count / len(rows) for count in removed]
    assert json.loads(json.dumps(report)) == report


def test_rules_of_later_stages_are_left_out_and_earlier_ones_come_first():
    rules = [Filter("a", ">=", 5, 2, "test"), Filter("a", ">=", 3, 1, "test")]
    assert [rule.value for rule in Funnel(1, rules).rules] == [3]
    assert [rule.value for rule in Funnel(2, rules).rules] == [3, 5]


def test_the_report_holds_the_paper_s_share():
    assert Funnel(1).report()["paper_kept_share"] == pytest.approx(4.98 / 6.03)
    assert Funnel(2).report()["paper_kept_share"] == pytest.approx(1.03 / 6.03)
    assert PAPER_PAIRS[0] == 6.03e9


def test_an_empty_stream_has_a_report(tmp_path):
    pytest.importorskip("matplotlib")
    report = Funnel(2).report()
    assert report["kept_share"] == 0
    plot_report(report, tmp_path / "empty.png")


def test_the_plot_is_a_image(tmp_path):
    pytest.importorskip("matplotlib")
    funnel = Funnel(2)
    for changes in BAD.values():
        funnel.keeps({**GOOD, **changes})
    for name in ("a.png", "a.svg"):
        plot_report(funnel.report(), tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000


# ----------------------------------------------------------------------------------------------------- missing columns
def test_a_missing_column_is_an_error_that_names_it():
    row = {key: value for key, value in GOOD.items() if key != "pwatermark"}
    with pytest.raises(
        MissingColumnError, match=r"watermark <= 0.95.*column `watermark`.*pwatermark.*similarity.*--without watermark"
    ):
        Funnel(1).keeps(row)


def test_an_optional_rule_passes_and_counts_rows_without_its_column():
    row = {key: value for key, value in GOOD.items() if key not in ("pwatermark", "height")}
    funnel = Funnel(1, with_optional(FILTERS, ["watermark", "shorter_side", "aspect_ratio"]))
    assert funnel.keeps(row)
    assert [rule["column"] for rule in funnel.report()["rules"] if rule["missing"]] == [
        "watermark", "shorter_side", "aspect_ratio",
    ]  # fmt: skip


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_missing_value_removes_the_row_unless_the_rule_is_optional(value):
    row = {**GOOD, "similarity": value}
    for rules, passes in ((FILTERS, False), (with_optional(FILTERS, ["similarity"]), True)):
        funnel = Funnel(1, rules)
        assert funnel.keeps(row) is passes
        assert funnel.report()["rules"][0]["missing"] == 1


@pytest.mark.parametrize("column", ["similarity", "watermark", "unsafe", "aesthetic", "width", "height", "caption"])
def test_every_usual_name_of_a_column_is_known(column):
    for name in COLUMNS[column]:
        value = GOOD[next(alias for alias in COLUMNS[column] if alias in GOOD)]
        row = {key: item for key, item in GOOD.items() if key not in COLUMNS[column]}
        assert Funnel(2).keeps({**row, name: value})


# ----------------------------------------------------------------------------------------------------- faulty tables
@pytest.mark.parametrize(
    ("changes", "match"),
    [({"comparison": "~"}, "`comparison` must be one of"), ({"stage": 3}, "`stage` must be one of")],
)
def test_impossible_rules_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        Filter(**{"column": "a", "comparison": ">=", "value": 1, "stage": 1, "why": "test", **changes})


def test_impossible_stages_and_columns_are_refused():
    with pytest.raises(ValueError, match="`stage` must be one of"):
        Funnel(3)
    with pytest.raises(ValueError, match="No rule is on sharpness; the table knows similarity, watermark"):
        with_optional(FILTERS, ["sharpness"])


def test_tables_are_read_from_json(tmp_path):
    file = tmp_path / "rules.json"
    rule = {"column": "similarity", "comparison": ">=", "value": 0.3, "stage": 2, "why": "mine", "is_optional": True}
    file.write_text(json.dumps([rule]))
    assert read_filters(file) == (Filter(**rule),)
    for content, match in (
        ({}, "list of objects"),
        ([{"column": "a"}], "must have the fields column, comparison, stage, value, why, may .*, and has column"),
        ([{**rule, "source": "mine"}], "and has .*source"),
        ([{**rule, "stage": 9}], "Filter 1 of"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=match):
            read_filters(file)


# --------------------------------------------------------------------------------------------------------- the command
def write_pairs(folder, count=20):
    samples = []
    for number in range(count):
        metadata = {**GOOD, "similarity": number / count}
        del metadata["caption"]
        samples.append(sample(number, json=json.dumps(metadata).encode(), txt=b"a caption that is long enough"))
    return str(write_tar(folder / "a.tar", [*samples, sample(count, txt=b"")]))


def test_the_command_reports_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = write_pairs(tmp_path)
    report, plot = tmp_path / "report.json", tmp_path / "plot.png"
    assert main(["funnel", path, "--stage", "1", "--output", str(report), "--plot", str(plot)]) == 0
    saved = json.loads(report.read_text())
    assert (saved["seen"], saved["kept"], saved["broken"]) == (20, 16, 1)
    assert plot.stat().st_size > 5000
    assert "16 of 20 pairs are kept (80.00%), 1 broken." in capsys.readouterr().out


@pytest.mark.parametrize("command", ["filter", "dedup", "prepare"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plot.doc", "must end in one of "),
        ("plot", "must end in one of "),
        ("plot.pgf", "must end in one of "),
        (f"{'p' * 246}.png", "File name too long"),
        ("a.tar/plot.png", "cannot be written"),
    ],
)
def test_a_plot_that_cannot_be_drawn_is_refused_before_there_is_work_to_lose(command, name, message, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, output = write_pairs(tmp_path), tmp_path / "out"
    model = ["--model", "nowhere"] if command == "prepare" else []
    assert main([command, path, "--output", str(output), *model, "--plot", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("command", ["funnel", "filter", "dedup", "prepare"])
def test_a_plot_does_not_take_the_place_of_the_output(command, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, output = write_pairs(tmp_path), tmp_path / "same.png"
    model = ["--model", "nowhere"] if command == "prepare" else []
    assert main([command, path, "--output", str(output), *model, "--plot", f"{tmp_path}/./same.png"]) == 2
    assert "`--plot` and `--output` are both" in capsys.readouterr().err
    assert not output.exists()


def test_a_plot_gets_the_folder_that_it_names(tmp_path):
    pytest.importorskip("matplotlib")
    plot_report(Funnel(2).report(), tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").stat().st_size > 5000


def test_the_command_says_which_column_is_missing(tmp_path, capsys):
    path = str(write_tar(tmp_path / "a.tar", [sample(90)]))
    assert main(["funnel", path]) == 2
    assert "finds no column `watermark`" in capsys.readouterr().err
    without = [word for column in ("watermark", "unsafe", "aesthetic") for word in ("--without", column)]
    assert main(["funnel", path, "--stage", "1", *without]) == 0


def test_metadata_is_read_where_there_are_no_images(tmp_path):
    path = str(write_tar(tmp_path / "a.tar", [sample(0, png=None)]))
    (row,) = metadata_rows([path], BadRows())
    assert (row["caption"], row["similarity"]) == ("caption 0", 0)
