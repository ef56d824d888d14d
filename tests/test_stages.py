"""The stages end to end on generated data: the loss falls, frozen parts stay, a stopped run goes on exactly, folders
load.
"""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from internvl.training import trainer
from internvl.training.__main__ import main
from internvl.training.data.augmentation import Augmentation
from internvl.training.data.negatives import CaptionPool
from internvl.training.models.build import build_contrastive_model
from internvl.training.models.parameter_groups import part_of
from internvl.training.recipes import (
    captions,
    captions_small,
    retrieval,
    retrieval_small,
    stage1,
    stage1_small,
    stage2,
    stage2_small,
    stage3,
    stage3_small,
    with_steps,
)
from internvl.training.stages import (
    Run,
    run_captions,
    run_retrieval,
    run_stage1,
    run_stage2,
    run_stage3,
    with_lora,
)

from .engine_jobs import StoppedError
from .fixtures_dialogues import llava
from .fixtures_pairs import sample, write_tar
from .fixtures_text import make_tokenizer
from .test_stage_faults import TEXT, VISION, assert_same_weights, stopped_after
from .tiny import DECODERS, randomize


COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (250, 250, 250)}
LENGTH = 40


def shrunk(recipe, image_sizes: tuple[int, ...] = (56,), steps: int = 12, rate: float = 5e-3, **changes):
    """The small recipe at a size of seconds, with everything else it says."""
    sizes = image_sizes * len(recipe.phases) if len(image_sizes) == 1 else image_sizes
    phases = [
        replace(
            phase,
            steps=steps,
            image_size=size,
            batch_size=8,
            warmup_steps=3,
            learning_rates=dict.fromkeys(phase.learning_rates, rate),
        )
        for phase, size in zip(recipe.phases, sizes, strict=True)
    ]
    return replace(recipe, phases=tuple(phases), save_steps=4, logging_steps=1, **changes)


STAGE1 = shrunk(
    stage1_small(), (42, 56), rate=2e-3, max_text_length=LENGTH, vision_config=VISION, text_config=TEXT,
    model_config={"clip_embed_dim": 12, "attn_pool_num_heads": 4},
)  # fmt: skip
STAGE2 = shrunk(stage2_small(), steps=16, rate=2e-3, num_query_token=5, max_text_length=LENGTH)
RETRIEVAL = shrunk(retrieval_small(), (84,), rate=1e-3, max_text_length=LENGTH)


def image(colour: tuple[int, int, int], number: int) -> Image.Image:
    """A colour that is a little different each time."""
    return Image.new("RGB", (20, 20), tuple((value + number) % 256 for value in colour))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[str]:
    folder, samples = tmp_path_factory.mktemp("shards"), []
    for number in range(32):
        name = list(COLOURS)[number % 4]
        file = io.BytesIO()
        image(COLOURS[name], number // 4).save(file, "PNG")
        samples.append(sample(number, png=file.getvalue(), txt=f"{name} is it".encode()))
    return [str(write_tar(folder / f"{i}.tar", samples[i::2])) for i in range(2)]


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("dialogues")
    rows = []
    for number, (name, colour) in enumerate(COLOURS.items()):
        image(colour, 0).save(folder / f"{number}.png")
        rows += [llava("<image>\nWhat?", name, image=f"{number}.png")] * 3 + [llava("Who?", "a bus")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(folder / "rows.jsonl")]


@pytest.fixture(scope="module")
def language(tmp_path_factory) -> dict[str, Path]:
    """A LLaMA and a chat decoder, with their tokenizers."""
    folder = tmp_path_factory.mktemp("language")
    torch.manual_seed(0)
    tokenizer = make_tokenizer(special_tokens=("<|im_start|>", "<|im_end|>"))
    size = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    decoder = {**DECODERS["qwen3"], **size}
    decoder.pop("model_type")
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**TEXT, **size)),
        "decoder": randomize(Qwen3ForCausalLM(Qwen3Config(**decoder))),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in models}


@pytest.fixture(scope="module")
def first(tmp_path_factory, shards, language) -> Path:
    folder = tmp_path_factory.mktemp("stage1")
    run_stage1(STAGE1, shards, Run(folder), llama=language["llama"])
    return folder


