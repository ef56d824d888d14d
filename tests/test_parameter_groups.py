"""Parts of the models, their learning rates and weight decay, and LoRA targets per part."""

import pytest
from peft import LoraConfig, get_peft_model

from internvl.training.models.parameter_groups import (
    PARTS,
    decays,
    layers_above,
    lora_targets,
    parameter_groups,
    part_of,
    train_parts,
)
from internvl.training.models.pretraining import InternVLForContrastiveTraining, InternVLForGenerativeTraining

from . import tiny
from .training_models import generative_batch, tiny_model


MODELS = {
    "C alone": lambda: tiny_model(InternVLForContrastiveTraining, 0, objective="sigmoid"),
    "G": lambda: tiny_model(InternVLForGenerativeTraining),
    "chat": tiny.chat_model,
    "full chat": lambda: tiny.chat_model(connector="queries_and_patches"),
    "full chat with experts": lambda: tiny.chat_model("qwen3_moe", "queries_and_patches"),
}
WANTED = {
    "C alone": {"vision", "pooling", "text_projection", "temperature", "qllama"},
    "G": {*PARTS} - {"projector", "language", "token_heads"},
    "chat": {"vision", "projector", "language"},
    "full chat": {"vision", "projector", "language", "qllama", "queries"},
    "full chat with experts": {"vision", "projector", "language", "qllama", "queries"},
}
RATES = {"vision": 1e-3, "queries": 2e-4, "query_heads": 3e-4, "temperature": 4e-4}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_belongs_to_a_part(name):
    assert {part_of(key) for key, _ in MODELS[name]().named_parameters()} == WANTED[name]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vision_model.encoder.layers.0.attn.qkv.weight", "vision"),
        ("clip_projector.norm1_q.weight", "pooling"),
        ("clip_projector2.norm1_q.weight", "query_heads"),
        ("qllama.model.layers.2.cross_attn.k_proj.weight", "queries"),
        ("qllama.layers.2.cross_attn.norm1.weight", "queries"),
        ("query_tokens", "queries"),
        ("qllama.model.layers.2.self_attn.k_proj.weight", "qllama"),
        ("qllama.model.embed_tokens.weight", "qllama"),
        ("qllama.lm_head.weight", "language_head"),
        ("language_model.lm_head.weight", "language"),
        ("mlp1.0.weight", "projector"),
        ("base_model.model.vision_model.encoder.layers.0.attn.qkv.lora_A.default.weight", "vision"),
        ("_fsdp_wrapped_module.qllama.model.layers.0._fsdp_wrapped_module.cross_attn.k_proj.weight", "queries"),
    ],
)
def test_names_say_the_part(name, part):
    assert part_of(name) == part


def test_parts_are_trained_and_all_others_frozen():
    model = MODELS["G"]()
    train_parts(model, RATES)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (part_of(name) in RATES), name


def test_each_part_and_each_layer_of_the_tower_has_its_rate():
    model = MODELS["G"]()
    train_parts(model, RATES)
    groups = parameter_groups(model, RATES, weight_decay=0.1, layer_decay=0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[parameter]: group for group in groups for parameter in group["params"]}
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(found)
    rates = {
        f"vision_model.encoder.layers.{i}.": 1e-3 * 0.5 ** (3 - i) for i in range(3)
    }  # the tower has three blocks, and its heads are a layer above the last
    rates["vision_model.embeddings."] = 1e-3 * 0.5**4
    for name, group in found.items():
        wanted = next((rate for start, rate in rates.items() if name.startswith(start)), RATES[part_of(name)])
        assert group["lr"] == pytest.approx(wanted), name
        assert group["part"] == part_of(name)


def test_matrices_decay_and_nothing_else():
    model = MODELS["G"]()
    spared = {name for name, parameter in model.named_parameters() if not decays(name, parameter)}
    assert {name for name, p in model.named_parameters() if p.ndim < 2} < spared
    for end in (
        "ls1",
        "norm1.weight",
        "fc1.bias",
        "q_bias",
        "query_tokens",
        "position_embedding",
        "class_embedding",
        "logit_scale",
    ):
        assert any(name.endswith(end) for name in spared), end
    for end in ("patch_embedding.weight", "qkv.weight", "embed_tokens.weight", "text_projection", "lm_head.weight"):
        assert not any(name.endswith(end) for name in spared), end
    train_parts(model, RATES)
    for group in parameter_groups(model, RATES, weight_decay=0.1):
        names = [name for name, p in model.named_parameters() if any(p is other for other in group["params"])]
        assert {name in spared for name in names} == {group["weight_decay"] == 0.0}


