"""`from_pretrained`: its time against reading the same files, and the memory of the host at its most.

A chat model with random weights in bf16 (0.8 GB in three files), in the page cache for both. Files may be mapped, and
are then read only when a weight is used: so every page of every weight is touched, in the time and in the memory.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from internvl import InternVLChatForConditionalGeneration

from .chat import TEXT, VISION
from .harness import Calls, Options, Row, in_fresh_process, interleave, memory_growth, row_of
from .native import build_chat


PAGE = 4096  # bytes
SHARD = "300MB"


def load_model(folder: Path | str, device: str) -> InternVLChatForConditionalGeneration:
    """The model, all of its weights in memory."""
    model = InternVLChatForConditionalGeneration.from_pretrained(folder, dtype="auto", device_map=device)
    for parameter in model.parameters():
        parameter.detach().flatten()[:: PAGE // parameter.element_size()].sum()
    return model


def read(folder: Path) -> list[bytes]:
    """The same files without any meaning."""
    return [file.read_bytes() for file in sorted(folder.glob("*.safetensors"))]


@torch.no_grad()
def rows(options: Options) -> Iterator[Row]:
    """Time, then memory."""
    model = build_chat(VISION, TEXT, Options()).to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=SHARD)
        found = load_model(folder, options.device)
        for name, parameter in model.named_parameters():
            if not torch.equal(found.get_parameter(name).cpu(), parameter):
                raise SystemExit(f"`{name}` was not loaded as it was saved: nothing to compare.")
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        del model, found
        name = f"from_pretrained of {size / 1e9:.1f} GB in bf16"
        calls: Calls = {"load": partial(load_model, folder, options.device), "read": partial(read, Path(folder))}
        title = f"{name}: time against reading the files"
        yield row_of(title, interleave(calls, options), "read", "load", target=1.5, is_lower_better=True)
        growth = in_fresh_process(loading_memory, folder, options.device)
    yield Row(
        f"{name}: peak memory of the host against the weights",
        ratio=growth / size,
        target=1.1,
        is_lower_better=True,
        details={"growth_bytes": growth, "weight_bytes": size},
    )


def loading_memory(folder: str, device: str) -> int:
    """Bytes by which loading lets this process grow at its most."""
    if device != "cpu":
        torch.zeros(1, device=device)  # its libraries are no weights
    return memory_growth(partial(load_model, folder, device))
