"""Looking at a graph: as a picture, and going backward through it one step at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinydiff import autograd
from tinydiff.autograd import Node
from tinydiff.hooks import input_names, owner, span
from tinydiff.tensor import Tensor

if TYPE_CHECKING:
    import graphviz

COLOURS = {"leaf": "#dcebd5", "op": "#dbe7f5", "result": "#f8e5c8"}


def draw(tensors: Tensor | Sequence[Tensor], names: Mapping[str, Tensor] | None = None, limit: int = 300) -> graphviz.Digraph:
    """The graph that made `tensors` (one or several), for `.source` (DOT text) or, where Graphviz is installed, `.render()`.

    A box is an op: the shape it gave, the line that called it, what it saved for backward and how many bytes that is. An
    ellipse is a leaf. An arrow carries the input's name and shape. Constants don't appear: the tape doesn't know them.

    Args:
        names: names to show, for leaves (a model's parameters) or results, as a dict from name to tensor.
        limit: how many ops to draw, those nearest to the results; older ones become one box that says how many.

    Raises TypeError for what is no tensor, ValueError when nothing was recorded, RuntimeError when backward released it.
    """
    import graphviz

    outputs = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    nodes = _nodes(outputs, limit)
    shown = nodes[-limit:]
    ids = {node: f"op{i}" for i, node in enumerate(shown)}
    labels = {t.node or t: name for name, t in (names or {}).items()}
    graph = graphviz.Digraph(
        "tinydiff",
        graph_attr={"label": graphviz.escape(_caption(nodes)), "fontname": "Helvetica"},
        node_attr={"shape": "box", "style": "rounded,filled", "fontname": "Helvetica", "fontsize": "11"},
        edge_attr={"fontname": "Helvetica", "fontsize": "9"},
    )
    if len(nodes) > len(shown):
        graph.node("earlier", f"… {len(nodes) - len(shown):,} earlier ops", style="rounded,dashed")
    leaves: dict[Tensor, str] = {}
    for node in shown:
        graph.node(ids[node], graphviz.escape(_op_label(node, labels.get(node))), fillcolor=COLOURS["op"])
        earlier = False
        for name, edge in zip(input_names(node.op, len(node.edges)), node.edges):
            if edge is None:
                continue
            if isinstance(edge, Tensor) and edge not in leaves:
                leaves[edge] = f"leaf{len(leaves)}"
                graph.node(
                    leaves[edge],
                    graphviz.escape(_leaf_label(edge, labels.get(edge))),
                    shape="ellipse",
                    style="filled",
                    fillcolor=COLOURS["leaf"],
                )
            source = leaves[edge] if isinstance(edge, Tensor) else ids.get(edge)
            if source is not None:
                graph.edge(source, ids[node], graphviz.escape(f"{name} {edge.shape}"))
            elif not earlier:
                graph.edge("earlier", ids[node], style="dashed")
                earlier = True
    for i, output in enumerate(outputs):
        if output.node is not None:
            graph.node(f"result{i}", f"result {output.shape}", shape="ellipse", style="filled", fillcolor=COLOURS["result"])
            graph.edge(ids[output.node], f"result{i}")
    return graph


def _nodes(outputs: Sequence[Tensor], limit: int) -> list[Node]:
    if limit < 1:
        raise ValueError(f"draw: limit must be at least 1 op, not {limit}")
    for output in outputs:
        if not isinstance(output, Tensor):
            raise TypeError(f"draw needs tensors, not {type(output).__name__}")
        if output.node is not None and output.node.inputs is None:
            raise RuntimeError("draw: backward has released this graph; draw it before, or pass retain_graph=True to backward")
    nodes = autograd.reachable(outputs)
    if not nodes:
        raise ValueError("draw: no op was recorded; make an input with requires_grad=True and stay out of no_grad")
    return nodes


def _saved_arrays(node: Node) -> list[tuple[str, Any]]:
    """What a node keeps for its backward, by name; nothing when a checkpoint dropped it."""
    if not isinstance(node.inputs, list | tuple):
        return []
    found = [(n, x.data) for n, x in zip(input_names(node.op, len(node.inputs)), node.inputs) if isinstance(x, Tensor)]
    if node.output is not None:
        found.append(("out", node.output))
    caches = node.cache if isinstance(node.cache, tuple) else (node.cache,)
    return found + [("cache", c) for c in caches if hasattr(c, "nbytes")]


def _op_label(node: Node, name: str | None) -> str:
    lines = [f"{name} = {node.op.name}" if name else node.op.name, f"{node.shape}, {Path(node.line()).name}"]
    arrays = _saved_arrays(node)
    if arrays:
        kept = ", ".join(dict.fromkeys(n for n, _ in arrays))
        lines.append(f"saves {kept}: {_bytes(sum(span(a) for a in {id(a): a for _, a in arrays}.values()))}")
    elif not isinstance(node.inputs, list | tuple):
        lines.append("released" if node.inputs is None else "saves nothing (checkpoint)")
    return "\n".join(lines)


def _leaf_label(leaf: Tensor, name: str | None) -> str:
    return "\n".join([*([name] if name else []), f"{leaf.shape} {leaf.dtype}", _bytes(leaf.data.nbytes)])


def _caption(nodes: Sequence[Node]) -> str:
    leaves = {edge for node in nodes for edge in node.edges if isinstance(edge, Tensor)}
    own = {id(owner(leaf.data)) for leaf in leaves}
    kept = {id(owner(a)): owner(a).nbytes for node in nodes for _, a in _saved_arrays(node)}
    total = sum(size for key, size in kept.items() if key not in own)
    return f"{len(nodes):,} ops, {len(leaves):,} leaves; beside the leaves it keeps {_bytes(total)}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


@dataclass(frozen=True, repr=False)
class Step:
    """One node on the way back; its `repr` is made to be read.

    Attributes:
        number: from 1, in the order of the backward pass. op: the op's name. line: of its forward call, "file:line".
        gradient: of the final result by this node's result: what arrives, complete.
        gradients: by each input that wants one, by the input's name: what leaves.
        saved: shapes of what the forward call kept for this, by name.
    """

    number: int
    op: str
    line: str
    gradient: Tensor
    gradients: dict[str, Tensor]
    saved: dict[str, tuple[int, ...]]

    def __repr__(self) -> str:
        rows = [("∂ result", self.gradient), *((f"→ ∂ {name}", g) for name, g in self.gradients.items())]
        width = max(len(name) for name, _ in rows)
        lines = [f"step {self.number}: {self.op}, called at {Path(self.line).name}"]
        lines += [f"  {name:{width}}  {g.shape} {_values(g)}" for name, g in rows]
        if self.saved:
            lines.append("  from saved " + ", ".join(f"{name} {shape}" for name, shape in self.saved.items()))
        return "\n".join(lines)


def _values(gradient: Tensor) -> str:
    values = gradient.numpy()
    if values.size > 8:
        return f"of norm {np.linalg.norm(values):.4g}"
    return np.array2string(values, separator=", ", precision=4).replace("\n", "")


def steps(tensor: Tensor, grad: Any = None) -> Iterator[Step]:
    """Go backward from `tensor` one node at a time, as `tensor.backward(grad)` does, and look at each.

    The graph is kept, so it can be walked again. `.grad` of the leaves is added to once the last step was taken.
    Raises RuntimeError as `backward` does: for a tensor without gradients, or of several elements when `grad` is None.
    """
    return _steps(tensor, autograd._cotangents([tensor], grad))


def _steps(tensor: Tensor, cotangents: list[Tensor]) -> Iterator[Step]:
    from tinydiff.ops import sum_to

    leaves: dict[Any, Tensor] = {}
    walk = autograd.walk([tensor], cotangents, leaves, retain_graph=True)
    number = 0
    while True:
        with autograd.no_grad():  # only while the engine works: the reader's own code records as ever
            found = next(walk, None)
            if found is None:
                break
            node, gradient, raw = found
            names = input_names(node.op, len(node.edges))
            gradients = {
                name: sum_to(g, edge.shape) if g.shape != edge.shape else g
                for name, g, edge in zip(names, raw, node.edges)
                if g is not None and edge is not None
            }
        number += 1
        saved = {name: array.shape for name, array in _saved_arrays(node)}
        yield Step(number, node.op.name, node.line(), gradient, gradients, saved)
    for leaf, gradient in leaves.items():
        leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
