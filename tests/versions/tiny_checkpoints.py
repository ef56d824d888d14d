"""Writes tiny checkpoints with random weights, complete as a Hub repository is: code, weights, tokenizer, processor.

    python tests/versions/tiny_checkpoints.py OUT

makes OUT/chat, OUT/chat_full, OUT/chat_internlm2, OUT/contrastive and OUT/vision. The code in them is this
repository's.
"""

import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from fixtures_text import make_tokenizer  # noqa: E402

from internvl import (  # noqa: E402
    InternVisionModel,
    InternViTConfig,
    InternVLChatConfig,
    InternVLChatForConditionalGeneration,
    InternVLConfig,
    InternVLImageProcessor,
    InternVLModel,
    InternVLProcessor,
    QLlamaConfig,
)
from internvl.conversation_internvl import get_conversation_template  # noqa: E402


IMAGE_SIZE, IMAGE_TOKENS, WIDTH = 28, 4, 32
SIZES = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def build(model_class: type, config: object) -> PreTrainedModel:
    """A model whose weights are large enough that its answers vary with the input."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
            elif name.endswith(("ls1", "ls2")):
                parameter.fill_(1.0)
    return model


def write(model: PreTrainedModel, folder: Path, processor: InternVLProcessor | None = None) -> None:
    """A folder that needs nothing outside itself: saving brings the code along."""
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


def vision_config() -> InternViTConfig:
    return InternViTConfig(**SIZES, image_size=IMAGE_SIZE, patch_size=7)


def qllama_config(vocab_size: int) -> QLlamaConfig:
    return QLlamaConfig(**SIZES, vocab_size=vocab_size, num_query_token=5, vision_hidden_size=WIDTH)


def chat(
    decoder: str = "qwen2", text_settings: dict | None = None, **settings: object
) -> tuple[PreTrainedModel, InternVLProcessor]:
    tokenizer = make_tokenizer(add_bos=False)
    text_config = {
        **SIZES,
        "model_type": decoder,
        "vocab_size": len(tokenizer),
        "num_key_value_heads": 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        **(text_settings or {}),
    }
    config = InternVLChatConfig(
        vision_config=vision_config(),
        text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        template="internvl",
        **settings,
    )
    image_processor = InternVLImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, max_num=4)
    processor = InternVLProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        image_seq_length=config.num_image_token,
        chat_template=get_conversation_template("internvl").to_jinja(),
    )
    return build(InternVLChatForConditionalGeneration, config), processor


def contrastive() -> tuple[PreTrainedModel, InternVLProcessor]:
    tokenizer = make_tokenizer(special_tokens=(), add_eos=False)
    config = InternVLConfig(
        vision_config=vision_config(),
        qllama_config=qllama_config(len(tokenizer)),
        clip_embed_dim=24,
        attn_pool_num_heads=4,
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = InternVLImageProcessor(size=size, resize_mode="squash")
    processor = InternVLProcessor(image_processor=image_processor, tokenizer=tokenizer, mode="contrastive")
    return build(InternVLModel, config), processor


def main(out: Path) -> None:
    vocab_size = len(make_tokenizer())
    write(build(InternVisionModel, vision_config()), out / "vision")
    full = {"connector": "queries_and_patches", "qllama_config": qllama_config(vocab_size)}
    for name, (model, processor) in {
        "chat": chat(),
        "chat_full": chat("llama", **full),
        "chat_internlm2": chat("internlm2"),
        "contrastive": contrastive(),
    }.items():
        write(model, out / name, processor)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
