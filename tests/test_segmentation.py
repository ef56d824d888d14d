"""Segmentation: metrics against torchmetrics, the sliding window against a slow one, the layout of ADE20K."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from internvl.evaluation.corpus_intervals import interval_of_sums
from internvl.evaluation.data.ade20k import class_names, random_part, segmented_images
from internvl.evaluation.metrics import class_areas, class_ious, mean_accuracy, mean_iou, pixel_accuracy
from internvl.evaluation.samples import SampleLog
from internvl.evaluation.segmentation import (
    check_segmenter,
    count_areas,
    load_segmenter,
    segment_image,
    summarise_segmentation,
    window_of,
)
from internvl.evaluation.sliding_window import SlidingWindow, best_classes, fit_to_window, window_scores
from internvl.image_processing_internvl import InternVLImageProcessor

from . import tiny
from .fixtures_segmentation import COLOURS, write_ade20k


PROCESSOR = SimpleNamespace(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])


class Oracle:
    """Knows the classes by their colours; says nothing about how it is asked."""

    config = SimpleNamespace(num_labels=4, model_type="intern_vit_6b", patch_size=14)
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, wrong=()):
        mean, deviation = (torch.tensor(values)[:, None, None] for values in vars(PROCESSOR).values())
        self.colours = ((torch.tensor(COLOURS[1:]).float()[..., None, None] / 255) - mean) / deviation  # (4, 3, 1, 1)
        self.wrong = dict(wrong)
        self.asked = 0

    def __call__(self, pixel_values):
        self.asked += len(pixel_values)
        scores = -((pixel_values[:, None] - self.colours) ** 2).sum(2)
        order = [self.wrong.get(index, index) for index in range(4)]
        return SimpleNamespace(logits=scores[:, order])


# ------------------------------------------------------------------------------------------------------------- metrics
def random_maps(seed):
    """Predicted and expected classes, of 6: some everywhere, some absent, some images without any class."""
    rng = np.random.default_rng(seed)
    expected = rng.integers(0, rng.integers(1, 7), (8, 9))
    predicted = np.where(rng.random((8, 9)) < 0.6, expected, rng.integers(0, rng.integers(1, 7), (8, 9)))
    expected[rng.random((8, 9)) < rng.choice([0, 0.2, 0.9, 1.0])] = 255
    return torch.from_numpy(predicted), torch.from_numpy(expected)


def test_segmentation_metrics_are_those_of_torchmetrics_on_random_maps():
    kinds = set()
    for seed in range(200):
        predicted, expected = random_maps(seed)
        areas = class_areas(predicted, expected, 6).numpy()
        present = areas[1] + areas[2] > 0
        if not present.any():
            assert np.isnan(mean_iou(areas))
            kinds.add("empty")
            continue
        kinds.add(int(present.sum()))
        settings = {"num_classes": 6, "average": "none", "ignore_index": 255}
        iou = multiclass_jaccard_index(predicted[None], expected[None], **settings).numpy()
        assert class_ious(areas)[present] == pytest.approx(iou[present])
        assert mean_iou(areas) == pytest.approx(iou[present].mean())
        recall = multiclass_accuracy(predicted[None], expected[None], **settings).numpy()
        assert mean_accuracy(areas) == pytest.approx(recall[areas[2] > 0].mean())
        micro = multiclass_accuracy(predicted[None], expected[None], num_classes=6, average="micro", ignore_index=255)
        assert pixel_accuracy(areas) == pytest.approx(float(micro))
    assert {"empty", 1, 6} <= kinds


def test_the_mean_iou_of_a_set_is_that_of_its_summed_areas():
    maps = [random_maps(seed) for seed in range(30)]
    areas = np.stack([class_areas(*pair, 6).numpy() for pair in maps])
    together = class_areas(*(torch.cat([pair[i] for pair in maps]) for i in (0, 1)), 6).numpy()
    assert mean_iou(areas.sum(axis=0)) == mean_iou(together)
    low, high = interval_of_sums(mean_iou, areas)
    assert low < mean_iou(together) < high
    assert interval_of_sums(mean_iou, areas[:1]) is None  # one image does not show how much images differ


def test_intervals_of_sums_cover_as_often_as_they_say():
    """A ratio of sums, whose true value is 0.5: 95 % intervals hold it in 93 to 97 % of 400 drawn sets."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        sizes = rng.integers(1, 40, 120)
        parts = np.stack([rng.binomial(sizes, 0.5), sizes], axis=1)
        low, high = interval_of_sums(lambda sums: sums[..., 0] / sums[..., 1], parts, draws=300)
        hits += low <= 0.5 <= high
    assert 0.92 <= hits / 400 <= 0.98


