"""Loading and saving of every model class: published arguments are understood, saved folders are self-contained."""

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from logging import LogRecord
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import is_flash_attn_2_available, logging


logger = logging.get_logger(__name__)

# Arguments of `from_pretrained` that say where the files beside the weights are. No token, which must not be saved.
SOURCE_SETTINGS = ("subfolder", "revision", "cache_dir", "local_files_only")

# The mixin calls methods of `PreTrainedModel`: type checkers see a subclass, at run time it stands before it.
_PreTrained: Any = PreTrainedModel if TYPE_CHECKING else object


class OwnParameters(nn.Module):
    """Lists the parameters that a model holds directly, such as learned queries, as one of its parts.

    PEFT's prompt methods (as of 0.21.2) freeze a model part by part, and would train the parameters of no part. To all
    others this is an empty module, so that the names of the parameters stay as published.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # The dictionary itself: a parameter that is replaced is replaced here as well.
        self._of_model = model._parameters

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self._of_model.values() if parameter is not None)


def loaded_parameter(model: nn.Module, name: str) -> torch.Tensor:
    """Returns a parameter that a model holds directly, also where it is offloaded.

    accelerate loads the parameters of a module for the time of its `forward`, which does not run where a model is
    called by another method.
    """
    parameter: torch.Tensor = getattr(model, name)
    loading = next((hook for hook in _hooks_of(model) if getattr(hook, "offload", False)), None)
    if not parameter.is_meta or loading is None:
        return parameter
    return loading.weights_map[name].to(loading.execution_device)


def _hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """accelerate's hooks of a module: none, one, or several in a row."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


