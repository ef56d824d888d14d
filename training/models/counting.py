"""Counts the floating-point operations of what runs inside, in a real step as on the meta device."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


aten = torch.ops.aten
# Attention of CPUs, which torch's registry leaves out; the first arguments are those of GPUs.
FORMULAS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of all operations, by torch's formulas.

    torch's `FlopCounterMode` has the same formulas, but follows modules by hooks, which nested checkpoints trip over.
    What custom kernels compute (flash-attn's package, 4-bit layers) is not seen.

    Attributes:
        flops: Of all operations so far.
        repeated_flops: Of those, what checkpoints compute again in the backward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.repeated_flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if formula := FORMULAS.get(function._overloadpacket):
            flops = formula(*args, **kwargs, out_val=output)
            self.flops += flops
            # A backward pass has no gradients itself; what a checkpoint computes again in it has.
            is_backward = torch._C._current_graph_task_id() != -1
            self.repeated_flops += flops if is_backward and torch.is_grad_enabled() else 0
        return output
