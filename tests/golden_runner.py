"""Run in a process of its own: loads converted checkpoints through the Auto classes as remote code and records what they compute.

`python golden_runner.py JOBS.json`, a list of {case: golden folder, model: converted folder, results: file to write}. Names in the
results are those in the golden's io.safetensors.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


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


def record(case, model_folder, results):
    notes = json.loads((case / "case.json").read_text())
    tensors = load_file(case / "io.safetensors")
    given = {name.removeprefix("in."): tensor for name, tensor in tensors.items() if name.startswith("in.")}
    model, info = AutoModel.from_pretrained(model_folder, trust_remote_code=True, output_loading_info=True)
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if problems or not type(model).__module__.startswith("transformers_modules."):
        raise SystemExit(f"{case.name}: loaded {type(model)} with {problems}")
    compute = {"intern_vit_6b": vision, "internvl_14b": contrastive}.get(model.config.model_type, chat)
    with torch.no_grad():
        found = {f"out.{name}": tensor.contiguous().clone() for name, tensor in compute(model.eval(), given, notes)}
    save_file(found, results)


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        record(Path(job["case"]), job["model"], job["results"])
