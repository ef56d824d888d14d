"""Captions of a data set in its real layout: generated as published, kept, resumed and scored."""

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModel, AutoProcessor

from internvl.evaluation import caption, caption_scores
from internvl.evaluation.caption import chat_captions
from internvl.evaluation.caption_scores import PTB_TOKENIZER, score_captions, tokenize_captions
from internvl.evaluation.captioning import generate_captions
from internvl.evaluation.data.opening import open_data
from internvl.evaluation.generated import held_out_scenes
from internvl.evaluation.protocols.protocol import find_protocol
from internvl.evaluation.runs import TaskRun, measure
from internvl.evaluation.samples import SampleLog, read_samples
from internvl.synthetic.captions import caption as caption_of
from internvl.synthetic.scenes import draw_scene

from .test_caption_scores import needs_java
from .test_pair_evaluations import tiny_model, tiny_processor


WORDS = ["a red star", "two blue rings on the left", "a green cross below a star"]


@pytest.fixture(scope="module")
def chat_checkpoint():
    root = Path(__file__).resolve().parents[1]
    return AutoModel.from_pretrained(root).float().eval(), AutoProcessor.from_pretrained(root)


@pytest.fixture
def coco(tmp_path):
    """COCO as Karpathy's split has it: five captions of each image."""
    root = tmp_path / "data" / "coco"
    (root / "val2014").mkdir(parents=True)
    rows = []
    for number, scene in enumerate(held_out_scenes(5)):
        name = f"val2014/COCO_val2014_{number:012d}.jpg"
        draw_scene(scene).resize((60, 60)).save(root / name)
        rows.append({"image": name, "caption": [caption_of(scene), *WORDS, f"a picture of number {number}"]})
    (root / "coco_karpathy_test.json").write_text(json.dumps(rows))
    return tmp_path / "data"


def run_of(root, path, settings=(), batch_size=2):
    protocol = find_protocol("coco-captions")
    data = open_data(protocol, str(root))
    log = SampleLog(path, {"model": "tiny", **dict(settings)})
    return TaskRun(protocol, data, tiny_model(), tiny_processor(), log, batch_size, dict(protocol.options))


def measured(run):
    with run.log:
        return measure(run)


@needs_java
def test_captions_are_generated_as_published_and_scored_with_the_ptb_tokenizer(coco, tmp_path, monkeypatch):
    run = run_of(coco, tmp_path / "out.samples.jsonl")
    asked = []

    def generate(model, processor, images, language, batch_size, **settings):
        asked.append((len(images), settings))
        return generate_captions(model, processor, images, language, batch_size, **settings)

    monkeypatch.setattr(caption, "generate_captions", generate)
    metrics = measured(run)
    published = {"prompt": "English caption:", "num_beams": 5, "min_new_tokens": 8, "max_new_tokens": 30}
    assert asked == [(2, published), (2, published), (1, published)]
    assert set(metrics) == {f"InternVL-G/{name}" for name in ("CIDEr", "ROUGE-L", "sentence BLEU-4", "BLEU-4")}

    _, samples = read_samples(run.log.path)
    images = [Image.open(item.source) for item in run.data.items]
    alone = [generate_captions(run.model, run.processor, [image], None, 1, **published)[0] for image in images]
    assert [sample["answer"] for sample in samples] == alone
    found = [text for (text,) in tokenize_captions([[text] for text in alone], PTB_TOKENIZER)]
    expected = score_captions(found, tokenize_captions([item.captions for item in run.data.items], PTB_TOKENIZER))
    assert metrics["InternVL-G/CIDEr"]["value"] == pytest.approx(expected.cider.mean())
    assert metrics["InternVL-G/BLEU-4"]["value"] == pytest.approx(expected.bleu_4)
    assert [sample["scores"]["InternVL-G/ROUGE-L"] for sample in samples] == pytest.approx(expected.rouge_l)
    assert samples[0]["expected"] == list(run.data.items[0].captions)
    assert "comparable" not in metrics["InternVL-G/CIDEr"]


