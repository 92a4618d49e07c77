"""Optimisers, the moving average of weights, gradient clipping and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from tinydiff import kernels
from tinydiff.backend import Array, array_module, device_of, to_device, to_numpy
from tinydiff.nn.module import Parameter
from tinydiff.tensor import Tensor


class Optimizer:
    """What optimisers share: parameters, a learning rate, per-parameter arrays by name, and a count of steps.

    Raises ValueError for no parameters or a negative learning rate.
    """

    slots: tuple[str, ...] = ()

    def __init__(self, parameters: Iterable[Parameter], lr: float) -> None:
        self.parameters = list(parameters)
        if not self.parameters:
            raise ValueError("an optimiser needs at least one parameter, and got none")
        if not lr >= 0:
            raise ValueError(f"lr must not be negative, and is {lr}")
        self.lr = lr
        self.steps = 0
        self.arrays = {name: [array_module(p.data).zeros_like(p.data) for p in self.parameters] for name in self.slots}

    def step(self, lr: float | None = None, ema: EMA | None = None, scale: float = 1.0) -> None:
        """Change each parameter that has a gradient, with this step's `lr` if given; `ema` follows in the same pass.

        Gradients count `scale` times (see `clip_scale`).
        """
        self.steps += 1
        rate = self.lr if lr is None else lr
        decay = ema.next_decay() if ema else 1.0
        averages = ema.average if ema else [None] * len(self.parameters)
        changes = []
        for parameter, average, *state in zip(self.parameters, averages, *self.arrays.values(), strict=True):
            if parameter.grad is not None:
                changes.append((parameter.data, parameter.grad.data, *state, average))
                assert parameter.version is not None
                parameter.version[0] += 1
            else:
                _follow(average, parameter.data, decay)
        self.update(changes, rate, decay, scale)

    def update(self, changes: Sequence[Any], lr: float, decay: float, scale: float) -> None:
        """Change parameters in place: `changes` has for each its array, its gradient's, its slots', and its average's or None."""
        raise TypeError(f"{type(self).__name__} defines no update()")

    def zero_grad(self) -> None:
        """Forget the accumulated gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything but the parameters, as NumPy arrays: "steps", and "SLOT.INDEX"."""
        state = {f"{name}.{i}": to_numpy(array) for name, arrays in self.arrays.items() for i, array in enumerate(arrays)}
        return state | {"steps": np.array([self.steps])}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from `state_dict()`. Raises ValueError when it belongs to other parameters."""
        own = self.state_dict()
        wrong = [k for k in {*own, *state} if k not in state or k not in own or own[k].shape != state[k].shape]
        if wrong:
            raise ValueError(f"the optimiser's state does not fit these parameters: {', '.join(sorted(wrong)[:5])}")
        for name, arrays in self.arrays.items():
            for i, array in enumerate(arrays):
                array[...] = _like(array, state[f"{name}.{i}"])
        self.steps = int(state["steps"][0])


def _like(array: Array, value: np.ndarray) -> Array:
    """`value` where `array` is."""
    return to_device(value, device_of(array) or "cpu")


def _follow(average: Array | None, p: Array, decay: float) -> None:
    if average is not None:
        average += (1 - decay) * (p - average)


def _scaled(changes: Sequence[Any], scale: float) -> Sequence[Any]:
    return changes if scale == 1.0 else [(p, g * scale, *rest) for p, g, *rest in changes]


class SGD(Optimizer):
    """p -= lr · v, with v = momentum · v + g (+ weight_decay · p)."""

    slots = ("momentum",)

    def __init__(self, parameters: Iterable[Parameter], lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, lr)
        self.momentum, self.weight_decay = momentum, weight_decay

    def update(self, changes: Sequence[Any], lr: float, decay: float, scale: float) -> None:
        """One step of these parameters."""
        for p, g, v, average in _scaled(changes, scale):
            v *= self.momentum
            v += g if not self.weight_decay else g + self.weight_decay * p
            p -= lr * v
            _follow(average, p, decay)


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2017), one pass over memory where the kernel runs."""

    slots = ("m", "v")

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(parameters, lr)
        if not all(0 <= b < 1 for b in betas):
            raise ValueError(f"betas must be in [0, 1), not {betas}")
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self._table: Any = None  # the kernel's

    def update(self, changes: Sequence[Any], lr: float, decay: float, scale: float) -> None:
        """One step of these parameters."""
        beta1, beta2 = self.betas
        rates = (lr, beta1, beta2, self.eps, self.weight_decay, self.steps, decay)
        if changes and device_of(changes[0][0]) != "cpu":
            changes, scale = kernels.cuda_optim.adamw(_scaled(changes, scale), *rates), 1.0
        elif sum(change[0].size for change in changes) >= 1024:
            if self._table is None or not self._table.lists(changes):
                self._table = kernels.optim.Table(changes)
            changes = kernels.optim.adamw(changes, *rates, scale, self._table)
        for p, g, m, v, average in _scaled(changes, scale):
            m += (1 - beta1) * (g - m)
            v += (1 - beta2) * (g * g - v)
            p *= 1 - lr * self.weight_decay
            corrected = array_module(v).sqrt(v / (1 - beta2**self.steps)) + self.eps
            p -= (lr / (1 - beta1**self.steps)) * m / corrected
            _follow(average, p, decay)


