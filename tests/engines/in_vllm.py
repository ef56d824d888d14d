"""Asks one checkpoint in vLLM, offline: `python in_vllm.py CHECKPOINT.json OUT.json`, in vLLM's own environment.

CHECKPOINT.json holds `folder`, `questions` (images, text), `new_tokens`, and `tensor_parallel`; OUT.json gets the
tokens of each answer. Nothing tells vLLM how this package's models are made: no plugin, no overrides. fp32, so that
tokens can be compared.
"""

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from vllm import LLM, SamplingParams


def conversation(question: dict[str, Any]) -> list[dict[str, Any]]:
    images = [{"type": "image_pil", "image_pil": Image.open(path).convert("RGB")} for path in question["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question["text"]}]}]


def main(job: dict[str, Any]) -> list[list[int]]:
    engine = LLM(
        job["folder"],
        trust_remote_code=True,
        dtype="float32",
        max_model_len=2048,
        max_num_seqs=4,
        enforce_eager=True,  # compiling takes minutes; `vllm serve` is run compiled
        tensor_parallel_size=job["tensor_parallel"],
    )
    greedy = SamplingParams(temperature=0, max_tokens=job["new_tokens"])
    # All at once, so that they are batched.
    outputs = engine.chat([conversation(question) for question in job["questions"]], greedy, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
