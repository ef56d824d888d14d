"""What vLLM's Transformers backend asks of the classes, without vLLM; `make engines` runs the engine itself."""

import re

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import AttentionInterface

from internvl.layers_internvl import eager_attention_forward
from internvl.modeling_internvl_chat import InternVLChatBaseModel, InternVLChatForConditionalGeneration

from . import tiny


each_connector = pytest.mark.parametrize("connector", ["patches", "queries_and_patches"])
each_decoder = pytest.mark.parametrize("decoder", tiny.DECODERS)


def flat_attention(*args, **kwargs) -> tuple[torch.Tensor, None]:
    """vLLM's attention as far as models see it: no mask, and an output (L, H * K) without a batch."""
    query = args[1]
    mask = torch.full((query.shape[2], query.shape[2]), -torch.inf).triu(1)
    output, _ = eager_attention_forward(*args[:4], mask, scaling=query.shape[-1] ** -0.5)
    return output.reshape(query.shape[2], -1), None


def as_vllm_asks(monkeypatch, decoder: str = "llama", connector: str = "patches"):
    """A configuration as vLLM hands it to `AutoModel.from_config`: the decoder has vLLM's attention."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "vllm", flat_attention)
    config = tiny.chat_config(decoder, connector)
    config.text_config._attn_implementation = "vllm"
    return config


@each_decoder
@each_connector
def test_no_class_has_a_loader_leave_out_a_weight_of_the_whole_model(decoder, connector):
    """vLLM adds the head to the headless class, and drops what that class calls unexpected."""
    weights = tiny.chat_model(decoder, connector).state_dict()
    ignored = tiny.chat_base_model(decoder, connector)._keys_to_ignore_on_load_unexpected
    assert [name for name in weights for pattern in ignored if re.search(pattern, name)] == []


def test_vllm_is_given_the_model_without_a_head(monkeypatch):
    model = AutoModel.from_config(as_vllm_asks(monkeypatch))
    assert type(model) is InternVLChatBaseModel
    assert model.get_output_embeddings() is None
    assert model.language_model.config._attn_implementation == "vllm"


@pytest.mark.parametrize("door", [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText])
@pytest.mark.parametrize("attention", [None, "sdpa", "eager"])
def test_everyone_else_is_given_the_whole_model(door, attention):
    settings = {} if attention is None else {"attn_implementation": attention}
    assert type(door.from_config(tiny.chat_config(), **settings)) is InternVLChatForConditionalGeneration


@each_decoder
@each_connector
def test_every_weight_of_the_whole_model_has_a_place_in_vllm(decoder, connector, monkeypatch):
    """In the headless model, or in the head that vLLM finds as the last `lm_head`, whatever the decoder calls it."""
    base = AutoModel.from_config(as_vllm_asks(monkeypatch, decoder, connector))
    names = set(tiny.chat_model(decoder, connector).state_dict())
    for renaming in get_model_conversion_mapping(base, add_legacy=False):
        names = {renaming.rename_source_key(name)[0] for name in names}
    assert names - set(base.state_dict()) == {"language_model.lm_head.weight"}


@each_decoder
@torch.no_grad()
def test_every_decoder_runs_on_vllms_attention(decoder, monkeypatch):
    expected = tiny.chat_base_model(decoder)
    model = AutoModel.from_config(as_vllm_asks(monkeypatch, decoder)).eval()
    model.load_state_dict(expected.state_dict())
    embeddings = expected.get_input_embeddings()(tiny.text_ids(1))
    positions = torch.arange(embeddings.shape[1])[None]
    hidden = model(inputs_embeds=embeddings, position_ids=positions, use_cache=False, return_dict=False)[0]
    torch.testing.assert_close(hidden, expected(inputs_embeds=embeddings).last_hidden_state, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_forward_in_vllm_embeds_nothing(monkeypatch):
    """The engine has placed the features; its embeddings with adapters take no single token, either."""
    model = AutoModel.from_config(as_vllm_asks(monkeypatch)).eval()
    embeddings = model.get_input_embeddings()(tiny.text_ids(1))
    asked = []
    model.get_input_embeddings().register_forward_hook(lambda *_: asked.append(1))
    model(inputs_embeds=embeddings, position_ids=torch.arange(embeddings.shape[1])[None], use_cache=False)
    assert not asked
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_internlm2_whose_heads_an_engine_has_cut_says_so():
    """transformers' plan never cuts one (tests/test_placement.py); vLLM shares out the columns of `wqkv` blindly."""
    model = tiny.chat_base_model("internlm2")
    attention = model.language_model.layers[0].attention
    attention.wqkv = torch.nn.Linear(attention.wqkv.in_features, attention.wqkv.out_features // 4)
    with pytest.raises(ValueError, match=r"`num_key_value_heads` \(2\)"):
        model(input_ids=tiny.text_ids(1))
