"""PEFT's methods other than plain LoRA: only what they add is trained, and what is saved gives the same loss again."""

import copy

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from . import tiny


CAUSAL = {"task_type": "CAUSAL_LM"}
METHODS = {
    "prefix tuning": PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, **CAUSAL),
    "LoRA": LoraConfig(r=2, target_modules=["q_proj", "qkv"], modules_to_save=["mlp1", "mlp2"], **CAUSAL),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **CAUSAL),
}
PROMPTS = ("prefix tuning", "prompt tuning", "p-tuning")


def labelled(model) -> dict:
    inputs = tiny.chat_inputs(model)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny.IMAGE_TOKEN_ID, -100)
    return {**inputs, "labels": labels.masked_fill(inputs["attention_mask"] == 0, -100)}


def trained(model, inputs: dict) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("decoder", "connector"), [("llama", "patches"), ("internlm2", "queries_and_patches"), ("qwen3", "queries")]
)
def test_only_what_the_method_adds_is_trained_and_reloading_gives_the_same_loss(decoder, connector, method, tmp_path):
    if decoder == "internlm2" and method in ("LoRA", "IA3"):
        decoder = "qwen2"  # InternLM2 names its layers otherwise
    base = tiny.chat_model(decoder, connector)
    before, inputs = copy.deepcopy(base.state_dict()), labelled(base)
    config = copy.deepcopy(METHODS[method])
    if config.peft_type == "LORA":
        config.modules_to_save = [name for name in ("mlp1", "mlp2") if getattr(base, name) is not None]
    model = get_peft_model(base, config)
    own = {name for name, p in model.named_parameters() if p.requires_grad}
    assert own
    assert not [
        name
        for name in own
        if not any(part in name for part in ("prompt_encoder", "lora_", "ia3_", "modules_to_save"))
    ]
    losses = trained(model.train(), inputs)
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        expected = model(**inputs).loss
        model.save_pretrained(tmp_path)
        fresh = tiny.chat_model(decoder, connector)
        assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
        again = PeftModel.from_pretrained(fresh, tmp_path).eval()
        assert torch.equal(again(**inputs).loss, expected)
        assert not torch.equal(tiny.chat_model(decoder, connector)(**inputs).loss, expected)


@pytest.mark.parametrize("connector", ["patches", "queries_and_patches"])
@pytest.mark.parametrize("method", PROMPTS)
@torch.no_grad()
def test_generation_behind_a_learned_prompt_goes_on_as_the_forward_says(connector, method):
    model = get_peft_model(tiny.chat_model("llama", connector), copy.deepcopy(METHODS[method])).eval()
    inputs = tiny.chat_inputs(model.base_model, [[1, 2]])
    found = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    for token in found.tolist():
        logits = model(**inputs).logits[0, -1]
        logits[tiny.IMAGE_TOKEN_ID] = -torch.inf
        assert int(logits.argmax()) == token
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])


@pytest.mark.parametrize("queries", [0, 5])
def test_parameters_of_the_model_itself_are_frozen_in_contrastive_models_too(queries, tmp_path):
    config = PromptTuningConfig(
        num_virtual_tokens=3, task_type="FEATURE_EXTRACTION", num_layers=3, token_dim=24, num_attention_heads=4
    )
    model = get_peft_model(tiny.internvl_model(num_query_token=queries), config)
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"prompt_encoder"}
    assert model.word_embeddings is model.base_model.get_input_embeddings()
    with pytest.raises(ValueError, match=r"takes no keyword `inputs_embeds`"):
        model(input_ids=tiny.summary_ids(), pixel_values=tiny.pixels())


@pytest.mark.parametrize("name", ["chat-full", "InternVLModel-C", "InternVLModel-C-alone"])
def test_a_copied_model_freezes_its_own_parameters(name):
    model = copy.deepcopy(tiny.MODELS[name][0]())
    assert set(map(id, model.own_parameters.parameters())) == set(map(id, model._parameters.values())) - {id(None)}
    assert not list(model.own_parameters.state_dict())
