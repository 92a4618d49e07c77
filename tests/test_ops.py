"""Every op, through the catalogue: values against naive loops, derivatives against differences, layouts, dtypes, kernels."""

import itertools
import math

import numpy as np
import pytest
from catalogue import LARGE, ODD, ORACLES, every, splitmix64
from hypothesis import given
from hypothesis import strategies as st

import tinydiff as td
from tinydiff import ops, random, testing
from tinydiff.op import REGISTRY
from tinydiff.samples import SAMPLES, Sample

OURS = {name: op for name, op in REGISTRY.items() if op.__wrapped_module__.startswith("tinydiff.ops.")} | {
    "alias": REGISTRY["alias"]
}
NAMES = sorted({*OURS, *ops.__all__})
CALLS = [pytest.param(name, sample, id=f"{name}-{k}") for name in NAMES for k, sample in enumerate(SAMPLES.get(name, ()))]
KERNELS = sorted(name for name, op in OURS.items() if "numpy" in op.kernels)
VIEWS = {"flatten", "transpose", "squeeze", "unsqueeze", "expand", "split", "activate", "dropout", "repeat", "linear"}
"""Functions whose result may share memory with their input, beside the ops that declare `view`."""


def listed(results):
    return list(results) if isinstance(results, list | tuple) else [results]


def tensors(sample, dtype=np.float64, requires_grad=False):
    return [td.tensor(a, requires_grad, dtype) for a in sample.arrays]


def gradients(sample, leaves):
    """The results, and the gradient of each leaf for drawn cotangents."""
    results = listed(sample(*leaves))
    rng = np.random.default_rng(3)
    cotangents = [rng.standard_normal(r.shape).astype(r.dtype) for r in results]
    return results, td.grad(results, leaves, cotangents)


def test_no_op_is_without_samples_and_oracle():
    assert set(NAMES) <= set(SAMPLES)
    assert set(NAMES) <= set(ORACLES)
    assert set(KERNELS) <= set(LARGE)


@pytest.mark.parametrize("name, sample", CALLS)
def test_values_are_those_of_naive_loops(name, sample):
    inputs = tensors(sample)
    results = listed(sample(*inputs))
    expected = listed(ORACLES[name](*sample.bind(sample.arrays), **sample.params))
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected):
        assert result.shape == wanted.shape
        assert result.dtype == wanted.dtype
        np.testing.assert_allclose(result.numpy(), wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name, sample", [p for p in CALLS if p.values[1].differentiable])
def test_first_and_second_derivatives(name, sample):
    assert td.gradcheck(sample, sample.arrays)
    assert td.gradgradcheck(sample, sample.arrays)


@pytest.mark.parametrize("name, sample", [p for p in CALLS if not p.values[1].differentiable])
def test_what_has_no_derivative_says_so(name, sample):
    assert not any(r.requires_grad for r in listed(sample(*tensors(sample, requires_grad=True))))


@pytest.mark.parametrize("name, sample", CALLS)
def test_float32_stays_float32_and_close(name, sample):
    if name == "astype":
        pytest.skip("says its dtype itself")
    exact, close = tensors(sample, requires_grad=sample.differentiable), tensors(sample, np.float32, sample.differentiable)
    if not sample.differentiable:
        for result, wanted in zip(listed(sample(*close)), listed(sample(*exact))):
            assert result.dtype == (np.float32 if wanted.dtype == np.float64 else wanted.dtype)
            assert np.array_equal(result.numpy(), wanted.numpy())
        return
    results, found = gradients(sample, close)
    expected, wanted = gradients(sample, exact)
    for a, b in zip([*results, *found], [*expected, *wanted]):
        assert a.dtype == np.float32
        scale = float(np.abs(b.numpy()).max(initial=1.0))
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-4, atol=2e-5 * scale)


def laid_out(array):
    """The same values reversed, transposed and with gaps in memory, none of it contiguous."""
    wide = np.full([2 * n for n in array.shape[::-1]], 99.0, array.dtype)
    view = wide.T[(..., *[slice(None, None, -2)] * array.ndim)]
    view[...] = array
    return view


