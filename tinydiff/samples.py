"""A few calls of every op at points where it has derivatives: what `gradcheck` goes through, and the tests start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tinydiff import ops
from tinydiff.op import REGISTRY
from tinydiff.tensor import Tensor

SAMPLES: dict[str, list[Sample]] = {}
"""By op name, as in `tinydiff.ops` and `tinydiff.op.REGISTRY`."""

_rng = np.random.default_rng(2024)


class Sample:
    """One call `function(*args, **params)`; its float arrays are what it is differentiated by.

    Called with as many tensors as it has `arrays`, it makes the call with those in their place.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], params: dict[str, Any], differentiable: bool) -> None:
        self.function, self.args, self.params, self.differentiable = function, args, params, differentiable

    @property
    def arrays(self) -> list[np.ndarray]:
        """The float64 arrays among the arguments, in order."""
        return [a for arg in self.args for a in (arg if isinstance(arg, list) else [arg]) if _is_float(a)]

    def __call__(self, *values: Any) -> Any:
        return self.function(*self.bind(values), **self.params)

    def bind(self, values: Any) -> list[Any]:
        """The arguments with `values` in the place of the float arrays."""
        rest: Iterator[Any] = iter(values)
        put = lambda arg: next(rest) if _is_float(arg) else arg  # noqa: E731
        return [[put(a) for a in arg] if isinstance(arg, list) else put(arg) for arg in self.args]

    def __repr__(self) -> str:
        shown = [f"{a.dtype}{list(a.shape)}" if isinstance(a, np.ndarray) else repr(a) for a in self.bind(self.arrays)]
        return ", ".join(shown + [f"{k}={v!r}" for k, v in self.params.items()])


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def register(name: str, *args: Any, differentiable: bool = True, **params: Any) -> None:
    """Add a sample of the op called `name`."""
    function = getattr(ops, name, None) or REGISTRY[name]
    args = tuple(np.asarray(a) if isinstance(a, np.floating) else a for a in args)
    SAMPLES.setdefault(name, []).append(Sample(function, args, params, differentiable))


def normal(*shape: int) -> np.ndarray:
    """Standard normal float64: never near a kink or a tie, since the seed is fixed."""
    return _rng.standard_normal(shape)


def positive(*shape: int) -> np.ndarray:
    """Uniform in [0.5, 2]."""
    return _rng.uniform(0.5, 2, shape)


def _elementwise() -> None:
    for name in ("exp", "expm1", "sin", "cos", "erf", "tanh", "sigmoid", "relu", "silu", "gelu", "quick_gelu", "softplus"):
        for shape in ((3, 4), (), (0, 3)):
            register(name, 1.5 * normal(*shape))
    register("gelu", normal(3, 4), "tanh")
    for sizes in ((2, 3, 6), (2,), (0, 4), (3, 0)):
        register("geglu", normal(*sizes))
    for name in ("abs", "neg", "sum", "alias"):
        register(name, normal(2, 3))
    for name in ("log", "log1p", "sqrt", "rsqrt"):
        for shape in ((3, 4), (), (0, 3)):
            register(name, positive(*shape))
    register("log1p", -0.4 * positive(3))
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((2, 3), (2, 3)), ((2, 1, 3), (4, 1)), ((), (3,)), ((0, 3), (1, 3))]
    for name in ("add", "sub", "mul", "maximum", "minimum", "div", "pow"):
        side = positive if name in ("div", "pow") else normal
        for left, right in shapes:
            register(name, positive(*left) if name == "pow" else normal(*left), side(*right))
        register(name, side(3), 1.75)
        register(name, 1.75, side(3))
    for exponent in (0, 1, 2, 3, -1, 0.5, -1.5):
        register("pow", positive(4), exponent)
    register("pow", normal(4), 3)
    register("pow", np.array([0.0, 0.7, 1.3]), 2)
    register("pow", positive(4), np.array([0.0, 1.0, 2.0, -1.0]))
    register("add", normal(3), normal(3))
    register("sign", normal(3, 4), differentiable=False)
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        register(name, np.array([1.0, 2.0, 3.0]), np.array([[1.0], [2.5]]), differentiable=False)
        register(name, np.array([1.0, 2.0, 3.0]), 2, differentiable=False)
    truths = np.array([True, False, True, False]), np.array([[True], [False]])
    register("logical_and", *truths, differentiable=False)
    register("logical_or", *truths, differentiable=False)
    register("logical_not", truths[0], differentiable=False)
    for bounds in ((-0.5, 0.5), (None, 0.3), (-0.3, None), (None, None)):
        register("clip", normal(3, 4), *bounds)
    condition = np.array([[True, False, True], [False, False, True]])
    for left, right in (((2, 3), (2, 3)), ((3,), (2, 1)), ((), (1, 3))):
        register("where", condition, normal(*left), normal(*right))
    register("where", condition, normal(2, 3), 0.5)
    register("where", condition, 0.5, normal(3))
    register("astype", normal(2, 3), "float64")
    register("to", normal(2, 3), "cpu")
    register("dropout", normal(2, 3), 0.0)
    register("dropout", normal(2, 3), 0.7, False)
    for shape in ((3, 4), (), (0, 3)):
        register("drop", normal(*shape), 0.3, 1234567)
    register("activate", normal(2, 3), None)
    register("activate", normal(2, 3), "silu")
    register("activate", normal(2, 3), "relu")


