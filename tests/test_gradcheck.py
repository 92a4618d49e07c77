"""The checkers themselves: each must catch the mistake it is for, and say where it is."""

import math
import subprocess
import sys

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinydiff as td
from tinydiff import ops, testing
from tinydiff.backend import Array
from tinydiff.gradcheck import GradcheckError, worst_errors
from tinydiff.op import REGISTRY
from tinydiff.samples import SAMPLES


@pytest.fixture
def made():
    """A function that makes an op for one test."""
    names = []

    def make(definition, **options):
        made = td.op(definition, name=f"_made_{len(names)}", **options)
        names.append(made.op.name)
        return made

    yield make
    for name in names:
        del REGISTRY[name]


def values(*shape):
    return np.random.default_rng(0).standard_normal(shape)


# gradcheck.


def test_right_derivatives_pass():
    assert td.gradcheck(lambda x, y: x.sin() @ y, [values(2, 3), values(3, 2)])
    assert td.gradgradcheck(lambda x, y: x.sin() @ y, [values(2, 3), values(3, 2)])
    assert td.gradcheck(lambda x: x.split(2), values(4))
    assert td.gradgradcheck(ops.exp, td.tensor(values(3), True), np.array([1.0, -2.0, 0.5]))
    assert td.gradcheck(ops.tanh, values(20, 20)), "larger inputs go along drawn directions"
    assert td.gradgradcheck(ops.tanh, values(20, 20))
    assert td.gradcheck(lambda x, y: x * y, [values(2), td.tensor(values(2))]), "the second is a constant"


def test_a_wrong_derivative_is_found_and_named(made):
    @made
    def cube(xp, x: Array):
        return x**3

    cube.vjp(lambda g, x: g * x * x * 2.0)
    x = np.array([0.0, 2.0])
    cube_at_one = lambda t: cube(t)[1]  # noqa: E731
    with pytest.raises(GradcheckError, match=r"input 0 at \(1,\): numerical .*, analytic"):
        td.gradcheck(cube, x)
    assert not td.gradcheck(cube_at_one, x, raise_exception=False)
    with pytest.raises(GradcheckError, match=r"input 1 at \(\): numerical"):
        td.gradcheck(lambda a, b: a * 2.0 + cube(b), [values(), np.array(2.0)])
    with pytest.raises(GradcheckError, match="along drawn direction 0"):
        td.gradcheck(cube, values(100))


def test_a_wrong_second_derivative_is_found(made):
    @made
    def square(xp, x: Array):
        return x * x

    square.vjp(lambda g, x: g * td.Tensor(2 * x.data))  # right, but the tape can't see that it depends on x
    assert td.gradcheck(square, values(3))
    with pytest.raises(GradcheckError, match=r"input 0 at \(0,\): numerical"):
        td.gradgradcheck(square, values(3))


def test_a_gradient_that_ignores_its_cotangent_is_found(made):
    @made
    def double(xp, x: Array):
        return 2 * x

    double.vjp(lambda g, x: td.Tensor(np.full(x.shape, 2.0)))
    with pytest.raises(GradcheckError):
        td.gradcheck(double, values(3))


def test_cotangents_are_drawn_not_all_ones(made):
    @made
    def softmax(xp, x: Array):
        return xp.exp(x) / xp.exp(x).sum()

    softmax.vjp(lambda g, x: x * 0.0)  # right for a cotangent of ones
    with pytest.raises(GradcheckError):
        td.gradcheck(softmax, values(30))


def test_a_gradient_of_another_shape_or_dtype_is_found(made):
    @made
    def first(xp, x: Array):
        return x[:1]

    first.vjp(lambda g, x: ops.astype(ops.broadcast_to(g, x.shape), "float32"))
    with pytest.raises(GradcheckError, match=r"the gradient of input 0 is float32\[3\], not float64\[3\]"):
        td.gradcheck(first, values(3))


def test_a_missing_gradient_is_found(made):
    product = lambda x: x * x.detach()  # noqa: E731
    with pytest.raises(GradcheckError, match="numerical"):
        td.gradcheck(product, values(3))
    with pytest.raises(GradcheckError, match="no result depends on an input"):
        td.gradcheck(lambda x: x.detach() * 2.0, values(3))
    with pytest.raises(GradcheckError, match="numerical"):
        td.gradcheck(lambda x: [x * 2.0, x.detach()], values(3))


def test_nan_is_no_agreement():
    with np.errstate(all="ignore"):
        assert not td.gradcheck(ops.log, np.array([-1.0, 1.0]), raise_exception=False)


