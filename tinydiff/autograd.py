"""The tape: what was recorded, and how gradients run back along it.

Each recorded op leaves a `Node`. Nodes are numbered as they are made and an op's inputs exist before it does, so visiting
nodes by falling number is a topological order: no recursion, no sorting pass, the same order every time. Nodes point only
backwards (to older nodes and to leaves), so a graph holds no reference cycle and dies by reference counting.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from tinydiff import random
from tinydiff.backend import array_module, device_of
from tinydiff.tensor import Tensor, as_tensor, tensor, zeros_like

if TYPE_CHECKING:
    from types import CodeType

    from tinydiff.op import Op


class _State(threading.local):
    """What recording looks at, per thread, and the node whose gradients are being computed, for `hooks`."""

    enabled = True
    region: _Region | None = None
    node: Node | None = None


STATE = _State()
_serials = count(0, -1)  # falling, so that the youngest comes first in a heap


class Node:
    """One recorded op: which op, where its gradients go, and what its vector-Jacobian product will read.

    Attributes:
        op, params: what ran, with which keyword parameters.
        edges: per input, where its gradient goes: the Node that made it, the leaf Tensor itself, or None.
        shape: of the result.
        inputs: per input the Tensor (or number) if some rule reads it, else None; all of it None once backward has consumed
            the node; a `_Dropped` inside a checkpoint.
        output: the result's raw array if some rule reads it (a Tensor would be a reference cycle).
        shapes: of the inputs, if some rule reads them.
        cache: what the kernel that ran computed on the side.
        version: what the version counters of the saved inputs that `assign_` may change added up to; None without such.
        code, offset: the code object and instruction of the call, for messages; never a frame, which would keep its locals alive.
    """

    __slots__ = (
        "cache", "code", "edges", "hooks", "inputs", "offset", "op", "output", "params", "serial", "shape", "shapes", "version"
    )  # fmt: skip

    def __init__(
        self,
        op: Op,
        params: dict[str, Any],
        edges: Sequence[Any],
        shape: tuple[int, ...],
        inputs: Any,
        output: Any,
        shapes: tuple | None,
        cache: Any,
        version: int | None,
        code: CodeType,
        offset: int,
    ) -> None:
        self.op = op
        self.params = params
        self.edges = edges
        self.shape = shape
        self.inputs = inputs
        self.output = output
        self.shapes = shapes
        self.cache = cache
        self.version = version
        self.code = code
        self.offset = offset
        self.serial = next(_serials)
        self.hooks: list[Callable[[Tensor], Tensor | None]] | None = None

    def line(self) -> str:
        """Where in the program the op was called, as "file:line"."""
        lines = [number for start, end, number in self.code.co_lines() if start <= self.offset < end and number]
        return f"{self.code.co_filename}:{lines[0] if lines else self.code.co_firstlineno}"

    def recall(self) -> None:
        """Check what was saved, and compute it again if a checkpoint dropped it. Raises RuntimeError if released or stale."""
        if self.inputs is None:
            raise RuntimeError(
                f"the graph of {self.op.name} (called at {self.line()}) was released by an earlier backward; "
                "pass retain_graph=True to that one"
            )
        if self.version is not None:
            total = 0
            for x in self.inputs:
                if isinstance(x, Tensor) and x.version is not None:
                    total += x.version[0]
            if total != self.version:
                raise RuntimeError(
                    f"a value that {self.op.name} (called at {self.line()}) saved for backward was changed by assign_ since; "
                    "run the forward pass again, or backward before the change"
                )
        if type(self.inputs) is _Dropped:
            self.inputs, self.output, self.shapes, self.cache = self.inputs.region.restore(self.inputs.position)


# Switching recording off and on.


def is_grad_enabled() -> bool:
    """Whether ops on tensors that require gradients are recorded."""
    return STATE.enabled


@contextmanager
def set_grad_enabled(enabled: bool) -> Iterator[None]:
    """Record, or don't, inside the block."""
    before, STATE.enabled = STATE.enabled, enabled
    try:
        yield
    finally:
        STATE.enabled = before


def no_grad() -> Any:
    """A block (or a decorator) in which nothing is recorded."""
    return set_grad_enabled(False)


def enable_grad() -> Any:
    """A block (or a decorator) in which recording is on again."""
    return set_grad_enabled(True)


# Going backward.


