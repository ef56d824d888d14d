"""The benchmarks: what a row says, what is counted and refused, and that every topic runs, at tiny sizes.

No time is checked here: figures of a tiny run mean nothing.
"""

import dataclasses
import importlib
import json
import math
import os
import sys
import time
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from internvl.benchmarks import __main__ as command
from internvl.benchmarks import harness
from internvl.benchmarks.harness import Options, Row, sizes_of

from . import tiny
from .test_quantization import chat, contrastive


VISION = {key: value for key, value in tiny.VISION.items() if key != "initializer_factor"}
TEXT = {
    "vocab_size": 99,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Constants of a topic that set how much it does.
TINY = {
    "vision": {
        "SIZES": VISION,
        "FEATURE_SIZES": {**VISION, "num_hidden_layers": 4},
        "BATCHES": {1: 2, 2: 2},
        "FEATURE_TILES": 2,
    },
    "chat": {
        "VISION": VISION,
        "TEXT": TEXT,
        "CONVERSATION_VISION": VISION,
        "CONVERSATION_TEXT": TEXT,
        "NEW_TOKENS": 3,
        "QUESTION": 4,
        "PROMPT": 5,
        "BATCH_PROMPTS": (2, 5, 3),
        "TURNS": 2,
        "TILES": (2, 1),
    },
    "loading": {"VISION": VISION, "TEXT": TEXT, "SHARD": "50KB"},
    "memory": {"VISION": VISION, "TEXT": TEXT},
    "pairs": {
        "SIZES_BY_NAME": {"tiny": (((40, 30), (30, 50)), 28)},
        "SHARDS": 1,
        "PAIRS_OF_SHARD": 8,
        "BATCH_SIZE": 4,
        "PEERS": (),
    },
    "image_embeddings": {"VISION": sizes_of(32, 64, 2, 4), "SIDE": 28, "WIDTH": 8, "NUM_IMAGES": 3, "BATCH_SIZE": 2},
    "funnel": {"COUNT": 2000, "FEW": 100, "MANY": 400, "NUM_IMAGES": 3, "NUM_NEAR": 5},
    "fine_tuning": {
        "VISION": VISION,
        "TEXT": TEXT,
        "TOKENS_PER_TILE": 4,
        "TILES": 2,
        "TOKENS": 20,
        "ANSWER": 5,
        "ROUNDS": 1,
    },
    "images": {"SIZES": ((40, 30), (80, 30)), "LARGE": (60, 60), "SIDE": 28, "MAX_TILES": 2},
    "connectors": {"IMAGE_SIZE": 28, "SHARE_OF_LAYERS": 1, "TILES": {"two": 2}, "TEXT_TOKENS": 5},
    "search": {"COUNT": 300, "SIZE": 32, "BLOCK": 128, "NUM_QUERIES": 5, "NUM_SCENES": 3},
}


@pytest.fixture
def small(monkeypatch):
    """Small sizes for a topic, and a compiler that is not there unless asked for: generating code takes long."""

    def use(topic: str, compiles: bool = False):
        monkeypatch.setitem(harness.PRODUCT_SIZES, "cpu", 64)
        module = importlib.import_module(f"internvl.benchmarks.{topic}")
        for name, value in TINY.get(topic, {}).items():
            assert hasattr(module, name)
            monkeypatch.setattr(module, name, value)
        if not compiles and hasattr(module, "no_compiler"):
            monkeypatch.setattr(module, "no_compiler", lambda device: "no compiler")
        return module

    return use


# --------------------------------------------------------------------------------------------------------------- a row
@pytest.mark.parametrize(
    ("ratio", "target", "is_lower_better", "is_met"),
    [
        (1.1, 1.0, False, True),
        (1.0, 1.0, False, True),
        (0.9, 1.0, False, False),
        (0.9, 1.0, True, True),
        (1.0, 1.0, True, True),
        (1.1, 1.0, True, False),
        (1.1, None, False, None),
        (None, 1.0, False, None),
    ],
)
def test_a_target_is_a_bound_from_the_side_that_the_row_names(ratio, target, is_lower_better, is_met):
    assert Row("row", ratio=ratio, target=target, is_lower_better=is_lower_better).is_met is is_met


def test_a_ratio_is_the_median_of_those_of_the_rounds_and_lies_in_their_interquartile_range():
    """The ratio of the medians, which may come from different rounds, would be 1."""
    row = harness.row_of("row", {"ours": [1.0, 2.0, 4.0], "peer": [2.0, 7.0, 2.0]}, target=2.5, note="kept")
    assert row.ratio == 2.0
    assert row.spread == (1.25, 2.75)  # of 2, 3.5 and 0.5
    assert row.is_met is False
    assert row.details == {"note": "kept", "median_seconds": {"ours": 2.0, "peer": 2.0}, "rounds": 3}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 15])
