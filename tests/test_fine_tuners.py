"""Fine-tuners that others made: LoRA adapters of PEFT, gradient checkpointing, TRL, on rows with unequal numbers of
tiles.

Saved folders are loaded by a process of its own, from another place, without this package.
"""

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import Trainer, TrainingArguments

from internvl.modeling_internvl_chat import InternVLChatForConditionalGeneration
from internvl.training.data.dialogues import DialogueCollator, DialogueDataset, DialogueEncoder

from . import engine_jobs
from .engine_jobs import CONNECTORS
from .fixtures_processes import run_elsewhere


NEEDS_TRL = "TRL needs Python 3.11"
TARGETS = r"(vision_model|qllama|language_model)\..*\.(qkv|q_proj|v_proj|fc1|down_proj)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fine_tuners")
    engine_jobs.write_data(folder)
    return folder


def batch_of(folder, connector: str) -> dict[str, torch.Tensor]:
    """Four rows: one tile, four and one, none, four."""
    encoder = DialogueEncoder(engine_jobs.make_processor(connector))
    rows = DialogueDataset(folder / "rows.jsonl", encoder)
    return DialogueCollator(encoder)([rows[index] for index in range(4)])


def adapted(folder, connector: str) -> PeftModel:
    """The chat model of the folder with adapters that are not zero."""
    model = InternVLChatForConditionalGeneration.from_pretrained(folder / connector)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("connector", CONNECTORS)
def test_adapters_save_load_and_merge(folder, connector, tmp_path):
    model, batch = adapted(folder, connector).eval(), batch_of(folder, connector)
    parts = {name.split(".")[2] for name, _ in model.named_parameters() if "lora_" in name}
    assert parts == {"vision_model", "language_model"} | ({"qllama"} if connector != "patches" else set())
    with torch.no_grad():
        expected = model(**batch).logits
        with model.disable_adapter():
            assert not torch.allclose(model(**batch).logits, expected, atol=1e-2)
        model.save_pretrained(tmp_path)
        assert not (tmp_path / "model.safetensors").exists()
        start = InternVLChatForConditionalGeneration.from_pretrained(folder / connector)
        loaded = PeftModel.from_pretrained(start, tmp_path).eval()
        torch.testing.assert_close(loaded(**batch).logits, expected, atol=0, rtol=0)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-4, rtol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        again = InternVLChatForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(again(**batch).logits, expected, atol=1e-4, rtol=1e-4)


FROZEN = {
    "vision tower": ("vision_model",),
    "decoder": ("language_model",),
    "all but the bridge": ("vision_model", "qllama", "language_model"),
    "all but adapters": (),
}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("connector", CONNECTORS)
def test_checkpointing_gives_the_gradients_of_the_plain_run(folder, connector, frozen, use_reentrant):
    batch = batch_of(folder, connector)
    gradients = []
    for checkpointed in (False, True):
        model = InternVLChatForConditionalGeneration.from_pretrained(folder / connector)
        if frozen == "all but adapters":
            model = adapted(folder, connector)
        for part in FROZEN[frozen]:
            for name, parameter in model.named_parameters():
                if name.startswith(part):
                    parameter.requires_grad_(False)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            if use_reentrant:
                model.enable_input_require_grads()
            assert model.is_gradient_checkpointing
        model.train()
        loss = model(**batch).loss
        loss.backward()
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert trained
        assert found.keys() <= trained
        gradients.append({"loss": loss.detach(), **found})
    plain, checkpointed = gradients
    assert checkpointed.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, atol=1e-6, rtol=1e-5, msg=name)


RELOAD = """
import sys
sys.modules["internvl"] = None  # the installed package must not help: an attempt to import it fails
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, row = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
messages = [{"role": "user", "content": [{"type": "image", "image": row}, {"type": "text", "text": "What?"}]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    torch.save(model(**inputs).logits, folder + "/logits.pt")
"""


