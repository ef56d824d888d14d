"""What is known of published checkpoints, as data."""

from typing import Any


# ------------------------------------------------------------------------------------------------------------- tensors
# Buffers that old releases of transformers saved and every model computes again.
DERIVED_BUFFERS = ("rotary_emb.inv_freq",)
# Parts of names by which adapters of PEFT, wrapped into a checkpoint, are known.
LORA_MARKS = ("lora_A.", "lora_B.", "lora_embedding_", "base_model.model.")

# ------------------------------------------------------------------------------------------------------ configurations
# `PretrainedConfig` once wrote all of its own keys into every nested configuration. These say nothing, whatever their value:
# they belong to the machine, the code or the release that wrote the file.
MEANINGLESS_KEYS = frozenset(
    "_name_or_path _commit_hash _attn_implementation_internal _attn_implementation_autoset _experts_implementation_internal "
    "architectures attn_implementation auto_map dtype torch_dtype transformers_version".split()
)
# These say nothing where they hold their old default.
OLD_DEFAULTS: dict[str, Any] = {
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "finetuning_task": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "output_attentions": False,
    "output_hidden_states": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "return_dict": True,
    "sep_token_id": None,
    "task_specific_params": None,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tokenizer_class": None,
    "torchscript": False,
    "use_bfloat16": False,
}
# The same for a vision tower, which has no tokens.
OLD_VISION_DEFAULTS: dict[str, Any] = {
    **OLD_DEFAULTS,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}
# Settings of `generate`, with the defaults of old; others than these move to generation_config.json.
OLD_GENERATION_DEFAULTS: dict[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_scores": False,
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict_in_generate": False,
    "suppress_tokens": None,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
}
# Of these, searches that transformers itself no longer has.
REMOVED_GENERATION_KEYS = ("diversity_penalty", "num_beam_groups")

# ---------------------------------------------------------------------------------------------------------- tokenizers
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
# Slow tokenizers that are a sentencepiece model and added tokens; InternLM2's came as remote code.
SENTENCEPIECE_TOKENIZERS = ("LlamaTokenizer", "InternLM2Tokenizer")

# ---------------------------------------------------------------------------------------------------------- Auto classes
# Those of the models are part of their configurations (`hub_auto_map`).
IMAGE_PROCESSOR_AUTO_MAP = {"AutoImageProcessor": "image_processing_internvl.InternVLImageProcessor"}
PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_internvl.InternVLProcessor"}
