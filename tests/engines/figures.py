"""Generated images in the layouts that harnesses read, and what this package measures on them.

    python tests/engines/figures.py OUT

makes OUT/classes and OUT/pairs (shards of clip-benchmark), OUT/questions (questions.json with its images),
OUT/images.json (the same images for MTEB and sentence-transformers) and OUT/figures.json. Images are shrunk and noisy,
so that the bundled models are wrong now and then: figures of 1 would be equal whatever was compared.
"""

import io
import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import internvl  # noqa: E402, F401 (registers the classes)
from internvl.evaluation.dialogue import answer_questions  # noqa: E402
from internvl.evaluation.embeddings import embed_images, embed_texts  # noqa: E402
from internvl.evaluation.generated import (  # noqa: E402
    CLASSES,
    class_prompts,
    held_out_questions,
    held_out_scenes,
    labelled_images,
)
from internvl.evaluation.metrics import CUTS, accuracy, is_correct, recalls_both_ways  # noqa: E402
from internvl.evaluation.zero_shot import embed_classes  # noqa: E402
from internvl.modeling_internvl import MODES  # noqa: E402
from internvl.synthetic.captions import caption  # noqa: E402
from internvl.synthetic.scenes import draw_scene  # noqa: E402


KIND, PER_KIND, PAIRS, QUESTIONS = "digit", 120, 80, 60
SIDES = {"classes": 40, "pairs": 18}  # an image is shrunk to this, and drawn again
EXAMPLES = ROOT / "examples"


def blurred(image: Image.Image, side: int, seed: int) -> Image.Image:
    small = np.asarray(image.convert("RGB").resize((side, side)), dtype=np.float32)
    noise = np.random.default_rng(seed).normal(0, 25, small.shape)
    return Image.fromarray((small + noise).clip(0, 255).astype(np.uint8)).resize((112, 96))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_shards(folder: Path, samples: list[dict[str, bytes]], files: dict[str, str]) -> None:
    """Two shards of a split called test, and what lies beside it, as clip-benchmark writes them."""
    (folder / "test").mkdir(parents=True)
    for name, text in {**files, "test/nshards.txt": "2"}.items():
        (folder / name).write_text(text, encoding="utf-8")
    half = len(samples) // 2
    for shard, part in enumerate((samples[:half], samples[half:])):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as archive:
            for number, sample in enumerate(part):
                for extension, content in sample.items():
                    info = tarfile.TarInfo(f"{shard}-{number:04}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))


def write_classes(out: Path) -> dict[str, Any]:
    """Labelled images; of class-specific prompts clip-benchmark wants one file for all data sets."""
    items = labelled_images(KIND, PER_KIND)
    images = [blurred(item.image, SIDES["classes"], seed) for seed, item in enumerate(items)]
    labels = [item.label for item in items]
    prompts = class_prompts(KIND, "en")
    samples = [{"png": png(image), "cls": str(label).encode()} for image, label in zip(images, labels, strict=True)]
    write_shards(out / "classes", samples, {"classnames.txt": "\n".join(CLASSES[KIND])})
    by_class = dict(zip(CLASSES[KIND], prompts, strict=True))
    (out / "classes" / "prompts.json").write_text(json.dumps({"classes": by_class}))
    return {"files": write_images(out / "classes", images), "labels": labels, "prompts": prompts}


def write_pairs(out: Path) -> dict[str, Any]:
    """Scenes with two captions each, no two of which are equal: equal ones, harnesses take for wrong."""
    scenes = held_out_scenes(2 * PAIRS)
    captions = [[caption(scene, language) for language in ("en", "zh")] for scene in scenes]
    known = [text for texts in captions for text in texts]
    chosen = [n for n, texts in enumerate(captions) if all(known.count(text) == 1 for text in texts)][:PAIRS]
    images = [blurred(draw_scene(scenes[n]), SIDES["pairs"], n) for n in chosen]
    captions = [captions[n] for n in chosen]
    samples = [
        {"png": png(image), "txt": "\n".join(texts).encode()} for image, texts in zip(images, captions, strict=True)
    ]
    write_shards(out / "pairs", samples, {"dataset_type.txt": "retrieval"})
    return {"files": write_images(out / "pairs", images), "captions": captions}


def write_images(folder: Path, images: list[Image.Image]) -> list[str]:
    """The images one by one; their paths."""
    (folder / "images").mkdir()
    paths = [folder / "images" / f"{number:04}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    return [str(path) for path in paths]


def write_questions(out: Path) -> list[dict[str, str]]:
    """The bundled questions and generated ones."""
    folder = out / "questions"
    folder.mkdir()
    rows = []
    for row in json.loads((EXAMPLES / "questions.json").read_text()):
        shutil.copy(EXAMPLES / row["file"], folder)
        rows.append({"image": row["file"], "question": row["question"], "answer": row["answer"]})
    for number, item in enumerate(held_out_questions(QUESTIONS)):
        item.image.save(folder / f"generated{number}.png")
        question = item.question
        rows.append({"image": f"generated{number}.png", "question": question.text, "answer": question.answer})
    (folder / "questions.json").write_text(json.dumps(rows, ensure_ascii=False))
    return rows


def opened(paths: list[str]) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in paths]


def figures_of_pairs(classes: dict[str, Any], pairs: dict[str, Any]) -> dict[str, Any]:
    """By mode: accuracy with all prompts of a class and with the first alone, and recalls."""
    model = AutoModel.from_pretrained(ROOT / "internvl_g", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(ROOT / "internvl_g")
    prompts = {"prompts": classes["prompts"], "first prompt": [texts[:1] for texts in classes["prompts"]]}
    of_classes = {name: embed_classes(model, processor, of_set) for name, of_set in prompts.items()}
    texts = [text for of_image in pairs["captions"] for text in of_image]
    owners = [number for number, of_image in enumerate(pairs["captions"]) for _ in of_image]
    text_embeds = embed_texts(model, processor, texts)
    figures: dict[str, Any] = {}
    for mode in MODES:
        embeds = embed_images(model, processor, opened(classes["files"]), mode)
        figures[mode] = {name: accuracy(embeds, rows, classes["labels"]) for name, rows in of_classes.items()}
        embeds = embed_images(model, processor, opened(pairs["files"]), mode)
        figures[mode]["recalls"] = recalls_both_ways(embeds, text_embeds, texts, CUTS, owners)
    return figures


def figures_of_questions(folder: Path, rows: list[dict[str, str]]) -> dict[str, Any]:
    """Answers and the share of right ones, in each precision in which a harness computes."""
    items = [(Image.open(folder / row["image"]).convert("RGB"), row["question"]) for row in rows]
    figures = {}
    for dtype in ("float32", "bfloat16"):
        model = AutoModelForImageTextToText.from_pretrained(ROOT, dtype=dtype).eval()
        answers = answer_questions(model, AutoProcessor.from_pretrained(ROOT), items, batch_size=1)
        right = [is_correct(answer, row["answer"]) for answer, row in zip(answers, rows, strict=True)]
        figures[dtype] = {"answers": answers, "exact_match": sum(right) / len(right)}
    return figures


def main(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    torch.manual_seed(0)
    classes, pairs, rows = write_classes(out), write_pairs(out), write_questions(out)
    (out / "images.json").write_text(json.dumps({"classes": classes, "pairs": pairs}, ensure_ascii=False))
    figures = {**figures_of_pairs(classes, pairs), "questions": figures_of_questions(out / "questions", rows)}
    (out / "figures.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