def test_no_ratio_lies_beside_its_interquartile_range(seed, rounds):
    seconds = torch.rand((2, rounds), generator=torch.Generator().manual_seed(seed)).add(0.1).tolist()
    row = harness.row_of("row", dict(zip(("ours", "peer"), seconds, strict=True)), scale=3.0)
    low, high = row.spread
    assert low <= row.ratio <= high


def test_one_round_is_its_own_interquartile_range():
    assert harness.interquartile_range([2.0]) == (2.0, 2.0)


def test_a_share_is_that_of_the_rate_of_the_matrix_product(monkeypatch):
    monkeypatch.setitem(harness.PRODUCT_SIZES, "cpu", 10)  # 2000 FLOPs
    seconds = {"call": [4.0, 4.0], "product": [1.0, 1.0]}
    row = harness.share_row("row", seconds, "call", 6000, 0.7, device="cpu")
    assert row.ratio == 0.75
    assert row.is_met


def test_calls_interleave_and_the_one_that_goes_first_changes():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    seconds = harness.interleave(calls, Options(rounds=2), warmups=1)
    assert "".join(order) == "baabba"  # the first round is not counted
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_long_calls_take_at_most_the_rounds_that_were_asked_for():
    assert Options(rounds=9).at_most(5).rounds == 5
    assert Options(rounds=3).at_most(5).rounds == 3


def test_seconds_are_those_of_the_call():
    assert harness.seconds_of(lambda: time.sleep(0.02)) >= 0.02


def test_threads_that_end_meanwhile_do_not_keep_the_others_from_one_core(monkeypatch):
    cores, listdir = os.sched_getaffinity(0), os.listdir
    ended = 2**22 + 1  # above the largest number of a thread
    monkeypatch.setattr(harness.os, "listdir", lambda path: [str(ended), *listdir(path)])
    with harness.one_core():
        assert os.sched_getaffinity(0) == {min(cores)}
    assert os.sched_getaffinity(0) == cores


def test_results_that_differ_are_not_compared():
    ours = torch.ones(3)
    assert harness.require_equal(ours, ours) == 0.0
    assert harness.require_equal(torch.zeros(3), torch.zeros(3)) == 0.0
    for other in (ours + 0.01, ours * float("nan"), torch.ones(1)):
        with pytest.raises(SystemExit, match="nothing to compare"):
            harness.require_equal(ours, other)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(harness.shutil, "which", lambda name: None)
    assert "g++" in harness.no_compiler("cpu")
    monkeypatch.setattr(harness.shutil, "which", lambda name: f"/bin/{name}")
    assert harness.no_compiler("cpu") is None


def test_a_fresh_process_that_fails_says_why():
    assert harness.in_fresh_process(math.gcd, 12, 18) == 6
    with pytest.raises(RuntimeError, match=r"`math.sqrt` failed:\n(.|\n)*ValueError"):
        harness.in_fresh_process(math.sqrt, -1)


def growth_by_64_mb_beyond_that_by_nothing() -> int:
    # glibc never serves so much from memory that the process has kept, which would be resident before.
    return harness.memory_growth(lambda: torch.ones(2**24).sum()) - harness.memory_growth(lambda: None)


def test_memory_grows_by_what_a_call_held_though_it_gave_it_back_and_not_by_what_others_did():
    # As the rows do: in a process where no other thread gives back memory in the meantime.
    assert 32 * 2**20 < harness.in_fresh_process(growth_by_64_mb_beyond_that_by_nothing) < 96 * 2**20


