"""What a run gets through, for its log: samples, tokens and floating-point operations per second.

FLOPs are counted by torch's formulas in real steps. Every kind of batch (by the shapes of its tensors) is counted
once, at most one between two entries of the log; a step of a kind that is not counted yet is taken to be in proportion
to its tokens and image patches. Not seen: kernels that torch has no formula for.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator

from .models.counting import FlopCounter


# Peak of dense matrix products in bfloat16, TFLOP/s, by the names of devices; of the makers' data sheets.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "RTX 4090": 165,
    "MI300X": 1307,
    "MI250": 362,
}
PATCH_VALUES = 3 * 14 * 14
MAX_KINDS = 1000


def peak_flops() -> float | None:
    """Return the peak of this device in bfloat16; None where it is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((1e12 * peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


class Throughput:
    """Adds up what the steps between two entries of the log do.

    Args:
        peak: FLOP/s that the device can do; None leaves out the utilization.
        is_compiled: Whether the model is compiled, whose kernels cannot be looked into: counted steps run without.
    """

    def __init__(self, peak: float | None = None, is_compiled: bool = False) -> None:
        self.peak = peak
        self.is_compiled = is_compiled
        self._known: dict[Any, float] = {}
        self._counted_flops = self._counted_size = 0.0
        self._begin()

    def _begin(self) -> None:
        self._start: float | None = None
        self._samples = self._size_of_uncounted = self._flops = self._waited = self._paused = 0.0
        self._tokens: list[torch.Tensor] = []
        self._may_count = True

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done inside is waiting for data; the first time starts the clock."""
        start = time.perf_counter()
        self._start = start if self._start is None else self._start
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is no training: evaluation, a checkpoint."""
        start = time.perf_counter()
        yield
        if self._start is not None:
            self._paused += time.perf_counter() - start

    @contextmanager
    def step(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """What is done inside is the forward and backward pass of a batch.

        Args:
            inputs: The batch.
        """
        self._samples += samples_in(inputs)
        self._tokens.append(tokens_in(inputs))
        kind = tuple((name, tuple(x.shape)) for name, x in inputs.items() if isinstance(x, torch.Tensor))
        size = sum(
            x.numel() / (PATCH_VALUES if x.is_floating_point() else 1)
            for x in inputs.values()
            if isinstance(x, torch.Tensor)
        )
        if kind in self._known:
            yield
            self._flops += self._known[kind]
        elif self._may_count and len(self._known) < MAX_KINDS:
            self._may_count = False
            stance = torch.compiler.set_stance("force_eager") if self.is_compiled else nullcontext()
            with stance, FlopCounter() as counter:
                yield
            self._known[kind] = counter.flops - counter.repeated_flops
            self._flops += self._known[kind]
            self._counted_flops += self._known[kind]
            self._counted_size += size
        else:
            yield
            self._size_of_uncounted += size

    def entry(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the figures since the entry before, of all processes together, and begin anew.

        Args:
            accelerator: Of the run; all its processes call this.
        """
        if self._start is None or not self._samples:
            return {}
        elapsed = time.perf_counter() - self._start - self._paused
        flops = self._flops + self._size_of_uncounted * self._counted_flops / max(self._counted_size, 1)
        tokens = float(sum(int(number) for number in self._tokens))
        sums = torch.tensor([self._samples, tokens, flops], dtype=torch.float32, device=accelerator.device)
        samples, tokens, all_flops = accelerator.reduce(sums, "sum").tolist()
        per_device = all_flops / accelerator.num_processes / elapsed
        found = {
            "samples_per_second": samples / elapsed,
            "tokens_per_second": tokens / elapsed,
            "tflops_per_device": per_device / 1e12,
            "share_of_time_waiting_for_data": self._waited / elapsed,
        }
        if self.peak is not None:
            found["mfu"] = per_device / self.peak
        self._begin()
        return {name: float(f"{value:.4g}") for name, value in found.items()}


def samples_in(inputs: Mapping[str, Any]) -> int:
    """Count dialogues, packed ones too, or else pairs: the images of stages 1 and 2, and of retrieval."""
    ids, pixels = inputs.get("input_ids"), inputs.get("pixel_values")
    is_pairs = "summarize_input_ids" in inputs or (ids is not None and "labels" not in inputs)
    if pixels is not None and (is_pairs or ids is None):
        return len(pixels)
    if ids is None:
        return len(next(iter(inputs.values()), ()))
    positions = inputs.get("position_ids")
    return len(ids) if positions is None else int((positions == 0).sum())


def tokens_in(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Count tokens of texts without padding, image tokens of dialogues among them."""
    total = torch.zeros((), dtype=torch.long)
    for name, ids in inputs.items():
        if name.endswith("input_ids"):
            mask = inputs.get(name.replace("input_ids", "attention_mask"))
            number = torch.tensor(ids.numel()) if mask is None or mask.ndim != 2 else mask.sum()
            total = total.to(number.device) + number
    return total
