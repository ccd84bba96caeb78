"""What an exception says about memory."""

from __future__ import annotations

import re

_REFUSALS = (
    re.compile(r"you tried to allocate (\d+) bytes"),  # c10/core/impl/alloc_cpu.cpp
    re.compile(r"[Tt]ried to allocate ([\d.]+) ([KMG]?i?B|bytes)"),  # c10/cuda/CUDACachingAllocator.cpp, and XPU, MPS
    re.compile(r"Failed to allocate ([\d.]+) ([KMG]?i?B|bytes)"),
)
_SCALES = {"bytes": 1, "B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_MARKS = ("out of memory", "can't allocate memory", "not enough memory", "DefaultCPUAllocator")
_LONGEST = 300


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether an exception says that memory could not be had, on whatever device."""
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":
        return True
    return isinstance(problem, RuntimeError) and any(mark in str(problem) for mark in _MARKS)


def requested_bytes(problem: BaseException) -> int | None:
    """What was asked for in vain, where the exception says it; PyTorch rounds it to two places in its larger units."""
    text = str(problem)
    for pattern in _REFUSALS:
        match = pattern.search(text)
        if match:
            unit = match.group(2) if pattern.groups > 1 else "bytes"
            return round(float(match.group(1)) * _SCALES[unit])
    return None


def error_line(problem: BaseException) -> str:
    """The exception's type and the first line of what it says."""
    first = next((line.strip() for line in str(problem).splitlines() if line.strip()), "")
    name = type(problem).__name__
    return f"{name}: {first}"[:_LONGEST] if first else name
