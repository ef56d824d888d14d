"""`finetune` as the README shows it, on the bundled models and on a converted one, with forty own rows of images,
videos or pairs.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText

from internvl.conversion import convert
from internvl.training.__main__ import main

from .fixtures_benchmarks import write_clip
from .fixtures_processes import run_elsewhere
from .fixtures_published import published_chat


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).resolve().parents[1]
KINDS = ("house", "tree")
QUESTION = "What is drawn here?"
ROWS, SIDE = 40, 224
FRAMES = 2


def draw(kind: str, seed: str) -> Image.Image:
    """A house or a tree somewhere; the bundled models know neither."""
    rng = random.Random(seed)
    image = Image.new("RGB", (SIDE, SIDE), "white")
    pen, side = ImageDraw.Draw(image), rng.randrange(60, 90)
    x, y = rng.randrange(20, 100), rng.randrange(80, 120)
    if kind == "house":
        pen.rectangle((x, y, x + side, y + side), fill="orange")
        pen.polygon([(x, y), (x + side, y), (x + side // 2, y - side // 2)], fill="red")
    else:
        pen.rectangle((x + side // 2 - 6, y, x + side // 2 + 6, y + side), fill="brown")
        pen.ellipse((x, y - side // 2, x + side, y + side // 2), fill="green")
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Rows of images, of videos, and of pairs; and images that are in none of them."""
    folder = tmp_path_factory.mktemp("own")
    rows: dict[str, list[dict]] = {"images": [], "videos": []}
    captions = ["image,caption\n"]
    for number in range(ROWS):
        kind = KINDS[number % 2]
        image = draw(kind, f"row {number}")
        image.save(folder / f"{number}.png")
        write_clip(folder / f"{number}.mp4", [image] * FRAMES)
        rows["images"].append({"image": f"{number}.png", "query": f"<image>\n{QUESTION}", "response": kind})
        rows["videos"].append({"video": f"{number}.mp4", "query": f"<video>\n{QUESTION}", "response": kind})
        captions.append(f"{number}.png,a {kind}\n")
    for name, part in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "pairs.csv").write_text("".join(captions))
    for kind in KINDS:
        draw(kind, f"new {kind}").save(folder / f"{kind}.png")
    return folder


def finetune(folder: Path, model: Path, data: str, output: Path, *words: str) -> list[float]:
    """The losses."""
    arguments = ["--model", str(model), "--data", str(folder / data), "--output", str(output), "--seed", "0"]
    assert main(["finetune", *arguments, "--batch-size", "8", "--logging-steps", "1", "--workers", "0", *words]) == 0
    log = json.loads((output / "training_log.json").read_text())
    return [entry["loss"] for entry in log["finetuning"] if "loss" in entry]


ASK = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, question, frames, *images = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
for path in images:
    content = []
    for number in range(int(frames)):
        if frames != "1":
            content.append({"type": "text", "text": f"Frame{number + 1}: "})
        content.append({"type": "image", "image": Image.open(path)})
    content.append({"type": "text", "text": question})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )
    found = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    print(processor.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
assert "internvl" not in sys.modules
"""
CAPTION = """
import sys
from PIL import Image
from transformers import AutoModel, AutoProcessor

folder, *images = sys.argv[1:]
model = AutoModel.from_pretrained(folder, dtype="float32", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
for path in images:
    inputs = processor(images=Image.open(path), mode="caption", return_tensors="pt")
    found = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=8)
    print(processor.decode(found[0], skip_special_tokens=True))
assert "internvl" not in sys.modules
"""
CLASSIFY = """
import sys
from PIL import Image
from transformers import AutoModel, AutoProcessor

folder, mode, *images = sys.argv[1:]
model = AutoModel.from_pretrained(folder, dtype="float32", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
texts = ["a house", "a tree", "a red star", "a green circle"]
for path in images:
    inputs = processor(images=Image.open(path), text=texts, padding=True, return_tensors="pt")
    print(texts[model(**inputs, mode=mode).logits_per_image.argmax()])
assert "internvl" not in sys.modules
"""


def answers(place: Path, code: str, *arguments) -> list[str]:
    """What a folder says of a new house and a new tree, in a process without this package."""
    return [line.strip() for line in run_elsewhere(place, "-c", code, *arguments).splitlines()]


@pytest.mark.parametrize("data", ["images", "videos"])
@pytest.mark.parametrize("method", ["whole", "lora"])
def test_the_bundled_chat_learns_words_from_forty_rows(folder, method, data, tmp_path):
    frames = ("--video-frames", str(FRAMES)) if data == "videos" else ()
    epochs, rate = ("9", "1e-3") if method == "whole" else ("12", "1e-2")
    words = ("--method", method, "--epochs", epochs, "--learning-rate", rate)
    losses = finetune(folder, ROOT, f"{data}.jsonl", tmp_path / "out", "--max-tiles", "1", *words, *frames)
    assert len(losses) == 5 * int(epochs)
    assert losses[-1] < 0.1 * losses[0]
    images = [folder / f"{kind}.png" for kind in KINDS]
    asked = (QUESTION, FRAMES if frames else 1, *images)
    assert not set(answers(tmp_path, ASK, ROOT, *asked)) & set(KINDS)
    assert answers(tmp_path, ASK, tmp_path / "out", *asked) == list(KINDS)
    if method == "lora":
        adapted = PeftModel.from_pretrained(
            AutoModelForImageTextToText.from_pretrained(ROOT), tmp_path / "out" / "adapter"
        )
        merged = adapted.merge_and_unload().state_dict()
        for name, value in AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict().items():
            torch.testing.assert_close(value, merged[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["whole", "lora"])
def test_a_converted_qwen2_chat_learns_answers_from_forty_rows(folder, method, tmp_path):
    convert(published_chat(tmp_path), tmp_path / "model", show_progress=False)
    words = ("--method", method, "--epochs", "24", "--learning-rate", "1e-2", "--max-tiles", "1")
    losses = finetune(folder, tmp_path / "model", "images.jsonl", tmp_path / "out", *words)
    assert losses[-1] < 0.7 * losses[0]
    before, after = (
        answers(tmp_path, ASK, tmp_path / name, QUESTION, 1, folder / "0.png") for name in ("model", "out")
    )
    assert before[0] not in KINDS
    assert after[0] in KINDS


@pytest.mark.parametrize(
    ("task", "code", "arguments"),
    [
        ("captions", CAPTION, ()),
        ("retrieval", CLASSIFY, ("InternVL-G",)),
        ("contrastive", CLASSIFY, ("InternVL-C",)),
    ],
)
def test_the_bundled_internvl_g_learns_words_from_forty_pairs(folder, task, code, arguments, tmp_path):
    words = ("--task", task, "--epochs", "9", "--learning-rate", "1e-3")
    losses = finetune(folder, ROOT / "internvl_g", "pairs.csv", tmp_path / "out", *words)
    assert losses[-1] < losses[0]
    images = [folder / f"{kind}.png" for kind in KINDS]
    found = answers(tmp_path, code, tmp_path / "out", *arguments, *images)
    assert found == [f"a {kind}" for kind in KINDS]
