"""Tensors as values: how they are made, printed, indexed, compared, shared and protected."""

import copy
import math
import operator
import subprocess
import sys

import numpy as np
import pytest

import tinydiff as td
from tinydiff import ops

# Made from, and turned into.


@pytest.mark.parametrize(
    "value, dtype",
    [
        (1.5, "float32"),
        ([1.0, 2], "float32"),
        (3, "int64"),
        ([[1, 2]], "int64"),
        (True, "bool"),
        ([True, False], "bool"),
        (np.float64(1), "float64"),
        (np.zeros(2), "float64"),
        (np.zeros(2, np.float32), "float32"),
        (np.zeros(2, np.int32), "int32"),
        (np.zeros(2, np.uint8), "uint8"),
        ([], "float32"),
    ],
)
def test_dtype_of_a_new_tensor(value, dtype):
    assert td.tensor(value).dtype == dtype
    assert td.tensor(value, dtype="float64").dtype == np.float64


@pytest.mark.parametrize(
    "value, dtype, message",
    [
        (np.zeros(2, np.float16), None, "float16"),
        (np.zeros(2, np.int16), None, "int16"),
        (np.zeros(2, np.complex64), None, "complex64"),
        ("text", None, "a tensor can't hold dtype <U4"),
        ([None], None, "object"),
        ([1.0], "float16", "dtype 'float16' is not one a tensor can have; use one of float32"),
        ([1.0], "wibble", "'wibble'"),
    ],
)
def test_dtypes_that_tensors_do_not_have(value, dtype, message):
    with pytest.raises(TypeError, match=message) as raised:
        td.tensor(value, dtype=dtype)
    assert "\n" not in str(raised.value)


def test_ragged_lists_are_refused():
    with pytest.raises(ValueError):
        td.tensor([[1.0], [1.0, 2.0]])


def test_tensor_copies():
    array = np.zeros(3)
    t = td.tensor(array)
    array[0] = 1
    assert t.tolist() == [0, 0, 0]
    other = td.tensor(t)
    assert not np.shares_memory(other.numpy(), t.numpy())


def test_from_numpy_shares_and_freezes():
    array = np.zeros(3)
    t = td.from_numpy(array)
    assert np.shares_memory(t.numpy(), array)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(TypeError, match=r"needs a numpy.ndarray, not list; use tinydiff.tensor"):
        td.from_numpy([1.0])
    with pytest.raises(TypeError, match="int16"):
        td.from_numpy(np.zeros(2, np.int16))


def test_numpy_is_a_read_only_view():
    t = td.tensor([1.0, 2.0])
    view = t.numpy()
    assert np.shares_memory(view, t.data)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 5
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(t)[0] = 5
    mine = np.array(t)
    mine[0] = 5
    assert t.tolist() == [1, 2]


def test_no_item_assignment():
    with pytest.raises(TypeError, match="item assignment"):
        td.tensor([1.0])[0] = 2.0


def test_items():
    assert td.tensor([[2.5]]).item() == 2.5
    assert isinstance(td.tensor(1).item(), int)
    assert float(td.tensor(2)) == 2.0 and int(td.tensor(2.9)) == 2 and bool(td.tensor(False)) is False
    with pytest.raises(ValueError, match=r"one element; this one has shape \(2,\)"):
        td.tensor([1.0, 2.0]).item()
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        bool(td.tensor([1.0, 2.0]) == 1.0)


def test_shape_size_and_length():
    t = td.tensor(np.zeros((2, 0, 3)))
    assert (t.shape, t.size, t.ndim, len(t), t.device, t.is_leaf) == ((2, 0, 3), 0, 3, 2, "cpu", True)
    assert td.tensor(np.zeros((2, 3))).size == 6
    assert td.tensor(1.0).size == 1
    with pytest.raises(TypeError, match="no length"):
        len(td.tensor(1.0))


def test_iteration_over_the_first_axis():
    x = td.tensor([[1.0, 2.0], [3.0, 4.0]], True)
    first, second = x
    assert td.grad((first * second).sum(), x).tolist() == [[3, 4], [1, 2]]
    with pytest.raises(TypeError):
        list(td.tensor(1.0))


def test_repr_reads_well():
    assert repr(td.tensor([1.0, 2.0])) == "tensor([1., 2.], shape=(2,), float32)"
    assert "requires_grad=True" in repr(td.tensor(1.0, True))
    assert "made by exp" in repr(td.tensor([1.0], True).exp())
    assert len(repr(td.tensor(np.zeros((1000, 1000))))) < 500
    assert "shape=(0,)" in repr(td.tensor([]))


