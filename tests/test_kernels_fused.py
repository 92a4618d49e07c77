"""The CPU kernels beside convolution and matrix products, against float64 references written here: odd sizes, special values.

Backward kernels are checked against directional differences of those references, so that no derivative is derived twice.
"""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise

import numba
import numpy as np
import pytest
import threadpoolctl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tinydiff as td
from tinydiff.kernels import activation, arrays, attention, norm, optim, resample, softmax

few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
erf64 = np.vectorize(math.erf, otypes=[np.float64])


@pytest.fixture(params=[1, numba.config.NUMBA_NUM_THREADS])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = numba.get_num_threads()
    numba.set_num_threads(request.param)
    yield request.param
    numba.set_num_threads(before)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every thread works, however small the array."""
    for module in (activation, norm, softmax, optim, resample):
        monkeypatch.setattr(module, "threads_for", lambda work, least=0: min(work, numba.get_num_threads()))
    monkeypatch.setattr(attention, "LARGE", 0)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def check_gradients(
    loss: Callable[..., float],
    inputs: list[np.ndarray],
    gradients: list[np.ndarray],
    rng: np.random.Generator,
    floor: float = 1e-2,
) -> None:
    """⟨gradient, u⟩ against (loss(x + hu) - loss(x - hu)) / 2h in float64, for each input and three random directions u.

    Numbers of size 1 go in, so rounding leaves about 1e-4 · floor a number even where the true gradient is 0.
    """
    wide = [a.astype(np.float64) for a in inputs]
    for i, gradient in enumerate(gradients):
        assert gradient.shape == inputs[i].shape and gradient.dtype == np.float32
        for _ in range(3):
            u = rng.standard_normal(inputs[i].shape)
            h = 1e-5
            ends = [loss(*wide[:i], wide[i] + s * h * u, *wide[i + 1 :]) for s in (1, -1)]
            expected, found = (ends[0] - ends[1]) / (2 * h), float((gradient.astype(np.float64) * u).sum())
            size = (np.linalg.norm(gradient.astype(np.float64)) + floor) * np.linalg.norm(u)
            assert abs(found - expected) <= 1e-4 * size, f"input {i}: {found} against {expected}"


# Elementary functions.


ELEMENTARY = {  # name: (kernel, float64 reference, ulps, smallest result that must be exact to that)
    "exp": (activation.exp, np.exp, 1.5),
    "tanh": (activation.tanh, np.tanh, 3),
    "sigmoid": (activation.sigmoid, lambda x: 1 / (1 + np.exp(-x)), 3),
    "erf": (activation.erf, erf64, 2),
    "log": (activation.log, np.log, 1.5),
}


def _everywhere() -> np.ndarray:
    """Floats of every size (random bits), and the ranges where the functions bend."""
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    ranges = [rng.uniform(a, b, 100_000).astype(np.float32) for a, b in ((-105, 90), (-11, 11), (-1, 1), (0, 3))]
    edges = np.float32([88.376, 88.3763, 88.7228, 88.72284, -87.3365, -87.33655, -88.4, 9, -9, 1, -1, 1e-38, 1e-45, 3.4e38])
    return np.concatenate([anything[np.isfinite(anything)], *ranges, edges, np.nextafter(edges, np.float32(0))])


@pytest.mark.parametrize("name", ELEMENTARY)
def test_elementary_functions_are_accurate_everywhere(name: str) -> None:
    kernel, reference, ulps = ELEMENTARY[name]
    x = _everywhere()
    with np.errstate(all="ignore"):
        expected = reference(x.astype(np.float64))
        rounded = expected.astype(np.float32)
        found = kernel(x)
        flushed = np.abs(expected) < 2.0**-126  # results too small to be normal numbers may be 0
        ulp = np.spacing(np.maximum(np.abs(rounded), np.float32(2.0**-126))).astype(np.float64)
        error = np.abs(found - expected) / ulp
    ordinary = np.isfinite(rounded) & ~flushed
    assert error[ordinary].max() <= ulps, x[ordinary][error[ordinary].argmax()]
    assert (np.abs(found[flushed]) <= 2.0**-126).all()
    np.testing.assert_array_equal(found[~np.isfinite(rounded)], rounded[~np.isfinite(rounded)])


@pytest.mark.parametrize("name", ELEMENTARY)
def test_elementary_functions_of_special_values(name: str) -> None:
    kernel, reference, _ = ELEMENTARY[name]
    odd_nans = np.uint32([0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FC00001, 0x7FFFFFFF, 0xFF812345]).view(np.float32)
    x = np.concatenate([np.float32([np.inf, -np.inf, 0.0, -0.0]), odd_nans])
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(kernel(x), reference(x.astype(np.float64)).astype(np.float32))


# Activations.

ACTIVATIONS: dict[str, tuple[Callable, Callable, Callable]] = {
    "silu": (activation.silu, activation.silu_backward, lambda x: x / (1 + np.exp(-x))),
    "quick_gelu": (activation.quick_gelu, activation.quick_gelu_backward, lambda x: x / (1 + np.exp(-1.702 * x))),
    "gelu": (activation.gelu, activation.gelu_backward, lambda x: x * (1 + erf64(x / math.sqrt(2))) / 2),
    "gelu_tanh": (
        lambda x: activation.gelu(x, "tanh"),
        lambda g, x: activation.gelu_backward(g, x, "tanh"),
        lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@few
@given(size=st.integers(1, 300), scale=st.sampled_from([0.1, 1, 10]), seed=st.integers(0, 2**31))
def test_activations_and_their_derivatives(name: str, threads: int, eager: None, size: int, scale: float, seed: int) -> None:
    kernel, backward, reference = ACTIVATIONS[name]
    rng = np.random.default_rng(seed)
    x, g = normal(rng, size) * np.float32(scale), normal(rng, size)
    kept = x.copy(), g.copy()
    np.testing.assert_allclose(kernel(x), reference(x.astype(np.float64)), rtol=1e-5, atol=1e-6)
    check_gradients(lambda v: float((g * reference(v)).sum()), [x], [backward(g, x)], rng)
    np.testing.assert_array_equal(x, kept[0])
    np.testing.assert_array_equal(g, kept[1])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_far_out(name: str) -> None:
    kernel, backward, _ = ACTIVATIONS[name]
    x = np.float32([1e30, 3e38, np.inf, -50, -1e4, -1e30, -3e38])
    found, slope = kernel(x), backward(np.ones_like(x), x)
    np.testing.assert_array_equal(found[:3], x[:3])
    np.testing.assert_allclose(found[3:], 0, atol=1e-18)
    np.testing.assert_array_equal(slope[:2], 1)
    np.testing.assert_allclose(slope[3:], 0, atol=1e-18)
    assert np.isnan(kernel(np.float32([np.nan]))).all()


def test_gelu_is_as_exact_as_the_error_function_in_float32() -> None:
    """Φ to 1.5e-7 and the derivative to 4e-7 absolutely, over a dense grid through all of both polynomials and their ends."""
    x = np.linspace(-7, 7, 400_001).astype(np.float32)
    wide = x.astype(np.float64)
    cdf = (1 + erf64(wide / math.sqrt(2))) / 2
    assert np.all(np.abs(activation.gelu(x) - wide * cdf) <= 1.5e-7 * np.abs(wide) + 6e-8 * np.abs(wide * cdf))
    slope = cdf + wide * np.exp(-wide * wide / 2) / math.sqrt(2 * math.pi)
    assert np.abs(activation.gelu_backward(np.ones_like(x), x) - slope).max() <= 4e-7


@few
@given(rows=st.integers(1, 9), half=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_geglu(threads: int, eager: None, rows: int, half: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, g = normal(rng, rows, 2 * half), normal(rng, rows, half)

    def reference(v: np.ndarray) -> np.ndarray:
        return v[:, :half] * v[:, half:] * (1 + erf64(v[:, half:] / math.sqrt(2))) / 2

    np.testing.assert_allclose(activation.geglu(x), reference(x.astype(np.float64)), rtol=1e-5, atol=1e-6)
    check_gradients(lambda v: float((g * reference(v)).sum()), [x], [activation.geglu_backward(g, x)], rng)


def test_large_arrays_on_all_threads_equal_one_thread(threads: int) -> None:
    rng = np.random.default_rng(1)
    x, y = normal(rng, 3, 100_003), normal(rng, 3, 100_003)
    np.testing.assert_array_equal(activation.add(x, y), x + y)
    whole = activation.silu_backward(y, x)
    pieces = [activation.silu_backward(y[:, a : a + 999].copy(), x[:, a : a + 999].copy()) for a in range(0, 100_003, 999)]
    np.testing.assert_allclose(whole, np.concatenate(pieces, axis=1), rtol=1e-6, atol=1e-9)


# Norms.


def _silu64(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _group_norm64(x: np.ndarray, w: np.ndarray, b: np.ndarray, groups: int, eps: float, act: str | None) -> np.ndarray:
    y = np.empty(x.shape)
    width = x.shape[-1] // groups
    for n in range(x.shape[0]):
        for k in range(groups):
            part = x[n, ..., k * width : (k + 1) * width]
            y[n, ..., k * width : (k + 1) * width] = (part - part.mean()) / np.sqrt(part.var() + eps)
    y = y * w + b
    return _silu64(y) if act == "silu" else y


@pytest.mark.parametrize("act", [None, "silu"])
@few
@given(
    n=st.integers(1, 5),
    height=st.integers(1, 6),
    width=st.integers(1, 23),
    groups=st.integers(1, 4),
    each=st.integers(1, 40),
    parameters=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_group_norm(
    act: str | None,
    threads: int,
    eager: None,
    n: int,
    height: int,
    width: int,
    groups: int,
    each: int,
    parameters: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    channels = groups * each
    x, g = normal(rng, n, height, width, channels) * 2 + 3, normal(rng, n, height, width, channels)
    w, b = (normal(rng, channels), normal(rng, channels)) if parameters else (None, None)
    eps = 0.1  # so that groups of one number have gradients worth comparing

    def reference(x: np.ndarray, w: np.ndarray | float = 1.0, b: np.ndarray | float = 0.0) -> np.ndarray:
        return _group_norm64(x, w, b, groups, eps, act)

    inputs = [x] if w is None or b is None else [x, w, b]
    options = {"num_groups": groups, "activation": act}
    y, (mean, rstd) = norm.group_norm(x, w, b, eps=eps, **options)
    np.testing.assert_allclose(y, reference(*[a.astype(np.float64) for a in inputs]), rtol=1e-5, atol=1e-5)
    gradients = norm.group_norm_backward(g, x, w, b, mean, rstd, **options)
    assert parameters or gradients[1:] == (None, None)
    more = np.asfortranarray(normal(rng, *x.shape))
    np.testing.assert_allclose(
        norm.group_norm_backward(g, x, w, b, mean, rstd, more, **options)[0], gradients[0] + more, rtol=1e-5, atol=1e-5
    )
    check_gradients(lambda *a: float((g * reference(*a)).sum()), inputs, list(gradients[: len(inputs)]), rng)


@few
@given(rows=st.integers(1, 70), channels=st.integers(1, 200), parameters=st.booleans(), seed=st.integers(0, 2**31))
def test_layer_norm(threads: int, eager: None, rows: int, channels: int, parameters: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, g = normal(rng, rows, channels) * 2 + 3, normal(rng, rows, channels)
    w, b = (normal(rng, channels), normal(rng, channels)) if parameters else (None, None)

    def reference(x: np.ndarray, w: np.ndarray | float = 1.0, b: np.ndarray | float = 0.0) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1) * w + b

    inputs = [x] if w is None or b is None else [x, w, b]
    y, (mean, rstd) = norm.layer_norm(x, w, b, eps=0.1)
    np.testing.assert_allclose(y, reference(*[a.astype(np.float64) for a in inputs]), rtol=1e-5, atol=1e-5)
    gradients = norm.layer_norm_backward(g, x, w, b, mean, rstd, eps=0.1)
    check_gradients(lambda *a: float((g * reference(*a)).sum()), inputs, list(gradients[: len(inputs)]), rng)


@pytest.mark.parametrize("shape", [(4, 30, 30, 32), (1, 64, 64, 48), (3, 9, 7, 640)])
def test_norms_of_large_means_lose_no_digits(threads: int, shape: tuple[int, ...]) -> None:
    """Mean 1000, deviation 1; and one number far from the rest in the first place."""
    x = normal(np.random.default_rng(2), *shape) + 1000
    x[:, 0, 0] = -2000
    ones, zeros = np.ones(shape[-1], np.float32), np.zeros(shape[-1], np.float32)
    exact = _group_norm64(x.astype(np.float64), ones, zeros, 8, 1e-5, None)
    y, _ = norm.group_norm(x, None, None, num_groups=8, eps=1e-5)
    np.testing.assert_allclose(y, exact, atol=2e-4)
    x = normal(np.random.default_rng(2), 50, shape[-1]) + 1000
    exact = (x.astype(np.float64) - x.mean(-1, keepdims=True, dtype=np.float64)) / x.std(-1, keepdims=True, dtype=np.float64)
    np.testing.assert_allclose(norm.layer_norm(x, None, None, eps=0)[0], exact, atol=5e-4)


# Softmax.


def _softmax64(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@few
@given(rows=st.integers(1, 20), columns=st.integers(1, 150), scale=st.sampled_from([1, 30]), seed=st.integers(0, 2**31))
def test_softmax_and_its_logarithm(threads: int, eager: None, rows: int, columns: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, g = normal(rng, rows, columns) * np.float32(scale), normal(rng, rows, columns)
    y, logarithm = softmax.softmax(x), softmax.log_softmax(x)
    exact = x.astype(np.float64) - x.max()
    np.testing.assert_allclose(y, _softmax64(exact), rtol=1e-5, atol=1e-30)
    logs = exact - exact.max(-1, keepdims=True)
    np.testing.assert_allclose(logarithm, logs - np.log(np.exp(logs).sum(-1, keepdims=True)), rtol=1e-5, atol=1e-6)
    check_gradients(lambda v: float((g * _softmax64(v)).sum()), [x], [softmax.softmax_backward(g, y)], rng)
    check_gradients(
        lambda v: float((g * np.log(np.maximum(_softmax64(v), 1e-300))).sum()),
        [x],
        [softmax.log_softmax_backward(g, logarithm)],
        rng,
    )


def test_softmax_of_special_values() -> None:
    x = np.float32([[0, 1, np.nan, 2], [-np.inf, 0, -np.inf, 0], [1e38, -1e38, 0, 1e38], [-np.nan, 5, 5, 5], [-3e38] * 4])
    y = softmax.softmax(x)
    assert np.isnan(y[0]).all() and np.isnan(y[3]).all()
    np.testing.assert_array_equal(y[[1, 2]], [[0, 0.5, 0, 0.5], [0.5, 0, 0, 0.5]])
    np.testing.assert_array_equal(y[4], 0.25)
    np.testing.assert_array_equal(softmax.softmax(np.float32([[-1000, -10, -1000, -10]])), [[0, 0.5, 0, 0.5]])


# Attention.


def _attention64(q: np.ndarray, k: np.ndarray, v: np.ndarray, allowed: np.ndarray, scale: float) -> np.ndarray:
    s = np.where(allowed, np.einsum("nhld,nhsd->nhls", q, k) * scale, -np.inf)
    top = s.max(-1, keepdims=True)
    e = np.exp(s - np.where(np.isfinite(top), top, 0))
    total = e.sum(-1, keepdims=True)
    return np.einsum("nhls,nhse->nhle", e / np.where(total > 0, total, 1), v)


@few
@given(
    n=st.integers(1, 3),
    heads=st.integers(1, 4),
    length=st.integers(1, 150),
    keys=st.integers(1, 80),
    size=st.integers(1, 48),
    width=st.integers(1, 48),
    causal=st.booleans(),
    mask=st.sampled_from([None, (1, 1, 1, 0), (1, 0, 1, 1), (0, 0, 0, 1)]),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_attention(
    threads: int,
    eager: None,
    n: int,
    heads: int,
    length: int,
    keys: int,
    size: int,
    width: int,
    causal: bool,
    mask: tuple[int, ...] | None,
    strided: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)

    def draw(length: int, size: int) -> np.ndarray:
        a = normal(rng, n, length, heads, size + 3)[..., :size].transpose(0, 2, 1, 3)
        return a if strided else np.ascontiguousarray(a)

    q, k, v, g = draw(length, size), draw(keys, size), draw(keys, width), draw(length, width)
    shape = (n, heads, length, keys)
    drawn = None if mask is None else rng.random([s if m else 1 for s, m in zip(shape, mask)]) < 0.7
    if drawn is not None:
        drawn[:, :, 0] = False  # a query with nothing to attend, where the mask has queries
    allowed = np.ones(shape, bool) if drawn is None else np.broadcast_to(drawn, shape)
    if causal:
        allowed = allowed & (np.arange(keys) <= np.arange(length)[:, None])
    scale = size**-0.5
    out, lse = attention.scaled_dot_product_attention(q, k, v, drawn, is_causal=causal, scale=scale)
    exact = _attention64(*(a.astype(np.float64) for a in (q, k, v)), allowed, scale)
    np.testing.assert_allclose(out, exact, rtol=1e-4, atol=1e-5)
    assert (out[~allowed.any(-1)] == 0).all()
    gradients = attention.scaled_dot_product_attention_backward(g, q, k, v, drawn, out, lse, is_causal=causal, scale=scale)
    check_gradients(lambda *a: float((g * _attention64(*a, allowed, scale)).sum()), [q, k, v], list(gradients), rng, floor=0.1)


def test_attention_needs_less_memory_than_the_scores() -> None:
    import tracemalloc

    q = normal(np.random.default_rng(3), 1, 1, 4096, 16)
    attention.scaled_dot_product_attention(q, q, q, is_causal=False, scale=0.25)
    tracemalloc.start()
    attention.scaled_dot_product_attention(q, q, q, is_causal=False, scale=0.25)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4096 * 4096 * 4 / 4 * max(1, numba.get_num_threads() / 4)


# Optimisers.


@few
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    step=st.integers(1, 2000),
    averages=st.lists(st.booleans(), min_size=4, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_adamw(threads: int, eager: None, sizes: list[int], step: int, averages: list[bool], seed: int) -> None:
    rng = np.random.default_rng(seed)
    lr, b1, b2, eps, decay, keep, scale = 1e-2, 0.9, 0.99, 1e-6, 0.1, 0.95, 0.7
    changes, expected = [], []
    for size, average in zip(sizes, averages):
        p, g, m, ema = (normal(rng, size) for _ in range(4))
        v = normal(rng, size) ** 2
        changes.append((p, g, m, v, ema if average else None))
        p64, g64, m64, v64, ema64 = (a.astype(np.float64) for a in (p, g, m, v, ema))
        m64 = b1 * m64 + (1 - b1) * scale * g64
        v64 = b2 * v64 + (1 - b2) * (scale * g64) ** 2
        p64 = p64 - lr * decay * p64 - lr * (m64 / (1 - b1**step)) / (np.sqrt(v64 / (1 - b2**step)) + eps)
        expected.append((p64, g64, m64, v64, keep * ema64 + (1 - keep) * p64))
    assert optim.adamw(changes, lr, b1, b2, eps, decay, step, keep, scale) == []
    for change, exact in zip(changes, expected):
        for found, wanted in zip(change, exact):
            if found is not None:
                np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-6)


def test_adamw_with_a_table_takes_the_same_steps() -> None:
    """Whether the table is of these parameters, of ones since replaced, or a gradient once has no place in it."""
    rng = np.random.default_rng(0)
    rest = (1e-2, 0.9, 0.99, 1e-6, 0.1)
    ours, theirs = ([td.nn.Parameter(np.full(700, i + 1, np.float32)) for i in range(3)] for _ in range(2))
    optimizer = td.optim.AdamW(ours, 1e-2, (0.9, 0.99), 1e-6, 0.1)
    states = [[np.zeros(700, np.float32) for _ in range(2)] for _ in theirs]
    for step in range(1, 6):
        gradients = [normal(rng, 700) for _ in ours]
        for p, g in zip(ours, gradients):
            p.grad = td.Tensor(np.repeat(g, 2)[::2] if step == 2 else g)
        if step == 4:
            ours[1].data = ours[1].data.copy()
        optimizer.step()
        optim.adamw([(p.data, g, *state, None) for p, g, state in zip(theirs, gradients, states)], *rest, step)
        for p, q in zip(ours, theirs):
            np.testing.assert_allclose(p.data, q.data, rtol=1e-5, atol=1e-6)


def test_adamw_returns_what_it_cannot_change() -> None:
    p = np.ones(8, np.float32)
    frozen = np.ones(8, np.float32)
    frozen.flags.writeable = False
    rest = (1e-3, 0.9, 0.999, 1e-8, 0.0, 1)
    for g, m in (
        (np.ones(8), p.copy()),
        (np.ones(16, np.float32)[::2], p.copy()),
        (np.ones(7, np.float32), p.copy()),
        (p, frozen),
    ):
        declined = (p, g, m, np.ones(8, np.float32), None)
        good = [np.ones(5, np.float32) for _ in range(4)]
        assert optim.adamw([declined, (*good, None)], *rest) == [declined]
        assert (good[0] < 1).all()
    np.testing.assert_array_equal(p, 1)


@few
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**31))
def test_sum_of_squares(threads: int, eager: None, size: int, seed: int) -> None:
    x = normal(np.random.default_rng(seed), size)
    found = optim.sum_of_squares(np.split(x, [size // 3, size // 2]) if size > 5 else [x])
    assert isinstance(found, float)
    assert found == pytest.approx(math.fsum(float(v) ** 2 for v in x), rel=2e-6)


def test_sum_of_squares_is_the_same_for_every_number_of_threads() -> None:
    x = normal(np.random.default_rng(4), 300_001)
    before, found = numba.get_num_threads(), set()
    for count in range(1, before + 1):
        numba.set_num_threads(count)
        found.add(optim.sum_of_squares([x, x[:1000], x[5:]]))
    numba.set_num_threads(before)
    assert len(found) == 1


# Enlarging and reducing.


@few
@given(
    n=st.integers(1, 3),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    channels=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_enlarge_and_reduce(threads: int, eager: None, n: int, height: int, width: int, channels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, g = normal(rng, n, height, width, channels), normal(rng, n, 2 * height, 2 * width, channels)
    enlarged = resample.upsample_nearest2d(x)
    back = resample.upsample_nearest2d_backward(g)
    for i in range(2 * height):
        for j in range(2 * width):
            np.testing.assert_array_equal(enlarged[:, i, j], x[:, i // 2, j // 2])
    for i in range(height):
        for j in range(width):
            four = sum(g[:, 2 * i + a, 2 * j + b].astype(np.float64) for a in (0, 1) for b in (0, 1))
            np.testing.assert_allclose(back[:, i, j], four, rtol=1e-6, atol=1e-6)


# What all of them refuse, and what they promise.

_CALLS: dict[str, Callable[[np.ndarray], object]] = {
    "silu": activation.silu,
    "gelu_backward": lambda x: activation.gelu_backward(x, x),
    "geglu": activation.geglu,
    "add": lambda x: activation.add(x, x),
    "group_norm": lambda x: norm.group_norm(x, None, None, num_groups=2, eps=1e-5),
    "layer_norm": lambda x: norm.layer_norm(x, None, None, eps=1e-5),
    "softmax": softmax.softmax,
    "log_softmax": softmax.log_softmax,
    "upsample_nearest2d": resample.upsample_nearest2d,
    "upsample_nearest2d_backward": resample.upsample_nearest2d_backward,
    "sum_of_squares": lambda x: optim.sum_of_squares([x]),
}


@pytest.mark.parametrize("name", _CALLS)
def test_kernels_decline_what_they_cannot_do(name: str) -> None:
    call = _CALLS[name]
    good = np.ones((2, 128, 128, 4), np.float32)
    assert call(good) is not NotImplemented
    for bad in (good.astype(np.float64), good.astype(np.int64), good[:, ::2, ::2], good[:, :0], good.transpose(3, 1, 2, 0)):
        assert call(bad) is NotImplemented


def test_attention_declines() -> None:
    good = np.ones((1, 2, 70, 8), np.float32)
    call = attention.scaled_dot_product_attention
    assert call(good, good, good, is_causal=False, scale=1.0) is not NotImplemented
    for bad in (good.astype(np.float64), good[:, :, :0], good[..., ::2]):
        assert call(bad, bad, bad, is_causal=False, scale=1.0) is NotImplemented


def test_the_same_bits_twice(threads: int) -> None:
    rng = np.random.default_rng(5)
    x, g = normal(rng, 5, 40, 40, 16), normal(rng, 5, 40, 40, 16)
    w = normal(rng, 16)
    q = normal(rng, 1, 3, 300, 16)

    def everything() -> list[np.ndarray]:
        y, cache = norm.group_norm(x, w, w, num_groups=4, eps=1e-5, activation="silu")
        out, lse = attention.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.3)
        back = attention.scaled_dot_product_attention_backward(out, q, q, q, None, out, lse, is_causal=True, scale=0.3)
        backward = norm.group_norm_backward(g, x, w, w, *cache, num_groups=4, activation="silu")
        return [y, *backward, *norm.layer_norm_backward(g, x, w, w, *norm.layer_norm(x, w, w, eps=1e-5)[1], eps=1e-5), out, *back]

    for first, second in zip(everything(), everything()):
        np.testing.assert_array_equal(first, second)


def test_share_gives_every_element_to_one_thread() -> None:
    for count in (1, 2, 15, 16, 63, 64, 100, 1000, 12345):
        for threads in (1, 2, 3, 7):
            parts = [arrays.share(count, t, threads) for t in range(threads)]
            assert parts[0][0] == 0 and parts[-1][1] == count
            assert all(a[1] == b[0] for a, b in pairwise(parts))


_USE = """
import numpy as np
from tinydiff.kernels import activation, norm, softmax
x = np.ones((4, 64, 64, 8), np.float32)
activation.silu(x), softmax.softmax(x), norm.group_norm(x, None, None, num_groups=2, eps=1e-5, activation="silu")
"""


def test_a_second_process_compiles_nothing(tmp_path: object) -> None:
    environment = os.environ | {"TINYDIFF_CACHE_DIR": str(tmp_path), "TINYDIFF_QUIET": "1"}

    def run() -> dict[str, int]:
        subprocess.run([sys.executable, "-c", _USE], env=environment, check=True, timeout=300)
        files = [os.path.join(folder, name) for folder, _, names in os.walk(str(tmp_path)) for name in names]
        return {name: os.stat(name).st_mtime_ns for name in files}

    first = run()
    assert any(name.endswith(".nbc") for name in first)
    assert run() == first


def test_the_pool_leaves_parallel_regions_of_others_as_they_were() -> None:
    """Numba's pool would let them nest, in the library of OpenMP that PyTorch, for one, computes with as well."""
    pools = [ctypes.CDLL(pool["filepath"]) for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "openmp"]
    if not pools:
        pytest.skip("Numba's threads aren't OpenMP's")
    assert [pool.omp_get_max_active_levels() for pool in pools] == [1] * len(pools)
