"""An image token for a decoder whose vocabulary has none.

LLaVA uses -200 as image id, outside the vocabulary; every other tool needs a token, so `<IMG_CONTEXT>` is added. Its
row of the embedding is the mean of the others (never read: features take its place), its row of the head is zero, and
the model gives it the lowest logit, so that the probabilities of the other tokens, and with them the loss, do not
change.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AddedToken, PreTrainedTokenizerBase

from ...conversation_internvl import IMAGE_CONTEXT_TOKEN
from ..readers.tensors import LazyTensor, computed
from ..repository.tokenizer import copy_tokenizer, image_token_id_of
from .edits import Draft, Edit


EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def add_to_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str] = (IMAGE_CONTEXT_TOKEN,)) -> None:
    """Gives a tokenizer the image tokens that it lacks."""
    added = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_tokens(added, special_tokens=True)


def adding_image_token(
    tokenizer_folder: Path | None, image_token_id: int | None, build_config: Callable[[dict[str, Any]], Any]
) -> Edit:
    """Builds the edit that adds an image token to a model, with the id that a tokenizer or else the user says.

    The edit raises ValueError if the tokenizer contradicts the user, or does not belong to the model.
    """

    def edit(draft: Draft) -> None:
        embedding = draft.tensors.get(EMBEDDING)
        if embedding is None:
            return  # is listed later, with everything else that is missing
        num_rows = embedding.shape[0]
        token_id, is_free = num_rows if image_token_id is None else image_token_id, False
        if tokenizer_folder is not None:
            token_id, is_free = _id_in_tokenizer(tokenizer_folder, build_config(draft.settings), image_token_id)
        draft.settings["image_token_id"] = token_id
        # Only a tokenizer shows whether an existing row is in use: without one, the named row is left alone.
        if is_free or token_id >= num_rows:
            _add_rows(draft, token_id, num_rows)

    return edit


def _id_in_tokenizer(folder: Path, config: Any, image_token_id: int | None) -> tuple[int, bool]:
    """The token's id, and whether the tokenizer had no such token before."""
    with TemporaryDirectory() as temporary:
        tokenizer = copy_tokenizer(folder, Path(temporary), config)
        is_free = IMAGE_CONTEXT_TOKEN not in tokenizer.get_vocab()
        add_to_tokenizer(tokenizer)
    return image_token_id_of(tokenizer, image_token_id), is_free


def _add_rows(draft: Draft, token_id: int, num_rows: int) -> None:
    if token_id > num_rows:
        raise ValueError(
            f"`{IMAGE_CONTEXT_TOKEN}` would be token {token_id}, but the model has embeddings for {num_rows} tokens: "
            "the tokenizer or `image_token_id` is not that of this checkpoint."
        )
    draft.tensors[EMBEDDING] = _with_row(draft.tensors[EMBEDDING], token_id, is_mean=True)
    if HEAD in draft.tensors:
        draft.tensors[HEAD] = _with_row(draft.tensors[HEAD], token_id, is_mean=False)
    draft.settings["text_config"]["vocab_size"] = max(num_rows, token_id + 1)
    draft.settings["mask_image_token_logit"] = True
    draft.notes.append(f"`{IMAGE_CONTEXT_TOKEN}` was added as token {token_id}; the other logits are unchanged.")


def _with_row(tensor: LazyTensor, index: int, is_mean: bool) -> LazyTensor:
    """A matrix with a row in the place of an unused one, or behind the last."""

    def replaced(rows: torch.Tensor) -> torch.Tensor:
        row = (
            rows.mean(dim=0, keepdim=True, dtype=torch.float32).to(rows.dtype)
            if is_mean
            else rows.new_zeros(1, rows.shape[1])
        )
        return torch.cat([rows[:index], row, rows[index + 1 :]])

    return computed(replaced, tensor)
