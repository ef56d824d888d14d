"""Pictures and texts to model inputs, for dialogue, retrieval and captions.

`InternVLProcessor` joins the image processor and a tokenizer. Its `mode` says what a call prepares:

- "chat": prompts in which each placeholder (`<IMG_CONTEXT>`, or `<image>` as in published user code) becomes the span
  of its picture, `<img>`, `image_seq_length` context tokens per tile, `</img>`. Padded on the left, as generation
  needs it.
- "contrastive" (also "retrieval"): `summarize:` in front, the end token behind, padded on the right to a fixed length.
- "caption": `English caption:` without an end token, padded on the left.

`apply_chat_template` renders and tokenizes dialogues. Image tokens in the text of a message are escaped (`<
IMG_CONTEXT>`), frames of a video become pictures of one tile (`Frame1: `, `Frame2: `...), and assistant masks and
labels count in tokens of the expanded prompt.

Not covered: reading video files (pass their frames) and sound.

Shapes: B samples, L tokens, T tiles of the whole call.
"""

import copy
import inspect
import json
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral
from pathlib import Path
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from .chat_templates_internvl import refusals_as_value_errors, template_names
from .conversation_internvl import (
    IMAGE_CONTEXT_TOKEN,
    IMAGE_END_TOKEN,
    IMAGE_PLACEHOLDER,
    IMAGE_START_TOKEN,
    escape_image_tokens,
    image_span,
)
from .image_loading_internvl import flatten_images
from .image_settings_internvl import SPELLINGS
from .messages_internvl import (
    Message,
    add_training_targets,
    as_conversations,
    assistant_masks,
    images_beside,
    is_nothing,
    prepare_conversations,
)
from .texts_internvl import MAX_TEXT_LENGTH, TEXT_PREFIX, encode_rows, pad_row, pad_token_id, with_prefix


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


