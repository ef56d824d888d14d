"""How much broken data a run puts up with: broken rows are counted and left out, and too many of them end the run."""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging

from ..console import printable
from ..renaming_internvl import renamed_names


logger = logging.get_logger(__name__)

MAX_KINDS = 100  # of faults that are counted apart
MAX_EXAMPLES = 3


class UnusableRowError(ValueError):
    """One row cannot be used; the others can."""


class TooManyBadRowsError(ValueError):
    """More rows are broken than the run allows."""


@dataclass
class BadRows:
    """The count of one reader (one process, or one worker of a data loader).

    Args:
        max_rate: Largest share of broken rows.
        grace: The share is taken of this many rows at least, so that one broken row among the first few ends nothing.
        seen: Rows so far, broken ones included.
        broken: Broken rows so far.
        reasons: How often each kind of fault was met: what is wrong, without names and numbers.
        examples: The first row of the first kinds: where it is, and what is wrong with it.
        limit: What a user sets `max_rate` by, for messages.
    """

    max_rate: float = 0.01
    grace: int = 1000
    seen: int = 0
    broken: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    limit: str = "`max_rate` of `BadRows`"

    def __post_init__(self) -> None:
        if not 0 <= self.max_rate <= 1:
            raise ValueError(f"{self.limit} is a share of the rows, between 0 and 1, got {self.max_rate}.")

    def count(self, place: str | None = None, reason: object = "") -> None:
        """Counts one row.

        Args:
            place: Where the broken row comes from; None for a good row.
            reason: What is wrong with it.

        Raises:
            TooManyBadRowsError: If more than `max_rate` of the rows are broken.
        """
        self.seen += 1
        if place is None:
            return
        self.broken += 1
        reason = printable(str(reason))
        kind = _kind_of(reason)
        if kind not in self.reasons and len(self.examples) < MAX_EXAMPLES:
            self.examples.append(f"{place}: {reason}")
        self.reasons[kind if kind in self.reasons or len(self.reasons) < MAX_KINDS else "other"] += 1
        if self.broken > self.max_rate * max(self.seen, self.grace):
            faults = ", ".join(f"{number} x {name}" for name, number in self.reasons.most_common())
            raise TooManyBadRowsError(
                f"{self.broken} of {self.seen} rows are broken, more than the {100 * self.max_rate:.4g}% of "
                f"{self.limit} (of at least {self.grace} rows): {faults}. The last one: {place}: {reason} Mend the "
                f"data, or raise {self.limit}."
            )
        if self.broken & (self.broken - 1) == 0:  # 1, 2, 4, 8... keeps the log short
            logger.warning(f"{self.broken} of {self.seen} rows left out so far. The last one: {place}: {reason}")

    def told(self) -> str:
        """What was broken, for messages: how often each kind, the first rows, and what names all of them."""
        kinds = ", ".join(f"{number} x {name}" for name, number in self.reasons.most_common())
        return f"{kinds}. The first: {' '.join(self.examples)} `python -m internvl.training validate` names all."

    def state_dict(self) -> dict[str, Any]:
        """The count, to go on with after a stop."""
        return {"seen": self.seen, "broken": self.broken, "reasons": dict(self.reasons)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved count."""
        self.seen, self.broken, self.reasons = state["seen"], state["broken"], Counter(state["reasons"])


def _kind_of(reason: str) -> str:
    """The first clause of a reason, with `*` for what differs from row to row."""
    without_names = re.sub(r"`[^`]*`|\([^)]*\)|\d+", "*", reason)
    return re.split(r"[:.](?:\s|$)", without_names, maxsplit=1)[0]


__getattr__ = renamed_names(globals(), BrokenRows="BadRows", TooManyBrokenRowsError="TooManyBadRowsError")
