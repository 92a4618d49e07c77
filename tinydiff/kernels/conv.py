"""Convolution's three directions on float32 arrays: which algorithm a shape gets, its scratch memory, and the call.

`algorithm` is the rule and names its choice; each function takes `force=` to override it (benchmarks do).

Error against float64, over the results' standard deviation, 3×3 with 16 / 64 / 320 channels of unit-variance numbers
(root mean square, and the largest of the 2·16²·C). `ROUNDING` says it for any number of products summed.

    direct            2e-7  4e-7  9e-7     2e-6  4e-6  1e-5
    shift_add         9e-8  2e-7  3e-7     5e-7  1e-6  2e-6
    winograd_f2       2e-7  3e-7  6e-7     1e-6  2e-6  3e-6
    winograd_f4       1e-6  2e-6  4e-6     2e-5  3e-5  7e-5
    winograd_s2       6e-7  1e-6  2e-6     6e-6  3e-5  4e-5
    upsample_conv2d   6e-7  1e-6  2e-6     9e-6  1e-5  4e-5
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np

from tinydiff.kernels import direct, winograd
from tinydiff.kernels import winograd_tiles as tiles
from tinydiff.kernels.launch import launch
from tinydiff.kernels.memory import address, contiguous, empty, lasting, scratch
from tinydiff.kernels.microkernel import LANES, REST, ROWS, WIDTH

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]

ROUNDING = {"direct": 3e-8, "shift_add": 3e-8, "winograd_f2": 3e-8, "winograd_f4": 1.5e-7, "winograd_s2": 1e-7}
"""Root mean square error of a result over its standard deviation, at most, per root of the number of products summed."""

precise = False
"""Set True to keep away from Winograd's 4×4 tiles, at either stride: some five times the rounding error of a plain sum, in the
worst place ten times."""

SLAB = 64 * 1024  # floats: the input under a band of rows, together with what it is multiplied with, stays in L2
PIXELS = 192  # that the weight gradient multiplies over at a time: a panel of the gradient stays in L1
UNPACKED = 10_000_000  # multiplications up to which weights aren't packed
BLOCK = 256 * ROWS  # Winograd: tiles × channels that a thread takes at a time, for the same reason
CUT = 1.5  # Winograd's weight gradient: tiles for each channel up to which threads share out the channels
KINDS = {"winograd_f4": tiles.F4, "winograd_f2": tiles.F2, "winograd_s2": tiles.DOWN}
TRANSFORM, WEIGHTS = {1: 10, 2: 7}, 23  # see `algorithm`
CALL = 700_000  # multiplications that take as long as a kernel's call
SMALL = 500_000  # multiplications under which a second thread costs more than it brings


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def algorithm(kernel: Pair, stride: Pair, channels: int, filters: int, pixels: tuple[int, int, int], calls: int = 1) -> str:
    """The algorithm for a convolution: "winograd_f4", "winograd_f2", "winograd_s2" (stride 2), "shift_add" or "direct".

    `pixels` are the output's (N, Ho, Wo), `calls` how many products of rows "direct" takes. For the input gradient, swap channels
    and filters and give the input's pixels, divided by the stride.

    Up to 4 filters leave most of a vector empty, so their taps share one. Else the cheapest by a count of multiplications:
    Winograd's transforms cost as much as TRANSFORM multiplications with each channel and filter, those of the weights as much as
    WEIGHTS more tiles; filters are rounded up to a panel; each call of "direct" but the first costs CALL. 4×4 tiles get all but
    small maps, 2×2 some of these.

    Fitted to measurements on AVX-512, one thread, of 114 shapes from 16 to 256 channels, 4×4 to 32×32 pixels, batch 1 to 16, not
    above: what it picks takes 1.01 times as long as the fastest in the mean, 1.32 times at most. At a stride of 2, to 469 shapes
    from 8 to 256 channels, 8×8 to 64×64 pixels, batch 1 to 64, 3 filters and more: 1.01 forward and input gradient, 1.03 weight
    gradient; 1.6 times at most, with many more channels than filters.
    """
    return _cheapest(kernel, stride, channels, filters, pixels, calls, precise)


def _points(side: int, kind: int) -> int:
    """Winograd's points along an axis, of all its tiles. At a stride of 2 `side` is the output's, in all directions."""
    tile = tiles.TILE[kind]
    return side // tile * tiles.points(kind, tile) + (tiles.points(kind, side % tile) if side % tile else 0)


def _winograd_cost(kind: int, channels: int, filters: int, pixels: tuple[int, int, int], transform: int) -> int:
    n, ho, wo = pixels
    points = n * _points(ho, kind) * _points(wo, kind) + WEIGHTS * tiles.weights(kind) ** 2
    return points * (channels * _up(filters, WIDTH) + transform * (_up(channels, LANES) + _up(filters, LANES)))


@lru_cache(maxsize=1024)
def _cheapest(
    kernel: Pair, stride: Pair, channels: int, filters: int, pixels: tuple[int, int, int], calls: int, precise: bool
) -> str:
    n, ho, wo = pixels
    if filters <= 4 and channels >= 16 and stride == (1, 1) and kernel != (1, 1):
        return "shift_add"
    if kernel != (3, 3) or stride not in ((1, 1), (2, 2)):
        return "direct"
    products = channels * _up(filters, WIDTH)
    costs = {"direct": 9 * n * ho * wo * products + CALL * (calls - 1)}
    for name in ("winograd_f4", "winograd_f2") if stride == (1, 1) else ("winograd_s2",):
        costs[name] = _winograd_cost(KINDS[name], channels, filters, pixels, TRANSFORM[stride[0]])
    if precise:
        costs = {name: cost for name, cost in costs.items() if name in ("direct", "winograd_f2")}
    return min(costs, key=lambda name: costs[name])


def enlarging_pays(channels: int, filters: int, pixels: tuple[int, int, int]) -> bool:
    """Whether a 3×3 convolution behind an enlargement to `pixels` (N, Ho, Wo) is made in one (`upsample_conv2d`).

    That takes 0.69 of the products of winograd_f4, and the enlarged input is never stored, but 2.8 times as many weights are
    to be transformed.
    """
    how = algorithm((3, 3), (1, 1), channels, filters, pixels)
    if how not in KINDS or precise:
        return False
    ours, theirs = (_winograd_cost(kind, channels, filters, pixels, TRANSFORM[1]) for kind in (tiles.NEAREST, KINDS[how]))
    return ours < theirs


def threads_for(items: int, work: int) -> int:
    """Threads for so many independent items and multiplications."""
    return 1 if work < SMALL else max(1, min(numba.get_num_threads(), items))


_FLOAT32 = np.dtype(np.float32)


def float32(*arrays: np.ndarray | None) -> bool:
    """Whether the kernels take these arrays."""
    for a in arrays:  # noqa: SIM110 (a generator takes twice as long)
        if a is not None and (a.dtype != _FLOAT32 or a.size == 0):
            return False
    return True


def _contiguous(array: np.ndarray | None) -> np.ndarray | None:
    return None if array is None else contiguous(array)


def _band(n: int, ho: int, row: int, work: int, slab: int = SLAB) -> int:
    """Output rows that a thread takes at a time: as many as fit the slab, but enough bands for every thread, and even ones."""
    if work >= SMALL and n < (threads := numba.get_num_threads()):
        ho = _up(ho * n, threads) // threads
    bands = -(-ho // max(1, slab // max(1, row)))
    return -(-ho // bands)


@lru_cache(maxsize=64)
def _offsets(kh: int, step: int, length: int) -> np.ndarray:
    """Where a window's numbers lie in a slab: `kh` runs that begin `step` apart, and zeros up to a multiple of TAPS."""
    found = (step * np.arange(kh)[:, None] + np.arange(length)).ravel()
    return np.pad(found, (0, -len(found) % direct.TAPS)).astype(np.int32)