def test_what_trainer_saves_loads_anywhere(folder, tmp_path):
    trainer = engine_jobs.chat_trainer(folder, "saved", max_steps=1, save_strategy="no")
    processor = trainer.processing_class = engine_jobs.make_processor()
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    moved = (tmp_path / "saved").rename(tmp_path / "elsewhere")
    content = [{"type": "image", "image": str(folder / "b.png")}, {"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    assert len(inputs["pixel_values"]) == 4
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).logits
    run_elsewhere(tmp_path, "-c", RELOAD, moved, folder / "b.png")
    torch.testing.assert_close(torch.load(moved / "logits.pt"), expected)


QUESTION = {"role": "user", "content": "What is shown?"}


def images(folder) -> list[list[Image.Image]]:
    """Of rows as TRL takes them: one, five, four and two tiles."""
    return [[Image.open(folder / f"{name}.png") for name in names] for names in ("a", "ba", "b", "aa")]


def conversations(folder) -> list[dict]:
    rows = []
    for number, shown in enumerate(images(folder)):
        answer = "A red bus on a street."[: 8 + number]
        rows.append({"messages": [QUESTION, {"role": "assistant", "content": answer}], "images": shown})
    return rows


def preferences(folder) -> list[dict]:
    answers = {"chosen": "A red bus on a street.", "rejected": "A cat."}
    said = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    return [{"prompt": [QUESTION], **said, "images": shown} for shown in images(folder)]


SETTINGS = {
    "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none",
    "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "remove_unused_columns": False,
}  # fmt: skip


def assert_learns(trainer: Trainer, folder) -> None:
    """The loss falls, and the folder of the adapters has what a processor is loaded from."""
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.95 * losses[0]
    trainer.save_model(str(folder))
    assert (folder / "adapter_model.safetensors").exists()
    assert (folder / "chat_template.jinja").exists()


def test_batches_of_trl_train_adapters_under_stock_trainer(folder, tmp_path):
    sft = pytest.importorskip("trl.trainer.sft_trainer", reason=NEEDS_TRL)
    processor = engine_jobs.make_processor()
    trainer = Trainer(
        adapted(folder, "patches"),
        TrainingArguments(str(tmp_path), **SETTINGS),
        data_collator=sft.DataCollatorForVisionLanguageModeling(processor),
        train_dataset=datasets.Dataset.from_list(conversations(folder)),
        processing_class=processor,
    )
    assert_learns(trainer, tmp_path / "adapters")


def trl_parts(folder, rows: list[dict]) -> dict:
    """What each of TRL's trainers takes."""
    return {
        "model": InternVLChatForConditionalGeneration.from_pretrained(folder / "patches"),
        "train_dataset": datasets.Dataset.from_list(rows),
        "processing_class": engine_jobs.make_processor(),
        "peft_config": LoraConfig(r=4, target_modules=TARGETS),
    }


def test_sft_trainer_trains_adapters(folder, tmp_path):
    trl = pytest.importorskip("trl", reason=NEEDS_TRL)
    arguments = trl.SFTConfig(str(tmp_path), max_length=None, bf16=False, **SETTINGS)
    assert_learns(trl.SFTTrainer(args=arguments, **trl_parts(folder, conversations(folder))), tmp_path / "adapters")


def test_dpo_trainer_trains_adapters(folder, tmp_path):
    trl = pytest.importorskip("trl", reason=NEEDS_TRL)
    arguments = trl.DPOConfig(str(tmp_path), max_length=None, bf16=False, **SETTINGS)
    assert_learns(trl.DPOTrainer(args=arguments, **trl_parts(folder, preferences(folder))), tmp_path / "adapters")


def test_grpo_trainer_trains_adapters(folder, tmp_path):
    trl = pytest.importorskip("trl", reason=NEEDS_TRL)
    arguments = trl.GRPOConfig(str(tmp_path), max_completion_length=8, num_generations=2, bf16=False, **SETTINGS)
    prompts = [{key: row[key] for key in ("prompt", "images")} for row in preferences(folder)]
    trainer = trl.GRPOTrainer(
        reward_funcs=lambda completions, **_: [float(len({*each[0]["content"]})) for each in completions],
        args=arguments,
        **trl_parts(folder, prompts),
    )
    trainer.train()
    # These matrices start at zero.
    moved = {name for name, value in trainer.model.named_parameters() if "lora_B" in name and value.abs().max() > 0}
    assert {name.split(".")[2] for name in moved} == {"vision_model", "language_model"}
