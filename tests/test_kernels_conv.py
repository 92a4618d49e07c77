"""The convolution and product kernels against plain float64 loops, and against each other by the adjoint identity."""

import json
import os
import subprocess
import sys

import numba
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llvmlite import binding

from tinydiff.kernels import conv, gemm, memory, microkernel
from tinydiff.kernels import winograd_tiles as tiles
from tinydiff.kernels.microkernel import LANES

FLOAT32 = np.finfo(np.float32).eps


def naive_conv2d(x, w, stride, padding):
    (n, height, width, _), (kh, kw, _, o) = x.shape, w.shape
    (top, bottom), (left, right) = padding
    padded = np.zeros((n, height + top + bottom, width + left + right, x.shape[3]))
    padded[:, top : top + height, left : left + width] = x
    ho, wo = (padded.shape[1] - kh) // stride[0] + 1, (padded.shape[2] - kw) // stride[1] + 1
    y = np.zeros((n, ho, wo, o))
    for i in range(ho):
        for j in range(wo):
            window = padded[:, i * stride[0] : i * stride[0] + kh, j * stride[1] : j * stride[1] + kw]
            y[:, i, j] = np.einsum("nklc,klco->no", window, w)
    return y


def naive_input_grad(g, w, size, stride, padding):
    (n, ho, wo, _), (kh, kw, c, _) = g.shape, w.shape
    (top, bottom), (left, right) = padding
    padded = np.zeros((n, size[0] + top + bottom, size[1] + left + right, c))
    for i in range(ho):
        for j in range(wo):
            window = padded[:, i * stride[0] : i * stride[0] + kh, j * stride[1] : j * stride[1] + kw]
            window += np.einsum("no,klco->nklc", g[:, i, j], w)
    return padded[:, top : top + size[0], left : left + size[1]]


def naive_weight_grad(x, g, kernel, stride, padding):
    n, height, width, c = x.shape
    (top, bottom), (left, right) = padding
    padded = np.zeros((n, height + top + bottom, width + left + right, c))
    padded[:, top : top + height, left : left + width] = x
    dw = np.zeros((*kernel, c, g.shape[3]))
    for i in range(g.shape[1]):
        for j in range(g.shape[2]):
            window = padded[:, i * stride[0] : i * stride[0] + kernel[0], j * stride[1] : j * stride[1] + kernel[1]]
            dw += np.einsum("nklc,no->klco", window, g[:, i, j])
    return dw


@st.composite
def cases(draw, kernel=None, stride=None):
    kernel = kernel or draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    stride = stride or draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    side = st.integers(0, 3)
    padding = (draw(side), draw(side)), (draw(side), draw(side))
    size = [draw(st.integers(max(1, k - sum(p)), 20)) for k, p in zip(kernel, padding)]
    channels = st.one_of(st.integers(1, 9), st.sampled_from([16, 31, 32, 33, 48, 64, 70]))
    return (
        draw(st.integers(1, 3)),
        *size,
        draw(channels),
        *kernel,
        draw(channels),
        stride,
        padding,
        draw(st.integers(0, 2**32 - 1)),
    )


def arrays(case):
    """x, w and g in float64 holding float32 values, so that the oracle sees what the kernel sees."""
    n, height, width, c, kh, kw, o, stride, ((top, bottom), (left, right)), seed = case
    rng = np.random.default_rng(seed)
    ho, wo = (height + top + bottom - kh) // stride[0] + 1, (width + left + right - kw) // stride[1] + 1
    shapes = (n, height, width, c), (kh, kw, c, o), (n, ho, wo, o)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def close(found, expected, terms, factor=1.0):
    """Equal within rounding: `terms` products of unit-variance numbers were summed."""
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=factor * 40 * FLOAT32 * np.sqrt(terms) + 1e-6)


def times(matrix, values):
    return [sum(a * b for a, b in zip(row, values)) for row in matrix]