def test_a_result_names_the_processor_and_what_it_stands_in_for(monkeypatch):
    for name in harness.STAND_INS:
        monkeypatch.delenv(name, raising=False)
    found = harness.versions()["processor"]
    assert found["name"]
    assert found["kernels"] == torch.backends.cpu.get_cpu_capability()
    assert found["stands_in_by"] == {}
    assert harness.describe_processor() == f"{found['name']}, {found['kernels']} kernels"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert harness.describe_processor().endswith("kernels (stands in by ONEDNN_MAX_CPU_ISA=AVX2)")


# ----------------------------------------------------------------------------------------------------------- the table
def test_the_table_names_the_target_and_whether_it_is_reached():
    rows = [
        Row("fast", ratio=2.0, target=1.5, spread=(1.75, 2.25)),
        Row("large", ratio=2.0, target=1.5, is_lower_better=True),
        Row("reported", ratio=0.1234),
        Row("short", ratio=0.00879, target=0.1, is_lower_better=True, spread=(0.0087, 0.0091)),
        Row("absent", skipped="no device"),
    ]
    assert command.format_table(rows).splitlines()[2:] == [
        "| fast | 2 | 1.75 to 2.25 | >= 1.5 | yes |",
        "| large | 2 | - | <= 1.5 | no |",
        "| reported | 0.123 | - | - | reported |",
        "| short | 0.00879 | 0.0087 to 0.0091 | <= 0.1 | yes |",
        "| absent | - | - | - | skipped: no device |",
    ]


def test_a_topic_is_written_with_its_calibration_and_its_rows(monkeypatch, tmp_path, small):
    monkeypatch.setattr(
        small("fine_tuning").importlib.util, "find_spec", lambda name: None
    )  # no TRL: rows are skipped
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    rows = command.measure_topic("fine_tuning", Options(rounds=2))
    content = json.loads((tmp_path / "fine_tuning-cpu.json").read_text())
    assert content["calibration"]["flops_per_second"] > 0
    assert len(content["calibration"]["interquartile_range"]) == 2
    assert content["torch"] == torch.__version__
    assert [row["name"] for row in content["rows"]] == [row.name for row in rows]
    assert all(row["skipped"] and row["met"] is None for row in content["rows"])


def test_rows_of_a_topic_that_breaks_are_in_its_file(monkeypatch, tmp_path):
    def rows(options):
        yield Row("first", 1.0)
        raise RuntimeError("no memory")

    monkeypatch.setattr(command.importlib, "import_module", lambda *_: SimpleNamespace(rows=rows))
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    with pytest.raises(RuntimeError):
        command.measure_topic("any", Options(rounds=1))
    (row,) = json.loads((tmp_path / "any-cpu.json").read_text())["rows"]
    assert (row["name"], row["ratio"]) == ("first", 1.0)


# ---------------------------------------------------------------------------------------------------------- the topics
@pytest.mark.parametrize("topic", command.TOPICS)
def test_every_topic_has_rows(topic):
    module = importlib.import_module(f"internvl.benchmarks.{topic}")
    assert callable(module.rows)
    assert module.__doc__


def check_rows(rows: list[Row], skipped: int = 0) -> None:
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert sum(row.skipped is not None for row in rows) == skipped
    for row in rows:
        assert (row.ratio is None) == (row.skipped is not None)
        json.dumps(dataclasses.asdict(row))


def test_the_start_up_rows_run(small, monkeypatch):
    module = small("start_up")
    monkeypatch.setattr(module, "CALLS", {name: ["-c", "pass"] for name in module.CALLS})
    rows = list(module.rows(Options(rounds=1)))
    assert [row.target for row in rows] == [1.1, 0.1]
    check_rows(rows)


def test_the_chat_rows_run(small):
    rows = list(small("chat").rows(Options(rounds=2)))
    assert len(rows) == 6
    check_rows(rows)


