"""Properties that every model class must have; one test body runs over all of them."""

import copy
import re

import pytest
import torch

from . import tiny
from .fixtures_processes import run_elsewhere


NAMES = list(tiny.MODELS)


def build(name: str):
    make, make_inputs = tiny.MODELS[name]
    model = make()
    return model, make_inputs(model)


@torch.no_grad()
def run(model, inputs, **kwargs) -> torch.Tensor:
    return tiny.main_output(model(**inputs, **kwargs))


def real(tensor: torch.Tensor, inputs: dict) -> torch.Tensor:
    """Without the rows of padding, whose values mean nothing."""
    mask = inputs.get("attention_mask")
    return tensor if mask is None or tensor.shape[:2] != mask.shape else tensor[mask.bool()]


def flat_tensors(values) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    return [tensor for value in values for tensor in flat_tensors(value)] if isinstance(values, tuple) else []


@pytest.mark.parametrize("name", NAMES)
def test_eager_equals_sdpa(name):
    model, inputs = build(name)
    outputs = {}
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        used = {
            m.config._attn_implementation for m in model.modules() if hasattr(m, "config") and hasattr(m, "scaling")
        }
        assert used == {attention}  # else this compares the model with itself
        outputs[attention] = real(run(model, inputs), inputs)
    torch.testing.assert_close(outputs["eager"], outputs["sdpa"], atol=1e-5, rtol=1e-5)
    assert not torch.equal(outputs["eager"], torch.zeros_like(outputs["eager"]))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("QLlamaForCausalLM",)])
def test_attention_of_every_part_goes_through_the_registry(name):
    """A kernel of our own, registered with transformers, must be the one that runs, in every attention module."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    seen = set()

    def spy(module, *args, **kwargs):
        seen.add(type(module).__name__)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    model, inputs = build(name)
    expected = {type(m).__name__ for m in model.modules() if hasattr(m, "scaling") and hasattr(m, "config")}
    if name == "InternVLModel-C":
        expected -= {"QLlamaCrossAttention"}  # only InternVL-G looks through the queries
    model.set_attn_implementation("spy")
    run(model, inputs)
    assert seen == expected


@pytest.mark.parametrize("name", NAMES)
def test_tuple_output_holds_the_same_tensors(name):
    model, inputs = build(name)
    with torch.no_grad():
        output, as_tuple = model(**inputs), model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    expected, got = flat_tensors(output.to_tuple()), flat_tensors(as_tuple)
    assert len(expected) == len(got) > 0
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_save_and_reload_is_bit_equal(name, tmp_path):
    model, inputs = build(name)
    expected = run(model, inputs)
    model.save_pretrained(tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "moved")
    again, info = type(model).from_pretrained(tmp_path / "moved", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    for key, value in model.named_buffers():
        assert torch.equal(value, again.get_buffer(key)), key
    assert torch.equal(run(again.eval(), inputs), expected)
    again.save_pretrained(tmp_path / "again")
    first, second = ((tmp_path / folder / "config.json").read_text() for folder in ("moved", "again"))
    # On loading, transformers notes the dtype in the parts as well.
    assert re.sub(r'"dtype": .*', "", first) == re.sub(r'"dtype": .*', "", second)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_initialised(name):
    """Built on the meta device and then given memory full of NaN, a model must leave `init_weights` without one."""
    model, _ = build(name)
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
    assert all(p.is_meta for p in empty.parameters())
    empty = empty.to_empty(device="cpu")
    for tensor in [*empty.parameters(), *empty.buffers()]:
        if tensor.is_floating_point():
            tensor.data.fill_(float("nan"))
        tensor._is_hf_initialized = False
    for module in empty.modules():
        module._is_hf_initialized = False
    empty.init_weights()
    broken = [n for n, t in [*empty.named_parameters(), *empty.named_buffers()] if not torch.isfinite(t.float()).all()]
    assert broken == []


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("InternViTBackbone")])
def test_gradient_checkpointing_changes_no_gradient(name):
    model, inputs = build(name)
    model.train()
    gradients = {}
    for checkpointing in (None, False, True):
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        model.zero_grad()
        # Reentrant checkpointing needs an input with a gradient, as PEFT and Trainer arrange by this hook.
        model.enable_input_require_grads()
        torch.manual_seed(0)
        output = tiny.main_output(model(**inputs))
        real(output, inputs).square().mean().backward()
        gradients[checkpointing] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(gradients[None]) > 5
    for other in (False, True):
        assert gradients[other].keys() == gradients[None].keys()
        for key, value in gradients[None].items():
            torch.testing.assert_close(gradients[other][key], value, msg=f"{key}, use_reentrant={other}")


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_runs_close_to_float32(name):
    model, inputs = build(name)
    expected = real(run(model, inputs), inputs)
    got = real(run(model.to(torch.bfloat16), inputs), inputs)  # `pixel_values` stay fp32: the model casts them
    assert got.dtype == torch.bfloat16
    cosine = torch.nn.functional.cosine_similarity(expected.flatten(), got.float().flatten(), dim=0)
    assert cosine > 0.99


@pytest.mark.parametrize("name", ["InternVLModel-C", "InternVLModel-C-alone", "chat-llama", "chat-internlm2"])
def test_resizing_the_vocabulary_keeps_the_old_tokens(name, tmp_path):
    model, inputs = build(name)
    expected = run(model, inputs)
    model.resize_token_embeddings(110)
    assert model.config.get_text_config().vocab_size == 110
    got = run(model, inputs)
    torch.testing.assert_close(got[..., : expected.shape[-1]], expected)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(run(type(model).from_pretrained(tmp_path).eval(), inputs), got)


SAVED = {
    "InternViTForImageClassification": "AutoModelForImageClassification",
    "chat-internlm2": "AutoModelForImageTextToText",
    "chat-full": "AutoModel",
    "InternVLModel-G": "AutoModel",
    "InternVLModel-C-alone": "AutoModel",
}
LOAD_SAVED = """
import sys, torch, transformers
for case in torch.load("cases.pt", weights_only=True):
    door = getattr(transformers, case["door"])
    model = door.from_pretrained(case["folder"], trust_remote_code=True).eval()
    assert "transformers_modules" in type(model).__module__ and "internvl" not in sys.modules
    outputs = model(**case["inputs"])
    found = outputs.logits if "logits" in outputs else outputs.logits_per_image
    assert torch.equal(found, case["expected"]), case["folder"]
"""


def test_saved_folders_bring_their_code_and_give_equal_outputs_in_a_process_without_the_package(tmp_path):
    cases = []
    for name, door in SAVED.items():
        model, inputs = build(name)
        model.config.auto_map = {"AutoModel": "someone/repository--modeling.Model"}  # as of one loaded from the Hub
        expected, moved = run(model, inputs), f"{name}.moved"
        cases.append({"folder": moved, "door": door, "inputs": inputs, "expected": expected})
        model.save_pretrained(tmp_path / name)
        (tmp_path / name).rename(tmp_path / moved)
    torch.save(cases, tmp_path / "cases.pt")
    run_elsewhere(tmp_path, "-c", LOAD_SAVED)
