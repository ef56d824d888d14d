"""A tiny byte-level tokenizer and what is built from it; shared by the tests of texts and dialogues."""

from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


IMAGE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>")
TURN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CORPUS = [
    "What is shown in the image? A red bus on a street. How many people are there? Answer briefly.",
    "summarize:a photo of a cat English caption: You are a careful assistant.",
    "USER: hello ASSISTANT: hello system user assistant Frame1: Frame2:",
]


@cache
def _trained() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend.to_str()


def make_tokenizer(
    special_tokens: tuple[str, ...] = (*TURN_TOKENS, *IMAGE_TOKENS),
    add_bos: bool = True,
    add_eos: bool = False,
    **kwargs: Any,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of some 300 tokens; like LLaMA's it may put `<s>` in front and `</s>` behind."""
    backend = Tokenizer.from_str(_trained())
    template = " ".join((["<s>"] if add_bos else []) + ["$A"] + (["</s>"] if add_eos else []))
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **kwargs}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special_tokens)})
    return tokenizer


def make_image(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    """A noise image; a square one gives one tile, a wide one several."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
