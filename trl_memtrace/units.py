"""Bytes to text and back: the only place where bytes are rounded."""

from __future__ import annotations

import re
from fractions import Fraction

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1024**4,
}


def format_bytes(size: int | None) -> str:
    """``1536`` -> ``"1.50 KiB"``: three significant places or so, binary units; ``None`` -> ``"-"``."""
    if size is None:
        return "-"
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if round(abs(value), 2) < 1024:
            return f"{size} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def common_unit(size: int | None) -> tuple[str, int]:
    """The binary unit in which the largest of some sizes is best written, and its bytes: ``("MiB", 1048576)``."""
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if (size or 0) >= scale:
            return unit, scale
    return "B", 1


def to_gib(size: int) -> float:
    """Bytes as GiB, for metrics whose names say so (``..._gib``)."""
    return size / GIB


def parse_bytes(text: str) -> int:
    """``"40GiB"``, ``"24 GB"`` or ``"1024"`` (bytes) -> bytes.

    Raises:
        ValueError: ``text`` is not a number with an optional unit of B, kB, MB, GB, TB, KiB, MiB, GiB or TiB.
    """
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([a-zA-Z]*)\s*", text)
    unit = (match.group(2) or "b").lower() if match else ""
    if match is None or unit not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write a number with a unit, such as 40GiB or 512MiB")
    return round(Fraction(match.group(1)) * _UNITS[unit])
