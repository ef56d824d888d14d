"""A model that is spread over devices or processes computes what it computes on one device.

Every class is split once by a map made from its `_no_split_modules`; some by the other names that `device_map` takes,
by dictionaries at every boundary a user may draw, and by offloading to memory and to disk. Without an accelerator
"cpu" and "disk" are the two devices. Tensor parallelism runs on two processes.
"""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoTokenizer

from internvl.configuration_internvl import InternVLConfig
from internvl.modeling_internvl import InternVLModel
from internvl.modeling_internvl_chat import InternVLChatForConditionalGeneration

from . import tiny, two_processes


def chat_case(connector: str):
    return lambda: tiny.chat_model(connector=connector), tiny.chat_inputs


CASES = {
    "vision": tiny.MODELS["InternVisionModel"],
    # As the 6B, whose 25 heads two processes cannot share.
    "vision-odd-heads": (
        lambda: tiny.vision_model(hidden_size=36, num_attention_heads=3, norm_type="layer_norm", qkv_bias=True),
        tiny.MODELS["InternVisionModel"][1],
    ),
    "C-alone": tiny.MODELS["InternVLModel-C-alone"],
    "14B-C": tiny.MODELS["InternVLModel-C"],
    "14B-G": tiny.MODELS["InternVLModel-G"],
    "chat-simple": chat_case("patches"),
    "chat-internlm2": tiny.MODELS["chat-internlm2"],
    "chat-experts": tiny.MODELS["chat-qwen3-moe"],
    "chat-queries": chat_case("queries"),
    "chat-full": chat_case("queries_and_patches"),
}


def qllama_case(**heads):
    config = InternVLConfig(
        vision_config=tiny.VISION, qllama_config={**tiny.QLLAMA, **heads}, clip_embed_dim=12, attn_pool_num_heads=4
    )
    return lambda: tiny.randomize(InternVLModel(config)), tiny.MODELS["InternVLModel-G"][1]


def decoder_case(decoder: str, **heads):
    return lambda: tiny.chat_model(decoder, text_config={**tiny.DECODERS[decoder], **heads}), tiny.chat_inputs


# Heads that two processes cannot share, of QLLaMA or of the decoder; or key/value heads alone.
ODD_HEADS = {
    "14B-3-heads": qllama_case(num_attention_heads=3),
    "14B-1-kv-head": qllama_case(num_key_value_heads=1),
    "full-3-heads": (
        lambda: tiny.chat_model(
            connector="queries_and_patches", qllama_config={**tiny.QLLAMA, "num_attention_heads": 3}
        ),
        tiny.chat_inputs,
    ),
    "llama-3-heads": decoder_case("llama", hidden_size=60, num_attention_heads=3, num_key_value_heads=3),
    "qwen3-3-kv-heads": decoder_case("qwen3", hidden_size=60, num_attention_heads=6, num_key_value_heads=3),
    "internlm2-1-kv-head": decoder_case("internlm2", num_key_value_heads=1),
    "experts-1-kv-head": decoder_case("qwen3_moe", num_key_value_heads=1),
}
SHARED_OUT = CASES | ODD_HEADS
each_case = pytest.mark.parametrize("name", list(CASES))


def build(name: str):
    make, make_inputs = (SHARED_OUT | tiny.MODELS)[name]
    model = make()
    return model, make_inputs(model)


@torch.no_grad()
def run(model, inputs) -> torch.Tensor:
    output = tiny.main_output(model(**inputs))
    mask = inputs.get("attention_mask")
    return output if mask is None or output.shape[:2] != mask.shape else output[mask.bool()]


def caption_inputs(name: str, model, inputs: dict) -> dict | None:
    """Arguments of `generate`, or None where a model generates no text."""
    if model.config.model_type == "internvl_chat_model":
        return inputs
    is_caption_model = name.startswith("14B") and name != "14B-C"
    return {"pixel_values": inputs["pixel_values"]} if is_caption_model else None


