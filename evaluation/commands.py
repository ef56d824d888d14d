"""Commands that measure on anyone's data: one protocol, or all whose data lie below a root."""

import argparse
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..kinds import check_kind, kind_of
from ..writing import check_writable
from .checkpoints import checkpoint_state
from .protocols.protocol import OWN_DATA, POOLINGS, TASKS, Protocol, find_protocol, own_protocol


if TYPE_CHECKING:  # `--help` and wrong arguments need no torch
    import torch

    from .data.items import EvaluationData
    from .reports import Report


def positive(text: str) -> int:
    """A number above 0, as argparse reads it."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


CONTRASTIVE = ("InternVL-C", "InternVL-G")
KINDS: dict[str, tuple[str, ...]] = {
    "zero_shot": CONTRASTIVE,
    "retrieval": CONTRASTIVE,
    "caption": ("InternVL-G", "chat"),
    "probe": ("vision", "InternVL-C", "InternVL-G", "chat"),
}
# Options of a task besides those of all: the flag, and what argparse is told.
TASK_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "retrieval": {
        "--rerank": {"type": positive, "metavar": "K", "help": "order K candidates by matching (InternVL-G)"},
        "--dual-softmax": {"action": "store_true", "help": "weight similarities by a softmax over all queries"},
    },
    "probe": {
        "--pooling": {"choices": POOLINGS, "help": "of the probe (default: linear, paper table 22)"},
        "--epochs": {"type": positive, "metavar": "N", "help": "of training (default: 10)"},
        "--views": {"type": positive, "metavar": "N", "help": "random crops of a training image that are stored"},
        "--sweep": {"action": "store_true", "help": "choose the learning rate on a tenth of the training images"},
        "--features": {"metavar": "DIR", "help": "where features are kept (default: beside the report)"},
        "--training-limit": {"type": positive, "metavar": "N", "help": "training images (default: all)"},
    },
}
PLACES = ("features",)  # options that decide no result
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_data_arguments(parser: argparse.ArgumentParser, is_card: bool = False) -> None:
    """The options of a measurement on data."""
    where = "folder with data sets" if is_card else "folder, file of annotations, or shards (`hf://...` too)"
    parser.add_argument("--data", required=is_card, metavar="ROOT", help=where)
    if is_card:
        parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help="(default: all)")
    else:
        parser.add_argument("--protocol", metavar="NAME", help="a shipped protocol, or the path of one as JSON")
        parser.add_argument("--mode", choices=("InternVL-C", "InternVL-G"), help="instead of the protocol's")
    parser.add_argument("--limit", type=positive, metavar="N", help="images, spread evenly over all")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as they are saved)")
    parser.add_argument("--image-size", type=positive, metavar="PIXELS", help="(default: the model's own)")
    parser.add_argument("--device", metavar="NAME", help="(default: a GPU if there is one)")


def add_task_arguments(parser: argparse.ArgumentParser, task: str) -> None:
    """The options that only one task has on data."""
    for flag, settings in TASK_OPTIONS.get(task, {}).items():
        parser.add_argument(flag, **settings)


def measure_on_data(options: argparse.Namespace) -> int:
    """Measures one protocol; prints and writes its report."""
    from .card import card
    from .data.opening import open_data
    from .reports import samples_file

    protocol = _chosen(options)
    if options.mode:
        protocol = replace(protocol, modes=(options.mode,))
    data = open_data(protocol, options.data, options.limit)
    _check_model(options, protocol.task)
    _check_image_size(options, protocol.task)
    _check_modes(options, protocol)
    named_device(options.device)
    output = options.output or _default_output(options, protocol)
    settings = _settings(protocol, data, options)
    known = _known(protocol, data, options, output, settings)
    report = known or _measured(protocol, data, lambda: _load(options, protocol.task), options, output, settings)
    print(card([report]))  # noqa: T201
    print(f"The report is {output}, its samples {samples_file(output)}.", file=sys.stderr)  # noqa: T201
    return 0


def _default_output(options: argparse.Namespace, protocol: Protocol) -> Path:
    """MODEL-PROTOCOL.json; of own data MODEL-TASK-DATA.json."""
    model = Path(options.model, options.subfolder).resolve().name or "model"
    data = re.sub(r"[^\w.-]+", "-", Path(options.data).stem).strip("-") or "data"
    return Path(f"{model}-{f'{protocol.task}-{data}' if protocol.name == OWN_DATA else protocol.name}.json")


def measure_card(options: argparse.Namespace) -> int:
    """Measures every protocol whose data lie below a root; what was measured before is read."""
    from tqdm import tqdm

    from .card import card
    from .data.opening import incomplete_below, open_data, protocols_below
    from .harness_results import benchmark_commands, read_harness_results

    protocols = [one for one in protocols_below(options.data) if one.task in options.tasks]
    for place, names in incomplete_below(options.data, options.tasks).items():
        print(f"{place} is not measured: it has none of {', '.join(names)}.", file=sys.stderr)  # noqa: T201
    if not protocols:
        raise ValueError(
            f"No data of a protocol lie below {options.data}: `python -m internvl.evaluation protocols` lists where "
            "each is looked for."
        )
    fitting = [one for one in protocols if _fits(options, one)]
    if not fitting:
        tasks = ", ".join(dict.fromkeys(one.task for one in protocols))
        raise ValueError(f"{options.model} is no model that the protocols below {options.data} measure: {tasks}.")
    named_device(options.device)
    _check_image_size(options, fitting[0].task)
    of_harnesses = [report for path in options.harness_results or () for report in read_harness_results(path)]
    folder = options.output or Path(f"{Path(options.model).resolve().name or 'model'}-card")
    planned = []
    for one in fitting:
        data, output = open_data(one, options.data, options.limit), folder / f"{one.name}.json"
        settings = _settings(one, data, options)
        planned.append((one, data, output, settings, _known(one, data, options, output, settings)))
    load = cache(partial(_load, options))
    reports = []
    for one, data, output, settings, known in tqdm(planned, desc="protocols", disable=None):
        loaded = partial(load, "segmentation" if one.task == "segmentation" else "")
        reports.append(known or _measured(one, data, loaded, options, output, settings))
    print(card([*reports, *of_harnesses]))  # noqa: T201
    if kind_of(check_kind(options.model, *KINDS["probe"], door="a card", subfolder=options.subfolder)) == "chat":
        print(benchmark_commands(options.model), file=sys.stderr)  # noqa: T201
    return 0


def print_protocols() -> int:
    """Prints every protocol with where its data are looked for."""
    from .card import table
    from .data.opening import annotation_names
    from .protocols.protocol import shipped_protocols

    rows = [("task", "protocol", "title", "looked for below the root", "with the file")]
    for one in shipped_protocols().values():
        separator = " and " if one.data["layout"] == "xtd" else ", "
        files = separator.join(annotation_names(one))
        rows.append((one.task, one.name, one.title, ", ".join(one.data.get("folders", [])), files))
    print(table(rows))  # noqa: T201
    return 0


def _chosen(options: argparse.Namespace) -> Protocol:
    """The protocol of a call: the one that is named, the only one whose data are there, or one of own data."""
    from .data.opening import protocols_below

    if options.protocol:
        return find_protocol(options.protocol, options.task)
    found = protocols_below(options.data, options.task) if Path(options.data).is_dir() else []
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise ValueError(f"{options.data} has data of several protocols ({names}): name one by --protocol.")
    return found[0] if found else own_protocol(options.task, Path(options.data).name)


def _check_model(options: argparse.Namespace, task: str) -> None:
    """Check that the model is one that a task measures, by its configuration alone."""
    if task == "segmentation":
        from .segmentation import check_segmenter, window_of

        config = check_segmenter(options.model, options.subfolder)
        if options.image_size:
            window_of(config, options.image_size)
    else:
        check_kind(options.model, *KINDS[task], door=f"the task {task}", subfolder=options.subfolder)
    if task == "caption":
        from .caption_scores import available_tokenizer

        available_tokenizer()


def _check_image_size(options: argparse.Namespace, task: str) -> None:
    """Check that images are whole patches of the model; of a segmentation model, `_check_model` does."""
    if not options.image_size or task == "segmentation":
        return
    config = check_kind(options.model, *KINDS["probe"], door=f"the task {task}", subfolder=options.subfolder)
    patch = getattr(config, "vision_config", config).patch_size
    if options.image_size % patch:
        raise ValueError(f"`--image-size` {options.image_size}: the model reads whole patches of {patch} pixels.")


def _check_modes(options: argparse.Namespace, protocol: Protocol) -> None:
    """Check that a model has a mode in which it is to be measured."""
    if KINDS.get(protocol.task) != CONTRASTIVE:
        return
    kind = kind_of(check_kind(options.model, *CONTRASTIVE, door="", subfolder=options.subfolder))
    own = CONTRASTIVE if kind == "InternVL-G" else CONTRASTIVE[:1]
    modes = [mode for mode in protocol.modes or own if mode in own]
    if not modes:
        raise ValueError(f"{options.model} is an {kind}, which has no mode {', '.join(protocol.modes)}.")
    rerank = getattr(options, "rerank", None) or protocol.options.get("rerank")
    if rerank and "InternVL-G" not in modes:
        raise ValueError("`--rerank` orders what the mode InternVL-G finds, and it is not measured here.")


def named_device(name: str | None) -> "torch.device":
    """The device of a command line; without a name a GPU if there is one.

    Raises:
        ValueError: If torch knows none of this name here.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"`--device {name}` is not here: {str(error).splitlines()[0]}") from error


