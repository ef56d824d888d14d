"""The recipes say what is trained at which rate; their batches hold what the training models ask for."""

import inspect
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from PIL import Image

from internvl.image_processing_internvl import InternVLImageProcessor
from internvl.processing_internvl import InternVLProcessor
from internvl.training import recipes, stage_command
from internvl.training.commands import FUNNEL_STAGES, LATER_SCALES, RETRIEVAL_DATA, SCALES, training_parser
from internvl.training.data.collators import GenerativeCollator, RetrievalCollator, image_number
from internvl.training.data.filters import STAGES
from internvl.training.models.parameter_groups import PARTS
from internvl.training.models.pretraining import InternVLForGenerativeTraining, InternVLForRetrievalTraining
from internvl.training.recipes import RECIPES, stage1, stage1_bundled, stage1_small, stage2, stage3, with_steps
from internvl.training.trainer import Run, training_arguments, with_lora

from .fixtures_text import make_image, make_tokenizer


FULL = ("--connector", "queries_and_patches")
ALL = [(stage, scale) for stage, scales in RECIPES.items() for scale in scales]


def trained(recipe) -> list[set[str]]:
    return [set(phase.learning_rates) for phase in recipe.phases]


# --------------------------------------------------------------------------------------------------------- the recipes
@pytest.mark.parametrize(("stage", "scale"), ALL)
def test_recipes_are_frozen_and_name_known_parts(stage, scale):
    recipe = RECIPES[stage][scale]()
    with pytest.raises(FrozenInstanceError):
        recipe.seed = 1
    for phase in recipe.phases:
        assert set(phase.learning_rates) <= set(PARTS)
        assert 0 < recipe.schedule_of(phase)[2] < recipe.schedule_of(phase)[1]


def test_the_command_line_offers_the_scales_and_stages_that_there_are():
    """They are written out there, because the tables they come from need torch."""
    assert [*RECIPES["stage1"]] == [*SCALES]
    assert [*RECIPES["retrieval"]] == [*RECIPES["captions"]] == [*SCALES[:2]]
    assert [*RECIPES["stage3"]] == [*SCALES, *LATER_SCALES]
    assert tuple(recipes.RETRIEVAL_DATA) == RETRIEVAL_DATA
    assert FUNNEL_STAGES == STAGES


@pytest.mark.parametrize("stage", RECIPES)
def test_both_scales_train_the_same_parts(stage):
    full, small = (RECIPES[stage][scale]() for scale in ("full", "small"))  # of stage 3 in the simple configuration
    assert trained(full) == trained(small)
    assert [phase.name for phase in full.phases] == [phase.name for phase in small.phases]
    for large, little in zip(full.phases, small.phases, strict=True):
        assert little.steps * little.batch_size < large.steps * large.batch_size


def test_full_stages_see_as_many_samples_as_the_paper_says():
    samples = [phase.steps * phase.batch_size / 1e9 for phase in stage1().phases]
    assert sum(samples) == pytest.approx(28.7, abs=0.01)
    assert samples[1] == pytest.approx(0.5, abs=0.01)
    assert [phase.image_size for phase in stage1().phases] == [196, 224]
    (queries,) = stage2().phases
    assert queries.steps * queries.batch_size / 1e9 == pytest.approx(1.6, abs=0.05)


@pytest.mark.parametrize(
    ("choices", "parts"),
    [
        ((), [{"projector"}, {"projector", "language"}]),
        (("patches", True), [{"projector"}]),
        (("patches", True, "vision"), [{"projector"}, {"projector", "vision"}]),
        (("queries_and_patches",), [{"projector"}]),  # the paper's, with a frozen decoder
        (("queries_and_patches", False), [{"projector"}, {"projector", "language"}]),
        (("queries_and_patches", None, "qllama"), [{"projector"}, {"projector", "queries", "qllama"}]),
    ],
)
def test_stage_3_trains_the_projector_first_and_then_more(choices, parts):
    recipe = stage3(*choices)
    assert trained(recipe) == parts
    assert recipe.connector == (choices[0] if choices else "patches")


