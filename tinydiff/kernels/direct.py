"""Convolution as one product per row of pixels, with no im2col buffer: any size, stride and padding, all three directions.

In channels-last memory the taps of one kernel row and their channels lie contiguous under a window, so the product's inner
dimension runs over KW·C numbers with a row stride of stride·C, once per kernel row. A thread takes a band of output rows, copies
the input under it into a zero-padded slab that stays in its L2 cache, and multiplies it with packed weights (`forward`),
or with the output's gradient, summed over all its bands (`weight_grad`; with few channels, all taps are one axis there). With few
filters the product comes first and the taps are shifted into place after (`shift_add`). Bound by FMA, or by memory when channels
or filters are few.
"""

from __future__ import annotations

import numpy as np

from tinydiff.kernels.jit import njit
from tinydiff.kernels.launch import body, unpack
from tinydiff.kernels.memory import copy, read, will_write, write, zero
from tinydiff.kernels.microkernel import COLUMNS, LANES, LINE, REST, ROWS, VECTORS, WIDTH, accumulate, gemm_tile, transpose

_tile_full = gemm_tile(ROWS, VECTORS)
_tile_8 = gemm_tile(8, VECTORS)
_tile_7 = gemm_tile(7, VECTORS)
_tile_4 = gemm_tile(4, VECTORS)
_tile_2 = gemm_tile(2, VECTORS)
_tile_1 = gemm_tile(1, VECTORS)
_tile_columns = gemm_tile(COLUMNS, VECTORS, transposed=True)
_tile_rest = gemm_tile(REST, VECTORS, transposed=True)
_tile_single = gemm_tile(ROWS, 1)
CHUNK = 8 * ROWS  # pixels that are multiplied and transposed at a time; a multiple of LANES
TAPS = 9 if COLUMNS >= 8 else COLUMNS  # rows of the tile below: a 3×3 kernel's taps
_tile_taps = gemm_tile(TAPS, VECTORS, transposed=True, scattered=True)
SLACK = 16  # floats that whole vectors and tiles may touch past the end of a slab


@njit
def pack_tap(w, s_c, s_o, c, columns, panel):  # type: ignore[no-untyped-def]
    """One tap's (C, columns) weights, of any strides, as rows of WIDTH, zero-padded."""
    if s_o == 1:
        for i in range(c):
            copy(panel + 4 * i * WIDTH, w + 4 * i * s_c, columns)
    else:
        for first in range(0, c, LANES):
            whole = columns // LANES * LANES if s_c == 1 and first + LANES <= c else 0
            for k in range(0, whole, LANES):
                transpose(w + 4 * (first + k * s_o), s_o, panel + 4 * (first * WIDTH + k), WIDTH)
            for k in range(whole, columns):
                for i in range(first, min(c, first + LANES)):
                    write(panel, i * WIDTH + k, read(w, i * s_c + k * s_o))
    if columns < WIDTH:
        for i in range(c):
            zero(panel + 4 * (i * WIDTH + columns), WIDTH - columns)


