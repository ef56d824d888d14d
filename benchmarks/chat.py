"""Chat against transformers' own InternVL: the first token, each token after, and a conversation about images.

A decoder of the shape of Qwen2-0.5B with a smaller vocabulary (0.4 B parameters) behind a small tower. The
conversation takes an eighth of the blocks of InternViT-300M and of that decoder, and of its vocabulary, so that the
parts take the same shares of the time.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, InternVLForConditionalGeneration

from internvl import InternVLChatForConditionalGeneration

from .harness import Options, Row, require_equal, sizes_of, speed_row
from .native import IMAGE_TOKEN_ID, build_chat, build_pair


VISION = sizes_of(256, 1024, 2, 4, image_size=448, patch_size=14)
TEXT = sizes_of(896, 4864, 24, 14, vocab_size=32768, num_key_value_heads=2)
PROMPT = 64  # tokens of text
BATCH_PROMPTS = (8, 200, 32, 64, 16, 128, 96, 48)  # tokens of text of the prompts of a batch
NEW_TOKENS = 16
TURNS = 5
QUESTION = 24  # tokens
TILES = (6, 6)
CACHE_BYTES = 2**28
CONVERSATION_VISION = sizes_of(1024, 4096, 3, 16, image_size=448, patch_size=14)
CONVERSATION_TEXT = {**TEXT, "vocab_size": 18992, "num_hidden_layers": 3}

Chat: TypeAlias = InternVLChatForConditionalGeneration | InternVLForConditionalGeneration


def random_ids(length: int, vocab_size: int, seed: int, device: torch.device | str) -> torch.Tensor:
    """Text (1, length) without placeholders."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(IMAGE_TOKEN_ID + 1, vocab_size, (1, length), generator=generator).to(device)


def prompt_of(tiles: int, length: int, model: Chat, per_tile: int) -> torch.Tensor:
    """Placeholders of some tiles, then text."""
    text = random_ids(length, model.config.text_config.vocab_size, 1, model.device)
    return torch.cat([torch.full_like(text[:, :1], IMAGE_TOKEN_ID).expand(-1, tiles * per_tile), text], dim=1)


def pixels_for(model: Chat, tiles: int) -> torch.Tensor:
    """Tiles of noise."""
    size = VISION["image_size"]
    generator = torch.Generator().manual_seed(2)
    return torch.randn(tiles, 3, size, size, generator=generator).to(model.device, model.dtype)


