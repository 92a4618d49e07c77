"""One loaded library of simulated kernels: its settings, its memory, and what it found."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinydiff.cudasim.build import csrc

SCHEDULES = ("forward", "reverse", "random", "warp")
GUARD = 1024  # bytes on either side of an array that no kernel may touch
_GUARD_BYTE = 0xA5


@dataclass(frozen=True)
class Finding:
    """One fault of a kernel.

    `kind` is one of "race", "uninitialised", "async" (an asynchronous copy used before it was waited for), "divergence" (of
    barriers), "warp" (misuse of a warp collective), "bounds", "alignment", "read-only", "blocks" (two blocks at one
    address), "limit" (of the architecture) or "order" (the result depends on the order in which threads run). `where` and
    `other` are "file:line", or empty.
    """

    kind: str
    message: str
    where: str
    other: str
    kernel: str

    def __str__(self) -> str:
        place = f" at {self.where}" if self.where else ""
        other = f" (the other access: {self.other})" if self.other else ""
        return f"{self.kind}{place}: {self.message}{other}"


@dataclass(frozen=True)
class Requests:
    """What the accesses of one line cost the memory system.

    `where` is the line, and `caller` the one that called the function it is in, where that was inlined; both "file:line".
    `space` is "shared" or "global", `access` "read", "write" or "atomic", `bytes` those of one thread. `parts` are bank phases
    for shared memory and 32-byte sectors for global memory; `least` is what the same bytes need at best. In shared memory
    `parts - least` are bank conflicts. Accesses that don't go through the launch header are seen with `races=True` only.
    """

    kernel: str
    where: str
    caller: str
    space: str
    access: str
    bytes: int
    requests: int
    parts: int
    least: int


class KernelError(RuntimeError):
    """A simulated kernel did something that a GPU would not report; `findings` has all of it."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__("\n".join(map(str, findings)))


class Memory:
    """A copy of an array as device memory: aligned, with guards on either side.

    `offset` moves the first element by as many elements from the alignment of 256 bytes that allocations have.
    """

    def __init__(self, array: np.ndarray, *, offset: int = 0, guard: int = GUARD) -> None:
        self.guard = guard
        shift = offset * array.itemsize
        self._bytes = np.full(array.nbytes + 2 * guard + 256 + shift, _GUARD_BYTE, np.uint8)
        first = guard + (-(self._bytes.ctypes.data + guard)) % 256 + shift
        self._first, self._last = first, first + array.nbytes
        self.array = self._bytes[self._first : self._last].view(array.dtype).reshape(array.shape)
        self.array[...] = array

    @property
    def pointer(self) -> int:
        return self._bytes.ctypes.data + self._first

    def damage(self) -> str | None:
        """What the guards say: None, or where somebody wrote."""
        before = np.flatnonzero(self._bytes[self._first - self.guard : self._first] != _GUARD_BYTE)
        if before.size:
            return f"{self.guard - int(before[-1])} bytes in front of it"
        after = np.flatnonzero(self._bytes[self._last : self._last + self.guard] != _GUARD_BYTE)
        return f"{int(after[0])} bytes after its end" if after.size else None