@pytest.mark.parametrize("name, sample", CALLS)
def test_any_memory_layout_gives_the_same(name, sample):
    def run(arrays):
        leaves = [td.Tensor(a, requires_grad=sample.differentiable) for a in arrays]
        if sample.differentiable:
            results, found = gradients(sample, leaves)
            return [*results, *found]
        return listed(sample(*leaves))

    for found, wanted in zip(run([laid_out(a) for a in sample.arrays]), run(sample.arrays)):
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name, sample", CALLS)
def test_inputs_are_not_changed_and_results_do_not_share_their_memory(name, sample):
    arrays = [np.array(a) for a in sample.arrays]
    leaves = [td.Tensor(a, requires_grad=sample.differentiable) for a in arrays]
    results, found = gradients(sample, leaves) if sample.differentiable else (listed(sample(*leaves)), ())
    for array, before in zip(arrays, sample.arrays):
        assert np.array_equal(array, before)
    may_share = name in VIEWS or getattr(OURS.get(name), "view", False)
    for result in results:
        assert may_share or not any(np.shares_memory(result.numpy(), a) for a in arrays)
    for gradient in found:
        assert not any(np.shares_memory(gradient.numpy(), a) for a in arrays)


# Kernels.


def run(name, args, params, dtype, arrange=np.copy):
    """The result and the gradients of all float arrays in `args`, as `dtype`."""
    sample = Sample(getattr(ops, name, None) or OURS[name], args, params, True)
    leaves = [td.Tensor(arrange(a.astype(dtype)), requires_grad=True) for a in sample.arrays]
    result = sample(*leaves)
    cotangent = arrange(np.random.default_rng(1).standard_normal(result.shape).astype(dtype))
    return [result, *td.grad(result, leaves, td.Tensor(cotangent))]


def reference(name, args, params):
    """The same by the definitions, in float64."""
    with testing.definition_only(*OURS.values()):
        return run(name, args, params, np.float64)


