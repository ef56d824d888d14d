"""transformers' native InternVL, to and from.

1. The native model computes the same logits, for every decoder and every flavour of the tower that it can express.
2. There and back again gives the same tensors and the same configuration.
3. A native checkpoint that this package never saw becomes a complete repository, whatever spelling its names have.
4. The native processor needs no remote code and writes the same tokens.
5. What the native model cannot express is refused, with all reasons.
6. An InternLM2 decoder becomes a LLaMA without a change in what is computed.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    InternVLForConditionalGeneration,
    Qwen2Config,
)
from transformers import InternVLConfig as NativeConfig

from internvl.configuration_internvl import InternVLChatConfig
from internvl.conversion.formats.native_settings import native_obstacles
from internvl.modeling_internvl_chat import InternVLChatForConditionalGeneration

from . import tiny
from .fixtures_conversions import (
    ask,
    assert_rejected,
    assert_same_weights,
    edit_json,
    edited_weights,
    json_of,
    refused,
    run,
    state_of,
    told,
    weights_of,
)
from .fixtures_published import GOLDEN, published, published_chat
from .fixtures_text import make_image, make_tokenizer


LAYER_NORM = {"norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False}
# Decoder, changes of the chat model, changes of its tower.
FLAVOURS = {
    "llama": ("llama", {}, {}),
    "internlm2": ("internlm2", {}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {}, {}),
    "layer-norm": ("qwen2", {}, LAYER_NORM),
    "fourth-from-the-end": ("llama", {"select_layer": -4}, {}),
    "second-from-the-front": ("llama", {"select_layer": 2}, {}),
    "other-image-size": ("qwen3", {"force_image_size": 84}, {}),
    "whole-grid": ("qwen2", {"downsample_ratio": 1.0}, {}),
    "quarter": ("qwen2", {"downsample_ratio": 0.25}, {"image_size": 112}),
    "tied-head": ("qwen2", {"tie_word_embeddings": True}, {}),
    "biased-internlm2": ("internlm2", {}, {"qkv_bias": True}),
    "mixture-of-experts": ("qwen3_moe", {}, {}),
}
EXPERTS = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def chat(flavour: str) -> InternVLChatForConditionalGeneration:
    decoder, changes, tower = FLAVOURS[flavour]
    text = {**tiny.DECODERS["qwen3"], **EXPERTS} if decoder == "qwen3_moe" else dict(tiny.DECODERS[decoder])
    if changes.get("tie_word_embeddings"):
        text["tie_word_embeddings"] = True
    if flavour == "biased-internlm2":
        text["bias"] = True
    return tiny.chat_model(vision_config={**tiny.VISION, **tower}, text_config=text, **changes)


def native_of(folder: Path) -> InternVLForConditionalGeneration:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert type(model) is InternVLForConditionalGeneration
    assert not any(info.values()), info
    return model.eval()


def inputs_for(model) -> dict[str, torch.Tensor]:
    inputs = tiny.chat_inputs(model)
    ids, side = inputs["input_ids"], model.config.image_size
    ids = torch.where(ids == tiny.IMAGE_TOKEN_ID, model.config.image_token_id, ids)
    return {**inputs, "input_ids": ids, "pixel_values": tiny.pixels(len(inputs["pixel_values"]), side, side)}


def assert_same_logits(native, own) -> None:
    inputs = inputs_for(own)
    with torch.no_grad():
        found, wanted = native(**inputs).logits, own(**inputs).logits
    kept = inputs["attention_mask"].bool()  # what stands at padding is no result
    torch.testing.assert_close(found[kept], wanted[kept], atol=1e-5, rtol=0)
    assert torch.equal(found[kept].argmax(-1), wanted[kept].argmax(-1))


@pytest.fixture(scope="module", params=FLAVOURS)
def trip(request, tmp_path_factory):
    """A model, its folder, the native format of it, and this package's format of that."""
    folder = tmp_path_factory.mktemp("native")
    model = chat(request.param)
    model.save_pretrained(folder / "own")
    native = run(folder / "own", folder / "native", to="native")
    return model, folder / "own", native, run(native, folder / "back")


# --------------------------------------------------------------------------------------------------------- the numbers
def test_native_logits_are_equal(trip):
    model, _, native, _ = trip
    assert_same_logits(native_of(native), model)


def test_there_and_back_again_gives_the_same_tensors_and_configuration(trip):
    _, own, _, back = trip
    assert_same_weights(back, own)
    assert json_of(back) == json_of(own)


