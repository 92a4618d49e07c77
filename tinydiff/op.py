"""Op: what an operation computes, its vector-Jacobian product and its fast kernels, declared in one place.

    @op                                    # the definition, in array code: it runs on every device and is the reference
    def exp(xp, x: Array):
        return xp.exp(x)

    @exp.vjp                               # in tensor ops, so derivatives of every order follow
    def _(g, out):
        return g * out

    @exp.kernel("numpy", above=LARGE)       # optional; returns NotImplemented to decline, and then the definition runs
    def _(x):
        return kernels.activation.exp(x)

A rule (of a vjp or a kernel's backward) says by its parameters' names what it needs, and nothing else is saved: `g` (the
gradient of the result), inputs and keyword parameters by their own names, `out` (the result), `shapes` (of the inputs),
`cache` (what the kernel computed on the side), `needs` (which inputs want a gradient). A kernel's backward that reads
`gathered` (the gradient that reached the first input from elsewhere, or None) gives that input's with it included: its pass over
memory then does what an addition would take another one for.

What `@op` gives is a function, to be called with tensors, arrays or numbers; the `Op` behind it is its `.op`.

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
from numpy import ndarray

from tinydiff import autograd
from tinydiff.autograd import STATE, Node
from tinydiff.backend import Array, array_module, device_of, kernels_for
from tinydiff.kernels import record
from tinydiff.tensor import Tensor, as_tensor, beside

P = ParamSpec("P")

LARGE = 8192
"""How many elements it takes for a compiled kernel to beat NumPy's call, and to be worth importing Numba for."""

REGISTRY: dict[str, Op[Any]] = {}
"""Every op by name: what the tests' catalogue, `gradcheck` and the documentation go through."""

OBSERVERS: list[Callable[[Call], None]] = []
"""Called after each computation, forward and backward (see `hooks`)."""

FLOAT32 = np.dtype(np.float32)
_sequences = {tuple, list}
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
    """A function that gives the gradients of some inputs, or of every input, and the names of what it reads.

    Attributes:
        targets: the positions of the inputs whose gradients it gives; none if it gives one for every input.
        target: the position if there is but one, else None.
        call: `(g, out, inputs, node, edges, gathered)` to the function's result, each argument fetched from its place.
        inputs: the positions of the inputs it reads; None for all of them.
    """

    def __init__(self, fn: Callable, targets: Sequence[str], op: Op) -> None:
        self.targets = [op.positions[target] for target in targets]
        self.target = self.targets[0] if len(targets) == 1 else None
        reads = list(inspect.signature(fn).parameters)
        places = {"g": "g", "out": "out", "needs": "[edge is not None for edge in edges]"}
        places |= {"shapes": "node.shapes", "cache": "node.cache", "gathered": "gathered"}
        places |= {name: f"node.params[{name!r}]" for name in op.defaults}
        places |= {name: "inputs" if op.variadic else f"inputs[{i}]" for name, i in op.positions.items()}
        unknown = [name for name in reads if name not in places]
        if unknown:
            raise TypeError(f"a rule of {op.name} reads {', '.join(unknown)}, which is no input or parameter of it")
        arguments = ", ".join(places[name] for name in reads)
        self.call = eval(f"lambda g, out, inputs, node, edges, gathered=None: fn({arguments})", {"fn": fn})
        self.wants = frozenset(reads)
        everything = op.variadic and op.inputs[0] in reads
        self.inputs = None if everything else tuple(i for name, i in op.positions.items() if name in reads)


def _gradients(
    rules: Sequence[Rule], g: Any, out: Any, inputs: Any, node: Node, edges: Sequence[Any], gathered: Any = None
) -> Any:
    """What the rules give for each input whose edge is not None; NotImplemented as soon as one declines."""
    found: list[Any] = [None] * len(edges)
    for rule in rules:
        target = rule.target
        if target is not None:
            if edges[target] is not None:
                value = rule.call(g, out, inputs, node, edges, gathered)
                if value is NotImplemented:
                    return value
                found[target] = value
        elif not rule.targets or any(edges[t] is not None for t in rule.targets):
            values = rule.call(g, out, inputs, node, edges, gathered)
            if values is NotImplemented:
                return values
            for t, value in zip(rule.targets or range(len(edges)), values, strict=True):
                if edges[t] is not None:
                    found[t] = value
    return found


