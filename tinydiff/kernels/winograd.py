"""3×3 stride-1 convolution by Winograd's minimal filtering: F(4×4, 3×3), with a quarter of the multiplications at some error,
and F(2×2, 3×3), with four ninths of them at hardly any.

The transforms B, G and A turn a tile's convolution into points² products, points = tile + 2, so over all tiles, channels and
filters it is that many matrix products (Lavin & Gray 2016; the matrices are Cook-Toom's). A thread transforms a block of tiles
into V (points², tiles, C), multiplies with the transformed weights U into M (points², tiles, O), and transforms M into pixels,
bias and residual added; V and M stay in its L2 cache, and what it reads next comes there while it multiplies. The weight gradient
is the same with 3×3 outputs and the gradient's tiles as filters, V and that transform multiplied over the tiles. Bound by FMA for
many channels, by the transforms for few.

Where a side is no multiple of the tile, the last tile of a row or column is narrower: with m outputs it needs m + 2 points, and
these are the first of the whole tile's, so that U is the same (`cook_toom`). A thread takes its tiles in the order right edge,
whole, bottom edge, corner. Then those that need a certain point follow one another, and it is multiplied for these alone.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tinydiff.kernels.direct import pack_tap, tile_columns, tile_rows
from tinydiff.kernels.jit import njit
from tinydiff.kernels.launch import body, unpack
from tinydiff.kernels.memory import LINE, prefetch, read, write, zero
from tinydiff.kernels.microkernel import I64, LANES, REST, VECTOR, WIDTH, Emitter, call_own

Matrix = list[list[Fraction]]
POINTS = [0, 1, -1, 2, -2]  # after infinity, which is the first


def cook_toom(outputs: int, taps: int, tile: int) -> tuple[Matrix, Matrix, Matrix]:
    """A (outputs, n), G (n, taps) and B (n, n), with n = outputs + taps - 1, such that A[(G g) ⊙ (B d)] correlates d with g.

    G is scaled as for the n = tile + 2 points of a whole tile: with fewer, it is the first rows of that.
    """
    n = outputs + taps - 1
    points = POINTS[: n - 1]

    def product(roots: list[int]) -> list[Fraction]:
        coefficients = [Fraction(1)]
        for root in roots:  # multiplied by (x - root); lowest power first
            coefficients = [a - root * b for a, b in zip([Fraction(0), *coefficients], [*coefficients, Fraction(0)])]
        return coefficients

    def value(roots: list[int], p: int) -> Fraction:
        return sum(c * p**k for k, c in enumerate(product(roots)))  # type: ignore[return-value]

    a = [[Fraction(i == outputs - 1)] + [Fraction(p) ** i for p in points] for i in range(outputs)]
    g, b = [[Fraction(k == taps - 1) for k in range(taps)]], [product(points)]
    for p in points:
        others, scale = [q for q in points if q != p], value([q for q in POINTS[: tile + 1] if q != p], p)
        g.append([Fraction(p) ** k / scale for k in range(taps)])
        b.append([c * scale / value(others, p) for c in [*product(others), Fraction(0)]])
    return a, g, b


def _weighted(emit: Emitter, terms: list[tuple[Fraction, Any]]) -> Any:
    """Σ coefficient · vector, in as few instructions as the coefficients allow."""
    terms = sorted((term for term in terms if term[0]), key=lambda term: abs(term[0] - 1))
    total = None
    for coefficient, value in terms:
        constant = ir.Constant(VECTOR, [float(coefficient)] * LANES)
        if total is None:
            total = value if coefficient == 1 else emit.builder.fmul(constant, value)
        elif abs(coefficient) == 1:
            total = emit.builder.fadd(total, value) if coefficient == 1 else emit.builder.fsub(total, value)
        else:
            total = emit.fma(constant, value, total)
    return total


def _opposite(first: list[Fraction], second: list[Fraction]) -> bool:
    """Whether the lists agree in some places and are each other's negative in all others."""
    return (
        first != second
        and all(abs(a) == abs(b) for a, b in zip(first, second))
        and any(a == b != 0 for a, b in zip(first, second))
    )


