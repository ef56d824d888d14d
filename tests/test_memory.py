"""`python -m internvl.planning memory` computes what loading and running really take, without doing either."""

import json

import pytest
import torch
from transformers import InternVLConfig as NativeConfig

from internvl.configuration_internvl import InternViTConfig, InternVLChatConfig, InternVLConfig
from internvl.modeling_internvit import InternVisionModel
from internvl.modeling_internvl import InternVLModel
from internvl.modeling_internvl_chat import InternVLChatForConditionalGeneration
from internvl.planning import memory as planner
from internvl.planning.__main__ import main
from internvl.planning.commands import ATTENTIONS
from internvl.planning.counting import OperationCounter

from . import tiny


FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def tensor_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def all_weights(report: planner.Report) -> dict[str, int]:
    return report.as_dict()["weights"]


@pytest.fixture
def only_config(tmp_path):
    """Saves a configuration and nothing else."""

    def save(config) -> str:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text(config.to_json_string())
        return str(tmp_path / "model")

    return save


@pytest.mark.parametrize("dtype", list(FLOATS))
@pytest.mark.parametrize("name", list(tiny.MODELS))
def test_weights_are_as_large_as_those_of_the_loaded_model(name, dtype, tmp_path):
    model = tiny.MODELS[name][0]()
    model.save_pretrained(tmp_path)
    report = planner.inspect_model(tmp_path / "config.json", dtype=dtype)
    loaded = type(model).from_pretrained(tmp_path, dtype=FLOATS[dtype])
    assert report.model_class == type(model).__name__
    assert all_weights(report)["parameters"] == sum(p.numel() for p in loaded.parameters())
    assert all_weights(report)["bytes"] == tensor_bytes([*loaded.parameters(), *loaded.buffers()])


def test_tied_embeddings_count_once(only_config):
    config = tiny.chat_config("qwen2", tie_word_embeddings=True)
    config.text_config.tie_word_embeddings = True
    embeddings = {part.part: part for part in planner.inspect_model(only_config(config)).parts}["embeddings"]
    assert embeddings.parameters == config.text_config.vocab_size * config.text_config.hidden_size


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
@pytest.mark.parametrize(
    "name", ["InternVLModel-G", "InternVLModel-C-alone", "chat-llama", "chat-internlm2", "chat-full"]
)
def test_quantised_weights_are_as_large_as_those_bitsandbytes_makes(name, dtype, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = tiny.MODELS[name][0]()
    model.save_pretrained(tmp_path)
    option = {"int8": "load_in_8bit", "nf4": "load_in_4bit"}[dtype]
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, **{option: True})
    scales = [p.SCB for p in loaded.parameters() if getattr(p, "SCB", None) is not None]
    scales += [p.quant_state.absmax for p in loaded.parameters() if hasattr(p, "quant_state")]
    assert scales
    report = planner.inspect_model(tmp_path, dtype=dtype)
    assert all_weights(report)["parameters"] == sum(p.numel() for p in model.parameters())
    assert all_weights(report)["bytes"] == tensor_bytes([*loaded.parameters(), *loaded.buffers(), *scales])


def test_the_parts_of_a_full_chat_model_are_told_apart(only_config):
    model = tiny.chat_model(connector="queries_and_patches")
    parts = {part.part: part.parameters for part in planner.inspect_model(only_config(model.config)).parts}

    def count(*prefixes: str) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes))

    embeddings = count("language_model.model.embed_tokens.", "language_model.lm_head.")
    assert parts == {
        "vision tower": count("vision_model."),
        "QLLaMA": count("qllama.", "query_tokens"),
        "connector": count("mlp1.", "mlp2."),
        "decoder": count("language_model.") - embeddings,
        "embeddings": embeddings,
    }


def test_the_parts_of_internvl_g_are_told_apart(only_config):
    model = tiny.internvl_model()
    parts = {part.part: part.parameters for part in planner.inspect_model(only_config(model.config)).parts}
    embeddings = model.qllama.model.embed_tokens.weight.numel() + model.qllama.lm_head.weight.numel()
    qllama = sum(p.numel() for p in model.qllama.parameters()) + model.query_tokens.numel() - embeddings
    assert parts.keys() == {"vision tower", "QLLaMA", "heads", "embeddings"}
    assert (parts["QLLaMA"], parts["embeddings"]) == (qllama, embeddings)


@pytest.mark.parametrize("name", list(planner.SIZES))
def test_every_published_size_is_known_without_weights(name):
    report = planner.inspect_model(name, dtype="float32")
    assert all_weights(report)["bytes"] >= 4 * all_weights(report)["parameters"] > 10**8


