"""Muon for matrices and AdamW for the rest in one optimizer, so that schedules, clipping and checkpoints see only one.

On the default checkpoint it needs about a third of AdamW's steps before answers begin to depend on the image.
torch has a `Muon` since 2.9, but for matrices alone.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn


# Quintic iteration of Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon/).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# Makes the update as large as AdamW's usually is (https://arxiv.org/abs/2502.16982, section 2.2).
_RMS_OF_ADAMW = 0.2


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Move the singular values of matrices close to 1 (between 0.7 and 1.2), keeping their directions.

    Args:
        matrices: (..., rows, columns).

    Returns:
        bfloat16 matrices of the same shape.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon with Nesterov momentum for groups with `use_muon`, AdamW for the others (see `parameter_groups`).

    Args:
        groups: Parameter groups, each a dictionary with `params` and `use_muon`.
        lr: Learning rate of both.
        betas: AdamW's decay rates.
        momentum: Muon's momentum.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self,
        groups: Iterable[dict],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.98),
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("`MuonWithAdamW` takes no `closure`: compute the gradients before `step()`.")
        for group in self.param_groups:
            update = self._muon_update if group["use_muon"] else self._adamw_update
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update(parameter, group), alpha=-group["lr"])

    def _muon_update(self, parameter: nn.Parameter, group: dict) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        direction = parameter.grad.lerp(state["momentum"], group["momentum"]).flatten(1)  # a convolution as a matrix
        scale = _RMS_OF_ADAMW * math.sqrt(max(direction.shape))
        return (orthogonalize(direction).to(parameter.dtype) * scale).view_as(parameter)

    def _adamw_update(self, parameter: nn.Parameter, group: dict) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["mean"] = torch.zeros_like(parameter)
            state["square"] = torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["mean"].lerp_(parameter.grad, 1 - beta1)
        state["square"].lerp_(parameter.grad.square(), 1 - beta2)
        count = state["step"].item()
        deviation = (state["square"] / (1 - beta2**count)).sqrt_().add_(1e-8)
        return state["mean"] / (1 - beta1**count) / deviation