def _run(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor], wanted: set | None, retain_graph: bool, create_graph: bool
) -> dict[Any, Tensor]:
    """Push cotangents back to the leaves, or to the targets in `wanted`; returns the gradient of each target."""
    found: dict[Any, Tensor] = {}
    with set_grad_enabled(create_graph):
        deque(walk(outputs, cotangents, found, wanted, retain_graph, create_graph, gather=True), maxlen=0)
    return found


def walk(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    leaves: dict[Any, Tensor],
    wanted: set | None = None,
    retain_graph: bool = False,
    create_graph: bool = False,
    gather: bool = False,
) -> Iterator[tuple[Node, Tensor, Sequence[Tensor | None]]]:
    """Go backward one node at a time: yields each with its gradient and those of its inputs, and fills `leaves`.

    A target is a Node or a leaf Tensor. With `wanted`, only ops on a path to one of them run. With `gather`, kernels may add
    their gradient to what an input already got, and then yield None for it.
    """
    from tinydiff.op import OBSERVERS
    from tinydiff.ops import add, sum_to

    pending: dict[Any, Tensor] = {}
    heap: list[tuple[int, Node]] = []
    useful = None if wanted is None else _leading_to(wanted, outputs)
    outer = STATE.node  # set while a fused op differentiates its composition
    edges: Sequence[Any] = [output.node or output for output in outputs]
    if useful is not None:
        edges = [edge if edge in useful else None for edge in edges]
    gradients: Sequence[Tensor | None] = cotangents
    node: Node | None = None
    gradient: Any = None
    try:
        while True:
            for target, sent in zip(edges, gradients):
                if target is None or sent is None:
                    continue
                if sent.data.shape != target.shape:
                    sent = sum_to(sent, target.shape)
                if type(target) is not Node:
                    leaves[target] = add(leaves[target], sent) if target in leaves else sent
                elif target in pending:
                    pending[target] = add(pending[target], sent)
                else:
                    pending[target] = sent
                    heappush(heap, (target.serial, target))
            if node is not None:
                if OBSERVERS:
                    STATE.node = outer
                yield node, gradient, gradients
            if not heap:
                break
            node = heappop(heap)[1]
            gradient = pending.pop(node)
            if node.hooks:
                gradient = _call_hooks(node.hooks, gradient)
            edges = node.edges
            if useful is not None:
                if node in wanted:  # type: ignore[operator]
                    leaves[node] = gradient
                edges = [edge if edge in useful else None for edge in edges]
                done = node.inputs is not None or wanted <= leaves.keys()  # type: ignore[operator]
                if done and all(edge is None for edge in edges):
                    node, gradients = None, ()
                    continue
            if OBSERVERS:
                STATE.node = outer or node
            gradients = node.op.backpropagate(node, gradient, edges, create_graph, pending if gather else {})
            if not retain_graph:
                node.inputs = node.output = node.cache = None
                node.edges = ()
    finally:
        STATE.node = outer
    for target, gradient in leaves.items():
        if target.hooks and type(target) is not Node:
            leaves[target] = _call_hooks(target.hooks, gradient)


def _call_hooks(hooks: Sequence[Callable[[Tensor], Tensor | None]], gradient: Tensor) -> Tensor:
    for hook in hooks:
        replaced = hook(gradient)
        if replaced is not None:
            if replaced.shape != gradient.shape:
                raise ValueError(f"a hook returned shape {replaced.shape} for a gradient of shape {gradient.shape}")
            gradient = replaced
    return gradient


def reachable(outputs: Iterable[Tensor]) -> list[Node]:
    """All nodes behind `outputs`, oldest first."""
    found: set[Node] = set()
    stack = [output.node for output in outputs if output.node is not None]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(edge for edge in node.edges if type(edge) is Node)
    return sorted(found, key=lambda node: -node.serial)


def _leading_to(wanted: set, outputs: Sequence[Tensor]) -> set:
    """The targets behind `outputs` through which a gradient reaches one of `wanted`, those included.

    What lies behind a released node is not known any more, so it counts as leading there, and walking to it raises.
    """
    useful = set(wanted)
    for node in reachable(outputs):
        if node.inputs is None or any(edge in useful for edge in node.edges if edge is not None):
            useful.add(node)
    return useful


