"""The script of the default checkpoint: a stopped run goes on exactly, and what it writes answers after loading."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from internvl.evaluation.dialogue import answer_questions
from internvl.training.default_checkpoint import AnsweringBatches, Batch, Phase, Recipe, build_processor, train
from internvl.training.scenes import LAYOUTS, draw_scene, sample_scene, scene_generator
from internvl.training.tokenizer import SPECIAL_TOKENS, build_tokenizer, tokenizer_corpus


TINY = Recipe(
    seeing=Phase(steps=2, batches=(Batch(1.0, 2, {"crowd": 1}),), save_steps=2),
    answering=Phase(
        steps=6, batches=(Batch(0.5, 2, {"mixed": 1}), Batch(0.5, 1, {"few_tiles": 1})), warmup_steps=2, save_steps=2
    ),
    turns=3,
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(tokenizer_corpus(num_scenes=50))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train(TINY, folder, use_bf16=False)
    return folder


def test_a_stopped_run_resumes_to_the_same_weights(finished, tmp_path, monkeypatch):
    original = AnsweringBatches.__getitem__

    def stop_at_step_4(self, step):
        if step == 4:
            raise RuntimeError("stopped")
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(AnsweringBatches, "__getitem__", stop_at_step_4)
        with pytest.raises(RuntimeError, match="stopped"):
            train(TINY, tmp_path, use_bf16=False)
    assert not (tmp_path / "model.safetensors").exists()
    assert list((tmp_path / "trainer" / "answering").glob("checkpoint-*"))
    train(TINY, tmp_path, resume=True, use_bf16=False)
    expected, resumed = (load_file(folder / "model.safetensors") for folder in (finished, tmp_path))
    assert expected.keys() == resumed.keys()
    for name, value in expected.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


def test_the_written_folder_loads_and_answers_about_tiled_pictures(finished):
    model, processor = AutoModelForImageTextToText.from_pretrained(finished), AutoProcessor.from_pretrained(finished)
    scenes = [
        sample_scene(scene_generator("held_out", 0, i), LAYOUTS[name], "held_out")
        for i, name in enumerate(("mixed", "many_tiles"))
    ]
    answers = answer_questions(model.eval(), processor, [(draw_scene(scene), "What?") for scene in scenes])
    assert len(answers) == 2
    assert processor.image_processor.max_num == 6
    assert model.generation_config.eos_token_id == [processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id]


def test_the_data_of_a_step_depends_on_the_seed_and_the_step_alone(tokenizer):
    processor = build_processor(tokenizer)
    first = AnsweringBatches(TINY.answering, 0, processor, 3)
    second = AnsweringBatches(TINY.answering, 0, processor, 3)
    other = AnsweringBatches(TINY.answering, 1, processor, 3)
    assert torch.equal(first[3]["pixel_values"], second[3]["pixel_values"])
    assert torch.equal(first[3]["labels"], second[3]["labels"])
    assert not torch.equal(first[3]["input_ids"], first[2]["input_ids"])
    assert not torch.equal(first[3]["input_ids"], other[3]["input_ids"])


def test_only_answers_and_their_end_are_learned(tokenizer):
    phase = replace(TINY.answering, batches=(Batch(1.0, 1, {"mixed": 1}),))
    data = AnsweringBatches(phase, 0, build_processor(tokenizer), 3)
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