class HubModelMixin(_PreTrained):
    """Loading with published arguments, saving with code; list it before `PreTrainedModel`.

    `_text_part` is the part that reads texts, if a model has several.

    `_auto_class` makes transformers copy the code into a saved folder. `_modules_kept_unquantized` holds full dotted
    paths: quantising the vision tower, the projector, the queries or a head costs more accuracy than it saves memory.
    It is put into every `quantization_config` that does not say which modules to skip.
    """

    config: Any
    # Every model runs on every attention kernel, and with activation checkpointing.
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _auto_class: str | None = "AutoModel"
    _modules_kept_unquantized: tuple[str, ...] = ()
    _text_part: str | None = None
    # The folder or repository of `from_pretrained`, and how to reach it; empty for a model built in memory.
    _source: dict[str, Any] = {}  # noqa: RUF012  (never changed, only replaced)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As in torch, but the part that reads texts comes first.

        PEFT's prompt methods (as of 0.21.2) take the first model among the parts for it. Parameters keep their order,
        which optimizers and sums of gradients depend on.
        """
        parts = dict(super().named_children())
        first = {name: parts.pop(name) for name in (self._text_part,) if name in parts}
        yield from {**first, **parts}.items()

    @property
    def device(self) -> torch.device:
        """As in transformers; where the first weights are offloaded, and lie on "meta", the device that computes with
        them.
        """
        device: torch.device = super().device
        if device.type != "meta":
            return device
        places = (getattr(hook, "execution_device", None) for part in self.modules() for hook in _hooks_of(part))
        return next((torch.device(place) for place in places if place is not None), device)

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
            use_flash_attn: True means FlashAttention 2 if it is installed, else "sdpa", with one warning.
            load_in_8bit: bitsandbytes int8 for all but the parts named above; `quantization_config` has other
                settings.
            load_in_4bit: The same with nf4.
            **kwargs: As in transformers.

        Raises:
            ValueError: More than one of `load_in_8bit`, `load_in_4bit` and `quantization_config`; another kind of
                model.
        """
        folder = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        own: Any = _class_in_folder(cls, folder, kwargs)
        if own is not cls:
            flags = {"use_flash_attn": use_flash_attn, "load_in_8bit": load_in_8bit, "load_in_4bit": load_in_4bit}
            return own.from_pretrained(*args, **flags, **kwargs)
        _check_kind(cls, folder, kwargs)
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
            )
        if kwargs.get("quantization_config") is not None:
            kept = cls._modules_kept_unquantized
            kwargs["quantization_config"] = _with_default_skip_list(kwargs["quantization_config"], kept)
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
        if getattr(model, "is_loaded_in_8bit", False):
            # bitsandbytes (as of 0.50.2) warns for every layer in every step that int8 casts its inputs.
            logging.get_logger("bitsandbytes.autograd._functions").addFilter(_is_first)
        if folder is not None:
            model._source = {
                "folder": str(folder),
                **{name: kwargs[name] for name in SOURCE_SETTINGS if name in kwargs},
            }
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the folder can be moved and loads anywhere, through every Auto class, with the code in
        it.

        The saved `auto_map` names the files beside it, not those of the repository that the model came from.
        """
        _restore_scales_for_bitsandbytes(self)
        own = self.config
        self.config = copy.deepcopy(own)  # transformers writes into it what it saves
        self.config.auto_map = dict(type(own).hub_auto_map)
        try:
            with _readable_by_torchao(getattr(self, "hf_quantizer", None)):
                super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config = own


def _class_in_folder(cls: Any, folder: Any, settings: dict[str, Any]) -> Any:
    """The class of this name in a folder's code, if that code is trusted.

    The Auto classes of transformers (as of 5.23.0) register a remote model class under its configuration class, which
    two folders of one name share if their configuration code is equal: the second would get the model class of the
    first.
    """
    package, file = cls.__module__.partition(".")[0], cls.__module__.rpartition(".")[2]
    is_trusted = package == "transformers_modules" and settings.get("trust_remote_code")
    if not is_trusted or folder is None or not os.path.isfile(os.path.join(folder, f"{file}.py")):
        return cls
    return get_class_from_dynamic_module(f"{file}.{cls.__name__}", folder)


def _check_kind(cls: Any, folder: Any, settings: dict[str, Any]) -> None:
    """Refuses a checkpoint of another kind of model, which transformers would load as far as names agree."""
    config, wanted = settings.get("config"), cls.config_class
    if isinstance(config, PretrainedConfig):
        found: Any = config.model_type
    elif folder is None:
        return
    else:
        source = {name: settings[name] for name in (*SOURCE_SETTINGS, "token") if name in settings}
        written, _ = PretrainedConfig.get_config_dict(config or folder, **source)
        # A composite checkpoint may give one of its parts.
        found = wanted.model_type if wanted.base_config_key in written else written.get("model_type")
    if found not in (None, "", wanted.model_type, *wanted.published_model_types):
        raise ValueError(
            f"`{folder}` holds a model of the kind '{found}', but {cls.__name__} loads '{wanted.model_type}'. Load it "
            f"with `AutoModel`, or name a folder of the kind '{wanted.model_type}'."
        )


_said: set[str] = set()


def _is_first(record: LogRecord) -> bool:
    """Whether a logger gives a message for the first time."""
    message = record.getMessage()
    is_first = message not in _said
    _said.add(message)
    return is_first


# Names of the list of modules to skip in the configurations of transformers' quantisers.
_SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert")


def _with_default_skip_list(config: Any, kept: tuple[str, ...]) -> Any:
    """The configuration if it lists modules to skip (also an empty list), else a copy that skips `kept`."""
    if isinstance(config, dict):
        config = AutoQuantizationConfig.from_dict(config)
    for name in _SKIP_LISTS:
        if hasattr(config, name) and getattr(config, name) is None:
            config = copy.deepcopy(config)
            setattr(config, name, list(kept))
    return config


def _restore_scales_for_bitsandbytes(model: nn.Module) -> None:
    """Brings 4-bit scales back into the order in which they are saved.

    On a CPU with bf16 instructions bitsandbytes packs weights and scales in the first forward
    (bitsandbytes-foundation/bitsandbytes#1804). Its inverse, which runs on saving, restores the scales only with
    double quantisation: without this, the saved model and the model in memory would answer nonsense. Needed up to
    0.50.2 at least, until `_convert_weight_packed_for_cpu_inverse` restores `absmax` in both cases.
    """
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False) and not state.original_nested:
            state.absmax = state.absmax.T.reshape(-1).float()


@contextmanager
def _readable_by_torchao(quantizer: Any) -> Iterator[None]:
    """Saves a torchao model so that it loads again.

    torchao lists all tensors in the header of the file and splits each name at its last dot on loading (since
    pytorch/ao#3282), which fails on parameters that the model holds directly (`query_tokens`, `logit_scale`). These
    are plain tensors, which need not be listed. Needed up to 0.18.0 at least, until names without a dot are accepted.
    """
    if quantizer is None:
        yield
        return
    collect = quantizer.get_state_dict_and_metadata

    def collect_dotted(model: PreTrainedModel) -> tuple[Any, dict[str, str]]:
        state, metadata = collect(model)
        if "tensor_names" in metadata:
            names = [name for name in json.loads(metadata["tensor_names"]) if "." in name]
            metadata = {**metadata, "tensor_names": json.dumps(names)}
        return state, metadata

    quantizer.get_state_dict_and_metadata = collect_dotted
    try:
        yield
    finally:
        del quantizer.get_state_dict_and_metadata


def _attention_for(use_flash_attn: bool) -> str:
    if use_flash_attn and is_flash_attn_2_available():
        return "flash_attention_2"
    if use_flash_attn:
        logger.warning_once("`use_flash_attn=True` was given, but flash-attn is not usable here: using 'sdpa'.")
    return "sdpa"
