"""The checkpoint at the root: complete, small, and right about the bundled images through every door."""

import json
import subprocess
import sys

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
    pipeline,
)

import internvl
from internvl.evaluation.__main__ import main as evaluate
from internvl.evaluation.captioning import evaluate_captioning
from internvl.evaluation.embeddings import embed_images
from internvl.evaluation.generated import CLASSES, labelled_images
from internvl.evaluation.metrics import accuracy
from internvl.evaluation.zero_shot import class_embeddings
from internvl.modeling_internvl import MODES
from internvl.synthetic.captions import LANGUAGES


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


def run_without_the_package(script: str, *arguments: str, folder) -> subprocess.CompletedProcess[str]:
    """Runs a script where `import internvl` is up to the script."""
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", script, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


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


def test_a_batch_of_unequal_images_answers_as_one_by_one(root, model, processor, questions):
    rows = list({row["file"]: row for row in questions}.values())
    inputs = encode(processor, [messages(root, row) for row in rows], padding=True)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    together = [text.strip() for text in processor.batch_decode(output, skip_special_tokens=True)]
    assert together == [answer(model, processor, messages(root, row)) for row in rows]


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


def test_pipeline_answers(root, model, processor, questions):
    row = questions[0]
    pipe = pipeline("image-text-to-text", model=str(root))
    result = pipe(text=messages(root, row), max_new_tokens=16, return_full_text=False)
    assert result[0]["generated_text"].strip() == answer(model, processor, messages(root, row))


def test_pipeline_answers_by_remote_code_without_the_package(root, model, processor, questions, tmp_path):
    row = questions[0]
    script = (
        "import json, sys\n"
        "from transformers import pipeline\n"
        "pipe = pipeline('image-text-to-text', model=sys.argv[1], trust_remote_code=True)\n"
        "assert 'internvl' not in sys.modules\n"
        "out = pipe(text=json.loads(sys.argv[2]), max_new_tokens=16, return_full_text=False)\n"
        "print(out[0]['generated_text'].strip())\n"
    )
    arguments = [str(root), json.dumps(messages(root, row))]
    done = run_without_the_package(script, *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == answer(model, processor, messages(root, row))


def test_chat_command_prints_one_answer(root, model, processor, questions):
    row = questions[0]
    command = [sys.executable, "-m", "internvl.chat", str(root / "examples" / row["file"]), "--ask", row["question"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answer(model, processor, messages(root, row))


def test_chat_command_names_a_broken_image(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    command = [sys.executable, "-m", "internvl.chat", str(broken), "--ask", "What?"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "broken.png" in done.stderr
    assert "Traceback" not in done.stderr


def test_conversation_goes_on_without_encoding_the_image_again(root, questions):
    from internvl.chat import Conversation

    conversation = Conversation(root, max_new_tokens=16)
    encoded = []
    conversation.model.vision_model.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    rows = [row for row in questions if row["file"] == questions[0]["file"]]
    answers = [conversation.ask(rows[0]["question"], [str(root / "examples" / rows[0]["file"])])]
    answers += [conversation.ask(row["question"]) for row in rows[1:]]
    assert len(encoded) == 1
    afresh = Conversation(root, max_new_tokens=16)
    afresh.messages = conversation.messages[:-2]
    assert answers[-1] == afresh.ask(rows[-1]["question"])


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


def test_sub_folders_load_by_remote_code_without_the_package(root, tmp_path):
    script = (
        "import sys\n"
        "from transformers import AutoModel, AutoProcessor\n"
        "settings = {'subfolder': 'internvl_g', 'trust_remote_code': True}\n"
        "model = AutoModel.from_pretrained(sys.argv[1], **settings)\n"
        "inputs = AutoProcessor.from_pretrained(sys.argv[1], **settings)(text=['a star'], return_tensors='pt')\n"
        "assert 'internvl' not in sys.modules\n"
        "print(type(model).__name__, *model.get_text_features(**inputs).shape)\n"
    )
    done = run_without_the_package(script, str(root), folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["InternVLModel", "1", "192"]


@pytest.mark.parametrize(
    ("task", "options", "measured"),
    [
        ("dialogue", ["--questions", "7"], {"questions": 7}),
        ("zero_shot", ["--subfolder", "internvl_g", "--images", "3", "--batch-size", "2"], {"images": 3}),
    ],
)
def test_evaluations_run_from_the_command_line(root, task, options, measured, tmp_path, capsys):
    output = tmp_path / "report.json"
    assert evaluate([task, str(root), *options, "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report.items() >= measured.items()
    assert json.loads(capsys.readouterr().out) == report


def test_weights_are_finite(model):
    assert all(torch.isfinite(p).all() for p in model.parameters())
