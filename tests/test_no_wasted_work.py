"""The chat model does no needless work, and lets the host wait for the device once, before a forward is queued.

What a forward reads on the host is shown in two ways. On the meta device tensors have no values: whatever reads one
fails, so a forward that runs there queues its work without waiting, and there the placeholders are checked as in
compiled code. On the CPU, where waiting costs nothing, each read is counted. (Transformers reads a padding mask on the
host to choose a kernel; these forwards have none.)
"""

import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, DynamicCache, StaticCache

from internvl import modeling_internvl_chat
from internvl.configuration_internvl import InternViTConfig
from internvl.image_placement_internvl import PLACEHOLDERS_HINT, TILES_HINT
from internvl.modeling_internvit import InternVisionModel
from internvl.modeling_internvl_chat import InternVLChatForConditionalGeneration
from internvl.planning.counting import OperationCounter

from . import tiny


GREEDY = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
CONNECTORS = ("patches", "queries", "queries_and_patches")
READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")
COPIES = ("clone", "contiguous", "_to_copy", "copy_")


class Operations(TorchDispatchMode):
    """Counts operations by name, those behind a boolean index included."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    def among(self, names) -> dict[str, int]:
        return {name: count for name, count in self.counts.items() if name in names}


def unpadded(model) -> dict[str, torch.Tensor]:
    """Two rows of one length, with one and two tiles."""
    inputs = tiny.chat_inputs(model, [[1], [2]], side="right")
    return {"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"]}


def sizes_seen(module) -> list[tuple[int, ...]]:
    """The shapes that a module is given, as it is given them."""
    seen = []
    module.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    return seen


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("decoder", ["llama", "qwen2", "internlm2"])
@torch.no_grad()
def test_prefill_and_decoding_read_no_value_on_the_host(decoder, connector):
    model = tiny.chat_model(decoder, connector).to("meta")
    with pytest.raises(RuntimeError):
        bool(torch.zeros((), device="meta"))  # else the rest of this shows nothing
    inputs = {name: tensor.to("meta") for name, tensor in unpadded(model).items()}
    cache = DynamicCache(config=model.config.text_config)
    num_patches = torch.tensor([1, 2], device="meta")
    assert model(**inputs, num_patches=num_patches, past_key_values=cache, logits_to_keep=1).logits.is_meta
    assert model(inputs["input_ids"][:, :1], past_key_values=cache).logits.shape == (2, 1, 99)
    assert model(inputs["input_ids"][:, :3], past_key_values=cache).logits.shape == (2, 3, 99)  # text of a later turn


@torch.no_grad()
def test_other_ways_to_give_images_read_no_value_on_the_host():
    model = tiny.chat_model().to("meta")
    inputs = {name: tensor.to("meta") for name, tensor in unpadded(model).items()}
    ids, images = inputs["input_ids"], inputs["pixel_values"]
    assert model(inputs_embeds=model.get_input_embeddings()(ids), pixel_values=images).logits.is_meta
    assert model(ids, image_embeds=torch.empty(2, 8, 40, device="meta")).logits.is_meta


def test_a_backward_reads_no_value_on_the_host():
    model = tiny.chat_model(connector="queries_and_patches").to("meta").train()
    inputs = {name: tensor.to("meta") for name, tensor in unpadded(model).items()}
    model(**inputs).logits.mean().backward()
    assert all(p.grad is not None for p in model.mlp1.parameters())


@torch.no_grad()
def test_on_the_cpu_one_value_is_read_in_the_prefill_and_none_after():
    model = tiny.chat_model("internlm2")
    cache = DynamicCache(config=model.config.text_config)
    with Operations() as prefill:
        model(**unpadded(model), past_key_values=cache, logits_to_keep=1)
    assert prefill.among(READS) == {"_local_scalar_dense": 1}  # whether the placeholders are as many as the features
    with Operations() as step:
        model(torch.tensor([[5], [6]]), past_key_values=cache)
    assert step.counts["mm"] > 0
    assert step.among(READS) == {}


@pytest.mark.parametrize("connector", CONNECTORS)
@torch.no_grad()
def test_placeholders_are_counted_on_the_host_before_a_tower_runs(connector, monkeypatch):
    """So a mismatch raises a `ValueError`, leaves a GPU's context alone, and waits only for earlier work."""
    model, order = tiny.chat_model(connector=connector), []
    read = modeling_internvl_chat.on_host
    monkeypatch.setattr(modeling_internvl_chat, "on_host", lambda number: order.append("read") or read(number))
    for part in (model.vision_model, model.get_decoder()):
        part.register_forward_pre_hook(lambda module, _: order.append(type(module).__name__))
    inputs = tiny.chat_inputs(model)
    model(**inputs)
    assert order == ["read", "InternVisionModel", "LlamaModel"]
    order.clear()
    with pytest.raises(ValueError, match="image placeholders but"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][1:]})
    assert order == ["read", "InternVisionModel"]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert read(torch.tensor(3)).ndim == 0
    monkeypatch.undo()
    assert isinstance(read(torch.tensor(3)), int)


