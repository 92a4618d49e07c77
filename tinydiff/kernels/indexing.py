"""Adding rows up where integers say: the gradient of an embedding and of picked rows.

Bound by memory. The threads share the columns and each goes through all rows in order, so that the result has the same bits
for any number of threads, and those of the definition, `numpy.add.at`, which takes some ten times as long.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinydiff.kernels import record
from tinydiff.kernels.arrays import Kernel, plain, share, threads_for
from tinydiff.kernels.launch import unpack
from tinydiff.kernels.memory import empty, zero
from tinydiff.kernels.microkernel import LANES, accumulate


@Kernel
def _untake(args, thread):  # type: ignore[no-untyped-def]
    x, indices, out, count, entries, columns, threads = unpack(args, 7)
    start, stop = share(columns, thread, threads)
    for i in range(entries):
        zero(out + 4 * (i * columns + start), stop - start)
    for i in range(count):
        (index,) = unpack(indices + 8 * i, 1)
        source, target = x + 4 * i * columns, out + 4 * index * columns
        for c in range(start, stop, LANES):
            accumulate(target + 4 * c, source + 4 * c, min(LANES, stop - c))


def untake(x: np.ndarray, shape: tuple[int, ...], indices: np.ndarray, axis: int) -> Any:
    """Zeros of `shape` with the rows of x (*indices.shape, *shape[1:]) added at `indices`, which are in range.

    NotImplemented for other axes than the first, and for other than float32 in C order.
    """
    if axis != 0 or not plain(x) or record.active():
        return NotImplemented
    indices = np.ascontiguousarray(indices, np.int64)
    columns = math.prod(shape[1:])
    out = empty(*shape)
    threads = min(threads_for(x.size), -(-columns // LANES))
    _untake(threads, x, indices, out, indices.size, shape[0], columns, threads)
    return out
