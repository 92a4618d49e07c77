"""Scaled-dot-product attention, forward and backward, without ever storing the L×S matrix (Dao et al. 2022, for a CPU's caches).

A thread takes BLOCK queries at a time: their scores against all keys (BLOCK × S floats) stay in its second-level cache from the
first product to the last. Unlike on a GPU there is room for whole rows, so softmax needs no running rescale. The backward
computes the scores again from the saved log-sum-exp. All five products run in the register tiles of `microkernel`, on keys and
values repacked once per head: transposed panels of WIDTH keys where the sum runs over the head's size, plain padded rows where
it runs over keys. The forward takes queries and values as they lie where no tile would read past their ends. Bound by FMA for
heads of 64, by exp for heads of 16.

Inputs may be strided views, such as (N, L, heads, D) with the middle axes exchanged; results are laid out like them.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tinydiff.kernels import record
from tinydiff.kernels.arrays import Kernel, load, number, store
from tinydiff.kernels.jit import njit
from tinydiff.kernels.launch import unpack
from tinydiff.kernels.mathfun import exp_within, log
from tinydiff.kernels.memory import address, read, scratch, write, zero
from tinydiff.kernels.microkernel import LANES, ROWS, VECTOR, WIDTH, Emitter, gemm_tile
from tinydiff.kernels.softmax import greatest

TILE = min(ROWS, 8)  # rows of a register tile
BLOCK = 8 * TILE  # queries at a time
LARGE = 1 << 16  # multiplications in one product from which a second thread pays
_f = np.float32
_INF = _f(np.inf)

_wide, _narrow = gemm_tile(TILE, 2, transposed=False), gemm_tile(TILE, 1, transposed=False)
_wide_t, _narrow_t = gemm_tile(TILE, 2, transposed=True), gemm_tile(TILE, 1, transposed=True)


@njit
def _product(a, lda, b, ldb, length, initial, c, ldc, rows, columns):  # type: ignore[no-untyped-def]
    """C = A·B, or C += A·B with initial = c: A (rows, length) by rows, B in whole vectors; rows a multiple of TILE."""
    for j in range(0, columns, WIDTH):
        for i in range(0, rows, TILE):
            at = (i * ldc + j) * 4
            start = initial + at if initial else 0
            if columns - j <= LANES:
                _narrow(a + i * lda * 4, lda, 0, 0, b + j * 4, ldb, 1, length, 0, start, ldc, c + at, ldc, columns - j)
            else:
                _wide(a + i * lda * 4, lda, 0, 0, b + j * 4, ldb, 1, length, 0, start, ldc, c + at, ldc, min(WIDTH, columns - j))


@njit
def _product_t(a, lda, b, ldb, length, c, ldc, rows, columns):  # type: ignore[no-untyped-def]
    """C += Aᵀ·B: A (length, rows) by rows."""
    for j in range(0, columns, WIDTH):
        for i in range(0, rows, TILE):
            at = c + (i * ldc + j) * 4
            if columns - j <= LANES:
                _narrow_t(a + i * 4, lda, 0, 0, b + j * 4, ldb, 1, length, 0, at, ldc, at, ldc, columns - j)
            else:
                _wide_t(a + i * 4, lda, 0, 0, b + j * 4, ldb, 1, length, 0, at, ldc, at, ldc, min(WIDTH, columns - j))


@njit
def _scores(a, lda, panels, size, s, lds, rows, keys):  # type: ignore[no-untyped-def]
    """S (rows, keys rounded up to WIDTH) = A (rows, size) · panels of transposed keys."""
    for j in range(0, keys, WIDTH):
        for i in range(0, rows, TILE):
            _wide(a + i * lda * 4, lda, 0, 0, panels + j * size * 4, WIDTH, 1, size, 0, 0, 0, s + (i * lds + j) * 4, lds, WIDTH)


@intrinsic
def _transpose(typingctx, source, step, target, scale):  # type: ignore[no-untyped-def]
    """LANES rows of LANES floats, `step` apart, times `scale`, to columns of rows WIDTH apart.

    In registers: blocks off the diagonal change places, then those within each block, and so on.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emitter(builder)
        source, target = emit.pointer(args[0]), emit.pointer(args[2])
        rows = [emit.load(emit.at(source, emit.times(i, args[1]))) for i in range(LANES)]

        def pick(a: Any, b: Any, lanes: list[int]) -> Any:
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), LANES), lanes))

        half = LANES // 2
        while half:
            for i in [i for i in range(LANES) if not i & half]:
                a, b = rows[i], rows[i + half]
                rows[i] = pick(a, b, [LANES + lane - half if lane & half else lane for lane in range(LANES)])
                rows[i + half] = pick(a, b, [LANES + lane if lane & half else lane + half for lane in range(LANES)])
            half //= 2
        lane = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), args[3], ir.Constant(ir.IntType(32), 0))
        factor = pick(lane, lane, [0] * LANES)
        for i, row in enumerate(rows):
            emit.store(builder.fmul(row, factor), emit.at(target, i * WIDTH))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32), codegen


