"""Convolution in all three directions, and a row per algorithm.

A kernel of your own is measured beside ours with `--kernel FILE.py`, where the file says

    from benchmarks.conv import register

    def mine(x, w, stride, padding):     # x (N, H, W, C), w (KH, KW, C, O), float32 arrays; two integers
        ...
        return y                         # (N, Ho, Wo, O)

    register("mine", mine)

It may raise NotImplementedError for shapes it does not serve. Its result is checked before it is timed.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import tinydiff as td
from benchmarks.harness import Bench, Case, Row, Side, aligned, difference

Forward = Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]
USERS: dict[str, Forward] = {}
FORCED = ("direct", "shift_add", "winograd_f2", "winograd_f4", "winograd_s2")  # what `force=` of our kernel takes
DIRECTIONS = ("forward", "input gradient", "weight gradient")


class Shape(NamedTuple):
    """A convolution of N pictures H×W, C to O channels, with a K×K kernel, stride S and padding P."""

    n: int
    h: int
    w: int
    c: int
    o: int
    k: int
    s: int = 1
    p: int = 1

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From "N,H,W,C,O,K,S,P". Raises ValueError for anything else."""
        try:
            shape = cls(*map(int, text.split(",")))
        except (ValueError, TypeError):
            raise ValueError(f"--shape {text!r}: give eight integers N,H,W,C,O,K,S,P, such as 64,28,28,32,32,3,1,1") from None
        if min(shape[:7]) < 1 or shape.p < 0 or min(shape.out) < 1:
            raise ValueError(f"--shape {text!r}: sizes must be positive, and the kernel no larger than the padded picture")
        return shape

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the result."""
        return (self.h + 2 * self.p - self.k) // self.s + 1, (self.w + 2 * self.p - self.k) // self.s + 1

    @property
    def flops(self) -> float:
        """Operations of each of the three directions, as the plain algorithm has them."""
        return 2.0 * self.n * self.out[0] * self.out[1] * self.o * self.k**2 * self.c

    def __str__(self) -> str:
        stride = f" stride {self.s}" if self.s > 1 else ""
        return f"{self.k}×{self.k}{stride} {self.c}→{self.o} at {self.h}×{self.w}, batch {self.n}"


STRIDE_1 = [
    Shape(64, 28, 28, 32, 32, 3),
    Shape(64, 28, 28, 64, 64, 3),
    Shape(64, 14, 14, 64, 64, 3),
    Shape(64, 14, 14, 128, 128, 3),
    Shape(64, 7, 7, 256, 256, 3),
    Shape(64, 28, 28, 128, 64, 3),
    Shape(32, 32, 32, 320, 320, 3),
    Shape(1, 64, 64, 320, 320, 3),
]
OTHERS = [
    Shape(64, 28, 28, 32, 32, 3, 2),
    Shape(64, 14, 14, 64, 64, 3, 2),
    Shape(64, 14, 14, 128, 128, 3, 2),
    Shape(64, 28, 28, 96, 32, 1, 1, 0),
    Shape(64, 14, 14, 128, 64, 1, 1, 0),
    Shape(64, 7, 7, 256, 128, 1, 1, 0),
    Shape(64, 28, 28, 1, 32, 3),
    Shape(64, 28, 28, 32, 1, 3),
    Shape(64, 32, 32, 3, 64, 3),
    Shape(64, 32, 32, 64, 3, 3),
    Shape(1, 64, 64, 4, 320, 3),
    Shape(1, 64, 64, 320, 4, 3),
]
TINY = Shape(1, 8, 8, 8, 8, 3)
COMPARED = [TINY, Shape(64, 28, 28, 32, 32, 3), Shape(64, 14, 14, 128, 128, 3)]


def register(name: str, forward: Forward) -> None:
    """Have a kernel of your own measured in the rows per algorithm."""
    USERS[name] = forward


def load_kernels(file: str) -> None:
    """Run a file that registers kernels. Raises ValueError when it registers none."""
    before = set(USERS)
    runpy.run_path(file)
    if set(USERS) == before:
        raise ValueError(f"--kernel {file}: it registers no kernel; call benchmarks.conv.register(name, forward) in it")


def run(bench: Bench, shapes: Sequence[Shape] = ()) -> None:
    """The suite, or all of it for the given shapes."""
    if shapes:
        directions(bench, list(shapes), "the shapes given")
        algorithms(bench, shapes)
        return
    quick = slice(2, 4) if bench.settings.quick else slice(None)
    directions(bench, STRIDE_1[quick], "3×3 stride 1")
    directions(bench, OTHERS[quick], "stride 2, 1×1, first and last layers")
    algorithms(bench, COMPARED[:2] if bench.settings.quick else COMPARED)


def directions(bench: Bench, shapes: Sequence[Shape], group: str) -> None:
    """Ours against theirs in each direction, and the geometric means."""
    rows: dict[str, list[Row]] = {direction: [] for direction in DIRECTIONS}
    for shape in shapes:
        for case in direction_cases(bench, shape):
            rows[case.extra["direction"]].append(bench.run(case))
    for direction, found in rows.items():
        bench.mean("conv", f"geometric mean, {group}, {direction}", found, 1.5)


def arrays(shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (N, H, W, C), w (K, K, C, O) scaled so that the result has unit variance, gy (N, Ho, Wo, O)."""
    rng = np.random.default_rng(0)
    n, h, w, c, o, k = shape[:6]
    x, weight, gy = (aligned(rng.standard_normal(size)) for size in ((n, h, w, c), (k, k, c, o), (n, *shape.out, o)))
    weight /= (c * k * k) ** 0.5
    return x, weight, gy


