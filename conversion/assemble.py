"""Makes a new model of parts of others: any InternViT, any QLLaMA, any causal language model of transformers.

With a decoder the result is an InternVL-Chat, which stage 3 starts from; without one it is an InternVL-C or -G, which
stage 2 starts from. What no part holds, such as a projector between two widths, starts from random values and is
listed. Weights pass from file to file as in a conversion.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers.initialization import no_init_weights

from ..configuration_internvl import CONNECTORS, InternViTConfig, InternVLChatConfig, InternVLConfig
from ..conversation_internvl import get_conversation_template
from .convert import write_plan
from .formats.edits import Draft
from .formats.format import Format
from .formats.image_token import add_to_tokenizer
from .formats.key_tables import LLAVA_UNUSED_TOWER_PARTS
from .formats.parts import POOLING, POOLING_KEYS
from .formats.recognition import find_target
from .part_sources import FoundPart, find_part
from .plan import DTYPES, Plan, expected_shapes, grouped, model_on_meta, name_dtypes, name_size, target_dtype
from .readers.damages import describing
from .readers.source import Source
from .readers.tensors import LazyTensor, Tensors, computed, in_order_of_files, main_dtype
from .repository.assembly_card import write_assembly_card
from .repository.result import CHAT, CONTRASTIVE, Result
from .repository.shards import cast
from .repository.target import place_of
from .repository.tokenizer import check_tokenizer, copy_tokenizer, image_token_id_of, needed_image_tokens


logger = logging.getLogger(__name__)

# What may start from random values where no part holds it.
MAY_BE_NEW = re.compile(
    r"(mlp[12]|clip_projector2?|itm_head|qllama\.lm_head|qllama\..*\bcross_attn)\."
    r"|(query_tokens|text_projection|logit_scale)$"
)
# What reads the tower, and has another shape for a tower of another width.
READS_TOWER = re.compile(r"qllama\..*\bcross_attn\.(k_proj|v_proj|norm2)\.|clip_projector\.")
# Of a chat model, where no projector says otherwise: today's published ones.
PROJECTOR_DEFAULTS = {
    "projector_type": "layer_norm_mlp",
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "select_layer": -1,
}
# Token of a decoder's vocabulary to the conversation template that it was trained with; else "vicuna_v1".
TEMPLATE_OF_TOKEN = {"<|im_start|>": "internvl2_5", "<|assistant|>": "phi3-chat"}
CHAT_OPTIONS = ("connector", "projector", "template", "select_layer", "downsample_ratio")


@dataclass(frozen=True, kw_only=True)
class AssemblyOptions:
    """What a model is assembled of. Every part is a folder, or a repository on the Hub (`user/name`).

    Args:
        vision: An InternViT alone, or a model with one.
        qllama: A QLLaMA alone, a model with one, or a LLaMA, which becomes a QLLaMA without queries.
        decoder: A causal language model, or a chat model with one. Without it the result is an InternVL-C, or an
            InternVL-G where there are queries.
        projector: A projector alone, or a chat model with one; its settings are taken over. None starts a new one.
        connector: What the decoder sees of a tile, as in `InternVLChatConfig`; None means "queries_and_patches" with
            a QLLaMA, else "patches".
        tokenizer: Folder of a tokenizer, instead of the decoder's or QLLaMA's.
        template: Name of the conversation template; None takes the one that the tokenizer's tokens stand for.
        image_size: Size of images to resize the tower's positions to.
        max_tiles: Most tiles of an image in a chat model.
        select_layer: Hidden state of the tower that gives the patches.
        downsample_ratio: Pixel shuffle factor per side.
        num_query_token: Number of new queries of a QLLaMA that has none.
        dtype: Type of the result's floats: "auto" (those of the parts), "float32", "float16" or "bfloat16".
        seed: Of the random values.

    Raises:
        ValueError: If an option has no effect or another value, or a part is missing.
    """

    vision: str | Path
    qllama: str | Path | None = None
    decoder: str | Path | None = None
    projector: str | Path | None = None
    connector: str | None = None
    tokenizer: str | Path | None = None
    template: str | None = None
    image_size: int | None = None
    max_tiles: int = 12
    select_layer: int | None = None
    downsample_ratio: float | None = None
    num_query_token: int | None = None
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of auto, {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.decoder is None and self.qllama is None:
            raise ValueError("An InternViT alone is no new model: name a `decoder`, a `qllama`, or both.")
        if self.connector not in (None, *CONNECTORS):
            raise ValueError(f"`connector` must be one of {', '.join(CONNECTORS)}, got {self.connector!r}.")
        if self.max_tiles < 1:
            raise ValueError(f"`max_tiles` must be at least 1, got {self.max_tiles}.")
        if self.num_query_token is not None and (self.num_query_token < 1 or self.qllama is None):
            raise ValueError("`num_query_token` is the number of new queries of a `qllama`, and at least 1.")
        idle = [name for name in CHAT_OPTIONS if getattr(self, name) is not None]
        if self.decoder is None and idle:
            raise ValueError(f"`{idle[0]}` has no effect: only a model with a `decoder` has one.")
        if self.decoder is not None and self.wanted_connector == "patches" and self.qllama is not None:
            raise ValueError("`qllama` has no effect: with the connector 'patches' the decoder reads the tower alone.")
        if self.decoder is not None and self.wanted_connector != "patches" and self.qllama is None:
            raise ValueError(f"The connector {self.wanted_connector!r} needs queries: name a `qllama`.")
        if self.template is not None:
            get_conversation_template(self.template)

    @property
    def wanted_connector(self) -> str:
        """What the decoder sees of a tile."""
        return self.connector or ("patches" if self.qllama is None else "queries_and_patches")

    @property
    def places(self) -> dict[str, str | Path]:
        """Where each part comes from."""
        places = {
            "vision": self.vision,
            "qllama": self.qllama,
            "decoder": self.decoder,
            "projector": self.projector,
        }
        return {name: place for name, place in places.items() if place is not None}


@dataclass(frozen=True, kw_only=True)
class Assembly(Plan):
    """What an assembly will do; `parts` are those that were found, by name."""

    parts: dict[str, FoundPart]

    def found(self) -> list[str]:
        """Describes the parts."""
        lines = []
        for name, found in self.parts.items():
            lines.append(
                f"Found {name}, of {found.title} (`{found.source.folder}`): {len(found.tensors)} tensors, "
                f"{name_size(sum(tensor.num_bytes for tensor in found.tensors))}, "
                f"{name_dtypes(tensor.dtype for tensor in found.tensors)}."
            )
        return lines

    def write_card(self, folder: Path) -> None:
        """Writes README.md of the result."""
        sources = {name: (found.title, found.source.folder) for name, found in self.parts.items()}
        write_assembly_card(folder, self.result, sources, grouped(self.added), f"{self.num_parameters:,}")


def assemble_model(
    out: str | Path,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    show_progress: bool = True,
    report: Callable[[str], None] = logger.info,
    verify: bool = False,
    **options: Any,
) -> Path:
    """Makes a new model of parts of others, a complete repository of this package.

    Args:
        out: Folder of the result; must not exist, be empty, or be allowed to be replaced.
        max_shard_size: Largest size of a file with weights.
        overwrite: Replace what `out` holds.
        show_progress: Whether to draw a progress bar.
        report: Takes messages to the user.
        verify: Load the result and compare every tensor with the parts, before `out` appears.
        **options: What it is made of; see `AssemblyOptions`.

    Returns:
        `out`.

    Raises:
        OSError: A file is missing, cannot be read or written, or `out` is not free.
        ValueError: A part is missing, parts do not fit together, or an option has no effect.
    """
    out = Path(out)
    choices = AssemblyOptions(**options)
    given = [*choices.places.values(), *([] if choices.tokenizer is None else [choices.tokenizer])]
    place = place_of(out, overwrite, [Path(path) for path in given])
    plan = plan_assembly(choices)
    write_plan(plan, out, place, max_shard_size, overwrite, show_progress, report, verify)
    return out


def plan_assembly(options: AssemblyOptions) -> Assembly:
    """Compares every tensor of the parts with the model that is to hold it. Reads no weights and writes nothing.

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError: A part is missing, or parts do not fit together.
    """
    parts = {
        name: find_part(place, name, options.image_size if name == "vision" else None)
        for name, place in options.places.items()
    }
    result = CONTRASTIVE if options.decoder is None else CHAT
    source_format = _format(result)
    draft = Draft(_settings(parts, options), {})
    _place(draft, parts, result)
    tokenizer_folder = _tokenizer_folder(parts, options)
    with describing(_text_part(parts).source.folder):
        if tokenizer_folder is not None:
            _fit_tokenizer(draft, source_format, tokenizer_folder)
        tensors, added = _filled(draft, source_format, parts, options)
        settings = {
            **draft.settings,
            "architectures": [result.model_class.__name__],
            "auto_map": result.auto_map,
            "dtype": main_dtype(tensors),
        }
        config = source_format.build_config(settings)
    source = _source(parts)
    return Assembly(
        source_format=source_format,
        source=source,
        settings=settings,
        config=config,
        tensors=tensors,
        image_size=None,
        tokenizer_folder=tokenizer_folder,
        target_format=find_target("internvl", result),
        written=in_order_of_files(tensors, source.files),
        dropped=draft.dropped,
        notes=draft.notes,
        added=added,
        parts=parts,
    )


# ------------------------------------------------------------------------------------------------------------ settings
def _format(result: Result) -> Format:
    kind = "InternVL-Chat" if result is CHAT else "InternVL-C/G"
    return Format(
        name=f"{kind}, assembled",
        result=result,
        tensor_names=(),
        map_config=lambda source: {},
        lacks_image_token=result is CHAT,
    )


def _settings(parts: dict[str, FoundPart], options: AssemblyOptions) -> dict[str, Any]:
    """This package's config.json, before the tokenizer is known."""
    vision = parts["vision"].part.settings
    settings: dict[str, Any] = {"vision_config": {key: vision[key] for key in vision if key not in POOLING_KEYS}}
    if "qllama" in parts:
        qllama = _qllama_settings(parts["qllama"].part.settings, options.num_query_token)
        width = vision.get("hidden_size", InternViTConfig.hidden_size)
        settings["qllama_config"] = {**qllama, "vision_hidden_size": width}
    if options.decoder is None:
        poolings = {**vision, **parts["qllama"].part.settings}
        pooling = {key: poolings[key] for key in POOLING_KEYS if key in poolings}
        return {**settings, **pooling, "tie_word_embeddings": False, "model_type": InternVLConfig.model_type}
    decoder = parts["decoder"].part.settings
    projector = parts["projector"].part.settings if "projector" in parts else {}
    chosen = {"select_layer": options.select_layer, "downsample_ratio": options.downsample_ratio}
    return {
        **settings,
        **PROJECTOR_DEFAULTS,
        **{key: projector[key] for key in PROJECTOR_DEFAULTS if key in projector},
        **{key: value for key, value in chosen.items() if value is not None},
        "connector": options.wanted_connector,
        "text_config": dict(decoder),
        "template": options.template,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": options.max_tiles,
        "tie_word_embeddings": decoder["tie_word_embeddings"],
        "model_type": InternVLChatConfig.model_type,
    }


