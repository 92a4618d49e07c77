"""The CUDA normalisations, softmax and optimiser of csrc/, run on the simulator against NumPy in double precision."""

import ctypes
import shutil

import numpy as np
import pytest

from tinydiff.cudasim import Memory, Simulator, build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

SOURCES = ["group_norm.cu", "layer_norm.cu", "softmax.cu", "adamw.cu"]
DTYPES = [np.float32, np.float64]


@pytest.fixture(scope="module")
def simulator():
    return Simulator.load(build.link([build.kernel_object(build.csrc() / name, "fast") for name in SOURCES], "fast"))


def call(simulator, name, *arguments, outputs=(), schedule="random"):
    """Run a launcher; arrays become addresses, and those in `outputs` (by position) come back, written."""
    memory = {i: Memory(a) for i, a in enumerate(arguments) if isinstance(a, np.ndarray)}
    passed = []
    for i, argument in enumerate(arguments):
        if i in memory:
            passed.append(ctypes.c_void_p(memory[i].pointer))
        elif argument is None:
            passed.append(ctypes.c_void_p(0))
        else:
            passed.append(ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int(argument))
    with (
        simulator.settings(schedule=schedule),
        simulator.tracked([(f"argument {i}", m, i in outputs) for i, m in memory.items()]),
    ):
        code = getattr(simulator.library, name)(*passed, ctypes.c_size_t(0))
        assert [str(f) for f in simulator.findings()] == []
    assert code == 0
    assert {i: m.damage() for i, m in memory.items() if m.damage()} == {}
    return [memory[i].array for i in outputs]


