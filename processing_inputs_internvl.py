"""What a call of the processor is given: settings, images and texts, checked before anything is made of them."""

import inspect
from collections.abc import Iterable, Mapping, Set
from numbers import Integral
from typing import Any

from transformers.image_utils import ImageInput
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, ProcessorMixin

from .conversation_internvl import IMAGE_CONTEXT_TOKEN, IMAGE_PLACEHOLDER, escape_image_tokens
from .image_loading_internvl import flatten_images
from .image_settings_internvl import SPELLINGS
from .messages_internvl import is_nothing


MODES = {"chat": "chat", "contrastive": "contrastive", "retrieval": "contrastive", "caption": "caption"}


# What a text of retrieval or a caption may be told; modes decide the rest (prefix, special tokens, where to cut).
PLAIN_TEXT_SETTINGS = {"max_length", "padding", "padding_side", "return_tensors", "truncation", "verbose"}
# What would make two prompts of one, or texts of no dialogue.
UNUSED_TEXT_SETTINGS = {
    "is_split_into_words",
    "return_overflowing_tokens",
    "text_pair",
    "text_pair_target",
    "text_target",
}
# Settings that the base class reads of a call itself.
CALL_SETTINGS = {"common_kwargs", "return_metadata"}
# What `processor_kwargs` of `apply_chat_template` may hold beside settings.
CALL_INPUTS = {"images", "mode", "return_num_patches"}


class InternVLProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Keyword arguments of `InternVLProcessor`; those of the pictures are the image processor's own."""

    _defaults = {}  # type: ignore[var-annotated]


def resolve_mode(mode: str) -> str:
    """The mode that a name means ("retrieval" is "contrastive")."""
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got `{mode}`.")
    return MODES[mode]


def requested(kwargs: dict[str, Any], name: str) -> Any:
    """Value of a tokenizer setting in the arguments of a call, flat or nested; None where it is not given."""
    places = (kwargs, kwargs.get("text_kwargs") or {}, kwargs.get("common_kwargs") or {})
    return next((place[name] for place in places if place.get(name) is not None), None)


def _check_text_settings(kwargs: dict[str, Any]) -> None:
    """Refuses lengths and sides that a tokenizer would not refuse, or not by name."""
    for name in ("max_length", "pad_to_multiple_of"):
        value = requested(kwargs, name)
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
    side = requested(kwargs, "padding_side")
    if side not in (None, "left", "right"):
        raise ValueError(f"`padding_side` must be `left` or `right`, got {side!r}.")


def set_text_setting(kwargs: dict[str, Any], name: str, value: Any) -> None:
    """Sets it where the call has it already (as None), because both places at once are an error."""
    nested = kwargs.get("text_kwargs") or {}
    if name in nested:
        kwargs["text_kwargs"] = {**nested, name: value}
    else:
        kwargs[name] = value


def settings_of_picture(images_kwargs: dict[str, Any], index: int) -> dict[str, Any]:
    """Settings of one picture, out of settings that may be lists with one value per picture."""
    per_picture = {"use_thumbnail", *SPELLINGS, *SPELLINGS.values()}
    return {
        name: value[index] if name in per_picture and isinstance(value, (list, tuple)) else value
        for name, value in images_kwargs.items()
    }


def check_no_sampling(settings: dict[str, Any]) -> None:
    """Refuses to leave out frames of a video: those that a message holds are taken."""
    nested = settings.get("videos_kwargs") or {}
    for name in ("num_frames", "fps", "do_sample_frames"):
        if settings.get(name) or nested.get(name):
            raise ValueError(f"`{name}` was given, but the frames in a message are all taken: choose them before.")