def direction_cases(bench: Bench, shape: Shape) -> list[Case]:
    """The three directions as cases."""
    x, w, gy = (td.from_numpy(a) for a in arrays(shape))
    s, p = shape.s, shape.p
    runs: dict[str, Callable[[], Any]] = {
        "forward": lambda: td.ops.conv2d(x, w, None, s, p),
        "input gradient": lambda: td.ops.conv2d_input_grad(gy, w, (shape.h, shape.w), s, p),
        "weight gradient": lambda: td.ops.conv2d_weight_grad(x, gy, (shape.k, shape.k), s, p),
    }
    theirs = torch_sides(bench.torch, shape) if bench.torch else {direction: {} for direction in DIRECTIONS}
    return [
        Case(
            "conv",
            f"{shape}, {direction}",
            Side(runs[direction], lambda y: [y.numpy()]),
            theirs[direction],
            target=0.95,
            flops=shape.flops,
            extra={"direction": direction},
        )
        for direction in DIRECTIONS
    ]


def torch_sides(torch: Any, shape: Shape) -> dict[str, dict[str, Side]]:
    """PyTorch's three directions, in both layouts."""
    sides: dict[str, dict[str, Side]] = {direction: {} for direction in DIRECTIONS}
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        x, w, gy = (torch.from_numpy(a) for a in arrays(shape))
        x, gy = (a.permute(0, 3, 1, 2).contiguous(memory_format=layout) for a in (x, gy))
        w = w.permute(3, 2, 0, 1).contiguous(memory_format=layout)

        def backward(mask: list[bool], x: Any = x, w: Any = w, gy: Any = gy) -> Any:
            pair = ([shape.s] * 2, [shape.p] * 2, [1, 1])
            return torch.ops.aten.convolution_backward(gy, x, w, None, *pair, False, [0, 0], 1, mask)

        forward = partial(torch.nn.functional.conv2d, x, w, None, shape.s, shape.p)
        sides["forward"][name] = Side(forward, lambda y: [y.permute(0, 2, 3, 1).numpy()])
        sides["input gradient"][name] = Side(
            partial(backward, [True, False, False]), lambda y: [y[0].permute(0, 2, 3, 1).numpy()]
        )
        sides["weight gradient"][name] = Side(
            partial(backward, [False, True, False]), lambda y: [y[1].permute(2, 3, 1, 0).numpy()]
        )
    return sides


