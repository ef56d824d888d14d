"""What a conversion will do, before it does anything: the layout, the changes, and every tensor compared with the model to be."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..configuration_internlm2 import InternLM2Config
from .formats.content import Content
from .formats.edits import Draft, Edit, drop_blocks_above, resize_tower
from .formats.format import Layout
from .formats.forms import FORMS, NativeForm, OwnForm, form_of
from .formats.image_token import adding_image_token
from .formats.key_tables import DERIVED_BUFFERS
from .formats.llama_decoder import decoder_as_llama, internlm2_as_llama, llama_as_internlm2
from .formats.llava_parts import complete_llava
from .formats.raw_files import join_raw_files
from .formats.raw_formats import RAW_LAYOUTS
from .formats.recognition import recognise
from .formats.rules import Translation, names_before, translate
from .readers.adapters import merge_adapters
from .readers.damages import describing
from .readers.hub import find_source
from .readers.links import check_links
from .readers.opening import open_file, open_source
from .readers.source import Source
from .readers.tensors import LazyTensor, TensorReader, Tensors, in_order_of_files
from .repository.records import Record, new_record, read_records
from .repository.result import stored_state
from .repository.shards import cast
from .repository.tokenizer import has_tokenizer


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Options of `plan_conversion` that name files or folders which are read.
INPUT_OPTIONS = ("tokenizer", "head", "base", "vision_tower", "vision_config")
# Above it, a number of layers is compared with the number of tensors first.
LARGEST_DEPTH = 200


@dataclass(frozen=True, kw_only=True)
class Plan(Content):
    """What a conversion will do: the model, and the form in which it is written.

    Args:
        form: The form.
        written: Tensors of the result, under their names in that form.
        dropped: Name to reason, of tensors of the source that the result does not hold.
        notes: What else the user is told.
    """

    form: OwnForm
    written: Tensors
    dropped: dict[str, str]
    notes: list[str]

    @property
    def found(self) -> str:
        """What the source is."""
        name = self.layout.name
        return f"{name.partition(',')[0]}, {OwnForm.title}" if self.is_own else name

    @property
    def is_own(self) -> bool:
        """Whether the source is a result of this command, in this package's form."""
        return form_of(self.layout, self.source.config) == OwnForm.name

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors of the result."""
        return sum(torch.Size(tensor.shape).numel() for tensor in self.written.values())

    @property
    def num_bytes(self) -> int:
        """Size of all tensors of the result."""
        return sum(tensor.num_bytes for tensor in self.written.values())

    def describe(self) -> list[str]:
        """What was found and what will come of it, line by line."""
        source = self.source
        files = f"{len(source.files)} file{'s' if len(source.files) > 1 else ''}"
        lines = [
            f"Found {self.found}: {len(source.tensors)} tensors, {name_size(source.num_bytes)}, "
            f"{name_dtypes(info.dtype for info in source.tensors.values())}, in {files}.",
            f"Result: {self.config.model_type} in {self.form.title}, {self.num_parameters:,} parameters, {name_size(self.num_bytes)}, "
            f"{name_dtypes(tensor.dtype for tensor in self.written.values())}.",
        ]
        for reason in dict.fromkeys(self.dropped.values()):
            names = ", ".join(name for name, why in self.dropped.items() if why == reason)
            lines.append(f"Left out: {names} ({reason}).")
        return lines + self.notes


def plan_conversion(
    source: str | Path,
    tokenizer: str | Path | None = None,
    image_token_id: int | None = None,
    dtype: str = "auto",
    head: str | Path | None = None,
    num_heads: int | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
    drop_unused_blocks: bool = False,
    lora_alpha: float | None = None,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    vision_config: str | Path | None = None,
    to: str = OwnForm.name,
    llama_decoder: bool = False,
    edits: Sequence[Edit] = (),
    revision: str | None = None,
) -> Plan:
    """Looks at a source and compares every tensor with the model that is to hold it. Reads no weights and writes nothing.

    Args:
        source: Folder of the checkpoint, its file with weights, or a repository on the Hub (`user/name`), which is downloaded.
        tokenizer: Folder of a tokenizer to use instead of the source's own.
        image_token_id: Id of `<IMG_CONTEXT>`, for a chat model without a tokenizer.
        dtype: Type of the result's floats: "auto" (the source's), "float32", "float16" or "bfloat16".
        head: File of a classification head for a raw backbone, where it is not the one that config.json names or the only one.
        num_heads: Heads of the tower of a raw checkpoint, whose weights do not tell.
        image_size: Pictures to resize the tower's positions to; None keeps them.
        patch_size: Patches to resize the tower's patch kernel to; None keeps it.
        drop_unused_blocks: Leave out the blocks of a chat model's tower above the one whose output the decoder sees.
        lora_alpha: Alpha of all LoRA adapters, instead of what the configuration says.
        base: Checkpoint that a folder with a LoRA adapter belongs to.
        vision_tower: Checkpoint of the vision tower, for one of the LLaVA code base without it.
        vision_config: config.json of the vision tower, for one of the LLaVA code base.
        to: Form of the result: "internvl" (this package's), "published" or "native".
        llama_decoder: Write an InternLM2 decoder as a plain LLaMA, which the native form needs anyway.
        edits: Further changes to the model, in their order.
        revision: Branch, tag or commit of a repository on the Hub.

    Returns:
        The plan.

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError: The layout is unknown, tensors do not fit, or a setting cannot take effect.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of auto, {', '.join(DTYPES)}, got {dtype!r}.")
    if to not in FORMS:
        raise ValueError(f"`to` must be one of {', '.join(FORMS)}, got {to!r}.")
    source = find_source(source, revision)
    with describing(source):
        opened = join_raw_files(_with_num_heads(open_source(source), num_heads), head)
        opened = complete_llava(merge_adapters(opened, lora_alpha, base), vision_tower, vision_config)
        layout = recognise(opened)
        _check_effect(layout, tokenizer=tokenizer, image_token_id=image_token_id, num_heads=num_heads)
        folder = Path(tokenizer) if tokenizer is not None else opened.folder
        check_links(folder, depth=0)
        has_text = layout.result.kind != "vision" and (tokenizer is not None or has_tokenizer(folder))
        tokenizer_folder = folder if has_text else None
        records = read_records(opened)
        sizes = {"image_size": image_size, "patch_size": patch_size}
        sizes = {**layout.wanted_sizes(opened), **{key: size for key, size in sizes.items() if size is not None}}
        asked = [resize_tower(**sizes)] if sizes else []
        asked += [drop_blocks_above] if drop_unused_blocks else []
        asked += (
            [adding_image_token(tokenizer_folder, image_token_id, layout.build_config)]
            if layout.lacks_image_token
            else []
        )
        draft, translation = _draft(opened, layout, [*asked, *_decoder_edits(to, llama_decoder, records), *edits])
        tensors, same = _compared(opened, layout, draft, translation, dtype)
        settings = draft.settings
        settings["architectures"] = [layout.result.model_class.__name__]
        settings["auto_map"] = layout.result.auto_map
        # Parts that were frozen in training may outnumber what was trained, and must not decide.
        settings["dtype"] = name_dtypes([opened.dtype]) if opened.dtype and dtype == "auto" else _main_dtype(tensors)
        settings |= {} if image_token_id is None else {"image_token_id": image_token_id}
        content = Content(
            source=opened,
            layout=layout,
            settings=settings,
            config=layout.build_config(settings),
            tensors=tensors,
            image_size=draft.image_size,
            tokenizer_folder=tokenizer_folder,
            records={**records, **_own_record(opened, layout, same)},
        )
        return _in_form(content, FORMS[to], draft)


def _check_effect(
    layout: Layout, tokenizer: str | Path | None, image_token_id: int | None, num_heads: int | None
) -> None:
    """Refuses options that cannot change this layout's result."""
    if num_heads is not None and layout not in RAW_LAYOUTS:
        raise ValueError(f"`num_heads` has no effect: the configuration of {layout.name} says how many there are.")
    if layout.result.kind == "vision" and tokenizer is not None:
        raise ValueError(f"`tokenizer` has no effect: {layout.name} reads no text.")
    if layout.result.kind != "chat" and image_token_id is not None:
        raise ValueError(f"`image_token_id` has no effect: in {layout.name} no picture stands in a text.")


def _compared(
    source: Source, layout: Layout, draft: Draft, translation: Translation, dtype: str
) -> tuple[Tensors, dict[str, str]]:
    """The tensors of the result, each known to fit, and names that the source held twice: the one left out to the one kept."""
    settings = draft.settings
    model = _meta_model(layout, settings)
    tied, same = _resolve_tied_heads(model, draft.tensors, settings)
    if not tied and model.all_tied_weights_keys:
        model = _meta_model(layout, settings)
    draft.dropped |= {name: f"the same as {other}" for name, other in same.items()}
    shapes = {name: tensor.shape for name, tensor in stored_state(model).items() if name not in tied}
    _check_keys(layout, source, draft, translation, shapes)
    found = draft.tensors
    return {name: cast(name, found[name], _target_dtype(found[name].dtype, dtype)) for name in shapes}, same


def _decoder_edits(to: str, llama_decoder: bool, records: dict[str, Record]) -> list[Edit]:
    """An InternLM2 decoder becomes a LLaMA on request and in the native form, and on the way back what it was."""
    if llama_decoder:
        return [decoder_as_llama]
    if to == NativeForm.name:
        return [internlm2_as_llama]
    config = records[to]["config"] if to in records else {}
    decoder = config.get("llm_config") or config.get("text_config") or {}
    was_internlm2 = isinstance(decoder, dict) and decoder.get("model_type") == InternLM2Config.model_type
    return [llama_as_internlm2] if was_internlm2 else []


def _own_record(source: Source, layout: Layout, twice: dict[str, str]) -> dict[str, Record]:
    """What is remembered of the source itself, if its form is one that can be written."""
    name = form_of(layout, source.config)
    return {} if name is None else {name: new_record(source, _main_dtype(source.tensors), twice)}


def _in_form(content: Content, form: OwnForm, draft: Draft) -> Plan:
    obstacles = form.obstacles(content)
    if obstacles:
        raise ValueError(f"This model cannot be written as {form.title}: {'; '.join(obstacles)}.")
    return Plan(
        **vars(content),
        form=form,
        written=in_order_of_files(form.named_tensors(content), content.source.files),
        dropped=draft.dropped,
        notes=[*draft.notes, *form.notes(content)],
    )


def _with_num_heads(source: Source, num_heads: int | None) -> Source:
    """The same with an argument of the published class in its configuration."""
    return source if num_heads is None else replace(source, config={**source.config, "num_heads": num_heads})


def _draft(source: Source, layout: Layout, edits: Sequence[Edit]) -> tuple[Draft, Translation]:
    """The model in today's names, with every change that was asked for."""
    settings = layout.map_config(source)
    _check_counts(source, settings)
    derived = {name: "a buffer that is computed" for name in source.tensors if _is_derived(name)}
    weights = {name: tensor for name, tensor in source.tensors.items() if name not in derived}
    translation = translate(weights, layout.rules, settings)
    draft = Draft(settings, dict(translation.tensors), {**source.left_out, **derived}, list(source.notes))
    for edit in edits:
        edit(draft)
    return draft, translation


def _check_counts(source: Source, settings: dict[str, Any]) -> None:
    """Refuses counts that are none, and more layers than a source of so many tensors has, before anything is built of them."""
    parts = {"": settings, **{f"{key}.": part for key, part in settings.items() if isinstance(part, dict)}}
    file = source.folder / "config.json"
    for prefix, part in parts.items():
        flags = [key for key, value in part.items() if key.startswith("num_") and isinstance(value, bool)]
        if flags:
            raise ValueError(f"`{file}` must say a number for `{prefix}{flags[0]}`, got {part[flags[0]]}.")
        depth = part.get("num_hidden_layers", 0)
        if isinstance(depth, int) and depth > max(LARGEST_DEPTH, len(source.tensors)):
            raise ValueError(
                f"`{file}` says `{prefix}num_hidden_layers` {depth:,}, but the weights are {len(source.tensors)} tensors. Put the "
                "config.json in its place that was published with them."
            )


# ------------------------------------------------------------------------------------------------------ what is compared
def _meta_model(layout: Layout, settings: dict[str, Any]) -> PreTrainedModel:
    """The model without memory, to know names and shapes."""
    with torch.device("meta"):
        return layout.result.model_class(layout.build_config(settings))


def _resolve_tied_heads(
    model: PreTrainedModel, tensors: Tensors, settings: dict[str, Any]
) -> tuple[set[str], dict[str, str]]:
    """Decides by the stored weights whether heads are tied to embeddings, and writes it into `settings`.

    Returns:
        Names that the result does not hold because they are tied, and those of them that the source holds twice with the other name.
    """
    tied = dict(model.all_tied_weights_keys)
    both = [name for name in tied if name in tensors and tied[name] in tensors]
    with TensorReader(open_file) as reader:
        different = [name for name in both if not _is_equal(reader, tensors[name], tensors[tied[name]])]
    if different:
        # The published loader would lose them.
        settings["tie_word_embeddings"] = False
        for part in ("text_config", "qllama_config"):
            if part in settings:
                settings[part]["tie_word_embeddings"] = False
        return set(), {}
    return set(tied), {name: tied[name] for name in both}


def _is_equal(reader: TensorReader, left: LazyTensor, right: LazyTensor) -> bool:
    return left.shape == right.shape and torch.equal(left.load(reader), right.load(reader))


def _is_derived(name: str) -> bool:
    return any(f".{name}".endswith(f".{buffer}") for buffer in DERIVED_BUFFERS)


def _check_keys(
    layout: Layout, source: Source, draft: Draft, translation: Translation, shapes: dict[str, torch.Size]
) -> None:
    """Raises with everything that does not fit, all at once."""
    tensors = draft.tensors
    wrong = [
        f"{' + '.join(translation.origins.get(name, (name,)))} {tuple(shape)} got {tensors[name].shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(shape) != tensors[name].shape
    ]
    # Under their names in the source, where it would have them.
    absent = [old for name in shapes if name not in tensors for old in names_before(name, layout.rules) or (name,)]
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
        raise ValueError(f"The tensors of `{source.folder}` do not fit {layout.name}. {'; '.join(found)}.")


def _target_dtype(found: torch.dtype, wanted: str) -> torch.dtype:
    return DTYPES[wanted] if wanted != "auto" and found.is_floating_point else found


def _main_dtype(tensors: Tensors) -> str:
    sizes: Counter = Counter()
    for tensor in tensors.values():
        if tensor.dtype.is_floating_point:
            sizes[tensor.dtype] += torch.Size(tensor.shape).numel()
    return str(sizes.most_common(1)[0][0]).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------------- messages
def name_dtypes(dtypes: Iterable[torch.dtype]) -> str:
    """Types as people write them, the most frequent first."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype, _ in Counter(dtypes).most_common())


def name_size(num_bytes: int) -> str:
    """A number of bytes as people write it."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes / 1000:.1f} kB"
