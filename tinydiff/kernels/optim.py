"""Optimiser updates in one pass over parameters, gradients and their averages, and the sum of squares that clipping needs.

AdamW touches four or five arrays; NumPy's dozen expressions would read and write each several times over. Bound by memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinydiff.kernels.arrays import Kernel, load, number, plain, share, store, threads_for, word
from tinydiff.kernels.jit import njit
from tinydiff.kernels.launch import unpack
from tinydiff.kernels.memory import write

BLOCK = 1024  # squares summed in float32 before they join the float64 sum
_f = np.float32


@njit(forceinline=True)
def _update(param, g, m, v, i, keep, step, root, eps, keep_m, take_m, keep_v, take_v):  # type: ignore[no-untyped-def]
    """One weight's step; its new value. What it writes it has read before, so that `load` and `store` are right here."""
    gradient = load(g, i)
    first = keep_m * load(m, i) + take_m * gradient
    second = keep_v * load(v, i) + take_v * gradient * gradient
    value = keep * load(param, i) - step * first / (root * np.sqrt(second) + eps)
    store(m, i, first)
    store(v, i, second)
    store(param, i, value)
    return value


@Kernel
def _adamw(args, thread):  # type: ignore[no-untyped-def]
    """A part of each of `count` parameters; the table has addresses of parameter, gradient, m, v and average, and the size."""
    table, count, keep, step, root, eps, keep_m, take_m, keep_v, take_v, take_ema, threads = unpack(args, 12)
    keep, step, root, eps, take_ema = number(keep), number(step), number(root), number(eps), number(take_ema)
    keep_m, take_m, keep_v, take_v = number(keep_m), number(take_m), number(keep_v), number(take_v)
    for row in range(count):
        param, g, m, v, ema, size = unpack(table + row * 48, 6)
        start, stop = share(size, thread, threads)
        if ema:
            for i in range(start, stop):
                value = _update(param, g, m, v, i, keep, step, root, eps, keep_m, take_m, keep_v, take_v)
                average = load(ema, i)
                store(ema, i, average + take_ema * (value - average))
        else:
            for i in range(start, stop):
                _update(param, g, m, v, i, keep, step, root, eps, keep_m, take_m, keep_v, take_v)


def adamw(
    changes: Sequence[Sequence[Any]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    ema_decay: float = 1.0,
) -> list[Sequence[Any]]:
    """One step of AdamW (Loshchilov & Hutter 2017), in place and for all parameters in one launch; `step` counts from 1.

    changes: for each parameter its array, gradient, m, v, and moving average or None. Returns, unchanged, those that are not
    float32, C-contiguous, writable (but the gradient) and of one shape.
    """
    table, taken, total, declined = array("q"), 0, 0, []
    for change in changes:
        given = change if change[4] is not None else change[:4]
        g = change[1]
        if not plain(*given) or any(a.shape != g.shape or not (a is g or a.flags.writeable) for a in given):
            declined.append(change)
            continue
        table.extend([*map(word, change), g.size])
        taken += 1
        total += g.size
    if taken:
        rates = [1 - lr * weight_decay, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, eps]
        averaging = [beta1, 1 - beta1, beta2, 1 - beta2, 1 - ema_decay]
        threads = threads_for(total)
        _adamw(threads, table.buffer_info()[0], taken, *map(float, rates + averaging), threads)
    return declined


@Kernel
def _sum_of_squares(args, thread):  # type: ignore[no-untyped-def]
    """The sum of each block of `count` arrays; the table has addresses and sizes."""
    table, count, sums, total, threads = unpack(args, 5)
    first, last = total * thread // threads, total * (thread + 1) // threads  # in blocks
    for row in range(count):
        x, size = unpack(table + 16 * row, 2)
        blocks = (size + BLOCK - 1) // BLOCK
        for block in range(max(first, 0), min(last, blocks)):
            square = _f(0)
            for i in range(block * BLOCK, min(size, (block + 1) * BLOCK)):
                square += load(x, i) * load(x, i)
            write(sums, block, square)
        first, last, sums = first - blocks, last - blocks, sums + 4 * blocks


def sum_of_squares(arrays: Sequence[np.ndarray]) -> Any:
    """Σ x² over all arrays as a float: blocks in float32, their sum in float64, the same for every number of threads.

    NotImplemented unless all are float32, C-contiguous and not empty.
    """
    if not plain(*arrays):
        return NotImplemented
    table = array("q")
    for x in arrays:
        table.extend((word(x), x.size))
    total = sum(-(-x.size // BLOCK) for x in arrays)
    sums = np.empty(total, np.float32)
    threads = min(total, threads_for(total * BLOCK))
    _sum_of_squares(threads, table.buffer_info()[0], len(arrays), sums, total, threads)
    return float(sums.sum(dtype=np.float64))
