"""Converts images and texts to model inputs for dialogue, retrieval and captioning.

`InternVLProcessor` joins the image processor and a tokenizer. Its `mode` selects what a call prepares:

- "chat": prompts in which each placeholder (`<IMG_CONTEXT>`, or `<image>` as in published user code) becomes the span
  of its image: `<img>`, `image_seq_length` context tokens per tile, `</img>`. Padded on the left for generation.
- "contrastive" (alias "retrieval"): texts with the prefix `summarize:` and an end token, padded on the right to a
  fixed length.
- "caption": the prompt `English caption:` without an end token, padded on the left.

`apply_chat_template` renders and tokenizes dialogues. It escapes image tokens in the text of a message (`<
IMG_CONTEXT>`), turns the frames of a video into images of one tile (`Frame1: `, `Frame2: `...), and returns assistant
masks and labels for the tokens of the expanded prompt.

Not covered: reading video files (pass their frames) and audio.

Shapes: B samples, L tokens, T tiles of the whole call.
"""

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .chat_templates_internvl import assistant_spans, refusals_as_value_errors, select_template, template_names
from .conversation_internvl import (
    IMAGE_CONTEXT_TOKEN,
    IMAGE_END_TOKEN,
    IMAGE_PLACEHOLDER,
    IMAGE_START_TOKEN,
    image_span,
)
from .image_loading_internvl import group_images
from .messages_internvl import (
    Message,
    add_training_targets,
    as_conversations,
    assistant_masks,
    images_beside,
    is_nothing,
    prepare_conversations,
)
from .processing_inputs_internvl import (
    InternVLProcessorKwargs,
    as_texts,
    check_call_settings,
    check_dialogue_settings,
    check_placeholders,
    requested,
    resolve_mode,
    set_text_setting,
    settings_of_image,
    split_settings,
    with_offsets,
    with_single_tile_frames,
)
from .texts_internvl import MAX_TEXT_LENGTH, TEXT_PREFIX, encode_batch, with_prefix


