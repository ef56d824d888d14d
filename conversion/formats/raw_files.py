"""Joins the files of a raw checkpoint that make one model: a backbone, and the head that belongs to it.

The published training code keeps them apart, and people keep several of them in one folder. What belongs together
follows from the tensors and from config.json; files that are left out are listed, with how to convert them.
"""

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..readers.opening import loose_files, open_source
from ..readers.source import Source
from ..readers.zero_files import FILE_SUFFIXES
from .format import Format
from .raw_formats import (
    CLASSIFIER_RAW,
    LINEAR_SEGMENTER_RAW,
    PYRAMID_RAW,
    RAW_FORMATS,
    SEGMENTATION_TOWER_RAW,
    TOWER_RAW,
    assumptions,
    classifier_pooling,
)
from .raw_towers import constructor_arguments, mmseg_settings


HEAD_NAMES = ("norm.running_mean", "head.weight")
HEAD_PARTS = ("norm.", "head.", "attn_pooling.")
# Of which one is in every raw tower.
TOWER_NAMES = ("cls_token", "backbone.cls_token")


def join_raw_files(source: Source, head: str | Path | None = None) -> Source:
    """Reduces a raw checkpoint to one model: the files that belong together, without what the model does not use.

    Args:
        source: An opened source.
        head: File of a classification head, where it is not the one that config.json names or the only one.

    Returns:
        The same source where it is no raw checkpoint.

    Raises:
        OSError: `head` cannot be read.
        ValueError: The files do not make one model, or `head` has no effect.
    """
    is_raw = is_head(source) or any(name in source.tensors for name in TOWER_NAMES)
    if is_raw and _is_collection(source):
        joined = _join_in_folder(source, head)
    elif is_raw and is_head(source) and head is None:
        joined = _join(_pick_backbone(_look_for_backbones(source)), source)
    elif head is not None:
        if _format_of(source) is not TOWER_RAW:
            raise ValueError(f"`head` has no effect: `{source.files[0]}` is no raw backbone alone.")
        joined = _join(source, _open_head(head))
    else:
        joined = source
    if not is_raw:
        return source
    joined = _without_unused(joined)
    return replace(joined, notes=[*joined.notes, *assumptions(joined)])


def is_head(source: Source) -> bool:
    """Whether a source is a classification head without a tower."""
    has_all = all(name in source.tensors for name in HEAD_NAMES)
    return has_all and all(name.startswith(HEAD_PARTS) for name in source.tensors)


def _is_collection(source: Source) -> bool:
    """Whether the files of a source are complete models or heads side by side, not shards of one model."""
    if len(source.files) < 2 or any(source.folder.glob("*.index.json")):
        return False
    loose = loose_files(source.folder)
    return all(file in loose and not file.name.endswith(FILE_SUFFIXES) for file in source.files)


# ---------------------------------------------------------------------------------------------------- what lies around
@dataclass(frozen=True)
class _Collection:
    """Files by what they hold, each by its name; `models` are complete, `others` neither models nor heads."""

    folder: Path
    config: dict[str, Any]
    models: dict[str, Source]
    heads: dict[str, Source]
    others: list[str]

    @property
    def backbones(self) -> dict[str, Source]:
        """Towers without a head."""
        return {name: part for name, part in self.models.items() if _format_of(part) is TOWER_RAW}

    def left_out(self, taken: Source) -> dict[str, str]:
        """Name to reason, of the files that are not taken."""
        how = "give this file as SOURCE to convert it"
        reasons = {
            **dict.fromkeys(self.models, f"another model; {how}"),
            **dict.fromkeys(self.heads, f"another head; {how}"),
            **dict.fromkeys(self.others, "holds no weights of a raw model"),
        }
        return {name: reason for name, reason in reasons.items() if name not in {file.name for file in taken.files}}


def _collect(source: Source, files: list[Path]) -> _Collection:
    parts = {file.name: replace(open_source(file), config=source.config) for file in files}
    models = {name: part for name, part in parts.items() if _format_of(part) is not None}
    heads = {name: part for name, part in parts.items() if is_head(part)}
    others = [name for name in parts if name not in models and name not in heads]
    return _Collection(source.folder, source.config, models, heads, others)


def _look_for_backbones(head: Source) -> _Collection:
    """Collects the files beside a head; only the backbone that config.json names, if it names one."""
    files = [file for file in loose_files(head.folder) if file != head.files[0]]
    named = [file for file in files if file.name == _pretrained_name(head.config)]
    return _collect(head, named or files)


