"""The machine in words, for model cards and results."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from foveate._wording import plural


def hardware(device: str | torch.device) -> str:
    """The GPU's name, or the processor's with the threads that torch uses.

    Example:
        >>> "thread" in hardware("cpu")
        True
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return f"{plural(torch.get_num_threads(), 'thread')} of {name}"
