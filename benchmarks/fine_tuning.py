"""A step of fine-tuning a chat model, forward and backward, against TRL's `SFTTrainer` on transformers' own InternVL.

A decoder of the shape of Qwen2.5-0.5B with its whole vocabulary behind a narrow tower, which is frozen, as in
published fine-tuning. A row has an image of some tiles, a long prompt, and an answer: only the answer has labels, and
this package's trainer asks for logits nowhere else. Both trainers get the same weights and the same batch, and must
give the same loss. By default both compute activations again in the backward pass.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer

from internvl.layers_internvl import IGNORE_INDEX
from internvl.training.callbacks import KeepFrozenPartsWithoutGradient
from internvl.training.recipes.finetuning import FineTuning, finetuning_recipe
from internvl.training.trainer import CHECKPOINTING, Run, Stage, StageTrainer, training_arguments

from .harness import Options, Row, in_fresh_process, memory_growth, require_equal, sizes_of, speed_row
from .native import IMAGE_TOKEN_ID, build_pair


VISION = sizes_of(256, 1024, 2, 4, image_size=448, patch_size=14)
TEXT = sizes_of(896, 4864, 24, 14, vocab_size=151_936, num_key_value_heads=2)
TOKENS_PER_TILE = 256
TILES, TOKENS, ANSWER = 4, 2000, 200
TRAINED = ("projector", "language")
ADAPTED = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
# Whether adapters are trained or the whole decoder and projector, and whether activations are computed again.
CASES = {"LoRA": (True, True), "whole": (False, True), "whole, activations kept": (False, False)}
TARGETS = {"step": 1.0, "memory": 0.7}  # speed at least, memory at most
ROUNDS = 5
MISSING = "trl is not installed: pip install -e '.[dev]'"


def batch_for(model: Any) -> dict[str, torch.Tensor]:
    """A row (1, `TOKENS`): placeholders, a prompt of noise, and an answer with labels."""
    generator = torch.Generator().manual_seed(1)
    size, vocab_size = VISION["image_size"], model.config.get_text_config().vocab_size
    ids = torch.randint(IMAGE_TOKEN_ID + 1, vocab_size, (1, TOKENS), generator=generator)
    ids[:, 1 : 1 + TILES * TOKENS_PER_TILE] = IMAGE_TOKEN_ID
    labels = ids.clone()
    labels[:, :-ANSWER] = IGNORE_INDEX
    pixels = torch.randn(TILES, 3, size, size, generator=generator).to(model.dtype)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: value.to(model.device) for name, value in batch.items()}


def trainer_of_ours(model: Any, folder: str, recompute: bool) -> Trainer:
    """The trainer of `python -m internvl.training finetune`."""
    choice = FineTuning("dialogue", "whole", steps=1, batch_size=1, parts=TRAINED)
    recipe = finetuning_recipe(choice, model.config, 0)
    run = Run(Path(folder), arguments=arguments_of_both(model, recompute))
    stage = Stage(model, None, recipe, run, None)  # type: ignore[arg-type]  # batches are given as they are
    (model.get_base_model() if isinstance(model, PeftModel) else model).skips_unlabelled_logits = True
    arguments = training_arguments(recipe, recipe.phases[0], run)
    if recompute:  # as `Trainer.train` does it, which is not called here
        model.gradient_checkpointing_enable({"use_reentrant": False})
        KeepFrozenPartsWithoutGradient().on_train_begin(model=model)
    return StageTrainer(stage, recipe.phases[0], model=model, args=arguments)


def trainer_of_theirs(model: Any, folder: str, recompute: bool) -> Trainer:
    """TRL's trainer."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    arguments = SFTConfig(
        folder,
        per_device_train_batch_size=1,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
        **arguments_of_both(model, recompute),
    )
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = datasets.Dataset.from_list([{"input_ids": [1], "labels": [1]}])  # batches are given as they are
    return SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)


MAKERS = {"ours": trainer_of_ours, "theirs": trainer_of_theirs}


def arguments_of_both(model: Any, recompute: bool) -> dict[str, Any]:
    """What both trainers are told."""
    return {CHECKPOINTING: recompute, "bf16": False, "use_cpu": model.device.type == "cpu"}


def make_step(who: str, model: Any, folder: str, case: str) -> Callable[[], torch.Tensor]:
    """A step that leaves no gradient behind, and returns its loss."""
    has_adapters, recompute = CASES[case]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision" not in name)
    if has_adapters:
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=ADAPTED))
    trainer, batch = MAKERS[who](model, folder, recompute), batch_for(model)
    if model.is_gradient_checkpointing != recompute:
        raise SystemExit(f"Activations of `{who}` are kept or recomputed against the arguments: nothing to compare.")
    trainer.current_gradient_accumulation_steps = 1

    def step() -> torch.Tensor:
        loss = trainer.training_step(model, dict(batch))
        model.zero_grad(set_to_none=True)
        return loss

    return step


def step_bytes(who: str, device: str, case: str) -> int:
    """What a step takes beside the weights."""
    model = dict(zip(MAKERS, build_pair(VISION, TEXT, Options(device)), strict=True))[who]
    for parameter in model.parameters():  # weights of a file are resident only when they were read
        parameter.sum()
    with tempfile.TemporaryDirectory() as folder:
        return memory_growth(make_step(who, model, folder, case), device)


def rows(options: Options) -> Iterator[Row]:
    """Time and memory of a step."""
    if importlib.util.find_spec("trl") is None:
        yield Row("fine-tuning against TRL", skipped=MISSING)
        return
    title = f"fine-tuning, a row of {TOKENS} tokens with {TILES} tiles, answer of {ANSWER}, against TRL on native"
    for case in CASES:
        name = f"{title}, {case}"
        pair = dict(zip(MAKERS, build_pair(VISION, TEXT, options), strict=True))
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = (make_step(who, model, folder, case) for who, model in pair.items())
            require_equal(ours(), theirs())
            yield speed_row(f"{name}: step", ours, theirs, options.at_most(ROUNDS), target=TARGETS["step"], warmups=1)
        del pair, ours, theirs
        taken = {who: in_fresh_process(step_bytes, who, options.device, case) for who in MAKERS}
        yield Row(
            f"{name}: peak memory beside weights",
            ratio=taken["ours"] / taken["theirs"],
            target=TARGETS["memory"],
            is_lower_better=True,
            details={"bytes": taken},
        )
