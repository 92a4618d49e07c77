"""3×3 convolution by Winograd's minimal filtering: F(4×4, 3×3), with a quarter of the multiplications at some error,
F(2×2, 3×3), with four ninths of them at hardly any, and at a stride of 2 with nine sixteenths of them.

The transforms B, G and A turn a tile's convolution into points² products, so over all tiles, channels and filters it is that
many matrix products (Lavin & Gray 2016): `winograd_tiles.py` says which, `winograd_transform.py` makes the transforms. A thread
transforms a block of tiles into V (points², tiles, C), multiplies with the transformed weights U into M (sums², tiles, O), and
transforms M into pixels, bias and residual added; V and M stay in its L2 cache, and rows are brought there as a stream before
they are taken tile by tile. The weight gradient is the transpose of that: V times the transformed tiles of the output's gradient,
summed over the tiles. Bound by FMA for many channels, by the transforms for few.

Where a side is no multiple of the tile, the last tile of a row or column is narrower, and a thread takes its tiles in the order
right edge, whole, bottom edge, corner. Then those that need a certain point follow one another, and it is multiplied for these
alone.
"""

from __future__ import annotations

from tinydiff.kernels import winograd_tiles as tiles
from tinydiff.kernels import winograd_transform as transform
from tinydiff.kernels.direct import pack_tap, tile_columns, tile_rows
from tinydiff.kernels.jit import njit
from tinydiff.kernels.launch import body, unpack
from tinydiff.kernels.memory import LINE, read, write, zero
from tinydiff.kernels.microkernel import LANES, REST, WIDTH


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
    tile = tiles.TILE[kind]
    tall, wide = (
        i >= tiles.count_points(kind, ho % tile),
        j >= tiles.count_points(kind, wo % tile),
    )  # whether a narrower tile does without it
    return end_right if wide else 0, end_whole if tall else end_bottom if wide else end


