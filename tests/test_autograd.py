"""The tape: order, memory, errors, checkpoints, higher derivatives."""

import gc
import threading
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinydiff as td
from tinydiff import ops, testing
from tinydiff.op import REGISTRY


def leaf(*shape, seed=0, dtype=np.float64):
    return td.tensor(np.random.default_rng(seed).standard_normal(shape), True, dtype)


@pytest.fixture
def no_collector():
    """Memory that is freed in here is freed by reference counts alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# backward and grad.


def test_backward_accumulates_into_leaves():
    x = td.tensor([1.0, 2.0], True)
    (x * x).sum().backward()
    assert x.grad.tolist() == [2, 4]
    (x * 3.0).sum().backward()
    assert x.grad.tolist() == [5, 7]
    assert not x.grad.requires_grad


def test_a_tensor_used_twice_gets_both_gradients():
    x = td.tensor(3.0, True)
    y = x * x
    z = y * y + y
    assert td.grad(z, x).item() == 4 * 27 + 6


@pytest.mark.parametrize("last", ["conv", "norm", "both"])
def test_kernels_add_to_a_gradient_that_is_there(last):
    """Where an input's gradient meets one that came another way: kernels (float32) against definitions (float64)."""
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(shape) for shape in [(2, 16, 16, 32), (3, 3, 32, 32), (32,), (32,)]]

    def gradients(dtype):
        x, w, bias, scale = leaves = [td.tensor(v.astype(dtype), requires_grad=True) for v in values]
        h = x * 1.5
        conv, norm = ops.conv2d(h, w, bias, padding=1), ops.group_norm(h, 4, scale, bias, activation="silu")
        y = {"conv": conv + h, "norm": norm * h, "both": ops.group_norm(conv, 4) + norm + ops.sigmoid(h)}[last]
        with td.profile() as profile:
            (y * y.detach()).sum().backward()
        return [leaf.grad.numpy() for leaf in leaves if leaf.grad is not None], profile

    (found, profile), (expected, _) = gradients(np.float32), gradients(np.float64)
    assert len(found) == len(expected) >= 3
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max())
    additions = [row for row in profile.rows if row.op == "add" and row.bytes > 10 * values[0].size]
    assert not additions  # of arrays of x's size


def test_backward_of_several_results_adds_them():
    x = td.tensor([1.0, 2.0], True)
    td.autograd.backward([x * 2.0, (x * x).sum()], [np.array([1.0, 10.0], np.float32), None])
    assert x.grad.tolist() == [2 + 2, 20 + 4]


def test_gradients_of_broadcast_inputs_have_their_shapes():
    a, b, c = leaf(3, 1), leaf(1, 4), leaf()
    for gradient, tensor in zip(td.grad((a * b + c).sum(), [a, b, c]), (a, b, c)):
        assert gradient.shape == tensor.shape
    np.testing.assert_allclose(td.grad((a * b + c).sum(), c).item(), 12)
    np.testing.assert_allclose(td.grad(a * b, a, np.ones((3, 4))).numpy(), np.full((3, 1), b.numpy().sum()))


def test_grad_leaves_grad_untouched_and_takes_results_as_inputs():
    x = leaf(3)
    y = x * 2.0
    z = (y * y).sum()
    by_y, by_x = td.grad(z, [y, x])
    np.testing.assert_allclose(by_y.numpy(), 2 * y.numpy())
    np.testing.assert_allclose(by_x.numpy(), 4 * y.numpy())
    assert x.grad is None
    again = x * 2.0
    assert td.grad(again, again, np.ones(3)).tolist() == [1, 1, 1]


def test_grad_gives_zeros_for_what_does_not_matter():
    x, other = leaf(2), leaf(3)
    found = td.grad(x.sum(), [x, other])
    assert found[1].tolist() == [0, 0, 0]
    assert found[1].dtype == other.dtype


def test_grad_does_only_the_work_that_was_asked_for():
    x, w = leaf(1, 4, 4, 2), leaf(3, 3, 2, 2, seed=1)
    y = ops.conv2d(x, w, padding=1).sum()
    with testing.recorded_calls() as calls:
        td.grad(y, x, retain_graph=True)
    names = {call[0].name for call in calls}
    assert "conv2d_input_grad" in names
    assert "conv2d_weight_grad" not in names
    frozen = td.tensor(x.numpy())
    y = ops.conv2d(frozen, w, padding=1).sum()
    with testing.recorded_calls() as calls:
        y.backward()
    names = {call[0].name for call in calls}
    assert "conv2d_input_grad" not in names
    assert "conv2d_weight_grad" in names


