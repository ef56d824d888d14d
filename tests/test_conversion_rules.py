"""Key tables read both ways, tensors that are read when needed, and what holds for every table of the conversion."""

from pathlib import Path

import pytest
import torch

from internvl.conversion.formats.rules import TensorRule, inverse, rename, translate, within
from internvl.conversion.readers.tensors import LazyTensor, TensorReader, computed, in_order_of_files, stored


def open_nothing(file):
    raise AssertionError(f"{file} was opened")


def made(value: torch.Tensor) -> LazyTensor:
    return LazyTensor(tuple(value.shape), value.dtype, Path("x"), lambda reader: value)


def values(tensors):
    return {name: tensor.load(TensorReader()) for name, tensor in tensors.items()}


FUSED = TensorRule(
    ("layers.{}.q", "layers.{}.k"),
    ("blocks.{}.qk",),
    rightward=(lambda parts, settings: torch.cat(list(parts)),),
    leftward=(
        lambda parts, settings: parts[0][: settings["width"]],
        lambda parts, settings: parts[0][settings["width"] :],
    ),
)
RULES = (FUSED, rename("layers.{}.ls1", "blocks.{}.ls1.gamma"), rename("mlp1.0.*", "projector.first.*"))


def test_a_table_and_its_inverse_cancel():
    torch.manual_seed(0)
    tensors = {f"layers.{layer}.{part}": made(torch.randn(3, 2)) for layer in (0, 11) for part in ("q", "k", "ls1")}
    tensors |= {"mlp1.0.weight": made(torch.randn(2)), "mlp1.0.bias": made(torch.randn(2))}
    there = translate(tensors, RULES, {"width": 3})
    back = translate(there.tensors, inverse(RULES), {"width": 3})
    assert set(there.tensors) == {
        *(f"blocks.{layer}.{part}" for layer in (0, 11) for part in ("qk", "ls1.gamma")),
        "projector.first.weight",
        "projector.first.bias",
    }
    assert there.origins["blocks.11.qk"] == ("layers.11.q", "layers.11.k")
    torch.testing.assert_close(values(back.tensors), values(tensors), rtol=0, atol=0)


def test_digits_that_are_part_of_a_name_are_no_slots():
    assert translate({"layers.3.ls2": made(torch.zeros(1))}, RULES).unknown == ["layers.3.ls2"]
    assert translate({"mlp1.1.weight": made(torch.zeros(1))}, RULES).unknown == ["mlp1.1.weight"]


def test_everything_that_does_not_fit_is_listed():
    one = made(torch.zeros(1))
    found = translate(
        {"layers.0.q": one, "a.w": one, "b.w": one, "c": one}, (*RULES, rename("a.*", "d.*"), rename("b.*", "d.*"))
    )
    assert found.incomplete == ["layers.0.k"]
    assert found.doubled == ["d.w"]
    assert found.unknown == ["c"]


def test_a_table_can_lie_deeper_on_either_side():
    found = translate({"tower.layers.4.ls1": made(torch.ones(1))}, within("tower.", "", RULES))
    assert list(found.tensors) == ["blocks.4.ls1.gamma"]


def test_shapes_and_types_are_known_before_anything_is_read():
    source = stored(open_nothing, Path("weights"), "w", (6, 4), torch.bfloat16)
    half = computed(lambda value: value.float()[:3], source)
    assert (half.shape, half.dtype, half.num_bytes) == ((3, 4), torch.float32, 48)
    with pytest.raises(AssertionError, match="weights was opened"):
        half.load(TensorReader())


def test_tensors_of_one_file_stay_together():
    tensors = {
        name: stored(open_nothing, Path(name[0]), name, (1,), torch.float32) for name in ("b1", "a1", "b2", "a2")
    }
    assert list(in_order_of_files(tensors, [Path("a"), Path("b")])) == ["a1", "a2", "b1", "b2"]


def test_a_closed_reader_opens_its_files_again():
    opened = []

    def open_file(file):
        opened.append(file)
        return {"w": torch.ones(1)}.__getitem__

    reader = TensorReader()
    tensor = stored(open_file, Path("a"), "w", (1,), torch.float32)
    for _ in range(2):
        tensor.load(reader)
        tensor.load(reader)
        reader.close()
    assert opened == [Path("a"), Path("a")]