class _Plan(NamedTuple):
    """What to save for one set of inputs that require gradients: positions of inputs (None: all), output, the inputs' shapes."""

    inputs: tuple[int, ...] | None
    output: bool
    shapes: bool


class Kernel:
    """A fast forward for one array module, optionally with a backward of the first order: rules on arrays."""

    def __init__(self, backend: str, forward: Callable, above: int) -> None:
        self.backend, self.forward, self.above = backend, forward, above
        self.rules: list[Rule] = []
        self.caches = False  # whether forward returns (result, cache)
        self.gathers = False  # whether backward reads the gradient that the first input already has


class Op(Generic[P]):
    """A differentiable operation: what is behind a function of `tinydiff.ops`.

    Attributes:
        name: as in `tinydiff.ops`.
        definition: the reference, in array code (`fused`: in Tensor ops).
        inputs: names of the differentiable inputs (parameters annotated `Array` or `Tensor`).
        defaults: the other parameters. function: what callers use.
        dtypes: "same" (mixed dtypes are promoted), "float" (and integers become float32), or "any" (left alone).
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
        self.flops = flops or (lambda out, *inputs, **params: 0 if view else out.size)
        parameters = list(inspect.signature(definition).parameters.values())
        if not fused:
            parameters = parameters[1:]
        self.names = tuple(p.name for p in parameters)
        tensors = [p for p in parameters if ("Tensor" if fused else "Array") in str(p.annotation)]
        if not tensors:
            raise TypeError(f"{self.name} has no inputs: annotate them as `{'x: Tensor' if fused else 'x: Array'}`")
        self.inputs = tuple(p.name for p in tensors)
        self.positions = {name: i for i, name in enumerate(self.inputs)}
        self.variadic = any(p.kind is p.VAR_POSITIONAL for p in tensors)
        self._only = self.inputs if len(tensors) == 1 and not self.variadic else ()
        self.optional = {p.name: p.default for p in tensors if p.default is not p.empty}
        self.defaults = {p.name: p.default for p in parameters if p not in tensors}
        self.rules: list[Rule] = []
        self.differentiable = fused
        self.kernels: dict[str, list[Kernel]] = {}
        self.smallest = sys.maxsize  # of the kernels' `above`
        self._plans: dict[int, _Plan] = {}
        self.__doc__ = definition.__doc__
        self.__name__ = self.name
        self.__signature__ = inspect.Signature(parameters)
        self.__wrapped_module__ = definition.__module__
        self.function = _make_function(self)

    def __repr__(self) -> str:
        return f"<op {self.name}{self.__signature__}>"

    # Declaring.

    def vjp(self, target: Any) -> Any:
        """Declare the gradient of the input named `target`, or bare: of every input (a tuple; of the one input, a tensor)."""
        if callable(target):
            return self._add_rule(target, self._only)
        if target not in self.positions:
            raise TypeError(f"{self.name} has no input {target!r}; its inputs are {', '.join(self.inputs)}")
        return lambda fn: self._add_rule(fn, (target,))

    def _add_rule(self, fn: Callable, targets: Sequence[str]) -> Callable:
        self.rules.append(Rule(fn, targets, self))
        self.differentiable = True
        self._plans.clear()
        return fn

    def kernel(self, backend: str, above: int = 0) -> Callable:
        """Declare a fast forward for the arrays of `backend` ("numpy", "cuda"); the latest declared is asked first.

        It gets the inputs' arrays and the keyword parameters, and returns the result (and a cache, if its backward reads one)
        or NotImplemented. It is not asked, nor what it imports loaded, when the first input has fewer than `above` elements.
        """

        def declare(fn: Callable) -> Callable:
            self.kernels.setdefault(backend, []).insert(0, Kernel(backend, fn, above))
            self.smallest = min(above, self.smallest)
            self._plans.clear()
            return fn

        return declare

    def kernel_backward(self, backend: str, *targets: str) -> Callable:
        """Declare the backward of the latest kernel for `backend`: a rule on arrays.

        It gives the gradient of the input named (a tuple for several), or without a name: of every input (as for `vjp`).
        """

        def declare(fn: Callable) -> Callable:
            kernel = self.kernels[backend][0]
            kernel.rules.append(rule := Rule(fn, targets or self._only, self))
            kernel.caches, kernel.gathers = kernel.caches or "cache" in rule.wants, kernel.gathers or "gathered" in rule.wants
            self._plans.clear()
            return fn

        return declare

    # Running.

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        return self.function(*args, **kwargs)

    def _settle(self, inputs: Sequence[Any], params: dict[str, Any]) -> Tensor:
        """Run on inputs of any kind: other dtypes, devices, plain arrays and lists as well."""
        arrays: list[Any] = []
        edges: list[Any] = []
        dtypes = set()
        for x in inputs:
            if isinstance(x, Tensor):
                edges.append(x.node or x if x.requires_grad else None)
                arrays.append(x.data)
                dtypes.add(x.dtype)
            elif type(x) not in _numbers or (self.fused and x is not None):
                return self._settle(self._tensors(inputs), params)
            else:
                edges.append(None)
                arrays.append(x)
        if self.dtypes != "any" or not dtypes:
            promoted = self._promote(inputs, dtypes)
            if promoted is not None:
                return self._settle(promoted, params)
        xp = array_module(*arrays)
        bits = sum(1 << i for i, edge in enumerate(edges) if edge is not None)
        return self._run(xp, inputs, arrays, params, edges, bits)

    def _run(
        self, xp: Any, inputs: Sequence[Any], arrays: Sequence[Any], params: dict[str, Any], edges: Sequence[Any], bits: int
    ) -> Tensor:
        """Compute, by a kernel or the definition, and record. `bits` says which inputs require gradients."""
        observed = perf_counter() if OBSERVERS else 0.0
        kernel = cache = None
        try:
            if self.kernels and (getattr(arrays[0], "size", -1) >= self.smallest or (record.current and record.active())):
                out, cache, kernel = self._try_kernels(kernels_for(xp), arrays, params)
            if kernel is not None:
                pass
            elif self.fused:  # its ops record themselves
                return self._compose(inputs, params)
            elif not params:
                out = self.definition(xp, *arrays)
            elif self.variadic:
                out = self.definition(xp, *arrays, **params)
            else:
                out = self.definition(xp, **dict(zip(self.inputs, arrays)), **params)
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            raise self._explained(error, arrays, params) from None
        if type(out) is not ndarray and device_of(out) is None:  # reductions of NumPy's give scalars
            out = xp.asarray(out)
        node = None
        if bits and STATE.enabled and self.differentiable:
            node = self._record(inputs, arrays, params, bits, edges, out, cache)
        result = Tensor(out, node is not None, node, inputs[0].version if self.view and out.base is not None else None)
        if observed:
            seconds = perf_counter() - observed
            for observer in tuple(OBSERVERS):
                observer(Call(self, kernel.backend if kernel else "definition", arrays, out, params, seconds, node))
        return result

    def _explained(self, error: Exception, arrays: Sequence[Any], params: dict[str, Any]) -> Exception:
        """The error with the op, its shapes and dtypes named; those of a composition's ops are already."""
        if self.fused:
            return error
        described = ", ".join(f"{a.dtype}{list(a.shape)}" if hasattr(a, "dtype") else repr(a) for a in arrays)
        given = "".join(f", {k}={v!r}" for k, v in params.items())
        return type(error)(f"{self.name}({described}{given}): {error}")

    def _compose(self, inputs: Sequence[Any], params: dict[str, Any]) -> Tensor:
        return self.definition(**dict(zip(self.inputs, inputs)), **params)

    def _try_kernels(self, backend: str, arrays: Sequence[Any], params: dict[str, Any]) -> tuple[Any, Any, Kernel | None]:
        for kernel in self.kernels.get(backend, ()):
            if arrays[0].size >= kernel.above or record.active():
                out = kernel.forward(*arrays, **params)
                if out is not NotImplemented:
                    return (*out, kernel) if kernel.caches else (out, None, kernel)
        return None, None, None

    def _record(
        self, inputs: Sequence[Any], arrays: Any, params: dict[str, Any], bits: int, edges: Sequence[Any], out: Array, cache: Any
    ) -> Node:
        plan = self._plans.get(bits) or self._make_plan(bits)
        kept: Any = ()
        version = shapes = None
        if plan.inputs != ():
            kept = [None] * len(inputs)
            for i in range(len(inputs)) if plan.inputs is None else plan.inputs:
                kept[i] = x = inputs[i]
                if isinstance(x, Tensor) and x.version is not None:
                    version = (version or 0) + x.version[0]
        if plan.shapes:
            shapes = tuple([getattr(a, "shape", None) for a in arrays])
        frame = sys._getframe(3)
        while frame.f_code.co_filename in _engine_files and frame.f_back is not None:
            frame = frame.f_back
        node = Node(
            self,
            params,
            edges,
            out.shape,
            kept,
            out if plan.output else None,
            shapes,
            cache,
            version,
            frame.f_code,
            frame.f_lasti,
        )
        if STATE.region is not None:
            STATE.region.drop(node)
        return node

    def _make_plan(self, bits: int) -> _Plan:
        """The union of what the rules for these inputs read (a kernel's backward may run in the place of any of them)."""
        rules = self.rules + [r for kernels in self.kernels.values() for k in kernels for r in k.rules]
        rules = [r for r in rules if not r.targets or any(bits >> target & 1 for target in r.targets)]
        reads = {i for r in rules for i in r.inputs or ()}
        keep = None if self.fused or any(r.inputs is None for r in rules) else tuple(sorted(reads))
        plan = _Plan(keep, any("out" in r.wants for r in rules), any("shapes" in r.wants for r in rules))
        self._plans[bits] = plan
        return plan

    # Arguments.

    def _tensors(self, inputs: Sequence[Any]) -> list[Any]:
        """Inputs with arrays and lists made constant tensors, and NumPy's scalars made (weak) Python numbers.

        Fused ops get tensors only: a composition asks its inputs for their shapes. Numbers become some on the others' device.
        """
        other = next((x.data for x in inputs if isinstance(x, Tensor)), None)

        def convert(x: Any) -> Any:
            if x is None or isinstance(x, Tensor) or (type(x) in _numbers and not self.fused):
                return x
            if isinstance(x, np.generic) and not self.fused:
                return x.item()
            made = as_tensor(x)
            return Tensor(beside(made.data, other)) if device_of(x) is None and other is not None else made

        try:
            return [convert(x) for x in inputs]
        except (TypeError, ValueError) as error:
            raise TypeError(f"{self.name}() needs tensors, arrays or numbers: {error}") from None

    def _promote(self, inputs: Sequence[Any], dtypes: set[np.dtype]) -> list[Any] | None:
        """Inputs cast to one dtype, or None if they need no cast. Any float beats any integer; Python numbers are weak.

        NumPy's own table would turn int64 with float32 into float64; here float64 comes only from float64.
        """
        from tinydiff.ops import astype

        if all(x is None for x in inputs):
            raise TypeError(f"{self.name}() needs tensors, arrays or numbers, not None")
        floats = [d for d in dtypes if d.kind == "f"]
        if floats:
            target = max(floats, key=lambda d: d.itemsize)
        elif self.dtypes == "float" or any(type(x) is float for x in inputs):
            target = np.dtype(np.float32)
        else:
            target = np.result_type(*dtypes, *[x for x in inputs if type(x) in (int, bool)])
        if not dtypes:
            return [x if x is None else Tensor(np.asarray(x, target)) for x in inputs]
        if all(d == target for d in dtypes):
            return None
        return [astype(x, target) if isinstance(x, Tensor) and x.dtype != target else x for x in inputs]

    # Backward.

    def backpropagate(
        self, node: Node, g: Tensor, edges: Sequence[Any], create_graph: bool, pending: dict[Any, Tensor]
    ) -> list[Tensor | None]:
        """The gradients of the inputs whose edge is not None, from the gradient `g` of the result.

        None too for the first input if a kernel added its gradient to the one in `pending`, which it replaces there.
        """
        if node.version is not None or type(node.inputs) not in _sequences:
            node.recall()
        if self.kernels and not create_graph and g.data.size >= self.smallest:
            found = self._kernel_backward(node, g, edges, pending)
            if found is not None:
                return found
        if self.fused:
            return self._differentiate_composition(node, g, edges, create_graph)
        out: Any = node.output
        if out is not None:
            out = Tensor(out, True, node) if create_graph else Tensor(out)
        return _gradients(self.rules, g, out, node.inputs, node, edges)

    def _kernel_backward(
        self, node: Node, g: Tensor, edges: Sequence[Any], pending: dict[Any, Tensor]
    ) -> list[Tensor | None] | None:
        """By the first kernel that takes it, or None."""
        backend = "numpy" if type(g.data) is ndarray else kernels_for(array_module(g.data))
        for kernel in self.kernels.get(backend, ()):
            if not kernel.rules or g.data.size < kernel.above or (kernel.caches and node.cache is None):
                continue
            observed = perf_counter() if OBSERVERS else 0.0
            arrays = [x.data if isinstance(x, Tensor) else x for x in node.inputs]
            gathered = pending.get(edges[0]) if kernel.gathers else None
            added = None if gathered is None else gathered.data
            values = _gradients(kernel.rules, g.data, node.output, arrays, node, edges, added)
            if values is NotImplemented:
                continue
            if observed:
                seconds, result = perf_counter() - observed, tuple(values)
                for observer in tuple(OBSERVERS):
                    observer(Call(self, f"{kernel.backend} backward", [g.data, *arrays], result, node.params, seconds, node))
            gradients = [None if v is None else Tensor(v) for v in values]
            if gathered is not None:
                pending[edges[0]], gradients[0] = gradients[0], None  # type: ignore[assignment]
            return gradients
        return None

    def _differentiate_composition(self, node: Node, g: Tensor, edges: Sequence[Any], create_graph: bool) -> list[Tensor | None]:
        """Run the composition again on aliases of the inputs (so that the derivative is partial) and differentiate that."""
        inputs: Any = node.inputs
        aliases = list(inputs)
        wanted = [i for i, edge in enumerate(edges) if edge is not None]
        for i in wanted:
            aliases[i] = alias(inputs[i]) if create_graph else inputs[i].detach().requires_grad_()
        with autograd.enable_grad():
            output = self._compose(aliases, node.params)
        found = autograd.grad(output, [aliases[i] for i in wanted], g, create_graph=create_graph)
        gradients: list[Tensor | None] = [None] * len(edges)
        for i, gradient in zip(wanted, found):
            gradients[i] = gradient
        return gradients


