"""Raw memory for the kernels that work on addresses: copy, zero, read and write floats, and scratch that begins on a cache line.

Kernels take addresses (int64) and not arrays, so that read-only, writable and differently shaped arrays share one compilation
and a call costs little. Offsets and counts are in floats; nothing checks them.
"""

from __future__ import annotations

import ctypes
import math
import threading
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tinydiff.kernels import record

_I8, _I64, _F32 = ir.IntType(8), ir.IntType(64), ir.FloatType()
_FLOAT = 4  # bytes
LINE = 16  # floats in a cache line
_PAGE = 1024  # floats
_ARENA = 1 << 18  # floats: 1 MiB
_thread = threading.local()


_HEAD = object.__basicsize__  # an array's address follows the head that every Python object has
_words = (ctypes.c_ssize_t * (1 << 57)).from_address(0)  # all memory; reading it so takes half the time of one object a word


def address(array: np.ndarray | None) -> int:
    """Where the array's first element lies, 0 for None. The caller keeps the array alive.

    It is read where NumPy's C interface has it: `__array_interface__` builds a whole dict, and took a third of the time of a
    small call.
    """
    if record.current is not None and array is not None and (recording := record.active()) is not None:
        recording.keep(array)
    return 0 if array is None else _words[(id(array) + _HEAD) >> 3]


def _call(builder: Any, name: str, args: list[Any]) -> None:
    function_type = ir.FunctionType(ir.VoidType(), [value.type for value in args])
    builder.call(builder.module.globals.get(name) or ir.Function(builder.module, function_type, name), args)


@intrinsic
def copy(typingctx, target, source, count):  # type: ignore[no-untyped-def]
    """Copies `count` floats between addresses that don't overlap."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        target, source = (builder.inttoptr(value, _I8.as_pointer()) for value in args[:2])
        size = builder.mul(args[2], ir.Constant(_I64, _FLOAT))
        _call(builder, "llvm.memcpy.p0.p0.i64", [target, source, size, ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def zero(typingctx, target, count):  # type: ignore[no-untyped-def]
    """Sets `count` floats to 0."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        size = builder.mul(args[1], ir.Constant(_I64, _FLOAT))
        target = builder.inttoptr(args[0], _I8.as_pointer())
        _call(builder, "llvm.memset.p0.i64", [target, ir.Constant(_I8, 0), size, ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def prefetch(typingctx, address):  # type: ignore[no-untyped-def]
    """Asks for the cache line at any address, valid or not, to be brought to the second-level cache."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        to_read, second_level, data = (ir.Constant(ir.IntType(32), value) for value in (0, 2, 1))
        _call(builder, "llvm.prefetch.p0", [builder.inttoptr(args[0], _I8.as_pointer()), to_read, second_level, data])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def read(typingctx, base, offset):  # type: ignore[no-untyped-def]
    """The float at `offset`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load(builder.gep(builder.inttoptr(args[0], _F32.as_pointer()), [args[1]]))

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def write(typingctx, base, offset, value):  # type: ignore[no-untyped-def]
    """Sets the float at `offset`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.store(args[2], builder.gep(builder.inttoptr(args[0], _F32.as_pointer()), [args[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def will_write(typingctx, base, offset):  # type: ignore[no-untyped-def]
    """Fetches the cache line of the float at `offset`, which is to be written soon. Any address will do."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        place = builder.gep(builder.inttoptr(args[0], _F32.as_pointer()), [args[1]])
        hints = [ir.Constant(ir.IntType(32), value) for value in (1, 3, 1)]  # to write, keep, data
        _call(builder, "llvm.prefetch.p0", [place, *hints])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array itself if it is C-contiguous, else a copy; which a recording can't have, but of a constant."""
    made = np.ascontiguousarray(array)
    if made is not array and record.current is not None and not record.is_constant(array):
        record.refuse("an array had to be copied to be contiguous")
    return made


def _floats(count: int) -> np.ndarray:
    recording = record.active() if record.current is not None else None
    return np.empty(count, np.float32) if recording is None else recording.lend(count)


def empty(*shape: int) -> np.ndarray:
    """An array of float32, C-contiguous, that begins on a cache line if it is larger than one page.

    NumPy's own begin 16 bytes into one, and then each of AVX-512's vectors lies in two lines.
    """
    count = math.prod(shape)
    if count < _PAGE:
        return np.empty(shape, np.float32)
    memory = _floats(count + LINE)
    first = -address(memory) // _FLOAT % LINE
    return np.ndarray(shape, np.float32, memory, 4 * first)


def lasting(constant: np.ndarray, count: int) -> int:
    """The address, on a cache line, of memory for `count` floats made of a constant of the recording under way, which keeps them.

    0 if nothing is recorded, or that is no constant, or there is no room: then they are made again each time.
    """
    if record.current is None or not record.is_constant(constant):
        return 0
    memory = record.current.prepare(count + LINE)
    return -(-address(memory) // (LINE * _FLOAT)) * LINE * _FLOAT


def scratch(*counts: int) -> tuple[np.ndarray, list[int]]:
    """Memory for arrays of so many floats, and their addresses, each on a cache line.

    The caller keeps the memory while it uses it. Small requests get this thread's arena, the same every time.
    """
    starts, total = [], 0
    for count in counts:
        starts.append(total)
        total += -(-count // LINE) * LINE
    if total > _ARENA:
        memory = _floats(total + LINE)
        first = address(memory)
    else:
        try:
            memory, first = _thread.arena
        except AttributeError:
            memory = np.empty(_ARENA + LINE, np.float32)
            memory, first = _thread.arena = memory, address(memory)
        if record.current is not None and (recording := record.active()) is not None:
            recording.keep(memory)
    first = -(-first // (LINE * _FLOAT)) * LINE * _FLOAT
    return memory, [first + start * _FLOAT for start in starts]
