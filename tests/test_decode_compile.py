"""Decoding with a static cache, compiled without graph breaks, gives what eager decoding with a growing cache gives.

The default suite only captures whole graphs (backend "eager"): that is where breaks show. One slow case generates code
by inductor. `generate` compiles the decoding step by itself on accelerators only, so here it is told to.
"""

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

from . import tiny


DECODERS = ("llama", "qwen2", "qwen3", "internlm2")
CONNECTORS = ("patches", "queries_and_patches")
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
CASES = [(decoder, "patches") for decoder in DECODERS] + [("internlm2", "queries_and_patches")]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def counting(name: str = "eager"):
    """A backend that counts the graphs it is given; a function, because `generate` copies its settings deeply."""

    def backend(graph, inputs):
        backend.graphs += 1
        return torch._dynamo.lookup_backend(name)(graph, inputs)

    backend.graphs = 0
    return backend


@torch.no_grad()
def decode(model, cache, step) -> torch.Tensor:
    """Logits of a prefill with images and of three steps of given tokens, by `step`."""
    inputs = tiny.chat_inputs(model, [[1, 1]])
    length = inputs["input_ids"].shape[1]
    logits = [model(**inputs, past_key_values=cache, logits_to_keep=1).logits[:, -1]]
    for number, token in enumerate(tiny.text_ids(1, 3)[0]):
        positions = torch.tensor([[length + number]])
        logits.append(step(token.view(1, 1), past_key_values=cache, position_ids=positions).logits[:, -1])
    assert int(cache.get_seq_length()) == length + 3
    return torch.stack(logits)


def assert_compiled_decoding_equals_eager(decoder: str, connector: str, backend) -> None:
    model = tiny.chat_model(decoder, connector)
    expected = decode(model, DynamicCache(config=model.config.text_config), model)
    step = torch.compile(model, fullgraph=True, backend=backend)  # a break in the graph is an error
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    torch.testing.assert_close(decode(model, cache, step), expected, atol=1e-5, rtol=1e-5)
    assert backend.graphs == 1  # not compiled again in later steps


@pytest.mark.parametrize(("decoder", "connector"), CASES)
def test_a_decoding_step_is_one_graph_and_gives_the_eager_logits(decoder, connector):
    assert_compiled_decoding_equals_eager(decoder, connector, counting())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_decoding_step_through_code_generation_gives_the_eager_logits(backend):
    assert_compiled_decoding_equals_eager("qwen3", "queries_and_patches", counting(backend))


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_static_cache_generates_the_tokens_of_a_growing_one(decoder, connector):
    model = tiny.chat_model(decoder, connector)
    inputs = tiny.chat_inputs(model)
    expected = model.generate(**inputs, **GREEDY)
    static = model.generate(**inputs, **GREEDY, cache_implementation="static", return_dict_in_generate=True)
    assert type(static.past_key_values) is StaticCache
    assert torch.equal(static.sequences, expected)


@pytest.mark.parametrize(("decoder", "connector"), [("qwen2", "patches"), ("internlm2", "queries_and_patches")])
def test_generation_compiled_by_transformers_equals_plain_generation(decoder, connector):
    model = tiny.chat_model(decoder, connector)
    inputs = tiny.chat_inputs(model)
    backend = counting()
    settings = CompileConfig(fullgraph=True, backend=backend, mode=None)
    settings._compile_all_devices = True
    compiled = model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=settings)
    assert backend.graphs == 1
    assert torch.equal(compiled, model.generate(**inputs, **GREEDY))


@torch.no_grad()
def test_a_forward_with_images_is_one_graph_and_still_refuses_a_wrong_number_of_placeholders():
    one_block = {"num_hidden_layers": 1}
    model = tiny.chat_model(
        connector="queries_and_patches",
        vision_config={**tiny.VISION, **one_block},
        qllama_config={**tiny.QLLAMA, **one_block},
        text_config={**tiny.DECODERS["llama"], **one_block},
    )
    inputs = tiny.chat_inputs(model)
    backend = counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    real = inputs["attention_mask"].bool()
    got, expected = compiled(**inputs).logits[real], model(**inputs).logits[real]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="number of image placeholders in the text differs"):
        compiled(**{**inputs, "input_ids": inputs["input_ids"].clamp(max=80)})  # no placeholders, same shapes
    assert backend.graphs == 1