def assert_close(found, expected, rtol, atol):
    """`atol` is in units of the largest value."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        scale = float(np.abs(b.numpy()).max(initial=0.1))
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=rtol, atol=atol * scale)


@pytest.mark.parametrize("name, args, params", every(LARGE))
def test_kernels_run_and_agree_with_the_definition(name, args, params):
    with testing.recorded_calls() as calls:
        found = run(name, args, params, np.float32)
    if OURS[name].kernels:
        ran = {call.who for call in calls if call[0] is OURS[name]}
        assert "numpy" in ran, f"the kernel declined: {ran or 'the composition ran'}"
        if any(kernel.rules for kernel in OURS[name].kernels["numpy"]):
            assert "numpy backward" in ran
    assert all(t.dtype == np.float32 for t in found)
    assert_close(found, reference(name, args, params), 1e-3, 2e-5)


@pytest.mark.parametrize("name, args, params", every(ODD))
def test_unusual_calls_of_that_size_are_right_whoever_runs_them(name, args, params):
    found = run(name, args, params, np.float32)
    assert all(t.dtype == np.float32 for t in found)
    assert_close(found, reference(name, args, params), 1e-3, 2e-5)


@pytest.mark.parametrize("name, args, params", every(LARGE))
def test_calls_of_that_size_in_any_layout_and_in_float64(name, args, params):
    expected = reference(name, args, params)
    assert_close(run(name, args, params, np.float32, laid_out), expected, 1e-3, 2e-5)
    found = run(name, args, params, np.float64)
    assert all(t.dtype == np.float64 for t in found)
    assert_close(found, expected, 1e-9, 1e-11)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_agree_at_any_size_and_layout(name):
    """Asked at sizes they are not made for, kernels must be right or decline."""
    for sample in SAMPLES[name]:
        for arrange in (np.copy, laid_out):
            for dtype, tolerance in ((np.float32, 3e-5), (np.float64, 1e-11)):
                arrays = [arrange(a.astype(dtype)) for a in sample.arrays]
                with testing.kernels_always(OURS[name]):
                    results, found = gradients(sample, [td.Tensor(a, requires_grad=True) for a in arrays])
                with testing.definition_only(*OURS.values()):
                    expected, wanted = gradients(sample, [td.Tensor(a, requires_grad=True) for a in arrays])
                for a, b in zip([*results, *found], [*expected, *wanted]):
                    assert a.dtype == b.dtype and a.shape == b.shape
                    scale = float(np.abs(b.numpy()).max(initial=1.0))
                    np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=10 * tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("name", ["silu", "gelu", "quick_gelu", "tanh", "sigmoid", "softmax", "group_norm", "layer_norm"])
def test_kernels_pass_on_nan(name):
    *args, params = LARGE[name][0]
    x = np.array(args[0])
    x[0, 0, ...] = np.nan
    result = getattr(ops, name)(td.from_numpy(x), *args[1:], **params).numpy()
    assert np.isnan(result[0, 0]).all()
    assert np.isfinite(result[-1]).all()


@pytest.mark.parametrize(
    "name, limits",
    [("silu", (0, math.inf)), ("gelu", (0, math.inf)), ("quick_gelu", (0, math.inf)), ("tanh", (-1, 1)), ("sigmoid", (0, 1))],
)
def test_kernels_at_the_ends_of_the_line(name, limits):
    """Far out, activations reach their limits: no overflow, no NaN from a polynomial beyond its range."""
    x = np.full((64, 256), -100.0, np.float32)
    x[1::2] = 100.0
    result = getattr(ops, name)(td.from_numpy(x)).numpy()
    np.testing.assert_allclose(result[::2], limits[0], atol=1e-6)
    np.testing.assert_allclose(result[1::2], min(limits[1], 100.0))
    huge = getattr(ops, name)(td.from_numpy(np.float32(1e30) * np.sign(x))).numpy()
    assert not np.isnan(huge).any()
    np.testing.assert_allclose(huge[1::2], min(limits[1], 1e30))


@pytest.mark.parametrize("name, args", [("group_norm", (8,)), ("layer_norm", ())])
@pytest.mark.parametrize("side", [1, 16], ids=["small", "large"])
def test_norms_are_accurate_far_from_zero(name, args, side):
    """Variances by E[x²] - E[x]² would have no digit left here."""
    x = (300 + np.random.default_rng(0).standard_normal((2, side, side, 64))).astype(np.float32)
    found, expected = (getattr(ops, name)(td.tensor(x, dtype=dtype), *args).numpy() for dtype in ("float32", "float64"))
    np.testing.assert_allclose(found, expected, atol=3e-4)


# The trilinear form of convolution: what three kernels must share, with no differences taken.


@pytest.mark.parametrize("case", [(*c[:2], c[-1]) for c in LARGE["conv2d"]])
def test_convolutions_three_directions_are_adjoint(case):
    x, w, params = case
    stride, padding = params.get("stride", 1), params["padding"]
    y = ops.conv2d(td.from_numpy(x), td.from_numpy(w), None, stride, padding).numpy()
    gy = np.random.default_rng(5).standard_normal(y.shape).astype(np.float32)
    dx = ops.conv2d_input_grad(gy, w, x.shape[1:3], stride, padding).numpy()
    dw = ops.conv2d_weight_grad(x, gy, w.shape[:2], stride, padding).numpy()
    wide = [a.astype(np.float64) for a in (x, w, y, gy, dx, dw)]
    form = np.vdot(wide[3], wide[2])
    scale = np.linalg.norm(wide[3]) * np.linalg.norm(wide[2])
    assert abs(form - np.vdot(wide[0], wide[4])) < 1e-5 * scale
    assert abs(form - np.vdot(wide[1], wide[5])) < 1e-5 * scale


# Dtypes.


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "maximum", "minimum", "pow"])
@pytest.mark.parametrize(
    "left, right, wanted",
    [
        ("float32", "float32", "float32"),
        ("float32", "int64", "float32"),
        ("uint8", "float32", "float32"),
        ("float32", "float64", "float64"),
        ("bool", "float64", "float64"),
    ],
)
def test_floats_beat_integers_whatever_their_size(name, left, right, wanted):
    x, y = td.tensor([1, 1], dtype=left), td.tensor([1, 1], dtype=right)
    for a, b in ((x, y), (y, x)):
        assert getattr(ops, name)(a, b).dtype == wanted


@pytest.mark.parametrize("number", [2, 2.0, True, np.float64(2), np.float32(2), np.int64(2), np.array(2.0).item()])
def test_scalars_are_weak(number):
    for dtype in ("float32", "float64"):
        x = td.tensor([1.0, 2.0], dtype=dtype)
        for result in (x + number, number + x, x * number, number - x, x / number, number / x, x**number, ops.maximum(x, number)):
            assert isinstance(result, td.Tensor)
            assert result.dtype == dtype


def test_integers_stay_integers_until_a_float_comes():
    i = td.tensor([1, 2, 3])
    assert (i + 1).dtype == np.int64
    assert (i * td.tensor([1, 2, 3], dtype="int32")).dtype == np.int64
    assert (td.tensor([1], dtype="uint8") + 1).dtype == np.uint8
    assert (i + 1.5).dtype == np.float32
    assert (i / 2).dtype == np.float32
    assert ops.exp(i).dtype == np.float32
    assert ops.sum(td.tensor([True, True])).item() == 2
    assert ops.mean(i).dtype == np.float32
    assert ops.matmul(i, i).dtype == np.float32
    assert (i > 1).dtype == bool
    assert ops.argmax(i).dtype == np.int64
    assert ops.clip(i, 0.5, 2.5).dtype == np.float32
    assert ops.clip(i, 1, 2).dtype == np.int64


def test_arrays_and_mixed_dtypes_where_a_parameter_stands_between_inputs():
    x = np.random.default_rng(0).standard_normal((2, 3, 4))
    expected = ops.group_norm(td.tensor(x), 2, td.tensor(np.arange(4.0))).numpy()
    assert np.array_equal(ops.group_norm(x, 2, np.arange(4.0)).numpy(), expected)
    assert ops.group_norm(td.tensor(x, dtype="float32"), 2, td.tensor(np.arange(4.0))).dtype == np.float64


def test_numbers_alone_are_float32_or_int64():
    assert ops.exp(1.0).dtype == np.float32
    assert ops.add(1.0, 2).dtype == np.float32
    assert ops.add(1, 2).dtype == np.int64
    assert ops.broadcast_to(2.0, (3,)).dtype == np.float32
    assert ops.where(np.array([True]), 1.0, 0.0).dtype == np.float32


def test_parameters_that_are_numpy_scalars_are_weak_too():
    x = td.tensor([[0.2, 0.7, -1.0, 2.0]])
    half = np.float64(0.5)
    assert ops.clip(x, -half, half).dtype == np.float32
    assert ops.pad(x, ((0, 0), (1, 1)), half).dtype == np.float32
    assert ops.layer_norm(x, eps=half).dtype == np.float32
    assert ops.group_norm(x, 2, eps=half).dtype == np.float32
    assert ops.dropout(x, half).dtype == np.float32
    q = td.tensor(np.ones((1, 1, 2, 2), np.float32))
    assert ops.scaled_dot_product_attention(q, q, q, scale=half).dtype == np.float32


# Conventions at kinks and ties, and other fine print.


def test_ties_share_the_gradient_equally():
    x = td.tensor([2.0, 2.0, 1.0], True)
    assert td.grad(x.max(), x).tolist() == [0.5, 0.5, 0.0]
    assert td.grad((-x).min(), x).tolist() == [-0.5, -0.5, 0.0]
    a, b = td.tensor(1.0, True), td.tensor(1.0, True)
    for function in (ops.maximum, ops.minimum):
        assert [g.item() for g in td.grad(function(a, b), [a, b])] == [0.5, 0.5]


def test_derivatives_at_kinks():
    zero = td.tensor([0.0], True)
    assert td.grad(ops.relu(zero), zero).item() == 0
    assert td.grad(ops.abs(zero), zero).item() == 0
    assert td.grad(ops.clip(zero, 0.0, 1.0), zero).item() == 1
    for exponent, slope in ((0, 0.0), (1, 1.0), (2, 0.0), (3, 0.0)):
        assert td.grad(zero**exponent, zero).item() == slope
        power = td.tensor([float(exponent)], True)
        found = td.grad(zero**power, [zero, power])
        assert [g.item() for g in found] == [slope, 0.0]


@pytest.mark.parametrize(
    "name", ["softmax", "log_softmax", "logsumexp", "softplus", "sigmoid", "silu", "gelu", "quick_gelu", "tanh"]
)
def test_nothing_overflows(name):
    with np.errstate(all="raise", under="ignore"):
        for scale in (1e2, 1e4):
            x = td.tensor(np.array([[-scale, 0.0, scale]]), True)
            args = () if name not in ("softmax", "log_softmax", "logsumexp") else (-1,)
            y = getattr(ops, name)(x, *args)
            assert np.isfinite(y.numpy()).all()
            assert np.isfinite(td.grad(y, x, np.ones(y.shape)).numpy()).all()


def test_infinities_in_logsumexp_and_softmax():
    x = td.tensor([[-np.inf, 0.0, 1.0]])
    np.testing.assert_allclose(ops.softmax(x).numpy(), [[0, 1 / (1 + math.e), math.e / (1 + math.e)]], rtol=1e-6)
    np.testing.assert_allclose(ops.logsumexp(x, -1).numpy(), [math.log(1 + math.e)], rtol=1e-6)
    assert ops.logsumexp(td.tensor([-np.inf, -np.inf])).item() == -np.inf
    assert ops.logsumexp(td.tensor([np.inf, 0.0])).item() == np.inf


def test_cross_entropy_and_bce_survive_sure_but_wrong_logits():
    assert ops.cross_entropy(td.tensor([[1000.0, 0.0]]), np.array([1])).item() == 1000
    assert ops.binary_cross_entropy_with_logits(td.tensor([1000.0]), td.tensor([0.0])).item() == 1000


def test_attention_row_with_nothing_to_attend_gives_zeros_and_no_nan():
    rng = np.random.default_rng(0)
    q, k, v = (td.tensor(rng.standard_normal((1, 1, 2, 3)), True) for _ in range(3))
    mask = np.array([[True, False], [False, False]])
    out = ops.scaled_dot_product_attention(q, k, v, mask)
    assert np.array_equal(out.numpy()[0, 0, 1], np.zeros(3))
    for gradient in td.grad(out, [q, k, v], rng.standard_normal(out.shape)):
        assert np.isfinite(gradient.numpy()).all()


def test_random_bits_are_the_published_ones():
    """SplitMix64's first numbers for the seed 1234567, as commonly listed to check an implementation by."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert random.bits(np, 5, 1234567).tolist() == expected == list(itertools.islice(splitmix64(1234567), 5))