def test_devices():
    assert td.tensor([1.0], device="cpu").to("cpu").device == "cpu"
    with pytest.raises(ValueError, match="unknown device 'tpu'; use one of cpu, cuda"):
        td.tensor([1.0], device="tpu")


def test_only_floats_have_gradients():
    with pytest.raises(TypeError, match="only float32 and float64 tensors have gradients, not int64"):
        td.tensor([1, 2], requires_grad=True)
    with pytest.raises(RuntimeError, match="made by mul"):
        (td.tensor([1.0], True) * 2.0).requires_grad_()


def test_detach_and_astype():
    x = td.tensor([1.5, -2.5], True)
    assert not x.detach().requires_grad
    assert np.shares_memory(x.detach().numpy(), x.numpy())
    double = x.astype("float64")
    assert td.grad(double.sum(), x).dtype == np.float32
    assert x.astype("int64").tolist() == [1, -2]
    assert not x.astype("int64").requires_grad


def test_hashable_by_identity():
    a, b = td.tensor([1.0]), td.tensor([1.0])
    assert len({a, b, a}) == 2


def test_copies_are_of_use():
    t = td.tensor([1.0, 2.0])
    assert copy.copy(t).tolist() == [1, 2]
    assert copy.deepcopy(t).tolist() == [1, 2]


# assign_.


def test_assign_changes_values_in_place():
    w = td.tensor([1.0, 2.0], True)
    view = w.detach()
    with td.no_grad():
        assert w.assign_(np.array([3, 4])) is w
    assert w.tolist() == view.tolist() == [3, 4]
    assert w.dtype == np.float32


def test_assign_is_guarded():
    w = td.tensor([1.0, 2.0], True)
    with pytest.raises(RuntimeError, match=r"under tinydiff.no_grad\(\)"):
        w.assign_(np.zeros(2))
    with td.no_grad():
        with pytest.raises(ValueError, match=r"assign_ needs shape \(2,\), not \(3,\)"):
            w.assign_(np.zeros(3))
        with pytest.raises(RuntimeError, match="not for the result of an op"):
            (w * 2.0).assign_(np.zeros(2))
        with pytest.raises((RuntimeError, ValueError)):
            td.from_numpy(np.zeros(2)).assign_(np.ones(2))


# Indexing.


def test_indexing():
    array = np.arange(24.0).reshape(2, 3, 4)
    t = td.tensor(array)
    for index in (
        0,
        -1,
        (1, 2, 3),
        slice(1),
        (slice(None), 1),
        (..., 2),
        (None, 0),
        (0, ..., slice(None, None, -2)),
        slice(5, 9),
        (np.int64(1), slice(None)),
        (slice(np.int64(1), None),),
    ):
        assert np.array_equal(t[index].numpy(), array[index])
    assert t[td.tensor(1)].shape == (3, 4)
    assert np.array_equal(t[td.tensor([1, 0, 1])].numpy(), array[[1, 0, 1]])
    assert np.array_equal(t[np.array([[-1]])].numpy(), array[np.array([[-1]])])


@pytest.mark.parametrize(
    "index, error",
    [
        (2, IndexError),
        ((0, 3), IndexError),
        ((0, 0, 0, 0), IndexError),
        (np.array([2]), IndexError),
        (1.0, TypeError),
        ("a", TypeError),
        (True, TypeError),
        ((0, False), TypeError),
        (np.array([True, False]), TypeError),
        (np.True_, TypeError),
        (np.array(True), TypeError),
        ((0, np.array([1, 2])), TypeError),
        ([0, 1], TypeError),
        ((..., ...), IndexError),
        (slice(0.5), TypeError),
    ],
)
def test_bad_indices(index, error):
    t = td.tensor(np.zeros((2, 3, 4)))
    with pytest.raises(error) as raised:
        t[index]
    assert "\n" not in str(raised.value)


# Operators.


@pytest.mark.parametrize(
    "symbol", [operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.lt, operator.le, operator.eq]
)
def test_operators_with_tensors_numbers_and_arrays_on_either_side(symbol):
    a, b = np.array([1.0, 2.0, 3.0]), np.array([[2.0], [3.0]])
    for left, right in (
        (td.tensor(a), td.tensor(b)),
        (td.tensor(a), b),
        (a, td.tensor(b)),
        (td.tensor(a), 2),
        (2.0, td.tensor(b)),
    ):
        plain = [x.numpy() if isinstance(x, td.Tensor) else x for x in (left, right)]
        result = symbol(left, right)
        assert isinstance(result, td.Tensor)
        np.testing.assert_allclose(result.numpy(), symbol(*plain))


