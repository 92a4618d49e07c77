"""Derivatives checked against central differences, in float64.

Gradients are compared for cotangents drawn at random: with all ones, softmax and the norms have no gradient to check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinydiff.autograd import enable_grad, grad, no_grad
from tinydiff.names import choose
from tinydiff.tensor import Tensor, as_tensor

SMALL = 64  # an input of up to so many elements is perturbed element by element, a larger one along random directions
ROWS = 16  # of a result of up to so many elements, each has its row of the Jacobian checked
PROBES = 3  # how many cotangents are drawn, and how many directions


class GradcheckError(RuntimeError):
    """A derivative is wrong, or can't be checked."""


class _Comparison(NamedTuple):
    """The worst of |numerical - analytic| / max(1, |numerical|), and a sentence about the first failure, if any."""

    worst: float
    failure: str


def gradcheck(
    fn: Callable[..., Any],
    inputs: Any,
    *,
    eps: float = 1e-6,
    atol: float = 1e-6,
    rtol: float = 1e-4,
    raise_exception: bool = True,
) -> bool:
    """Whether backward through `fn` agrees with central differences (of step `eps`) at `inputs`.

    Args:
        fn: of tensors, returning a tensor or a list of them. Called many times; it must be deterministic.
        inputs: a float64 tensor or array, or a list; arrays, and tensors with requires_grad, are differentiated by.
        atol, rtol: |numerical - analytic| may be atol + rtol · |numerical|.

    Raises GradcheckError (or returns False if not `raise_exception`) saying which input and element disagree, with both
    values; TypeError for float32, whose differences are too coarse to judge by.
    """
    tensors = _tensors(inputs)
    names = [f"input {i}" for i in range(len(tensors))]
    return _conclude(_compare(fn, tensors, names, eps, atol, rtol), raise_exception)


def gradgradcheck(
    fn: Callable[..., Any],
    inputs: Any,
    grad_outputs: Any = None,
    *,
    eps: float = 1e-6,
    atol: float = 1e-6,
    rtol: float = 1e-4,
    raise_exception: bool = True,
) -> bool:
    """Whether second derivatives of `fn` are right: `gradcheck` of its gradient, by the inputs and by the cotangents.

    `grad_outputs` are the cotangents at which to check, drawn if left out. Otherwise as `gradcheck`.
    """
    gradients, tensors, names = _gradient_function(fn, _tensors(inputs), grad_outputs)
    return _conclude(_compare(gradients, tensors, names, eps, atol, rtol), raise_exception)


def worst_errors(name: str) -> tuple[float, float]:
    """The worst errors of the first and second derivatives of the op called `name`, over `tinydiff.samples`.

    An error is |numerical - analytic| / max(1, |numerical|). Both are NaN for an op without derivatives.
    Raises ValueError for an unknown op.
    """
    from tinydiff.samples import SAMPLES

    errors = [(float("nan"), float("nan"))]
    for sample in choose(SAMPLES, name, "op"):
        if sample.differentiable:
            inputs = _tensors(sample.arrays)
            first = _compare(sample, inputs, [""] * len(inputs), 1e-6, np.inf, 0).worst
            second = _compare(*_gradient_function(sample, inputs, None), 1e-6, np.inf, 0).worst
            errors.append((first, second))
    # NaN from a sample is a failure and must show; NaN stands for "none" only where no sample was differentiable.
    first_errors, second_errors = zip(*(errors[1:] or errors))
    return float(np.max(first_errors)), float(np.max(second_errors))


def _conclude(comparison: _Comparison, raise_exception: bool) -> bool:
    if comparison.failure and raise_exception:
        raise GradcheckError(comparison.failure)
    return not comparison.failure


def _tensors(inputs: Any) -> list[Tensor]:
    """The inputs as tensors; raises unless one can be differentiated by, in float64."""
    listed = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
    tensors = [x if isinstance(x, Tensor) else as_tensor(x) for x in listed]
    tensors = [t if isinstance(x, Tensor) or t.dtype.kind != "f" else t.requires_grad_() for t, x in zip(tensors, listed)]
    for i, tensor in enumerate(tensors):
        if tensor.requires_grad and tensor.dtype != np.float64:
            raise TypeError(f"gradcheck: input {i} is {tensor.dtype}, too coarse for differences; convert it to float64")
    if not any(t.requires_grad for t in tensors):
        raise ValueError("gradcheck: no input has requires_grad=True, so there is nothing to check")
    return tensors


def _floats(results: Any) -> list[Tensor]:
    """The results that can have gradients."""
    listed = list(results) if isinstance(results, list | tuple) else [results]
    for result in listed:
        if not isinstance(result, Tensor):
            raise TypeError(f"gradcheck: the function must return tensors, not {type(result).__name__}")
        if result.dtype == np.float32:
            raise TypeError("gradcheck: the function returned float32, too coarse for differences; compute in float64 throughout")
    return [r for r in listed if r.dtype.kind == "f"]


