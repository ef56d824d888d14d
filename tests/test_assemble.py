"""Models assembled of parts, and parts taken out of models: `conversion assemble` and `--extract`.

- Any tower, QLLaMA and decoder: the result loads, trains, is read again, and gives back the parts that went in.
- What is new is named, and nothing else starts from random values.
- The parts of a model, taken apart and put together, are the model to the bit, with its settings.
- Stages 2 and 3 start from what was assembled.
"""

import json
from pathlib import Path
from shutil import copytree

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
)

from internvl.conversion.__main__ import main
from internvl.conversion.assemble import assemble_model
from internvl.conversion.part_sources import find_part
from internvl.conversion.plan import ConversionOptions, plan_conversion
from internvl.conversion.readers.tensors import TensorReader, Tensors
from internvl.training.__main__ import main as train

from . import tiny
from .fixtures_conversions import ask, assert_same, assert_same_weights, json_of, run, state_of, weights_of
from .fixtures_dialogues import llava
from .fixtures_pairs import png, sample, write_tar
from .fixtures_published import published, published_chat
from .fixtures_text import make_tokenizer


TOWERS = ("rms_norm", "layer_norm", "of_a_chat_model")
QLLAMAS = ("of_internvl_g", "alone")
DECODERS = ("llama", "gpt2", "qwen3_moe")
TURNS = ("<|im_start|>", "<|im_end|>")


