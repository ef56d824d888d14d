"""One conversion: recognise, compare every key, write beside the place of the result, rename when complete."""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .key_tables import DERIVED_BUFFERS
from .layouts import Layout, recognise
from .model_card import write_card
from .repository import copy_code, image_processor_for, write_generation_config, write_json, write_processor
from .shards import write_shards
from .source import Source, TensorReader, open_source
from .tokenizer_files import check_tokenizer, copy_tokenizer, has_tokenizer, image_token_id_of


logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MANIFEST_FILE = "conversion.json"


@dataclass(frozen=True)
class Plan:
    """What a conversion will do.

    Args:
        source: The opened source.
        layout: Its layout.
        settings: config.json of the result, but for the image token.
        config: The same as an object.
        expected: Name to meta tensor: shape and type of every tensor of the result.
        dropped: Name to reason, of tensors of the source that the result does not hold.
        tokenizer_folder: Where the tokenizer is, or None.
    """

    source: Source
    layout: Layout
    settings: dict[str, Any]
    config: Any
    expected: dict[str, torch.Tensor]
    dropped: dict[str, str]
    tokenizer_folder: Path | None

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors of the result."""
        return sum(tensor.numel() for tensor in self.expected.values())

    @property
    def num_bytes(self) -> int:
        """Size of all tensors of the result."""
        return sum(tensor.numel() * tensor.dtype.itemsize for tensor in self.expected.values())

    def describe(self) -> list[str]:
        """What was found and what will come of it, line by line."""
        source = self.source
        files = f"{len(source.files)} file{'s' if len(source.files) > 1 else ''}"
        lines = [
            f"Found {self.layout.name}: {len(source.tensors)} tensors, {_size(source.num_bytes)}, "
            f"{_dtypes(info.dtype for info in source.tensors.values())}, in {files}.",
            f"Result: {self.config.model_type}, {self.num_parameters:,} parameters, {_size(self.num_bytes)}, "
            f"{_dtypes(tensor.dtype for tensor in self.expected.values())}.",
        ]
        lines += [f"Left out: {name} ({reason})." for name, reason in self.dropped.items()]
        return lines


def plan_conversion(
    source: str | Path, tokenizer: str | Path | None = None, image_token_id: int | None = None, dtype: str = "auto"
) -> Plan:
    """Looks at a source and compares every tensor with the model that is to hold it. Reads no weights and writes nothing.

    Args:
        source: Folder of the checkpoint, or its file with weights.
        tokenizer: Folder of a tokenizer to use instead of the source's own.
        image_token_id: Id of `<IMG_CONTEXT>`, for a chat model without a tokenizer.
        dtype: Type of the result's floats: "auto" (the source's), "float32", "float16" or "bfloat16".

    Returns:
        The plan.

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError: The layout is unknown, tensors do not fit, or a setting cannot take effect.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of auto, {', '.join(DTYPES)}, got {dtype!r}.")
    opened = open_source(source)
    layout = recognise(opened)
    if layout.kind == "vision" and tokenizer is not None:
        raise ValueError(f"`tokenizer` has no effect: {layout.name} reads no text.")
    if layout.kind != "chat" and image_token_id is not None:
        raise ValueError(f"`image_token_id` has no effect: in {layout.name} no picture stands in a text.")
    settings = layout.map_config(opened.config)
    model = _meta_model(layout, settings)
    tied, dropped = _resolve_tied_heads(model, opened, settings)
    if not tied and model.all_tied_weights_keys:
        model = _meta_model(layout, settings)
    dropped |= {name: "a buffer that is computed" for name in opened.tensors if _is_derived(name)}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
    _check_keys(layout, opened, shapes, dropped)
    expected = {
        name: torch.empty(shapes[name], dtype=_target_dtype(opened.tensors[name].dtype, dtype), device="meta")
        for name in opened.in_order_of_files(shapes)
    }
    settings["architectures"] = [layout.model_class.__name__]
    settings["auto_map"] = layout.auto_map
    settings["dtype"] = _main_dtype(expected)
    folder = Path(tokenizer) if tokenizer is not None else opened.folder
    has_text = layout.kind != "vision" and (tokenizer is not None or has_tokenizer(folder))
    if image_token_id is not None:
        settings["image_token_id"] = image_token_id
    config = _build_config(layout, settings)
    return Plan(opened, layout, settings, config, expected, dropped, folder if has_text else None)


