"""Which variables and keys a chat template reads, found by parsing it, and its errors as `ValueError`.

jinja2 is an optional dependency of transformers, which alone runs templates; here they are only parsed.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from traceback import walk_tb

from transformers.utils import is_jinja_available


if is_jinja_available():
    from jinja2 import TemplateError, meta, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

# Marks of transformers' own around what the assistant writes; jinja2 alone does not know them.
_GENERATION_MARKS = re.compile(r"{%[-+]?\s*(?:end)?generation\s*[-+]?%}")


@dataclass(frozen=True)
class TemplateNames:
    """Names in a chat template.

    Args:
        variables: What it takes from outside: `messages`, `tools`, `add_generation_prompt`...
        words: Attributes, keys and strings: everything by which it may ask a message or a part of one for something.
    """

    variables: frozenset[str]
    words: frozenset[str]


@lru_cache(maxsize=32)
def template_names(jinja: str) -> TemplateNames:
    """Parses a chat template.

    Args:
        jinja: Its text.

    Returns:
        The names in it.

    Raises:
        ImportError: If jinja2 is missing.
        ValueError: If the text is no template.
    """
    if not is_jinja_available():
        raise ImportError("Chat templates need jinja2: `pip install jinja2`.")
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    with refusals_as_value_errors():
        tree = environment.parse(_GENERATION_MARKS.sub("", jinja))
        variables = meta.find_undeclared_variables(tree)  # refuses filters that do not exist
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    strings = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return TemplateNames(frozenset(variables), frozenset(attributes | strings))


@contextmanager
def refusals_as_value_errors() -> Iterator[None]:
    """Turns what a template raises (`raise_exception`, a missing variable, broken syntax, a content of a type that it does not
    expect) into a `ValueError`."""
    try:
        yield
    except TemplateError as error:
        raise ValueError(f"The chat template refuses this conversation: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        if not any(frame.f_code.co_filename == "<template>" for frame, _ in walk_tb(error.__traceback__)):
            raise
        raise ValueError(f"The chat template cannot render this conversation: {error}") from error


__all__ = ["TemplateNames", "refusals_as_value_errors", "template_names"]
