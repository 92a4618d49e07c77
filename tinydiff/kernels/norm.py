"""Group and layer normalisation, channels last, with SiLU fused, forward and backward.

A sample's pixels are read as rows of `period` numbers, a whole number of pixels and at least 256 long, so that every loop
runs over long stretches of memory with the channels' coefficients beside them. Means and squared deviations come from blocks of
BLOCK rows that stay in cache (two passes over each, then merged as Chan et al. 1983 do, in float64), so a large mean
costs no digits. Each thread takes whole samples, which fit its second-level cache: memory is read once. A few large
samples are cut into parts instead, at the price of reading them twice. The backward recomputes the normalised value and
the activation, so nothing is saved but x, mean and 1/σ. Bound by memory bandwidth.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinydiff.kernels.arrays import Kernel, add_to, bits, load, plain, share, store, threads_for
from tinydiff.kernels.jit import njit
from tinydiff.kernels.launch import unpack
from tinydiff.kernels.mathfun import from_bits, sigmoid
from tinydiff.kernels.memory import address, read, scratch, write, zero

BLOCK = 64  # rows summed straight into float32
ROW = 256  # numbers in a row, at least
_f = np.float32
_ACTIVATIONS = {None: 0, "silu": 1}


@njit(forceinline=True)
def _fold(sums, period, channels):  # type: ignore[no-untyped-def]
    """Add the pixels of a row of sums up, into the first one's place."""
    for at in range(channels, period, channels):
        for c in range(channels):
            write(sums, c, read(sums, c) + read(sums, at + c))


@njit(forceinline=True)
def _spread(values, period, channels):  # type: ignore[no-untyped-def]
    """Repeat the first pixel of a row over all of it."""
    for at in range(channels, period):
        write(values, at, read(values, at - channels))