@pytest.mark.parametrize("kind", range(len(tiles.TILE)))
def test_narrower_tiles_share_the_transformed_weights(kind):
    """Exactly, in fractions: outputs and weight gradient from the first of a whole tile's points, made with its weights."""
    rng = np.random.default_rng(0)
    up, tile, sum_of, weight_of = (
        kind in (tiles.UP, tiles.UP_ODD),
        tiles.TILE[kind],
        tiles.sum_of.py_func,
        tiles.weight_of.py_func,
    )
    even = up or kind == tiles.NEAREST
    taps = rng.integers(-9, 9, 3).tolist()
    whole = tiles.matrices(kind, tile)[1]
    transformed = times(whole, taps)
    assert len(transformed) == tiles.weights(kind)
    for m in range(1 + even, tile + 1, 1 + even):
        a, _, b = tiles.matrices(kind, m)
        data, gradient = rng.integers(-9, 9, len(b[0])).tolist(), rng.integers(-9, 9, m).tolist()
        assert (len(b), len(a[0])) == (tiles.points(kind, m), tiles.sums(kind, m))
        sums, weight_sums = [0] * len(a[0]), [0] * len(transformed)
        spread = times(zip(*a), gradient)
        for p, value in enumerate(times(b, data)):
            sums[sum_of(kind, p)] += transformed[weight_of(kind, p)] * value
            weight_sums[weight_of(kind, p)] += spread[sum_of(kind, p)] * value
        if up:  # data are the numbers under a window that is spread out by zeros
            stuffed = [0, 0, *(v for d in data for v in (d, 0)), 0]
            first = 2 if kind == tiles.UP_ODD else 3
            reached = [[stuffed[first + i - 1 + k] for k in range(3)] for i in range(m)]
        elif kind == tiles.NEAREST:
            enlarged = np.repeat(data, 2).tolist()
            reached = [enlarged[1 + i : 4 + i] for i in range(m)]
        elif kind == tiles.NEAREST_GRAD:  # what three taps reach of each of two neighbours, added up
            reached = [[sum(data[2 * i + k : 2 * i + k + 2]) for k in range(3)] for i in range(m)]
        else:
            reached = [[data[i * (1 + (kind == tiles.DOWN)) + k] for k in range(3)] for i in range(m)]
        assert times(a, sums) == times(reached, taps)
        assert times(zip(*whole), weight_sums) == times(zip(*reached), gradient)


WINOGRAD = 10  # times the error of a plain sum
STRIDES = {"winograd_s2": (2, 2)}  # of the algorithms for another stride than 1


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(["none", "shared", "sample"]), st.booleans())
def test_conv2d(case, bias_kind, with_residual):
    stride, padding, seed = case[-3:]
    x, w, g = arrays(case)
    rng = np.random.default_rng(seed + 1)
    bias = {"none": None, "shared": rng.standard_normal(w.shape[3]), "sample": rng.standard_normal((len(x), w.shape[3]))}[
        bias_kind
    ]
    expected = naive_conv2d(x.astype(float), w.astype(float), stride, padding)
    if bias is not None:
        bias = bias.astype(np.float32)
        expected += bias if bias.ndim == 1 else bias[:, None, None, :]
    if with_residual:
        expected += g
    found = conv.conv2d(x, w, bias, g if with_residual else None, stride=stride, padding=padding)
    close(found, expected, w[..., 0].size, WINOGRAD)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_input_grad(case):
    stride, padding = case[-3:-1]
    x, w, g = arrays(case)
    expected = naive_input_grad(g.astype(float), w.astype(float), x.shape[1:3], stride, padding)
    options = {"input_size": x.shape[1:3], "stride": stride, "padding": padding}
    close(conv.conv2d_input_grad(g, w, **options), expected, w[:, :, 0].size, WINOGRAD)
    close(conv.conv2d_input_grad(g, w, x, **options), expected + x, w[:, :, 0].size, WINOGRAD)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_weight_grad(case):
    stride, padding = case[-3:-1]
    x, w, g = arrays(case)
    options = {"kernel_size": w.shape[:2], "stride": stride, "padding": padding}
    found, sums = conv.conv2d_weight_grad(x, g, sums=True, **options)
    assert (found == conv.conv2d_weight_grad(x, g, **options)).all()
    assert sums is None or sums.shape == g.shape[::3]
    close(found, naive_weight_grad(x.astype(float), g.astype(float), w.shape[:2], stride, padding), g[..., 0].size, WINOGRAD)


@pytest.mark.parametrize("bad", [np.float64, np.float16])
def test_declines_other_dtypes(bad):
    x, w = np.ones((1, 4, 4, 2), bad), np.ones((3, 3, 2, 2), bad)
    assert conv.conv2d(x, w) is NotImplemented


