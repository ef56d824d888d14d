"""Run in a process of its own: loads converted checkpoints through the Auto classes as remote code and records what
they compute.

`python golden_runner.py JOBS.json`, a list of {case: golden folder, model: converted folder, results: file to write}.
Names in the results are those in the golden's io.safetensors.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


DEVICE = os.environ.get("GOLDENS_DEVICE", "cpu")
torch.backends.cudnn.allow_tf32 = False  # the published outputs are of float32

sys.modules["internvl"] = None  # the installed package must not help: an attempt to import it fails

from transformers import AutoModel  # noqa: E402


def vision(model, given, notes):
    outputs = model(given["pixel_values"], output_hidden_states=True)
    yield "last_hidden_state", outputs.last_hidden_state
    yield "pooler_output", outputs.pooler_output
    for index, hidden_states in enumerate(outputs.hidden_states):
        yield f"hidden_states.{index}", hidden_states
    yield "dynamic.last_hidden_state", model(given["pixel_values_dynamic"]).last_hidden_state
    yield "from_embeds.last_hidden_state", model(pixel_embeds=given["pixel_embeds"]).last_hidden_state
    old, new = given["pixel_values"].shape[-1], given["pixel_values_resized"].shape[-1]
    model.resize_pos_embeddings(old, new, model.config.patch_size)
    yield "resized.position_embedding", model.embeddings.position_embedding
    yield "resized.last_hidden_state", model(given["pixel_values_resized"]).last_hidden_state


def contrastive(model, given, notes):
    image, text = given["image"], given["text"]
    tokens = model.vision_model(image).last_hidden_state
    queries = model.get_query_features(image)
    yield "vision_last_hidden_state", tokens
    yield "query_hidden_states", queries
    yield "clip_projector", model.clip_projector(tokens)
    yield "clip_projector2", model.clip_projector2(queries)
    yield "text_hidden_states", model.qllama.model(text, attention_mask=(text > 0).long()).last_hidden_state
    yield "encode_text", model.encode_text(text)
    for letter in "cg":
        mode = f"InternVL-{letter.upper()}"
        yield f"{letter}.encode_image", model.encode_image(image, mode=mode)
        per_image, per_text = model(image=image, text=text, mode=mode)
        yield f"{letter}.logits_per_image", per_image
        yield f"{letter}.logits_per_text", per_text
    yield from captions(model, given, notes)


def captions(model, given, notes):
    settings = {"pixel_values": given["image"], "do_sample": False, "max_new_tokens": 12}
    for name in ("caption", "caption_padded"):
        prompt = {"input_ids": given[f"{name}.input_ids"], "attention_mask": given.get(f"{name}.attention_mask")}
        extra = {"eos_token_id": -1, "output_scores": True, "return_dict_in_generate": True}
        outputs = model.generate(**prompt, **settings, **extra)
        yield f"{name}.tokens", outputs.sequences
        yield f"{name}.scores", torch.stack(outputs.scores, dim=1)
        if name == "caption":
            yield "caption.full_logits", uncached_logits(model, given["image"], prompt["input_ids"], outputs.sequences)
    ids, end = given["caption.input_ids"], notes["caption_eos_token_id"]
    yield "caption_eos.tokens", model.generate(input_ids=ids, eos_token_id=end, pad_token_id=0, **settings)
    longer = model.generate(input_ids=ids, eos_token_id=end, pad_token_id=0, min_new_tokens=8, **settings)
    yield "caption_eos_min8.tokens", longer


def uncached_logits(model, image, prompt, generated):
    """Logits over queries, prompt and all but the last new token."""
    hidden_states = model.qllama.model(
        input_ids=torch.cat([prompt, generated[:, :-1]], dim=1),
        query_embeds=model.query_tokens.expand(len(image), -1, -1),
        vision_hidden_states=model.vision_model(image).last_hidden_state,
    ).last_hidden_state
    return model.qllama.lm_head(hidden_states)


def chat(model, given, notes):
    yield "vit_embeds", model.extract_feature(given["pixel_values"])
    inputs = {key: given[key] for key in ("pixel_values", "input_ids", "attention_mask", "labels", "image_flags")}
    outputs = model(**inputs)
    yield "logits", outputs.logits
    yield "loss", outputs.loss
    yield "loss_weighted", model(**inputs, loss_weight=given["loss_weight"].tolist()).loss
    tiles = given["pixel_values"][given["image_flags"] == 1]
    prompt = {key: given[f"generate.{key}"] for key in ("input_ids", "attention_mask")}
    length = prompt["input_ids"].shape[1]
    greedy = {"do_sample": False, "max_new_tokens": 10}
    model.generation_config.eos_token_id = None
    outputs = model.generate(pixel_values=tiles, **prompt, **greedy, output_scores=True, return_dict_in_generate=True)
    yield "generate.tokens", outputs.sequences[:, length:]
    yield "generate.scores", torch.stack(outputs.scores, dim=1)
    single, text = given["generate.single_input_ids"], given["generate.text_only_input_ids"]
    first = tiles[: notes["tiles"][0]]
    yield (
        "generate.single_tokens",
        model.generate(pixel_values=first, input_ids=single, **greedy)[:, single.shape[1] :],
    )
    yield "generate.text_only_tokens", model.generate(input_ids=text, **greedy)[:, text.shape[1] :]
    end = notes["generate_eos_token_id"]
    ended = model.generate(pixel_values=tiles, **prompt, **greedy, eos_token_id=end, pad_token_id=0)
    yield "generate.eos_tokens", ended[:, length:]


def merged(model, given, notes):
    """InternVL-14B that was wrapped by adapters: a few outputs of each kind, and some merged weights."""
    image, text = given["image"], given["text"]
    yield "encode_text", model.encode_text(text)
    for letter in "cg":
        mode = f"InternVL-{letter.upper()}"
        yield f"{letter}.encode_image", model.encode_image(image, mode=mode)
        yield f"{letter}.logits_per_image", model(image=image, text=text, mode=mode)[0]
    settings = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": -1}
    yield (
        "caption.tokens",
        model.generate(pixel_values=image, input_ids=given["caption.input_ids"], **settings),
    )


def with_placeholders(ids, labels, image_token_id, num_image_token, marker):
    """Every marker replaced by placeholders, rows padded on the right: ids, mask, labels (-100 at placeholders)."""
    rows, row_labels = [], []
    for row, own in zip(ids, labels, strict=True):
        counts = torch.where(row == marker, num_image_token, 1)
        rows.append(torch.where(row == marker, image_token_id, row).repeat_interleave(counts))
        row_labels.append(torch.where(row == marker, -100, own).repeat_interleave(counts))
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    return pad(rows, batch_first=True), mask, pad(row_labels, batch_first=True, padding_value=-100)


def llava(model, given, notes):
    images, labels, marker = given["images"], given["labels"], notes["image_token_index"]
    vision = model.vision_model(images, output_hidden_states=True)
    yield "tower.patches", vision.hidden_states[model.select_layer][:, 1:]
    if model.qllama is not None:
        queries = model.query_tokens.expand(len(images), -1, -1)
        hidden = model.qllama(query_embeds=queries, vision_hidden_states=vision.last_hidden_state)
        yield "tower.queries", hidden.last_hidden_state
    yield "image_features", (features := model.extract_feature(images))
    seen = []
    model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    own_tokens = slice(model.config.image_token_id)  # the placeholder is the last one, and was added
    for prefix, name in (("", "input_ids"), ("ragged.", "ragged.input_ids")):
        ids, mask, own = with_placeholders(given[name], labels, model.config.image_token_id, features.shape[1], marker)
        # The published code takes an image of every row, also of those without a marker.
        with_images = images[(given[name] == marker).any(dim=1)]
        outputs = model(input_ids=ids, attention_mask=mask, labels=own, pixel_values=with_images)
        yield f"{prefix}inputs_embeds", seen[-1]
        yield f"{prefix}attention_mask", mask
        yield f"{prefix}labels", own
        yield f"{prefix}loss", outputs.loss
        if not prefix:
            yield "logits", outputs.logits[..., own_tokens]
    ids, mask, _ = with_placeholders(
        given["input_ids"], labels, model.config.image_token_id, features.shape[1], marker
    )
    settings = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": -1, "output_scores": True}
    outputs = model.generate(
        input_ids=ids, attention_mask=mask, pixel_values=images, return_dict_in_generate=True, **settings
    )
    yield "generate.tokens", outputs.sequences[:, ids.shape[1] :]
    yield "generate.scores", torch.stack(outputs.scores, dim=1)[..., own_tokens]


def record(case, model_folder, results):
    notes = json.loads((case / "case.json").read_text())
    tensors = load_file(case / "io.safetensors", device=DEVICE)
    given = {name.removeprefix("in."): tensor for name, tensor in tensors.items() if name.startswith("in.")}
    model, info = AutoModel.from_pretrained(model_folder, trust_remote_code=True, output_loading_info=True)
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if problems or not type(model).__module__.startswith("transformers_modules."):
        raise SystemExit(f"{case.name}: loaded {type(model)} with {problems}")
    compute = {"intern_vit_6b": vision, "internvl_14b": contrastive}.get(model.config.model_type, chat)
    if "lora" in notes:
        compute = merged
    elif "image_token_index" in notes:
        compute = llava
    with torch.no_grad():
        outputs = compute(model.eval().to(DEVICE), given, notes)
        found = {f"out.{name}": tensor.cpu().contiguous().clone() for name, tensor in outputs}
    save_file(found, results)


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        record(Path(job["case"]), job["model"], job["results"])