def test_compiled_code_prints_messages_that_fit_into_its_assertion():
    for hint in (PLACEHOLDERS_HINT, TILES_HINT):
        assert len(hint.encode()) < 256
        with pytest.raises(RuntimeError, match=hint[:40]):
            torch._assert_async(torch.tensor(False), hint)


@torch.no_grad()
def test_only_the_pixel_shuffle_and_the_rotary_angles_copy():
    model = tiny.chat_model("internlm2")
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    model(**unpadded(model), past_key_values=cache)
    with Operations() as tiles:
        model.extract_feature(tiny.pixels(2))
    assert tiles.among(COPIES) == {"clone": 1}
    mask = torch.zeros(2, 1, 1, 64)
    with Operations() as step:
        model(torch.tensor([[5], [6]]), past_key_values=cache, attention_mask=mask, position_ids=torch.tensor([[40]]))
    assert step.counts["mm"] > 0
    assert step.among(COPIES) == {"_to_copy": 1}  # the position as a float


@torch.no_grad()
def test_no_hidden_state_is_kept_unless_asked_for():
    model = tiny.chat_model(connector="queries_and_patches")
    alive = []

    def watch(_, args, output) -> None:
        # What this block was given may live on, what the blocks before it were given may not.
        assert [number for number, state in enumerate(alive[:-1]) if state() is not None] == []
        alive.append(weakref.ref(output))

    for blocks in (model.vision_model.encoder.layers, model.language_model.model.layers):
        for block in blocks:
            block.register_forward_hook(watch)
    inputs = tiny.chat_inputs(model)
    outputs = model(**inputs)
    assert len(alive) == 5
    assert outputs.hidden_states is None
    assert outputs.attentions is None
    assert len(model.eval()(**inputs, output_hidden_states=True).hidden_states) == 3


def test_generation_computes_the_logits_of_one_position_at_a_time():
    model = tiny.chat_model()
    seen = sizes_seen(model.get_output_embeddings())
    model.generate(**tiny.chat_inputs(model), **GREEDY)
    assert seen == [(3, 1, 40)] * 4


def test_no_tile_of_five_turns_is_encoded_twice():
    model = tiny.chat_model("qwen3")
    tiles = [[2], [], [3], [], [1, 1]]
    rows, images = tiny.chat_rows(model, tiles), tiny.pixels(7)
    encoded, expected = sizes_seen(model.vision_model), []
    cache, dialogue, given = DynamicCache(config=model.config.text_config), torch.empty(0, dtype=torch.long), 0
    for row, counts in zip(rows, tiles, strict=True):
        dialogue, given = torch.cat([dialogue, row]), given + sum(counts)
        expected += [(sum(counts), 3, 56, 56)] if counts else []
        turn = model.generate(
            dialogue[None],
            attention_mask=torch.ones(1, len(dialogue), dtype=torch.long),
            pixel_values=images[:given],
            past_key_values=cache,
            **GREEDY,
        )
        assert encoded == expected
        last, dialogue = dialogue, turn[0]
    afresh = model.generate(
        last[None], attention_mask=torch.ones(1, len(last), dtype=torch.long), pixel_values=images, **GREEDY
    )
    assert torch.equal(afresh[0], dialogue)


def training_inputs(model) -> dict[str, torch.Tensor]:
    inputs = tiny.chat_inputs(model, side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[labels == tiny.IMAGE_TOKEN_ID] = -100
    labels[:, :3] = -100
    return {**inputs, "labels": labels}


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("decoder", "extra"),
    [
        ("internlm2", {}),
        ("internlm2", {"num_items_in_batch": 50}),
        ("qwen2", {"loss_weight": True}),
        ("qwen3_moe", {"output_router_logits": True}),
    ],
)
def test_a_training_step_computes_logits_for_label_positions_alone(decoder, extra):
    model = tiny.chat_model(decoder, mask_image_token_logit=True).train()
    model.skips_unlabelled_logits = True
    inputs = training_inputs(model)
    if "loss_weight" in extra:
        extra = {"loss_weight": torch.rand(inputs["labels"].shape, generator=torch.Generator().manual_seed(0))}
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, output: seen.append(tuple(output.shape)))
    outputs = model(**inputs, **extra)
    count = int((inputs["labels"][:, 1:] != -100).sum())
    assert 0 < count < inputs["labels"].numel() / 2
    assert seen == [(count, 99)]
    assert outputs.logits.shape == (count, 99)
    got = gradients(model, outputs.loss)
    model.eval()  # has neither dropout nor drop path, so that only the logits differ
    whole = model(**inputs, **extra)
    assert whole.logits.shape == (*inputs["labels"].shape, 99)
    assert len(seen[-1]) == 3
    torch.testing.assert_close(outputs.loss, whole.loss)
    expected = gradients(model, whole.loss)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("connector", CONNECTORS)
