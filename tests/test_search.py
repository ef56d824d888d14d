"""Search over embeddings: whole, in 8 bits and by signs, of sets of vectors, by texts and images, re-ranked."""

import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from internvl.evaluation.__main__ import main
from internvl.evaluation.embeddings import ModelPlace, embed_images, embed_texts
from internvl.evaluation.matching import matching_scores, matching_texts
from internvl.evaluation.multi_vectors import embed_queries
from internvl.evaluation.searching import Searcher
from internvl.evaluation.vectors import indexes
from internvl.evaluation.vectors.files import Description, EmbeddingFolder
from internvl.evaluation.vectors.indexes import StoredVectors, max_similarity, search_vectors
from internvl.evaluation.vectors.quantization import quantize
from internvl.evaluation.vectors.sources import EmbeddedItem

from .test_embeddings_on_disk import CAPTIONS, as_tars, embedded, image_folder, images, model, processor


def unit(*shape, seed=0):
    vectors = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def stored(folder, vectors, precision="float32", rows_per_file=70) -> StoredVectors:
    """Vectors (rows, M, E) as those of images; every fifth row has none."""
    _, num_vectors, size = vectors.shape
    description = Description("model", "InternVL-C", precision, size, num_vectors, rows_per_file, 1, "")
    found = EmbeddingFolder(folder, description)
    items = [EmbeddedItem(f"{n}", f"{n}.png", None if n % 5 == 4 else "image") for n in range(len(vectors) * 5 // 4)]
    left = iter(quantize(vectors, precision))
    starts = range(0, len(items), rows_per_file)
    for block, start in enumerate(starts):
        some = items[start : start + rows_per_file]
        rows = [next(left) for item in some if item.image]
        found.write_block(0, block, some, {"image": np.array(rows)}, 0)
    found.mark_done(0, len(starts), len(items))
    return StoredVectors(found, "image")


def brute_force(queries, vectors, k):
    """Rows in order of their cosine."""
    return [sorted(range(len(vectors)), key=lambda row: -float(vectors[row] @ query))[:k] for query in queries]


# ----------------------------------------------------------------------------------------------------------- the index
def test_flat_search_finds_what_comparing_all_finds(tmp_path, monkeypatch):
    vectors, queries = unit(200, 24), unit(7, 24, seed=1)
    found = stored(tmp_path / "out", vectors[:, None])
    assert isinstance(found.stored, np.memmap)
    expected = brute_force(queries, vectors, 10)
    for block_bytes in (2**27, 24 * 4 * 33, 1):
        monkeypatch.setattr(indexes, "BLOCK_BYTES", block_bytes)
        scores, rows = search_vectors(queries, found, 10)
        assert rows.tolist() == expected
        np.testing.assert_allclose(scores, np.take_along_axis(queries @ vectors.T, rows, 1), atol=1e-6)
    assert search_vectors(queries, found, 1000)[1].shape == (7, 200)
    # Rows of files without an image are counted in what is shown, but are no vectors.
    assert [item["id"] for item in found.items(np.array([150, 4, 0]))] == ["187", "5", "0"]


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_narrow_indexes_find_nearly_the_same(precision, tmp_path):
    vectors, queries = unit(400, 64), unit(20, 64, seed=1)
    found = stored(tmp_path / "out", vectors[:, None], precision)
    exact = [set(rows) for rows in brute_force(queries, vectors, 10)]

    def recall(**settings):
        rows = search_vectors(queries, found, 10, **settings)[1]
        return np.mean([len(set(some) & best) / 10 for some, best in zip(rows.tolist(), exact, strict=True)])

    assert recall(index="flat") > 0.97
    assert recall(index="int8") > 0.95
    recalls = [recall(index="binary", candidates=candidates) for candidates in (1, 5, 40)]
    assert 0.1 < recalls[0] < recalls[1] < recalls[2]
    assert recalls[2] > 0.97  # all are compared again
    assert {"int8.faiss", "binary.faiss"} <= {file.name for file in found.path.iterdir()}


def test_signs_alone_are_compared_with_whole_queries(tmp_path):
    vectors, queries = unit(100, 16), unit(5, 16, seed=1)
    found = stored(tmp_path / "out", vectors[:, None], "binary")
    scores, _ = search_vectors(queries, found, 10)
    expected = np.sort(queries @ (np.sign(vectors) / 4).T)[:, ::-1][:, :10]
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_sets_of_vectors_are_compared_by_their_nearest(tmp_path, monkeypatch):
    sets, queries = unit(30, 3, 16), unit(4, 2, 16, seed=1)
    expected = np.array(
        [[np.mean([max(float(a @ b) for b in row) for a in query]) for row in sets] for query in queries]
    )
    np.testing.assert_allclose(max_similarity(queries, sets), expected, atol=1e-6)
    found = stored(tmp_path / "out", sets)
    monkeypatch.setattr(indexes, "BLOCK_BYTES", 4 * 16 * 3 * 7)
    scores, rows = search_vectors(queries, found, 5)
    assert rows.tolist() == np.argsort(-expected, axis=1, kind="stable")[:, :5].tolist()
    np.testing.assert_allclose(scores, np.take_along_axis(expected, rows, 1), atol=1e-6)
    with pytest.raises(ValueError, match="Sets of vectors are compared whole"):
        search_vectors(queries, found, 5, index="int8")


def test_an_index_is_made_again_when_the_embeddings_change(tmp_path):
    data = image_folder(tmp_path / "images")
    folder = embedded([data], tmp_path / "out")
    first = StoredVectors(folder, "image")
    search_vectors(unit(1, 16), first, 2, index="int8")
    made = {file.name: file.stat().st_mtime_ns for file in first.path.iterdir()}
    assert set(made) == {"vectors.npy", "places.npy", "made_from.json", "int8.faiss"}
    assert {file.name: file.stat().st_mtime_ns for file in StoredVectors(folder, "image").path.iterdir()} == made
    folder.files()[0].unlink()
    with pytest.raises(ValueError, match=r"not finished: 1 of 3 parts are missing\. Give the same `embed` command"):
        StoredVectors(folder, "image")
    embedded([data], tmp_path / "out")
    assert {file.name for file in StoredVectors(folder, "image").path.iterdir()} == set(made) - {"int8.faiss"}


# ------------------------------------------------------------------------------------------------------- texts, images
@pytest.mark.parametrize("mode", ["InternVL-C", "InternVL-G", "queries"])
def test_texts_and_images_find_images_and_texts(mode, tmp_path):
    folder = embedded([image_folder(tmp_path / "images")], tmp_path / "out", mode=mode)
    searcher = Searcher(folder, model(), processor())
    embeds = embed_queries if mode == "queries" else partial(embed_images, mode=mode)
    of_images = embeds(model(), processor(), images()).reshape(5, -1, 16)
    of_texts = embed_texts(model(), processor(), CAPTIONS)
    cosines = torch.einsum("ime,te->itm", of_images, of_texts).amax(-1)  # (images, texts)
    for number, text in enumerate(CAPTIONS):
        hits = searcher.by_text(text, top=5)
        assert [hit.text for hit in hits] == [CAPTIONS[row] for row in cosines[:, number].argsort(descending=True)]
        assert [hit.score for hit in hits] == pytest.approx(
            sorted(cosines[:, number].tolist(), reverse=True), abs=1e-5
        )
        found = searcher.by_text(text, "text", top=1)
        assert (found[0].text, found[0].score) == (text, pytest.approx(1))
        hits = searcher.by_image(images()[number], "text", top=5)
        assert [hit.score for hit in hits] == pytest.approx(sorted(cosines[number].tolist(), reverse=True), abs=1e-5)
        (hit,) = searcher.by_image(tmp_path / "images" / f"{number}.png", top=1)
        assert (hit.path, hit.score) == (str(tmp_path / "images" / f"{number}.png"), pytest.approx(1, abs=1e-5))


def test_the_matching_head_orders_the_best_again(tmp_path):
    folder = embedded([image_folder(tmp_path / "images")], tmp_path / "out", mode="InternVL-G")
    searcher = Searcher(folder, model(), processor())
    plain = searcher.by_text(CAPTIONS[0], top=5)
    best = [int(hit.path[-5]) for hit in plain[:3]]
    matches = matching_scores(model(), processor(), [images()[n] for n in best], [CAPTIONS[0]] * 3, batch_size=2)
    scores = [hit.score + match for hit, match in zip(plain, matches.tolist(), strict=False)]
    order = sorted(range(3), key=lambda place: -scores[place])
    assert order != [0, 1, 2]
    again = searcher.by_text(CAPTIONS[0], top=5, rerank=3)
    assert [hit.path for hit in again] == [plain[n].path for n in order] + [hit.path for hit in plain[3:]]
    assert [hit.score for hit in again[:3]] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
    plain = {hit.text: hit.score for hit in searcher.by_image(images()[1], "text", top=5)}
    (hit,) = searcher.by_image(images()[1], "text", top=1, rerank=5)
    matches = matching_scores(model(), processor(), images()[1:2], CAPTIONS).tolist()
    scores = {text: plain[text] + match for text, match in zip(CAPTIONS, matches, strict=True)}
    assert (hit.text, hit.score) == (max(scores, key=scores.get), pytest.approx(max(scores.values()), abs=1e-5))
    with pytest.raises(ValueError, match="compares an image with texts"):
        searcher.by_image(images()[1], "image", rerank=2)


def test_matching_takes_texts_as_training_does():
    pixels = processor()(images=images()[:2], mode="contrastive", max_num=1, return_tensors="pt")["pixel_values"]
    ids, mask = matching_texts(processor(), ["a", "a caption of 3"])
    tokenizer = processor().tokenizer
    assert ids[1].tolist() == [*tokenizer("a caption of 3", add_special_tokens=True).input_ids, tokenizer.eos_token_id]
    assert mask.sum(1).tolist() == [len(tokenizer("a").input_ids) + 1, ids.shape[1]]
    logits = model().get_matching_logits(pixels, ids, mask)
    found = matching_scores(model(), processor(), images()[:2], ["a", "a caption of 3"], batch_size=1)
    torch.testing.assert_close(found, logits.softmax(-1)[:, 1].detach(), atol=1e-5, rtol=1e-4)


def test_what_lies_in_shards_cannot_be_looked_at_again(tmp_path):
    searcher = Searcher(embedded(as_tars(tmp_path), tmp_path / "out", mode="InternVL-G"), model(), processor())
    with pytest.raises(ValueError, match="is no file: it lies in a shard"):
        searcher.by_text("a", rerank=2)


# --------------------------------------------------------------------------------------------------- the command lines
def command(module, *words) -> int:
    return main([module, *map(str, words)])


@pytest.fixture
def model_folder(tmp_path):
    model().save_pretrained(tmp_path / "model")
    processor().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_embedded_and_searched_by_commands(model_folder, tmp_path, capsys):
    data, output = image_folder(tmp_path / "images"), tmp_path / "out"
    words = ["--mode", "G", "--precision", "int8", "--batch-size", "2", "--rows-per-file", "2"]
    assert command("embed", model_folder, "--data", data, "--output", output, *words) == 0
    assert capsys.readouterr().out == f"{output}: 5 images, 5 texts\n"
    assert command("search", output, "--text", CAPTIONS[1], "--among", "texts", "--top", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0] == f"1.0000\t{data / '1.txt'}\t{CAPTIONS[1]}".replace("1.txt", "1.png")
    assert command("search", output, "--image", data / "3.png", data / "4.png", "--top", "1", "--json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["rank"], row["path"]) for row in found] == [(1, str(data / "3.png")), (1, str(data / "4.png"))]


@pytest.mark.slow
def test_two_processes_of_accelerate_embed_what_one_does(model_folder, tmp_path, capsys):
    words = [
        "embed",
        model_folder,
        "--data",
        image_folder(tmp_path / "images"),
        "--rows-per-file",
        1,
        "--mode",
        "queries",
    ]
    assert main([*map(str, words), "--output", str(tmp_path / "one")]) == 0
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "internvl.evaluation", *words]
    done = subprocess.run(
        [*map(str, launch), "--output", tmp_path / "two"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'two'}: 5 images, 5 texts" in done.stdout
    one, two = (EmbeddingFolder(tmp_path / name) for name in ("one", "two"))
    two.check_is_finished()
    for side in ("image", "text"):
        stored = [[values for _, _, values in folder.read(side)] for folder in (one, two)]
        assert np.array_equal(*map(np.concatenate, stored))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere/*.tar"], "there is no file `nowhere/*.tar`"),
        (["--dims", "8"], "`dims` 8: this checkpoint was not trained"),
        (["--output", "images"], "is not empty, and holds no embeddings"),
        (["--batch-size", "0"], "must be at least 1"),
        (["--max-bad-rate", "nan"], "is a share of the rows"),
    ],
)
def test_embedding_what_cannot_be_is_one_line_before_a_model_is_loaded(
    words, message, model_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ModelPlace, "load", lambda *_: pytest.fail("loaded"))
    image_folder(tmp_path / "images")
    assert command("embed", model_folder, "--data", "images", "--output", "out", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--text", "a"], "`nowhere` holds no embeddings"),
        (["out", "--text", "a", "--among", "texts"], "has no embeddings of texts"),
        (["out", "--text", "a", "--rerank", "3"], "`rerank` needs embeddings of an InternVL-G"),
        (["out", "--text", "a", "--top", "0"], "must be at least 1"),
        (["out", "--text", "a", "--model", "./gone"], "`gone` is not there"),
        (["out", "--image", "gone.png", "--model", "model"], "gone.png does not exist"),
    ],
)
def test_searching_what_is_not_there_is_one_line_before_a_model_is_loaded(
    words, message, model_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ModelPlace, "load", lambda *_: pytest.fail("loaded"))
    embedded([image_folder(tmp_path / "images")], tmp_path / "out", sides=("image",))
    assert command("search", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_embeddings_of_other_weights_of_the_same_name_are_refused(model_folder, tmp_path, monkeypatch, capsys):
    """A model that was trained further lies where it lay: its vectors are not to be mixed with those of before."""
    image_folder(tmp_path / "images")
    words = ("embed", model_folder, "--data", tmp_path / "images", "--output", tmp_path / "out")
    assert command(*words) == 0
    monkeypatch.setattr(ModelPlace, "load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("internvl.evaluation.indexing.checkpoint_state", lambda *_: "another")
    monkeypatch.setattr("internvl.evaluation.checkpoints.checkpoint_state", lambda *_: "another")
    assert command(*words) == 2
    assert "other weights of the same name" in capsys.readouterr().err
    assert command("search", tmp_path / "out", "--text", "a") == 2
    assert "other weights than those of these embeddings" in capsys.readouterr().err
