"""What every model class of the package adds to loading and saving: published arguments in, self-contained folders out."""

import os
from typing import TYPE_CHECKING, Any

from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available, logging


logger = logging.get_logger(__name__)

# The mixin calls what `PreTrainedModel` brings; for type checkers it is one, at run time it stands in front of it.
_PreTrained: Any = PreTrainedModel if TYPE_CHECKING else object


class HubModelMixin(_PreTrained):
    """Loading with published arguments, saving with code; list it before `PreTrainedModel`.

    `_auto_class` makes transformers copy the code into a saved folder. `_modules_kept_unquantized` holds full dotted paths:
    quantising the vision tower, the projector, the queries or a head costs more accuracy than it saves memory.
    """

    _auto_class: str | None = "AutoModel"
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
            *args: As in transformers.
            use_flash_attn: True asks for FlashAttention 2 where it is installed, else for "sdpa", with one warning.
            load_in_8bit: bitsandbytes int8 for all but the parts named above; for other settings pass `quantization_config`.
            load_in_4bit: The same with nf4.
            **kwargs: As in transformers.

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

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the folder can be moved and loads anywhere, through every Auto class, with its own code.

        Whatever repository the model came from, the saved `auto_map` names the files beside it.
        """
        self.config.auto_map = dict(type(self.config).hub_auto_map)
        super().save_pretrained(save_directory, *args, **kwargs)


def _attention_for(use_flash_attn: bool) -> str:
    if not use_flash_attn:
        return "sdpa"
    if is_flash_attn_2_available():
        return "flash_attention_2"
    logger.warning_once("`use_flash_attn=True` was asked for, but flash-attn is not usable here: using 'sdpa'.")
    return "sdpa"
