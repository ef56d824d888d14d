"""Checks and sorts what a call of the processor receives: settings, images and texts."""

import inspect
from collections.abc import Iterable, Mapping, Set
from numbers import Integral
from typing import Any

from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, ProcessorMixin

from .conversation_internvl import IMAGE_CONTEXT_TOKEN, IMAGE_PLACEHOLDER, escape_image_tokens
from .image_settings_internvl import ALIASES
from .messages_internvl import is_nothing


PROCESSOR_MODES = {"chat": "chat", "contrastive": "contrastive", "retrieval": "contrastive", "caption": "caption"}
# Tokenizer settings of the modes "contrastive" and "caption", which decide the others (prefix, special tokens...).
PLAIN_TEXT_SETTINGS = {"max_length", "padding", "padding_side", "return_tensors", "truncation", "verbose"}
# Tokenizer settings that make no sense for prompts: they split one into several or expect a second text.
UNUSED_TEXT_SETTINGS = set(
    "is_split_into_words return_overflowing_tokens text_pair text_pair_target text_target".split()
)
# Settings of a call that the base class reads itself.
CALL_SETTINGS = {"common_kwargs", "return_metadata"}
# Allowed in `processor_kwargs` of `apply_chat_template` in addition to settings.
CALL_INPUTS = {"images", "mode", "return_num_patches"}


class InternVLProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Keyword arguments of `InternVLProcessor`; the image processor declares those of images."""

    _defaults = {}  # type: ignore[var-annotated]


def resolve_mode(mode: str) -> str:
    """Resolves aliases of a mode: "retrieval" is "contrastive"."""
    if not isinstance(mode, str) or mode not in PROCESSOR_MODES:
        raise ValueError(f"`mode` must be one of {', '.join(PROCESSOR_MODES)}, got `{mode}`.")
    return PROCESSOR_MODES[mode]


def requested(kwargs: dict[str, Any], name: str) -> Any:
    """Returns a tokenizer setting from the arguments of a call, flat or nested; None if it is missing."""
    places = (kwargs, kwargs.get("text_kwargs") or {}, kwargs.get("common_kwargs") or {})
    return next((place[name] for place in places if place.get(name) is not None), None)


def _check_text_settings(kwargs: dict[str, Any]) -> None:
    """Raises a ValueError for lengths and sides that a tokenizer accepts or reports without their name."""
    for name in ("max_length", "pad_to_multiple_of"):
        value = requested(kwargs, name)
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
    side = requested(kwargs, "padding_side")
    if side not in (None, "left", "right"):
        raise ValueError(f"`padding_side` must be `left` or `right`, got {side!r}.")


def set_text_setting(kwargs: dict[str, Any], name: str, value: Any) -> None:
    """Sets a tokenizer setting where the call has it already (as None), since giving it in two places is an error."""
    nested = kwargs.get("text_kwargs") or {}
    if name in nested:
        kwargs["text_kwargs"] = {**nested, name: value}
    else:
        kwargs[name] = value


def settings_of_image(images_kwargs: dict[str, Any], index: int) -> dict[str, Any]:
    """Selects the settings of one image where settings are lists with one value per image."""
    per_image = {"use_thumbnail", *ALIASES, *ALIASES.values()}
    return {
        name: value[index] if name in per_image and isinstance(value, (list, tuple)) else value
        for name, value in images_kwargs.items()
    }


def _check_no_sampling(settings: dict[str, Any]) -> None:
    """Raises a ValueError for settings that sample frames of a video: all frames in a message are used."""
    nested = settings.get("videos_kwargs") or {}
    for name in ("num_frames", "fps", "do_sample_frames"):
        if settings.get(name) or nested.get(name):
            raise ValueError(f"`{name}` was given, but all frames in a message are used. Choose the frames before.")


def split_settings(
    kwargs: dict[str, Any], processor_kwargs: dict[str, Any] | None, variables: frozenset[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits arguments of `apply_chat_template` into those of the base class and template, and settings of the call.

    Raises:
        ValueError: If the template would ignore an argument.
    """
    kwargs = {name: None if is_nothing(value) else value for name, value in kwargs.items()}
    for name in ("tools", "documents"):
        if kwargs.get(name) is not None and name not in variables:
            raise ValueError(
                f"`{name}` was given, but the chat template does not read it, so the model would never see it. "
                "Leave it out, describe it in a message, or pass a `chat_template` that renders it."
            )
    if kwargs.get("load_audio_from_video"):
        raise ValueError("`load_audio_from_video` was given, but these models take no audio. Leave it out.")
    known = inspect.signature(ProcessorMixin.apply_chat_template).parameters
    if not isinstance(processor_kwargs or {}, Mapping):
        raise ValueError(f"`processor_kwargs` must be a dict of settings, got {processor_kwargs!r:.80}.")
    settings = dict(processor_kwargs or {})
    kept = {}
    for name, value in kwargs.items():
        if name in known or name in variables:
            kept[name] = value
        elif value is not None and settings.get(name) is not None:
            raise ValueError(f"`{name}` was given twice: in `processor_kwargs` and as an argument. Give it once.")
        else:
            settings[name] = value
    return kept, settings


