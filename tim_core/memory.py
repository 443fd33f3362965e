"""How much memory a device has left, and room for one network where it is short."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

UNKNOWN = 4 * 2**30  # bytes, where the system does not say
SHARE_OF_MEMORY = 0.8  # of what is available that a run of a network may take
MOST_ON_CPU = 4 * 2**30  # bytes that a run may take there, where other programs need memory too
OFFLOAD_DEVICE = torch.device("cpu")


def fits(needed: int, device: torch.device, available: int | None = None) -> bool:
    """Whether a run that takes `needed` bytes fits in what a device can still give, by default `available_bytes`."""
    available = available_bytes(device) if available is None else available
    return needed < SHARE_OF_MEMORY * available and (device.type != "cpu" or needed < MOST_ON_CPU)


def make_room(network: nn.Module, needed: int, others: Iterable[nn.Module], device: torch.device) -> None:
    """Move a network to a device. If a run of it, which takes `needed` bytes, does not fit there, move the others to the CPU first."""
    away = [parameter for parameter in network.parameters() if parameter.device != device]
    needed += sum(parameter.nbytes for parameter in away)
    if device != OFFLOAD_DEVICE and not fits(needed, device):
        for other in others:
            other.to(OFFLOAD_DEVICE)
    if away:
        network.to(device)


def available_bytes(device: torch.device) -> int:
    """Bytes that a device can still give: free memory, and what torch holds but does not use. A guess of 4 GiB where nobody knows."""
    if device.type == "cuda":  # and ROCm
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return min((found for found in (_linux(), _control_group()) if found is not None), default=UNKNOWN)


def _linux(path: Path = Path("/proc/meminfo")) -> int | None:
    for line in _lines(path):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _control_group(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit leaves; None without one."""
    limit, used = _lines(folder / "memory.max"), _lines(folder / "memory.current")
    if not limit or not used or not limit[0].isdecimal():
        return None
    cache = next((int(line.split()[1]) for line in _lines(folder / "memory.stat") if line.startswith("inactive_file ")), 0)
    return int(limit[0]) - int(used[0]) + cache


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