class InternVLProcessor(ProcessorMixin):
    """Prepares images and texts for every InternVL model.

    Args:
        image_processor: Returns `pixel_values` and the number of tiles of each image (`num_patches`).
        tokenizer: Tokenizer of the language model. Mode "chat" needs `<IMG_CONTEXT>` in its vocabulary, and with
            `use_image_start_end` also `<img>` and `</img>`.
        image_seq_length: Number of image tokens per tile.
        chat_template: Jinja text of the chat template, for example from `ConversationTemplate.to_jinja`.
        mode: Default mode of a call: "chat", "contrastive" (alias "retrieval") or "caption".
        max_text_length: Length in tokens to which mode "contrastive" pads and truncates.
        text_prefix: Prefix of every text in mode "contrastive".
        caption_prompt: Prompt of mode "caption" for images without a text.
        use_image_start_end: Whether `<img>` and `</img>` enclose the tokens of an image. False in the LLaVA code base.

    Raises:
        ValueError: If the mode is unknown, or is "chat" and the vocabulary lacks image tokens.
    """

    _auto_class = "AutoProcessor"  # makes `save_pretrained` copy the code into the folder
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
        mode = resolve_mode(mode)
        if mode == "chat" and getattr(tokenizer, "padding_side", "left") != "left":
            # transformers' pipelines pad with the tokenizer itself. The copy shares the vocabulary and leaves the
            # caller's tokenizer unchanged.
            tokenizer = copy.copy(tokenizer)
            tokenizer.padding_side = "left"
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        # `save_pretrained` sets it; set here so that saving does not change the processor.
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
            self._check_image_tokens()
        if not self.missing_image_tokens:
            # Attributes that transformers and serving engines read. `image_start_token` is left out because vLLM would
            # write it a second time.
            self.image_token = IMAGE_CONTEXT_TOKEN
            self.image_token_id = ids[0]
            self.image_token_ids = ids

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepares the inputs of a model.

        Args:
            images: PIL images, arrays, tensors, paths, URLs or bytes, flat or nested per sample.
            text: One text or B texts. In mode "chat" with one placeholder per image, in the order of the images.
            **kwargs: `mode`, overriding the processor's default; `return_num_patches=True`, to return `num_patches`
                (tiles per image) as well; `return_mm_token_type_ids`; settings of the tokenizer and of the image
                processor (`max_num`, `min_num`, `use_thumbnail`...), flat or in `text_kwargs` and `images_kwargs`.

        Returns:
            `input_ids` and `attention_mask` (B, L), 1 = attend; `pixel_values` (T, 3, H, W), tiles in image order.

        Raises:
            ValueError: If the numbers of placeholders and images differ, or a setting is unknown.
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
        mode = resolve_mode(kwargs.pop("mode", None) or self.mode)
        with_num_patches = kwargs.pop("return_num_patches", False)
        check_call_settings(kwargs, mode, self)
        if text is not None:
            text = as_texts(text)
        if mode == "chat":
            features = self._prepare_chat(images, text, kwargs)
        else:
            features = self._prepare_plain(images, text, mode, kwargs)
        if not with_num_patches:
            features.pop("num_patches", None)
        return features

    # ------------------------------------------------------------------------------------------------------------ chat
    def _prepare_chat(self, images: ImageInput | None, text: list[str] | None, kwargs: dict[str, Any]) -> BatchFeature:
        self._check_image_tokens()
        groups, is_nested = group_images(images)
        flat_images = [image for group in groups for image in group]
        if text is not None:
            check_placeholders(text, [len(group) for group in groups] if is_nested else None, len(flat_images))
            text = [sample.replace(IMAGE_PLACEHOLDER, IMAGE_CONTEXT_TOKEN) for sample in text]
            kwargs = self._with_text_defaults(kwargs, len(text))
        return super().__call__(images=flat_images or None, text=text, **kwargs)

    def _with_text_defaults(self, kwargs: dict[str, Any], batch_size: int) -> dict[str, Any]:
        """Pads on the left, regardless of the saved tokenizer, and turns padding on if a batch of tensors needs it."""
        kwargs = dict(kwargs)
        if requested(kwargs, "padding_side") is None:
            set_text_setting(kwargs, "padding_side", "left")
        needs_padding = batch_size > 1 and requested(kwargs, "return_tensors") is not None
        if needs_padding and requested(kwargs, "padding") is None and "padding" not in self.tokenizer.init_kwargs:
            set_text_setting(kwargs, "padding", True)
        return kwargs

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """Returns the text that replaces the placeholder of image `image_idx`. Called by the base class."""
        num_patches = int(image_inputs["num_patches"][image_idx])
        return image_span(num_patches, self.image_seq_length, self.use_image_start_end)

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Counts image tokens (with start and end token) and tiles of each image from its (height, width) alone.

        Serving engines plan their memory with it.
        """
        if image_sizes is None:
            return MultiModalData()
        images_kwargs = self._merge_kwargs(InternVLProcessorKwargs, **kwargs)["images_kwargs"]
        num_patches = [
            self.image_processor.get_number_of_image_patches(height, width, settings_of_image(images_kwargs, index))
            for index, (height, width) in enumerate(image_sizes)
        ]
        num_enclosing = 2 if self.use_image_start_end else 0
        num_tokens = [num_enclosing + self.image_seq_length * count for count in num_patches]
        return MultiModalData(num_image_tokens=num_tokens, num_image_patches=num_patches)

    @property
    def unused_input_names(self) -> list[str]:
        """Outputs of the tokenizer that no model takes."""
        return ["token_type_ids"]

    @property
    def model_input_names(self) -> list[str]:
        """Keys that a call returns by default."""
        return [name for name in super().model_input_names if name != "num_patches"]

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `processor_config.json`."""
        # transformers has a class of this name, which `AutoProcessor` would load even with this package installed.
        # Without `processor_class` it follows `auto_map` and the model's configuration.
        return {name: value for name, value in super().to_dict().items() if name != "processor_class"}

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Saves the settings, tokenizer, chat template and code; returns the paths of the settings.

        With `push_to_hub` the folder is uploaded too; `kwargs` are arguments of that, such as `repo_id`.
        """
        files = super().save_pretrained(save_directory)
        self.tokenizer._set_processor_class(None)  # set by the base class; see `to_dict`
        tokenizer_config = Path(save_directory) / "tokenizer_config.json"
        settings = json.loads(tokenizer_config.read_text(encoding="utf-8"))
        if settings.pop("processor_class", None) is not None:
            text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
            tokenizer_config.write_text(text + "\n", encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files

    def _check_image_tokens(self) -> None:
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
        flat_images = [image for group in group_images(images)[0] for image in group]
        if mode == "caption" and text is None:
            text = [self.caption_prompt] * len(flat_images)
        features: dict[str, Any] = {}
        if text is not None:
            features.update(self._encode_texts(text, mode, kwargs))
        if flat_images:
            features.update(self.image_processor(flat_images, **merged["images_kwargs"]))
        return BatchFeature(features, tensor_type=merged["text_kwargs"].get("return_tensors"))

    def _encode_texts(self, text: list[str], mode: str, kwargs: dict[str, Any]) -> dict[str, list[list[int]]]:
        names = ("max_length", "padding", "padding_side")
        settings = {name: value for name in names if (value := requested(kwargs, name)) is not None}
        if mode == "caption":
            return encode_batch(self.tokenizer, text, with_end=False, **{"padding_side": "left", **settings})
        text = [with_prefix(sample, self.text_prefix) for sample in text]
        defaults = {"max_length": self.max_text_length, "padding": "max_length", "padding_side": "right"}
        return encode_batch(self.tokenizer, text, with_end=True, **{**defaults, **settings})

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
        """Renders one dialogue or a batch of dialogues, and tokenizes them with `tokenize=True`.

        Args:
            conversation: Messages with `role` and `content`: a string or parts of type "text" (`text`), "image"
                (`image`, `path`, `url` or `base64`) and "video" (`video`, a list of frames). Not modified.
            chat_template: Jinja text or the name of one of the processor's templates, overriding the default.
            tokenize: Return model inputs instead of text.
            return_dict: Return all model inputs, not only `input_ids`.
            return_assistant_tokens_mask: Return `assistant_masks` (B, L), 1 = written by the assistant. Pads right.
            return_labels: Return `labels` (B, L): ids of the assistant's tokens, -100 elsewhere. Pads right.
            processor_kwargs: Settings of the call, such as `max_num`; may also be passed as keyword arguments.
            **kwargs: Arguments of the base class (`add_generation_prompt`...) and variables of the template.

        Returns:
            The prompt (a list for a batch), `input_ids`, or with `return_dict` a `BatchFeature`.

        Raises:
            ValueError: If a message is malformed, or labels are requested and no assistant token is left.
        """
        conversations, is_batched = as_conversations(conversation)
        names = template_names(jinja := select_template(self.chat_template, chat_template))
        prepared, is_frame = prepare_conversations(conversations, names)
        kwargs, processor_kwargs = split_settings(kwargs, processor_kwargs, names.variables)
        check_dialogue_settings(processor_kwargs, self)
        with_targets = return_assistant_tokens_mask or return_labels
        if with_targets and not (tokenize and return_dict):
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
            processor_kwargs = with_single_tile_frames(processor_kwargs, is_frame, self.image_processor)
        with refusals_as_value_errors():
            if with_targets:
                spans = assistant_spans(prepared, jinja, self.tokenizer, kwargs)
                processor_kwargs = with_offsets(processor_kwargs)
            settings = {"chat_template": jinja, "tokenize": True, "return_dict": True, **kwargs}
            features = super().apply_chat_template(messages, processor_kwargs=processor_kwargs, **settings)
        if with_targets:
            masks = assistant_masks(spans, features.pop("offset_mapping"), features.pop("text_replacement_offsets"))
            add_training_targets(features, masks, return_assistant_tokens_mask, return_labels)
        return features if return_dict else features["input_ids"]


def _token_id(tokenizer: Any, token: str) -> int | None:
    """Returns the id of a token, None if the vocabulary lacks it."""
    index = tokenizer.convert_tokens_to_ids(token)
    return None if index == tokenizer.unk_token_id else index


__all__ = ["InternVLProcessor", "InternVLProcessorKwargs"]
