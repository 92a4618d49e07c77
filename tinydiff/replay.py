"""Calling a network again without Python: the kernels that its first call launched are launched again, on new inputs.

A picture is drawn in some 50 calls of a network with inputs of one shape, and a network is trained in thousands. Of a small
network on a small batch more than half the time goes to Python, a hundred ops of some 25 µs each, and all of that is the same
every time. With gradients wanted, what the first call recorded on the tape is put there again too.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import pairwise
from sys import getrefcount, maxsize
from threading import Lock, get_ident
from typing import Any

import numpy as np

from tinydiff import kernels
from tinydiff.autograd import STATE, reachable
from tinydiff.backend import get_num_threads
from tinydiff.kernels import record
from tinydiff.nn.module import Module
from tinydiff.op import OBSERVERS, Call
from tinydiff.tensor import Tensor

Body = Callable[..., Tensor]
Inputs = tuple[Tensor | None, ...]
_recording = Lock()
LEAST = 8  # samples in a part: with fewer, the weights are gone through too often for too little
MOST = 4  # recordings kept, for as many different shapes


class _Tape:
    """The nodes of a recorded call, oldest first, with what they saved: to be renewed when the call is done again.

    Their memory is the recording's, which the next call overwrites. So nodes, saved tensors and their arrays are counted: as
    long as anything else refers to one of them (a graph not yet dropped, a result someone kept), `idle` is false.
    """

    def __init__(self, result: Tensor, inputs: list[Tensor | None], constants: list[np.ndarray]) -> None:
        self.nodes = [(node, node.edges, node.inputs, node.output, node.cache) for node in reachable([result])]
        self.result, self.root = result.data, result.node
        # Where the recording's own inputs stand for those of a call, among what nodes saved and where their gradients go.
        own = {id(x): k for k, x in enumerate(inputs) if x is not None}
        self.saved_places: list[tuple[Any, int, int]] = []
        self.edge_places: list[tuple[Any, int, int]] = []
        for node, edges, saved, _, _ in self.nodes:
            for found, places in ((saved, self.saved_places), (edges, self.edge_places)):
                places += [(found, i, own[id(x)]) for i, x in enumerate(found) if id(x) in own]
            if any(id(x) in own for x in saved):
                node.version = node.version or 0  # inputs may have versions
        tensors = {id(x): x for _, _, saved, _, _ in self.nodes for x in saved if type(x) is Tensor}
        arrays = [result.data, *(x.data for x in tensors.values()), *(output for _, _, _, output, _ in self.nodes)]
        found = {id(a): a for array in arrays if array is not None for a in (array, array.base) if a is not None}
        for constant in constants:  # to which optimisers refer as well
            found.pop(id(constant), None)
        self.watched = [*(entry[0] for entry in self.nodes), *tensors.values(), *found.values()]
        self.counts: list[int] = []

    def count(self) -> list[int]:
        """How many references there are to each node, tensor and array."""
        return [getrefcount(watched) for watched in self.watched]

    def put(self, inputs: Inputs) -> None:
        """Let a call's inputs have their places."""
        for saved, position, k in self.saved_places:
            saved[position] = inputs[k]
        for edges, position, k in self.edge_places:
            x: Any = inputs[k]
            edges[position] = x.node or x

    def renew(self) -> Tensor:
        """Record all nodes again; the result."""
        for node, edges, saved, output, cache in self.nodes:
            node.renew(edges, saved, output, cache)
        return Tensor(self.result, self.root is not None, self.root)