def test_adapters_take_the_place_of_their_part_in_the_optimizer():
    model = MODELS["G"]()
    get_peft_model(model, LoraConfig(r=2, target_modules=lora_targets(model, ["vision"])))
    train_parts(model, RATES, adapted=["vision"])
    groups = parameter_groups(model, RATES, layer_decay=0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[parameter]: group["lr"] for group in groups for parameter in group["params"]}
    adapters = {name for name in found if part_of(name) == "vision"}
    assert adapters
    assert all("lora_" in name for name in adapters)
    assert {found[name] for name in adapters} == {5e-4, 2.5e-4, 1.25e-4}
    assert "query_tokens" in found


@pytest.mark.parametrize(
    ("name", "part", "layers"),
    [
        ("G", "vision", {"qkv", "proj", "fc1", "fc2"}),
        ("G", "qllama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("G", "queries", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("full chat", "qllama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("full chat", "language", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("chat", "projector", {"1", "3"}),
    ],
)
def test_lora_targets_are_the_linear_layers_of_the_part(name, part, layers):
    model = MODELS[name]()
    targets = lora_targets(model, [part])
    assert {target.rpartition(".")[2] for target in targets} == layers
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    found = {key for key, _ in adapted.named_parameters() if "lora_" in key}
    assert len(found) == 2 * len(targets)
    assert {part_of(key) for key in found} == {part}


def test_lora_targets_of_all_towers_leave_heads_and_new_parts_out():
    targets = lora_targets(MODELS["full chat"]())
    assert {part_of(f"{target}.weight") for target in targets} == {"vision", "qllama", "language"}
    assert not any("lm_head" in target or "cross_attn" in target for target in targets)


def test_gradients_reach_the_adapters_alone():
    model = MODELS["G"]()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=lora_targets(model, ["vision", "qllama"])))
    adapted(**generative_batch()).loss.backward()
    with_gradient = {part_of(name) for name, p in adapted.named_parameters() if p.grad is not None}
    assert with_gradient == {"vision", "qllama"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: part_of("resampler.weight"), "`resampler.weight` belongs to none of the parts vision"),
        (lambda: train_parts(MODELS["chat"](), ["queries"]), "There is no part queries to train in this model"),
        (
            lambda: parameter_groups(MODELS["chat"](), {"vision": 1e-3}),
            "`learning_rates` has none for `(projector|language)`",
        ),
        (lambda: lora_targets(MODELS["chat"](), ["llama"]), "`parts` must be among .*, got llama"),
        (lambda: lora_targets(MODELS["chat"](), ["queries"]), "no linear layer in queries"),
    ],
)
def test_what_a_model_has_not_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def published_exponent(name: str, num_vision: int, num_qllama: int) -> int:
    """`get_num_layer_for_vit_and_qllama` and what is made of it: the power of the decay, at least 0."""
    tops = {"vision": num_vision + 2, "qllama": num_qllama + 2}
    tower = "vision" if name.startswith(("vision_model.", "clip_projector.")) else "qllama"
    if name in ("query_tokens", "logit_scale") or "embeddings." in name or "embed_tokens" in name:
        number = 0
    elif "layers." in name:
        number = int(name.split("layers.")[1].split(".")[0]) + 1
    else:
        number = tops[tower]
    return max(0, tops[tower] - number - 1)


def test_layers_are_counted_as_published():
    model = MODELS["G"]()
    depths = {"vision": 48, "qllama": 32}
    for name, _ in model.named_parameters():
        tower, number = layers_above(name, depths)
        assert number == published_exponent(name, 48, 32), name
        assert tower in name or not tower or name in ("query_tokens", "logit_scale"), name
    assert layers_above("vision_model.encoder.layers.47.ls1", depths) == ("vision", 1)
    assert layers_above("vision_model.embeddings.class_embedding", depths) == ("vision", 49)
    assert layers_above("qllama.model.embed_tokens.weight", depths) == ("qllama", 33)


def test_retrieval_has_the_groups_of_the_published_code():
    """Both decays, and weight decay of all that is no vector, queries, positions and the temperature too."""
    model = MODELS["G"]()
    rates = dict.fromkeys(WANTED["G"], 1e-6)
    groups = parameter_groups(model, rates, 0.05, 0.9, qllama_layer_decay=0.8, decay_inputs=True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[parameter]: group for group in groups for parameter in group["params"]}
    layers = (model.config.vision_config.num_hidden_layers, model.config.qllama_config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        decay = 0.9 if name.startswith("vision_model.") else 0.8
        assert found[name]["lr"] == pytest.approx(1e-6 * decay ** published_exponent(name, *layers)), name
        is_vector = parameter.ndim == 1 and name != "logit_scale"  # a scalar there, a vector of one in training here
        assert found[name]["weight_decay"] == (0.0 if is_vector else 0.05), name
