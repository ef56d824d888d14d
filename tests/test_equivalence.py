"""The benchmark of equivalent copies: what the copies are, and how they are judged."""

import json

import pytest
import torch

from internvl.benchmarks import equivalence
from internvl.benchmarks.equivalence import BUNDLED, converted, damaged, judge, load_quantized, samples_path


@pytest.fixture(scope="module")
def original():
    return load_quantized(BUNDLED, None, "cpu").state_dict()


def test_a_copy_that_went_through_the_published_layouts_is_the_original(original):
    found = converted().state_dict()
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in original.items())


def test_its_tensors_are_those_that_came_back(original, monkeypatch):
    """All but the projector of the queries, which no published layout of a chat model has."""

    def zeros(model, processor, folder):
        return {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}

    monkeypatch.setattr(equivalence, "through_published_layout", zeros)
    kept = {name.partition(".")[0] for name, tensor in converted().state_dict().items() if tensor.any()}
    assert kept == {"mlp2"}


def test_only_the_decoder_is_damaged(original):
    changed = {name for name, tensor in damaged().state_dict().items() if not torch.equal(tensor, original[name])}
    assert all(name.startswith("language_model.model.layers.") for name in changed)
    assert len(changed) > 20


def test_copies_are_judged_on_what_they_were_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(equivalence, "RESULTS", tmp_path)
    asked = {"original": 2016, "converted": 2016, "damaged": 504}
    for name, number in asked.items():
        right = [int(index % 10 > 0 and not (name == "damaged" and index % 10 == 1)) for index in range(number)]
        samples = [{"id": str(index), "scores": {"accuracy": score}} for index, score in enumerate(right)]
        rows = [{"settings": {"task": "dialogue"}}, *samples]
        samples_path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    first, second = judge(["converted", "damaged"]).splitlines()[2:]
    assert first.startswith("| converted | 2016 questions | 89.98 | 89.98 | +0.00 |")
    assert first.endswith("| equivalent within 2 |")
    assert second.startswith("| damaged | 504 questions |")
    assert second.endswith("| worse |")
