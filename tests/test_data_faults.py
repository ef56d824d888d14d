"""Data and protocols with faults that only a run would meet, or that would change a figure without a word: each is
refused by a line that names it, before a model is loaded.
"""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from internvl.evaluation.data.ade20k import class_names
from internvl.evaluation.data.annotations import read_annotations
from internvl.evaluation.data.folders import match_folders
from internvl.evaluation.data.items import Item, check_items
from internvl.evaluation.data.opening import find_data, incomplete_below, open_data
from internvl.evaluation.protocols.protocol import Protocol, own_protocol, read_protocol, shipped_protocols
from internvl.rows.shards import FAULT_COLUMN, read_shards

from .fixtures_pairs import png
from .test_own_data import write_captions, write_classes, write_tar


# ----------------------------------------------------------------------------------------------------------- protocols
@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("retrieval", {"options": {"rerank": "x"}}, '"rerank" has to be a number above 0'),
        ("retrieval", {"options": {"rerank": -1}}, '"rerank" has to be a number above 0'),
        ("retrieval", {"options": {"reranked": 5}}, "no key 'reranked', only"),
        ("probe", {"options": {"pooling": "mean"}}, "pooling 'mean' is none of linear, attention"),
        ("probe", {"options": {"epochs": 1.5}}, '"epochs" has to be a number above 0'),
        ("caption", {"options": {"chat": "abc"}}, '"chat" has to be an object'),
        ("caption", {"options": {"InternVL-G": {"num_beams": "x"}}}, '"num_beams" has to be a number above 0'),
        ("caption", {"options": {"chat": {"top_p": []}}}, "'top_p' has to be a number"),
        ("zero_shot", {"prompts": {"template": ["a {c}"]}}, "no key 'template', only"),
        ("zero_shot", {"data": {"layout": "class_folders", "folder": ["x"]}}, "no key 'folder', only"),
        ("zero_shot", {"data": {"layout": "captions"}}, "none that the task zero_shot reads: class_folders"),
        ("retrieval", {"data": {"layout": "class_folders"}}, "none that the task retrieval reads: captions, xtd"),
        ("retrieval", {"data": {"layout": "xtd"}}, "are two files"),
    ],
)
def test_what_no_task_reads_in_a_protocol_is_refused(task, content, message, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"task": task, "data": {"layout": "captions"}, **content}))
    with pytest.raises(ValueError, match="mine") as error:
        open_data(read_protocol(path), str(tmp_path))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["xtd-en", "objectnet", "probe-imagenet-1k", "ade20k", "cifar10"])
def test_files_and_shards_where_a_folder_belongs(name, tmp_path):
    protocol = shipped_protocols()[name]
    with pytest.raises(ValueError, match="is a file, and the layout"):
        open_data(protocol, str(write_captions(tmp_path, ["a"])))
    if name not in ("xtd-en", "cifar10"):
        tar = write_tar(tmp_path / "a.tar", [{"0.png": png(), "0.cls": b"0"}])
        with pytest.raises(ValueError, match="are shards, and the layout"):
            open_data(protocol, tar)


# --------------------------------------------------------------------------------------------------------------- texts
def test_texts_that_no_tokenizer_takes_are_refused_with_the_data(tmp_path):
    with pytest.raises(ValueError, match=r"a caption of 1\.png holds a lone surrogate"):
        open_data(own_protocol("retrieval"), str(write_captions(tmp_path / "captions", ["a", "b\ud800"])))
    with pytest.raises(ValueError, match="of which prompts are made, holds a lone surrogate"):
        open_data(own_protocol("zero_shot"), str(write_classes(tmp_path / "classes", ["a", "\udcff"])))


# ------------------------------------------------------------------------------------------------------------- classes
def test_wordnet_ids_are_no_names(tmp_path):
    """A user of ImageNet who names no protocol would see a figure near chance."""
    folder = write_classes(tmp_path / "val", ["n01440764", "n01443537"])
    with pytest.raises(ValueError, match=r"WordNet ids, such as n01440764.*--protocol"):
        open_data(own_protocol("zero_shot"), str(folder))
    (folder / "classnames.json").write_text('["tench", "goldfish"]')
    assert open_data(own_protocol("zero_shot"), str(folder)).classes == ("tench", "goldfish")


def test_folders_of_splits_are_no_classes(tmp_path):
    """Of a data set that is half there: what is missing is named, and `val` is no class of ImageNet."""
    (tmp_path / "imagenet-1k" / "val").mkdir(parents=True)
    assert find_data(shipped_protocols()["imagenet-1k-en"], tmp_path) is None
    assert incomplete_below(str(tmp_path), ["zero_shot"]) == {
        str(tmp_path / "imagenet-1k" / "val"): ["the sub-folders of classes"]
    }


def test_a_probe_is_trained_on_two_classes(tmp_path):
    for split in ("train", "val"):
        write_classes(tmp_path / split, ["a", "b"])
    assert len(open_data(own_protocol("probe"), str(tmp_path)).training) == 2
    (tmp_path / "train" / "b" / "0.png").unlink()
    with pytest.raises(ValueError, match="train has images of fewer than two classes"):
        open_data(own_protocol("probe"), str(tmp_path))


def test_hidden_folders_hold_no_images(tmp_path):
    folder = write_classes(tmp_path, ["a", "b"])
    (folder / "a" / ".ipynb_checkpoints").mkdir()
    (folder / "a" / ".ipynb_checkpoints" / "0-checkpoint.png").write_bytes(png())
    assert [item.name for item in open_data(own_protocol("zero_shot"), str(folder)).items] == ["a/0.png", "b/0.png"]


