"""Whether the device computes what it should, before anything is timed."""

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from internvl import (
    InternVisionModel,
    InternViTConfig,
    InternVLChatConfig,
    InternVLChatForConditionalGeneration,
    InternVLConfig,
    InternVLModel,
)

from ..harness import Row
from .jobs import CUDA, Measurement, Need, Setting, library
from .models import build_random, compile_blocks, flash, noise


ROOT = Path(__file__).resolve().parents[2]
IMAGE_TOKEN_ID = 3
# Of the root of the mean square, where implementations round bf16 sums in other orders.
TOLERANCES = {torch.bfloat16: 0.02, torch.float32: 1e-4}
COMPILER_SECONDS = 90.0
GOLDENS = Need("the tests of a clone", lambda setting: (ROOT / "tests" / "test_goldens.py").is_file())

Call = Callable[[nn.Module], torch.Tensor]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over that of what is expected."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def agreement_row(name: str, run: Callable[[], torch.Tensor], expected: torch.Tensor) -> Row:
    """How far a result is from the one that is expected, within what its dtype allows."""
    return Row(name, ratio=relative_error(run(), expected), target=TOLERANCES[expected.dtype], is_lower_better=True)


def implementation_jobs(
    what: str, model: Any, call: Call, kernels: Iterable[str], changes: Callable[[nn.Module], None] | None = None
) -> Iterator[Measurement]:
    """A job for each way to run a model, against eager attention.

    Args:
        what: Names the model.
        model: The model.
        call: Computes the result that is compared.
        kernels: Of "sdpa", "flash" and "compiled".
        changes: Sets what random weights leave without effect.
    """
    if changes is not None:
        changes(model)
    model.set_attn_implementation("eager")
    expected = call(model)

    def run(kernel: str) -> torch.Tensor:
        model.set_attn_implementation("sdpa")
        with flash() if kernel == "flash" else nullcontext():
            return call(compile_blocks(model) if kernel == "compiled" else model)

    for kernel in kernels:
        name = f"{what}, {kernel}: relative error against eager"
        seconds = COMPILER_SECONDS if kernel == "compiled" else 30.0
        yield Measurement(name, partial(agreement_row, name, partial(run, kernel), expected), seconds)


def tower_jobs(setting: Setting) -> Iterator[Measurement]:
    """InternViT."""
    config = InternViTConfig(**setting.sizes.checked_vision)
    model = build_random(InternVisionModel, config, setting.options)
    tiles = noise(2, config.image_size, setting.options)
    yield from implementation_jobs(
        "InternViT", model, lambda model: model(tiles).last_hidden_state, ("sdpa", "flash", "compiled")
    )
    name = f"InternViT, {setting.options.dtype}: relative error against float32"
    exact = copy.deepcopy(model).float()(tiles.float()).last_hidden_state.to(setting.options.dtype)
    yield Measurement(name, partial(agreement_row, name, lambda: model(tiles).last_hidden_state, exact))


def let_images_in(model: nn.Module) -> None:
    """Fresh cross-attention adds nothing: gives it weights."""
    for layer in model.qllama.model.layers:
        if layer.cross_attn is not None:
            nn.init.normal_(layer.cross_attn.o_proj.weight, std=0.02)


def qllama_jobs(setting: Setting) -> Iterator[Measurement]:
    """InternVL-G: queries that read an image, and a text."""
    sizes = setting.sizes
    config = InternVLConfig(
        vision_config=sizes.checked_vision, qllama_config={**sizes.checked_text, "num_query_token": 8}
    )
    model = build_random(InternVLModel, config, setting.options)
    images = noise(2, config.vision_config.image_size, setting.options)
    ids = torch.arange(4, 20, device=setting.device)[None].expand(2, -1)

    def image_features(model: Any) -> torch.Tensor:
        return model.get_image_features(images, mode="InternVL-G")

    def text_features(model: Any) -> torch.Tensor:
        return model.get_text_features(ids, attention_mask=torch.ones_like(ids))

    kernels = ("sdpa", "compiled")
    yield from implementation_jobs("QLLaMA, queries of an image", model, image_features, kernels, let_images_in)
    yield from implementation_jobs("QLLaMA, a text", model, text_features, kernels)


