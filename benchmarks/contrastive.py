"""The contrastive objectives against open_clip's losses: same features, same model, step time and peak memory.

Ours are InfoNCE and the sigmoid loss of `internvl.training.models.losses`, whole and a few rows at a time; theirs
`ClipLoss` and `SigLipLoss` as one process has them. Losses and gradients are compared first. The model is that of the
recipe `stage1_small`; with gradient caching it keeps the activations of a few pairs only, which open_clip's loss
cannot do without a training loop of its own.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import torch

from internvl import InternVLConfig
from internvl.training.models.losses import info_nce_loss, sigmoid_loss
from internvl.training.models.pretraining import InternVLForContrastiveTraining
from internvl.training.recipes import stage1_small

from .harness import Options, Row, in_fresh_process, memory_growth, speed_row


WIDTH = 768  # of the embeddings of InternVL-C
BATCHES = (1024, 4096)
ROWS_AT_A_TIME = 256
MODEL_BATCH = 64
MODEL_ROWS_AT_A_TIME = 8
MISSING = "open_clip is not installed: `pip install --no-deps open_clip_torch`"
SCALE, BIAS = 14.3, -10.0

Loss = Callable[..., torch.Tensor]
Step = Callable[[], torch.Tensor]


def open_clip_losses() -> ModuleType:
    """open_clip's file of losses alone: its package would import torchvision and timm as well.

    Raises:
        ImportError: open_clip is not installed.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ImportError(MISSING)
    module = ModuleType("open_clip_loss")
    SourceFileLoader(module.__name__, str(Path(package.origin).with_name("loss.py"))).exec_module(module)
    return module


def losses(rows_at_a_time: int | None, theirs: ModuleType) -> dict[str, tuple[Loss, Loss]]:
    """Ours and theirs by objective: both of image embeddings (B, E), text embeddings (B, E), factor and bias."""
    clip, siglip = theirs.ClipLoss(), theirs.SigLipLoss()
    return {
        "softmax": (
            lambda images, texts, scale, bias: info_nce_loss(images, texts, scale, chunk_size=rows_at_a_time),
            lambda images, texts, scale, bias: clip(images, texts, scale),
        ),
        "sigmoid": (partial(sigmoid_loss, chunk_size=rows_at_a_time), siglip),
    }


def features(batch: int, device: str) -> list[torch.Tensor]:
    """Image and text embeddings of unit length, in pairs a little alike, a factor and a bias: all with gradients."""
    torch.manual_seed(0)
    images = torch.randn(batch, WIDTH)
    texts = images + 3 * torch.randn(batch, WIDTH)
    embeds = [torch.nn.functional.normalize(rows, dim=1) for rows in (images, texts)]
    return [tensor.to(device).requires_grad_() for tensor in (*embeds, torch.tensor(SCALE), torch.tensor(BIAS))]


def step(loss: Step, parameters: list[torch.Tensor]) -> torch.Tensor:
    """Forward and backward, into fresh gradients."""
    for parameter in parameters:
        parameter.grad = None
    value = loss()
    value.backward()
    return value.detach()


def difference_of_losses(ours: Step, theirs: Step, parameters: list) -> float:
    """Differences of losses, and of gradients relative to the largest: some, as of key biases, are only rounding."""
    found = step(ours, parameters)
    gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
    difference = ((step(theirs, parameters) - found) / found).abs().item()
    largest = max(p.grad.abs().max() for p in parameters if p.grad is not None)
    for gradient, parameter in zip(gradients, parameters, strict=True):
        if gradient is None or parameter.grad is None:
            if gradient is not parameter.grad:
                raise SystemExit("One of the losses has a gradient that the other lacks: nothing to compare.")
            continue
        difference = max(difference, ((gradient - parameter.grad).abs().max() / largest).item())
    if difference > 1e-4:
        raise SystemExit(f"Losses or gradients differ by {difference}: nothing to compare.")
    return difference


def model_of(rows_at_a_time: int | None, device: str) -> InternVLForContrastiveTraining:
    """The model of `stage1_small`, without anything random."""
    recipe = stage1_small()
    torch.manual_seed(0)
    config = InternVLConfig(
        vision_config=dict(recipe.vision_config),
        qllama_config={**recipe.text_config, "vocab_size": 1000},
        num_query_token=0,
        **recipe.model_config,
    )
    return InternVLForContrastiveTraining(config, grad_cache_chunk_size=rows_at_a_time).train().to(device)


def batch_of(batch: int, device: str) -> dict[str, torch.Tensor]:
    """Images and texts of the recipe's sizes."""
    recipe = stage1_small()
    side, length = recipe.phases[-1].image_size, recipe.max_text_length
    torch.manual_seed(0)
    return {
        "pixel_values": torch.randn(batch, 3, side, side).to(device),
        "input_ids": torch.randint(3, 1000, (batch, length)).to(device),
    }