def test_dropout_keeps_the_mean_and_the_seed_decides():
    x = td.tensor(np.ones(20_000, np.float32), True)
    y = ops.dropout(x, 0.25, rng=np.random.default_rng(0))
    kept = y.numpy() != 0
    assert abs(kept.mean() - 0.75) < 0.02
    np.testing.assert_allclose(y.numpy()[kept], 1 / 0.75, rtol=1e-6)
    np.testing.assert_allclose(td.grad(y.sum(), x).numpy(), y.numpy())
    td.manual_seed(3)
    first = ops.dropout(x, 0.5).numpy()
    td.manual_seed(3)
    assert np.array_equal(first, ops.dropout(x, 0.5).numpy())
    assert not np.array_equal(first, ops.dropout(x, 0.5).numpy())


def test_einsum_plans_do_not_mix_up_calls_of_other_counts():
    rng = np.random.default_rng(0)
    x, w = td.tensor(rng.standard_normal((2, 3)), True), td.tensor(rng.standard_normal((3, 2)), True)
    constant = td.tensor(rng.standard_normal((2, 2)))
    two = td.grad(ops.einsum("ij,jk->ik", x, w), [x, w], np.ones((2, 2)))
    three = td.grad(ops.einsum("ij,jk,kl->il", x, w, constant), [x, w], np.ones((2, 2)))
    again = td.grad(ops.einsum("ij,jk->ik", x, w), [x, w], np.ones((2, 2)))
    ones = np.ones((2, 2))
    np.testing.assert_allclose(three[0].numpy(), ones @ constant.numpy().T @ w.numpy().T)
    np.testing.assert_allclose(two[0].numpy(), ones @ w.numpy().T)
    assert np.array_equal(two[1].numpy(), again[1].numpy())


