"""The table of `make gpu-status`, on a machine with NVML, with torch alone, and with neither."""

from __future__ import annotations

import os
import re
import sys
from types import SimpleNamespace

import pytest

from orchestrate.tools import gpu_status


class Error(Exception):
    """Stands for pynvml.NVMLError."""


def nvml(**changed) -> SimpleNamespace:
    """Two GPUs: this process and one that is gone on the first, nothing on the second, whose use is not known."""
    running = {0: [(os.getpid(), 3 * 10**9), (2**22 + 1, None)], 1: []}

    def use(device):
        if device == 1:
            raise Error("not supported")
        return SimpleNamespace(gpu=87)

    functions = dict(
        NVMLError=Error,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda device: [b"H200", "A100"][device],
        nvmlDeviceGetMemoryInfo=lambda device: SimpleNamespace(used=5 * 10**9, total=150 * 10**9),
        nvmlDeviceGetUtilizationRates=use,
        nvmlDeviceGetComputeRunningProcesses=lambda device: [
            SimpleNamespace(pid=pid, usedGpuMemory=memory) for pid, memory in running[device]
        ],
    )
    return SimpleNamespace(**{**functions, **changed})


def table(monkeypatch, module) -> list[list[str]]:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return [re.split(r"\s{2,}", line) for line in gpu_status.status().splitlines()]


def test_a_row_for_each_process_and_each_idle_gpu(monkeypatch):
    head, mine, gone, idle, host = table(monkeypatch, nvml())
    assert head == list(gpu_status._COLUMNS)
    assert mine[:5] == ["0", "H200", "87 %", "5.0 of 150.0 GB", str(os.getpid())] and mine[6] == "3.0 GB"
    assert gone == ["", str(2**22 + 1), "-", "-", "-"]
    assert idle == ["1", "A100", "-", "5.0 of 150.0 GB", "-", "-", "-", "-"]
    assert re.match(r"host: \d+ cores, CPU \d+ %, memory [\d.]+ GB of [\d.]+ GB$", host[0])


def test_nvml_is_closed_whatever_happens(monkeypatch):
    closed = []

    def broken(device):
        raise Error("GPU is lost")

    module = nvml(nvmlShutdown=lambda: closed.append(1), nvmlDeviceGetMemoryInfo=broken)
    assert table(monkeypatch, module)[:2] == [["no NVIDIA GPU is seen here"], ["note: NVML: GPU is lost"]]
    assert closed == [1]


@pytest.mark.parametrize("gpus", [0, 1])
def test_without_pynvml_torch_says_what_it_can(monkeypatch, gpus):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (100 * 10**9, 150 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H200")
    rows = table(monkeypatch, None)  # None in sys.modules: cannot be imported
    assert rows[-2] == ["note: pynvml is not installed: use and processes are not known (pip install nvidia-ml-py)"]
    if gpus:
        assert rows[1] == ["0", "H200", "-", "50.0 of 150.0 GB", "-", "-", "-", "-"]
    else:
        assert rows[0] == ["no NVIDIA GPU is seen here"]
