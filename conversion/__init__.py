"""Published checkpoints to complete, self-contained repositories of this package: `python -m internvl.conversion SOURCE OUT`.

- convert: the whole run; plan: what it will do, known before anything is written; verify: whether it did
- sources: where weights come from: files, training folders, LoRA adapters, parts that lie beside each other
- layouts: what a source is: names, configuration, and how each layout is recognised
- edits: changes that are asked for: positions and patches resized, unused blocks left out
- output: what a result is made of, in each form in which it can be written
- tensors: tensors that are read when they are needed; rules: tables of names, read both ways; key_tables: such tables and other facts
- content: the model between reading and writing
"""

from .. import starts_a_command


if not starts_a_command():
    from .convert import convert

__all__ = ["convert"]
