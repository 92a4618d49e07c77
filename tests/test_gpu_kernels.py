"""The kernels that CuPy compiles at run time: their arithmetic, by g++, against the ops' definitions on the CPU."""

import math
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinydiff as td
from tinydiff import nn, ops, optim, simarray
from tinydiff.backend import module_of
from tinydiff.cudasim.elementwise import Loop, Reduction, parse
from tinydiff.kernels import cuda, gpu
from tinydiff.op import REGISTRY
from tinydiff.testing import recorded_calls

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
ULPS = {np.float32: 2e-6, np.float64: 4e-15}
EDGES = [0.0, -0.0, 1e-30, -1e-30, 0.5, -0.5, 3.0, -3.0, 15.0, -15.0, 90.0, -90.0, 700.0, -700.0, 1e30, -1e30]


def curve(name, x):
    """The curves by Python's own mathematics, in double precision."""

    def logistic(v):
        return 1 / (1 + math.exp(-v)) if v > -700 else 0.0

    def normal(v):
        return 0.5 * math.erfc(-v / math.sqrt(2))

    def bend(v):
        return math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)

    return {
        "sigmoid": lambda: logistic(x),
        "silu": lambda: x * logistic(x),
        "quick_gelu": lambda: x * logistic(1.702 * x),
        "gelu": lambda: x * normal(x),
        "gelu_tanh": lambda: x * 0.5 * (1 + math.tanh(bend(x))),
    }[name]()


def slope(name, x):
    """Derivatives of the curves; beyond 30 all are flat or straight to the last bit."""
    if abs(x) > 30:
        return float(x > 0) if name not in ("sigmoid", "tanh") else 0.0
    h = 1e-5

    def difference(f):
        return (8 * (f(x + h) - f(x - h)) - (f(x + 2 * h) - f(x - 2 * h))) / (12 * h)

    return difference(math.tanh if name == "tanh" else lambda v: curve(name, v))


def there(x, dtype, device="cudasim"):
    return module_of(device).asarray(np.asarray(x, dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["sigmoid", "silu", "quick_gelu", "gelu", "gelu_tanh"])
def test_curves(device, name, dtype):
    x = np.concatenate([EDGES, np.linspace(-20, 20, 4001)]).astype(dtype)
    found = gpu.run(name, there(x, dtype, device)).get()
    expected = np.array([curve(name, float(v)) for v in x])
    assert found.dtype == dtype
    # Left of 0 the normal distribution's sum is 1 minus nearly 1: exact to the roundings of 1, times x.
    np.testing.assert_allclose(found, expected, rtol=ULPS[dtype], atol=ULPS[dtype] * (20 if "gelu" in name else 0.5))
    assert np.isnan(gpu.run(name, there([np.nan], dtype, device)).get()).all()
    assert gpu.run(name, there([np.inf], dtype, device)).get()[0] == (1 if name == "sigmoid" else np.inf)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["silu", "quick_gelu", "gelu", "gelu_tanh"])
def test_slopes(device, name, dtype):
    x = np.concatenate([EDGES, np.linspace(-20, 20, 801)]).astype(dtype)
    g = np.linspace(-2, 2, x.size).astype(dtype)
    found = gpu.run(f"{name}_backward", there(g, dtype, device), there(x, dtype, device)).get()
    expected = g * np.array([slope(name, float(v)) for v in x])
    np.testing.assert_allclose(
        found, expected, rtol=1e-5 if dtype == np.float32 else 1e-9, atol=1e-5 if dtype == np.float32 else 1e-9
    )
    ends = gpu.run(f"{name}_backward", there(np.full(3, 3), dtype, device), there([np.inf, -np.inf, np.nan], dtype, device)).get()
    assert ends[0] == 3 and ends[1] == 0 and np.isnan(ends[2])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9), data=st.data())
def test_slopes_by_the_result(dtype, values, data):
    x = np.array(values, dtype)
    g = np.array(data.draw(st.lists(st.floats(-10, 10, width=32), min_size=x.size, max_size=x.size)), dtype)
    tanh, s = np.tanh(x), 1 / (1 + np.exp(-np.clip(x, -80, 80)))
    for name, y, expected in (
        ("tanh", tanh, g * (1 - tanh**2)),
        ("sigmoid", s, g * s * (1 - s)),
        ("relu", x, np.where(x > 0, g, 0)),
    ):
        found = gpu.run(f"{name}_backward", there(g, dtype), there(y, dtype)).get()
        np.testing.assert_allclose(found, expected, rtol=ULPS[dtype], atol=ULPS[dtype])


def outcome(function, arrays, device, dtype=np.float64):
    """Result and gradients of a function of tensors, and which ops ran as kernels, forward and backward."""
    leaves = [td.tensor(a, True, dtype, device) for a in arrays]
    with recorded_calls() as calls:
        result = function(*leaves)
        g = np.random.default_rng(1).standard_normal(result.shape)
        gradients = td.grad(result, leaves, td.tensor(g, dtype=dtype, device=device))
    return [t.numpy() for t in (result, *gradients)], {(c[0].name, c.who) for c in calls if c.who.startswith("cuda")}


