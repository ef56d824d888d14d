"""Plans a conversion: formats, changes, and every tensor compared with the model, before anything is written."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..configuration_internlm2 import InternLM2Config
from .formats.content import Content
from .formats.edits import Draft, Edit, drop_blocks_above, resize_tower
from .formats.format import Format
from .formats.image_token import adding_image_token
from .formats.key_tables import DERIVED_BUFFERS
from .formats.llama_decoder import decoder_as_llama, internlm2_as_llama, llama_as_internlm2
from .formats.llava_parts import complete_llava
from .formats.native_format import NativeFormat
from .formats.own_format import OwnFormat
from .formats.part_formats import PartFormat, part_content
from .formats.parts import PART_NAMES
from .formats.raw_files import join_raw_files
from .formats.raw_formats import RAW_FORMATS
from .formats.recognition import TARGETS, find_target, recognise
from .formats.rules import Translation, names_before, translate
from .readers.adapters import merge_adapters
from .readers.damages import describing
from .readers.hub import find_source
from .readers.links import check_links
from .readers.opening import open_source
from .readers.source import Source
from .readers.tensors import TensorReader, Tensors, in_order_of_files, is_equal, main_dtype
from .repository.card import write_card
from .repository.records import Record, new_record, read_records
from .repository.result import stored_state
from .repository.shards import cast
from .repository.tokenizer import has_tokenizer


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# More layers than this are compared with the number of tensors first.
LARGEST_DEPTH = 200


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """What is converted, and how.

    Args:
        tokenizer: Folder of a tokenizer to use instead of the source's.
        image_token_id: Id of `<IMG_CONTEXT>`, for a chat model without a tokenizer.
        dtype: Type of the result's floats: "auto" (the source's), "float32", "float16" or "bfloat16".
        head: File of a classification head for a raw backbone, where config.json does not name it and it is not the
            only one.
        num_heads: Attention heads of the tower of a raw checkpoint, whose weights do not say it.
        image_size: Size of images to resize the tower's positions to; None keeps them.
        patch_size: Size of patches to resize the tower's patch kernel to; None keeps it.
        drop_unused_blocks: Leave out the blocks of a chat model's tower above the one whose output the decoder sees.
        lora_alpha: Alpha of all LoRA adapters, instead of the configuration's.
        base: Checkpoint that the folder of a LoRA adapter belongs to.
        vision_tower: Checkpoint of the vision tower, for one of the LLaVA code base without it.
        vision_config: config.json of the vision tower, for one of the LLaVA code base.
        to: Format of the result: "internvl" (this package's), "published" or "native".
        llama_decoder: Write an InternLM2 decoder as a plain LLaMA, as the native format always does.
        revision: Branch, tag or commit of a repository on the Hub.
        extract: Part to write alone, one of `PART_NAMES`; None writes the whole model.

    Raises:
        ValueError: If `dtype`, `to` or `extract` has another value.
    """

    tokenizer: str | Path | None = None
    image_token_id: int | None = None
    dtype: str = "auto"
    head: str | Path | None = None
    num_heads: int | None = None
    image_size: int | None = None
    patch_size: int | None = None
    drop_unused_blocks: bool = False
    lora_alpha: float | None = None
    base: str | Path | None = None
    vision_tower: str | Path | None = None
    vision_config: str | Path | None = None
    to: str = next(iter(TARGETS))
    llama_decoder: bool = False
    revision: str | None = None
    extract: str | None = None

    def __post_init__(self) -> None:
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of auto, {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.to not in TARGETS:
            raise ValueError(f"`to` must be one of {', '.join(TARGETS)}, got {self.to!r}.")
        if self.extract is not None and self.extract not in PART_NAMES:
            raise ValueError(f"`extract` must be one of {', '.join(PART_NAMES)}, got {self.extract!r}.")
        if self.extract not in (None, "vision") and self.to != OwnFormat.to:
            raise ValueError(f"`to` has no effect: a {self.extract} alone has one format.")

    @property
    def inputs(self) -> list[Path]:
        """Files and folders that are read besides the source."""
        paths = (self.tokenizer, self.head, self.base, self.vision_tower, self.vision_config)
        return [Path(path) for path in paths if path is not None]


@dataclass(frozen=True, kw_only=True)
class Plan(Content):
    """What a conversion will do: the model, and the format in which it is written.

    Args:
        target_format: Format of the result.
        written: Tensors of the result under their names in that format.
        dropped: Name to reason, of tensors of the source that the result does not hold.
        notes: Further remarks for the user.
        added: Name to reason, of tensors that no source holds: they start from random values.
    """

    target_format: OwnFormat
    written: Tensors
    dropped: dict[str, str]
    notes: list[str]
    added: dict[str, str] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """Number of elements in all tensors of the result."""
        return sum(torch.Size(tensor.shape).numel() for tensor in self.written.values())

    @property
    def num_bytes(self) -> int:
        """Size of all tensors of the result."""
        return sum(tensor.num_bytes for tensor in (*self.written.values(), *self.beside.values()))

    def describe(self) -> list[str]:
        """Describes source and result, line by line."""
        lines = [
            *self.found(),
            f"Result: {self.config.model_type} in {self.target_format.title}, {self.num_parameters:,} parameters, "
            f"{name_size(self.num_bytes)}, {name_dtypes(tensor.dtype for tensor in self.written.values())}.",
        ]
        for reason in dict.fromkeys(self.dropped.values()):
            names = ", ".join(name for name, why in self.dropped.items() if why == reason)
            lines.append(f"Left out: {names} ({reason}).")
        for reason in dict.fromkeys(self.added.values()):
            names = ", ".join(grouped(name for name, why in self.added.items() if why == reason))
            lines.append(f"New, from random values: {names} ({reason}).")
        return lines + self.notes

    def found(self) -> list[str]:
        """Describes what is read."""
        source = self.source
        files = f"{len(source.files)} file{'s' if len(source.files) > 1 else ''}"
        return [
            f"Found {self.source_format.name}: {len(source.tensors)} tensors, {name_size(source.num_bytes)}, "
            f"{name_dtypes(info.dtype for info in source.tensors.values())}, in {files}."
        ]

    def write_card(self, folder: Path) -> None:
        """Writes README.md of the result."""
        facts = {
            "Converted from": self.source_format.name,
            "Parameters": f"{self.num_parameters:,}",
            "Type": name_dtypes(tensor.dtype for tensor in self.written.values()),
            "Model type": f"`{self.config.model_type}`",
        }
        write_card(folder, self.source_format.name, self.result, self.source.folder, facts, self.target_format.to)


def plan_conversion(source: str | Path, options: ConversionOptions | None = None) -> Plan:
    """Compares every tensor of a source with the model that is to hold it. Reads no weights and writes nothing.

    Args:
        source: Folder of the checkpoint, its file with weights, or a repository on the Hub (`user/name`), which is
            downloaded.
        options: What is converted, and how.

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError: The format is unknown, tensors do not fit, or a setting cannot take effect.
    """
    options = options or ConversionOptions()
    path = find_source(source, options.revision)
    with describing(path):
        opened = _open(path, options)
        source_format = recognise(opened)
        _check_effect(source_format, options)
        tokenizer_folder = _tokenizer_folder(opened, source_format, options)
        records = read_records(opened)
        edits = _edits(opened, source_format, options, tokenizer_folder, records)
        draft, translation = _draft(opened, source_format, edits)
        tensors, same = _compared(opened, source_format, draft, translation, options.dtype)
        settings = _complete_settings(opened, source_format, draft, tensors, options)
        content = Content(
            source=opened,
            source_format=source_format,
            settings=settings,
            config=source_format.build_config(settings),
            tensors=tensors,
            image_size=draft.image_size,
            tokenizer_folder=tokenizer_folder,
            records={**records, **_own_record(opened, source_format, same)},
        )
        if options.extract is not None:
            content = part_content(content, options.extract)
            if isinstance(content.source_format, PartFormat):
                return _in_format(content, content.source_format, draft)
        return _in_format(content, find_target(options.to, content.result), draft)


def _open(path: Path, options: ConversionOptions) -> Source:
    """The source with all of its parts."""
    opened = open_source(path)
    if options.num_heads is not None:  # an argument of the published class
        opened = replace(opened, config={**opened.config, "num_heads": options.num_heads})
    opened = merge_adapters(join_raw_files(opened, options.head), options.lora_alpha, options.base)
    return complete_llava(opened, options.vision_tower, options.vision_config)


def _check_effect(source_format: Format, options: ConversionOptions) -> None:
    """Refuses options that cannot change the result."""
    name, kind = source_format.name, source_format.result.kind
    if options.num_heads is not None and source_format not in RAW_FORMATS:
        raise ValueError(f"`num_heads` has no effect: the configuration of {name} says how many there are.")
    if kind == "vision" and options.tokenizer is not None:
        raise ValueError(f"`tokenizer` has no effect: {name} reads no text.")
    if kind != "chat" and options.image_token_id is not None:
        raise ValueError(f"`image_token_id` has no effect: in {name} no image stands in a text.")


def _tokenizer_folder(source: Source, source_format: Format, options: ConversionOptions) -> Path | None:
    folder = source.folder if options.tokenizer is None else Path(options.tokenizer)
    check_links(folder, depth=0)
    has_text = source_format.result.kind != "vision" and (options.tokenizer is not None or has_tokenizer(folder))
    return folder if has_text else None


def _edits(
    source: Source,
    source_format: Format,
    options: ConversionOptions,
    tokenizer_folder: Path | None,
    records: dict[str, Record],
) -> list[Edit]:
    """Changes that the options ask for or the target format needs, in their order."""
    asked = {"image_size": options.image_size, "patch_size": options.patch_size}
    sizes = source_format.wanted_sizes(source) | {key: size for key, size in asked.items() if size is not None}
    edits: list[Edit] = [resize_tower(**sizes)] if sizes else []
    if options.drop_unused_blocks:
        edits.append(drop_blocks_above)
    if source_format.lacks_image_token:
        edits.append(adding_image_token(tokenizer_folder, options.image_token_id, source_format.build_config))
    return [*edits, *_decoder_edits(options, records)]


def _decoder_edits(options: ConversionOptions, records: dict[str, Record]) -> list[Edit]:
    """An InternLM2 decoder becomes a LLaMA on request and in the native format, and on the way back what it was."""
    if options.llama_decoder:
        return [decoder_as_llama]
    if options.to == NativeFormat.to:
        return [internlm2_as_llama]
    config = records[options.to].config if options.to in records else {}
    decoder = config.get("llm_config") or config.get("text_config") or {}
    was_internlm2 = isinstance(decoder, dict) and decoder.get("model_type") == InternLM2Config.model_type
    return [llama_as_internlm2] if was_internlm2 else []


def _draft(source: Source, source_format: Format, edits: Sequence[Edit]) -> tuple[Draft, Translation]:
    """The model under today's names, with every change that was asked for."""
    settings = source_format.map_config(source)
    check_counts(source, settings)
    derived = {name: "a buffer that is computed" for name in source.tensors if _is_derived(name)}
    weights = {name: tensor for name, tensor in source.tensors.items() if name not in derived}
    translation = translate(weights, source_format.rules, settings)
    draft = Draft(settings, dict(translation.tensors), {**source.left_out, **derived}, list(source.notes))
    for edit in edits:
        edit(draft)
    return draft, translation


def check_counts(source: Source, settings: dict[str, Any]) -> None:
    """Refuses counts that are no numbers, and more layers than the source has tensors, before a model is built.

    Raises:
        ValueError: A flag in place of a count, or too many layers.
    """
    parts = {"": settings, **{f"{key}.": part for key, part in settings.items() if isinstance(part, dict)}}
    file = source.folder / "config.json"
    for prefix, part in parts.items():
        flags = [key for key, value in part.items() if key.startswith("num_") and isinstance(value, bool)]
        if flags:
            raise ValueError(f"`{file}` must say a number for `{prefix}{flags[0]}`, got {part[flags[0]]}.")
        depth = part.get("num_hidden_layers", 0)
        if isinstance(depth, int) and depth > max(LARGEST_DEPTH, len(source.tensors)):
            raise ValueError(
                f"`{file}` says `{prefix}num_hidden_layers` {depth:,}, but the weights are {len(source.tensors)} "
                "tensors. Put the config.json in its place that was published with them."
            )


def _complete_settings(
    source: Source, source_format: Format, draft: Draft, tensors: Tensors, options: ConversionOptions
) -> dict[str, Any]:
    """This package's config.json, with what follows from the class, the tensors and the options."""
    # Parts that were frozen in training may outnumber what was trained, and must not decide the type.
    trained = source.dtype if options.dtype == "auto" else None
    return {
        **draft.settings,
        "architectures": [source_format.result.model_class.__name__],
        "auto_map": source_format.result.auto_map,
        "dtype": name_dtypes([trained]) if trained else main_dtype(tensors),
        **({} if options.image_token_id is None else {"image_token_id": options.image_token_id}),
    }


def _own_record(source: Source, source_format: Format, twice: dict[str, str]) -> dict[str, Record]:
    """The record of the source itself, if its format can be written."""
    name = source_format.to
    return {} if not name else {name: new_record(source, main_dtype(source.tensors), twice)}


def _in_format(content: Content, target: OwnFormat, draft: Draft) -> Plan:
    obstacles = target.obstacles(content)
    if obstacles:
        raise ValueError(f"This model cannot be written as {target.title}: {'; '.join(obstacles)}.")
    return Plan(
        **vars(content),
        target_format=target,
        written=in_order_of_files(target.named_tensors(content), content.source.files),
        dropped=draft.dropped,
        notes=[*draft.notes, *target.notes(content)],
    )


# ---------------------------------------------------------------------------------------------------- what is compared
def _compared(
    source: Source, source_format: Format, draft: Draft, translation: Translation, dtype: str
) -> tuple[Tensors, dict[str, str]]:
    """The tensors of the result, each of which fits, and names held twice: the one left out to the one kept."""
    shapes, same = expected_shapes(source_format, draft.settings, draft.tensors)
    draft.dropped |= {name: f"the same as {other}" for name, other in same.items()}
    _check_keys(source_format, source, draft, translation, shapes)
    found = draft.tensors
    return {name: cast(name, found[name], target_dtype(found[name].dtype, dtype)) for name in shapes}, same


def expected_shapes(
    source_format: Format, settings: dict[str, Any], tensors: Tensors
) -> tuple[dict[str, torch.Size], dict[str, str]]:
    """Name to shape of what files of a model hold, and names held twice: the one left out to the one kept.

    Whether heads are tied is decided by the tensors, and written into `settings`.
    """
    model = model_on_meta(source_format, settings)
    tied, same = _resolve_tied_heads(model, tensors, settings)
    if not tied and model.all_tied_weights_keys:
        model = model_on_meta(source_format, settings)
    return {name: tensor.shape for name, tensor in stored_state(model).items() if name not in tied}, same


def model_on_meta(source_format: Format, settings: dict[str, Any]) -> PreTrainedModel:
    """A format's model on the meta device, for names and shapes."""
    with torch.device("meta"):
        return source_format.result.model_class(source_format.build_config(settings))


def _resolve_tied_heads(
    model: PreTrainedModel, tensors: Tensors, settings: dict[str, Any]
) -> tuple[set[str], dict[str, str]]:
    """Decides by the stored weights whether heads are tied to embeddings, and writes it into `settings`.

    Returns:
        Names that the result does not hold because they are tied, and those of them that the source holds twice with
        the other name.
    """
    tied = dict(model.all_tied_weights_keys)
    both = [name for name in tied if name in tensors and tied[name] in tensors]
    reader = TensorReader()
    if not all(is_equal(reader, tensors[name], tensors[tied[name]]) for name in both):
        # The published loader would lose them.
        settings["tie_word_embeddings"] = False
        for part in ("text_config", "qllama_config"):
            if part in settings:
                settings[part]["tie_word_embeddings"] = False
        return set(), {}
    return set(tied), {name: tied[name] for name in both}


def _is_derived(name: str) -> bool:
    return any(f".{name}".endswith(f".{buffer}") for buffer in DERIVED_BUFFERS)


def _check_keys(
    source_format: Format, source: Source, draft: Draft, translation: Translation, shapes: dict[str, torch.Size]
) -> None:
    """Raises with everything that does not fit, all at once."""
    tensors = draft.tensors
    wrong = [
        f"{' + '.join(translation.origins.get(name, (name,)))} {tuple(shape)} got {tensors[name].shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(shape) != tensors[name].shape
    ]
    # Under their names in the source, where it would have them.
    absent = [
        old for name in shapes if name not in tensors for old in names_before(name, source_format.rules) or (name,)
    ]
    missing = [name for name in absent if name not in source.tensors]
    unused = [name for name in tensors if name not in shapes and name not in draft.dropped]
    unknown = translation.unknown + [old for name in unused for old in translation.origins.get(name, (name,))]
    problems = {
        "missing": list(dict.fromkeys(translation.incomplete + missing)),
        "unknown": unknown,
        "in more than one file": source.doubled,
        "given by more than one tensor": translation.doubled,
        "of another shape than config.json says (expected, got)": wrong,
    }
    found = [f"{len(names)} {problem}: {', '.join(names)}" for problem, names in problems.items() if names]
    if found:
        raise ValueError(f"The tensors of `{source.folder}` do not fit {source_format.name}. {'; '.join(found)}.")


def target_dtype(found: torch.dtype, wanted: str) -> torch.dtype:
    """Type of a tensor in the result, given the user's wish, which may be "auto"."""
    return DTYPES[wanted] if wanted != "auto" and found.is_floating_point else found


# ------------------------------------------------------------------------------------------------------------ messages
def grouped(names: Iterable[str]) -> list[str]:
    """Names of tensors, those that differ by the numbers of their layers as one."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\..*\.)", ".*", name) for name in names))


def name_dtypes(dtypes: Iterable[torch.dtype]) -> str:
    """Types as people write them, the most frequent first."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype, _ in Counter(dtypes).most_common())


def name_size(num_bytes: int) -> str:
    """A number of bytes as people write it."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes / 1000:.1f} kB"