@body
def transform_weights(args, thread):  # type: ignore[no-untyped-def]
    """U (weights², panels, C, WIDTH, and a gap) from w with any strides; `packed` holds the weights as panels on the way."""
    w, s_kh, s_kw, s_c, s_o, c, o, packed, u, kind, threads = unpack(args, 11)
    n_weights, whole = tiles.count_weights(kind), 16 * kind + tiles.TILE[kind]
    panels = (o + WIDTH - 1) // WIDTH
    plane = panels * c * WIDTH + LANES
    for j in range(thread * panels // threads, (thread + 1) * panels // threads):
        panel = packed + 4 * j * 9 * c * WIDTH
        for tap in range(9):
            source = w + 4 * (tap // 3 * s_kh + tap % 3 * s_kw + j * WIDTH * s_o)
            pack_tap(source, s_c, s_o, c, min(WIDTH, o - j * WIDTH), panel + 4 * tap * c * WIDTH)
        for i in range(0, c * WIDTH, LANES):
            target = u + 4 * (j * c * WIDTH + i)
            transform.weights_to_u(
                whole, whole, panel + 4 * i, 3 * c * WIDTH, c * WIDTH, 0, 0, 0, target, n_weights * plane, plane, 0, 0, 0
            )


@njit
def _stream(pixels, height, width, c, channels, image, begin, end, seen, sink):  # type: ignore[no-untyped-def]
    """Read a number of every cache line of an image's rows, from `begin` or behind those `seen`, to `end`: what is seen then.

    The processor fetches ahead what is read in order. In the order of tiles, or asked for by prefetch instructions, lines
    came from memory at an eighth of its speed. The sum goes to `sink`, or nothing would be read.
    """
    begin, end = max(image * height + begin, seen), image * height + min(end, height)
    total = read(sink, 0)
    if channels == c:
        for i in range(begin * width * c, end * width * c, LINE):
            total += read(pixels, i)
    else:
        for pixel in range(begin * width, end * width):
            for k in range(0, channels, LINE):
                total += read(pixels, pixel * c + k)
    write(sink, 0, total)
    return max(seen, end)


@njit
def _transform_images(x, height, width, c, top, left, ho, wo, order, first, last, v, plane, stride, channels, kind):  # type: ignore[no-untyped-def]
    """V (points², tiles, stride) for tiles first to last, of so many of x's channels."""
    tile = tiles.TILE[kind]
    n_points, seen = tiles.count_points(kind, tile), 0
    sink = v + 4 * (n_points * n_points * plane - 1)  # in the last plane's gap
    for t in range(first, last):
        image, y, x0, my, mx = _find(t, order, ho, wo, tile)
        y, x0, down, across = tiles.first_input(kind, y) - top, tiles.first_input(kind, x0) - left, 16 * kind + my, 16 * kind + mx
        under_y, under_x = tiles.count_inputs(kind, my), tiles.count_inputs(kind, mx)
        if mx == tile:
            seen = _stream(x, height, width, c, channels, image, max(0, y), y + under_y, seen, sink)
        source = x + 4 * ((image * height + y) * width + x0) * c
        target = v + 4 * (t - first) * stride
        rows, cols = _bits(y, under_y, height), _bits(x0, under_x, width)
        inside = my == mx == tile and rows == (1 << under_y) - 1 and cols == (1 << under_x) - 1
        whole = channels // LANES * LANES if inside else 0
        for k in range(0, whole, LANES):
            to = target + 4 * k
            transform.image_to_v(down, across, source + 4 * k, width * c, c, 0, 0, 0, to, n_points * plane, plane, 0, 0, 0)
        for k in range(whole, channels, LANES):
            to, lanes = target + 4 * k, _lanes(k, channels)
            transform.image_edge_to_v(
                down, across, source + 4 * k, width * c, c, rows, cols, lanes, to, n_points * plane, plane, 0, 0, 0
            )


@body
def forward(args, thread):  # type: ignore[no-untyped-def]
    """y = conv(x, w) + bias + residual from transformed weights, `block` tiles at a time."""
    (
        x, bias, bias_step, residual, y, u, vs, ms,
        n, height, width, c, top, left, ho, wo, o,
        block, kind, threads,
    ) = unpack(args, 20)  # fmt: skip
    tile = tiles.TILE[kind]
    n_points, n_sums, n_weights = tiles.count_points(kind, tile), tiles.count_sums(kind, tile), tiles.count_weights(kind)
    panels = (o + WIDTH - 1) // WIDTH
    v_stride, m_stride = (c + LANES - 1) // LANES * LANES, panels * WIDTH
    v_plane, m_plane, u_plane = block * v_stride + LANES, block * m_stride + LANES, panels * c * WIDTH + LANES
    v, m = vs + 4 * thread * n_points * n_points * v_plane, ms + 4 * thread * n_sums * n_sums * m_plane
    order, sink = _order(n, ho, wo, tile, thread, threads), v + 4 * (n_points * n_points * v_plane - 1)
    for first in range(0, order[7], block):
        last = min(first + block, order[7])
        _transform_images(x, height, width, c, top, left, ho, wo, order, first, last, v, v_plane, v_stride, c, kind)
        for p in range(n_points * n_points):
            y_point, x_point = p // n_points, p % n_points
            begin, end = _needing(y_point, x_point, order, ho, wo, kind)
            begin, end = max(begin, first) - first, min(end, last) - first
            weight = tiles.weight_of(kind, y_point) * n_weights + tiles.weight_of(kind, x_point)
            to, adds = (
                tiles.sum_of(kind, y_point) * n_sums + tiles.sum_of(kind, x_point),
                tiles.is_added(kind, y_point) or tiles.is_added(kind, x_point),
            )
            for j in range(panels):
                b, t = u + 4 * (weight * u_plane + j * c * WIDTH), begin
                while t < end:
                    a, product = v + 4 * (p * v_plane + t * v_stride), m + 4 * (to * m_plane + t * m_stride + j * WIDTH)
                    start = product if adds else 0
                    t += tile_rows(a, v_stride, 0, b, WIDTH, 1, c, 0, start, m_stride, product, m_stride, WIDTH, end - t)
        seen = 0
        for t in range(first, last):
            image, y0, x0, my, mx = _find(t, order, ho, wo, tile)
            if residual != 0 and mx == tile:
                seen = _stream(residual, ho, wo, o, o, image, y0, y0 + my, seen, sink)
            at = ((image * ho + y0) * wo + x0) * o
            for k in range(0, o, LANES):
                source = m + 4 * ((t - first) * m_stride + k)
                add = bias + 4 * (image * bias_step + k) if bias != 0 else 0
                more = residual + 4 * (at + k) if residual != 0 else 0
                down, across, target, lanes = 16 * kind + my, 16 * kind + mx, y + 4 * (at + k), _lanes(k, o)
                transform.m_to_pixels(
                    down, across, source, n_sums * m_plane, m_plane, 0, 0, 0, target, wo * o, o, lanes, add, more
                )


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
    tile = tiles.TILE[kind]
    n_points, n_sums, n_weights = tiles.count_points(kind, tile), tiles.count_sums(kind, tile), tiles.count_weights(kind)
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
    order, sink = _order(n, ho, wo, tile, part, parts), v + 4 * (n_points * n_points * v_plane - 1)
    if d_stride >= o + LANES:  # a vector that no transform fills
        zero(d, n_sums * n_sums * d_plane)
    for p in range(n_points * n_points):
        begin, end = _needing(p // n_points, p % n_points, order, ho, wo, kind)
        if begin >= end:
            weight = tiles.weight_of(kind, p // n_points) * n_weights + tiles.weight_of(kind, p % n_points)
            for j in range(panels):
                zero(mine + 4 * (weight * plane + j * rows_c * WIDTH), padded * WIDTH)
    for first in range(0, order[7], block):
        last = min(first + block, order[7])
        from_c = x + 4 * first_c
        _transform_images(from_c, height, width, c, top, left, ho, wo, order, first, last, v, v_plane, v_stride, channels, kind)
        seen = 0
        for t in range(first, last):
            image, y0, x0, my, mx = _find(t, order, ho, wo, tile)
            if mx == tile:
                seen = _stream(g, ho, wo, o, o, image, y0, y0 + my, seen, sink)
            at = g + 4 * ((image * ho + y0) * wo + x0) * o
            for k in range(0, o, LANES):
                target, lanes = d + 4 * ((t - first) * d_stride + k), _lanes(k, o)
                down, across, rows, cols = 16 * kind + my, 16 * kind + mx, (1 << my) - 1, (1 << mx) - 1
                transform.gradient_to_d(
                    down, across, at + 4 * k, wo * o, o, rows, cols, lanes, target, n_sums * d_plane, d_plane, 0, 0, 0
                )
            if totals != 0 and cut == 0:
                total = totals + 4 * (part * n + image) * o
                (first_i, end_i), (first_j, end_j) = tiles.ones(kind, my), tiles.ones(kind, mx)
                for i in range(first_i, end_i):
                    for j in range(first_j, end_j):
                        at = d + 4 * ((i * n_sums + j) * d_plane + (t - first) * d_stride)
                        for k in range(o):
                            write(total, k, read(total, k) + read(at, k))
        for p in range(n_points * n_points):
            y_point, x_point = p // n_points, p % n_points
            begin, end = _needing(y_point, x_point, order, ho, wo, kind)
            low, high = max(begin, first), min(end, last)
            if low >= high:
                continue
            weight = tiles.weight_of(kind, y_point) * n_weights + tiles.weight_of(kind, x_point)
            of, shares = (
                tiles.sum_of(kind, y_point) * n_sums + tiles.sum_of(kind, x_point),
                tiles.is_shared(kind, y_point) or tiles.is_shared(kind, x_point),
            )
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
    n_weights, whole = tiles.count_weights(kind), 16 * kind + tiles.TILE[kind]
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
                transform.sums_to_weights(
                    whole, whole, source, n_weights * plane, plane, 0, 0, 0, target, 3 * c * o, c * o, lanes, 0, 0
                )
