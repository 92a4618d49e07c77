"""Running a kernel's body on several threads of Numba's pool without compiling each body as a parallel function.

`parallel=True` triples a kernel's compile time, so there is one parallel function, `_launch`, and it calls compiled bodies by
their address. A body takes (args, thread): `unpack(args, n)` gives the n integers that it was launched with.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import pack
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tinydiff.kernels import record
from tinydiff.kernels.jit import FASTMATH, njit

_I64 = ir.IntType(64)
_HEAD = bytes.__basicsize__ - 1  # what bytes hold follows their head


@intrinsic(prefer_literal=True)
def unpack(typingctx, args, count):  # type: ignore[no-untyped-def]
    """The first `count` (a literal) integers at the address `args`, as a tuple."""
    length = count.literal_value

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        base = builder.inttoptr(arguments[0], _I64.as_pointer())
        return cgutils.pack_array(builder, [builder.load(builder.gep(base, [ir.Constant(_I64, i)])) for i in range(length)])

    return types.UniTuple(types.int64, length)(types.int64, count), codegen


@intrinsic
def _call(typingctx, function, args, thread):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.VoidType(), [_I64, _I64])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@njit(["void(int64, int64, int64)"], parallel=True)
def _launch(function, args, threads):  # type: ignore[no-untyped-def]
    for thread in numba.prange(threads):
        _call(function, args, thread)


def body(function: Callable[..., None]) -> Any:
    """Compiles `function(args, thread)`, or takes it from the disk cache, for `launch`."""
    signature = types.void(types.int64, types.int64)
    return numba.cfunc(signature, cache=True, fastmath=FASTMATH, error_model="numpy")(function)


@njit(["void(int64, int64)"])
def _run(function, args):  # type: ignore[no-untyped-def]
    _call(function, args, 0)


@njit(["void(int64, int64)"])
def _replay(launches, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        function, args, threads = unpack(launches + 24 * i, 3)
        if threads == 1:
            _call(function, args, 0)
        else:
            _launch(function, args, threads)


def replay(recording: record.Recording) -> None:
    """Does all the launches of a recording again, in order."""
    _replay(recording.launches.buffer_info()[0], len(recording.launches) // 3)


def launch(compiled: Any, threads: int, *args: int, recorded: bool = True) -> None:
    """Runs a body once for each thread number below `threads`, at the same time, and waits."""
    packed = pack(f"{len(args)}q", *args)
    where = id(packed) + _HEAD
    if recorded and record.current is not None and (recording := record.active()) is not None:
        recording.note(compiled.address, where, threads, packed)
    if threads == 1:
        _run(compiled.address, where)
    else:
        _launch(compiled.address, where, threads)
