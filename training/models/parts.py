"""The parts of a model, by the names of its parameters."""

import re


# A parameter belongs to the first part whose pattern matches the beginning of its name.
PARTS = {
    "vision": r"vision_model\.",
    "pooling": r"clip_projector\.",  # InternVL-C's
    "text_projection": r"text_projection$",
    "temperature": r"logit_(scale|bias)$",
    "queries": r"query_tokens$|qllama\..*\bcross_attn\.",
    "query_heads": r"(clip_projector2|itm_head)\.",  # InternVL-G's, and matching
    "language_head": r"qllama\.lm_head\.",
    "qllama": r"qllama\.",  # the LLaMA that QLLaMA is made of
    "projector": r"mlp[12]\.",
    "language": r"language_model\.",  # the decoder of a chat model
    "token_heads": r"token_heads\.",  # of dense supervision, for training only
}
# What PEFT, FSDP and torch.compile put into names.
_WRAPPERS = re.compile(r"^base_model\.model\.|\b(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def part_of(name: str) -> str:
    """The part that a parameter or module belongs to.

    Args:
        name: From the model's root, also where PEFT, FSDP or torch.compile has wrapped it.

    Raises:
        ValueError: If it belongs to none.
    """
    name = plain_name(name)
    for part, pattern in PARTS.items():
        if re.match(pattern, name):
            return part
    raise ValueError(f"`{name}` belongs to none of the parts {', '.join(PARTS)}.")


def plain_name(name: str) -> str:
    """A parameter's name as it is without wrappers."""
    return _WRAPPERS.sub("", name)
