"""The published helpers `chat` and `batch_chat` of InternVL-Chat, with their published signatures."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationMixin
from transformers.utils import logging

from .conversation_internvl import (
    IMAGE_CONTEXT_TOKEN,
    ConversationTemplate,
    build_query,
    get_conversation_template,
    with_image_placeholder,
)


logger = logging.get_logger(__name__)

# The mixin calls methods of a model that generates: type checkers see a subclass.
_Generation: Any = GenerationMixin if TYPE_CHECKING else object


class ChatHelpersMixin(_Generation):
    """Turns of a conversation in the checkpoint's published prompt form."""

    _image_token_id: int | None

    @property
    def template(self) -> str | None:
        """Name of the conversation template."""
        return self.config.template

    @property
    def conv_template(self) -> ConversationTemplate | None:
        """The conversation template."""
        return get_conversation_template(self.config.template) if self.config.template else None

    def chat(
        self,
        tokenizer: Any,
        pixel_values: torch.Tensor | None,
        question: str,
        generation_config: dict[str, Any],
        history: list[tuple[str, str]] | None = None,
        return_history: bool = False,
        num_patches_list: list[int] | None = None,
        IMG_START_TOKEN: str = "<img>",
        IMG_END_TOKEN: str = "</img>",
        IMG_CONTEXT_TOKEN: str = IMAGE_CONTEXT_TOKEN,
        verbose: bool = False,
    ) -> str | tuple[str, list[tuple[str, str]]]:
        """One turn of a conversation in the checkpoint's published prompt form.

        Args:
            tokenizer: The checkpoint's tokenizer.
            pixel_values: (tiles, 3, height, width) of all images of the conversation, or None.
            question: What the user says, with one `<image>` per image; without any, `<image>` and a line break come
                first.
            generation_config: Arguments of `generate` as a plain dictionary; may hold a `streamer`. Not changed.
            history: (question, answer) of earlier turns. Not changed.
            return_history: Whether to return the history with this turn appended as well.
            num_patches_list: Tiles of each image; None means all tiles are one image.
            IMG_START_TOKEN: Must be the token of the checkpoint.
            IMG_END_TOKEN: Must be the token of the checkpoint.
            IMG_CONTEXT_TOKEN: Must be the token of the checkpoint.
            verbose: Whether to log prompt and answer.

        Returns:
            The answer, or `(answer, history)`.
        """
        _check_image_tokens(IMG_START_TOKEN, IMG_END_TOKEN)
        if num_patches_list is None:
            num_patches_list = [len(pixel_values)] if pixel_values is not None else []
        if pixel_values is not None and len(pixel_values) != sum(num_patches_list):
            raise ValueError(f"`num_patches_list` sums to {sum(num_patches_list)}, got {len(pixel_values)} tiles.")
        query = self._build_query(question, history, num_patches_list)
        answers = self._answer(tokenizer, pixel_values, query, generation_config, IMG_CONTEXT_TOKEN)
        if verbose:
            logger.info("%s %s", query, answers[0])
        asked = with_image_placeholder(question, history, bool(num_patches_list))
        return (answers[0], [*(history or []), (asked, answers[0])]) if return_history else answers[0]

    def batch_chat(
        self,
        tokenizer: Any,
        pixel_values: torch.Tensor | None,
        questions: list[str],
        generation_config: dict[str, Any],
        num_patches_list: list[int] | list[list[int]] | None = None,
        history: list[list[tuple[str, str]] | None] | None = None,
        return_history: bool = False,
        IMG_START_TOKEN: str = "<img>",
        IMG_END_TOKEN: str = "</img>",
        IMG_CONTEXT_TOKEN: str = IMAGE_CONTEXT_TOKEN,
        verbose: bool = False,
        image_counts: list[int] | None = None,
    ) -> list[str] | tuple[list[str], list[list[tuple[str, str]]]]:
        """One turn of several conversations at once.

        Args:
            tokenizer: As in `chat`.
            pixel_values: The tiles of all conversations, in order.
            questions: One per conversation.
            generation_config: As in `chat`.
            num_patches_list: Per conversation the tiles of its image, or a list with the tiles of each of its images
                (an empty list for none).
            history: Per conversation its earlier turns or None; the published code accepts only None.
            return_history: Whether to return the histories with this turn appended as well.
            IMG_START_TOKEN: As in `chat`.
            IMG_END_TOKEN: As in `chat`.
            IMG_CONTEXT_TOKEN: As in `chat`.
            verbose: Whether to log prompts and answers.
            image_counts: Former name of `num_patches_list`, in the published signature.
        """
        _check_image_tokens(IMG_START_TOKEN, IMG_END_TOKEN)
        counts: Any = image_counts if num_patches_list is None else num_patches_list
        if counts is None:
            counts = [[] for _ in questions] if pixel_values is None else [1] * len(questions)
        tiles = [[entry] if isinstance(entry, int) else list(entry) for entry in counts]
        histories = list(history) if history is not None else [None] * len(questions)
        if not len(questions) == len(tiles) == len(histories):
            raise ValueError(
                f"`questions`, `num_patches_list` and `history` must be equally long, got {len(questions)}, "
                f"{len(tiles)} and {len(histories)}."
            )
        num_tiles = 0 if pixel_values is None else len(pixel_values)
        if num_tiles != sum(map(sum, tiles)):
            raise ValueError(f"`num_patches_list` sums to {sum(map(sum, tiles))}, got {num_tiles} tiles.")
        turns = list(zip(questions, histories, tiles, strict=True))
        queries = [self._build_query(*turn) for turn in turns]
        answers = self._answer(tokenizer, pixel_values, queries, generation_config, IMG_CONTEXT_TOKEN)
        if verbose:
            logger.info("%s %s", queries, answers)
        if not return_history:
            return answers
        asked = [with_image_placeholder(question, past, bool(images)) for question, past, images in turns]
        return answers, [
            [*(past or []), (question, answer)]
            for past, question, answer in zip(histories, asked, answers, strict=True)
        ]

    def _build_query(self, question: str, history: list[tuple[str, str]] | None, num_patches: list[int]) -> str:
        if self.conv_template is None:
            raise ValueError("`config.template` is not set; name one of `conversation_internvl` to use `chat`.")
        return build_query(
            self.conv_template,
            question,
            history,
            num_patches,
            self.num_image_token,
            self.system_message,
            self.config.use_image_start_end,
        )

    @contextmanager
    def _placeholder_of(self, token: str, index: int) -> Iterator[None]:
        """Uses the user's tokenizer's id of the placeholder in this call, and from then on if none was known."""
        known = self._image_token_id
        if self.img_context_token_id not in (None, index):
            logger.warning_once(
                f"The model's image placeholder has the id {self.img_context_token_id}, the tokenizer's `{token}` "
                f"{index}: using the tokenizer's."
            )
        is_new = self.img_context_token_id is None
        self._image_token_id = index
        try:
            yield
        finally:
            if not is_new:
                self._image_token_id = known

    def _answer(
        self,
        tokenizer: Any,
        pixel_values: torch.Tensor | None,
        query: str | list[str],
        generation_config: dict[str, Any],
        image_token: str,
    ) -> list[str]:
        image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        is_batch = not isinstance(query, str)
        encoded = tokenizer(query, return_tensors="pt", padding=is_batch, padding_side="left")
        settings = dict(generation_config)
        stop_id = tokenizer.convert_tokens_to_ids(self.conv_template.stop.strip())
        if stop_id is not None and stop_id != getattr(tokenizer, "unk_token_id", None):
            settings.setdefault("eos_token_id", stop_id)
        input_ids = encoded["input_ids"].to(self.device)
        with self._placeholder_of(image_token, image_token_id):
            output = self.generate(
                input_ids=input_ids,
                pixel_values=pixel_values,
                attention_mask=encoded["attention_mask"].to(self.device),
                **settings,
            )
        texts = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
        return [self.conv_template.cut_answer(text) for text in texts]


def _check_image_tokens(start: str, end: str) -> None:
    if (start, end) != ("<img>", "</img>"):
        raise ValueError(f"Images stand between `<img>` and `</img>` in every release, got {start!r} and {end!r}.")