def _cotangents(outputs: Sequence[Tensor], given: Any) -> list[Tensor]:
    """The starting gradients: as given, or 1 for outputs of one element."""
    if given is None:
        given = [None] * len(outputs)
    elif not isinstance(given, list | tuple) or not all(g is None or hasattr(g, "shape") for g in given):
        given = [given]  # one gradient, if need be as a list of numbers
    if len(given) != len(outputs):
        raise ValueError(f"{len(outputs)} outputs need as many gradients, not {len(given)}")
    result = []
    for output, cotangent in zip(outputs, given):
        if not output.requires_grad:
            raise RuntimeError("this tensor does not depend on anything with requires_grad=True, so it has no gradients")
        if cotangent is None:
            if output.size != 1:
                raise RuntimeError(
                    f"backward from shape {output.shape} needs a gradient of that shape; without one, reduce to a scalar"
                )
            cotangent = Tensor(array_module(output.data).ones(output.shape, output.dtype))
        if not isinstance(cotangent, Tensor):  # copied, for it may end up as a `.grad`
            cotangent = tensor(cotangent, device=output.device if device_of(cotangent) in (None, "cpu") else None)
        if cotangent.shape != output.shape:
            raise ValueError(f"the gradient of an output of shape {output.shape} can't have shape {cotangent.shape}")
        if cotangent.dtype != output.dtype:
            from tinydiff.ops import astype

            cotangent = astype(cotangent, output.dtype)
        result.append(cotangent)
    return result


def backward(tensors: Any, grad: Any = None, retain_graph: bool = False, create_graph: bool = False) -> None:
    """Add to `.grad` of each leaf behind `tensors` (one, or a list) the gradient of their sum, weighted by `grad`.

    `grad` has each tensor's shape and may be left out for tensors of one element. The graph is released as it is
    consumed unless `retain_graph` (or `create_graph`, which records the gradients' own graph as well).
    Raises RuntimeError for a graph already released, a saved value changed since, or a tensor without gradients.
    """
    outputs = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    found = _run(outputs, _cotangents(outputs, grad), None, retain_graph or create_graph, create_graph)
    for leaf, gradient in found.items():
        leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


def grad(
    outputs: Any, inputs: Any, grad_outputs: Any = None, create_graph: bool = False, retain_graph: bool | None = None
) -> Any:
    """The gradient of `outputs`, weighted by `grad_outputs`, by each of `inputs`: a tensor for a tensor, a tuple for a list.

    Inputs may be leaves or results; one that the outputs don't depend on gets zeros. Only ops between the two run, and
    `.grad` is untouched. With `create_graph` the gradients can be differentiated again. `retain_graph` defaults to it.
    """
    single = isinstance(inputs, Tensor)
    targets = [inputs] if single else list(inputs)
    for position, target in enumerate(targets):
        if not isinstance(target, Tensor) or not target.requires_grad:
            raise RuntimeError(f"input {position} of grad() does not require gradients; make it with requires_grad=True")
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    retain = create_graph if retain_graph is None else retain_graph
    wanted = {target.node or target for target in targets}
    found = _run(outputs, _cotangents(outputs, grad_outputs), wanted, retain, create_graph)
    results = []
    for target in targets:
        gradient = found.get(target.node or target)
        results.append(zeros_like(target) if gradient is None else gradient)
    return results[0] if single else tuple(results)


# Products with the Jacobian and the Hessian of a function of tensors.


def _aliases(values: Any) -> tuple[list[Tensor], bool]:
    """Fresh leaves with the same values, and whether a single tensor was given."""
    single = isinstance(values, Tensor)
    return [as_tensor(v).detach().requires_grad_() for v in ([values] if single else values)], single


def _listed(values: Any, expected: int) -> list[Tensor]:
    listed = [as_tensor(v) for v in (values if isinstance(values, list | tuple) else [values])]
    if len(listed) != expected:
        raise ValueError(f"{expected} tensors need as many vectors, not {len(listed)}")
    return listed


def vjp(fn: Callable[..., Tensor], inputs: Any, v: Any) -> tuple[Tensor, Any]:
    """(fn(*inputs), vᵀJ): the vector-Jacobian product, by one backward pass. `v` has the output's shape."""
    leaves, single = _aliases(inputs)
    with enable_grad():
        output = fn(*leaves)
    products = grad(output, leaves, v) if output.requires_grad else _zeros(leaves)
    return output.detach(), products[0] if single else products


