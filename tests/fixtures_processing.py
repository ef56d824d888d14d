"""A small processor and short ways to write messages, for the tests of calls and of dialogues."""

from typing import Any

import numpy as np

from internvl.conversation_internvl import get_conversation_template
from internvl.image_processing_internvl import InternVLImageProcessor
from internvl.processing_internvl import InternVLProcessor

from .fixtures_text import make_image, make_tokenizer


SEQ = 4  # image tokens of one tile
SIDE = 28
SQUARE, WIDE = make_image(32, 32), make_image(96, 32, seed=1)  # 1 tile; 3 tiles and a thumbnail


def make_processor(
    template: str = "internvl", tokenizer: Any = None, side: int = SIDE, **kwargs: Any
) -> InternVLProcessor:
    return InternVLProcessor(
        image_processor=InternVLImageProcessor(size={"height": side, "width": side}, max_num=6),
        tokenizer=make_tokenizer() if tokenizer is None else tokenizer,
        chat_template=get_conversation_template(template).to_jinja(),
        **{"image_seq_length": SEQ, **kwargs},
    )


def span(tiles: int) -> str:
    return "<img>" + "<IMG_CONTEXT>" * (SEQ * tiles) + "</img>"


def decoded(processor: InternVLProcessor, ids: Any, mask: Any = None) -> str:
    ids = [index for row in [ids] for index in (row.tolist() if hasattr(row, "tolist") else row)]
    if mask is not None:
        ids = [index for index, kept in zip(ids, mask.tolist(), strict=True) if kept]
    return processor.tokenizer.decode(ids)


def user(*parts: Any) -> dict[str, Any]:
    """A message of the user: strings are texts, lists and arrays videos, other things images."""
    content = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        elif isinstance(part, (list, np.ndarray)):
            content.append({"type": "video", "video": part})
        else:
            content.append({"type": "image", "image": part})
    return {"role": "user", "content": content}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def chat(processor: InternVLProcessor, conversation: Any, **kwargs: Any) -> Any:
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt", **kwargs}
    return processor.apply_chat_template(conversation, **settings)