def test_grad_skips_branches_that_do_not_lead_to_the_input():
    x, other = leaf(2), leaf(2, seed=1)
    z = (x * other.exp().sin()).sum()
    with testing.recorded_calls() as calls:
        td.grad(z, x)
    assert "cos" not in {call[0].name for call in calls}


def test_order_is_the_same_every_time():
    def run():
        xs = [leaf(3, seed=i) for i in range(5)]
        total = sum((a * b).sin() for a in xs for b in xs).sum()
        with testing.recorded_calls() as calls:
            total.backward()
        return [call[0].name for call in calls], [x.grad.tolist() for x in xs]

    assert run() == run()


def test_a_gradient_given_as_an_array_is_not_kept():
    x = td.tensor([1.0, 2.0], True)
    given = np.ones(2, np.float32)
    (x + 0.0).backward(given)
    given[:] = 7
    assert x.grad.tolist() == [1, 1]


def test_cotangents_are_checked():
    x = leaf(2)
    with pytest.raises(RuntimeError, match=r"backward from shape \(2,\) needs a gradient"):
        (x * 2.0).backward()
    with pytest.raises(ValueError, match=r"shape \(2,\) can't have shape \(3,\)"):
        (x * 2.0).backward(np.ones(3))
    with pytest.raises(ValueError, match="2 outputs need as many gradients, not 1"):
        td.grad([x * 2.0, x * 3.0], x, [np.ones(2)])
    with pytest.raises(RuntimeError, match="does not depend on anything with requires_grad=True"):
        td.tensor([1.0]).backward()
    with pytest.raises(RuntimeError, match="input 1 of grad"):
        td.grad(x.sum(), [x, td.tensor(1.0)])
    assert td.grad(x * 2.0, x, np.ones(2, np.float32)).dtype == np.float64


# Long chains and memory.


def test_a_chain_of_100_000_ops_goes_backward(no_collector):
    x = td.tensor(1.0, True)
    y = x
    for _ in range(100_000):
        y = y + 1.0
    y.backward()
    assert x.grad.item() == 1


def test_a_long_chain_that_never_went_backward_is_freed(no_collector):
    x = td.tensor(1.0, True)
    y = x
    for _ in range(100_000):
        y = y * 1.0
    node = weakref.ref(y)
    del y
    assert node() is None


@pytest.mark.parametrize("backward", [False, True])
def test_graphs_die_by_reference_counts(no_collector, backward):
    x, w = leaf(2, 4, 4, 4), leaf(3, 3, 4, 4, seed=1)
    hidden = ops.conv2d(x, w, padding=1)
    normed = ops.group_norm(hidden, 2, activation="silu")
    pieces = normed.split(2, axis=-1)
    loss = (ops.softmax(pieces[0].exp()) * pieces[1].max(axis=-1, keepdims=True)).mean()
    watched = [weakref.ref(t) for t in (hidden, normed, *pieces, loss)] + [weakref.ref(hidden.data)]
    if backward:
        loss.backward()
    del hidden, normed, pieces, loss
    assert not any(ref() is not None for ref in watched)


def test_gradients_of_gradients_die_by_reference_counts(no_collector):
    x = leaf(3)
    y = (x.sin() * x).sum()
    first = td.grad(y, x, create_graph=True)
    second = td.grad(first.sum(), x)
    watched = [weakref.ref(t) for t in (y, first, second)]
    del y, first, second
    assert not any(ref() is not None for ref in watched)


def test_backward_lets_go_of_what_was_saved(no_collector):
    x = leaf(3)
    hidden = x.exp()
    y = (hidden * hidden).sum()
    array = weakref.ref(hidden.data)
    del hidden
    assert array() is not None
    y.backward()
    assert array() is None


def test_only_what_backward_reads_is_saved(no_collector):
    x = leaf(3)
    hidden = x * 2.0
    array = weakref.ref(hidden.data)
    y = hidden + 1.0
    del hidden
    assert array() is None
    y.sum().backward()


