"""Tasks on data in the layouts in which benchmarks are published, by the bundled InternVL-C and -G."""

import json
import tarfile

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from internvl.evaluation.__main__ import main
from internvl.evaluation.card import card_rows
from internvl.evaluation.data.folders import imagenet, match_folders
from internvl.evaluation.data.opening import open_data, protocols_below
from internvl.evaluation.data.prompts import benchmark_classes, benchmark_templates
from internvl.evaluation.protocols.protocol import find_protocol, read_protocol, shipped_protocols
from internvl.evaluation.reports import read_report
from internvl.evaluation.samples import read_samples

from . import fixtures_benchmarks as benchmarks
from .conftest import ROOT, made_once


MODEL = ["--subfolder", "internvl_g", "--batch-size", "4", "--image-size", "56"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return made_once(tmp_path_factory, "benchmarks", benchmarks.write_all)


@pytest.fixture(scope="module")
def model_and_processor():
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(ROOT, subfolder="internvl_g").eval()
    processor = AutoProcessor.from_pretrained(ROOT, subfolder="internvl_g")
    processor.image_processor.size = {"height": 56, "width": 56}
    return model, processor


def evaluate(task: str, data, protocol: str, output, *more: str):
    arguments = [task, str(ROOT), *MODEL, "--data", str(data), "--protocol", protocol, "--output", str(output), *more]
    assert main(arguments) == 0
    return read_report(output)


# ----------------------------------------------------------------------------------------------------------- protocols
def test_every_shipped_protocol_is_one_whose_layout_is_known():
    from internvl.evaluation.data.opening import LAYOUTS

    protocols = shipped_protocols()
    assert len(protocols) >= 51
    tasks = {"zero_shot", "retrieval"}
    assert {one.data["layout"] for one in protocols.values() if one.task in tasks} <= set(LAYOUTS)


def test_the_card_has_every_figure_of_the_papers_tables():
    of_table = {}
    for one in shipped_protocols().values():
        for mode, figures in one.published.items():
            if mode.startswith("InternVL"):
                of_table.setdefault(one.published["source"], []).extend(figures.values())
    sizes = {name: len(found) for name, found in of_table.items()}
    assert sizes["table 6"] == 10
    assert sizes["table 7"] == 48
    assert sizes["table 8"] == 12
    assert sizes["table 13"] == 16
    assert sizes["table 14"] == 24
    assert sum(of_table["table 16"]) / len(of_table["table 16"]) == pytest.approx(78.1, abs=0.05)  # the paper's mean


def test_a_protocol_of_a_user_needs_no_code(data, tmp_path):
    path = tmp_path / "shapes.json"
    content = {"task": "zero_shot", "data": {"layout": "class_folders"}, "prompts": {"templates": ["{c}"]}}
    path.write_text(json.dumps(content))
    report = evaluate("zero_shot", data / "own", str(path), tmp_path / "report.json")
    assert report["protocol"] == "shapes"
    assert set(report["metrics"]) >= {"InternVL-C/top-1", "InternVL-G/top-1", "InternVL-C/mean per class"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "JSON object"),
        ("{", "no JSON"),
        ('{"task": "guessing", "data": {"layout": "captions"}}', "guessing"),
        ('{"task": "retrieval", "data": {"layout": "captions"}, "modes": ["InternVL-X"]}', "InternVL-X"),
        ('{"task": "retrieval", "data": {}}', "layout"),
        ('{"task": "retrieval", "data": {"layout": "captions"}, "metric": "R@1"}', "no key 'metric'"),
    ],
)
def test_what_is_no_protocol_is_refused_with_the_reason(tmp_path, content, message):
    path = tmp_path / "protocol.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_protocol(path)