@pytest.fixture(scope="module")
def second(tmp_path_factory, shards, first, language) -> Path:
    folder = tmp_path_factory.mktemp("stage2")
    run_stage2(STAGE2, shards, Run(folder), first, language["llama"])
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def losses(folder: Path, phase: str) -> list[float]:
    log = json.loads((folder / "training_log.json").read_text())
    return [entry["loss"] for entry in log[phase] if "loss" in entry]


def assert_falls(folder: Path, phase: str, factor: float = 0.9) -> None:
    found = losses(folder, phase)
    assert sum(found[-3:]) < factor * 3 * found[0], found


def changed_parts(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Parts of which a weight differs in any bit, among those that both have."""
    assert before.keys() & after.keys()
    return {part_of(name) for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}


# ---------------------------------------------------------------------------------------------------------- one by one
def test_stage_1_learns_and_is_an_internvl_c_with_its_processor(first):
    assert_falls(first, "half_patches")
    model, processor = AutoModel.from_pretrained(first).eval(), AutoProcessor.from_pretrained(first)
    assert type(model).__name__ == "InternVLModel"
    assert not model.config.has_queries
    size = processor.image_processor.size
    assert (size["height"], size["width"], processor.mode) == (56, 56, "contrastive")
    inputs = processor(
        images=[image(colour, 1) for colour in COLOURS.values()],
        text=[f"{name} is it" for name in COLOURS],
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
    assert (logits.argmax(1) == torch.arange(4)).sum() >= 3


def test_stage_1_drops_patches_of_smaller_images_first_and_then_none(shards, language, tmp_path, monkeypatch):
    seen = []
    original = trainer.StageTrainer.training_step

    def watched(self, model, inputs, *args, **kwargs):
        seen.append((inputs["pixel_values"].shape[-1], model.patch_drop_rate, inputs["input_ids"].shape[1]))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.StageTrainer, "training_step", watched)
    run_stage1(with_steps(STAGE1, 2), shards, Run(tmp_path), language["llama"])
    assert seen == [(42, 0.5, LENGTH)] * 2 + [(56, 0.0, LENGTH)] * 2


def test_stage_1_starts_its_tower_as_beit_does():
    """Cut off at a deviation of 0.02; the ends of the branches shrink with the root of twice the depth."""
    tokenizer = make_tokenizer()
    deep = replace(STAGE1, vision_config={**VISION, "num_hidden_layers": 8})
    torch.manual_seed(0)
    tower = build_contrastive_model(deep, tokenizer).vision_model
    assert deep.init_as_beit
    for number, layer in enumerate(tower.encoder.layers, start=1):
        for branch in (layer.attn.proj, layer.mlp.fc2):
            limit = 0.02 / math.sqrt(2 * number)
            assert 0.95 * limit < branch.weight.abs().max() <= limit * 1.0001
        assert 0.019 < layer.attn.qkv.weight.abs().max() <= 0.02
    assert tower.embeddings.position_embedding.abs().max() <= 0.02
    plain = build_contrastive_model(replace(deep, init_as_beit=False), tokenizer).vision_model
    assert plain.encoder.layers[7].mlp.fc2.weight.abs().max() > 0.03


def test_stage_1_starts_its_text_encoder_from_a_llama(shards, language, tmp_path):
    still = replace(STAGE1, phases=(replace(STAGE1.phases[0], steps=1, learning_rates={"temperature": 1e-3}),))
    run_stage1(still, shards, Run(tmp_path), llama=language["llama"])
    found = weights(tmp_path)
    for name, value in load_file(language["llama"] / "model.safetensors").items():
        if name != "lm_head.weight":
            assert torch.equal(found[f"qllama.{name}"], value), name


def test_stage_2_learns_its_new_parts_and_leaves_stage_1_as_it_was(first, second):
    assert_falls(second, "queries")
    before, after = weights(first), weights(second)
    assert changed_parts(before, after) == {"temperature"}
    added = {part_of(name) for name in after.keys() - before.keys()}
    assert added == {"queries", "query_heads", "language_head"}
    model = AutoModel.from_pretrained(second).eval()
    processor = AutoProcessor.from_pretrained(second)
    inputs = processor(images=[image(COLOURS["red"], 0)], mode="caption", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3).shape[0] == 1


def test_stage_2_takes_the_language_head_of_a_llama_or_a_fresh_one(first, shards, language, tmp_path):
    still = replace(STAGE2, phases=(replace(STAGE2.phases[0], steps=1, learning_rates={"queries": 1e-3}),))
    wanted = load_file(language["llama"] / "model.safetensors")["lm_head.weight"]
    for name, llama in (("llama", language["llama"]), ("fresh", None)):
        run_stage2(still, shards, Run(tmp_path / name), first, llama)
        assert torch.equal(weights(tmp_path / name)["qllama.lm_head.weight"], wanted) == (llama is not None)


@pytest.mark.parametrize("side", [56, 84])
def test_retrieval_fine_tuning_trains_all_but_the_language_head(side, second, shards, tmp_path):
    recipe = replace(RETRIEVAL, phases=(replace(RETRIEVAL.phases[0], image_size=side),))
    run_retrieval(recipe, shards, Run(tmp_path), second)
    assert_falls(tmp_path, "retrieval", 0.95)
    wanted = {"vision", "pooling", "text_projection", "temperature", "queries", "query_heads", "qllama"}
    assert changed_parts(weights(second), weights(tmp_path)) == wanted
    assert AutoProcessor.from_pretrained(tmp_path).image_processor.size["height"] == side
    assert AutoModel.from_pretrained(tmp_path).config.force_image_size == side


def test_caption_fine_tuning_trains_what_writes_captions(second, shards, tmp_path):
    recipe = shrunk(captions_small(), rate=1e-2, max_text_length=LENGTH, prompt="It:", crop_scale=(0.5, 1.0))
    run_captions(recipe, shards, Run(tmp_path), second)
    assert_falls(tmp_path, "captions", 0.8)
    assert changed_parts(weights(second), weights(tmp_path)) == {"vision", "queries", "qllama", "language_head"}
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.caption_prompt == "It:"
    inputs = processor(images=[image(colour, 1) for colour in COLOURS.values()], mode="caption", return_tensors="pt")
    model = AutoModel.from_pretrained(tmp_path).eval()
    written = processor.batch_decode(model.generate(**inputs, max_new_tokens=24), skip_special_tokens=True)
    assert all(text.endswith(" it") for text in written), written


def test_retrieval_draws_its_negatives_from_all_the_data_and_augments(second, shards, tmp_path, monkeypatch):
    """The switches of the full recipe, by what reaches the model."""
    seen: list[dict] = []
    augments: list = []
    original = trainer.StageTrainer.training_step

    def watched(self, model, inputs, *args, **kwargs):
        seen.append({**inputs})
        augments.append(self.data_collator.augment)
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.StageTrainer, "training_step", watched)
    others: list[bool] = []
    draw = CaptionPool.draw

    def watched_draw(self, pair, seed=0):
        drawn = draw(self, pair, seed)
        others.append(drawn != pair["text"])
        return drawn

    monkeypatch.setattr(CaptionPool, "draw", watched_draw)
    plain = replace(RETRIEVAL, negatives="similar", crop_scale=None, flip_rate=0.0, simple_captions=False)
    for name, recipe in (("plain", plain), ("full", RETRIEVAL), ("again", RETRIEVAL)):
        run_retrieval(with_steps(recipe, 1), shards, Run(tmp_path / name), second)
    first, full, again = seen
    assert "negative_input_ids" not in first
    assert full["negative_input_ids"].shape == full["positive_input_ids"].shape
    differs = (full["negative_input_ids"] != full["positive_input_ids"]).any(dim=1)
    assert differs.tolist() == others[: len(differs)]  # images of one colour have captions of one text
    assert augments == [None, *[Augmentation((0.5, 1.0), 0.5, RETRIEVAL.seed)] * 2]
    assert torch.equal(full["image_ids"], first["image_ids"])  # the same pairs
    assert all(torch.equal(value, again[key]) for key, value in full.items())


CHATS = {
    "simple": ("patches", False, None, {"projector", "language"}),
    "simple, decoder frozen": ("patches", True, "vision", {"projector", "vision"}),
    "full": ("queries_and_patches", False, None, {"projector", "language"}),
    "full, decoder frozen": ("queries_and_patches", True, "qllama", {"projector", "queries", "qllama"}),
}


@pytest.mark.parametrize("name", CHATS)
def test_stage_3_makes_a_chat_model_of_stage_2_and_trains_what_it_says(name, second, dialogues, language, tmp_path):
    *choices, trained = CHATS[name]
    connector, freeze_language, _ = choices
    recipe = shrunk(stage3_small(*choices), steps=8, rate=1e-2)
    run_stage3(recipe, dialogues, Run(tmp_path), second, language["decoder"])
    if not freeze_language:  # no image can steer the random decoder of this test
        assert_falls(tmp_path, "whole", 0.5)
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert model.config.connector == connector
    assert model.num_image_token == processor.image_seq_length == 4 + 5 * (connector != "patches")
    before = {
        key.replace("qllama.model.", "qllama."): value
        for key, value in weights(second).items()
        if not key.startswith(("clip_", "itm_", "text_", "logit_", "qllama.lm_head"))
    }
    words = load_file(language["decoder"] / "model.safetensors")
    before |= {f"language_model.{key}": value for key, value in words.items()}
    after = weights(tmp_path)
    rows = len(before["language_model.model.embed_tokens.weight"])
    for key in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        after[key] = after[key][:rows]  # the image tokens are new
    assert changed_parts(before, after) == trained - {"projector"}
    message = [
        {"role": "user", "content": [{"type": "image", "image": image((9, 9, 9), 0)}, {"type": "text", "text": "?"}]}
    ]
    inputs = processor.apply_chat_template(
        message, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


def test_stage_2_keeps_frozen_parts_in_the_dtype_they_are_stored_in(first, shards, tmp_path):
    narrow = AutoModel.from_pretrained(first).bfloat16()
    narrow.save_pretrained(tmp_path / "narrow")
    AutoProcessor.from_pretrained(first).save_pretrained(tmp_path / "narrow")
    run_stage2(replace(with_steps(STAGE2, 2), use_bf16=True), shards, Run(tmp_path / "out"), tmp_path / "narrow")
    before, after = weights(tmp_path / "narrow"), weights(tmp_path / "out")
    trained = set(STAGE2.phases[0].learning_rates)
    for name, value in after.items():
        assert value.dtype == (torch.float32 if part_of(name) in trained else torch.bfloat16), name
    assert changed_parts(before, after) <= {"temperature"}


# ---------------------------------------------------------------------------------------------- parts that are trained
def test_the_rates_of_the_parts_rise_and_fall_in_the_optimizer(shards, language, tmp_path, monkeypatch):
    rates = {"vision": 1e-3, "pooling": 2e-3, "qllama": 3e-4, "text_projection": 4e-4, "temperature": 5e-4}
    phase = replace(STAGE1.phases[0], learning_rates=rates, steps=8, warmup_steps=2)
    seen = []
    original = trainer.StageTrainer.training_step

    def watched(self, *args, **kwargs):
        seen.append([(group["part"], group["lr"], group["betas"]) for group in self.optimizer.param_groups])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer.StageTrainer, "training_step", watched)
    recipe = replace(STAGE1, phases=(phase,), layer_decay=0.5)
    run_stage1(recipe, shards, Run(tmp_path), language["llama"])
    for step, share in {0: 0.0, 1: 0.5, 2: 1.0, 5: 0.5}.items():
        found = {part: {lr for name, lr, _ in seen[step] if name == part} for part in rates}
        for part, rate in rates.items():
            wanted = [rate / 2, rate / 4, rate / 8] if part == "vision" else [rate]  # two blocks and the embeddings
            assert sorted(found[part]) == pytest.approx(sorted({value * share for value in wanted})), (step, part)
    assert {betas for group in seen for _, _, betas in group} == {(0.9, 0.95)}


def test_two_phases_have_one_cosine_and_go_on_in_it_when_resumed(shards, language, tmp_path, monkeypatch):
    short, whole = (replace(phase, steps=6, warmup_steps=2) for phase in STAGE1.phases)
    recipe = replace(STAGE1, phases=(short, whole), save_steps=3)
    assert recipe.one_schedule
    seen = []
    original = trainer.StageTrainer.training_step

    def watched(self, *args, **kwargs):
        seen.append(self.optimizer.param_groups[0]["lr"])
        if len(seen) == 11:
            raise StoppedError
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer.StageTrainer, "training_step", watched)
    with pytest.raises(StoppedError):
        run_stage1(recipe, shards, Run(tmp_path), language["llama"])
    run_stage1(recipe, shards, Run(tmp_path, resume=True), language["llama"])
    peak = max(short.learning_rates.values())
    wanted = [peak * min(step / 2, 0.5 * (1 + math.cos(math.pi * (step - 2) / 10))) for step in range(12)]
    assert seen[:10] == pytest.approx(wanted[:10])
    assert seen[11:] == pytest.approx(wanted[9:])  # from the checkpoint of the third step of the second phase


def test_full_recipes_run_with_their_ways_of_saving_memory(shards, dialogues, language, tmp_path):
    """Gradient caching or accumulation, activation checkpointing and bfloat16, at tiny sizes."""
    sizes = {"vision_config": VISION, "text_config": TEXT, "model_config": STAGE1.model_config}
    short = {"steps": 1, "grad_cache_chunk_size": 4}
    folders = {name: tmp_path / name for name in ("stage1", "stage2", "retrieval", "stage3", "captions")}
    recipe = shrunk(stage1(), (42, 56), max_text_length=LENGTH, **sizes, **short)
    run_stage1(recipe, shards, Run(folders["stage1"]), llama=language["llama"])
    recipe = shrunk(stage2(), num_query_token=5, max_text_length=LENGTH, **short)
    run_stage2(recipe, shards, Run(folders["stage2"]), folders["stage1"])
    recipe = shrunk(retrieval(), max_text_length=LENGTH, **short)
    run_retrieval(recipe, shards, Run(folders["retrieval"]), folders["stage2"])
    recipe = shrunk(stage3("queries_and_patches"), **short)
    run_stage3(recipe, dialogues, Run(folders["stage3"]), folders["stage2"], language["decoder"])
    chat = AutoProcessor.from_pretrained(folders["stage3"])
    assert (chat.image_seq_length, chat.image_processor.resize_mode) == (5 + 4 * 4, "pad")  # queries, and all patches
    assert not {"<img>", "</img>"} & chat.tokenizer.get_vocab().keys()
    recipe = shrunk(captions(), max_text_length=LENGTH, **short)
    run_captions(recipe, shards, Run(folders["captions"]), folders["stage2"])
    for name, folder in folders.items():
        log = json.loads((folder / "training_log.json").read_text())
        assert log["recipe"]["gradient_checkpointing"], name
        assert all(math.isfinite(loss) for phase in log["recipe"]["phases"] for loss in losses(folder, phase["name"]))
        assert {value.dtype for value in weights(folder).values()} == {torch.float32}


@pytest.mark.slow
def test_small_recipes_run_at_their_own_sizes(shards, dialogues, language, tmp_path):
    """One step of each phase, on few pairs; models, images and texts are the recipes'."""

    def step_of(recipe):
        recipe = with_steps(recipe, 1)
        return replace(recipe, phases=tuple(replace(phase, batch_size=4) for phase in recipe.phases))

    folders = {name: tmp_path / name for name in ("stage1", "stage2", "retrieval", "patches", "queries_and_patches")}
    model = run_stage1(step_of(stage1_small()), shards, Run(folders["stage1"]), language["llama"])
    assert (model.config.vision_config.hidden_size, model.config.vision_config.num_hidden_layers) == (192, 6)
    run_stage2(step_of(stage2_small()), shards, Run(folders["stage2"]), folders["stage1"])
    run_retrieval(step_of(retrieval_small()), shards, Run(folders["retrieval"]), folders["stage2"])
    for connector in ("patches", "queries_and_patches"):
        source, decoder = folders["stage2"], language["decoder"]
        run_stage3(step_of(stage3_small(connector)), dialogues, Run(folders[connector]), source, decoder)
    sides = {"stage1": 112, "stage2": 112, "retrieval": 168, "patches": 112, "queries_and_patches": 112}
    for name, folder in folders.items():
        log = json.loads((folder / "training_log.json").read_text())
        # A single step is not logged under "loss": the log of the whole phase has its mean.
        found = [
            entry["train_loss"]
            for phase in log["recipe"]["phases"]
            for entry in log[phase["name"]]
            if "train_loss" in entry
        ]
        assert len(found) == len(log["recipe"]["phases"])
        assert all(map(math.isfinite, found)), name
        assert AutoProcessor.from_pretrained(folder).image_processor.size["height"] == sides[name]


@pytest.mark.parametrize("freeze_language", [False, True], ids=["tower frozen", "decoder frozen"])
def test_checkpointing_does_not_send_gradients_through_a_frozen_tower(
    freeze_language, second, dialogues, language, tmp_path, monkeypatch
):
    seen = []
    original = trainer.StageTrainer.training_step

    def watched(self, model, *args, **kwargs):
        hook = model.vision_model.register_forward_hook(
            lambda *call: seen.append(call[2].last_hidden_state.requires_grad)
        )
        loss = original(self, model, *args, **kwargs)
        hook.remove()
        return loss

    monkeypatch.setattr(trainer.StageTrainer, "training_step", watched)
    recipe = stage3("patches", freeze_language, "vision" if freeze_language else None)
    recipe = shrunk(recipe, steps=1, grad_cache_chunk_size=4, use_bf16=False)
    recipe = replace(recipe, model_config={})  # the tower has fewer blocks than the recipe leaves out
    assert recipe.gradient_checkpointing
    run_stage3(recipe, dialogues, Run(tmp_path), second, language["decoder"])
    assert set(seen[:2]) == {False}  # the MLP alone, in two rounds
    assert set(seen[2:]) == {freeze_language}


@pytest.mark.parametrize("part", ["qllama", "vision"])
def test_lora_trains_adapters_in_place_of_a_part_and_merges_them(part, first, shards, tmp_path):
    recipe = with_lora(STAGE2, [part], 1e-2)
    run_stage2(recipe, shards, Run(tmp_path, lora_rank=2, lora_parts=(part,)), first)
    assert_falls(tmp_path, "queries")
    adapters = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {part_of(name) for name in adapters} == {part}
    before, after = weights(first), weights(tmp_path)
    assert changed_parts(before, after) == {"temperature", part}
    changed = {n for n in before if not torch.equal(before[n], after[n]) and part_of(n) == part}
    assert all(before[name].ndim == 2 for name in changed)
    AutoModel.from_pretrained(tmp_path)


def test_a_stopped_stage_2_resumes_to_the_same_weights(second, first, shards, language, tmp_path):
    with stopped_after(6):
        run_stage2(STAGE2, shards, Run(tmp_path), first, language["llama"])
    run_stage2(STAGE2, shards, Run(tmp_path, resume=True), first, language["llama"])
    assert_same_weights(tmp_path, second)


# ------------------------------------------------------------------------------------------------------- command line
def test_the_command_line_runs_a_stage(second, dialogues, language, tmp_path, capsys):
    options = [
        "stage3", "--scale", "small", "--data", *dialogues, "--output", tmp_path / "chat", "--model", second,
        "--decoder", language["decoder"], "--connector", "queries_and_patches", "--steps", 1, "--batch-size", 2,
        "--lora-rank", 2, "--lora-parts", "language",
    ]  # fmt: skip
    assert main([str(option) for option in options]) == 0
    assert f"The model is in {tmp_path / 'chat'}." in capsys.readouterr().out
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "chat")
    assert model.config.connector == "queries_and_patches"
    assert (tmp_path / "chat" / "adapter" / "adapter_config.json").exists()