def test_methods_are_the_ops():
    x = td.tensor([[1.0, -2.0], [3.0, 4.0]])
    assert np.array_equal(x.exp().numpy(), ops.exp(x).numpy())
    assert x.sum(axis=0).tolist() == [4.0, 2.0]
    assert x.reshape(4).shape == (4,)
    assert x.T.tolist() == [[1.0, 3.0], [-2.0, 4.0]]
    with pytest.raises(AttributeError, match="no attribute 'wibble'"):
        _ = x.wibble


# Properties, on shapes and values that hypothesis draws.


@given(testing.broadcastable_shapes().flatmap(lambda shapes: st.tuples(*[testing.arrays(s) for s in shapes])))
def test_broadcasting_is_numpys_and_is_undone(pair):
    x, y = pair
    testing.check_op(ops.mul, x, y, reference=ORACLES["mul"])
    testing.check_op(ops.add, x, y, reference=ORACLES["add"])


@given(testing.arrays(testing.shapes(min_dims=1, max_dims=3), unique=True), st.data())
def test_reductions_over_any_axis(x, data):
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    for name in ("sum", "mean", "max", "logsumexp"):
        testing.check_op(getattr(ops, name), x, reference=ORACLES[name], axis=axis)
    for name in ("softmax", "cumsum"):
        testing.check_op(getattr(ops, name), x, reference=ORACLES[name], axis=axis)


