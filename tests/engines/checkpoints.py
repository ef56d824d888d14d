"""The checkpoints that the engines are asked, the questions, and what `generate` answers, greedily and in fp32.

    python tests/engines/checkpoints.py OUT

makes OUT/NAME for every checkpoint but "root", which is this repository's own, OUT/NAME-native of one,
OUT/contrastive and OUT/converted-14b for features, and OUT/questions.json: by name the folder and the questions, each
with the paths of its images, its text, and the expected tokens and text. "root in bf16" is the root with answers in
that dtype. Heads are 32 wide, which vLLM needs on a CPU.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "versions")]

from tiny_checkpoints import chat, contrastive, qllama_config, write  # noqa: E402

from internvl.conversion.convert import convert  # noqa: E402
from tests.fixtures_published import published, published_14b  # noqa: E402
from tests.fixtures_text import make_image, make_tokenizer  # noqa: E402


NEW_TOKENS = 12
EXAMPLES = ROOT / "examples"
# Published layouts, with two heads of 32 in place of four of 16: the weights have the same shapes. Every head is a
# matrix of its own, InternLM2's under the name `output`.
CONVERTED = {
    "converted-internlm2": ("chat_internlm2_v2", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "converted-qwen2": ("chat_qwen2_v2", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "converted-llama": ("chat_llama_v1", {"num_attention_heads": 2, "num_key_value_heads": 2}),
}
# As transformers' own InternVL too, which holds simple models.
NATIVE = "converted-qwen2"


def built() -> dict[str, dict[str, Any]]:
    """Arguments of `tiny_checkpoints.chat` by name."""
    queries = qllama_config(len(make_tokenizer()))
    tied = {"hidden_size": 128, "head_dim": 32, "tie_word_embeddings": True}
    return {
        "full-untied": {
            "decoder": "llama",
            "text_settings": {"hidden_size": 128},
            "connector": "queries_and_patches",
            "qllama_config": queries,
        },
        "simple-tied": {"decoder": "qwen3", "text_settings": tied, "tie_word_embeddings": True},
    }


def make_checkpoints(out: Path) -> dict[str, Path]:
    """Folders by name."""
    for name, (case, heads) in CONVERTED.items():
        decoder = json.loads((ROOT / "tests" / "golden" / case / "config.json").read_text())["llm_config"]
        source = published(case, out, llm_config={**decoder, **heads})
        make_tokenizer(add_bos=False, eos_token="<|endoftext|>").save_pretrained(source)
        convert(source, out / name, show_progress=False)
    for name, arguments in built().items():
        model, processor = chat(**arguments)
        write(model, out / name, processor)
    convert(out / NATIVE, out / f"{NATIVE}-native", to="native", show_progress=False)
    return {"root": ROOT, "fine-tuned": fine_tune(out), **{name: out / name for name in [*CONVERTED, *built()]}}


def fine_tune(out: Path) -> Path:
    """The root after a few steps that teach it another answer; beside the merged weights lies the adapter."""
    rows = [
        {"image": row["file"], "query": f"<image>\n{row['question']}", "response": "purple"}
        for row in json.loads((EXAMPLES / "questions.json").read_text())
    ]
    (out / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "-m", "internvl.training", "finetune", "--model", ROOT, "--data", out / "own.jsonl"]
    command += ["--images", EXAMPLES, "--output", out / "fine-tuned", "--method", "lora", "--lora-rank", 8]
    command += ["--steps", 8, "--batch-size", 2, "--learning-rate", "3e-2", "--max-tiles", 1]
    subprocess.run(list(map(str, command)), check=True, cwd=out)
    return out / "fine-tuned"


def make_questions(out: Path) -> dict[str, list[dict[str, Any]]]:
    """With one image, several, and none."""
    for seed, (width, height) in enumerate([(56, 56), (120, 50)]):
        make_image(width, height, seed).save(out / f"{seed}.png")
    noise = [str(out / "0.png"), str(out / "1.png")]
    shown = [
        {"images": [str(EXAMPLES / row["file"])], "text": row["question"]}
        for row in json.loads((EXAMPLES / "questions.json").read_text())
    ]
    both = {"images": [str(EXAMPLES / "star.png"), str(EXAMPLES / "shapes.png")], "text": "What colour is the star?"}
    random = [
        {"images": noise[:1], "text": "What is shown in the image?"},
        {"images": noise, "text": "How many people are there?"},
        {"images": [], "text": "Answer briefly."},
    ]
    nothing = {"images": [], "text": "What colour is the star?"}
    return {"root": [*shown[::3], both, nothing], "random": random}


def conversation(question: dict[str, Any]) -> list[dict[str, Any]]:
    """One turn, as the processor takes it."""
    images = [{"type": "image", "image": Image.open(path).convert("RGB")} for path in question["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question["text"]}]}]


@torch.inference_mode()
def with_answers(folder: Path, questions: list[dict[str, Any]], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The folder and the questions with `tokens` and `answer`, what `generate` gives in `new_tokens`."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    processor = AutoProcessor.from_pretrained(folder)
    answered = []
    for question in questions:
        inputs = processor.apply_chat_template(
            conversation(question), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs.to(dtype), do_sample=False, max_new_tokens=NEW_TOKENS)
        tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
        answer = processor.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")  # as over_http.py compares them
        answered.append({**question, "tokens": tokens, "answer": answer})
    return {"folder": str(folder), "questions": answered, "new_tokens": NEW_TOKENS}


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model, processor = contrastive()
    write(model, out / "contrastive", processor)
    convert(published_14b(out), out / "converted-14b", show_progress=False)
    questions = make_questions(out)
    asked = {}
    for name, folder in make_checkpoints(out).items():
        own = questions["root" if name in ("root", "fine-tuned") else "random"]
        asked[name] = with_answers(folder, own)
    asked["root in bf16"] = with_answers(ROOT, questions["root"], torch.bfloat16)
    before, after = ([row["answer"] for row in asked[name]["questions"]] for name in ("root", "fine-tuned"))
    if before == after:
        raise ValueError("Fine-tuning has changed no answer: an adapter without effect would not be seen.")
    asked[NATIVE]["native"] = str(out / f"{NATIVE}-native")
    (out / "questions.json").write_text(json.dumps(asked, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