def _gradient_function(
    fn: Callable[..., Any], tensors: list[Tensor], grad_outputs: Any
) -> tuple[Callable[..., Any], list[Tensor], list[str]]:
    """The gradient of `fn` as a function of its inputs and cotangents, with those and their names."""
    variable = [i for i, t in enumerate(tensors) if t.requires_grad]
    count = len(tensors)

    def gradients(*values: Tensor) -> Any:
        with enable_grad():
            leaves = [v if v.requires_grad or i not in variable else v.detach().requires_grad_() for i, v in enumerate(values)]
            outputs = [(o, g) for o, g in zip(_floats(fn(*leaves[:count])), leaves[count:]) if o.requires_grad]
            if not outputs:
                raise GradcheckError("gradgradcheck: no result depends on an input that requires gradients")
            results, cotangents = zip(*outputs)
            return grad(list(results), [leaves[i] for i in variable], list(cotangents), create_graph=True)

    if grad_outputs is None:
        rng = np.random.default_rng(1)
        with no_grad():
            shapes = [o.shape for o in _floats(fn(*tensors))]
        grad_outputs = [rng.standard_normal(shape) for shape in shapes]
    cotangents = _tensors(grad_outputs)
    names = [f"input {i}" for i in range(count)] + [f"cotangent {i}" for i in range(len(cotangents))]
    return gradients, tensors + cotangents, names


def _compare(fn: Callable[..., Any], inputs: list[Tensor], names: list[str], eps: float, atol: float, rtol: float) -> _Comparison:
    arrays = [t.data for t in inputs]
    variable = [i for i, t in enumerate(inputs) if t.requires_grad]
    rng = np.random.default_rng(0)

    def evaluate(changed: int, step: np.ndarray | float) -> list[np.ndarray]:
        """The function's results with one input moved by `step`."""
        with no_grad():
            values = [Tensor(a + step if i == changed else a) if i in variable else inputs[i] for i, a in enumerate(arrays)]
            return [r.data for r in _floats(fn(*values))]

    centre = evaluate(variable[0], 0.0)
    if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(centre, evaluate(variable[0], 0.0))):
        return _Comparison(np.inf, "gradcheck: the function gave two results for the same inputs; fix its random numbers")

    with enable_grad():
        leaves = [t.detach().requires_grad_() if t.requires_grad else t for t in inputs]
        results = _floats(fn(*leaves))
    live = [i for i, r in enumerate(results) if r.requires_grad]
    if not live:
        return _Comparison(np.inf, "gradcheck: no result depends on an input that requires gradients")
    wanted = [leaves[i] for i in variable]
    checks = []  # (cotangents, gradients by each variable input)
    for cotangents in _cotangents([r.shape for r in results], rng):
        # A result without a gradient counts as constant, and the differences below tell whether it is.
        gradients = grad([results[i] for i in live], wanted, [cotangents[i] for i in live], retain_graph=True)
        for i, gradient in zip(variable, gradients):
            if gradient.shape != inputs[i].shape or gradient.dtype != inputs[i].dtype:
                found = f"{gradient.dtype}{list(gradient.shape)}"
                wants = f"{inputs[i].dtype}{list(inputs[i].shape)}"
                return _Comparison(np.inf, f"gradcheck: the gradient of {names[i]} is {found}, not {wants}")
        checks.append((cotangents, [g.data for g in gradients]))

    worst, failure = 0.0, ""
    for position, i in enumerate(variable):
        for where, direction in _directions(arrays[i].shape, rng):
            step = eps * direction
            above, below = evaluate(i, step), evaluate(i, -step)
            slopes = [(a - b) / (2 * eps) for a, b in zip(above, below)]
            for cotangents, gradients in checks:
                numerical = _inner(cotangents, slopes)
                analytic = _inner([gradients[position]], [direction])
                error = abs(numerical - analytic)
                worst = float(np.maximum(worst, error / max(1.0, abs(numerical))))  # NaN stays
                if not failure and not error <= atol + rtol * abs(numerical):
                    right = _inner(cotangents, [(a - c) / eps for a, c in zip(above, centre)])
                    left = _inner(cotangents, [(c - b) / eps for c, b in zip(centre, below)])
                    failure = f"gradcheck: {names[i]} {where}: numerical {numerical:.9g}, analytic {analytic:.9g}"
                    if abs(right - left) > 1e-2 * max(1.0, abs(right), abs(left)):
                        failure += f"; a kink or jump there (slopes {left:.6g} and {right:.6g}): check at another point"
    return _Comparison(worst, failure)


def _inner(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> float:
    return float(sum(np.vdot(a, b) for a, b in zip(left, right)))


def _cotangents(shapes: Sequence[tuple[int, ...]], rng: np.random.Generator) -> Iterator[list[np.ndarray]]:
    """Drawn cotangents; for few results also one for each of them alone."""
    for _ in range(PROBES):
        yield [rng.standard_normal(shape) for shape in shapes]
    sizes = [int(np.prod(shape)) for shape in shapes]
    if sum(sizes) <= ROWS:
        for k in range(sum(sizes)):
            ends = np.cumsum(sizes)[:-1]
            yield [part.reshape(shape) for part, shape in zip(np.split(np.eye(sum(sizes))[k], ends), shapes)]


def _directions(shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Directions to move an input in, each with words for where."""
    if np.prod(shape) > SMALL:
        return ((f"along drawn direction {k}", rng.standard_normal(shape)) for k in range(PROBES))
    return ((f"at {index}", _unit(shape, index)) for index in np.ndindex(shape))


def _unit(shape: tuple[int, ...], index: tuple[int, ...]) -> np.ndarray:
    unit = np.zeros(shape)
    unit[index] = 1
    return unit
