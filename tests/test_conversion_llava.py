"""Chat checkpoints of the LLaVA code base: parts, image token, prompts, and what is refused.

That the results compute what the published code computed is tested in test_goldens.
"""

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from transformers import AutoModel, AutoProcessor, AutoTokenizer, GenerationConfig

from internvl.conversion.__main__ import main
from internvl.conversion.plan import plan_conversion

from .fixtures_conversions import ask, assert_rejected, assert_same_weights, edit_json, json_of, run, told, weights_of
from .fixtures_published import GOLDEN, PREPROCESSOR, published, write_sentencepiece_tokenizer
from .fixtures_text import make_image, make_tokenizer
from .test_conversion_adapters import wrap


TOWER = "model.vision_tower.vision_tower."
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
CASES = ("llava_vit6b", "llava_internvl14b")


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a source."""
    shards = [torch.load(file, weights_only=True) for file in folder.glob("pytorch_model-*.bin")]
    return weights_of(folder) | {name: tensor for shard in shards for name, tensor in shard.items()}


def llava(case: str, folder: Path, **config) -> Path:
    source = published(case, folder, with_preprocessor=False)
    edit_json(source / "config.json", **config)
    return source


@contextmanager
def as_one_file(source: Path):
    """One safetensors file in the place of all others, of what the tensors are after the block."""
    tensors = stored(source)
    for file in source.glob("pytorch_model*"):
        file.unlink()
    yield tensors
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, source / "model.safetensors")


def drop(prefix: str, source: Path) -> None:
    with as_one_file(source) as tensors:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return {case: run(GOLDEN / case, tmp_path_factory.mktemp("llava") / case) for case in CASES}


# -------------------------------------------------------------------------------------------------- names and settings
@pytest.mark.parametrize("case", CASES)
def test_weights_are_the_source_bit_by_bit_but_for_one_row(case, converted):
    wanted, found = stored(GOLDEN / case), weights_of(converted[case])
    renamed = {
        f"{TOWER}vision_model.": "vision_model.",
        f"{TOWER}qllama.model.": "qllama.",
        f"{TOWER}query_tokens": "query_tokens",
        TOWER: "vision_model.",
        "model.mm_projector.mlp": "mlp",
        "model.mm_projector.": "mlp1.",
        "model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    }
    unused = {f"{TOWER}qllama.model.embed_tokens.weight", f"{TOWER}qllama.lm_head.weight"}
    for name, tensor in wanted.items():
        old, new = next((old, new) for old, new in renamed.items() if name.startswith(old))
        if name not in unused:
            result = found.pop(name.replace(old, new, 1))
            assert torch.equal(result[: len(tensor)], tensor)
            assert len(result) == len(tensor) + (old in ("model.", "lm_head.") and len(tensor) == 480)
    assert not found


def test_what_is_left_out_of_a_14b_tower_is_named():
    lines = plan_conversion(GOLDEN / "llava_internvl14b").describe()
    for name in ("qllama.lm_head.weight", "qllama.model.embed_tokens.weight"):
        assert any(line.startswith(f"Left out: {TOWER}{name} (in a chat model QLLaMA") for line in lines)


def test_the_configuration_is_split_into_its_parts(converted):
    vit, full = (json_of(converted[case]) for case in CASES)
    assert (vit["connector"], vit["select_layer"]) == ("patches", -4)
    assert (full["connector"], full["select_layer"]) == ("queries_and_patches", -2)
    for config in (vit, full):
        assert config["projector_type"] == "mlp2x_gelu"
        assert (config["downsample_ratio"], config["template"], config["pad2square"]) == (1.0, "vicuna_v1", True)
        assert (config["model_type"], config["text_config"]["model_type"]) == ("internvl_chat_model", "llama")
        assert (config["text_config"]["rms_norm_eps"], config["mm_projector_type"] != "") == (1e-5, True)
        assert not any(key.startswith(("mm_", "image_", "tune_")) for key in config["text_config"])
        assert "vision_tower_config" not in config
    assert full["qllama_config"]["num_query_token"] == 8
    model = AutoModel.from_pretrained(converted["llava_internvl14b"])
    assert model.num_image_token == 8 + 16


def test_a_projector_with_a_norm_keeps_it(tmp_path):
    """`mlp2x_gelu_ln`: norm, linear, activation, linear."""
    source = llava("llava_vit6b", tmp_path, mm_projector_type="mlp2x_gelu_ln")
    (source / "mm_projector.bin").unlink()

    with as_one_file(source) as tensors:
        for kind in ("weight", "bias"):
            last, first = (tensors.pop(f"model.mm_projector.{index}.{kind}") for index in (2, 0))
            tensors |= {f"model.mm_projector.3.{kind}": last, f"model.mm_projector.1.{kind}": first}
            tensors[f"model.mm_projector.0.{kind}"] = torch.ones(48)
    out = run(source, tmp_path / "out")
    assert json_of(out)["projector_type"] == "layer_norm_mlp"
    assert isinstance(AutoModel.from_pretrained(out).mlp1[0], torch.nn.LayerNorm)


@pytest.mark.parametrize(("tower_size", "wanted"), [(224, 336), (56, 56)])
def test_towers_of_224_pixels_see_images_of_336(tower_size, wanted, tmp_path):
    source = llava("llava_vit6b", tmp_path)
    edit_json(source / "vision_tower_config.json", image_size=tower_size)
    patches = (tower_size // 14) ** 2

    with as_one_file(source) as tensors:
        tensors[f"{TOWER}embeddings.position_embedding"] = torch.zeros(1, patches + 1, 48)
    out = run(source, tmp_path / "out")
    config = AutoModel.from_pretrained(out).config
    assert (config.vision_config.image_size, config.image_size) == (tower_size, wanted)
    assert config.num_image_token == (wanted // 14) ** 2
    assert json_of(out, "preprocessor_config.json")["size"]["height"] == wanted


def test_another_size_of_images_may_be_asked_for(tmp_path):
    run(GOLDEN / "llava_vit6b", tmp_path / "out", image_size=70)
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    recorded = load_file(GOLDEN / "llava_vit6b" / "io.safetensors")
    assert model.num_image_token == recorded["out.image_features"].shape[1]
    found = model.extract_feature(recorded["in.images"])
    torch.testing.assert_close(found, recorded["out.image_features"], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(("aspect_ratio", "mode"), [("pad", "pad"), (None, "crop"), (..., "crop"), ("square", "crop")])
def test_images_are_padded_or_cropped_as_in_training(aspect_ratio, mode, tmp_path):
    out = run(llava("llava_vit6b", tmp_path, image_aspect_ratio=aspect_ratio), tmp_path / "out")
    settings = json_of(out, "preprocessor_config.json")
    assert settings["resize_mode"] == mode
    assert json_of(run(out, tmp_path / "again"), "preprocessor_config.json") == settings


def test_settings_of_generate_are_kept(tmp_path):
    out = run(llava("llava_vit6b", tmp_path, temperature=0.6, do_sample=True), tmp_path / "out")
    assert GenerationConfig.from_pretrained(out).temperature == 0.6
    assert "temperature" not in json_of(out)["text_config"]


# ----------------------------------------------------------------------------------------------------- the image token
@pytest.mark.parametrize("case", CASES)
def test_the_image_token_is_one_row_behind_the_others(case, converted):
    found, before = weights_of(converted[case]), stored(GOLDEN / case)
    config = json_of(converted[case])
    assert config["image_token_id"] == 480
    assert config["text_config"]["vocab_size"] == 481
    assert config["mask_image_token_logit"] is True
    torch.testing.assert_close(found[EMBEDDING][480], before["model.embed_tokens.weight"].mean(dim=0))
    assert not found[HEAD][480].any()


@pytest.mark.parametrize("case", CASES)
def test_the_other_logits_and_the_loss_are_unchanged_and_training_does_not_reach_the_row(case, converted):
    model = AutoModel.from_pretrained(converted[case]).eval()
    ids = torch.randint(0, 480, (3, 9), generator=torch.Generator().manual_seed(0))
    found = model(input_ids=ids, labels=ids)
    assert (found.logits[..., 480] == torch.finfo(torch.float32).min).all()
    found.loss.backward()
    decoder = model.language_model
    gradient = decoder.lm_head.weight.grad
    assert gradient[:480].any()
    assert not gradient[480].any()
    for part in (decoder.lm_head, decoder.model.embed_tokens):  # now as in the source
        part.weight.data = part.weight.data[:480]
    decoder.vocab_size = decoder.config.vocab_size = 480
    wanted = decoder(input_ids=ids, labels=ids)
    assert torch.equal(found.logits[..., :480], wanted.logits)
    torch.testing.assert_close(found.loss, wanted.loss, atol=0, rtol=1e-6)


def test_a_tied_head_stays_tied(tmp_path):
    source = llava("llava_vit6b", tmp_path, tie_word_embeddings=True)
    drop("lm_head.", source)
    out = run(source, tmp_path / "out")
    assert HEAD not in weights_of(out)
    model = AutoModel.from_pretrained(out)
    assert model.language_model.lm_head.weight.shape[0] == 481
    assert model.language_model.lm_head.weight is model.get_input_embeddings().weight


def test_an_id_inside_the_vocabulary_is_taken_as_it_is(tmp_path):
    out = run(GOLDEN / "llava_vit6b", tmp_path / "out", image_token_id=479)
    config = json_of(out)
    assert (config["image_token_id"], config["text_config"]["vocab_size"]) == (479, 480)
    assert "mask_image_token_logit" not in config
    assert torch.equal(weights_of(out)[EMBEDDING], stored(GOLDEN / "llava_vit6b")["model.embed_tokens.weight"])


def test_an_id_far_behind_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="would be token 500, but the model has embeddings for 480"):
        run(GOLDEN / "llava_vit6b", tmp_path / "out", image_token_id=500)


def with_vocabulary(source: Path, size: int) -> None:
    with as_one_file(source) as tensors:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.randn(size, tensors[name].shape[1], generator=torch.Generator().manual_seed(1))
    edit_json(source / "config.json", vocab_size=size)


@pytest.mark.parametrize("kind", ["sentencepiece", "fast"])
@pytest.mark.parametrize("spare_rows", [0, 3])
def test_the_tokenizer_gets_the_token_and_the_model_its_row(kind, spare_rows, tmp_path):
    source = llava("llava_vit6b", tmp_path)
    if kind == "sentencepiece":
        write_sentencepiece_tokenizer(source, {})
        size = SentencePieceProcessor(model_file=str(source / "tokenizer.model")).get_piece_size()
    else:
        tokenizer = make_tokenizer(special_tokens=())
        tokenizer.save_pretrained(source)
        size = len(tokenizer)
    with_vocabulary(source, size + spare_rows)
    out = run(source, tmp_path / "out")
    tokenizer, config = AutoTokenizer.from_pretrained(out), json_of(out)
    assert tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == config["image_token_id"] == size
    assert len(tokenizer) == size + 1
    assert config["text_config"]["vocab_size"] == max(size + spare_rows, size + 1)
    before, found = stored(source)["model.embed_tokens.weight"], weights_of(out)[EMBEDDING]
    kept = [row for row in range(len(before)) if row != size]
    assert torch.equal(found[kept], before[kept])
    torch.testing.assert_close(found[size], before.mean(dim=0))
    assert tokenizer("a <IMG_CONTEXT> b").input_ids.count(size) == 1
    again = run(out, tmp_path / "again")
    assert_same_weights(again, out)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        assert json_of(again, name) == json_of(out, name)


def test_a_tokenizer_of_another_model_or_that_contradicts_the_image_token_is_refused(tmp_path):
    source = llava("llava_vit6b", tmp_path)
    make_tokenizer(special_tokens=tuple(f"<extra{i}>" for i in range(400))).save_pretrained(source)
    assert_rejected(source, tmp_path, r"would be token \d+, but the model has embeddings for 480 tokens")
    make_tokenizer(special_tokens=()).save_pretrained(source)
    assert_rejected(source, tmp_path, r"`image_token_id` is 7, the tokenizer has \d+ for", image_token_id=7)


# ------------------------------------------------------------------------------------------------------------- prompts
@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    source = llava("llava_vit6b", folder)
    write_sentencepiece_tokenizer(source, {}, pad_token="<unk>")
    return source, run(source, folder / "out")


QUESTION = "What is shown in the image?"
PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    f"and polite answers to the user's questions. USER: <image>\n{QUESTION} ASSISTANT:"
)


def published_ids(source: Path, image_token_id: int, num_image_token: int) -> list[int]:
    """As the LLaVA code: text on either side of an image is tokenized alone, and the begin token is kept once."""
    processor = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    before, after = (processor.encode(part) for part in PROMPT.split("<image>"))
    return [1, *before, *[image_token_id] * num_image_token, *after]


def test_the_prompt_is_the_published_one_token_by_token(with_tokenizer):
    source, out = with_tokenizer
    model, processor = AutoModel.from_pretrained(out), AutoProcessor.from_pretrained(out)
    wanted = published_ids(source, model.config.image_token_id, model.num_image_token)
    inputs = ask(processor, (56, 56), QUESTION)
    assert inputs["input_ids"][0].tolist() == wanted
    assert processor(text=PROMPT, images=make_image(56, 56))["input_ids"][0] == wanted
    assert processor.image_token_ids == [model.config.image_token_id]
    counts = processor._get_num_multimodal_tokens(image_sizes=[(56, 90)])
    assert (counts["num_image_tokens"], counts["num_image_patches"]) == ([model.num_image_token], [1])
    with torch.no_grad():
        assert model.eval().generate(**inputs, max_new_tokens=2).shape[1] > len(wanted)


def test_chat_builds_the_same_prompt(with_tokenizer, monkeypatch):
    source, out = with_tokenizer
    model, tokenizer = AutoModel.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    seen = []
    generate = type(model).generate
    monkeypatch.setattr(
        type(model), "generate", lambda self, **kwargs: seen.append(kwargs["input_ids"]) or generate(self, **kwargs)
    )
    model.chat(tokenizer, torch.zeros(1, 3, 56, 56), QUESTION, {"max_new_tokens": 1})
    assert seen[0][0].tolist() == published_ids(source, model.config.image_token_id, model.num_image_token)


# ----------------------------------------------------------------------------------------------------- where parts lie
@pytest.mark.parametrize("name", ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"])
def test_a_file_of_the_checkpoint_stands_for_all_of_it(name, converted, tmp_path):
    assert_same_weights(run(GOLDEN / "llava_vit6b" / name, tmp_path / "out"), converted["llava_vit6b"])


def test_the_projector_may_lie_in_its_own_file_only(converted, tmp_path):
    source = llava("llava_vit6b", tmp_path)
    drop("model.mm_projector.", source)
    assert_same_weights(run(source, tmp_path / "out"), converted["llava_vit6b"])


def test_a_projector_file_that_contradicts_the_others_is_refused(tmp_path):
    source = llava("llava_vit6b", tmp_path)
    projector = torch.load(source / "mm_projector.bin", weights_only=True)
    projector["model.mm_projector.2.bias"] += 1
    torch.save(projector, source / "mm_projector.bin")
    assert_rejected(source, tmp_path, r"do not agree in model\.mm_projector\.2\.bias\. Take away the file")


def test_pre_trained_projectors_alone_are_answered_with_what_to_do(tmp_path):
    source = llava("llava_vit6b", tmp_path)
    for file in source.glob("pytorch_model*"):
        file.unlink()
    assert_rejected(source, tmp_path, r"holds a projector and no language model.*fine-tuned")


@pytest.mark.parametrize("case", CASES)
def test_the_tower_may_come_from_its_own_checkpoint(case, converted, tmp_path):
    source = llava(case, tmp_path)
    tower = {name.removeprefix(TOWER): x.clone() for name, x in stored(source).items() if name.startswith(TOWER)}
    if case == "llava_internvl14b":  # a whole InternVL-14B: with the heads that a chat model does not use
        whole = load_file(GOLDEN / "internvl_14b" / "model.safetensors")
        heads = ("clip_projector", "text_projection", "logit_scale", "itm_head")
        tower |= {name: tensor for name, tensor in whole.items() if name.startswith(heads)}
    folder = tmp_path / "tower"
    folder.mkdir()
    save_file(tower, folder / "model.safetensors")
    (source / "vision_tower_config.json").rename(folder / "config.json")
    drop(TOWER, source)
    assert_rejected(source, tmp_path, r"has no vision tower: config.json names 'OpenGVLab/.*--vision-tower DIR")
    out = tmp_path / "out"
    assert main([str(source), str(out), "--vision-tower", str(folder)]) == 0
    assert_same_weights(out, converted[case])
    assert json_of(out) == json_of(converted[case])


def test_a_named_tower_takes_the_place_of_the_stored_one(tmp_path):
    source = llava("llava_vit6b", tmp_path)
    folder = tmp_path / "tower"
    folder.mkdir()
    tower = {name.removeprefix(TOWER): x + 1 for name, x in stored(source).items() if name.startswith(TOWER)}
    save_file(tower, folder / "model.safetensors")
    shutil.copyfile(source / "vision_tower_config.json", folder / "config.json")
    out, messages = told(source, tmp_path / "out", vision_tower=folder)
    found = weights_of(out)
    assert all(torch.equal(found[f"vision_model.{name}"], tensor) for name, tensor in tower.items())
    assert "another vision tower was asked for" in messages


@pytest.mark.parametrize("place", ["file", "folder"])
def test_the_configuration_of_the_tower_may_be_named(place, converted, tmp_path):
    source = llava("llava_vit6b", tmp_path)
    (tmp_path / "elsewhere").mkdir()
    file = (source / "vision_tower_config.json").rename(tmp_path / "elsewhere" / "config.json")
    named = file if place == "file" else file.parent
    assert json_of(run(source, tmp_path / "out", vision_config=named)) == json_of(converted["llava_vit6b"])


@pytest.mark.parametrize("case", CASES)
def test_without_the_tower_configuration_widths_of_no_release_are_refused(case, tmp_path):
    source = llava(case, tmp_path)
    (source / "vision_tower_config.json").unlink()
    assert_rejected(source, tmp_path, "--vision-config FILE")


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_of_a_tower_of_a_released_width_is_read_from_its_shapes(case, tmp_path):
    """Checked on a tower whose heads are as wide as those of the releases."""
    source = llava(case, tmp_path)
    wanted = json_of(source, "vision_tower_config.json")
    vision, width = wanted.get("vision_config", wanted), 128
    old = {vision["hidden_size"], wanted.get("qllama_config", vision)["hidden_size"]}
    sides = {**dict.fromkeys(old, width), 3 * vision["hidden_size"]: 3 * width}
    touching = (TOWER, *(f"model.mm_projector.{part}0.weight" for part in ("", "mlp1.", "mlp2.")))

    with as_one_file(source) as tensors:
        for name in [name for name in tensors if name.startswith(touching)]:
            tensors[name] = torch.zeros([sides.get(side, side) for side in tensors[name].shape])
    (source / "mm_projector.bin").unlink(missing_ok=True)
    (source / "vision_tower_config.json").unlink()
    config = json_of(run(source, tmp_path / "out"))
    found = config["vision_config"]
    assert (found["hidden_size"], found["num_attention_heads"]) == (width, 1)
    for key in ("image_size", "patch_size", "num_hidden_layers", "intermediate_size", "qk_normalization", "qkv_bias"):
        assert found[key] == vision[key]
    if "qllama_config" in wanted:
        qllama = config["qllama_config"]
        assert (qllama["hidden_size"], qllama["num_attention_heads"], qllama["num_query_token"]) == (width, 1, 8)
        assert (qllama["num_hidden_layers"], qllama["cross_attention_frequency"]) == (3, 2)


def test_a_wrapped_tower_is_merged_with_the_fixed_alpha_of_the_llava_code(converted, tmp_path):
    source = llava("llava_internvl14b", tmp_path)
    vision, qllama = "vision_model.encoder.layers.1.mlp.fc2", "qllama.model.layers.1.self_attn.o_proj"
    deltas = {}

    with as_one_file(source) as tensors:
        for module in (vision, qllama):
            prefix = f"{TOWER}{module.partition('.')[0]}.base_model.model."
            deltas[module] = wrap(tensors, TOWER + module, prefix, 4, ".base_layer")
    found, plain = weights_of(run(source, tmp_path / "out")), weights_of(converted["llava_internvl14b"])
    for module, delta in deltas.items():
        name = f"{module.replace('qllama.model.', 'qllama.')}.weight"
        torch.testing.assert_close(found[name], plain[name] + 64 * delta)


def test_an_adapter_of_the_llava_code_base_brings_its_projector(converted, tmp_path):
    """Its folder holds the adapter of the decoder, the other trained weights, and the configuration of the whole."""
    source = llava("llava_vit6b", tmp_path)
    module = "model.layers.0.self_attn.q_proj"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copyfile(source / "config.json", adapter / "config.json")
    named = "lmsys/vicuna-7b-v1.5"
    edit_json(adapter / "adapter_config.json", peft_type="LORA", r=2, lora_alpha=6, base_model_name_or_path=named)
    tensors = stored(source)
    delta = wrap(tensors, module, "base_model.model.", 2)
    lora = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
    torch.save(lora, adapter / "adapter_model.bin")
    projector = {f"base_model.model.{name}": x + 1 for name, x in tensors.items() if "mm_projector" in name}
    torch.save(projector, adapter / "non_lora_trainables.bin")
    drop("model.mm_projector.", source)
    (source / "mm_projector.bin").unlink()
    found, plain = weights_of(run(adapter, tmp_path / "out", base=source)), weights_of(converted["llava_vit6b"])
    assert torch.equal(found["mlp1.0.bias"], plain["mlp1.0.bias"] + 1)
    name = f"language_model.{module}.weight"
    torch.testing.assert_close(found[name], plain[name] + 3 * delta)


# ----------------------------------------------------------------------------------------------------- what is refused
def test_everything_that_is_not_supported_is_listed_at_once(tmp_path):
    changes = {
        "mm_projector_type": "resampler",
        "mm_vision_select_feature": "cls_patch",
        "mm_use_im_start_end": True,
        "image_aspect_ratio": "anyres",
        "mm_vision_select_layer": ...,
    }
    with pytest.raises(ValueError, match="cannot be converted") as caught:
        run(llava("llava_vit6b", tmp_path, **changes), tmp_path / "out")
    for key, value in changes.items():
        assert f"`{key}` is {None if value is ... else value!r}, supported: " in str(caught.value)


def test_tensors_that_belong_nowhere_are_listed_under_their_own_names(tmp_path):
    source = llava("llava_vit6b", tmp_path)
    strange = f"{TOWER}encoder.layers.0.attn.strange"
    with as_one_file(source) as tensors:
        tensors.update({strange: torch.zeros(2), "model.extra": torch.zeros(2)})
    with pytest.raises(ValueError, match="2 unknown") as caught:
        run(source, tmp_path / "out")
    assert strange in str(caught.value)
    assert "model.extra" in str(caught.value)


def test_a_tower_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be an InternViT or InternVL-14B checkpoint, got InternVL-Chat"):
        run(GOLDEN / "llava_vit6b", tmp_path / "out", vision_tower=published("chat_llama_v1", tmp_path))


def test_a_configuration_that_describes_no_tower_is_refused(tmp_path):
    edit_json(tmp_path / "preprocessor.json", **PREPROCESSOR)
    with pytest.raises(ValueError, match="describes no vision tower"):
        run(GOLDEN / "llava_vit6b", tmp_path / "out", vision_config=tmp_path / "preprocessor.json")
    with pytest.raises(OSError, match=r"There is no .*--vision-config FILE"):
        run(GOLDEN / "llava_vit6b", tmp_path / "out", vision_config=tmp_path / "nowhere.json")
