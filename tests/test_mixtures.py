"""Mixture files, streamed dialogues, and rows grouped by length."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from internvl.rows.bad_rows import TooManyBadRowsError
from internvl.training.__main__ import main
from internvl.training.data.augmentation import Augmentation
from internvl.training.data.dialogues import DialogueDataset, DialogueEncoder
from internvl.training.data.mixtures import MixtureSource, is_mixture, read_mixture
from internvl.training.data.pairs import PairStream
from internvl.training.data.sources import (
    DialogueMixture,
    DialogueStream,
    StreamMixture,
    dialogue_data,
    num_rows,
    pair_data,
)
from internvl.training.data.stream_batches import StreamBatches
from internvl.training.trainer import StageTrainer

from . import engine_jobs
from .fixtures_dialogues import llava
from .fixtures_pairs import png, sample, write_parquet, write_tar
from .fixtures_text import make_image
from .test_dialogues import SEQ, make_processor
from .test_videos import write_video


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten rows "a" with images of several tiles, four rows "b" of text, and pairs."""
    for number in range(10):
        make_image(56 * (1 + number % 3), 56, seed=number).save(tmp_path / f"{number}.png")
    rows = [llava("<image>\nWhat?", f"a {n}", image=f"{n}.png") for n in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "b.json").write_text(json.dumps([llava("Hello", f"b {n}") for n in range(4)]))
    write_tar(tmp_path / "red.tar", [sample(n) for n in range(9)])
    write_parquet(tmp_path / "green.parquet", list(range(100, 107)))
    return tmp_path


@pytest.fixture
def encoder(folder) -> DialogueEncoder:
    return DialogueEncoder(make_processor())


def write(folder: Path, sources, name: str = "mix.yaml") -> list[str]:
    path = folder / name
    path.write_text(
        json.dumps(sources) if path.suffix == ".json" else yaml.safe_dump({"sources": sources}, sort_keys=False)
    )
    return [str(path)]


def answer(encoder: DialogueEncoder, row: dict) -> str:
    return encoder.processor.tokenizer.decode(row["input_ids"][row["labels"] != -100]).removesuffix("<|im_end|>")


def answers(encoder: DialogueEncoder, rows) -> list[str]:
    return [answer(encoder, rows[index]) for index in range(len(rows))]


# ------------------------------------------------------------------------------------------------------------ the file
def test_a_source_has_what_its_entry_says(folder):
    (folder / "saved").mkdir()
    entry = {
        "data": ["a.jsonl", "owner/chat", "saved:test", "*.parquet", "hf://a/b.tar"], "images": "texts", "weight": 2,
        "max_tiles": 4, "video_frames": 8, "jpeg_quality": [75, 100], "crop_scale": [0.5, 1], "flip_rate": 0.5,
    }  # fmt: skip
    (path,) = write(folder, [entry, {"data": "z.jsonl", "weight": 0.5}])
    located = [str(folder / "a.jsonl"), "owner/chat", str(folder / "saved:test"), str(folder / "*.parquet")]
    assert read_mixture(path) == (
        MixtureSource(
            "1", (*located, "hf://a/b.tar"), str(folder / "texts"), 2.0, 1.0, 4, (8, 8), (75, 100), (0.5, 1.0), 0.5
        ),
        MixtureSource("2", (str(folder / "z.jsonl"),), weight=0.5),
    )
    assert read_mixture(path)[0].augmentation(3) == Augmentation((0.5, 1.0), 0.5, 3, (75, 100))
    assert read_mixture(path)[1].augmentation(3) is None


def test_meta_files_of_the_published_code_are_read(folder):
    meta = {
        "charts": {"root": "texts", "annotation": "a.jsonl", "data_augment": True, "max_dynamic_patch": 12,
                   "repeat_time": 2, "length": 10},
        "chat": {"root": "", "annotation": "texts/b.json", "data_augment": False, "repeat_time": 0.5, "length": 4},
    }  # fmt: skip
    meta["chat"].pop("root")
    (path,) = write(folder, meta, "meta.json")
    assert read_mixture(path) == (
        MixtureSource("charts", (str(folder / "a.jsonl"),), str(folder / "texts"), None, 2.0, 12, None, (75, 100)),
        MixtureSource("chat", (str(folder / "texts/b.json"),), repeat=0.5),
    )


