"""The costs of the full recipes: their FLOPs are what torch counts on tiny models, their parameters those of the released sizes."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from internvl.layers_internvit import InternViTLayer
from internvl.modeling_qllama import QLlamaDecoderLayer, rotary_angles
from internvl.planning.__main__ import main
from internvl.planning.costs import (
    Cluster,
    Products,
    Shapes,
    cost_of,
    full_models,
    llama_layer_widths,
    state_bytes,
    unit_sizes,
    vision_layer_widths,
)
from internvl.planning.memory import build_on_meta, read_config
from internvl.training.__main__ import main as train
from internvl.training.models.parameter_groups import part_of, train_parts
from internvl.training.models.pretraining import (
    InternVLForContrastiveTraining,
    InternVLForGenerativeTraining,
    InternVLForRetrievalTraining,
)
from internvl.training.recipes import retrieval, stage1, stage2, stage3

from . import tiny
from .training_models import tiny_model


BATCH, LENGTH = 4, 9


class FlopCounter(TorchDispatchMode):
    """torch's own formulas. (Its `FlopCounterMode` follows modules with hooks that nested checkpoints trip over.)"""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def pair_inputs(*names: str) -> dict[str, torch.Tensor]:
    """Pictures of the tiny size, and a text of full length under every name."""
    texts = {f"{name}input_ids": tiny.text_ids(BATCH, LENGTH, seed=number) for number, name in enumerate(names)}
    return {"pixel_values": tiny.pixels(BATCH), **texts}


def contrastive(rows, objective="softmax"):
    model = tiny_model(
        InternVLForContrastiveTraining, 0, objective=objective, dropped_patches=0.5, rows_per_chunk=rows
    )
    return model, stage1(), pair_inputs("")


def generative(rows):
    model = tiny_model(InternVLForGenerativeTraining, rows_per_chunk=rows)
    inputs = pair_inputs("", "positive_", "summarize_")
    return model, stage2(), {**inputs, "labels": inputs["input_ids"]}


def retrieving(rows):
    model = tiny_model(InternVLForRetrievalTraining, rows_per_chunk=rows)
    return model, retrieval(), {**pair_inputs("positive_", "summarize_"), "image_ids": torch.arange(BATCH)}


def chatting(connector, phase=1, freeze_language=False):
    def make(rows):
        model = tiny.chat_model(connector=connector).train()
        model.skips_unlabelled_logits = True  # as stage 3 has it
        recipe = stage3(connector, freeze_language)
        pictures = torch.full((BATCH, model.num_image_token), tiny.IMAGE_TOKEN_ID)
        ids = torch.cat([pictures, tiny.text_ids(BATCH, LENGTH)], dim=1)
        labels = ids.masked_fill(ids == tiny.IMAGE_TOKEN_ID, -100)
        inputs = {"pixel_values": tiny.pixels(BATCH), "input_ids": ids, "labels": labels}
        return model, replace(recipe, phases=(recipe.phases[phase],)), inputs

    return make


CASES = {
    "stage 1": contrastive,
    "stage 1, sigmoid": lambda rows: contrastive(rows, "sigmoid"),
    "stage 2": generative,
    "retrieval": retrieving,
    "stage 3, simple, mlp": chatting("patches", 0),
    "stage 3, simple": chatting("patches"),
    "stage 3, simple, decoder frozen": chatting("patches", freeze_language=True),
    "stage 3, full": chatting("queries_and_patches"),
    "stage 3, full, decoder frozen": chatting("queries_and_patches", freeze_language=True),
}


# Dialogues are accumulated, not cached.
WAYS = [(name, rows) for name in CASES for rows in (None, 2) if rows is None or "stage 3" not in name]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("name", "rows"), WAYS)
def test_flops_are_those_that_torch_counts(name, rows, checkpointed):
    model, recipe, inputs = CASES[name](rows)
    model.set_attn_implementation("eager")
    phase = replace(recipe.phases[0], image_size=56)
    objective = getattr(model, "objective", None)
    changes = (
        {"max_text_length": LENGTH, **({"objective": objective} if objective else {})} if "stage 3" not in name else {}
    )
    recipe = replace(recipe, rows_at_a_time=rows, gradient_checkpointing=checkpointed, **changes)
    train_parts(model, phase.rates)
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # as `StageTrainer` does
    with FlopCounter() as counter:
        model(**inputs).loss.backward()
    shapes = Shapes(model, recipe, phase, BATCH, BATCH, LENGTH)
    assert shapes.caches == bool(rows)
    found = BATCH * sum(place.executed(shapes.caches, checkpointed) for place in shapes.products)
    # Recomputing stops before the last product of a block, whose result nothing needs.
    assert found == pytest.approx(counter.total, rel=0.04)


def test_frozen_parts_cost_a_forward_pass_and_trained_ones_three():
    frozen, passed, trained = (
        Products(10, 7, 4, is_trained=is_trained, is_reached=is_reached, is_layer=True)
        for is_trained, is_reached in ((False, False), (False, True), (True, True))
    )
    assert (frozen.forward, frozen.backward) == (144, 0)
    assert (passed.backward, trained.backward) == (148, 288)
    assert [frozen.executed(True, True), passed.executed(True, True)] == [144, 3 * 144 + 148]
    assert trained.executed(False, True) == 2 * 144 + 288