def _qllama_settings(settings: dict[str, Any], num_query_token: int | None) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if key not in POOLING_KEYS}
    if num_query_token is None:
        return kept
    if kept.get("num_query_token"):
        raise ValueError(f"`num_query_token` has no effect: this QLLaMA has {kept['num_query_token']} queries.")
    return {**kept, "num_query_token": num_query_token}


def _text_part(parts: dict[str, FoundPart]) -> FoundPart:
    """The part whose texts the model reads and writes."""
    return parts["decoder"] if "decoder" in parts else parts["qllama"]


def _tokenizer_folder(parts: dict[str, FoundPart], options: AssemblyOptions) -> Path | None:
    folder = _text_part(parts).tokenizer_folder if options.tokenizer is None else Path(options.tokenizer)
    if folder is None and "decoder" in parts:
        raise ValueError(f"`{options.decoder}` has no tokenizer: name the folder of one by `tokenizer`.")
    return folder


def _source(parts: dict[str, FoundPart]) -> Source:
    """The parts as one source: settings of `generate` are those of the text part, colours those of the tower."""
    text = _text_part(parts).source
    return Source(
        folder=text.folder,
        config=text.config,
        files=list(dict.fromkeys(file for found in parts.values() for file in found.files)),
        tensors={},
        recorded_files={
            "generation_config.json": text.read_json("generation_config.json"),
            "preprocessor_config.json": parts["vision"].image_settings or {},
        },
    )


