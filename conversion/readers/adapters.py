"""LoRA adapters of PEFT, merged on the way: wrapped into a checkpoint, or in a folder of their own.

PEFT names a wrapped layer `x.weight` (up to 0.5) or `x.base_layer.weight` (since), with `x.lora_A.default.weight` and
`x.lora_B.default.weight` beside it, and prefixes the wrapped model with `base_model.model.`. The merged weight is
`W + alpha / rank * B @ A`, computed in fp32 and cast to the type of W.

Linear layers are merged, modules that were trained whole, rank and alpha by pattern, rank-stabilised scaling. DoRA,
adapters of embeddings and convolutions, and initialisations that change the base (PiSSA, OLoRA...) are refused.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .links import hub_snapshot
from .opening import open_source
from .source import Source
from .tensors import LazyTensor, Tensors, computed


# LoRA adapters wrapped into a part of a checkpoint: the key of config.json that has their rank. Alpha is twice the
# rank.
LORA_RANK_KEYS = {
    "vision_model": "use_backbone_lora",
    "qllama": "use_qllama_lora",
    "language_model": "use_llm_lora",
}
# In the LLaVA code base the tower's alpha is this number for every rank.
LLAVA_TOWER_PREFIX = "model.vision_tower.vision_tower."
LLAVA_TOWER_LORA_ALPHA = 256


ADAPTER_CONFIG = "adapter_config.json"
WRAPPING = re.compile(r"(^|\.)base_model\.model\.")
PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
TRAINED_WHOLE = re.compile(r"\.modules_to_save\.[^.]+\.")
# Settings of PEFT that mean nothing for the merge, or that it follows. Any other one that is set is refused.
KNOWN_SETTINGS = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path bias ensure_weight_tying eva_config exclude_modules "
    "inference_mode init_lora_weights layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core "
    "modules_to_save peft_type peft_version qalora_group_size r rank_pattern revision runtime_config target_modules "
    "task_type use_rslora".split()
)
# Starts that leave the base as it is.
KNOWN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
# Prefixes of the parts of a model that an adapter's base may be.
BASE_PREFIXES = ("", "language_model.", "vision_model.", "qllama.")

# From the name of a layer and its rank to alpha / rank, or to what is wrong.
Scaling = Callable[[str, int], float | str]


@dataclass
class Wrapped:
    """Tensors under the names that they have without PEFT.

    Args:
        plain: Tensors of the model.
        pairs: Name of a layer to its "A" and "B".
        left_out: Originals whose place was taken.
        problems: Kind of problem to names.
    """

    plain: Tensors = field(default_factory=dict)
    pairs: dict[str, Tensors] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)

    def blame(self, kind: str, name: str) -> None:
        """Notes a problem."""
        self.problems.setdefault(kind, []).append(name)


def merge_adapters(source: Source, lora_alpha: float | None = None, base: str | Path | None = None) -> Source:
    """A source with plain tensors in place of wrapped ones.

    Args:
        source: An opened source: a checkpoint, or the folder of an adapter.
        lora_alpha: Alpha of all adapters, instead of what the configuration says.
        base: Checkpoint that an adapter folder belongs to, instead of the one that its settings name.

    Returns:
        The same source where nothing is wrapped.

    Raises:
        OSError: If the base of an adapter is not found.
        ValueError: If adapters do not fit, or are of a kind that is not merged; or a setting has no effect.
    """
    is_folder = (source.folder / ADAPTER_CONFIG).is_file() and any(
        file.name.startswith("adapter_model.") for file in source.files
    )
    if base is not None and not is_folder:
        raise ValueError(f"`base` has no effect: `{source.folder}` is no folder of an adapter.")
    is_wrapped = any(WRAPPING.search(name) or ".lora_" in name or ".base_layer." in name for name in source.tensors)
    if not is_wrapped:
        if lora_alpha is not None:
            raise ValueError(f"`lora_alpha` has no effect: there are no adapters in `{source.folder}`.")
        return source
    wrapped = _unwrap(source)
    if is_folder:
        settings = source.read_json(ADAPTER_CONFIG)
        _check_settings(source.folder, settings)
        source = _with_base(source, wrapped, _open_base(source, settings, base))
        scaling = _by_settings(settings, lora_alpha)
    else:
        scaling = _by_config(source.config, lora_alpha)
    tensors = _merge(wrapped, scaling)
    if wrapped.problems:
        found = "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in wrapped.problems.items())
        raise ValueError(f"The adapters in `{source.folder}` cannot be merged. {found}.")
    config = {key: 0 if key in LORA_RANK_KEYS.values() else value for key, value in source.config.items()}
    return replace(
        source,
        config=config,
        tensors=tensors,
        left_out={**source.left_out, **wrapped.left_out},
        notes=[*source.notes, f"Merged the LoRA adapters of {len(wrapped.pairs)} layers."],
    )


def _unwrap(source: Source) -> Wrapped:
    """Sorts tensors by what they are, under plain names."""
    wrapped = Wrapped()
    adapters = set()
    for name, tensor in source.tensors.items():
        bare = WRAPPING.sub(r"\1", name)
        pair = PAIR.fullmatch(bare)
        if pair:
            adapters.add(pair["adapter"] or "default")
            wrapped.pairs.setdefault(pair["module"], {})[pair["side"]] = tensor
        elif re.search(r"(^|\.)lora_", bare):
            wrapped.blame("of a kind that is not merged", name)
        elif ".original_module." in bare:
            wrapped.left_out[name] = "training replaced the whole module"
        else:
            plain = TRAINED_WHOLE.sub(".", bare).replace(".base_layer.", ".")
            if plain in wrapped.plain:
                wrapped.blame("given twice", plain)
            wrapped.plain[plain] = tensor
    if len(adapters) > 1:
        wrapped.problems["adapters where one is expected"] = sorted(adapters)
    if not wrapped.pairs:
        wrapped.problems["tensors wrapped by PEFT, with no adapter beside them"] = [
            name for name in source.tensors if WRAPPING.search(name) or ".base_layer." in name
        ]
    return wrapped


def _merge(wrapped: Wrapped, scaling: Scaling) -> Tensors:
    """Plain tensors with the adapters added; what does not fit is noted in `wrapped.problems`."""
    tensors = dict(wrapped.plain)
    for module, pair in wrapped.pairs.items():
        weight = tensors.get(f"{module}.weight")
        if len(pair) < 2:
            wrapped.blame("half pairs", f"{module}.lora_{next(iter(pair))}")
        elif weight is None:
            wrapped.blame("without the weight that they change", module)
        elif not _fits(weight, pair["A"], pair["B"]):
            shapes = f"{weight.shape}, A {pair['A'].shape}, B {pair['B'].shape}"
            wrapped.blame("of shapes that do not fit", f"{module} {shapes}")
        else:
            factor = scaling(module, pair["A"].shape[0])
            if isinstance(factor, str):
                wrapped.blame(factor, module)
            else:
                tensors[f"{module}.weight"] = _sum(weight, pair["A"], pair["B"], factor)
    return tensors


def _fits(weight: LazyTensor, down: LazyTensor, up: LazyTensor) -> bool:
    if not len(weight.shape) == len(down.shape) == len(up.shape) == 2:
        return False
    return weight.shape == (up.shape[0], down.shape[1]) and up.shape[1] == down.shape[0]


def _sum(weight: LazyTensor, down: LazyTensor, up: LazyTensor, factor: float) -> LazyTensor:
    def merged(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return (weight.float() + factor * (up.float() @ down.float())).to(weight.dtype)

    return computed(merged, weight, down, up)


# ------------------------------------------------------------------------------------------------- wrapped checkpoints
def _by_config(config: dict[str, Any], lora_alpha: float | None) -> Scaling:
    """The published rule: the configuration has the rank of each part, alpha is twice that."""

    def scaling(module: str, rank: int) -> float | str:
        if lora_alpha is not None:
            return lora_alpha / rank
        if module.startswith(LLAVA_TOWER_PREFIX):
            return LLAVA_TOWER_LORA_ALPHA / rank
        key = LORA_RANK_KEYS.get(module.partition(".")[0])
        stated = config.get(key) if key else None
        if not stated:
            return f"without {f'`{key}`' if key else 'a rank'} in config.json, give `--lora-alpha N`"
        if stated != rank:
            return f"of rank {rank} where config.json says `{key}` {stated}"
        return 2 * stated / rank

    return scaling


# ------------------------------------------------------------------------------------------------- folders of adapters
def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    refused = sorted(key for key, value in settings.items() if value and key not in KNOWN_SETTINGS)
    if str(settings.get("peft_type")).upper() != "LORA":
        refused.append(f"peft_type {settings.get('peft_type')!r}")
    if settings.get("init_lora_weights") not in KNOWN_STARTS:
        refused.append(f"init_lora_weights {settings['init_lora_weights']!r}")
    if refused:
        raise ValueError(
            f"`{folder / ADAPTER_CONFIG}` describes an adapter that is not merged by this command "
            f"({', '.join(refused)}). Merge it with PEFT (`merge_and_unload`), save the model, and convert that."
        )


def _open_base(source: Source, settings: dict[str, Any], base: str | Path | None) -> Source:
    place = _named_base(source, settings) if base is None else Path(base)
    notes = [f"The base is `{place}`, as {ADAPTER_CONFIG} says; `--base DIR` gives another."] if base is None else []
    opened = open_source(place)
    if (opened.folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"The base `{opened.folder}` is an adapter itself. Merge and save that first.")
    return merge_adapters(replace(opened, notes=[*opened.notes, *notes]))


def _named_base(source: Source, settings: dict[str, Any]) -> Path:
    """The base that an adapter names by an absolute path; relative paths and downloads are not followed."""
    base = settings.get("base_model_name_or_path")
    if isinstance(base, str) and hub_snapshot(source.folder) is None:
        place = Path(base)
        if place.is_absolute() and ".." not in place.parts and place.is_dir():
            return place
    raise FileNotFoundError(
        f"`{source.folder}` holds an adapter of {base!r}, which is no folder here: download it and name it with "
        "`--base DIR`."
    )


def _with_base(source: Source, wrapped: Wrapped, base: Source) -> Source:
    """The base with the adapter's files and settings; fills `wrapped` with the tensors of the base."""
    names = [f"{module}.weight" for module in wrapped.pairs]
    part = next((part for part in BASE_PREFIXES if all(part + name in base.tensors for name in names)), "")
    wrapped.pairs = {part + module: pair for module, pair in wrapped.pairs.items()}
    wrapped.plain = {**base.tensors, **{part + name: tensor for name, tensor in wrapped.plain.items()}}
    return replace(
        base,
        notes=[*base.notes, *source.notes],
        config=source.config or base.config,
        files=[*base.files, *source.files],
        doubled=[*base.doubled, *source.doubled],
        left_out={**base.left_out, **source.left_out},
    )


def _by_settings(settings: dict[str, Any], lora_alpha: float | None) -> Scaling:
    """PEFT's own rule."""

    def scaling(module: str, rank: int) -> float | str:
        alpha = lora_alpha if lora_alpha is not None else _setting(settings, "lora_alpha", "alpha_pattern", module)
        stated = _setting(settings, "r", "rank_pattern", module)
        if alpha is None:
            return f"without `lora_alpha` in {ADAPTER_CONFIG}, give `--lora-alpha N`"
        if stated not in (None, rank):
            return f"of rank {rank} where {ADAPTER_CONFIG} says {stated}"
        return alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank

    return scaling


def _setting(settings: dict[str, Any], key: str, patterns_key: str, module: str) -> Any:
    """A setting of a layer: that of the first pattern that the end of its name matches, or the general one."""
    for pattern, value in (settings.get(patterns_key) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return settings.get(key)
