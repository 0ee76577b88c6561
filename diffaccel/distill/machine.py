"""What a machine has for training: free memory and speed."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_MEMORY, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a process can still allocate on a device; None where that cannot be found out.

    On the CPU the smaller of what the system and a container's limit leave, outside Linux half of all memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    if not _MEMORY.exists():
        known = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if known else None
    fields = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines() if ":" in line)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    return min(free, _container_bytes(free))


def _container_bytes(otherwise: int) -> int:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        # Pages of files count as used and are given back when they are needed.
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        used -= int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):
        return otherwise
    return otherwise if limit == "max" else int(limit) - used


@dataclass(frozen=True)
class Speed:
    """Attributes:
    flops: floating-point operations per second of a matrix product.
    operator: seconds that a small operator takes.
    """

    flops: float
    operator: float

    def seconds(self, flops: float, operators: float) -> float:
        """Of work that consists of so many operations in so many operators."""
        return flops / self.flops + operators * self.operator


def measure_speed(device: torch.device, precision: str = "no") -> Speed:
    """Time a matrix product, in bfloat16 if the precision is "bf16", and a small operator; a fifth of a second or so."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 4096 if device.type == "cuda" else 768
    large, small = torch.ones(size, size, device=device, dtype=dtype), torch.ones(8, device=device, requires_grad=True)
    product = _seconds(lambda: large @ large, device, repeats=3)
    operator = _seconds(lambda: [small * 1.0 for _ in range(200)], device, repeats=3) / 200
    return Speed(2 * size**3 / product, operator)


def _seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The shortest time of a few; the first one is not counted."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