def check_call_settings(kwargs: dict[str, Any], mode: str, processor: Any) -> None:
    """Raises a ValueError for unknown settings, which the base class would drop with a warning."""
    kinds = InternVLProcessorKwargs.__annotations__
    groups = {name: set(kind.__annotations__) for name, kind in kinds.items() if name.endswith("_kwargs")}
    groups["images_kwargs"] |= set(getattr(processor.image_processor, "valid_kwargs", ImagesKwargs).__annotations__)
    # Settings of videos and audio are accepted because generic code passes them for every model.
    known = {*kinds, *CALL_SETTINGS}.union(*groups.values())
    unused = UNUSED_TEXT_SETTINGS if mode == "chat" else groups["text_kwargs"] - PLAIN_TEXT_SETTINGS
    unknown = []
    for group, names in {"": known, **groups, "common_kwargs": known}.items():
        if group and not isinstance(kwargs.get(group) or {}, Mapping):
            raise ValueError(f"`{group}` must be a dict of settings, got {kwargs[group]!r:.80}.")
        for name, value in (kwargs.get(group) or {} if group else kwargs).items():
            if name not in names or (name in unused and value is not False and not is_nothing(value)):
                unknown.append(f"{group}[{name!r}]" if group else name)
    if unknown:
        raise ValueError(
            f"`{'`, `'.join(unknown)}` is no setting of `{type(processor).__name__}` in mode `{mode}`. Known are "
            f"`mode`, `return_num_patches` and {', '.join(sorted(known - unused))}."
        )
    _check_text_settings(kwargs)


def check_dialogue_settings(processor_kwargs: dict[str, Any], processor: Any) -> None:
    """Checks the settings of a dialogue and removes `mode`, which can only be "chat"."""
    settings = {name: value for name, value in processor_kwargs.items() if name not in CALL_INPUTS}
    check_call_settings(settings, "chat", processor)
    mode = processor_kwargs.pop("mode", None)
    if mode is not None and resolve_mode(mode) != "chat":
        raise ValueError(f"`mode={mode!r}` has no dialogues: call the processor itself, with texts and images.")


def with_offsets(processor_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Requests the characters of tokens and images, with which masks are made, and pads on the right by default."""
    settings = {**processor_kwargs, "return_offsets_mapping": True, "return_text_replacement_offsets": True}
    if requested(settings, "padding_side") is None:
        set_text_setting(settings, "padding_side", "right")
    return settings


def with_single_tile_frames(
    processor_kwargs: dict[str, Any], is_frame: list[bool], image_processor: Any
) -> dict[str, Any]:
    """Limits video frames to one tile, as published; other images keep the requested settings."""
    _check_no_sampling(processor_kwargs)
    processor_kwargs = dict(processor_kwargs)
    images_kwargs = dict(processor_kwargs.get("images_kwargs") or {})
    num_images = is_frame.count(False)
    for setting, of_frames in (("min_num", 1), ("max_num", 1), ("use_thumbnail", False)):
        value = getattr(image_processor, setting)
        for name in (setting, *(other for other, means in ALIASES.items() if means == setting)):
            for settings in (processor_kwargs, images_kwargs):
                given = settings.pop(name, None)
                value = value if given is None else given
        values = list(value) if isinstance(value, (list, tuple)) else [value] * num_images
        if len(values) != num_images:
            raise ValueError(
                f"`{setting}` has {len(values)} value(s) for {num_images} image(s) beside frames. Give one per image."
            )
        images_kwargs[setting] = [of_frames if frame else values.pop(0) for frame in is_frame]
    processor_kwargs["images_kwargs"] = images_kwargs
    return processor_kwargs


# ---------------------------------------------------------------------------------------------------------- the inputs
def as_texts(text: str | list[str]) -> list[str]:
    """Returns the texts as a list and checks that a tokenizer takes each."""
    is_one = isinstance(text, (str, bytes, Mapping, Set)) or not isinstance(text, Iterable)
    texts: list[Any] = [text] if is_one else list(text)
    if not texts:
        raise ValueError("`text` holds no text. Give at least one.")
    for index, sample in enumerate(texts, start=1):
        if not isinstance(sample, str):
            raise ValueError(
                f"`text` must be a string or a list of strings, text {index} is of {type(sample).__name__}."
            )
        try:
            sample.encode()
        except UnicodeEncodeError as error:  # no tokenizer encodes it
            raise ValueError(
                f"Text {index} of {len(texts)} holds half of a surrogate pair at character {error.start}, which is no "
                "text: decode it anew, or leave the character out."
            ) from error
    return texts


def check_placeholders(text: list[str], given: list[int] | None, total: int) -> None:
    """Compares the numbers of placeholders and images, per sample if the images are nested."""
    found = [sample.count(IMAGE_CONTEXT_TOKEN) + sample.count(IMAGE_PLACEHOLDER) for sample in text]
    if given is None and len(found) == 1:
        given = [total]
    if found == given or (given is None and sum(found) == total):
        return
    if given is None:
        where = f"the texts have {found} and {total} image(s) were given"
    elif len(found) != len(given):
        where = f"there are {len(found)} text(s) and images for {len(given)} sample(s)"
    else:
        row = next(index for index, pair in enumerate(zip(found, given, strict=True)) if pair[0] != pair[1])
        where = f"sample {row} has {found[row]} and {given[row]} image(s) were given for it"
    if any(
        escape_image_tokens(token) in sample for sample in text for token in (IMAGE_CONTEXT_TOKEN, IMAGE_PLACEHOLDER)
    ):
        fix = (
            f"An image token typed into a message, such as `{IMAGE_PLACEHOLDER}`, is read as text: give each image as "
            'a part of the message, `{"type": "image", "image": ...}`, in its place.'
        )
    else:
        fix = (
            f"Write one `{IMAGE_CONTEXT_TOKEN}` or `{IMAGE_PLACEHOLDER}` per image, in their order, or use "
            "`apply_chat_template`, which does it for the image parts of messages."
        )
    raise ValueError(
        f"The number of image tokens in the prompts should be the same as the number of images: {where}. {fix}"
    )