@pytest.fixture
def every_product(monkeypatch):
    """Products that BLAS would be left with are run here as well."""
    monkeypatch.setattr(gemm, "pays", lambda m, k, n, summed: not summed or m % gemm.REST == 0)


quiet = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("turned_a", [False, True])
@pytest.mark.parametrize("turned_b", [False, True])
@quiet
@given(m=st.integers(1, 70), k=st.integers(1, 300), n=st.integers(1, 70), seed=st.integers(0, 99))
def test_matmul(every_product, turned_a, turned_b, m, k, n, seed):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((k, m) if turned_a else (m, k)).astype(np.float32)
    b = rng.standard_normal((n, k) if turned_b else (k, n)).astype(np.float32)
    a, b = a.T if turned_a else a, b.T if turned_b else b
    found = gemm.matmul(a, b)
    if found is NotImplemented:
        assert turned_a and m % gemm.REST
        return
    close(found, np.einsum("mk,kn->mn", a.astype(float), b.astype(float)), k)


@quiet
@given(m=st.integers(1, 40), k=st.integers(1, 40), n=st.integers(1, 70), seed=st.integers(0, 99))
def test_linear_and_batches_by_one_matrix(every_product, m, k, n, seed):
    rng = np.random.default_rng(seed)
    x, w, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, m, k), (k, n), n))
    expected = np.einsum("amk,kn->amn", x.astype(float), w.astype(float))
    close(gemm.matmul(x, w), expected, k)
    close(gemm.linear(x, w, bias), expected + bias, k)


@pytest.mark.parametrize("rows, k, n, bias", [((7,), 30, 50, True), ((3, 5), 30, 50, False), ((400, 2), 32, 50, True)])
@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_of_a_linear_layer(monkeypatch, rows, k, n, bias, threads):
    """The last is large enough for our kernel."""
    monkeypatch.setattr(gemm.numba, "get_num_threads", lambda: threads)
    rng = np.random.default_rng(0)
    x, w, g, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((*rows, k), (k, n), (*rows, n), n))
    b = b if bias else None
    gx, gw, gb = gemm.linear_backward(g, x, w, b, [True, True, True])
    flat_x, flat_g = x.reshape(-1, k).astype(float), g.reshape(-1, n).astype(float)
    close(gx, np.einsum("...n,kn->...k", g.astype(float), w.astype(float)), n)
    close(gw, np.einsum("mk,mn->kn", flat_x, flat_g), len(flat_x))
    if bias:
        close(gb, np.einsum("mn->n", flat_g), len(flat_x))
    else:
        assert gb is None
    assert gemm.linear_backward(g, x, w, b, [False, False, False]) == (None, None, None)


@pytest.mark.parametrize("shape", [(3,), (1023,), (1024,), (5, 7, 300), (2, 3, 0)])
def test_large_results_begin_on_a_cache_line(shape):
    arrays = [memory.empty(*shape) for _ in range(5)]
    for array in arrays:
        array[...] = 1.0
        assert array.shape == shape and array.dtype == np.float32 and array.flags.c_contiguous and array.flags.writeable
        assert array.size < 1024 or array.ctypes.data % 64 == 0


def test_products_that_blas_does_better_are_left_to_it():
    a, b = np.ones((64, 64), np.float32), np.ones((64, 64), np.float32)
    assert gemm.matmul(a, b) is NotImplemented and gemm.matmul(a.T, b) is NotImplemented
    assert gemm.matmul(np.ones((2, 512, 64), np.float32), np.ones((2, 64, 8), np.float32)) is NotImplemented
    assert gemm.matmul(np.ones((512, 64), np.float32), b).shape == (512, 64)


@pytest.mark.parametrize("force, factor", [("winograd_f4", WINOGRAD), ("winograd_f2", 1), ("winograd_s2", WINOGRAD)])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_winograd(force, factor, data):
    """Each direction against its own oracle: 2×2 tiles at the error of a plain sum, 4×4 ones and stride 2 at ten times that."""
    case = data.draw(cases(kernel=(3, 3), stride=STRIDES.get(force, (1, 1))))
    stride, padding = case[-3:-1]
    x, w, g = arrays(case)
    x64, w64, g64 = (a.astype(float) for a in (x, w, g))
    options = {"stride": stride, "padding": padding, "force": force}
    y = conv.conv2d(x, w, g[0, 0, 0], g, **options)
    close(y, naive_conv2d(x64, w64, stride, padding) + g + g[0, 0, 0], w[..., 0].size, factor)
    dx = conv.conv2d_input_grad(g, w, input_size=x.shape[1:3], **options)
    close(dx, naive_input_grad(g64, w64, x.shape[1:3], stride, padding), w[:, :, 0].size, factor)
    dw, sums = conv.conv2d_weight_grad(x, g, kernel_size=(3, 3), sums=True, **options)
    close(dw, naive_weight_grad(x64, g64, (3, 3), stride, padding), g[..., 0].size, factor)
    close(sums, g64.sum((1, 2)), g[0, ..., 0].size)