def test_data_is_no_mixture(folder):
    (folder / "one.json").write_text(json.dumps(llava("a", "b")))
    (folder / "broken.json").write_text("{")
    for name in ("a.jsonl", "texts/b.json", "one.json", "broken.json", "red.tar", "missing.json"):
        assert not is_mixture(folder / name)
    for sources, name in (({"sources": []}, "x.json"), ({"a": {"annotation": "b"}}, "y.json"), ([], "z.yaml")):
        assert is_mixture(write(folder, sources, name)[0])


BROKEN = {
    "no sources": ([], "must hold `sources`"),
    "no object": (["a.jsonl"], "source `1`: it must be an object with `data`, got 'a.jsonl'"),
    "no data": ([{"weight": 1}], "source `1`: `data` is missing"),
    "empty data": ({"x": {"data": []}}, r"source `x`: `data` must be a file or a list of files, got \[\]"),
    "unknown key": ([{"data": "a", "wieght": 1}], "`wieght` is not known; known are data, images, weight"),
    "weight and repeat": ([{"data": "a", "weight": 1, "repeat": 2}], "a `weight` and a `repeat`: give one"),
    "a weight of some": ([{"data": "a", "weight": 1}, {"data": "b"}], "source `2`: other sources have a `weight`"),
    "negative weight": ([{"data": "a", "weight": -1}], "`weight` must be a number above 0, got -1"),
    "a text as weight": ([{"data": "a", "weight": "1"}], "`weight` must be a number above 0, got '1'"),
    "true as tiles": ([{"data": "a", "max_tiles": True}], "`max_tiles` must be a whole number from 1 on, got True"),
    "falling quality": ([{"data": "a", "jpeg_quality": [90, 80]}], "two rising numbers from 1 to 100"),
    "quality of 101": ([{"data": "a", "jpeg_quality": 101}], "two rising numbers from 1 to 100"),
    "half a frame": ([{"data": "a", "video_frames": [1, 2.5]}], "`video_frames` must be two rising"),
    "not a number": ([{"data": "a", "flip_rate": float("nan")}], "`flip_rate` must be a number from 0 to 1"),
    "the same twice": ([{"data": "a", "annotation": "b"}], "`annotation` is given twice, the other time as `data`"),
    "a published switch": ([{"data": "a", "data_augment": 3}], "`data_augment` must be true or false, got 3"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_entry_is_named(name, folder):
    sources, message = BROKEN[name]
    with pytest.raises(ValueError, match=message):
        read_mixture(write(folder, sources)[0])


def test_aliases_of_yaml_are_not_written_out(folder):
    """Written out, the text would have 8 ** 30 words."""
    lists = ["&a0 [x, x, x, x, x, x, x, x]"]
    lists += [f"&a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 30)]
    (folder / "mix.yaml").write_text(f"sources: {{z: {{data: [{', '.join(lists)}]}}}}")
    with pytest.raises(ValueError, match=r"source `z`: `data` must be a file or a list of files, got \[\['x'"):
        read_mixture(folder / "mix.yaml")


def test_a_broken_file_is_one_line_of_a_command(folder, capsys):
    for text in ("a: [", "!!python/object/apply:os.system ['true']", "sources: [{data: a.jsonl}]\nseed: 3"):
        (folder / "mix.yaml").write_text(text)
        assert main(["validate", str(folder / "mix.yaml")]) == 2
        error = capsys.readouterr().err
        assert "mix.yaml" in error
        assert error.count("\n") == 1
    files = [*write(folder, [{"data": "a.jsonl"}]), str(folder / "a.jsonl")]
    assert main(["validate", *files]) == 2
    assert "it names all data and folders of images itself" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- dialogues
A, B = {"data": "a.jsonl"}, {"data": "texts/b.json"}


@pytest.mark.parametrize(
    ("a", "b", "counts"),
    [
        ({}, {}, (10, 4)),
        ({"repeat": 0.5}, {"repeat": 2.25}, (5, 9)),
        ({"weight": 1}, {"weight": 1}, (10, 10)),
        ({"weight": 1}, {"weight": 0.1}, (40, 4)),
    ],
)
def test_each_source_has_its_share(folder, encoder, a, b, counts):
    files = write(folder, [{**A, **a}, {**B, **b}])
    rows = dialogue_data(files, encoder, seed=3)
    assert isinstance(rows, DialogueMixture)
    found = answers(encoder, rows)
    assert found == answers(encoder, dialogue_data(files, encoder, seed=3))
    assert len(found) == sum(counts) == num_rows(files)
    for name, count, size in zip("ab", counts, (10, 4), strict=True):
        times = Counter(text for text in found if text.startswith(name))
        assert times.total() == count
        assert len(times) == min(count, size)
        assert max(times.values()) - min(times.values()) <= 1
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_a_seed_draws_other_rows(folder, encoder):
    files = write(folder, [{**A, "repeat": 0.4}, B])
    drawn = {tuple(answers(encoder, dialogue_data(files, encoder, seed=seed))[:4]) for seed in range(6)}
    assert len(drawn) > 2
    with pytest.raises(ValueError, match="leave no row"):
        dialogue_data(write(folder, [{**B, "repeat": 0.01}]), encoder)


def test_files_alone_are_no_mixture(folder, encoder):
    files = [str(folder / "a.jsonl"), str(folder / "texts" / "b.json")]
    assert type(dialogue_data(files, encoder)) is DialogueDataset
    assert len(dialogue_data(files, encoder)) == num_rows(files) == 14
    alone = dialogue_data(write(folder, [{**A, "max_tiles": 1}]), encoder)
    assert type(alone) is DialogueDataset
    assert len(alone[2]["pixel_values"]) == 1
    assert len(dialogue_data(files, encoder)[2]["pixel_values"]) == 4


def test_images_are_stored_as_jpeg_each_copy_in_its_own_way(folder, encoder):
    plain, rows = DialogueDataset(folder / "a.jsonl", encoder), []
    for quality in ([5, 90], [5, 90], [100, 100]):
        rows.append(dialogue_data(write(folder, [{**A, "jpeg_quality": quality, "repeat": 2}]), encoder, seed=1))
    first, again, fine = ([mixture[index]["pixel_values"] for index in (0, 10)] for mixture in rows)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    original = plain[0]["pixel_values"]
    assert 0 < (fine[0] - original).abs().mean() < (first[0] - original).abs().mean()


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_a_stream_gives_the_rows_of_the_data_set(folder, encoder, ending, monkeypatch):
    path = folder / f"rows.{ending}"
    rows = [llava("<image>\nWhat?", f"a {n}", image=f"{n}.png") for n in range(10)]
    if ending == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if ending == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    expected = DialogueDataset(folder / "a.jsonl", encoder)
    found = {}
    for rank in range(2):
        stream = dialogue_data([str(path)], encoder, None, True, rank=rank, world_size=2, epochs=1)
        assert isinstance(stream, DialogueStream)
        for row in DataLoader(stream, batch_size=None, num_workers=1):
            assert found.setdefault(answer(encoder, row), row) is row
    assert found.keys() == {f"a {n}" for n in range(10)}
    for number in range(10):
        row = expected[number]
        assert all(torch.equal(row[key], found[f"a {number}"][key]) for key in row)


def rows_of(data) -> list:
    return list(data) if isinstance(data, DialogueStream) else [data[index] for index in range(len(data))]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_how_many_bad_rows_dialogues_may_have_is_said_by_their_option(folder, encoder, is_streamed):
    path = folder / "many_bad.jsonl"
    lines = [*["{}"] * 12, *[json.dumps(llava("a", f"b {number}")) for number in range(3)]]
    path.write_text("".join(f"{line}\n" for line in lines))
    place = {"is_streamed": True, "epochs": 1} if is_streamed else {}
    with pytest.raises(TooManyBadRowsError, match="or raise `--max-bad-rate`"):
        rows_of(dialogue_data([str(path)], encoder, **place))
    found = [answer(encoder, row) for row in rows_of(dialogue_data([str(path)], encoder, max_bad_rate=0.8, **place))]
    assert set(found) == {"b 0", "b 1", "b 2"}


def test_a_stream_counts_bad_rows_and_looks_below_its_folder(folder, encoder):
    rows = [llava("a", "b 0"), "{", llava("<image>", "c", image="z.png"), llava("<image>", "d", image="../0.png")]
    path = folder / "texts" / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    stream = DialogueStream(str(path), encoder, epochs=1)
    assert [answer(encoder, row) for row in stream] == ["b 0"]
    assert stream.bad_rows.broken == 3
    assert len(list(DialogueStream(str(path), encoder, folder / "texts" / "..", epochs=1))) == 1


# ------------------------------------------------------------------------------------------------------------- streams
def pair_mixture(folder: Path, **settings) -> StreamMixture:
    sources = [{"data": "red.tar", "weight": 3}, {"data": "green.parquet", "weight": 1}]
    stream = pair_data(write(folder, sources), shuffle_buffer=4, **settings)
    assert isinstance(stream, StreamMixture)
    return stream


def take(stream, count: int) -> list[str]:
    rows = iter(stream)
    return [next(rows)["text"] for _ in range(count)]


def is_green(text: str) -> bool:
    return int(text.split()[1]) >= 100


def test_pairs_are_drawn_by_weight(folder):
    texts = take(pair_mixture(folder), 400)
    assert 70 < sum(map(is_green, texts)) < 130
    assert texts == take(pair_mixture(folder), 400) != take(pair_mixture(folder, seed=1), 400)
    assert texts[:50] == take(pair_mixture(folder).from_the_beginning(), 50)
    for source in ({"repeat": 2}, {"max_tiles": 2}):
        with pytest.raises(ValueError, match=r"streams are not counted|pairs have neither"):
            pair_data(write(folder, [{"data": "red.tar", **source}, {"data": "green.parquet"}]))


def test_a_mixture_goes_on_from_its_position(folder):
    whole = take(pair_mixture(folder), 60)
    for stop in (0, 1, 13, 41):
        first = pair_mixture(folder)
        assert take(first, stop) == whole[:stop]
        second = pair_mixture(folder)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert take(second, 60 - stop) == whole[stop:]


def texts_of(rows: list[dict]) -> list[str]:
    return [row["text"] for row in rows]


def test_batches_of_a_mixture_go_on_over_workers(folder):
    def batches(places=None) -> StreamBatches:
        return StreamBatches([pair_mixture(folder)], texts_of, 3, places, num_workers=2)

    unbroken = iter(batches())
    whole = [next(unbroken) for _ in range(9)]
    begun = batches()
    rows = iter(begun)
    assert [next(rows) for _ in range(5)] == whole[:5]
    resumed = iter(batches(begun.places()))
    assert [next(resumed) for _ in range(9)] == [None] * 5 + whole[5:]
    assert not set(whole[0]) & set(whole[1])  # one worker's rows are none of the other's
    write_parquet(folder / "green.parquet", [100])
    with pytest.raises(ValueError, match="too few rows for all workers of a mixture"):
        list(zip(range(30), batches(), strict=False))


def test_images_of_one_source_are_augmented(folder):
    sources = [{"data": "red.tar", "crop_scale": [0.2, 0.3]}, {"data": "green.parquet"}]
    rows = iter(pair_data(write(folder, sources)))
    for _ in range(30):
        pair = next(rows)
        assert (pair["image"].size == (4, 4)) == is_green(pair["text"])
    assert isinstance(pair_data([str(folder / "red.tar")]), PairStream)


def test_jpeg_quality_is_drawn_between_its_ends():
    image = make_image(64, 64)
    sizes = set()
    for number in range(12):
        changed = Augmentation(jpeg_quality=(10, 90))({"image": image, "key": number})
        assert changed.size == image.size
        sizes.add(changed.tobytes())
    assert len(sizes) > 8
    assert Augmentation()({"image": image}) is image


# ------------------------------------------------------------------------------------------------------------- lengths
def test_lengths_are_those_of_the_tokens_without_reading_an_image(folder, encoder, monkeypatch):
    rows = dialogue_data(write(folder, [{**A, "max_tiles": 6}, B]), encoder)
    expected = [len(rows[index]["input_ids"]) for index in range(len(rows))]

    def refuse(*_, **__):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(Image.Image, "load", refuse)
    lengths = dialogue_data(write(folder, [{**A, "max_tiles": 6}, B]), encoder).lengths
    monkeypatch.undo()
    assert sorted(range(14), key=lengths.__getitem__)[:4] == [10, 11, 12, 13]  # text alone
    for length, tokens, tiles in zip(lengths[:10], expected[:10], [1, 3, 4] * 3 + [1], strict=True):
        assert SEQ * tiles <= length < tokens
    assert sorted(lengths[:10]) == [lengths[index] for index in sorted(range(10), key=expected.__getitem__)]


def test_rows_are_grouped_by_these_lengths(folder, encoder, monkeypatch):
    rows = dialogue_data(write(folder, [A]), encoder)
    monkeypatch.setattr(rows, "encoded", None)  # nothing is encoded
    arguments = SimpleNamespace(
        train_sampling_strategy="group_by_length", train_batch_size=2, gradient_accumulation_steps=5, seed=3
    )
    trainer = SimpleNamespace(args=arguments, train_dataset=rows)
    torch.manual_seed(0)
    order = list(StageTrainer._get_train_sampler(trainer))
    assert sorted(order) == list(range(10))
    assert [rows.lengths[index] for index in order] == sorted(rows.lengths, reverse=True)


# ------------------------------------------------------------------------------------------------------------ commands
def test_validate_knows_mixtures_and_pairs(folder, capsys):
    (files,) = write(folder, [{**A, "images": "texts"}, B])
    assert main(["validate", files]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert lines[0].startswith(f"{folder / 'a.jsonl'}:1: The image `0.png` is missing")
    assert lines[-1] == "14 rows in 2 files, 10 bad."
    (folder / "pairs.csv").write_text("image,caption\n0.png,good\nz.png,bad\n0.png,\n")
    write_tar(folder / "bad.tar", [sample(0), sample(1, png=png()[:20])])
    assert main(["validate", "--pairs", str(folder / "pairs.csv"), str(folder / "bad.tar")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines[:-1]] == [
        f"{folder / 'pairs.csv'}:3", f"{folder / 'pairs.csv'}:4", f"{folder / 'bad.tar'}, sample `part/000001`"
    ]  # fmt: skip
    assert lines[-1] == "5 rows in 2 files, 3 bad."


@pytest.fixture
def finetune(folder, tmp_path_factory):
    """Fine-tunes a tiny chat model on a mixture of images, texts and a video."""
    write_video(folder / "v.mp4", 6)
    rows = [llava("<video>\nWhat?", "c", video="v.mp4")] * 2
    (folder / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{**A, "weight": 2, "jpeg_quality": [20, 80], "max_tiles": 2}, {**B, "weight": 1}]
    (files,) = write(folder, [*sources, {"data": "v.jsonl", "weight": 3}])
    start = tmp_path_factory.mktemp("start")
    engine_jobs.write_data(start)
    connector = engine_jobs.CONNECTORS[0]
    engine_jobs.make_processor(connector).save_pretrained(start / connector)
    plain = "--bf16 False --gradient-checkpointing False --logging-steps 1 --batch-size 4 --video-frames 4".split()

    def run(output: Path, *words: str) -> dict[str, torch.Tensor]:
        model = ["--model", str(start / connector), "--data", files, "--output", str(output)]
        assert main(["finetune", *model, *plain, *words]) == 0
        return load_file(output / "model.safetensors")

    return run


@pytest.mark.parametrize("words", [(), ("--streaming",), ("--train-sampling-strategy", "group_by_length")])
def test_a_mixture_is_trained_on(finetune, words, tmp_path):
    finetune(tmp_path / "out", "--steps", "2", *words)
    log = json.loads((tmp_path / "out" / "training_log.json").read_text())
    assert [entry["step"] for entry in log["finetuning"] if "loss" in entry] == [1, 2]
    assert log["recipe"]["video_frames"] == [4, 4]


@pytest.mark.parametrize("words", [(), ("--streaming",), ("--train-sampling-strategy", "group_by_length")])
def test_a_stopped_mixture_is_resumed_to_the_bit(finetune, words, tmp_path, monkeypatch):
    words = (*words, "--steps", "5", "--save-steps", "4", "--batch-size", "12")  # 2.5 steps an epoch
    expected = finetune(tmp_path / "whole", *words)
    step = StageTrainer.training_step

    def stop(trainer, *arguments, **settings):
        if trainer.state.global_step == 4:
            raise OSError("stopped")
        return step(trainer, *arguments, **settings)

    monkeypatch.setattr(StageTrainer, "training_step", stop)
    with pytest.raises(AssertionError):
        finetune(tmp_path / "out", *words)
    monkeypatch.undo()
    found = finetune(tmp_path / "out", *words, "--resume")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
