"""Who sees whom in QLLaMA (paper section 3.2), queries (Q) first, then text (T); padding is never seen:

| pattern       | Q sees Q | Q sees T | T sees Q | T sees T |
|---------------|----------|----------|----------|----------|
| "image"       | all      | -        | -        | -        |
| "text"        | -        | -        | -        | causal   |
| "matching"    | all      | all      | all      | all      |
| "contrastive" | all      | no       | no       | causal   |
| "generation"  | all      | no       | all      | causal   |

A row may hold several readings of its picture, each with a pattern and a text of its own. Queries that see no text are the same in
every reading and stand there once. Shape letters as in modeling_internvit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


VISIBILITIES = ("image", "text", "matching", "contrastive", "generation")

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def text_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions (B, T) that count real tokens only; padding gets 1, as published (its value never matters)."""
    positions = attention_mask.long().cumsum(-1) - 1
    return positions.masked_fill(attention_mask == 0, 1)


@dataclass(frozen=True)
class Readings:
    """The readings of a picture that share a row: copies of the queries first, then the texts in the order of the readings.

    Every "matching" reading has a copy of its own, since its queries see its text. All others share the last copy.

    Args:
        patterns: One per reading.
        text_lengths: Positions of each reading's text, padding counted.
        num_queries: M, queries of a reading.
    """

    patterns: tuple[str, ...]
    text_lengths: tuple[int, ...]
    num_queries: int

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.patterns) - set(VISIBILITIES)):
            raise ValueError(f"`visibility` must be among {list(VISIBILITIES)}, got {unknown}.")
        if any(length for pattern, length in zip(self.patterns, self.text_lengths, strict=True) if pattern == "image"):
            raise ValueError('`visibility` "image" takes queries alone, but text was given.')
        if self.num_queries and "text" in self.patterns:
            raise ValueError('`visibility` "text" takes text alone, but queries were given.')

    @property
    def copies(self) -> list[int]:
        """For each reading, which copy of the queries is its own."""
        num_matching = self.patterns.count("matching")
        own = iter(range(num_matching))
        return [next(own) if pattern == "matching" else num_matching for pattern in self.patterns]

    @property
    def num_copies(self) -> int:
        """How many times the queries stand in the row."""
        return len(set(self.copies))

    def split(self, hidden_states: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(B, copies * M + texts, D) -> per reading its queries (B, M, D) and its text (B, L, D)."""
        queries, texts = hidden_states.tensor_split([self.num_copies * self.num_queries], dim=1)
        copies = queries.split(self.num_queries, dim=1)
        parts = texts.split(list(self.text_lengths), dim=1)
        return [(copies[copy], text) for copy, text in zip(self.copies, parts, strict=True)]

    def position_ids(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, copies * M + texts) of ones and zeros -> positions: every reading counts as if it were alone."""
        masks = [torch.cat(reading, dim=1) for reading in self.split(attention_mask)]
        texts = [text_positions(mask)[:, self.num_queries :] for mask in masks]
        queries = torch.arange(self.num_queries, device=attention_mask.device).repeat(self.num_copies)
        return torch.cat([queries.expand(len(attention_mask), -1), *texts], dim=1)

    def blocks(self) -> torch.Tensor:
        """(2, copies * M + texts): the block that each position belongs to, and the one it sees besides (if none, its own again).

        In a block from 0 on all see all; in a negative one the text is causal.
        """
        own = [copy for copy in range(self.num_copies) for _ in range(self.num_queries)]
        seen = list(own)
        for number, (pattern, copy, length) in enumerate(
            zip(self.patterns, self.copies, self.text_lengths, strict=True)
        ):
            block = copy if pattern == "matching" else -1 - number
            own += [block] * length
            seen += [block if pattern == "contrastive" else copy] * length
        return torch.tensor([own, seen])


def rows_of(
    visibility: str | Sequence[str] | Readings | None, num_queries: int, batch: int, length: int
) -> list[Readings]:
    """The readings of all rows (a list of one) or of each row.

    Args:
        visibility: As for `QLlamaModel.forward`.
        num_queries: Positions of queries, all copies together.
        batch: Rows.
        length: Positions, queries and text.

    Raises:
        ValueError: If the patterns or their number do not fit.
    """
    num_text = length - num_queries
    if isinstance(visibility, Readings):
        described = (visibility.num_copies * visibility.num_queries, sum(visibility.text_lengths))
        if described != (num_queries, num_text):
            raise ValueError(
                f"`visibility` describes {described[0]} queries and {described[1]} text positions, got {num_queries} and {num_text}: "
                f"give {visibility.num_copies} copies of the queries and all texts."
            )
        return [visibility]
    if visibility is None:
        visibility = "text" if not num_queries else "generation" if num_text else "image"
    patterns = [visibility] if isinstance(visibility, str) else visibility
    if len(patterns) not in (1, batch):
        raise ValueError(f"`visibility` must name one pattern, or one per row ({batch}), got {len(patterns)}.")
    return [Readings((pattern,), (num_text,), num_queries) for pattern in patterns]


def mask_functions(rows: list[Readings], batch: int, device: torch.device) -> tuple[MaskFunction, MaskFunction]:
    """What a causal mask gains and what it loses, for `create_causal_mask`: of row, head, query position and key position."""
    blocks = torch.stack([readings.blocks() for readings in rows]).expand(batch, -1, -1)
    own, seen = blocks.to(device, non_blocking=True).unbind(1)
    last = own.shape[1] - 1

    def also_visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (own[b, q] >= 0) & (own[b, q] == own[b, k.clamp(max=last)])

    def still_visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        block = own[b, k.clamp(max=last)]  # a static cache has room behind the last position
        return (k <= last) & ((block == own[b, q]) | (block == seen[b, q]))

    return also_visible, still_visible


__all__ = ["VISIBILITIES", "MaskFunction", "Readings", "mask_functions", "rows_of", "text_positions"]
