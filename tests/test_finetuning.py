"""`finetune`: a finished model goes on learning from one's own rows, whole, by adapters or by its head."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from internvl.configuration_internvl import InternVLConfig
from internvl.conversion import convert
from internvl.training import finetune_command
from internvl.training.__main__ import main
from internvl.training.curves import AnswerCurve
from internvl.training.models.parameter_groups import part_of
from internvl.training.models.parts import PARTS
from internvl.training.recipes.finetuning import PARTS_OF_TASK, FineTuning, finetuning_recipe
from internvl.training.trainer import StageTrainer

from . import engine_jobs
from .fixtures_dialogues import llava
from .fixtures_processes import run_elsewhere
from .fixtures_published import published_chat
from .fixtures_text import make_image


PLAIN = ("--bf16", "False", "--gradient-checkpointing", "False", "--logging-steps", "1", "--seed", "1")
SHORT = (*PLAIN, "--batch-size", "4", "--steps", "2", "--learning-rate", "1e-2", "--lr-scheduler-type", "constant")
QUESTION, ANSWER = "<image>\nWhat is it?", "seven"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tiny chat models "patches", "queries_and_patches" and "converted", "stage 1 start" (C) and "stage 2 start" (G),
    and rows.
    """
    folder = tmp_path_factory.mktemp("finetuning")
    engine_jobs.write_data(folder)
    for connector in engine_jobs.CONNECTORS:
        engine_jobs.make_processor(connector).save_pretrained(folder / connector)
    convert(published_chat(folder), folder / "converted", show_progress=False)
    rows = []
    for number in range(8):
        make_image(56 * (1 + number % 2), 56, seed=number).save(folder / f"{number}.png")
        rows.append(llava(QUESTION, ANSWER, image=f"{number}.png"))
    rows.append(llava("What is it?", ANSWER))
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pairs.csv").write_text("".join(["image,caption\n", *(f"{n}.png,number {n}\n" for n in range(8))]))
    write_wrong(folder)
    return folder


def write_wrong(folder: Path) -> None:
    """Models and rows that cannot be used."""
    for name, file, content in (
        ("published", "config.json", {"model_type": "internvl_chat", "auto_map": {"AutoConfig": "a.B"}}),
        ("native", "config.json", {"model_type": "internvl"}),
        ("adapter", "adapter_config.json", {}),
        ("no processor", "config.json", json.loads((folder / "patches/config.json").read_text())),
    ):
        (folder / name).mkdir()
        (folder / name / file).write_text(json.dumps(content))
    (folder / "empty").mkdir()
    rows = [llava(QUESTION, ANSWER, image="absent.png")] * 2
    (folder / "elsewhere.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pairs.jsonl").write_text(json.dumps({"image": "0.png", "caption": "seven"}) + "\n")
    (folder / "nameless.csv").write_text("0.png,number 0\n1.png,number 1\n")
    (folder / "empty.csv").write_text("image,caption\n")
    (folder / "empty.jsonl").write_text("")


def finetune(folder: Path, model: str, output: Path, *words: str, data: str = "own.jsonl") -> None:
    arguments = ["--model", str(folder / model), "--data", str(folder / data), "--output", str(output), *words]
    assert main(["finetune", *arguments]) == 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed_parts(before: Path, after: Path) -> set[str]:
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    return {part_of(name) for name in old if not torch.equal(old[name], new[name])}


def log_of(folder: Path) -> dict:
    return json.loads((folder / "training_log.json").read_text())


METHODS = {
    "whole": ((), {"projector", "language"}),
    "head": (("--method", "head"), {"projector"}),
    "lora": (("--method", "lora"), {"language"}),
    "these parts": (("--train", "vision", "projector"), {"vision", "projector"}),
    "but not these": (("--freeze", "projector"), {"language"}),
}


