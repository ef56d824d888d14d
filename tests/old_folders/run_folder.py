"""Loads folders as users do and prints what their models answer, as JSON.

    python tests/old_folders/run_folder.py FOLDERS [--installed]

FOLDERS holds `chat`, `contrastive` and `adapter`, which PEFT trained on `chat`. With --installed the package is
imported first, so its classes are used; without it the code in the folders is. The calls are those of commit a090a6c.
"""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor


QUESTION = "What is shown in the image?"
NEW_TOKENS = 8


def image() -> Image.Image:
    """A wide image of gradients, which takes several tiles."""
    y, x = np.mgrid[0:40, 0:90]
    return Image.fromarray(np.stack([x * 255 // 89, y * 255 // 39, (x * y) % 256], -1).astype("uint8"))


def rounded(tensor: torch.Tensor) -> list:
    return [round(value, 4) for value in tensor.detach().float().flatten().tolist()]


def answer(model, processor) -> dict:
    """Ids of the prompt, logits of the last position, and the answer as ids and by the published helper."""
    content = [{"type": "image", "image": image()}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    output = model.generate(**inputs, **length)
    pixel_values = inputs["pixel_values"]
    published = model.chat(processor.tokenizer, pixel_values, QUESTION, length)
    return {
        "prompt": inputs["input_ids"][0].tolist(),
        "pixels": [*pixel_values.shape, *rounded(pixel_values.mean((0, 2, 3)))],
        "logits": rounded(model(**inputs).logits[0, -1]),
        "answer": output[0, inputs["input_ids"].shape[1] :].tolist(),
        "published": published,
        "features": rounded(model.extract_feature(pixel_values)[0, 0]),
    }


def compare(model, processor) -> dict:
    """Similarities in both modes, matching logits, text features and a caption."""
    inputs = processor(images=[image()], text=["a red bus", "two cats"], mode="contrastive", return_tensors="pt")
    found = {mode: rounded(model(**inputs, mode=mode).logits_per_image) for mode in ("InternVL-C", "InternVL-G")}
    found["texts"] = inputs["input_ids"].tolist()
    found["features"] = rounded(model.get_text_features(inputs["input_ids"], inputs["attention_mask"])[0])
    pairs = {**inputs, "pixel_values": inputs["pixel_values"].expand(2, -1, -1, -1)}
    found["matching"] = rounded(model.get_matching_logits(**pairs))
    inputs = processor(images=[image()], mode="caption", return_tensors="pt")
    caption = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    found["caption"] = caption[0].tolist()
    return found


@torch.no_grad()
def run(folders: Path) -> dict:
    """Everything there is to compare, with the modules of the models that gave it."""
    settings = {"trust_remote_code": True}
    chat = AutoModelForImageTextToText.from_pretrained(folders / "chat", dtype="float32", **settings).eval()
    processor = AutoProcessor.from_pretrained(folders / "chat", **settings)
    contrastive = AutoModel.from_pretrained(folders / "contrastive", dtype="float32", **settings).eval()
    found = {"code": [type(model).__module__ for model in (chat, processor, contrastive)]}
    found["chat"] = answer(chat, processor)
    adapted = PeftModel.from_pretrained(chat, folders / "adapter").eval()
    found["adapter"] = answer(adapted, processor)
    found["contrastive"] = compare(contrastive, AutoProcessor.from_pretrained(folders / "contrastive", **settings))
    return found


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    if "--installed" in sys.argv:
        import internvl  # noqa: F401
    print(json.dumps(run(Path(sys.argv[1]))))
