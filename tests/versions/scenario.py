"""Loads one checkpoint folder as remote code, runs it, saves it, reloads it, and prints what came out as JSON.

    python tests/versions/scenario.py FOLDER [FOLDER...]

Run in a process without this repository on its path: everything comes from the folder. The last line of the output is
one JSON list with an object per folder: `transformers`, `model_type`, `result` (tokens or rounded numbers), `reloaded`
(the same from the saved copy).
"""

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)


QUESTION = "What is shown?"
NEW_TOKENS = 8


def gradient_image() -> Image.Image:
    """A wide image of gradients, which takes several tiles."""
    y, x = np.mgrid[0:40, 0:90]
    return Image.fromarray(np.stack([x * 255 // 89, y * 255 // 39, (x * y) % 256], -1).astype("uint8"))


def answer(model: Any, processor: Any) -> list[int]:
    """Tokens of the answer to a question about the image."""
    content = [{"type": "image", "image": gradient_image()}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def similarities(model: Any, processor: Any) -> list:
    """Logits of both modes, and the tokens of a caption."""
    inputs = processor(
        images=[gradient_image()], text=["a red bus", "two cats"], mode="contrastive", return_tensors="pt"
    )
    with torch.no_grad():
        logits = [model(**inputs, mode=mode).logits_per_image[0].tolist() for mode in ("InternVL-C", "InternVL-G")]
    inputs = processor(images=[gradient_image()], mode="caption", return_tensors="pt")
    caption = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return [[round(value, 3) for row in logits for value in row], caption[0].tolist()]


def features(model: Any, processor: None) -> list[float]:
    """A few features of a fixed image."""
    pixels = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)
    with torch.no_grad():
        return [round(value, 3) for value in model(pixels).pooler_output[0, :8].tolist()]


KINDS = {
    "internvl_chat_model": ((AutoModelForImageTextToText, AutoModel, AutoModelForCausalLM), answer),
    "internvl_14b": ((AutoModel,), similarities),
    "intern_vit_6b": ((AutoModel,), features),
}


def run(folder: Path) -> dict:
    """Every door gives the same result, and so does a saved copy."""
    model_type = AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type
    doors, compute = KINDS[model_type]
    has_processor = (folder / "processor_config.json").exists()
    if has_processor:
        AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True) if has_processor else None
    results = []
    for door in doors:
        model = door.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
        results.append(compute(model, processor))
    if any(result != results[0] for result in results):
        raise SystemExit(f"{folder}: the doors {[door.__name__ for door in doors]} differ: {results}")
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        if processor is not None:
            processor.save_pretrained(saved)
            processor = AutoProcessor.from_pretrained(saved, trust_remote_code=True)
        reloaded_model = doors[0].from_pretrained(saved, trust_remote_code=True, dtype=torch.float32).eval()
        compare_buffers(model, reloaded_model)
        reloaded = compute(reloaded_model, processor)
    return {
        "transformers": transformers.__version__,
        "model_type": model_type,
        "code": type(model).__module__,
        "result": results[0],
        "reloaded": reloaded,
    }


def compare_buffers(model: Any, reloaded: Any) -> None:
    """Buffers that are not saved come back as uninitialised memory unless the model computes them again."""
    for name, buffer in model.named_buffers():
        if not torch.equal(buffer, reloaded.get_buffer(name)):
            raise SystemExit(f"the buffer `{name}` is not the same after saving and loading")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print(json.dumps([run(Path(folder)) for folder in sys.argv[1:]]))