# -------------------------------------------------------------------------------------------------------------- window
def slow_scores(model, pixels, size, stride):
    """mmsegmentation's loop over rows and columns."""
    height, width = pixels.shape[1:]
    rows, columns = (max(side - size + stride - 1, 0) // stride + 1 for side in (height, width))
    total, times = 0, torch.zeros(height, width)
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * stride + size, height), min(column * stride + size, width)
            top, left = max(bottom - size, 0), max(right - size, 0)
            crop = pixels[None, :, top:bottom, left:right]
            logits = F.interpolate(model(pixel_values=crop).logits, size=crop.shape[2:], mode="bilinear")
            total = total + F.pad(logits, (left, width - right, top, height - bottom))
            times[top:bottom, left:right] += 1
    return (total / times)[0]


@pytest.mark.parametrize(("height", "width"), [(56, 56), (56, 140), (98, 56), (70, 84)])
@torch.no_grad()
def test_scores_of_windows_are_those_of_the_slow_loop(height, width):
    model, window = tiny.segmenter(), SlidingWindow(56, 36, 14)
    pixels = tiny.pixels(1, height, width)[0]
    found = window_scores(model, pixels, window, batch_size=2)
    torch.testing.assert_close(found, slow_scores(model, pixels, 56, 36), atol=1e-5, rtol=1e-5)


def test_the_published_window_is_504_pixels_with_stride_322():
    config = SimpleNamespace(model_type="intern_vit_6b", patch_size=14)
    assert window_of(config) == SlidingWindow(504, 322, 14)
    assert window_of(config, 448).stride == 286
    assert SlidingWindow().starts(504) == [0]
    assert SlidingWindow().starts(1000) == [0, 322, 496]
    with pytest.raises(ValueError, match="whole patches of 14"):
        window_of(config, 500)


@pytest.mark.parametrize(
    ("size", "expected"), [((300, 400), (504, 672)), ((1000, 750), (672, 504)), ((504, 505), (504, 518))]
)
def test_an_image_keeps_its_shape_with_a_short_side_of_a_window_and_whole_patches(size, expected):
    pixels = torch.arange(3 * size[0] * size[1]).reshape(3, *size) % 256
    assert fit_to_window(pixels, SlidingWindow()).shape == (3, *expected)


