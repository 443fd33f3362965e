"""How much memory a device has left."""

from __future__ import annotations

from pathlib import Path

import torch

UNKNOWN = 4 * 2**30  # bytes, where the system does not say


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
