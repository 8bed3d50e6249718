"""The GPUs of this machine and who uses them: python -m orchestrate.tools.gpu_status (`make gpu-status`).

A table of each GPU's use and memory with the processes on it, and the host's load. It only looks: it starts nothing on
a GPU and ends nothing. NVML is asked through pynvml, which need not be installed; without it torch says less.
"""

from __future__ import annotations

import contextlib
from typing import Any

import psutil

_COLUMNS = "gpu", "name", "use", "memory", "pid", "user", "process memory", "command"


def _gb(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e9:.1f} GB"


def _process(pid: int, memory: int | None) -> list[str]:
    """A process on a GPU; of another container's nothing but its number is known here."""
    user, command = "-", "-"
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        user, command = process.username(), " ".join(process.cmdline())[:60] or process.name()
    return [str(pid), user, _gb(memory), command]


def from_nvml(nvml: Any) -> list[list[str]]:
    """A row for each process on a GPU, and one for each GPU without any. Raises nvml.NVMLError."""
    rows = []
    nvml.nvmlInit()
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            name, memory = nvml.nvmlDeviceGetName(device), nvml.nvmlDeviceGetMemoryInfo(device)
            name = name.decode() if isinstance(name, bytes) else name  # older versions of pynvml
            use = "-"
            with contextlib.suppress(nvml.NVMLError):  # a part of a GPU (MIG) has no number for it
                use = f"{nvml.nvmlDeviceGetUtilizationRates(device).gpu} %"
            running = nvml.nvmlDeviceGetComputeRunningProcesses(device)
            first = [str(index), name, use, f"{memory.used / 1e9:.1f} of {_gb(memory.total)}"]
            processes = [_process(p.pid, p.usedGpuMemory) for p in running] or [["-"] * 4]
            rows += [[*(first if i == 0 else [""] * 4), *cells] for i, cells in enumerate(processes)]
    finally:
        nvml.nvmlShutdown()
    return rows


def from_torch() -> list[list[str]]:
    """A row for each GPU, without its processes and its use."""
    import torch

    rows = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        memory = f"{(total - free) / 1e9:.1f} of {_gb(total)}"
        rows.append([str(index), torch.cuda.get_device_name(index), "-", memory, *["-"] * 4])
    return rows


def status() -> str:
    """What `main` prints."""
    rows, note = [], ""
    try:
        import pynvml
    except ImportError:
        rows, note = from_torch(), "pynvml is not installed: use and processes are not known (pip install nvidia-ml-py)"
    else:
        try:
            rows = from_nvml(pynvml)
        except pynvml.NVMLError as error:
            note = f"NVML: {error}"
    lines = []
    if rows:
        table = [list(_COLUMNS), *rows]
        widths = [max(len(row[i]) for row in table) for i in range(len(_COLUMNS))]
        lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
    else:
        lines.append("no NVIDIA GPU is seen here")
    memory = psutil.virtual_memory()
    lines += [f"note: {note}"] * bool(note)
    cores = psutil.cpu_count()
    lines.append(
        f"host: {cores} cores, CPU {psutil.cpu_percent(0.1):.0f} %, memory {_gb(memory.used)} of {_gb(memory.total)}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    print(status())