# ----------------------------------------------------------------------------------------------------------- tokenizer
def _fit_tokenizer(draft: Draft, source_format: Format, folder: Path) -> None:
    """Makes settings and embeddings those of a tokenizer: the image tokens of a chat model, the end token of a LLaMA.

    Raises:
        ValueError: If the tokenizer does not belong to the model.
    """
    settings, config = draft.settings, source_format.build_config(draft.settings)
    is_chat, rows = source_format.lacks_image_token, config.get_text_config().vocab_size
    with TemporaryDirectory() as temporary:
        tokenizer = copy_tokenizer(folder, Path(temporary), config, is_for_retrieval=not is_chat)
    check_tokenizer(tokenizer, rows, ())
    if not is_chat:
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if settings["qllama_config"].get(key) is None:
                settings["qllama_config"][key] = getattr(tokenizer, key)
        return
    vocabulary = tokenizer.get_vocab()
    if settings["template"] is None:
        names = (name for token, name in TEMPLATE_OF_TOKEN.items() if token in vocabulary)
        settings["template"] = next(names, "vicuna_v1")
    add_to_tokenizer(tokenizer, needed_image_tokens(config))
    settings["image_token_id"] = image_token_id_of(tokenizer, None)
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > rows:
        _add_rows(draft, source_format, needed - rows)
        settings["text_config"]["vocab_size"] = needed