def test_a_stopped_run_goes_on_with_the_captions_that_are_left(coco, tmp_path, monkeypatch):
    written = []

    def generate(model, processor, images, *_, **__):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.extend(images)
        return [f"a star number {len(written)}"] * len(images)

    monkeypatch.setattr(caption, "generate_captions", generate)
    monkeypatch.setattr(caption_scores.shutil, "which", lambda name: None)
    with pytest.raises(KeyboardInterrupt):
        measured(run_of(coco, tmp_path / "out.samples.jsonl"))
    assert read_samples(tmp_path / "out.samples.captions.jsonl")[1][3]["answer"] == "a star number 4"
    written.clear()
    measured(run_of(coco, tmp_path / "out.samples.jsonl"))
    assert len(written) == 1
    answers = [sample["answer"] for sample in read_samples(tmp_path / "out.samples.jsonl")[1]]
    assert answers == [f"a star number {number}" for number in (2, 2, 4, 4, 1)]
    assert not (tmp_path / "out.samples.captions.jsonl").exists()
    measured(run_of(coco, tmp_path / "out.samples.jsonl"))
    assert len(written) == 1  # all is there


def test_without_java_figures_are_not_set_beside_published_ones(coco, tmp_path, monkeypatch):
    monkeypatch.setattr(caption_scores.shutil, "which", lambda name: None)
    monkeypatch.setattr(caption, "generate_captions", lambda model, processor, images, *_, **__: WORDS[: len(images)])
    metrics = measured(run_of(coco, tmp_path / "out.samples.jsonl"))
    for name in ("CIDEr", "ROUGE-L", "BLEU-4"):
        assert metrics[f"InternVL-G/{name}"]["comparable"] is False
        assert "other tokeniser" in metrics[f"InternVL-G/{name}"]["notes"][0]
    assert 0 < metrics["InternVL-G/BLEU-4"]["value"] <= 1


@pytest.mark.parametrize(
    ("name", "figure"), [("coco-captions", 128.2), ("flickr30k-captions", 79.2), ("nocaps", 113.7)]
)
def test_the_protocols_have_the_figures_of_table_10(name, figure):
    protocol = find_protocol(name, "caption")
    assert protocol.published["InternVL-G"]["CIDEr"] == figure
    assert protocol.options["InternVL-G"] == caption.GENERATION["InternVL-G"]
    assert protocol.prompts == caption.PROMPTS


def test_nocaps_and_flickr30k_are_read_in_their_layouts(tmp_path):
    nocaps, flickr = tmp_path / "nocaps", tmp_path / "flickr30k"
    for folder in (nocaps / "images", flickr / "Images"):
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "a.jpg")
    content = {
        "images": [{"id": 7, "file_name": "a.jpg", "domain": "in-domain"}],
        "annotations": [{"id": 1, "image_id": 7, "caption": "one"}, {"id": 2, "image_id": 7, "caption": "two"}],
    }
    (nocaps / "nocaps_val_4500_captions.json").write_text(json.dumps(content))
    content["images"][0] = {"id": 7, "image": "a.jpg"}  # as the published evaluation takes it too
    (flickr / "flickr30k_test_karpathy.json").write_text(json.dumps(content))
    for name in ("nocaps", "flickr30k-captions"):
        (item,) = open_data(find_protocol(name), str(tmp_path)).items
        assert item.captions == ("one", "two")
        assert item.read()[0].size == (8, 8)


def test_a_chat_model_is_asked_for_a_caption(chat_checkpoint):
    """In a batch as alone."""
    model, processor = chat_checkpoint
    images = [draw_scene(scene) for scene in held_out_scenes(3)]
    settings = {"num_beams": 1, "min_new_tokens": 3, "max_new_tokens": 6}
    prompt = caption.PROMPTS["chat"]
    found = chat_captions(model, processor, images, prompt, **settings)
    assert found == [chat_captions(model, processor, [image], prompt, **settings)[0] for image in images]
    assert all(found)