@njit
def _pack_panels(x, step, count, size, panels, scale):  # type: ignore[no-untyped-def]
    """Rows of `size` floats, `step` apart, times `scale`, to panels (size, WIDTH), the last one padded with zeros."""
    for j in range(0, count, WIDTH):
        panel, width = panels + j * size * 4, min(WIDTH, count - j)
        if width < WIDTH:
            zero(panel, size * WIDTH)
        whole = size // LANES * LANES  # of each row, and of the panel's columns, by `_transpose`; the rest one by one
        for i in range(0, width, LANES):
            done = 0
            if width - i >= LANES:
                done = whole
                for d in range(0, whole, LANES):
                    _transpose(x + ((j + i) * step + d) * 4, step, panel + (d * WIDTH + i) * 4, scale)
            for d in range(done, size):
                for k in range(i, min(i + LANES, width)):
                    store(panel, d * WIDTH + k, load(x, (j + k) * step + d) * scale)


@njit
def _pack_rows(x, step, count, size, rows, padded, total, scale):  # type: ignore[no-untyped-def]
    """Rows times `scale` to rows of `padded` floats, the rest of them and rows up to `total` zero."""
    for i in range(count):
        for d in range(size):
            store(rows, i * padded + d, load(x, i * step + d) * scale)
        for d in range(size, padded):
            store(rows, i * padded + d, _f(0))
    zero(rows + count * padded * 4, (total - count) * padded)


@njit
def _unpack_rows(rows, padded, count, size, x, step, scale):  # type: ignore[no-untyped-def]
    for i in range(count):
        for d in range(size):
            store(x, i * step + d, load(rows, i * padded + d) * scale)


@njit(forceinline=True)
def _up(count, step):  # type: ignore[no-untyped-def]
    return (count + step - 1) // step * step


@njit
def _add_bias(s, at, keys, bias, base, step):  # type: ignore[no-untyped-def]
    """Add the mask's 0 or -inf to a row of scores."""
    for j in range(keys):
        write(s, at + j, read(s, at + j) + load(bias, base + j * step))


