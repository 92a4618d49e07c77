"""How much memory this process holds, and held at most (Linux: read from /proc)."""

from __future__ import annotations

import ctypes
from pathlib import Path

STATUS = Path("/proc/self/status")


def _field(name: str) -> int:
    if not STATUS.exists():
        raise RuntimeError("memory is measured through /proc, which this system does not have; run this on Linux")
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return 1024 * int(line.split()[1])


def resident() -> int:
    """Bytes resident now."""
    return _field("VmRSS")


def return_freed() -> None:
    """Give freed memory back to the system, where glibc keeps it: what is taken next then counts as resident."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak() -> int:
    """Most bytes resident since the start, or since `reset_peak`."""
    return _field("VmHWM")


def reset_peak() -> None:
    """Start `peak` anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