@lru_cache(maxsize=1024)
def _forward_plan(
    n: int, c: int, kernel: tuple[int, ...], size: Pair, stride: Pair, contiguous: bool, available: int
) -> tuple[int, int, int, bool, int, int]:
    """Rows of a band, threads, floats of a slab, whether weights are packed, by how many threads, into how many floats."""
    kh, kw, _, o = kernel
    taps, columns = kh * kw * c, (size[1] - 1) * stride[1] + kw
    work = n * size[0] * size[1] * taps * o
    band = _band(n, size[0], stride[0] * columns * c, work)
    threads = threads_for(n * -(-size[0] // band), work)
    slab = ((band - 1) * stride[0] + kh) * columns * c + direct.SLACK
    # Where little is done with the weights, panels are taken from where they lie, and no time is spent on packing.
    packs = o % WIDTH > 0 or work > UNPACKED or not contiguous
    return band, threads, slab, packs, threads_for(kh * kw * -(-o // WIDTH), taps * o), taps * _up(o, WIDTH) * packs


def direct_forward(
    x: np.ndarray,
    w: np.ndarray,
    bias: Any,
    residual: Any,
    y: np.ndarray,
    size: Pair,
    stride: Pair,
    first: Pair,
    place: Any,
) -> None:
    """y = conv(x, w) + bias + residual by products of rows.

    w (KH, KW, C, O) may have any strides; `first` is the (top, left) padding, negative to begin inside; pixel
    (n, i, j) of y begins at place[0] + n·place[1] + i·place[2] + j·place[3], in floats.
    """
    n, height, width, c = x.shape
    kh, kw, _, o = w.shape
    work = n * size[0] * size[1] * kh * kw * c * o
    band, threads, slab, packs, packers, panels = _forward_plan(
        n, c, w.shape, size, stride, w.flags.c_contiguous, 1 if work < SMALL else numba.get_num_threads()
    )
    panel, ldb = (kh * kw * c * WIDTH, WIDTH) if packs else (WIDTH, o)
    kept = lasting(w, panels) if packs else 0
    _keep, (packed, slabs) = scratch(0 if kept else panels, threads * slab)
    source, steps = 0, (0, 0, 0, 0)
    if packs:
        packed, (s_kh, s_kw, s_c, s_o) = kept or packed, w.strides
        source, steps = address(w), (s_kh // 4, s_kw // 4, s_c // 4, s_o // 4)
        if kept or threads > 1:
            launch(direct.pack, packers, source, *steps, kh, kw, c, o, packed, packers, recorded=not kept)
            source = 0
    else:
        packed = address(w)
    launch(
        direct.forward, threads, address(x), address(bias), 0 if bias is None or bias.ndim == 1 else o, address(residual),
        address(y), source, *steps, packed, panel, ldb, slabs,
        n, height, width, c, kh, kw, *stride, *first, *size, o, *place, band, threads,
    )  # fmt: skip


def _shift_add(x: np.ndarray, w: np.ndarray, bias: Any, residual: Any, y: np.ndarray, first: Pair) -> None:
    (n, height, width, c), (kh, kw, _, o), (_, ho, wo, _) = x.shape, w.shape, y.shape
    work, columns = n * ho * wo * kh * kw * c * o, kh * kw * o
    band = _band(n, ho, width * _up(columns, LANES), work, 2 * SLAB)  # each band multiplies kh - 1 rows of its neighbours'
    threads = threads_for(n * -(-ho // band), work)
    plane = (band + kh - 1) * width + 2 * direct.CHUNK
    buffer = _up((direct.CHUNK + plane) * _up(columns, LANES) + WIDTH + o * _up(wo, LANES), 16)
    _keep, (packed, buffers) = scratch(c * _up(columns, WIDTH), threads * buffer)
    launch(direct.pack_taps, 1, address(w), *(step // 4 for step in w.strides), kh, kw, c, o, packed)
    launch(
        direct.shift_add, threads, address(x), address(bias), 0 if bias is None or bias.ndim == 1 else o, address(residual),
        address(y), packed, buffers, buffer, n, height, width, c, kh, kw, *first, ho, wo, o, band, threads,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _weight_grad_plan(n: int, ho: int, wo: int, kernel: tuple[int, ...], stride: Pair, available: int) -> tuple[Any, ...]:
    """Rows of a band, threads, the sums' segments, length and that to a multiple of the tile, offsets, sizes of the scratch."""
    kh, kw, c, o = kernel
    columns, work = (wo - 1) * stride[1] + kw, n * ho * wo * kh * kw * c * o
    segments, length, unit, offsets = kh, kw * c, REST, None
    if kh > 1 and kw * c < 16:  # A kernel row would leave tiles half empty: its whole window is one axis.
        segments, length, unit = 1, kh * kw * c, direct.TAPS
        offsets = _offsets(kh, columns * c, kw * c)
    band = min(_band(n, ho, stride[0] * columns * c, work), max(1, PIXELS // wo))
    threads, padded = threads_for(n * -(-ho // band), work), _up(length, unit)
    sizes = (
        threads * segments * padded * _up(o, WIDTH),
        threads * (((band - 1) * stride[0] + kh) * columns * c + direct.SLACK),
        threads * band * wo * _up(o, WIDTH) if o % WIDTH else 0,
    )
    return band, threads, (segments, length, padded), offsets, sizes


def direct_weight_grad(x: np.ndarray, g: np.ndarray, dw: np.ndarray, stride: Pair, first: Pair) -> None:
    """dw (KH, KW, C, O) from x (N, H, W, C) and g (N, Ho, Wo, O) by products over rows of pixels."""
    (n, height, width, c), (_, ho, wo, o), (kh, kw) = x.shape, g.shape, dw.shape[:2]
    work = n * ho * wo * kh * kw * c * o
    band, threads, (segments, length, padded), offsets, sizes = _weight_grad_plan(
        n, ho, wo, dw.shape, stride, 1 if work < SMALL else numba.get_num_threads()
    )
    _keep, (sums, slabs, g_packs) = scratch(*sizes)
    launch(
        direct.weight_grad, threads, address(x), address(g), address(dw), sums, slabs, address(offsets), g_packs,
        n, height, width, c, kh, kw, *stride, *first, ho, wo, o, band, threads,
    )  # fmt: skip
    if threads > 1:
        direct.reduce_sums(sums, threads, segments, length, padded, o, address(dw))


def _winograd_plan(n: int, size: Pair, c: int, o: int, kind: int, *, sums: bool = False) -> tuple[int, int, int, list[int]]:
    """Threads, parts that the tiles are shared out in, tiles at a time, and the sizes of both transforms' scratch.

    There are fewer parts than threads where the tiles are added up (`sums`) and few: each part has its own sums, which another
    thread then has to fetch, and that took longer than transforming the gradient once for every share of the channels.
    """
    tile, large = tiles.TILE[kind], 1 + (kind > tiles.F4) + (kind >= tiles.NEAREST)
    (qy, ry), (qx, rx) = (divmod(side, tile) for side in size)
    kinds = [n * qy * (rx > 0), n * qy * qx, n * (ry > 0) * qx, n * (ry > 0) * (rx > 0)]  # each is shared out by itself
    threads = threads_for(-(-sum(kinds) // ROWS), n * size[0] * size[1] * 9 * c * o)
    cuts = max((d for d in range(1, c // WIDTH + 1) if threads % d == 0), default=1) if sums and sum(kinds) <= CUT * c else 1
    parts, weights, c = threads // cuts, c * o, _up(-(-c // cuts), LANES)
    share = sum(-(-count // parts) for count in kinds)
    # Weights that fill L2 are read again for each block, which had better be large: 128 channels became 1.1 to 1.4 times as fast,
    # 256 behind an enlargement 1.3 times.
    least = ROWS * (1 + (kind > tiles.F4) if c * o < 1 << 14 else 3 if c * o <= 1 << 16 else 4)
    if kind >= tiles.NEAREST and weights >= 1 << 16:
        least = 16 * ROWS
    blocks = -(-share // max(least, BLOCK // (large * (c + o))))  # tiles of 4×4 have 36 points, others two or three times as many
    block = _up(-(-share // blocks), ROWS)
    planes = (tiles.points(kind, tile), c), (tiles.sums(kind, tile), _up(o, WIDTH))
    return threads, parts, block, [threads * side**2 * (block * width + LANES) for side, width in planes]


def _winograd_forward(x: np.ndarray, w: np.ndarray, bias: Any, residual: Any, y: np.ndarray, first: Pair, kind: int) -> None:
    (n, height, width, c), (_, *size, o) = x.shape, y.shape
    threads, _, block, sizes = _winograd_plan(n, (size[0], size[1]), c, o, kind)
    transformed = tiles.weights(kind) ** 2 * (c * _up(o, WIDTH) + LANES)
    kept = lasting(w, transformed)
    _keep, (packed, u, v, m) = scratch(9 * c * _up(o, WIDTH), 0 if kept else transformed, *sizes)
    u, steps = kept or u, [step // 4 for step in w.strides]
    launch(
        winograd.transform_weights, threads, address(w), *steps, c, o, packed, u, tiles.WEIGHTS_OF[kind], threads,
        recorded=not kept,
    )  # fmt: skip
    launch(
        winograd.forward, threads, address(x), address(bias), 0 if bias is None or bias.ndim == 1 else o, address(residual),
        address(y), u, v, m, n, height, width, c, *first, *size, o, block, kind, threads,
    )  # fmt: skip


def _winograd_weight_grad(x: np.ndarray, g: np.ndarray, dw: np.ndarray, first: Pair, kind: int, sums_of_g: bool) -> Any:
    """Fills dw; gives the sums over each image's pixels of g, (N, O), if asked."""
    (n, height, width, c), (_, ho, wo, o) = x.shape, g.shape
    threads, parts, block, sizes = _winograd_plan(n, (ho, wo), c, o, kind, sums=True)
    totals = np.zeros((parts, n, o), np.float32) if sums_of_g else None
    _keep, (sums, v, d) = scratch(parts * tiles.weights(kind) ** 2 * (_up(c, REST) * _up(o, WIDTH) + LANES), *sizes)
    launch(
        winograd.weight_grad, threads, address(x), address(g), sums, address(totals), v, d,
        n, height, width, c, *first, ho, wo, o, block, kind, parts, threads,
    )  # fmt: skip
    launch(winograd.transform_sums, threads, sums, address(dw), c, o, parts, kind, threads)
    return None if totals is None else totals.sum(0)


def conv2d(
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Padding = ((0, 0), (0, 0)),
    force: str | None = None,
) -> Any:
    """x (N, H, W, C) with w (KH, KW, C, O), plus bias (O,) or (N, O) and residual (N, Ho, Wo, O): (N, Ho, Wo, O)."""
    if not float32(x, w, bias, residual):
        return NotImplemented
    x, bias, residual = contiguous(x), _contiguous(bias), _contiguous(residual)
    (n, height, width, c), (kh, kw, _, o) = x.shape, w.shape
    (top, bottom), (left, right) = padding
    size = (height + top + bottom - kh) // stride[0] + 1, (width + left + right - kw) // stride[1] + 1
    y = empty(n, *size, o)
    how = force or algorithm((kh, kw), stride, c, o, (n, *size))
    if how in KINDS:
        _winograd_forward(x, w, bias, residual, y, (top, left), KINDS[how])
    elif how == "shift_add" and stride == (1, 1):
        _shift_add(x, w, bias, residual, y, (top, left))
    else:
        place = 0, size[0] * size[1] * o, size[1] * o, o
        direct_forward(x, w, bias, residual, y, size, stride, (top, left), place)
    return y


def conv2d_input_grad(
    g: np.ndarray,
    w: np.ndarray,
    residual: np.ndarray | None = None,
    *,
    input_size: Pair,
    stride: Pair,
    padding: Padding,
    force: str | None = None,
) -> Any:
    """g (N, Ho, Wo, O) with w (KH, KW, C, O) give (N, *input_size, C), plus a residual of that shape.

    The input's pixels fall into stride² classes, and each class is an ordinary stride-1 convolution of g with the taps
    that reach it: no multiplication with the zeros that a transposed convolution inserts.
    """
    if not float32(g, w, residual):
        return NotImplemented
    g, residual = contiguous(g), _contiguous(residual)
    (n, _, _, o), (kh, kw, c, _), (height, width) = g.shape, w.shape, input_size
    (top, _), (left, _) = padding
    dx = empty(n, height, width, c)
    pixels = n, -(-height // stride[0]), -(-width // stride[1])
    how = force or algorithm((kh, kw), stride, o, c, pixels, stride[0] * stride[1])
    turned, first = w[::-1, ::-1].transpose(0, 1, 3, 2), (kh - 1 - top, kw - 1 - left)
    if how == "winograd_s2" and height % 2 == width % 2 == 0 == (top - left) % 2:
        first = (top + 1) % 2 - top // 2, (left + 1) % 2 - left // 2
        _winograd_forward(g, turned, None, residual, dx, first, tiles.UP_ODD if top % 2 else tiles.UP)
        return dx
    if how in ("winograd_f4", "winograd_f2"):
        _winograd_forward(g, turned, None, residual, dx, first, KINDS[how])
        return dx
    if how == "shift_add" and stride == (1, 1):
        _shift_add(g, turned, None, residual, dx, first)
        return dx
    if stride[0] > kh or stride[1] > kw:
        dx[...] = 0.0 if residual is None else residual  # pixels that no window covers
    for y0 in range(min(stride[0], height)):
        for x0 in range(min(stride[1], width)):
            taps_y, taps_x = range((y0 + top) % stride[0], kh, stride[0]), range((x0 + left) % stride[1], kw, stride[1])
            if not taps_y or not taps_x:
                continue
            # Pixel y0 + i·s takes tap t from row i + (y0 + top - t) / s: the last tap from the first row.
            first = (taps_y[-1] - y0 - top) // stride[0], (taps_x[-1] - x0 - left) // stride[1]
            flipped = w[taps_y[-1] :: -stride[0], taps_x[-1] :: -stride[1]].transpose(0, 1, 3, 2)
            size = -(-(height - y0) // stride[0]), -(-(width - x0) // stride[1])
            place = (y0 * width + x0) * c, height * width * c, stride[0] * width * c, stride[1] * c
            direct_forward(g, flipped, None, residual, dx, size, (1, 1), first, place)
    return dx


def upsample_conv2d(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None) -> Any:
    """x (N, H, W, C), each pixel four times, with w (3, 3, C, O) at a padding of 1, plus bias (O,): (N, 2H, 2W, O)."""
    if not float32(x, w, bias) or w.shape[:2] != (3, 3):
        return NotImplemented
    (n, height, width, c), o = x.shape, w.shape[3]
    if not enlarging_pays(c, o, (n, 2 * height, 2 * width)):
        return NotImplemented
    y = empty(n, 2 * height, 2 * width, o)
    _winograd_forward(contiguous(x), w, _contiguous(bias), None, y, (1, 1), tiles.NEAREST)
    return y


def upsample_conv2d_input_grad(g: np.ndarray, w: np.ndarray, residual: np.ndarray | None = None) -> Any:
    """g (N, 2H, 2W, O) with w (3, 3, C, O) give (N, H, W, C), plus a residual of that shape."""
    n, height, width, _ = g.shape
    dx = empty(n, height // 2, width // 2, w.shape[2])
    turned = w[::-1, ::-1].transpose(0, 1, 3, 2)
    _winograd_forward(contiguous(g), turned, None, _contiguous(residual), dx, (1, 1), tiles.NEAREST_GRAD)
    return dx


def upsample_conv2d_weight_grad(x: np.ndarray, g: np.ndarray, *, sums: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """x (N, H, W, C) with g (N, 2H, 2W, O) give (3, 3, C, O), and with `sums` the sums of g over each image's pixels, (N, O)."""
    dw = np.empty((3, 3, x.shape[3], g.shape[3]), np.float32)
    return dw, _winograd_weight_grad(contiguous(x), contiguous(g), dw, (1, 1), tiles.NEAREST, sums)


def conv2d_weight_grad(
    x: np.ndarray,
    g: np.ndarray,
    *,
    kernel_size: Pair,
    stride: Pair,
    padding: Padding,
    force: str | None = None,
    sums: bool = False,
) -> Any:
    """x (N, H, W, C) with g (N, Ho, Wo, O) give (*kernel_size, C, O). The same bits every time for a given number of threads.

    With `sums` also the sums of g over each image's pixels, (N, O), the gradient of a bias, if the algorithm has them on the
    way, else None.
    """
    if not float32(x, g):
        return NotImplemented
    x, g = contiguous(x), contiguous(g)
    first = padding[0][0], padding[1][0]
    dw, found = np.empty((*kernel_size, x.shape[3], g.shape[3]), np.float32), None
    how = force or algorithm(kernel_size, stride, x.shape[3], g.shape[3], g.shape[:3])
    if how in KINDS:
        found = _winograd_weight_grad(x, g, dw, first, KINDS[how], sums)
    elif how == "shift_add" and stride == (1, 1):
        # Few filters: g and x change places, for Σ x[p + k]·g[p] is also Σ g[q - k]·x[q], and then g's windows are gathered.
        turned = np.empty((*kernel_size, g.shape[3], x.shape[3]), np.float32)
        before = kernel_size[0] - 1 - first[0], kernel_size[1] - 1 - first[1]
        direct_weight_grad(g, x, turned, stride, before)
        dw[...] = turned[::-1, ::-1].transpose(0, 1, 3, 2)
    else:
        direct_weight_grad(x, g, dw, stride, first)
    return (dw, found) if sums else dw
