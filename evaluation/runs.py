"""A task on anyone's data: what it is given, and how its samples become a report."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from .data.items import EvaluationData, Item
from .embeddings import batches, modes_of
from .feature_store import fingerprint_of_items
from .protocols.protocol import Protocol
from .reports import Report, metrics_of, new_report
from .samples import SampleLog


# Where `measure_TASK` stands.
MODULES = {
    "zero_shot": "zero_shot",
    "retrieval": "retrieval",
    "caption": "caption",
    "probe": "probe",
    "segmentation": "segmentation",
}


@dataclass(frozen=True)
class TaskRun:
    """What a task is given.

    Args:
        protocol: What is measured.
        data: On which images.
        model: Loaded, in evaluation mode.
        processor: Its processor.
        log: Where the results of samples go; those of an earlier run that was stopped are in it.
        batch_size: Images at a time.
        options: Further ones of the command line, such as `rerank`.
    """

    protocol: Protocol
    data: EvaluationData
    model: PreTrainedModel
    processor: ProcessorMixin
    log: SampleLog
    batch_size: int
    options: dict[str, Any]

    @property
    def modes(self) -> list[str]:
        """The modes of the protocol that the model has."""
        own = modes_of(self.model)
        return [mode for mode in (self.protocol.modes or own) if mode in own]

    def items_left(self, description: str) -> Iterator[list[Item]]:
        """Yields batches of the items that have no result yet, with a progress bar on a terminal."""
        left = [item for item in self.data.items if item.name not in self.log.done]
        return batches(left, self.batch_size, description)


def data_state(protocol: Protocol, data: EvaluationData) -> str:
    """Returns a short text that changes when a protocol, images, their labels or captions, or names of classes do."""
    measured = {name: value for name, value in vars(protocol).items() if name not in ("title", "published")}
    texts = [(item.labels, item.captions) for item in (*data.items, *data.training)]
    found = hashlib.sha256(
        repr((measured, data.classes, data.templates, data.candidates, texts)).encode("utf-8", "backslashreplace")
    )
    found.update(fingerprint_of_items((*data.items, *data.training)).encode())
    return found.hexdigest()[:16]


def measure(run: TaskRun) -> dict[str, dict[str, Any]]:
    """Measures what is left to measure.

    Returns:
        Metrics by their names: those of the samples as from `metrics_of`, and those of the whole that the task adds.
    """
    task = run.protocol.task
    measure_task: Callable[[TaskRun], dict[str, dict[str, Any]] | None] = getattr(
        import_module(f".{MODULES[task]}", __package__), f"measure_{task}"
    )
    of_whole = measure_task(run) or {}
    return {**metrics_of(run.log.done.values()), **of_whole}


def report_of(run: TaskRun, metrics: dict[str, dict[str, Any]]) -> Report:
    """The report of a finished run."""
    protocol = run.protocol
    return new_report(
        protocol.task,
        run.log.settings["model"],
        run.log.settings,
        metrics,
        protocol=protocol.name,
        title=protocol.title,
        published=dict(protocol.published) or None,
        samples=Path(run.log.path).name,
    )
