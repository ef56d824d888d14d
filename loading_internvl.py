"""Arguments of `from_pretrained` that published snippets pass and transformers itself no longer takes."""

from typing import Any

from transformers import BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available, logging


logger = logging.get_logger(__name__)


class PublishedLoadingMixin:
    """Maps `use_flash_attn`, `load_in_8bit` and `load_in_4bit` to today's arguments; list it before `PreTrainedModel`.

    `_modules_kept_unquantized` holds full dotted paths: quantising the vision tower, the projector, the queries or a head costs
    more accuracy than it saves memory.
    """

    _modules_kept_unquantized: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(
        cls,
        *args: Any,
        use_flash_attn: bool | None = None,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, plus the published arguments.

        Args:
            use_flash_attn: True asks for FlashAttention 2 where it is installed, else for "sdpa", with one warning.
            load_in_8bit, load_in_4bit: bitsandbytes int8 or nf4 with the parts named above left in bf16; for other settings pass
                `quantization_config` instead.

        Raises:
            ValueError: `load_in_8bit` and `load_in_4bit` together, or beside a `quantization_config`.
        """
        if use_flash_attn is not None:
            kwargs.setdefault("attn_implementation", _attention_for(use_flash_attn))
        if load_in_8bit or load_in_4bit:
            if (load_in_8bit and load_in_4bit) or kwargs.get("quantization_config") is not None:
                raise ValueError("Give only one of `load_in_8bit`, `load_in_4bit` and `quantization_config`.")
            kwargs["quantization_config"] = BitsAndBytesConfig(
                load_in_8bit=load_in_8bit,
                load_in_4bit=load_in_4bit,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype="bfloat16",
                llm_int8_skip_modules=list(cls._modules_kept_unquantized),
            )
        return super().from_pretrained(*args, **kwargs)


def _attention_for(use_flash_attn: bool) -> str:
    if not use_flash_attn:
        return "sdpa"
    if is_flash_attn_2_available():
        return "flash_attention_2"
    logger.warning_once("`use_flash_attn=True` was asked for, but flash-attn is not usable here: using 'sdpa'.")
    return "sdpa"