def test_a_graph_that_raised_in_backward_is_freed(no_collector):
    def fails(gradient):
        raise ZeroDivisionError

    x = leaf(2)
    y = x.exp()
    y.register_hook(fails)
    watched = weakref.ref(y)
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()
    del y
    assert watched() is None
    assert td.is_grad_enabled()


# Using a graph again.


def test_a_second_backward_names_retain_graph_and_the_line():
    x = leaf(2)
    y = x.exp().sum()
    y.backward()
    with pytest.raises(RuntimeError, match=r"(?s)released by an earlier backward; pass retain_graph=True") as raised:
        y.backward()
    assert __file__ in str(raised.value)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        td.grad(y, x)


def test_a_released_graph_is_not_taken_for_an_unrelated_one():
    x = leaf(2)
    y = x.exp()
    y.sum().backward()
    with pytest.raises(RuntimeError, match="released"):
        td.grad((y * 2.0).sum(), x)


def test_retain_graph():
    x = td.tensor(2.0, True)
    y = x * x
    y.backward(retain_graph=True)
    y.backward()
    assert x.grad.item() == 8


def test_a_value_changed_after_it_was_saved_raises():
    w, x = td.tensor([1.0, 2.0], True), td.tensor([3.0, 4.0], True)
    y = (w * x).sum()
    with td.no_grad():
        w.assign_(np.zeros(2))
    with pytest.raises(RuntimeError, match=r"mul \(called at .*test_autograd.py:\d+\) saved for backward was changed by assign_"):
        y.backward()


@pytest.mark.parametrize("view", [lambda w: w[1:], lambda w: w.reshape(2, 1)[:, 0], lambda w: w.T, lambda w: w.detach()])
def test_a_view_of_a_changed_value_raises_too(view):
    w, x = td.tensor([1.0, 2.0, 3.0, 4.0], True), None
    w = td.tensor([1.0, 2.0], True)
    seen = view(w)
    x = td.tensor(np.ones(seen.shape, np.float32), True)
    y = (seen * x).sum()
    with td.no_grad():
        w.assign_(np.zeros(2))
    with pytest.raises(RuntimeError, match="changed by assign_"):
        y.backward()


def test_a_change_that_nothing_saved_is_harmless():
    w, x = td.tensor([1.0, 2.0], True), td.tensor([3.0, 4.0], True)
    y = (w + x).sum()
    with td.no_grad():
        w.assign_(np.zeros(2))
    y.backward()
    assert w.grad.tolist() == [1, 1]


def test_gradients_are_right_after_the_forward_pass_is_run_again():
    w = td.tensor([1.0, 2.0], True)
    for _ in range(3):
        loss = (w * w).sum()
        w.grad = None
        loss.backward()
        with td.no_grad():
            w.assign_(w - 0.25 * w.grad)
    np.testing.assert_allclose(w.numpy(), np.array([1, 2]) / 8)


# Recording on and off.


def test_no_grad_as_block_and_as_decorator():
    x = leaf(2)
    with td.no_grad():
        assert not (x * 2.0).requires_grad
        with td.enable_grad():
            assert (x * 2.0).requires_grad
        assert not td.is_grad_enabled()

    @td.no_grad()
    def double(t):
        return t * 2.0

    assert not double(x).requires_grad
    assert not double(x).requires_grad
    assert (x * 2.0).requires_grad
    with pytest.raises(ZeroDivisionError), td.no_grad():
        raise ZeroDivisionError
    assert td.is_grad_enabled()


def test_recording_is_a_threads_own_matter():
    seen = []
    with td.no_grad():
        thread = threading.Thread(target=lambda: seen.append((leaf(2) * 2.0).requires_grad))
        thread.start()
        thread.join()
    assert seen == [True]


def test_threads_go_backward_side_by_side():
    w = leaf(8, 8)
    found = {}

    def work(k):
        x = leaf(8, seed=k)
        for _ in range(20):
            found[k] = td.grad((w @ x).tanh().sum(), x).numpy()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(4):
        x = leaf(8, seed=k)
        np.testing.assert_array_equal(found[k], td.grad((w @ x).tanh().sum(), x).numpy())


def test_constants_leave_no_tape():
    x = td.tensor([1.0])
    assert (x * 2.0).node is None
    assert (leaf(2) > 0.0).node is None
    assert not ops.argmax(leaf(2)).requires_grad


