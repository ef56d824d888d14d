"""The classification and segmentation heads and the feature pyramid of InternViT by their definitions, saving and
loading. That they give the outputs of the published code is in tests/test_conversion_raw.py.
"""

import re

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSemanticSegmentation

from internvl.layers_internvit import resize_patch_kernel
from internvl.modeling_internvit import (
    InternVisionModel,
    InternViTBackbone,
    InternViTForSemanticSegmentation,
)

from . import tiny
from .fixtures_processes import run_elsewhere


POOLINGS = ("cls_patch_concat", "attention_pooling", "clip_projector")


def test_each_pooling_brings_its_own_parameters_and_no_others():
    heads = {}
    for pooling in POOLINGS:
        names = dict(tiny.classifier(pooling).named_parameters())
        heads[pooling] = {name.split(".")[0] for name in names} - {"vision_model"}
        assert names["head.weight"].shape[1] == {"attention_pooling": 32, "clip_projector": 12}.get(pooling, 64)
    assert heads == {
        "cls_patch_concat": {"norm", "head"},
        "attention_pooling": {"attn_pooling", "norm", "head"},
        "clip_projector": {"clip_projector", "norm", "head"},
    }


def test_the_heads_of_the_clip_projector_are_configured_and_those_of_attention_pooling_are_the_towers():
    assert tiny.classifier("clip_projector", attn_pool_num_heads=8).clip_projector.cross_attn.num_heads == 8
    assert tiny.classifier("attention_pooling", attn_pool_num_heads=8).attn_pooling.cross_attn.num_heads == 4