def test_stage_3_sees_as_many_dialogues_as_the_paper_says():
    def sizes(recipe):
        return [(phase.image_size, phase.batch_size, phase.steps * phase.batch_size) for phase in recipe.phases]

    assert sizes(stage3()) == [(336, 256, 558_336), (336, 128, 665_344)]  # LLaVA's 558,128 and 665,298
    assert sizes(stage3("patches", True)) == [(336, 128, 665_344)]
    assert sizes(stage3("queries_and_patches")) == [(224, 512, 4_000_256)]
    assert sizes(stage3("queries_and_patches", False)) == [(336, 512, 4_000_256)] * 2
    assert sum(size[2] for size in sizes(recipes.stage3_v1_2())[1:]) == pytest.approx(1.2e6, rel=1e-3)
    assert sizes(recipes.stage3_v2_5())[-1][2] == pytest.approx(16.3e6, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stage3(also_train="vision"), "`also_train` 'vision' is for a frozen decoder"),
        (lambda: stage3(freeze_language=True, also_train="qllama"), "needs the connector 'queries_and_patches'"),
        (lambda: stage3(freeze_language=True, also_train="heads"), "`also_train` must be 'qllama' or 'vision'"),
        (lambda: recipes.stage3_v1_2("queries_and_patches"), "in the simple configuration"),
        (lambda: replace(stage3(), max_tiles=2), "with `resize_mode` 'pad' an image is one tile"),
        (lambda: recipes.retrieval(dataset="flickr8k"), "`dataset` must be one of .* got 'flickr8k'"),
        (lambda: replace(recipes.retrieval(), negatives="hard"), "`negatives` must be one of .* got 'hard'"),
        (lambda: replace(stage1(), crop_scale=(0.9, 0.5)), "`crop_scale` must be two rising shares"),
        (lambda: replace(stage1(), flip_rate=2.0), r"`flip_rate` must be in \[0, 1\], got 2.0"),
    ],
)
def test_recipes_that_cannot_be_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_retrieval_is_as_long_as_its_data():
    steps = {name: recipes.retrieval(dataset=name).phases[0].steps for name in RETRIEVAL_DATA}
    assert steps == {"flickr30k": 1_420, "flickr30k-cn": 1_420, "coco": 2_770}
    (heads,) = recipes.retrieval(heads_only=True).phases
    assert (heads.image_size, {*heads.learning_rates}) == (224, {"text_projection"})
    assert recipes.retrieval().phases[0].image_size == 364


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("retrieval", "--dataset", "coco", "--heads-only"), recipes.retrieval(None, "coco", True)),
        (("retrieval", "--image-size", "224"), recipes.retrieval(224)),
        (("captions",), recipes.captions()),
        (("stage3", "--connector", "queries_and_patches"), stage3("queries_and_patches")),
        (
            ("stage3", "--connector", "queries_and_patches", "--no-freeze-language"),
            stage3("queries_and_patches", False),
        ),
        (("stage3", "--freeze-language", "--also-train", "vision"), stage3("patches", True, "vision")),
    ],
)
def test_the_command_line_chooses_the_recipe(words, wanted):
    options = training_parser().parse_args([*words, "--scale", "full", "--model", "m", "--output", "o"])
    assert stage_command._recipe_of(options) == wanted


def test_both_phases_of_stage_1_share_a_schedule(tmp_path):
    recipe = stage1()
    assert [recipe.schedule_of(phase) for phase in recipe.phases] == [
        (0, 175_171, 5000),
        (172_119, 175_171, 5000),
    ]
    apart = replace(recipe, one_schedule=False)
    assert [apart.schedule_of(phase)[:2] for phase in apart.phases] == [(0, 172_119), (0, 3_052)]
    arguments = training_arguments(replace(recipe, use_bf16=False), recipe.phases[1], Run(tmp_path))
    assert (arguments.max_steps, arguments.warmup_steps) == (3_052, 5000)


def test_lora_adds_rates_in_the_last_phase_alone():
    recipe = with_lora(stage3(), ["vision", "language"], 3e-4)
    assert trained(recipe) == [{"projector"}, {"projector", "vision", "language"}]
    assert recipe.phases[1].learning_rates["vision"] == 3e-4
    assert recipe.phases[1].learning_rates["language"] == stage3().phases[1].learning_rates["language"]


def test_a_try_is_short():
    assert [(phase.steps, phase.warmup_steps) for phase in with_steps(stage3(), 30).phases] == [(30, 3), (30, 3)]


def test_arguments_are_the_recipe_s(tmp_path):
    recipe = replace(stage3(), use_bf16=False)
    arguments = training_arguments(recipe, recipe.phases[0], Run(tmp_path, num_workers=3), rows_per_process=4)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (4, 64)
    assert (arguments.max_steps, arguments.warmup_steps, arguments.lr_scheduler_type) == (2181, 66, "cosine")
    assert arguments.gradient_checkpointing
    assert (arguments.max_grad_norm, arguments.dataloader_num_workers, arguments.seed) == (1.0, 3, 0)


def test_a_cooldown_makes_the_schedule_of_a_phase_on_generated_scenes(tmp_path):
    recipe = stage1_bundled()
    arguments = training_arguments(recipe, recipe.phases[0], Run(tmp_path, num_workers=1))
    assert arguments.lr_scheduler_type == "warmup_stable_decay"
    assert arguments.lr_scheduler_kwargs == {"num_decay_steps": 440, "decay_type": "linear"}
    assert arguments.per_device_train_batch_size == 1  # an item is a batch
    with pytest.raises(ValueError, match="which only generated `batches` have"):
        replace(stage3().phases[0], dense_supervision=True)


def test_fields_are_read_under_their_old_names():
    with pytest.warns(FutureWarning, match="`rates` is now called `learning_rates`"):
        phase = replace(stage2().phases[0], rates={"queries": 1.0})
    assert phase.learning_rates == {"queries": 1.0}
    with pytest.warns(FutureWarning, match="`rows_at_a_time`"):
        assert replace(stage2(), rows_at_a_time=7).grad_cache_chunk_size == 7


