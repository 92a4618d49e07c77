"""Op: what an operation computes, its vector-Jacobian product and its fast kernels, declared in one place.

    @op                                    # the definition, in array code: it runs on every device and is the reference
    def exp(xp, x: Array):
        return xp.exp(x)

    @exp.vjp                               # in tensor ops, so derivatives of every order follow
    def _(g, out):
        return g * out

    @exp.kernel("numpy", when=large)       # optional; returns NotImplemented to decline, and then the definition runs
    def _(x):
        return kernels.activation.exp(x)

A rule (a vjp or a kernel's backward) says by its parameters' names what it needs, and nothing else is saved: `g` (the
gradient of the result), inputs and keyword parameters by their own names, `out` (the result), `shapes` (of the inputs),
`cache` (what the kernel computed on the side), `needs` (which inputs want a gradient).

A *fused* op is written as a composition of other ops (in Tensors, without `xp`). Where a kernel takes over, one node is
recorded; where none does, the composition runs as it stands. Its derivative, to any order, is that of the composition.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Concatenate, Generic, NamedTuple, ParamSpec

import numpy as np

from tinydiff import autograd
from tinydiff.autograd import STATE, Node
from tinydiff.backend import Array, array_module
from tinydiff.tensor import Tensor, as_tensor

P = ParamSpec("P")

REGISTRY: dict[str, Op[Any]] = {}
"""Every op by name: what the tests' catalogue, `gradcheck` and the documentation go through."""

OBSERVERS: list[Callable[[Call], None]] = []
"""Called after each computation, forward and backward (see `hooks`)."""

_numbers = {int, float, bool, type(None)}
_folder = Path(__file__).parent
_engine_files = {str(path) for name in ("op.py", "tensor.py", "autograd.py", "ops/*.py") for path in _folder.glob(name)}


class Call(NamedTuple):
    """One computation, as observers see it."""

    op: Op
    who: str  # "definition", or the backend of the kernel that ran; with " backward" for a kernel's backward
    inputs: Sequence[Any]
    result: Any
    params: dict[str, Any]
    seconds: float
    node: Node | None


class Rule:
    """A function that gives the gradients of some inputs, and the names of what it reads."""

    def __init__(self, fn: Callable, targets: tuple[int, ...], op: Op) -> None:
        self.fn, self.targets = fn, targets
        reads = list(inspect.signature(fn).parameters)
        known = {*_SOURCES, *op.inputs, *op.defaults}
        unknown = [name for name in reads if name not in known]
        if unknown:
            raise TypeError(f"a rule of {op.name} reads {', '.join(unknown)}, which is no input or parameter of it")
        self.wants = frozenset(reads)
        if op.variadic and op.inputs[0] in reads:
            self.inputs: tuple[int, ...] | None = None  # all of them
        else:
            self.inputs = tuple(i for i, name in enumerate(op.inputs) if name in reads)
        self.sources = tuple((_SOURCES.index(name), name) if name in _SOURCES else self._place(name, op) for name in reads)

    @staticmethod
    def _place(name: str, op: Op) -> tuple[int, Any]:
        if name in op.defaults:
            return 5, name
        return (7, None) if op.variadic else (6, op.positions[name])

    def __call__(self, g: Any, node: Node, saved: Sequence[Any], out: Any, needs: tuple[bool, ...]) -> Any:
        values = (g, out, node.shapes, node.cache, needs)
        params = node.params
        return self.fn(
            *[
                values[kind] if kind < 5 else params[key] if kind == 5 else saved[key] if kind == 6 else saved
                for kind, key in self.sources
            ]
        )


_SOURCES = ["g", "out", "shapes", "cache", "needs"]


class _Plan(NamedTuple):
    """What to save for one set of inputs that require gradients."""

    inputs: tuple[int, ...]
    output: bool
    shapes: bool


class Kernel:
    """A fast forward for one array module, optionally with a backward of the first order."""

    def __init__(self, backend: str, forward: Callable, when: Callable[..., bool] | None) -> None:
        self.backend, self.forward, self.when = backend, forward, when
        self.backward: Rule | None = None
        self.caches = False  # whether forward returns (result, cache)


