"""Optimiser updates in one pass over parameters, gradients and their averages, and the sum of squares that clipping needs.

AdamW touches four or five arrays; NumPy's dozen expressions would read and write each several times over. Bound by memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from tinydiff.kernels.arrays import Kernel, load, number, plain, share, store, threads_for
from tinydiff.kernels.jit import njit
from tinydiff.kernels.launch import unpack
from tinydiff.kernels.memory import address, write

BLOCK = 1024  # squares summed in float32 before they join the float64 sum
_f = np.float32


@njit(forceinline=True)
def _update(param, g, m, v, i, scale, keep, step, root, eps, keep_m, take_m, keep_v, take_v):  # type: ignore[no-untyped-def]
    """One weight's step; its new value. What it writes it has read before, so that `load` and `store` are right here."""
    gradient = scale * load(g, i)
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
    table, count, scale, keep, step, root, eps, keep_m, take_m, keep_v, take_v, take_ema, threads = unpack(args, 13)
    scale, keep, step, root, eps = number(scale), number(keep), number(step), number(root), number(eps)
    keep_m, take_m, keep_v, take_v, take_ema = number(keep_m), number(take_m), number(keep_v), number(take_v), number(take_ema)
    for row in range(count):
        param, g, m, v, ema, size = unpack(table + row * 48, 6)
        start, stop = share(size, thread, threads)
        if ema:
            for i in range(start, stop):
                value = _update(param, g, m, v, i, scale, keep, step, root, eps, keep_m, take_m, keep_v, take_v)
                average = load(ema, i)
                store(ema, i, average + take_ema * (value - average))
        else:
            for i in range(start, stop):
                _update(param, g, m, v, i, scale, keep, step, root, eps, keep_m, take_m, keep_v, take_v)


class Table:
    """Where parameters, their m, v and averages lie, checked once: to look at all that again took a tenth of a small step.

    Built of `changes` as `adamw` gets them; `taken` are the positions of those that the kernel takes.
    """

    def __init__(self, changes: Sequence[Sequence[Any]]) -> None:
        self.arrays = [(p, m, v, average) for p, _, m, v, average in changes]
        self.taken = [i for i, row in enumerate(self.arrays) if self._fits([a for a in row if a is not None])]
        rows = [self.arrays[i] for i in self.taken]
        places = [(address(p), 0, address(m), address(v), address(average), p.size) for p, m, v, average in rows]
        self.places = np.array(places, np.int64).reshape(-1, 6)

    @staticmethod
    def _fits(given: Sequence[np.ndarray]) -> bool:
        return plain(*given) and all(a.shape == given[0].shape and a.flags.writeable for a in given)

    def lists(self, changes: Sequence[Sequence[Any]]) -> bool:
        """Whether these are changes of its arrays."""
        return len(changes) == len(self.arrays) and all(
            p is q and m is k and v is w and average is other
            for (p, _, m, v, average), (q, k, w, other) in zip(changes, self.arrays)
        )


def adamw(
    changes: Sequence[Sequence[Any]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    ema_decay: float = 1.0,
    scale: float = 1.0,
    table: Table | None = None,
) -> list[Sequence[Any]]:
    """One step of AdamW (Loshchilov & Hutter 2017), in place and for all parameters in one launch; `step` counts from 1.

    changes: for each parameter its array, gradient, m, v, and moving average or None. scale: what gradients are multiplied with.
    table: of the same parameters, if there is one. Returns, unchanged, those that are not float32, C-contiguous, writable (but
    the gradient) and of one shape.
    """
    table = table or Table(changes)
    places, taken = table.places, table.taken
    fits = [plain(g) and g.shape == p.shape for p, g in (changes[i][:2] for i in taken)]
    if not all(fits):
        places, taken = places[fits], [i for i, fit in zip(taken, fits) if fit]
    if taken:
        places[:, 1] = [address(changes[i][1]) for i in taken]
        total = int(places[:, 5].sum())
        rates = [scale, 1 - lr * weight_decay, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, eps]
        averaging = [beta1, 1 - beta1, beta2, 1 - beta2, 1 - ema_decay]
        threads = threads_for(total)
        _adamw(threads, places, len(taken), *map(float, rates + averaging), threads)
    done = set(taken)
    return [change for i, change in enumerate(changes) if i not in done]


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
    sizes = [x.size for x in arrays]
    table = array("q", chain.from_iterable(zip(map(address, arrays), sizes)))
    total = sum([-(-size // BLOCK) for size in sizes])
    sums = np.empty(total, np.float32)
    threads = min(total, threads_for(total * BLOCK))
    _sum_of_squares(threads, table.buffer_info()[0], len(arrays), sums, total, threads)
    return float(sums.sum(dtype=np.float64))