def _apply(emit: Emitter, matrix: Matrix, values: list[Any]) -> list[Any]:
    """matrix · values; points ±p give pairs of columns or rows that share their sums."""
    columns = [list(column) for column in zip(*matrix)]
    terms: list[list[tuple[Fraction, Any]]] = [[] for _ in matrix]
    rest = list(range(len(values)))
    while rest:
        j = rest.pop(0)
        k = next((k for k in rest if _opposite(columns[j], columns[k])), None)
        if k is None:
            for row, entry in zip(terms, columns[j]):
                row.append((entry, values[j]))
            continue
        rest.remove(k)
        total, difference = emit.builder.fadd(values[j], values[k]), emit.builder.fsub(values[j], values[k])
        for row, a, b in zip(terms, columns[j], columns[k]):
            row.append((a, total if a == b else difference))
    results: list[Any] = [None] * len(matrix)
    for i, row in enumerate(terms):
        k = next((k for k in range(i + 1, len(matrix)) if results[k] is None and _opposite(matrix[i], matrix[k])), None)
        if results[i] is not None:
            continue
        if k is None or [v for _, v in row] != [v for _, v in terms[k]]:
            results[i] = _weighted(emit, row)
            continue
        even = _weighted(emit, [a for a, b in zip(row, terms[k]) if a[0] == b[0]])
        odd = _weighted(emit, [a for a, b in zip(row, terms[k]) if a[0] != b[0]])
        results[i], results[k] = emit.builder.fadd(even, odd), emit.builder.fsub(even, odd)
    return results


def transform(name: str, matrices: dict[int, Matrix], *, edges: bool = False, final: bool = False) -> Any:
    """An intrinsic that computes D · X · Cᵀ for a rectangle X of vectors (LANES channels at a time), D and C of the matrices.

    Its arguments are (which is D, which is C, source, row stride, column stride, row bits, column bits, lane bits) and (target,
    row stride, column stride, lane bits, bias, residual). `edges`: source vectors outside the bits are taken as 0 and not read.
    `final`: bias and residual (0: none; laid out as the target) are added, and only the lanes of the bits are written. Else bits
    are ignored.
    """
    extent = max(max(len(matrix), len(matrix[0])) for matrix in matrices.values())

    def emit_transform(builder, args):  # type: ignore[no-untyped-def]
        down, across, source, s_row, s_col, s_rows, s_cols, s_lanes, target, t_row, t_col, t_lanes, bias, residual = args
        emit = Emitter(builder)
        none, one = ir.Constant(I64, 0), ir.Constant(I64, 1)
        source, target = emit.pointer(source), emit.pointer(target)
        halfway = builder.bitcast(builder.alloca(VECTOR, extent * extent), source.type)

        def look_up(which: Any, counts: dict[int, int]) -> Any:
            found = none
            for key, count in counts.items():
                same = builder.icmp_signed("==", which, ir.Constant(I64, key))
                found = builder.select(same, ir.Constant(I64, count), found)
            return found

        def along(which: Any, repeats: Any, load: Any, store: Any) -> None:
            """Multiply the chosen matrix with `repeats` lists of vectors."""
            entry, done = builder.block, builder.append_basic_block("done")
            choice = builder.switch(which, done)
            for key, matrix in matrices.items():
                loop = builder.append_basic_block("loop")
                choice.add_case(ir.Constant(I64, key), loop)
                builder.position_at_end(loop)
                r = builder.phi(I64)
                for i, value in enumerate(_apply(emit, matrix, load(len(matrix[0]), r))):
                    store(value, i, r)
                after = builder.add(r, one)
                builder.cbranch(builder.icmp_signed("<", after, repeats), loop, done)
                r.add_incoming(none, entry)
                r.add_incoming(after, loop)
            builder.position_at_end(done)

        def load_column(size: int, r: Any) -> list[Any]:
            places = [emit.at(source, builder.add(emit.times(i, s_row), builder.mul(r, s_col))) for i in range(size)]
            if not edges:
                return [emit.load(at) for at in places]
            inside = builder.select(builder.trunc(builder.lshr(s_cols, r), ir.IntType(1)), s_lanes, none)
            bits = [builder.trunc(builder.lshr(s_rows, ir.Constant(I64, i)), ir.IntType(1)) for i in range(size)]
            return [emit.masked_load(at, emit.mask(builder.select(bit, inside, none))) for at, bit in zip(places, bits)]

        def store_column(value: Any, i: int, r: Any) -> None:
            emit.store(value, emit.at(halfway, emit.times(LANES, builder.add(ir.Constant(I64, i * extent), r))))

        def load_row(size: int, r: Any) -> list[Any]:
            row = emit.at(halfway, emit.times(LANES * extent, r))
            return [emit.load(emit.at(row, LANES * j)) for j in range(size)]

        if final:
            bias, has_bias = emit.optional(bias, t_lanes, source)
            add, lanes = emit.masked_load(bias, emit.mask(has_bias)), emit.mask(t_lanes)
            given = builder.icmp_signed("!=", residual, none)
            residual, has_residual = emit.optional(residual, t_lanes, source)

        def store_row(value: Any, j: int, r: Any) -> None:
            offset = builder.add(builder.mul(r, t_row), emit.times(j, t_col))
            if final:
                more = emit.masked_load(emit.at(residual, builder.select(given, offset, none)), emit.mask(has_residual))
                emit.masked_store(emit.add(emit.add(value, add), more), emit.at(target, offset), lanes)
            else:
                emit.store(value, emit.at(target, offset))

        along(down, look_up(across, {key: len(matrix[0]) for key, matrix in matrices.items()}), load_column, store_column)
        along(across, look_up(down, {key: len(matrix) for key, matrix in matrices.items()}), load_row, store_row)

    @intrinsic
    def run(
        typingctx, down, across, source, s_row, s_col, s_rows, s_cols, s_lanes, target, t_row, t_col, t_lanes, bias, residual
    ):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            call_own(builder, name, args, emit_transform)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 14), codegen

    return run


