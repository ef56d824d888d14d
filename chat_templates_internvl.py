"""Selects and parses chat templates: the variables and keys that one reads, and its errors as `ValueError`.

jinja2 is an optional dependency of transformers, which renders the templates; here they are only parsed.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from traceback import walk_tb
from typing import Any

from transformers.utils import is_jinja_available
from transformers.utils.chat_template_utils import render_jinja_template

from .conversation_internvl import IMAGE_CONTEXT_TOKEN, IMAGE_PLACEHOLDER


if is_jinja_available():
    from jinja2 import TemplateError, meta, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

# Markers that transformers adds to Jinja for what the assistant writes.
_GENERATION_MARKS = re.compile(r"{%[-+]?\s*(?:end)?generation\s*[-+]?%}")


@dataclass(frozen=True)
class TemplateNames:
    """Names in a chat template.

    Args:
        variables: Variables that it expects: `messages`, `tools`, `add_generation_prompt`...
        words: Attributes, keys and strings, with which it may access messages and their parts.
    """

    variables: frozenset[str]
    words: frozenset[str]


@lru_cache(maxsize=32)
def template_names(jinja: str) -> TemplateNames:
    """Parses the text of a chat template.

    Raises:
        ImportError: If jinja2 is missing.
        ValueError: If the text is not a valid template.
    """
    if not is_jinja_available():
        raise ImportError("Chat templates need jinja2: `pip install jinja2`.")
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    with refusals_as_value_errors():
        tree = environment.parse(_GENERATION_MARKS.sub("", jinja))
        variables = meta.find_undeclared_variables(tree)  # raises for unknown filters
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    strings = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return TemplateNames(frozenset(variables), frozenset(attributes | strings))


@contextmanager
def refusals_as_value_errors() -> Iterator[None]:
    """Converts errors of a template to `ValueError`: its own, missing variables, syntax, unexpected content."""
    try:
        yield
    except TemplateError as error:
        raise ValueError(f"The chat template refuses this conversation: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        if not any(frame.f_code.co_filename == "<template>" for frame, _ in walk_tb(error.__traceback__)):
            raise
        raise ValueError(f"The chat template cannot render this conversation: {error}") from error


def select_template(templates: str | dict[str, str] | None, chat_template: str | None) -> str:
    """Returns the text of a chat template.

    Args:
        templates: Templates of the processor: one, several by name, or None.
        chat_template: A template, the name of one, or None for the processor's default.

    Raises:
        ValueError: If there is no such template, or it does not read `messages`.
    """
    own: Any = templates
    if isinstance(own, dict):
        own = own.get("default" if chat_template is None else chat_template, chat_template)
    elif chat_template is not None:
        own = chat_template
    if own is None:
        raise ValueError(
            "The processor has no (default) chat template. Pass `chat_template`, or build the processor with one: "
            "`get_conversation_template(name).to_jinja()`."
        )
    if not isinstance(own, str) or "messages" not in template_names(own).variables:
        named = f" Templates of this processor: {', '.join(templates)}." if isinstance(templates, dict) else ""
        raise ValueError(f"`chat_template` is no template: it does not read `messages`, got {own!r:.80}.{named}")
    return own


def assistant_spans(
    conversations: list[list[dict[str, Any]]], jinja: str, tokenizer: Any, kwargs: dict[str, Any]
) -> list[Any]:
    """Finds what the assistant writes in the prompts: (start, end) characters before images are expanded.

    Args:
        conversations: Lists of messages.
        jinja: Text of the chat template, with generation markers.
        tokenizer: A fast tokenizer.
        kwargs: Arguments of `apply_chat_template` and variables of the template.

    Raises:
        ValueError: If the tokenizer, the template or an argument does not allow it.
    """
    if not tokenizer.is_fast:
        raise ValueError("Assistant masks and labels need a fast tokenizer, which knows the characters of each token.")
    if kwargs.get("continue_final_message") or kwargs.get("sanitize_control_tokens"):
        raise ValueError("`continue_final_message` and `sanitize_control_tokens` exclude assistant masks and labels.")
    variables = {name: value for name, value in kwargs.items() if name != "return_tensors"}
    variables = {**tokenizer.special_tokens_map, **variables}
    prompts, spans = render_jinja_template(
        conversations=conversations, chat_template=jinja, return_assistant_tokens_mask=True, **variables
    )
    if any(IMAGE_PLACEHOLDER in prompt for prompt in prompts):
        # The call replaces it by a placeholder of another length, which would shift the spans.
        raise ValueError(
            f"The chat template writes `{IMAGE_PLACEHOLDER}`; for assistant masks it must write "
            f"`{IMAGE_CONTEXT_TOKEN}`."
        )
    return spans
