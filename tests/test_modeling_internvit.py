"""InternViT against a slow re-implementation, and what is special about it."""

import pytest
import torch
import torch.nn.functional as F

from internvl.configuration_internvl import InternViTConfig
from internvl.layers_internvit import InternViTDropPath, InternViTMLP, resize_position_grid
from internvl.modeling_internvit import InternViTBackbone

from . import reference, tiny


@torch.no_grad()
def test_equals_the_slow_reference():
    model = tiny.vision_model().double()
    image = tiny.pixels(1, 28, 42).double()
    patches = [image[0, :, i : i + 14, j : j + 14].flatten() for i in range(0, 28, 14) for j in range(0, 42, 14)]
    embeddings = model.embeddings
    weight, bias = embeddings.patch_embedding.weight.flatten(1), embeddings.patch_embedding.bias
    tokens = torch.stack([embeddings.class_embedding[0, 0], *[weight @ patch + bias for patch in patches]])
    grid = embeddings.position_embedding[0, 1:].float().reshape(4, 4, -1).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, size=(2, 3), mode="bicubic", align_corners=False)[0].flatten(1).T.double()
    tokens = tokens + torch.cat([embeddings.position_embedding[0, :1], grid])
    for layer in model.encoder.layers:
        tokens = reference.vision_block(layer.state_dict(), tokens, heads=4, eps=1e-6)
    torch.testing.assert_close(model(image).last_hidden_state[0], tokens, atol=1e-5, rtol=1e-5)  # norms are fp32


def test_positions_are_resized_without_antialiasing():
    grid = torch.randn(1, 1 + 16 * 16, 8)
    resized = resize_position_grid(grid, 4, 6)
    square = grid[:, 1:].reshape(1, 16, 16, 8).permute(0, 3, 1, 2)
    plain, smoothed = (
        F.interpolate(square, size=(4, 6), mode="bicubic", align_corners=False, antialias=antialias)
        for antialias in (False, True)
    )
    torch.testing.assert_close(resized[:, 1:], plain.flatten(2).transpose(1, 2))
    assert (plain - smoothed).abs().max() > 0.1  # so the line above can tell them apart
    assert torch.equal(resized[:, :1], grid[:, :1])
    assert torch.equal(resize_position_grid(grid, 16, 16), grid)


@torch.no_grad()
def test_running_part_of_the_blocks_gives_the_inner_hidden_state():
    model = tiny.vision_model()
    states = model(tiny.pixels(), output_hidden_states=True).hidden_states
    assert len(states) == 4
    for count in range(4):
        torch.testing.assert_close(model(tiny.pixels(), num_layers=count).last_hidden_state, states[count])


@torch.no_grad()
def test_backbone_returns_the_attentions_and_hidden_states_of_the_tower():
    tower = tiny.vision_model()
    backbone = InternViTBackbone(tiny.vision_config(out_indices=[0, 2])).eval()
    backbone.load_state_dict(tower.state_dict())
    for model in (tower, backbone):
        model.set_attn_implementation("eager")
    expected = tower(tiny.pixels(), output_attentions=True, output_hidden_states=True)
    outputs = backbone(tiny.pixels(), output_attentions=True, output_hidden_states=True)
    assert len(outputs.attentions) == 3
    assert len(outputs.hidden_states) == 4
    found = [*outputs.attentions, *outputs.hidden_states]
    assert all(map(torch.equal, found, [*expected.attentions, *expected.hidden_states]))
    short = backbone(tiny.pixels(), output_attentions=True)  # of the two blocks that the last map needs
    assert len(short.attentions) == 2
    assert short.hidden_states is None


@torch.no_grad()
def test_backbone_returns_the_named_maps_and_skips_the_blocks_above():
    model = tiny.vision_model()
    backbone = InternViTBackbone(tiny.vision_config(out_features=["stem", "stage2"])).eval()
    backbone.load_state_dict(model.state_dict())
    ran = []
    for index, layer in enumerate(backbone.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    maps = backbone(tiny.pixels(2, 28, 56)).feature_maps
    assert ran == [0, 1]
    states = model(tiny.pixels(2, 28, 56), output_hidden_states=True).hidden_states
    for feature_map, state in zip(maps, (states[0], states[2]), strict=True):
        assert feature_map.shape == (2, 32, 2, 4)
        torch.testing.assert_close(feature_map.flatten(2).transpose(1, 2), state[:, 1:])


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    drop = InternViTDropPath(0.25).train()
    torch.manual_seed(0)
    out = drop(torch.ones(4000, 2, 3))
    per_sample = out.flatten(1)
    assert ((per_sample == 0).all(1) | (per_sample == 1 / 0.75).all(1)).all()
    assert abs(out.mean() - 1) < 0.05
    assert torch.equal(drop.eval()(out), out)


def test_drop_path_rises_linearly_with_depth():
    layers = tiny.vision_model(drop_path_rate=0.3, num_hidden_layers=4).encoder.layers
    assert [round(layer.drop_path1.rate, 6) for layer in layers] == [0.0, 0.1, 0.2, 0.3]


def test_drop_path_may_be_the_same_at_every_depth_and_is_so_after_a_reload(tmp_path):
    model = tiny.vision_model(drop_path_rate=0.3, drop_path_schedule="uniform", num_hidden_layers=4)
    model.save_pretrained(tmp_path)
    for found in (model, type(model).from_pretrained(tmp_path)):
        assert [layer.drop_path1.rate for layer in found.encoder.layers] == [0.3] * 4
    with pytest.raises(ValueError, match=r"`drop_path_schedule` must be one of .* got 'cosine'"):
        tiny.vision_model(drop_path_schedule="cosine")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pixel_values": torch.zeros(2, 3, 56)}, r"must be \(B, 3, height, width\), got \(2, 3, 56\)"),
        ({"pixel_values": torch.zeros(2, 4, 56, 56)}, r"must be \(B, 3, height, width\)"),
        ({"pixel_values": torch.zeros(2, 3, 56, 50)}, "multiples of the patch size 14"),
        ({"pixel_embeds": torch.zeros(2, 3)}, r"`pixel_embeds` must be \(B, N, D\)"),
        ({}, "exactly one of"),
    ],
)
def test_unfitting_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny.vision_model()(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, r"`hidden_size` \(32\) must be a multiple of `num_attention_heads` \(5\)"),
        ({"norm_type": "batch"}, r"`norm_type` must be one of \['rms_norm', 'layer_norm'\], got 'batch'"),
        ({"image_size": 57}, r"`image_size` \(57\) must be a multiple of `patch_size` \(14\)"),
    ],
)
def test_impossible_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.vision_config(**changes)


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_without_gradients_gelu_is_computed_in_place_and_gives_the_same(activation):
    mlp = InternViTMLP(InternViTConfig(**tiny.VISION, hidden_act=activation))
    wide = []
    mlp.fc1.register_forward_hook(lambda module, args, output: wide.append((output, output.clone())))
    states = torch.randn(2, 5, mlp.fc1.in_features)
    expected = mlp(states)
    with torch.no_grad():
        got = mlp(states)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert torch.equal(*wide[0])
    assert torch.equal(*wide[1]) == (activation != "gelu")
