"""The checkpoint at the root: complete, small, and right about the bundled images through every door."""

import json
import re

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

import internvl
from internvl.chat import main as chat
from internvl.evaluation.__main__ import main as evaluate
from internvl.evaluation.captioning import evaluate_captioning
from internvl.evaluation.embeddings import embed_images
from internvl.evaluation.generated import CLASSES, labelled_images
from internvl.evaluation.metrics import accuracy
from internvl.evaluation.zero_shot import class_embeddings
from internvl.modeling_internvl import MODES
from internvl.synthetic.captions import LANGUAGES

from .fixtures_processes import run_elsewhere


@pytest.fixture(scope="module")
def questions(root) -> list[dict]:
    return json.loads((root / "examples" / "questions.json").read_text())


@pytest.fixture(scope="module")
def model(root):
    return AutoModelForImageTextToText.from_pretrained(root).eval()


@pytest.fixture(scope="module")
def processor(root):
    return AutoProcessor.from_pretrained(root)


def messages(root, row: dict) -> list[dict]:
    image = {"type": "image", "image": str(root / "examples" / row["file"])}
    return [{"role": "user", "content": [image, {"type": "text", "text": row["question"]}]}]


def encode(processor, conversation, **settings):
    return processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **settings
    )


def answer(model, processor, conversation: list[dict]) -> str:
    inputs = encode(processor, conversation)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_every_auto_class_gives_the_chat_model(root, model):
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        assert isinstance(auto_class.from_pretrained(root), internvl.InternVLChatForConditionalGeneration)
    token_id = AutoTokenizer.from_pretrained(root).convert_tokens_to_ids("<IMG_CONTEXT>")
    assert model.config.image_token_id == token_id


def test_it_is_small_and_complete(root):
    names = ("config.json", "generation_config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja")
    parts = [root / name for name in names]
    parts += [root / "internvl_g" / name for name in ("config.json", "tokenizer.json", "processor_config.json")]
    parts += [root / "internvit" / name for name in ("config.json", "preprocessor_config.json")]
    weights = [folder / "model.safetensors" for folder in (root, root / "internvl_g", root / "internvit")]
    assert all(file.exists() for file in parts + weights)
    assert sum(file.stat().st_size for file in parts + weights) <= 60e6


def test_most_bundled_questions_are_answered_right(root, model, processor, questions):
    right = [answer(model, processor, messages(root, row)).lower() == row["answer"].lower() for row in questions]
    assert sum(right) >= 0.85 * len(right)


def test_small_text_of_the_bundled_images_needs_the_tiles(root, model, processor, questions):
    rows = [row for row in questions if row["kind"] == "small_text" and "small_text" in row["file"]]
    assert len(rows) >= 2
    for row in rows:
        assert answer(model, processor, messages(root, row)) == row["answer"]
        inputs = encode(processor, messages(root, row), max_num=1)
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        assert row["answer"] not in processor.decode(output[0, inputs["input_ids"].shape[1] :])


def test_generation_ends_by_itself_at_the_end_of_the_turn(root, model, processor, questions):
    output = model.generate(**encode(processor, messages(root, questions[0])))
    assert output[0, -1] in processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


def test_published_chat_call_answers(root, model, processor, questions):
    row = questions[0]
    with Image.open(root / "examples" / row["file"]) as image:
        pixel_values = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    settings = {"max_new_tokens": 16, "do_sample": False}
    tokenizer = AutoTokenizer.from_pretrained(root)
    text, history = model.chat(tokenizer, pixel_values, row["question"], settings, history=None, return_history=True)
    assert text == answer(model, processor, messages(root, row))
    assert history == [(f"<image>\n{row['question']}", text)]
    assert settings == {"max_new_tokens": 16, "do_sample": False}


REMOTE_CODE = """
import json, sys
from transformers import AutoModel, AutoProcessor, pipeline
pipe = pipeline("image-text-to-text", model=sys.argv[1], trust_remote_code=True)
out = pipe(text=json.loads(sys.argv[2]), max_new_tokens=16, return_full_text=False)
settings = {"subfolder": "internvl_g", "trust_remote_code": True}
model = AutoModel.from_pretrained(sys.argv[1], **settings)
inputs = AutoProcessor.from_pretrained(sys.argv[1], **settings)(text=["a star"], return_tensors="pt")
assert "internvl" not in sys.modules
print(out[0]["generated_text"].strip())
print(type(model).__name__, *model.get_text_features(**inputs).shape)
"""


def test_the_pipeline_answers_and_a_sub_folder_loads_by_remote_code(root, model, processor, questions, tmp_path):
    asked = messages(root, questions[0])
    printed = run_elsewhere(tmp_path, "-c", REMOTE_CODE, root, json.dumps(asked)).splitlines()
    assert printed[-2:] == [answer(model, processor, asked), "InternVLModel 1 192"]


def test_chat_command_prints_one_answer_or_names_a_broken_image(root, model, processor, questions, tmp_path, capsys):
    row = questions[0]
    assert chat([str(root / "examples" / row["file"]), "--ask", row["question"]]) == 0
    assert capsys.readouterr().out.strip() == answer(model, processor, messages(root, row))
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert chat([str(tmp_path / "broken.png"), "--ask", "What?"]) == 2
    assert re.fullmatch(r"error: .*broken\.png.*\n", capsys.readouterr().err)


# ----------------------------------------------------------------------------------------- sub-folders of the same run
@pytest.fixture(scope="module")
def pair_model(root):
    return AutoModel.from_pretrained(root, subfolder="internvl_g").eval()


@pytest.fixture(scope="module")
def pair_processor(root):
    return AutoProcessor.from_pretrained(root, subfolder="internvl_g")


@pytest.mark.parametrize("mode", MODES)
def test_internvl_c_and_g_know_what_an_image_shows(pair_model, pair_processor, mode):
    for kind in CLASSES:
        items = labelled_images(kind, 40)
        images = embed_images(pair_model, pair_processor, [item.image for item in items], mode)
        classes = class_embeddings(pair_model, pair_processor, kind, "en")
        assert accuracy(images, classes, [item.label for item in items]) >= 0.85, kind


def test_internvl_g_describes_an_image(pair_model, pair_processor):
    report = evaluate_captioning(pair_model, pair_processor, images=10)
    assert all(report[language]["cider"] >= 1 for language in LANGUAGES)  # of 10; captions of other images have 0.03


def test_internvit_is_the_tower_of_internvl_c_and_g(root, pair_model):
    tower = AutoModel.from_pretrained(root, subfolder="internvit")
    assert isinstance(tower, internvl.InternVisionModel)
    expected = pair_model.vision_model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in tower.state_dict().items())
    assert AutoImageProcessor.from_pretrained(root, subfolder="internvit").size == {"height": 448, "width": 448}


def test_an_evaluation_runs_from_the_command_line(root, tmp_path, capsys):
    output = tmp_path / "report.json"
    assert evaluate(["dialogue", str(root), "--questions", "7", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report["questions"] == 7
    assert json.loads(capsys.readouterr().out) == report
