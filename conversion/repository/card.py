"""README.md of the result: front matter that the Hub reads, and a snippet that runs."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from .licence import UNKNOWN, copy_license, license_fields
from .result import Result


TAGS = {
    "text": [],
    "encoder": [],
    "part": [],
    "vision": ["vision"],
    "contrastive": ["vision", "image-to-text", "retrieval"],
    "chat": ["vision", "multimodal", "conversational"],
}

# By kind of model, or by class where that differs from its kind's.
SNIPPETS = {
    "InternViTForImageClassification": """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

path = "."  # this folder, or its id on the Hub
model = AutoModelForImageClassification.from_pretrained(path, trust_remote_code=True).eval()
image_processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=True)
inputs = image_processor(Image.open("image.jpg"), return_tensors="pt")
with torch.no_grad():
    logits = model(inputs["pixel_values"]).logits
print(logits.softmax(dim=-1).topk(min(5, model.num_labels)))
""",
    "InternViTForSemanticSegmentation": """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

path = "."  # this folder, or its id on the Hub
model = AutoModelForSemanticSegmentation.from_pretrained(path, trust_remote_code=True).eval()
image_processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=True)
image = Image.open("image.jpg")
inputs = image_processor(image, return_tensors="pt")
with torch.no_grad():
    logits = model(inputs["pixel_values"]).logits
scores = torch.nn.functional.interpolate(logits, size=(image.height, image.width), mode="bilinear")
print(scores.argmax(dim=1).shape)
""",
    "InternViTBackbone": """\
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

path = "."  # this folder, or its id on the Hub
backbone_class = get_class_from_dynamic_module("modeling_internvit.InternViTBackbone", path)
model = backbone_class.from_pretrained(path).eval()
image_processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=True)
inputs = image_processor(Image.open("image.jpg"), return_tensors="pt")
with torch.no_grad():
    feature_maps = model(inputs["pixel_values"]).feature_maps
print([tuple(feature_map.shape) for feature_map in feature_maps])
""",
    "vision": """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

path = "."  # this folder, or its id on the Hub
model = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
image_processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=True)
inputs = image_processor(Image.open("image.jpg"), return_tensors="pt")
with torch.no_grad():
    outputs = model(inputs["pixel_values"])
print(outputs.last_hidden_state.shape, outputs.pooler_output.shape)
""",
    "contrastive": """\
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

path = "."  # this folder, or its id on the Hub
model = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
texts = ["a photo of a cat", "a photo of a dog"]
inputs = processor(images=Image.open("image.jpg"), text=texts, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs, mode="InternVL-G")  # or "InternVL-C"
print(outputs.logits_per_image.softmax(dim=-1))
""",
    "chat": """\
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

path = "."  # this folder, or its id on the Hub
model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
content = [{"type": "image", "image": Image.open("image.jpg")}, {"type": "text", "text": "What is shown?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
tokens = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(tokens[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
""",
}


SNIPPETS["text"] = """\
from transformers import AutoModelForCausalLM

path = "."  # this folder, or its id on the Hub
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
"""
SNIPPETS["encoder"] = SNIPPETS["text"].replace("AutoModelForCausalLM", "AutoModel")
SNIPPETS["part"] = """\
# A part of a model, of which another is made by `python -m internvl.conversion assemble`.
"""
PUBLISHED_SNIPPET = """\
from transformers import AutoModel

path = "."  # this folder, or its id on the Hub
model = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
"""
# By `--to`: the end of the title, and whose the files beside the weights are.
TARGET_TEXTS = {
    "part": (
        "alone",
        "this folder holds a part of the model, which the InternVL package took out of it. "
        "`python -m internvl.conversion assemble` makes another model of it.",
    ),
    "internvl": (
        "for today's transformers",
        "code, processor and configuration are those of the InternVL package, which wrote this folder.",
    ),
    "published": (
        "in the published layout",
        "names and configuration are those of the releases, for engines and code that read them (vLLM's "
        "`InternVLChatModel`, llama.cpp's `convert_hf_to_gguf.py`). The code is that of the InternVL package, which "
        "wrote this folder, under the published names.",
    ),
    "native": (
        "for transformers' own InternVL",
        "names, configuration and processor are transformers' own, so nothing here needs remote code; the processor "
        "needs torchvision. The InternVL package wrote this folder.",
    ),
}


def snippet_of(result: Result, to: str) -> str:
    """Code that runs a model in the format that `to` names."""
    if to == "published":
        return PUBLISHED_SNIPPET
    snippet = SNIPPETS.get(result.model_class.__name__) or SNIPPETS[result.kind]
    return snippet.replace(", trust_remote_code=True", "") if to == "native" else snippet


def front_matter(text: str) -> dict[str, str]:
    """Reads the plain `key: value` lines of a card's front matter, without nested values."""
    block = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    pairs = re.findall(r"^(\w+):[ \t]*(\S[^\n]*)$", block.group(1), re.MULTILINE) if block else []
    return {key: value.strip().strip("'\"") for key, value in pairs}


def hub_id(folder: Path) -> str | None:
    """The id of a repository whose folder lies in the Hub's cache."""
    for part in folder.absolute().parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return None


def write_card(target: Path, name: str, result: Result, source_folder: Path, facts: dict[str, Any], to: str) -> None:
    """Writes README.md.

    The source's card names the licence, its place in the Hub's cache the repository.

    Args:
        target: Folder of the result.
        name: Name of the source's format.
        result: What is written.
        source_folder: Folder of the source.
        facts: Label to value, for the list in the card.
        to: Value of `--to` of the result's format.
    """
    card = source_folder / "README.md"
    published = front_matter(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else {}
    base_model = hub_id(source_folder)
    code = ("custom_code",) if any(target.glob("*.py")) else ()
    data = ModelCardData(
        **license_fields(published, copy_license(source_folder, target), base_model),
        library_name="transformers",
        pipeline_tag=result.pipeline_tag,
        base_model=base_model,
        tags=["internvl", *code, *TAGS[result.kind]],
    )
    title, remark = TARGET_TEXTS[to]
    lines = ["---", data.to_yaml(), "---", ""]
    title_name = base_model or name.partition(",")[0]
    lines += [
        f"# {title_name}, {title}",
        "",
        f"The weights are those of {base_model or 'the published checkpoint'}; {remark}",
        "",
        "```python",
        snippet_of(result, to).rstrip(),
        "```",
        "",
        *(f"- {label}: {value}" for label, value in facts.items()),
    ]
    if data.license == UNKNOWN:
        lines += ["", "The source names no licence: look at where its weights come from before passing them on."]
    (target / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
