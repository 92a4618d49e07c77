"""A recording of the kernels that a computation launches, to launch them again in the same memory with no Python between them.

What a launch is given are addresses, so a recording keeps what they point at: arrays made elsewhere stay alive, and the arrays
that kernels make come from blocks of its own, lent again once nothing refers to what was in them, as an allocator would.
Whatever computes without a launch would be missing from the recording, and refuses it.
"""

from __future__ import annotations

import weakref
from array import array
from collections import defaultdict
from collections.abc import Iterable
from threading import get_ident
from typing import Any

import numpy as np

current: Recording | None = None
"""The recording under way, if any; of one thread at a time."""

LIMIT = 1 << 24  # floats in blocks, 64 MB: what is larger is taken in parts, of which each goes through all weights, and
PER_WEIGHT = 8  # therefore it is as much for each weight, if that is more, up to
LARGEST = 8  # times LIMIT


class Recording:
    """What `launch` notes while this is `current`.

    Attributes:
        constants: the arrays, by id, whose values count as part of the recording.
        launches: (address of the body, address of its arguments, threads), three integers each.
        refused: why there can be no recording; None as long as there can. too_large: whether for want of room.
        room: floats that it may take. size: floats in blocks. prepared: floats in what is made of constants.
    """

    def __init__(self, constants: Iterable[np.ndarray]) -> None:
        self.constants = {id(a): a for a in constants}
        weights = sum(a.size for a in self.constants.values())
        self.room = min(max(LIMIT, PER_WEIGHT * weights), LARGEST * LIMIT)
        self.launches = array("q")
        self.refused: str | None = None
        self.too_large = False
        self.thread = get_ident()
        self._kept: list[Any] = []
        self._free: defaultdict[int, list[bytearray]] = defaultdict(list)
        self._lent: set[int] = set()
        self.size = self.prepared = 0

    def note(self, function: int, arguments: int, threads: int, packed: bytes) -> None:
        """Add a launch, with arguments that lie in `packed`."""
        self._kept.append(packed)
        self.launches.extend((function, arguments, threads))

    def keep(self, memory: Any) -> None:
        """Keep an array whose address was taken, unless its memory is lent."""
        if id(memory) not in self._lent and id(memory.base) not in self._lent:
            self._kept.append(memory)

    def lend(self, count: int) -> np.ndarray:
        """Memory for `count` floats, taken back when no array refers to it any more."""
        free = self._free[count]
        if free:
            block = free.pop()
        else:
            self.size += count
            if self.size > self.room and self.refused is None:
                self.too_large = True
                self.refuse(f"it takes more than {self.room >> 18} MB")
            block = bytearray(4 * count)
        memory = np.frombuffer(block, np.float32)
        self._lent.add(id(memory))
        weakref.finalize(memory, self._take_back, id(memory), block).atexit = False
        return memory

    def _take_back(self, lent: int, block: bytearray) -> None:
        self._lent.discard(lent)
        if self.refused is None:
            self._free[len(block) // 4].append(block)

    def prepare(self, count: int) -> np.ndarray | None:
        """Memory for `count` floats that lasts, for what is made of constants; None if that took all room before."""
        if self.prepared + count > self.room:
            return None
        self.prepared += count
        memory = np.empty(count, np.float32)
        self._kept.append(memory)
        return memory

    def refuse(self, why: str) -> None:
        """There is no recording of this. What was kept for it stays until `clear`: the kernel being prepared may use it."""
        global current
        self.refused, current = self.refused or why, None

    def clear(self) -> None:
        """Let go of all that was kept."""
        self.launches, self._kept = array("q"), []
        self._free.clear()


def active() -> Recording | None:
    """The recording under way on this thread."""
    return current if current is not None and current.thread == get_ident() else None


def refuse(why: str) -> None:
    """Say that what this thread does can't be recorded, if it is being recorded."""
    recording = active()
    if recording is not None:
        recording.refuse(why)


def is_constant(array: np.ndarray) -> bool:
    """Whether this is (a view of) what the recording under way takes to be constant."""
    recording = active()
    return recording is not None and (id(array) in recording.constants or id(array.base) in recording.constants)
