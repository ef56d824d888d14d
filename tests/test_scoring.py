"""`score`: the similarity is the model's cosine, written in every format, and what pairs have stays."""

import json
import sys
import types

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from internvl.evaluation.embeddings import ModelPlace, embed_images, embed_texts
from internvl.evaluation.indexing import Embedder, Job
from internvl.rows.bad_rows import TooManyBadRowsError
from internvl.rows.shards import read_shards
from internvl.training.data import filtering, scoring
from internvl.training.data.filters import Filter, metadata_row

from .fixtures_pairs import sample, write_tar
from .test_embeddings_on_disk import CAPTIONS, images, model, processor


def job(shards, output, **settings):
    return scoring.ScoreJob(tuple(map(str, shards)), str(output), ModelPlace("tiny"), batch_size=2, **settings)


def embedder(**settings):
    return Embedder(model(), processor(), Job((), "", batch_size=2, **settings))


@pytest.fixture(scope="module")
def expected():
    vectors = embed_images(model(), processor(), images()), embed_texts(model(), processor(), CAPTIONS)
    return (vectors[0] * vectors[1]).sum(dim=1).numpy()


@pytest.fixture
def folder(tmp_path):
    for number, image in enumerate(images()):
        image.save(tmp_path / f"{number}.png")
    return tmp_path


def shard_of(folder, ending):
    path = folder / f"a.{ending}"
    rows = [{"file_name": f"{number}.png", "caption": text} for number, text in enumerate(CAPTIONS)]
    if ending == "tar":
        contents = [(folder / row["file_name"]).read_bytes() for row in rows]
        samples = [
            sample(number, png=content, txt=row["caption"].encode(), json=b'{"license": "?"}')
            for number, (row, content) in enumerate(zip(rows, contents, strict=True))
        ]
        write_tar(path, samples)
    elif ending == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending == "jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        path.write_text("file_name,caption\n" + "".join(f"{row['file_name']},{row['caption']}\n" for row in rows))
    return path


def similarities(output, folder):
    files = sorted(str(file) for file in (output / "pairs").iterdir())
    return [scoring._score_in(row) for row in read_shards(files)]


@pytest.mark.parametrize("ending", ["tar", "parquet", "jsonl", "csv"])
def test_scores_are_the_model_s_cosines(folder, expected, ending):
    shard = shard_of(folder, ending)
    (count,) = scoring.score_data(job([shard], folder / "out", images=str(folder)), embedder())
    assert (count.rows, count.scored, count.broken) == (5, 5, 0)
    np.testing.assert_allclose(similarities(folder / "out", folder), expected, atol=1e-5)
    before, after = (list(read_shards([str(file)])) for file in (shard, folder / "out" / "pairs" / f"000000.{ending}"))
    for old, new in zip(before, after, strict=True):
        assert {name: new[name] for name in old if name not in ("__shard__", "json")} == {
            name: value for name, value in old.items() if name not in ("__shard__", "json")
        }
        if ending == "tar":
            assert json.loads(new["json"])["license"] == "?"


def test_what_pairs_have_stays_and_what_cannot_be_read_has_none(folder, expected):
    rows = [
        {"file_name": "0.png", "caption": CAPTIONS[0], "clip_similarity": 0.5},
        {"file_name": "1.png", "caption": CAPTIONS[1], "clip_similarity": None},
        {"file_name": "none.png", "caption": "a", "clip_similarity": None},
        {"file_name": "3.png", "caption": CAPTIONS[3], "clip_similarity": float("nan")},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    (count,) = scoring.score_data(job([folder / "a.parquet"], folder / "out"), embedder(max_bad_rate=1))
    assert (count.rows, count.scored, count.broken) == (4, 2, 1)
    first, second, third, fourth = similarities(folder / "out", folder)
    assert (first, third) == (0.5, None)
    np.testing.assert_allclose([second, fourth], expected[[1, 3]], atol=1e-5)


def test_the_rules_read_what_was_written(folder, expected):
    shard = shard_of(folder, "tar")
    scoring.score_data(job([shard], folder / "out"), embedder())
    cut = float(np.sort(expected)[2])
    rules = (Filter("similarity", ">=", cut - 1e-4, 1, "test"),)
    scored = str(folder / "out" / "pairs" / "000000.tar")
    assert filtering.filter_data(filtering.FilterJob((scored,), rules=rules))["kept"] == 3
    assert all("similarity" in metadata_row(row) for row in read_shards([scored]))


def test_a_stopped_run_goes_on_and_processes_share_shards(folder, monkeypatch):
    shards = [shard_of(folder, ending) for ending in ("tar", "jsonl", "csv")]
    one = embedder()
    scoring.score_data(job(shards, folder / "out", images=str(folder)), one, rank=1, world=2)
    assert [file.name for file in (folder / "out" / "pairs").iterdir()] == ["000001.jsonl"]
    embedded = []
    embed = one.embed
    monkeypatch.setattr(one, "embed", lambda items: embedded.extend(items) or embed(items))
    scoring.score_data(job(shards, folder / "out", images=str(folder)), one)
    assert len(embedded) == 10
    assert len(similarities(folder / "out", folder)) == 15


def test_too_many_pairs_that_cannot_be_read_end_the_run(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [sample(number, png=b"no image", json=None) for number in range(12)])
    with pytest.raises(TooManyBadRowsError):
        scoring.score_data(job([shard], tmp_path / "out"), embedder())
    assert not list((tmp_path / "out" / "pairs").iterdir())


def test_ray_data_filters_and_scores_by_actors(folder, monkeypatch, expected):
    """Ray is no library of the tests: a stand-in maps rows by actors as it does."""

    class Rows(list):
        def map(self, kind, fn_constructor_args, concurrency, **resources):
            actors = [kind(*fn_constructor_args) for _ in range(concurrency)]
            return Rows(actors[number % concurrency](row) for number, row in enumerate(self))

        def materialize(self):
            return self

        def take_all(self):
            return list(self)

    ray = types.ModuleType("ray")
    ray.data = types.SimpleNamespace(from_items=lambda rows, override_num_blocks: Rows(rows))
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(scoring.ScoreJob, "embedder", lambda self, device: embedder())
    shards = [shard_of(folder, ending) for ending in ("tar", "jsonl", "csv")]
    asked = job(shards, folder / "scored", images=str(folder))
    scoring.score_by_ray(asked, 2, 0)
    np.testing.assert_allclose(similarities(folder / "scored", folder), np.tile(expected, 3), atol=1e-5)
    rules = (Filter("similarity", ">=", float(np.median(expected)) - 1e-4, 1, "test"),)
    scored = tuple(sorted(str(file) for file in (folder / "scored" / "pairs").iterdir()))
    monkeypatch.chdir(folder)
    for image in folder.glob("*.png"):
        (folder / "scored" / "pairs" / image.name).write_bytes(image.read_bytes())
    report = filtering.filter_by_ray(filtering.FilterJob(scored, rules=rules, output=str(folder / "ray")), 2)
    assert report == filtering.filter_data(filtering.FilterJob(scored, rules=rules, output=str(folder / "one")))
    assert report["kept"] == 9
    read = [list(read_shards(sorted(str(f) for f in (folder / name / "pairs").iterdir()))) for name in ("ray", "one")]
    assert len(read[0]) == 9
    assert [{**row, "__shard__": ""} for row in read[0]] == [{**row, "__shard__": ""} for row in read[1]]
