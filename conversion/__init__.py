"""Converts published checkpoints to complete repositories of this package: `python -m internvl.conversion SOURCE OUT`.

Each stands above the ones before it:

- readers: bytes to tensors that are read when they are needed; they know no model
- repository: what a written folder is made of besides its format
- formats: how a checkpoint is recognised, read and written, format by format
- plan: what a conversion will do, known before anything is written
- verify: whether the result holds what its source held
- convert: the whole run
"""

from .. import starts_a_command


if not starts_a_command():
    from .convert import convert

__all__ = ["convert"]
