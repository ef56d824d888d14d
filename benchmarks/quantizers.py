"""Quantised weights against fp32: dialogue accuracy, bytes of the weights as they are held, decode speed, closeness of
the scores.

The bundled checkpoint shows what quantising costs in answers. Three tenths of its weights are the vision tower, which
stays as it is, so memory and speed are those of a decoder-heavy model of 0.3 billion random parameters too.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, PreTrainedModel, TorchAoConfig

from internvl import InternVLChatConfig, InternVLChatForConditionalGeneration
from internvl.evaluation.dialogue import evaluate_questions
from internvl.evaluation.generated import held_out_questions

from .harness import Options, Row, sizes_of, speed_row


BUNDLED = Path(__file__).resolve().parents[1]
NUM_QUESTIONS = 210
MEMORY_TARGET = 0.4
NEW_TOKENS = 8
DECODER = sizes_of(1024, 2816, 24, 16, model_type="llama", vocab_size=4096, num_key_value_heads=16, pad_token_id=0)
VISION = sizes_of(256, 512, 2, 4, image_size=56, patch_size=14)


def torchao_settings() -> dict[str, Any]:
    """What loads a model with torchao's int8 weights."""
    from torchao.quantization import Int8WeightOnlyConfig

    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}


# Name, package that must be there, what goes to `from_pretrained`.
KINDS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "bf16": ("torch", dict),
    "int8 (bitsandbytes)": ("bitsandbytes", lambda: {"load_in_8bit": True}),
    "nf4 (bitsandbytes)": ("bitsandbytes", lambda: {"load_in_4bit": True}),
    "int8 (torchao)": ("torchao", torchao_settings),
}


def held_bytes(model: PreTrainedModel) -> int:
    """Bytes of parameters and buffers with the scales that belong to them; a tied tensor counts once."""
    return sum(_tensor_bytes(tensor) for tensor in [*model.parameters(), *model.buffers()])


def _tensor_bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "tensor_data_names"):  # torchao's
        return sum(_tensor_bytes(getattr(tensor, name)) for name in tensor.tensor_data_names)
    # bitsandbytes'
    scales = getattr(tensor, "SCB", None), getattr(getattr(tensor, "quant_state", None), "absmax", None)
    own = tensor.numel() * tensor.element_size()
    return own + sum(_tensor_bytes(scale) for scale in scales if scale is not None)


def load_quantized(folder: Path, kind: str | None, device: str) -> PreTrainedModel:
    """The checkpoint in fp32, or as `kind` holds it."""
    settings = {"dtype": torch.float32} if kind is None else {"dtype": torch.bfloat16, **KINDS[kind][1]()}
    return InternVLChatForConditionalGeneration.from_pretrained(folder, device_map={"": device}, **settings).eval()


def accuracy_rows(options: Options) -> Iterator[Row]:
    """Right answers to the same held-out questions, and the bytes of the weights, of the bundled checkpoint."""
    processor = AutoProcessor.from_pretrained(BUNDLED)
    questions = held_out_questions(NUM_QUESTIONS)
    model = load_quantized(BUNDLED, None, options.device)
    exact, exact_bytes = evaluate_questions(model, processor, questions), held_bytes(model)
    for kind in KINDS:
        name = f"bundled checkpoint, {kind}"
        if (missing := _missing(kind)) is not None:
            yield Row(name, skipped=missing)
            continue
        model = load_quantized(BUNDLED, kind, options.device)
        report = evaluate_questions(model, processor, questions)
        details = {"accuracy": report["accuracy"], "accuracy_fp32": exact["accuracy"], "questions": len(questions)}
        yield Row(f"{name}: right answers, against fp32", report["accuracy"] / exact["accuracy"], details=details)
        details = {"bytes": held_bytes(model), "bytes_fp32": exact_bytes}
        yield Row(
            f"{name}: memory, against fp32", held_bytes(model) / exact_bytes, details=details, is_lower_better=True
        )


def write_decoder_heavy_model(folder: str) -> None:
    """A chat model that is nearly all decoder, with random weights."""
    torch.manual_seed(0)
    config = InternVLChatConfig(vision_config=VISION, text_config=DECODER, image_token_id=1, template="internvl2_5")
    InternVLChatForConditionalGeneration(config).save_pretrained(folder)


def decode_rows(options: Options) -> Iterator[Row]:
    """Memory and decode speed of the decoder-heavy model."""
    with tempfile.TemporaryDirectory() as folder:
        write_decoder_heavy_model(folder)
        exact = load_quantized(Path(folder), None, options.device)
        for kind in KINDS:
            name = f"0.3 B decoder, {kind}"
            if (missing := _missing(kind)) is not None:
                yield Row(name, skipped=missing)
                continue
            yield from _compare(
                name, load_quantized(Path(folder), kind, options.device), exact, options, is_16_bit=kind == "bf16"
            )


def _missing(kind: str) -> str | None:
    package = KINDS[kind][0]
    return None if find_spec(package) else f"{package} is not installed"


def _compare(
    name: str, model: PreTrainedModel, exact: PreTrainedModel, options: Options, is_16_bit: bool
) -> Iterator[Row]:
    ids = torch.randint(2, DECODER["vocab_size"], (1, 32), device=options.device)
    found, expected = (each(input_ids=ids).logits.float().flatten() for each in (model, exact))
    cosine = torch.cosine_similarity(found, expected, dim=0).item()
    if cosine < 0.9:
        raise SystemExit(f"{name}: the scores have a cosine of {cosine} with those of fp32: nothing to compare.")
    sizes = {"bytes": held_bytes(model), "bytes_fp32": held_bytes(exact)}
    yield Row(
        f"{name}: memory, against fp32",
        sizes["bytes"] / sizes["bytes_fp32"],
        target=None if is_16_bit else MEMORY_TARGET,
        is_lower_better=True,
        details={**sizes, "cosine_of_scores": cosine},
    )
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    generate = {
        key: partial(each.generate, input_ids=ids, **length) for key, each in (("ours", model), ("fp32", exact))
    }
    few = replace(options, rounds=min(options.rounds, 5))
    yield speed_row(f"{name}: decode speed, against fp32", generate["ours"], generate["fp32"], few, warmups=1)


@torch.no_grad()
def rows(options: Options) -> Iterator[Row]:
    """Accuracy, memory and speed of every kind of weights."""
    yield from accuracy_rows(options)
    yield from decode_rows(options)