@njit
def _moments(x, size, period, channels, groups, mean, squares, work):  # type: ignore[no-untyped-def]
    """The mean and the sum of squared deviations of each group, of `size` numbers at x. work: 2 periods."""
    sums, centre = work, work + 4 * period
    width = channels // groups
    before = 0.0
    for start in range(0, size, BLOCK * period):
        stop = min(size, start + BLOCK * period)
        count = float((stop - start) // channels * width)
        zero(sums, period)
        for row in range(start, stop, period):
            for j in range(min(period, stop - row)):
                add_to(sums, j, load(x, row + j))
        _fold(sums, period, channels)
        for g in range(groups):
            total = 0.0
            for c in range(g * width, (g + 1) * width):
                total += read(sums, c)
            for c in range(g * width, (g + 1) * width):
                write(centre, c, _f(total / count))
        _spread(centre, period, channels)
        zero(sums, period)
        for row in range(start, stop, period):
            for j in range(min(period, stop - row)):
                d = load(x, row + j) - load(centre, j)
                add_to(sums, j, d * d)
        _fold(sums, period, channels)
        for g in range(groups):
            total = 0.0
            for c in range(g * width, (g + 1) * width):
                total += read(sums, c)
            shift = read(centre, g * width) - mean[g]
            mean[g] += shift * count / (before + count)
            squares[g] += total + shift * shift * before * count / (before + count)
        before += count


@njit
def _apply(x, y, size, period, centre, scale, shift, silu):  # type: ignore[no-untyped-def]
    """y = (x - centre) · scale + shift, then SiLU if asked."""
    for row in range(0, size, period):
        length = min(period, size - row)
        if silu:
            for j in range(length):
                z = (load(x, row + j) - load(centre, j)) * load(scale, j) + load(shift, j)
                store(y, row + j, z * sigmoid(z))
        else:
            for j in range(length):
                store(y, row + j, (load(x, row + j) - load(centre, j)) * load(scale, j) + load(shift, j))


@njit
def _coefficients(mean, rstd, weight, bias, channels, groups, period, centre, scale, shift):  # type: ignore[no-untyped-def]
    """Rows of coefficients from one sample's statistics (addresses of `groups` numbers) and the parameters (0: none)."""
    width = channels // groups
    for c in range(channels):
        write(centre, c, read(mean, c // width))
        write(scale, c, read(rstd, c // width) * (read(weight, c) if weight else _f(1)))
        write(shift, c, read(bias, c) if bias else _f(0))
    _spread(centre, period, channels)
    _spread(scale, period, channels)
    _spread(shift, period, channels)


@Kernel
def _group_norm(args, thread):  # type: ignore[no-untyped-def]
    """Whole samples."""
    x, y, weight, bias, mean, rstd, work, samples, size, channels, groups, period, eps, silu, threads = unpack(args, 15)
    work += thread * 5 * period * 4
    for n in range(samples * thread // threads, samples * (thread + 1) // threads):
        m, s = np.zeros(groups), np.zeros(groups)
        _moments(x + n * size * 4, size, period, channels, groups, m, s, work)
        count = size // groups
        for g in range(groups):
            write(mean, n * groups + g, _f(m[g]))
            write(rstd, n * groups + g, _f(1 / np.sqrt(s[g] / count + from_bits(np.int32(eps)))))
        centre, scale, shift = work + 8 * period, work + 12 * period, work + 16 * period
        at = n * groups * 4
        _coefficients(mean + at, rstd + at, weight, bias, channels, groups, period, centre, scale, shift)
        _apply(x + n * size * 4, y + n * size * 4, size, period, centre, scale, shift, silu)


@Kernel
def _part_moments(args, thread):  # type: ignore[no-untyped-def]
    """The moments of a part of each sample per thread, to mean and squares (threads, samples, groups)."""
    x, mean, squares, work, samples, size, channels, groups, period, threads = unpack(args, 10)
    start, stop = share(size // channels, thread, threads)
    for n in range(samples):
        m, s = np.zeros(groups), np.zeros(groups)
        part = x + (n * size + start * channels) * 4
        _moments(part, (stop - start) * channels, period, channels, groups, m, s, work + thread * 2 * period * 4)
        for g in range(groups):
            write(mean, (thread * samples + n) * groups + g, _f(m[g]))
            write(squares, (thread * samples + n) * groups + g, _f(s[g]))


@Kernel
def _part_apply(args, thread):  # type: ignore[no-untyped-def]
    """The thread's part of each sample, normalised."""
    x, y, weight, bias, mean, rstd, work, samples, size, channels, groups, period, silu, threads = unpack(args, 14)
    centre = work + thread * 3 * period * 4
    scale, shift = centre + 4 * period, centre + 8 * period
    start, stop = share(size // channels, thread, threads)
    for n in range(samples):
        at = n * groups * 4
        _coefficients(mean + at, rstd + at, weight, bias, channels, groups, period, centre, scale, shift)
        part = (n * size + start * channels) * 4
        _apply(x + part, y + part, (stop - start) * channels, period, centre, scale, shift, silu)


@Kernel
def _group_norm_backward(args, thread):  # type: ignore[no-untyped-def]
    """Whole samples: gx, and per sample the sums over pixels of the gradient z of the normalised value's scale and shift.

    With x̂ = (x - mean) rstd and z the gradient before the activation, gx = rstd (w z - ⟨w z⟩ - x̂ ⟨w z x̂⟩), where ⟨⟩ is the
    mean over a group.
    """
    (g, x, weight, bias, mean, rstd, gx, gweight, gbias, work, samples, size, channels, groups, period, silu, threads) = unpack(
        args, 17
    )
    step = 4 * period
    work += thread * 8 * step
    centre, scale, w, b = work, work + step, work + 2 * step, work + 3 * step
    first, second, offset, slope = work + 4 * step, work + 5 * step, work + 6 * step, work + 7 * step
    width = channels // groups
    for n in range(samples * thread // threads, samples * (thread + 1) // threads):
        for c in range(channels):
            write(centre, c, read(mean, n * groups + c // width))
            write(scale, c, read(rstd, n * groups + c // width))
            write(w, c, read(weight, c) if weight else _f(1))
            write(b, c, read(bias, c) if bias else _f(0))
        for row in (centre, scale, w, b):
            _spread(row, period, channels)
        here, gradient, result = x + n * size * 4, g + n * size * 4, gx + n * size * 4
        sums, products = np.zeros(channels), np.zeros(channels)
        for block in range(0, size, BLOCK * period):
            zero(first, period)
            zero(second, period)
            for row in range(block, min(size, block + BLOCK * period), period):
                length = min(period, size - row)
                if silu:
                    for j in range(length):
                        normalised = (load(here, row + j) - load(centre, j)) * load(scale, j)
                        before = normalised * load(w, j) + load(b, j)
                        s = sigmoid(before)
                        d = load(gradient, row + j) * (s + before * (s - s * s))
                        store(result, row + j, d)
                        add_to(first, j, d)
                        add_to(second, j, d * normalised)
                else:
                    for j in range(length):
                        d = load(gradient, row + j)
                        add_to(first, j, d)
                        add_to(second, j, d * ((load(here, row + j) - load(centre, j)) * load(scale, j)))
            _fold(first, period, channels)
            _fold(second, period, channels)
            for c in range(channels):
                sums[c] += read(first, c)
                products[c] += read(second, c)
        count = size // groups
        for group in range(groups):
            mean_z, mean_zx = 0.0, 0.0
            for c in range(group * width, (group + 1) * width):
                mean_z += sums[c] * read(w, c)
                mean_zx += products[c] * read(w, c)
            for c in range(group * width, (group + 1) * width):
                r = read(scale, c)
                write(gbias, n * channels + c, _f(sums[c]))
                write(gweight, n * channels + c, _f(products[c]))
                write(offset, c, _f(r * mean_z / count))
                write(slope, c, _f(r * r * mean_zx / count))
                write(w, c, r * read(w, c))
        for row in (w, offset, slope):
            _spread(row, period, channels)
        for row in range(0, size, period):
            length = min(period, size - row)
            if silu:
                for j in range(length):
                    d = read(result, row + j) * load(w, j) - load(offset, j)
                    store(result, row + j, d - (load(here, row + j) - load(centre, j)) * load(slope, j))
            else:
                for j in range(length):
                    d = load(gradient, row + j) * load(w, j) - load(offset, j)
                    store(result, row + j, d - (load(here, row + j) - load(centre, j)) * load(slope, j))


def _period(pixels: int, channels: int) -> int:
    return channels * min(pixels, max(1, ROW // channels))


def _fits(x: np.ndarray, weight: Any, bias: Any, num_groups: int) -> bool:
    parameters = [p for p in (weight, bias) if p is not None]
    return (
        plain(x, *parameters)
        and x.ndim >= 2
        and x.shape[-1] % num_groups == 0
        and all(p.shape == x.shape[-1:] for p in parameters)
    )


def group_norm(x: np.ndarray, weight: Any, bias: Any, *, num_groups: int, eps: float, activation: str | None = None) -> Any:
    """(y, (mean, rstd)) of x (N, …, C) with groups of channels normalised; weight and bias (C,) or None; mean, rstd (N, groups).

    NotImplemented but for float32, C-contiguous, not empty arrays, and for activations other than None and "silu".
    """
    if activation not in _ACTIVATIONS or not _fits(x, weight, bias, num_groups):
        return NotImplemented
    n, channels = x.shape[0], x.shape[-1]
    size = x.size // n
    y = np.empty_like(x)
    mean, rstd = np.empty((n, num_groups), np.float32), np.empty((n, num_groups), np.float32)
    period, silu = _period(size // channels, channels), _ACTIVATIONS[activation]
    threads = threads_for(x.size)
    sizes = (n, size, channels, num_groups, period)
    places = (address(x), address(y), address(weight), address(bias), address(mean), address(rstd))
    if threads == 1 or n % threads == 0 or n >= 4 * threads:
        _keep, (work,) = scratch(threads * 5 * period)
        _group_norm(threads, *places, work, *sizes, bits(eps), silu, threads)
        return y, (mean, rstd)
    threads = min(threads, size // channels)
    _keep, (work,) = scratch(threads * 3 * period)
    means, squares = np.empty((threads, n, num_groups), np.float32), np.empty((threads, n, num_groups), np.float32)
    _part_moments(threads, address(x), address(means), address(squares), work, *sizes, threads)
    counts = _part_pixels(size // channels, threads)[:, None, None] * (channels // num_groups)
    total = counts.sum()
    mean[...] = merged = (means * counts).sum(0) / total
    deviations = squares.sum(0, dtype=np.float64) + (counts * (means - merged) ** 2).sum(0)
    rstd[...] = 1 / np.sqrt(deviations / total + eps)
    _part_apply(threads, *places, work, *sizes, silu, threads)
    return y, (mean, rstd)


def _part_pixels(pixels: int, threads: int) -> np.ndarray:
    """How many pixels each thread takes, as float64."""
    return np.array([np.subtract(*share(pixels, t, threads)[::-1]) for t in range(threads)], np.float64)


def group_norm_backward(
    g: np.ndarray,
    x: np.ndarray,
    weight: Any,
    bias: Any,
    mean: np.ndarray,
    rstd: np.ndarray,
    *,
    num_groups: int,
    eps: float,
    activation: str | None = None,
) -> Any:
    """(gx, gweight, gbias) from g, the gradient of `group_norm`'s result; None for a parameter that is None."""
    if activation not in _ACTIVATIONS or not _fits(x, weight, bias, num_groups) or not plain(g, mean, rstd) or g.shape != x.shape:
        return NotImplemented
    n, channels = x.shape[0], x.shape[-1]
    size = x.size // n
    gx = np.empty_like(x)
    gweight, gbias = np.empty((n, channels), np.float32), np.empty((n, channels), np.float32)
    period = _period(size // channels, channels)
    threads = min(n, threads_for(x.size))
    _keep, (work,) = scratch(threads * 8 * period)
    arrays = (g, x, weight, bias, mean, rstd, gx, gweight, gbias)
    _group_norm_backward(
        threads, *map(address, arrays), work, n, size, channels, num_groups, period, _ACTIVATIONS[activation], threads
    )
    return gx, gweight.sum(0) if weight is not None else None, gbias.sum(0) if bias is not None else None


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
        r = _f(1) / np.sqrt(total / _f(channels) + from_bits(np.int32(eps)))
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
    y, mean, rstd = np.empty_like(x), np.empty(rows, np.float32), np.empty(rows, np.float32)
    weight = np.ones(channels, np.float32) if weight is None else weight
    bias = np.zeros(channels, np.float32) if bias is None else bias
    threads = min(rows, threads_for(x.size))
    _layer_norm(threads, *map(address, (x, y, weight, bias, mean, rstd)), rows, channels, bits(eps), threads)
    return y, (mean, rstd)


def layer_norm_backward(
    g: np.ndarray, x: np.ndarray, weight: Any, bias: Any, mean: np.ndarray, rstd: np.ndarray, *, eps: float
) -> Any:
    """(gx, gweight, gbias) from g, the gradient of `layer_norm`'s result; None for a parameter that is None."""
    if x.ndim == 0 or not _fits(x.reshape(1, *x.shape), weight, bias, 1) or not plain(g, mean, rstd) or g.shape != x.shape:
        return NotImplemented
    channels = x.shape[-1]
    rows = x.size // channels
    gx = np.empty_like(x)
    scale = np.ones(channels, np.float32) if weight is None else weight
    threads = min(rows, threads_for(x.size))
    gweight, gbias = np.empty((threads, channels), np.float32), np.empty((threads, channels), np.float32)
    _keep, (work,) = scratch(threads * 2 * channels)
    arrays = (g, x, scale, mean, rstd, gx, gweight, gbias)
    _layer_norm_backward(threads, *map(address, arrays), work, rows, channels, threads)
    return gx, gweight.sum(0) if weight is not None else None, gbias.sum(0) if bias is not None else None