@settings(max_examples=60, deadline=None)
@given(cases(kernel=(3, 3), stride=(1, 1)), st.booleans())
def test_convolution_behind_an_enlargement(case, with_residual):
    """All directions against the oracles on the enlarged input; the error is at most that of 4×4 tiles."""
    n, height, width, c, _, _, o, stride, _, seed = case
    ones, rng = ((1, 1), (1, 1)), np.random.default_rng(seed)
    x, w, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((n, height, width, c), (3, 3, c, o), o))
    g = rng.standard_normal((n, 2 * height, 2 * width, o)).astype(np.float32)
    large, w64, g64 = x.astype(float).repeat(2, 1).repeat(2, 2), w.astype(float), g.astype(float)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "enlarging_pays", lambda *shape: True)
        close(conv.upsample_conv2d(x, w, bias), naive_conv2d(large, w64, stride, ones) + bias, 9 * c, WINOGRAD)
    dx = naive_input_grad(g64, w64, large.shape[1:3], stride, ones).reshape(n, height, 2, width, 2, c).sum((2, 4))
    residual = x if with_residual else None
    close(conv.upsample_conv2d_input_grad(g, w, residual), dx + x * with_residual, 36 * o, WINOGRAD)
    dw, sums = conv.upsample_conv2d_weight_grad(x, g, sums=True)
    close(dw, naive_weight_grad(large, g64, (3, 3), stride, ones), g[..., 0].size, WINOGRAD)
    close(sums, g64.sum((1, 2)), g[0, ..., 0].size)
    assert conv.upsample_conv2d_weight_grad(x, g, sums=False)[1] is None


@pytest.mark.parametrize(
    "channels, filters, pixels, pays",
    [
        (64, 64, (64, 28, 28), True),
        (320, 320, (1, 64, 64), True),
        (320, 320, (1, 16, 16), False),  # few tiles beside the transform of a hundred weights
        (64, 3, (64, 28, 28), False),  # taps share vectors
        (1, 64, (64, 28, 28), False),
    ],
)
def test_enlarging_and_convolution_are_one_where_it_pays(channels, filters, pixels, pays, monkeypatch):
    assert conv.enlarging_pays(channels, filters, pixels) is pays
    monkeypatch.setattr(conv, "precise", True)
    assert not conv.enlarging_pays(channels, filters, pixels)


@pytest.mark.parametrize("threads, parts", [(2, 1), (3, 1), (6, 2)])
@pytest.mark.parametrize("force, factor", [("winograd_f4", WINOGRAD), ("winograd_f2", 1)])
def test_threads_share_out_channels_of_few_tiles(monkeypatch, force, factor, threads, parts):
    monkeypatch.setattr(conv, "threads_for", lambda items, work: threads)
    case = 5, 7, 6, 9 * LANES + 6, 3, 3, 40, (1, 1), ((1, 1), (1, 1)), 0
    x, _, g = arrays(case)
    assert conv._winograd_plan(5, (7, 6), x.shape[3], 40, conv.KINDS[force], sums=True)[:2] == (threads, parts)
    options = {"kernel_size": (3, 3), "stride": (1, 1), "padding": case[-2], "force": force}
    dw, sums = conv.conv2d_weight_grad(x, g, sums=True, **options)
    close(dw, naive_weight_grad(x.astype(float), g.astype(float), (3, 3), *case[-3:-1]), g[..., 0].size, factor)
    close(sums, g.astype(float).sum((1, 2)), g[0, ..., 0].size, factor)