def _add_rows(draft: Draft, source_format: Format, count: int) -> None:
    """Puts rows for new tokens behind the embeddings and the head: the mean of the others."""
    model = model_on_meta(source_format, draft.settings)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {
        f"{path}.{name}" for path, module in model.named_modules() if module in ends for name in module._parameters
    }
    for name in sorted(names & draft.tensors.keys()):
        draft.tensors[name] = computed(lambda rows: _with_mean_rows(rows, count), draft.tensors[name])
        draft.notes.append(f"{name} has {count} more rows, the mean of the others, for the image tokens.")


def _with_mean_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    mean = rows.mean(dim=0, keepdim=True, dtype=torch.float32).to(rows.dtype)
    return torch.cat([rows, mean.expand(count, *rows.shape[1:])])


# ------------------------------------------------------------------------------------------------------------- tensors
def _place(draft: Draft, parts: dict[str, FoundPart], result: Result) -> None:
    """Puts the tensors of all parts under the names that they have in the model."""
    tensors = {f"vision_model.{name}": tensor for name, tensor in parts["vision"].part.tensors.items()}
    tensors |= parts["vision"].part.beside
    if "qllama" in parts:
        tensors |= {f"qllama.{name}": tensor for name, tensor in parts["qllama"].part.tensors.items()}
        tensors |= parts["qllama"].part.beside
    if "decoder" in parts:
        tensors |= {f"language_model.{name}": tensor for name, tensor in parts["decoder"].part.tensors.items()}
    if "projector" in parts:
        tensors |= parts["projector"].part.tensors
    for name, tensor in tensors.items():
        reason = _unused(name, result, draft.settings)
        if reason:
            draft.dropped[name] = reason
        else:
            draft.tensors[name.replace("qllama.model.", "qllama.") if result is CHAT else name] = tensor