def convert(
    source: str | Path,
    out: str | Path,
    tokenizer: str | Path | None = None,
    image_token_id: int | None = None,
    dtype: str = "auto",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    show_progress: bool = True,
    report: Callable[[str], None] = logger.info,
) -> Path:
    """Converts a published checkpoint to a complete repository of this package.

    Args:
        source: Folder of the checkpoint, or its file with weights. Not changed, and none of its code is run.
        out: Folder of the result; must not exist, be empty, or be allowed to be replaced.
        tokenizer: Folder of a tokenizer to use instead of the source's own.
        image_token_id: Id of `<IMG_CONTEXT>`, for a chat model without a tokenizer.
        dtype: Type of the result's floats: "auto" (the source's), "float32", "float16" or "bfloat16".
        max_shard_size: Largest size of a file with weights.
        overwrite: Replace what `out` holds.
        show_progress: Whether to draw a progress bar.
        report: Takes messages to the user.

    Returns:
        `out`.

    Raises:
        OSError: A file is missing, cannot be read or written, or `out` is not free.
        ValueError: The layout is unknown, tensors do not fit, or a setting cannot take effect.
    """
    out = Path(out)
    _check_target(out, overwrite, [Path(path) for path in (source, tokenizer) if path is not None])
    plan = plan_conversion(source, tokenizer, image_token_id, dtype)
    for line in plan.describe():
        report(line)
    with _complete_or_nothing(out) as folder:
        _check_space(folder, plan.num_bytes)
        _write_all_but_weights(folder, plan, report)
        with plan.source.reader() as reader:
            hashes = write_shards(folder, plan.expected, reader, max_shard_size, show_progress)
        write_json(folder / MANIFEST_FILE, _manifest(plan, hashes))
    report(f"Wrote {out}.")
    return out


def _write_all_but_weights(folder: Path, plan: Plan, report: Callable[[str], None]) -> None:
    layout, source = plan.layout, plan.source
    tokenizer = None
    if plan.tokenizer_folder is not None:
        tokenizer = copy_tokenizer(plan.tokenizer_folder, folder, plan.config, layout.kind == "contrastive")
        check_tokenizer(tokenizer, plan.config.text_config.vocab_size, layout.kind == "chat")
    elif layout.kind != "vision":
        report("No tokenizer was found, so the result has none and no processor; `--tokenizer DIR` names one.")
    settings, config = plan.settings, plan.config
    if layout.kind == "chat":
        settings = {**settings, "image_token_id": _image_token_id(config, tokenizer, report)}
        config = _build_config(layout, settings)
    write_json(folder / "config.json", settings)
    image_processor = image_processor_for(layout, config, source)
    auto_maps = write_processor(folder, layout, config, image_processor, tokenizer)
    write_generation_config(folder, layout, config, source, tokenizer)
    copy_code(folder, [layout.auto_map, *auto_maps])
    write_card(folder, layout, source.folder, _facts(plan))


def _image_token_id(
    config: Any, tokenizer: PreTrainedTokenizerBase | None, report: Callable[[str], None]
) -> int | None:
    given, vocabulary_size = config.image_token_id, config.text_config.vocab_size
    if tokenizer is not None:
        found = image_token_id_of(tokenizer)
        if given not in (None, found):
            raise ValueError(
                f"`image_token_id` is {given}, the tokenizer has {found} for `<IMG_CONTEXT>`. Leave it out."
            )
        return found
    if given is None:
        report(
            "The id of `<IMG_CONTEXT>` is not known: pictures cannot be placed until `--image-token-id N` names it."
        )
    elif not 0 <= given < vocabulary_size:
        raise ValueError(f"`image_token_id` must lie in the vocabulary of {vocabulary_size} tokens, got {given}.")
    return given


# ------------------------------------------------------------------------------------------------------ what is compared
def _build_config(layout: Layout, settings: dict[str, Any]) -> Any:
    # Deep copies, because configurations take nested dictionaries apart.
    arguments = {key: value for key, value in settings.items() if key != "model_type"}
    try:
        return layout.config_class.from_dict(arguments)
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(f"config.json does not describe {layout.name}: {error}") from error


def _meta_model(layout: Layout, settings: dict[str, Any]) -> PreTrainedModel:
    """The model without memory, to know names and shapes."""
    with torch.device("meta"):
        return layout.model_class(_build_config(layout, settings))