# Algorithms: a row for each way to compute the same forward convolution.


def naive(x: np.ndarray, w: np.ndarray, stride: int, padding: int) -> np.ndarray:
    """The definition in Python loops. Only tiny shapes."""
    n, h, width, _ = x.shape
    k, _, _, o = w.shape
    ho, wo = (h + 2 * padding - k) // stride + 1, (width + 2 * padding - k) // stride + 1
    if n * ho * wo * o * w[..., 0].size > 1e6:
        raise NotImplementedError
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0))).tolist()
    weights = w.tolist()
    y = np.zeros((n, ho, wo, o), x.dtype)
    for picture in range(n):
        for row in range(ho):
            for column in range(wo):
                for channel in range(o):
                    total = 0.0
                    for i in range(k):
                        for j in range(k):
                            pixel, tap = padded[picture][row * stride + i][column * stride + j], weights[i][j]
                            for c, value in enumerate(pixel):
                                total += value * tap[c][channel]
                    y[picture, row, column, channel] = total
    return y


def im2col(x: np.ndarray, w: np.ndarray, stride: int, padding: int) -> np.ndarray:
    """Every window copied out into a row of a matrix, then one BLAS product (Chellapilla et al. 2006)."""
    k, _, c, o = w.shape
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), axis=(1, 2))[:, ::stride, ::stride]
    rows = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, k * k * c)
    return (rows @ w.reshape(-1, o)).reshape(*windows.shape[:3], o)


def definition(x: np.ndarray, w: np.ndarray, stride: int, padding: int) -> np.ndarray:
    """The op's reference: one matrix product for each position in the kernel."""
    from tinydiff.ops.conv import _conv2d, padding_pairs

    return _conv2d.op.definition(np, x, w, stride=(stride, stride), padding=padding_pairs(padding))


def all_algorithms() -> dict[str, Forward]:
    """Everything that can compute the forward convolution, by name."""
    return {"naive loops": naive, "im2col + BLAS": im2col, "definition": definition, **kernel_algorithms(), **USERS}


def kernel_algorithms() -> dict[str, Forward]:
    """The algorithms that our kernels offer, each forced. What one can't serve raises NotImplementedError."""
    from tinydiff import kernels
    from tinydiff.ops.conv import padding_pairs

    def forced(name: str) -> Forward:
        def forward(x: np.ndarray, w: np.ndarray, stride: int, padding: int) -> np.ndarray:
            if name.startswith("winograd") and (w.shape[:2], stride) != ((3, 3), 2 if name == "winograd_s2" else 1):
                raise NotImplementedError
            y = kernels.conv.conv2d(x, w, stride=(stride, stride), padding=padding_pairs(padding), force=name)
            if y is NotImplemented:
                raise NotImplementedError
            return y

        return forward

    return {name: forced(name) for name in FORCED}


def algorithms(bench: Bench, shapes: Sequence[Shape]) -> None:
    """A row per algorithm and shape, checked against PyTorch, or im2col without it. An algorithm may decline a shape."""
    for shape in shapes:
        x, w, _ = arrays(shape)
        theirs = torch_sides(bench.torch, shape)["forward"] if bench.torch else {}
        for name, forward in all_algorithms().items():
            compute = partial(forward, x, w, shape.s, shape.p)
            try:
                result = compute()
            except NotImplementedError:
                continue
            case = Case("conv", f"{shape}: {name}", Side(compute), theirs, flops=shape.flops, extra={"algorithm": name})
            wrong = None if theirs else difference([result], [im2col(x, w, shape.s, shape.p)], case.tolerance)
            if wrong:
                bench.add({"suite": "conv", "case": case.name, "wrong": wrong, **case.extra})
            else:
                bench.run(case)