def _zeros(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(map(zeros_like, tensors))


def jvp(fn: Callable[..., Tensor], inputs: Any, v: Any) -> tuple[Tensor, Tensor]:
    """(fn(*inputs), Jv): the Jacobian-vector product, as the derivative of vᵀJ by its vector (two backward passes)."""
    leaves, _ = _aliases(inputs)
    vectors = _listed(v, len(leaves))
    with enable_grad():
        output = fn(*leaves)
        probe = zeros_like(output).requires_grad_()
        products = grad(output, leaves, probe, create_graph=True) if output.requires_grad else ()
        linear = [p for p in products if p.requires_grad]
        if not linear:
            return output.detach(), zeros_like(output)
        kept = [vector for vector, p in zip(vectors, products) if p.requires_grad]
    return output.detach(), grad(linear, probe, kept)


def hvp(fn: Callable[..., Tensor], inputs: Any, v: Any) -> tuple[Tensor, Any]:
    """(fn(*inputs), Hv) for a scalar `fn`: the Hessian-vector product, as the gradient of ⟨gradient, v⟩."""
    leaves, single = _aliases(inputs)
    vectors = _listed(v, len(leaves))
    with enable_grad():
        output = fn(*leaves)
        gradients = grad(output, leaves, create_graph=True) if output.requires_grad else ()
        linear = [(g, u) for g, u in zip(gradients, vectors) if g.requires_grad]
    if not linear:
        products: Any = _zeros(leaves)
    else:
        products = grad([g for g, _ in linear], leaves, [u for _, u in linear])
    return output.detach(), products[0] if single else products


# Checkpoints: forget what a region saved, and compute it again when backward asks.


class _Region:
    """A checkpointed call: nodes recorded inside keep their edges, but not what they saved."""

    def __init__(self, fn: Callable[..., Any], args: tuple, kwargs: dict) -> None:
        self.fn, self.args, self.kwargs = fn, args, kwargs
        self.random_state = random.get_state()
        self.generators: list[tuple[np.random.Generator, Any]] = []  # others that it drew from, and their states before
        self.size = 0
        self.restored: dict[int, tuple] | None = None
        self.recording: list[Node] | None = None

    def drop(self, node: Node) -> None:
        """Take what a node just recorded saved; called by `apply` while the region runs."""
        if self.recording is not None:
            self.recording.append(node)
        else:
            node.inputs = _Dropped(self, self.size, node.inputs)
            node.output = node.shapes = node.cache = None
            self.size += 1

    def restore(self, position: int) -> tuple:
        """Inputs, output, shapes and cache of the node at `position`. Runs the region again if need be."""
        if self.restored is None or position not in self.restored:
            self.recording, before = [], (STATE.region, random.get_state())
            after = [(rng, rng.bit_generator.state) for rng, _ in self.generators]
            try:
                STATE.region = self
                random.set_state(self.random_state)
                for rng, earlier in self.generators:
                    rng.bit_generator.state = earlier
                with enable_grad():
                    self.fn(*self.args, **self.kwargs)
                if len(self.recording) != self.size:
                    raise RuntimeError(
                        f"the checkpointed function recorded {self.size} ops first and {len(self.recording)} when run again; "
                        "it must do the same work both times"
                    )
                self.restored = {i: (n.inputs, n.output, n.shapes, n.cache) for i, n in enumerate(self.recording)}
            finally:
                self.recording = None
                STATE.region, state = before
                random.set_state(state)
                for rng, later in after:
                    rng.bit_generator.state = later
        return self.restored.pop(position)


def note_generator(rng: np.random.Generator) -> None:
    """Tell the checkpoint around an op, if any, that the op is about to draw from `rng`: its second run will wind it back."""
    region = STATE.region
    if region is not None and region.recording is None and all(rng is not known for known, _ in region.generators):
        region.generators.append((rng, rng.bit_generator.state))


class _Dropped:
    """Stands in `Node.inputs` for what a checkpointed region will compute again; and what of it `assign_` may change."""

    __slots__ = ("assignable", "position", "region")

    def __init__(self, region: _Region, position: int, inputs: Sequence[Any]) -> None:
        self.region, self.position = region, position
        self.assignable = [x for x in inputs if isinstance(x, Tensor) and x.version is not None]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.assignable)


def checkpoint(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`fn(*args, **kwargs)`, without keeping what its ops save: backward runs `fn` once more to get it (Chen et al. 2016).

    `fn` must do the same both times; random generators are wound back for the second run (the default one, and dropout's).
    """
    if not STATE.enabled:
        return fn(*args, **kwargs)
    before, STATE.region = STATE.region, _Region(fn, args, kwargs)
    try:
        return fn(*args, **kwargs)
    finally:
        STATE.region = before