def _reductions() -> None:
    for name in ("sum", "mean", "max", "min", "logsumexp", "var", "std"):
        for axis in (None, 0, -1, (0, 2), (-1, 1)):
            register(name, normal(2, 3, 4), axis)
        register(name, normal(2, 3), axis=1, keepdims=True)
        register(name, normal(2, 3), axis=None, keepdims=True)
        register(name, normal(0, 3), axis=1)
        if name not in ("var", "std"):
            register(name, normal())
    register("sum", normal(0, 3), axis=0)
    register("var", normal(2, 5), 1, 1)
    register("std", normal(2, 5), 1, 1)
    for name in ("softmax", "log_softmax", "cumsum"):
        for axis in (0, 1, -1):
            register(name, normal(2, 3, 4), axis)
        register(name, normal(5))
        register(name, normal(0, 3))
    for name in ("argmax", "argmin"):
        for axis in (None, 0, -1):
            register(name, normal(3, 4), axis, differentiable=False)
        register(name, normal(3, 4), 1, True, differentiable=False)


def _shapes() -> None:
    register("reshape", normal(2, 6), (3, -1))
    register("reshape", normal(6), 2, 3)
    register("reshape", normal(1, 1), ())
    register("reshape", normal(0, 4), (2, 0))
    register("flatten", normal(2, 3, 2), 1)
    register("flatten", normal(2, 3))
    register("permute", normal(2, 3, 4), 2, 0, 1)
    register("permute", normal(2, 3, 4), (0, -1, 1))
    register("transpose", normal(2, 3, 4))
    register("transpose", normal(2, 3, 4), -1, 0)
    register("broadcast_to", normal(3, 1), (2, 3, 4))
    register("broadcast_to", normal(), (2,))
    register("expand", normal(3, 1), (2, -1, 4))
    register("expand", normal(1), 5)
    for shape in ((2, 3, 4), (3, 4), (4,), (1, 3, 1), (3, 1), ()):
        register("sum_to", normal(2, 3, 4), shape)
    register("squeeze", normal(1, 3, 1))
    register("squeeze", normal(1, 3, 1), -1)
    register("squeeze", normal(1, 3, 1), (0, 2))
    for axis in (0, 1, -1):
        register("unsqueeze", normal(2, 3), axis)
    for axis in (0, -1):
        register("stack", [normal(2, 3), normal(2, 3), normal(2, 3)], axis)
    register("concat", [normal(2, 3), normal(1, 3), normal(0, 3)], 0)
    register("concat", [normal(2, 3), normal(2, 2)], -1)
    register("concat", [normal(2)])
    register("split", normal(5, 2), 2)
    register("split", normal(2, 5), [1, 4], 1)
    register("split", normal(2, 3), 3, -1)
    register("pad", normal(2, 3), ((1, 0), (0, 2)))
    register("pad", normal(3), ((1, 1),), 1.5)
    register("flip", normal(2, 3), 0)
    register("flip", normal(2, 3, 2), (0, -1))
    register("repeat", normal(2, 3), 2, 1)
    register("repeat", normal(3), (2, 2))
    for index in (
        1,
        -1,
        slice(None, None, 2),
        slice(None, None, -1),
        (slice(1, 3), 0),
        (..., None, 2),
        (None, slice(0, 0)),
        (2, 1),
        np.array([[0, 3], [-1, 0]]),
    ):
        register("getitem", normal(4, 3), index)
    register("place", normal(2, 3), (5, 3), (slice(0, 4, 2),))
    register("place", normal(3), (3, 2), (slice(None, None, -1), 1))


