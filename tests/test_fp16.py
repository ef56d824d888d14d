"""fp16: the vision tower stays finite where plain products leave the range; bf16 and fp32 are computed as before."""

import pytest
import torch
import torch.nn.functional as F

from internvl.configuration_internvl import InternViTConfig
from internvl.layers_internvl import clamp_to_dtype, eager_attention_forward
from internvl.modeling_internvit import InternVisionModel

from . import tiny


LARGEST = torch.finfo(torch.float16).max
CHANNELS = [3, 17, 40]
WIDE = {"hidden_size": 64, "intermediate_size": 96, "initializer_factor": 0.1}


def with_outliers(model: InternVisionModel, pixels: torch.Tensor, peak: float) -> InternVisionModel:
    """A few channels of the stream grow to about `peak` in the second block: one unit of its MLP answers strongly to
    one token, as in large trained towers.
    """
    first, second = model.encoder.layers[:2]
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.ls1.fill_(0.1)
            layer.ls2.fill_(0.1)
        tokens = first(model.embeddings(pixels))
        tokens = tokens + second.attn(second.norm1(tokens))[0] * second.ls1
        strong = second.norm2(tokens)[0, 5]
        second.mlp.fc1.weight[0] = 300 * strong / strong.norm() ** 2
        second.mlp.fc1.bias[0] = 0
        second.mlp.fc2.weight[CHANNELS, 0] = peak / 300 / second.ls2[CHANNELS]
    return model