@pytest.mark.parametrize("force", sorted(conv.ROUNDING))
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 3),
    size=st.tuples(st.integers(6, 20), st.integers(6, 20)),
    channels=st.sampled_from([8, 20, 64, 130]),
    filters=st.sampled_from([8, 20, 64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_documented_rounding_error(force, n, size, channels, filters, seed):
    """The root mean square error against float64 keeps the documented bound in all three directions."""
    ones, stride = ((1, 1), (1, 1)), STRIDES.get(force, (1, 1))
    size = size[0] * stride[0], size[1] * stride[1]
    x, w, g = arrays((n, *size, channels, 3, 3, filters, stride, ones, seed))
    x64, w64, g64 = (a.astype(float) for a in (x, w, g))
    options = {"stride": stride, "padding": ones, "force": force}
    for found, expected, terms in [
        (conv.conv2d(x, w, **options), naive_conv2d(x64, w64, stride, ones), 9 * channels),
        (
            conv.conv2d_input_grad(g, w, input_size=size, **options),
            naive_input_grad(g64, w64, size, stride, ones),
            9 * filters,
        ),
        (
            conv.conv2d_weight_grad(x, g, kernel_size=(3, 3), **options),
            naive_weight_grad(x64, g64, (3, 3), stride, ones),
            g[..., 0].size,
        ),
    ]:
        error = np.sqrt(np.mean((found - expected) ** 2)) / expected.std()
        assert error < conv.ROUNDING[force] * np.sqrt(terms)


@pytest.mark.parametrize("channels", [16, 64])
def test_documented_rounding_error_behind_an_enlargement(monkeypatch, channels):
    monkeypatch.setattr(conv, "enlarging_pays", lambda *shape: True)
    x, w, _ = arrays((2, 16, 16, channels, 3, 3, channels, (1, 1), ((1, 1), (1, 1)), 0))
    expected = naive_conv2d(x.astype(float).repeat(2, 1).repeat(2, 2), w.astype(float), (1, 1), ((1, 1), (1, 1)))
    error = np.sqrt(np.mean((conv.upsample_conv2d(x, w) - expected) ** 2)) / expected.std()
    assert 1e-8 * np.sqrt(9 * channels) < error < 1e-7 * np.sqrt(9 * channels)


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(["direct", "shift_add"]))
def test_every_algorithm_takes_every_shape(case, force):
    stride, padding = case[-3:-1]
    x, w, g = arrays(case)
    x64, w64, g64 = (a.astype(float) for a in (x, w, g))
    options = {"stride": stride, "padding": padding, "force": force}
    bias = g[:, 0, 0]
    close(
        conv.conv2d(x, w, bias, g, **options), naive_conv2d(x64, w64, stride, padding) + g + bias[:, None, None], w[..., 0].size
    )
    dx = conv.conv2d_input_grad(g, w, input_size=x.shape[1:3], **options)
    close(dx, naive_input_grad(g64, w64, x.shape[1:3], stride, padding), w[:, :, 0].size)
    dw = conv.conv2d_weight_grad(x, g, kernel_size=w.shape[:2], **options)
    close(dw, naive_weight_grad(x64, g64, w.shape[:2], stride, padding), g[..., 0].size)


@pytest.mark.parametrize("force", sorted(conv.ROUNDING))
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_three_directions_are_adjoint(force, data):
    """⟨g, conv(x, w)⟩ = ⟨x, input_grad(g, w)⟩ = ⟨w, weight_grad(x, g)⟩."""
    case = data.draw(cases(kernel=(3, 3), stride=STRIDES.get(force, (1, 1))))
    stride, padding = case[-3:-1]
    x, w, g = arrays(case)
    options = {"stride": stride, "padding": padding, "force": force}
    forward = conv.conv2d(x, w, **options).astype(float)
    by_x = conv.conv2d_input_grad(g, w, input_size=x.shape[1:3], **options).astype(float)
    by_w = conv.conv2d_weight_grad(x, g, kernel_size=w.shape[:2], **options).astype(float)
    scale = np.sqrt(g.size * w[..., 0].size)  # the standard deviation of the form itself
    assert abs((g * forward).sum() - (x * by_x).sum()) < 1e-4 * scale
    assert abs((g * forward).sum() - (w * by_w).sum()) < 1e-4 * scale


@pytest.mark.parametrize(
    "kernel, stride, channels, filters, pixels, expected",
    [
        (3, 1, 32, 32, (64, 28, 28), "winograd_f4"),
        (3, 1, 256, 256, (64, 7, 7), "winograd_f4"),
        (3, 1, 320, 320, (1, 64, 64), "winograd_f4"),
        (3, 1, 128, 128, (1, 16, 16), "winograd_f2"),  # 16 tiles of 4×4 are few beside the transform of the weights
        (3, 1, 64, 64, (4, 6, 6), "winograd_f2"),  # a side of 6 is 12 points either way, 4 + 2 wide or 2 + 2 + 2
        (3, 1, 64, 64, (1, 4, 4), "direct"),  # too few pixels for any transform of the weights
        (3, 1, 1, 64, (64, 28, 28), "direct"),
        (3, 1, 64, 1, (64, 28, 28), "shift_add"),
        (3, 2, 64, 64, (64, 14, 14), "winograd_s2"),
        (3, 2, 64, 64, (1, 8, 8), "direct"),
        (3, 2, 3, 64, (64, 14, 14), "direct"),
        (3, 3, 64, 64, (64, 14, 14), "direct"),
        (5, 1, 64, 64, (64, 14, 14), "direct"),
        (1, 1, 64, 2, (64, 28, 28), "direct"),
    ],
)
def test_algorithm_follows_the_shape(kernel, stride, channels, filters, pixels, expected):
    assert conv.algorithm((kernel, kernel), (stride, stride), channels, filters, pixels) == expected


def test_a_small_input_gradient_is_one_call_rather_than_four():
    assert [conv.algorithm((3, 3), (2, 2), 16, 16, (1, 4, 4), calls) for calls in (1, 4)] == ["direct", "winograd_s2"]


@pytest.mark.parametrize(
    "n, height, threads, row, bands", [(1, 64, 2, 3072, 4), (1, 64, 1, 3072, 4), (3, 64, 2, 3072, 12), (1, 64, 2, 264, 2)]
)
def test_bands_are_even(monkeypatch, n, height, threads, row, bands):
    """Threads get as many rows each: 21, 21, 21 and 1 would leave one thread twice the work of the other."""
    monkeypatch.setattr(conv.numba, "get_num_threads", lambda: threads)
    band = conv._band(n, height, row, conv.SMALL)
    assert band * row <= conv.SLAB
    assert n * height / band == bands


@pytest.mark.parametrize("stride, instead", [(1, "winograd_f2"), (2, "direct")])
def test_precise_keeps_away_from_4x4_tiles(monkeypatch, stride, instead):
    rng, options = np.random.default_rng(0), {"stride": (stride, stride)}
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 28, 28, 64), (3, 3, 64, 64)))
    ordinary, forced = conv.conv2d(x, w, **options), conv.conv2d(x, w, **options, force=instead)
    monkeypatch.setattr(conv, "precise", True)
    assert np.array_equal(conv.conv2d(x, w, **options), forced) and not np.array_equal(ordinary, forced)