def test_the_fine_tuning_rows_run_with_equal_losses_for_every_case(small, monkeypatch):
    pytest.importorskip("trl")
    module = small("fine_tuning")
    monkeypatch.setattr(module, "in_fresh_process", lambda call, *arguments: 1 + abs(call(*arguments)))
    rows = list(module.rows(Options(rounds=1)))
    check_rows(rows)
    assert len(rows) == 2 * len(module.CASES) == 6


def test_the_image_rows_run_and_refuse_other_bytes(small, monkeypatch):
    module = small("images")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    rows = list(module.rows(Options(rounds=1)))
    check_rows(rows)
    assert [row.details["threads"] for row in rows] == [2, 2, 1, 1, 2, 2]
    assert rows[0].details["tiles"] == 4  # one, and two with a thumbnail
    assert module.resize_and_write(module.draw_images(module.SIZES), 1).shape == (4, 3, 28, 28)
    monkeypatch.setattr(module, "published", lambda images: module.ours(module.InternVLImageProcessor(), images))
    with pytest.raises(SystemExit, match="different bytes"):
        list(module.rows(Options(rounds=1)))


def test_the_pair_rows_run_and_refuse_loaders_that_give_different_pairs(small, monkeypatch):
    module = small("pairs")
    monkeypatch.setattr(module, "their_batches", module.our_batches)
    check_rows(list(module.rows(Options(rounds=1))))
    monkeypatch.setattr(module, "their_batches", lambda *_: [])
    with pytest.raises(SystemExit, match="different captions"):
        list(module.rows(Options(rounds=1)))
    monkeypatch.setattr(module, "PEERS", ("no_such_loader",))
    check_rows(list(module.rows(Options(rounds=1))), skipped=1)


def test_the_rows_of_image_embeddings_run_and_refuse_what_is_no_unit_vector(small, monkeypatch):
    module = small("image_embeddings")
    monkeypatch.setattr(module, "PEERS", {"twin": "json", "none": "no_such_package"})
    monkeypatch.setattr(module, "MAKERS", {"twin": module.by_internvl})
    check_rows(list(module.rows(Options(rounds=1))), skipped=1)
    monkeypatch.setattr(module, "MAKERS", {"twin": lambda _: lambda images: torch.ones(len(images), 8)})
    with pytest.raises(SystemExit, match="3 unit vectors of 8 components were expected"):
        list(module.rows(Options(rounds=1)))


def test_the_connector_rows_run_on_shared_weights_and_count_tokens(small, monkeypatch, tmp_path):
    module = small("connectors")
    sizes = json.loads(module.SIZES.read_text())
    tiny_parts = {"vision_config": VISION, "qllama_config": tiny.QLLAMA, "text_config": {**TEXT, "vocab_size": 1000}}
    (tmp_path / "tiny.json").write_text(json.dumps({**sizes, **tiny_parts}))
    monkeypatch.setattr(module, "SIZES", tmp_path / "tiny.json")
    monkeypatch.setattr(module, "in_fresh_process", lambda call, *arguments: 1 + abs(call(*arguments)))
    models = module.build_models("cpu")
    assert models.keys() == set(module.CONNECTORS)
    whole = models["queries_and_patches"]
    assert all(model.config.connector == connector for connector, model in models.items())
    assert all(parameter.device.type == "cpu" for model in models.values() for parameter in model.parameters())
    assert models["queries"].qllama is whole.qllama
    assert models["patches"].mlp1 is whole.mlp1
    rows = list(module.rows(Options(rounds=1)))
    check_rows(rows)
    assert len(rows) == 4
    queries, patches = tiny.QLLAMA["num_query_token"], 1  # 4 patches of 14 px, shuffled to one
    assert rows[0].details["tokens"] == {"queries": 2 * queries + 5, "patches": 2 * patches + 5}
    assert rows[1].details["tokens"] == {"queries_and_patches": 2 * (queries + patches) + 5, "patches": 7}


