"""What a stage may start from: other kinds of models are refused in a sentence, narrow weights and other patches are
no obstacle.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoProcessor, LlamaConfig, LlamaForCausalLM

from internvl.evaluation.__main__ import main as evaluate
from internvl.export.__main__ import main as export
from internvl.kinds import SETTINGS_FILES, check_kind
from internvl.planning.__main__ import main as plan
from internvl.training.__main__ import main
from internvl.training.data.dialogues import DialogueCollator
from internvl.training.models.build import fit_image_sizes, set_dtypes
from internvl.training.models.parameter_groups import freeze_idle, idle_modules, lora_targets, train_parts
from internvl.training.recipes import stage1_small, stage2_small, stage3_small, with_steps

from . import tiny
from .fixtures_dialogues import llava
from .fixtures_pairs import sample, write_tar
from .fixtures_text import make_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory, root) -> dict[str, Path]:
    """A model of each kind, the bundled ones and a LLaMA, and data."""
    folder = tmp_path_factory.mktemp("kinds")
    tokenizer = make_tokenizer(special_tokens=("<|im_start|>", "<|im_end|>"))
    size = {"vocab_size": len(tokenizer), "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**size, num_hidden_layers=1)).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    write_tar(folder / "pairs.tar", [sample(number) for number in range(8)])
    (folder / "rows.jsonl").write_text(json.dumps(llava("what?", "a bus")) + "\n")
    bundled = {"chat": root, "InternVL-G": root / "internvl_g", "vision": root / "internvit"}
    return {**bundled, "llama": folder / "llama", "data": folder}


DOORS = {
    "stage1 --model": ("chat", "an InternVL-Chat model, but `--model` needs an InternVL-C"),
    "stage1 --llama": ("InternVL-G", "an InternVL-G .*, but `--llama` needs a LLaMA"),
    "stage2 --model": ("vision", "an InternViT vision tower, but `--model` needs an InternVL-C"),
    "stage2 --llama": ("chat", "an InternVL-Chat model, but `--llama` needs a LLaMA"),
    "retrieval --model": ("llama", "a LLaMA, but `--model` needs an InternVL-"),
    "stage3 --model": ("chat", "an InternVL-Chat model, but `--model` needs an InternVL-C"),
    "stage3 --decoder": ("chat", "an InternVL-Chat model, but `--decoder` needs a causal language model"),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_model_of_another_kind_is_one_line_at_every_door(door, folders, tmp_path, capsys):
    import re

    (command, option), (kind, message) = door.split(), DOORS[door]
    good = {"--model": folders["InternVL-G"], "--decoder": folders["llama"]}
    needed = {"stage1": (), "stage2": ("--model",), "retrieval": ("--model",), "stage3": ("--model", "--decoder")}
    options = {name: good[name] for name in needed[command]} | {option: folders[kind]}
    data = folders["data"] / ("rows.jsonl" if command == "stage3" else "pairs.tar")
    arguments = [command, "--data", data, "--output", tmp_path / "out", *(x for pair in options.items() for x in pair)]
    assert main([str(argument) for argument in arguments]) == 2
    errors = capsys.readouterr().err
    assert re.search(f"^error: {re.escape(str(folders[kind]))} holds {message}", errors, re.MULTILINE), errors
    assert not (tmp_path / "out").exists()


def test_validate_needs_a_chat_model_to_count_tokens_by(folders, capsys):
    assert main(["validate", str(folders["data"] / "rows.jsonl"), "--model", str(folders["InternVL-G"])]) == 2
    assert "but `--model` needs an InternVL-Chat model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "kind", "wanted"),
    [
        ("captioning", "chat", "an InternVL-G"),
        ("dialogue", "InternVL-G", "an InternVL-Chat"),
        ("zero_shot", "vision", "an InternVL-C"),
    ],
)
def test_evaluations_name_the_kind_they_need(task, kind, wanted, folders, capsys):
    assert evaluate([task, str(folders[kind])]) == 2
    assert f"but this evaluation needs {wanted}" in capsys.readouterr().err


READERS = {
    "stage1 --model": lambda model, data, out: main(["stage1", *data, "--output", out, "--model", model]),
    "stage1 --llama": lambda model, data, out: main(["stage1", *data, "--output", out, "--llama", model]),
    "zero_shot": lambda model, data, out: evaluate(["zero_shot", model]),
    "export": lambda model, data, out: export([model, out]),
    "memory": lambda model, data, out: plan(["memory", model]),
}
BROKEN = {"[]": "it holds list", "5": "it holds int", "{": "cannot be read", '{"a":' * 100_000: "cannot be read"}


@pytest.mark.parametrize("door", READERS)
def test_a_broken_configuration_is_one_line_at_every_door(door, folders, tmp_path, capsys):
    data = ["--data", str(folders["data"] / "pairs.tar")]
    for text, said in BROKEN.items():
        (tmp_path / "config.json").write_text(text)
        assert READERS[door](str(tmp_path), data, str(tmp_path / "out")) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        assert "config.json" in line
        assert said in line


@pytest.mark.parametrize("door", sorted(READERS.keys() - {"memory"}))  # which reads no weights
def test_weights_that_are_cut_off_are_one_line_at_every_door(door, folders, tmp_path, capsys):
    kind = "llama" if "llama" in door else "InternVL-G"
    model = shutil.copytree(folders[kind], tmp_path / "model")
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size // 2)
    data = ["--data", str(folders["data"] / "pairs.tar")]
    assert READERS[door](str(model), data, str(tmp_path / "out")) == 2
    assert "model.safetensors ends too early: copy or convert it again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", SETTINGS_FILES)
def test_broken_settings_of_a_processor_are_one_line_with_their_file(name, folders, tmp_path, capsys):
    shutil.copytree(folders["InternVL-G"], tmp_path, dirs_exist_ok=True)
    for text, said in BROKEN.items():
        (tmp_path / name).write_text(text)
        assert evaluate(["zero_shot", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert name in error
        assert said in error


def test_files_nested_too_deeply_are_one_line_whoever_reads_them(folders, tmp_path, capsys):
    shutil.copytree(folders["InternVL-G"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text('{"a":' * 100_000)
    assert evaluate(["zero_shot", str(tmp_path)]) == 2
    assert "error: " in capsys.readouterr().err


def test_others_own_language_models_are_not_refused_by_their_type(folders, tmp_path):
    config = json.loads((folders["llama"] / "config.json").read_text())
    check_kind(folders["llama"], "language", door="`--decoder`")
    for model_type, is_refused in (("vit", True), ("qwen2", False)):
        (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        if is_refused:
            with pytest.raises(ValueError, match="holds a model of type 'vit'"):
                check_kind(tmp_path, "language", door="`--decoder`")
        else:
            check_kind(tmp_path, "language", door="`--decoder`")


@pytest.mark.parametrize("command", ["stage1", "stage2", "stage3"])
def test_the_bundled_bfloat16_folder_trains_by_the_small_recipes(command, folders, tmp_path, capsys):
    """Its patches of 28 px do not fill the 98 px of stage 1 either."""
    data = folders["data"] / ("rows.jsonl" if command == "stage3" else "pairs.tar")
    options = ["--data", data, "--output", tmp_path / "out", "--model", folders["InternVL-G"]]
    options += ["--steps", 1, "--batch-size", 2]
    if command == "stage3":
        options += ["--decoder", folders["llama"]]
    assert main([str(option) for option in [command, *options]]) == 0, capsys.readouterr().err
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_processor.size["height"] == 112


def test_sizes_that_patches_do_not_fill_grow_to_the_next_that_they_do(folders, caplog):
    recipe = fit_image_sizes(stage1_small(), folders["InternVL-G"])
    assert [phase.image_size for phase in recipe.phases] == [112, 112]
    assert "has images of 112 px instead of 98" in caplog.text
    assert fit_image_sizes(stage1_small()) == stage1_small()
    odd = replace(stage3_small(), phases=tuple(replace(phase, image_size=140) for phase in stage3_small().phases))
    assert [phase.image_size for phase in fit_image_sizes(odd, folders["InternVL-G"]).phases] == [
        168,
        168,
    ]  # 6 patches, 3 tokens


def test_all_is_float32_unless_the_recipe_computes_under_autocast():
    recipe = with_steps(stage2_small(), 1)
    for use_bf16, wanted in ((False, {torch.float32}), (True, {torch.float32, torch.bfloat16})):
        model = tiny.internvl_model().bfloat16()
        set_dtypes(replace(recipe, use_bf16=use_bf16), model)
        assert {parameter.dtype for parameter in model.parameters()} == wanted


# ----------------------------------------------------------------------------------------------- blocks that never run
@pytest.mark.parametrize(
    ("select_layer", "connector", "idle"),
    [(-1, "patches", 0), (-2, "patches", 1), (1, "patches", None), (-2, "queries_and_patches", 0)],
)
def test_blocks_that_no_forward_runs_are_named_and_neither_trained_nor_adapted(select_layer, connector, idle):
    model = tiny.chat_model(select_layer=select_layer, connector=connector)
    depth = model.config.vision_config.num_hidden_layers
    names = idle_modules(model)
    assert len(names) == (depth - 1 if idle is None else idle)
    assert not [
        target for target in lora_targets(model, ["vision"]) if target.startswith(tuple(f"{n}." for n in names))
    ]
    assert train_parts(model, ["vision", "projector"]) == names
    # Under DistributedDataParallel each trained parameter must get a gradient.
    inputs = tiny.chat_inputs(model)
    model.train().gradient_checkpointing_enable()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None for gradient in trained.values())
    assert any(name.startswith("vision_model.encoder.layers.0") for name in trained)


def test_adapters_of_another_hand_on_idle_blocks_can_be_frozen():
    model = tiny.chat_model(select_layer=-2)
    last = model.config.vision_config.num_hidden_layers - 1
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    (name,) = freeze_idle(adapted)
    assert name.endswith(f"vision_model.encoder.layers.{last}")
    inputs = tiny.chat_inputs(model)
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    assert trained


def test_a_batch_without_a_label_is_refused_by_name():
    class Encoder:
        class processor:
            class tokenizer:
                pad_token_id = 0

    ids = torch.arange(3)
    nothing = {"input_ids": ids, "labels": torch.full((3,), -100)}
    something = {"input_ids": ids, "labels": ids}
    for pack in (False, True):
        collator = DialogueCollator(Encoder, pack)
        with pytest.raises(ValueError, match="None of the 2 rows of a batch has a label"):
            collator([nothing, nothing])
        assert (collator([nothing, something])["labels"] != -100).any()