def _indexing() -> None:
    repeated = np.array([[0, 2, 2], [1, 0, -1]])
    register("take", normal(3, 4), repeated)
    register("take", normal(3, 4), np.array([3, 3, 0]), -1)
    register("take", normal(3, 4), np.zeros((0,), np.int64))
    register("untake", normal(2, 3, 4), (3, 4), np.array([[0, 2, 2], [1, 0, 1]]))
    register("untake", normal(3, 3), (3, 4), np.array([3, 3, 0]), 1)
    register("embedding", repeated % 4, normal(4, 5))
    register("embedding", np.array(2), normal(4, 5))
    register("gather", normal(4, 3), 0, repeated)
    register("gather", normal(2, 4), 1, repeated)
    register("scatter_add", normal(4, 3), 0, repeated, normal(2, 3))
    register("scatter_add", normal(2, 4), -1, repeated, normal(2, 3))
    register("upsample_nearest2d", normal(2, 2, 3, 2))
    register("upsample_nearest2d", normal(0, 2, 3, 2))


def _products() -> None:
    for left, right in (
        ((2, 3), (3, 4)),
        ((3,), (3,)),
        ((3,), (3, 2)),
        ((2, 3), (3,)),
        ((2, 2, 3), (3, 2)),
        ((2, 2, 3), (3,)),
        ((3,), (2, 3, 2)),
        ((2, 1, 2, 3), (2, 3, 2)),
        ((1, 2, 3), (2, 3, 2)),
        ((0, 3), (3, 2)),
        ((2, 0), (0, 2)),
    ):
        register("matmul", normal(*left), normal(*right))
    register("linear", normal(2, 3), normal(3, 4), normal(4))
    register("linear", normal(2, 2, 3), normal(3, 2))
    register("linear", normal(2, 3), normal(3, 2), normal(2), normal(2, 2))
    register("linear", normal(2, 2, 3), normal(3, 2), None, normal(2, 2, 2))
    register("linear", normal(3), normal(3, 2), normal(2))
    register("linear", normal(0, 3), normal(3, 2), normal(2))
    register("mlp", normal(2, 3), normal(3, 4), normal(4), normal(4, 2), normal(2))
    register("mlp", normal(2, 2, 3), normal(3, 2), normal(2), normal(2, 3), normal(3), normal(2, 2, 3), "quick_gelu")
    register("mlp", normal(2, 3), normal(3, 4), normal(4), normal(2, 3), normal(3), normal(2, 3), "geglu")
    for subscripts, *shapes in (
        ("ij,jk->ik", (2, 3), (3, 2)),
        ("ij,jk,kl->il", (2, 3), (3, 2), (2, 2)),
        ("i,j->ij", (2,), (3,)),
        ("bij,bkj->bik", (2, 2, 3), (2, 2, 3)),
        ("ij->ji", (2, 3)),
        ("ij->", (2, 3)),
        ("ij->i", (2, 3)),
        ("ij,ij", (2, 3), (2, 3)),
        ("ij,k->k", (2, 3), (2,)),
        ("...ij,...jk->...ik", (2, 2, 3), (2, 3, 2)),
        ("...ij,jk", (2, 2, 3), (3, 2)),
        ("...i,...i->...", (1, 3), (2, 3)),
        ("b...c,c->b...", (2, 2, 3), (3,)),
    ):
        register("einsum", subscripts, *[normal(*shape) for shape in shapes])


