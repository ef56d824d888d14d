"""Reasons for skips that several specifications share: {transformers' message: what it means here}."""

MACHINE = {
    "test requires *accelerator*": "needs a GPU, or several",
    "test requires * kernels library": "needs the `kernels` library and a GPU",
    "test requires the kernels library": "needs the `kernels` library and a GPU",
    "test requires Flash Attention*": "needs a GPU and flash-attn",
    "test requires MPS": "needs an Apple GPU",
    "test requires deepspeed": "needs DeepSpeed",
    "test is slow": "compiles on a GPU, or loads our code in a process that trusts none",
    "Test requires torchao": "needs torchao",
}
NO_SUCH_PART = {
    "No conversion found for *": "parameters have their published names, so nothing is renamed on loading",
    "No sequence-to-sequence language modeling head*": "no encoder-decoder",
    "*does not support grouped_mm": "no mixture of experts",
    "*has no sparse experts*": "no mixture of experts",
    "Not an MoE model": "no mixture of experts",
    "*has no `output_router_logits`*": "no mixture of experts",
    "*_keep_in_fp32_modules*": "no part must stay in fp32",
    "*does not support sliding window mask": "no sliding window",
    "*no axial RoPE*": "the vision tower has learned positions",
    "*does not have position embeddings": "learned positions are resized: tests/test_modeling_internvit.py",
}
NO_TEXT = {
    "No decoder-only language modeling head*": "no language model in it",
    "This model doesn't use `inputs_embeds`": "takes images",
    "*does not support RoPE scaling": "no rotary positions",
    "*does not have RoPE": "no rotary positions",
    "test_resize_embeddings is set to `False`": "no token embeddings",
}
NOT_COMPOSITE = {
    "Model is not a composite model.": "one configuration, no parts",
    "This model is not composite": "one configuration, no parts",
    "No subconfigs*": "one configuration, no parts",
    "*does not support SDPA": "the message of a test for composite models; SDPA is tested by the others",
}