def test_kinks_are_called_kinks():
    with pytest.raises(GradcheckError, match=r"a kink or jump there \(slopes -?0 and"):
        td.gradcheck(ops.relu, np.array([1.0, 0.0]))


def test_what_can_not_be_checked_is_refused():
    with pytest.raises(TypeError, match="input 0 is float32, too coarse for differences; convert it to float64"):
        td.gradcheck(ops.exp, values(2).astype(np.float32))
    with pytest.raises(TypeError, match="returned float32"):
        td.gradcheck(lambda x: x.astype("float32"), values(2))
    with pytest.raises(ValueError, match="no input has requires_grad=True"):
        td.gradcheck(ops.exp, td.tensor(values(2)))
    with pytest.raises(TypeError, match="must return tensors, not ndarray"):
        td.gradcheck(lambda x: x.numpy(), values(2))
    with pytest.raises(GradcheckError, match="two results for the same inputs"):
        td.gradcheck(lambda x: ops.dropout(x, 0.5), values(20))


def test_inputs_stay_as_they_were():
    x = td.tensor(values(3), True)
    before = x.numpy().copy()
    td.gradgradcheck(ops.exp, x)
    assert np.array_equal(x.numpy(), before)
    assert x.grad is None
    array = values(3)
    td.gradcheck(ops.exp, array)
    array[0] = 1.0  # not frozen


@pytest.mark.parametrize("name", ["exp", "conv2d", "group_norm", "argmax"])
def test_worst_errors_of_an_op(name):
    first, second = worst_errors(name)
    if name == "argmax":
        assert math.isnan(first) and math.isnan(second)
    else:
        assert 0 < first < 1e-7 and 0 <= second < 1e-6


def test_worst_errors_shows_what_is_wrong(made):
    from tinydiff.samples import Sample

    @made
    def cube(xp, x: Array):
        return x**3

    cube.vjp(lambda g, x: g * x * x * 2.0)
    SAMPLES[cube.op.name] = [Sample(cube, (np.array([1.0, 2.0]),), {}, True)]
    try:
        first, second = worst_errors(cube.op.name)
        assert first > 0.1
        assert second > 0.1 or second < 1e-6
    finally:
        del SAMPLES[cube.op.name]
    with pytest.raises(ValueError, match="unknown op 'sofmax': did you mean 'softmax'"):
        worst_errors("sofmax")


# Strategies.


@given(testing.arrays(unique=True))
def test_drawn_arrays_have_the_values_and_shapes_promised(x):
    assert x.dtype == np.float64
    assert len(np.unique(x)) == x.size
    assert (np.abs(x) <= 3).all()


@given(testing.arrays(testing.shapes(min_side=0), np.float32))
def test_drawn_values_are_exact_in_float32_and_off_the_whole_numbers(x):
    assert x.dtype == np.float32
    assert np.array_equal(x * 16, np.round(x * 16))
    assert (x != np.round(x)).all()


def test_layouts_vary_and_keep_the_values():
    seen = set()

    @given(testing.layouts(np.arange(24.0).reshape(2, 3, 4)))
    def draw(x):
        assert np.array_equal(x, np.arange(24.0).reshape(2, 3, 4))
        seen.add(x.strides)

    draw()
    assert len(seen) > 5


@given(testing.broadcastable_shapes(3))
def test_drawn_shapes_broadcast(shapes):
    np.broadcast_shapes(*shapes)


@given(st.just((3, 2)).flatmap(testing.cotangents))
def test_cotangents_are_uneven(g):
    assert len(np.unique(g)) == 6


def test_without_hypothesis_the_error_says_what_to_install():
    code = "import sys; sys.modules['hypothesis'] = None; import tinydiff; import tinydiff.testing"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "pip install 'tinydiff[test]'" in result.stderr.strip().splitlines()[-1]


# check_op, on ops with a mistake each.


def test_check_op_passes_what_is_right(made):
    testing.check_op(ops.softmax, values(2, 3), axis=0)
    testing.check_op(ops.group_norm, values(2, 3, 4), num_groups=2)
    testing.check_op(lambda x, w: (x @ w).tanh(), values(2, 3), values(3, 2))
    testing.check_op(ops.argmax, values(3))
    testing.check_op(ops.embedding, np.array([0, 2]), values(3, 2))


def mistaken(made, definition, rule=lambda g: g * 1.0, **options):
    wrong = made(definition, **options)
    wrong.vjp(rule)
    return wrong


