"""Writes `a090a6c.tar.xz`: folders made by the code of commit a090a6c, and what that code answers with them.

    git worktree add --detach OLD a090a6c && mkdir PATH_OF_OLD && ln -s OLD PATH_OF_OLD/internvl
    PYTHONPATH=PATH_OF_OLD python tests/old_folders/write.py OLD

It is run once. The archive holds `chat` (the full configuration), `contrastive` (InternVL-C and -G), both as `python
-m internvl.conversion` writes them with code, weights in bf16, processor and card; `adapter`, a LoRA trained for two
steps on `chat` by PEFT; and `outputs.json`.
"""

import json
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model


HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(Path(sys.argv[1]) / "tests"), str(Path(sys.argv[1]) / "tests" / "versions")]

import run_folder  # noqa: E402
import tiny_checkpoints  # noqa: E402

from internvl.conversion import convert  # noqa: E402


WIDTH = 16


def make_checkpoints(folder: Path) -> None:
    tiny_checkpoints.WIDTH = WIDTH
    tiny_checkpoints.SIZES.update(hidden_size=WIDTH, intermediate_size=24)
    vocab_size = len(tiny_checkpoints.make_tokenizer())
    full = {
        "connector": "queries_and_patches",
        "qllama_config": tiny_checkpoints.qllama_config(vocab_size),
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "max_dynamic_patch": 4,
    }
    made = {"chat": tiny_checkpoints.chat("qwen2", **full), "contrastive": tiny_checkpoints.contrastive()}
    for name, (model, processor) in made.items():
        tiny_checkpoints.write(model.to(torch.bfloat16), folder / "sources" / name, processor)
        convert(folder / "sources" / name, folder / name, show_progress=False)


def train_adapter(folder: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(folder / "chat", dtype="float32")
    processor = AutoProcessor.from_pretrained(folder / "chat")
    inputs = processor(images=[run_folder.image()], text="<IMG_CONTEXT> a red bus", return_tensors="pt")
    targets = r".*(vision_model.*\.qkv|language_model.*\.(q|v)_proj|qllama.*\.k_proj)"
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets, modules_to_save=["mlp1"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(2):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder / "adapter")
    # The card and the settings name the folder by its whole path.
    (folder / "adapter" / "README.md").unlink()
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "chat"}, indent=2))


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_checkpoints(folder)
        train_adapter(folder)
        outputs = run_folder.run(folder)
        del outputs["code"]
        (folder / "outputs.json").write_text(json.dumps(outputs))
        with tarfile.open(HERE / "a090a6c.tar.xz", "w:xz", preset=9) as archive:
            for name in ("adapter", "chat", "contrastive", "outputs.json"):
                archive.add(folder / name, name)


if __name__ == "__main__":
    main()
