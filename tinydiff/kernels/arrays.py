"""What kernels over flat float32 memory share: which arrays they accept, how they start, and how their loops read and write.

A kernel is a body (args, thread) for `launch`, compiled when it is first launched. Its loops go through `load` and `store`,
which promise the compiler that what `load` reads nothing in the kernel writes by `store` or `add_to`: with more than three or
four arrays it would otherwise give up on proving that, and not vectorise. Memory that a kernel both stores and reads back is
read by `memory.read`.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tinydiff.kernels import launch as _launch
from tinydiff.kernels.jit import njit
from tinydiff.kernels.mathfun import from_bits
from tinydiff.kernels.memory import address

_F32 = ir.FloatType()


_FLOAT32 = np.dtype(np.float32)


def plain(*arrays: Any) -> bool:
    """Whether all are float32 arrays, C-contiguous and not empty."""
    for a in arrays:  # noqa: SIM110 (a generator takes twice as long)
        if type(a) is not np.ndarray or a.dtype != _FLOAT32 or not a.flags.c_contiguous or not a.size:
            return False
    return True


_FLOAT, _INT = struct.Struct("f"), struct.Struct("i")


def word(value: Any) -> int:
    """What a body unpacks for a kernel's argument: an array's address (None: 0), an integer, or the bits of a float32."""
    kind = type(value)
    if kind is int or kind is bool:
        return value
    if kind is np.ndarray or value is None:
        return address(value)
    return _INT.unpack(_FLOAT.pack(value))[0] if isinstance(value, float | np.floating) else operator.index(value)


def threads_for(work: int, least: int = 1 << 16) -> int:
    """How many threads to use for a loop over `work` elements: one below `least`, where waking others (5 to 10 µs) costs more."""
    return 1 if work < least else min(numba.get_num_threads(), work)


class Kernel:
    """A body that is compiled, or read from the disk cache, at its first launch."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function, self.compiled = function, None
        self.__doc__ = function.__doc__

    def __call__(self, threads: int, *args: Any) -> None:
        """Launch it on `threads` threads with `args`: arrays (None for none), integers, and floats, which `number` reads."""
        if self.compiled is None:
            self.compiled = _launch.body(self.function)
        _launch.launch(self.compiled, threads, *[a if type(a) is int else word(a) for a in args])


@njit(forceinline=True)
def number(word):  # type: ignore[no-untyped-def]
    """The float32 among a body's arguments."""
    return from_bits(np.int32(word))


@njit(forceinline=True)
def share(count, thread, threads):  # type: ignore[no-untyped-def]
    """(start, stop): the thread's part of `count` things, in steps of 16 where there are many."""
    step = 16 if count >= 64 * threads else 1
    blocks = (count + step - 1) // step
    return min(count, blocks * thread // threads * step), min(count, blocks * (thread + 1) // threads * step)


def _tag(builder: Any, instruction: Any, kind: str) -> None:
    domain = builder.module.add_metadata(["tinydiff"])
    scope = builder.module.add_metadata(["tinydiff read", domain])
    instruction.set_metadata(kind, builder.module.add_metadata([scope]))


@intrinsic
def load(context: Any, base: Any, offset: Any) -> Any:
    """The float at `offset` from the address `base`, in memory that the kernel does not `store` to."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(builder.gep(builder.inttoptr(args[0], _F32.as_pointer()), [args[1]]))
        _tag(builder, value, "alias.scope")
        return value

    return types.float32(types.int64, types.int64), generate


@intrinsic
def store(context: Any, base: Any, offset: Any, value: Any) -> Any:
    """Set the float at `offset`, in memory that the kernel does not `load` from."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        instruction = builder.store(args[2], builder.gep(builder.inttoptr(args[0], _F32.as_pointer()), [args[1]]))
        _tag(builder, instruction, "noalias")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def add_to(context: Any, base: Any, offset: Any, value: Any) -> Any:
    """Add to the float at `offset`, in memory that the kernel does not `load` from."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.gep(builder.inttoptr(args[0], _F32.as_pointer()), [args[1]])
        before = builder.load(place)
        after = builder.store(builder.fadd(before, args[2]), place)
        _tag(builder, before, "noalias")
        _tag(builder, after, "noalias")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate
