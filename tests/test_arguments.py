"""Flags of `TrainingArguments` on the command line of a stage: what they change, what is refused, what a resumed run
is held to.
"""

import argparse
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from internvl.kinds import HUB_SECONDS, check_folder
from internvl.training import arguments, stage_command, trainer
from internvl.training.__main__ import main
from internvl.training.arguments import RANGES, REFUSED, apply_flags, parse_flags
from internvl.training.commands import part_and_rate, training_parser, with_hyphens
from internvl.training.models.build import check_whole_patches
from internvl.training.recipes import stage1_bundled, stage1_small, stage2_small, stage3_small
from internvl.training.trainer import CHECKPOINTING, Run, Stage, StageTrainer, training_arguments

from .tiny import internvl_model


ROOT = Path(__file__).resolve().parents[1]


def flags(*words: str) -> dict:
    return parse_flags(words, "training")


def applied(tmp_path, *words: str, recipe=None):
    return apply_flags(stage2_small() if recipe is None else recipe, Run(tmp_path), flags(*words))


def test_only_what_is_given_is_parsed_and_both_spellings_are_one():
    assert flags() == {}
    given = {"learning_rate": 1e-3, "torch_compile": True, "report_to": "tensorboard"}
    assert flags("--learning-rate", "1e-3", "--torch_compile", "--report-to", "tensorboard") == given
    assert flags("--learning_rate", "1e-3") == flags("--learning-rate", "1e-3")


def test_every_field_of_training_arguments_is_parsed_or_refused_by_name():
    for name, field in TrainingArguments.__dataclass_fields__.items():
        value = {int: "1", "int": "1", float: "0.5", "float": "0.5"}.get(field.type)
        if name in REFUSED:
            with pytest.raises(ValueError, match=f"`--{name.replace('_', '-')}` is not for a stage: "):
                flags(f"--{name}", value or ("end" if name == "hub_strategy" else "True"))
        elif value:
            assert flags(f"--{name}", value).keys() == {name}


def test_numbers_of_a_recipe_are_changed_in_it_and_the_rest_goes_to_the_trainer(tmp_path):
    recipe, run = applied(
        tmp_path, "--weight-decay", "0.3", "--adam-beta2", "0.9", "--logging-steps", "7", "--bf16", "True",
        "--lr-scheduler-type", "linear", "--dataloader-num-workers", "3", "--warmup-steps", "0.5",
    )  # fmt: skip
    assert (recipe.weight_decay, recipe.betas, recipe.logging_steps, recipe.use_bf16) == (0.3, (0.9, 0.9), 7, True)
    assert recipe.phases[0].warmup_steps == recipe.phases[0].steps // 2
    assert (run.num_workers, dict(run.arguments)) == (3, {"lr_scheduler_type": "linear"})
    settings = training_arguments(recipe, recipe.phases[0], run)
    assert settings.lr_scheduler_type == "linear"
    assert (settings.adam_beta2, settings.dataloader_num_workers, settings.logging_steps) == (0.9, 3, 7)


def test_checkpointing_of_activations_is_one_setting_under_both_its_names_and_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for name in ("gradient_checkpointing", CHECKPOINTING):
            recipe, run = applied(tmp_path, f"--{name}", "True")
            assert recipe.gradient_checkpointing
            assert not run.arguments
            assert training_arguments(recipe, recipe.phases[0], run).gradient_checkpointing


def test_a_learning_rate_scales_those_of_all_parts(tmp_path):
    before = stage1_small()
    recipe, _ = applied(tmp_path, "--learning-rate", "1e-2", recipe=before)
    for old, new in zip(before.phases, recipe.phases, strict=True):
        assert max(new.learning_rates.values()) == pytest.approx(1e-2)
        ratios = {new.learning_rates[part] / rate for part, rate in old.learning_rates.items()}
        assert max(ratios) == pytest.approx(min(ratios))


def test_single_parts_have_rates_of_their_own_and_others_keep_theirs(tmp_path):
    before, run = stage1_small(), Run(tmp_path)
    rates = [
        training_parser().parse_args(["stage1", "--output", "o", "--learning-rates", "vision=3e-4"]).learning_rates
    ]
    recipe, _ = apply_flags(before, run, {}, *rates)
    for old, new in zip(before.phases, recipe.phases, strict=True):
        assert new.learning_rates == {**old.learning_rates, "vision": 3e-4}
    with pytest.raises(ValueError, match="No phase trains language, only vision, pooling"):
        apply_flags(before, run, {}, [("language", 1e-3)])
    for wrong in ("tower=1", "vision", "vision=fast", "vision=nan", "vision=inf", "vision=-1"):
        with pytest.raises(SystemExit, match="2"):
            training_parser().parse_args(["stage1", "--output", "o", "--learning-rates", wrong])


def test_a_batch_per_device_with_accumulation_is_the_batch_of_the_recipe(tmp_path, monkeypatch):
    for module in (arguments, trainer):
        monkeypatch.setattr(module, "num_processes", lambda: 2)
    words = ("--per-device-train-batch-size", "3", "--gradient-accumulation-steps", "4")
    recipe, run = applied(tmp_path, *words, recipe=stage3_small())
    assert {phase.batch_size for phase in recipe.phases} == {24}
    settings = training_arguments(recipe, recipe.phases[0], run)
    assert (settings.per_device_train_batch_size, settings.gradient_accumulation_steps) == (3, 4)


def test_the_steps_of_a_learning_curve_are_the_recipes(tmp_path):
    recipe, run = applied(tmp_path, "--eval-steps", "5", recipe=stage1_bundled())
    assert (recipe.eval_steps, dict(run.arguments)) == (5, {})
    held_out = Run(tmp_path, eval_data=("rows.jsonl",))
    recipe, run = apply_flags(stage2_small(), held_out, flags("--eval-steps", "5"))
    assert (recipe.eval_steps, dict(run.arguments)) == (None, {"eval_steps": 5, "eval_strategy": "steps"})


def test_a_scheduler_that_is_asked_for_replaces_a_cooldown(tmp_path):
    recipe, run = applied(tmp_path, "--lr-scheduler-type", "linear", recipe=stage1_bundled())
    phase = recipe.phases[0]
    assert phase.cooldown_fraction is not None
    assert training_arguments(recipe, phase, run).lr_scheduler_kwargs is None
    assert training_arguments(recipe, phase, Run(tmp_path)).lr_scheduler_type == "warmup_stable_decay"


@pytest.mark.parametrize("name", RANGES)
def test_numbers_out_of_range_are_named_as_they_were_given(name):
    is_whole = "int" in str(TrainingArguments.__dataclass_fields__[name].type)
    for value in ("-3",) if is_whole else ("-3.0", "nan", "inf"):
        with pytest.raises(ValueError, match=f"`--{name.replace('_', '-')}` must be a number .*, got {value}"):
            flags(f"--{name}", value)


TOGETHER = {
    "--fp16 --bf16": "exclude each other",
    "--fp16 --use-cpu": "needs a GPU",
    "--eval-steps 2": "`--eval-steps` needs held-out data: give files by `--eval-data`",
    "--eval-strategy epoch": "`--eval-strategy` needs held-out",
    "--eval-on-start": "`--eval-on-start` needs held-out",
    "--metric-for-best-model loss": "`--metric-for-best-model` needs held-out",
    "--save-strategy best": "`--save-strategy` needs held-out",
}


@pytest.mark.parametrize("words", TOGETHER)
def test_flags_that_do_not_go_together_say_so(tmp_path, words):
    with pytest.raises(ValueError, match=TOGETHER[words]):
        applied(tmp_path, *words.split())


def test_a_run_in_which_nothing_learns_is_refused(tmp_path):
    trained = dict.fromkeys(stage1_small().phases[0].learning_rates, 0.0)
    with pytest.raises(ValueError, match=r"learning rates of phase .* are 0"):
        apply_flags(stage1_small(), Run(tmp_path), {}, trained.items())


@pytest.mark.parametrize("name", ["cp_size", "sp_size", "tp_size"])
def test_a_launcher_that_would_split_rows_is_refused(name, monkeypatch, tmp_path):
    recipe = stage1_small()
    training_arguments(recipe, recipe.phases[0], Run(tmp_path))
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", "2")
    with pytest.raises(ValueError, match=f"`--parallelism_config_{name} 2`: .* is not for these models"):
        training_arguments(recipe, recipe.phases[0], Run(tmp_path))


def test_flags_that_are_refused_may_be_false():
    assert flags("--push-to-hub", "False", "--do-eval", "False") == {}


def test_flags_with_underscores_are_those_with_hyphens_and_values_stay():
    words = ["finetune", "--batch_size", "4", "--eval_data=a_b.json", "c_d", "--no_such=x_y"]
    assert with_hyphens(words) == ["finetune", "--batch-size", "4", "--eval-data=a_b.json", "c_d", "--no-such=x_y"]


def trainer_for(tmp_path, *words: str, **settings) -> StageTrainer:
    recipe, run = applied(tmp_path, *words)
    model = internvl_model()
    phase = replace(recipe.phases[0], learning_rates={"queries": 1e-3, "query_heads": 1e-4})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("query_tokens", "itm_head")))
    stage = Stage(model, None, recipe, run, None, curve=settings.pop("curve", None))
    return StageTrainer(stage, phase, model=model, args=training_arguments(recipe, phase, run), **settings)


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("rmsprop", torch.optim.RMSprop)])
def test_an_optimizer_that_is_asked_for_gets_the_rates_of_the_parts(tmp_path, name, kind):
    optimizer = trainer_for(tmp_path, "--optim", name).create_optimizer()
    assert type(optimizer) is kind
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3, 1e-4}
    assert type(trainer_for(tmp_path).create_optimizer()) is torch.optim.AdamW


def test_an_optimizer_that_chooses_its_parameters_or_lacks_its_library_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"`optim` .*: .*galore"):
        trainer_for(tmp_path, "--optim", "galore_adamw").create_optimizer()
    chooses = (torch.optim.AdamW, {"params": []})
    monkeypatch.setattr(StageTrainer, "get_optimizer_cls_and_kwargs", lambda *_: chooses)
    with pytest.raises(ValueError, match="chooses parameters itself"):
        trainer_for(tmp_path).create_optimizer()


def test_a_learning_curve_and_held_out_data_are_both_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "evaluate", lambda self: {"eval_loss": 2.0})
    curve = {"zero_shot": 0.5}
    for dataset, expected in ((None, curve), ([0], {**curve, "eval_loss": 2.0})):
        stage_trainer = trainer_for(tmp_path, curve=lambda model: dict(curve), eval_dataset=dataset)
        assert stage_trainer.evaluate() == {**expected, "epoch": 0}
        assert stage_trainer.state.log_history[-1]["zero_shot"] == 0.5


def test_an_interrupted_stage_says_how_to_go_on_in_one_line(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stage_command, "run", interrupted)
    assert main(["stage1", "--output", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == (
        "stopped: the same command with `--resume` goes on from the last checkpoint, if any.\n"
    )


def test_a_resumed_run_is_held_to_flags_that_decide_about_weights_and_to_no_others(tmp_path):
    deciding = ("--lr-scheduler-type", "linear", "--data-seed", "3")
    _, run = applied(tmp_path, *deciding, "--report-to", "tensorboard", "--run-name", "a")
    assert run.settings()["arguments"] == {"lr_scheduler_type": "linear", "data_seed": 3}


def test_unknown_flags_end_the_command_before_anything_is_loaded(tmp_path, capsys):
    for words in (["validate", "x.json", "--learning-rate", "1"], ["funnel", "x.tar", "--no-such-flag"]):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        assert "unrecognized arguments" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["stage1", "--output", str(tmp_path / "out"), "--learning-rat", "1"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 3
    assert "unrecognized arguments: --learning-rat 1" in lines[-1]
    assert main(["stage1", "--output", str(tmp_path / "out"), "--batch_size", "4", "--learning_rate", "nan"]) == 2
    assert "error: `--learning-rate` must be a number above 0" in capsys.readouterr().err
    assert main(["stage1", "--output", str(tmp_path / "out"), "--output-dir", "b"]) == 2
    assert "give `--output`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------ slips, told before a model loads
def test_rates_that_no_optimizer_can_take_are_refused():
    for name in ("--learning-rate", "--weight-decay"):
        with pytest.raises(ValueError, match=f"`{name}` must be a number .* 100"):
            flags(name, "1e38")
    with pytest.raises(argparse.ArgumentTypeError, match="from 0 to 100"):
        part_and_rate("vision=1e38")
    assert part_and_rate("vision=0.5") == ("vision", 0.5)


@pytest.mark.parametrize("text", ["nonsense", "momentum=", "=3", "momentum=0.9,x", "0.9"])
def test_settings_of_the_optimizer_are_names_with_values(text):
    with pytest.raises(ValueError, match=r"`--optim-args` must be NAME=VALUE"):
        flags("--optim-args", text)
    assert flags("--optim-args", "momentum=0.9, nesterov=True") == {"optim_args": "momentum=0.9, nesterov=True"}


@pytest.mark.parametrize("command", ["finetune", "retrieval", "captions"])
def test_an_image_size_that_patches_do_not_fill_is_refused_with_the_next_ones(command, tmp_path, capsys):
    words = ["--model", str(ROOT / "internvl_g"), "--data", "x.jsonl", "--output", str(tmp_path / "out")]
    assert main([command, *words, "--image-size", "225"]) == 2
    error = capsys.readouterr().err
    assert "`--image-size 225` is no multiple of the model's 28 px: give 224 or 252." in error, error
    chat = SimpleNamespace(vision_config=SimpleNamespace(patch_size=14), downsample_ratio=0.5)
    check_whole_patches(56, chat)
    with pytest.raises(ValueError, match="give 28 or 56"):
        check_whole_patches(42, chat)
    with pytest.raises(ValueError, match="give 28"):
        check_whole_patches(7, chat)


def test_a_name_is_looked_up_on_the_hub_in_seconds_or_not_at_all(monkeypatch):
    """transformers asks six times with pauses for every file, a minute for a slip of the pen on a machine without
    network."""
    asked = []

    def connect(place, seconds):
        asked.append((place, seconds))
        raise OSError("no route")

    monkeypatch.setattr("socket.create_connection", connect)
    monkeypatch.setattr("internvl.kinds.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub.invalid:81")
    with pytest.raises(OSError, match=r"no folder `some/modle`, .* http://hub\.invalid:81 cannot be reached"):
        check_folder("some/modle")
    assert asked == [(("hub.invalid", 81), HUB_SECONDS)]
    monkeypatch.setattr("internvl.kinds.getproxies", lambda: {"http": "http://proxy"})
    assert check_folder("some/modle") is None  # the proxy knows
    monkeypatch.setattr("internvl.kinds.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "/cache/config.json")
    assert check_folder("some/model") is None
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert check_folder("some/model") is None  # transformers says so itself
    assert len(asked) == 1
