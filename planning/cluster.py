"""What the costs of a run are computed for: GPUs, how states are spread over them, and decoders."""

from dataclasses import dataclass


DECODERS = {"7b": "internvl-chat-7b", "13b": "internvl-chat-13b"}
SHARDINGS = ("fsdp", "ddp")


@dataclass(frozen=True)
class Cluster:
    """What trains.

    Args:
        gpus: How many.
        gpu_memory: Of each, in GB.
        peak_tflops: Of each, dense bfloat16.
        utilization: Share of the peak that executed operations reach.
        sharding: One of `SHARDINGS`.
    """

    gpus: int = 640
    gpu_memory: float = 80.0
    peak_tflops: float = 312.0
    utilization: float = 0.4
    sharding: str = "fsdp"

    def __post_init__(self) -> None:
        for name in ("gpus", "gpu_memory", "peak_tflops"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if not 0 < self.utilization <= 1:
            raise ValueError(f"`utilization` must be in (0, 1], got {self.utilization}.")
        if self.sharding not in SHARDINGS:
            raise ValueError(f"`sharding` must be one of {list(SHARDINGS)}, got {self.sharding!r}.")
