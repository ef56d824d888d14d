"""Random crops, mirroring and random negatives: what is drawn, by what, and that it is off where a recipe says so.

Nothing of it depends on workers, processes or what was read before: a sample in an epoch gets the same.
"""

import io
import json
import math
from collections import Counter
from itertools import islice
from random import Random

import numpy
import pytest
import torch
from PIL import Image, ImageOps

from internvl.image_processing_internvl import InternVLImageProcessor
from internvl.processing_internvl import InternVLProcessor
from internvl.rows.texts import simple_caption
from internvl.training.data.augmentation import Augmentation, random_crop_box
from internvl.training.data.collators import CaptionCollator, GenerativeCollator, RetrievalCollator
from internvl.training.data.negatives import CaptionPool
from internvl.training.data.pairs import PairCollator, PairStream
from internvl.training.data.sources import pair_data

from .fixtures_pairs import png, sample, write_parquet, write_tar
from .fixtures_text import make_image, make_tokenizer


def pair(number: int = 0, epoch: int = 0, shard: str = "a.tar", **changes) -> dict:
    name = {"key": str(number), "shard": shard, "epoch": epoch}
    return {"image": make_image(30, 20, seed=number), "text": f"caption {number}", **name, **changes}


@pytest.fixture(scope="module")
def processor() -> InternVLProcessor:
    image_processor = InternVLImageProcessor(size={"height": 28, "width": 28}, resize_mode="squash")
    return InternVLProcessor(image_processor, make_tokenizer(special_tokens=()), mode="contrastive")


# --------------------------------------------------------------------------------------------------------------- crops
def test_crops_have_the_areas_and_shapes_they_may_have():
    width, height = 640, 480
    boxes = [random_crop_box(width, height, (0.5, 1.0), Random(seed)) for seed in range(500)]
    sizes = [(right - left, lower - upper) for left, upper, right, lower in boxes]
    assert all(0 <= left < right <= width and 0 <= upper < lower <= height for left, upper, right, lower in boxes)
    areas = [columns * rows / (width * height) for columns, rows in sizes]
    assert 0.495 < min(areas) < 0.52
    assert max(areas) < 1.005
    ratios = [columns / rows for columns, rows in sizes]
    assert 0.745 < min(ratios) < 0.85
    assert 1.25 < max(ratios) < 1.34
    assert len({(left, upper) for left, upper, *_ in boxes}) > 300  # their places vary too


@pytest.mark.parametrize(
    ("size", "box"), [((900, 30), (430, 0, 470, 30)), ((30, 900), (0, 430, 30, 470)), ((1, 1), (0, 0, 1, 1))]
)
def test_an_image_too_narrow_for_any_crop_gives_its_middle(size, box):
    """As torchvision's `RandomResizedCrop`: the largest crop of an allowed shape."""
    assert random_crop_box(*size, (0.9, 1.0), Random(0)) == box


def test_the_crop_is_of_the_image_and_mirrored_as_often_as_asked():
    columns = Image.new("L", (100, 80))
    columns.putdata([x for _ in range(80) for x in range(100)])  # a pixel says its column
    flips = 0
    for number in range(200):
        made = Augmentation((0.5, 1.0), 0.25)(pair(number, image=columns))
        row = [made.getpixel((x, 0)) for x in range(made.width)]
        flips += row[0] > row[-1]
        assert sorted(row) == list(range(min(row), max(row) + 1))
    assert 30 < flips < 70
    whole = Augmentation(flip_rate=1.0)(pair(image=columns))
    assert whole.tobytes() == ImageOps.mirror(columns).tobytes()


def test_what_is_drawn_depends_on_the_sample_its_epoch_and_the_seed_alone():
    augment = Augmentation((0.3, 1.0), 0.5, seed=3)
    wanted = augment(pair(1)).tobytes()
    augment(pair(2))
    torch.rand(3)
    assert augment(pair(1)).tobytes() == Augmentation((0.3, 1.0), 0.5, seed=3)(pair(1)).tobytes() == wanted
    image = make_image(30, 20, seed=1)
    others = [
        Augmentation((0.3, 1.0), 0.5, seed=4)(pair(1)),
        augment(pair(1, epoch=1)),
        augment(pair(1, shard="b.tar")),
        augment(pair(5, image=image)),
    ]
    assert all(other.tobytes() != wanted for other in others)
    assert augment(pair(1, is_held_out=True)).tobytes() == image.tobytes()


