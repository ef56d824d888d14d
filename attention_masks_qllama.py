"""Attention masks of QLLaMA (paper section 3.2). Queries (Q) stand before text (T); padding is never attended to.

| attention mode | Q to Q | Q to T | T to Q | T to T |
|----------------|--------|--------|--------|--------|
| "image"        | all    | -      | -      | -      |
| "text"         | -      | -      | -      | causal |
| "matching"     | all    | all    | all    | all    |
| "contrastive"  | all    | no     | no     | causal |
| "generation"   | all    | no     | all    | causal |

A row may pack several passes over its image, each with its mode and its text. Queries that attend to no text are equal
in every pass, so they stand in the row once. Shape letters as in modeling_internvit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .renaming_internvl import renamed_arguments, renamed_names


ATTENTION_MODES = ("image", "text", "matching", "contrastive", "generation")

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def text_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions (B, T) that count real tokens only; padding gets 1, as published (its value never matters)."""
    positions = attention_mask.long().cumsum(-1) - 1
    return positions.masked_fill(attention_mask == 0, 1)


@renamed_arguments(patterns="modes")
@dataclass(frozen=True)
class PackedPasses:
    """Passes over one image that share a row: copies of the queries first, then the texts in the order of the passes.

    Every "matching" pass needs its own copy, since its queries attend to its text. All other passes share the last
    copy. So "matching", "contrastive" and "generation" (stage 2) are packed as

        Q of matching | Q of both others | T of matching | T of contrastive | T of generation

    Args:
        modes: One per pass, of `ATTENTION_MODES`.
        text_lengths: Positions of each pass's text, padding counted.
        num_queries: M, queries of a pass.
    """

    modes: tuple[str, ...]
    text_lengths: tuple[int, ...]
    num_queries: int

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.modes) - set(ATTENTION_MODES)):
            raise ValueError(f"`attention_mode` must be among {list(ATTENTION_MODES)}, got {unknown}.")
        if any(length for mode, length in zip(self.modes, self.text_lengths, strict=True) if mode == "image"):
            raise ValueError('`attention_mode` "image" takes queries alone, but text was given.')
        if self.num_queries and "text" in self.modes:
            raise ValueError('`attention_mode` "text" takes text alone, but queries were given.')

    @property
    def copies(self) -> list[int]:
        """Index of the copy of the queries that each pass uses."""
        num_matching = self.modes.count("matching")
        unshared = iter(range(num_matching))
        return [next(unshared) if mode == "matching" else num_matching for mode in self.modes]

    @property
    def num_copies(self) -> int:
        """How many times the queries stand in the row."""
        return len(set(self.copies))

    def split(self, hidden_states: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(B, copies * M + texts, D) -> queries (B, M, D) and text (B, L, D) of each pass."""
        queries, texts = hidden_states.tensor_split([self.num_copies * self.num_queries], dim=1)
        copies = queries.split(self.num_queries, dim=1)
        parts = texts.split(list(self.text_lengths), dim=1)
        return [(copies[copy], text) for copy, text in zip(self.copies, parts, strict=True)]

    def position_ids(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, copies * M + texts) of ones and zeros -> positions: every pass counts as if it were alone."""
        masks = [torch.cat(parts, dim=1) for parts in self.split(attention_mask)]
        texts = [text_positions(mask)[:, self.num_queries :] for mask in masks]
        queries = torch.arange(self.num_queries, device=attention_mask.device).repeat(self.num_copies)
        return torch.cat([queries.expand(len(attention_mask), -1), *texts], dim=1)

    def blocks(self) -> torch.Tensor:
        """(2, copies * M + texts): each position's block, and the second block it attends to (its block if there is
        none).

        Within a block numbered from 0 all positions attend to each other; within a negative block attention is causal.
        A copy of the queries is block 0, 1...; a matching text joins its copy's block, any other text is block -1,
        -2...
        """
        block = [copy for copy in range(self.num_copies) for _ in range(self.num_queries)]
        also_seen = list(block)
        for number, (mode, copy, length) in enumerate(zip(self.modes, self.copies, self.text_lengths, strict=True)):
            text_block = copy if mode == "matching" else -1 - number
            block += [text_block] * length
            also_seen += [text_block if mode == "contrastive" else copy] * length
        return torch.tensor([block, also_seen])


def packed_passes(
    attention_mode: str | Sequence[str] | PackedPasses | None, num_queries: int, batch: int, length: int
) -> list[PackedPasses]:
    """The passes packed in every row (a list of one) or in each row.

    Args:
        attention_mode: As for `QLlamaModel.forward`.
        num_queries: Positions of queries, all copies together.
        batch: Rows.
        length: Positions, queries and text.

    Raises:
        ValueError: The modes or their number do not fit.
    """
    num_text = length - num_queries
    if isinstance(attention_mode, PackedPasses):
        described = (attention_mode.num_copies * attention_mode.num_queries, sum(attention_mode.text_lengths))
        if described != (num_queries, num_text):
            raise ValueError(
                f"`attention_mode` describes {described[0]} queries and {described[1]} text positions, got "
                f"{num_queries} and {num_text}: give {attention_mode.num_copies} copies of the queries and all texts."
            )
        return [attention_mode]
    if attention_mode is None:
        attention_mode = "text" if not num_queries else "generation" if num_text else "image"
    modes = [attention_mode] if isinstance(attention_mode, str) else attention_mode
    if len(modes) not in (1, batch):
        raise ValueError(f"`attention_mode` must name one mode, or one per row ({batch}), got {len(modes)}.")
    return [PackedPasses((mode,), (num_text,), num_queries) for mode in modes]


def mask_functions(rows: list[PackedPasses], batch: int, device: torch.device) -> tuple[MaskFunction, MaskFunction]:
    """The `or_mask_function` and the `and_mask_function` of `create_causal_mask` for packed rows.

    A causal mask lets a query position attend to every earlier key. The first function adds the later keys of blocks
    in which all attend to all; the second then removes the keys of every block but the position's block and the second
    one it attends to. Both take indices of row, head, query position and key position.
    """
    blocks = torch.stack([passes.blocks() for passes in rows]).expand(batch, -1, -1)
    block, also_seen = blocks.to(device, non_blocking=True).unbind(1)
    last = block.shape[1] - 1  # a static cache has keys behind it, whose index would leave `block`

    def is_added(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (block[b, q] >= 0) & (block[b, q] == block[b, k.clamp(max=last)])

    def is_kept(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        key_block = block[b, k.clamp(max=last)]
        return (k <= last) & ((key_block == block[b, q]) | (key_block == also_seen[b, q]))

    return is_added, is_kept


__getattr__ = renamed_names(globals(), Readings="PackedPasses", VISIBILITIES="ATTENTION_MODES")
