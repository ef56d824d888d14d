"""Stage 3 of the bundled recipe: where both configurations start, what each phase trains, and the run of all
stages."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

from internvl.evaluation.dialogue import answer_questions
from internvl.modeling_internvl import InternVLModel
from internvl.reproduction import ablation
from internvl.reproduction import run as bundled_run
from internvl.reproduction.ablation import VARIANTS, ablate
from internvl.reproduction.run import scaled
from internvl.synthetic.scenes import LAYOUTS, draw_scene, sample_scene, scene_generator
from internvl.synthetic.tokenizer import SPECIAL_TOKENS, question_tokenizer
from internvl.training import stages
from internvl.training.data.generated import conversation_about, dialogue_batches
from internvl.training.models import build
from internvl.training.models.build import build_chat_model, build_chat_processor
from internvl.training.models.parameter_groups import part_of
from internvl.training.recipes import Batch
from internvl.training.stages import run_stage3
from internvl.training.trainer import Run

from .fixtures_bundled_run import few_scenes_and_one_thread, stopped_at, tiny_run


RECIPES = tiny_run().chats
TOKENS_PER_TILE = 64


@pytest.fixture(scope="module")
def tokenizer():
    return question_tokenizer(num_scenes=20)


@pytest.fixture
def few_scenes(tokenizer, monkeypatch):
    monkeypatch.setattr(build, "question_tokenizer", lambda: tokenizer)


def test_the_full_configuration_starts_from_stage_2_and_the_simple_one_from_its_tower(
    finished_default_run, few_scenes
):
    base = InternVLModel.from_pretrained(finished_default_run / "stage2")
    full, simple = (build_chat_model(RECIPES[name], finished_default_run / "stage2")[0] for name in ("full", "simple"))
    for model in (full, simple):
        for name, value in model.vision_model.state_dict().items():
            assert torch.equal(value, base.vision_model.state_dict()[name]), name
    assert torch.equal(full.query_tokens, base.query_tokens)
    for name, value in full.qllama.state_dict().items():
        assert torch.equal(value, base.qllama.model.state_dict()[name]), name
    assert simple.qllama is None
    assert (full.config.connector, simple.config.connector) == ("queries_and_patches", "patches")


def test_the_full_configuration_of_a_stage_1_is_refused(finished_default_run, few_scenes):
    assert build_chat_model(RECIPES["simple"], finished_default_run / "stage1")[0].qllama is None
    with pytest.raises(ValueError, match="needs the queries of stage 2"):
        build_chat_model(RECIPES["full"], finished_default_run / "stage1")


@pytest.mark.parametrize(
    ("number", "expected"), [(1, {"projector", "language"}), (2, {"projector", "language", "queries", "qllama"})]
)
def test_each_phase_trains_its_parts_and_nothing_else(finished_default_run, few_scenes, tmp_path, number, expected):
    """Two runs of which one has a single step more."""
    recipe, states = RECIPES["full"], []
    for steps in (0, 1):
        phase = replace(recipe.phases[number], steps=steps, warmup_steps=0)
        folder = tmp_path / str(steps)
        run_stage3(replace(recipe, phases=(phase,)), None, Run(folder), finished_default_run / "stage2")
        states.append(load_file(folder / "model.safetensors"))
    before, after = states
    assert {part_of(key) for key, value in after.items() if not torch.equal(value, before[key])} == expected


def test_dense_supervision_changes_the_tower_and_leaving_it_out_keeps_it(finished_default_run, tmp_path, few_scenes):
    recipe, source = RECIPES["simple"], finished_default_run / "stage2"
    run_stage3(replace(recipe, phases=recipe.phases[1:2]), None, Run(tmp_path), source)
    start, blind, seeing = (
        load_file(folder / "model.safetensors") for folder in (source, tmp_path, finished_default_run / "simple")
    )
    name = "vision_model.encoder.layers.0.attn.qkv.weight"
    assert torch.equal(blind[name], start[name])
    assert not torch.equal(seeing[name], start[name])


def test_a_stopped_run_resumes_to_the_same_weights(finished_default_run, tmp_path):
    source = finished_default_run / "stage2"
    with few_scenes_and_one_thread():
        with stopped_at("stage3/answering", 2):
            run_stage3(RECIPES["full"], None, Run(tmp_path, num_workers=1), source)
        assert list((tmp_path / "trainer" / "answering").glob("checkpoint-*"))
        assert not (tmp_path / "model.safetensors").exists()
        run_stage3(RECIPES["full"], None, Run(tmp_path, resume=True, num_workers=1), source)
    expected = load_file(finished_default_run / "full" / "model.safetensors")
    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("name", "queries"), [("full", 4), ("simple", 0)])
def test_the_written_folder_loads_and_answers_about_tiled_images(finished_default_run, name, queries):
    folder = finished_default_run / name
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert model.num_image_token == processor.image_seq_length == queries + TOKENS_PER_TILE
    scene = sample_scene(scene_generator("held_out", 0, 0), LAYOUTS["few_tiles"], "held_out")
    assert len(answer_questions(model.eval(), processor, [(draw_scene(scene), "What?")])) == 1
    assert processor.image_processor.max_num == 6
    assert model.generation_config.eos_token_id == [processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id]


# ------------------------------------------------------------------------------------------------------------ its data
def test_the_data_of_a_step_depends_on_the_seed_and_the_step_alone(tokenizer):
    recipe = RECIPES["simple"]
    processor = build_chat_processor(recipe, tokenizer, patch_size=28)
    first, second, other = (
        dialogue_batches(replace(recipe, seed=seed), recipe.phases[2], processor) for seed in (0, 0, 1)
    )
    assert torch.equal(first[2]["pixel_values"], second[2]["pixel_values"])
    assert torch.equal(first[2]["labels"], second[2]["labels"])
    assert not torch.equal(first[2]["input_ids"], first[1]["input_ids"])
    assert not torch.equal(first[2]["input_ids"], other[2]["input_ids"])


def test_only_answers_and_their_end_are_learned(tokenizer):
    recipe = RECIPES["simple"]
    phase = replace(recipe.phases[2], batches=(Batch(1.0, 1, {"mixed": 1}),))
    data = dialogue_batches(recipe, phase, build_chat_processor(recipe, tokenizer, patch_size=28))
    ((scene, rng),) = data.scenes(0)
    messages = conversation_about(scene, rng, recipe.num_turns)
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


# -------------------------------------------------------------------------------------------------- all stages in turn
def test_a_resumed_run_trains_only_what_is_not_finished(finished_default_run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished_default_run, folder)
    (folder / "full" / "training_log.json").unlink()
    trained = []
    monkeypatch.setattr(stages, "train", lambda stage: trained.append(stage.run))
    with few_scenes_and_one_thread():
        bundled_run.train_all_stages(tiny_run(), folder, resume=True)
    run = Run(folder / "full", resume=True, num_workers=1)
    assert trained == [run.reading(folder / "stage2")]


def test_the_assembled_checkpoint_holds_every_model_of_the_run_and_is_small(finished_default_run, tmp_path):
    bundled_run.assemble(finished_default_run, tmp_path)
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
    run = bundled_run.bundled_run()
    small = scaled(run, 0.1)
    recipes = [(run.stage1, small.stage1), (run.stage2, small.stage2)]
    recipes += [(run.chats[name], chat) for name, chat in small.chats.items()]
    for whole, part in recipes:
        for before, after in zip(whole.phases, part.phases, strict=True):
            assert after.steps == round(before.steps * 0.1) > 0
            assert after.batches == before.batches
            assert after.warmup_steps < after.steps


@pytest.fixture
def untrained_stages(monkeypatch):
    """Stages that only record what they were asked for, once per folder; their reports are the list."""
    asked = []

    def record(recipe, data, run, *sources):
        if not run.output.exists():
            run.output.mkdir(parents=True)
            asked.append((recipe, [source.name for source in sources], run.output.name))

    for name in ("run_stage1", "run_stage2", "run_stage3"):
        monkeypatch.setattr(ablation, name, record)
    monkeypatch.setattr(ablation, "evaluate_chat", lambda folder, questions: {"folder": folder.name})
    monkeypatch.setattr(ablation, "mean_recalls", lambda folder, pairs: folder.name)
    return asked


def test_the_ablation_leaves_stages_out_and_shares_the_rest(untrained_stages, tmp_path):
    report = ablate(lambda seed: tiny_run(), tmp_path, seeds=1, questions=7, pairs=7)
    assert [part["0"]["folder"] for part in report.values()] == [
        "stage1_stage2_full", "no_stage1_stage2_full", "stage1_no_stage2_full",
    ]  # fmt: skip
    assert all(f"{part['0']['recall_at_1']}_full" == part["0"]["folder"] for part in report.values())
    trained = {name: recipe.phases[0].steps > 0 for recipe, _, name in untrained_stages if not name.endswith("full")}
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