@Kernel
def _forward(args, thread):  # type: ignore[no-untyped-def]
    # fmt: off
    (q, q_n, q_h, q_l, k, k_n, k_h, k_l, v, v_n, v_h, v_l, out, o_n, o_h, o_l, lse, bias, b_n, b_h, b_l, b_s, work, room,
     samples, heads, length, keys, size, width, causal, scale, split, threads) = unpack(args, 34)
    # fmt: on
    padded, wide, tall = _up(size, LANES), _up(width, LANES), _up(keys, WIDTH)
    lds = tall + LANES  # so that rows don't fall on the same cache sets
    panels = work + thread * room * 4
    values = panels + tall * size * 4
    queries = values + tall * wide * 4
    s = queries + BLOCK * padded * 4
    result = s + BLOCK * lds * 4
    sums = result + BLOCK * wide * 4
    tops = sums + BLOCK * 4
    blocks, items = (length + BLOCK - 1) // BLOCK, samples * heads
    start, stop, first_block, last_block = items * thread // threads, items * (thread + 1) // threads, 0, blocks
    if split:  # few heads: each thread takes a part of every head's queries
        start, stop, first_block, last_block = 0, items, blocks * thread // threads, blocks * (thread + 1) // threads
    for item in range(start, stop):
        n, h = item // heads, item % heads
        _pack_panels(k + (n * k_n + h * k_h) * 4, k_l, keys, size, panels, number(scale))
        v_here, v_step = v + (n * v_n + h * v_h) * 4, v_l
        if width != wide:
            _pack_rows(v_here, v_l, keys, width, values, wide, tall, _f(1))
            v_here, v_step = values, wide
        for block in range(first_block, last_block):
            first = block * BLOCK
            count = min(BLOCK, length - first)
            rows, seen = _up(count, TILE), min(keys, first + count) if causal else keys
            query, step = q + (n * q_n + h * q_h + first * q_l) * 4, q_l
            if rows != count:
                _pack_rows(query, q_l, count, size, queries, padded, rows, _f(1))
                query, step = queries, padded
            _scores(query, step, panels, size, s, lds, rows, seen)
            for i in range(count):
                at, limit = i * lds, min(keys, first + i + 1) if causal else keys
                if bias:
                    _add_bias(s, at, limit, bias, n * b_n + h * b_h + (first + i) * b_l, b_s)
                top, total = greatest(s, at, limit), _f(0)
                base = _f(0) if top == -_INF else top
                for j in range(limit):
                    e = exp_within(read(s, at + j) - base)
                    total += e
                    write(s, at + j, e)
                zero(s + (at + limit) * 4, seen - limit)
                write(tops, i, base)
                write(sums, i, total)
            there = lse + (item * length + first) * 4
            for i in range(count):  # apart from the loop above, so that these logarithms and quotients vectorise
                # With nothing to attend, sum and result are 0; any finite log-sum-exp then gives the backward weights of 0.
                total = read(sums, i)
                store(there, i, load(tops, i) + log(total) if total != _f(0) else _f(0))
                store(sums, i, _f(1) / total if total != _f(0) else _f(0))
            _product(s, lds, v_here, v_step, seen, 0, result, wide, rows, width)
            for i in range(count):
                target, factor = out + (n * o_n + h * o_h + (first + i) * o_l) * 4, read(sums, i)
                for d in range(width):
                    store(target, d, load(result, i * wide + d) * factor)


