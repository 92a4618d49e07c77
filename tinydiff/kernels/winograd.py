"""3×3 stride-1 convolution by Winograd's minimal filtering: F(4×4, 3×3), with a quarter of the multiplications at some error,
and F(2×2, 3×3), with four ninths of them at hardly any.

The transforms B, G and A turn a tile's convolution into points² products, points = tile + 2, so over all tiles, channels and
filters it is that many matrix products (Lavin & Gray 2016; the matrices are Cook-Toom's). A thread transforms a block of tiles
into V (points², tiles, C), multiplies with the transformed weights U into M (points², tiles, O), and transforms M into pixels,
bias and residual added; V and M stay in its L2 cache. The weight gradient is the same with 3×3 outputs and the gradient's tiles
as filters, V and that transform multiplied over the tiles. Bound by FMA for many channels, by the transforms for few.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tinydiff.kernels.direct import pack_tap, tile_columns
from tinydiff.kernels.jit import njit
from tinydiff.kernels.launch import body, unpack
from tinydiff.kernels.memory import read, write, zero
from tinydiff.kernels.microkernel import I64, LANES, REST, ROWS, VECTOR, VECTORS, WIDTH, Emitter, gemm_tile

Matrix = list[list[Fraction]]


def cook_toom(outputs: int, taps: int, points: list[int]) -> tuple[Matrix, Matrix, Matrix]:
    """A (outputs, n), G (n, taps) and B (n, n), with n = outputs + taps - 1, such that A[(G g) ⊙ (B d)] correlates d with g.

    `points` are n - 1 distinct numbers; infinity is the n-th.
    """
    n = outputs + taps - 1

    def product(roots: list[int]) -> list[Fraction]:
        coefficients = [Fraction(1)]
        for root in roots:  # multiplied by (x - root); lowest power first
            coefficients = [a - root * b for a, b in zip([Fraction(0), *coefficients], [*coefficients, Fraction(0)])]
        return coefficients

    a = [[Fraction(p) ** i for p in points] + [Fraction(i == outputs - 1)] for i in range(outputs)]
    g, b = [], []
    for p in points:
        others = [q for q in points if q != p]
        scale = Fraction(1)
        for q in others:
            scale *= p - q
        g.append([Fraction(p) ** k / scale for k in range(taps)])
        b.append([*product(others), Fraction(0)])
    g.append([Fraction(k == taps - 1) for k in range(taps)])
    b.append(product(points))
    assert len(b) == n
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


def transform(matrix: Matrix, *, edges: bool = False, final: bool = False) -> Any:
    """An intrinsic that computes matrix · X · matrixᵀ for a square of vectors (LANES channels at a time).

    Its arguments are (source, row stride, column stride, row bits, column bits, lane bits) and the same of the target, then bias
    and residual. `edges`: source vectors outside the bits are taken as 0 and not read. `final`: bias and residual (0: none; laid
    out as the target) are added, and vectors outside the target's bits aren't written. Else bits are ignored.
    """
    count, size = len(matrix), len(matrix[0])

    @intrinsic
    def run(
        typingctx, source, s_row, s_col, s_rows, s_cols, s_lanes, target, t_row, t_col, t_rows, t_cols, t_lanes, bias, residual
    ):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            source, s_row, s_col, s_rows, s_cols, s_lanes, target, t_row, t_col, t_rows, t_cols, t_lanes, bias, residual = args
            emit = Emitter(builder)
            none = ir.Constant(I64, 0)

            def bit(bits: Any, i: int) -> Any:
                return builder.icmp_signed("!=", builder.and_(bits, ir.Constant(I64, 1 << i)), none)

            def masks(rows: Any, columns: Any, lanes: Any, extent: int) -> list[list[Any]]:
                by_column = [builder.select(bit(columns, j), lanes, none) for j in range(extent)]
                return [[builder.select(bit(rows, i), lane, none) for lane in by_column] for i in range(extent)]

            source = emit.pointer(source)
            inside = masks(s_rows, s_cols, s_lanes, size) if edges else []
            halfway = []
            for j in range(size):
                column = []
                for i in range(size):
                    at = emit.at(emit.at(source, emit.times(i, s_row)), emit.times(j, s_col))
                    column.append(emit.masked_load(at, emit.mask(inside[i][j])) if edges else emit.load(at))
                halfway.append(_apply(emit, matrix, column))
            wanted = masks(t_rows, t_cols, t_lanes, count) if final else []
            if final:
                bias, has_bias = emit.optional(bias, t_lanes, source)
                add = emit.masked_load(bias, emit.mask(has_bias))
                given = builder.icmp_signed("!=", residual, none)
                residual, has_residual = emit.optional(residual, t_lanes, source)
            for i in range(count):
                for j, value in enumerate(_apply(emit, matrix, [column[i] for column in halfway])):
                    offset = builder.add(emit.times(i, t_row), emit.times(j, t_col))
                    if final:
                        lanes, where = builder.and_(has_residual, wanted[i][j]), builder.select(given, offset, none)
                        more = emit.masked_load(emit.at(residual, where), emit.mask(lanes))
                        value = emit.add(emit.add(value, add), more)
                        emit.masked_store(value, emit.at(emit.pointer(target), offset), emit.mask(wanted[i][j]))
                    else:
                        emit.store(value, emit.at(emit.pointer(target), offset))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 14), codegen

    return run


_A, _G, _B = cook_toom(4, 3, [0, 1, -1, 2, -2])
_A_GRAD, _G_GRAD, _ = cook_toom(3, 4, [0, 1, -1, 2, -2])
_image_4, _image_edge_4 = transform(_B), transform(_B, edges=True)
_weights_4 = transform(_G)
_pixels_4 = transform(_A, final=True)
_gradient_4 = transform(_G_GRAD, edges=True)
_weights_grad_4 = transform(_A_GRAD, final=True)
_A, _G, _B = cook_toom(2, 3, [0, 1, -1])
_A_GRAD, _G_GRAD, _ = cook_toom(3, 2, [0, 1, -1])
_image_2, _image_edge_2 = transform(_B), transform(_B, edges=True)
_weights_2 = transform(_G)
_pixels_2 = transform(_A, final=True)
_gradient_2 = transform(_G_GRAD, edges=True)
_weights_grad_2 = transform(_A_GRAD, final=True)
_tile = gemm_tile(ROWS, VECTORS)


@njit
def _bits(first, extent, size):  # type: ignore[no-untyped-def]
    """Bit i is set where 0 ≤ first + i < size, i < extent."""
    low, high = min(max(0, -first), extent), max(0, min(extent, size - first))
    return ((1 << high) - 1) & ~((1 << low) - 1)


@njit
def _lanes(first, size):  # type: ignore[no-untyped-def]
    return (1 << min(LANES, size - first)) - 1


@body
def transform_weights(args, thread):  # type: ignore[no-untyped-def]
    """U (points², panels, C, WIDTH) from w with any strides; `packed` holds the weights as panels on the way."""
    w, s_kh, s_kw, s_c, s_o, c, o, packed, u, tile, threads = unpack(args, 11)
    points = tile + 2
    panels = (o + WIDTH - 1) // WIDTH
    plane = panels * c * WIDTH
    for j in range(thread * panels // threads, (thread + 1) * panels // threads):
        panel = packed + 4 * j * 9 * c * WIDTH
        for tap in range(9):
            source = w + 4 * (tap // 3 * s_kh + tap % 3 * s_kw + j * WIDTH * s_o)
            pack_tap(source, s_c, s_o, c, min(WIDTH, o - j * WIDTH), panel + 4 * tap * c * WIDTH)
        for i in range(c):
            for v in range(0, WIDTH, LANES):
                source, target = panel + 4 * (i * WIDTH + v), u + 4 * ((j * c + i) * WIDTH + v)
                arguments = (source, 3 * c * WIDTH, c * WIDTH, 0, 0, 0, target, points * plane, plane, 0, 0, 0, 0, 0)
                if tile == 4:
                    _weights_4(*arguments)
                else:
                    _weights_2(*arguments)


@njit
def _transform_images(x, height, width, c, top, left, th, tw, first, last, v, plane, stride, tile):  # type: ignore[no-untyped-def]
    """V (points², tiles, stride) for tiles first to last."""
    points = tile + 2
    for t in range(first, last):
        image, ty, tx = t // (th * tw), t // tw % th, t % tw
        y, x0 = ty * tile - top, tx * tile - left
        source = x + 4 * ((image * height + y) * width + x0) * c
        target = v + 4 * (t - first) * stride
        if y >= 0 and y + points <= height and x0 >= 0 and x0 + points <= width:
            whole, rows, cols = c // LANES * LANES, (1 << points) - 1, (1 << points) - 1
        else:
            whole, rows, cols = 0, _bits(y, points, height), _bits(x0, points, width)
        for k in range(0, whole, LANES):
            arguments = (source + 4 * k, width * c, c, 0, 0, 0, target + 4 * k, points * plane, plane, 0, 0, 0, 0, 0)
            if tile == 4:
                _image_4(*arguments)
            else:
                _image_2(*arguments)
        for k in range(whole, c, LANES):
            lanes, edge = _lanes(k, c), target + 4 * k
            arguments = (source + 4 * k, width * c, c, rows, cols, lanes, edge, points * plane, plane, 0, 0, 0, 0, 0)
            if tile == 4:
                _image_edge_4(*arguments)
            else:
                _image_edge_2(*arguments)


@body
def forward(args, thread):  # type: ignore[no-untyped-def]
    """y = conv(x, w) + bias + residual from transformed weights, `block` tiles (a multiple of ROWS) at a time."""
    (
        x, bias, bias_step, residual, y, u, vs, ms,
        n, height, width, c, top, left, ho, wo, o,
        block, tile, threads,
    ) = unpack(args, 20)  # fmt: skip
    points = tile + 2
    th, tw = (ho + tile - 1) // tile, (wo + tile - 1) // tile
    panels = (o + WIDTH - 1) // WIDTH
    v_stride, m_stride = (c + LANES - 1) // LANES * LANES, panels * WIDTH
    v_plane, m_plane, u_plane = block * v_stride + LANES, block * m_stride + LANES, panels * c * WIDTH
    v, m = vs + 4 * thread * points * points * v_plane, ms + 4 * thread * points * points * m_plane
    tiles = n * th * tw
    end = (thread + 1) * tiles // threads
    for first in range(thread * tiles // threads, end, block):
        last = min(first + block, end)
        count = (last - first + ROWS - 1) // ROWS * ROWS
        _transform_images(x, height, width, c, top, left, th, tw, first, last, v, v_plane, v_stride, tile)
        for p in range(points * points):
            zero(v + 4 * (p * v_plane + (last - first) * v_stride), (count - (last - first)) * v_stride)
            for j in range(panels):
                b = u + 4 * (p * u_plane + j * c * WIDTH)
                for t in range(0, count, ROWS):
                    a, product = v + 4 * (p * v_plane + t * v_stride), m + 4 * (p * m_plane + t * m_stride + j * WIDTH)
                    _tile(a, v_stride, 0, 0, b, WIDTH, 1, c, 0, 0, 0, product, m_stride, WIDTH)
        for t in range(first, last):
            image, ty, tx = t // (th * tw), t // tw % th, t % tw
            rows, cols = _bits(ty * tile, tile, ho), _bits(tx * tile, tile, wo)
            at = ((image * ho + ty * tile) * wo + tx * tile) * o
            for k in range(0, o, LANES):
                source = m + 4 * ((t - first) * m_stride + k)
                add = bias + 4 * (image * bias_step + k) if bias != 0 else 0
                more = residual + 4 * (at + k) if residual != 0 else 0
                target, lanes = y + 4 * (at + k), _lanes(k, o)
                arguments = (source, points * m_plane, m_plane, 0, 0, 0, target, wo * o, o, rows, cols, lanes, add, more)
                if tile == 4:
                    _pixels_4(*arguments)
                else:
                    _pixels_2(*arguments)


@body
def weight_grad(args, thread):  # type: ignore[no-untyped-def]
    """This thread's Σ over its tiles of V ⊗ transformed g, in sums (threads, points², panels, C to a multiple of REST, WIDTH)."""
    (
        x, g, sums, vs, ds,
        n, height, width, c, top, left, ho, wo, o,
        block, tile, threads,
    ) = unpack(args, 17)  # fmt: skip
    points = tile + 2
    th, tw = (ho + tile - 1) // tile, (wo + tile - 1) // tile
    panels = (o + WIDTH - 1) // WIDTH
    v_stride, d_stride = (c + LANES - 1) // LANES * LANES, panels * WIDTH
    rows_c = (c + REST - 1) // REST * REST
    v_plane, d_plane = block * v_stride + LANES, block * d_stride + LANES
    v, d = vs + 4 * thread * points * points * v_plane, ds + 4 * thread * points * points * d_plane
    mine = sums + 4 * thread * points * points * panels * rows_c * WIDTH
    tiles = n * th * tw
    begin, end = thread * tiles // threads, (thread + 1) * tiles // threads
    zero(v, points * points * v_plane)
    zero(d, points * points * d_plane)
    for first in range(begin, end, block):
        last = min(first + block, end)
        _transform_images(x, height, width, c, top, left, th, tw, first, last, v, v_plane, v_stride, tile)
        for t in range(first, last):
            image, ty, tx = t // (th * tw), t // tw % th, t % tw
            rows, cols = _bits(ty * tile, tile, ho), _bits(tx * tile, tile, wo)
            at = g + 4 * ((image * ho + ty * tile) * wo + tx * tile) * o
            for k in range(0, o, LANES):
                target = d + 4 * ((t - first) * d_stride + k)
                lanes = _lanes(k, o)
                arguments = (at + 4 * k, wo * o, o, rows, cols, lanes, target, points * d_plane, d_plane, 0, 0, 0, 0, 0)
                if tile == 4:
                    _gradient_4(*arguments)
                else:
                    _gradient_2(*arguments)
        for p in range(points * points):
            for j in range(panels):
                b = d + 4 * (p * d_plane + j * WIDTH)
                i = 0
                while i < c:
                    at = mine + 4 * (((p * panels + j) * rows_c + i) * WIDTH)
                    start = at if first > begin else 0
                    a = v + 4 * (p * v_plane + i)
                    i += tile_columns(a, v_stride, 0, b, d_stride, 1, last - first, at, start, rows_c - i)


@body
def transform_sums(args, thread):  # type: ignore[no-untyped-def]
    """dw (3, 3, C, O) from the sums of all threads, added in order."""
    sums, dw, c, o, parts, tile, threads = unpack(args, 7)
    points = tile + 2
    panels = (o + WIDTH - 1) // WIDTH
    rows_c = (c + REST - 1) // REST * REST
    plane = panels * rows_c * WIDTH
    for i in range(thread * c // threads, (thread + 1) * c // threads):
        for j in range(panels):
            row = sums + 4 * (j * rows_c + i) * WIDTH
            for p in range(points * points):
                for part in range(1, parts):
                    for k in range(WIDTH):
                        write(row, p * plane + k, read(row, p * plane + k) + read(row, (part * points * points + p) * plane + k))
            for k in range(j * WIDTH, min(o, (j + 1) * WIDTH), LANES):
                source, target = row + 4 * (k - j * WIDTH), dw + 4 * (i * o + k)
                arguments = (source, points * plane, plane, 0, 0, 0, target, 3 * c * o, c * o, 7, 7, _lanes(k, o), 0, 0)
                if tile == 4:
                    _weights_grad_4(*arguments)
                else:
                    _weights_grad_2(*arguments)