def _fits(options: argparse.Namespace, protocol: Protocol) -> bool:
    """Whether a model can be measured by a protocol."""
    from .segmentation import is_segmenter

    if protocol.task != "segmentation" and is_segmenter(options.model, options.subfolder):
        return False
    try:
        _check_model(options, protocol.task)
    except ValueError:
        return False
    if not protocol.modes or "InternVL-C" in protocol.modes:
        return True
    return kind_of(check_kind(options.model, *CONTRASTIVE, door="", subfolder=options.subfolder)) == "InternVL-G"


def _load(options: argparse.Namespace, task: str) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModel, AutoProcessor

    device = named_device(options.device)
    if task == "segmentation":
        from .segmentation import load_segmenter

        model, processor = load_segmenter(options.model, options.subfolder, options.dtype)
    else:
        where = {"pretrained_model_name_or_path": options.model, "subfolder": options.subfolder}
        model = AutoModel.from_pretrained(**where, dtype=options.dtype).eval()
        reads_text = hasattr(model.config, "vision_config")
        processor = (AutoProcessor if reads_text else AutoImageProcessor).from_pretrained(**where)
    if options.image_size:
        image_processor = getattr(processor, "image_processor", processor)
        image_processor.size = {"height": options.image_size, "width": options.image_size}
    return model.to(device), processor


