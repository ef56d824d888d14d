"""The allow-list for JSON files of a source, applied where they are read.

A source is untrusted, and transformers follows some settings to code: `auto_map`, `_attn_implementation` (a kernel on
the Hub), `custom_pipelines`, `quantization_config`, `trust_remote_code`. So only data of a source reaches a model, a
result or its records: numbers and flags under any key, since they name nothing; texts and objects only under keys that
are known to hold data, or that transformers' class of this configuration declares.
"""

import re
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from transformers import CONFIG_MAPPING

from ...configuration_internlm2 import InternLM2Config
from ...configuration_internvl import InternViTConfig, InternVLChatConfig, InternVLConfig, QLlamaConfig


# Arguments of the published training code's towers, by what they are called here.
RAW_ARGUMENTS = {
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "drop_path_rate": "drop_path_rate",
    "init_values": "initializer_factor",
}
# Prefixes of the LLaVA code base's keys among those of the decoder.
LLAVA_KEYS = ("mm_", "tune_mm_", "freeze_mm_", "unfreeze_mm_", "use_mm_", "image_", "vision_tower")
# Modules that a result may hold in any format, and the only ones that its `auto_map`s name.
OWN_MODULES = frozenset(
    "configuration_intern_vit configuration_internlm2 configuration_internvl configuration_internvl_chat "
    "image_processing_internvl "
    "modeling_intern_vit modeling_internlm2 modeling_internvit modeling_internvl modeling_internvl_chat "
    "modeling_qllama processing_internvl".split()
)


REFERENCE = re.compile(r"(?P<module>\w+)\.\w+")
# Flags that give consent are the user's to set.
CONSENTS = ("trust_remote_code", "use_kernels")
# Transformers looks such a name up in torch.
DTYPE_KEYS = ("torch_dtype", "dtype")
DTYPES = (None, "float32", "float16", "bfloat16", "float64")
# Properties of a token, and of one of several chat templates.
LABEL_FIELDS = frozenset("__type content id lstrip name normalized rstrip single_word special template".split())
# The only names of attention that stand for no kernel to download.
ATTENTION_KEYS = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def _fields_of(config_class: Any) -> frozenset[str]:
    """Settings that a class of configurations declares, but for its private ones."""
    declared = fields(config_class) if is_dataclass(config_class) else ()
    return frozenset(field.name for field in declared if not field.name.startswith("_"))


# A text where a number belongs passes, to be refused with its name where the number is used.
OWN_FIELDS = frozenset().union(
    *map(_fields_of, (InternViTConfig, QLlamaConfig, InternVLConfig, InternVLChatConfig, InternLM2Config)),
    RAW_ARGUMENTS,
    ("img_size", "num_classes"),
)


@dataclass(frozen=True)
class Allowed:
    """What passes in one kind of file besides numbers and flags.

    Args:
        texts: Keys whose texts, or lists of texts, are data.
        parts: Keys of objects that are looked at in the same way.
        labels: Keys of texts by name: tokens with their properties, templates, labels. What else is in them does not
            pass.
        endings: Ends of further keys of that kind.
    """

    texts: frozenset[str]
    parts: frozenset[str]
    labels: frozenset[str] = frozenset()
    endings: tuple[str, ...] = ()

    def holds_labels(self, key: str) -> bool:
        """Whether texts by name stand under a key."""
        return key in self.labels or (bool(self.endings) and key.endswith(self.endings))


