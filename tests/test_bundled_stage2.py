"""Stage 2 of the bundled recipe: captions in five languages, what each phase trains, and what its folder holds."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from internvl.evaluation.captioning import generate_captions
from internvl.modeling_internvl import InternVLModel
from internvl.processing_internvl import InternVLProcessor
from internvl.synthetic.captions import CAPTION_PROMPTS
from internvl.synthetic.scenes import TILE_SIZE, draw_scene
from internvl.training.data.collators import GenerativeCollator
from internvl.training.data.generated import captioned_pair, encode_captions, scene_batches
from internvl.training.models.build import build_generative_model
from internvl.training.models.losses import info_nce_loss, l2_normalize
from internvl.training.models.parameter_groups import part_of
from internvl.training.recipes import with_steps
from internvl.training.stages import run_stage2
from internvl.training.trainer import Run

from .fixtures_bundled_run import tiny_run


RECIPE = tiny_run().stage2
NEW_PARTS, ALL_BUT_TOWER = (set(phase.learning_rates) for phase in RECIPE.phases)


@pytest.fixture(scope="module")
def collator(finished_default_run):
    processor = InternVLProcessor.from_pretrained(finished_default_run / "stage1")
    return GenerativeCollator(processor, RECIPE.max_text_length, padding="longest")


@pytest.fixture(scope="module")
def batches(collator):
    return scene_batches(RECIPE, RECIPE.phases[0], partial(encode_captions, collator))


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed_parts(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Parts of which a weight differs; what only one of them has counts too."""
    return {
        part_of(name)
        for name in before.keys() | after.keys()
        if name not in before or name not in after or not torch.equal(before[name], after[name])
    }


def test_what_is_learned_is_the_caption_after_the_prompt_of_its_language(batches, collator):
    pairs, batch = [captioned_pair(*drawn) for drawn in batches.scenes(1)], batches[1]
    assert len({pair["prompt"] for pair in pairs}) > 1
    tokenizer = collator.processor.tokenizer
    for pair, ids, mask, labels in zip(
        pairs, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        assert pair["prompt"] in CAPTION_PROMPTS.values()
        assert tokenizer.decode(ids[mask == 1]) == f"{pair['prompt']} {pair['text']}{tokenizer.eos_token}"
        assert tokenizer.decode(labels[labels >= 0]) == f" {pair['text']}{tokenizer.eos_token}"


def test_batches_repeat_and_no_column_is_all_padding(batches):
    batch, again = batches[1], batches[1]
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    assert not torch.equal(batch["pixel_values"], batches[0]["pixel_values"])
    assert batch["pixel_values"].shape[1:] == (3, TILE_SIZE, TILE_SIZE)
    masks = [value for key, value in batch.items() if key.endswith("attention_mask")]
    assert len(masks) == 3
    assert all(mask.any(dim=0).all() for mask in masks)
    assert batch["labels"].shape == batch["input_ids"].shape


def test_with_the_llama_the_texts_are_contrasted_with_internvl_c_too(finished_default_run, batches, collator):
    model = build_generative_model(RECIPE, finished_default_run / "stage2", collator.prefix_lengths()).eval()
    batch = batches[0]
    with torch.no_grad():
        without = model(**batch)
        model.itc_on_vision_tower = True
        found = model(**batch)
        images = l2_normalize(model.get_image_features(batch["pixel_values"]))
        texts = l2_normalize(model.get_text_features(batch["summarize_input_ids"], batch["summarize_attention_mask"]))
        expected = info_nce_loss(images, texts, model.logit_scale.exp())
    assert without.loss_itc_tower is None
    torch.testing.assert_close(found.loss_itc_tower, expected, atol=1e-5, rtol=1e-5)
    parts = found.loss_itc + found.loss_itm + found.loss_itg + expected  # negatives are drawn anew in each call
    torch.testing.assert_close(found.loss, parts, atol=1e-5, rtol=1e-5)


def test_the_first_phase_trains_what_is_new_and_nothing_else(finished_default_run, tmp_path):
    recipe, source = replace(RECIPE, phases=RECIPE.phases[:1], eval_steps=None), finished_default_run / "stage1"
    run_stage2(recipe, None, Run(tmp_path / "trained"), source)
    run_stage2(with_steps(recipe, 0), None, Run(tmp_path / "start"), source)
    stage1, start, trained = map(weights_of, (source, tmp_path / "start", tmp_path / "trained"))
    assert changed_parts(stage1, start) == NEW_PARTS - {"temperature"}  # new, and the rest is stage 1's
    assert changed_parts(start, trained) == NEW_PARTS


def test_the_whole_run_trains_all_but_the_vision_tower(finished_default_run):
    stage1, stage2 = (weights_of(finished_default_run / name) for name in ("stage1", "stage2"))
    assert changed_parts(stage1, stage2) == ALL_BUT_TOWER


def test_the_folder_is_an_internvl_g_that_describes_images(finished_default_run, batches):
    folder = finished_default_run / "stage2"
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    assert type(model) is InternVLModel
    assert model.config.num_query_token == RECIPE.num_query_token
    images = [draw_scene(scene) for scene, _ in batches.scenes(0)][:2]
    texts = generate_captions(model, processor, images, "zh", max_new_tokens=4)
    assert len(texts) == 2
    embeds = model.get_image_features(processor(images=images, return_tensors="pt")["pixel_values"], mode="InternVL-G")
    assert embeds.shape == (2, model.config.clip_embed_dim)


def test_the_log_holds_all_three_losses_and_the_retrieval_curve(finished_default_run):
    log = json.loads((finished_default_run / "stage2" / "training_log.json").read_text(encoding="utf-8"))
    assert set(log) == {"recipe", "settings", "arguments", "queries", "queries_and_llama"}
    assert all(log["queries"][-1][f"loss_{name}"] > 0 for name in ("itc", "itm", "itg"))
    curve = [row for row in log["queries_and_llama"] if "recall_at_1_InternVL-G" in row]
    assert [row["step"] for row in curve] == [2, 3]
    assert all(0 <= row[f"recall_at_1_InternVL-{mode}"] <= 1 for row in curve for mode in "CG")
