"""Our vision tower against the one in transformers (`InternVLVisionModel`): same weights, same pictures, seconds per forward pass.

    python -m benchmarks.vision_forward [--rounds 20] [--batch 1] [--layers 6] [--device cpu]

Does: the width of InternViT-300M (1024, LayerNorm) at 448 px, with few blocks so that a laptop finishes; the two models take turns, so
that a change in the machine's speed meets both; checks first that they compute the same. Does not: the 6B shape, training, memory.

Prints the ratio of the medians (below 1: ours is faster) with the middle half of the ratios of the single rounds, and writes both to
`benchmarks/results/vision_forward-DEVICE.json` with the versions it was measured with.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import InternVLVisionConfig, InternVLVisionModel

from internvl import InternVisionModel, InternViTConfig


RESULTS = Path(__file__).resolve().parent / "results"
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
}


def build_models(num_layers: int, device: str) -> tuple[InternVisionModel, InternVLVisionModel]:
    """Ours and transformers' own with the same weights."""
    ours = InternVisionModel(
        InternViTConfig(
            **SIZES, num_hidden_layers=num_layers, norm_type="layer_norm", qk_normalization=False, qkv_bias=True
        )
    )
    native = InternVLVisionModel(InternVLVisionConfig(**SIZES, num_hidden_layers=num_layers, attention_bias=True))
    native.load_state_dict(to_native(ours.state_dict()))
    return ours.eval().to(device), native.eval().to(device)


def to_native(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our weights under transformers' names; q, k and v are one matrix here and three there."""
    renamed = {}
    names = {
        "embeddings.class_embedding": "embeddings.cls_token",
        "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
        "embeddings.position_embedding": "embeddings.position_embeddings",
        "encoder.layers": "encoder.layer",
        "attn.proj": "attention.projection_layer",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "ls1": "lambda_1",
        "ls2": "lambda_2",
    }
    for name, tensor in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if ".attn.qkv." not in name:
            renamed[name] = tensor
            continue
        for part, piece in zip("qkv", tensor.chunk(3), strict=True):
            renamed[name.replace("attn.qkv", f"attention.{part}_proj")] = piece
    return renamed


def seconds_of(call: Callable[[], Any], device: str) -> float:
    """Wall time of one call, with the device's queue empty before and after."""
    if device != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def measure(rounds: int, batch: int, num_layers: int, device: str) -> dict:
    """Both models in turns, the one that goes first changing every round."""
    torch.manual_seed(0)
    ours, native = build_models(num_layers, device)
    pixels = torch.randn(batch, 3, SIZES["image_size"], SIZES["image_size"], device=device)
    difference = (ours(pixels).last_hidden_state - native(pixels).last_hidden_state).abs().max().item()
    if difference > 1e-3:
        raise SystemExit(f"The two models differ by {difference}: nothing to compare.")
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    calls = {"ours": lambda: ours(pixels), "transformers": lambda: native(pixels)}
    for index in range(rounds):
        for name in list(calls) if index % 2 else reversed(list(calls)):
            seconds[name].append(seconds_of(calls[name], device))
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["transformers"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "ratio": round(medians["ours"] / medians["transformers"], 4),
        "ratio_middle_half": [round(low, 4), round(high, 4)],
        "median_seconds": {name: round(value, 5) for name, value in medians.items()},
        "largest_difference": difference,
        "rounds": rounds,
        "batch": batch,
        "layers": num_layers,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    result = measure(arguments.rounds, arguments.batch, arguments.layers, arguments.device)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"vision_forward-{arguments.device}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    low, high = result["ratio_middle_half"]
    print(f"ours / transformers: {result['ratio']} (middle half of {result['rounds']} rounds: {low} to {high})")
    print(f"median seconds: {result['median_seconds']}; written to {path.relative_to(RESULTS.parents[1])}")


if __name__ == "__main__":
    main()
