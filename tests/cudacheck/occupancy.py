"""How many blocks of a kernel a multiprocessor holds at once, by CUDA's written rules.

The limits are those of the CUDA C++ Programming Guide's table of compute capabilities. Registers are given to warps in
units of 256 and warps of registers in fours; shared memory to blocks in units of 128 bytes (256 on sm_75), with 1 KB more for
the system from sm_80 on.
"""

from __future__ import annotations

from dataclasses import dataclass

REGISTERS = 65536  # of a multiprocessor, on every architecture here
KIB = 1024


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor: warps, blocks and bytes of shared memory at once. `block` is the most shared memory of one block."""

    warps: int
    blocks: int
    shared: int
    block: int
    reserved: int = KIB
    unit: int = 128


LIMITS = {
    "75": Limits(32, 16, 64 * KIB, 64 * KIB, reserved=0, unit=256),
    "80": Limits(64, 32, 164 * KIB, 163 * KIB),
    "86": Limits(48, 16, 100 * KIB, 99 * KIB),
    "89": Limits(48, 24, 100 * KIB, 99 * KIB),
    "90": Limits(64, 32, 228 * KIB, 227 * KIB),
    "100": Limits(64, 32, 228 * KIB, 227 * KIB),
    "120": Limits(48, 24, 100 * KIB, 99 * KIB),
}


def up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def blocks_at_once(architecture: str, threads: int, registers: int, shared: int) -> int:
    """Blocks of `threads` threads with `registers` each and `shared` bytes that run on one multiprocessor; 0 if none can."""
    limits = LIMITS[architecture]
    if shared > limits.block:
        return 0
    warps = -(-threads // 32)
    warps_by_registers = REGISTERS // up(registers * 32, 256) // 4 * 4
    taken = up(shared + limits.reserved, limits.unit)
    return min(
        limits.blocks, limits.warps // warps, warps_by_registers // warps, limits.shared // taken if taken else limits.blocks
    )


def occupancy(architecture: str, threads: int, registers: int, shared: int) -> float:
    """The part of a multiprocessor's warps that such blocks fill."""
    warps = -(-threads // 32) * blocks_at_once(architecture, threads, registers, shared)
    return warps / LIMITS[architecture].warps