def num_bytes(model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def split_off(model, part: str, folder):
    """The model, loaded again with one part on disk."""
    model.save_pretrained(folder)
    children = [name for name, module in model.named_children() if any(True for _ in module.parameters())]
    parameters = [name for name, _ in model.named_parameters(recurse=False)]
    device_map = {**dict.fromkeys(children + parameters, "cpu"), part: "disk"}
    return type(model).from_pretrained(folder, device_map=device_map, offload_folder=folder / "offload").eval()


def assert_same(model, inputs, expected: torch.Tensor) -> None:
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "device_map"),
    [*((name, "auto") for name in tiny.MODELS), ("chat-full", "balanced"), ("14B-G", "sequential")],
)
def test_a_named_device_map_changes_nothing(name, device_map, tmp_path):
    """Memory for two thirds of the model; the rest is read from disk."""
    model, inputs = build(name)
    expected = run(model, inputs)
    model.save_pretrained(tmp_path)
    split = type(model).from_pretrained(
        tmp_path,
        device_map=device_map,
        max_memory={"cpu": num_bytes(model) * 2 // 3},
        offload_folder=tmp_path / "offload",
    )
    assert set(split.hf_device_map.values()) == {"cpu", "disk"}
    assert any(p.is_meta for p in split.parameters())
    assert_same(split.eval(), inputs, expected)


@each_case
def test_any_part_alone_on_disk_changes_nothing(name, tmp_path):
    """A dictionary by hand, one part after the other on another device than all the rest."""
    model, inputs = build(name)
    expected = run(model, inputs)
    for part, module in model.named_children():
        if any(True for _ in module.named_parameters()):
            split = split_off(model, part, tmp_path)
            on_disk = {parameter.split(".")[0] for parameter, tensor in split.named_parameters() if tensor.is_meta}
            assert on_disk == {part}
            assert_same(split, inputs, expected)


@each_case
@pytest.mark.parametrize("to_disk", [False, True])
def test_offloading_all_of_it_changes_nothing(name, to_disk, tmp_path):
    """Every module is fetched for its own forward only: what reads a parameter of another module fails here."""
    model, inputs = build(name)
    expected = run(model, inputs)
    offload(model, tmp_path if to_disk else None)
    assert_same(model, inputs, expected)


def offload(model, folder=None) -> None:
    """Puts every parameter into memory or a folder, to be fetched when it is needed."""
    if folder is None:
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, folder, execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())


OTHER_CALLS = {
    "image features": lambda model, pixels, ids: model.get_image_features(pixels, mode="InternVL-G"),
    "query features": lambda model, pixels, ids: model.get_query_features(pixels),
    "text features": lambda model, pixels, ids: model.get_text_features(ids),
    "published image features": lambda model, pixels, ids: model.encode_image(pixels, mode="InternVL-G"),
    "published text features": lambda model, pixels, ids: model.encode_text(ids),
    "matching": lambda model, pixels, ids: model.get_matching_logits(pixels, ids),
    "a caption": lambda model, pixels, ids: model.generate(pixels, max_new_tokens=3, min_new_tokens=3),
}


@torch.no_grad()
@pytest.mark.parametrize("call", OTHER_CALLS)
@pytest.mark.parametrize("to_disk", [False, True])
def test_offloading_all_of_it_changes_no_other_call(call, to_disk, tmp_path):
    """accelerate fetches what a model holds directly, such as queries, for its `forward` alone."""
    model, pixels, ids = tiny.internvl_model(), tiny.pixels(2), tiny.summary_ids(2)
    expected = OTHER_CALLS[call](model, pixels, ids)
    offload(model, tmp_path if to_disk else None)
    assert torch.equal(OTHER_CALLS[call](model, pixels, ids), expected)
    assert all(parameter.is_meta for parameter in model.parameters())


@torch.no_grad()
def test_a_chat_model_with_queries_gives_features_and_answers_when_all_of_it_is_offloaded():
    model, inputs = build("chat-full")
    length = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}
    features, answer = model.extract_feature(inputs["pixel_values"]), model.generate(**inputs, **length)
    offload(model)
    assert torch.equal(model.extract_feature(inputs["pixel_values"]), features)
    assert torch.equal(model.generate(**inputs, **length), answer)