def model_losses(
    model: InternVLForContrastiveTraining, inputs: dict[str, torch.Tensor], theirs: ModuleType
) -> tuple[Step, Step]:
    """The model's own loss, and open_clip's on the features that the same model gives as a whole batch."""
    clip = theirs.ClipLoss()

    def open_clip_loss() -> torch.Tensor:
        rows, model.grad_cache_chunk_size = model.grad_cache_chunk_size, None
        outputs = model(**inputs, return_loss=False)
        model.grad_cache_chunk_size = rows
        return clip(outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp())

    return lambda: model(**inputs).loss, open_clip_loss


def cases(device: str) -> dict[str, Callable[[int, ModuleType], Step]]:
    """What a fresh process measures, by name: given the batch, one step."""

    def of_loss(objective: str, rows: int | None, is_theirs: bool, batch: int, theirs: ModuleType) -> Step:
        inputs = features(batch, device)
        function = losses(rows, theirs)[objective][is_theirs]
        return partial(step, partial(function, *inputs), inputs)

    def of_model(rows: int | None, is_theirs: bool, batch: int, theirs: ModuleType) -> Step:
        model = model_of(rows, device)
        function = model_losses(model, batch_of(batch, device), theirs)[is_theirs]
        return partial(step, function, list(model.parameters()))

    found: dict[str, Callable[[int, ModuleType], Step]] = {}
    for who, rows in ways(MODEL_ROWS_AT_A_TIME):
        found[f"model-{who}"] = partial(of_model, rows, who == "theirs")
    for objective in ("softmax", "sigmoid"):
        for who, rows in ways(ROWS_AT_A_TIME):
            found[f"{objective}-{who}"] = partial(of_loss, objective, rows, who == "theirs")
    return found


def ways(rows_at_a_time: int) -> tuple[tuple[str, int | None], ...]:
    """Who computes, and how many rows at a time."""
    return ("theirs", None), ("whole", None), ("chunks", rows_at_a_time)


def added_memory(case: str, batch: int, device: str) -> int:
    """Bytes that one step of a case needs at its most, beside weights and inputs."""
    theirs = open_clip_losses()
    cases(device)[case](8, theirs)()  # for what libraries load
    return memory_growth(cases(device)[case](batch, theirs), device)


def memory_row(name: str, case: str, peer: str, batch: int, options: Options) -> Row:
    """Ours over theirs, each in a process of its own."""
    found = {key: in_fresh_process(added_memory, key, batch, options.device) for key in (case, peer)}
    details = {"bytes": {"ours": found[case], "peer": found[peer]}}
    return Row(name, ratio=found[case] / found[peer], is_lower_better=True, details=details)


def loss_rows(options: Options, theirs: ModuleType) -> Iterator[Row]:
    """The losses alone, on features."""
    for objective, batch in ((objective, batch) for objective in ("softmax", "sigmoid") for batch in BATCHES):
        for who, rows_at_a_time in ways(ROWS_AT_A_TIME)[1:]:
            inputs = features(batch, options.device)
            ours, peer = (partial(function, *inputs) for function in losses(rows_at_a_time, theirs)[objective])
            difference = difference_of_losses(ours, peer, inputs)
            manner = "whole" if rows_at_a_time is None else f"{rows_at_a_time} rows at a time"
            name = f"{objective} loss, {batch} x {WIDTH}, {manner}, against open_clip"
            steps = partial(step, ours, inputs), partial(step, peer, inputs)
            yield speed_row(f"{name}: step", *steps, options=options, largest_difference=difference)
            yield memory_row(f"{name}: peak memory", f"{objective}-{who}", f"{objective}-theirs", batch, options)


def model_rows(options: Options, theirs: ModuleType) -> Iterator[Row]:
    """Steps of a small model of two towers."""
    for who, rows_at_a_time in ways(MODEL_ROWS_AT_A_TIME)[1:]:
        model = model_of(rows_at_a_time, options.device)
        parameters = list(model.parameters())
        ours, peer = model_losses(model, batch_of(MODEL_BATCH, options.device), theirs)
        difference = difference_of_losses(ours, peer, parameters)
        manner = "whole" if rows_at_a_time is None else f"gradient caching by {rows_at_a_time}"
        name = f"stage 1 small, {MODEL_BATCH} pairs, {manner}, against open_clip's loss"
        steps = partial(step, ours, parameters), partial(step, peer, parameters)
        yield speed_row(f"{name}: step", *steps, options=options, largest_difference=difference)
        yield memory_row(f"{name}: peak memory", f"model-{who}", "model-theirs", MODEL_BATCH, options)


def rows(options: Options) -> Iterator[Row]:
    """All of them, or one line that says what is missing."""
    try:
        theirs = open_clip_losses()
    except ImportError as error:
        yield Row("contrastive losses against open_clip", skipped=str(error))
        return
    yield from loss_rows(options, theirs)
    yield from model_rows(options, theirs)