def test_classes_compared_a_few_at_a_time_are_those_of_all_at_once():
    scores = torch.randn(37, 9, 11, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(scores[None], size=(20, 30), mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(best_classes(scores, 20, 30), expected)


def test_what_an_oracle_sees_is_all_right_and_what_it_confounds_is_not(tmp_path):
    items = segmented_images(write_ade20k(tmp_path, [(56, 112), (56, 56), (84, 56), (61, 90)]), "validation")
    window = SlidingWindow(56, 36, 14)
    areas = count_areas(Oracle(), PROCESSOR, items, window)
    assert mean_iou(areas[:3].sum(axis=0)) == 1.0
    assert mean_iou(areas[3]) > 0.9  # resized, so that the borders between classes are blurred
    areas = count_areas(Oracle({0: 1, 1: 0}), PROCESSOR, items[:3], window)
    summary = summarise_segmentation(areas, class_names(tmp_path))
    expected = {"wall": 0.0, "building": 0.0, "sky": 1.0, "floor": 1.0}
    assert summary["mIoU"]["classes"] == expected
    assert summary["mIoU"]["value"] == 0.5
    assert summary["mIoU"]["samples"] == 3
    assert set(summary) == {"mIoU", "mean accuracy", "pixel accuracy"}


def test_the_batch_of_windows_does_not_change_what_is_seen():
    pixels = (tiny.pixels(1, 90, 150)[0] * 60 + 128).clamp(0, 255)
    model, window = tiny.segmenter(), SlidingWindow(56, 36, 14)
    found = [segment_image(model, PROCESSOR, pixels, window, batch_size) for batch_size in (1, 5)]
    assert torch.equal(*found)
    assert len(found[0].unique()) > 1


def test_a_stopped_measurement_goes_on_and_sums_to_the_same(tmp_path):
    items = segmented_images(write_ade20k(tmp_path / "data", [(56, 70), (56, 56), (70, 56)]), "validation")
    window, model = SlidingWindow(56, 36, 14), Oracle({2: 3})
    expected = count_areas(model, PROCESSOR, items, window)
    with SampleLog(tmp_path / "samples.jsonl", {}) as log:
        count_areas(model, PROCESSOR, items[:2], window, log)
    model.asked = 0
    with SampleLog(tmp_path / "samples.jsonl", {}) as log:
        assert np.array_equal(count_areas(model, PROCESSOR, items, window, log), expected)
    assert model.asked == 2  # the windows of the last image
    assert log.done[items[0].name]["scores"].keys() == {"pixel accuracy of the image", "mIoU of the image"}


# -------------------------------------------------------------------------------------------------------------- layout
def test_the_layout_of_ade20k_is_read(tmp_path):
    root = write_ade20k(tmp_path / "ADEChallengeData2016", [(20, 30), (31, 17)], suffix=".jpg")
    for given in (tmp_path, root):  # as the archive is unpacked
        items = segmented_images(given, "validation")
        assert [item.name for item in items] == ["ADE_val_00000000", "ADE_val_00000001"]
        assert class_names(given) == ["wall", "building", "sky", "floor"]
    pixels, labels = items[1].read_pixels(), items[1].read_labels(4)
    assert pixels.shape == (3, 31, 17)
    assert labels[0, 0] == 255
    assert set(labels.unique().tolist()) - {255} <= {0, 1, 2, 3}
    (root / "objectInfo150.txt").unlink()
    assert len(class_names(root)) == 150


def spoil_missing(root):
    (root / "annotations" / "validation" / "ADE_val_00000001.png").unlink()


def spoil_folder(root):
    (root / "images").rename(root / "pictures")


def spoil_empty(root):
    for path in (root / "images" / "validation").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(spoil_missing, "ADE_val_00000001.png is not there"), (spoil_folder, "layout of ADE20K"), (spoil_empty, "no im")],
)
def test_a_folder_that_lacks_something_is_refused_by_name(spoil, message, tmp_path):
    root = write_ade20k(tmp_path, [(20, 30), (31, 17)])
    spoil(root)
    with pytest.raises(FileNotFoundError, match=message):
        segmented_images(root, "validation")


def test_unfitting_annotations_are_refused(tmp_path):
    root = write_ade20k(tmp_path, [(20, 30)])
    (item,) = segmented_images(root, "validation")
    with pytest.raises(ValueError, match="has class 4, but there are 3"):
        item.read_labels(3)
    Image.new("RGB", (30, 20)).save(item.annotation)
    with pytest.raises(ValueError, match="one number per pixel"):
        item.read_labels(4)
    Image.new("L", (20, 20), 1).save(item.annotation)
    with pytest.raises(ValueError, match="30 x 20 pixels large, and its annotation 20 x 20"):
        count_areas(Oracle(), PROCESSOR, [item], SlidingWindow(56, 36, 14))


@pytest.mark.parametrize("table", ["", "Idx\tName\n2\twall\n", "nothing"])
def test_a_broken_table_of_classes_is_refused(table, tmp_path):
    (tmp_path / "objectInfo150.txt").write_text(table)
    with pytest.raises(ValueError, match="a line for each class"):
        class_names(tmp_path)


def test_a_part_of_the_images_is_drawn_by_its_seed():
    items = list(range(160))
    part = random_part(items, 1 / 16)
    assert part == random_part(items, 1 / 16) == sorted(part)
    assert len(part) == 10
    assert part != random_part(items, 1 / 16, seed=1)
    assert random_part(items, 1.0) == items
    for share in (0.0, 0.001, 1.5):
        with pytest.raises(ValueError, match="`fraction`"):
            random_part(items, share)


# -------------------------------------------------------------------------------------------------------------- models
def test_other_models_are_refused(tmp_path):
    tiny.segmenter().save_pretrained(tmp_path / "head")
    InternVLImageProcessor(size={"height": 56, "width": 56}).save_pretrained(tmp_path / "head")
    assert check_segmenter(str(tmp_path / "head")).num_labels == 5
    model, image_processor = load_segmenter(str(tmp_path / "head"))
    assert not model.training
    assert list(image_processor.image_mean) == PROCESSOR.image_mean
    tiny.vision_model().save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match=r"internvl\.training segmentation"):
        check_segmenter(str(tmp_path / "tower"))
