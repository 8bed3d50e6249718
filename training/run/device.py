"""Which device and which number type a run computes on, and numbers that come from a device without a wait."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str, local_rank: int) -> torch.device:
    """`auto` picks cuda, then mps, then cpu; on CUDA each local rank takes its own device. Raises ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: got {name!r}, allowed: auto, cpu, cuda, cuda:N, mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: got {name!r}, but torch {torch.__version__} sees no CUDA device here")
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"device: cuda:{index} is asked for and there are {torch.cuda.device_count()} CUDA devices"
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device: got {name!r}, but torch sees no mps device here")
    if device.type not in ("cpu", "mps"):
        raise ValueError(f"device: got {name!r}, allowed: auto, cpu, cuda, cuda:N, mps")
    return device


def pick_dtype(name: str, device: torch.device) -> str:
    """`auto` is bfloat16 on a GPU that has it, else float16 on CUDA, else float32."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def on_its_way(value: Tensor) -> Callable[[], float]:
    """A copy of a number () on the device, on its way to the host; calling it waits for the copy alone."""
    if value.device.type != "cuda":
        copied = value.detach().clone()
        return lambda: copied.item()
    on_host = torch.empty((), dtype=value.dtype, pin_memory=True)
    on_host.copy_(value.detach(), non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> float:
        arrived.synchronize()
        return on_host.item()

    return read