class _Recorded:
    """A call of a body: its inputs' own arrays, its result, the launches between, and what they hold for.

    With gradients wanted, the values of parameters are not part of the recording, and there is a tape.
    """

    def __init__(self, body: Body, module: Module, inputs: Inputs) -> None:
        parameters = module.parameters()
        self.changes, self.taped = Module.changes, STATE.enabled
        self.held = [(p, p.data, self._state(p)) for p in parameters]
        self.inputs = [None if x is None else x.data.copy() for x in inputs]
        self.recording = record.Recording(() if self.taped else (p.data for p in parameters))
        self.launched, self.loaded, self.swept = 0, kernels.launch.loaded, False
        leaves = [None if x is None else Tensor(own, x.requires_grad) for x, own in zip(inputs, self.inputs)]
        record.current = self.recording
        OBSERVERS.append(self._watch)
        try:
            result = body(*leaves)
        finally:
            OBSERVERS.remove(self._watch)
            record.current = None
            if self.recording.refused:
                self.recording.clear()
        self.result = result.data
        self.tape = _Tape(result, leaves, [p.data for p in parameters]) if self.taped else None

    def _watch(self, call: Call) -> None:
        """Refuse a recording of what was computed without a launch. The result of a view needs none, while it is one."""
        if record.active() is not self.recording:
            return
        op: Any = call[0]
        before, self.launched = self.launched, len(self.recording.launches)
        if self.launched == before and not (op.view and np.may_share_memory(call.result, call.inputs[0])):
            self.recording.refuse(f"{op.name} ran without a kernel")

    def holds(self) -> bool:
        """Whether the same modules have the same parameters: with the same values, or in the same place if there is a tape."""
        return self.changes == Module.changes and all(p.data is data and self._state(p) == kept for p, data, kept in self.held)

    def _state(self, parameter: Tensor) -> Any:
        """What a recording depends on of a parameter, beside its place in memory."""
        return parameter.requires_grad if self.taped else parameter.version and parameter.version[0]

    def first(self, inputs: Inputs) -> Tensor:
        """The result of the call that was recorded."""
        if self.tape is None:
            return Tensor(self.result.copy())
        tape = self.tape
        tape.put(inputs)
        if self.recording.refused:
            self.tape, self.result = None, np.empty(0)  # and no memory is kept
        else:
            if kernels.launch.loaded > self.loaded:  # which leaves garbage that refers to much
                gc.collect()
            tape.counts = tape.count()
        return tape.renew()

    def idle(self) -> bool:
        """Whether nothing refers to what the next call would overwrite, after looking once whether that is garbage."""
        if self.tape is None or self.tape.count() == self.tape.counts:
            return True
        if self.swept:
            return False
        self.swept = True
        gc.collect()
        return self.tape.count() == self.tape.counts

    def again(self, inputs: Inputs) -> Tensor:
        """The result for other inputs."""
        for own, x in zip(self.inputs, inputs):
            if own is not None and x is not None:
                own[...] = x.data
        kernels.launch.replay(self.recording)
        if self.tape is None:
            return Tensor(self.result.copy())
        self.tape.put(inputs)
        return self.tape.renew()


class Replay:
    """Calls of one network's body: `replay(body, module, *inputs)` is `body(*inputs)`, recorded and replayed where it can be.

    That is with nothing observed, for float32 inputs on the CPU that are small enough, if the body runs by kernels alone. It
    must depend on nothing but inputs and module, and treat the samples along the first axis of all inputs one by one: where
    nothing is to be differentiated, a batch that a recording has no room for is cut into parts. These fit the caches as well,
    and 128 digits in parts of 16 take 0.82 of the time. A recording holds until any module changes, and with nothing to be
    differentiated until a parameter does.
    """

    def __init__(self) -> None:
        self.calls: dict[Any, _Recorded] = {}
        self.most: dict[Any, int] = {}  # how many samples of a shape a recording may have room for, where all were too many

    def __reduce__(self) -> tuple[type[Replay], tuple[()]]:
        return Replay, ()  # a copied network has other parameters

    def __call__(self, body: Body, module: Module, *inputs: Tensor | None) -> Tensor:
        """`body(*inputs)`."""
        if STATE.region is not None or record.active() is not None or not all(map(_fits, inputs)):
            return body(*inputs)
        taped, shapes = STATE.enabled, [None if x is None else x.data.shape for x in inputs]
        sample = tuple(shape and shape[1:] for shape in shapes)
        count = next(shape[0] for shape in shapes if shape)
        if not taped and count > (most := self.most.get(sample, count)):
            bounds = [count * i // -(-count // most) for i in range(-(-count // most) + 1)]
            parts = [[None if x is None else Tensor(x.data[a:b]) for x in inputs] for a, b in pairwise(bounds)]
            return Tensor(np.concatenate([self(body, module, *part).data for part in parts]))
        wanted = taped and tuple(x is not None and x.requires_grad for x in inputs)
        key = (*shapes, wanted, get_num_threads(), kernels.conv.precise, get_ident())
        with _recording:  # or another thread's recording would seem to be an observer, and rounding depend on chance
            if OBSERVERS:
                known = None
            elif (known := self.calls.get(key)) is None or not known.holds():
                self.calls.pop(key, None)
                while len(self.calls) >= MOST:
                    del self.calls[next(iter(self.calls))]
                known = self.calls[key] = _Recorded(body, module, inputs)
                if known.recording.too_large and not taped:
                    self.most[sample] = count // 2 if count >= 2 * LEAST else maxsize
                return known.first(inputs)
        return body(*inputs) if known is None or known.recording.refused or not known.idle() else known.again(inputs)


def _fits(x: Tensor | None) -> bool:
    return x is None or (type(x.data) is np.ndarray and x.data.dtype == np.float32 and 0 < x.data.size <= record.LIMIT)