@pytest.fixture
def real_sizes(monkeypatch, tmp_path):
    """The module with three tiny sizes, in this process."""
    module = importlib.import_module("internvl.benchmarks.real_sizes")
    disk = module.Loading("disk", "bfloat16", "100KiB")
    nf4 = [module.Loading("nf4", "nf4")] if find_spec("bitsandbytes") else []
    cases = {}
    for name, model, loadings in (
        ("tower", tiny.vision_model(), (module.BF16,)),
        ("pairs", contrastive(), (*nf4, disk)),
        ("chat", chat(), (*nf4, disk)),
    ):
        model.config.save_pretrained(tmp_path / name)
        cases[str(tmp_path / name)] = tuple(loadings)
    monkeypatch.setattr(module, "CASES", cases)
    monkeypatch.setattr(module, "in_one_process", lambda call, *arguments: call(*arguments))
    return module


def test_models_of_real_sizes_are_measured_and_deleted_one_by_one(real_sizes, tmp_path):
    results, folder = tmp_path / "results" / "real_sizes.json", tmp_path / "disk"
    folder.mkdir()
    rows = list(real_sizes.rows(real_sizes.CASES, folder, results))
    check_rows(rows)
    assert len(rows) == sum(map(len, real_sizes.CASES.values()))
    assert not list(folder.iterdir())
    for row in rows:
        assert (row.details["on_disk"] > 0) == ("disk" in row.name)
        assert row.details["said"] > 0
    outputs = {row.name.split(",")[0].rpartition("/")[2]: row.details["outputs"] for row in rows}
    assert outputs["tower"] == {"features": [1, tiny.VISION["hidden_size"]]}
    assert outputs["pairs"] == {"InternVL-C": [1, 32], "InternVL-G": [1, 32], "caption": [1, 2]}
    assert outputs["chat"] == {"answer": [1, 2]}


def test_a_stopped_run_over_real_sizes_measures_what_is_left(real_sizes, monkeypatch, tmp_path):
    results = tmp_path / "real_sizes.json"
    measure = real_sizes.measure_loading
    measured = []

    def stopped(folder, loading):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(loading.name)
        return measure(folder, loading)

    monkeypatch.setattr(real_sizes, "measure_loading", stopped)
    with pytest.raises(KeyboardInterrupt):
        list(real_sizes.rows(real_sizes.CASES, tmp_path, results))
    assert not list(tmp_path.glob("internvl-real-size-*"))
    monkeypatch.setattr(
        real_sizes, "measure_loading", lambda *arguments: (measured.append("again"), measure(*arguments))[1]
    )
    rows = list(real_sizes.rows(real_sizes.CASES, tmp_path, results))
    assert measured.count("again") == len(rows) - 2
    (tower, *others) = real_sizes.CASES
    assert len(list(real_sizes.rows([tower], tmp_path, results, is_anew=True))) == 1
    assert measured.count("again") == len(rows) - 1
    assert list(real_sizes.rows(others, tmp_path, results)) == rows[1:]


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(real_sizes, monkeypatch, tmp_path):
    monkeypatch.setattr(real_sizes.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"needs .* GB of disk, and .* has 0.0 GB left"):
        list(real_sizes.rows(real_sizes.CASES, tmp_path, tmp_path / "real_sizes.json"))
    assert not list(tmp_path.glob("internvl-real-size-*"))


def test_weights_that_are_mapped_from_a_file_are_counted_and_others_are_not(real_sizes, tmp_path):
    model = tiny.vision_model().to(torch.bfloat16)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert real_sizes.mapped_bytes(model, tmp_path) == 0
    for name, tensor in model.state_dict().items():
        path = tmp_path / name
        tensor.view(torch.uint8).numpy().tofile(path)
        mapped = torch.from_file(str(path), shared=False, size=tensor.numel(), dtype=torch.bfloat16)
        model.get_parameter(name).data = mapped.view(tensor.shape)
    assert real_sizes.mapped_bytes(model, tmp_path) == weights


def test_recall_by_signs_with_all_candidates_is_that_of_whole_vectors(monkeypatch):
    module = importlib.import_module("internvl.benchmarks.matryoshka")
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(12, 16, generator=generator)) for _ in range(2))
    whole = images @ texts.T
    few = module.by_signs(images, texts)
    assert (few == -2).any()  # others than the best by signs are left out
    assert torch.equal(few[few > -2], whole[few > -2])
    monkeypatch.setattr(module, "CANDIDATES", 12)
    assert torch.equal(module.by_signs(images, texts), whole)