def test_published_sizes_have_the_published_numbers_of_parameters():
    """Paper: InternViT-6B has 5.9 billion, QLLaMA 8, InternVL 14."""
    parts = {part.part: part.parameters for part in planner.inspect_model("internvl-14b").parts}
    assert parts["vision tower"] == pytest.approx(5.9e9, rel=0.01)
    assert parts["QLLaMA"] + parts["embeddings"] == pytest.approx(8e9, rel=0.03)
    assert sum(parts.values()) == pytest.approx(14e9, rel=0.02)


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["llama", "internlm2", "qwen3"])
def test_the_cache_is_as_large_as_a_filled_one(decoder, only_config):
    model = tiny.chat_model(decoder)
    inputs = tiny.chat_inputs(model, tiles=[[2], [1, 1]])
    cache = model(**inputs, use_cache=True).past_key_values
    batch, length = inputs["input_ids"].shape
    report = planner.inspect_model(only_config(model.config), "float32", batch=batch, length=length)
    assert report.kv_cache == tensor_bytes(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def test_the_default_length_holds_the_tiles_and_some_text(only_config):
    config = tiny.chat_config()
    report = planner.inspect_model(only_config(config), tiles=3)
    assert report.length == 3 * config.num_image_token + planner.TEXT_LENGTH


@pytest.mark.parametrize("name", ["internvit-6b", "internvl-c"])
def test_a_model_that_generates_no_text_has_no_cache(name):
    assert planner.inspect_model(name).kv_cache == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", list(FLOATS))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True},
        {"intermediate_size": 128},  # the attention is wider than the MLP
        {"intermediate_size": 128, "qk_normalization": False},
        {"image_size": 224},
        {"hidden_act": "silu"},
    ],
    ids=["6B", "300M", "narrow-mlp", "narrow-mlp-without-norms", "many-tokens", "not-in-place"],
)
@torch.no_grad()
def test_the_tensors_of_the_vision_tower_take_what_is_said(changes, dtype, attention):
    """Tensors alone: what kernels allocate for themselves differs by processor."""
    settings = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = InternViTConfig(**{**settings, "image_size": 112, **changes})
    model = tiny.randomize(InternVisionModel(config)).to(FLOATS[dtype])
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    pixels = tiny.pixels(4, config.image_size, config.image_size)
    said = planner.vision_activation_bytes(model.config, len(pixels), config.image_size, FLOATS[dtype])
    with OperationCounter() as live:
        model(pixels)
    assert live.peak_bytes + pixels.nbytes == pytest.approx(said, rel=0.002)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("dtype", list(FLOATS))
def test_the_planner_takes_as_many_tiles_at_once_as_the_model(dtype, attention, only_config):
    config = InternVLChatConfig(
        vision_config={"image_size": 448, "num_hidden_layers": 1}, text_config=dict(tiny.DECODERS["llama"])
    )
    with torch.device("meta"):
        model = InternVLChatForConditionalGeneration(config).to(FLOATS[dtype])
    model.config._attn_implementation = attention
    said = planner.inspect_model(only_config(config), dtype, tiles=100, attention=attention)
    assert said.tiles_at_once == model.vision_batch_size
    assert said.vision_activations == planner.vision_activation_bytes(
        model.config.vision_config, 100, 448, FLOATS[dtype], said.tiles_at_once
    )


def test_wider_numbers_and_written_out_scores_take_more():
    """fp16 more than bf16: its stream is fp32."""
    taken = {
        (dtype, attention): planner.inspect_model("internvit-6b", dtype, attention=attention).vision_activations
        for dtype in FLOATS
        for attention in ATTENTIONS
    }
    assert taken["bfloat16", "sdpa"] < taken["float16", "sdpa"] < taken["float32", "sdpa"]
    for dtype in FLOATS:
        assert taken[dtype, "sdpa"] == taken[dtype, "flash_attention_2"] < taken[dtype, "eager"]