# Hooks.


def test_hooks_see_and_replace_gradients():
    x = leaf(2)
    y = x * 3.0
    seen = []
    y.register_hook(lambda g: seen.append(g.tolist()))
    y.register_hook(lambda g: g * 10.0)
    x.register_hook(lambda g: g + 1.0)
    (y * 2.0).sum().backward()
    assert seen == [[2, 2]]
    assert x.grad.tolist() == [61, 61]

    y = x * 3.0
    remove = y.register_hook(lambda g: seen.append(g.tolist()))
    remove()
    y.sum().backward()
    assert len(seen) == 1


def test_a_leafs_hook_runs_once_on_the_whole_gradient():
    x = td.tensor(2.0, True)
    seen = []
    x.register_hook(lambda g: seen.append(g.item()))
    (x * x + x * 3.0).backward()
    assert seen == [7]


def test_a_hook_must_keep_the_shape():
    x = leaf(2)
    x.register_hook(lambda g: g.sum())
    with pytest.raises(ValueError, match=r"a hook returned shape \(\) for a gradient of shape \(2,\)"):
        x.sum().backward()
    with pytest.raises(RuntimeError, match="no gradient flows"):
        td.tensor(1.0).register_hook(print)


def test_retain_grad(no_collector):
    x = leaf(2)
    y = (x * 2.0).retain_grad()
    (y * 5.0).sum().backward()
    assert y.grad.tolist() == [5, 5]
    assert x.grad.tolist() == [10, 10]
    watched = weakref.ref(y)
    del y
    assert watched() is None


# Higher derivatives and products.


def test_third_derivative_of_sine():
    x = td.tensor(np.array(0.7), True)
    y = x.sin()
    for wanted in (np.cos(0.7), -np.sin(0.7), -np.cos(0.7), np.sin(0.7)):
        y = td.grad(y, x, create_graph=True)
        np.testing.assert_allclose(y.item(), wanted, rtol=1e-12)


@pytest.mark.parametrize(
    "function, derivatives",
    [
        (lambda x: x**4, lambda v: [4 * v**3, 12 * v**2, 24 * v]),
        (lambda x: x.exp() * x, lambda v: [(v + k) * np.exp(v) for k in (1, 2, 3)]),
        (lambda x: 1.0 / x, lambda v: [-(v**-2), 2 * v**-3, -6 * v**-4]),
        (lambda x: x.log(), lambda v: [1 / v, -1 / v**2, 2 / v**3]),
        (lambda x: x.sqrt(), lambda v: [0.5 * v**-0.5, -0.25 * v**-1.5, 0.375 * v**-2.5]),
        (lambda x: ops.softplus(x), lambda v: _softplus(v)),
    ],
)
def test_three_derivatives_in_closed_form(function, derivatives):
    values = np.array([0.3, 0.9, 1.7])
    x = td.tensor(values, True)
    y = function(x)
    for wanted in derivatives(values):
        y = td.grad(y, x, np.ones(3), create_graph=True)
        np.testing.assert_allclose(y.numpy(), wanted, rtol=1e-10)


def _softplus(v):
    s = 1 / (1 + np.exp(-v))
    return [s, s * (1 - s), s * (1 - s) * (1 - 2 * s)]


def test_backward_with_create_graph():
    x = td.tensor(np.array(2.0), True)
    (x**3).backward(create_graph=True)
    first = x.grad
    assert first.item() == 12
    assert td.grad(first, x).item() == 12
    x.grad = None


def test_products_with_jacobian_and_hessian():
    rng = np.random.default_rng(0)
    a, x, u = rng.standard_normal((3, 3)), rng.standard_normal(3), rng.standard_normal(3)
    form = lambda t: (t @ td.tensor(a) @ t).sum()  # noqa: E731
    value, product = td.hvp(form, td.tensor(x), u)
    np.testing.assert_allclose(value.item(), x @ a @ x)
    np.testing.assert_allclose(product.numpy(), (a + a.T) @ u)
    function = lambda t: (td.tensor(a) @ t).sin()  # noqa: E731
    jacobian = np.cos(a @ x)[:, None] * a
    np.testing.assert_allclose(td.jvp(function, td.tensor(x), u)[1].numpy(), jacobian @ u)
    np.testing.assert_allclose(td.vjp(function, td.tensor(x), u)[1].numpy(), u @ jacobian)


