"""InternVL-Chat in the full configuration: the queries of QLLaMA, then the patches; the decoder is dense."""

from specs import chat
from specs.qllama import NUM_QUERIES, SIZES


CONFIG, MODELS, AUTO = chat.CONFIG, chat.MODELS, chat.AUTO
GROUPS = ("model", "generation", "training", "tensor_parallel")


def make_config(config_class: type) -> object:
    return config_class(
        vision_config=dict(chat.VISION),
        text_config=dict(chat.TEXT),
        qllama_config=dict(SIZES),
        connector="queries_and_patches",
        projector_type="mlp2x_gelu",
        image_token_id=chat.IMAGE_TOKEN,
    )


make_inputs = chat.make_inputs
TESTER = {**chat.TESTER, "num_image_tokens": NUM_QUERIES + chat.IMAGE_TOKENS}
MODEL_ATTRS = chat.MODEL_ATTRS
RANDOM_IDS_BELOW = chat.RANDOM_IDS_BELOW
EXPERT_TESTS = (
    *(f"test_eager_matches_batched_and_grouped_inference_{case}" for case in ("0_fp16", "1_fp32", "2_bf16")),
    "test_moe_models_record_router_logits",
)
NOT_RUN = {**chat.NOT_RUN, **dict.fromkeys(EXPERT_TESTS, "the decoder is dense; `chat` has one with experts")}
SKIPS = chat.SKIPS