class Op(Generic[P]):
    """A differentiable operation; call it with tensors, arrays or numbers and get a Tensor.

    Attributes:
        name: as in `tinydiff.ops`.
        definition: the reference, in array code (`fused`: in Tensor ops).
        inputs: names of the differentiable inputs (parameters annotated `Array` or `Tensor`).
        defaults: the other parameters. `dtypes`: "same" (mixed dtypes are promoted), "float" (and integers become
            float32), or "any" (left alone).
        view: whether the result may share memory with the first input.
        flops: how many floating-point operations, from the result and the inputs' arrays.
    """

    def __init__(
        self,
        definition: Callable[..., Any],
        *,
        fused: bool,
        dtypes: str,
        view: bool,
        flops: Callable[..., float] | None,
        name: str,
    ) -> None:
        self.definition, self.fused, self.dtypes, self.view = definition, fused, dtypes, view
        self.name = name or definition.__name__.strip("_")
        self.flops = flops or (lambda out, *inputs, **params: out.size)
        parameters = list(inspect.signature(definition).parameters.values())
        if not fused:
            parameters = parameters[1:]
        self.names = tuple(p.name for p in parameters)
        tensors = [p for p in parameters if str(p.annotation).startswith("Tensor" if fused else "Array")]
        self.inputs = tuple(p.name for p in tensors)
        self.positions = {name: i for i, name in enumerate(self.inputs)}
        self.variadic = any(p.kind is p.VAR_POSITIONAL for p in tensors)
        self.optional = {p.name: p.default for p in tensors if p.default is not p.empty}
        self.required = tuple(p.name for p in tensors if p.default is p.empty)
        self.defaults = {p.name: p.default for p in parameters if p not in tensors}
        self.simple = (
            not self.variadic and parameters[: len(tensors)] == tensors and inspect.Parameter.empty not in self.defaults.values()
        )
        self.rules: list[Rule] = []
        self.kernels: dict[str, list[Kernel]] = {}
        self._plans: dict[int, _Plan] = {}
        self.__doc__ = definition.__doc__
        self.__name__ = self.name
        self.__signature__ = inspect.Signature(parameters)
        self.__wrapped_module__ = definition.__module__

    def __repr__(self) -> str:
        return f"<op {self.name}{self.__signature__}>"

    def __get__(self, instance: Any, owner: Any = None) -> Callable[..., Tensor]:
        return self if instance is None else lambda *args, **kwargs: self(instance, *args, **kwargs)  # type: ignore[return-value]

    # Declaring.

    def vjp(self, *targets: Any) -> Any:
        """Declare the gradients of the inputs named in `targets` (all, if bare); the rule returns one per target, or a tuple."""
        if len(targets) == 1 and callable(targets[0]):
            return self._add_rule(targets[0], ())
        return lambda fn: self._add_rule(fn, targets)

    def _add_rule(self, fn: Callable, targets: tuple[str, ...]) -> Callable:
        unknown = [t for t in targets if t not in self.positions]
        if unknown:
            raise TypeError(f"{self.name} has no input {', '.join(unknown)}; its inputs are {', '.join(self.inputs)}")
        self.rules.append(Rule(fn, tuple(self.positions[t] for t in targets or self.inputs), self))
        self._plans.clear()
        return fn

    def kernel(self, backend: str, when: Callable[..., bool] | None = None) -> Callable:
        """Declare a fast forward for the arrays of `backend` ("numpy", "cupy"); the latest declared is asked first.

        It gets the inputs' arrays and the keyword parameters, and returns the result (and a cache, if its backward reads one)
        or NotImplemented. `when(*arrays, **params)` spares the call, and the kernel's import, where it can't pay.
        """

        def declare(fn: Callable) -> Callable:
            self.kernels.setdefault(backend, []).insert(0, Kernel(backend, fn, when))
            self._plans.clear()
            return fn

        return declare

    def kernel_backward(self, backend: str) -> Callable:
        """Declare the backward of the latest kernel for `backend`: a rule on arrays, giving one gradient per input (or None)."""

        def declare(fn: Callable) -> Callable:
            kernel = self.kernels[backend][0]
            kernel.backward = Rule(fn, tuple(range(len(self.inputs))), self)
            kernel.caches = "cache" in kernel.backward.wants
            self._plans.clear()
            return fn

        return declare

    # Running.

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        if not kwargs and self.simple and len(args) == len(self.inputs):
            inputs, params = args, self.defaults
        else:
            inputs, params = self._bind(args, kwargs)
        arrays = []
        bits, bit, dtype, mixed, plain = 0, 1, None, False, False
        for x in inputs:
            if isinstance(x, Tensor):
                if x.requires_grad:
                    bits |= bit
                data = x.data
                if dtype is None:
                    dtype = data.dtype
                elif data.dtype is not dtype:
                    mixed = True
                arrays.append(data)
            elif type(x) in _numbers:
                plain = True
                arrays.append(x)
            else:
                return self(*self._tensors(inputs), **params)
            bit <<= 1
        if self.dtypes != "any" and (mixed or dtype is None or dtype.kind != "f"):
            promoted = self._promote(inputs, plain)
            if promoted is not None:
                return self(*promoted, **params)
        xp = np if len(arrays) == 1 and type(arrays[0]) is np.ndarray else array_module(*arrays)
        who, cache, started = "definition", None, perf_counter() if OBSERVERS else 0.0
        recording = bits and STATE.enabled and (self.rules or self.fused)
        if self.kernels:
            out, cache, kernel = self._try_kernels(xp.__name__, arrays, params)
            if kernel is None:
                out = self._define(xp, arrays, inputs, params)
            else:
                who = kernel.backend
        else:
            out = self._define(xp, arrays, inputs, params)
        if type(out) is Tensor:  # a composition ran: its ops recorded themselves
            return out
        if type(out) is not np.ndarray:
            out = xp.asarray(out)
        result = Tensor(out)
        if recording:
            result.requires_grad = True
            result.node = self._record(inputs, arrays, params, bits, out, cache)
        if self.view:
            result.version = next((x.version for x in inputs if isinstance(x, Tensor)), None)
        if OBSERVERS:
            seconds = perf_counter() - started
            for observer in tuple(OBSERVERS):
                observer(Call(self, who, arrays, out, params, seconds, result.node))
        return result

    def _define(self, xp: Any, arrays: Sequence[Any], inputs: Sequence[Any], params: dict[str, Any]) -> Any:
        """Run the definition, with the op, shapes and dtypes named if it fails."""
        try:
            if self.fused:
                return self._compose(inputs, params)
            if not params:
                return self.definition(xp, *arrays)
            if self.simple or self.variadic:
                return self.definition(xp, *arrays, **params)
            return self.definition(xp, **dict(zip(self.inputs, arrays)), **params)
        except (ValueError, TypeError, IndexError) as error:
            if self.fused or str(error).startswith(self.name):
                raise
            described = ", ".join(f"{a.dtype}{list(a.shape)}" if hasattr(a, "dtype") else repr(a) for a in arrays)
            given = "".join(f", {k}={v!r}" for k, v in params.items())
            raise type(error)(f"{self.name}({described}{given}): {error}") from None

    def _compose(self, inputs: Sequence[Any], params: dict[str, Any]) -> Tensor:
        return self.definition(**dict(zip(self.inputs, inputs)), **params)

    def _try_kernels(self, backend: str, arrays: Sequence[Any], params: dict[str, Any]) -> tuple[Any, Any, Kernel | None]:
        for kernel in self.kernels.get(backend, ()):
            if kernel.when is None or kernel.when(*arrays, **params):
                out = kernel.forward(*arrays, **params)
                if out is not NotImplemented:
                    return (*out, kernel) if kernel.caches else (out, None, kernel)
        return None, None, None

    def _record(
        self, inputs: Sequence[Any], arrays: Sequence[Any], params: dict[str, Any], bits: int, out: Array, cache: Any
    ) -> Node:
        frame = sys._getframe(2)
        while frame.f_code.co_filename in _engine_files and frame.f_back is not None:
            frame = frame.f_back
        edges = tuple([(x.node or x) if isinstance(x, Tensor) and x.requires_grad else None for x in inputs])
        node = Node(self, edges, params, out.shape, (frame.f_code, frame.f_lasti))
        plan = self._plans.get(bits) or self._make_plan(bits, len(inputs))
        if plan.inputs:
            saved: list[Any] = [None] * len(inputs)
            versions: list[int | None] | None = None
            for i in plan.inputs:
                x = saved[i] = inputs[i]
                if isinstance(x, Tensor) and x.version is not None:
                    versions = versions or [None] * len(inputs)
                    versions[i] = x.version[0]
            node.saved, node.versions = saved, versions
        if plan.output:
            node.output = out
        if plan.shapes:
            node.shapes = tuple([getattr(a, "shape", None) for a in arrays])
        node.cache = cache
        if STATE.region is not None:
            STATE.region.drop(node)
        return node

    def _make_plan(self, bits: int, count: int) -> _Plan:
        """The union of what the rules for these inputs read (a kernel's backward may run in the place of any of them)."""
        rules = [r for r in self.rules if self.variadic or any(bits >> i & 1 for i in r.targets)]
        rules += [k.backward for kernels in self.kernels.values() for k in kernels if k.backward is not None]
        everything = self.fused or any(rule.inputs is None for rule in rules)
        inputs = range(count) if everything else {i for rule in rules for i in rule.inputs or ()}
        plan = _Plan(tuple(sorted(inputs)), any("out" in r.wants for r in rules), any("shapes" in r.wants for r in rules))
        self._plans[bits] = plan
        return plan

    # Arguments.

    def _bind(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        """Split a call's arguments into inputs and parameters. Raises TypeError as Python would."""
        if self.variadic:
            unknown = [k for k in kwargs if k not in self.defaults]
            if unknown:
                raise TypeError(f"{self.name}() has no parameter {', '.join(unknown)}; it takes {', '.join(self.names)}")
            return args, {**self.defaults, **kwargs}
        if len(args) > len(self.names):
            raise TypeError(f"{self.name}() takes at most {len(self.names)} arguments ({', '.join(self.names)}), not {len(args)}")
        given = dict(zip(self.names, args))
        for name, value in kwargs.items():
            if name in given or name not in self.names:
                why = "twice" if name in given else f"an unknown argument; it takes {', '.join(self.names)}"
                raise TypeError(f"{self.name}() got {name!r} {why}")
            given[name] = value
        try:
            inputs = [given.pop(n) if n in given else self.optional[n] for n in self.inputs]
        except KeyError as missing:
            raise TypeError(f"{self.name}() needs {missing}; it takes {', '.join(self.names)}") from None
        params = {**self.defaults, **given}
        for name, value in params.items():
            if value is inspect.Parameter.empty:
                raise TypeError(f"{self.name}() needs {name!r}; it takes {', '.join(self.names)}")
        return inputs, params

    def _tensors(self, inputs: Sequence[Any]) -> list[Any]:
        """Inputs with arrays and lists made constant tensors, and NumPy's scalars made (weak) Python numbers."""
        try:
            return [
                x if isinstance(x, Tensor) or type(x) in _numbers else x.item() if isinstance(x, np.generic) else as_tensor(x)
                for x in inputs
            ]
        except (TypeError, ValueError) as error:
            raise TypeError(f"{self.name}() needs tensors, arrays or numbers: {error}") from None

    def _promote(self, inputs: Sequence[Any], plain: bool) -> list[Any] | None:
        """Inputs cast to one dtype, or None if they need no cast. Any float beats any integer; Python numbers are weak.

        NumPy's own table would turn int64 with float32 into float64; here float64 comes only from float64.
        """
        from tinydiff.ops import astype

        dtypes = {x.dtype for x in inputs if isinstance(x, Tensor)}
        floats = [d for d in dtypes if d.kind == "f"]
        if floats:
            target = max(floats, key=lambda d: d.itemsize)
        elif self.dtypes == "float" or any(type(x) is float for x in inputs):
            target = np.dtype(np.float32)
        elif dtypes:
            target = np.result_type(*dtypes, *[x for x in inputs if plain and type(x) in (int, bool)])
        else:
            target = np.dtype(np.float32 if any(isinstance(x, float) for x in inputs) else np.int64)
            return [x if x is None else Tensor(np.asarray(x, target)) for x in inputs]
        if all(d == target for d in dtypes):
            return None
        return [astype(x, target) if isinstance(x, Tensor) and x.dtype != target else x for x in inputs]

    # Backward.

    def backpropagate(self, node: Node, g: Tensor, edges: tuple, create_graph: bool) -> list[Tensor | None]:
        """The gradients of the inputs whose edge is not None, from the gradient `g` of the result."""
        saved = node.inputs()
        needs = tuple([edge is not None for edge in edges])
        if self.kernels and not create_graph:
            for kernel in self.kernels.get(array_module(g.data).__name__, ()):
                if kernel.backward is not None and (node.cache is not None or not kernel.caches):
                    found = self._kernel_backward(kernel, node, g, saved, needs)
                    if found is not None:
                        return found
        if self.fused:
            return self._differentiate_composition(node, g, saved, needs, create_graph)
        gradients: list[Tensor | None] = [None] * len(edges)
        out = None
        if node.output is not None:
            out = Tensor(node.output, True, node) if create_graph else Tensor(node.output)
        for rule in self.rules:
            targets = range(len(edges)) if self.variadic else rule.targets
            for target in targets:
                if needs[target]:
                    break
            else:
                continue
            values = rule(g, node, saved, out, needs)
            if len(targets) == 1:
                gradients[targets[0]] = values
            else:
                for target, value in zip(targets, values, strict=True):
                    if needs[target]:
                        gradients[target] = value
        return gradients

    def _kernel_backward(
        self, kernel: Kernel, node: Node, g: Tensor, saved: Sequence[Any], needs: tuple[bool, ...]
    ) -> list[Tensor | None] | None:
        started = perf_counter() if OBSERVERS else 0.0
        arrays = [x.data if isinstance(x, Tensor) else x for x in saved]
        assert kernel.backward is not None
        values = kernel.backward(g.data, node, arrays, node.output, needs)
        if values is NotImplemented:
            return None
        values = values if isinstance(values, tuple) else (values,)
        if OBSERVERS:
            seconds = perf_counter() - started
            for observer in tuple(OBSERVERS):
                observer(Call(self, f"{kernel.backend} backward", [g.data, *arrays], values[0], node.params, seconds, node))
        return [Tensor(v) if v is not None and need else None for v, need in zip(values, needs)]

    def _differentiate_composition(
        self, node: Node, g: Tensor, saved: Sequence[Any], needs: tuple[bool, ...], create_graph: bool
    ) -> list[Tensor | None]:
        """Run the composition again on aliases of the inputs (so that the derivative is partial) and differentiate that."""
        aliases = list(saved)
        for i, need in enumerate(needs):
            if need:
                aliases[i] = alias(saved[i]) if create_graph else saved[i].detach().requires_grad_()
        with autograd.enable_grad():
            output = self._compose(aliases, node.params)
        wanted = [a for a, need in zip(aliases, needs) if need]
        found = iter(autograd.grad(output, wanted, g, create_graph=create_graph))
        return [next(found) if need else None for need in needs]


def op(
    definition: Callable[Concatenate[Any, P], Any] | None = None,
    *,
    dtypes: str = "float",
    view: bool = False,
    flops: Callable[..., float] | None = None,
    name: str = "",
) -> Any:
    """Make an op of a definition in array code: `definition(xp, *inputs, **params)`. See `Op` for the options."""

    def make(fn: Callable[Concatenate[Any, P], Any]) -> Op[P]:
        made: Op[P] = Op(fn, fused=False, dtypes=dtypes, view=view, flops=flops, name=name)
        REGISTRY[made.name] = made
        return made

    return make if definition is None else make(definition)


def fused(
    definition: Callable[P, Tensor] | None = None,
    *,
    dtypes: str = "float",
    flops: Callable[..., float] | None = None,
    name: str = "",
) -> Any:
    """Make an op of a composition in Tensor ops: `definition(*inputs, **params)`. Kernels may take over (see above)."""

    def make(fn: Callable[P, Tensor]) -> Op[P]:
        made: Op[P] = Op(fn, fused=True, dtypes=dtypes, view=False, flops=flops, name=name)
        REGISTRY[made.name] = made
        return made

    return make if definition is None else make(definition)


@op(dtypes="any", view=True)
def alias(xp: Any, x: Array) -> Array:
    """The same values as a node of its own; its gradient is passed through."""
    return x


@alias.vjp
def _(g: Tensor) -> Tensor:
    return g