class Adam(AdamW):
    """Adam (Kingma & Ba 2014): AdamW without decay of the weights."""

    def __init__(
        self, parameters: Iterable[Parameter], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(parameters, lr, betas, eps, weight_decay=0.0)


class EMA:
    """The exponential moving average of parameters: average += (1 - decay) · (p - average).

    The decay starts small, (1 + n)/(10 + n) at the n-th update, so that the start is forgotten.
    """

    def __init__(self, parameters: Iterable[Parameter], decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay must be in [0, 1), not {decay}")
        self.parameters = list(parameters)
        self.average = [p.data.copy() for p in self.parameters]
        self.decay = decay
        self.updates = 0

    def next_decay(self) -> float:
        """Count an update, and the decay to use for it."""
        self.updates += 1
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    def update(self) -> None:
        """Follow the parameters by one step (when the optimiser doesn't do it)."""
        decay = self.next_decay()
        for average, p in zip(self.average, self.parameters):
            _follow(average, p.data, decay)

    def swap(self) -> None:
        """Exchange parameters and averages; call it again to go back."""
        for average, p in zip(self.average, self.parameters):
            kept = p.data.copy()
            p.data[...] = average
            average[...] = kept
            assert p.version is not None
            p.version[0] += 1

    def state_dict(self) -> dict[str, np.ndarray]:
        """The averages, as NumPy arrays, and "updates"."""
        return {f"average.{i}": to_numpy(a) for i, a in enumerate(self.average)} | {"updates": np.array([self.updates])}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from `state_dict()`. Raises ValueError when it belongs to other parameters."""
        names = [f"average.{i}" for i in range(len(self.average))]
        if {*names, "updates"} != set(state) or any(a.shape != state[n].shape for a, n in zip(self.average, names)):
            raise ValueError("the moving average's state does not fit these parameters")
        for name, average in zip(names, self.average):
            average[...] = _like(average, state[name])
        self.updates = int(state["updates"][0])


def grad_norm(parameters: Iterable[Parameter]) -> float:
    """The joint Euclidean norm of all gradients."""
    return math.sqrt(_sum_of_squares([p.grad.data for p in parameters if p.grad is not None]))


def clip_scale(norm: float, max_norm: float) -> float:
    """What brings gradients of that joint norm down to `max_norm`, if they are above: a factor, which `Optimizer.step` takes.

    Raises ValueError unless `max_norm` is positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, not {max_norm}")
    return max_norm / norm if norm > max_norm else 1.0


def clip_grad_norm(parameters: Iterable[Parameter], max_norm: float) -> float:
    """Scale all gradients together so that their joint Euclidean norm is at most `max_norm`; returns the norm before.

    Raises ValueError unless `max_norm` is positive.
    """
    parameters = list(parameters)
    norm = grad_norm(parameters)
    scale = clip_scale(norm, max_norm)
    for p in parameters if scale != 1.0 else ():
        if p.grad is not None:
            p.grad = Tensor(p.grad.data * scale)
    return norm


def _sum_of_squares(arrays: Sequence[Array]) -> float:
    if sum(a.size for a in arrays) >= 1024:
        found = kernels.optim.sum_of_squares(arrays)
        if found is not NotImplemented and math.isfinite(found):  # a square may be too large for float32
            return found
    xp = array_module(*arrays)
    if xp is not np:  # one wait for the GPU, not one for each array
        return float(xp.sum(xp.stack([_square(xp, a) for a in arrays]))) if arrays else 0.0
    return math.fsum(float(np.sum(np.square(a, dtype=np.float64))) for a in arrays)


def _square(xp: ModuleType, a: Array) -> Array:
    total = kernels.gpu.run("sum_of_squares", a)
    return xp.sum(xp.square(a.astype(np.float64))) if total is NotImplemented else total


def warmup_cosine(step: int, total: int, warmup: int = 0, final: float = 0.0) -> float:
    """The factor for the learning rate at `step` of `total`: a linear rise over `warmup` steps, then half a cosine to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
