"""`dedup`: near duplicates and images of evaluation sets are left out, others stay, and a run that was stopped goes
on."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from internvl.evaluation.vectors.files import Description, EmbeddingFolder
from internvl.evaluation.vectors.sources import Columns, item_of_row
from internvl.rows.shards import read_shards
from internvl.synthetic.textures import CHANGES, as_png, changed, texture
from internvl.training.__main__ import main
from internvl.training.data import dedup
from internvl.training.data.fingerprints import coefficients, fingerprint, perceptual_hashes, sameness
from internvl.training.data.near_duplicates import (
    MIN_SAMENESS,
    Fingerprints,
    groups_of,
    hash_pairs,
    mirrored_hashes,
    near_duplicates,
)

from .fixtures_pairs import sample, write_tar, write_textures


IMAGES, PLANTED, LEAKS = 60, 24, 8


def pair(image: bytes, number: int) -> dict[str, bytes]:
    return sample(number, png=image)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two shards with planted near duplicates, and an evaluation set of which some images are in the data."""
    folder = tmp_path_factory.mktemp("dedup")
    images = [as_png(texture(seed)) for seed in range(IMAGES)]
    kinds, copies = zip(*(changed(texture(seed), seed) for seed in range(PLANTED)), strict=True)
    assert set(kinds) == set(CHANGES)
    leaks = [changed(texture(1000 + seed), seed)[1] for seed in range(LEAKS)]
    first, second = [*images[:40], *leaks], [*images[40:], *copies, b"no image"]
    write_tar(folder / "a.tar", [pair(image, number) for number, image in enumerate(first)])
    write_tar(folder / "b.tar", [pair(image, 100 + number) for number, image in enumerate(second)])
    write_textures(folder / "evaluation", range(1000, 1000 + 2 * LEAKS))
    return folder


def job(data, output, **settings):
    return dedup.DedupJob((str(data / "a.tar"), str(data / "b.tar")), str(output), **settings)


def captions(output):
    rows = read_shards(sorted(str(file) for file in (output / "pairs").iterdir()))
    return [row["txt"].decode() for row in rows]