class InternVLProcessor(ProcessorMixin):
    """Prepares pictures and texts for every InternVL model.

    Args:
        image_processor: Makes `pixel_values` and counts the tiles of each picture (`num_patches`).
        tokenizer: Tokenizer of the language model. For "chat" its vocabulary needs `<IMG_CONTEXT>`, and `<img>` and
            `</img>` where they stand around a picture.
        image_seq_length: Number of image tokens of one tile.
        chat_template: Jinja text of the dialogue form, as `ConversationTemplate.to_jinja` writes it.
        mode: What a call prepares if it does not say: "chat", "contrastive" ("retrieval" is the same) or "caption".
        max_text_length: Number of tokens of every text in mode "contrastive".
        text_prefix: What stands in front of every text in mode "contrastive".
        caption_prompt: Text of mode "caption" for pictures that come without one.
        use_image_start_end: Whether `<img>` and `</img>` stand around a picture; not so in the LLaVA code base.

    Raises:
        ValueError: If the mode is unknown, or is "chat" and image tokens are missing in the vocabulary.
    """

    _auto_class = "AutoProcessor"  # `save_pretrained` writes the code along, so that the folder can be moved
    valid_processor_kwargs = InternVLProcessorKwargs

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 256,
        chat_template: str | dict[str, str] | None = None,
        mode: str = "chat",
        max_text_length: int = MAX_TEXT_LENGTH,
        text_prefix: str = TEXT_PREFIX,
        caption_prompt: str = "English caption:",
        use_image_start_end: bool = True,
    ) -> None:
        mode = _resolve_mode(mode)
        if mode == "chat" and getattr(tokenizer, "padding_side", "left") != "left":
            # transformers' pipelines and others pad with the tokenizer itself. A copy, which shares the vocabulary: the side of the
            # caller's stays as it is.
            tokenizer = copy.copy(tokenizer)
            tokenizer.padding_side = "left"
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        # Saving sets it; set from the start, so that saving changes nothing in the processor that is saved.
        self.auto_map = {self._auto_class: f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"}
        self.image_seq_length = image_seq_length
        self.mode = mode
        self.max_text_length = max_text_length
        self.text_prefix = text_prefix
        self.caption_prompt = caption_prompt
        self.use_image_start_end = use_image_start_end

        tokens = (IMAGE_CONTEXT_TOKEN, *((IMAGE_START_TOKEN, IMAGE_END_TOKEN) if use_image_start_end else ()))
        ids = [_token_id(tokenizer, token) for token in tokens]
        self.missing_image_tokens = [token for token, index in zip(tokens, ids, strict=True) if index is None]
        if self.mode == "chat":
            self._require_image_tokens()
        if not self.missing_image_tokens:
            # Names that transformers and serving engines look for. Not `image_start_token`: vLLM would write it twice.
            self.image_token = IMAGE_CONTEXT_TOKEN
            self.image_token_id = ids[0]
            self.image_token_ids = ids

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepares one call of a model.

        Args:
            images: Pictures (PIL images, arrays, tensors, paths, addresses, bytes), flat or nested per sample.
            text: One text or B texts. In mode "chat" with one placeholder per picture, in the order of the pictures.
            **kwargs: `mode`, instead of the processor's own; `return_num_patches=True`, to get `num_patches` (tiles of
                each picture) as well; `return_mm_token_type_ids`; settings of the tokenizer and of the image processor
                (`max_num`, `min_num`, `use_thumbnail`...), flat or in `text_kwargs` and `images_kwargs`.

        Returns:
            `input_ids` and `attention_mask` (B, L), 1 = attend; `pixel_values` (T, 3, H, W), tiles in picture order.

        Raises:
            ValueError: If placeholders and pictures differ in number, or a setting is none of this processor.
        """
        for modality in ("videos", "audio", "audios"):
            if not is_nothing(kwargs.pop(modality, None)):
                raise ValueError(
                    f"`{modality}` cannot be passed to a call. Put the frames of a video into a message part "
                    '`{"type": "video", "video": [frame, ...]}` of `apply_chat_template`, or write `Frame1: <image>` '
                    "and pass images."
                )
        images, text = (None if is_nothing(given) else given for given in (images, text))
        if images is None and text is None:
            raise ValueError("Neither `images` nor `text` was given. Pass at least one of them.")
        mode = _resolve_mode(kwargs.pop("mode", None) or self.mode)
        with_num_patches = kwargs.pop("return_num_patches", False)
        self._check_settings(kwargs, mode)
        if text is not None:
            text = _as_texts(text)
        if mode == "chat":
            features = self._prepare_chat(images, text, kwargs)
        else:
            features = self._prepare_plain(images, text, mode, kwargs)
        if not with_num_patches:
            features.pop("num_patches", None)
        return features

    def _check_settings(self, kwargs: dict[str, Any], mode: str) -> None:
        """Refuses settings that nothing would read; the base class drops them with a warning."""
        kinds = InternVLProcessorKwargs.__annotations__
        groups = {name: set(kind.__annotations__) for name, kind in kinds.items() if name.endswith("_kwargs")}
        groups["images_kwargs"] |= set(getattr(self.image_processor, "valid_kwargs", ImagesKwargs).__annotations__)
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
                f"`{'`, `'.join(unknown)}` is no setting of `{type(self).__name__}` in mode `{mode}`. Known are `mode`, "
                f"`return_num_patches` and {', '.join(sorted(known - unused))}."
            )
        _check_text_settings(kwargs)

    # ------------------------------------------------------------------------------------------------------------ chat
    def _prepare_chat(self, images: ImageInput | None, text: list[str] | None, kwargs: dict[str, Any]) -> BatchFeature:
        self._require_image_tokens()
        groups, is_nested = _group_by_sample(images)
        pictures = [picture for group in groups for picture in group]
        if text is not None:
            _check_placeholders(text, [len(group) for group in groups] if is_nested else None, len(pictures))
            text = [sample.replace(IMAGE_PLACEHOLDER, IMAGE_CONTEXT_TOKEN) for sample in text]
            kwargs = self._with_text_defaults(kwargs, len(text))
        return super().__call__(images=pictures or None, text=text, **kwargs)

    def _with_text_defaults(self, kwargs: dict[str, Any], batch_size: int) -> dict[str, Any]:
        """Adds left padding, whatever side the tokenizer was saved with, and padding itself where tensors need it."""
        kwargs = dict(kwargs)
        if _requested(kwargs, "padding_side") is None:
            _set_text_setting(kwargs, "padding_side", "left")
        needs_padding = batch_size > 1 and _requested(kwargs, "return_tensors") is not None
        if needs_padding and _requested(kwargs, "padding") is None and "padding" not in self.tokenizer.init_kwargs:
            _set_text_setting(kwargs, "padding", True)
        return kwargs

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The text that the placeholder of a picture becomes. Called by the base class.

        Args:
            image_inputs: What the image processor returned.
            image_idx: Index of the picture.
            **kwargs: Settings of the pictures; not used.

        Returns:
            Context tokens of all tiles, between start and end token where the model has them.
        """
        num_patches = int(image_inputs["num_patches"][image_idx])
        return image_span(num_patches, self.image_seq_length, self.use_image_start_end)

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Counts without looking at pixels; serving engines plan their memory with it.

        Args:
            image_sizes: (height, width) of each picture.
            **kwargs: Settings of a call.

        Returns:
            `num_image_tokens` (start and end token included) and `num_image_patches` of each picture.
        """
        if image_sizes is None:
            return MultiModalData()
        images_kwargs = self._merge_kwargs(InternVLProcessorKwargs, **kwargs)["images_kwargs"]
        num_patches = [
            self.image_processor.get_number_of_image_patches(height, width, _of_picture(images_kwargs, index))
            for index, (height, width) in enumerate(image_sizes)
        ]
        around = 2 if self.use_image_start_end else 0
        num_tokens = [around + self.image_seq_length * count for count in num_patches]
        return MultiModalData(num_image_tokens=num_tokens, num_image_patches=num_patches)

    @property
    def unused_input_names(self) -> list[str]:
        """Outputs of the parts that no model takes."""
        return ["token_type_ids"]

    @property
    def model_input_names(self) -> list[str]:
        """Keys of what a call returns, unless it asks for more."""
        return [name for name in super().model_input_names if name != "num_patches"]

    def to_dict(self) -> dict[str, Any]:
        """What `processor_config.json` holds."""
        # `AutoProcessor` would find transformers' own class of this name before this one, with this package installed
        # too. Without a name it goes by `auto_map` and by the model's configuration.
        return {name: value for name, value in super().to_dict().items() if name != "processor_class"}

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Saves settings, tokenizer, chat template and the code.

        Args:
            save_directory: Folder to save to; made if it does not exist.
            push_to_hub: Upload as well.
            **kwargs: Arguments of `push_to_hub`, `repo_id` among them.

        Returns:
            Path of the settings.
        """
        files = super().save_pretrained(save_directory)
        self.tokenizer._set_processor_class(None)  # the base class sets it, see `to_dict`
        tokenizer_config = Path(save_directory) / "tokenizer_config.json"
        settings = json.loads(tokenizer_config.read_text(encoding="utf-8"))
        if settings.pop("processor_class", None) is not None:
            text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
            tokenizer_config.write_text(text + "\n", encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files

    def _require_image_tokens(self) -> None:
        if self.missing_image_tokens:
            missing = ", ".join(f"`{token}`" for token in self.missing_image_tokens)
            raise ValueError(
                f"The tokenizer's vocabulary lacks {missing}, which mode `chat` needs: `python -m "
                'internvl.conversion` adds them. For InternVL-C and InternVL-G use `mode="contrastive"`.'
            )

    # ------------------------------------------------------------------------------------------ retrieval and captions
    def _prepare_plain(
        self, images: ImageInput | None, text: list[str] | None, mode: str, kwargs: dict[str, Any]
    ) -> BatchFeature:
        merged = self._merge_kwargs(
            InternVLProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        pictures = [picture for group in _group_by_sample(images)[0] for picture in group]
        if mode == "caption" and text is None:
            text = [self.caption_prompt] * len(pictures)
        features: dict[str, Any] = {}
        if text is not None:
            features.update(self._encode_plain(text, mode, kwargs))
        if pictures:
            features.update(self.image_processor(pictures, **merged["images_kwargs"]))
        return BatchFeature(features, tensor_type=merged["text_kwargs"].get("return_tensors"))

    def _encode_plain(self, text: list[str], mode: str, kwargs: dict[str, Any]) -> dict[str, list[list[int]]]:
        """Ids and masks; the end token is there once (contrastive) or never (caption), whatever the tokenizer adds."""
        max_length = _requested(kwargs, "max_length")
        padding = _requested(kwargs, "padding")
        padding_side = _requested(kwargs, "padding_side")
        is_contrastive = mode == "contrastive"
        if is_contrastive:
            text = [with_prefix(sample, self.text_prefix) for sample in text]
            max_length = max_length or self.max_text_length
            padding = "max_length" if padding is None else padding
        rows = encode_rows(self.tokenizer, text, max_length, with_end=is_contrastive)
        width = max_length if padding == "max_length" and max_length else max(map(len, rows), default=0)
        if padding in (False, "do_not_pad"):
            width = 0
        is_left = (padding_side or ("right" if is_contrastive else "left")) == "left"
        pad_id = pad_token_id(self.tokenizer)
        return {
            "input_ids": [pad_row(row, width, pad_id, is_left) for row in rows],
            "attention_mask": [pad_row([1] * len(row), width, 0, is_left) for row in rows],
        }

    # ------------------------------------------------------------------------------------------------------- dialogues
    def apply_chat_template(
        self,
        conversation: list[Message] | list[list[Message]],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        return_labels: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Renders one dialogue or a batch of them, and tokenizes them if asked.

        Args:
            conversation: Messages with `role` and `content`: a string or parts `{"type": "text", "text": ...}`,
                `{"type": "image", "image" or "path" or "url" or "base64": ...}`, `{"type": "video", "video": [frame,
                ...]}`. Not changed.
            chat_template: Jinja text, or name of one of several templates, instead of the processor's own.
            tokenize: Return model inputs instead of text.
            return_dict: Return all model inputs, not only `input_ids`.
            return_assistant_tokens_mask: Return `assistant_masks` (B, L), 1 = written by the assistant. Pads on the
                right.
            return_labels: Return `labels` (B, L): the ids where the assistant writes, else -100. Pads on the right.
            processor_kwargs: Settings of the call, such as `max_num`; they may also be given as keyword arguments.
            **kwargs: Other arguments of the base class (`add_generation_prompt`, `return_tensors`...) and variables of
                the template.

        Returns:
            The prompt (or one per dialogue), `input_ids`, or a `BatchFeature`.

        Raises:
            ValueError: If a part of a message is unusable, or labels were asked for and nothing is to be learned.
        """
        conversations, is_batched = as_conversations(conversation)
        jinja = self._jinja_text(chat_template)
        names = template_names(jinja)
        prepared, is_frame = prepare_conversations(conversations, names)
        kwargs, processor_kwargs = _split_settings(kwargs, processor_kwargs, names.variables)
        self._check_settings({k: v for k, v in processor_kwargs.items() if k not in CALL_INPUTS}, "chat")
        mode = processor_kwargs.pop("mode", None)
        if mode is not None and _resolve_mode(mode) != "chat":
            raise ValueError(f"`mode={mode!r}` has no dialogues: call the processor itself, with texts and images.")
        if (return_assistant_tokens_mask or return_labels) and not (tokenize and return_dict):
            raise ValueError("Assistant masks and labels come with `tokenize=True` and `return_dict=True` only.")
        messages = prepared if is_batched else prepared[0]
        if not tokenize:
            with refusals_as_value_errors():
                return super().apply_chat_template(messages, chat_template=jinja, tokenize=False, **kwargs)

        processor_kwargs["mode"] = "chat"
        if not is_nothing(images := processor_kwargs.pop("images", None)):
            groups = images_beside(images, prepared)
            processor_kwargs["images"] = groups if is_batched else groups[0]
        if any(is_frame):
            _check_no_sampling(processor_kwargs)
            processor_kwargs = self._with_single_tile_frames(processor_kwargs, is_frame)
        spans = None
        if return_assistant_tokens_mask or return_labels:
            with refusals_as_value_errors():
                spans = self._assistant_spans(prepared, jinja, kwargs)
            processor_kwargs.update(return_offsets_mapping=True, return_text_replacement_offsets=True)
            if _requested(processor_kwargs, "padding_side") is None:
                _set_text_setting(processor_kwargs, "padding_side", "right")
        with refusals_as_value_errors():
            features = super().apply_chat_template(
                messages,
                chat_template=jinja,
                tokenize=True,
                return_dict=True,
                processor_kwargs=processor_kwargs,
                **kwargs,
            )
        if spans is not None:
            masks = assistant_masks(spans, features.pop("offset_mapping"), features.pop("text_replacement_offsets"))
            add_training_targets(features, masks, return_assistant_tokens_mask, return_labels)
        return features if return_dict else features["input_ids"]

    def _jinja_text(self, chat_template: str | None) -> str:
        """The template itself, where the argument is one, the name of one, or nothing."""
        own = self.chat_template
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
            named = (
                f" Templates of this processor: {', '.join(self.chat_template)}."
                if isinstance(self.chat_template, dict)
                else ""
            )
            raise ValueError(f"`chat_template` is no template: it does not read `messages`, got {own!r:.80}.{named}")
        return own

    def _assistant_spans(self, prepared: list[list[Message]], jinja: str, kwargs: dict[str, Any]) -> list[Any]:
        """(start, end) characters of what the assistant writes, in the prompts before images are expanded."""
        if not self.tokenizer.is_fast:
            raise ValueError(
                "Assistant masks and labels need a fast tokenizer, which knows the characters of each token."
            )
        if kwargs.get("continue_final_message") or kwargs.get("sanitize_control_tokens"):
            raise ValueError(
                "`continue_final_message` and `sanitize_control_tokens` exclude assistant masks and labels."
            )
        variables = {name: value for name, value in kwargs.items() if name != "return_tensors"}
        variables = {**self.tokenizer.special_tokens_map, **variables}
        prompts, spans = render_jinja_template(
            conversations=prepared, chat_template=jinja, return_assistant_tokens_mask=True, **variables
        )
        if any(IMAGE_PLACEHOLDER in prompt for prompt in prompts):
            # A call replaces it by a placeholder of another length, which would shift the spans.
            raise ValueError(
                f"The chat template writes `{IMAGE_PLACEHOLDER}`; for assistant masks it must write "
                f"`{IMAGE_CONTEXT_TOKEN}`."
            )
        return spans

    def _with_single_tile_frames(self, processor_kwargs: dict[str, Any], is_frame: list[bool]) -> dict[str, Any]:
        """Limits frames of a video to one tile, as published; the other pictures keep what was asked for."""
        processor_kwargs = dict(processor_kwargs)
        images_kwargs = dict(processor_kwargs.get("images_kwargs") or {})
        num_pictures = is_frame.count(False)
        for setting, of_frames in (("min_num", 1), ("max_num", 1), ("use_thumbnail", False)):
            value = getattr(self.image_processor, setting)
            for name in (setting, *(other for other, means in SPELLINGS.items() if means == setting)):
                for settings in (processor_kwargs, images_kwargs):
                    given = settings.pop(name, None)
                    value = value if given is None else given
            values = list(value) if isinstance(value, (list, tuple)) else [value] * num_pictures
            if len(values) != num_pictures:
                raise ValueError(
                    f"`{setting}` has {len(values)} value(s) for {num_pictures} picture(s) beside frames."
                )
            images_kwargs[setting] = [of_frames if frame else values.pop(0) for frame in is_frame]
        processor_kwargs["images_kwargs"] = images_kwargs
        return processor_kwargs


# ------------------------------------------------------------------------------------------------------------ settings
def _resolve_mode(mode: str) -> str:
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got `{mode}`.")
    return MODES[mode]


def _requested(kwargs: dict[str, Any], name: str) -> Any:
    """Value of a tokenizer setting in the arguments of a call, flat or nested; None where it is not given."""
    places = (kwargs, kwargs.get("text_kwargs") or {}, kwargs.get("common_kwargs") or {})
    return next((place[name] for place in places if place.get(name) is not None), None)


def _check_text_settings(kwargs: dict[str, Any]) -> None:
    """Refuses lengths and sides that a tokenizer would not refuse, or not by name."""
    for name in ("max_length", "pad_to_multiple_of"):
        value = _requested(kwargs, name)
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
    side = _requested(kwargs, "padding_side")
    if side not in (None, "left", "right"):
        raise ValueError(f"`padding_side` must be `left` or `right`, got {side!r}.")


def _set_text_setting(kwargs: dict[str, Any], name: str, value: Any) -> None:
    """Sets it where the call has it already (as None), because both places at once are an error."""
    nested = kwargs.get("text_kwargs") or {}
    if name in nested:
        kwargs["text_kwargs"] = {**nested, name: value}
    else:
        kwargs[name] = value


def _of_picture(images_kwargs: dict[str, Any], index: int) -> dict[str, Any]:
    """Settings of one picture, out of settings that may be lists with one value per picture."""
    per_picture = {"use_thumbnail", *SPELLINGS, *SPELLINGS.values()}
    return {
        name: value[index] if name in per_picture and isinstance(value, (list, tuple)) else value
        for name, value in images_kwargs.items()
    }


def _check_no_sampling(settings: dict[str, Any]) -> None:
    """Refuses to leave out frames of a video: those that a message holds are taken."""
    nested = settings.get("videos_kwargs") or {}
    for name in ("num_frames", "fps", "do_sample_frames"):
        if settings.get(name) or nested.get(name):
            raise ValueError(f"`{name}` was given, but the frames in a message are all taken: choose them before.")


def _split_settings(
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


def _token_id(tokenizer: Any, token: str) -> int | None:
    """Id of a token, None where the vocabulary lacks it."""
    index = tokenizer.convert_tokens_to_ids(token)
    return None if index == tokenizer.unk_token_id else index


# ---------------------------------------------------------------------------------------------------------- the inputs
def _as_texts(text: str | list[str]) -> list[str]:
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


def _group_by_sample(images: ImageInput | None) -> tuple[list[list[Any]], bool]:
    """Pictures in groups, and whether the groups are samples."""
    if images is None:
        return [[]], False
    if isinstance(images, (list, tuple)) and any(
        group is None or isinstance(group, (list, tuple)) for group in images
    ):
        return [flatten_images(group or []) for group in images], True
    return [flatten_images(images)], False


def _check_placeholders(text: list[str], given: list[int] | None, total: int) -> None:
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


__all__ = ["InternVLProcessor", "InternVLProcessorKwargs"]