@torch.no_grad()
def test_sixteen_pairs_take_what_is_said(only_config):
    """InternVL-14B at a thirty-second of its widths: the vision tower takes more than texts and both heads do."""
    vision = {"hidden_size": 100, "intermediate_size": 400, "num_attention_heads": 25, "num_hidden_layers": 2}
    qllama = {
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_attention_heads": 32,
        "num_hidden_layers": 2,
        "num_query_token": 96,
        "vision_hidden_size": 100,
        "vocab_size": 50,
    }
    config = InternVLConfig(vision_config=vision, qllama_config=qllama, clip_embed_dim=24, attn_pool_num_heads=4)
    model = tiny.randomize(InternVLModel(config)).to(torch.bfloat16)
    model.completes_texts = False
    pixels, ids = tiny.pixels(16, 224, 224), torch.ones((16, 80), dtype=torch.long)
    said = planner.inspect_model(only_config(config), batch=16).vision_activations
    with OperationCounter() as live:
        model(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids), mode="InternVL-G")
    assert live.peak_bytes + pixels.nbytes == pytest.approx(said, rel=0.02)


def test_images_are_counted_as_their_tiles():
    one = planner.inspect_model("internvl-chat-7b", images=3, tiles=2, batch=2)
    other = planner.inspect_model("internvl-chat-7b", tiles=6, batch=2)
    for name in ("kv_cache", "vision_activations", "tiles_at_once", "length"):
        assert getattr(one, name) == getattr(other, name)
    assert planner.inspect_model("internvl-chat-7b", images=0).vision_activations == 0


def test_the_report_counts_the_tiles_that_are_encoded_at_once():
    reports = [planner.inspect_model(name, tiles=12, batch=4) for name in ("internvl-chat-13b", "internvit-6b-448px")]
    assert [report.tiles_at_once for report in reports] == [14, 48]
    assert reports[0].vision_activations < reports[1].vision_activations / 3


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential"])
@pytest.mark.parametrize(
    "name", ["InternVisionModel", "InternVLModel-G", "InternVLModel-C-alone", "chat-llama", "chat-full"]
)
def test_modules_are_placed_as_from_pretrained_places_them(name, device_map, tmp_path):
    model = tiny.MODELS[name][0]()
    model.save_pretrained(tmp_path)
    budget = {"cpu": tensor_bytes(model.parameters()) * 2 // 3}
    report = planner.inspect_model(tmp_path, "float32", max_memory=budget, device_map=device_map)
    split = type(model).from_pretrained(
        tmp_path, device_map=device_map, max_memory=budget, offload_folder=tmp_path / "offload"
    )
    assert report.modules == {name: str(device) for name, device in split.hf_device_map.items()}
    on_disk = sum(p.numel() for p in split.parameters() if p.is_meta) * 4
    weights = {plan.device: plan.weights for plan in report.devices}
    assert weights["disk"] == on_disk > 0
    assert sum(weights.values()) == all_weights(report)["bytes"]


@pytest.mark.parametrize("dtype", ["bfloat16", "nf4"])
def test_two_cards_share_a_model_without_splitting_a_layer(dtype):
    budget = {0: 30 * planner.GIB, 1: 30 * planner.GIB}
    report = planner.inspect_model("internvl-chat-13b", dtype, tiles=7, batch=2, max_memory=budget)
    first, second = (plan for plan in report.devices if plan.device in "01")
    assert report.fits
    assert 0 < first.weights <= first.budget
    assert 0 < second.weights <= second.budget
    assert first.kv_cache + second.kv_cache == report.kv_cache > 0
    # The tower lies behind the decoder: on the second card, or on both.
    assert second.vision_activations == report.vision_activations > 0
    layers = [name for name in report.modules if ".layers." in name]
    assert layers
    assert all(name.rsplit(".", 1)[1].isdigit() for name in layers)


def test_what_is_offloaded_runs_on_the_card():
    budget = {0: 8 * planner.GIB, "cpu": 64 * planner.GIB}
    report = planner.inspect_model("internvl-14b", max_memory=budget)
    plans = {plan.device: plan for plan in report.devices}
    assert plans["cpu"].weights > plans["0"].weights > 0
    assert (plans["cpu"].kv_cache, plans["cpu"].vision_activations) == (0, 0)
    assert (plans["0"].kv_cache, plans["0"].vision_activations) == (report.kv_cache, report.vision_activations)
    assert report.fits
    assert "offloaded to the CPU" in "\n".join(planner.report_lines(report))


def test_weights_that_no_device_holds_do_not_fit():
    report = planner.inspect_model("internvl-14b", max_memory={0: 8 * planner.GIB, "cpu": 8 * planner.GIB})
    assert not report.fits
    assert "It does not fit" in planner.report_lines(report)[-1]


def test_a_cache_that_no_device_holds_does_not_fit():
    report = planner.inspect_model("internvl-14b", batch=64, length=4096, max_memory={0: 40 * planner.GIB})
    assert not report.fits
    assert "not with cache and activations, on device 0" in planner.report_lines(report)[-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0=24GiB,1=24GiB,cpu=64GiB", {0: 24 * 2**30, 1: 24 * 2**30, "cpu": 64 * 2**30}),
        ("0=10GB", {0: 10 * 10**9}),
        (" cpu = 500 MiB ", {"cpu": 500 * 2**20}),
        ("cuda:0=24GB", {0: 24 * 10**9}),
        (
            "cuda:0=24GB, 1=24GiB, CPU=1000GB,disk=2000GiB",
            {0: 24 * 10**9, 1: 24 * 2**30, "cpu": 10**12, "disk": 2000 * 2**30},
        ),
        ("xpu:1=1GiB,mps=8GiB", {1: 2**30, "mps": 2**33}),
    ],
)
def test_max_memory_is_read_as_accelerate_writes_it(text, expected):
    assert planner.parse_max_memory(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "24GiB",
        "gpu=24GiB",
        "0=24",
        "0=lots",
        "0=24GiB;1=24GiB",
        "0=1.2.3GiB",
        "cuda=1GiB",
        "cuda:0=1GiB,0=2GiB",
        "cuda:x=1GiB",
    ],
)
def test_max_memory_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match="--max-memory"):
        planner.parse_max_memory(text)


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:x", "gpu0"])
def test_a_device_by_another_name_is_told_the_names(device):
    with pytest.raises(ValueError, match=r"\(`0` or `cuda:0`\), `cpu`, `mps` or `disk`; got '" + device):
        planner.parse_max_memory(f"{device}=24GB")