def _images() -> None:
    cases: list[tuple[tuple[int, ...], tuple[int, ...], Any, Any]] = [
        ((2, 4, 4, 2), (3, 3, 2, 3), 1, 1),
        ((1, 5, 4, 2), (3, 2, 2, 2), 2, (1, 0)),
        ((1, 6, 5, 1), (3, 3, 1, 2), 2, ((0, 1), (0, 1))),
        ((2, 3, 3, 3), (1, 1, 3, 2), 1, 0),
        ((1, 4, 5, 1), (2, 3, 1, 1), (1, 2), ((1, 0), (2, 1))),
        ((0, 4, 4, 1), (3, 3, 1, 2), 1, 1),
    ]
    for shape, weight, stride, padding in cases:
        x, w = normal(*shape), normal(*weight)
        gy = normal(*ops.conv2d(Tensor(x), Tensor(w), None, stride, padding).shape)
        register("conv2d", x, w, None, stride, padding)
        register("conv2d_input_grad", gy, w, shape[1:3], stride, padding)
        register("conv2d_weight_grad", x, gy, weight[:2], stride, padding)
    register("conv2d", normal(2, 3, 3, 2), normal(3, 3, 2, 2), normal(2), 1, 1)
    register("conv2d", normal(2, 3, 3, 2), normal(3, 3, 2, 2), normal(2, 2), 1, 1, normal(2, 3, 3, 2), "silu")
    register("conv2d", normal(1, 3, 3, 2), normal(1, 1, 2, 2), None, 1, 0, normal(1, 3, 3, 2), "relu")
    register("upsample_conv2d", normal(2, 2, 1, 2), normal(3, 3, 2, 3), normal(3))
    register("upsample_conv2d", normal(1, 1, 2, 1), normal(3, 3, 1, 2), None)
    padded: dict[str, Any] = {"stride": (1, 1), "padding": ((1, 1), (1, 1))}
    residual = normal(2, 3, 3, 2)
    register("conv2d_activation", normal(2, 3, 3, 2), normal(3, 3, 2, 2), normal(2, 2), residual, **padded, activation="silu")
    register("conv2d_activation", normal(2, 3, 3, 2), normal(3, 3, 2, 2), normal(2), None, **padded, activation="relu")
    for name in ("max_pool2d", "avg_pool2d"):
        register(name, normal(1, 4, 4, 2), 2)
        register(name, normal(1, 5, 4, 1), (3, 2), (1, 2))
        register(name, normal(0, 4, 4, 2), 2)


def _norms_attention_and_losses() -> None:
    register("group_norm", normal(2, 2, 2, 4), 2)
    register("group_norm", normal(2, 3, 4), 2, normal(4), normal(4), 1e-3, "silu")
    register("group_norm", normal(2, 4), 1, normal(4), None, 1e-5, "relu")
    register("group_norm", normal(0, 2, 4), 2, normal(4), normal(4))
    register("layer_norm", normal(3, 4))
    register("layer_norm", normal(2, 2, 4), normal(4), normal(4), 1e-3)
    register("layer_norm", normal(0, 4), normal(4), normal(4))
    mask = np.array([[True, False, True, True], [False, True, True, False], [False, False, False, False]])
    name = "scaled_dot_product_attention"
    register(name, normal(1, 2, 3, 2), normal(1, 2, 4, 2), normal(1, 2, 4, 3))
    register(name, normal(1, 2, 3, 2), normal(1, 2, 4, 2), normal(1, 2, 4, 2), mask)
    register(name, normal(1, 1, 3, 2), normal(1, 1, 3, 2), normal(1, 1, 3, 2), None, True)
    register(name, normal(2, 1, 3, 2), normal(2, 1, 4, 2), normal(2, 1, 4, 2), mask, True, 0.3)
    register(name, normal(2, 3, 4), normal(2, 4, 4), normal(2, 4, 2), mask, heads=2)
    register("mse_loss", normal(2, 3), normal(2, 3))
    register("mse_loss", normal(), normal())
    register("binary_cross_entropy_with_logits", normal(2, 3), positive(2, 3) / 2)
    register("cross_entropy", normal(3, 4), np.array([0, 3, 1]))
    register("cross_entropy", normal(2, 2, 3), np.array([[0, 2], [1, 1]]))
    register("cross_entropy", normal(2, 3), positive(2, 3))


_elementwise()
_reductions()
_shapes()
_indexing()
_products()
_images()
_norms_attention_and_losses()