# ----------------------------------------------------------------------------------------------------------- zero-shot
def test_zero_shot_equals_a_slow_evaluation_by_hand(data, model_and_processor, tmp_path):
    report = evaluate("zero_shot", data, "eurosat", tmp_path / "report.json")
    model, processor = model_and_processor
    names, templates = benchmark_classes("eurosat"), benchmark_templates("eurosat")
    classes = []
    right = {1: 0, 5: 0}
    by_class: dict[str, list[int]] = {}
    with torch.inference_mode():
        for name in names:
            inputs = processor(text=[t.format(c=name) for t in templates], mode="contrastive", return_tensors="pt")
            prompts = F.normalize(model.get_text_features(**inputs), dim=-1)
            classes.append(F.normalize(prompts.mean(0), dim=-1))
        samples = read_samples(tmp_path / "report.samples.jsonl")[1]
        for sample in samples:
            image = Image.open(data / "eurosat" / "2750" / sample["id"])
            pixels = processor(images=[image], mode="contrastive", max_num=1, return_tensors="pt")["pixel_values"]
            features = F.normalize(model.get_image_features(pixels, mode="InternVL-C"), dim=-1)[0]
            order = sorted(range(len(names)), key=lambda place: -float(classes[place] @ features))
            expected = sample["id"].split("/")[0].replace("_", " ")
            assert sample["expected"] == expected
            assert sample["answer"] == names[order[0]]
            for k in right:
                right[k] += expected in [names[place] for place in order[:k]]
            by_class.setdefault(expected, []).append(names[order[0]] == expected)
    metrics = report["metrics"]
    assert len(samples) == 12
    assert metrics["InternVL-C/top-1"]["value"] == pytest.approx(right[1] / 12)
    assert metrics["InternVL-C/top-5"]["value"] == pytest.approx(right[5] / 12)
    mean = sum(sum(found) / len(found) for found in by_class.values()) / len(by_class)
    assert metrics["InternVL-C/mean per class"]["value"] == pytest.approx(mean)


@pytest.mark.parametrize("language", ["en", "zh", "ja", "ar", "it"])
def test_imagenet_is_read_in_five_languages(data, language):
    found = open_data(find_protocol(f"imagenet-1k-{language}"), str(data))
    assert len(found.items) == 12
    assert len(found.classes) == 1000
    assert {item.labels for item in found.items} == {(0,), (1,), (2,)}
    assert found.classes[:1] == tuple(benchmark_classes("imagenet1k", language)[:1])
    assert len(set(found.templates)) > 10


def test_subsets_and_numbered_folders_have_the_right_classes(data):
    names = benchmark_classes("imagenet1k")
    adversarial = open_data(find_protocol("imagenet-a"), str(data))
    assert len(adversarial.classes) == 200
    expected = {names[number] for number in imagenet()["imagenet-a"][:2]}
    assert {adversarial.classes[item.labels[0]] for item in adversarial.items} == expected
    version_2 = open_data(find_protocol("imagenet-v2"), str(data))
    for item in version_2.items:
        assert version_2.classes[item.labels[0]] == names[int(item.name.split("/")[0])]
    sketch = open_data(find_protocol("imagenet-sketch"), str(data))
    assert {item.labels for item in sketch.items} == {(7,), (8,)}


def test_real_labels_replace_those_of_the_folders(data):
    plain = open_data(find_protocol("imagenet-1k-en"), str(data))
    real = open_data(find_protocol("imagenet-real"), str(data))
    labels = {item.name.rsplit("_", 1)[1]: item.labels for item in real.items}
    assert len(real.items) == len(plain.items) - 1  # the second image has no label
    assert labels["00000001.JPEG"] == (0,)
    assert labels["00000003.JPEG"] == (0, 5)
    assert "00000002.JPEG" not in labels


def test_objectnet_has_the_classes_that_imagenet_has_too(data):
    found = open_data(find_protocol("objectnet"), str(data))
    assert found.classes == ("backpack", "banana")
    assert {item.name.split("/")[0]: item.labels for item in found.items} == {"backpack": (0,), "banana": (1,)}


def test_videos_average_the_features_of_their_frames(data, model_and_processor, tmp_path):
    from internvl.evaluation.embeddings import embed_frames

    found = open_data(find_protocol("kinetics400-8-frames"), str(data))
    frames = found.items[0].read(8)
    assert len(frames) == 6  # all, where there are fewer
    model, processor = model_and_processor
    together = embed_frames(model, processor, [frames, frames[:1]], ["InternVL-C"])["InternVL-C"]
    with torch.inference_mode():
        pixels = processor(images=frames, mode="contrastive", max_num=1, return_tensors="pt")["pixel_values"]
        each = model.get_image_features(pixels, mode="InternVL-C").float()
    torch.testing.assert_close(together[0], F.normalize(each.mean(0), dim=-1), atol=1e-5, rtol=1e-4)
    report = evaluate("zero_shot", data, "kinetics400-8-frames", tmp_path / "report.json")
    metrics = report["metrics"]
    both = metrics["InternVL-C/mean of top-1 and top-5"]["value"]
    assert both == pytest.approx((metrics["InternVL-C/top-1"]["value"] + metrics["InternVL-C/top-5"]["value"]) / 2)