def test_products_with_several_inputs():
    x, y = leaf(2), leaf(2, seed=1)
    u, v = np.array([1.0, 2.0]), np.array([-1.0, 0.5])
    function = lambda a, b: a * b + a  # noqa: E731
    np.testing.assert_allclose(td.jvp(function, [x, y], [u, v])[1].numpy(), u * (y.numpy() + 1) + v * x.numpy())
    by_x, by_y = td.vjp(function, [x, y], u)[1]
    np.testing.assert_allclose(by_x.numpy(), u * (y.numpy() + 1))
    np.testing.assert_allclose(by_y.numpy(), u * x.numpy())
    by_x, by_y = td.hvp(lambda a, b: (a * a * b).sum(), [x, y], [u, v])[1]
    np.testing.assert_allclose(by_x.numpy(), 2 * y.numpy() * u + 2 * x.numpy() * v)
    np.testing.assert_allclose(by_y.numpy(), 2 * x.numpy() * u)


def test_products_of_linear_functions():
    x = leaf(3)
    assert td.hvp(lambda t: t.sum(), x, np.ones(3))[1].tolist() == [0, 0, 0]
    assert td.jvp(lambda t: t * 2.0, x, np.ones(3))[1].tolist() == [2, 2, 2]
    with td.no_grad():
        assert td.jvp(lambda t: t * t, x, np.ones(3))[1].shape == (3,)
    with pytest.raises(ValueError, match="1 tensors need as many vectors, not 2"):
        td.jvp(lambda t: t, x, [np.ones(3), np.ones(3)])


@pytest.mark.parametrize("name", ["group_norm", "silu", "gelu", "layer_norm"])
def test_second_derivatives_when_a_kernel_ran_first(name):
    """The kernel's cached statistics are no constants: the second derivative must see through them."""
    function = {
        "group_norm": lambda t: ops.group_norm(t, 2, activation="silu"),
        "silu": ops.silu,
        "gelu": ops.gelu,
        "layer_norm": ops.layer_norm,
    }[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 32, 32, 4)).astype(np.float32)
    u, v = rng.standard_normal(x.shape), rng.standard_normal(x.shape)

    def second(dtype):
        t = td.tensor(x, True, dtype)
        first = td.grad(function(t), t, u, create_graph=True)
        return td.grad(first, t, v).numpy()

    with testing.recorded_calls() as calls:
        found = second(np.float32)
    assert (name, "numpy") in {(call[0].name, call.who) for call in calls}
    with testing.definition_only(*[op for op in REGISTRY.values() if op.kernels]):
        expected = second(np.float64)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


# Checkpoints.


def block(x, w):
    hidden = (x @ w).tanh()
    return (hidden * hidden.exp()) @ w


def gradients(function, *inputs):
    out = function(*inputs)
    return [out.numpy(), *[g.numpy() for g in td.grad((out * out).sum(), list(inputs))]]


def test_a_checkpoint_changes_no_gradient():
    x, w = leaf(3, 4), leaf(4, 4, seed=1)
    plain = gradients(block, x, w)
    for function in (
        lambda x, w: td.checkpoint(block, x, w),
        lambda x, w: td.checkpoint(lambda x: block(x, w), x),  # the weight in the closure
        lambda x, w: td.checkpoint(lambda x, w: td.checkpoint(block, x, w), x, w),
        lambda x, w: td.checkpoint(block, x, w=w),
    ):
        for found, wanted in zip(gradients(function, x, w), plain, strict=True):
            assert np.array_equal(found, wanted)


def test_checkpoints_in_a_row_and_nested_with_work_around_them():
    x, w = leaf(3, 4), leaf(4, 4, seed=1)

    def inner(x):
        return block(x, w).sin()

    def plain(x, w):
        return inner(inner(x).exp()) + x

    def kept(x, w):
        outer = td.checkpoint(lambda t: td.checkpoint(inner, t.exp()), td.checkpoint(inner, x))
        return outer + x

    for found, wanted in zip(gradients(kept, x, w), gradients(plain, x, w), strict=True):
        assert np.array_equal(found, wanted)


def test_backward_through_a_checkpoint_fills_grad():
    x, w = leaf(3, 4), leaf(4, 4, seed=1)
    td.checkpoint(lambda t: block(t, w), x).sum().backward()
    assert np.array_equal(w.grad.numpy(), td.grad(block(x, w).sum(), w).numpy())