@pytest.fixture(scope="module")
def models():
    return full_models("13b")


def size_of(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_full_models_have_the_released_sizes(models):
    released = {"stage 1": "internvl-c", "stage 2": "internvl-14b", "retrieval": "internvl-14b"}
    for stage, name in {**released, "stage 3, simple, 13b": "internvl-chat-13b"}.items():
        assert size_of(models[stage][0]) == size_of(build_on_meta(read_config(name), torch.float32))
    full = dict(models["stage 3, full, 13b"][0].named_children())
    assert size_of(full["qllama"]) == pytest.approx(7.4e9, rel=0.03)
    assert size_of(full["vision_model"]) == pytest.approx(5.9e9, rel=0.01)


def test_states_are_shared_out_or_not(models):
    model, recipe = models["stage 2"]
    phase = recipe.phases[0]
    trained = sum(p.numel() for name, p in model.named_parameters() if part_of(name) in phase.rates)
    frozen = size_of(model) - trained
    whole = state_bytes(model, phase, Cluster(gpus=64, sharding="ddp"))
    assert whole == 18 * trained + 2 * frozen
    few, many = (state_bytes(model, phase, Cluster(gpus=gpus)) for gpus in (64, 640))
    largest, rest = unit_sizes(model)
    assert few - many == pytest.approx((16 * trained + 2 * frozen) * (1 / 64 - 1 / 640))
    assert many > 6 * largest > 6 * max(p.numel() for p in model.parameters())
    assert 0 < rest < 0.01 * size_of(model)


def test_days_fall_with_the_cluster_and_rise_with_what_is_computed_again(models):
    model, recipe = models["stage 1"]
    phase = recipe.phases[0]
    found = [cost_of("", model, recipe, phase, Cluster(gpus=gpus), 512) for gpus in (320, 640)]
    assert found[0].days == pytest.approx(2 * found[1].days, rel=1e-3)
    # No more GPUs work than a batch has samples.
    tuned, its = models["retrieval"]
    small = replace(its.phases[0], batch_size=64)
    few, many = (cost_of("", tuned, its, small, Cluster(gpus=gpus), 512) for gpus in (64, 128))
    assert few.days == many.days
    assert found[1].executed > 1.5 * found[1].flops
    plain = replace(recipe, rows_at_a_time=None, gradient_checkpointing=False)
    kept = cost_of("", model, plain, phase, Cluster(), 512)
    assert kept.executed == kept.flops == found[1].flops
    assert kept.activations > 50 * found[1].activations
    assert kept.days == pytest.approx(found[1].days * kept.flops / found[1].executed)


def saved_widths(layer: torch.nn.Module, *args, **kwargs) -> float:
    """Elements per position that torch keeps for the backward pass of a layer, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() / x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = layer(*args, **kwargs)
        out = out if isinstance(out, torch.Tensor) else out[0]
        positions = out.shape[0] * out.shape[1]
        found = sum(kept.values()) / positions
    assert out.requires_grad
    return found


def test_layers_keep_what_the_formulas_say():
    torch.manual_seed(0)
    config = tiny.vision_config(hidden_size=64, intermediate_size=256)
    hidden_states = torch.randn(2, 37, 64, requires_grad=True)
    layer = InternViTLayer(config, 0.0).train()
    assert saved_widths(layer, hidden_states) == pytest.approx(vision_layer_widths(64, 256), rel=0.1)
    config = tiny.qllama_model(hidden_size=64, intermediate_size=172).config
    angles = rotary_angles(torch.arange(37)[None], config.head_dim, 1e4)
    layer = QLlamaDecoderLayer(config, 1).train()
    found = saved_widths(layer, hidden_states, attention_mask=None, position_embeddings=angles)
    assert found == pytest.approx(llama_layer_widths(64, 172), rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 0}, "`gpus` must be positive, got 0"),
        ({"utilization": 1.5}, r"`utilization` must be in \(0, 1\], got 1.5"),
        ({"sharding": "tp"}, r"`sharding` must be one of \['fsdp', 'ddp'\], got 'tp'"),
    ],
)
def test_impossible_clusters_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Cluster(**changes)


def test_the_command_prints_a_row_for_every_phase_and_its_assumptions(capsys):
    assert main(["costs", "--gpus", "2", "--gpu-memory", "40", "--decoder", "7b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(("| stage", "| retrieval"))]
    assert len(rows) == 8
    assert "| stage 3, full, 7b: whole |" in lines[9]
    assert "GB short" in rows[0]
    assert any("2 GPUs of 312 TFLOP/s" in line for line in lines)


def test_the_old_command_names_the_new_one(capsys):
    assert train(["costs", "--gpus", "2"]) == 2
    assert "python -m internvl.planning costs" in capsys.readouterr().err
