"""Calling a network again without Python: the kernels that its first call launched are launched again, on new inputs.

A picture is drawn in some 50 calls of a network with inputs of one shape. Of a small network on a small batch more than half
the time goes to Python, a hundred ops of some 25 µs each, and all of that is the same every time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from threading import Lock, get_ident
from typing import Any

import numpy as np

from tinydiff import kernels
from tinydiff.autograd import STATE
from tinydiff.backend import get_num_threads
from tinydiff.kernels import record
from tinydiff.nn.module import Module
from tinydiff.op import OBSERVERS, Call
from tinydiff.tensor import Tensor

Body = Callable[..., Tensor]
_recording = Lock()
LEAST = 8  # samples in a part: with fewer, the weights are gone through too often for too little
MOST = 4  # recordings kept, for as many different shapes


class _Recorded:
    """A call of a body: its inputs' own arrays, its result, the launches between, and what they hold for."""

    def __init__(self, body: Body, module: Module, inputs: tuple[Tensor | None, ...]) -> None:
        parameters = module.parameters()
        self.changes = Module.changes
        self.held = [(p, p.data, p.version and p.version[0]) for p in parameters]
        self.inputs = [None if x is None else x.data.copy() for x in inputs]
        self.recording = record.Recording(p.data for p in parameters)
        self.launched = 0
        record.current = self.recording
        OBSERVERS.append(self._watch)
        try:
            self.result = body(*[None if x is None else Tensor(x) for x in self.inputs])
        finally:
            OBSERVERS.remove(self._watch)
            record.current = None
            if self.recording.refused:
                self.recording.clear()

    def _watch(self, call: Call) -> None:
        """Refuse a recording of what was computed without a launch. The result of a view needs none, while it is one."""
        if record.active() is not self.recording:
            return
        op: Any = call[0]
        before, self.launched = self.launched, len(self.recording.launches)
        if self.launched == before and not (op.view and np.may_share_memory(call.result, call.inputs[0])):
            self.recording.refuse(f"{op.name} ran without a kernel")

    def holds(self) -> bool:
        """Whether the same modules have the same parameters with the same values."""
        return self.changes == Module.changes and all(
            p.data is data and (p.version is None or p.version[0] == version) for p, data, version in self.held
        )

    def again(self, inputs: tuple[Tensor | None, ...]) -> Tensor:
        """The result for other inputs."""
        for own, x in zip(self.inputs, inputs):
            if own is not None and x is not None:
                own[...] = x.data
        kernels.launch.replay(self.recording)
        return Tensor(self.result.data.copy())


class Replay:
    """Calls of one network's body: `replay(body, module, *inputs)` is `body(*inputs)`, recorded and replayed where it can be.

    That is with nothing to be differentiated or observed, for float32 inputs on the CPU that are small enough, if the body runs
    by kernels alone. It must depend on nothing but inputs and module, and treat the samples along the first axis of all inputs
    one by one: a batch that a recording has no room for is cut into parts. These fit the caches as well, and 128 digits in parts
    of 16 take 0.82 of the time. A recording holds until a parameter or any module changes.
    """

    def __init__(self) -> None:
        self.calls: dict[Any, _Recorded] = {}
        self.most: dict[Any, int] = {}  # how many samples of a shape a recording may have room for, where all were too many

    def __reduce__(self) -> tuple[type[Replay], tuple[()]]:
        return Replay, ()  # a copied network has other parameters

    def __call__(self, body: Body, module: Module, *inputs: Tensor | None) -> Tensor:
        """`body(*inputs)`."""
        if STATE.enabled or record.active() is not None or not all(map(_fits, inputs)) or _observed():
            return body(*inputs)
        shapes = [None if x is None else x.data.shape for x in inputs]
        sample = tuple(shape and shape[1:] for shape in shapes)
        count = next(shape[0] for shape in shapes if shape)
        if count > (most := self.most.get(sample, count)):
            bounds = [count * i // -(-count // most) for i in range(-(-count // most) + 1)]
            parts = [[None if x is None else Tensor(x.data[a:b]) for x in inputs] for a, b in pairwise(bounds)]
            return Tensor(np.concatenate([self(body, module, *part).data for part in parts]))
        key = (*shapes, get_num_threads(), kernels.conv.precise, get_ident())
        with _recording:
            if (known := self.calls.get(key)) is None or not known.holds():
                self.calls.pop(key, None)
                while len(self.calls) >= MOST:
                    del self.calls[next(iter(self.calls))]
                known = self.calls[key] = _Recorded(body, module, inputs)
                if known.recording.too_large:
                    self.most[sample] = count // 2 if count >= 2 * LEAST else sys.maxsize
                return Tensor(known.result.data.copy())
        return body(*inputs) if known.recording.refused else known.again(inputs)


def _fits(x: Tensor | None) -> bool:
    return x is None or (type(x.data) is np.ndarray and x.data.dtype == np.float32 and 0 < x.data.size <= record.LIMIT)


def _observed() -> bool:
    """Whether a block such as `td.profile()` is to see every op, of the whole batch at once."""
    with _recording:  # or another thread's recording would seem to be an observer, and rounding depend on chance
        return bool(OBSERVERS)