@pytest.mark.parametrize("connector", engine_jobs.CONNECTORS)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_its_parts_and_nothing_else(folder, name, connector, tmp_path):
    words, expected = METHODS[name]
    finetune(folder, connector, tmp_path, *SHORT, *words)
    assert changed_parts(folder / connector, tmp_path) == expected
    assert (tmp_path / "adapter").is_dir() == (name == "lora")


ASK = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, image = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": "What is it?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
    return_tensors="pt",
)
found = model.generate(**inputs, do_sample=False, max_new_tokens=8)
assert "internvl" not in sys.modules
print(processor.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


@pytest.mark.parametrize(
    ("model", "method"),
    [
        pytest.param("patches", "whole", marks=pytest.mark.slow),
        pytest.param("converted", "whole", marks=pytest.mark.slow),
        ("converted", "lora"),
    ],
)
def test_a_taught_answer_is_given_by_the_saved_folder_without_this_package(folder, model, method, tmp_path):
    words = ("--method", method, "--epochs", "16", "--batch-size", "4", "--learning-rate", "1e-2")
    finetune(folder, model, tmp_path / "out", *PLAIN, *words)
    losses = [entry["loss"] for entry in log_of(tmp_path / "out")["finetuning"] if "loss" in entry]
    assert len(losses) == 16 * 3  # 9 rows
    assert losses[-1] < 0.1 * losses[0]
    image = folder / "0.png"
    before, after = (run_elsewhere(tmp_path, "-c", ASK, path, image) for path in (folder / model, tmp_path / "out"))
    assert not before.startswith(ANSWER)
    assert after.startswith(ANSWER)


def test_the_adapter_on_the_old_model_equals_the_merged_folder(folder, tmp_path):
    finetune(folder, "patches", tmp_path, *SHORT, "--lora-rank", "3", "--lora-parts", "vision", "language")
    assert changed_parts(folder / "patches", tmp_path) == {"vision", "language"}
    start = AutoModelForImageTextToText.from_pretrained(folder / "patches")
    adapted = PeftModel.from_pretrained(start, tmp_path / "adapter")
    assert adapted.peft_config["default"].r == 3
    merged = adapted.merge_and_unload().state_dict()
    for name, value in AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict().items():
        torch.testing.assert_close(value, merged[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("gpu", "instructions"), [(True, False), (False, True), (False, False)])
def test_bfloat16_is_computed_in_only_where_it_is_fast(gpu, instructions, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: instructions)
    choice = FineTuning("contrastive", "head", steps=1, batch_size=1, parts=("pooling",))
    recipe = finetuning_recipe(choice, InternVLConfig(), max_text_length=80)
    assert recipe.use_bf16 == (gpu or instructions)


def test_held_out_rows_are_measured_and_their_answers_logged(folder, tmp_path):
    words = (*SHORT, "--steps", "4", "--eval-strategy", "steps", "--eval-steps", "2", "--eval-data")
    finetune(folder, "patches", tmp_path / "a", *words, str(folder / "own.jsonl"))
    points = [entry for entry in log_of(tmp_path / "a")["finetuning"] if "eval_loss" in entry]
    assert [point["step"] for point in points] == [2, 4]
    assert all(0 <= point["eval_exact_match"] <= 1 for point in points)
    samples = (tmp_path / "a/trainer/finetuning/samples.jsonl").read_text().splitlines()
    assert len(samples) == 2 * 9
    first = json.loads(samples[0])
    assert (first["step"], first["expected"]) == (2, ANSWER)
    assert first["prompt"].endswith("assistant\n")
    assert "What is it?" in first["prompt"]


def test_the_loss_of_held_out_rows_is_that_of_the_model_in_evaluation_mode(folder, tmp_path):
    words = (*PLAIN, "--batch-size", "9", "--steps", "1", "--learning-rate", "1e-9", "--eval-data")
    one_forward = ("--per-device-train-batch-size", "9")
    finetune(folder, "patches", tmp_path, *words, str(folder / "own.jsonl"), *one_forward)
    log = log_of(tmp_path)["finetuning"]
    trained, held_out = (next(entry[name] for entry in log if name in entry) for name in ("loss", "eval_loss"))
    assert held_out == pytest.approx(trained, rel=1e-3)


@pytest.mark.slow
def test_steps_are_profiled_and_the_model_is_compiled_where_asked_for(folder, tmp_path):
    compiled = ("--torch-compile", "--torch-compile-backend", "eager")
    finetune(folder, "patches", tmp_path / "plain", *SHORT, "--steps", "4")
    finetune(folder, "patches", tmp_path / "out", *SHORT, "--steps", "4", "--profile-steps", "2", *compiled)
    assert log_of(tmp_path / "out")["arguments"]["torch_compile"] is True
    (trace,) = (tmp_path / "out/profile/finetuning").glob("*.json")
    steps = {
        event["name"] for event in json.loads(trace.read_text())["traceEvents"] if "ProfilerStep" in event["name"]
    }
    assert steps == {"ProfilerStep#2", "ProfilerStep#3"}
    for name, value in weights(tmp_path / "plain").items():
        torch.testing.assert_close(weights(tmp_path / "out")[name], value, atol=1e-5, rtol=1e-4)


def test_image_size_and_tiles_are_those_asked_for_and_are_saved(folder, tmp_path):
    finetune(folder, "queries_and_patches", tmp_path, *SHORT, "--image-size", "84", "--max-tiles", "1")
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    queries = model.config.qllama_config.num_query_token
    assert (model.config.force_image_size, model.config.dynamic_image_size) == (84, False)
    assert (processor.image_processor.size["height"], processor.image_processor.max_num) == (84, 1)
    assert processor.image_seq_length == 9 + queries
    pixels = processor.image_processor(make_image(112, 56), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 84, 84)


PAIRS = {
    "contrastive on C": ("stage 1 start", (), {"vision", "pooling", "qllama", "text_projection", "temperature"}),
    "head of C": ("stage 1 start", ("--method", "head"), {"pooling", "text_projection", "temperature"}),
    "retrieval on G": ("stage 2 start", ("--method", "lora"), {"vision", "qllama"}),
    "captions of G": ("stage 2 start", ("--task", "captions", "--method", "head"), {"queries", "language_head"}),
    "contrastive on G": ("stage 2 start", ("--task", "contrastive", "--train", "pooling"), {"pooling"}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_models_of_pairs_learn_from_rows_of_images_and_captions(folder, name, tmp_path):
    model, words, expected = PAIRS[name]
    elsewhere = folder / "elsewhere"  # from the images
    elsewhere.mkdir(exist_ok=True)
    shutil.copy(folder / "pairs.csv", elsewhere)
    held_out = ("--images", str(folder), "--eval-data", str(elsewhere / "pairs.csv"))
    finetune(folder, model, tmp_path, *SHORT, *words, *held_out, data="elsewhere/pairs.csv")
    assert changed_parts(folder / model, tmp_path) == expected
    point = next(entry for entry in log_of(tmp_path)["finetuning"] if "eval_loss" in entry)
    if "captions" in words:
        assert point["eval_cider"] >= 0
        return
    assert 0 <= point["eval_recall_at_1_InternVL-C"] <= 1
    assert ("eval_recall_at_1_InternVL-G" in point) == (model == "stage 2 start")


def test_the_best_checkpoint_is_kept_and_loaded_at_the_end(folder, tmp_path, monkeypatch):
    values = iter([0.5, 0.9, 0.1, 0.2])  # the best after step 2
    monkeypatch.setattr(AnswerCurve, "__call__", lambda *_: {"exact_match": next(values)})
    words = [*SHORT, "--steps", "4", "--save-steps", "1", "--eval-strategy", "steps", "--eval-steps", "1"]
    words += ["--load-best-model-at-end", "--metric-for-best-model", "exact_match", "--save-total-limit", "2"]
    finetune(folder, "patches", tmp_path, *words, "--eval-data", str(folder / "own.jsonl"))
    checkpoints = tmp_path / "trainer/finetuning"
    assert sorted(path.name for path in checkpoints.glob("checkpoint-*")) == [
        f"checkpoint-{step}" for step in (2, 3, 4)
    ]
    state = json.loads((checkpoints / "checkpoint-4/trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(checkpoints / "checkpoint-2")
    best, last = (weights(checkpoints / f"checkpoint-{step}") for step in (2, 4))
    for name, value in weights(tmp_path).items():
        assert torch.equal(value, best[name]), name
    assert any(not torch.equal(best[name], last[name]) for name in best)


def test_a_stopped_run_goes_on_to_the_weights_of_an_unbroken_one(folder, tmp_path, monkeypatch):
    words = (*SHORT, "--steps", "4", "--save-steps", "2")
    finetune(folder, "patches", tmp_path / "whole", *words)
    step = StageTrainer.training_step

    def stopping(self, *arguments, **settings):
        if self.state.global_step == 3:
            raise engine_jobs.StoppedError
        return step(self, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", stopping)
        with pytest.raises(engine_jobs.StoppedError):
            finetune(folder, "patches", tmp_path / "stopped", *words)
    finetune(folder, "patches", tmp_path / "stopped", *words, "--resume")
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "stopped")[name]), name


def test_a_stopped_run_does_not_go_on_with_other_data_or_from_another_model(folder, tmp_path, capsys):
    words = (*SHORT, "--save-steps", "1")
    finetune(folder, "patches", tmp_path / "out", *words)
    (tmp_path / "out/training_log.json").unlink()  # as if stopped at its end
    for given in ({"model": "converted"}, {"data": "other.jsonl"}):
        shutil.copy(folder / "own.jsonl", folder / "other.jsonl")
        names = {"model": "patches", "data": "own.jsonl", **given}
        arguments = ["--model", str(folder / names["model"]), "--data", str(folder / names["data"])]
        assert main(["finetune", *arguments, "--output", str(tmp_path / "out"), *words, "--resume"]) == 2
        assert "holds a run of another recipe" in capsys.readouterr().err
    finetune(folder, "patches", tmp_path / "out", *words, "--resume")


WRONG = {
    "a task of another kind": (("--model", "patches", "--task", "retrieval"), "`--task retrieval` needs"),
    "nothing to train": (("--model", "patches", "--freeze", "projector", "language"), "nothing to train"),
    "no such part": (("--model", "patches", "--train", "pooling"), "no part pooling"),
    "parts without a rank of adapters": (
        ("--model", "patches", "--lora-parts", "language", "--method", "whole"),
        "`--lora-parts` belongs to `--method lora`",
    ),
    "adapters of the head": (("--model", "patches", "--lora-rank", "2", "--method", "head"), "`--lora-rank` belongs"),
    "adapters on the projector": (("--model", "patches", "--lora-rank", "2", "--train", "projector"), "names none"),
    "adapters on what is frozen": (
        ("--model", "patches", "--method", "lora", "--freeze", "language"),
        "All of language are frozen",
    ),
    "two batch sizes": (("--model", "patches", "--per-device-train-batch-size", "2"), "contradicts"),
    "a file": (("--model", "patches/config.json"), "is a file: give the folder of a model, here perhaps `patches`"),
    "an image": (("--model", "0.png"), "is a file: give the folder of a model"),
    "a folder without a model": (("--model", "empty"), "a folder without config.json"),
    "adapters alone": (("--model", "adapter"), "LoRA adapters: give the folder of the merged model"),
    "a path that is not there": (("--model", "some/path/of/mine"), "`some/path/of/mine` is not there"),
    "a published chat model": (("--model", "published"), "`python -m internvl.conversion published NEW_FOLDER`"),
    "a native model": (("--model", "native"), "`python -m internvl.conversion native NEW_FOLDER`"),
    "no processor": (("--model", "no processor"), "`no processor` has no processor"),
    "no image is there": (
        ("--model", "patches", "--data", "elsewhere.jsonl"),
        "None of 2 rows can be used: 2 x The image * is missing. The first: elsewhere.jsonl:1: The image `absent.png`",
    ),
    "pairs for a chat model": (("--model", "patches", "--data", "pairs.jsonl"), "The first: pairs.jsonl:1: "),
    "no row": (("--model", "patches", "--data", "empty.jsonl", "--epochs", "1"), "no row in empty.jsonl"),
    "no model": (("--model", "./stage9"), "stage9"),
    "a table of pairs for a chat model": (
        ("--model", "patches", "--data", "pairs.csv"),
        "holds image-text pairs, from which an",
    ),
    "no data": (("--model", "patches", "--data", "absent.jsonl"), "absent.jsonl"),
}


WRONG_PAIRS = {
    "one pair a step": (("--batch-size", "1"), "a `--batch-size` of 2 or more"),
    "one pair a process": (("--per-device-train-batch-size", "1"), "a `--batch-size` of 2 or more"),
    "accumulation": (("--batch-size", "4", "--gradient-accumulation-steps", "2"), "`grad_cache_chunk_size` (here 32)"),
    "no names of columns": (
        ("--data", "nameless.csv"),
        "nameless.csv:2: A column is missing: the row needs one of jpg, jpeg, png, webp, image, image_bytes, bytes, "
        "image_path, file_name, filepath, and has 0.png, number 0. The first line of the file must name the columns.",
    ),
    "no pair": (("--epochs", "1", "--data", "empty.csv"), "no row in empty.csv"),
    "an empty file of rows": (("--epochs", "1", "--data", "empty.jsonl"), "no row in empty.jsonl"),
}


@pytest.mark.parametrize("name", WRONG_PAIRS)
def test_pairs_of_which_nothing_is_learned_are_refused(folder, name, tmp_path, monkeypatch, capsys):
    words, message = WRONG_PAIRS[name]
    monkeypatch.chdir(folder)
    words = ("--model", "stage 1 start", "--data", "pairs.csv", "--output", str(tmp_path / "out"), *words)
    assert main(["finetune", *words, *PLAIN, *(() if "--epochs" in words else ("--steps", "2"))]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (("--batch-size", "4"), 3),
        (("--per-device-train-batch-size", "1"), 9),
        (("--per-device-train-batch-size", "1", "--gradient-accumulation-steps", "2"), 5),
        (("--batch-size", "4", "--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "2"), 3),
        (("--batch-size", "4", "--data", "mixture.json", "--streaming"), 5),  # 9 of each file
        (("--batch-size", "4", "--data", "mixture.json"), 5),
    ],
)
def test_an_epoch_has_as_many_steps_as_batches(folder, words, steps, tmp_path, monkeypatch):
    recipes = []
    monkeypatch.setattr(finetune_command, "run_stage3", lambda recipe, *_: recipes.append(recipe))
    monkeypatch.chdir(folder)
    (folder / "two.jsonl").write_text("".join((folder / "own.jsonl").read_text().splitlines(keepends=True)[:5]))
    sources = [{"data": "own.jsonl", "weight": 1}, {"data": "two.jsonl", "weight": 1}]
    (folder / "mixture.json").write_text(json.dumps({"sources": sources}))
    assert main(["finetune", "--model", "patches", "--data", "own.jsonl", "--output", str(tmp_path), *words]) == 0
    assert recipes[0].phases[0].steps == steps


LEARNING = {
    "patches": ("patches", "dialogue", {"vision", "projector", "language"}),
    "queries": ("queries_and_patches", "dialogue", {"vision", "projector", "language", "qllama", "queries"}),
    "contrastive": ("stage 1 start", "contrastive", set(PARTS_OF_TASK["contrastive"]["whole"])),
    "contrastive on G": ("stage 2 start", "contrastive", set(PARTS_OF_TASK["contrastive"]["whole"])),
    "retrieval": ("stage 2 start", "retrieval", set(PARTS_OF_TASK["retrieval"]["whole"])),
    "captions": ("stage 2 start", "captions", set(PARTS_OF_TASK["captions"]["whole"])),
}


@pytest.mark.parametrize("name", LEARNING)
def test_parts_that_the_loss_reaches_learn_and_all_others_are_refused(folder, name, tmp_path, capsys):
    model, task, learning = LEARNING[name]
    data = "own.jsonl" if task == "dialogue" else "pairs.csv"
    finetune(folder, model, tmp_path, *SHORT, "--task", task, "--train", *sorted(learning), data=data)
    assert changed_parts(folder / model, tmp_path) == learning
    words = ["--model", str(folder / model), "--data", str(folder / data), "--output", str(tmp_path / "out")]
    for part in sorted(set(PARTS) - learning):
        assert main(["finetune", *words, *SHORT, "--task", task, "--train", part]) == 2
        assert f"no part {part} that learns" in capsys.readouterr().err


REFUSED = {
    "no deepspeed": ("patches", "--deepspeed absent.json", "cannot be set up"),
    "no liger": ("patches", "--use-liger-kernel", "needs the library"),
    "no tracker": ("patches", "--report-to clearml", "cannot be set up"),
    "an incomplete schedule": ("patches", "--lr-scheduler-type warmup_stable_decay", "num_decay_steps"),
    "a schedule's settings": ("patches", '--lr-scheduler-kwargs {"nope":1}', "nope"),
    "a list of settings": ("patches", "--lr-scheduler-kwargs []", "must be a JSON object"),
    "no such mode": ("patches", "--torch-compile-mode nonsense", "nonsense"),
    "no such backend": ("patches", "--torch-compile-backend nonsense", "nonsense"),
    "an uneven batch": ("patches", "--gradient-accumulation-steps 3", "3 steps of accumulation"),
    "a metric": (
        "patches",
        "--eval-data own.jsonl --metric-for-best-model nonsense",
        "take one of loss, exact_match.",
    ),
    "a metric of pairs": (
        "stage 1 start",
        "--data pairs.csv --eval-data pairs.csv --metric-for-best-model recall_at_1",
        "take one of loss, recall_at_1_InternVL-C.",
    ),
    "settings that are no JSON": ("patches", "--lr-scheduler-kwargs {bad", "`TrainingArguments` of these flags"),
    "tiles of pairs": ("stage 1 start", "--data pairs.csv --max-tiles 3", "`--max-tiles` is for chat models"),
    "a frozen part of another model": ("patches", "--freeze pooling", "no part pooling"),
    "videos of pairs": ("stage 1 start", "--data pairs.csv --video-frames 3", "is for chat models"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_a_library_refuses_are_one_line_before_training(folder, name, tmp_path, monkeypatch, capsys):
    model, words, message = REFUSED[name]
    monkeypatch.chdir(folder)
    arguments = ["--model", model, "--data", "own.jsonl", "--output", str(tmp_path / "out"), *SHORT]
    if "schedule" in name:
        arguments = arguments[: arguments.index("--lr-scheduler-type")]
    assert main(["finetune", *arguments, *words.split(" ")]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_together_is_one_line_and_leaves_no_folder(folder, name, tmp_path, monkeypatch, capsys):
    words, message = WRONG[name]
    monkeypatch.chdir(folder)
    assert main(["finetune", "--data", "own.jsonl", "--output", str(tmp_path / "out"), *SHORT, *words]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_model_that_diverged_is_not_written(folder, tmp_path, capsys):
    words = ("--model", str(folder / "patches"), "--data", str(folder / "own.jsonl"), "--output", str(tmp_path))
    assert main(["finetune", *words, *SHORT, "--learning-rate", "100"]) == 2
    assert "weights are not finite" in capsys.readouterr().err
    assert not (tmp_path / "config.json").exists()