INDICES = np.array([[3, 0, 3, 3], [1, 3, 0, 3]])
OPS = {
    "tanh": (ops.tanh, [(20, 20)]),
    "sigmoid": (ops.sigmoid, [(20, 20)]),
    "relu": (ops.relu, [(20, 20)]),
    "silu": (ops.silu, [(20, 20)]),
    "quick_gelu": (ops.quick_gelu, [(20, 20)]),
    "gelu": (ops.gelu, [(3, 100)]),
    "gelu by tanh": (lambda x: ops.gelu(x, "tanh"), [(3, 100)]),
    "geglu": (ops.geglu, [(3, 4, 52)]),
    "geglu of a view": (lambda x: ops.geglu(ops.transpose(x)), [(26, 20)]),
    "upsample_nearest2d": (ops.upsample_nearest2d, [(3, 10, 13, 22)]),
    "drop": (lambda x: REGISTRY["drop"](x, 0.3, 5), [(20, 21)]),
    "gather": (lambda x: ops.gather(x, 1, INDICES[:, :1]), [(2, 5)]),
    "gather in the middle": (lambda x: ops.gather(x, 1, INDICES[:, None, :3]), [(2, 7, 3)]),
    "mse_loss": (ops.mse_loss, [(30, 20), (30, 20)]),
    "sum_to": (lambda x, bias: x + bias, [(1280, 7), (7,)]),
    "sum": (lambda x: ops.sum(x, (0, 1, 2)), [(4, 16, 32, 5)]),
    "sum with axes kept": (lambda x: ops.sum(x, (0, 1), True), [(32, 40, 7, 2)]),
}


@pytest.mark.parametrize("case", OPS)
def test_ops_run_as_kernels_with_the_definitions_results(device, case):
    function, shapes = OPS[case]
    arrays = [np.random.default_rng(0).standard_normal(shape) for shape in shapes]
    found, ran = outcome(function, arrays, device)
    expected, _ = outcome(function, arrays, "cpu")
    name = case.split()[0]
    assert (name, "cuda") in ran and (name in ("sum", "sum_to", "drop") or (name, "cuda backward") in ran)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    if device == "cudasim":
        with cuda.simulated(False):
            assert {name for name, _ in outcome(function, arrays, device)[1]} <= {"tanh", "relu"}  # one array call forward