def test_the_native_configuration_says_all_that_its_class_reads(trip):
    _, _, native, _ = trip
    config = json_of(native)
    top = set(NativeConfig.__annotations__) - {"sub_configs_defaults", "model_type", "sub_configs"}
    assert top <= config.keys()
    vision = set(type(NativeConfig().vision_config).__annotations__) - {"model_type", "base_config_key"}
    assert vision <= config["vision_config"].keys()


@pytest.mark.parametrize("case", ["chat_qwen2_v2", "chat_internlm2_v2"])
def test_the_native_model_gives_what_the_published_code_gave(case, tmp_path):
    notes = json.loads((GOLDEN / case / "case.json").read_text())
    tensors = load_file(GOLDEN / case / "io.safetensors")
    out = run(GOLDEN / case, tmp_path / "native", to="native", image_token_id=notes["img_context_token_id"])
    native = native_of(out)
    kept, tiles = tensors["in.attention_mask"].bool(), tensors["in.image_flags"] == 1
    inputs = {key: tensors[f"in.{key}"] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = native(**inputs, pixel_values=tensors["in.pixel_values"][tiles]).logits
        features = native.get_image_features(tensors["in.pixel_values"], return_dict=True).pooler_output
        prompt = {key: tensors[f"in.generate.{key}"] for key in ("input_ids", "attention_mask")}
        native.generation_config.eos_token_id = None
        generated = native.generate(
            **prompt, pixel_values=tensors["in.pixel_values"][tiles], do_sample=False, max_new_tokens=10
        )
    limits = notes["tolerance"]["fp32"]
    torch.testing.assert_close(logits[kept], tensors["out.logits"][kept], **limits)
    torch.testing.assert_close(features, tensors["out.vit_embeds"], **limits)
    assert torch.equal(generated[:, prompt["input_ids"].shape[1] :], tensors["out.generate.tokens"])


def test_a_published_checkpoint_comes_back_from_its_native_form(tmp_path):
    source = published("chat_internlm2_v2", tmp_path)
    native = run(source, tmp_path / "native", to="native", image_token_id=530)
    assert not any("wqkv" in name for name in weights_of(native))
    back = run(native, tmp_path / "back", to="published")
    assert_same_weights(back, source)
    assert json_of(back) == json_of(source)


@pytest.mark.parametrize("trip", ["qwen2"], indirect=True)
def test_the_type_of_the_weights_is_in_the_native_configuration(trip, tmp_path):
    out = run(trip[1], tmp_path / "native", to="native", dtype="bfloat16")
    assert json_of(out)["dtype"] == "bfloat16"
    assert native_of(out).dtype == torch.bfloat16
    back = run(out, tmp_path / "back")
    assert json_of(back)["dtype"] == "bfloat16"


@pytest.mark.parametrize("trip", ["tied-head", "mixture-of-experts"], indirect=True)
def test_the_native_format_can_be_verified(trip, tmp_path):
    assert "bit by bit" in told(trip[1], tmp_path / "native", to="native", verify=True)[1]


@pytest.mark.parametrize("trip", ["mixture-of-experts"], indirect=True)
def test_each_expert_of_a_mixture_keeps_the_names_of_its_release(trip, tmp_path):
    """transformers holds all experts in one tensor, and stores them one by one."""
    out, messages = told(trip[1], tmp_path / "published", to="published", verify=True)
    assert "language_model.model.layers.1.mlp.experts.3.up_proj.weight" in weights_of(out)
    assert json_of(out)["llm_config"]["architectures"] == ["Qwen3MoeForCausalLM"]
    assert "bit by bit" in messages


# ----------------------------------------------------------------------------------------- checkpoints of transformers
def foreign(folder: Path, is_old: bool, **changes) -> InternVLForConditionalGeneration:
    """A native checkpoint as transformers saves it, with names of today or of the first releases."""
    config = NativeConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": 56, "use_qk_norm": True, "norm_type": "rms_norm",
        },
        text_config={**tiny.DECODERS["qwen2"], "vocab_size": 528},
        image_token_id=349, **{"image_seq_length": 4, "tie_word_embeddings": False, **changes},
    )  # fmt: skip
    model = tiny.randomize(InternVLForConditionalGeneration(config))
    model.save_pretrained(folder)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    if is_old:
        tensors = {old_name(name): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def old_name(name: str) -> str:
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.", 1)
    return "language_model." + name if name.startswith("lm_head.") else name


def write_native_processor(folder: Path) -> None:
    tokenizer = make_tokenizer(add_bos=False, eos_token="<|endoftext|>")
    # As the published native repositories have it: the token for a video lies past the vocabulary.
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(folder)
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    edit_json(folder / "tokenizer_config.json", extra_special_tokens=names, **names)
    (folder / "chat_template.jinja").write_text("{{ '<|im_start|>' }}{{ messages[0]['content'] }}")
    settings = {"image_processor_type": "GotOcr2ImageProcessorFast", "min_patches": 1, "max_patches": 3, "size": 56}
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2], "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **statistics}))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A native checkpoint with names of the first releases and its processor, and this package's format of it."""
    folder = tmp_path_factory.mktemp("released")
    foreign(folder / "native", is_old=True)
    write_native_processor(folder / "native")
    return folder / "native", run(folder / "native", folder / "own")