def test_check_op_finds_wrong_values(made):
    def identity(xp, x: Array):
        return x + 0

    with pytest.raises(AssertionError, match="differs from the reference"):
        testing.check_op(mistaken(made, identity), values(3), reference=lambda x: x + 1)


def test_check_op_finds_a_changed_input(made):
    def greedy(xp, x: Array):
        x[...] = 0
        return x + 0

    with pytest.raises(AssertionError, match="changed its input"):
        testing.check_op(mistaken(made, greedy), values(3))


def test_check_op_finds_shared_memory(made):
    def same(xp, x: Array):
        return x

    with pytest.raises(AssertionError, match="returns memory of its input; declare view=True"):
        testing.check_op(mistaken(made, same), values(3))
    testing.check_op(mistaken(made, same, view=True), values(3))


def test_check_op_finds_a_leak_to_float64(made):
    def leaky(xp, x: Array):
        return x * np.float64(1.0)

    with pytest.raises(AssertionError, match="of float32 gives float64"):
        testing.check_op(mistaken(made, leaky), values(3))


def test_check_op_finds_what_depends_on_the_layout(made):
    def flat(xp, x: Array):
        return x.ravel(order="K").reshape(x.shape) + 0

    with pytest.raises(AssertionError, match="its own result"):
        testing.check_op(mistaken(made, flat), values(3, 2).T)


def test_check_op_finds_wrong_kernels(made):
    def double(xp, x: Array):
        return 2 * x

    wrong = mistaken(made, double, lambda g: g * 2.0)
    wrong.kernel("numpy", above=1 << 20)(lambda x: 3 * x)
    with pytest.raises(AssertionError, match="the definition's result in float64, from its kernel"):
        testing.check_op(wrong, values(3))
    wrong = mistaken(made, double, lambda g: g * 2.0)
    wrong.kernel("numpy", above=1 << 20)(lambda x: 2 * x)
    wrong.kernel_backward("numpy")(lambda g: 3 * g)
    with pytest.raises(AssertionError, match="the definition's gradient 0"):
        testing.check_op(wrong, values(3))


def test_a_fused_op_of_ones_own_with_a_kernel_that_caches():
    @td.fused(name="_made_fused")
    def normed(x: td.Tensor, eps: float = 1e-3):
        centred = x - ops.mean(x, -1, keepdims=True)
        return centred * ops.rsqrt(ops.mean(centred * centred, -1, keepdims=True) + eps)

    @normed.kernel("numpy", above=1 << 20)
    def _(x, eps):
        centred = x - x.mean(-1, keepdims=True)
        scale = 1 / np.sqrt((centred * centred).mean(-1, keepdims=True) + x.dtype.type(eps))
        return centred * scale, scale

    @normed.kernel_backward("numpy")
    def _(g, out, cache):
        return cache * (g - g.mean(-1, keepdims=True) - out * (g * out).mean(-1, keepdims=True))

    try:
        testing.check_op(normed, values(3, 5))
        with testing.kernels_always(normed):
            assert td.gradcheck(normed, values(3, 5))
            assert td.gradgradcheck(normed, values(3, 5)), "the cached scale is no constant"
    finally:
        del REGISTRY["_made_fused"]


# The README's example: an op of one's own, with a gradient and a Numba kernel.


@td.op
def mish(xp, x: Array):
    """x · tanh(log(1 + eˣ)) (Misra 2019)."""
    return x * xp.tanh(xp.logaddexp(x, 0))


@mish.vjp
def _(g, x):  # in tensor ops, so the second derivative follows
    t = ops.tanh(ops.softplus(x))
    return g * (t + x * (1.0 - t * t) * ops.sigmoid(x))


@numba.njit
def mish_loop(x, out):
    for i in range(x.size):
        out[i] = x[i] * math.tanh(math.log1p(math.exp(x[i])))


@mish.kernel("numpy", above=4096)  # smaller arrays go to the definition
def _(x):
    if not x.flags.c_contiguous:
        return NotImplemented  # and so does what the kernel can't take
    out = np.empty_like(x)
    mish_loop(x.reshape(-1), out.reshape(-1))
    return out


@given(testing.arrays())
def test_mish(x):
    testing.check_op(mish, x)


def test_mish_runs_its_kernel_from_the_size_it_names():
    for side, who in ((8, "definition"), (80, "numpy")):
        with testing.recorded_calls() as calls:
            mish(td.tensor(values(side, side)))
        assert [call.who for call in calls] == [who]