@njit
def pack_share(w, s_kh, s_kw, s_c, s_o, kh, kw, c, o, packed, thread, threads):  # type: ignore[no-untyped-def]
    """The thread's share of the weights, of any strides, into panels (ceil(O / WIDTH), KH, KW, C, WIDTH), zero-padded."""
    items = (o + WIDTH - 1) // WIDTH * kh * kw
    for item in range(thread * items // threads, (thread + 1) * items // threads):
        j, y, x = item // (kh * kw), item // kw % kh, item % kw
        source = w + 4 * (y * s_kh + x * s_kw + j * WIDTH * s_o)
        pack_tap(source, s_c, s_o, c, min(WIDTH, o - j * WIDTH), packed + 4 * item * c * WIDTH)


@body
def pack(args, thread):  # type: ignore[no-untyped-def]
    """`pack_share` as a launch of its own."""
    w, s_kh, s_kw, s_c, s_o, kh, kw, c, o, packed, threads = unpack(args, 11)
    pack_share(w, s_kh, s_kw, s_c, s_o, kh, kw, c, o, packed, thread, threads)


@body
def pack_taps(args, thread):  # type: ignore[no-untyped-def]
    """Weights with any strides into panels (ceil(KH·KW·O / WIDTH), C, WIDTH), zero-padded: all taps side by side."""
    w, s_kh, s_kw, s_c, s_o, kh, kw, c, o, packed = unpack(args, 10)
    columns = kh * kw * o
    for k in range((columns + WIDTH - 1) // WIDTH * WIDTH):
        tap, at = k // o, k // WIDTH * c * WIDTH + k % WIDTH
        source = tap // kw * s_kh + tap % kw * s_kw + k % o * s_o
        for i in range(c):
            write(packed, at + i * WIDTH, read(w, source + i * s_c) if k < columns else np.float32(0))


@njit
def fill_slab(image, height, width, c, first_y, first_x, rows, columns, slab):  # type: ignore[no-untyped-def]
    """Copies the (rows, columns, C) window of an image that begins at (first_y, first_x); outside the image it is 0."""
    left = min(max(0, -first_x), columns)
    inside = max(0, min(width, first_x + columns) - (first_x + left))
    for i in range(rows):
        y = first_y + i
        row = slab + 4 * i * columns * c
        if y < 0 or y >= height or inside == 0:
            zero(row, columns * c)
        else:
            zero(row, left * c)
            copy(row + 4 * left * c, image + 4 * ((y * width + first_x + left) * c), inside * c)
            zero(row + 4 * (left + inside) * c, (columns - left - inside) * c)


@njit
def tile_rows(a, lda, step, b, ldb, segments, length, bias, initial, ld_initial, c, ldc, columns, left):  # type: ignore[no-untyped-def]
    """Multiplies the largest tile of the `left` rows, and says how many rows that was."""
    args = (a, lda, step, 0, b, ldb, segments, length, bias, initial, ld_initial, c, ldc, columns)
    if left >= ROWS and left != 16:
        _tile_full(*args)
        return ROWS
    if left >= 8:
        _tile_8(*args)
        return 8
    if left == 7:
        _tile_7(*args)
        return 7
    if left >= 4:
        _tile_4(*args)
        return 4
    if left >= 2:
        _tile_2(*args)
        return 2
    _tile_1(*args)
    return 1


@njit
def tile_columns(a, lda, step, b, ldb, segments, length, at, initial, left):  # type: ignore[no-untyped-def]
    """Multiplies the larger transposed tile that fits the `left` rows into the sums `at`, and says how many rows that was."""
    if left >= COLUMNS:
        _tile_columns(a, lda, step, 0, b, ldb, segments, length, 0, initial, WIDTH, at, WIDTH, WIDTH)
        return COLUMNS
    _tile_rest(a, lda, step, 0, b, ldb, segments, length, 0, initial, WIDTH, at, WIDTH, WIDTH)
    return REST


@body
def forward(args, thread):  # type: ignore[no-untyped-def]
    """y = conv(x, w) + bias + residual by bands of `band` rows, from panels of weights `panel` floats apart, rows `ldb` apart.

    If `w` is not 0, the only thread first packs the panels from there: to launch that on its own takes longer for small ones.
    """
    (
        x, bias, bias_step, residual, y, w, s_kh, s_kw, s_c, s_o, packed, panel, ldb, slabs,
        n, height, width, c, kh, kw, sh, sw, top, left, ho, wo, o,
        y_base, y_image, y_row, y_pixel,  # where in y (and residual) a pixel lies
        band, threads,
    ) = unpack(args, 33)  # fmt: skip
    if w != 0:
        pack_share(w, s_kh, s_kw, s_c, s_o, kh, kw, c, o, packed, 0, 1)
    taps = kh * kw * c
    panels = (o + WIDTH - 1) // WIDTH
    bands = (ho + band - 1) // band
    columns = (wo - 1) * sw + kw
    plain = top == 0 and left == 0 and (ho - 1) * sh + kh <= height and columns <= width
    flat = plain and taps == c and sh == 1 and sw == 1 and width == wo and y_row == wo * y_pixel  # rows follow one another
    items = n * bands
    slab = slabs + 4 * thread * (((band - 1) * sh + kh) * columns * c + SLACK)
    for item in range(thread * items // threads, (thread + 1) * items // threads):
        image, first = item // bands, item % bands * band
        rows = min(band, ho - first)
        source = x + 4 * image * height * width * c
        if plain:
            a, step = source + 4 * first * sh * width * c, width * c
        else:
            fill_slab(source, height, width, c, first * sh - top, -left, (rows - 1) * sh + kh, columns, slab)
            a, step = slab, columns * c
        lda = sw * c
        for j in range(panels):
            b = packed + 4 * j * panel
            add = bias + 4 * (image * bias_step + j * WIDTH) if bias != 0 else 0
            wanted = min(WIDTH, o - j * WIDTH)
            for row in range(1 if flat else rows):
                at = 4 * (y_base + image * y_image + (first + row) * y_row + j * WIDTH)
                a_now = a + 4 * row * sh * step
                done = 0
                run = rows * wo if flat else wo
                while done < run:
                    for pixel in range(ROWS, 2 * ROWS):  # the next tile's: a large result waits for memory more than for FMA
                        for k in range(0, WIDTH, LINE // 4):
                            will_write(y + at, pixel * y_pixel + k)
                    start = residual + at if residual != 0 else 0
                    count = tile_rows(
                        a_now, lda, step, b, ldb, kh, kw * c, add, start, y_pixel, y + at, y_pixel, wanted, run - done
                    )
                    done += count
                    a_now += 4 * count * lda
                    at += 4 * count * y_pixel


@body
def shift_add(args, thread):  # type: ignore[no-untyped-def]
    """y = conv(x, w) + bias + residual at stride 1, few filters: x times all taps' weights, each tap's result shifted into place.

    Packed weights are (C, KH·KW·O): the taps fill the vectors that O alone would leave empty. The products are transposed to
    planes (KH·KW·O, pixels), for along a row of pixels all of a vector shifts alike.
    """
    (
        x, bias, bias_step, residual, y, packed, buffers, buffer,
        n, height, width, c, kh, kw, top, left, ho, wo, o,
        band, threads,
    ) = unpack(args, 21)  # fmt: skip
    taps = kh * kw * o
    stride, panels = (taps + LANES - 1) // LANES * LANES, (taps + WIDTH - 1) // WIDTH
    plane, line = (band + kh - 1) * width + 2 * CHUNK, (wo + LANES - 1) // LANES * LANES
    bands = (ho + band - 1) // band
    items = n * bands
    products = buffers + 4 * thread * buffer
    planes = products + 4 * (CHUNK * stride + WIDTH)
    sums = planes + 4 * stride * plane
    for item in range(thread * items // threads, (thread + 1) * items // threads):
        image, first = item // bands, item % bands * band
        last = min(first + band, ho)
        begin, end = max(0, first - top), min(height, last - 1 - top + kh)  # rows of x under the band
        source = x + 4 * (image * height + begin) * width * c
        run = max(0, end - begin) * width
        for chunk in range(0, run, CHUNK):
            for j in range(panels):
                b, done, left_over = packed + 4 * j * c * WIDTH, chunk, min(run, chunk + CHUNK)
                single = stride - j * WIDTH == LANES
                while done < left_over:
                    a, product = source + 4 * done * c, products + 4 * ((done - chunk) * stride + j * WIDTH)
                    if single and done + ROWS <= left_over:
                        _tile_single(a, c, 0, 0, b, WIDTH, 1, c, 0, 0, 0, product, stride, LANES)
                        done += ROWS
                    else:
                        wanted = min(WIDTH, stride - j * WIDTH)
                        done += tile_rows(a, c, 0, b, WIDTH, 1, c, 0, 0, stride, product, stride, wanted, left_over - done)
            for pixel in range(0, min(CHUNK, run - chunk), LANES):
                for k in range(0, stride, LANES):
                    transpose(products + 4 * (pixel * stride + k), stride, planes + 4 * (k * plane + chunk + pixel), plane)
        for row in range(first, last):
            zero(sums, o * line)
            for i in range(max(0, begin + top - row), min(kh, end + top - row)):
                for j in range(kw):
                    start, stop = max(0, left - j), min(wo, width + left - j)
                    base = planes + 4 * ((i * kw + j) * o * plane + (row - top + i - begin) * width + j - left)
                    for k in range(o):
                        for column in range(start, stop, LANES):
                            to, add = sums + 4 * (k * line + column), base + 4 * (k * plane + column)
                            accumulate(to, add, min(LANES, stop - column))
            at = (image * ho + row) * wo * o
            for k in range(o):
                add = read(bias, image * bias_step + k) if bias != 0 else np.float32(0)
                for column in range(wo):
                    value = read(sums, k * line + column) + add
                    to = at + column * o + k
                    write(y, to, value + read(residual, to) if residual != 0 else value)


@njit(["void(int64, int64, int64, int64, int64, int64, int64)"])
def reduce_sums(sums, threads, segments, length, padded, o, dw):  # type: ignore[no-untyped-def]
    """dw (segments, length, O) = the threads' sums (threads, segments, panels, padded, WIDTH), added in order."""
    panels = (o + WIDTH - 1) // WIDTH
    size = segments * panels * padded * WIDTH
    for i in range(segments):
        for m in range(length):
            for j in range(panels):
                at = ((i * panels + j) * padded + m) * WIDTH
                for k in range(min(WIDTH, o - j * WIDTH)):
                    total = read(sums, at + k)
                    for thread in range(1, threads):
                        total += read(sums, thread * size + at + k)
                    write(dw, (i * length + m) * o + j * WIDTH + k, total)


@body
def weight_grad(args, thread):  # type: ignore[no-untyped-def]
    """This thread's Σ over images and pixels of the window under it × g, in sums (threads, KH, panels, KW·C, WIDTH).

    With `offsets` (not 0), of all the window's numbers in the slab, KH and KW·C are one axis, a multiple of TAPS.
    A thread that is the only one makes dw of them too.
    """
    (
        x, g, dw, sums, slabs, offsets, g_packs,
        n, height, width, c, kh, kw, sh, sw, top, left, ho, wo, o,
        band, threads,
    ) = unpack(args, 22)  # fmt: skip
    panels = (o + WIDTH - 1) // WIDTH
    segments_m, length_m, unit = (kh, kw * c, REST) if offsets == 0 else (1, kh * kw * c, TAPS)
    padded_m = (length_m + unit - 1) // unit * unit
    size = segments_m * padded_m * panels * WIDTH
    bands = (ho + band - 1) // band
    columns = (wo - 1) * sw + kw
    items = n * bands
    aligned = o % WIDTH == 0
    flat = kh == 1 and kw == 1 and c % REST == 0 and sh == 1 and sw == 1 and top == 0 and left == 0 and width == wo
    slab = slabs + 4 * thread * (((band - 1) * sh + kh) * columns * c + SLACK)
    g_packed = g_packs + 4 * thread * band * wo * panels * WIDTH
    mine = sums + 4 * thread * size
    zero(mine, size)
    if not aligned:
        zero(g_packed, band * wo * panels * WIDTH)
    zero(slab + 4 * ((band - 1) * sh + kh) * columns * c, SLACK)
    for item in range(thread * items // threads, (thread + 1) * items // threads):
        image, first = item // bands, item % bands * band
        rows = min(band, ho - first)
        source = x + 4 * image * height * width * c
        a, lda, a_step, a_row, segments, length = slab, sw * c, sh * columns * c, columns * c, rows, wo
        if flat:
            a, segments, length = source + 4 * first * width * c, 1, rows * wo
        else:
            fill_slab(source, height, width, c, first * sh - top, -left, (rows - 1) * sh + kh, columns, slab)
        b, ldb = g + 4 * (image * ho + first) * wo * o, o
        if not aligned:
            for pixel in range(rows * wo):
                copy(g_packed + 4 * pixel * panels * WIDTH, b + 4 * pixel * o, o)
            b, ldb = g_packed, panels * WIDTH
        for i in range(segments_m):
            for j in range(panels):
                m, b_now = 0, b + 4 * j * WIDTH
                while m < padded_m:
                    at = mine + 4 * (((i * panels + j) * padded_m + m) * WIDTH)
                    if offsets == 0:
                        a_now = a + 4 * (i * a_row + m)
                        m += tile_columns(a_now, lda, a_step, b_now, ldb, segments, length, at, at, padded_m - m)
                    else:
                        where = offsets + 4 * m
                        _tile_taps(a, lda, a_step, where, b_now, ldb, segments, length, 0, at, WIDTH, at, WIDTH, WIDTH)
                        m += TAPS
    if threads == 1:
        reduce_sums(sums, 1, segments_m, length_m, padded_m, o, dw)
