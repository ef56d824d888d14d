"""One conversion: carry out a plan beside the place of the result, and rename when it is complete."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .formats.image_token import add_to_tokenizer
from .formats.own_format import OwnFormat
from .plan import ConversionOptions, Plan, name_size, plan_conversion
from .readers.damages import describing
from .repository.code import write_json
from .repository.records import MANIFEST_FILE, hashes_of, manifest_of
from .repository.shards import BESIDE_STEM, write_shards
from .repository.target import complete_or_nothing, place_of
from .repository.tokenizer import check_tokenizer, copy_tokenizer, image_token_id_of, needed_image_tokens
from .verify import Verification, compare_with_source


logger = logging.getLogger(__name__)


def convert(
    source: str | Path,
    out: str | Path,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    show_progress: bool = True,
    report: Callable[[str], None] = logger.info,
    verify: bool = False,
    recorded: str | Path | None = None,
    **options: Any,
) -> Path:
    """Converts a published checkpoint to a complete repository of this package.

    Args:
        source: Folder of the checkpoint, its file with weights, or a repository on the Hub (`user/name`), which is
            downloaded. It is not changed, and none of its code is run.
        out: Folder of the result; must not exist, be empty, or be allowed to be replaced.
        max_shard_size: Largest size of a file with weights.
        overwrite: Replace what `out` holds.
        show_progress: Whether to draw a progress bar.
        report: Takes messages to the user.
        verify: Load the result through its Auto class and compare every tensor with the source, before `out` appears.
        recorded: With `verify`, a file of recorded inputs and outputs; see `verify.compare_with_source`.
        **options: What is converted, and how; see `ConversionOptions`.

    Returns:
        `out`.

    Raises:
        OSError: A file is missing, cannot be read or written, or `out` is not free.
        ValueError: The format is unknown, tensors do not fit, a setting cannot take effect, or what was written is not
            the source.
    """
    out = Path(out)
    choices = ConversionOptions(**options)
    place = place_of(out, overwrite, [Path(source), *choices.inputs])
    plan = plan_conversion(source, choices)
    write_plan(plan, out, place, max_shard_size, overwrite, show_progress, report, verify, recorded)
    return out


def write_plan(
    plan: Plan,
    out: Path,
    place: Path,
    max_shard_size: int | str,
    overwrite: bool,
    show_progress: bool,
    report: Callable[[str], None],
    verify: bool,
    recorded: str | Path | None = None,
) -> None:
    """Carries out a plan; `place` is where `out` leads to, the others are arguments of `convert`."""
    for line in plan.describe():
        report(line)
    with complete_or_nothing(out, place, overwrite) as folder:
        _check_space(folder, plan.num_bytes)
        with describing(plan.source.folder):
            _write_all_but_weights(folder, plan, report)
        hashes = write_shards(folder, plan.written, max_shard_size, show_progress)
        if plan.beside:
            hashes |= write_shards(folder, plan.beside, max_shard_size, show_progress, stem=BESIDE_STEM)
        write_json(folder / MANIFEST_FILE, _manifest(folder, plan, hashes))
        if verify:
            for line in _verification(folder, plan, recorded).describe():
                report(line)
    report(f"Wrote {out}.")


def _verification(folder: Path, plan: Plan, recorded: str | Path | None) -> Verification:
    # Trusted is this package's own code, which was just written there.
    settings = {"dtype": "auto", "trust_remote_code": plan.target_format.brings_code}
    model = plan.target_format.auto_class.from_pretrained(folder, **settings)
    return compare_with_source(model, plan.written, recorded, plan.target_format.spelling)


def _write_all_but_weights(folder: Path, plan: Plan, report: Callable[[str], None]) -> None:
    result, tokenizer = plan.result, None
    if plan.tokenizer_folder is not None:
        tokenizer = copy_tokenizer(plan.tokenizer_folder, folder, plan.config, result.kind == "contrastive")
        needed = needed_image_tokens(plan.config) if result.kind == "chat" else ()
        if plan.source_format.lacks_image_token:
            add_to_tokenizer(tokenizer, needed)
            tokenizer.save_pretrained(folder)
        check_tokenizer(tokenizer, plan.config.get_text_config().vocab_size, needed)
    elif result.kind not in ("vision", "part"):
        report("No tokenizer was found, so the result has none and no processor; `--tokenizer DIR` names one.")
    settings = plan.settings
    if result.kind == "chat":
        settings = {**settings, "image_token_id": _image_token_id(plan.config, tokenizer, report)}
    content = replace(plan, settings=settings, config=plan.source_format.build_config(settings), tokenizer=tokenizer)
    plan.target_format.write(folder, content)
    plan.write_card(folder)


def _image_token_id(
    config: Any, tokenizer: PreTrainedTokenizerBase | None, report: Callable[[str], None]
) -> int | None:
    given, vocabulary_size = config.image_token_id, config.text_config.vocab_size
    if tokenizer is not None:
        return image_token_id_of(tokenizer, given)
    if given is None:
        report("The id of `<IMG_CONTEXT>` is not known: images cannot be placed until `--image-token-id N` names it.")
    elif not 0 <= given < vocabulary_size:
        raise ValueError(f"`image_token_id` must lie in the vocabulary of {vocabulary_size} tokens, got {given}.")
    return given


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"The result needs {name_size(num_bytes)}, but the disk of `{folder.parents[1]}` has {name_size(free)} "
            "left."
        )


# ------------------------------------------------------------------------------------------------------------ messages
def _manifest(folder: Path, plan: Plan, hashes: dict[str, str]) -> dict[str, Any]:
    return {
        "layout": _first_format(plan),
        "left_out": plan.dropped,
        **({"new": plan.added} if plan.added else {}),
        "sha256": hashes,
        "written": hashes_of(folder),
        "forms": manifest_of({name: record for name, record in plan.records.items() if name != plan.target_format.to}),
    }


def _first_format(plan: Plan) -> str:
    """Name of the format that the weights had first: a result of this command remembers it."""
    is_own = plan.source_format.to == OwnFormat.to
    remembered = plan.source.read_json(MANIFEST_FILE).get("layout") if is_own else None
    return remembered or plan.source_format.name