def _resolve_tied_heads(
    model: PreTrainedModel, source: Source, settings: dict[str, Any]
) -> tuple[set[str], dict[str, str]]:
    """Decides by the stored weights whether heads are tied to embeddings, and writes it into `settings`.

    Returns:
        Names that the result does not hold because they are tied, and those of them that the source holds twice.
    """
    tied = dict(model.all_tied_weights_keys)
    stored = [name for name in tied if name in source.tensors and tied[name] in source.tensors]
    with source.reader() as reader:
        different = [name for name in stored if not _is_equal(reader, name, tied[name])]
    if different:
        # The published loader would lose them.
        settings["tie_word_embeddings"] = False
        for part in ("text_config", "qllama_config"):
            if part in settings:
                settings[part]["tie_word_embeddings"] = False
        return set(), {}
    return set(tied), {name: f"the same as {tied[name]}" for name in stored}


def _is_equal(reader: TensorReader, left: str, right: str) -> bool:
    first = reader[left]
    return torch.equal(first, reader[right])


def _is_derived(name: str) -> bool:
    return any(f".{name}".endswith(f".{buffer}") for buffer in DERIVED_BUFFERS)


def _check_keys(layout: Layout, source: Source, shapes: dict[str, torch.Size], dropped: dict[str, str]) -> None:
    """Raises with everything that does not fit, all at once."""
    tensors = source.tensors
    wrong = [
        f"{name} {tuple(shape)} got {tensors[name].shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(shape) != tensors[name].shape
    ]
    problems = {
        "missing": [name for name in shapes if name not in tensors],
        "unknown": [name for name in tensors if name not in shapes and name not in dropped],
        "in more than one file": source.doubled,
        "of another shape than config.json says (expected, got)": wrong,
    }
    found = [f"{len(names)} {problem}: {', '.join(names)}" for problem, names in problems.items() if names]
    if found:
        raise ValueError(f"The tensors of `{source.folder}` do not fit {layout.name}. {'; '.join(found)}.")


def _target_dtype(found: torch.dtype, wanted: str) -> torch.dtype:
    return DTYPES[wanted] if wanted != "auto" and found.is_floating_point else found


def _main_dtype(expected: dict[str, torch.Tensor]) -> str:
    sizes: Counter = Counter()
    for tensor in expected.values():
        if tensor.dtype.is_floating_point:
            sizes[tensor.dtype] += tensor.numel()
    return str(sizes.most_common(1)[0][0]).removeprefix("torch.")


# --------------------------------------------------------------------------------------------------- where it is written
def _check_target(out: Path, overwrite: bool, inputs: list[Path]) -> None:
    place = out.resolve()
    for path in inputs:
        if path.resolve() == place or place in path.resolve().parents:
            raise ValueError(f"OUT (`{out}`) must be a folder of its own, and not hold the input `{path}`.")
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"OUT (`{out}`) must be a folder, but is a file. Give another name.")
    if any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"OUT (`{out}`) is not empty. Give another folder, or replace it with `--overwrite`.")


@contextmanager
def _complete_or_nothing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when all went well, and else vanishes."""
    partial, replaced = (out.parent / f".{out.name}.{state}" for state in ("incomplete", "replaced"))
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    if replaced.exists() and not out.exists():
        replaced.rename(out)  # that run was killed between the two renames below
    shutil.rmtree(replaced, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            out.rename(replaced)
        partial.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"The result needs {_size(num_bytes)}, but the disk of `{folder.parent}` has {_size(free)} left."
        )


# ------------------------------------------------------------------------------------------------------------- messages
def _manifest(plan: Plan, hashes: dict[str, str]) -> dict[str, Any]:
    return {"layout": plan.layout.name, "left_out": plan.dropped, "sha256": hashes}


def _facts(plan: Plan) -> dict[str, str]:
    return {
        "Converted from": plan.layout.name,
        "Parameters": f"{plan.num_parameters:,}",
        "Type": _dtypes(tensor.dtype for tensor in plan.expected.values()),
        "Model type": f"`{plan.config.model_type}`",
    }


def _dtypes(dtypes: Any) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype, _ in Counter(dtypes).most_common())


def _size(num_bytes: int) -> str:
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes / 1000:.1f} kB"