@torch.no_grad()
def test_tiles_encoded_in_chunks_have_the_features_of_tiles_encoded_together(connector):
    model = tiny.chat_model(connector=connector)
    images = tiny.pixels(5)
    seen = sizes_seen(model.vision_model)
    expected = model.get_image_features(images, output_hidden_states=True)
    assert [size[0] for size in seen] == [5]  # a small batch goes in one
    model.vision_batch_size = 2
    seen.clear()
    got = model.get_image_features(images, output_hidden_states=True)
    assert [size[0] for size in seen] == [2, 2, 1]
    torch.testing.assert_close(model.extract_feature(images), expected.pooler_output)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output)
    torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(got.hidden_states, expected.hidden_states)


def test_generation_encodes_in_chunks():
    model = tiny.chat_model()
    inputs = tiny.chat_inputs(model)
    expected = model.generate(**inputs, **GREEDY)
    model.vision_batch_size = 4
    seen = sizes_seen(model.vision_model)
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    assert [size[0] for size in seen] == [4, 2]


@torch.no_grad()
def test_the_batch_of_the_vision_tower_bounds_its_memory():
    model, peaks = tiny.chat_model(), {}
    for tiles, model.vision_batch_size in ((3, 3), (12, 3), (12, 12)):
        images = tiny.pixels(tiles)
        with OperationCounter() as live:
            features = model.extract_feature(images)
        peaks[tiles, model.vision_batch_size] = live.peak_bytes - 2 * features.nbytes  # of the chunks and of all
    assert peaks[12, 3] <= peaks[3, 3]
    assert peaks[12, 12] > 3 * peaks[3, 3]


def test_the_former_bound_in_bytes_sets_the_batch_of_the_vision_tower():
    model = tiny.chat_model()
    for size, tiles in ((1, 1), (2**30, 14), (2**31, 28)):
        with pytest.warns(FutureWarning, match="`vision_chunk_bytes` is now `vision_batch_size`"):
            model.vision_chunk_bytes = size
        assert model.vision_batch_size == tiles
    assert model.vision_chunk_bytes == 2**31


def test_training_and_groups_of_processes_call_the_tower_once(monkeypatch):
    model = tiny.chat_model()
    model.vision_batch_size = 2
    seen = sizes_seen(model.vision_model)
    model.train()(**training_inputs(model)).loss.backward()
    assert [size[0] for size in seen] == [6]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with torch.no_grad():
        model.eval()(**tiny.chat_inputs(model))
    assert [size[0] for size in seen] == [6, 6]


def empty_output(query: torch.Tensor) -> torch.Tensor:
    batch, heads, length, width = query.shape
    return query.new_empty(batch, length, heads, width)


@torch.no_grad()
def test_the_default_batch_of_the_largest_tower_takes_a_gibibyte():
    """InternViT-6B in bfloat16, which the configuration's defaults describe; two blocks take as much as all."""
    with torch.device("meta"):
        model = InternVisionModel(InternViTConfig(image_size=448, num_hidden_layers=2)).to(torch.bfloat16)
        pixels = torch.empty(InternVLChatForConditionalGeneration.vision_batch_size, 3, 448, 448, dtype=torch.bfloat16)
    # The meta device knows no kernel and would write the scores out; this takes what a kernel takes.
    AttentionInterface.register("output_alone", lambda _, query, *rest, **kwargs: (empty_output(query), None))
    model.config._attn_implementation = "output_alone"
    with OperationCounter() as live:
        model(pixels)
    assert 0.9 * 2**30 < live.peak_bytes <= 2**30


@pytest.mark.parametrize("connector", CONNECTORS)
def test_a_frozen_tower_has_no_backward_under_checkpointing(connector):
    """Though transformers then makes the embeddings of every part ask for gradients."""
    model = tiny.chat_model(connector=connector).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    pixels = tiny.pixels(2)
    trained = model.get_image_features(pixels, return_dict=True)
    assert trained.last_hidden_state.requires_grad
    model.vision_model.requires_grad_(False)
    frozen = model.get_image_features(pixels, return_dict=True)
    assert not frozen.last_hidden_state.requires_grad
    assert frozen.pooler_output.requires_grad  # through the connector
    torch.testing.assert_close(frozen.pooler_output, trained.pooler_output)
    wanted = model.get_image_features(pixels.clone().requires_grad_(), return_dict=True)
    assert wanted.last_hidden_state.requires_grad