@pytest.mark.parametrize("is_old", [False, True], ids=["names-of-today", "first-names"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"vision_feature_layer": -2}])
def test_a_checkpoint_of_transformers_gives_equal_logits(is_old, changes, tmp_path):
    native = foreign(tmp_path / "native", is_old, **changes)
    out = run(tmp_path / "native", tmp_path / "own")
    own = InternVLChatForConditionalGeneration.from_pretrained(out).eval()
    assert own.config.select_layer == changes.get("vision_feature_layer", -1)
    assert_same_logits(native, own)


def test_a_checkpoint_that_transformers_saved_is_recognised(tmp_path):
    """Whatever names `save_pretrained` of today chooses."""
    model = foreign(tmp_path / "native", is_old=False)
    model.save_pretrained(tmp_path / "saved")
    own = InternVLChatForConditionalGeneration.from_pretrained(run(tmp_path / "saved", tmp_path / "own")).eval()
    assert_same_logits(model, own)


def test_a_checkpoint_of_transformers_becomes_a_complete_repository(released):
    _, out = released
    config = InternVLChatConfig.from_pretrained(out)
    assert (config.template, config.image_token_id) == ("internvl2_5", 349)
    assert (config.dynamic_image_size, config.use_thumbnail, config.max_dynamic_patch) == (True, True, 3)
    processor = AutoProcessor.from_pretrained(out)
    assert tuple(processor.image_processor.image_mean) == (0.5, 0.4, 0.3)
    model = AutoModelForImageTextToText.from_pretrained(out).eval()
    inputs = ask(processor)
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_a_checkpoint_of_transformers_has_its_small_files_again(released, tmp_path):
    native, own = released
    back = run(own, tmp_path / "back", to="native")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert json_of(back, name) == json_of(native, name)
    assert (back / "chat_template.jinja").read_text() == (native / "chat_template.jinja").read_text()
    assert_same_logits(native_of(back), InternVLChatForConditionalGeneration.from_pretrained(own).eval())


def test_a_token_for_videos_past_the_vocabulary_is_dropped_and_others_are_kept(released, tmp_path):
    for size, is_kept in ((350, False), (351, True)):  # the token has id 350
        source = shutil.copytree(released[0], tmp_path / str(size))
        edit_json(source / "config.json", text_config={**json_of(source)["text_config"], "vocab_size": size})
        cut = {name: t[:size].clone() for name, t in weights_of(source).items() if t.shape[0] == 528}
        with edited_weights(source) as tensors:
            tensors.update(cut)
        out = run(source, tmp_path / f"own_{size}")
        assert ("<video>" in AutoTokenizer.from_pretrained(out).get_vocab()) == is_kept
        assert not set(json_of(out, "tokenizer_config.json")) & {"start_image_token", "video_token"}


def test_the_image_size_follows_the_number_of_image_tokens(tmp_path):
    foreign(tmp_path / "native", is_old=False, image_seq_length=9)
    config = json_of(run(tmp_path / "native", tmp_path / "own"))
    assert config["force_image_size"] == 84
    assert config["vision_config"]["image_size"] == 56


# ------------------------------------------------------------------------------------------------------- the processor
@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """A model with its tokenizer in this package's format, and in the native one."""
    folder = tmp_path_factory.mktemp("processors")
    source = published_chat(folder)
    return run(source, folder / "own"), run(source, folder / "native", to="native")


