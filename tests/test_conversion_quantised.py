"""Published quantised checkpoints: the numbers that bitsandbytes' layers compute with, bit by bit, or one sentence."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from .fixtures_conversions import edit_json, refused, run, told
from .fixtures_published import published_chat


functional = pytest.importorskip("bitsandbytes").functional


LINEAR = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight", "_proj.weight")


def quantised(source, change, **config):
    """A checkpoint whose linear layers are kept otherwise; the wanted weights, by name."""
    file = source / "model.safetensors"
    tensors, wanted = {}, {}
    for name, tensor in load_file(file).items():
        if name.endswith(LINEAR) and tensor.dim() == 2 and "embedding" not in name:
            parts, wanted[name] = change(name, tensor)
            tensors |= parts
        else:
            tensors[name] = wanted[name] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    edit_json(source / "config.json", **config)
    return wanted


def in_eight_bits(name, tensor):
    weight, scale, _ = functional.int8_vectorwise_quant(tensor.half())
    module = name.removesuffix(".weight")
    parts = {name: weight, f"{module}.SCB": scale, f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, functional.int8_vectorwise_dequant(weight, scale)


def in_four_bits(kind, is_nested, dtype):
    def change(name, tensor):
        # As one row: bitsandbytes 0.50 on a CPU mistakes the blocks of rows that do not hold a whole number of them.
        packed, state = functional.quantize_4bit(
            tensor.to(dtype).view(1, -1), blocksize=64, quant_type=kind, compress_statistics=is_nested
        )
        wanted = functional.dequantize_4bit(packed, state).view(tensor.shape)
        state.shape = tensor.shape
        parts = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        return {name: packed, **parts}, wanted

    return change


def assert_holds(out, wanted):
    found = load_file(out / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name
    assert not [name for name in found if found[name].dtype in (torch.int8, torch.uint8)]


def test_eight_bits_become_the_numbers_they_stand_for(tmp_path):
    source = published_chat(tmp_path)
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    wanted = quantised(source, in_eight_bits, **config)
    out, said = told(source, tmp_path / "out", verify=True)
    assert_holds(out, wanted)
    assert "8 bits (bitsandbytes)" in said
    assert "quantization_config" not in (out / "config.json").read_text()
    back = run(out, tmp_path / "back", to="published", verify=True)
    assert "quantization_config" not in (back / "config.json").read_text()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("is_nested", "dtype"),
    [(False, torch.float32), (True, torch.float16), (True, torch.bfloat16)],
    ids=["plain-float32", "nested-float16", "nested-bfloat16"],
)
def test_four_bits_become_the_numbers_their_layers_compute_with(dtype, is_nested, kind, tmp_path):
    source = published_chat(tmp_path)
    wanted = quantised(source, in_four_bits(kind, is_nested, dtype))
    out = run(source, tmp_path / "out")
    assert_holds(out, wanted)
    name = next(name for name in wanted if name.endswith("qkv.weight"))
    assert load_file(out / "model.safetensors")[name].dtype == dtype


@pytest.mark.parametrize(
    ("mark", "method"),
    [
        ("qweight", None),
        ("qzeros", "awq"),
        ("weight_packed", 5),
        ("weight_scale", "evil\n" * 100),
        ("weight_scale_inv", None),
        ("W_q", None),
    ],
)
def test_other_quantisations_are_answered_with_one_sentence_that_names_them(mark, method, tmp_path, capsys):
    source = published_chat(tmp_path)

    def change(name, tensor):
        return {f"{name.removesuffix('.weight')}.{mark}": torch.zeros(2, dtype=torch.int32)}, tensor

    quantised(source, change, quantization_config={"quant_method": method})
    error = refused(capsys, source, tmp_path / "out")
    assert "is quantised (" in error
    assert ("(awq)" in error) == (method == "awq")
    assert "evil" not in error


@pytest.mark.parametrize(
    "damage", ["no-scale-shape", "gpu-order", "no-weight", "state-is-no-json", "state-lacks-shape", "too-few-blocks"]
)
def test_parts_that_do_not_fit_are_refused_with_the_file(damage, tmp_path, capsys):
    source = published_chat(tmp_path)
    is_eight = damage in ("no-scale-shape", "gpu-order", "no-weight")
    quantised(source, in_eight_bits if is_eight else in_four_bits("nf4", True, torch.float32))
    file = source / "model.safetensors"
    tensors = load_file(file)
    ends = {"no-scale-shape": ".SCB", "gpu-order": ".weight_format", "too-few-blocks": ".absmax"}
    name = next(n for n in tensors if n.endswith(ends.get(damage, ".SCB" if is_eight else "__nf4")))
    if damage == "no-weight":
        del tensors[name.replace(".SCB", ".weight")]
    elif damage == "gpu-order":
        tensors[name] = torch.tensor(1, dtype=torch.uint8)
    elif damage.startswith("state"):
        text = b"nonsense" if damage == "state-is-no-json" else b'{"blocksize": 64, "dtype": "float32"}'
        tensors[name] = torch.tensor(list(text), dtype=torch.uint8)
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file)
    assert "model.safetensors" in refused(capsys, source, tmp_path / "out")
