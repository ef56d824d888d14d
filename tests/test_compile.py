"""The vision tower compiles to one graph without breaks and then gives what it gives uncompiled.

The default suite only captures whole graphs (backend "eager"): that is where breaks show. Slow cases generate code by
inductor. A decoding step is in `test_decode_compile`.
"""

import pytest
import torch

from internvl.benchmarks.vision import compiled

from . import tiny
from .test_decode_compile import counting


FLAVOURS = {
    "rms_norm": {},
    "layer_norm": {"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True},
    "eager_attention": {"attn_implementation": "eager"},
}
INPUTS = {
    "as configured": ({}, {}),
    "other size": ({"height": 84, "width": 42}, {}),
    "inner features": ({}, {"num_layers": 2}),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@torch.no_grad()
def assert_compiled_equals_plain(flavour: str, inputs: str, backend, **settings) -> None:
    changes, arguments = INPUTS[inputs]
    model, pixels = tiny.vision_model(**FLAVOURS[flavour]), tiny.pixels(**changes)
    expected = model(pixels, **arguments)
    compiled = torch.compile(model, fullgraph=True, backend=backend, **settings)  # a break in the graph is an error
    found = compiled(pixels, **arguments)
    assert backend.graphs == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_tower_is_one_graph_and_gives_the_eager_features(flavour, inputs):
    assert_compiled_equals_plain(flavour, inputs, counting())


@pytest.mark.slow
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_generated_code_gives_the_eager_features(flavour):
    assert_compiled_equals_plain(flavour, "as configured", counting("inductor"))


@pytest.mark.slow
@torch.no_grad()
def test_generated_code_with_frozen_weights_gives_the_eager_features():
    model, pixels = tiny.vision_model(**FLAVOURS["layer_norm"]), tiny.pixels()
    expected = model(pixels).last_hidden_state
    call = compiled(model, pixels)
    torch.testing.assert_close(call().last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    # They are part of the code now: a change has no effect on it.
    model.encoder.layers[0].mlp.fc1.weight.mul_(2)
    torch.testing.assert_close(call().last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(pixels).last_hidden_state, expected, atol=1e-3)


@torch.no_grad()
def test_one_graph_serves_any_number_of_tiles_in_a_chat_model_that_encodes_them_one_by_one():
    model, backend = tiny.chat_model(), counting()
    images = [tiny.pixels(tiles) for tiles in (1, 3, 5)]
    expected = [model.extract_feature(pixels) for pixels in images]
    model.vision_batch_size = 1
    model.vision_model.compile(fullgraph=True, dynamic=False, backend=backend)
    for pixels, features in zip(images, expected, strict=True):
        torch.testing.assert_close(model.extract_feature(pixels), features, atol=1e-5, rtol=1e-5)
    assert backend.graphs == 1


def test_the_gradients_of_the_compiled_tower_are_the_eager_ones():
    model, pixels, backend = tiny.vision_model(), tiny.pixels(), counting("aot_eager")
    model(pixels).last_hidden_state.square().mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend=backend)(pixels).last_hidden_state.square().mean().backward()
    assert backend.graphs == 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-5)