@pytest.mark.parametrize("force", sorted(conv.ROUNDING))
def test_same_bits_every_time(force):
    rng, stride = np.random.default_rng(0), STRIDES.get(force, (1, 1))
    x, g = (rng.standard_normal((16, 20 * s, 20 * s, 24)).astype(np.float32) for s in (stride[0], 1))
    options = {"kernel_size": (3, 3), "stride": stride, "padding": ((1, 1), (1, 1)), "force": force}
    assert len({conv.conv2d_weight_grad(x, g, **options).tobytes() for _ in range(5)}) == 1


@settings(max_examples=40, deadline=None)
@given(cases())
def test_layout_does_not_matter_and_inputs_are_not_written(case):
    stride, padding = case[-3:-1]
    x, w, g = arrays(case)
    turned = [np.ascontiguousarray(a.T).T for a in (x, w, g)]
    for array in (x, w, g, *turned):
        array.flags.writeable = False
    for a, b in [
        [conv.conv2d(u, v, stride=stride, padding=padding) for u, v in ((x, w), turned[:2])],
        [conv.conv2d_input_grad(v, u, input_size=x.shape[1:3], stride=stride, padding=padding) for u, v in ((w, g), turned[1:])],
        [
            conv.conv2d_weight_grad(u, v, kernel_size=w.shape[:2], stride=stride, padding=padding)
            for u, v in ((x, g), turned[::2])
        ],
    ]:
        assert np.array_equal(a, b)


def test_zero_sizes_are_declined():
    x, w = np.ones((0, 4, 4, 2), np.float32), np.ones((3, 3, 2, 2), np.float32)
    assert conv.conv2d(x, w) is NotImplemented
    assert gemm.matmul(np.ones((3, 0), np.float32), np.ones((0, 2), np.float32)) is NotImplemented


