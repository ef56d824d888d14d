"""Embeddings on disk: every source of data gives the same, a stopped run goes on, processes share the work."""

import csv
import json
import shutil
import sys
import types
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from internvl.configuration_internvl import InternVLConfig
from internvl.evaluation.embeddings import ModelPlace, embed_images, embed_texts, vector_size
from internvl.evaluation.indexing import (
    Embedder,
    Job,
    embed_by_ray,
    embed_data,
    share_of,
)
from internvl.evaluation.multi_vectors import embed_queries
from internvl.evaluation.vectors.files import EmbeddingFolder, rows_at
from internvl.evaluation.vectors.quantization import PRECISIONS, dequantize, quantize
from internvl.evaluation.vectors.sources import Columns, EmbeddedItem, find_parts
from internvl.image_processing_internvl import InternVLImageProcessor
from internvl.modeling_internvl import InternVLModel
from internvl.processing_internvl import InternVLProcessor
from internvl.rows.bad_rows import TooManyBadRowsError
from internvl.synthetic.tokenizer import caption_corpus, train_tokenizer

from . import tiny
from .fixtures_pairs import png, write_parquet, write_tar


PLACE = ModelPlace("tiny")
CAPTIONS = [f"a caption of {number}" for number in range(5)]


@cache
def processor():
    image_processor = InternVLImageProcessor(size={"height": 28, "width": 28}, resize_mode="squash")
    tokenizer = train_tokenizer(caption_corpus(num_scenes=20), 400)
    return InternVLProcessor(image_processor, tokenizer, mode="contrastive")


@cache
def model(num_queries=3):
    qllama = {**tiny.QLLAMA, "vocab_size": len(processor().tokenizer), "num_query_token": num_queries}
    config = InternVLConfig(
        vision_config=dict(tiny.VISION), qllama_config=qllama, clip_embed_dim=16, attn_pool_num_heads=4
    )
    return tiny.randomize(InternVLModel(config))


def images():
    return [Image.fromarray(noise(number)) for number in range(5)]


def noise(number):
    return np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def image_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, text) in enumerate(zip(images(), CAPTIONS, strict=True)):
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"{text}\n", encoding="utf-8")
    return folder


def job(data, output, **settings) -> Job:
    return Job(tuple(map(str, data)), str(output), **{"batch_size": 2, "rows_per_file": 2, **settings})


def embedded(data, output, rank=0, world=1, **settings) -> EmbeddingFolder:
    return embed_data(model(), processor(), job(data, output, **settings), PLACE, rank, world)


def vectors_of(folder: EmbeddingFolder, side: str) -> np.ndarray:
    rows = [values for _, _, values in folder.read(side)]
    return dequantize(np.concatenate(rows), folder.description.precision)


def rows_of(folder: EmbeddingFolder) -> list[dict]:
    return [row for file in folder.files() for row in rows_at(file, range(len(read_ids(file))))]


def read_ids(file: Path) -> list[str]:
    from pyarrow import parquet

    return parquet.read_table(file, columns=["id"]).column(0).to_pylist()


# --------------------------------------------------------------------------------------------------------- the sources
def as_folder(folder):
    return [image_folder(folder / "images")]


def as_files(folder):
    return sorted(image_folder(folder / "images").iterdir())


def as_lines(folder):
    image_folder(folder / "images")
    rows = [{"image": f"images/{number}.png", "caption": text} for number, text in enumerate(CAPTIONS)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return [folder / "rows.jsonl"]


def as_csv(folder):
    image_folder(folder / "images")
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [["filepath", "title"], *([f"images/{number}.png", text] for number, text in enumerate(CAPTIONS))]
        )
    return [folder / "rows.csv"]


def as_tars(folder):
    files = [(image_folder(folder / "images") / f"{number}.png").read_bytes() for number in range(5)]
    samples = [{"png": file, "txt": text.encode()} for file, text in zip(files, CAPTIONS, strict=True)]
    write_tar(folder / "a.tar", samples[:3])
    write_tar(folder / "b.tar", samples[3:])
    return [folder / "*.tar"]


def table(folder) -> Dataset:
    files = [(image_folder(folder / "images") / f"{number}.png").read_bytes() for number in range(5)]
    return Dataset.from_dict({"image": [{"bytes": file, "path": None} for file in files], "text": CAPTIONS})


def as_parquet(folder):
    table(folder).to_parquet(folder / "rows.parquet")
    return [folder / "rows.parquet"]


def as_data_set(folder):
    table(folder).save_to_disk(folder / "saved")
    return [folder / "saved"]