def workspace(simulator, name, *sizes):
    function = getattr(simulator.library, name)
    function.restype = ctypes.c_int64
    return np.full(function(*sizes) // 8 + 1, np.nan)


def empty(*shape, dtype):
    return np.full(shape, np.nan, dtype)


def tolerance(dtype):
    return {"rtol": 0, "atol": 2e-5 if dtype == np.float32 else 1e-12}


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


ACTIVATIONS = [  # in the order of enum Activation: the function and its derivative
    (lambda v: v, np.ones_like),
    (lambda v: v * sigmoid(v), lambda v: sigmoid(v) * (1 + v * (1 - sigmoid(v)))),
    (lambda v: np.maximum(v, 0), lambda v: (v > 0).astype(float)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", range(3))
@pytest.mark.parametrize(
    ("n", "pixels", "channels", "groups", "affine"), [(2, 150, 40, 8, 1), (1, 1, 6, 3, 1), (3, 65, 33, 1, 0)]
)
def test_group_norm(simulator, n, pixels, channels, groups, affine, activation, dtype):
    rng = np.random.default_rng(0)
    x = (3 + rng.standard_normal((n, pixels, channels))).astype(dtype)
    g = rng.standard_normal(x.shape).astype(dtype)
    w, b = (rng.standard_normal(channels).astype(dtype) if affine else None for _ in range(2))
    precision, eps = DTYPES.index(dtype), 1e-3
    scratch = workspace(simulator, "group_norm_workspace", precision, n, pixels, channels, groups)
    y, mean, rstd, _ = call(
        simulator, "group_norm", precision, n, pixels, channels, groups, eps, activation, x, w, b, empty(*x.shape, dtype=dtype),
        empty(n, groups, dtype=dtype), empty(n, groups, dtype=dtype), scratch, outputs=(10, 11, 12, 13),
    )  # fmt: skip

    x64, w64, b64 = x.astype(float), 1 if w is None else w.astype(float), 0 if b is None else b.astype(float)
    grouped = x64.reshape(n, pixels, groups, -1)
    centre, inverse = grouped.mean((1, 3)), (grouped.var((1, 3)) + eps) ** -0.5
    spread = channels // groups
    xh = (x64 - np.repeat(centre, spread, 1)[:, None]) * np.repeat(inverse, spread, 1)[:, None]
    act, slope = ACTIVATIONS[activation]
    np.testing.assert_allclose(mean, centre, **tolerance(dtype))
    np.testing.assert_allclose(rstd, inverse, rtol=1e-5 if dtype == np.float32 else 1e-12)
    np.testing.assert_allclose(y, act(xh * w64 + b64), **tolerance(dtype))

    gradients = [empty(*x.shape, dtype=dtype), *(empty(channels, dtype=dtype) if affine else None for _ in range(2))]
    found = call(
        simulator, "group_norm_backward", precision, n, pixels, channels, groups, activation, g, x, w, b,
        centre.astype(dtype), inverse.astype(dtype), *gradients, scratch, outputs=(12, 13, 14, 15) if affine else (12, 15),
    )  # fmt: skip
    gz = g * slope(xh * w64 + b64)

    def mean_of(v):
        return np.repeat(v.reshape(n, pixels, groups, -1).mean((1, 3)), spread, 1)[:, None]

    gx = np.repeat(inverse, spread, 1)[:, None] * (gz * w64 - mean_of(gz * w64) - xh * mean_of(gz * w64 * xh))
    scale = np.abs(gx).max() + pixels
    for result, answer in zip(found, [gx, (gz * xh).sum((0, 1)), gz.sum((0, 1))] if affine else [gx], strict=False):
        np.testing.assert_allclose(result, answer, rtol=0, atol=tolerance(dtype)["atol"] * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size", "affine"), [(1, 1, 1), (9, 40, 1), (151, 33, 0), (151, 100, 1)])
def test_layer_norm(simulator, rows, size, affine, dtype):
    rng = np.random.default_rng(0)
    x = (3 + rng.standard_normal((rows, size))).astype(dtype)
    g = rng.standard_normal(x.shape).astype(dtype)
    w, b = (rng.standard_normal(size).astype(dtype) if affine else None for _ in range(2))
    precision, eps = DTYPES.index(dtype), 1e-3
    y, mean, rstd = call(
        simulator, "layer_norm", precision, rows, size, eps, x, w, b, empty(*x.shape, dtype=dtype),
        empty(rows, dtype=dtype), empty(rows, dtype=dtype), outputs=(7, 8, 9),
    )  # fmt: skip
    x64, w64, b64 = x.astype(float), 1 if w is None else w.astype(float), 0 if b is None else b.astype(float)
    inverse = (x64.var(1) + eps) ** -0.5
    xh = (x64 - x64.mean(1, keepdims=True)) * inverse[:, None]
    np.testing.assert_allclose(mean, x64.mean(1), **tolerance(dtype))
    np.testing.assert_allclose(rstd, inverse, rtol=1e-5 if dtype == np.float32 else 1e-12)
    np.testing.assert_allclose(y, xh * w64 + b64, **tolerance(dtype))

    gradients = [empty(*x.shape, dtype=dtype), *(empty(size, dtype=dtype) if affine else None for _ in range(2))]
    scratch = workspace(simulator, "layer_norm_workspace", precision, rows, size)
    found = call(
        simulator, "layer_norm_backward", precision, rows, size, g, x, w, mean, rstd, *gradients, scratch,
        outputs=(8, 9, 10, 11) if affine else (8, 11),
    )  # fmt: skip
    gw = g * w64
    gx = inverse[:, None] * (gw - gw.mean(1, keepdims=True) - xh * (gw * xh).mean(1, keepdims=True))
    for result, answer in zip(found, [gx, (g * xh).sum(0), g.sum(0)] if affine else [gx], strict=False):
        np.testing.assert_allclose(result, answer, rtol=0, atol=tolerance(dtype)["atol"] * (1 + np.abs(answer).max()) * 10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logarithmic", [0, 1])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (9, 40), (17, 7), (3, 1000)])
def test_softmax(simulator, rows, size, logarithmic, dtype):
    rng = np.random.default_rng(0)
    x = (10 * rng.standard_normal((rows, size))).astype(dtype)
    x[0, 0] += 1e4
    if size > 1:
        x[-1, 1:] = -np.inf  # all weight on one
    g = rng.standard_normal(x.shape).astype(dtype)
    precision = DTYPES.index(dtype)
    (y,) = call(simulator, "softmax", precision, rows, size, logarithmic, x, empty(*x.shape, dtype=dtype), outputs=(5,))
    e = np.exp(x.astype(float) - x.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        logs = x.astype(float) - x.max(1, keepdims=True) - np.log(e.sum(1, keepdims=True))
    np.testing.assert_allclose(y, logs if logarithmic else p, rtol=1e-5 if dtype == np.float32 else 1e-13, atol=1e-6)
    answer = g - p * g.sum(1, keepdims=True) if logarithmic else p * (g - (g * p).sum(1, keepdims=True))
    given = (logs if logarithmic else p).astype(dtype)
    (gx,) = call(
        simulator, "softmax_backward", precision, rows, size, logarithmic, g, given, empty(*x.shape, dtype=dtype), outputs=(6,)
    )
    np.testing.assert_allclose(gx, answer, rtol=0, atol=tolerance(dtype)["atol"] * np.abs(g).sum(1).max())


def test_adamw(simulator):
    """Forty parameters (more than a launch's table holds), some empty, every other one with a moving average."""
    rng = np.random.default_rng(0)
    lr, beta1, beta2, eps, decay, step, ema_decay = 1e-2, 0.9, 0.99, 1e-8, 0.1, 3, 0.95
    memory, table, answers = [], [], []
    for k in range(40):
        size = int(rng.integers(0, 1500)) if k % 7 else 0
        p, g, m, v, a = (rng.standard_normal(size).astype(np.float32) for _ in range(5))
        v = np.abs(v)
        arrays = [Memory(array) for array in (p, g, m, v, a)]
        memory.append(arrays)
        table.append([*(array.pointer for array in arrays[:4]), arrays[4].pointer if k % 2 else 0, size])
        p, g, m, v, a = (array.astype(float) for array in (p, g, m, v, a))
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        p = p - lr * decay * p - lr * (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + eps)
        answers.append([p, g, m, v, ema_decay * a + (1 - ema_decay) * p if k % 2 else a])
    numbers = [lr, beta1, beta2, eps, decay, beta1**step, beta2**step, ema_decay]
    changes = np.array(table, np.int64)
    tracked = [(f"{k}.{i}", m, i != 1) for k, arrays in enumerate(memory) for i, m in enumerate(arrays) if m.array.size]
    with simulator.settings(), simulator.tracked(tracked):
        code = simulator.library.adamw(
            len(table), ctypes.c_void_p(changes.ctypes.data), *map(ctypes.c_double, numbers), ctypes.c_size_t(0)
        )
        assert [str(f) for f in simulator.findings()] == []
    assert code == 0
    for arrays, answer in zip(memory, answers, strict=True):
        for array, expected in zip(arrays, answer, strict=True):
            assert array.damage() is None
            np.testing.assert_allclose(array.array, expected, rtol=1e-5, atol=1e-6)