CONFIGURATION = Allowed(
    texts=frozenset(
        "_commit_hash _name_or_path activation_function architectures classifier_pooling connector "
        "drop_path_schedule dtype "
        "feature_pyramid finetuning_task hidden_act hidden_activation layer_types mlp_layer_types model model_type "
        "norm_type out_features prefix problem_type projector_hidden_act projector_type ps_version rope_type "
        "stage_names template tokenizer_class torch_dtype transformers_version type vision_feature_select_strategy "
        # of the published training code's configurations, which are read and not passed on
        "CLS_TARGET PRETRAINED TYPE cls_target pretrained".split()
    ),
    parts=frozenset(
        "llm_config qllama_config rope_parameters rope_scaling text_config vision_config vision_tower_config "
        "DATA INTERN_VIT_6B MODEL auxiliary_head backbone decode_head fpn_variant full_attention model "
        "sliding_attention".split()
    ),
    labels=frozenset(("id2label", "label2id")),
)
GENERATION = Allowed(
    texts=frozenset(("cache_implementation", "early_stopping", "stop_strings", "transformers_version")),
    parts=frozenset(),
)
PROCESSOR = Allowed(
    texts=frozenset(
        "crop_size data_format feature_extractor_type image_mean image_processor_type image_std processor_class "
        "resample resize_mode "
        "size".split()
    ),
    parts=frozenset("crop_size feature_extractor image_mean image_processor image_std size video_processor".split()),
)
TOKENIZER = Allowed(
    texts=frozenset(
        "backend errors model_input_names name_or_path padding_side processor_class tokenizer_class "
        "truncation_side".split()
    ),
    parts=frozenset(("sp_model_kwargs",)),
    labels=frozenset(("added_tokens_decoder", "chat_template")),
    endings=("_token", "_tokens"),
)
# By name of the file; what is in no file of these is looked at where it is read, and passed on nowhere.
FILES = {
    **dict.fromkeys(("config.json", "llm_config.json", "vision_tower_config.json"), CONFIGURATION),
    "generation_config.json": GENERATION,
    **dict.fromkeys(
        ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"), PROCESSOR
    ),
    **dict.fromkeys(("special_tokens_map.json", "tokenizer_config.json"), TOKENIZER),
}


def only_data(name: str, content: dict[str, Any], refused: list[str] | None = None) -> dict[str, Any]:
    """What may be taken over from a file of a source: its content without what names code, or what nobody knows.

    `refused` takes the keys of what is left out.
    """
    allowed = FILES.get(name)
    return content if allowed is None else _data(content, allowed, [] if refused is None else refused, "")


def is_own_code(auto_map: Any) -> bool:
    """Whether an `auto_map` names nothing but modules that this package writes, in the folder itself."""
    if not isinstance(auto_map, dict) or not auto_map:
        return False
    matches = [REFERENCE.fullmatch(place) if isinstance(place, str) else None for place in auto_map.values()]
    return all(match is not None and match["module"] in OWN_MODULES for match in matches)


def _data(content: dict[str, Any], allowed: Allowed, refused: list[str], path: str) -> dict[str, Any]:
    kept = {}
    for key, value in content.items():
        if allowed.holds_labels(key):
            kept[key] = _labels(value, refused, f"{path}{key}")
        elif _passes(key, value, content, allowed):
            kept[key] = value
        elif isinstance(value, dict) and key not in DTYPE_KEYS and (key in allowed.parts or key in _declared(content)):
            kept[key] = _data(value, allowed, refused, f"{path}{key}.")
        else:
            refused.append(f"{path}{key}")
    return kept


def _labels(value: Any, refused: list[str], path: str) -> Any:
    """Keeps texts, numbers, and objects and lists of these; of nested objects, the fields of tokens and templates."""
    if isinstance(value, list):
        return [_labels(part, refused, path) for part in value]
    if not isinstance(value, dict):
        return value
    is_label = bool(value.keys() & {"content", "template"})
    kept = {}
    for key, part in value.items():
        is_object = isinstance(part, dict) and not part.keys() & {"content", "template"}
        if (
            key in ("auto_map", *CONSENTS)
            or is_object
            or (is_label and (key not in LABEL_FIELDS or isinstance(part, (dict, list))))
        ):
            refused.append(f"{path}.{key}")
        else:
            kept[key] = _labels(part, refused, f"{path}.{key}")
    return kept


def _passes(key: str, value: Any, content: dict[str, Any], allowed: Allowed) -> bool:
    if key in CONSENTS:
        return False
    if key == "auto_map":
        return is_own_code(value)
    if key in ATTENTION_KEYS:
        return value is None or (isinstance(value, str) and value in ATTENTIONS)
    if key in DTYPE_KEYS:
        return (value is None or isinstance(value, str)) and value in DTYPES
    if _is_number(value) or value in ({}, ""):
        return True
    # A text among numbers passes as well, to be refused where the numbers are used.
    is_text = isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(item, str) or _is_number(item) for item in value)
    )
    return is_text and (key in allowed.texts or key.startswith(LLAVA_KEYS) or key in _declared(content))


def _is_number(value: Any) -> bool:
    """Numbers and flags, also in lists."""
    if isinstance(value, list):
        return all(map(_is_number, value))
    return value is None or isinstance(value, (bool, int, float))


def _declared(content: dict[str, Any]) -> frozenset[str]:
    """Settings that the classes here declare, or transformers' own of this configuration."""
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return OWN_FIELDS
    return OWN_FIELDS | _fields_of(CONFIG_MAPPING[model_type])