def test_operators_without_a_partner():
    t = td.tensor([-1.0, 2.0])
    assert (-t).tolist() == [1, -2]
    assert abs(t).tolist() == [1, 2]
    assert (np.eye(2, dtype=np.float32) @ t).tolist() == [-1, 2]
    assert (t @ np.eye(2, dtype=np.float32)).tolist() == [-1, 2]
    assert (t != 2.0).tolist() == [True, False]
    with pytest.raises(TypeError):
        t + "a"


def test_gradients_flow_through_operators_on_either_side():
    x = td.tensor([2.0], True)
    for result, slope in ((3.0 - x, -1), (3.0 / x, -0.75), (2.0**x, 4 * math.log(2)), (np.array([3.0]) * x, 3)):
        np.testing.assert_allclose(td.grad(result, x, np.ones(1)).item(), slope, rtol=1e-6)


def test_special_values_pass_through():
    t = td.tensor([np.nan, np.inf, -np.inf, -0.0])
    assert np.isnan((t + 1.0).numpy()[0])
    assert (t * 2.0).tolist()[1:3] == [np.inf, -np.inf]
    assert math.copysign(1, (t * 1.0).tolist()[3]) == -1
    assert np.isnan(ops.maximum(t, 0.0).numpy()[0])


# Sharing with others.


def test_dlpack_both_ways_with_numpy():
    t = td.tensor([1.0, 2.0])
    assert np.shares_memory(np.from_dlpack(t), t.numpy())
    array = np.arange(3.0)
    assert np.shares_memory(td.from_dlpack(array).numpy(), array)


def test_dlpack_both_ways_with_torch():
    torch = pytest.importorskip("torch")
    theirs = torch.arange(6.0).reshape(2, 3)
    ours = td.from_dlpack(theirs)
    assert ours.tolist() == theirs.tolist()
    theirs[0, 0] = 9
    assert ours.tolist()[0][0] == 9, "shared, not copied"
    back = torch.from_dlpack(td.tensor([[1.0, 2.0]]))
    assert back.tolist() == [[1, 2]]
    with pytest.raises(TypeError, match="float16"):
        td.from_dlpack(torch.zeros(2, dtype=torch.float16))


# Threads and loading.


def test_set_num_threads():
    before = td.get_num_threads()
    try:
        td.set_num_threads(1)
        assert td.get_num_threads() == 1
        with pytest.raises(ValueError, match=r"set_num_threads\(0\): use 1 to"):
            td.set_num_threads(0)
    finally:
        td.set_num_threads(before)


def test_importing_loads_no_compiler_and_no_plots():
    code = "import sys, tinydiff; print([m for m in ('numba', 'matplotlib', 'torch', 'hypothesis', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_small_work_loads_no_compiler():
    code = (
        "import sys, tinydiff as td; x = td.tensor([1.0], True); (x.silu() * x).sum().backward(); print('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_masks_combine_and_invert():
    x = td.tensor([-1.0, 0.5, 2.0])
    assert ((x > 0) & (x < 1)).tolist() == [False, True, False]
    assert ((x < 0) | (x > 1)).tolist() == [True, False, True]
    assert (~(x > 0)).tolist() == [True, False, False]


def test_sizes_and_axes_may_be_numpy_integers():
    x = td.tensor(np.arange(6.0).reshape(2, 3))
    three = np.int64(3)
    assert x.reshape(three, np.int64(2)).shape == (3, 2)
    assert x.sum(axis=np.int64(0)).tolist() == [3.0, 5.0, 7.0]
    assert [piece.shape for piece in x.split(np.int64(1))] == [(1, 3), (1, 3)]


def test_a_view_or_a_result_can_not_be_assigned():
    x = td.tensor(np.zeros((2, 3)))
    for made in (x.reshape(3, 2), x.T.reshape(6), x + 1):
        with td.no_grad(), pytest.raises(RuntimeError, match="not for the result of an op"):
            made.assign_(np.ones(made.shape))


def test_completion_knows_the_ops():
    assert {"exp", "conv2d", "softmax"} <= set(dir(td.tensor(1.0)))