def plain_forward(model: InternVisionModel, pixels: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """The published tower written out, products in the dtype of the weights; and the largest value at each place."""
    largest: dict[str, float] = {}

    def seen(name: str, x: torch.Tensor) -> torch.Tensor:
        value = x.detach().float().nan_to_num(nan=float("inf")).abs().max().item()
        largest[name] = max(largest.get(name, 0.0), value)
        return x

    heads, scale = (
        model.config.num_attention_heads,
        (model.config.hidden_size // model.config.num_attention_heads) ** -0.5,
    )
    stream = model.embeddings(pixels)
    for layer in model.encoder.layers:
        query, key, value = layer.attn.qkv(layer.norm1(stream)).chunk(3, dim=-1)
        parts = (layer.attn.q_norm(query), layer.attn.k_norm(key), value)
        query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in parts)
        weights = (
            (seen("scores", query @ key.transpose(2, 3)) * scale).softmax(-1, dtype=torch.float32).to(value.dtype)
        )
        looked = (weights @ value).transpose(1, 2).flatten(2)
        attended = seen("proj", F.linear(looked, layer.attn.proj.weight, layer.attn.proj.bias))
        stream = seen("stream", torch.addcmul(stream, attended, layer.ls1))
        inner = seen("fc1", layer.mlp.act(layer.mlp.fc1(layer.norm2(stream))))
        changed = seen("fc2", F.linear(inner, layer.mlp.fc2.weight, layer.mlp.fc2.bias))
        stream = seen("stream", torch.addcmul(stream, changed, layer.ls2))
    return stream, largest


def least_cosine(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Of all tokens, without the outlier channels, which would hide all others."""
    others = [channel for channel in range(exact.shape[-1]) if channel not in CHANNELS]
    return torch.cosine_similarity(ours.float()[..., others], exact[..., others], dim=-1).min().item()


def fp16_and_fp32(model: InternVisionModel) -> tuple[InternVisionModel, InternVisionModel]:
    """The model in fp16, and the same rounded weights in fp32."""
    half = type(model)(model.config).eval()
    half.load_state_dict(model.state_dict())
    half.half()
    model.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    return half, model


@pytest.mark.parametrize("norm_type", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize(("peak", "first_to_leave"), [(2e4, "fc2"), (9e4, "stream")])
@torch.no_grad()
def test_fp16_is_finite_and_close_where_the_plain_products_overflow(peak, first_to_leave, norm_type):
    pixels = tiny.pixels()
    half, exact = fp16_and_fp32(with_outliers(tiny.vision_model(**WIDE, norm_type=norm_type), pixels, peak))
    _, largest = plain_forward(exact, pixels)
    assert largest[first_to_leave] > LARGEST
    assert not plain_forward(half, pixels)[0].isfinite().all()
    for implementation in ("eager", "sdpa"):
        half.set_attn_implementation(implementation)
        assert half.config._attn_implementation == implementation
        features = half(pixels).last_hidden_state
        assert features.dtype == torch.float16
        assert features.isfinite().all()
        assert least_cosine(features, exact(pixels).last_hidden_state) > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_other_dtypes_are_computed_plainly_bit_for_bit(dtype):
    model = tiny.vision_model(**WIDE).to(dtype)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    pixels = tiny.pixels().to(dtype)
    assert torch.equal(model(pixels).last_hidden_state, plain_forward(model, pixels)[0])


def test_eager_scores_do_not_overflow_in_fp16():
    generator = torch.Generator().manual_seed(0)
    query, value = (torch.randn(1, 2, 5, 128, generator=generator) for _ in range(2))
    query = 40 * query
    assert not (query.half() @ query.half().transpose(2, 3)).isfinite().all()
    half, module = query.half(), torch.nn.Module().eval()
    output, weights = eager_attention_forward(module, half, half, value.half(), None, scaling=128**-0.5)
    assert weights.dtype == output.dtype == torch.float16
    expected = F.scaled_dot_product_attention(query, query, value).transpose(1, 2)
    torch.testing.assert_close(output.float(), expected, atol=2e-3, rtol=2e-3)


def test_values_out_of_range_become_the_largest_number():
    values = torch.tensor([1e6, -1e6, 1.5])
    assert clamp_to_dtype(values, torch.float16).tolist() == [LARGEST, -LARGEST, 1.5]
    assert clamp_to_dtype(values, torch.float32) is values


@torch.no_grad()
def test_autocast_to_fp16_is_finite_and_close():
    pixels = tiny.pixels()
    model = with_outliers(tiny.vision_model(**WIDE), pixels, 9e4)
    exact = model(pixels).last_hidden_state
    with torch.autocast("cpu", dtype=torch.float16):
        features = model(pixels).last_hidden_state
    assert features.isfinite().all()
    assert least_cosine(features, exact) > 0.999


@pytest.mark.parametrize("connector", ["patches", "queries_and_patches"])
@torch.no_grad()
def test_chat_in_fp16_answers_as_in_fp32(connector):
    parts = {"vision_config": {**tiny.VISION, **WIDE}}
    if connector != "patches":
        parts["qllama_config"] = {**tiny.QLLAMA, "vision_hidden_size": WIDE["hidden_size"]}
    model = tiny.chat_model(connector=connector, **parts)
    inputs = tiny.chat_inputs(model)
    with_outliers(model.vision_model, inputs["pixel_values"], 2e4)
    exact = model(**inputs).logits
    half = model.half()
    assert not plain_forward(half.vision_model, inputs["pixel_values"])[0].isfinite().all()
    scores = half(**inputs).logits
    assert scores.isfinite().all()
    assert torch.cosine_similarity(scores.float().flatten(), exact.flatten(), dim=0) > 0.999


@pytest.mark.slow
@torch.no_grad()
def test_fp16_is_finite_and_close_at_the_width_of_the_6b_tower():
    torch.manual_seed(0)
    sizes = {"hidden_size": 3200, "intermediate_size": 12800, "num_attention_heads": 25, "num_hidden_layers": 3}
    pixels = tiny.pixels(1)
    model = InternVisionModel(InternViTConfig(**sizes, image_size=56, patch_size=14)).eval()
    half, exact = fp16_and_fp32(with_outliers(model, pixels, 9e4))
    _, largest = plain_forward(exact, pixels)
    assert largest["fc2"] > largest["stream"] > LARGEST > 100 * largest["scores"]
    assert not plain_forward(half, pixels)[0].isfinite().all()
    features = half(pixels).last_hidden_state
    assert features.isfinite().all()
    assert least_cosine(features, exact(pixels).last_hidden_state) > 0.999
