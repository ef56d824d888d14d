"""Where the features of images go among the embeddings of a text, and what is said when they do not fit."""

from collections.abc import Callable

import torch

from .conversation_internvl import IMAGE_CONTEXT_TOKEN


PLACEHOLDERS_HINT = (
    "The number of image placeholders in the text differs from that of the image features. Pass the tiles of every picture in the text, "
    "in order, and do not truncate the text. Run it uncompiled to see the numbers."
)
TILES_HINT = "`num_patches` does not sum to the number of tiles in `pixel_values`."
NO_IMAGE_TOKEN = (
    "`config.image_token_id` is not set, so pictures have no place in the text. Set it to the id of "
    f"`{IMAGE_CONTEXT_TOKEN}` in the tokenizer, or convert the checkpoint with `--image-token-id`."
)


def on_host(number: torch.Tensor) -> int | torch.Tensor:
    """The value of a single number; the tensor itself where there is none to read yet: in compiled or captured code, on the meta device."""
    is_captured = number.is_cuda and torch.cuda.is_current_stream_capturing()
    return number if torch.compiler.is_compiling() or number.is_meta or is_captured else int(number)


def check(condition: bool | torch.Tensor, hint: str, message: Callable[[], str]) -> None:
    """Stops unless `condition` holds.

    A value of the host stops by a `ValueError` with `message()`, whatever device the model is on, and leaves the device as it was. A
    tensor, of compiled or captured code, is asserted by the device, which prints `hint`; on CUDA no kernel runs in that process after.

    Args:
        condition: A boolean, or one as a tensor ().
        hint: What was expected and what to do, less than 256 characters, without numbers of the batch.
        message: The same with numbers.

    Raises:
        ValueError: It does not hold.
    """
    if isinstance(condition, torch.Tensor):
        torch._assert_async(condition, hint)
    elif not condition:
        raise ValueError(message())