class Simulator:
    """The simulator inside a shared library.

    It runs one kernel at a time; `with simulator.settings(...)` holds its lock. Settings: `schedule` (forward, reverse, random,
    warp: one warp as far as it gets, then the next), `seed` (of the random schedule), `late_copies` (asynchronous copies
    happen when they are waited for, else when they are issued), `architecture` (80 for sm_80: whose limits hold), `record`
    (memory requests), `mutant` (the number of the guard that is switched off; 0: none).
    """

    def __init__(self, library: ctypes.CDLL, path: Path) -> None:
        self.library, self.path = library, path
        self._lock = threading.RLock()
        library.sim_report.restype = ctypes.c_char_p
        library.sim_set.argtypes = [ctypes.c_char_p, ctypes.c_longlong]
        library.sim_track.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_size_t,
            ctypes.c_char_p,
        ]
        library.sim_untrack.argtypes = [ctypes.c_void_p]

    @classmethod
    def load(cls, path: Path) -> Simulator:
        return cls(ctypes.CDLL(str(path)), path)

    @contextlib.contextmanager
    def settings(
        self,
        *,
        schedule: str = "forward",
        seed: int = 0,
        late_copies: bool = True,
        architecture: int = 80,
        record: bool = False,
        mutant: int = 0,
    ) -> Iterator[Simulator]:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule {schedule!r} is none of {', '.join(SCHEDULES)}")
        values = {
            "schedule": SCHEDULES.index(schedule),
            "seed": seed,
            "late_copies": late_copies,
            "architecture": architecture,
            "record": record,
            "mutant": mutant,
        }
        with self._lock:
            for name, value in values.items():
                if self.library.sim_set(name.encode(), int(value)):
                    raise ValueError(f"the simulator has no {name} {value!r}")
            self.library.sim_clear()
            try:
                yield self
            finally:
                self.library.sim_set(b"mutant", 0)

    @contextlib.contextmanager
    def tracked(self, memory: Sequence[tuple[str, Memory, bool]]) -> Iterator[None]:
        """Let kernels use these (name, memory, writable) and nothing else."""
        for name, piece, writable in memory:
            self.track(piece.pointer, piece.array.nbytes, piece.array.itemsize, writable, name, piece.guard)
        try:
            yield
        finally:
            for _, piece, _ in memory:
                self.untrack(piece.pointer)

    def track(self, pointer: int, nbytes: int, itemsize: int, writable: bool, name: str, guard: int = 0) -> None:
        """Let kernels use `nbytes` bytes at an address, until `untrack`."""
        self.library.sim_track(pointer, nbytes, itemsize, writable, guard, name.encode())

    def untrack(self, pointer: int) -> None:
        self.library.sim_untrack(pointer)

    def _report(self) -> dict[str, Any]:
        return json.loads(self.library.sim_report().decode())

    def findings(self) -> list[Finding]:
        """What was found since the settings were made."""
        found = self._report()["findings"]
        chains = self._chains([pc for f in found for pc in (f["pc"], f["other_pc"]) if pc])
        result = []
        for f in found:
            where = _place(f["file"], f["line"]) if f["file"] else _nth(chains.get(f["pc"]), 0)
            result.append(Finding(f["kind"], f["message"], where, _nth(chains.get(f["other_pc"]), 0), f["kernel"]))
        return result

    def requests(self) -> list[Requests]:
        """The memory requests recorded since the settings were made (`record=True`), those of one line together."""
        found = self._report()["requests"]
        chains = self._chains([r["pc"] for r in found if r["pc"]])
        counts: dict[tuple[Any, ...], list[int]] = {}
        for r in found:
            chain = chains.get(r["pc"], [])
            where = _place(r["file"], r["line"]) if r["file"] else _nth(chain, 0)
            caller = _nth(chain, chain.index(where) + 1) if where in chain else ""
            count = counts.setdefault((r["kernel"], where, caller, r["space"], r["access"], r["bytes"]), [0, 0, 0])
            for i, name in enumerate(("requests", "parts", "least")):
                count[i] += r[name]
        return [Requests(*key, *count) for key, count in counts.items()]

    def mutant_hits(self) -> int:
        """How often the guard that is switched off was reached."""
        return int(self._report()["mutant_hits"])

    def _chains(self, offsets: Sequence[int]) -> dict[int, list[str]]:
        """The source lines of each offset in the library: the innermost first, then its callers as far as they are inlined.

        The simulator's own are left out.
        """
        tool = shutil.which("addr2line")
        if not offsets or tool is None:
            return {}
        addresses = "\n".join(hex(offset) for offset in offsets)
        out = subprocess.run([tool, "-a", "-i", "-e", str(self.path)], input=addresses, capture_output=True, text=True).stdout
        own = (f"{csrc() / 'sim'}{os.sep}", str(csrc() / "launch.h"))
        chains: dict[int, list[str]] = {offset: [] for offset in offsets}
        offset = 0
        for line in out.splitlines():
            if line.startswith("0x"):
                offset = int(line, 16)
            elif not line.startswith("??"):
                file, _, number = line.partition(" ")[0].rpartition(":")
                if not str(Path(file).resolve()).startswith(own):
                    chains[offset].append(_place(file, number))
        return chains


def _nth(chain: Sequence[str] | None, n: int) -> str:
    return chain[n] if chain and n < len(chain) else ""


def _place(file: str, line: int | str) -> str:
    return f"{Path(file).name}:{line}"