@pytest.fixture(scope="module")
def found(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("out")
    report = dedup.dedup_data(job(data, output, against=(str(data / "evaluation"),)))
    return report, output


def test_planted_duplicates_and_leaks_are_found_and_nothing_else(found):
    report, output = found
    assert (report["seen"], report["broken"], report["against"]) == (IMAGES + PLANTED + LEAKS, 1, 2 * LEAKS)
    assert (report["duplicates"], report["evaluation"], report["kept"]) == (PLANTED, LEAKS, IMAGES)
    removed = [json.loads(line) for line in (output / "removed.jsonl").read_text().splitlines()]
    leaks = [row for row in removed if row["kind"] == "evaluation"]
    assert sorted(int(row["same_as"].rpartition("/")[2][:-4]) for row in leaks) == list(range(1000, 1000 + LEAKS))
    assert all(row["sameness"] >= 0.8 for row in removed)


def test_of_images_that_are_the_same_the_largest_is_kept(found, data):
    _, output = found
    kept = set(captions(output))
    for seed in range(PLANTED):
        original, copy = texture(seed), changed(texture(seed), seed)
        pixels = {f"caption {seed}": original.width * original.height}
        with Image.open(io.BytesIO(copy[1])) as image:
            pixels[f"caption {100 + IMAGES - 40 + seed}"] = image.width * image.height
        assert sorted(kept & set(pixels)) == [max(pixels, key=lambda name: (pixels[name], -int(name.split()[1])))]


def test_a_run_that_was_stopped_goes_on(found, data, tmp_path, monkeypatch):
    report, whole = found
    copy_rows, calls = dedup.copy_rows, []

    def stop_at_the_second(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return copy_rows(*arguments)

    monkeypatch.setattr(dedup, "copy_rows", stop_at_the_second)
    against = (str(data / "evaluation"),)
    with pytest.raises(KeyboardInterrupt):
        dedup.dedup_data(job(data, tmp_path / "out", against=against))
    monkeypatch.setattr(dedup, "write_fingerprints", None)
    assert dedup.dedup_data(job(data, tmp_path / "out", against=against)) == report
    assert len(calls) == 3
    assert captions(tmp_path / "out") == captions(whole)
    with pytest.raises(ValueError, match="other data or by other rules"):
        dedup.dedup_data(job(data, tmp_path / "out"))


def test_the_command_says_what_was_left_out(found, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    report, _ = found
    shard = str(write_tar(tmp_path / "a.tar", [pair(as_png(texture(number // 2)), number) for number in range(6)]))
    output, plot = tmp_path / "out", tmp_path / "plot.png"
    assert main(["dedup", shard, "--output", str(output), "--hashes-only", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "Near duplicates of other images: 3." in out
    assert "3 of 6 pairs are kept, 0 broken." in out
    assert plot.stat().st_size > 5000
    assert set(json.loads((output / "report.json").read_text())) == set(report)
    assert main(["dedup", shard, "--output", str(output), "--min-sameness", "2"]) == 2
    assert "`min_sameness` must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize(("min_cosine", "left_out"), [(0.97, [3]), (0.85, [3, 4])])
def test_images_that_are_alike_to_a_model_are_left_out_too(data, tmp_path, min_cosine, left_out):
    images = [texture(seed).resize((100, 100 - seed)) for seed in range(6)]
    shard = str(write_tar(tmp_path / "a.tar", [pair(as_png(image), number) for number, image in enumerate(images)]))
    vectors = np.eye(6, dtype=np.float32)
    vectors[3], vectors[4, 1], vectors[4, 4] = vectors[0], 0.9, 0.19**0.5
    kind = {"precision": "float32", "size": 6, "vectors": 1, "rows_per_file": 6, "parts": 1}
    folder = EmbeddingFolder(tmp_path / "vectors", Description("tiny", "InternVL-C", **kind, data=""))
    items = [item_of_row(row, Columns()) for row in read_shards([shard])]
    folder.write_block(0, 0, items, {"image": vectors[:, None]}, 0)
    folder.mark_done(0, 1, 6)
    settings = {"embeddings": str(folder.path), "min_cosine": min_cosine}
    dedup.dedup_data(dedup.DedupJob((shard,), str(tmp_path / "out"), **settings))
    removed = [json.loads(line) for line in (tmp_path / "out" / "removed.jsonl").read_text().splitlines()]
    same_as = {3: items[0].id, 4: items[1].id}
    assert [(row["id"], row["same_as"]) for row in removed] == [(items[n].id, same_as[n]) for n in left_out]
    assert [row["sameness"] for row in removed] == pytest.approx([1.0, 0.9][: len(left_out)], abs=1e-5)
    with pytest.raises(ValueError, match="holds embeddings of other data"):
        dedup.dedup_data(job(data, tmp_path / "other", **settings))


# ---------------------------------------------------------------------------------------------------------- the search
def prints_of(images):
    return Fingerprints(np.stack([fingerprint(image) for image in images]))


def test_many_images_are_searched_in_cells_with_the_same_result(monkeypatch):
    images = [texture(seed) for seed in range(30)]
    images += [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images[:10]]
    whole, scores = near_duplicates(prints_of(images))
    monkeypatch.setattr("internvl.training.data.near_duplicates.FLAT_INDEX_UP_TO", 10)
    monkeypatch.setattr("internvl.training.data.near_duplicates.HASH_TABLES_FROM", 10)
    pairs, again = near_duplicates(prints_of(images))
    assert pairs.tolist() == whole.tolist() == [[number, 30 + number] for number in range(10)]
    np.testing.assert_array_equal(scores, again)


def test_hashes_are_found_as_a_slow_loop_finds_them():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (200, 8), dtype=np.uint8)
    hashes[100:110] = hashes[:10] ^ np.array([0, 1, 0, 128, 0, 0, 3, 0], np.uint8)
    found = {tuple(row) for row in hash_pairs(hashes, hashes, 5).tolist() if row[0] != row[1]}
    bits = np.unpackbits(hashes, axis=1).astype(int)
    slow = {(a, b) for a in range(200) for b in range(200) if a != b and (bits[a] != bits[b]).sum() <= 5}
    assert found == slow
    assert len(slow) >= 20


def test_the_hash_of_a_mirrored_image_is_known_without_it():
    image = texture(3)
    grids = prints_of([image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]).grids
    one, other = perceptual_hashes(coefficients(grids[:, 0])[:, 0])
    differing = np.unpackbits(mirrored_hashes(one[None])[0] ^ other).sum()
    assert differing <= 1
    assert np.unpackbits(one ^ other).sum() > 10


def test_sameness_is_1_for_the_same_and_low_for_others():
    grids = prints_of([texture(seed) for seed in range(12)]).grids
    np.testing.assert_allclose(sameness(grids, grids), 1, atol=1e-5)
    assert sameness(grids, np.roll(grids, 1, axis=0)).max() < 0.5


def test_noise_is_known_again_in_another_size_and_other_noise_is_not():
    noises = [seed for seed in range(0, 300, 3) if changed(texture(seed), seed)[0] in ("resize", "crop", "jpeg")]
    grids = prints_of([texture(seed) for seed in noises]).grids
    copies = [Image.open(io.BytesIO(changed(texture(seed), seed)[1])) for seed in noises]
    assert sameness(grids, prints_of(copies).grids).min() >= MIN_SAMENESS
    assert sameness(grids, np.roll(grids, 1, axis=0)).max() < MIN_SAMENESS - 0.05


def test_detail_finer_than_the_grid_does_not_make_images_alike():
    rng = np.random.default_rng(0)
    board = np.indices((32, 32)).sum(axis=0) % 2 * 160
    smooth = rng.normal(0, 6, (20, 3, 4, 4)).repeat(8, axis=2).repeat(8, axis=3)  # much fainter than the board
    grids = (smooth + board + 48).clip(0, 255).astype(np.uint8)
    assert sameness(grids, np.roll(grids, 1, axis=0)).max() < MIN_SAMENESS


def test_groups_reach_over_others():
    assert groups_of(6, np.array([[4, 5], [1, 4], [0, 2]])).tolist() == [0, 1, 0, 3, 1, 1]
    assert groups_of(2, np.zeros((0, 2), int)).tolist() == [0, 1]


def test_nothing_is_found_in_nothing():
    empty, one = Fingerprints(np.zeros((0, 3, 32, 32), np.uint8)), prints_of([texture(0)])
    for images, others in ((empty, None), (one, None), (one, empty), (empty, one)):
        assert near_duplicates(images, others)[0].shape == (0, 2)