@given(st.data())
def test_convolution_of_any_geometry(data):
    kernel = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    size = data.draw(st.tuples(st.integers(3, 5), st.integers(3, 5)))
    channels, filters = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    stride = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = data.draw(st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2)) for _ in range(2)]))
    x = data.draw(testing.arrays((1, *size, channels)))
    w = data.draw(testing.arrays((*kernel, channels, filters)))

    def convolve(x, w):
        return ops.conv2d(x, w, None, stride, padding)

    testing.check_op(convolve, x, w, reference=lambda x, w: ORACLES["conv2d"](x, w, None, stride, padding), second=False)


@given(testing.arrays(testing.shapes(min_dims=1, max_dims=3, max_side=5)), st.data())
def test_slices_of_any_kind(x, data):
    from hypothesis.extra import numpy as hnp

    index = data.draw(hnp.basic_indices(x.shape, allow_newaxis=True))
    index = index if isinstance(index, tuple) else (index,)
    assert np.array_equal(ops.getitem(td.from_numpy(np.array(x)), index).numpy(), np.array(x)[index])
    td.gradcheck(lambda t: t[index], np.array(x))


# Errors: one line that names the op and the values.

T = td.tensor


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: T([1.0, 2.0]) + T([1.0, 2.0, 3.0]), ValueError, r"add\(float32\[2\], float32\[3\]\)"),
        (lambda: ops.matmul(T([[1.0]]), T([[1.0], [2.0]])), ValueError, r"matmul\(float32\[1, 1\], float32\[2, 1\]\)"),
        (lambda: ops.reshape(T([1.0, 2.0]), 3), ValueError, r"reshape\(float32\[2\], shape=\(3,\)\)"),
        (lambda: ops.sum(T([1.0]), axis=1), IndexError, "axis 1 is out of range for a tensor of 1 axes"),
        (lambda: ops.sum(T([[1.0]]), axis=(0, -2)), ValueError, "names one axis twice"),
        (lambda: ops.softmax(T([1.0]), 1), IndexError, "axis 1"),
        (lambda: ops.cumsum(T([1.0]), 1), IndexError, "axis 1"),
        (lambda: ops.take(T([[1.0]]), np.array([0]), axis=2), IndexError, "axis 2"),
        (lambda: ops.gather(T([[1.0]]), 2, np.array([[0]])), IndexError, "axis 2"),
        (lambda: ops.scatter_add(T([[1.0]]), -3, np.array([[0]]), T([[1.0]])), IndexError, "axis -3"),
        (lambda: ops.split(T([1.0]), 1, axis=1), IndexError, "axis 1"),
        (lambda: ops.squeeze(T([[1.0]]), 2), IndexError, "axis 2"),
        (lambda: ops.unsqueeze(T([1.0]), 3), IndexError, "axis 3"),
        (lambda: ops.transpose(T([1.0]), 0, 1), IndexError, "axis 1"),
        (lambda: ops.flip(T([1.0]), 1), (IndexError, ValueError), "axis 1"),
        (lambda: ops.concat([T([1.0]), T([1.0])], 1), (IndexError, ValueError), "axis 1"),
        (lambda: ops.mean(T(np.zeros((0, 2)))), ValueError, r"no elements \(shape \(0, 2\)"),
        (lambda: ops.var(T([1.0]), correction=1), ValueError, "correction=1"),
        (lambda: ops.max(T(np.zeros((0,)))), ValueError, "max"),
        (lambda: ops.take(T([1.0]), np.array([1])), IndexError, "index 1 is out of range for 1 entries"),
        (lambda: ops.take(T([1.0]), np.array([0.5])), TypeError, "indices must be integers"),
        (lambda: ops.embedding(np.array([5]), T([[1.0]])), IndexError, "embedding: index 5"),
        (lambda: ops.gather(T([[1.0]]), 0, np.array([[3]])), IndexError, "gather: index 3"),
        (lambda: ops.where(T([1.0]), T([1.0]), T([1.0])), TypeError, "boolean condition"),
        (lambda: ops.concat([]), ValueError, "empty list"),
        (lambda: ops.concat([T([[1.0]]), T([1.0])]), ValueError, r"\(1, 1\), \(1,\)"),
        (lambda: ops.stack([T([1.0]), T([1.0, 2.0])]), ValueError, "one shape"),
        (lambda: ops.split(T([1.0, 2.0]), [1, 2]), ValueError, "add up to 3"),
        (lambda: ops.split(T([1.0]), 0), ValueError, "at least 1"),
        (lambda: ops.pad(T([1.0]), ((1, -1),)), ValueError, "non-negative"),
        (lambda: ops.permute(T([[1.0]]), 0, 0), ValueError, r"\(0, 0\)"),
        (lambda: ops.repeat(T([[1.0]]), 2), ValueError, "1 numbers for 2 axes"),
        (lambda: ops.einsum("ij,jk->ik", T([[1.0]])), ValueError, "2 operands, not 1"),
        (lambda: ops.einsum("ii->i", T([[1.0]])), ValueError, "each letter once"),
        (lambda: ops.einsum("ij->ik", T([[1.0]])), ValueError, "output 'ik'"),
        (lambda: ops.linear(T([[1.0, 2.0]]), T([[1.0]])), ValueError, r"weight must be \(2, out\)"),
        (lambda: ops.mse_loss(T([1.0]), T([1.0, 2.0])), ValueError, r"\(1,\), target \(2,\)"),
        (lambda: ops.cross_entropy(T(np.zeros((0, 3))), np.zeros(0, int)), ValueError, "empty batch"),
        (lambda: ops.cross_entropy(T([[1.0, 2.0]]), np.array([2])), IndexError, "class 2"),
        (lambda: ops.cross_entropy(T([[1.0, 2.0]]), np.array([0, 1])), ValueError, r"must have shape \(1,\)"),
        (lambda: ops.gelu(T([1.0]), "fast"), ValueError, "'fast'"),
        (lambda: ops.gelu(T(np.zeros((100, 100), np.float32)), "fast"), ValueError, "'fast'"),
        (lambda: ops.dropout(T([1.0]), 1.0), ValueError, r"\[0, 1\), not 1.0"),
        (lambda: ops.activate(T([1.0]), "swish"), ValueError, "unknown activation 'swish'"),
        (lambda: -T([True]), TypeError, "neg"),
        (lambda: ops.exp(T([1.0]), T([1.0])), TypeError, r"exp\(\) takes 1 positional argument but 2 were given"),
        (lambda: ops.exp(T([1.0]), base=2), TypeError, "'base'"),
        (lambda: ops.exp("one"), TypeError, "exp"),
        (lambda: ops.exp(), TypeError, "missing 1 required positional argument: 'x'"),
        (lambda: ops.exp(None), TypeError, "exp.* not None"),
        (lambda: ops.upsample_nearest2d(T([1.0])), ValueError, "upsample_nearest2d"),
        (lambda: ops.clip(T([1.0]), T([0.0])), TypeError, "must be a number or None, not Tensor"),
    ],
)
def test_bad_calls_are_named(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("side", [2, 64], ids=["small", "large"])
def test_bad_shapes_are_named_at_sizes_with_kernels_too(side):
    x = td.tensor(np.zeros((2, side, side, 8), np.float32))
    w = td.tensor(np.zeros((3, 3, 4, 8), np.float32))
    wrong = td.tensor(np.zeros(7, np.float32))
    with pytest.raises(ValueError, match=r"must be \(KH, KW, 8, O\), not \(3, 3, 4, 8\)"):
        ops.conv2d(x, w)
    with pytest.raises(ValueError, match="bias"):
        ops.conv2d(x, td.tensor(np.zeros((1, 1, 8, 3), np.float32)), wrong)
    with pytest.raises(ValueError, match="residual"):
        ops.conv2d(x, td.tensor(np.zeros((1, 1, 8, 3), np.float32)), None, 1, 0, x)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        ops.conv2d(x, td.tensor(np.zeros((1, 1, 8, 3), np.float32)), None, 0)
    with pytest.raises(ValueError, match="larger than the padded input"):
        ops.conv2d(x, td.tensor(np.zeros((99, 1, 8, 3), np.float32)))
    with pytest.raises(ValueError, match="must divide the 8 channels"):
        ops.group_norm(x, 3)
    with pytest.raises(ValueError, match=r"weight must have shape \(8,\)"):
        ops.group_norm(x, 2, wrong)
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        ops.group_norm(x, 2, activation="swish")
    with pytest.raises(ValueError, match=r"weight must have shape \(8,\)"):
        ops.layer_norm(x, wrong)
    with pytest.raises(ValueError, match="attention needs"):
        ops.scaled_dot_product_attention(x, x, wrong)
    with pytest.raises(ValueError, match="attention needs"):
        ops.scaled_dot_product_attention(x, wrong, wrong)
    with pytest.raises(ValueError, match="attention with 3 heads needs"):
        ops.scaled_dot_product_attention(*[x.reshape(2, side, side * 8)] * 3, heads=3)
    with pytest.raises(TypeError, match="mask must be boolean"):
        ops.scaled_dot_product_attention(x, x, x, mask=np.ones((side, side)))
    with pytest.raises(ValueError, match="matmul"):
        ops.matmul(x, x.reshape(2, side, 2, side * 4))
    with pytest.raises(IndexError, match="axis 4"):
        ops.softmax(x, 4)


def test_negative_classes_are_not_counted_from_the_end():
    with pytest.raises(IndexError, match="class -1 is out of range for 3 classes"):
        ops.cross_entropy(td.tensor(np.zeros((2, 3))), np.array([-1, 0]))
    with pytest.raises(IndexError, match="index -1 is out of range for 4 entries"):
        ops.embedding(np.array([-1]), td.tensor(np.zeros((4, 2))))


def test_numbers_and_lists_where_tensors_belong_are_converted_or_refused_in_words():
    x = td.tensor(np.ones((2, 2)))
    assert ops.mse_loss(td.tensor(3.0), 1.0).item() == 4.0
    for call in (lambda: x @ 2.0, lambda: ops.linear(x, 3.0), lambda: ops.conv2d([[1.0]], x)):
        with pytest.raises((ValueError, TypeError), match=r"matmul|linear|conv2d"):
            call()
