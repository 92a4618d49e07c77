"""3×3 convolution by Winograd's minimal filtering: F(4×4, 3×3), with a quarter of the multiplications at some error,
F(2×2, 3×3), with four ninths of them at hardly any, and at a stride of 2 with nine sixteenths of them.

The transforms B, G and A turn a tile's convolution into points² products, so over all tiles, channels and filters it is that
many matrix products (Lavin & Gray 2016; the matrices are Cook-Toom's). A thread transforms a block of tiles into V (points²,
tiles, C), multiplies with the transformed weights U into M (sums², tiles, O), and transforms M into pixels, bias and residual
added; V and M stay in its L2 cache, and what it reads next comes there while it multiplies. The weight gradient is the transpose
of that: V times the transformed tiles of the output's gradient, summed over the tiles. Bound by FMA for many channels, by the
transforms for few.

At a stride of 2 the outer taps meet every other number, which makes them F(4, 2), of 5 points, and the middle tap those between:
4 products as they are. Together that is 9 points of 6 different weights, and two of the middle tap's products go into the sum of
one of F's, for the outermost points of F belong to one output alone: 7 sums. The gradient by the input is alike, with outputs
where there were inputs; its products are all summed apart.

Where a side is no multiple of the tile, the last tile of a row or column is narrower: with fewer outputs it needs fewer points,
and these are the first of the whole tile's, so that U is the same. A thread takes its tiles in the order right edge, whole,
bottom edge, corner. Then those that need a certain point follow one another, and it is multiplied for these alone.
"""

from __future__ import annotations

from fractions import Fraction
from functools import partial
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
F2, F4, DOWN, UP, UP_ODD = range(5)
"""The kinds of tile: two at stride 1, one at stride 2, and two for the gradient by its input. Of these, UP begins with an output
that the outer taps reach, UP_ODD with one that the middle tap does; their outputs along an axis are an even number."""
TILE = 2, 4, 4, 8, 8  # outputs of a whole tile of each kind, along an axis
_OUTER, _MIDDLE = (0, 2, 4, 5, 7), (1, 3, 6, 8)  # at stride 2, which points are F(4, 2)'s, and which the middle tap's
_SUM = 0, 0, 1, 1, 2, 3, 4, 5, 6
_WEIGHT = 0, 1, 2, 1, 3, 4, 1, 5, 1


def cook_toom(outputs: int, taps: int, tile: int) -> tuple[Matrix, Matrix, Matrix]:
    """A (outputs, n), G (n, taps) and B (n, n), with n = outputs + taps - 1, such that A[(G g) ⊙ (B d)] correlates d with g.

    G is scaled as for the points of a whole tile of `tile` outputs: with fewer, it is the first rows of that.
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
        others, scale = [q for q in points if q != p], value([q for q in POINTS[: tile + taps - 2] if q != p], p)
        g.append([Fraction(p) ** k / scale for k in range(taps)])
        b.append([c * scale / value(others, p) for c in [*product(others), Fraction(0)]])
    return a, g, b


def points(kind: int, outputs: int) -> int:
    """Products along an axis for so many outputs of a tile."""
    return outputs + 2 if kind <= F4 else 2 * outputs + 1 if kind == DOWN else outputs + 1


def sums(kind: int, outputs: int) -> int:
    """Sums of these products."""
    return outputs + 2 if kind <= F4 else max(2, 2 * outputs - 1) if kind == DOWN else outputs + 1


def weights(kind: int) -> int:
    """Transformed weights along an axis."""
    return TILE[kind] + 2 if kind <= F4 else 6


_points, _sums, _n_weights = njit(points), njit(sums), njit(weights)


@njit
def sum_of(kind, point):  # type: ignore[no-untyped-def]
    """The sum along an axis that a product goes into."""
    return _SUM[point] if kind == DOWN else point


@njit
def weight_of(kind, point):  # type: ignore[no-untyped-def]
    """The transformed weight along an axis that a product is made with."""
    return _WEIGHT[point] if kind > F4 else point


@njit
def _adds(kind, point):  # type: ignore[no-untyped-def]
    """Whether an earlier product goes into the same sum."""
    return kind == DOWN and (point == 1 or point == 3)


@njit
def _shares(kind, point):  # type: ignore[no-untyped-def]
    """Whether an earlier product is made with the same weight."""
    return kind > F4 and point > 1 and _WEIGHT[point] == 1


@njit
def _ones(kind, outputs):  # type: ignore[no-untyped-def]
    """A sum along an axis that each of so many outputs of a tile has as it is, as one of F's points 0 and 1."""
    return 1 if outputs == 1 else 2