def test_dropout_in_a_checkpoint_draws_the_same_mask_twice():
    x = leaf(1000)
    td.manual_seed(1)
    y = td.checkpoint(lambda t: ops.dropout(t * 1.0, 0.5) * 3.0, x)
    between = ops.dropout(x, 0.5).numpy()
    gradient = td.grad(y.sum(), x).numpy()
    after = ops.dropout(x, 0.5).numpy()
    assert np.array_equal(gradient != 0, y.numpy() != 0)
    td.manual_seed(1)
    ops.dropout(x, 0.5)
    assert np.array_equal(between, ops.dropout(x, 0.5).numpy())
    assert np.array_equal(after, ops.dropout(x, 0.5).numpy()), "backward must not rewind the generator"


def test_dropout_with_a_generator_of_its_own_in_a_checkpoint_too():
    x, rng = leaf(1000), np.random.default_rng(1)
    y = td.checkpoint(lambda t: ops.dropout(ops.dropout(t * 1.0, 0.5, rng=rng), 0.2, rng=rng) * 3.0, x)
    between = rng.bit_generator.state
    gradient = td.grad(y.sum(), x).numpy()
    assert np.array_equal(gradient != 0, y.numpy() != 0)
    assert rng.bit_generator.state == between, "backward must not rewind the generator"


def test_second_derivatives_through_a_checkpoint():
    x, w = leaf(3, 4), leaf(4, 4, seed=1)
    assert td.gradgradcheck(lambda x, w: td.checkpoint(block, x, w), [x, w])

    def penalty(function):
        first = td.grad(function(x, w).sum(), x, create_graph=True)
        return td.grad((first * first).sum(), w).numpy()

    np.testing.assert_allclose(penalty(lambda x, w: td.checkpoint(block, x, w)), penalty(block), rtol=1e-12)


def test_a_checkpoint_keeps_only_its_inputs_and_outputs(no_collector):
    x = leaf(50, 50)
    arrays = []

    def chain(t):
        for _ in range(5):
            t = (t * 0.5 - 1.0).exp()
            arrays.append(weakref.ref(t.data))
        return t

    y = td.checkpoint(chain, x)
    assert [ref() is not None for ref in arrays] == [False] * 4 + [True]
    arrays.clear()
    y.sum().backward()
    del y
    assert len(arrays) == 5, "run once more, and only once"
    assert not any(ref() is not None for ref in arrays)
    arrays.clear()
    kept = chain(x)
    assert kept.requires_grad and all(ref() is not None for ref in arrays)


def test_retain_graph_through_a_checkpoint():
    x = leaf(3)
    y = td.checkpoint(lambda t: (t * t).sin(), x).sum()
    first = td.grad(y, x, retain_graph=True).numpy()
    assert np.array_equal(td.grad(y, x).numpy(), first)
    with pytest.raises(RuntimeError, match="retain_graph"):
        td.grad(y, x)


def test_a_checkpoint_notices_values_changed_since():
    w, x = td.tensor([2.0], True), td.tensor([3.0], True)
    y = td.checkpoint(lambda t: (t * w).sin(), x)
    with td.no_grad():
        w.assign_(np.array([5.0]))
    with pytest.raises(RuntimeError, match="changed by assign_"):
        y.backward()


def test_a_checkpoint_notices_work_that_differs():
    x, runs = leaf(3), []

    def fickle(t):
        runs.append(1)
        return t.sin() if len(runs) == 1 else t.sin().sin()

    y = td.checkpoint(fickle, x)
    with pytest.raises(RuntimeError, match="recorded 1 ops first and 2 when run again"):
        y.sum().backward()


def test_a_checkpoint_under_no_grad_is_a_plain_call():
    with td.no_grad():
        assert not td.checkpoint(lambda t: t * 2.0, leaf(2)).requires_grad


def test_an_error_in_a_checkpoint_leaves_recording_as_it_was():
    x = leaf(2)
    with pytest.raises(ZeroDivisionError):
        td.checkpoint(lambda t: 1 / 0, x)
    arrays = weakref.ref((hidden := x.exp()).data)
    y = hidden * hidden
    del hidden
    assert arrays() is not None, "recorded outside of any checkpoint"
    y.sum().backward()


