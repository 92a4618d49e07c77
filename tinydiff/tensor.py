"""Tensor: an immutable array that remembers how it was made. Operator sugar only; the mathematics is in `ops`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from tinydiff import backend
from tinydiff.backend import Array

if TYPE_CHECKING:
    from tinydiff.autograd import Node

ops: Any = None  # the module tinydiff.ops, which binds itself here once it is loaded: nothing imports upward


class Tensor:
    """An array, and whether gradients flow to it.

    Made by `tinydiff.tensor` (copies), `tinydiff.from_numpy` (shares) or by an op. Its values never change, but for
    `assign_` on tensors that `tensor` or `Parameter` made: views of those share a version counter, and a backward pass
    that would read a value saved before such a change raises.

    Attributes:
        data: the array; treat it as read-only.
        requires_grad: whether a gradient with respect to this tensor (or to something before it) is wanted.
        grad: the gradient that `backward` accumulated, a Tensor of the same shape, or None.
        node: the tape's record of the op that made it; None for a leaf.
    """

    __slots__ = ("__weakref__", "data", "grad", "hooks", "node", "requires_grad", "version")
    __array_ufunc__ = None  # so that `ndarray * tensor` asks the tensor

    def __init__(
        self, data: Array, requires_grad: bool = False, node: Node | None = None, version: list[int] | None = None
    ) -> None:
        self.data = data
        self.requires_grad = requires_grad
        self.node = node
        self.version = version  # a counter shared by all views of one assignable array; None: never assigned
        self.grad: Tensor | None = None
        self.hooks: list[Callable[[Tensor], Tensor | None]] | None = None

    # What it is.

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, channels last."""
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        """The NumPy dtype."""
        return self.data.dtype

    @property
    def ndim(self) -> int:
        """How many axes."""
        return self.data.ndim

    @property
    def size(self) -> int:
        """How many elements, as in NumPy."""
        return self.data.size

    @property
    def device(self) -> str:
        """Where the array lives: "cpu", "cuda" or "cudasim"."""
        return backend.device_of(self.data) or "cpu"

    @property
    def is_leaf(self) -> bool:
        """Whether no recorded op made it."""
        return self.node is None

    @property
    def T(self) -> Tensor:
        """All axes reversed."""
        return ops.transpose(self)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a tensor of shape () has no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        return bool(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        values = np.array2string(
            np.asarray(self.numpy()), separator=", ", prefix="tensor(", threshold=20, edgeitems=3, precision=4
        )
        made = f", made by {self.node.op.name}" if self.node else ", requires_grad=True" if self.requires_grad else ""
        where = f", on {self.device}" if self.device != "cpu" else ""
        return f"tensor({values}, shape={self.shape}, {self.dtype.name}{where}{made})"

    # Out of the graph, and out of tinydiff.

    def numpy(self) -> np.ndarray:
        """A read-only view of the values as a NumPy array; a copy of them if they live on another device than the CPU."""
        view = self.data.view() if isinstance(self.data, np.ndarray) else backend.to_numpy(self.data)
        view.flags.writeable = False
        return view

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.device != "cpu":
            raise TypeError(f"a tensor on {self.device} does not become a NumPy array by itself; use .numpy(), which copies")
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def __dlpack__(self, **options: Any) -> Any:
        return self.data.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.data.__dlpack_device__()

    def item(self) -> float | int | bool:
        """The only element as a Python number. Raises ValueError when there are more, or none."""
        if self.size != 1:
            raise ValueError(f"item() needs a tensor of one element; this one has shape {self.shape}")
        return self.data.item()

    def tolist(self) -> Any:
        """The values as nested lists of Python numbers."""
        return self.data.tolist()

    def detach(self) -> Tensor:
        """The same values, cut off from the graph."""
        return Tensor(self.data, version=self.version)

    def to(self, device: str) -> Tensor:
        """The same values on `device` ("cpu", "cuda", "cudasim"); the gradient comes back from there.

        Raises ValueError for an unknown device, RuntimeError for one that is not available.
        """
        return ops.to(self, device)

    # Gradients.

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Set `requires_grad` on a leaf, and return it. Raises for integers and for results of ops."""
        if self.node is not None:
            raise RuntimeError(f"requires_grad_() is for leaves; this tensor was made by {self.node.op.name}: detach() it first")
        if requires_grad and self.dtype.kind != "f":
            raise TypeError(f"only float32 and float64 tensors have gradients, not {self.dtype.name}; use .astype('float32')")
        self.requires_grad = requires_grad
        return self

    def backward(self, grad: Any = None, retain_graph: bool = False, create_graph: bool = False) -> None:
        """Accumulate into `.grad` of every leaf that this tensor depends on. See `tinydiff.autograd.backward`."""
        from tinydiff import autograd

        autograd.backward(self, grad, retain_graph=retain_graph, create_graph=create_graph)

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> Callable[[], None]:
        """Call `hook(gradient)` once this tensor's gradient is complete; what it returns, if anything, replaces the gradient.

        Returns a function that removes the hook. Raises RuntimeError when no gradient flows here.
        """
        if not self.requires_grad:
            raise RuntimeError("a hook needs a tensor with requires_grad=True: no gradient flows to this one")
        owner = self.node or self
        owner.hooks = [*(owner.hooks or ()), hook]

        def remove() -> None:
            owner.hooks = [h for h in owner.hooks or () if h is not hook] or None

        return remove

    def retain_grad(self) -> Tensor:
        """Keep `.grad` for this tensor too though it is no leaf; returns the tensor."""
        if self.node is not None and not any(getattr(hook, "retains", False) for hook in self.node.hooks or ()):
            import weakref

            me = weakref.ref(self)  # the graph must not own its own results

            def keep(gradient: Tensor) -> None:
                tensor = me()
                if tensor is not None:
                    tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient

            keep.retains = True  # type: ignore[attr-defined]
            self.register_hook(keep)
        return self

    def assign_(self, value: Any) -> Tensor:
        """Overwrite the values in place, from any device, and bump the version; for optimisers, under `no_grad`.

        Raises RuntimeError while recording or for the result of an op, ValueError for another shape or a frozen array.
        """
        from tinydiff import autograd

        if autograd.is_grad_enabled() and self.requires_grad:
            raise RuntimeError("assign_ changes values that the tape may have saved; do it under tinydiff.no_grad()")
        if self.version is None or not self.data.flags.owndata:
            raise RuntimeError("assign_ is for tensors made by tinydiff.tensor or Parameter, not for the result of an op")
        array = value.data if isinstance(value, Tensor) else value if backend.device_of(value) else np.asarray(value)
        if array.shape != self.shape:
            raise ValueError(f"assign_ needs shape {self.shape}, not {array.shape}")
        if isinstance(self.data, np.ndarray) and not self.data.flags.writeable:
            raise ValueError("this tensor shares a frozen NumPy array (from_numpy); make it with tinydiff.tensor, which copies")
        self.data[...] = backend.to_device(array, self.device)
        self.version[0] += 1
        return self

    # Sugar: each line names the op that does it.

    def __add__(self, other: Any) -> Tensor:
        return ops.add(self, other)

    def __radd__(self, other: Any) -> Tensor:
        return ops.add(other, self)

    def __sub__(self, other: Any) -> Tensor:
        return ops.sub(self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return ops.sub(other, self)

    def __mul__(self, other: Any) -> Tensor:
        return ops.mul(self, other)

    def __rmul__(self, other: Any) -> Tensor:
        return ops.mul(other, self)

    def __truediv__(self, other: Any) -> Tensor:
        return ops.div(self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return ops.div(other, self)

    def __pow__(self, other: Any) -> Tensor:
        return ops.pow(self, other)

    def __rpow__(self, other: Any) -> Tensor:
        return ops.pow(other, self)

    def __matmul__(self, other: Any) -> Tensor:
        return ops.matmul(self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return ops.matmul(other, self)

    def __neg__(self) -> Tensor:
        return ops.neg(self)

    def __abs__(self) -> Tensor:
        return ops.abs(self)

    def __eq__(self, other: Any) -> Tensor:  # type: ignore[override]
        return ops.eq(self, other)

    def __ne__(self, other: Any) -> Tensor:  # type: ignore[override]
        return ops.ne(self, other)

    def __lt__(self, other: Any) -> Tensor:
        return ops.lt(self, other)

    def __le__(self, other: Any) -> Tensor:
        return ops.le(self, other)

    def __gt__(self, other: Any) -> Tensor:
        return ops.gt(self, other)

    def __ge__(self, other: Any) -> Tensor:
        return ops.ge(self, other)

    def __and__(self, other: Any) -> Tensor:
        return ops.logical_and(self, other)

    def __or__(self, other: Any) -> Tensor:
        return ops.logical_or(self, other)

    def __invert__(self) -> Tensor:
        return ops.logical_not(self)

    def __getitem__(self, index: Any) -> Tensor:
        return ops.getitem(self, index)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *ops.METHODS})

    def __getattr__(self, name: str) -> Any:
        """Every op that takes a tensor first is a method too: `x.exp()`, `x.sum(axis=1)`, `x.conv2d(w)`."""
        function = getattr(ops, name, None) if name in ops.METHODS else None
        if function is None:
            raise AttributeError(f"Tensor has no attribute {name!r}")
        return function.__get__(self)


def _as_array(values: Any, dtype: Any) -> Array:
    """`values` as an array of a dtype that tensors have; Python floats become float32, Python integers int64."""
    values = values.data if isinstance(values, Tensor) else values
    xp = backend.array_module(values)
    array = xp.asarray(values, dtype=dtype and backend.check_dtype(dtype))
    if dtype is None and array.dtype == np.float64 and not hasattr(values, "dtype"):
        return array.astype(np.float32)
    if array.dtype not in backend.DTYPES:
        names = ", ".join(d.name for d in backend.DTYPES)
        raise TypeError(f"a tensor can't hold dtype {array.dtype}; convert the values to one of {names}")
    return array


def tensor(array: Any, requires_grad: bool = False, dtype: Any = None, device: str | None = None) -> Tensor:
    """A leaf tensor with a copy of `array` (an array, a tensor, a number or nested lists), by default where `array` is.

    Python floats become float32; arrays keep their dtype. Raises TypeError for dtypes that tensors don't have, ValueError for
    an unknown device, RuntimeError for one that is not available.
    """
    found = _as_array(array, dtype)
    here = backend.device_of(found) or "cpu"
    target = here if device is None else backend.check_device(device)
    if target == here:
        copied = np.array(found, order="C") if here == "cpu" else found.copy()
    else:
        copied = backend.to_device(found, target)
    leaf = Tensor(copied, version=[0])
    return leaf.requires_grad_() if requires_grad else leaf


def from_numpy(array: np.ndarray) -> Tensor:
    """A leaf tensor that shares `array`'s memory and freezes it: writing to the array afterwards raises."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"from_numpy needs a numpy.ndarray, not {type(array).__name__}; use tinydiff.tensor")
    array = _as_array(array, None)
    array.flags.writeable = False
    return Tensor(array)


def from_dlpack(source: Any) -> Tensor:
    """A leaf tensor that shares the memory of anything with `__dlpack__` (PyTorch, JAX, NumPy, CuPy …), where that is."""
    on_gpu = source.__dlpack_device__()[0] == 2  # as DLPack numbers them
    xp = backend.module_of(backend.check_device("cuda" if on_gpu else "cpu"))
    return Tensor(_as_array(xp.from_dlpack(source), None))


def beside(value: Any, array: Array) -> Array:
    """The array of a parameter (indices, a mask) where `array` is: NumPy arrays, lists and numbers move there, for they must.

    Raises TypeError for a tensor, or an array, of another device.
    """
    if isinstance(value, Tensor):
        value = value.data
    elif backend.device_of(value) in (None, "cpu"):
        value = backend.to_device(np.asarray(value), backend.device_of(array) or "cpu")
    backend.array_module(value, array)
    return value


def zeros_like(x: Tensor) -> Tensor:
    """A constant of 0 with the shape, dtype and device of `x`."""
    return Tensor(backend.array_module(x.data).zeros(x.shape, x.dtype))


def as_tensor(value: Any) -> Tensor:
    """`value` itself if it is a tensor, else a constant tensor around it, without a copy where possible.

    An array is shared: don't change it before the backward pass of what was computed with it.
    """
    return value if isinstance(value, Tensor) else Tensor(_as_array(value, None))