def test_shards_give_what_folders_give(data, tmp_path):
    """A tar file as clip-benchmark exports one: an image and the number of its class."""
    folder = open_data(find_protocol("imagenet-v2"), str(data))
    with tarfile.open(tmp_path / "test.tar", "w") as tar:
        for number, item in enumerate(folder.items):
            (tmp_path / f"{number}.cls").write_text(str(item.labels[0]))
            tar.add(item.source, f"{number:04d}.jpg")
            tar.add(tmp_path / f"{number}.cls", f"{number:04d}.cls")
    shards = open_data(find_protocol("imagenet-v2"), str(tmp_path / "test.tar"))
    assert [item.labels for item in shards.items] == [item.labels for item in folder.items]
    assert shards.classes == folder.classes
    assert [item.read()[0].tobytes() for item in shards.items] == [item.read()[0].tobytes() for item in folder.items]


@pytest.mark.parametrize(
    ("folders", "classes", "expected"),
    [
        (["2", "10"], list("abcdefghijkl"), {"2": 2, "10": 10}),
        (["Sea_Lake", "annual-crop"], ["annual crop", "sea lake"], {"Sea_Lake": 1, "annual-crop": 0}),
        (["AnnualCrop", "Forest"], ["annual crop land", "forest"], {"AnnualCrop": 0, "Forest": 1}),
    ],
)
def test_folders_are_matched_with_the_classes_of_a_benchmark(folders, classes, expected):
    assert match_folders(folders, classes) == expected


def test_a_folder_of_no_known_class_says_which_file_to_give():
    with pytest.raises(ValueError, match=r"'zebra'.*classnames\.json"):
        match_folders(["forest", "zebra"], ["annual crop", "forest", "sea"])


# ----------------------------------------------------------------------------------------------------------- retrieval
RETRIEVAL = ["flickr30k", "flickr30k-cn", "coco", "xtd-en", "xtd-zh", "msr-vtt-1-frame", "msr-vtt-8-frames"]


@pytest.mark.parametrize("protocol", RETRIEVAL)
def test_every_layout_of_captions_has_the_same_scenes(data, protocol):
    found = open_data(find_protocol(protocol), str(data))
    language = {"flickr30k-cn": "zh", "xtd-zh": "zh"}.get(protocol, "en")
    number = 2 if protocol in ("flickr30k", "flickr30k-cn", "coco") else 1
    scenes = [tuple(benchmarks.captions_of(scene, language, number)) for scene in benchmarks.scenes()]
    if protocol.startswith("msr-vtt"):
        scenes = scenes[1:]  # the first video belongs to the training split
    if protocol == "coco":
        scenes.reverse()  # ids fall, and torchvision sorts by them
    assert [item.captions for item in found.items] == scenes


def slow_recall(queries, items, matches, k: int) -> float:
    right = 0
    for query, own in zip(queries, matches, strict=True):
        order = sorted(range(len(items)), key=lambda place: -float(query @ items[place]))
        right += any(place in own for place in order[:k])
    return right / len(queries)


def test_retrieval_equals_a_slow_evaluation_by_hand(data, model_and_processor, tmp_path):
    report = evaluate("retrieval", data, "coco", tmp_path / "report.json")
    model, processor = model_and_processor
    items = open_data(find_protocol("coco"), str(data)).items
    texts = [text for item in items for text in item.captions]
    owner = [place for place, item in enumerate(items) for _ in item.captions]
    with torch.inference_mode():
        pixels = processor(images=[item.read()[0] for item in items], mode="contrastive", max_num=1)["pixel_values"]
        inputs = processor(text=texts, mode="contrastive", return_tensors="pt")
        text_embeds = F.normalize(model.get_text_features(**inputs), dim=-1)
        for mode in ("InternVL-C", "InternVL-G"):
            images = F.normalize(model.get_image_features(torch.as_tensor(pixels), mode=mode), dim=-1)
            for k in (1, 5):
                texts_of = [{t for t, own in enumerate(owner) if own == place} for place in range(len(items))]
                found = report["metrics"][f"{mode}/image_to_text/R@{k}"]
                assert found["value"] == pytest.approx(slow_recall(images, text_embeds, texts_of, k))
                assert found["samples"] == len(items)
                found = report["metrics"][f"{mode}/text_to_image/R@{k}"]
                assert found["value"] == pytest.approx(slow_recall(text_embeds, images, [{one} for one in owner], k))
                assert found["samples"] == len(texts)
    _, samples = read_samples(tmp_path / "report.samples.jsonl")
    assert {sample["cluster"] for sample in samples} == {item.name for item in items}
    assert not list(tmp_path.glob("*.features"))  # embeddings go when the report is there