def test_the_command_prints_a_table(root, capsys):
    assert main(["memory", str(root), "--dtype", "float32", "--max-memory", "0=1GiB", "--tiles", "4"]) == 0
    printed = capsys.readouterr().out
    for expected in ("vision tower", "decoder", "all weights", "key-value cache", "4 tile(s)", "It fits."):
        assert expected in printed


def test_the_command_prints_json(root, capsys):
    assert main(["memory", str(root), "--max-memory", "0=1MiB,cpu=2MiB", "--json", "--device-map", "sequential"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["model_class"] == "InternVLChatForConditionalGeneration"
    assert found["weights"]["bytes"] == sum(part["bytes"] for part in found["parts"])
    assert found["fits"] is False
    assert {plan["device"] for plan in found["devices"]} == {"0", "cpu", "disk"}


def refusal(arguments: list[str], capsys) -> str:
    assert main(["memory", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    return captured.err


def test_a_model_that_is_nowhere_is_refused_with_the_names_that_are_known(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "internvl-14b" in refusal([str(tmp_path / "nowhere")], capsys)


def test_a_folder_without_a_configuration_is_refused(capsys, tmp_path):
    assert "holds no `config.json`" in refusal([str(tmp_path)], capsys)


def test_a_broken_configuration_is_refused(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refusal([str(tmp_path)], capsys)


@pytest.mark.parametrize("model_type", [NativeConfig.model_type, "internvl_chat", None])
def test_a_configuration_of_another_package_is_refused(model_type, capsys, tmp_path):
    """`internvl` is what InternVL-14B was published under and what transformers' own model has."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {}))
    assert "python -m internvl.conversion" in refusal([str(tmp_path)], capsys)


def test_impossible_arguments_are_refused(capsys):
    assert "`batch` must be at least 1, got 0" in refusal(["internvit-300m", "--batch", "0"], capsys)
    assert "`tiles` must be at least 0, got -1" in refusal(["internvit-300m", "--tiles", "-1"], capsys)
    assert "`images` must be at least 0, got -1" in refusal(["internvit-300m", "--images", "-1"], capsys)
    with pytest.raises(ValueError, match="`dtype` must be one of"):
        planner.inspect_model("internvit-300m", dtype="fp8")
    with pytest.raises(ValueError, match="`attention` must be one of"):
        planner.inspect_model("internvit-300m", attention="flash")
    with pytest.raises(ValueError, match="`device_map` must be one of"):
        planner.inspect_model("internvit-300m", device_map="cuda")


def test_qllama_alone_is_not_quantised(only_config):
    with pytest.raises(ValueError, match="not loaded in 8 or 4 bits on its own"):
        planner.inspect_model(only_config(tiny.qllama_model().config), "nf4")


def test_every_configuration_of_the_package_is_known():
    assert InternVLChatConfig.model_type in planner.MODEL_CLASSES
    for model_type, classes in planner.MODEL_CLASSES.items():
        assert all(model_class.config_class.model_type == model_type for model_class in classes)