# Programs that hypothesis writes.

STEPS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b.tanh(),
    "sin": lambda a, b: (a + b).sin(),
    "softmax": lambda a, b: ops.softmax(a) * b,
    "silu": lambda a, b: ops.silu(a) - b,
    "norm": lambda a, b: ops.layer_norm(a, b, None, 0.1),
    "slice": lambda a, b: ops.concat([a[1:], b[:1]]),
    "outer": lambda a, b: (a.reshape(3, 1) * b).mean(axis=0),
    "same": lambda a, b: a,
}


@given(st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_any_program_has_right_derivatives_checkpointed_or_not(steps):
    def program(a, b):
        pool = [a, b, a * b]
        for name, i, j in steps:
            pool.append(STEPS[name](pool[i % len(pool)], pool[j % len(pool)]))
        return pool[-1] + pool[0]

    inputs = [leaf(3), leaf(3, seed=1)]
    td.gradcheck(program, inputs, atol=1e-5)
    td.gradgradcheck(program, inputs, atol=1e-5)
    plain = td.grad(program(*inputs), inputs, np.arange(3.0))
    again = td.grad(td.checkpoint(program, *inputs), inputs, np.arange(3.0))
    assert [g.tolist() for g in again] == [g.tolist() for g in plain]


# Where an error was made.


def test_errors_in_backward_name_the_line_of_the_forward_call():
    x = td.tensor([2.0], True)
    y = x.exp() * x
    y.backward()
    with pytest.raises(RuntimeError) as raised:
        y.backward()
    with open(__file__) as source:
        line = next(n for n, text in enumerate(source, 1) if "y = x.exp() * x" in text and "text" not in text)
    assert f"mul (called at {__file__}:{line})" in str(raised.value)


def test_errors_in_forward_name_op_shapes_and_dtypes():
    with pytest.raises(ValueError, match=r"mul\(float32\[2\], float64\[3\]\)|mul\(float64\[2\], float64\[3\]\)"):
        td.tensor([1.0, 2.0]) * td.tensor(np.ones(3))


def test_rules_that_read_what_is_not_there_are_refused_at_once():
    from tinydiff.backend import Array

    @td.op(name="_test_rule")
    def identity(xp, x: Array):
        return x + 0

    try:
        with pytest.raises(TypeError, match="reads y, which is no input or parameter"):
            identity.vjp(lambda g, y: g)
        with pytest.raises(TypeError, match="has no input 'y'; its inputs are x"):
            identity.vjp("y")(lambda g: g)
    finally:
        del REGISTRY["_test_rule"]


def test_an_op_may_call_its_inputs_as_it_likes():
    from tinydiff.backend import Array

    @td.op(name="_test_names")
    def _(xp, run: Array, numpy: Array, bits: Array = None, *, function=2.0):
        return run * numpy * function if bits is None else run * numpy * function + bits

    del REGISTRY["_test_names"]
    assert _(leaf(2), 3.0).shape == (2,)
    assert _(td.tensor([1.0]), td.tensor([3.0]), function=4).item() == 12
    assert _(1, numpy=2, bits=td.tensor([1.0])).item() == 5
    with pytest.raises(TypeError, match=r"_test_names\(\) missing 1 required positional argument: 'numpy'"):
        _(1.0)


def test_products_with_the_jacobian_of_a_function_that_ignores_its_input_are_zero():
    x, v = td.tensor([1.0, 2.0]), td.tensor([1.0, 1.0])
    constant = td.tensor(3.0)
    assert td.vjp(lambda x: constant, x, td.tensor(1.0))[1].tolist() == [0.0, 0.0]
    assert td.jvp(lambda x: constant, x, v)[1].item() == 0.0
    assert td.hvp(lambda x: constant, x, v)[1].tolist() == [0.0, 0.0]


def test_retaining_a_gradient_twice_keeps_it_once():
    x = td.tensor(2.0, requires_grad=True)
    y = x * 3.0
    y.retain_grad().retain_grad()
    (y * 5.0).backward()
    assert y.grad.item() == 5.0


def test_a_gradient_that_stops_before_a_released_graph_needs_none_of_it():
    x = td.tensor(2.0, requires_grad=True)
    y = x.exp()
    y.backward()
    assert td.grad(y * 3.0, y).item() == 3.0
