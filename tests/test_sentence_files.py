"""Files beside InternVL-C and -G for sentence-transformers, and the mode in which it embeds images."""

import json

import pytest
import torch

from internvl import InternVLConfig, InternVLModel
from internvl.sentence_files_internvl import SENTENCE_FILES

from .tiny import internvl_model, pixels, summary_ids


def test_saved_folders_have_the_files_and_keep_prompts_of_a_user(tmp_path):
    model = internvl_model()
    name = "config_sentence_transformers.json"
    (tmp_path / name).write_text('{"prompts": {"query": "find: "}}')
    model.save_pretrained(tmp_path)
    found = {file: json.loads((tmp_path / file).read_text()) for file in SENTENCE_FILES}
    assert found.pop(name) == {"prompts": {"query": "find: "}}
    assert found == {file: content for file, content in SENTENCE_FILES.items() if file != name}


def test_other_processes_write_nothing(tmp_path):
    internvl_model().save_pretrained(tmp_path, is_main_process=False)
    assert not any((tmp_path / file).exists() for file in SENTENCE_FILES)


def test_the_bundled_model_has_the_files(root):
    found = {file: json.loads((root / "internvl_g" / file).read_text()) for file in SENTENCE_FILES}
    assert found == SENTENCE_FILES


@torch.no_grad()
def test_the_mode_of_a_call_without_one_is_that_of_the_configuration(tmp_path):
    model, images = internvl_model(), pixels(2)
    by_mode = [model.get_image_features(images, mode=mode) for mode in ("InternVL-C", "InternVL-G")]
    assert not torch.equal(*by_mode)
    assert torch.equal(model.get_image_features(images), by_mode[0])
    model.config.default_mode = "InternVL-G"
    model.save_pretrained(tmp_path)
    loaded = InternVLModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.get_image_features(images), by_mode[1])
    assert torch.equal(loaded.encode_image(images, mode="InternVL-C"), by_mode[0])
    modes = (None, "InternVL-G", "InternVL-C")
    logits = [loaded(summary_ids(2), images, mode=mode).logits_per_image for mode in modes]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="`default_mode` must be one of"):
        InternVLConfig(default_mode="G")