# A matrix for m outputs of a tile is numbered tile + m: 5 to 8 and 3 to 4.
_MATRICES = {tile + m: (*cook_toom(m, 3, tile), *cook_toom(3, m, tile)[:2]) for tile in (2, 4) for m in range(1, tile + 1)}
ONE = 1 + POINTS.index(1)  # the place of point 1
SUM_SCALES = {tile: float(1 / _MATRICES[2 * tile][4][ONE][0] ** 2) for tile in (2, 4)}  # of that point along both axes
_whole = {2 * tile: _MATRICES[2 * tile] for tile in (2, 4)}
_image = transform("image", {key: b for key, (_, _, b, _, _) in _MATRICES.items()})
_image_edge = transform("image_edge", {key: b for key, (_, _, b, _, _) in _MATRICES.items()}, edges=True)
_pixels = transform("pixels", {key: a for key, (a, _, _, _, _) in _MATRICES.items()}, final=True)
_gradient = transform("gradient", {key: g for key, (_, _, _, _, g) in _MATRICES.items()}, edges=True)
_weights = transform("weights", {key: g for key, (_, g, _, _, _) in _whole.items()})
_weights_grad = transform("weights_grad", {key: a for key, (_, _, _, a, _) in _whole.items()}, final=True)


@njit
def _bits(first, extent, size):  # type: ignore[no-untyped-def]
    """Bit i is set where 0 ≤ first + i < size, i < extent."""
    low, high = min(max(0, -first), extent), max(0, min(extent, size - first))
    return ((1 << high) - 1) & ~((1 << low) - 1)


@njit
def _lanes(first, size):  # type: ignore[no-untyped-def]
    return (1 << min(LANES, size - first)) - 1


@njit
def _share(count, thread, threads):  # type: ignore[no-untyped-def]
    first = thread * count // threads
    return first, (thread + 1) * count // threads - first


@njit
def _order(n, ho, wo, tile, thread, threads):  # type: ignore[no-untyped-def]
    """Which tiles this thread takes of the four kinds (the first's number, and where they end among the thread's)."""
    qy, qx, ey, ex = ho // tile, wo // tile, min(1, ho % tile), min(1, wo % tile)
    right, n_right = _share(n * qy * ex, thread, threads)
    whole, n_whole = _share(n * qy * qx, thread, threads)
    bottom, n_bottom = _share(n * ey * qx, thread, threads)
    corner, n_corner = _share(n * ey * ex, thread, threads)
    n_whole += n_right
    n_bottom += n_whole
    return right, whole, bottom, corner, n_right, n_whole, n_bottom, n_bottom + n_corner