def test_a_batch_is_shared_out_evenly_or_refused(tmp_path, monkeypatch):
    recipe = replace(stage1_small(), phases=(replace(stage1_small().phases[0], batch_size=12),))
    monkeypatch.setattr("internvl.training.trainer.num_processes", lambda: 4)
    assert training_arguments(recipe, recipe.phases[0], Run(tmp_path)).per_device_train_batch_size == 3
    with pytest.raises(ValueError, match="A batch of 12 cannot be shared out evenly to 4 processes with 2 rows"):
        training_arguments(recipe, recipe.phases[0], Run(tmp_path), rows_per_process=2)


# --------------------------------------------------------------------------------------------------------- the batches
@pytest.fixture(scope="module", params=[True, False], ids=["with end token", "without"])
def processor(request) -> InternVLProcessor:
    image_processor = InternVLImageProcessor(size={"height": 28, "width": 28}, resize_mode="squash")
    tokenizer = make_tokenizer(special_tokens=(), add_eos=request.param)
    return InternVLProcessor(image_processor, tokenizer, mode="contrastive")


def pairs(*texts: str) -> list[dict]:
    return [{"image": make_image(30, 20, seed=i), "text": text} for i, text in enumerate(texts)]


def words(processor, ids: torch.Tensor, mask: torch.Tensor) -> str:
    return processor.tokenizer.decode(ids[mask.bool()])


def test_a_batch_of_stage_2_holds_three_texts_of_one_length(processor):
    batch = GenerativeCollator(processor, 40, size={"height": 42, "width": 42})(pairs("a red bus", "a cat on a mat"))
    assert batch["pixel_values"].shape == (2, 3, 42, 42)
    texts = {
        "positive_": "<s>a red bus</s>",
        "summarize_": "<s>summarize:a red bus</s>",
        "": "<s>English caption: a red bus</s>",
    }
    for prefix, wanted in texts.items():
        ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
        assert ids.shape == mask.shape == (2, 40)
        assert words(processor, ids[0], mask[0]) == wanted
        assert (mask.sort(dim=1, descending=True).values == mask).all()  # padding on the right
    assert set(batch) <= set(inspect.signature(InternVLForGenerativeTraining.forward).parameters)


def test_texts_may_be_padded_to_the_longest_of_the_batch(processor):
    rows = pairs("a red bus", "a cat on a mat")
    fixed, longest = (
        GenerativeCollator(processor, 40)(rows),
        GenerativeCollator(processor, 40, padding="longest")(rows),
    )
    for prefix in ("positive_", "summarize_", ""):
        length = int(fixed[f"{prefix}attention_mask"].sum(dim=1).max())
        assert length < 40
        for name in (f"{prefix}input_ids", f"{prefix}attention_mask", *(["labels"] if not prefix else [])):
            assert torch.equal(longest[name], fixed[name][:, :length]), name
    with pytest.raises(ValueError, match=r"`padding` must be one of .* got 'shortest'"):
        GenerativeCollator(processor, 40, padding="shortest")


def test_the_caption_and_its_end_are_learned_alone(processor):
    batch = GenerativeCollator(processor, 40)(pairs("a red bus", "a cat"))
    for label, ids, wanted in zip(batch["labels"], batch["input_ids"], (" a red bus</s>", " a cat</s>"), strict=True):
        is_learned = label != -100
        assert processor.tokenizer.decode(label[is_learned]) == wanted
        assert torch.equal(label[is_learned], ids[is_learned])


def test_long_captions_are_cut_and_keep_their_end(processor):
    collator = GenerativeCollator(processor, 24)
    batch = collator(pairs("a red bus on a street " * 9))
    for prefix in ("positive_", "summarize_", ""):
        assert batch[f"{prefix}attention_mask"].all()
        assert batch[f"{prefix}input_ids"][0, -1] == processor.tokenizer.eos_token_id


def test_prefix_lengths_tell_texts_without_a_caption(processor):
    collator = GenerativeCollator(processor, 40)
    batch = collator(pairs("", "a"))
    lengths = collator.prefix_lengths()
    for name, prefix in (("matching", "positive"), ("summarize", "summarize")):
        counts = batch[f"{prefix}_attention_mask"].sum(dim=1)
        assert counts[0] == lengths[f"{name}_prefix_length"] < counts[1]


def test_retrieval_knows_equal_images(processor):
    rows = pairs("a", "b", "c")
    rows[2]["image"] = rows[0]["image"].copy()
    batch = RetrievalCollator(processor, 40)(rows)
    assert batch["image_ids"][0] == batch["image_ids"][2] != batch["image_ids"][1]
    assert batch["image_ids"].dtype == torch.long
    assert set(batch) <= set(inspect.signature(InternVLForRetrievalTraining.forward).parameters)
    assert "labels" not in batch
    flat, tall = Image.new("L", (4, 2)), Image.new("L", (2, 4))
    assert image_number(flat) != image_number(tall)


def test_texts_too_short_for_a_caption_are_refused(processor):
    with pytest.raises(ValueError, match=r"`max_length` must be above .* got 5"):
        GenerativeCollator(processor, 5)