def _make_function(op: Op) -> Any:
    """The op as a function, written for its signature: Python itself then binds arguments and defaults, and says what is missing.

    It unwraps float32 tensors of NumPy, numbers and None in place, without a loop, since for a tiny op that is half the time;
    everything else goes by way of `_settle`. It carries the op as `.op`, and what declares rules and kernels.
    """
    parameters = op.__signature__.parameters.values()
    names = {p.name: p.empty if p.default is p.empty else _Name(f"default_{p.name}") for p in parameters}
    shown = [p.replace(annotation=p.empty, default=names[p.name]) for p in parameters]
    params = "{" + ", ".join(f"{name!r}: {name}" for name in op.defaults) + "}" if op.defaults else "__defaults"
    lines = [f"def function{inspect.Signature(shown)}:"]
    if op.variadic:
        lines.append(f"    return __settle({op.inputs[0]}, {params})")
    else:
        inputs = f"({', '.join(op.inputs)},)"
        settle = f"return __settle({inputs}, {params})"
        lines.append("    __bits = __tensors = 0")
        for i, name in enumerate(op.inputs):
            lines += [
                f"    __edge_{i} = None",
                f"    if isinstance({name}, __Tensor):",
                f"        if {name}.requires_grad:",
                f"            __edge_{i} = {name}.node or {name}",
                f"            __bits += {1 << i}",
                f"        __array_{i} = {name}.data",
                f"        if __array_{i}.dtype is not __float32 or type(__array_{i}) is not __ndarray:",
                f"            {settle}",
                "        __tensors = 1",
                f"    elif {name} is None{'' if op.fused else f' or type({name}) in __numbers'}:",
                f"        __array_{i} = {name}",
                "    else:",
                f"        {settle}",
            ]
        arrays, edges = (f"[{', '.join(f'__{kind}_{i}' for i in range(len(op.inputs)))}]" for kind in ("array", "edge"))
        lines += ["    if not __tensors:", f"        {settle}"]
        lines += [f"    return __run(__numpy, {inputs}, {arrays}, {params}, {edges}, __bits)"]
    scope = {f"default_{p.name}": p.default for p in parameters}
    scope |= {"__settle": op._settle, "__run": op._run, "__defaults": op.defaults, "__numpy": np, "__ndarray": ndarray}
    scope |= {"__Tensor": Tensor, "__float32": FLOAT32, "__numbers": _numbers}
    exec(compile("\n".join(lines), __file__, "exec"), scope)
    function: Any = scope["function"]
    function.__name__ = function.__qualname__ = op.name
    function.__doc__, function.__signature__, function.__module__ = op.__doc__, op.__signature__, op.__wrapped_module__
    function.op, function.vjp, function.kernel, function.kernel_backward = op, op.vjp, op.kernel, op.kernel_backward
    return function


