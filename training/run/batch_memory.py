"""How much memory a micro-batch needs, found by trying it: for adjust_batch_size."""

from __future__ import annotations

import gc
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import psutil
import torch

from orchestrate.training.run.out_of_memory import is_out_of_memory
from orchestrate.training.run.sharding import local

if TYPE_CHECKING:
    from orchestrate.training.run.run import Run


def largest_batch_that_fits(run: Run, target: float, candidates: Sequence[int]) -> int:
    """The largest candidate (ascending sizes) whose forward and backward pass stay within a share of memory.

    Every rank tries, the smallest answer counts. The run is left as it was. On CUDA the share is of the device's
    memory, elsewhere of the host's.

    Raises ValueError when not even the smallest candidate fits.
    """
    if not candidates:
        raise ValueError("there is no batch size to try")
    limit = target * total_memory(run)
    measured: dict[int, float] = {}
    low, high = -1, len(candidates)  # candidates[low] fits, candidates[high] does not
    probe = 0
    while high - low > 1:
        # Doubling first, because what is far too large is slow to try; then halving the interval.
        probe = min(max(2 * low + 1, 0), high - 1) if high == len(candidates) else (low + high) // 2
        fits = not run.ranks.sharded or expected(measured, candidates[probe]) <= limit
        if fits:
            measured[candidates[probe]] = max(run.ranks.gather(peak_memory(run, candidates[probe])))
            fits = measured[candidates[probe]] <= limit
        low, high = (probe, high) if fits else (low, probe)
    if low < 0:
        raise ValueError(
            f"a micro-batch of {candidates[0]} already needs more than {target:g} of "
            f"{total_memory(run) / 2**30:.1f} GiB"
        )
    return candidates[low]


def expected(measured: dict[int, float], size: int) -> float:
    """Peak bytes of a micro-batch on the line through the two nearest measured ones; 0 while there are none.

    Where weights are sharded a size that would not fit is not tried: the others would wait for a rank whose memory
    ran out.
    """
    if len(measured) < 2:
        return 0.0
    (a, low), (b, high) = sorted(sorted(measured.items(), key=lambda item: abs(item[0] - size))[:2])
    return high + (high - low) / (b - a) * (size - b)


def total_memory(run: Run) -> float:
    """Bytes of the memory that the batch competes for."""
    if run.device.type == "cuda":
        return float(torch.cuda.get_device_properties(run.device).total_memory)
    return float(psutil.virtual_memory().total)


def peak_memory(run: Run, batch_size: int) -> float:
    """Peak bytes in use during one forward and backward pass of a micro-batch; infinite when memory ran out."""
    run.optimizer.zero_grad()
    gc.collect()
    meter = _DeviceMeter(run.device) if run.device.type == "cuda" else _HostMeter()
    try:
        with meter:
            block_size = run.settings.model.block_size
            x = torch.zeros(batch_size, block_size, dtype=torch.long, device=run.device)
            with run.autocast():
                # Not the DDP wrapper: ranks try different sizes for different times.
                loss = run.model(x, x).sum / x.numel()
            run.scaler.scale(loss).backward()
        # The optimizer's state, where the first step has not made it yet, and the gradients are there at the same time.
        optimizer = run.optimizer
        missing = sum(
            optimizer.state_bytes(name, local(p)[0].shape)
            for name, p in zip(optimizer.names, optimizer.parameters, strict=True)
            if p not in optimizer.inner.state
        )
        return meter.peak + missing
    except Exception as error:
        if is_out_of_memory(error):
            return float("inf")
        raise
    finally:
        run.optimizer.zero_grad()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


class _DeviceMeter:
    """Peak of torch's allocator on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak = device, 0.0

    def __enter__(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def __exit__(self, *_: object) -> None:
        self.peak = float(torch.cuda.max_memory_reserved(self.device))


class _HostMeter:
    """Peak resident memory of this process, looked at every millisecond by a thread."""

    def __init__(self) -> None:
        self.peak = 0.0
        self._process, self._done = psutil.Process(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, float(self._process.memory_info().rss))
            if self._done.wait(0.001):
                return

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