@pytest.mark.parametrize("layout", [as_folder, as_files, as_lines, as_csv, as_tars, as_parquet, as_data_set])
def test_every_source_gives_the_same_embeddings(layout, tmp_path):
    folder = embedded(layout(tmp_path), tmp_path / "out")
    assert folder.count() == {"images": 5, "texts": 5, "bad_rows": 0}
    expected = {
        "image": embed_images(model(), processor(), images(), "InternVL-C"),
        "text": embed_texts(model(), processor(), CAPTIONS),
    }
    for side, vectors in expected.items():
        np.testing.assert_allclose(vectors_of(folder, side)[:, 0], vectors.numpy(), atol=1e-6)
    rows = rows_of(folder)
    assert [row["text"] for row in rows] == CAPTIONS
    assert len({row["id"] for row in rows}) == 5
    in_shard = layout in (as_tars, as_parquet, as_data_set)
    assert all(Path(row["path"]).is_file() != in_shard for row in rows)


def test_images_and_texts_may_stand_alone_and_hidden_files_are_none(tmp_path):
    folder = image_folder(tmp_path / "images")
    (folder / "0.png").unlink()
    (folder / "1.txt").unlink()
    (folder / ".2.png").write_bytes(b"")
    (folder / ".cache").mkdir()
    shutil.copy(folder / "2.png", folder / ".cache")
    (part,) = find_parts([str(folder)], Columns(), 100)
    found = [(Path(item.id).stem, item.image is None, item.text) for item in part.read()]
    expected = [("0", True, CAPTIONS[0]), ("1", False, None)]
    assert found == expected + [(str(number), False, CAPTIONS[number]) for number in (2, 3, 4)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["nowhere"], "there is no file `nowhere`|No such file"),
        (["nowhere/*.tar"], "there is no file `nowhere"),
        (["image.png"], "There is no file `image.png`"),
        (["empty"], "holds no images .* and no texts"),
        (["shards"], r"Shards are named one by one: `shards/\*.parquet`"),
        (["images", "images"], "is given twice"),
    ],
)
def test_data_that_are_none_are_refused(names, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_folder(Path("images"))
    Path("empty").mkdir()
    Path("shards").mkdir()
    write_parquet(Path("shards/a.parquet"), [1])
    with pytest.raises((OSError, ValueError), match=message):
        find_parts(names, Columns(), 2)


def test_chosen_columns_and_a_chosen_folder_are_read(tmp_path):
    image_folder(tmp_path / "elsewhere")
    row = {"image": "wrong.png", "mine": "3.png", "text": "wrong", "words": "right"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    columns = Columns(("mine",), ("words",), str(tmp_path / "elsewhere"))
    folder = embedded([tmp_path / "rows.jsonl"], tmp_path / "out", columns=columns)
    (row,) = rows_of(folder)
    assert row["text"] == "right"
    assert row["path"] == str(tmp_path / "elsewhere" / "3.png")


# ------------------------------------------------------------------------------------------------------------ bad rows
def test_rows_that_cannot_be_used_are_left_out_and_counted(tmp_path):
    samples = [{"png": png(number, 30), "txt": f"text {number}".encode()} for number in range(4)]
    samples[1]["png"] = samples[1]["png"][:40]
    samples[2]["txt"] = b"\xff"
    folder = embedded([write_tar(tmp_path / "a.tar", samples)], tmp_path / "out")
    assert folder.count() == {"images": 2, "texts": 2, "bad_rows": 2}
    assert [row["text"] for row in rows_of(folder)] == ["text 0", "text 3"]


def test_too_many_of_them_end_the_run(tmp_path):
    samples = [{"png": b"none"} for _ in range(12)]
    with pytest.raises(TooManyBadRowsError, match=r"more than the 0\.1% of"):
        embedded([write_tar(tmp_path / "a.tar", samples)], tmp_path / "out", max_bad_rate=0.001)


def test_a_shard_at_an_address_that_breaks_off_is_not_taken_for_whole(tmp_path):
    whole = write_tar(tmp_path / "a.tar", [{"png": png(number, 30)} for number in range(40)])
    whole.write_bytes(whole.read_bytes()[:9000])
    with pytest.raises(OSError, match="Try again: what is embedded is kept"):
        embedded([f"file://{whole}"], tmp_path / "out")
    assert EmbeddingFolder(tmp_path / "out").unfinished_parts() == [0]
    assert embedded([whole], tmp_path / "out2").count()["bad_rows"] == 1


# ------------------------------------------------------------------------------------------------------------- restart
def test_a_run_that_was_stopped_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    data = [image_folder(tmp_path / "images"), *as_tars(tmp_path / "images")]
    whole = embedded(data, tmp_path / "whole")
    calls = []
    embed = Embedder.embed

    def stops(self, items):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return embed(self, items)

    monkeypatch.setattr(Embedder, "embed", stops)
    with pytest.raises(KeyboardInterrupt):
        embedded(data, tmp_path / "out")
    folder = EmbeddingFolder(tmp_path / "out")
    written = {file: file.stat().st_mtime_ns for file in folder.files()}
    assert len(written) == 2
    with pytest.raises(ValueError, match=r"not finished: \d of \d parts are missing"):
        folder.check_is_finished()
    (folder.path / "rows" / ".000001-000000.parquet.123").write_bytes(b"torn")
    monkeypatch.setattr(Embedder, "embed", lambda self, items: calls.append(1) or embed(self, items))
    again = embedded(data, tmp_path / "out")
    assert len(calls) == len(whole.files())
    assert all(file.stat().st_mtime_ns == time for file, time in written.items())
    assert rows_of(again) == rows_of(whole)
    assert len(rows_of(whole)) == 15
    for side in ("image", "text"):
        assert np.array_equal(vectors_of(again, side), vectors_of(whole, side))
    embedded(data, tmp_path / "out")
    assert len(calls) == len(whole.files())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"mode": "InternVL-G"}, "mode InternVL-C, now InternVL-G"), ({"sides": ("text",)}, "other data, columns")],
)
def test_a_folder_of_another_job_is_refused(changes, message, tmp_path):
    data = [image_folder(tmp_path / "images")]
    embedded(data, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        embedded(data, tmp_path / "out", **changes)


def test_changed_data_and_a_folder_of_something_else_are_refused(tmp_path):
    data = image_folder(tmp_path / "images")
    embedded([data], tmp_path / "out")
    (data / "5.txt").write_text("new", encoding="utf-8")
    with pytest.raises(ValueError, match="other data, columns"):
        embedded([data], tmp_path / "out")
    with pytest.raises(ValueError, match="is not empty, and holds no embeddings"):
        embedded([data], data)


# ----------------------------------------------------------------------------------------------------------- processes
class FakePart:
    def __init__(self, is_shared):
        self.is_shared = is_shared


@pytest.mark.parametrize("shared", ["", "1", "0", "0000", "0110", "1111", "00100010"])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_block_is_read_by_one_process(shared, world):
    parts = [FakePart(bool(int(sign))) for sign in shared]
    for number in range(len(parts)):
        for block in range(10):
            readers = [
                rank
                for rank in range(world)
                for part, reader, of in share_of(parts, rank, world)
                if part == number and block % of == reader
            ]
            assert len(readers) == 1
    loads = [len(share_of(parts, rank, world)) for rank in range(world)]
    assert max(loads) - min(loads) <= 1


def test_two_processes_write_what_one_writes(tmp_path):
    data = [*as_lines(tmp_path), *as_tars(tmp_path), tmp_path / "images"]
    one = embedded(data, tmp_path / "one")
    first = embedded(data, tmp_path / "two", 0, 2)
    assert first.unfinished_parts()
    two = embedded(data, tmp_path / "two", 1, 2)
    assert rows_of(one) == rows_of(two)
    assert np.array_equal(vectors_of(one, "image"), vectors_of(two, "image"))
    assert {file.name for file in one.files()} == {file.name for file in two.files()}


def test_ray_data_embeds_parts_by_actors(tmp_path, monkeypatch):
    """With a stand-in that has the calls of Ray that are used; Ray is not among what tests need."""
    made = []

    class Rows:
        def __init__(self, rows):
            self.rows = rows

        def map_batches(self, actor, fn_constructor_args, concurrency, batch_size, num_cpus):
            made.append((concurrency, batch_size, num_cpus))
            worker = actor(*fn_constructor_args)
            return Rows([worker({"part": np.array([row["part"]])}) for row in self.rows])

        def materialize(self):
            made.append(len(self.rows))

    ray = types.ModuleType("ray")
    ray.data = types.SimpleNamespace(from_items=lambda rows, override_num_blocks: Rows(rows))
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(ModelPlace, "load", lambda self, device: (model(), processor()))
    data = [image_folder(tmp_path / "images")]
    one = embedded(data, tmp_path / "one")
    folder = embed_by_ray(job(data, tmp_path / "ray"), PLACE, model().config, 3, 0)
    folder.check_is_finished()
    assert made == [(3, 1, 1), 3]
    assert np.array_equal(vectors_of(one, "image"), vectors_of(folder, "image"))
    embed_by_ray(job(data, tmp_path / "ray"), PLACE, model().config, 3, 0)
    assert len(made) == 2


# -------------------------------------------------------------------------------------------------------- what is kept
def test_precisions_keep_what_they_promise():
    vectors = np.random.default_rng(0).standard_normal((200, 3, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    for precision, least, size in zip(PRECISIONS, (1, 0.999999, 0.9999, 0.7), (256, 128, 64, 8), strict=True):
        stored = quantize(vectors, precision)
        assert stored[0, 0].nbytes == size
        back = dequantize(stored, precision)
        assert back.dtype == np.float32
        assert ((back * vectors).sum(-1) / np.linalg.norm(back, axis=-1)).min() >= least - 1e-6
        np.testing.assert_allclose(np.linalg.norm(back, axis=-1), 1, atol=5e-4)
    assert np.array_equal(quantize(vectors, "binary"), np.packbits(vectors > 0, axis=-1))
    with pytest.raises(ValueError, match="multiple of 8"):
        quantize(vectors[..., :9], "binary")
    with pytest.raises(ValueError, match="not finite"):
        quantize(vectors * np.nan, "int8")
    assert not quantize(np.zeros((1, 8), np.float32), "int8").any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_embeddings_are_stored_in_each_precision(precision, tmp_path):
    folder = embedded([image_folder(tmp_path / "images")], tmp_path / "out", precision=precision, mode="queries")
    expected = embed_queries(model(), processor(), images()).numpy()
    assert expected.shape == (5, 3, 16)
    np.testing.assert_allclose(
        vectors_of(folder, "image"), dequantize(quantize(expected, precision), precision), atol=2e-2
    )
    assert vectors_of(folder, "text").shape == (5, 1, 16)


def test_a_query_is_pooled_as_if_all_queries_were_it():
    queries = model().get_query_features(
        processor()(images=images(), mode="contrastive", max_num=1, return_tensors="pt")["pixel_values"]
    )
    vectors = embed_queries(model(), processor(), images())
    alone = torch.nn.functional.normalize(model().clip_projector2(queries[:, 1:2].expand_as(queries)), dim=-1)
    torch.testing.assert_close(vectors[:, 1], alone)
    assert (vectors[:, 0] - vectors[:, 1]).abs().max() > 0.01


def test_one_side_alone_is_embedded(tmp_path):
    folder = embedded([image_folder(tmp_path / "images")], tmp_path / "out", sides=("text",))
    assert folder.count() == {"images": 0, "texts": 5, "bad_rows": 0}
    (tmp_path / "images" / "0.png").write_bytes(b"broken, and not looked at")
    assert embedded([tmp_path / "images"], tmp_path / "out", sides=("text",)).count()["bad_rows"] == 0


def test_vectors_are_cut_only_where_the_checkpoint_was_trained_for_it(tmp_path, monkeypatch):
    data = [image_folder(tmp_path / "images")]
    with pytest.raises(ValueError, match="`dims` 8: this checkpoint was not trained to have its vectors cut"):
        embedded(data, tmp_path / "out", dims=8)
    monkeypatch.setattr(model().config, "matryoshka_dims", [8, 16], raising=False)
    with pytest.raises(ValueError, match="must be one of 8, 16, as in `matryoshka_dims`, got 4"):
        vector_size(model().config, 4)
    folder = embedded(data, tmp_path / "out", dims=8)
    whole = embed_images(model(), processor(), images(), "InternVL-C")
    expected = torch.nn.functional.normalize(whole[:, :8], dim=-1).numpy()
    np.testing.assert_allclose(vectors_of(folder, "image")[:, 0], expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["InternVL-G", "queries"])
def test_modes_with_queries_need_a_model_with_them(mode, tmp_path):
    settings = job([image_folder(tmp_path / "images")], tmp_path / "out", mode=mode)
    with pytest.raises(ValueError, match="this one is an InternVL-C"):
        embed_data(model(0), processor(), settings, PLACE)
    with pytest.raises(ValueError, match="must be one of"):
        embed_data(model(), processor(), replace(settings, mode="X"), PLACE)


def test_images_are_decoded_ahead_in_order():
    embedder = Embedder(model(), processor(), job([], "", batch_size=1))
    items = [EmbeddedItem(str(number), "", image, str(number)) for number, image in enumerate(images() * 4)]
    decoded = list(embedder._decoded(iter(items)))
    assert [item.id for item, _, _ in decoded] == [str(number) for number in range(20)]
    assert all(np.array_equal(image, noise(number % 5)) for number, (_, image, _) in enumerate(decoded))