def save_decoder(folder: Path, name: str, room: int, **settings) -> None:
    """A decoder with its tokenizer and `room` more rows than that needs."""
    tokenizer = make_tokenizer(special_tokens=TURNS)
    settings = {**settings, "vocab_size": len(tokenizer) + room, "eos_token_id": 2, "pad_token_id": 0}
    model = tiny.randomize(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings)))
    # Files of GPT-2 on the Hub are those of the model without its head.
    (model.transformer if name == "gpt2" else model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """Folders of parts, by name."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.vision_model().save_pretrained(folder / "rms_norm")
    tokenizer = make_tokenizer(special_tokens=())
    size = {**tiny.QLLAMA, "vocab_size": len(tokenizer)}
    model = tiny.internvl_model()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "of_internvl_g")
    tokenizer.save_pretrained(folder / "of_internvl_g")
    tiny.chat_model(connector="queries", qllama_config={**size, "hidden_size": 32}).save_pretrained(folder / "chat")
    run(folder / "chat", folder / "alone", extract="qllama")
    small = {"hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
    save_decoder(folder / "llama", "llama", 5, **small)
    save_decoder(folder / "gpt2", "gpt2", 0, n_embd=24, n_layer=2, n_head=4, tie_word_embeddings=True)
    moe = {key: value for key, value in tiny.DECODERS["qwen3_moe"].items() if key != "model_type"}
    save_decoder(folder / "qwen3_moe", "qwen3_moe", 2, **moe)
    towers = {"layer_norm": published("intern_vit_300m", folder), "of_a_chat_model": published_chat(folder)}
    return {**{path.name: path for path in folder.iterdir()}, **towers}


def assembled(out: Path, **options) -> tuple[Path, str]:
    """A new model, and what was said."""
    lines: list[str] = []
    settings = {"show_progress": False, "report": lines.append, "verify": True, **options}
    return assemble_model(out, **settings), "\n".join(lines)


def loaded(tensors: Tensors) -> dict[str, torch.Tensor]:
    reader = TensorReader()
    return {name: tensor.load(reader).clone() for name, tensor in tensors.items()}


def extracted(folder: Path, part: str) -> dict[str, torch.Tensor]:
    """A part of a model as `--extract` would write it."""
    plan = plan_conversion(folder, ConversionOptions(extract=part))
    return loaded({**plan.written, **plan.beside})


def weights_of_part(folder: Path, name: str) -> dict[str, torch.Tensor]:
    found = find_part(folder, name).part
    return loaded({**found.tensors, **found.beside})


def train_one_step(folder: Path) -> None:
    """A step of training, in which all that is new gets a gradient."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).train()
    inputs = ask(AutoProcessor.from_pretrained(folder))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    new = set(json_of(folder, "conversion.json")["new"])
    assert {name for name in new if name.startswith("mlp")} <= changed
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


# ---------------------------------------------------------------------------------------------------------- assemblies
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("qllama", QLLAMAS)
@pytest.mark.parametrize("tower", TOWERS)
def test_every_tower_qllama_and_decoder_go_together(tower, qllama, decoder, places, tmp_path):
    connector = "queries" if (TOWERS.index(tower) + DECODERS.index(decoder)) % 2 else "queries_and_patches"
    parts = {"vision": places[tower], "qllama": places[qllama], "decoder": places[decoder]}
    sizes = {"max_tiles": 1, "downsample_ratio": 1.0 if tower == "layer_norm" else 0.5}  # 5 patches a side, or 4
    out, said = assembled(tmp_path / "out", **parts, connector=connector, **sizes, verify=False)
    train_one_step(out)
    # Read again, whatever it is: the same tensors.
    assert_same(loaded(plan_conversion(out).written), weights_of(out))
    new = json_of(out, "conversion.json")["new"]
    for name in ("vision", "decoder"):
        found, wanted = extracted(out, name), weights_of_part(parts[name], name)
        rows = {key: tensor.shape[0] for key, tensor in wanted.items() if tensor.ndim}
        assert_same({key: tensor[: rows[key]] for key, tensor in found.items()}, wanted)
    found, wanted = extracted(out, "qllama"), weights_of_part(places[qllama], "qllama")
    own = {key for key in found if f"qllama.{key.removeprefix('model.')}" not in new}
    assert_same({key: found[key] for key in own}, {key: wanted[key] for key in own})
    # Keys and values of a tower of another width, and the projectors; nothing else is new.
    is_other = tower != "rms_norm"
    assert any("cross_attn.k_proj" in key for key in new) is is_other
    assert "it read another tower" in said or not is_other
    kinds = ("mlp1.", "mlp2.") if connector == "queries_and_patches" else ("mlp2.",)
    assert all(key.startswith(kinds) or "cross_attn" in key for key in new)
    assert not [key for key in new if key.endswith(("q_proj.weight", "o_proj.weight", "norm1.weight"))]
    # The 3 image tokens find room in the vocabulary, or get rows.
    size = json_of(places[decoder])["vocab_size"]
    assert json_of(out)["text_config"]["vocab_size"] - size == {"llama": 0, "gpt2": 3, "qwen3_moe": 1}[decoder]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_tower_and_a_decoder_alone_are_the_simple_configuration_and_go_to_the_published_layout(
    decoder, places, tmp_path
):
    parts = {"vision": places["rms_norm"], "decoder": places[decoder]}
    out, _ = assembled(tmp_path / "out", **parts, dtype="bfloat16", max_tiles=4)
    assert {tensor.dtype for tensor in weights_of(out).values()} == {torch.bfloat16}
    config = json_of(out)
    assert (config["connector"], config["template"], config["max_dynamic_patch"]) == ("patches", "internvl2_5", 4)
    train_one_step(out)
    back = run(run(out, tmp_path / "published", to="published"), tmp_path / "back")
    assert_same_weights(back, out)


def test_new_rows_are_the_mean_of_the_others_and_the_rest_is_untouched(places, tmp_path):
    out, said = assembled(tmp_path / "out", vision=places["rms_norm"], decoder=places["gpt2"])
    rows = weights_of(out)["language_model.transformer.wte.weight"]
    old = weights_of(places["gpt2"])["wte.weight"]
    assert torch.equal(rows[: len(old)], old)
    torch.testing.assert_close(rows[len(old) :], old.mean(dim=0, keepdim=True).expand(3, -1))
    assert "language_model.transformer.wte.weight has 3 more rows" in said
    assert json_of(out)["image_token_id"] == len(old) + 2


def test_the_seed_decides_what_is_new_and_nothing_else(places, tmp_path):
    options = {"vision": places["rms_norm"], "decoder": places["llama"]}
    folders = [assembled(tmp_path / str(seed), **options, seed=seed)[0] for seed in (0, 1)]
    first, other = map(weights_of, folders)
    again = weights_of(assembled(tmp_path / "again", **options)[0])
    assert_same(again, first)
    different = {name for name in first if not torch.equal(first[name], other[name])}
    assert different == {"mlp1.1.weight", "mlp1.3.weight"}  # norms and biases start at 1 and 0
    assert 0.015 < first["mlp1.1.weight"].std() < 0.025  # `initializer_range`


# --------------------------------------------------------------------------------------------------------------- parts
def test_a_chat_model_taken_apart_and_put_together_is_the_same(places, tmp_path):
    parts = {"vision": places["layer_norm"], "qllama": places["of_internvl_g"], "decoder": places["gpt2"]}
    out, _ = assembled(tmp_path / "out", **parts, downsample_ratio=1.0, select_layer=-2)
    folders = {name: run(out, tmp_path / name, extract=name) for name in (*parts, "projector")}
    again, said = assembled(tmp_path / "again", **folders)
    assert_same_weights(again, out)
    assert json_of(again) == json_of(out)
    assert "New" not in said
    assert "new" not in json_of(again, "conversion.json")
    same = ("tokenizer.json", "chat_template.jinja", "generation_config.json", "preprocessor_config.json")
    before, after = state_of(out), state_of(again)
    assert {name: before[name] for name in same} == {name: after[name] for name in same}


def test_an_internvl_g_taken_apart_and_put_together_is_the_same(places, tmp_path):
    source = places["of_internvl_g"]
    vision = run(source, tmp_path / "vision", extract="vision", verify=True)
    qllama = run(source, tmp_path / "qllama", extract="qllama", verify=True)
    again, said = assembled(tmp_path / "again", vision=vision, qllama=qllama)
    assert_same_weights(again, source)
    assert "New" not in said
    model, wanted = (AutoModel.from_pretrained(folder).eval() for folder in (again, source))
    inputs = AutoProcessor.from_pretrained(again)(text=["a bus", "two cats"], return_tensors="pt")
    inputs["pixel_values"] = tiny.pixels(2)
    for mode in ("InternVL-C", "InternVL-G"):
        with torch.no_grad():
            assert torch.equal(*(x(**inputs, mode=mode).logits_per_image for x in (model, wanted)))


@pytest.mark.parametrize("case", ["chat_internlm2_v2", "chat_qwen2_v2"])
def test_a_decoder_alone_loads_as_one_and_computes_what_it_did(case, tmp_path):
    source = published(case, tmp_path)
    whole = run(source, tmp_path / "whole", image_token_id=90)
    alone = run(source, tmp_path / "alone", extract="decoder", verify=True)
    model = AutoModelForImageTextToText.from_pretrained(whole).eval()
    decoder = AutoModelForCausalLM.from_pretrained(alone, trust_remote_code=True).eval()
    ids = tiny.text_ids()
    with torch.no_grad():
        assert torch.equal(decoder(ids).logits, model(input_ids=ids).logits)


def test_a_tower_alone_is_any_internvit_and_its_images_keep_their_colours(places, tmp_path):
    alone = run(places["of_a_chat_model"], tmp_path / "alone", extract="vision", verify=True)
    wanted = plan_conversion(places["of_a_chat_model"]).written
    assert_same(
        weights_of(alone),
        loaded({k.removeprefix("vision_model."): t for k, t in wanted.items() if k.startswith("vision_model.")}),
    )
    assert AutoProcessor.from_pretrained(alone).resize_mode == "squash"
    published_at_once = run(places["of_a_chat_model"], tmp_path / "published", extract="vision", to="published")
    assert_same_weights(published_at_once, alone)
    assert "configuration_intern_vit.InternVisionConfig" in json_of(published_at_once)["auto_map"].values()


# -------------------------------------------------------------------------------------------------------------- stages
@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_tar(folder / "pairs.tar", [sample(number) for number in range(4)])
    (folder / "a.png").write_bytes(png(1))
    (folder / "rows.jsonl").write_text(json.dumps(llava("<image>\nwhat?", "a bus", image="a.png")) + "\n")
    return folder


def save_llama(folder: Path) -> None:
    tokenizer = make_tokenizer(special_tokens=(), add_bos=False)
    settings = {**tiny.QLLAMA, "vocab_size": len(tokenizer), "hidden_size": 32, "eos_token_id": 2}
    config = LlamaConfig(**{key: value for key, value in settings.items() if key in LlamaConfig().to_dict()})
    tiny.randomize(LlamaForCausalLM(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_a_tower_and_a_llama_are_an_internvl_c_that_stage_2_starts_from(places, data, tmp_path, capsys):
    save_llama(tmp_path / "llama")
    vision = tiny.vision_model(image_size=56)
    vision.save_pretrained(tmp_path / "vision")
    out, said = assembled(tmp_path / "c", vision=tmp_path / "vision", qllama=tmp_path / "llama")
    assert json_of(out)["qllama_config"]["num_query_token"] == 0
    assert "qllama.lm_head.weight (InternVL-C writes no text)" in said
    words = ["stage2", "--model", out, "--llama", tmp_path / "llama", "--data", data / "pairs.tar"]
    words += ["--steps", 1, "--batch-size", 2, "--output", tmp_path / "g"]
    assert train([str(word) for word in words]) == 0, capsys.readouterr().err
    assert AutoConfig.from_pretrained(tmp_path / "g").has_queries


def test_a_llama_becomes_a_qllama_with_new_queries(tmp_path):
    save_llama(tmp_path / "llama")
    tiny.vision_model().save_pretrained(tmp_path / "vision")
    parts = {"vision": tmp_path / "vision", "qllama": tmp_path / "llama"}
    out, said = assembled(tmp_path / "g", **parts, num_query_token=4)
    model = AutoModel.from_pretrained(out)
    assert model.query_tokens.shape == (1, 4, 32)
    assert not model.qllama.model.layers[0].cross_attn.o_proj.weight.any()  # it starts as a LLaMA
    torch.testing.assert_close(model.logit_scale.exp().item(), 1 / 0.07)
    assert "New, from random values: " in said
    assert "qllama.model.layers.*.cross_attn.k_proj.weight" in said
    new = {name.partition(".")[0] for name in json_of(out, "conversion.json")["new"]}
    heads = {"query_tokens", "clip_projector", "clip_projector2", "itm_head", "text_projection", "logit_scale"}
    assert new == {*heads, "qllama"}


def test_stage_3_starts_from_an_assembled_chat_model(places, data, tmp_path, capsys):
    parts = {"vision": places["rms_norm"], "qllama": places["of_internvl_g"], "decoder": places["llama"]}
    out, _ = assembled(tmp_path / "chat", **parts)
    words = ["stage3", "--model", out, "--data", data / "rows.jsonl", "--output", tmp_path / "trained"]
    words += ["--images", data, "--connector", "queries_and_patches", "--steps", 1, "--batch-size", 1]
    assert train([str(word) for word in words]) == 0, capsys.readouterr().err
    before, after = weights_of(out), weights_of(tmp_path / "trained")
    assert before.keys() == after.keys()
    assert not torch.equal(before["mlp2.1.weight"], after["mlp2.1.weight"])


# ------------------------------------------------------------------------------------------------------------ the door
def command(*words: object) -> int:
    return main([str(word) for word in words])


def test_the_command_assembles_extracts_and_says_so(places, tmp_path, capsys):
    words = ["assemble", "--vision", places["rms_norm"], "--decoder", places["llama"], "--connector", "patches"]
    assert command(*words, "--dry-run") == 0
    assert not list(tmp_path.iterdir())
    assert "New, from random values: mlp1.0.weight" in capsys.readouterr().out
    assert command(*words, "--verify", tmp_path / "out") == 0
    assert "Verified: " in capsys.readouterr().out
    assert command(tmp_path / "out", tmp_path / "projector", "--extract", "projector") == 0
    assert weights_of(tmp_path / "projector").keys() == {
        f"mlp1.{n}.{k}" for n in (0, 1, 3) for k in ("weight", "bias")
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "It has to be trained before it is of use." in card
    assert "- decoder: a folder, llama alone, licence unknown" in card


def test_a_folder_called_assemble_is_a_source_by_its_path(places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assemble").symlink_to(places["rms_norm"])
    assert command("./assemble", "--dry-run") == 0
    assert "Found InternViT" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command("assemble", "--dry-run")


REFUSED = {
    "a tower alone": ({}, "name a `decoder`, a `qllama`, or both"),
    "no queries": ({"decoder": "llama", "connector": "queries"}, "needs queries: name a `qllama`"),
    "queries unread": (
        {"decoder": "llama", "connector": "patches", "qllama": "of_internvl_g"},
        "`qllama` has no effect",
    ),
    "no decoder": ({"qllama": "of_internvl_g", "connector": "queries"}, "`connector` has no effect"),
    "queries twice": ({"qllama": "of_internvl_g", "num_query_token": 4}, "this QLLaMA has 5 queries"),
    "a QLLaMA without text": ({"qllama": "alone"}, "1 missing: qllama.model.embed_tokens.weight"),
    "no such part": ({"qllama": "rms_norm"}, "There is no part `qllama` in InternViT"),
    "another kind of decoder": ({"decoder": "rms_norm"}, "There is no part `decoder` in InternViT"),
    "a projector that does not fit": (
        {"decoder": "gpt2", "projector": "of_a_chat_model"},
        "These parts do not fit together .* of another shape than the model needs",
    ),
    "a template that is none": ({"decoder": "llama", "template": "none"}, "none"),
    "a ratio": ({"decoder": "llama", "downsample_ratio": 0.3}, "`downsample_ratio`"),
    "tiles": ({"decoder": "llama", "max_tiles": 0}, "`max_tiles` must be at least 1"),
    "nothing there": ({"decoder": "nowhere/at/all"}, "There is no `nowhere/at/all`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_a_line_before_anything_is_written(case, places, tmp_path):
    options, message = REFUSED[case]
    named = {key: places.get(value, value) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises((ValueError, OSError), match=message):
        assembled(tmp_path / "out", vision=places["rms_norm"], **named)
    assert not list(tmp_path.iterdir())


def changed_copy(folder: Path, out: Path, **changes) -> Path:
    """A copy whose config.json has other values; None takes one out."""
    copytree(folder, out)
    known = {**json_of(out), **changes}
    (out / "config.json").write_text(json.dumps({key: value for key, value in known.items() if value is not None}))
    return out


def test_a_damaged_config_of_a_part_is_refused_in_a_line_before_a_model_is_built(places, tmp_path, capsys):
    deep = changed_copy(places["llama"], tmp_path / "deep", num_hidden_layers=2**40)
    words = ("assemble", "--vision", places["rms_norm"], "--decoder", deep, "--dry-run")
    assert command(*words) == 2
    assert "says `num_hidden_layers` 1,099,511,627,776, but the weights are" in capsys.readouterr().err
    silent = changed_copy(places["alone"], tmp_path / "silent", num_query_token=None)
    out = tmp_path / "out"
    words = ("assemble", out, "--vision", places["rms_norm"], "--decoder", places["llama"], "--qllama", silent)
    assert command(*words, "--num-query-token", 3) == 2
    error = capsys.readouterr().err
    assert "error: " in error
    assert "Traceback" not in error
    assert not out.exists()


def test_an_unset_variable_is_no_tokenizer(places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(places["llama"])  # an empty name would mean this folder
    with pytest.raises(SystemExit):
        command("assemble", tmp_path / "out", "--vision", places["rms_norm"], "--decoder", "llama", "--tokenizer", "")
    assert "argument --tokenizer: must be a name, got ''" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "source", "options", "message"),
    [
        ("decoder", "of_internvl_g", {}, "There is no part `decoder` in InternVL-14B"),
        ("qllama", "of_a_chat_model", {}, "There is no part `qllama` in InternVL-Chat"),
        ("decoder", "of_a_chat_model", {"to": "native"}, "`to` has no effect"),
        ("projector", "of_a_chat_model", {"verify": True}, "no class loads projector alone"),
        ("head", "of_a_chat_model", {}, "`extract` must be one of vision, projector"),
    ],
)
def test_parts_that_are_not_there_are_refused(part, source, options, message, places, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(places[source], tmp_path / "out", extract=part, **options)
    assert not (tmp_path / "out").exists()


def test_parts_that_name_no_licence_of_theirs_make_no_licence_of_the_whole(places, tmp_path):
    def card_with(licences: dict[str, str], out: str) -> str:
        for name, licence in licences.items():
            (places[name] / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        folder, _ = assembled(tmp_path / out, vision=places["rms_norm"], decoder=places["llama"])
        for name in licences:
            (places[name] / "README.md").unlink()
        return (folder / "README.md").read_text()

    assert "license: mit\n" in card_with({"rms_norm": "mit", "llama": "mit"}, "same")
    mixed = card_with({"rms_norm": "mit", "llama": "llama2"}, "mixed")
    assert "license: other\n" in mixed
    assert "licence llama2" in mixed
    assert "license: other\n" in card_with({"rms_norm": "mit"}, "unnamed")