def _image_size(options: argparse.Namespace) -> int | None:
    """The size at which images are seen, without loading the model."""
    if options.image_size:
        return options.image_size
    from transformers import AutoImageProcessor

    size = AutoImageProcessor.from_pretrained(options.model, subfolder=options.subfolder).size
    return int(size["height"])


def _measured(
    protocol: Protocol,
    data: "EvaluationData",
    load: Callable[[], tuple[Any, Any]],
    options: argparse.Namespace,
    output: Path,
    settings: dict[str, Any],
) -> "Report":
    from .reports import features_folder, samples_file, write_report
    from .runs import TaskRun, measure, report_of
    from .samples import SampleLog

    features = features_folder(samples_file(output))
    with SampleLog(samples_file(output), settings) as log:
        if log.is_new:
            shutil.rmtree(features, ignore_errors=True)
        model, processor = load()
        all_options = {**protocol.options, **_task_options(protocol, options)}
        run = TaskRun(protocol, data, model, processor, log, options.batch_size, all_options)
        report = report_of(run, measure(run))
    write_report(output, report)
    shutil.rmtree(features, ignore_errors=True)
    return report


def _task_options(protocol: Protocol, options: argparse.Namespace) -> dict[str, Any]:
    """The options of a command line that only this task has, where they were given."""
    names = [flag.removeprefix("--").replace("-", "_") for flag in TASK_OPTIONS.get(protocol.task, {})]
    return {name: value for name in names if (value := getattr(options, name, None))}


def _settings(protocol: Protocol, data: "EvaluationData", options: argparse.Namespace) -> dict[str, Any]:
    """What decides the results of a run."""
    from .runs import data_state

    extra = _task_options(protocol, options)
    return {
        "model": f"{options.model}/{options.subfolder}" if options.subfolder else options.model,
        "state": checkpoint_state(options.model, options.subfolder),
        "protocol": protocol.name,
        "data": data.place,
        "data_state": data_state(protocol, data),
        "modes": list(protocol.modes),
        "limit": options.limit,
        "dtype": options.dtype,
        "image_size": _image_size(options),
        "published_image_size": protocol.image_size,
        "images": len(data.items),
        "published_images": protocol.data.get("count"),
        "batch_size": options.batch_size,
        **{name: value for name, value in extra.items() if name not in PLACES},
    }


def _known(
    protocol: Protocol, data: "EvaluationData", options: argparse.Namespace, output: Path, settings: dict[str, Any]
) -> "Report | None":
    """The report of an earlier run of the same settings.

    Raises:
        OSError: If a report cannot be written.
        ValueError: If a report or samples of other settings are there, or the model has other classes than the data.
    """
    from .reports import read_report, samples_file
    from .samples import SampleLog, differing_settings

    check_writable(output)
    if output.exists():
        known = read_report(output)
        if not (differing := differing_settings(known["settings"], settings)):
            return known
        raise ValueError(
            f"{output} is the report of other settings ({differing}): delete it, or name another by --output."
        )
    SampleLog(samples_file(output), settings)  # refuses those of other settings
    if protocol.task == "segmentation":
        from .segmentation import check_classes, check_segmenter

        check_classes(check_segmenter(options.model, options.subfolder), data)
    return None


__all__ = [
    "KINDS",
    "TASKS",
    "add_data_arguments",
    "measure_card",
    "measure_on_data",
    "named_device",
    "print_protocols",
]
