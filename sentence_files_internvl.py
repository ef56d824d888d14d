# Copyright 2026 The InternVL package authors
"""Files that sentence-transformers (6 and later) reads beside InternVL-C and -G, as its `save_pretrained` writes them.

Without them it finds the same settings, with a warning. Queries and documents have the same, empty prompt, as the
processor adds prefix and end token to every text. Images are embedded in the mode of `config.default_mode`.
"""

import json
import os
from pathlib import Path
from typing import Any


SENTENCE_FILES: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {
            name: {"method": f"get_{name}_features", "method_output_name": None} for name in ("text", "image")
        },
        "module_output_name": "sentence_embedding",
    },
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer",
        "prompts": {"query": "", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    },
}


def write_sentence_files(folder: str | os.PathLike) -> None:
    """Writes the files that a folder lacks: those with prompts of a user's own stay."""
    for name, content in SENTENCE_FILES.items():
        file = Path(folder, name)
        if not file.exists():
            file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


__all__ = ["SENTENCE_FILES", "write_sentence_files"]