@Kernel
def _backward(args, thread):  # type: ignore[no-untyped-def]
    # fmt: off
    (g, g_n, g_h, g_l, q, q_n, q_h, q_l, k, k_n, k_h, k_l, v, v_n, v_h, v_l, out, o_n, o_h, o_l, gq, gq_n, gq_h, gq_l,
     gk, gk_n, gk_h, gk_l, gv, gv_n, gv_h, gv_l, gk_t, gv_t, lse, bias, b_n, b_h, b_l, b_s, work, room,
     samples, heads, length, keys, size, width, causal, scale, split, threads) = unpack(args, 52)
    # fmt: on
    factor = number(scale)
    padded, wide, tall = _up(size, LANES), _up(width, LANES), _up(keys, WIDTH)
    lds = tall + LANES
    key_panels = work + thread * room * 4
    value_panels = key_panels + tall * size * 4
    key_rows = value_panels + tall * width * 4
    to_keys = key_rows + tall * padded * 4
    to_values = to_keys + tall * padded * 4
    queries = to_values + tall * wide * 4
    gradients = queries + BLOCK * padded * 4
    p = gradients + BLOCK * wide * 4
    ds = p + BLOCK * lds * 4
    result = ds + BLOCK * lds * 4
    blocks, items = (length + BLOCK - 1) // BLOCK, samples * heads
    start, stop, first_block, last_block = items * thread // threads, items * (thread + 1) // threads, 0, blocks
    if split:
        start, stop, first_block, last_block = 0, items, blocks * thread // threads, blocks * (thread + 1) // threads
    for item in range(start, stop):
        n, h = item // heads, item % heads
        _pack_panels(k + (n * k_n + h * k_h) * 4, k_l, keys, size, key_panels, _f(1))
        _pack_panels(v + (n * v_n + h * v_h) * 4, v_l, keys, width, value_panels, _f(1))
        _pack_rows(k + (n * k_n + h * k_h) * 4, k_l, keys, size, key_rows, padded, tall, _f(1))
        zero(to_keys, tall * padded)
        zero(to_values, tall * wide)
        for block in range(first_block, last_block):
            first = block * BLOCK
            count = min(BLOCK, length - first)
            rows, seen = _up(count, TILE), min(keys, first + count) if causal else keys
            tiles = _up(seen, TILE)
            _pack_rows(q + (n * q_n + h * q_h + first * q_l) * 4, q_l, count, size, queries, padded, rows, factor)
            _pack_rows(g + (n * g_n + h * g_h + first * g_l) * 4, g_l, count, width, gradients, wide, rows, _f(1))
            _scores(queries, padded, key_panels, size, p, lds, rows, seen)
            _scores(gradients, wide, value_panels, width, ds, lds, rows, seen)
            for i in range(count):
                at, limit = i * lds, min(keys, first + i + 1) if causal else keys
                if bias:
                    _add_bias(p, at, limit, bias, n * b_n + h * b_h + (first + i) * b_l, b_s)
                here, total = out + (n * o_n + h * o_h + (first + i) * o_l) * 4, load(lse, item * length + first + i)
                delta = _f(0)
                for d in range(width):
                    delta += load(here, d) * read(gradients, i * wide + d)
                for j in range(limit):
                    weight = exp_within(read(p, at + j) - total)
                    write(p, at + j, weight)
                    write(ds, at + j, weight * (read(ds, at + j) - delta))
                zero(p + (at + limit) * 4, tiles - limit)
                zero(ds + (at + limit) * 4, tiles - limit)
            _product_t(p, lds, gradients, wide, rows, to_values, wide, tiles, width)
            _product_t(ds, lds, queries, padded, rows, to_keys, padded, tiles, size)
            _product(ds, lds, key_rows, padded, seen, 0, result, padded, rows, size)
            _unpack_rows(result, padded, count, size, gq + (n * gq_n + h * gq_h + first * gq_l) * 4, gq_l, factor)
        one = _f(1)
        _unpack_rows(to_keys, padded, keys, size, gk + (thread * gk_t + n * gk_n + h * gk_h) * 4, gk_l, one)
        _unpack_rows(to_values, wide, keys, width, gv + (thread * gv_t + n * gv_n + h * gv_h) * 4, gv_l, one)


def _fits(*arrays: Any) -> bool:
    """Whether all are float32, not empty, and contiguous along the last axis."""
    return all(a.dtype == np.float32 and a.size and (a.shape[-1] == 1 or a.strides[-1] == 4) for a in arrays)