SCATTERS = {
    "embedding": (lambda w: ops.embedding(INDICES, w), "untake", [(5, 7)]),
    "embedding of bytes": (lambda w: ops.embedding(INDICES.astype(np.uint8), w), "untake", [(5, 7)]),
    "take in the middle": (lambda x: ops.take(x, INDICES, 1), "untake", [(2, 4, 3)]),
    "take of nothing": (lambda x: ops.take(x, np.zeros((0, 2), np.int64), 0), "untake", [(4, 3)]),
    "gather": (lambda x: ops.gather(x, 1, INDICES), "scatter_add", [(2, 5)]),
    "scatter_add": (lambda x, src: ops.scatter_add(x, 0, INDICES, src), "scatter_add", [(6, 4), (2, 4)]),
    "scatter_add last": (lambda x, src: ops.scatter_add(x, -1, INDICES, src), "scatter_add", [(2, 5), (2, 4)]),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", SCATTERS)
def test_scattered_sums_are_the_cpus_to_the_bit(device, case, dtype):
    """Added one after another, as `numpy.add.at` does."""
    function, name, shapes = SCATTERS[case]
    arrays = [np.random.default_rng(0).standard_normal(shape).astype(dtype) for shape in shapes]
    found, ran = outcome(function, arrays, device, dtype)
    expected, _ = outcome(function, arrays, "cpu", dtype)
    assert (name, "cuda") in ran
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_scattered_sums_of_any_shape(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    axis = data.draw(st.integers(0, len(shape) - 1))
    n = data.draw(st.integers(0, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    index = rng.integers(0, shape[axis], (*shape[:axis], n, *shape[axis + 1 :]))
    x, src = rng.standard_normal(shape).astype(np.float32), rng.standard_normal(index.shape).astype(np.float32)
    expected = x.copy()
    for place in np.ndindex(index.shape):
        expected[(*place[:axis], index[place], *place[axis + 1 :])] += src[place]
    found = gpu.scatter_add(there(x, x.dtype), there(src, x.dtype), simarray.asarray(index), axis)
    assert found.get().tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_scattered_integers(dtype):
    src = simarray.asarray(np.array([1, 2, 3, 4], dtype))
    result = gpu.untake(src, (3,), simarray.asarray(np.array([2, 0, 2, 2])), 0)
    assert result.dtype == dtype and result.tolist() == [2, 0, 8]


def test_gathers_of_any_shape_and_kind_of_index():
    rng = np.random.default_rng(0)
    for shape, axis in (((4, 3, 5), 0), ((4, 3, 5), 1), ((4, 3, 5), 2), ((6,), 0)):
        for m, kind in ((1, np.uint8), (2, np.int32), (7, np.int64)):
            x, index = (
                rng.standard_normal(shape),
                rng.integers(0, shape[axis], (*shape[:axis], m, *shape[axis + 1 :])).astype(kind),
            )
            given = simarray.asarray(x), simarray.asarray(index)
            assert np.array_equal(gpu.gather(*given, axis).get(), np.take_along_axis(x, index.astype(int), axis))
            g = rng.standard_normal(index.shape)
            found, expected = gpu.gather_backward(simarray.asarray(g), shape, given[1], axis), np.zeros(shape)
            for place in np.ndindex(index.shape):
                expected[(*place[:axis], index[place], *place[axis + 1 :])] += g[place]
            assert found is NotImplemented if m > 1 else np.array_equal(found.get(), expected)
    assert gpu.gather(given[0], simarray.asarray(np.zeros(0, np.int64)), 0) is NotImplemented


def test_squares_are_added_in_float64():
    """Of float32 they would overflow, and of many the last would be lost."""
    x = np.array([1e30, -1e30, 3.0], np.float32)
    assert gpu.run("sum_of_squares", simarray.asarray(x)).get() == np.square(x.astype(float)).sum()
    ones = simarray.asarray(np.ones(2**25, np.float32))
    assert gpu.run("sum_of_squares", ones).get() == 2**25 and gpu.mse_loss(ones, ones * 0).get() == 1
    assert gpu.run("sum_of_squares", simarray.asarray(np.zeros((0, 3), np.float32))).get() == 0


def test_the_gradients_norm_is_a_kernel_for_each_array_and_one_number_back():
    rng = np.random.default_rng(0)
    parameters = [nn.Parameter(simarray.zeros(shape, np.float32)) for shape in ((30, 70), (3,), ())]
    for p in parameters:
        p.grad = td.tensor(rng.standard_normal(p.shape), dtype=np.float32, device="cudasim")
    expected = math.sqrt(sum(np.square(p.grad.numpy().astype(float)).sum() for p in parameters))
    with simarray.recorded_copies() as copies:
        assert optim.clip_grad_norm(parameters, 1.0) == pytest.approx(expected, rel=1e-12)
    assert [c.bytes for c in copies] == [8]


def test_sums_that_need_no_cutting_are_left_to_cupy():
    x = simarray.asarray(np.ones((1009, 9), np.float32))
    for array, axes in ((x, (0,)), (x, (1,)), (x, (0, 1)), (x[:512], (0,)), (x.transpose(), (0,)), (x.astype(np.int64), (0,))):
        assert gpu.sum_rows(array, axes) is NotImplemented
    assert gpu.sum_rows(simarray.asarray(np.ones((1024, 9), np.float32)), (0,)).tolist() == [1024] * 9


# The loop that stands for CuPy's kernels.


def test_loops_broadcast_and_write_in_place():
    add = Loop("T x, T y, int64 n", "T z", "z = x + n * y", "add", "")
    x, y = np.arange(6.0).reshape(2, 3), np.arange(3.0)
    np.testing.assert_array_equal(add(x, y, 10), x + 10 * y)
    assert add(x.T.astype(np.float32), np.float32(1).reshape(1), 0).dtype == np.float32
    reverse = Loop("raw T x, int64 n", "raw T y", "y[i] = x[n - 1 - i]", "reverse", "")
    out = np.zeros(3)
    assert reverse(y, 3, out, size=3) is out
    np.testing.assert_array_equal(out, y[::-1])
    both = Loop("T x", "T y, T z", "y = x; z = -x", "both", "")
    np.testing.assert_array_equal(both(y)[1], -y)


def test_reductions():
    largest = Reduction("T x", "T y", "x * x", "a > b ? a : b", "y = sqrt(a)", "0", "largest", None, "")
    assert largest(np.array([[3.0, -4.0], [1.0, 2.0]])) == 4 and largest(np.zeros((0, 2))) == 0
    counted = Reduction("T x, S y", "int64 n", "x > y", "a + b", "n = a", "0", "counted", "long long", "")
    assert counted(np.arange(6.0).reshape(2, 3), np.array([1, 1, 7])).tolist() == 2


def test_loops_refuse_what_cupy_would():
    add = Loop("T x, T y", "T z", "z = x + y", "add", "")
    with pytest.raises(TypeError, match="add: y is of float32, not float64"):
        add(np.ones(2), np.ones(2, np.float32))
    with pytest.raises(ValueError, match="z must be contiguous"):
        add(np.ones(2), np.ones(2), np.ones(4)[::2])
    for text in ("T", "raw raw T x", "float16 x", "T i"):
        with pytest.raises(ValueError, match="parameter"):
            parse(text)
    with pytest.raises(RuntimeError, match="nonsense"):
        Loop("T x", "T y", "y = nonsense(x)", "wrong", "")(np.ones(1))
