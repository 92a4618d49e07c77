"""Group and layer normalisation, channels last, with SiLU fused, forward and backward.

A sample's pixels are read as rows of `period` numbers, a whole number of pixels and at least 256 long, so that every loop
runs over long stretches of memory with the channels' coefficients beside them. Sums of deviations and of their squares come
from one pass over blocks of BLOCK rows, about the mean of the blocks before, and are merged as Chan et al. 1983 do, in float64,
so a large mean costs no digits. Each thread takes whole samples, which fit its second-level cache: memory is read once. A few
large samples are cut into parts instead, in two launches, at the price of reading them twice. The backward recomputes the
normalised value and the activation, so nothing is saved but x, mean and 1/σ. Bound by memory bandwidth.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinydiff.kernels.arrays import Kernel, add_to, load, number, plain, share, store, threads_for
from tinydiff.kernels.jit import njit
from tinydiff.kernels.launch import unpack
from tinydiff.kernels.mathfun import bounded, one_and_exp_of_minus, sigmoid
from tinydiff.kernels.memory import LINE, contiguous, copy, empty, prefetch, read, scratch, write, zero

WHOLE, PARTS, APPLY = range(3)  # what a launch does: whole samples, or parts of samples in two stages
FIRST = 8  # rows whose mean the first block is centred at
BLOCK = 64  # rows summed straight into float32
ROW = 256  # numbers in a row, at least
_f = np.float32
_ACTIVATIONS = {None: 0, "silu": 1}


@njit
def _fold(sums, period, channels):  # type: ignore[no-untyped-def]
    """Add the pixels of a row of sums up, into the first one's place."""
    for at in range(channels, period, channels):
        for c in range(channels):
            add_to(sums, c, load(sums, at + c))


@njit
def _spread(values, period, channels):  # type: ignore[no-untyped-def]
    """Repeat the first pixel of a row over all of it."""
    done = channels
    while done < period:
        count = min(done, period - done)
        copy(values + done * 4, values, count)
        done += count


