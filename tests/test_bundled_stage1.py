"""Stage 1 of the bundled recipe: batches repeat by seed, images are the processor's, and a run leaves what stage 2
needs.
"""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModel, AutoProcessor

from internvl.modeling_internvl import InternVLModel
from internvl.synthetic.captions import LANGUAGES
from internvl.synthetic.tokenizer import caption_corpus, train_tokenizer
from internvl.training.data.generated import encode_pairs, scene_batches
from internvl.training.models.build import build_pair_processor
from internvl.training.stages import run_stage1
from internvl.training.trainer import Run

from .fixtures_bundled_run import few_scenes_and_one_thread, stopped_at, tiny_run


RECIPE = tiny_run().stage1


@pytest.fixture(scope="module")
def processor():
    return build_pair_processor(RECIPE, train_tokenizer(caption_corpus(num_scenes=20), 400))


@pytest.fixture(scope="module")
def batches(processor):
    return scene_batches(RECIPE, RECIPE.phases[0], partial(encode_pairs, processor))


@pytest.fixture(scope="module")
def finished_run(finished_default_run):
    return finished_default_run / "stage1"


def test_batches_repeat_by_seed_and_differ_by_phase_and_step(batches, processor):
    encode = partial(encode_pairs, processor)
    first, again = batches[1], batches[1]
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert first["pixel_values"].shape == (len(LANGUAGES), 3, 448, 448)
    for other in (
        batches[2],
        scene_batches(RECIPE, RECIPE.phases[1], encode)[1],
        scene_batches(replace(RECIPE, seed=1), RECIPE.phases[0], encode)[1],
    ):
        assert not torch.equal(first["pixel_values"], other["pixel_values"])


def test_every_image_has_a_caption_in_each_language(batches, processor):
    texts = processor.tokenizer.batch_decode(batches[1]["input_ids"], skip_special_tokens=True)
    scenes = batches.scenes(1)
    assert len(texts) == len(LANGUAGES) * len(scenes)
    for language, start in zip(LANGUAGES, range(0, len(texts), len(scenes)), strict=True):
        for text, (scene, _) in zip(texts[start : start + len(scenes)], scenes, strict=True):
            (item, *_) = scene.objects
            words = LANGUAGES[language]
            names = (
                [*words.shapes, *words.feminine]
                if item.kind == "shape"
                else [*words.digits, *"0123456789", *words.numerals]
            )
            assert any(name in text for name in names), (language, text)


def test_a_run_leaves_a_model_of_stage_1_that_stage_2_starts_from(finished_run):
    model = AutoModel.from_pretrained(finished_run)
    assert isinstance(model, InternVLModel)
    assert not model.config.has_queries
    grown = InternVLModel.from_pretrained(finished_run, num_query_token=4)
    torch.testing.assert_close(grown.text_projection, model.text_projection)
    inputs = AutoProcessor.from_pretrained(finished_run)(
        text=["a star", "一个星形"], padding=True, return_tensors="pt"
    )
    assert model.get_text_features(**inputs).shape == (2, model.config.clip_embed_dim)


def test_the_log_holds_losses_and_the_zero_shot_curve_of_each_phase(finished_run):
    log = json.loads((finished_run / "training_log.json").read_text(encoding="utf-8"))
    assert set(log) == {"recipe", "settings", "arguments", "objects", "whole"}
    for phase, steps in (("objects", [2, 3]), ("whole", [1])):
        curve = [row for row in log[phase] if "zero_shot_digit" in row]
        assert [row["step"] for row in curve] == steps
        assert all(0 <= row[f"zero_shot_{kind}"] <= 1 for row in curve for kind in ("digit", "shape", "colour"))


def test_the_same_seed_gives_the_same_weights_also_after_a_stop(finished_run, tmp_path):
    with few_scenes_and_one_thread(starts_workers_anew=True):
        with stopped_at("stage1/objects", 2):
            run_stage1(RECIPE, None, Run(tmp_path))
        saved = [path.name for path in (tmp_path / "trainer" / "objects").glob("checkpoint-*")]
        assert saved
        assert "checkpoint-3" not in saved
        run_stage1(RECIPE, None, Run(tmp_path, resume=True, num_workers=1))
    expected = InternVLModel.from_pretrained(finished_run).state_dict()
    for name, value in InternVLModel.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(value, expected[name]), name