def test_one_misspelt_folder_does_not_shift_all_of_them():
    classes = ["ship", "cat", "dog"]  # not in alphabetical order, so that folders are matched by their names
    assert match_folders(["cat", "dog", "ship"], classes) == {"cat": 1, "dog": 2, "ship": 0}
    with pytest.raises(ValueError, match="'dogs' is none of the 3 classes"):
        match_folders(["cat", "dogs", "ship"], classes)
    assert match_folders(["Kat", "dog", "ship"], sorted(classes)) == {"Kat": 0, "dog": 1, "ship": 2}
    assert match_folders(["sun"], ["sea", "sun", "sun"]) == {"sun": 1}  # of one name the first is the answer


# --------------------------------------------------------------------------------------------------- images and videos
def test_a_video_that_is_none_is_refused_before_any_is_decoded(tmp_path):
    (tmp_path / "v0.mp4").write_bytes(b"no video")
    (tmp_path / "rows.json").write_text('[{"video": "v0.mp4", "caption": "a"}]')
    with pytest.raises(ValueError, match=r"v0\.mp4 cannot be read as a video"):
        open_data(own_protocol("retrieval"), str(tmp_path / "rows.json"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_that_were_cut_off_are_refused_before_any_is_decoded(kind, tmp_path, monkeypatch):
    """Else a run stops at one of them after hours, and starts anew once it was replaced."""
    pixels = np.random.default_rng(0).integers(0, 255, (60, 60, 3)).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind)
    read = Item.read
    decoded = []
    monkeypatch.setattr(Item, "read", lambda item: decoded.append(item.name) or read(item))
    whole = file.getvalue()
    check_items([Item("a", whole)], "here")
    assert not decoded
    check_items([Item("a", whole + b"more" * 5000)], "here")  # what some cameras put behind an image
    assert decoded == ["a"]
    (tmp_path / "b").write_bytes(whole[:-1000])
    for source in (whole[: len(whole) // 2], tmp_path / "b"):
        with pytest.raises(ValueError, match="b cannot be read as an image"):
            check_items([Item("a", whole), Item("b", source)], "here")


def test_a_tar_file_that_ends_within_a_header_is_damaged(tmp_path):
    path = write_tar(tmp_path / "a.tar", [{"png": png(), "txt": b"a"}])
    content = Path(path).read_bytes()
    size = 512 * (1 - -len(png()) // 512)  # of the first member
    for length in (size + 100, size + 511):
        Path(path).write_bytes(content[:length])
        assert ["cut off within the header" in row.get(FAULT_COLUMN, "") for row in read_shards([path])] == [True]
    Path(path).write_bytes(content)
    assert [row["__key__"] for row in read_shards([path])] == ["0000"]


def test_annotations_of_pixels_are_looked_at(tmp_path):
    for kind in ("images", "annotations"):
        (tmp_path / kind / "validation").mkdir(parents=True)
    image, annotation = tmp_path / "images/validation/a.jpg", tmp_path / "annotations/validation/a.png"
    Image.new("RGB", (30, 20)).save(image)
    protocol = own_protocol("segmentation")
    for size, is_good in (((30, 20), True), ((20, 30), True), ((30, 21), False)):  # a photo may lie on its side
        Image.fromarray(np.ones(size[::-1], np.uint8)).save(annotation)
        if is_good:
            assert len(open_data(protocol, str(tmp_path)).items) == 1
            continue
        with pytest.raises(ValueError, match="30 x 20 pixels large, and its annotation 30 x 21"):
            open_data(protocol, str(tmp_path))
    annotation.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"The annotation .* cannot be read"):
        open_data(protocol, str(tmp_path))
    (tmp_path / "objectInfo150.txt").write_bytes(b"Idx\tName\n1\t\xff\n")
    with pytest.raises(ValueError, match=r"objectInfo150\.txt is no UTF-8"):
        class_names(tmp_path)


# -------------------------------------------------------------------------------------------------------------- tables
@pytest.mark.parametrize(
    ("text", "captions"),
    [
        ("caption,image\na red, round one,a.jpg\n", ["a red, round one"]),
        ('image,caption\na.jpg,"Hello," he said, "go"\n', ['"Hello," he said, "go"']),
        ('image,caption\na.jpg,"two, in quotes"\n', ["two, in quotes"]),
        ("image,number,caption\na.jpg,0,one,\n", ["one"]),
    ],
)
def test_captions_of_tables_are_whole(text, captions, tmp_path):
    (tmp_path / "t.csv").write_text(text)
    assert read_annotations(tmp_path / "t.csv") == {"a.jpg": captions}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,number,caption\na.jpg,0,a dog, running\n", "line 2: there are more fields than the 3 columns"),
        ("image," + "x" * 200_000, "is no table: field larger"),
    ],
)
def test_tables_that_would_be_cut_are_refused(text, message, tmp_path):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_annotations(tmp_path / "t.csv")


def test_videos_without_a_sentence_are_not_left_out(tmp_path):
    content = {"videos": [{"video_id": "a"}, {"video_id": "b"}], "sentences": [{"video_id": "a", "caption": "x"}]}
    (tmp_path / "m.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="1 videos have no caption, the first is b"):
        read_annotations(tmp_path / "m.json")


def test_every_shipped_protocol_is_one_that_its_task_reads():
    for protocol in shipped_protocols().values():
        assert isinstance(protocol, Protocol)
        with pytest.raises((ValueError, OSError), match=r"There is no file|not there"):
            open_data(protocol, "/nowhere")
