"""Searches over files that were damaged, by a full disk or by two searches at once: mended, or refused by name."""

import threading

import numpy as np
import pytest

from internvl import InternVLConfig
from internvl.evaluation.searching import Searcher, check_fits
from internvl.evaluation.vectors.files import rows_at
from internvl.evaluation.vectors.indexes import StoredVectors, search_vectors

from .test_search import stored, unit


MADE = ("vectors.npy", "places.npy", "made_from.json", "int8.faiss", "binary.faiss")


def damaged(content: bytes) -> list[bytes]:
    return [content[: len(content) // 2], b"", b"junk" * 50]


@pytest.mark.parametrize("name", MADE)
def test_what_a_search_made_and_was_damaged_is_made_again(name, tmp_path):
    vectors, query = unit(60, 16), unit(1, 16, seed=1)
    found = stored(tmp_path / "out", vectors[:, None])

    def search():
        fresh = StoredVectors(found.folder, "image")
        index = name.removesuffix(".faiss") if name.endswith(".faiss") else "flat"
        rows = search_vectors(query, fresh, 5, index=index)[1][0]
        return [item["id"] for item in fresh.items(rows)]

    expected = search()
    file = found.path / name
    for content in damaged(file.read_bytes()):
        file.unlink()  # the old one may be mapped
        file.write_bytes(content)
        assert search() == expected


def test_arrays_of_another_shape_are_made_again_and_places_of_other_files_are_refused(tmp_path):
    found = stored(tmp_path / "out", unit(20, 1, 16))
    (found.path / "vectors.npy").unlink()
    np.save(found.path / "vectors.npy", np.zeros((20, 1, 8), np.float32))
    again = StoredVectors(found.folder, "image")
    assert again.stored.shape == (20, 1, 16)
    (found.path / "places.npy").unlink()
    np.save(found.path / "places.npy", np.full((20, 2), 99))
    with pytest.raises(ValueError, match="delete it, and search again"):
        StoredVectors(found.folder, "image").items(np.array([0]))


def test_a_search_waits_for_another_that_makes_the_same_files(tmp_path):
    found = stored(tmp_path / "out", unit(20, 1, 16))
    (found.path / "made_from.json").unlink()
    opened = []
    other = threading.Thread(target=lambda: opened.append(StoredVectors(found.folder, "image")))
    with found.locked():
        other.start()
        other.join(0.3)
        assert other.is_alive()
        assert not (found.path / "made_from.json").exists()
    other.join(30)
    assert len(opened[0]) == 20


def test_a_damaged_block_is_named(tmp_path):
    folder = stored(tmp_path / "out", unit(20, 1, 16)).folder
    (file,) = folder.files()
    for content in damaged(file.read_bytes()):
        file.write_bytes(content)
        for read in (folder.count, lambda: list(folder.read("image")), lambda: rows_at(file, [0])):
            with pytest.raises(ValueError, match=r"000000-000000\.parquet` is no block of embeddings, or damaged"):
                read()


def test_a_query_that_is_not_finite_finds_nothing(tmp_path):
    searcher = Searcher(stored(tmp_path / "out", unit(20, 1, 16)).folder)
    with pytest.raises(ValueError, match="not finite"):
        searcher._search(np.full((1, 16), np.nan, np.float32), "image", 3)


def test_sets_of_vectors_have_no_narrow_index(tmp_path):
    folder = stored(tmp_path / "out", unit(20, 3, 16)).folder
    Searcher(folder, index="flat").check("image", 0)
    with pytest.raises(ValueError, match="the index must be flat, got 'int8'"):
        Searcher(folder, index="int8").check("image", 0)


def test_a_model_with_other_vectors_is_refused_by_its_configuration(tmp_path):
    description = stored(tmp_path / "out", unit(20, 1, 16)).folder.description
    check_fits(description, InternVLConfig(clip_embed_dim=16), "m")
    check_fits(description, InternVLConfig(clip_embed_dim=32, matryoshka_dims=[16]), "m")
    with pytest.raises(ValueError, match="have 16 components, and `m` gives 32, 8"):
        check_fits(description, InternVLConfig(clip_embed_dim=32, matryoshka_dims=[8]), "m")