def test_the_native_format_names_its_image_tokens_and_keeps_the_special_ones(processors):
    own, native = processors
    tokenizer = AutoTokenizer.from_pretrained(native)
    names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    assert [getattr(tokenizer, name) for name in names] == ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    assert tokenizer.context_image_token_id == json_of(native)["image_token_id"] == json_of(own)["image_token_id"]
    assert set(AutoTokenizer.from_pretrained(own).all_special_tokens) <= set(tokenizer.all_special_tokens)
    assert not list(native.glob("*.py"))


def test_the_way_back_gives_the_same_processor(processors, tmp_path):
    own, _ = processors
    back = run(run(own, tmp_path / "native", to="native"), tmp_path / "back")
    found, wanted = state_of(back), state_of(own)
    for name in ("README.md", "conversion.json", "model.safetensors"):
        assert found.pop(name)
        assert wanted.pop(name)
    assert found == wanted


@pytest.mark.parametrize("is_tiled", [True, False])
def test_the_native_image_processor_makes_the_same_tiles(is_tiled, processors, tmp_path):
    own, native = processors
    if not is_tiled:
        source = published("chat_qwen2_v2", tmp_path, dynamic_image_size=False)
        native = run(source, tmp_path / "native", to="native", image_token_id=349)
        own = run(source, tmp_path / "own", image_token_id=349)
    image = make_image(130, 70)
    # What the native processor asks for, whatever the settings say.
    found = AutoImageProcessor.from_pretrained(native)([image], crop_to_patches=True, return_tensors="pt")
    wanted = AutoImageProcessor.from_pretrained(own)([image], return_tensors="pt")
    assert found["pixel_values"].shape == wanted["pixel_values"].shape
    assert (len(wanted["pixel_values"]) > 1) == is_tiled
    # They differ by the rounding of the resize.
    torch.testing.assert_close(found["pixel_values"], wanted["pixel_values"], atol=0.1, rtol=0)


def test_the_native_processor_feeds_the_native_model(processors):
    pytest.importorskip("torchvision", reason="the native processor handles videos too")
    own, native = (AutoProcessor.from_pretrained(folder) for folder in processors)
    assert type(native).__module__.startswith("transformers.")
    inputs = ask(native)
    assert torch.equal(inputs["input_ids"], ask(own)["input_ids"])
    tokens = native_of(processors[1]).generate(**inputs, max_new_tokens=3)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3