def _unused(name: str, result: Result, settings: dict[str, Any]) -> str | None:
    """Why a model has no place for a tensor of its parts."""
    if result is CHAT:
        unread = {"patches": "mlp2.", "queries": "mlp1."}.get(settings["connector"], "no such part")
        reasons = {**LLAVA_UNUSED_TOWER_PARTS, unread: f"not with the connector {settings['connector']!r}"}
        return next((why for start, why in reasons.items() if name.startswith(start)), None)
    without_queries = not settings["qllama_config"].get("num_query_token", 1)
    return "InternVL-C writes no text" if without_queries and name.startswith("qllama.lm_head.") else None


def _filled(
    draft: Draft, source_format: Format, parts: dict[str, FoundPart], options: AssemblyOptions
) -> tuple[Tensors, dict[str, str]]:
    """Every tensor of the model, and name to reason of those that start from random values.

    Raises:
        ValueError: If something is missing, too much, or of another shape; the message has all of it.
    """
    shapes, same = expected_shapes(source_format, draft.settings, draft.tensors)
    draft.dropped |= {name: f"the same as {other}" for name, other in same.items()}
    found = {name: tensor for name, tensor in draft.tensors.items() if name not in same}
    added = {name: "no part has it" for name in shapes if name not in found and MAY_BE_NEW.match(name)}
    misfits = [name for name in shapes if name in found and tuple(shapes[name]) != found[name].shape]
    if any(name.startswith(POOLING) for name in misfits):  # one tensor alone would be of no use
        misfits = list(dict.fromkeys([*misfits, *(name for name in found if name.startswith(POOLING))]))
    added |= {name: "it read another tower" for name in misfits if READS_TOWER.match(name)}
    problems = {
        "missing": [name for name in shapes if name not in found and name not in added],
        "unknown": [name for name in found if name not in shapes],
        "of another shape than the model needs (expected, got)": [
            f"{name} {tuple(shapes[name])} got {found[name].shape}" for name in misfits if name not in added
        ],
    }
    told = [f"{len(names)} {problem}: {', '.join(names)}" for problem, names in problems.items() if names]
    if told:
        places = ", ".join(f"{name} `{part.source.folder}`" for name, part in parts.items())
        raise ValueError(f"These parts do not fit together ({places}). Tensors {'; '.join(told)}.")
    kept = {name: found[name] for name in shapes if name not in added}
    main = torch.float32 if not kept else DTYPES[main_dtype(kept)]
    kept = {name: cast(name, tensor, target_dtype(tensor.dtype, options.dtype)) for name, tensor in kept.items()}
    file = next(iter(found.values())).file
    new_shapes = {name: shapes[name] for name in added}
    new = _random(source_format, draft.settings, new_shapes, target_dtype(main, options.dtype), options.seed, file)
    return {name: (new if name in new else kept)[name] for name in shapes}, added


def _random(
    source_format: Format,
    settings: dict[str, Any],
    shapes: dict[str, torch.Size],
    dtype: torch.dtype,
    seed: int,
    file: Path,
) -> Tensors:
    """Tensors of these names as the model initialises them, in float32 and then cast; computed when one is read."""

    @cache
    def values() -> dict[str, torch.Tensor]:
        with no_init_weights():
            model = model_on_meta(source_format, settings)
        for path, module in model.named_modules():
            own = {name: f"{path}.{name}".lstrip(".") for name in module._parameters}
            # Modules without new tensors keep what they have, which is nothing: they are on the meta device.
            module._is_hf_initialized = not any(full in shapes for full in own.values())
            for name, full in own.items():
                parameter = module._parameters[name]
                if full in shapes:
                    module._parameters[name] = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"))
                elif parameter is not None:
                    parameter._is_hf_initialized = True
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.initialize_weights()
        return {name: model.get_parameter(name).detach().to(dtype) for name in shapes}

    def reading(name: str) -> Callable[..., torch.Tensor]:
        return lambda reader: values()[name]

    return {name: LazyTensor(tuple(shape), dtype, file, reading(name)) for name, shape in shapes.items()}