@njit
def _find(t, order, ho, wo, tile):  # type: ignore[no-untyped-def]
    """Image, first row and first column of the thread's t-th tile, and its outputs along both axes."""
    right, whole, bottom, corner, end_right, end_whole, end_bottom, _ = order
    qy, qx = ho // tile, wo // tile
    if t < end_right:
        i, rows, columns, y, x = right + t, qy, 1, 0, qx
    elif t < end_whole:
        i, rows, columns, y, x = whole + t - end_right, qy, qx, 0, 0
    elif t < end_bottom:
        i, rows, columns, y, x = bottom + t - end_whole, 1, qx, qy, 0
    else:
        i, rows, columns, y, x = corner + t - end_bottom, 1, 1, qy, qx
    y, x = (y + i // columns % rows) * tile, (x + i % columns) * tile
    return i // (rows * columns), y, x, min(tile, ho - y), min(tile, wo - x)


@njit
def _needing(i, j, order, ho, wo, tile):  # type: ignore[no-untyped-def]
    """The first and the end of the thread's tiles that need point (i, j)."""
    _, _, _, _, end_right, end_whole, end_bottom, end = order
    tall, wide = i >= ho % tile + 2, j >= wo % tile + 2  # whether a narrower tile does without it
    return end_right if wide else 0, end_whole if tall else end_bottom if wide else end


@body
def transform_weights(args, thread):  # type: ignore[no-untyped-def]
    """U (points², panels, C, WIDTH, and a gap) from w with any strides; `packed` holds the weights as panels on the way."""
    w, s_kh, s_kw, s_c, s_o, c, o, packed, u, tile, threads = unpack(args, 11)
    points, whole = tile + 2, 2 * tile
    panels = (o + WIDTH - 1) // WIDTH
    plane = panels * c * WIDTH + LANES
    for j in range(thread * panels // threads, (thread + 1) * panels // threads):
        panel = packed + 4 * j * 9 * c * WIDTH
        for tap in range(9):
            source = w + 4 * (tap // 3 * s_kh + tap % 3 * s_kw + j * WIDTH * s_o)
            pack_tap(source, s_c, s_o, c, min(WIDTH, o - j * WIDTH), panel + 4 * tap * c * WIDTH)
        for i in range(0, c * WIDTH, LANES):
            target = u + 4 * (j * c * WIDTH + i)
            _weights(whole, whole, panel + 4 * i, 3 * c * WIDTH, c * WIDTH, 0, 0, 0, target, points * plane, plane, 0, 0, 0)


@njit
def _transform_images(x, height, width, c, top, left, ho, wo, order, first, last, v, plane, stride, channels, tile):  # type: ignore[no-untyped-def]
    """V (points², tiles, stride) for tiles first to last, of so many of x's channels."""
    points = tile + 2
    for t in range(first, last):
        image, y, x0, my, mx = _find(t, order, ho, wo, tile)
        y, x0, down, across = y - top, x0 - left, tile + my, tile + mx
        source = x + 4 * ((image * height + y) * width + x0) * c
        target = v + 4 * (t - first) * stride
        rows, cols = _bits(y, my + 2, height), _bits(x0, mx + 2, width)
        whole = channels // LANES * LANES if rows == (1 << (my + 2)) - 1 and cols == (1 << (mx + 2)) - 1 else 0
        for k in range(0, whole, LANES):
            to = target + 4 * k
            _image(down, across, source + 4 * k, width * c, c, 0, 0, 0, to, points * plane, plane, 0, 0, 0)
        for k in range(whole, channels, LANES):
            to, lanes = target + 4 * k, _lanes(k, channels)
            _image_edge(down, across, source + 4 * k, width * c, c, rows, cols, lanes, to, points * plane, plane, 0, 0, 0)


@njit
def _fetch(pixels, height, width, channels, t, order, ho, wo, tile):  # type: ignore[no-untyped-def]
    """Prefetch the thread's t-th tile of pixels, or about where it is, if those aren't of the output's size."""
    image, y, x, my, mx = _find(t, order, ho, wo, tile)
    for i in range(my):
        row = pixels + 4 * ((image * height + y + i) * width + x) * channels
        for line in range(row, row + 4 * mx * channels, 4 * LINE):
            prefetch(line)


@body
def forward(args, thread):  # type: ignore[no-untyped-def]
    """y = conv(x, w) + bias + residual from transformed weights, `block` tiles at a time."""
    (
        x, bias, bias_step, residual, y, u, vs, ms,
        n, height, width, c, top, left, ho, wo, o,
        block, tile, threads,
    ) = unpack(args, 20)  # fmt: skip
    points = tile + 2
    panels = (o + WIDTH - 1) // WIDTH
    v_stride, m_stride = (c + LANES - 1) // LANES * LANES, panels * WIDTH
    v_plane, m_plane, u_plane = block * v_stride + LANES, block * m_stride + LANES, panels * c * WIDTH + LANES
    v, m = vs + 4 * thread * points * points * v_plane, ms + 4 * thread * points * points * m_plane
    order = _order(n, ho, wo, tile, thread, threads)
    for first in range(0, order[7], block):
        last = min(first + block, order[7])
        _transform_images(x, height, width, c, top, left, ho, wo, order, first, last, v, v_plane, v_stride, c, tile)
        for p in range(points * points):
            begin, end = _needing(p // points, p % points, order, ho, wo, tile)
            begin, end = max(begin, first) - first, min(end, last) - first
            part, count = _share(last - first, p, points * points)
            for t in range(first + part, first + part + count):
                if residual != 0:
                    _fetch(residual, ho, wo, o, t, order, ho, wo, tile)
                if t + block < order[7]:
                    _fetch(x, height, width, c, t + block, order, ho, wo, tile)
            for j in range(panels):
                b, t = u + 4 * (p * u_plane + j * c * WIDTH), begin
                while t < end:
                    a, product = v + 4 * (p * v_plane + t * v_stride), m + 4 * (p * m_plane + t * m_stride + j * WIDTH)
                    t += tile_rows(a, v_stride, 0, b, WIDTH, 1, c, 0, 0, 0, product, m_stride, WIDTH, end - t)
        for t in range(first, last):
            image, y0, x0, my, mx = _find(t, order, ho, wo, tile)
            at = ((image * ho + y0) * wo + x0) * o
            for k in range(0, o, LANES):
                source = m + 4 * ((t - first) * m_stride + k)
                add = bias + 4 * (image * bias_step + k) if bias != 0 else 0
                more = residual + 4 * (at + k) if residual != 0 else 0
                down, across, target, lanes = tile + my, tile + mx, y + 4 * (at + k), _lanes(k, o)
                _pixels(down, across, source, points * m_plane, m_plane, 0, 0, 0, target, wo * o, o, lanes, add, more)


@body
def weight_grad(args, thread):  # type: ignore[no-untyped-def]
    """Σ over tiles of V ⊗ transformed g, in sums (parts, points², panels, C to a multiple of REST, WIDTH, and a gap).

    The threads share out the tiles in `parts`; those of one part share out the channels, each transforming all of the part's g.
    Unless `totals` is 0, g is added up on the way: a tile's sum is its value at the point (1, 1), but for SUM_SCALES. It is
    added to those in totals (parts, N, O).
    """
    (
        x, g, sums, totals, vs, ds,
        n, height, width, c, top, left, ho, wo, o,
        block, tile, parts, threads,
    ) = unpack(args, 19)  # fmt: skip
    points = tile + 2
    panels = (o + WIDTH - 1) // WIDTH
    cuts, vectors = threads // parts, (c + LANES - 1) // LANES
    part, cut = thread // cuts, thread % cuts
    first_c, last_c = cut * vectors // cuts * LANES, min(c, (cut + 1) * vectors // cuts * LANES)
    v_stride, d_stride = (vectors + cuts - 1) // cuts * LANES, panels * WIDTH
    rows_c = (c + REST - 1) // REST * REST
    v_plane, d_plane = block * v_stride + LANES, block * d_stride + LANES
    v, d = vs + 4 * thread * points * points * v_plane, ds + 4 * thread * points * points * d_plane
    plane = panels * rows_c * WIDTH + LANES
    mine = sums + 4 * (part * points * points * plane + first_c * WIDTH)
    channels = last_c - first_c
    padded = (channels + REST - 1) // REST * REST
    order = _order(n, ho, wo, tile, part, parts)
    if d_stride >= o + LANES:  # a vector that no transform fills
        zero(d, points * points * d_plane)
    for p in range(points * points):
        begin, end = _needing(p // points, p % points, order, ho, wo, tile)
        if begin >= end:
            for j in range(panels):
                zero(mine + 4 * (p * plane + j * rows_c * WIDTH), padded * WIDTH)
    for first in range(0, order[7], block):
        last = min(first + block, order[7])
        from_c = x + 4 * first_c
        _transform_images(from_c, height, width, c, top, left, ho, wo, order, first, last, v, v_plane, v_stride, channels, tile)
        for t in range(first, last):
            image, y0, x0, my, mx = _find(t, order, ho, wo, tile)
            at = g + 4 * ((image * ho + y0) * wo + x0) * o
            for k in range(0, o, LANES):
                target, lanes = d + 4 * ((t - first) * d_stride + k), _lanes(k, o)
                down, across, rows, cols = tile + my, tile + mx, (1 << my) - 1, (1 << mx) - 1
                _gradient(down, across, at + 4 * k, wo * o, o, rows, cols, lanes, target, points * d_plane, d_plane, 0, 0, 0)
            if totals != 0 and cut == 0:
                total = totals + 4 * (part * n + image) * o
                tile_sum = d + 4 * (ONE * (points + 1) * d_plane + (t - first) * d_stride)
                for k in range(o):
                    write(total, k, read(total, k) + read(tile_sum, k))
        for p in range(points * points):
            begin, end = _needing(p // points, p % points, order, ho, wo, tile)
            low, high = max(begin, first), min(end, last)
            if low >= high:
                continue
            skip, count = _share(last - first, p, points * points)
            for t in range(first + skip + block, min(first + skip + count + block, order[7])):
                _fetch(x, height, width, c, t, order, ho, wo, tile)
                _fetch(g, ho, wo, o, t, order, ho, wo, tile)
            for j in range(panels):
                b = d + 4 * (p * d_plane + (low - first) * d_stride + j * WIDTH)
                i = 0
                while i < padded:
                    at = mine + 4 * (p * plane + (j * rows_c + i) * WIDTH)
                    start = at if low > begin else 0
                    a = v + 4 * (p * v_plane + (low - first) * v_stride + i)
                    i += tile_columns(a, v_stride, 0, b, d_stride, 1, high - low, at, start, padded - i)


@body
def transform_sums(args, thread):  # type: ignore[no-untyped-def]
    """dw (3, 3, C, O) from the sums of all parts, added in order."""
    sums, dw, c, o, parts, tile, threads = unpack(args, 7)
    points, whole = tile + 2, 2 * tile
    panels = (o + WIDTH - 1) // WIDTH
    rows_c = (c + REST - 1) // REST * REST
    plane = panels * rows_c * WIDTH + LANES
    for i in range(thread * c // threads, (thread + 1) * c // threads):
        for j in range(panels):
            row = sums + 4 * (j * rows_c + i) * WIDTH
            for p in range(points * points):
                for part in range(1, parts):
                    for k in range(WIDTH):
                        write(row, p * plane + k, read(row, p * plane + k) + read(row, (part * points * points + p) * plane + k))
            for k in range(j * WIDTH, min(o, (j + 1) * WIDTH), LANES):
                source, target, lanes = row + 4 * (k - j * WIDTH), dw + 4 * (i * o + k), _lanes(k, o)
                _weights_grad(whole, whole, source, points * plane, plane, 0, 0, 0, target, 3 * c * o, c * o, lanes, 0, 0)