def _pretrained_name(config: dict[str, Any]) -> str | None:
    """File of the backbone that config.json names. Only the name counts: the path is that of another machine."""
    path = constructor_arguments(config).get("pretrained")
    return PurePosixPath(PureWindowsPath(path).name).name if isinstance(path, str) else None


def _open_head(head: str | Path) -> Source:
    opened = open_source(head)
    if not is_head(opened):
        raise ValueError(f"`head` must be a file with {' and '.join(HEAD_NAMES)} and no tower, but `{head}` is none.")
    return opened


# ------------------------------------------------------------------------------------------------------- what is taken
def _join_in_folder(source: Source, head: str | Path | None) -> Source:
    found = _collect(source, source.files)
    taken = _pick_model(found) if head is None else _pick_backbone(found)
    own_head = _pick_head(found, taken) if head is None else _open_head(head)
    if own_head is not None:
        taken = _join(taken, own_head)
    beside = {name: reason for name, reason in source.left_out.items() if (source.folder / name).exists()}
    return replace(taken, left_out={**taken.left_out, **found.left_out(taken), **beside})


def _pick_model(found: _Collection) -> Source:
    """The model that config.json describes, or the only one."""
    if "decode_head" in mmseg_settings(found.config):
        wanted = PYRAMID_RAW if constructor_arguments(found.config).get("with_fpn") else LINEAR_SEGMENTER_RAW
        fitting = [part for part in found.models.values() if _format_of(part) is wanted]
        if len(fitting) == 1:
            return fitting[0]
    has_choice = found.heads or _pretrained_name(found.config) in found.backbones
    return _pick_backbone(found, found.backbones if has_choice else found.models)


def _pick_backbone(found: _Collection, candidates: dict[str, Source] | None = None) -> Source:
    """The one that config.json names as pretrained, or the only one."""
    candidates = found.backbones if candidates is None else candidates
    named = _pretrained_name(found.config)
    if named in candidates:
        return candidates[named]
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    raise ValueError(
        f"`{found.folder}` must hold one raw model, or a config.json that names its backbone as `pretrained`; it "
        f"holds {', '.join(candidates) or 'none'}. Give the file to convert as SOURCE, and a head for a backbone as "
        "`--head FILE`."
    )


def _pick_head(found: _Collection, backbone: Source) -> Source | None:
    """The head that config.json asks for, or the only one; None where there is none."""
    if _format_of(backbone) is not TOWER_RAW or mmseg_settings(found.config):
        return None
    fitting = list(found.heads.values())
    if isinstance(found.config.get("MODEL"), dict):
        target = constructor_arguments(found.config).get("cls_target", "cls_patch_concat")  # the published default
        fitting = [head for head in fitting if _fits(head, backbone, target)]
    if len(fitting) > 1:
        names = ", ".join(head.files[0].name for head in fitting)
        raise ValueError(
            f"`{found.folder}` holds several heads for one backbone: {names}. Give the one to convert as SOURCE, or "
            "as `--head FILE`."
        )
    return fitting[0] if fitting else None


def _fits(head: Source, backbone: Source, target: Any) -> bool:
    try:
        return classifier_pooling(_join(backbone, head)) == target
    except ValueError:  # of another width
        return False


def _join(backbone: Source, head: Source) -> Source:
    return replace(
        backbone,
        files=[*backbone.files, *head.files],
        tensors={**backbone.tensors, **head.tensors},
        doubled=[*backbone.doubled, *head.doubled, *(name for name in head.tensors if name in backbone.tensors)],
        left_out={**backbone.left_out, **head.left_out},
    )


def _without_unused(source: Source) -> Source:
    """Leaves out, by name, what lies in the files and the model has no use for."""
    found = _format_of(source)
    unused: tuple[str, ...] = ()
    reason = ""
    if found is TOWER_RAW or (found is CLASSIFIER_RAW and classifier_pooling(source) != "clip_projector"):
        unused, reason = ("clip_projector.",), "the CLIP pooling, which this model does not use"
    elif found in (PYRAMID_RAW, SEGMENTATION_TOWER_RAW):
        unused, reason = (
            ("decode_head.", "auxiliary_head."),
            "a head of mmsegmentation, which `--with-heads` keeps",
        )
    dropped = {name: reason for name in source.tensors if name.startswith(unused)} if unused else {}
    kept = {name: tensor for name, tensor in source.tensors.items() if name not in dropped}
    return replace(source, tensors=kept, left_out={**source.left_out, **dropped})


def _format_of(source: Source) -> Format | None:
    return next((candidate for candidate in RAW_FORMATS if candidate.matches(source)), None)