def padded_prompts(lengths: Sequence[int], model: InternVLChatForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Prompts of one tile and so many tokens of text each, padded on the left."""
    prompts = [prompt_of(1, length, model, model.num_image_token)[0] for length in lengths]
    ids = pad_sequence(prompts, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels_for(model, len(lengths))}


def read_prompt(model: Chat, ids: torch.Tensor, pixel_values: torch.Tensor) -> Any:
    """Reads an image and a prompt into a cache; with it come the logits of the last position."""
    return model(input_ids=ids, pixel_values=pixel_values, use_cache=True, logits_to_keep=1)


def decode(model: Chat, cache: DynamicCache, tokens: torch.Tensor) -> torch.Tensor:
    """Reads `tokens` (1, L) one by one, as generation does; logits of the last. The cache is afterwards as before."""
    for token in tokens.split(1, dim=1):
        logits = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    cache.crop(-tokens.shape[1])
    return logits


def token_rows(options: Options) -> Iterator[Row]:
    """The first token, those after, and both as `generate` gives them."""
    ours, native = build_pair(VISION, TEXT, options)
    models = {"ours": ours, "peer": native}
    ids, pixel_values = prompt_of(1, PROMPT, ours, ours.num_image_token), pixels_for(ours, 1)
    calls = {way: partial(read_prompt, model, ids, pixel_values) for way, model in models.items()}
    difference = require_equal(calls["ours"]().logits, calls["peer"]().logits)
    decoder = f"{sum(p.numel() for p in ours.language_model.parameters()) / 1e9:.1f} B decoder"
    name = f"prefill of one tile and {PROMPT} tokens, {decoder}, against native"
    yield speed_row(name, **calls, options=options, target=1.0, warmups=1, largest_difference=difference)

    tokens = random_ids(NEW_TOKENS, TEXT["vocab_size"], 3, options.device)
    calls = {
        way: partial(decode, model, read_prompt(model, ids, pixel_values).past_key_values, tokens)
        for way, model in models.items()
    }
    difference = require_equal(calls["ours"](), calls["peer"]())
    name = f"decode of {NEW_TOKENS} tokens, {decoder}, against native"
    yield speed_row(name, **calls, options=options, target=1.0, warmups=1, largest_difference=difference)

    calls = {
        way: partial(model.generate, ids, pixel_values=pixel_values, max_new_tokens=NEW_TOKENS, do_sample=False)
        for way, model in models.items()
    }
    if not torch.equal(calls["ours"](), calls["peer"]()):
        raise SystemExit("The two models generate different tokens: nothing to compare.")
    name = f"`generate` of {NEW_TOKENS} tokens after one tile, {decoder}, against native"
    yield speed_row(name, **calls, options=options, target=1.0, warmups=0)

    batch = padded_prompts(BATCH_PROMPTS, ours)
    calls = {
        way: partial(model.generate, **batch, max_new_tokens=NEW_TOKENS, do_sample=False)
        for way, model in models.items()
    }
    if not torch.equal(calls["ours"](), calls["peer"]()):
        raise SystemExit("The two models generate different tokens for a batch: nothing to compare.")
    name = f"`generate` of {NEW_TOKENS} tokens for {len(BATCH_PROMPTS)} unequal prompts at once, {decoder}"
    yield speed_row(f"{name}, against native", **calls, options=options.at_most(5), target=1.0, warmups=0)


def converse(model: Chat, pixel_values: torch.Tensor, opening: torch.Tensor, keeps_cache: bool) -> torch.Tensor:
    """All ids of a conversation; with `keeps_cache` each turn starts from the cache of the last, without images."""
    vocab_size, ids = model.config.text_config.vocab_size, opening
    cache = DynamicCache(config=model.config.text_config) if keeps_cache else None
    for turn in range(TURNS):
        if turn:
            ids = torch.cat([ids, random_ids(QUESTION, vocab_size, 10 + turn, ids.device)], dim=1)
        given: dict[str, Any] = {} if keeps_cache and turn else {"pixel_values": pixel_values}
        given |= {"past_key_values": cache} if keeps_cache else {}
        mask = torch.ones_like(ids)
        ids = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, **given)
    return ids


def conversation_row(options: Options) -> Row:
    """Ours keeps the cache between turns, native reads and encodes everything again."""
    ours, native = build_pair(CONVERSATION_VISION, CONVERSATION_TEXT, options)
    tiles = sum(TILES)
    opening, pixel_values = prompt_of(tiles, QUESTION, ours, ours.num_image_token), pixels_for(ours, tiles)
    keep = partial(converse, ours, pixel_values, opening, True)
    read_again = partial(converse, native, pixel_values, opening, False)
    if not torch.equal(keep(), read_again()):
        raise SystemExit("The two conversations differ: nothing to compare.")
    turns = f"conversation of {TURNS} turns about {len(TILES)} images of {TILES[0]} tiles"
    name = f"{turns}, against native reading all again"
    return speed_row(name, keep, read_again, options.at_most(2), target=4.0, warmups=0)


def ask_all(model: InternVLChatForConditionalGeneration, pixel_values: torch.Tensor, cache_bytes: int) -> torch.Tensor:
    """Answers of as many clients as a conversation has turns, each with a question of its own about the same images.

    What was kept before is forgotten: the first client pays for the images.
    """
    model.image_feature_cache_bytes = cache_bytes
    answers = []
    for client in range(TURNS):
        question = random_ids(QUESTION, model.config.text_config.vocab_size, 20 + client, model.device)
        places = torch.full_like(question[:, :1], IMAGE_TOKEN_ID).expand(-1, len(pixel_values) * model.num_image_token)
        ids = torch.cat([places, question], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixel_values}
        answers.append(model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False))
    return torch.cat(answers)


def clients_row(options: Options) -> Row:
    """Several clients ask about one image, with and without the cache of its features."""
    model, tiles = build_chat(CONVERSATION_VISION, CONVERSATION_TEXT, options), TILES[0]
    kept, encoded_again = (partial(ask_all, model, pixels_for(model, tiles), size) for size in (CACHE_BYTES, 0))
    if not torch.equal(kept(), encoded_again()):
        raise SystemExit("The cache changes the answers: nothing to compare.")
    name = f"{TURNS} clients ask about one image of {tiles} tiles: features kept, against encoded for each"
    return speed_row(name, kept, encoded_again, options.at_most(3), warmups=0)


@torch.no_grad()
def rows(options: Options) -> Iterator[Row]:
    """Tokens, then the conversation and the clients."""
    yield from token_rows(options)
    yield conversation_row(options)
    yield clients_row(options)