def build_checked_chat(setting: Setting) -> Any:
    """A chat model in which implementations are compared."""
    sizes = setting.sizes
    config = InternVLChatConfig(
        vision_config=sizes.checked_vision,
        text_config={"model_type": "llama", "tie_word_embeddings": False, **sizes.checked_text},
        image_token_id=IMAGE_TOKEN_ID,
    )
    return build_random(InternVLChatForConditionalGeneration, config, setting.options)


def chat_inputs(model: Any, setting: Setting, missing: int = 0) -> dict[str, Any]:
    """A row of placeholders and 16 tokens of text, with one tile; `missing` placeholders are left out."""
    ids = torch.arange(4, 20, device=setting.device)[None]
    places = torch.full((1, model.num_image_token - missing), IMAGE_TOKEN_ID, device=setting.device)
    side = model.config.vision_config.image_size
    return {"input_ids": torch.cat([places, ids], dim=1), "pixel_values": noise(1, side, setting.options)}


def chat_jobs(setting: Setting) -> Iterator[Measurement]:
    """InternVL-Chat: logits after an image; a wrong number of placeholders; what makes the host wait."""
    model = build_checked_chat(setting)
    inputs = chat_inputs(model, setting)
    kernels = ("sdpa", "flash", "compiled")
    yield from implementation_jobs("chat", model, lambda model: model(**inputs).logits, kernels)
    name = "chat: placeholders that do not fit raise, and the device goes on"
    yield Measurement(name, partial(mismatch_row, name, model, setting))
    for what, call in waiting_calls(model, setting).items():
        name = f"{what}: the host does not wait for the device"
        yield Measurement(name, partial(waiting_row, name, call), needs=(CUDA,))


def mismatch_row(name: str, model: Any, setting: Setting) -> Row:
    """1 where too few placeholders are a `ValueError`, and the same forward works after it."""
    inputs = chat_inputs(model, setting)
    expected = model(**inputs).logits
    try:
        model(**chat_inputs(model, setting, missing=1))
    except ValueError as error:
        is_same = torch.equal(model(**inputs).logits, expected)
        return Row(name, ratio=float(is_same), target=1.0, details={"message": str(error)})
    return Row(name, ratio=0.0, target=1.0)


def waiting_calls(model: Any, setting: Setting) -> dict[str, Callable[[], Any]]:
    """Calls in which nothing may be read back. (A chat model counts the placeholders once, before the first layer.)"""
    inputs = chat_inputs(model, setting)
    cache = model(**inputs, use_cache=True).past_key_values
    token = inputs["input_ids"][:, -1:].clone()
    return {
        "tower": partial(model.vision_model, inputs["pixel_values"]),
        "features of tiles": partial(model.get_image_features, inputs["pixel_values"]),
        "a decoding step": partial(model, input_ids=token, past_key_values=cache),
    }


def waiting_row(name: str, call: Callable[[], Any]) -> Row:
    """1 where a call runs while every wait of the host is an error."""
    call()  # kernels are loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Row(name, ratio=1.0, target=1.0)


def golden_jobs(setting: Setting) -> Iterator[Measurement]:
    """The published code's outputs, by the project's own test, with models and inputs on the device."""
    name = "outputs of the published code, float32: share of the tests that pass"
    yield Measurement(name, partial(golden_row, name, setting), seconds=180.0, needs=(GOLDENS, library("pytest")))


def golden_row(name: str, setting: Setting) -> Row:
    """Runs tests/test_goldens.py in a process of its own."""
    env = os.environ | {"GOLDENS_DEVICE": setting.device}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_goldens.py"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    if done.returncode not in (0, 1):
        raise RuntimeError(last)
    counts = {outcome: int(count) for count, outcome in re.findall(r"(\d+) (passed|failed|error)", last)}
    return Row(name, ratio=counts.get("passed", 0) / sum(counts.values()), target=1.0, details={"summary": last})