def test_the_native_processor_takes_videos(processors):
    pytest.importorskip("torchvision", reason="the native processor handles videos too")
    processor = AutoProcessor.from_pretrained(processors[1])
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(text=text, videos=[torch.zeros(2, 3, 60, 60, dtype=torch.uint8)], return_tensors="pt")
    assert "Frame2: <img>" in processor.decode(inputs["input_ids"][0])
    assert inputs["pixel_values"].shape == (2, 3, 56, 56)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dynamic_image_size": False, "pad2square": True}, "cannot pad images to squares"),
        ({"use_thumbnail": False}, "always adds a thumbnail"),
        ({"template": None}, "no chat template"),
    ],
)
def test_what_the_native_processor_does_otherwise_is_said(changes, message, tmp_path):
    assert message in told(published_chat(tmp_path, **changes), tmp_path / "native", to="native")[1]


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("case", "options", "reason"),
    [
        ("chat_llama_v1", ("--to", "native", "--image-token-id", "500"), "`ps_version` is 'v1'"),
        ("intern_vit_6b", ("--to", "native"), "only for chat models"),
        ("internvl_14b", ("--to", "native"), "only for chat models"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(case, options, reason, tmp_path, capsys):
    assert reason in refused(capsys, GOLDEN / case, tmp_path / "out", *options)


def test_all_reasons_against_the_native_format_are_given_at_once(tmp_path, capsys):
    model = tiny.chat_model(
        connector="queries_and_patches",
        projector_type="mlp2x_gelu",
        ps_version="v1",
        use_image_start_end=False,
        vision_config={**tiny.VISION, "layer_norm_eps": 1e-5},
        image_token_id=None,
    )
    model.save_pretrained(tmp_path / "own")
    message = refused(capsys, tmp_path / "own", tmp_path / "out", "--to", "native")
    for name in (
        "connector`",
        "projector_type`",
        "ps_version`",
        "<img>`",
        "layer_norm_eps` is 1e-05",
        "image_token_id`",
    ):
        assert f"`{name}" in message


def test_a_ratio_that_no_float_holds_and_a_head_that_does_more_have_no_native_form():
    assert not native_obstacles(tiny.chat_config("llama"))
    config = tiny.chat_config("llama", downsample_ratio=1 / 3, vision_config={**tiny.VISION, "image_size": 42})
    config.text_config.final_logit_softcapping = 30.0
    ratio, head = native_obstacles(config)
    assert "`downsample_ratio`" in ratio
    assert "`final_logit_softcapping`" in head


def test_what_a_native_checkpoint_has_besides_is_refused_at_once(tmp_path):
    foreign(tmp_path / "native", is_old=False)
    config = json_of(tmp_path / "native")
    edit_json(
        tmp_path / "native" / "config.json",
        vision_feature_select_strategy="full",
        vision_feature_layer=[-1, -2],
        projector_hidden_act="relu",
        vision_config={**config["vision_config"], "use_mean_pooling": False, "image_size": [56, 70]},
    )
    with pytest.raises(ValueError, match="has what InternVL-Chat here has not") as refusal:
        run(tmp_path / "native", tmp_path / "out")
    for key in "strategy vision_feature_layer projector_hidden_act use_mean_pooling vision_config.image_size".split():
        assert key in str(refusal.value)


def test_a_native_checkpoint_that_lacks_a_third_of_its_attention_is_refused(tmp_path):
    foreign(tmp_path / "native", is_old=False)
    missing = "model.vision_tower.encoder.layer.1.attention.k_proj.weight"
    with edited_weights(tmp_path / "native") as tensors:
        tensors.pop(missing)
    assert_rejected(tmp_path / "native", tmp_path, f"missing: {missing}")


# ---------------------------------------------------------------------------------------------------- InternLM2, LLaMA
@pytest.mark.parametrize("to", ["internvl", "published"])
def test_an_internlm2_decoder_is_a_llama_on_request(to, tmp_path):
    tensors = load_file(GOLDEN / "chat_internlm2_v2" / "io.safetensors")
    notes = json.loads((GOLDEN / "chat_internlm2_v2" / "case.json").read_text())
    source, token = published("chat_internlm2_v2", tmp_path), notes["img_context_token_id"]
    out = run(source, tmp_path / "out", llama_decoder=True, to=to, image_token_id=token)
    decoder = json_of(out)["text_config" if to == "internvl" else "llm_config"]
    assert decoder["model_type"] == "llama"
    assert "bias" not in decoder
    if to == "published":
        assert decoder["architectures"] == ["LlamaForCausalLM"]
        out = run(out, tmp_path / "own", image_token_id=token)
    model = InternVLChatForConditionalGeneration.from_pretrained(out).eval()
    keys = ("pixel_values", "input_ids", "attention_mask", "image_flags")
    with torch.no_grad():
        logits = model(**{key: tensors[f"in.{key}"] for key in keys}).logits
    kept = tensors["in.attention_mask"].bool()
    torch.testing.assert_close(logits[kept], tensors["out.logits"][kept], **notes["tolerance"]["fp32"])


def test_scaled_rotary_positions_of_an_internlm2_stay_scaled(tmp_path):
    text = {
        **tiny.DECODERS["internlm2"],
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 16,
    }
    model = tiny.chat_model("internlm2", text_config=text)
    model.save_pretrained(tmp_path / "own")
    out = run(tmp_path / "own", tmp_path / "llama", llama_decoder=True)
    llama = InternVLChatForConditionalGeneration.from_pretrained(out).eval()
    assert llama.config.text_config.rope_parameters["rope_type"] == "dynamic"
    inputs = inputs_for(model)
    assert inputs["input_ids"].shape[1] > 16
    with torch.no_grad():
        torch.testing.assert_close(llama(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)


def test_heads_that_do_not_fit_the_packed_matrix_are_refused(tmp_path):
    source = published("chat_internlm2_v2", tmp_path)
    decoder = {**json_of(source)["llm_config"], "num_attention_heads": 8, "num_key_value_heads": 8}
    decoder["hidden_size"] = 72
    edit_json(source / "config.json", llm_config=decoder)
    assert_rejected(source, tmp_path, "does not describe this internlm2 decoder", llama_decoder=True)


def test_qwen2_of_the_native_default_is_known_without_its_name(tmp_path):
    """transformers takes a decoder without `model_type` for a Qwen2."""
    foreign(tmp_path / "native", is_old=False)
    text = json_of(tmp_path / "native")["text_config"]
    text.pop("model_type")
    edit_json(tmp_path / "native" / "config.json", text_config=text)
    assert json_of(run(tmp_path / "native", tmp_path / "own"))["text_config"]["model_type"] == Qwen2Config.model_type