def split_settings(
    kwargs: dict[str, Any], processor_kwargs: dict[str, Any] | None, variables: frozenset[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Moves what neither the base class nor the template knows from the arguments to the settings of the call.

    Raises:
        ValueError: If the template would drop an argument that is for it.
    """
    kwargs = {name: None if is_nothing(value) else value for name, value in kwargs.items()}
    for name in ("tools", "documents"):
        if kwargs.get(name) is not None and name not in variables:
            raise ValueError(
                f"`{name}` was given, but the chat template does not read it, so the model would never see it. Leave it out, "
                "describe it in a message, or pass a `chat_template` that renders it."
            )
    if kwargs.get("load_audio_from_video"):
        raise ValueError("`load_audio_from_video` was asked for, but these models do not hear.")
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
    """Refuses settings that nothing would read; the base class drops them with a warning."""
    kinds = InternVLProcessorKwargs.__annotations__
    groups = {name: set(kind.__annotations__) for name, kind in kinds.items() if name.endswith("_kwargs")}
    groups["images_kwargs"] |= set(getattr(processor.image_processor, "valid_kwargs", ImagesKwargs).__annotations__)
    # Those of videos and sound too: general code passes them whether or not there is something for them.
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
            f"`{'`, `'.join(unknown)}` is no setting of `{type(processor).__name__}` in mode `{mode}`. Known are `mode`, "
            f"`return_num_patches` and {', '.join(sorted(known - unused))}."
        )
    _check_text_settings(kwargs)


def with_single_tile_frames(
    processor_kwargs: dict[str, Any], is_frame: list[bool], image_processor: Any
) -> dict[str, Any]:
    """Limits frames of a video to one tile, as published; the other pictures keep what was asked for."""
    processor_kwargs = dict(processor_kwargs)
    images_kwargs = dict(processor_kwargs.get("images_kwargs") or {})
    num_pictures = is_frame.count(False)
    for setting, of_frames in (("min_num", 1), ("max_num", 1), ("use_thumbnail", False)):
        value = getattr(image_processor, setting)
        for name in (setting, *(other for other, means in SPELLINGS.items() if means == setting)):
            for settings in (processor_kwargs, images_kwargs):
                given = settings.pop(name, None)
                value = value if given is None else given
        values = list(value) if isinstance(value, (list, tuple)) else [value] * num_pictures
        if len(values) != num_pictures:
            raise ValueError(f"`{setting}` has {len(values)} value(s) for {num_pictures} picture(s) beside frames.")
        images_kwargs[setting] = [of_frames if frame else values.pop(0) for frame in is_frame]
    processor_kwargs["images_kwargs"] = images_kwargs
    return processor_kwargs


# ---------------------------------------------------------------------------------------------------------- the inputs
def as_texts(text: str | list[str]) -> list[str]:
    """Texts in a list, each of which a tokenizer takes."""
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
        except UnicodeEncodeError as error:  # no tokenizer takes it
            raise ValueError(
                f"Text {index} of {len(texts)} holds half of a surrogate pair at character {error.start}, which is no text: "
                "decode it anew, or leave the character out."
            ) from error
    return texts


def group_by_sample(images: ImageInput | None) -> tuple[list[list[Any]], bool]:
    """Pictures in groups, and whether the groups are samples."""
    if images is None:
        return [[]], False
    if isinstance(images, (list, tuple)) and any(
        group is None or isinstance(group, (list, tuple)) for group in images
    ):
        return [flatten_images(group or []) for group in images], True
    return [flatten_images(images)], False


def check_placeholders(text: list[str], given: list[int] | None, total: int) -> None:
    """Compares the placeholders of the texts with the images, by sample where it is known whose they are."""
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
            f"An image token typed into a message, such as `{IMAGE_PLACEHOLDER}`, is read as text: give each image as a part of "
            'the message, `{"type": "image", "image": ...}`, in its place.'
        )
    else:
        fix = (
            f"Write one `{IMAGE_CONTEXT_TOKEN}` or `{IMAGE_PLACEHOLDER}` per image, in their order, or use "
            "`apply_chat_template`, which does it for the image parts of messages."
        )
    raise ValueError(
        f"The number of image tokens in the prompts should be the same as the number of images: {where}. {fix}"
    )


__all__ = [
    "CALL_INPUTS",
    "InternVLProcessorKwargs",
    "as_texts",
    "check_call_settings",
    "check_no_sampling",
    "check_placeholders",
    "group_by_sample",
    "requested",
    "resolve_mode",
    "set_text_setting",
    "settings_of_picture",
    "split_settings",
    "with_single_tile_frames",
]