CHAT_CALLS = {
    "of an image": lambda model, tokenizer, pixels: model.chat(tokenizer, pixels, "What is it?", dict(TWO_WORDS)),
    "of text alone": lambda model, tokenizer, pixels: model.chat(tokenizer, None, "What is it?", dict(TWO_WORDS)),
    "of a batch": lambda model, tokenizer, pixels: model.batch_chat(
        tokenizer, torch.cat([pixels, pixels]), ["What is it?", "What colour has it?"], dict(TWO_WORDS), [1, 1]
    ),
}
TWO_WORDS = {"do_sample": False, "max_new_tokens": 2, "min_new_tokens": 2}


@torch.no_grad()
@pytest.mark.parametrize("call", CHAT_CALLS)
@pytest.mark.parametrize("to_disk", [False, True])
def test_a_chat_with_a_model_that_is_offloaded_gives_the_same_answer(call, to_disk, root, tmp_path):
    model = InternVLChatForConditionalGeneration.from_pretrained(root, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(root)
    side = model.config.vision_config.image_size
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected = CHAT_CALLS[call](model, tokenizer, pixels)
    offload(model, tmp_path if to_disk else None)
    assert model.device == torch.device("cpu")  # where it computes, not where its weights are
    assert CHAT_CALLS[call](model, tokenizer, pixels) == expected


def test_a_model_without_weights_says_so():
    assert tiny.chat_model().to("meta").device.type == "meta"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("14B-G", "vision_model"),
        ("14B-G", "qllama"),
        ("chat-simple", "vision_model"),
        ("chat-simple", "language_model"),
        ("chat-experts", "vision_model"),
        ("chat-full", "vision_model"),
        ("chat-full", "qllama"),
        ("chat-full", "language_model"),
    ],
)
def test_a_model_with_a_part_on_disk_generates_the_same_tokens(name, part, tmp_path):
    """With the vision tower offloaded, the first weights lie on "meta": nothing new may be made there."""
    model, inputs = build(name)
    arguments = {**caption_inputs(name, model, inputs), "do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    expected = model.generate(**arguments)
    split = split_off(model, part, tmp_path)
    assert torch.equal(split.generate(**arguments), expected)


@pytest.fixture(scope="module")
def tensor_parallel_runs(tmp_path_factory):
    """Every case in one pair of processes: starting them takes longer than running them."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    expected = {}
    for name in SHARED_OUT:
        model, inputs = build(name)
        arguments = caption_inputs(name, model, inputs)
        if "input_ids" in inputs:
            model.resize_token_embeddings(100)  # divides evenly among the processes
        (folder / name).mkdir()
        model.save_pretrained(folder / name / "model")
        job = {"class": type(model).__name__, "inputs": inputs, "generate": arguments}
        torch.save(job, folder / name / "inputs.pt")
        with torch.no_grad():
            expected[name] = {"output": tiny.main_output(model(**inputs))}
        if arguments is not None:
            expected[name]["tokens"] = model.generate(**arguments, do_sample=False, max_new_tokens=4, min_new_tokens=4)
        expected[name]["sizes"] = {parameter: tensor.numel() for parameter, tensor in model.named_parameters()}
    return expected, two_processes.run("tensor_parallel", folder)


@pytest.mark.parametrize("name", SHARED_OUT)
def test_tensor_parallelism_changes_nothing(name, tensor_parallel_runs):
    expected, ranks = tensor_parallel_runs
    for rank in ranks:
        torch.testing.assert_close(rank[name]["output"], expected[name]["output"], atol=2e-5, rtol=2e-5)
        if "tokens" in expected[name]:
            assert torch.equal(rank[name]["tokens"], expected[name]["tokens"])


@pytest.mark.parametrize("name", SHARED_OUT)
def test_each_process_holds_half_of_every_large_matrix(name, tensor_parallel_runs):
    """Of the vision tower, QLLaMA with its cross-attention, and the decoder."""
    expected, ranks = tensor_parallel_runs
    sharded = "qkv proj fc1 fc2 q_proj k_proj v_proj o_proj gate_proj up_proj down_proj wqkv wo w1 w2 w3".split()
    suffixes = tuple(f".{layer}.weight" for layer in sharded)
    sizes = {key: n for key, n in expected[name]["sizes"].items() if "layers." in key and key.endswith(suffixes)}
    assert sizes
    for parameter, size in sizes.items():
        assert [rank[name]["sizes"][parameter] for rank in ranks] == [size // 2, size // 2], parameter
