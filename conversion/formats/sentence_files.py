"""Files that sentence-transformers (6 and later) reads beside InternVL-C and -G, as its `save_pretrained` writes them.

Without them it finds the same settings, with a warning. Prompts are empty: the processor adds prefix and end token.
"""

from pathlib import Path
from typing import Any

from ..repository.code import write_json


MODULES = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}]
TRANSFORMER: dict[str, Any] = {
    "transformer_task": "feature-extraction",
    "modality_config": {
        name: {"method": f"get_{name}_features", "method_output_name": None} for name in ("text", "image")
    },
    "module_output_name": "sentence_embedding",
}
WHOLE = {
    "model_type": "SentenceTransformer",
    "prompts": {"query": "", "document": ""},
    "default_prompt_name": None,
    "similarity_fn_name": "cosine",
}


def write_sentence_files(folder: Path) -> None:
    """Writes modules.json, sentence_bert_config.json and config_sentence_transformers.json beside a processor."""
    write_json(folder / "modules.json", MODULES)
    write_json(folder / "sentence_bert_config.json", TRANSFORMER)
    write_json(folder / "config_sentence_transformers.json", WHOLE)
