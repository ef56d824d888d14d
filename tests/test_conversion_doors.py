"""Moved results load through every Auto class, offline, in a process that cannot import the package.

One process loads all folders, since starting one takes longer than everything that it does here.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from .fixtures_conversions import run
from .fixtures_published import GOLDEN, published, published_14b, published_chat
from .fixtures_text import make_image


LOADER = """
import contextlib, io, json, sys
from pathlib import Path
sys.modules["internvl"] = None
import torch, transformers
results = {}
for name, (folder, doors) in json.loads(sys.argv[1]).items():
    for door in doors:
        auto = getattr(transformers, door)
        if door == "AutoBackbone":  # its `from_pretrained` asks the Hub, also for a folder
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
            part, info = auto.from_config(config, trust_remote_code=True), {}
        elif door.startswith("AutoModel"):
            part, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        else:
            part, info = auto.from_pretrained(folder, trust_remote_code=True), {}
        results[f"{name}.{door}"] = [type(part).__name__, getattr(part, "model_type", None), any(info.values())]
for name, folder in json.loads(sys.argv[2]).items():
    card = (Path(folder) / "README.md").read_text().partition("```python")[2].partition("```")[0]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(card.replace('path = "."', f"path = {folder!r}"), {})
    results[f"{name}.card"] = printed.getvalue()
print("RESULTS" + json.dumps(results))
"""
# Folder to Auto class to the class that it gives.
DOORS = {
    "vision": {
        "AutoConfig": "InternViTConfig",
        "AutoModel": "InternVisionModel",
        "AutoBackbone": "InternViTBackbone",
        "AutoModelForImageClassification": "InternViTForImageClassification",
        "AutoModelForSemanticSegmentation": "InternViTForSemanticSegmentation",
        "AutoImageProcessor": "InternVLImageProcessor",
    },
    "contrastive": {
        "AutoConfig": "InternVL14BConfig",
        "AutoModel": "InternVLModel",
        "AutoModelForZeroShotImageClassification": "InternVLModel",
        "AutoImageProcessor": "InternVLImageProcessor",
        "AutoProcessor": "InternVLProcessor",
    },
    "chat": {
        "AutoConfig": "InternVLChatConfig",
        "AutoModel": "InternVLChatForConditionalGeneration",
        "AutoModelForCausalLM": "InternVLChatForConditionalGeneration",
        "AutoModelForImageTextToText": "InternVLChatForConditionalGeneration",
        "AutoModelForMultimodalLM": "InternVLChatForConditionalGeneration",
        "AutoImageProcessor": "InternVLImageProcessor",
        "AutoProcessor": "InternVLProcessor",
        "AutoTokenizer": "TokenizersBackend",
    },
}
# A published case to its class of configuration and `model_type`.
PUBLISHED = {
    "intern_vit_6b": ("InternVisionConfig", "intern_vit_6b"),
    "internvl_14b": ("InternVL14BConfig", "internvl"),
    "chat_llama_v1": ("InternVLChatConfig", "internvl_chat"),
    "chat_internlm2_v2": ("InternVLChatConfig", "internvl_chat"),
}
# Raw files to the Auto class of the result; a backbone with a pyramid loads by its class alone, as its card does.
RAW = {
    "head": ("classification_raw", "AutoModelForImageClassification", "InternViTForImageClassification"),
    "linear": ("segmentation_raw", "AutoModelForSemanticSegmentation", "InternViTForSemanticSegmentation"),
    "pyramid": ("segmentation_raw/upernet_backbone.pth", None, None),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doors")
    sources = {
        "vision": published("intern_vit_6b", folder),
        "contrastive": published_14b(folder),
        "chat": published_chat(folder),
    }
    jobs = {}
    for name, source in sources.items():
        made = run(source, folder / "made" / name)
        jobs[name] = str(shutil.move(made, folder / f"moved-{name}")), list(DOORS[name])
    for name in PUBLISHED:
        jobs[name] = str(run(GOLDEN / name, folder / name, to="published")), ["AutoConfig", "AutoModel"]
    for name, (source, door, _) in RAW.items():
        jobs[name] = str(run(GOLDEN / source, folder / name)), [door] if door else []
    cards = {name: jobs[name][0] for name in RAW}
    make_image(90, 60).save(folder / "image.jpg")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-c", LOADER, json.dumps(jobs), json.dumps(cards)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.partition("RESULTS")[2])


@pytest.mark.parametrize("kind", DOORS)
def test_every_auto_class_loads_the_moved_result(kind, loaded):
    assert {door: loaded[f"{kind}.{door}"][0] for door in DOORS[kind]} == DOORS[kind]


@pytest.mark.parametrize("case", PUBLISHED)
def test_the_published_format_loads_by_its_published_names(case, loaded):
    """Engines that build the model themselves load its configuration by `auto_map`."""
    assert tuple(loaded[f"{case}.AutoConfig"][:2]) == PUBLISHED[case]
    has_other_keys = loaded[f"{case}.AutoModel"][2]
    assert not has_other_keys


@pytest.mark.parametrize("name", ["head", "linear"])
def test_heads_of_raw_checkpoints_load_with_all_of_their_keys(name, loaded):
    _, door, wanted = RAW[name]
    assert loaded[f"{name}.{door}"] == [wanted, None, False]


def test_the_snippets_of_the_cards_run(loaded):
    assert all(loaded[f"{name}.card"] for name in RAW)
    assert "[(1, 48, 16, 16), (1, 48, 8, 8), (1, 48, 4, 4), (1, 48, 2, 2)]" in loaded["pyramid.card"]