def test_a_caption_of_two_images_finds_its_own_only_and_either_image_finds_it(data, tmp_path):
    """As published for captions; which of two equal captions an image finds is chance."""
    images = [f"COCO_val2014_{number:012d}.jpg" for number in range(2)]
    rows = [{"image": image, "caption": "the same words"} for image in images]
    place = data / "mscoco_captions" / "val2014"
    for image in images:
        (tmp_path / image).symlink_to(place / image)
    (tmp_path / "own.json").write_text(json.dumps(rows))
    call = ["retrieval", str(ROOT), *MODEL, "--mode", "InternVL-C", "--output", str(tmp_path / "report.json")]
    assert main([*call, "--data", str(tmp_path / "own.json")]) == 0
    metrics = read_report(tmp_path / "report.json")["metrics"]
    assert metrics["InternVL-C/text_to_image/R@1"]["value"] == 0.5
    assert metrics["InternVL-C/image_to_text/R@1"]["value"] == 1


def test_candidates_are_ordered_again_by_matching(data, tmp_path):
    report = evaluate("retrieval", data, "xtd-en", tmp_path / "report.json", "--rerank", "2")
    assert "InternVL-G+ITM/image_to_text/R@1" in report["metrics"]
    plain, again = (
        report["metrics"][f"{mode}/text_to_image/R@5"]["value"] for mode in ("InternVL-G", "InternVL-G+ITM")
    )
    assert plain == again  # only the first two change places


def test_dual_softmax_is_an_option_that_is_written_down(data, tmp_path):
    report = evaluate("retrieval", data, "msr-vtt-1-frame", tmp_path / "report.json", "--dual-softmax")
    assert report["settings"]["dual_softmax"] is True


