"""Tiny checkpoints as they would be downloaded: golden weights, a tokenizer and a preprocessor_config.json."""

import io
import json
import random
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from .fixtures_text import CORPUS, make_tokenizer


GOLDEN = Path(__file__).parent / "golden"
IMAGE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>")
# As published, but for the size.
PREPROCESSOR = {
    "crop_size": 56,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 56,
}


@cache
def sentencepiece_model(num_unused: int = 0) -> bytes:
    """A LLaMA-like tokenizer.model of some 300 pieces; the first after `</s>` are unused ones, as InternLM2 has."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=written,
        vocab_size=330,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        pad_id=-1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        user_defined_symbols=[f"[UNUSED_TOKEN_{index}]" for index in range(num_unused)],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return written.getvalue()


def write_sentencepiece_tokenizer(folder: Path, special: dict[int, str], num_unused: int = 0, **settings: Any) -> None:
    """Files of a slow tokenizer as transformers 4.37 saved them: tokenizer.model and a list of added tokens."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(num_unused))
    content = {0: "<unk>", 1: "<s>", 2: "</s>", **special}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokenizer_config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(index): {"content": text, **flags} for index, text in content.items()},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "LlamaTokenizer",
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


LLAMA_TOKENS = {330: "<img>", 331: "</img>", 332: "<IMG_CONTEXT>"}
INTERNLM2_TOKENS = {3: "<|im_end|>", 4: "<|im_start|>", **LLAMA_TOKENS}


@cache
def _slow_tokenizer(folder: Path) -> tuple[Any, dict[str, int], re.Pattern]:
    from sentencepiece import SentencePieceProcessor

    decoder = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    ids = {token["content"]: int(index) for index, token in decoder.items()}
    pattern = re.compile("(" + "|".join(map(re.escape, ids)) + ")")
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model")), ids, pattern


def slow_ids(folder: Path, text: str) -> list[int]:
    """What the published slow tokenizer gives: sentencepiece over the stretches between added tokens, one by one."""
    processor, ids, pattern = _slow_tokenizer(folder)
    parts = [part for part in pattern.split(text) if part]
    return [1] + [index for part in parts for index in ([ids[part]] if part in ids else processor.encode(part))]


def published(case: str, folder: Path, with_preprocessor: bool = True, **config: Any) -> Path:
    """A copy of a golden checkpoint, changed keys of config.json included."""
    source = folder / f"published_{case}"
    source.mkdir(parents=True)
    for file in (GOLDEN / case).iterdir():
        if file.name not in ("io.safetensors", "case.json"):
            shutil.copyfile(file, source / file.name)
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, **config}))
    if with_preprocessor:
        (source / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return source


def published_chat(folder: Path, **config: Any) -> Path:
    """InternVL-Chat with Qwen2 and a fast byte-level tokenizer."""
    source = published("chat_qwen2_v2", folder, **config)
    make_tokenizer(add_bos=False, eos_token="<|endoftext|>").save_pretrained(source)
    return source


def published_14b(folder: Path, **config: Any) -> Path:
    """InternVL-14B with a slow LLaMA tokenizer."""
    source = published("internvl_14b", folder, **config)
    write_sentencepiece_tokenizer(source, {})
    return source


def random_lines(special: list[str], count: int) -> list[str]:
    """Words, digits, scripts, emoji, control characters, runs of spaces, and special tokens whole and broken."""
    generator = random.Random(0)
    ranges = [
        (0x20, 0x7E),
        (0x20, 0x7E),
        (0xA0, 0x17F),
        (0x400, 0x44F),
        (0x5D0, 0x6FF),
        (0x4E00, 0x4FFF),
        (0x1F600, 0x1F64F),
        (1, 31),
    ]
    words = [
        "What",
        " is",
        " shown",
        "in",
        " the",
        "image",
        "?",
        "summarize:",
        "a photo",
        " 12345.67",
        "\n\n",
        "   ",
        "\t",
        "\u2581",
    ]

    def piece() -> str:
        kind = generator.random()
        if kind < 0.5:
            return generator.choice(words)
        if kind < 0.6:
            token = generator.choice(special)
            return token if generator.random() < 0.7 else token[: generator.randrange(1, len(token))]
        first, last = generator.choice(ranges)
        return "".join(chr(generator.randint(first, last)) for _ in range(generator.randrange(1, 6)))

    return ["".join(piece() for _ in range(generator.randrange(1, 12))) for _ in range(count)]
