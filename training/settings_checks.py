"""Checks of `Trainer`'s settings before a phase is trained: a bad one is a `ValueError` at once."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.utils import is_liger_kernel_available


# What transformers, accelerate and torch raise for settings that are wrong or need a library that is not installed.
LIBRARY_ERRORS = (AssertionError, AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError)
# Sizes of `accelerate launch` by which processes would share rows, or layers, with each other.
SHARED_ROWS = {"cp_size": "context", "sp_size": "sequence", "tp_size": "tensor"}
MEASURED_ALWAYS = ("loss", "runtime", "samples_per_second", "steps_per_second")


@contextmanager
def settings_of(what: str) -> Iterator[None]:
    """Turn errors of libraries into a `ValueError` that begins with what they refuse."""
    try:
        yield
    except LIBRARY_ERRORS as error:
        raise ValueError(f"{what} cannot be set up: {error or type(error).__name__}") from error


def check_launcher() -> None:
    """Check that processes are to read rows of their own.

    Raises:
        ValueError: If they are to share rows. accelerate would split token ids before the model has put the images in
            their places.
    """
    for name, kind in SHARED_ROWS.items():
        size = os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")
        if size != "1":
            raise ValueError(
                f"`--parallelism_config_{name} {size}`: {kind} parallelism is not for these models, whose images are "
                "put between the tokens inside of the model. Leave it out, and share the weights by "
                "`--parallelism_config_dp_shard_size` (configs/accelerate/fsdp2.yaml, hsdp.yaml); shorter rows, "
                "packing and gradient checkpointing save memory for activations."
            )


def check_late_settings(arguments: TrainingArguments) -> None:
    """Build what `Trainer` builds only when it trains: the schedule, and the compiler.

    Raises:
        ValueError: If one of them refuses its settings, or a library is not installed.
    """
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError("`--use-liger-kernel` needs the library `liger-kernel`, which is not installed.")
    kind, settings = arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs
    if not isinstance(settings, dict | None):
        raise ValueError(f"`--lr-scheduler-kwargs` must be a JSON object, got {settings!r}.")
    with settings_of(f"`--lr-scheduler-type {getattr(kind, 'value', kind)}` with `--lr-scheduler-kwargs {settings}`"):
        get_scheduler(
            kind,
            torch.optim.SGD([torch.zeros(1)]),
            arguments.get_warmup_steps(arguments.max_steps),
            arguments.max_steps,
            settings,
        )
    if arguments.torch_compile:
        backend, mode = arguments.torch_compile_backend, arguments.torch_compile_mode
        with settings_of(f"`--torch-compile` with backend {backend} and mode {mode}"):
            torch.compile(torch.nn.Identity(), backend=backend or "inductor", mode=mode)


def check_best_metric(arguments: TrainingArguments, measure: Any, model: Any) -> None:
    """Check that the evaluation on held-out data will give the metric by which checkpoints are compared.

    Args:
        arguments: Settings of `Trainer`.
        measure: What is measured beside the loss; its `names`, if it has any, returns the names of its values.
        model: The model that it measures.

    Raises:
        ValueError: If it will not.
    """
    metric, names = arguments.metric_for_best_model, ()
    if measure is not None:
        if not hasattr(measure, "names"):
            return
        names = measure.names(model)
    if metric is not None and metric.removeprefix("eval_") not in (*MEASURED_ALWAYS, *names):
        raise ValueError(
            f"`--metric-for-best-model {metric}` is not measured on the held-out data: take one of "
            f"{', '.join((MEASURED_ALWAYS[0], *names))}."
        )
