"""Stage 3 of the default checkpoint: where both configurations start, what each phase trains, and the run of all stages."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

from internvl.evaluation.dialogue import answer_questions
from internvl.modeling_internvl import InternVLModel
from internvl.reproduction import run as default_run
from internvl.reproduction import stage3 as stage3_default
from internvl.reproduction.ablation import VARIANTS, ablate
from internvl.reproduction.phases import Batch
from internvl.reproduction.run import scaled
from internvl.reproduction.stage3 import (
    FULL,
    SIMPLE,
    TOKENS_PER_TILE,
    AnsweringBatches,
    build_processor,
    learn_to_answer,
    start_from,
    train,
)
from internvl.synthetic.scenes import LAYOUTS, draw_scene, sample_scene, scene_generator
from internvl.synthetic.tokenizer import SPECIAL_TOKENS, build_tokenizer, tokenizer_corpus
from internvl.training.models.parameter_groups import part_of

from .fixtures_default_run import few_scenes_and_one_thread, stopped_at, tiny_run


RECIPES = {recipe.connector: recipe for recipe in tiny_run().chats.values()}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(tokenizer_corpus(num_scenes=20))


def test_the_full_configuration_starts_from_stage_2_and_the_simple_one_from_its_tower(finished_default_run, tokenizer):
    base = InternVLModel.from_pretrained(finished_default_run / "stage2")
    full, simple = (start_from(finished_default_run / "stage2", tokenizer, name) for name in (FULL, SIMPLE))
    for model in (full, simple):
        for name, value in model.vision_model.state_dict().items():
            assert torch.equal(value, base.vision_model.state_dict()[name]), name
    assert torch.equal(full.query_tokens, base.query_tokens)
    for name, value in full.qllama.state_dict().items():
        assert torch.equal(value, base.qllama.model.state_dict()[name]), name
    assert simple.qllama is None
    assert (full.config.connector, simple.config.connector) == (FULL, SIMPLE)


def test_the_full_configuration_of_a_stage_1_is_refused(finished_default_run, tokenizer):
    assert start_from(finished_default_run / "stage1", tokenizer, SIMPLE).qllama is None
    with pytest.raises(ValueError, match="needs the queries of stage 2"):
        start_from(finished_default_run / "stage1", tokenizer, FULL)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("connecting", {"projector", "language"}),
        ("answering", {"projector", "language", "queries", "qllama"}),
    ],
)
def test_each_phase_trains_its_parts_and_nothing_else(finished_default_run, tokenizer, tmp_path, name, expected):
    model = start_from(finished_default_run / "stage2", tokenizer, FULL)
    processor = AutoProcessor.from_pretrained(finished_default_run / "full")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    recipe = replace(RECIPES[FULL], answering=RECIPES[FULL].connecting)  # one step of each
    learn_to_answer(model, processor, recipe, name, tmp_path, resume=False, use_bf16=False)
    changed = {part_of(key) for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == expected


def test_seeing_changes_the_tower_and_leaving_it_out_keeps_it(finished_default_run, tmp_path):
    recipe = RECIPES[SIMPLE]
    idle = replace(recipe.seeing, steps=0)
    with few_scenes_and_one_thread():
        train(replace(recipe, seeing=idle, answering=idle), finished_default_run / "stage2", tmp_path, use_bf16=False)
    start, blind, seeing = (
        load_file(folder / "model.safetensors")
        for folder in (finished_default_run / "stage2", tmp_path, finished_default_run / "simple")
    )
    name = "vision_model.encoder.layers.0.attn.qkv.weight"
    assert torch.equal(blind[name], start[name])
    assert not torch.equal(seeing[name], start[name])


def test_a_stopped_run_resumes_to_the_same_weights(finished_default_run, tmp_path):
    with few_scenes_and_one_thread():
        with stopped_at("stage3/answering", 2):
            train(RECIPES[FULL], finished_default_run / "stage2", tmp_path, use_bf16=False)
        assert list((tmp_path / "trainer" / "answering").glob("checkpoint-*"))
        assert not (tmp_path / "model.safetensors").exists()
        train(RECIPES[FULL], finished_default_run / "stage2", tmp_path, resume=True, use_bf16=False)
    expected = load_file(finished_default_run / "full" / "model.safetensors")
    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("name", "queries"), [("full", 4), ("simple", 0)])
def test_the_written_folder_loads_and_answers_about_tiled_pictures(finished_default_run, name, queries):
    folder = finished_default_run / name
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert model.num_image_token == processor.image_seq_length == queries + TOKENS_PER_TILE
    scene = sample_scene(scene_generator("held_out", 0, 0), LAYOUTS["few_tiles"], "held_out")
    assert len(answer_questions(model.eval(), processor, [(draw_scene(scene), "What?")])) == 1
    assert processor.image_processor.max_num == 6
    assert model.generation_config.eos_token_id == [processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id]


# ------------------------------------------------------------------------------------------------------------- its data
def test_the_data_of_a_step_depends_on_the_seed_and_the_step_alone(tokenizer):
    processor, phase = build_processor(tokenizer), RECIPES[SIMPLE].answering
    first, second, other = (AnsweringBatches("answering", phase, seed, processor, 3) for seed in (0, 0, 1))
    assert torch.equal(first[2]["pixel_values"], second[2]["pixel_values"])
    assert torch.equal(first[2]["labels"], second[2]["labels"])
    assert not torch.equal(first[2]["input_ids"], first[1]["input_ids"])
    assert not torch.equal(first[2]["input_ids"], other[2]["input_ids"])


def test_only_answers_and_their_end_are_learned(tokenizer):
    phase = replace(RECIPES[SIMPLE].answering, batches=(Batch(1.0, 1, {"mixed": 1}),))
    data = AnsweringBatches("answering", phase, 0, build_processor(tokenizer), 3)
    ((scene, rng),) = data.scenes(0)
    messages = data._conversation(scene, rng)
    answers = [part["text"] for message in messages if message["role"] == "assistant" for part in message["content"]]
    labels = data[0]["labels"][0]
    learned = tokenizer.decode(labels[labels != -100])
    assert learned == "".join(f"{answer}<|im_end|>" for answer in answers)


def test_the_tokenizer_encodes_any_text_and_splits_numbers_into_digits(tokenizer):
    for text in ("Where is the red circle?", "caf\u00e9 \u65e5\u672c 7", "  two  blanks\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("305") == ["3", "0", "5"]
    for token in SPECIAL_TOKENS:
        assert tokenizer.tokenize(token) == [token]


# ----------------------------------------------------------------------------------------------------- all stages in turn
def test_a_resumed_run_trains_only_what_is_not_finished(finished_default_run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished_default_run, folder)
    (folder / "full" / "training_log.json").unlink()
    trained = []

    def record(recipe, source, output, **how):
        trained.append((recipe.connector, source.name, output.name, how["resume"]))

    monkeypatch.setattr(stage3_default, "train", record)
    default_run.train(tiny_run(), folder, resume=True)
    assert trained == [(FULL, "stage2", "full", True)]


def test_the_assembled_checkpoint_holds_every_model_of_the_run_and_is_small(finished_default_run, tmp_path):
    default_run.assemble(finished_default_run, tmp_path)
    parts = {
        "": (
            AutoModelForImageTextToText,
            load_file(finished_default_run / "full" / "model.safetensors"),
            torch.float32,
        ),
        "internvl_g": (AutoModel, load_file(finished_default_run / "stage2" / "model.safetensors"), torch.bfloat16),
    }
    for subfolder, (auto_class, expected, dtype) in parts.items():
        state = auto_class.from_pretrained(tmp_path, subfolder=subfolder).state_dict()
        assert all(torch.equal(state[name], value.to(dtype)) for name, value in expected.items())
        assert AutoProcessor.from_pretrained(tmp_path, subfolder=subfolder).tokenizer is not None
    tower = AutoModel.from_pretrained(tmp_path, subfolder="internvit")
    pixels = AutoImageProcessor.from_pretrained(tmp_path, subfolder="internvit")(
        draw_scene(sample_scene(scene_generator("held_out", 0, 0), LAYOUTS["mixed"], "held_out")), return_tensors="pt"
    )
    assert tower(**pixels).last_hidden_state.shape == (1, 1 + 4 * TOKENS_PER_TILE, tower.config.hidden_size)
    assert not list(tmp_path.glob("*/*.py"))
    assert {path.stem for path in (tmp_path / "reproduction" / "logs").iterdir()} == {
        "stage1",
        "stage2",
        "full",
        "simple",
    }
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 60e6


def test_a_scaled_run_has_its_share_of_every_phase():
    run, small = default_run.default_run(), scaled(default_run.default_run(), 0.1)
    phases = [(run.stage1.phases[name], phase) for name, phase in small.stage1.phases.items()]
    phases += [(run.stage2.phases[name], phase) for name, phase in small.stage2.phases.items()]
    for name, chat in small.chats.items():
        phases += [
            (getattr(run.chats[name], part), getattr(chat, part)) for part in ("seeing", "connecting", "answering")
        ]
    for full, part in phases:
        assert part.steps == round(full.steps * 0.1) > 0
        assert part.batches == full.batches
        assert part.warmup_steps < part.steps


@pytest.fixture
def untrained_stages(monkeypatch):
    """Stages that only write down what they were asked for; their reports are the list."""
    asked = []

    def train(recipe, *sources, output, **how):
        output.mkdir(parents=True, exist_ok=True)
        (output / "training_log.json").write_text("{}")
        asked.append((recipe, [source.name for source in sources], output.name))

    for module in (default_run.stage1_default, default_run.stage2_default, stage3_default):
        monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(
        "internvl.reproduction.ablation.evaluate_chat", lambda folder, questions: {"folder": folder.name}
    )
    monkeypatch.setattr("internvl.reproduction.ablation.mean_recalls", lambda folder, pairs: folder.name)
    return asked


def test_the_ablation_leaves_stages_out_and_shares_the_rest(untrained_stages, tmp_path):
    report = ablate(lambda seed: tiny_run(), tmp_path, seeds=1, questions=7, pairs=7)
    assert [part["0"]["folder"] for part in report.values()] == [
        "stage1_stage2_full", "no_stage1_stage2_full", "stage1_no_stage2_full",
    ]  # fmt: skip
    assert all(f"{part['0']['recall_at_1']}_full" == part["0"]["folder"] for part in report.values())
    trained = {name: bool(recipe.phases) for recipe, _, name in untrained_stages if hasattr(recipe, "phases")}
    assert trained == {
        "stage1": True, "stage1_stage2": True, "no_stage1": False, "no_stage1_stage2": True, "stage1_no_stage2": False,
    }  # fmt: skip
    assert len(untrained_stages) == 8
    assert [sources for _, sources, name in untrained_stages if name.endswith("full")] == [
        ["stage1_stage2"], ["no_stage1_stage2"], ["stage1_no_stage2"],
    ]  # fmt: skip


def test_the_ablation_goes_on_where_it_stopped_and_refuses_a_folder_in_use(untrained_stages, tmp_path):
    ablate(lambda seed: tiny_run(), tmp_path, seeds=1, questions=7, pairs=7)
    untrained_stages.clear()
    with pytest.raises(ValueError, match="go on with it by `--resume`"):
        ablate(lambda seed: tiny_run(), tmp_path, seeds=2, questions=7, pairs=7)
    report = ablate(lambda seed: tiny_run(), tmp_path, seeds=2, questions=7, pairs=7, resume=True)
    assert len(untrained_stages) == 8
    assert all(list(report[name]) == ["0", "1"] for name in VARIANTS)
