"""The training models of stages 1 and 2 and of fine-tuning: published losses and gradients, Trainer's conventions,
saving.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, Trainer, TrainingArguments

from internvl.modeling_internvl import InternVLModel
from internvl.training.models.base import drop_patches, patch_contrast
from internvl.training.models.pretraining import (
    InternVLForCaptionTraining,
    InternVLForContrastiveTraining,
    InternVLForGenerativeTraining,
    InternVLForRetrievalTraining,
)

from . import tiny, two_processes
from .training_models import (
    caption_batch,
    contrastive_batch,
    generative_batch,
    golden_inputs,
    golden_model,
    notes,
    retrieval_batch,
    tensors,
    tiny_model,
)


def assert_recorded(case: str, prefix: str, found: dict[str, torch.Tensor]) -> None:
    """Every recorded loss and gradient is found; names in `found` are "loss..." and "grad...."."""
    wanted = {key.removeprefix(prefix): value for key, value in tensors(case).items() if key.startswith(prefix)}
    assert len(wanted) > 1
    for key, value in wanted.items():
        limits = notes(case)["tolerance"]["grad" if "grad." in key else "loss"]
        torch.testing.assert_close(found[key], value, **limits, msg=lambda text, key=key: f"{prefix}{key}: {text}")


@pytest.mark.parametrize("tag", ["stage2", "stage2_empty", "retrieval"])
def test_losses_and_gradients_are_those_of_the_published_code(tag):
    model = golden_model(tag)
    model.config.label_smoothing = notes("internvl_14b_training")[tag].get("label_smoothing", 0.0)
    outputs = model(**golden_inputs("internvl_14b_training", tag))
    outputs.loss.backward()
    losses = {name: value.detach() for name, value in outputs.items()}
    assert_recorded("internvl_14b_training", f"{tag}.out.", losses | two_processes.gradients(model))


@pytest.mark.parametrize("grad_cache_chunk_size", [None, 2], ids=["plain", "gradient caching"])
@pytest.mark.parametrize("tag", ["stage2", "retrieval"])
def test_two_processes_have_the_losses_and_gradients_of_the_published_code(tag, grad_cache_chunk_size, on_two):
    case, found = "internvl_14b_training_ws2", [rank["goldens"][tag, grad_cache_chunk_size] for rank in on_two]
    for rank in range(2):
        assert_recorded(case, f"{tag}.rank{rank}.out.", found[rank])
    means = {f"mean_{key}": (found[0][key] + found[1][key]) / 2 for key in found[0] if key.startswith("grad.")}
    assert_recorded(case, f"{tag}.out.", means)


def test_stage_2_is_one_forward_of_each_tower_and_equals_three_separate_passes():
    model, inputs = tiny_model(InternVLForGenerativeTraining), generative_batch(5)
    calls, shapes = [], []
    for tower in (model.vision_model, model.qllama.model):
        tower.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    cross_attention = model.qllama.model.layers[0].cross_attn
    for side in (cross_attention.q_proj, cross_attention.k_proj):
        side.register_forward_hook(lambda module, given, _: shapes.append(tuple(given[0].shape[:2])))
    found = model(**inputs)
    assert sorted(calls) == ["InternVisionModel", "QLlamaModel"]
    # Keys of every image once; its 5 queries once for matching and once for the two losses whose queries see no text.
    assert sorted(shapes) == [(5, 5 + 5), (5, 17)]

    images = inputs["pixel_values"]
    scores = [
        model.get_matching_logits(images, inputs[f"{name}_input_ids"], inputs[f"{name}_attention_mask"])
        for name in ("negative", "positive")
    ]
    itm = F.cross_entropy(torch.cat([scores[0][:3], scores[1][3:]]), torch.tensor([0, 0, 0, 1, 1]))
    image_embeds = F.normalize(model.clip_projector2(model.get_query_features(images)), dim=-1)
    summaries = (inputs["summarize_input_ids"], inputs["summarize_attention_mask"])
    texts = F.normalize(model.get_text_features(*summaries), dim=-1)
    logits = model.logit_scale.exp() * image_embeds @ texts.T
    itc = (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2
    itg = model.qllama(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        query_embeds=model.query_tokens.expand(5, -1, -1),
        vision_hidden_states=model.vision_model(images).last_hidden_state,
        labels=inputs["labels"],
    ).loss
    wanted = {"loss": itm + itc + itg, "loss_itc": itc, "loss_itm": itm, "loss_itg": itg}
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(found.loss, list(model.parameters()), allow_unused=True)
    wanted = torch.autograd.grad(wanted["loss"], list(model.parameters()), allow_unused=True)
    for name, *pair in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_padding_on_either_side_and_masks_left_out_change_no_loss():
    model, inputs = tiny_model(InternVLForGenerativeTraining), generative_batch()
    wanted = model(**inputs)
    derived = {key: value for key, value in inputs.items() if "mask" not in key}
    left = dict(inputs)
    for prefix in ("positive_", "negative_", "summarize_", ""):
        order = inputs[f"{prefix}attention_mask"].argsort(dim=1, stable=True)  # padding first
        names = [f"{prefix}input_ids", f"{prefix}attention_mask"] + ["labels"] * (not prefix)
        left |= {name: inputs[name].gather(1, order) for name in names}
    assert (left["summarize_attention_mask"][:, 0] == 0).any()
    for other in (derived, left):
        found = model(**other)
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-5)


def test_a_single_pair_is_a_negative():
    inputs = generative_batch(1)
    model = tiny_model(InternVLForGenerativeTraining)
    scores = model.get_matching_logits(inputs["pixel_values"], inputs["negative_input_ids"])
    torch.testing.assert_close(model(**inputs).loss_itm, F.cross_entropy(scores, torch.tensor([0])))


def test_texts_with_nothing_after_the_prefix_are_left_out():
    model = tiny_model(InternVLForGenerativeTraining, matching_prefix_length=2, summarize_prefix_length=3)
    inputs = generative_batch(5)
    inputs["positive_attention_mask"][3, 2:] = 0
    inputs["summarize_attention_mask"][3, 3:] = 0
    wanted = model(**inputs)
    changed = dict(inputs, positive_input_ids=inputs["positive_input_ids"].clone())
    changed["positive_input_ids"][3] = 7
    torch.testing.assert_close(model(**changed).loss_itm, wanted.loss_itm)
    images = F.normalize(model.clip_projector2(model.get_query_features(inputs["pixel_values"])), dim=-1)
    texts = F.normalize(
        model.get_text_features(inputs["summarize_input_ids"], inputs["summarize_attention_mask"]), dim=-1
    )
    logits, target = model.logit_scale.exp() * images @ texts.T, torch.tensor([0, 1, 2, -100, 4])
    itc = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(wanted.loss_itc, itc)


@pytest.mark.parametrize("name", ["stage 2", "retrieval"])
def test_without_negatives_other_texts_of_the_batch_are_drawn(name, monkeypatch):
    drawn = []

    def draw(similarities: torch.Tensor, is_candidate: torch.Tensor):
        drawn.append((similarities, is_candidate))
        return torch.tensor([3, 3, 3, 0, 1]), torch.tensor([True, True, False, True, True])

    monkeypatch.setattr("internvl.training.models.base.draw_hard_negatives", draw)
    if name == "stage 2":
        model, inputs = tiny_model(InternVLForGenerativeTraining, matching_prefix_length=3), generative_batch()
        inputs["positive_attention_mask"][2, 3:] = 0
        inputs["positive_input_ids"][1] = inputs["positive_input_ids"][0]
        is_candidate = [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [1, 1, 0, 1, 1], [1, 1, 0, 0, 1], [1, 1, 0, 1, 0]]
    else:
        model, inputs = tiny_model(InternVLForRetrievalTraining), retrieval_batch()  # images 0, 0, 1, 1, 2
        is_candidate = [[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 1], [1, 1, 0, 0, 1], [1, 1, 1, 1, 0]]
    positive = (inputs["positive_input_ids"], inputs["positive_attention_mask"])
    inputs = {key: value for key, value in inputs.items() if not key.startswith("negative")}
    found = model(**inputs)
    similarities, candidates = drawn[0]
    assert candidates.int().tolist() == is_candidate
    summaries = {"input_ids": inputs["summarize_input_ids"], "attention_mask": inputs["summarize_attention_mask"]}
    plain = InternVLModel.forward(model, pixel_values=inputs["pixel_values"], mode="InternVL-C", **summaries)
    torch.testing.assert_close(similarities, plain.logits_per_image)
    negatives = [part[torch.tensor([3, 3, 3, 0, 1])] for part in positive]
    wrong, right = (model.get_matching_logits(inputs["pixel_values"], *texts) for texts in (negatives, positive))
    if name == "stage 2":
        itm = F.cross_entropy(torch.cat([wrong[:3], right[3:]]), torch.tensor([0, 0, -100, 1, 1]))
    else:
        itm = F.cross_entropy(torch.cat([wrong, right]), torch.tensor([0, 0, -100, 0, 0] + [1] * 5))
    torch.testing.assert_close(found.loss_itm, itm, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["stage 2", "retrieval"])
def test_drawn_negatives_give_the_losses_and_gradients_of_the_same_ones_given(name, monkeypatch):
    """Where they are drawn the texts' features come from a pass of their own, and the images are read without these
    texts.
    """
    cls, _, batch = STAGES[name]
    model, inputs, drawn = tiny_model(cls), batch(), torch.tensor([3, 4, 4, 0, 1])
    monkeypatch.setattr(
        "internvl.training.models.base.draw_hard_negatives", lambda *_: (drawn, torch.ones(5, dtype=torch.bool))
    )
    given = inputs | {f"negative_{key}": inputs[f"positive_{key}"][drawn] for key in ("input_ids", "attention_mask")}
    lengths, found = [], []
    model.qllama.model.layers[0].register_forward_hook(lambda m, args, _: lengths.append(args[0].shape[1]))
    for case in (given, {key: value for key, value in inputs.items() if not key.startswith("negative")}):
        model.zero_grad()
        outputs = model(**case)
        outputs.loss.backward()
        found.append({"loss": outputs.loss.detach()} | two_processes.gradients(model))
    longest = inputs["summarize_input_ids"].shape[1]
    assert lengths == [lengths[0], longest, lengths[0] - longest]
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(
            found[1][key], value, atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


STAGES = {
    "softmax": (InternVLForContrastiveTraining, {}, contrastive_batch),
    "sigmoid": (InternVLForContrastiveTraining, {"objective": "sigmoid"}, contrastive_batch),
    "C alone, half the patches": (
        InternVLForContrastiveTraining,
        {"num_query_token": 0, "patch_drop_rate": 0.5},
        contrastive_batch,
    ),
    "stage 2": (InternVLForGenerativeTraining, {}, generative_batch),
    "retrieval": (InternVLForRetrievalTraining, {}, retrieval_batch),
    "captions": (InternVLForCaptionTraining, {}, caption_batch),
}


def trainer_for(model: nn.Module, inputs: dict[str, torch.Tensor], folder, **arguments) -> Trainer:
    """Plain `Trainer` on the rows of a batch, each a sample of its own."""
    rows = [{key: value[i] for key, value in inputs.items()} for i in range(len(inputs["pixel_values"]))]
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": len(rows), "max_steps": 8, "learning_rate": 3e-3,
        "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True, "dataloader_pin_memory": False, "eval_strategy": "no",
    }  # fmt: skip
    arguments = TrainingArguments(**{**settings, **arguments})
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("name", STAGES)
def test_plain_trainer_lowers_and_evaluates_the_loss(name, tmp_path):
    cls, settings, batch = STAGES[name]
    trainer = trainer_for(tiny_model(cls, **settings), batch(), tmp_path)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.9 * losses[0]
    assert trainer.evaluate()["eval_loss"] < 0.9 * before


@pytest.mark.parametrize("name", ["softmax", "stage 2"])
def test_lora_trains_the_adapters_alone(name, tmp_path):
    cls, settings, batch = STAGES[name]
    lora = LoraConfig(r=4, target_modules=r"(qllama|vision_model)\..*(q_proj|qkv)")
    model = get_peft_model(tiny_model(cls, **settings, grad_cache_chunk_size=2), lora)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = trainer_for(model, batch(), tmp_path, gradient_checkpointing=True, learning_rate=3e-2)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    adapters = {key for key in before if "lora_" in key}
    assert {key for key in adapters if ".vision_model." in key}
    assert changed == adapters - {key for key in adapters if ".cross_attn." in key and name == "softmax"}


def test_accumulated_captions_weigh_every_label_alike(tmp_path):
    inputs = caption_batch(8)
    inputs["labels"][:4, :5] = -100  # few labels in the first half, so that a mean of means would show
    inputs["labels"][4:, 0] = 5  # nothing predicts the first token, so it must not count

    def trained(batch_size: int) -> dict[str, torch.Tensor]:
        model = tiny_model(InternVLForCaptionTraining)
        arguments = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 8 // batch_size}
        trainer = trainer_for(
            model, inputs, tmp_path, max_steps=1, optim="sgd", max_grad_norm=0.0, learning_rate=1.0, **arguments,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer.train()
        return {name: p.detach() for name, p in model.named_parameters()} | {
            "loss": torch.tensor(trainer.state.log_history[0]["loss"])
        }

    wanted = trained(8)
    torch.testing.assert_close(
        wanted["loss"], tiny_model(InternVLForCaptionTraining)(**inputs).loss, atol=1e-4, rtol=0
    )
    for batch_size in (4, 1):
        for name, value in trained(batch_size).items():
            torch.testing.assert_close(value, wanted[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", STAGES)
def test_a_saved_folder_is_an_internvl_model(name, tmp_path):
    cls, settings, _ = STAGES[name]
    model = tiny_model(cls, **settings)
    model.save_pretrained(tmp_path)
    assert type(model) is cls
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["InternVLModel"]
    assert "modeling_internvl.InternVLModel" in config["auto_map"].values()
    code = {path.name for path in tmp_path.glob("*.py")}
    assert "modeling_internvl.py" in code
    assert not code & {"pretraining.py", "training_model.py", "objectives.py"}
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded).__name__ == "InternVLModel"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.logit_scale.ndim == 0  # in training a vector of one element
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key].reshape(value.shape))


def test_stage_2_starts_from_a_folder_of_stage_1(tmp_path):
    first = tiny_model(InternVLForContrastiveTraining, num_query_token=0, objective="sigmoid")
    first.save_pretrained(tmp_path)
    settings = {"num_query_token": 5, "grad_cache_chunk_size": 2, "matching_prefix_length": 2}
    second, info = InternVLForGenerativeTraining.from_pretrained(tmp_path, **settings, output_loading_info=True)
    assert (second.grad_cache_chunk_size, second.matching_prefix_length, second.config.num_query_token) == (2, 2, 5)
    assert not info["unexpected_keys"]
    assert "query_tokens" in info["missing_keys"]
    for name, value in first.state_dict().items():
        if name != "logit_bias":
            assert torch.equal(second.state_dict()[name], value)
    assert torch.isfinite(second(**generative_batch()).loss)
    resumed = InternVLForContrastiveTraining.from_pretrained(tmp_path, objective="sigmoid")
    assert torch.equal(resumed.logit_bias, first.logit_bias)
    assert torch.equal(resumed.logit_scale, first.logit_scale)


def test_the_sigmoid_starts_as_in_siglip_and_keeps_a_learned_temperature(tmp_path):
    fresh = InternVLForContrastiveTraining(tiny.internvl_model().config, objective="sigmoid")
    assert (round(fresh.logit_scale.exp().item(), 4), fresh.logit_bias.item()) == (10.0, -10.0)
    tiny.internvl_model().save_pretrained(tmp_path)
    loaded = InternVLForContrastiveTraining.from_pretrained(tmp_path, objective="sigmoid")
    assert (loaded.logit_scale.item(), loaded.logit_bias.item()) == (1.5, -10.0)


@pytest.mark.parametrize("name", ["softmax", "C alone, half the patches"])
def test_stage_1_is_the_contrastive_loss_of_internvl_c(name):
    cls, settings, batch = STAGES[name]
    model = tiny_model(cls, **settings).eval()
    found = model(**batch())
    wanted = InternVLModel.forward(model, **batch(), return_loss=True)
    for key in ("loss", "image_embeds", "text_embeds"):
        torch.testing.assert_close(found[key], wanted[key])
    without = model(**batch(), return_loss=False)
    assert without.loss is None
    assert torch.equal(without.text_embeds, found.text_embeds)


def test_half_of_the_patches_are_left_out_in_training_alone():
    model = tiny_model(InternVLForContrastiveTraining, patch_drop_rate=0.5)
    seen = []
    model.vision_model.encoder.layers[0].register_forward_hook(lambda module, given, _: seen.append(given[0]))
    embedded = model.vision_model.embeddings(tiny.pixels(5))
    model(**dict(contrastive_batch(), pixel_values=tiny.pixels(5)))
    model.eval()(**contrastive_batch())
    assert [x.shape[1] for x in seen] == [1 + 8, 1 + 16]
    chosen = []
    for image, tokens in zip(embedded, seen[0], strict=True):
        matches = (tokens[:, None] == image).all(-1).float().argmax(1).tolist()
        assert torch.equal(image[matches], tokens)
        assert matches[0] == 0  # the class token
        assert len(set(matches)) == len(matches)
        chosen.append(frozenset(matches))
    assert len(set(chosen)) > 1


def test_every_patch_is_left_out_as_often_as_any_other():
    tokens = torch.arange(11.0)[None, :, None].expand(4000, -1, 1)
    counts = torch.bincount(drop_patches(tokens, 0.7).flatten().long(), minlength=11) / 4000
    torch.testing.assert_close(counts, torch.tensor([1.0] + [0.3] * 10), atol=0.05, rtol=0)


def test_the_plainest_patches_are_left_out_and_equals_by_chance():
    tokens = torch.arange(11.0)[None, :, None].expand(4000, -1, 1)
    contrast = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0]).expand(4000, -1)
    counts = torch.bincount(drop_patches(tokens, 0.5, contrast).flatten().long(), minlength=11) / 4000
    expected = [1.0] + [1.0 if value else 2 / 7 for value in contrast[0]]
    torch.testing.assert_close(counts, torch.tensor(expected), atol=0.05, rtol=0)


def test_contrast_is_the_range_of_a_patch_in_its_widest_channel():
    pixels = torch.zeros(1, 3, 4, 6)
    pixels[0, 1, 3, 2] = 5.0  # second row of patches, second column
    pixels[0, 2, 2, 2] = -3.0
    assert patch_contrast(pixels, 2).tolist() == [[0, 0, 0, 0, 5, 0]]


def test_dropping_plain_patches_reads_the_others_alone():
    """Images that differ in dropped patches only, by less than the kept ones contrast, have one embedding."""
    model = tiny_model(InternVLForContrastiveTraining, patch_drop_rate=0.5, drop_low_contrast_patches=True).train()
    size, patch = model.config.vision_config.image_size, model.config.vision_config.patch_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    per_side = size // patch
    is_plain = torch.arange(per_side**2) % 2 == 1
    scale = torch.where(is_plain, 1e-3, 1.0).view(per_side, per_side)
    pixels = pixels * scale.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    other = pixels + 0.5 * (scale < 1).float().repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    embeds = [model(pixel_values=p, input_ids=tiny.text_ids(1)).image_embeds for p in (pixels, other)]
    torch.testing.assert_close(embeds[0], embeds[1], atol=1e-5, rtol=1e-5)
    whole = model.eval()(pixel_values=other, input_ids=tiny.text_ids(1)).image_embeds
    assert (whole - embeds[1]).abs().max() > 1e-3


def test_several_texts_for_each_image_have_the_mean_of_their_losses():
    model = tiny_model(InternVLForContrastiveTraining)
    pixels, texts = tiny.pixels(3), tiny.text_ids(6)
    both = model(pixel_values=pixels, input_ids=texts)
    parts = [model(pixel_values=pixels, input_ids=part).loss for part in texts.split(3)]
    torch.testing.assert_close(both.loss, torch.stack(parts).mean())
    assert parts[0] != parts[1]
    assert both.text_embeds.shape[0] == 6


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_in_groups_of_similar_length_have_the_features_and_gradients_of_all_together(side):
    lengths = torch.tensor([9, 2, 7, 3, 8, 2])
    columns = torch.arange(9)
    mask = (columns < lengths[:, None]) if side == "right" else (columns >= 9 - lengths[:, None])
    batch = {"pixel_values": tiny.pixels(6), "input_ids": tiny.text_ids(6, 9), "attention_mask": mask.long()}
    seen, results = [], []
    for groups in (1, 3, 100):
        model = tiny_model(InternVLForContrastiveTraining, num_length_buckets=groups)
        model.qllama.model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        output = model(**batch)
        output.loss.backward()
        results.append((output.text_embeds, model.qllama.model.embed_tokens.weight.grad))
    assert seen == [(6, 9), (2, 2), (2, 7), (2, 9), *((1, length) for length in sorted(lengths.tolist()))]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["softmax", "stage 2", "retrieval", "captions"])
def test_a_frozen_tower_runs_in_its_own_dtype_without_gradient_and_without_drop_path(name):
    cls, settings, batch = STAGES[name]
    model = tiny_model(cls, **settings)
    model.vision_model.requires_grad_(False).bfloat16()
    for layer in model.vision_model.encoder.layers:
        layer.drop_path1.rate = 0.9
    model.train()
    inputs, outputs = batch(), []
    model.vision_model.register_forward_hook(lambda module, _, out: outputs.append(out.last_hidden_state))
    losses = [model(**inputs).loss for _ in range(2)]
    assert torch.equal(losses[0], losses[1])
    assert outputs[0].dtype == torch.bfloat16
    assert not outputs[0].requires_grad
    losses[0].backward()
    assert all(p.grad is None and p.dtype == torch.bfloat16 for p in model.vision_model.parameters())
    assert model.text_projection.grad is not None or name == "captions"


def test_frozen_llama_layers_keep_their_storage_dtype_under_autocast():
    model = tiny_model(InternVLForGenerativeTraining).requires_grad_(False).bfloat16()
    trained = [p for n, p in model.named_parameters() if "cross_attn" in n or n.startswith(("query", "itm", "logit"))]
    for parameter in trained:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**generative_batch()).loss
    assert loss.dtype == torch.float32
    loss.backward()
    wanted = tiny_model(InternVLForGenerativeTraining)(**generative_batch()).loss
    torch.testing.assert_close(loss, wanted, atol=0.1, rtol=0.05)
    with_gradient = [p for p in model.parameters() if p.grad is not None]
    assert with_gradient
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in with_gradient)
    assert model.qllama.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


def test_nothing_is_remembered_between_calls():
    model, inputs = tiny_model(InternVLForGenerativeTraining), generative_batch()
    first, state = model(**inputs).loss, set(vars(model))
    model(**generative_batch(3, seed=4))
    assert torch.equal(model(**inputs).loss, first)
    assert set(vars(model)) == state


def test_the_scale_of_the_similarities_is_capped():
    model = tiny_model(InternVLForContrastiveTraining, max_logit_scale=3.0)
    with torch.no_grad():
        model.logit_scale.fill_(8.0)
    found = model(**contrastive_batch()).loss
    with torch.no_grad():
        model.logit_scale.fill_(math.log(3))
    torch.testing.assert_close(found, model(**contrastive_batch()).loss)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: tiny_model(InternVLForContrastiveTraining, objective="hinge"),
            "`objective` must be one of .*'hinge'",
        ),
        (
            lambda: tiny_model(InternVLForContrastiveTraining, num_length_buckets=0),
            "`num_length_buckets` must be at least 1, got 0",
        ),
        (lambda: tiny_model(InternVLForContrastiveTraining, patch_drop_rate=1.0), r"in \[0, 1\), got 1.0"),
        (lambda: tiny_model(InternVLForGenerativeTraining, 0), "Stage 2 needs the queries .* `num_query_token` is 0"),
        (lambda: tiny_model(InternVLForRetrievalTraining, 0), "Retrieval fine-tuning needs the queries"),
        (lambda: tiny_model(InternVLForCaptionTraining, 0), "Caption fine-tuning needs the queries"),
        (
            lambda: tiny_model(InternVLForContrastiveTraining)(tiny.pixels(2), tiny.text_ids(3)),
            "must be pairs, or have as many texts for each image, got 2 images and 3 texts",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