class _Name(str):
    """A default value that shows as a name."""

    __repr__ = str.__str__


def op(
    definition: Callable[Concatenate[Any, P], Any] | None = None,
    *,
    dtypes: str = "float",
    view: bool = False,
    flops: Callable[..., float] | None = None,
    name: str = "",
) -> Any:
    """Make an op of a definition in array code: `definition(xp, *inputs, **params)`. See `Op` for the options."""

    def make(fn: Callable[Concatenate[Any, P], Any]) -> Any:
        made: Op[P] = Op(fn, fused=False, dtypes=dtypes, view=view, flops=flops, name=name)
        REGISTRY[made.name] = made
        return made.function

    return make if definition is None else make(definition)


def fused(
    definition: Callable[P, Tensor] | None = None,
    *,
    dtypes: str = "float",
    flops: Callable[..., float] | None = None,
    name: str = "",
) -> Any:
    """Make an op of a composition in Tensor ops: `definition(*inputs, **params)`. Kernels may take over (see above)."""

    def make(fn: Callable[P, Tensor]) -> Any:
        made: Op[P] = Op(fn, fused=True, dtypes=dtypes, view=False, flops=flops, name=name)
        REGISTRY[made.name] = made
        return made.function

    return make if definition is None else make(definition)


@op(dtypes="any", view=True)
def alias(xp: Any, x: Array) -> Array:
    """The same values as a node of its own; its gradient is passed through."""
    return x


@alias.vjp
def _(g: Tensor) -> Tensor:
    return g