@njit
def _moments(x, size, period, channels, groups, mean, squares, work):  # type: ignore[no-untyped-def]
    """The mean and the sum of squared deviations of each group, of `size` numbers at x. work: 3 periods."""
    centre, first, second = work, work + 4 * period, work + 8 * period
    width = channels // groups
    start = min(size, FIRST * period)
    zero(first, period)
    for row in range(0, start, period):
        for j in range(min(period, start - row)):
            add_to(first, j, load(x, row + j))
    _fold(first, period, channels)
    for g in range(groups):
        for c in range(g * width, (g + 1) * width):
            mean[g] += read(first, c)
        mean[g] /= start // groups
    done = 0.0
    for start in range(0, size, BLOCK * period):
        stop = min(size, start + BLOCK * period)
        for c in range(channels):
            write(centre, c, _f(mean[c // width]))
        _spread(centre, period, channels)
        zero(first, period)
        zero(second, period)
        for row in range(start, stop, period):
            for j in range(min(period, stop - row)):
                d = load(x, row + j) - load(centre, j)
                add_to(first, j, d)
                add_to(second, j, d * d)
        _fold(first, period, channels)
        _fold(second, period, channels)
        count = float((stop - start) // groups)
        for g in range(groups):
            total, square = 0.0, 0.0
            for c in range(g * width, (g + 1) * width):
                total += read(first, c)
                square += read(second, c)
            base = float(read(centre, g * width))
            shift = base + total / count - mean[g] if done else 0.0
            mean[g] = mean[g] + shift * count / (done + count) if done else base + total / count
            squares[g] += square - total * total / count + shift * shift * done * count / (done + count)
        done += count


@njit
def _fetch(x, length):  # type: ignore[no-untyped-def]
    """Prefetch `length` numbers at x, while something else is computed."""
    for line in range(x, x + 4 * length, 4 * LINE):
        prefetch(line)


@njit
def _apply(x, y, size, period, centre, scale, shift, silu):  # type: ignore[no-untyped-def]
    """y = (x - centre) · scale + shift, then SiLU if asked, which leaves time to fetch the next sample's x."""
    for row in range(0, size, period):
        length = min(period, size - row)
        if silu:
            _fetch(x + 4 * (size + row), length)
            for j in range(length):
                z = (load(x, row + j) - load(centre, j)) * load(scale, j) + load(shift, j)
                store(y, row + j, z / one_and_exp_of_minus(bounded(z)))
        else:
            for j in range(length):
                store(y, row + j, (load(x, row + j) - load(centre, j)) * load(scale, j) + load(shift, j))


@Kernel
def _group_norm(args, thread):  # type: ignore[no-untyped-def]
    """Whole samples; or a part of each, its moments to `parts` (threads, samples, 2, groups), then all."""
    # fmt: off
    (x, y, weight, bias, mean, rstd, parts, work, samples, size, channels, groups, period, eps, silu, stage, threads) = unpack(
        args, 17)
    # fmt: on
    work += thread * 6 * period * 4
    centre, scale, shift = work, work + 4 * period, work + 8 * period
    width, count = channels // groups, size // groups
    first, last, begin, end = samples * thread // threads, samples * (thread + 1) // threads, 0, size
    if stage != WHOLE:
        first, last = 0, samples
        begin, end = share(size // channels, thread, threads)
        begin, end = begin * channels, end * channels
    for n in range(first, last):
        m, s = np.zeros(groups), np.zeros(groups)
        here, there = x + (n * size + begin) * 4, y + (n * size + begin) * 4
        if stage != APPLY:
            _moments(here, end - begin, period, channels, groups, m, s, work + 12 * period)
        if stage == PARTS:
            for g in range(groups):
                write(parts, ((thread * samples + n) * 2) * groups + g, _f(m[g]))
                write(parts, ((thread * samples + n) * 2 + 1) * groups + g, _f(s[g]))
            continue
        if stage == APPLY:
            done = 0.0
            for t in range(threads):
                start, stop = share(size // channels, t, threads)
                part = float((stop - start) * width)
                for g in range(groups):
                    d = read(parts, ((t * samples + n) * 2) * groups + g) - m[g]
                    m[g] += d * part / (done + part)
                    s[g] += read(parts, ((t * samples + n) * 2 + 1) * groups + g) + d * d * part * done / (done + part)
                done += part
        for g in range(groups):
            r = 1 / np.sqrt(s[g] / count + number(eps))
            if stage == WHOLE or thread == 0:
                write(mean, n * groups + g, _f(m[g]))
                write(rstd, n * groups + g, _f(r))
            for c in range(g * width, (g + 1) * width):
                write(centre, c, _f(m[g]))
                write(scale, c, _f(r) * (read(weight, c) if weight else _f(1)))
                write(shift, c, read(bias, c) if bias else _f(0))
        _spread(centre, period, channels)
        _spread(scale, period, channels)
        _spread(shift, period, channels)
        _apply(here, there, end - begin, period, centre, scale, shift, silu)


@njit
def _weighted(g, x, z, size, period, channels, centre, scale, w, b, first, second, silu, sums, more):  # type: ignore[no-untyped-def]
    """Per channel the sums (2, channels) of the gradients before the activation (kept in z) and of them times x̂.

    The activation leaves time to fetch `more`, unless that is 0.
    """
    for block in range(0, size, BLOCK * period):
        zero(first, period)
        zero(second, period)
        for row in range(block, min(size, block + BLOCK * period), period):
            length = min(period, size - row)
            if silu:
                _fetch(more + 4 * row, length if more else 0)
                for j in range(length):
                    normalised = (load(x, row + j) - load(centre, j)) * load(scale, j)
                    before = normalised * load(w, j) + load(b, j)
                    s = sigmoid(before)
                    d = load(g, row + j) * s * (_f(1) + before * (_f(1) - s))
                    store(z, row + j, d)
                    add_to(first, j, d)
                    add_to(second, j, d * normalised)
            else:
                for j in range(length):
                    d = load(g, row + j)
                    add_to(first, j, d)
                    add_to(second, j, d * ((load(x, row + j) - load(centre, j)) * load(scale, j)))
        _fold(first, period, channels)
        _fold(second, period, channels)
        for c in range(channels):
            sums[0, c] += read(first, c)
            sums[1, c] += read(second, c)


@njit
def _centred(z, x, i, j, centre, slope, w, offset):  # type: ignore[no-untyped-def]
    """w · z - offset - slope · (x - centre) for number i, the j-th of its row."""
    return z * load(w, j) - load(offset, j) - (load(x, i) - load(centre, j)) * load(slope, j)


@njit
def _combine(g, x, z, more, size, period, centre, slope, w, offset, silu):  # type: ignore[no-untyped-def]
    """z = w · (z or, without activation, g) - offset - slope · (x - centre), plus `more` unless that is 0."""
    for row in range(0, size, period):
        length = min(period, size - row)
        if silu and more:
            for j in range(length):
                store(z, row + j, _centred(read(z, row + j), x, row + j, j, centre, slope, w, offset) + load(more, row + j))
        elif silu:
            for j in range(length):
                store(z, row + j, _centred(read(z, row + j), x, row + j, j, centre, slope, w, offset))
        elif more:
            for j in range(length):
                store(z, row + j, _centred(load(g, row + j), x, row + j, j, centre, slope, w, offset) + load(more, row + j))
        else:
            for j in range(length):
                store(z, row + j, _centred(load(g, row + j), x, row + j, j, centre, slope, w, offset))


@Kernel
def _group_norm_backward(args, thread):  # type: ignore[no-untyped-def]
    """gx, and to `parts` the sums over pixels for weight and bias: (threads, samples or 1, 2, channels).

    With x̂ = (x - mean) rstd and z the gradient before the activation, gx = rstd (w z - ⟨w z⟩ - x̂ ⟨w z x̂⟩), where ⟨⟩ is the
    mean over a group: over whole samples, or over all the threads' parts of each. `more` is added to gx unless it is 0.
    """
    (
        g, x, weight, bias, mean, rstd, more, gx, parts, work,
        samples, size, channels, groups, period, silu, stage, threads,
    ) = unpack(args, 18)  # fmt: skip
    step = 4 * period
    work += thread * 8 * step
    centre, scale, w, b = work, work + step, work + 2 * step, work + 3 * step
    offset, slope, one, two = work + 4 * step, work + 5 * step, work + 6 * step, work + 7 * step
    width, count = channels // groups, size // groups
    first, last, begin, end = samples * thread // threads, samples * (thread + 1) // threads, 0, size
    if stage != WHOLE:
        first, last = 0, samples
        begin, end = share(size // channels, thread, threads)
        begin, end = begin * channels, end * channels
    totals = np.zeros((2, channels))
    for n in range(first, last):
        for c in range(channels):
            write(centre, c, read(mean, n * groups + c // width))
            write(scale, c, read(rstd, n * groups + c // width))
            write(w, c, read(weight, c) if weight else _f(1))
            write(b, c, read(bias, c) if bias else _f(0))
        at, sums = (n * size + begin) * 4, np.zeros((2, channels))
        added = more + at if more else 0
        if stage != APPLY:
            for row in (centre, scale, w, b):
                _spread(row, period, channels)
            before = g + at, x + at, gx + at
            _weighted(*before, end - begin, period, channels, centre, scale, w, b, one, two, silu, sums, added)
            totals += sums
        if stage == PARTS:
            for c in range(channels):
                write(parts, ((thread * samples + n) * 2) * channels + c, _f(sums[0, c]))
                write(parts, ((thread * samples + n) * 2 + 1) * channels + c, _f(sums[1, c]))
            continue
        if stage == APPLY:
            for t in range(threads):
                for c in range(channels):
                    sums[0, c] += read(parts, ((t * samples + n) * 2) * channels + c)
                    sums[1, c] += read(parts, ((t * samples + n) * 2 + 1) * channels + c)
        for group in range(groups):
            mean_z, mean_zx = 0.0, 0.0
            for c in range(group * width, (group + 1) * width):
                mean_z += sums[0, c] * read(w, c)
                mean_zx += sums[1, c] * read(w, c)
            for c in range(group * width, (group + 1) * width):
                r = read(scale, c)
                write(offset, c, _f(r * mean_z / count))
                write(slope, c, _f(r * r * mean_zx / count))
                write(w, c, r * read(w, c))
        for row in (centre, w, offset, slope):
            _spread(row, period, channels)
        _combine(g + at, x + at, gx + at, added, end - begin, period, centre, slope, w, offset, silu)
    if stage == WHOLE:
        for c in range(channels):
            write(parts, thread * 2 * channels + c, _f(totals[0, c]))
            write(parts, (thread * 2 + 1) * channels + c, _f(totals[1, c]))


def _plan(total: int, samples: int, pixels: int, channels: int) -> tuple[int, int, tuple[int, ...]]:
    """The period, the number of threads, and the stages to launch: whole samples where they share out about evenly."""
    period, threads = channels * min(pixels, max(1, ROW // channels)), threads_for(total)
    if threads == 1 or samples % threads == 0 or samples >= 4 * threads:
        return period, threads, (WHOLE,)
    return period, min(threads, pixels), (PARTS, APPLY)


def _fits(x: np.ndarray, weight: Any, bias: Any, num_groups: int) -> bool:
    for p in (weight, bias):
        if p is not None and (p.shape != x.shape[-1:] or not plain(p)):
            return False
    return plain(x) and x.ndim >= 2 and x.shape[-1] % num_groups == 0


def group_norm(x: np.ndarray, weight: Any, bias: Any, *, num_groups: int, eps: float, activation: str | None = None) -> Any:
    """(y, (mean, rstd)) of x (N, …, C) with groups of channels normalised; weight and bias (C,) or None; mean, rstd (N, groups).

    NotImplemented but for float32, C-contiguous, not empty arrays, and for activations other than None and "silu".
    """
    if activation not in _ACTIVATIONS or not _fits(x, weight, bias, num_groups):
        return NotImplemented
    n, channels = x.shape[0], x.shape[-1]
    size = x.size // n
    y = empty(*x.shape)
    mean, rstd = np.empty((n, num_groups), np.float32), np.empty((n, num_groups), np.float32)
    period, threads, stages = _plan(x.size, n, size // channels, channels)
    parts = None if stages == (WHOLE,) else np.empty((threads, n, 2, num_groups), np.float32)
    _keep, (work,) = scratch(threads * 6 * period)
    sizes = (n, size, channels, num_groups, period, float(eps), _ACTIVATIONS[activation])
    for stage in stages:
        _group_norm(threads, x, y, weight, bias, mean, rstd, parts, work, *sizes, stage, threads)
    return y, (mean, rstd)


def group_norm_backward(
    g: np.ndarray,
    x: np.ndarray,
    weight: Any,
    bias: Any,
    mean: np.ndarray,
    rstd: np.ndarray,
    more: np.ndarray | None = None,
    *,
    num_groups: int,
    activation: str | None = None,
) -> Any:
    """(gx, gweight, gbias) from g, the gradient of `group_norm`'s result; None for a parameter that is None.

    `more`, of x's shape, is added to gx.
    """
    if activation not in _ACTIVATIONS or not _fits(x, weight, bias, num_groups) or not plain(g, mean, rstd) or g.shape != x.shape:
        return NotImplemented
    more = None if more is None else contiguous(more)
    n, channels = x.shape[0], x.shape[-1]
    size = x.size // n
    gx = empty(*x.shape)
    period, threads, stages = _plan(x.size, n, size // channels, channels)
    parts = np.empty((threads if stages == (WHOLE,) else threads * n, 2, channels), np.float32)
    _keep, (work,) = scratch(threads * 8 * period)
    sizes = (n, size, channels, num_groups, period, _ACTIVATIONS[activation])
    for stage in stages:
        _group_norm_backward(threads, g, x, weight, bias, mean, rstd, more, gx, parts, work, *sizes, stage, threads)
    gbias, gweight = parts.sum(0) if len(parts) > 1 else parts[0]
    return gx, None if weight is None else gweight, None if bias is None else gbias


@Kernel
def _layer_norm(args, thread):  # type: ignore[no-untyped-def]
    x, y, weight, bias, mean, rstd, rows, channels, eps, threads = unpack(args, 10)
    start, stop = share(rows, thread, threads)
    for row in range(start, stop):
        at = row * channels
        total = _f(0)
        for c in range(channels):
            total += load(x, at + c)
        m = total / _f(channels)
        total = _f(0)
        for c in range(channels):
            d = load(x, at + c) - m
            total += d * d
        r = _f(1) / np.sqrt(total / _f(channels) + number(eps))
        write(mean, row, m)
        write(rstd, row, r)
        for c in range(channels):
            store(y, at + c, (load(x, at + c) - m) * r * load(weight, c) + load(bias, c))


@Kernel
def _layer_norm_backward(args, thread):  # type: ignore[no-untyped-def]
    """gx, and the thread's sums for weight and bias in blocks of rows, added up in float64."""
    g, x, weight, mean, rstd, gx, gweight, gbias, work, rows, channels, threads = unpack(args, 12)
    first = work + thread * 2 * channels * 4
    second = first + channels * 4
    sums, products = np.zeros(channels), np.zeros(channels)
    start, stop = share(rows, thread, threads)
    for block in range(start, stop, BLOCK):
        zero(first, channels)
        zero(second, channels)
        for row in range(block, min(stop, block + BLOCK)):
            at = row * channels
            m, r = read(mean, row), read(rstd, row)
            total, product = _f(0), _f(0)
            for c in range(channels):
                d, normalised = load(g, at + c), (load(x, at + c) - m) * r
                add_to(first, c, d)
                add_to(second, c, d * normalised)
                d *= load(weight, c)
                total += d
                product += d * normalised
            total /= _f(channels)
            product /= _f(channels)
            for c in range(channels):
                d, normalised = load(g, at + c) * load(weight, c), (load(x, at + c) - m) * r
                store(gx, at + c, r * (d - total - normalised * product))
        for c in range(channels):
            sums[c] += read(first, c)
            products[c] += read(second, c)
    for c in range(channels):
        write(gbias, thread * channels + c, _f(sums[c]))
        write(gweight, thread * channels + c, _f(products[c]))


def layer_norm(x: np.ndarray, weight: Any, bias: Any, *, eps: float) -> Any:
    """(y, (mean, rstd)) of x (…, C) with the last axis normalised; weight and bias (C,) or None; mean, rstd (rows,).

    NotImplemented but for float32, C-contiguous, not empty arrays.
    """
    if x.ndim == 0 or not _fits(x.reshape(1, *x.shape), weight, bias, 1):
        return NotImplemented
    channels = x.shape[-1]
    rows = x.size // channels
    y, mean, rstd = empty(*x.shape), np.empty(rows, np.float32), np.empty(rows, np.float32)
    weight = np.ones(channels, np.float32) if weight is None else weight
    bias = np.zeros(channels, np.float32) if bias is None else bias
    threads = min(rows, threads_for(x.size))
    _layer_norm(threads, x, y, weight, bias, mean, rstd, rows, channels, float(eps), threads)
    return y, (mean, rstd)


def layer_norm_backward(
    g: np.ndarray, x: np.ndarray, weight: Any, bias: Any, mean: np.ndarray, rstd: np.ndarray, *, eps: float
) -> Any:
    """(gx, gweight, gbias) from g, the gradient of `layer_norm`'s result; None for a parameter that is None."""
    if x.ndim == 0 or not _fits(x.reshape(1, *x.shape), weight, bias, 1) or not plain(g, mean, rstd) or g.shape != x.shape:
        return NotImplemented
    channels = x.shape[-1]
    rows = x.size // channels
    gx = empty(*x.shape)
    scale = np.ones(channels, np.float32) if weight is None else weight
    threads = min(rows, threads_for(x.size))
    gweight, gbias = np.empty((threads, channels), np.float32), np.empty((threads, channels), np.float32)
    _keep, (work,) = scratch(threads * 2 * channels)
    _layer_norm_backward(threads, g, x, scale, mean, rstd, gx, gweight, gbias, work, rows, channels, threads)
    return gx, gweight.sum(0) if weight is not None else None, gbias.sum(0) if bias is not None else None
