"""Copies of the bundled chat checkpoint against the checkpoint itself, on the same generated questions:
`python -m internvl.benchmarks.equivalence`.

A copy is judged as by `python -m internvl.evaluation compare`: equivalent within two points, worse, better, or not
decided.

- converted: the tensors of vision tower, QLLaMA, projector of the patches and decoder went through the published
  layouts and back. None of these holds such a model whole, so two do: InternVL-14B with its towers, and an
  InternVL-Chat without QLLaMA. The projector of the queries belongs to neither.
- int8 and nf4: as `from_pretrained` quantises, see `quantizers`.
- damaged: noise on the matrices of the decoder's layers.

The answers of each are in `benchmarks/results/equivalence/NAME.samples.jsonl` as they come; a run that was stopped
goes on there.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor, PreTrainedModel
from transformers.utils import logging

from internvl import InternVLChatConfig, InternVLChatForConditionalGeneration, InternVLConfig, InternVLModel
from internvl.conversion import convert
from internvl.evaluation.compare import compare_results, format_comparison, read_results
from internvl.evaluation.dialogue import evaluate_dialogue
from internvl.evaluation.samples import SampleLog

from .quantizers import BUNDLED, load_quantized


G_MODEL = BUNDLED / "internvl_g"
CHAT_PARTS = ("mlp1.", "mlp2.", "language_model.")
RESULTS = Path("benchmarks", "results", "equivalence")  # of the current folder
ORIGINAL = "original"
MARGIN = 2.0  # points
QUESTIONS = 2016  # 288 of each kind
FEW_QUESTIONS = 504  # enough for a large difference, and where nothing is claimed
BATCH_SIZE = 7
NOISE = 0.8  # of the deviation of each matrix
SEED = 0


def through_published_layout(model: PreTrainedModel, processor: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a model that was saved, written in the published layout, and converted back."""
    model.save_pretrained(folder / "own")
    AutoProcessor.from_pretrained(processor).save_pretrained(folder / "own")
    convert(folder / "own", folder / "published", show_progress=False, to="published")
    convert(folder / "published", folder / "back", show_progress=False)
    return AutoModel.from_pretrained(folder / "back").state_dict()


def chat_without_qllama(whole: PreTrainedModel) -> PreTrainedModel:
    """A chat model of the vision tower, the projector of the patches and the decoder."""
    settings = {**whole.config.to_dict(), "connector": "patches", "qllama_config": None}
    model = InternVLChatForConditionalGeneration(InternVLChatConfig.from_dict(settings))
    tensors = whole.state_dict()
    model.load_state_dict({name: tensors[name] for name in model.state_dict()})
    return model


def name_in_towers(name: str) -> str:
    """Name in an InternVL-C or -G of a tensor of a chat model."""
    return name.replace("qllama.", "qllama.model.", 1) if name.startswith("qllama.") else name


def towers_of(whole: PreTrainedModel) -> PreTrainedModel:
    """An InternVL-G with the vision tower, QLLaMA and queries of a chat model; what else it has stays random."""
    settings, own = InternVLConfig.from_pretrained(G_MODEL).to_dict(), whole.config.to_dict()
    qllama = {**own["qllama_config"], "vocab_size": settings["qllama_config"]["vocab_size"]}
    parts = {"vision_config": own["vision_config"], "qllama_config": qllama}
    model = InternVLModel(InternVLConfig.from_dict({**settings, **parts}))
    tensors = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith(CHAT_PARTS)}
    named = {name_in_towers(name): tensor for name, tensor in tensors.items()}
    if unexpected := model.load_state_dict(named, strict=False).unexpected_keys:
        raise SystemExit(f"An InternVL-G has no {', '.join(unexpected)}.")
    return model


def converted() -> PreTrainedModel:
    """The bundled checkpoint with the tensors that came back from the published layouts."""
    model = load_quantized(BUNDLED, None, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        chat = through_published_layout(chat_without_qllama(model), BUNDLED, Path(folder, "chat"))
        towers = through_published_layout(towers_of(model), G_MODEL, Path(folder, "towers"))
    own = model.state_dict()
    model.load_state_dict({name: towers.get(name_in_towers(name), chat.get(name, own[name])) for name in own})
    return model


@torch.no_grad()
def damaged() -> PreTrainedModel:
    """The bundled checkpoint with noise on the matrices of the decoder's layers."""
    model = load_quantized(BUNDLED, None, "cpu")
    generator = torch.Generator().manual_seed(SEED)
    for parameter in model.language_model.model.layers.parameters():
        if parameter.ndim == 2:
            parameter += NOISE * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


def _quantized(kind: str) -> Callable[[], PreTrainedModel]:
    return partial(load_quantized, BUNDLED, kind, "cpu")


# What makes each copy, and how many questions it is asked.
COPIES: dict[str, tuple[Callable[[], PreTrainedModel], int]] = {
    ORIGINAL: (partial(load_quantized, BUNDLED, None, "cpu"), QUESTIONS),
    "converted": (converted, QUESTIONS),
    "int8 (torchao)": (_quantized("int8 (torchao)"), QUESTIONS),
    "int8 (bitsandbytes)": (_quantized("int8 (bitsandbytes)"), QUESTIONS),
    "nf4 (bitsandbytes)": (_quantized("nf4 (bitsandbytes)"), FEW_QUESTIONS),
    "damaged": (damaged, FEW_QUESTIONS),
}


def samples_path(name: str) -> Path:
    """File of the answers of a copy."""
    return RESULTS / f"{name.replace(' ', '-').replace('(', '').replace(')', '')}.samples.jsonl"


def ask_copy(name: str) -> None:
    """Asks a copy what it was not asked yet."""
    make, questions = COPIES[name]
    settings = {"copy": name, "task": "dialogue", "seed": SEED, "batch_size": BATCH_SIZE}
    with SampleLog(samples_path(name), settings) as log:
        evaluate_dialogue(make(), AutoProcessor.from_pretrained(BUNDLED), questions, SEED, BATCH_SIZE, log)


def judge(copies: Iterable[str]) -> str:
    """The table of copies against the original, each on the questions that it was asked."""
    original, names, pairs = read_results(samples_path(ORIGINAL)), [], []
    for name in copies:
        copy = read_results(samples_path(name))
        pairs.append((replace(original, samples={key: original.samples[key] for key in copy.samples}), copy))
        names.append(name)
    found = compare_results(pairs, MARGIN, ["accuracy"])
    rows = [
        replace(row, task=name, metric=f"{row.comparison.samples} questions")
        for name, (row,) in zip(names, found, strict=True)
    ]
    return format_comparison(rows, MARGIN)


def main() -> None:
    """Ask the copies and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m internvl.benchmarks.equivalence", description="Compares copies of the bundled chat checkpoint."
    )
    parser.add_argument("copies", nargs="*", help=f"of {', '.join(COPIES)}; all of these unless named")
    copies = parser.parse_args().copies or list(COPIES)
    logging.disable_progress_bar()
    for name in dict.fromkeys((ORIGINAL, *copies)):
        ask_copy(name)
    print(judge(name for name in copies if name != ORIGINAL))


if __name__ == "__main__":
    main()