def collator_makers(processor):
    return (
        lambda **settings: PairCollator(processor, max_length=40, padding="max_length", **settings),
        lambda **settings: GenerativeCollator(processor, 40, **settings),
        lambda **settings: RetrievalCollator(processor, 40, **settings),
        lambda **settings: CaptionCollator(processor, 40, **settings),
    )


def test_collators_augment_where_asked_and_only_there(processor):
    rows = [pair(number) for number in range(4)]
    augment = Augmentation((0.3, 0.5), seed=1)
    cropped = [{**row, "image": augment(row)} for row in rows]
    for make in collator_makers(processor):
        plain, augmented, wanted = make()(rows), make(augment=augment)(rows), make()(cropped)
        assert torch.equal(augmented["pixel_values"], wanted["pixel_values"])
        assert not torch.equal(augmented["pixel_values"], plain["pixel_values"])
        for name in plain.keys() - {"pixel_values"}:  # the image of `image_ids` is that before the crop
            assert torch.equal(plain[name], augmented[name]), name


@pytest.mark.parametrize("augment", [None, Augmentation(flip_rate=1.0, jpeg_quality=(50, 90))])
@pytest.mark.parametrize(
    ("settings", "prepared_size"),
    [
        ({"resize_mode": "squash"}, (28, 28)),
        ({"resize_mode": "squash", "size": {"height": 42, "width": 42}, "resample": 0}, (42, 42)),
        ({"resize_mode": "squash", "do_resize": False}, None),
        ({"resize_mode": "crop", "size": 36}, None),
        ({"resize_mode": "pad"}, None),
        ({"resize_mode": "tiles", "max_num": 2}, None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_pairs_prepared_one_by_one_give_the_batch_of_the_processor(processor, settings, prepared_size, augment):
    rows = [{**pair(number), "stored": make_image(50, 40, seed=number)} for number in range(3)]
    images = [row["image"] if augment is None else augment(row) for row in rows]
    wanted = processor.image_processor(images, return_tensors="pt", **settings)["pixel_values"]
    for make in collator_makers(processor):
        collator = make(augment=augment, **settings)
        prepared = [collator.prepare(row) for row in rows]
        sizes = [prepared_size or image.size for image in images]
        assert [row["image"].size for row in prepared] == sizes
        assert not any("stored" in row for row in prepared)  # a worker holds no large image
        batch, direct = collator(prepared), collator(rows)
        assert torch.equal(batch["pixel_values"], wanted)
        assert batch.keys() == direct.keys()
        assert all(torch.equal(batch[name], direct[name]) for name in batch)


def test_collators_take_what_the_processor_takes_and_prepare_only_what_is_decoded(processor, tmp_path):
    image = make_image(50, 40, seed=1)
    rows = [pair(1, image=image), pair(2, image=numpy.asarray(image)), pair(3, image=png(3))]
    collator = PairCollator(processor, max_length=40, resize_mode="squash")
    batch = collator(rows)["pixel_values"]
    prepared = [collator.prepare(row) for row in rows]
    assert [isinstance(row["image"], Image.Image) for row in prepared] == [True, False, False]
    assert torch.equal(batch, collator(prepared)["pixel_values"])
    assert torch.equal(batch[0], batch[1])
    clear = make_image(50, 40, seed=2)
    clear.info["transparency"] = clear.getpixel((0, 0))
    whole = Image.open(io.BytesIO(png(3)))
    for hidden in (clear, whole, make_image(2000, 2, seed=1)):
        few = PairCollator(processor, max_length=40, resize_mode="squash", max_image_pixels=3000)
        assert few.prepare(pair(image=hidden))["image"] is hidden  # the processor composites, reads or refuses it
    read = next(iter(PairStream(str(write_tar(tmp_path / "a.tar", [sample(1, png=png(1))])))))
    assert collator.prepare(read)["image"].size == (28, 28)
    for nested in ({"size": {"height": 42, "width": 42}}, {"resize_mode": "pad"}):
        collator = PairCollator(processor, max_length=40, images_kwargs=nested)
        assert collator.prepare(rows[0])["image"].size == ((42, 42) if "size" in nested else (50, 40))
        assert torch.equal(
            collator(rows)["pixel_values"], collator([collator.prepare(rows[0]), *rows[1:]])["pixel_values"]
        )
    with pytest.raises(ValueError, match=r"An image would become 1 tile.*Give a smaller `size`"):
        PairCollator(processor, resize_mode="squash", size={"height": 10**6, "width": 10**6})


# ----------------------------------------------------------------------------------------------------------- negatives
@pytest.fixture
def shards(tmp_path) -> list[str]:
    """Six images with two captions each in a tar file, three others in a parquet file, and something broken."""
    samples = [sample(i, png=png(i // 2), txt=f"caption {i}".encode()) for i in range(12)]
    samples.append(sample(12, txt=None))
    return [str(write_tar(tmp_path / "a.tar", samples)), str(write_parquet(tmp_path / "b.parquet", [20, 21, 22]))]


def test_negatives_are_captions_of_other_images_of_all_the_data(shards):
    pool = CaptionPool.read(PairStream(shards))
    assert len(pool) == 15
    image_of = {f"caption {i}": i // 2 for i in range(12)} | {f"caption {i}": i for i in (20, 21, 22)}
    drawn = Counter()
    for epoch in range(40):
        for row in PairStream(shards, epochs=1, seed=epoch):
            text = pool.draw({**row, "epoch": epoch})
            assert image_of[text] != image_of[row["text"]]
            drawn[text] += 1
    assert set(drawn) == set(image_of)
    mean = sum(drawn.values()) / len(drawn)
    assert all(abs(count - mean) < 5 * math.sqrt(mean) for count in drawn.values())


def test_the_pool_is_the_same_however_many_processes_read_it(shards, monkeypatch):
    whole = CaptionPool.read(PairStream(shards))
    parts = []
    monkeypatch.setattr("internvl.training.data.negatives.gather_object", lambda own: parts.append(own) or own * 2)
    CaptionPool.read(PairStream(shards, rank=0, world_size=2))
    CaptionPool.read(PairStream(shards[::-1], rank=0, world_size=2))  # the other file
    assert sorted(map(len, parts)) == [3, 12]
    both = CaptionPool(sorted([*parts[0], *((1, *entry[1:]) for entry in parts[1])]))
    assert both.captions == whole.captions
    assert both.draw(pair(3, shard=shards[0])) == whole.draw(pair(3, shard=shards[0]))


def test_a_mixture_has_negatives_of_all_its_sources_and_its_crops_keep_image_ids(tmp_path, shards, processor):
    sources = [{"data": shards[0], "flip_rate": 1.0, "crop_scale": [0.3, 0.6]}, {"data": shards[1]}]
    file = tmp_path / "mix.json"
    file.write_text(json.dumps({"sources": sources}))
    mixture = pair_data([str(file)])
    rows = list(islice(mixture, 60))
    pool = CaptionPool.read(*mixture.streams)
    assert len(pool) == 15
    batch = RetrievalCollator(processor, 40, pool)(rows)
    numbers = {row["text"]: int(number) for row, number in zip(rows, batch["image_ids"], strict=True)}
    assert len(set(numbers.values())) == 9
    assert numbers["caption 0"] == numbers["caption 1"] != numbers["caption 2"]
    assert {pool.draw({**rows[0], "epoch": epoch}) for epoch in range(200)} == {
        text for text in pool.captions if numbers[text] != numbers[rows[0]["text"]]
    }


def test_data_of_one_image_has_no_negatives(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [sample(i, png=png(1)) for i in range(3)])
    with pytest.raises(ValueError, match=r"the data has 3 captions of 1 image\(s\)"):
        CaptionPool.read(PairStream(str(shard)))


def test_retrieval_reads_negatives_of_the_pool_as_it_reads_captions(processor, shards):
    pool = CaptionPool.read(PairStream(shards))
    rows = list(PairStream(shards, epochs=1))[:4]
    batch = RetrievalCollator(processor, 40, pool, seed=2)(rows)
    for i, row in enumerate(rows):
        ids = batch["negative_input_ids"][i][batch["negative_attention_mask"][i].bool()]
        assert processor.tokenizer.decode(ids) == f"<s>{pool.draw(row, seed=2)}</s>"
    assert batch["negative_input_ids"].shape == batch["positive_input_ids"].shape == (4, 40)
    assert "negative_input_ids" not in RetrievalCollator(processor, 40)(rows)


def test_captions_are_simplified_as_published(processor):
    assert simple_caption('  A "red" bus (old); STOP!  ') == "a red bus old stop"
    assert simple_caption("it's an A/B-test, ok?") == "it's an a/b-test, ok?"
    assert simple_caption("word " * 60).count("word") == 50
    batch = RetrievalCollator(processor, 40, simple_captions=True)([pair(text="A (red) bus."), pair(1)])
    ids = batch["summarize_input_ids"][0][batch["summarize_attention_mask"][0].bool()]
    assert processor.tokenizer.decode(ids) == "<s>summarize:a red bus</s>"
