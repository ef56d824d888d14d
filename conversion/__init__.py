"""Published checkpoints to complete, self-contained repositories of this package: `python -m internvl.conversion SOURCE OUT`.

- layouts: which layout a source has, by its content, and its configuration in today's keys
- key_tables: data: keys to drop, names of parts, Auto classes
- source: tensors of a source, one at a time, from safetensors or from PyTorch files read without unpickling code
- shards: the weights of the result, written as they are read
- tokenizer_files: the tokenizer, without remote code; sentencepiece_model: one made of a tokenizer.model
- repository: everything else in the result
- model_card: its README.md
- convert: the whole run

Does: the three published Hub layouts (InternViT, InternVL-14B, InternVL-Chat). Does not yet: raw training layouts, LoRA-wrapped
checkpoints, and the way back.
"""

from .convert import convert


__all__ = ["convert"]
