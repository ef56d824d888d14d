"""Commands that measure on anyone's data: one protocol, or all whose data lie below a root."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..kinds import check_kind, kind_of
from .protocols.protocol import TASKS, Protocol, find_protocol


if TYPE_CHECKING:  # `--help` and wrong arguments need no torch
    from .data.items import EvaluationData
    from .reports import Report


OWN_LAYOUTS = {
    "zero_shot": "class_folders",
    "retrieval": "captions",
    "caption": "captions",
    "probe": "probe_folders",
    "segmentation": "segmentation",
}
KINDS = {
    "zero_shot": ("InternVL-C", "InternVL-G"),
    "retrieval": ("InternVL-C", "InternVL-G"),
    "caption": ("InternVL-G",),
    "probe": ("vision", "InternVL-C", "InternVL-G", "chat"),
    "segmentation": ("vision",),
}
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_data_arguments(parser: argparse.ArgumentParser, is_card: bool = False) -> None:
    """The options of a measurement on data."""
    where = "folder with data sets" if is_card else "folder, file of annotations, or shards (`hf://...` too)"
    parser.add_argument("--data", required=is_card, metavar="ROOT", help=where)
    if not is_card:
        parser.add_argument("--protocol", metavar="NAME", help="a shipped protocol, or the path of one as JSON")
        parser.add_argument("--mode", choices=("InternVL-C", "InternVL-G"), help="instead of the protocol's")
    parser.add_argument("--limit", type=_positive, metavar="N", help="images, spread evenly over all")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as they are saved)")
    parser.add_argument("--image-size", type=_positive, metavar="PIXELS", help="(default: the model's own)")
    parser.add_argument("--device", metavar="NAME", help="(default: a GPU if there is one)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def measure_on_data(options: argparse.Namespace) -> int:
    """Measures one protocol; prints and writes its report."""
    from .card import card
    from .data.opening import open_data
    from .reports import samples_file

    protocol = _chosen(options)
    if options.mode:
        protocol = replace(protocol, modes=(options.mode,))
    data = open_data(protocol, options.data, options.limit)
    where = _checked(options, (protocol,))
    output = options.output or Path(f"{Path(options.model).name or 'model'}-{protocol.name}.json")
    report = _measured(protocol, data, lambda: _load(options, where), options, output)
    print(card([report]))  # noqa: T201
    print(f"The report is {output}, its samples {samples_file(output)}.", file=sys.stderr)  # noqa: T201
    return 0


def measure_card(options: argparse.Namespace) -> int:
    """Measures every protocol whose data lie below a root; what was measured before is read."""
    from tqdm import tqdm

    from .card import card
    from .data.opening import open_data, protocols_below

    protocols = protocols_below(options.data)
    if not protocols:
        raise ValueError(
            f"No data of a protocol lie below {options.data}: `python -m internvl.evaluation protocols` lists where "
            "each is looked for."
        )
    kind = _kind(options)
    fitting = [one for one in protocols if kind in KINDS[one.task] and _has_mode(one, kind)]
    if not fitting:
        raise ValueError(f"{options.model} is {kind}: no protocol below {options.data} measures such a model.")
    opened = [(one, open_data(one, options.data, options.limit)) for one in fitting]
    where = _checked(options, fitting)
    folder = options.output or Path(f"{Path(options.model).name or 'model'}-card")
    loaded: list[Any] = []

    def load() -> Any:
        if not loaded:
            loaded.append(_load(options, where))
        return loaded[0]

    reports = []
    for protocol, data in tqdm(opened, desc="protocols", disable=None):
        reports.append(_measured(protocol, data, load, options, folder / f"{protocol.name}.json"))
    for path in options.harness_results or ():
        from .harness_results import read_harness_results

        reports += read_harness_results(path)
    print(card(reports))  # noqa: T201
    return 0


def print_protocols() -> int:
    """Prints every protocol with where its data are looked for."""
    from .card import table
    from .protocols.protocol import shipped_protocols

    rows = [("task", "protocol", "title", "looked for below the root")]
    for one in shipped_protocols().values():
        rows.append((one.task, one.name, one.title, ", ".join(one.data.get("folders", []))))
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
    own = Protocol("own-data", options.task, {"layout": OWN_LAYOUTS[options.task]}, title=Path(options.data).name)
    return found[0] if found else own


def _kind(options: argparse.Namespace) -> str | None:
    everything = tuple(dict.fromkeys(kind for kinds in KINDS.values() for kind in kinds))
    return kind_of(check_kind(options.model, *everything, door="this evaluation", subfolder=options.subfolder))


def _has_mode(protocol: Protocol, kind: str | None) -> bool:
    return not protocol.modes or "InternVL-C" in protocol.modes or kind == "InternVL-G"


def _checked(options: argparse.Namespace, protocols: Any) -> dict[str, str]:
    """Where the model lies, once it is known to be one that the protocols take."""
    kinds = [kind for kind in KINDS[protocols[0].task] if all(kind in KINDS[one.task] for one in protocols)]
    if len(protocols) == 1:
        check_kind(options.model, *kinds, door=f"the task {protocols[0].task}", subfolder=options.subfolder)
    return {"pretrained_model_name_or_path": options.model, "subfolder": options.subfolder}


def _load(options: argparse.Namespace, where: dict[str, str]) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModel, AutoProcessor

    processor = AutoProcessor.from_pretrained(**where)
    if options.image_size:
        processor.image_processor.size = {"height": options.image_size, "width": options.image_size}
    model = AutoModel.from_pretrained(**where, dtype=options.dtype).eval()
    return model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu")), processor


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
) -> "Report":
    from .feature_files import remove_features
    from .reports import read_report, samples_file, write_report
    from .runs import TaskRun, measure, report_of
    from .samples import SampleLog

    extra = {name: value for name in ("rerank", "dual_softmax") if (value := getattr(options, name, None))}
    settings = {
        "model": f"{options.model}/{options.subfolder}" if options.subfolder else options.model,
        "protocol": protocol.name,
        "data": data.place,
        "modes": list(protocol.modes),
        "limit": options.limit,
        "dtype": options.dtype,
        "image_size": _image_size(options),
        "published_image_size": protocol.image_size,
        "batch_size": options.batch_size,
        **extra,
    }
    if output.exists():
        known = read_report(output)
        if known["settings"] == settings:
            return known
        raise ValueError(f"{output} is the report of other settings: delete it, or name another by --output.")
    with SampleLog(samples_file(output), settings) as log:
        if log.is_new:
            remove_features(log.path)
        model, processor = load()
        run = TaskRun(protocol, data, model, processor, log, options.batch_size, {**protocol.options, **extra})
        report = report_of(run, measure(run))
    write_report(output, report)
    remove_features(samples_file(output))
    return report


__all__ = ["KINDS", "TASKS", "add_data_arguments", "measure_card", "measure_on_data", "print_protocols"]