@torch.no_grad()
def test_the_segmentation_head_reads_the_last_selected_map_and_skips_the_blocks_above():
    model = tiny.segmenter(out_features=["stem", "stage2"], out_indices=None)
    ran = []
    for index, layer in enumerate(model.vision_model.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    outputs = model(tiny.pixels(2, 28, 56), output_hidden_states=True)
    assert ran == [0, 1]
    assert len(outputs.hidden_states) == 3
    tokens = outputs.hidden_states[-1][:, 1:]  # (B, 8, D)
    head = model.decode_head
    normed = (tokens - head.norm.running_mean) / (head.norm.running_var + 1e-5).sqrt()
    scores = (normed * head.norm.weight + head.norm.bias) @ head.conv_seg.weight[:, :, 0, 0].T + head.conv_seg.bias
    torch.testing.assert_close(outputs.logits, scores.reshape(2, 2, 4, 5).permute(0, 3, 1, 2), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_a_selection_the_last_block_is_segmented():
    model = tiny.segmenter(out_indices=None)
    assert len(model(tiny.pixels(), output_hidden_states=True).hidden_states) == 4
    same = tiny.segmenter(out_indices=[-1])
    assert torch.equal(model(tiny.pixels()).logits, same(tiny.pixels()).logits)


@pytest.mark.parametrize("ignored", [255, 3])
def test_the_segmentation_loss_is_the_mean_over_labelled_pixels(ignored):
    model = tiny.segmenter(semantic_loss_ignore_index=ignored)
    labels = torch.randint(0, 5, (3, 56, 40), generator=torch.Generator().manual_seed(3))
    labels[:, :9] = ignored
    outputs = model(tiny.pixels(3, 56, 42), labels=labels)
    scores = F.interpolate(outputs.logits, size=(56, 40), mode="bilinear", align_corners=False).log_softmax(1)
    kept = labels != ignored
    expected = -scores.permute(0, 2, 3, 1)[kept][torch.arange(kept.sum()), labels[kept]].mean()
    torch.testing.assert_close(outputs.loss, expected)
    outputs.loss.backward()
    assert model.decode_head.conv_seg.weight.grad.abs().sum() > 0
    assert model(tiny.pixels()).loss is None


def test_trainer_is_told_that_the_segmentation_loss_is_a_mean():
    """Its own count of labels would include the pixels that are left out."""
    assert tiny.segmenter().accepts_loss_kwargs is False


@pytest.mark.parametrize("shape", [(3, 4), (3, 1, 56, 56), (2, 56, 56)])
def test_unfitting_segmentation_labels_are_refused(shape):
    message = re.escape(f"`labels` must be (3, height, width), a class per pixel of each image, got {shape}.")
    with pytest.raises(ValueError, match=message):
        tiny.segmenter()(tiny.pixels(), labels=torch.zeros(shape, dtype=torch.long))


@torch.no_grad()
def test_the_pyramid_has_four_scales_and_the_final_norm_is_over_channels():
    plain, normed = tiny.pyramid_backbone("plain"), tiny.pyramid_backbone("final_norm")
    missing = normed.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert {name.rpartition(".")[0] for name in missing} == {"up1.4", "up2.1", "up3.1", "up4.1"}
    image = tiny.pixels(2, 42, 70)  # 3 x 5 patches: the smallest map drops the odd row and column
    maps = plain(image).feature_maps
    assert [tuple(m.shape) for m in maps] == [(2, 32, 12, 20), (2, 32, 6, 10), (2, 32, 3, 5), (2, 32, 1, 2)]
    assert plain.channels == [32] * 4
    norms = (normed.up1[4], normed.up2[1], normed.up3[1], normed.up4[1])
    for before, after, norm in zip(maps, normed(image).feature_maps, norms, strict=True):
        pixel, expected = before[1, :, 0, 1], after[1, :, 0, 1]
        pixel = (pixel - pixel.mean()) / (pixel.var(unbiased=False) + 1e-6).sqrt()
        torch.testing.assert_close(expected, pixel * norm.weight + norm.bias, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_pyramid_changes_the_scale_and_nothing_below():
    pyramid = tiny.pyramid_backbone("plain")
    backbone = InternViTBackbone(tiny.vision_config(out_indices=[0, 1, 2, 3])).eval()
    assert not [name for name in backbone.state_dict() if name.startswith("up")]
    backbone.load_state_dict({k: v for k, v in pyramid.state_dict().items() if not k.startswith("up")})
    maps, scaled = (model(tiny.pixels()).feature_maps for model in (backbone, pyramid))
    assert torch.equal(scaled[2], maps[2])
    assert torch.equal(scaled[3], F.max_pool2d(maps[3], 2))


@pytest.mark.parametrize("selection", [{}, {"out_indices": [1, 3]}, {"out_features": ["stem", "stage1", "stage3"]}])
def test_a_pyramid_without_four_maps_is_refused(selection):
    with pytest.raises(ValueError, match="`feature_pyramid` 'plain' needs four feature maps, got"):
        tiny.vision_config(feature_pyramid="plain", **selection)


def test_a_pyramid_keeps_its_four_maps_when_the_selection_changes():
    backbone = tiny.pyramid_backbone()
    backbone.out_features = ["stem", "stage1", "stage2", "stage3"]
    with pytest.raises(ValueError, match="needs four feature maps, got 1"):
        backbone.out_indices = [2]
    config = tiny.vision_config(out_indices=[1])
    config.feature_pyramid = "plain"
    with pytest.raises(ValueError, match="needs four feature maps, got 1"):
        InternViTBackbone(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classifier_pooling": "mean"}, r"`classifier_pooling` must be one of \['cls_patch_concat', "),
        ({"feature_pyramid": "normed"}, r"`feature_pyramid` must be one of \[None, 'plain', 'final_norm'\]"),
        (
            {"classifier_pooling": "clip_projector", "attn_pool_num_heads": 5},
            r"`hidden_size` \(32\) must be a multiple of `attn_pool_num_heads` \(5\)",
        ),
    ],
)
def test_impossible_heads_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.vision_config(**changes)


def test_a_patch_kernel_is_resized_in_fp32_and_keeps_its_dtype():
    kernel = torch.randn(5, 3, 14, 14, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    resized = resize_patch_kernel(kernel, 16)
    expected = F.interpolate(kernel.float(), size=(16, 16), mode="bicubic", align_corners=False)
    assert torch.equal(resized, expected.to(torch.bfloat16))
    assert torch.equal(resize_patch_kernel(kernel, 14), kernel)


def test_the_segmentation_class_is_registered():
    model = AutoModelForSemanticSegmentation.from_config(tiny.vision_config())
    assert type(model) is InternViTForSemanticSegmentation


SAVED = {
    "cls_patch_concat": (lambda: tiny.classifier(), "AutoModelForImageClassification", ("norm.", "head.")),
    "attention_pooling": (
        lambda: tiny.classifier("attention_pooling"),
        "AutoModelForImageClassification",
        ("attn_pooling.", "norm.", "head."),
    ),
    "clip_projector": (
        lambda: tiny.classifier("clip_projector"),
        "AutoModelForImageClassification",
        ("clip_projector.", "norm.", "head."),
    ),
    "segmentation": (tiny.segmenter, "AutoModelForSemanticSegmentation", ("decode_head.",)),
    "pyramid": (tiny.pyramid_backbone, "AutoBackbone", ("up1.", "up2.", "up3.", "up4.")),
}
LOAD_SAVED = """
import sys, torch, transformers

torch.set_grad_enabled(False)
for case in torch.load("cases.pt", weights_only=True):
    door, folder = getattr(transformers, case["door"]), case["name"] + ".moved"
    if case["door"] == "AutoBackbone":  # its `from_pretrained` asks the Hub for such a repository, for a folder too
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        door = type(door.from_config(config, trust_remote_code=True))
    model, info = door.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert "transformers_modules" in type(model).__module__ and "internvl" not in sys.modules
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    outputs = model.eval()(case["pixels"])
    found = outputs.feature_maps if case["door"] == "AutoBackbone" else [outputs.logits]
    torch.testing.assert_close(list(found), case["outputs"], atol=1e-5, rtol=1e-5)

    tower, info = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert type(tower).__name__ == "InternVisionModel"
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    assert info["unexpected_keys"] and all(k.startswith(tuple(case["head"])) for k in info["unexpected_keys"]), info
    found = tower.eval()(case["pixels"]).last_hidden_state
    torch.testing.assert_close(found, case["tokens"], atol=1e-5, rtol=1e-5)
"""


def tower_of(model: torch.nn.Module) -> InternVisionModel:
    """The tower of a head, or one with the backbone's weights."""
    if hasattr(model, "vision_model"):
        return model.vision_model
    tower = InternVisionModel(model.config).eval()
    tower.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("up")})
    return tower


@torch.no_grad()
def test_saved_heads_load_through_their_auto_class_and_as_a_bare_tower(tmp_path):
    """As remote code, in a process without the package, from folders that were moved; the bare tower reports the
    head's keys only.
    """
    cases = []
    for name, (make, door, head) in SAVED.items():
        model, pixels = make(), tiny.pixels()
        outputs = model(pixels)
        tensors = list(outputs.feature_maps) if door == "AutoBackbone" else [outputs.logits]
        tokens = tower_of(model)(pixels).last_hidden_state
        case = {"name": name, "door": door, "head": list(head), "pixels": pixels, "outputs": tensors, "tokens": tokens}
        cases.append(case)
        model.save_pretrained(tmp_path / name)
        (tmp_path / name).rename(tmp_path / f"{name}.moved")
    torch.save(cases, tmp_path / "cases.pt")
    run_elsewhere(tmp_path, "-c", LOAD_SAVED)


@pytest.mark.parametrize("name", ["attention_pooling", "segmentation", "pyramid"])
def test_a_head_starts_from_a_bare_tower_and_says_only_what_it_adds(name, tmp_path):
    make, _, head = SAVED[name]
    model = make()
    tower_of(model).save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, config=model.config, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert info["missing_keys"]
    assert all(key.startswith(head) for key in info["missing_keys"])
    for key, value in model.state_dict().items():
        if not key.startswith(head):
            assert torch.equal(again.state_dict()[key], value), key