_NARROW = """
import json, sys
import numpy as np
from numba.core import event

compiled = []
class Listener(event.Listener):
    on_start = lambda self, e: compiled.append(e)
    on_end = lambda self, e: None
event.register("numba:run_pass", Listener())
from tinydiff.kernels import conv, gemm, microkernel

given, (folder,) = np.load(sys.argv[1]), sys.argv[2:]
x, w, g = (given[name] for name in "xwg")
found = {"product": gemm.matmul(given["a"], given["b"])}
for force in ("direct", "winograd_f2", "winograd_f4"):
    options = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "force": force}
    found[f"{force} forward"] = conv.conv2d(x, w, **options)
    found[f"{force} input"] = conv.conv2d_input_grad(g, w, input_size=x.shape[1:3], **options)
    found[f"{force} weight"] = conv.conv2d_weight_grad(x, g, kernel_size=(3, 3), **options)
np.savez(folder + "/found.npz", **found)
print(json.dumps({"compiled": len(compiled), "lanes": microkernel.LANES}))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Two processes with a cache of their own and, where the processor has it, AVX2 at most: what they say, and the results."""
    folder, rng = tmp_path_factory.mktemp("elsewhere"), np.random.default_rng(0)
    given = {"x": (2, 13, 11, 19), "w": (3, 3, 19, 35), "g": (2, 13, 11, 35), "a": (1021, 70), "b": (70, 35)}
    given = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in given.items()}
    np.savez(folder / "given.npz", **given)
    environment = os.environ | {"TINYDIFF_CACHE_DIR": str(folder), "TINYDIFF_QUIET": "1"}
    if binding.get_host_cpu_features().get("avx2"):
        environment |= {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma"}
    command = [sys.executable, "-c", _NARROW, folder / "given.npz", folder]
    runs = [subprocess.run(command, env=environment, capture_output=True, text=True) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    return [json.loads(run.stdout) for run in runs], given, dict(np.load(folder / "found.npz"))


def test_one_compilation_serves_every_process(elsewhere):
    """A second process finds every kernel in the disk cache."""
    first, second = elsewhere[0]
    assert first["compiled"] > 0 and second["compiled"] == 0


def test_vectors_of_avx2_give_the_same_numbers(elsewhere):
    (first, _), given, found = elsewhere
    if not binding.get_host_cpu_features().get("avx2"):
        pytest.skip("no processor with AVX2")
    assert first["lanes"] == 8
    x, w, g, a, b = (array.astype(np.float64) for array in given.values())
    stride, padding = (1, 1), ((1, 1), (1, 1))
    expected = {
        "forward": naive_conv2d(x, w, stride, padding),
        "input": naive_input_grad(g, w, x.shape[1:3], stride, padding),
        "weight": naive_weight_grad(x, g, (3, 3), stride, padding),
        "product": a @ b,
    }
    assert len(found) == 10
    for name, array in found.items():
        wanted = expected[name.split()[-1]]
        np.testing.assert_allclose(array, wanted, atol=2e-5 * np.abs(wanted).max(), err_msg=name)


def test_tiles_fit_the_processor_that_was_chosen(monkeypatch):
    """Numba's features are "" for a generic processor, which has no wide vectors even on a host that has them."""
    for features, lanes in (("", 4), ("+avx,+avx2,+fma", 8), ("+avx2,+avx512f", 16)):
        monkeypatch.setattr(numba.config, "CPU_FEATURES", features)
        assert microkernel._registers()[0] == lanes


def test_without_a_cache_that_can_be_written_kernels_are_compiled_in_a_folder_that_goes(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "kernel.py").write_text(
        "from numba import config\nfrom tinydiff.kernels import jit\n"
        'double = jit.njit(["float64(float64)"])(lambda x: 2 * x)\n'
        "print(double(21), config.CACHE_DIR)\n"
    )
    environment = os.environ | {"TINYDIFF_CACHE_DIR": str(tmp_path / "file" / "below"), "TMPDIR": str(tmp_path)}
    command = [sys.executable, tmp_path / "kernel.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    value, folder = done.stdout.split()
    assert value == "42.0" and os.path.dirname(folder) == str(tmp_path)
    assert "Traceback" not in done.stderr
    assert not os.path.exists(folder)
