"""Exports the parts of a model, writes them and compares them with the model."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModel, AutoProcessor

from ..conversion.repository.target import complete_or_nothing, place_of
from ..extras import extra
from ..kinds import check_kind, kind_of
from .parts import ExportedPart, Inputs, parts_of


DOOR = "`python -m internvl.export`"
CONTRASTIVE = ("InternVL-C", "InternVL-G")
# Largest difference between a program and its model, relative to the largest value where that is above 1.
TOLERANCE = 1e-4

Program = Callable[[Inputs], list[torch.Tensor]]


def _exported(part: ExportedPart) -> Any:
    inputs = next(part.examples())
    return torch.export.export(part.module, inputs, dynamic_shapes=part.dynamic_shapes, strict=False)


def write_torch_program(part: ExportedPart, folder: Path) -> Program:
    """Writes `NAME.pt2` for `torch.export.load`; returns the program."""
    exported = _exported(part)
    torch.export.save(exported, folder / f"{part.name}.pt2")
    program = exported.module()
    return lambda inputs: list(program(*inputs))


def onnx_runtime() -> Any:
    """Returns the module of ONNX Runtime.

    Raises:
        MissingLibraryError: Without it, or without what torch's exporter builds graphs with.
    """
    with extra("export"):
        import onnxruntime
        import onnxscript  # noqa: F401
    return onnxruntime


def write_onnx_program(part: ExportedPart, folder: Path) -> Program:
    """Writes `NAME.onnx`, its weights beside it where they are large; returns the program as ONNX Runtime runs it."""
    file = folder / f"{part.name}.onnx"
    torch.onnx.export(
        _exported(part),
        next(part.examples()),
        file,
        dynamo=True,
        input_names=part.inputs,
        output_names=part.outputs,
        external_data=sum(weight.nbytes for weight in part.module.parameters()) > 2**30,
        verbose=False,
    )
    session = onnx_runtime().InferenceSession(file, providers=["CPUExecutionProvider"])

    def program(inputs: Inputs) -> list[torch.Tensor]:
        given = {name: value.numpy() for name, value in zip(part.inputs, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(list(part.outputs), given)]

    return program


WRITERS = {"torch": write_torch_program, "onnx": write_onnx_program}


def largest_difference(part: ExportedPart, program: Program) -> float:
    """The largest difference of any output over the examples, relative to the largest value where that is above 1."""
    differences = []
    for inputs in part.examples():
        for expected, output in zip(part.module(*inputs), program(inputs), strict=True):
            scale = max(1.0, float(expected.abs().max()))
            differences.append((output - expected).abs().max() / scale)
    return float(torch.stack(differences).max())  # NaN, if there is one


def _selected(kind: str | None, part: str | None, mode: str | None) -> tuple[str, str]:
    """The part and the mode, where they are left out those that the kind of model has."""
    part = part or ("embeddings" if kind in CONTRASTIVE else "vision")
    if part == "embeddings" and kind not in CONTRASTIVE:
        raise ValueError("`--part embeddings` needs an InternVL-C or InternVL-G; of other models export `vision`.")
    if mode and part != "embeddings":
        raise ValueError("`--mode` chooses the embeddings of images; `--part vision` has none. Leave it out.")
    if mode == "G" and kind != "InternVL-G":
        raise ValueError("`--mode G` needs the queries of an InternVL-G; this model is an InternVL-C. Use `--mode C`.")
    return part, mode or ("G" if kind == "InternVL-G" else "C")


@torch.no_grad()
def export_model(options: argparse.Namespace, print_fn: Callable[[str], None]) -> int:
    """Writes programs, `export.json` and the files of the processor; returns the exit status.

    Raises:
        ValueError: The model lacks the part, or a place or library does not fit.
    """
    where = {"subfolder": options.subfolder}
    config = check_kind(options.model, "vision", "chat", *CONTRASTIVE, door=DOOR, **where)
    kind = kind_of(config)
    part, mode = _selected(kind, options.part, options.mode)
    out, source = Path(options.out), Path(options.model)
    place = place_of(out, options.overwrite, [source / options.subfolder] if source.exists() else [])
    if options.to == "onnx":
        onnx_runtime()
    model = AutoModel.from_pretrained(options.model, dtype=torch.float32, attn_implementation="sdpa", **where).eval()
    processors: Any = AutoProcessor if part == "embeddings" else AutoImageProcessor
    processor = processors.from_pretrained(options.model, **where)
    settings: dict[str, Any] = {"model": kind, "part": part, "programs": {}}
    if part == "embeddings":
        settings["mode"] = mode
    with complete_or_nothing(out, place, options.overwrite) as folder:
        for each in parts_of(model, part, mode):
            difference = largest_difference(each, WRITERS[options.to](each, folder))
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"The program `{each.name}` differs from the model by {difference:.1e}, more than {TOLERANCE}: "
                    "nothing was written."
                )
            file = f"{each.name}.{'onnx' if options.to == 'onnx' else 'pt2'}"
            settings["programs"][file] = {
                "inputs": each.inputs,
                "outputs": each.outputs,
                "largest_difference": difference,
            }
            print_fn(
                f"{out / file}: {', '.join(each.inputs)} -> {', '.join(each.outputs)}; differs by {difference:.1e}"
            )
        processor.save_pretrained(folder)
        (folder / "export.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return 0
