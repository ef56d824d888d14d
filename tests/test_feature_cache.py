"""`image_feature_cache_bytes`: an image that was seen is not encoded again until what it depends on changes."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model

from internvl.feature_cache_internvl import ImageFeatureCache, weights_state

from . import tiny


MEGABYTE = 2**20


@pytest.fixture(params=["patches", "queries_and_patches"])
def model(request):
    model = tiny.chat_model("llama", request.param)
    model.image_feature_cache_bytes = MEGABYTE
    return model


def count_tiles(model) -> list[int]:
    """Tiles of each forward of the vision tower."""
    seen: list[int] = []
    model.vision_model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


def features(model, tiles: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.extract_feature(tiles)


def test_it_is_off_unless_asked_for():
    model = tiny.chat_model("llama")
    seen, tiles = count_tiles(model), tiny.pixels(2)
    assert model.image_feature_cache_bytes == 0
    features(model, tiles), features(model, tiles)
    assert seen == [2, 2]


def test_the_same_image_asked_again_costs_no_forward_and_gives_the_same_answer(model):
    inputs = tiny.chat_inputs(model)
    seen = count_tiles(model)
    first, second = (model.generate(**inputs, max_new_tokens=4, do_sample=False) for _ in range(2))
    assert torch.equal(first, second)
    assert sum(seen) == len(inputs["pixel_values"])
    model.image_feature_cache_bytes = 0
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), first)
    assert sum(seen) == 2 * len(inputs["pixel_values"])


def test_only_tiles_that_were_not_seen_are_encoded_each_once_and_in_their_places(model):
    tiles = tiny.pixels(4)
    expected = features(model, tiles)
    model.image_feature_cache.clear()
    seen = count_tiles(model)
    features(model, tiles[[1]])
    mixed = [3, 1, 0, 3, 0]
    torch.testing.assert_close(features(model, tiles[mixed]), expected[mixed])
    assert seen == [1, 2]
    assert (model.image_feature_cache.hits, model.image_feature_cache.misses) == (3, 7)


def step(model) -> None:
    with torch.no_grad():
        next(model.vision_model.parameters()).mul_(1.5)


def replace(model) -> None:
    weight = next(model.mlp1.parameters())
    weight.data = weight.data * 1.5


def load(model) -> None:
    model.mlp1.load_state_dict({name: 1.5 * value for name, value in model.mlp1.state_dict().items()})


def choose_layer(model) -> None:
    model.config.select_layer = -2


def shuffle(model) -> None:
    model.config.ps_version = "v1"


def edit_data(model) -> None:
    next(model.vision_model.parameters()).data.mul_(1.5)


def round_weights(model) -> None:
    """The new tensors may take the places of the old ones."""
    weight = next(model.mlp1[1].parameters())
    place, rounded = weight.data_ptr(), (100 * weight.data).to(torch.bfloat16).float()
    weight.data.copy_(rounded)
    assert weight.data_ptr() == place


def add_hook(model) -> None:
    model.mlp1.register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.parametrize("change", [step, replace, load, choose_layer, shuffle, edit_data, round_weights, add_hook])
def test_what_changes_features_makes_it_forget(change: Callable, model):
    tiles = tiny.pixels(2)
    before = features(model, tiles)
    change(model)
    after = features(model, tiles)
    assert not torch.allclose(before, after)
    model.image_feature_cache_bytes = 0
    assert torch.equal(features(model, tiles), after)


def test_autocast_and_the_attention_make_it_forget(model):
    tiles = tiny.pixels(2)
    seen = count_tiles(model)
    features(model, tiles)
    with torch.autocast("cpu", torch.bfloat16):
        assert features(model, tiles).dtype == torch.bfloat16
    assert features(model, tiles).dtype == torch.float32
    model.set_attn_implementation("eager")
    features(model, tiles)
    assert seen == [2, 2, 2, 2]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_of_a_model_starts_with_an_empty_cache_of_the_same_size(copied: Callable, model):
    tiles = tiny.pixels(2)
    expected = features(model, tiles)
    other = copied(model)
    seen = count_tiles(other)
    assert torch.equal(features(other, tiles), expected)
    assert seen == [2]
    assert other.image_feature_cache_bytes == MEGABYTE
    assert other.image_feature_cache is not model.image_feature_cache


def test_the_state_of_weights_holds_no_description_of_the_model():
    state = weights_state(tiny.chat_model("llama"))
    assert len(repr(state)) < 100 * len(state)


def test_weights_of_the_decoder_change_nothing(model):
    tiles = tiny.pixels(2)
    seen = count_tiles(model)
    features(model, tiles)
    with torch.no_grad():
        next(model.language_model.parameters()).mul_(1.5)
    features(model, tiles)
    assert seen == [2]


def test_adapters_make_it_forget_when_they_come_are_switched_and_are_merged():
    model = tiny.chat_model("llama")
    model.image_feature_cache_bytes = MEGABYTE
    tiles = tiny.pixels(2)
    plain = features(model, tiles)
    config = LoraConfig(target_modules=r"vision_model\..*\.(fc1|fc2)", init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    with_adapter = features(model, tiles)
    assert not torch.allclose(with_adapter, plain)
    with adapted.disable_adapter():
        assert torch.allclose(features(model, tiles), plain)
    assert torch.allclose(features(model, tiles), with_adapter)
    merged = adapted.merge_and_unload()
    assert torch.allclose(features(merged, tiles), with_adapter, atol=1e-5)


def test_gradients_and_training_bypass_it(model):
    tiles = tiny.pixels(2)
    features(model, tiles)
    seen = count_tiles(model)
    assert model.extract_feature(tiles).requires_grad
    features(model.train(), tiles)
    features(model.eval(), tiles)
    model.vision_model.train()
    features(model, tiles)
    assert seen == [2, 2, 2, 2]


@pytest.mark.parametrize(("module", "name"), [(torch.jit, "is_tracing"), (torch.compiler, "is_compiling")])
def test_code_that_is_traced_bypasses_it(module, name, model, monkeypatch):
    tiles = tiny.pixels(2)
    seen = count_tiles(model)
    features(model, tiles)
    monkeypatch.setattr(module, name, lambda: True)
    features(model, tiles)
    assert seen == [2, 2]


def test_groups_of_processes_bypass_it(model, monkeypatch):
    tiles = tiny.pixels(2)
    features(model, tiles)
    seen = count_tiles(model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    features(model, tiles)
    assert seen == [2]


def test_another_dtype_is_another_tile(model):
    tiles = tiny.pixels(1)
    seen = count_tiles(model)
    features(model, tiles)
    features(model.to(torch.bfloat16), tiles.to(torch.bfloat16))
    assert seen == [1, 1]


@pytest.mark.parametrize("mode", ["InternVL-C", "InternVL-G"])
@torch.no_grad()
def test_embeddings_of_images_are_kept_for_each_mode(mode):
    model = tiny.internvl_model()
    images = tiny.pixels(3)
    expected = {mode: model.get_image_features(images, mode=mode) for mode in ("InternVL-C", "InternVL-G")}
    model.image_feature_cache_bytes = MEGABYTE
    seen = count_tiles(model)
    for _ in range(2):
        assert torch.equal(model.get_image_features(images, mode=mode), expected[mode])
    assert seen == [3]
    other = next(name for name in expected if name != mode)
    assert torch.equal(model.get_image_features(images, mode=other), expected[other])


def test_the_features_used_last_are_kept_within_the_bytes():
    cache = ImageFeatureCache(max_bytes=3 * 4 * 8)
    encoded = []

    def encode(tiles: torch.Tensor) -> torch.Tensor:
        encoded.append(tiles[:, 0, 0, 0].tolist())
        return tiles.flatten(1)[:, :8]

    tiles = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 4, 4).contiguous()
    for index in (0, 1, 2, 0, 3, 0, 1):  # 3 pushes 1 out, which comes again and pushes 2 out
        cache.features(tiles[[index]], None, encode)
        assert cache.num_bytes <= cache.max_bytes
    assert encoded == [[0.0], [1.0], [2.0], [3.0], [1.0]]
    cache.features(tiles, None, encode)  # more than fits
    assert cache.num_bytes == cache.max_bytes


@pytest.mark.parametrize("value", [-1, 1.5, True, "1GB"])
def test_what_is_no_number_of_bytes_is_refused(value):
    with pytest.raises(ValueError, match="`image_feature_cache_bytes` must be a number of bytes, 0 for none, got"):
        tiny.chat_model("llama").image_feature_cache_bytes = value
