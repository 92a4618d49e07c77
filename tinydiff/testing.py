"""Property tests for ops of your own, with hypothesis: strategies for arrays, and one check of everything an op promises.

@given(testing.arrays())
def test_my_op(x):
    testing.check_op(my_op, x)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tinydiff.autograd import enable_grad, grad
from tinydiff.gradcheck import gradcheck, gradgradcheck
from tinydiff.op import OBSERVERS, Call, Kernel, Op
from tinydiff.tensor import Tensor

try:
    from hypothesis import strategies as st
    from hypothesis.extra import numpy as hnp
except ImportError as missing:
    raise ImportError("tinydiff.testing needs hypothesis; pip install 'tinydiff[test]'") from missing

# Strategies.


def shapes(min_dims: int = 0, max_dims: int = 4, min_side: int = 1, max_side: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes; `min_side=0` includes empty ones."""
    return hnp.array_shapes(min_dims=min_dims, max_dims=max_dims, min_side=min_side, max_side=max_side)


def broadcastable_shapes(
    count: int = 2, max_dims: int = 3, min_side: int = 1, max_side: int = 4
) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    """As many shapes as `count` that broadcast together."""
    drawn = hnp.mutually_broadcastable_shapes(num_shapes=count, max_dims=max_dims, min_side=min_side, max_side=max_side)
    return drawn.map(lambda found: found.input_shapes)


def values(low: float = -3.0, high: float = 3.0) -> st.SearchStrategy[float]:
    """Numbers in [low, high] of a grid of sixteenths, exact in float32 and never a whole number, so away from most kinks."""
    steps = st.integers(int(np.ceil(low * 8 - 0.5)), int(np.floor(high * 8 - 0.5)))
    return steps.map(lambda k: (k + 0.5) / 8)


@st.composite
def arrays(
    draw: st.DrawFn,
    shape: Any = None,
    dtype: Any = np.float64,
    *,
    low: float = -3.0,
    high: float = 3.0,
    unique: bool = False,
    strided: bool = True,
) -> np.ndarray:
    """Arrays of `values`, in any layout of memory.

    Args:
        shape: sizes, or a strategy for them; `shapes()` by default. dtype: of the result.
        low, high: the range of the values. unique: no two equal, so that `max` has no ties.
        strided: also arrays that are transposed, reversed or sliced out of larger ones.
    """
    sizes = draw(shapes() if shape is None else shape if isinstance(shape, st.SearchStrategy) else st.just(shape))
    if unique:
        count = int(np.prod(sizes))
        steps = np.random.default_rng(draw(st.integers(0, 2**16))).permutation(count)
        array = (low + (high - low) * (steps + 0.5) / max(count, 1)).reshape(sizes).astype(dtype)
    else:
        array = draw(hnp.arrays(np.float64, sizes, elements=values(low, high), fill=st.nothing())).astype(dtype)
    return draw(layouts(array)) if strided else array


@st.composite
def layouts(draw: st.DrawFn, array: np.ndarray) -> np.ndarray:
    """The same values, laid out in memory another way."""
    order = draw(st.permutations(range(array.ndim)))
    steps = [draw(st.sampled_from([1, 1, 2, -1, -2])) for _ in range(array.ndim)]
    room = np.full(
        [array.shape[axis] * abs(steps[axis]) for axis in order], np.nan if array.dtype.kind == "f" else 1, array.dtype
    )
    everything: tuple[Any, ...] = (..., *[slice(None, None, step) for step in steps])
    view = room.transpose(np.argsort(order))[everything]
    view[...] = array
    return view


def cotangents(shape: tuple[int, ...], dtype: Any = np.float64) -> st.SearchStrategy[np.ndarray]:
    """Gradients of a result of `shape`: never all equal by design, which would hide errors in softmax and the norms."""
    return arrays(shape, dtype, low=-2, high=2, unique=True)


# Switching kernels.


@contextmanager
def definition_only(*ops: Any) -> Iterator[None]:
    """Run the definitions of `ops`, without their kernels, inside the block."""
    with _kernels({_op(f): {} for f in ops}):
        yield


@contextmanager
def kernels_always(*ops: Any) -> Iterator[None]:
    """Ask the kernels of `ops` inside the block at any size; they may still decline."""
    with _kernels({_op(f): {name: [_always(k) for k in kernels] for name, kernels in _op(f).kernels.items()} for f in ops}):
        yield


def _op(function: Any) -> Op[Any]:
    return function if isinstance(function, Op) else function.op


def _always(kernel: Kernel) -> Kernel:
    asked = copy.copy(kernel)
    asked.above = 0
    return asked


@contextmanager
def _kernels(by_op: dict[Op[Any], dict[str, list[Kernel]]]) -> Iterator[None]:
    before = {op: (op.kernels, op.smallest) for op in by_op}
    try:
        for op, kernels in by_op.items():
            op.kernels, op.smallest = kernels, 0
            op._plans.clear()  # what is saved depends on the kernels
        yield
    finally:
        for op, found in before.items():
            op.kernels, op.smallest = found
            op._plans.clear()


@contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """The list of the computations that run inside the block: which op, and who ran it."""
    calls: list[Call] = []
    OBSERVERS.append(calls.append)
    try:
        yield calls
    finally:
        OBSERVERS.remove(calls.append)


# One check of everything.


def check_op(
    fn: Callable[..., Any],
    *inputs: Any,
    reference: Callable[..., Any] | None = None,
    second: bool = True,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    **params: Any,
) -> None:
    """Check an op, or any function of tensors, at `inputs`; raises AssertionError or GradcheckError with what is wrong.

    The results: equal to `reference(*arrays, **params)` if given; the same for inputs laid out otherwise in memory; in
    float32 of that dtype and equal to `rtol` and `atol`; sharing no memory with the inputs (views excepted), which stay
    as they were. The derivatives: against differences, the second ones too if `second`. The op's kernels, if it has
    some: run at this size whatever their `above` says, forward and backward equal to the definition.

    Args:
        fn: called as fn(*tensors, **params), giving a tensor. inputs: float arrays to differentiate by; others are passed on.
    """
    op = getattr(fn, "op", fn)
    inputs = tuple(x.numpy() if isinstance(x, Tensor) else x for x in inputs)
    places = [i for i, x in enumerate(inputs) if isinstance(x, np.ndarray) and x.dtype.kind == "f"]

    def call(*floats: Any) -> Tensor:
        given = list(inputs)
        for place, value in zip(places, floats):
            given[place] = value
        return fn(*given, **params)

    originals = [inputs[i] for i in places]
    exact = [np.array(x, np.float64, order="C") for x in originals]
    expected = call(*[Tensor(x.copy()) for x in exact])
    if reference is not None:
        _assert_close(fn, "the reference", expected.numpy(), np.asarray(reference(*inputs, **params)), 1e-7, 1e-9)
    for dtype, relative, absolute in ((np.float64, 1e-9, 1e-11), (np.float32, rtol, atol)):
        laid_out = [_like(x, e.astype(dtype)) for x, e in zip(originals, exact)]
        result = call(*map(Tensor, laid_out))
        if expected.dtype.kind == "f":
            assert result.dtype == dtype, f"{_name(fn)} of {np.dtype(dtype)} gives {result.dtype}"
        for x, e in zip(laid_out, exact):
            assert np.array_equal(x, e.astype(dtype), equal_nan=True), f"{_name(fn)} changed its input"
            if not (isinstance(op, Op) and op.view):
                assert not np.shares_memory(result.numpy(), x), f"{_name(fn)} returns memory of its input; declare view=True"
        what = f"its own result in float64, from {np.dtype(dtype)}"
        _assert_close(fn, what, result.numpy(), expected.numpy(), relative, absolute)
    if _gradients(call, exact) is None:
        return
    gradcheck(call, exact)
    if second:
        gradgradcheck(call, exact)
    if isinstance(op, Op) and op.kernels:
        for dtype, relative, absolute in ((np.float64, 1e-9, 1e-11), (np.float32, rtol, atol)):
            given = [x.astype(dtype) for x in exact]
            with definition_only(op):
                wanted = _gradients(call, given)
            with kernels_always(op):
                found = _gradients(call, given)
            assert wanted is not None and found is not None, f"{_name(fn)} has gradients only with or only without its kernels"
            for label, a, b in zip(["result", *[f"gradient {i}" for i in places]], found, wanted):
                _assert_close(fn, f"the definition's {label} in {np.dtype(dtype)}, from its kernel", a, b, relative, absolute)


def _name(fn: Any) -> str:
    return getattr(fn, "__name__", repr(fn))


def _like(original: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` with the memory layout of `original`."""
    if original.flags.c_contiguous:
        return values
    axes = np.argsort([-abs(s) for s in original.strides], kind="stable")
    wide = np.repeat(values.transpose(axes), 2, axis=-1)[..., ::2] if values.ndim else values
    return wide.transpose(np.argsort(axes))


def _gradients(call: Callable[..., Tensor], arrays: list[np.ndarray]) -> list[np.ndarray] | None:
    """The result and its gradients for one fixed cotangent; None where there are none."""
    leaves = [Tensor(x, requires_grad=True) for x in arrays]
    with enable_grad():
        result = call(*leaves)
    if not result.requires_grad:
        return None
    cotangent = np.random.default_rng(0).standard_normal(result.shape).astype(result.dtype)
    return [result.numpy(), *[g.numpy() for g in grad(result, leaves, cotangent)]]


def _assert_close(fn: Any, what: str, found: np.ndarray, expected: np.ndarray, rtol: float, atol: float) -> None:
    assert found.shape == expected.shape, f"{_name(fn)} has shape {found.shape}, but {what} has {expected.shape}"
    np.testing.assert_allclose(found, expected, rtol, atol, err_msg=f"{_name(fn)} differs from {what}")