@njit
def _inputs(kind, outputs):  # type: ignore[no-untyped-def]
    """Numbers along an axis that so many outputs are made of."""
    return outputs + 2 if kind <= F4 else 2 * outputs + 1 if kind == DOWN else outputs // 2 + 1


@njit
def _start(kind, output):  # type: ignore[no-untyped-def]
    """Where the inputs of a tile begin, beside those of the first."""
    return output if kind <= F4 else 2 * output if kind == DOWN else output // 2


def matrices(kind: int, outputs: int) -> tuple[Matrix, Matrix, Matrix]:
    """A (outputs, sums), G (weights, 3) and B (points, inputs) for so many outputs of a kind of tile."""
    if kind <= F4:
        return cook_toom(outputs, 3, TILE[kind])
    m = outputs if kind == DOWN else outputs // 2
    to, middle_to, of, middle_of = {  # the places of F's outputs, of the middle tap's, of F's inputs and of the middle tap's
        DOWN: (range(m), range(m), range(0, 2 * m + 1, 2), range(1, 2 * m, 2)),
        UP: (range(0, 2 * m, 2), range(1, 2 * m, 2), range(m + 1), range(1, m + 1)),
        UP_ODD: (range(1, 2 * m, 2), range(0, 2 * m, 2), range(m + 1), range(m)),
    }[kind]
    shapes = (outputs, sums(kind, outputs)), (weights(kind), 3), (points(kind, outputs), of[-1] + 1)
    a, g, b = ([[Fraction(0)] * columns for _ in range(rows)] for rows, columns in shapes)
    outer_a, outer_g, outer_b = cook_toom(m, 2, 4)
    for p, k in zip(_OUTER, range(m + 1)):
        g[_WEIGHT[p]][::2] = outer_g[k]
        for j in range(m + 1):
            b[p][of[j]] = outer_b[k][j]
        for j in range(m):
            a[to[j]][sum_of.py_func(kind, p)] = outer_a[j][k]
    for p, j in zip(_MIDDLE, [m - 1, *range(m - 1)]):  # infinity is the last output's, 0 the first's
        g[_WEIGHT[p]][1] = b[p][middle_of[j]] = a[middle_to[j]][sum_of.py_func(kind, p)] = Fraction(1)
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

    def emit_transform(matrices, builder, args):  # type: ignore[no-untyped-def]
        extent = max(max(len(matrix), len(matrix[0])) for matrix in matrices.values())
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
            # A function for each kind: with all in one, LLVM made the loops of each half as fast again.
            done = builder.append_basic_block("done")
            choice = builder.switch(builder.udiv(args[0], ir.Constant(I64, 16)), done)
            for kind in sorted({key // 16 for key in matrices}):
                block = builder.append_basic_block("kind")
                choice.add_case(ir.Constant(I64, kind), block)
                builder.position_at_end(block)
                own = {key: matrix for key, matrix in matrices.items() if key // 16 == kind}
                call_own(builder, f"{name}_{kind}", args, partial(emit_transform, own))
                builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 14), codegen

    return run


# The matrices for m outputs of a kind are numbered 16 · kind + m.
_MATRICES = {
    16 * kind + m: matrices(kind, m) for kind, tile in enumerate(TILE) for m in range(1, tile + 1) if kind < UP or m % 2 == 0
}
_WHOLE = {16 * kind + TILE[kind]: _MATRICES[16 * kind + TILE[kind]] for kind in (F2, F4, DOWN)}


def _transposed(matrix: Matrix) -> Matrix:
    return [list(column) for column in zip(*matrix)]


_image = transform("image", {key: b for key, (_, _, b) in _MATRICES.items()})
_image_edge = transform("image_edge", {key: b for key, (_, _, b) in _MATRICES.items()}, edges=True)
_pixels = transform("pixels", {key: a for key, (a, _, _) in _MATRICES.items()}, final=True)
_gradient = transform("gradient", {key: _transposed(a) for key, (a, _, _) in _MATRICES.items() if key < 16 * UP}, edges=True)
_weights = transform("weights", {key: g for key, (_, g, _) in _WHOLE.items()})
_weights_grad = transform("weights_grad", {key: _transposed(g) for key, (_, g, _) in _WHOLE.items()}, final=True)


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
def _needing(i, j, order, ho, wo, kind):  # type: ignore[no-untyped-def]
    """The first and the end of the thread's tiles that need point (i, j)."""
    _, _, _, _, end_right, end_whole, end_bottom, end = order
    tile = TILE[kind]
    tall, wide = i >= _points(kind, ho % tile), j >= _points(kind, wo % tile)  # whether a narrower tile does without it
    return end_right if wide else 0, end_whole if tall else end_bottom if wide else end


@body
def transform_weights(args, thread):  # type: ignore[no-untyped-def]
    """U (weights², panels, C, WIDTH, and a gap) from w with any strides; `packed` holds the weights as panels on the way."""
    w, s_kh, s_kw, s_c, s_o, c, o, packed, u, kind, threads = unpack(args, 11)
    n_weights, whole = _n_weights(kind), 16 * kind + TILE[kind]
    panels = (o + WIDTH - 1) // WIDTH
    plane = panels * c * WIDTH + LANES
    for j in range(thread * panels // threads, (thread + 1) * panels // threads):
        panel = packed + 4 * j * 9 * c * WIDTH
        for tap in range(9):
            source = w + 4 * (tap // 3 * s_kh + tap % 3 * s_kw + j * WIDTH * s_o)
            pack_tap(source, s_c, s_o, c, min(WIDTH, o - j * WIDTH), panel + 4 * tap * c * WIDTH)
        for i in range(0, c * WIDTH, LANES):
            target = u + 4 * (j * c * WIDTH + i)
            _weights(whole, whole, panel + 4 * i, 3 * c * WIDTH, c * WIDTH, 0, 0, 0, target, n_weights * plane, plane, 0, 0, 0)


@njit
def _transform_images(x, height, width, c, top, left, ho, wo, order, first, last, v, plane, stride, channels, kind):  # type: ignore[no-untyped-def]
    """V (points², tiles, stride) for tiles first to last, of so many of x's channels."""
    tile = TILE[kind]
    n_points = _points(kind, tile)
    for t in range(first, last):
        image, y, x0, my, mx = _find(t, order, ho, wo, tile)
        y, x0, down, across = _start(kind, y) - top, _start(kind, x0) - left, 16 * kind + my, 16 * kind + mx
        under_y, under_x = _inputs(kind, my), _inputs(kind, mx)
        source = x + 4 * ((image * height + y) * width + x0) * c
        target = v + 4 * (t - first) * stride
        rows, cols = _bits(y, under_y, height), _bits(x0, under_x, width)
        whole = channels // LANES * LANES if rows == (1 << under_y) - 1 and cols == (1 << under_x) - 1 else 0
        for k in range(0, whole, LANES):
            to = target + 4 * k
            _image(down, across, source + 4 * k, width * c, c, 0, 0, 0, to, n_points * plane, plane, 0, 0, 0)
        for k in range(whole, channels, LANES):
            to, lanes = target + 4 * k, _lanes(k, channels)
            _image_edge(down, across, source + 4 * k, width * c, c, rows, cols, lanes, to, n_points * plane, plane, 0, 0, 0)


@njit
def _fetch(pixels, height, width, channels, t, order, ho, wo, tile):  # type: ignore[no-untyped-def]
    """Prefetch the thread's t-th tile of pixels, or about where it is, if those aren't of the output's size."""
    image, y, x, my, mx = _find(t, order, ho, wo, tile)
    for i in range(y * height // ho, (y + my) * height // ho):
        row = pixels + 4 * ((image * height + i) * width + x * width // wo) * channels
        for line in range(row, row + 4 * (mx * width // wo) * channels, 4 * LINE):
            prefetch(line)


@body
def forward(args, thread):  # type: ignore[no-untyped-def]
    """y = conv(x, w) + bias + residual from transformed weights, `block` tiles at a time."""
    (
        x, bias, bias_step, residual, y, u, vs, ms,
        n, height, width, c, top, left, ho, wo, o,
        block, kind, threads,
    ) = unpack(args, 20)  # fmt: skip
    tile = TILE[kind]
    n_points, n_sums, n_weights = _points(kind, tile), _sums(kind, tile), _n_weights(kind)
    panels = (o + WIDTH - 1) // WIDTH
    v_stride, m_stride = (c + LANES - 1) // LANES * LANES, panels * WIDTH
    v_plane, m_plane, u_plane = block * v_stride + LANES, block * m_stride + LANES, panels * c * WIDTH + LANES
    v, m = vs + 4 * thread * n_points * n_points * v_plane, ms + 4 * thread * n_sums * n_sums * m_plane
    order = _order(n, ho, wo, tile, thread, threads)
    for first in range(0, order[7], block):
        last = min(first + block, order[7])
        _transform_images(x, height, width, c, top, left, ho, wo, order, first, last, v, v_plane, v_stride, c, kind)
        for p in range(n_points * n_points):
            y_point, x_point = p // n_points, p % n_points
            begin, end = _needing(y_point, x_point, order, ho, wo, kind)
            begin, end = max(begin, first) - first, min(end, last) - first
            weight = weight_of(kind, y_point) * n_weights + weight_of(kind, x_point)
            to, adds = sum_of(kind, y_point) * n_sums + sum_of(kind, x_point), _adds(kind, y_point) or _adds(kind, x_point)
            part, count = _share(last - first, p, n_points * n_points)
            for t in range(first + part, first + part + count):
                if residual != 0:
                    _fetch(residual, ho, wo, o, t, order, ho, wo, tile)
                if t + block < order[7]:
                    _fetch(x, height, width, c, t + block, order, ho, wo, tile)
            for j in range(panels):
                b, t = u + 4 * (weight * u_plane + j * c * WIDTH), begin
                while t < end:
                    a, product = v + 4 * (p * v_plane + t * v_stride), m + 4 * (to * m_plane + t * m_stride + j * WIDTH)
                    start = product if adds else 0
                    t += tile_rows(a, v_stride, 0, b, WIDTH, 1, c, 0, start, m_stride, product, m_stride, WIDTH, end - t)
        for t in range(first, last):
            image, y0, x0, my, mx = _find(t, order, ho, wo, tile)
            at = ((image * ho + y0) * wo + x0) * o
            for k in range(0, o, LANES):
                source = m + 4 * ((t - first) * m_stride + k)
                add = bias + 4 * (image * bias_step + k) if bias != 0 else 0
                more = residual + 4 * (at + k) if residual != 0 else 0
                down, across, target, lanes = 16 * kind + my, 16 * kind + mx, y + 4 * (at + k), _lanes(k, o)
                _pixels(down, across, source, n_sums * m_plane, m_plane, 0, 0, 0, target, wo * o, o, lanes, add, more)


@body
def weight_grad(args, thread):  # type: ignore[no-untyped-def]
    """Σ over tiles of V ⊗ transformed g, in sums (parts, weights², panels, C to a multiple of REST, WIDTH, and a gap).

    The threads share out the tiles in `parts`; those of one part share out the channels, each transforming all of the part's g.
    Unless `totals` is 0, g is added up on the way: a tile's sum is its value where the transform is one. It is
    added to those in totals (parts, N, O).
    """
    (
        x, g, sums, totals, vs, ds,
        n, height, width, c, top, left, ho, wo, o,
        block, kind, parts, threads,
    ) = unpack(args, 19)  # fmt: skip
    tile = TILE[kind]
    n_points, n_sums, n_weights = _points(kind, tile), _sums(kind, tile), _n_weights(kind)
    panels = (o + WIDTH - 1) // WIDTH
    cuts, vectors = threads // parts, (c + LANES - 1) // LANES
    part, cut = thread // cuts, thread % cuts
    first_c, last_c = cut * vectors // cuts * LANES, min(c, (cut + 1) * vectors // cuts * LANES)
    v_stride, d_stride = (vectors + cuts - 1) // cuts * LANES, panels * WIDTH
    rows_c = (c + REST - 1) // REST * REST
    v_plane, d_plane = block * v_stride + LANES, block * d_stride + LANES
    v, d = vs + 4 * thread * n_points * n_points * v_plane, ds + 4 * thread * n_sums * n_sums * d_plane
    plane = panels * rows_c * WIDTH + LANES
    mine = sums + 4 * (part * n_weights * n_weights * plane + first_c * WIDTH)
    channels = last_c - first_c
    padded = (channels + REST - 1) // REST * REST
    order = _order(n, ho, wo, tile, part, parts)
    if d_stride >= o + LANES:  # a vector that no transform fills
        zero(d, n_sums * n_sums * d_plane)
    for p in range(n_points * n_points):
        begin, end = _needing(p // n_points, p % n_points, order, ho, wo, kind)
        if begin >= end:
            weight = weight_of(kind, p // n_points) * n_weights + weight_of(kind, p % n_points)
            for j in range(panels):
                zero(mine + 4 * (weight * plane + j * rows_c * WIDTH), padded * WIDTH)
    for first in range(0, order[7], block):
        last = min(first + block, order[7])
        from_c = x + 4 * first_c
        _transform_images(from_c, height, width, c, top, left, ho, wo, order, first, last, v, v_plane, v_stride, channels, kind)
        for t in range(first, last):
            image, y0, x0, my, mx = _find(t, order, ho, wo, tile)
            at = g + 4 * ((image * ho + y0) * wo + x0) * o
            for k in range(0, o, LANES):
                target, lanes = d + 4 * ((t - first) * d_stride + k), _lanes(k, o)
                down, across, rows, cols = 16 * kind + my, 16 * kind + mx, (1 << my) - 1, (1 << mx) - 1
                _gradient(down, across, at + 4 * k, wo * o, o, rows, cols, lanes, target, n_sums * d_plane, d_plane, 0, 0, 0)
            if totals != 0 and cut == 0:
                total = totals + 4 * (part * n + image) * o
                tile_sum = d + 4 * ((_ones(kind, my) * n_sums + _ones(kind, mx)) * d_plane + (t - first) * d_stride)
                for k in range(o):
                    write(total, k, read(total, k) + read(tile_sum, k))
        for p in range(n_points * n_points):
            y_point, x_point = p // n_points, p % n_points
            begin, end = _needing(y_point, x_point, order, ho, wo, kind)
            low, high = max(begin, first), min(end, last)
            if low >= high:
                continue
            skip, count = _share(last - first, p, n_points * n_points)
            for t in range(first + skip + block, min(first + skip + count + block, order[7])):
                _fetch(x, height, width, c, t, order, ho, wo, tile)
                _fetch(g, ho, wo, o, t, order, ho, wo, tile)
            weight = weight_of(kind, y_point) * n_weights + weight_of(kind, x_point)
            of, shares = sum_of(kind, y_point) * n_sums + sum_of(kind, x_point), _shares(kind, y_point) or _shares(kind, x_point)
            for j in range(panels):
                b = d + 4 * (of * d_plane + (low - first) * d_stride + j * WIDTH)
                i = 0
                while i < padded:
                    at = mine + 4 * (weight * plane + (j * rows_c + i) * WIDTH)
                    start = at if low > begin or shares else 0
                    a = v + 4 * (p * v_plane + (low - first) * v_stride + i)
                    i += tile_columns(a, v_stride, 0, b, d_stride, 1, high - low, at, start, padded - i)


@body
def transform_sums(args, thread):  # type: ignore[no-untyped-def]
    """dw (3, 3, C, O) from the sums of all parts, added in order."""
    sums, dw, c, o, parts, kind, threads = unpack(args, 7)
    n_weights, whole = _n_weights(kind), 16 * kind + TILE[kind]
    panels = (o + WIDTH - 1) // WIDTH
    rows_c = (c + REST - 1) // REST * REST
    plane = panels * rows_c * WIDTH + LANES
    for i in range(thread * c // threads, (thread + 1) * c // threads):
        for j in range(panels):
            row = sums + 4 * (j * rows_c + i) * WIDTH
            for p in range(n_weights * n_weights):
                for part in range(1, parts):
                    for k in range(WIDTH):
                        write(
                            row,
                            p * plane + k,
                            read(row, p * plane + k) + read(row, (part * n_weights * n_weights + p) * plane + k),
                        )
            for k in range(j * WIDTH, min(o, (j + 1) * WIDTH), LANES):
                source, target, lanes = row + 4 * (k - j * WIDTH), dw + 4 * (i * o + k), _lanes(k, o)
                _weights_grad(whole, whole, source, n_weights * plane, plane, 0, 0, 0, target, 3 * c * o, c * o, lanes, 0, 0)