def test_the_funnel_rows_run_and_find_what_was_planted(small, monkeypatch):
    pytest.importorskip("polars")
    module = small("funnel")
    monkeypatch.setattr(module, "in_fresh_process", lambda call, folder: 1 + abs(call(folder)))
    rows = list(module.rows(Options(rounds=1)))
    check_rows(rows)
    assert len(rows) == 12
    (hashes,) = (row for row in rows if "hashes" in row.name)
    assert hashes.details["found"] == hashes.details["planted"] == 5


def test_the_curve_of_duplicates_counts_what_was_planted(monkeypatch, tmp_path, capsys):
    pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["duplicates", "--images", "60"])
    module = importlib.import_module("internvl.benchmarks.duplicates")
    assert module.main() == 0
    found = json.loads((tmp_path / module.RESULTS).read_text())
    assert (found["images"], found["copies"], found["leaks"]) == (78, 12, 6)
    (row,) = (row for row in found["curve"] if row["min_sameness"] == module.MIN_SAMENESS)
    assert row["copies_found"]["all"] == row["leaks_found"]["all"] == 1
    assert row["false_alarms"] == row["false_leaks"] == 0
    assert f"| {module.MIN_SAMENESS:g} | 100.000% | 100.000% | 0.000% | 0.000% |" in capsys.readouterr().out
    monkeypatch.setattr(module, "near_duplicates", lambda images, others=None, **_: (np.array([[5, 3]]), np.ones(1)))
    assert module.main() == 1  # nothing that was planted is found, and one image is a false alarm
    (row, *_) = json.loads((tmp_path / module.RESULTS).read_text())["curve"]
    assert row["copies_found"]["all"] == row["leaks_found"]["all"] == 0
    assert row["false_alarms"] == row["false_leaks"] == 1 / 78


def test_a_benchmark_of_the_funnel_keeps_the_rows_that_polars_alone_keeps(small, tmp_path):
    pytest.importorskip("polars")
    module = small("funnel")
    (shard,) = module.write_metadata(tmp_path, 3000)
    module.bare(shard, module.FILTERS, tmp_path / "bare.out")
    report = module.filter_data(module.FilterJob((shard,), output=str(tmp_path / "ours")))
    ours, bare = (
        module.parquet.read_table(path) for path in (tmp_path / "ours/pairs/000000.parquet", tmp_path / "bare.out")
    )
    assert 300 < report["kept"] < 2000
    assert ours.equals(bare.cast(ours.schema))


def test_the_vision_rows_run_and_compiled_ones_are_skipped_without_a_compiler(small, monkeypatch):
    module = small("vision")
    # The fresh process would have the usual sizes: both ways are measured here.
    monkeypatch.setattr(module, "in_fresh_process", lambda call, way: 1 + abs(call(way)))
    rows = list(module.rows(Options(rounds=2)))
    assert len(rows) == 12
    check_rows(rows, skipped=6)


def test_the_memory_rows_run(small, monkeypatch):
    module = small("memory")
    monkeypatch.setattr(module, "in_fresh_process", lambda call, *arguments: call(*arguments))
    rows = list(module.rows(Options()))
    assert len(rows) == 8
    check_rows(rows)


@pytest.mark.slow
def test_the_compiled_vision_rows_run(small):
    rows = list(torch.no_grad()(small("vision", compiles=True).forward_rows)(Options(rounds=2)))
    assert len(rows) == 10
    check_rows(rows)


@pytest.mark.slow  # a process of its own loads the model
def test_the_loading_rows_run(small):
    rows = list(small("loading").rows(Options(rounds=2)))
    assert len(rows) == 2
    check_rows(rows)


def test_a_folder_that_is_not_of_the_benchmark_is_left_alone(real_sizes, monkeypatch, tmp_path):
    case = next(iter(real_sizes.CASES))  # the path of a folder `tower`
    notes = tmp_path / "internvl-real-size-tower" / "notes.txt"
    notes.parent.mkdir()
    notes.touch()
    with pytest.raises(ValueError, match="is not of this benchmark"):
        list(real_sizes.rows([case], tmp_path, tmp_path / "real_sizes.json"))
    assert notes.exists()