def _place(array: np.ndarray) -> tuple[int, ...]:
    """Address, and strides of samples, heads and rows in floats."""
    return address(array), *(step // 4 for step in array.strides[-4:-1])


def _bias(mask: np.ndarray | None, shape: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
    """A boolean mask as numbers to add to the scores (kept alive by the caller), its address and four strides."""
    if mask is None:
        return None, (0,) * 5
    record.refuse("the mask of an attention is prepared by NumPy")
    bias = np.broadcast_to(np.where(mask, np.float32(0), np.float32(-np.inf)), shape)
    return bias, (address(bias), *(step // 4 for step in bias.strides))


def _threads(q: np.ndarray, keys: int) -> tuple[int, int]:
    """Threads to use, and whether they split every head's queries among them instead of sharing out the heads."""
    items = q.shape[0] * q.shape[1]
    threads = 1 if q.size * keys < LARGE else numba.get_num_threads()
    split = items % threads != 0 and items < 4 * threads
    return (min(threads, -(-q.shape[2] // BLOCK)) if split else min(threads, items)), int(split)


def _up_to(count: int, step: int) -> int:
    return -(-count // step) * step


def scaled_dot_product_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None = None, *, is_causal: bool, scale: float
) -> Any:
    """(out, lse): softmax(q kᵀ · scale) v and each query's log-sum-exp of the scores.

    q (N, heads, L, D), k (N, heads, S, D), v (N, heads, S, E), float32, contiguous along the last axis; mask boolean,
    broadcastable to (N, heads, L, S), True where a query may attend; is_causal: query i attends keys 0 … i. out (N, heads, L, E)
    is laid out like q, lse (N, heads, L). A query with nothing to attend gets 0. NotImplemented for anything else.
    """
    if not _fits(q, k, v):
        return NotImplemented
    (n, heads, length, size), keys, width = q.shape, k.shape[2], v.shape[3]
    layout = np.empty_like(q) if width == size else np.empty((n, length, heads, width), np.float32).transpose(0, 2, 1, 3)
    out, lse = layout, np.empty((n, heads, length), np.float32)
    keep, bias = _bias(mask, (n, heads, length, keys))
    threads, split = _threads(q, keys)
    padded, wide, tall = _up_to(size, LANES), _up_to(width, LANES), _up_to(keys, WIDTH)
    room = tall * (size + wide) + BLOCK * (padded + tall + LANES + wide + 2) + LANES
    _memory, (work,) = scratch(threads * room)
    _forward(
        threads, *_place(q), *_place(k), *_place(v), *_place(out), lse, *bias, work, room,
        n, heads, length, keys, size, width, is_causal, float(scale), split, threads,
    )  # fmt: skip
    del keep
    return out, lse


def scaled_dot_product_attention_backward(
    g: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None,
    out: np.ndarray,
    lse: np.ndarray,
    *,
    is_causal: bool,
    scale: float,
) -> Any:
    """(gq, gk, gv) from g, the gradient of `out`; the other arguments as for, and from, the forward."""
    if not _fits(g, q, k, v, out):
        return NotImplemented
    (n, heads, length, size), keys, width = q.shape, k.shape[2], v.shape[3]
    keep, bias = _bias(mask, (n, heads, length, keys))
    threads, split = _threads(q, keys)
    gq = np.empty_like(q)
    # Threads that share a head each have sums of their own for its keys and values.
    to_keys, to_values = (np.empty((threads, *a.shape), np.float32) if split else np.empty_like(a)[None] for a in (k, v))
    steps = (to_keys.strides[0] // 4, to_values.strides[0] // 4) if split else (0, 0)
    padded, wide, tall = _up_to(size, LANES), _up_to(width, LANES), _up_to(keys, WIDTH)
    room = tall * (size + width + 2 * padded + wide) + BLOCK * (2 * padded + wide + 2 * (tall + LANES)) + LANES
    _memory, (work,) = scratch(threads * room)
    _backward(
        threads, *_place(g), *_place(q), *_place(k), *_place(v), *_place(out), *_place(gq), *_place(to_keys), *_place(to_values),
        *steps, lse, *bias, work, room, n, heads, length, keys, size, width, is_causal, float(scale), split, threads,
    )  # fmt: skip
    del keep
    return (gq, to_keys.sum(0), to_values.sum(0)) if split else (gq, to_keys[0], to_values[0])