# -------------------------------------------------------------------------------------------------- killed and resumed
@pytest.mark.parametrize(("task", "protocol", "stop"), [("zero_shot", "eurosat", 4), ("retrieval", "coco", 4)])
def test_a_task_that_was_stopped_goes_on_and_gives_the_same(data, tmp_path, monkeypatch, task, protocol, stop):
    from internvl.evaluation.data import items

    whole = evaluate(task, data, protocol, tmp_path / "whole.json")
    read, calls = items.Item.read, []

    def read_until_stopped(item, frames=1):
        calls.append(item.name)
        if len(calls) == stop + 2:
            raise KeyboardInterrupt
        return read(item, frames)

    monkeypatch.setattr(items.Item, "read", read_until_stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(task, data, protocol, tmp_path / "stopped.json")
    calls.clear()
    monkeypatch.setattr(items.Item, "read", lambda item, frames=1: (calls.append(item.name), read(item, frames))[1])
    resumed = evaluate(task, data, protocol, tmp_path / "stopped.json")
    unbroken = len(open_data(find_protocol(protocol), str(data)).items) * (2 if task == "retrieval" else 1)
    assert len(calls) == unbroken - stop
    assert resumed["metrics"] == whole["metrics"]
    first, second = (read_samples(tmp_path / f"{name}.samples.jsonl")[1] for name in ("whole", "stopped"))
    assert first == second


# ---------------------------------------------------------------------------------------------------------------- card
def test_the_card_measures_what_is_there_beside_the_papers_figures(data, tmp_path, capsys):
    root = tmp_path / "root"
    root.mkdir()
    for name in ("flickr30k", "eurosat"):
        (root / name).symlink_to(data / name)
    assert {one.name for one in protocols_below(str(root))} >= {"eurosat", "flickr30k", "flickr30k-cn"}
    (root / "flickr30k").unlink()
    arguments = ["card", str(ROOT), *MODEL, "--data", str(root), "--limit", "6", "--output", str(tmp_path / "card")]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "79.4" in shown
    assert "6 images; at 56 px, the paper at 224" in shown
    report = read_report(tmp_path / "card" / "eurosat.json")
    assert card_rows(report)[0][:2] == ("EuroSAT", "InternVL-C/top-1")
    before = (tmp_path / "card" / "eurosat.json").stat().st_mtime_ns
    assert main(arguments) == 0  # read, not measured again
    assert (tmp_path / "card" / "eurosat.json").stat().st_mtime_ns == before
    assert capsys.readouterr().out == shown
    assert main([*arguments, "--tasks", "retrieval"]) == 2
    assert "No data of a protocol" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ bad data, before the model
def refused(capsys, monkeypatch, *arguments: str) -> str:
    from internvl.evaluation import commands

    monkeypatch.setattr(commands, "_load", lambda *_: pytest.fail("the model was loaded"))
    assert main([*arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1, error
    return error


@pytest.mark.parametrize(
    ("spoil", "task", "message"),
    [
        (lambda root: (root / "flickr30k" / "Images" / "1002.jpg").unlink(), "retrieval", "1002.jpg is missing"),
        (
            lambda root: (root / "flickr30k" / "Images" / "1002.jpg").write_text("no image"),
            "retrieval",
            "1002.jpg",
        ),
        (
            lambda root: (root / "flickr30k" / "flickr30k_test_karpathy.txt").write_text("image,caption\n1000.jpg,\n"),
            "retrieval",
            "line 2 has no caption",
        ),
        (
            lambda root: (root / "flickr30k" / "flickr30k_test_karpathy.txt").write_text("file,words\n1000.jpg,a\n"),
            "retrieval",
            "has the columns file, words",
        ),
        (lambda root: (root / "own" / "classnames.json").write_text("{}"), "zero_shot", "it lacks 'class_0'"),
        (lambda root: (root / "own" / "classnames.json").write_text(""), "zero_shot", "no JSON"),
        (lambda root: (root / "own" / "classnames.json").write_text('["a"]'), "zero_shot", "1 names"),
    ],
)
def test_bad_data_are_one_line_before_the_model_is_loaded(capsys, monkeypatch, tmp_path, spoil, task, message):
    benchmarks.write_flickr30k(tmp_path)
    benchmarks.write_own_classes(tmp_path)
    spoil(tmp_path)
    place = tmp_path / ("flickr30k" if task == "retrieval" else "own")
    protocol = ["--protocol", "flickr30k"] if task == "retrieval" else []
    assert message in refused(capsys, monkeypatch, task, str(ROOT), *MODEL, "--data", str(place), *protocol)


def test_unknown_languages_folders_and_protocols_are_refused(capsys, monkeypatch, data, tmp_path):
    path = tmp_path / "own.json"
    prompts = {"classes": "imagenet1k", "templates": "imagenet1k", "language": "xx"}
    path.write_text(json.dumps({"task": "zero_shot", "data": {"layout": "class_folders"}, "prompts": prompts}))
    call = ["zero_shot", str(ROOT), *MODEL, "--data"]
    places = data / "imagenet-1k" / "val"
    assert "'xx'" in refused(capsys, monkeypatch, *call, str(places), "--protocol", str(path))
    assert "no file or folder" in refused(capsys, monkeypatch, *call, str(tmp_path / "absent"))
    assert "no protocol 'imagnet'" in refused(capsys, monkeypatch, *call, str(data), "--protocol", "imagnet")
    assert "name one by --protocol" in refused(capsys, monkeypatch, *call, str(data))
    message = refused(capsys, monkeypatch, *call, str(tmp_path), "--protocol", "pets")
    assert "pets/test" in message
    assert "belongs to the task retrieval" in refused(capsys, monkeypatch, *call, str(data), "--protocol", "coco")


def test_a_model_of_another_kind_is_refused(capsys, monkeypatch, data):
    call = ["retrieval", str(ROOT), "--data", str(data), "--protocol", "coco"]
    assert "InternVL-Chat" in refused(capsys, monkeypatch, *call)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": 3, "annotations": []}', '"images" has to be a list'),
        ('{"images": [{"id": [1], "file_name": "a.jpg"}], "annotations": []}', "image 1 needs"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": {}}]}', "annotation 1 has no"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}', "have no caption"),
        ('{"images": [{"filename": "a.jpg", "sentences": 7}]}', "row 1 has no caption"),
        ('{"videos": [{"video_id": []}], "sentences": [{"video_id": []}]}', "names no image"),
        ('[{"image": "../../etc/passwd", "caption": "a"}]', "lies outside"),
        ('[{"image": "a.jpg", "caption": [1]}]', "row 1 has no caption"),
        ("[3]", "row 1 is no JSON object"),
        ("7", "none of the known layouts"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_annotations_of_another_form_are_refused_by_their_row(capsys, monkeypatch, tmp_path, content, message):
    (tmp_path / "own.json").write_text(content)
    assert message in refused(
        capsys, monkeypatch, "retrieval", str(ROOT), *MODEL, "--data", str(tmp_path / "own.json")
    )


def test_numbers_below_1_are_refused(capsys):
    for option in ("--batch-size", "--limit", "--image-size"):
        with pytest.raises(SystemExit):
            main(["zero_shot", str(ROOT), "--data", ".", option, "0"])
        assert "not above 0" in capsys.readouterr().err
