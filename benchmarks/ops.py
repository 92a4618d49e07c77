"""The other ops of a denoiser, forward alone and forward with backward: norms, softmax, attention, activations, the optimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import tinydiff as td
from benchmarks.harness import Bench, Case, Side, aligned
from tinydiff.nn import Parameter
from tinydiff.optim import EMA, AdamW

Arrays = dict[str, np.ndarray]
LAYOUTS = {"image": (0, 3, 1, 2), "conv": (3, 2, 0, 1)}  # ours to PyTorch's, for inputs of these kinds
GROUPS, EPS = 8, 1e-5


class Work:
    """An op with its inputs.

    Attributes:
        ours: from our tensors to one. theirs: from the module torch and its tensors to one.
        inputs: arrays by name; kinds: "image" for (N, H, W, C), "conv" for (KH, KW, C, O), of those that have another
            layout in PyTorch. The result is an image if the first input is.
        flops: of the forward; its backward counts `backward` times as much. Without flops, memory traffic is reported:
            `passes` over the first input's memory forward, and `passes_back` backward.
    """

    def __init__(
        self,
        name: str,
        inputs: Arrays,
        ours: Callable[..., Any],
        theirs: Callable[..., Any],
        kinds: dict[str, str] | None = None,
        flops: float | None = None,
        backward: float = 2.0,
        passes: float = 2.0,
        passes_back: float = 3.0,
    ) -> None:
        self.name, self.inputs, self.ours, self.theirs, self.kinds = name, inputs, ours, theirs, kinds or {}
        self.flops, self.backward, self.passes, self.passes_back = flops, backward, passes, passes_back


def random(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal, float32."""
    return aligned(np.random.default_rng(seed).standard_normal(shape, np.float32))


def image(n: int, size: int, channels: int) -> np.ndarray:
    """A batch of square pictures (N, H, W, C)."""
    return random(n, size, size, channels)


def their_geglu(torch: Any, x: Any) -> Any:
    """The gated half of a transformer's feed-forward (Shazeer 2020), as Stable Diffusion has it."""
    value, gate = x.chunk(2, -1)
    return value * torch.nn.functional.gelu(gate)


def attention(n: int, heads: int, length: int, size: int = 64) -> Work:
    """Self-attention of `length` tokens."""
    inputs = {name: random(n, heads, length, size, seed=i) for i, name in enumerate("qkv")}
    return Work(
        f"attention N={length}, {heads} head{'s' * (heads > 1)}, batch {n}",
        inputs,
        td.ops.scaled_dot_product_attention,
        lambda torch, q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        flops=4.0 * n * heads * length**2 * size,
        backward=2.5,
    )


def works() -> list[Work]:
    """The ops measured, at the sizes that a small denoiser and Stable Diffusion have."""

    def norm(n: int, size: int, channels: int) -> Work:
        return Work(
            f"GroupNorm+SiLU {channels} channels at {size}×{size}, batch {n}",
            {"x": image(n, size, channels), "weight": random(channels, seed=1), "bias": random(channels, seed=2)},
            lambda x, weight, bias: td.ops.group_norm(x, GROUPS, weight, bias, EPS, "silu"),
            lambda torch, x, weight, bias: torch.nn.functional.silu(torch.nn.functional.group_norm(x, GROUPS, weight, bias, EPS)),
            {"x": "image"},
        )

    def upsample(n: int, size: int, channels: int) -> Work:
        return Work(
            f"upsample + conv {channels} channels from {size}×{size}, batch {n}",
            {"x": image(n, size, channels), "w": random(3, 3, channels, channels, seed=1) / np.float32(3 * channels**0.5)},
            lambda x, w: td.ops.upsample_conv2d(x, w),
            lambda torch, x, w: torch.nn.functional.conv2d(
                torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"), w, None, 1, 1
            ),
            {"x": "image", "w": "conv"},
            flops=2.0 * n * (2 * size) ** 2 * 9 * channels**2,
        )

    return [
        norm(64, 28, 32),
        norm(64, 14, 64),
        norm(64, 7, 128),
        norm(1, 64, 320),
        Work(
            "LayerNorm 4096×320",
            {"x": random(4096, 320), "weight": random(320, seed=1), "bias": random(320, seed=2)},
            lambda x, weight, bias: td.ops.layer_norm(x, weight, bias, EPS),
            lambda torch, x, weight, bias: torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, EPS),
        ),
        Work(
            "softmax 8×1024×1024", {"x": random(8, 1024, 1024)}, lambda x: td.ops.softmax(x, -1), lambda torch, x: x.softmax(-1)
        ),
        attention(64, 1, 64),
        attention(64, 4, 64, 16),
        attention(16, 4, 256, 32),
        attention(4, 8, 1024, 40),
        attention(1, 8, 4096, 40),
        attention(1, 1, 4096, 64),
        Work("GELU 4096×1280", {"x": random(4096, 1280)}, lambda x: td.ops.gelu(x), lambda torch, x: torch.nn.functional.gelu(x)),
        Work(
            "SiLU 32 channels at 28×28, batch 64",
            {"x": image(64, 28, 32)},
            lambda x: td.ops.silu(x),
            lambda torch, x: torch.nn.functional.silu(x),
            {"x": "image"},
        ),
        Work(
            "GEGLU 4096×1280",
            {"x": random(4096, 2560)},
            lambda x: td.ops.geglu(x),
            their_geglu,
            passes=1.5,
            passes_back=2.5,
        ),
        upsample(64, 14, 64),
        upsample(1, 32, 320),
    ]


def cases(bench: Bench, work: Work) -> list[Case]:
    """A work's forward, and its forward with backward."""
    g = random(*_result_shape(work), seed=9)
    forward: dict[str, Side] = {}
    both: dict[str, Side] = {}
    if bench.torch:
        image_layout = "image" in work.kinds.values()
        for layout in ("contiguous", "channels_last") if image_layout else ("torch",):
            forward[layout], both[layout] = _torch_sides(bench.torch, work, g, layout)
    ours_forward, ours_both = _our_sides(work, g)
    bytes_ = next(iter(work.inputs.values())).nbytes
    traffic = (None, None) if work.flops else (work.passes * bytes_, (work.passes + work.passes_back) * bytes_)
    flops = (work.flops, work.flops * (1 + work.backward)) if work.flops else (None, None)
    return [
        Case("ops", f"{work.name}, forward", ours_forward, forward, 0.9, flops[0], traffic[0]),
        Case("ops", f"{work.name}, forward and backward", ours_both, both, 0.9, flops[1], traffic[1]),
    ]


def _result_shape(work: Work) -> tuple[int, ...]:
    with td.no_grad():
        return work.ours(*[td.from_numpy(a) for a in work.inputs.values()]).shape


def _our_sides(work: Work, g: np.ndarray) -> tuple[Side, Side]:
    constants = [td.from_numpy(a) for a in work.inputs.values()]
    leaves = [td.tensor(a, requires_grad=True) for a in work.inputs.values()]
    cotangent = td.from_numpy(g)

    def both() -> Any:
        y = work.ours(*leaves)
        return y, td.grad(y, leaves, cotangent)

    return (
        Side(lambda: work.ours(*constants), lambda y: [y.numpy()]),
        Side(both, lambda found: [found[0].numpy(), *(a.numpy() for a in found[1])]),
    )


def _torch_sides(torch: Any, work: Work, g: np.ndarray, layout: str) -> tuple[Side, Side]:
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    kinds = [work.kinds.get(name, "") for name in work.inputs]

    def there(array: np.ndarray, kind: str) -> Any:
        tensor = torch.from_numpy(array.copy())
        return tensor.permute(LAYOUTS[kind]).contiguous(memory_format=format) if kind in LAYOUTS else tensor

    def back(tensor: Any, kind: str) -> np.ndarray:
        tensor = tensor.detach()
        return tensor.permute(*np.argsort(LAYOUTS[kind])).numpy() if kind in LAYOUTS else tensor.numpy()

    constants = [there(a, kind) for a, kind in zip(work.inputs.values(), kinds)]
    leaves = [c.clone(memory_format=torch.preserve_format).requires_grad_() for c in constants]
    cotangent = there(g, kinds[0])

    def forward() -> Any:
        with torch.inference_mode():
            return work.theirs(torch, *constants)

    def both() -> Any:
        y = work.theirs(torch, *leaves)
        return y, torch.autograd.grad(y, leaves, cotangent)

    return (
        Side(forward, lambda y: [back(y, kinds[0])]),
        Side(both, lambda found: [back(a, kind) for a, kind in zip((found[0], *found[1]), (kinds[0], *kinds))]),
    )


def optimizer_case(bench: Bench, size: int = 512, count: int = 16) -> Case:
    """AdamW with the moving average of the weights, over `count` matrices size × size. Both sides go on from step to step."""
    values, gradients = ([random(size, size, seed=seed + i) for i in range(count)] for seed in (0, 100))
    parameters = [Parameter(a.copy()) for a in values]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = td.from_numpy(gradient)
    optimizer, ema = AdamW(parameters, 1e-3), EMA(parameters, 0.999)
    theirs = {}
    if bench.torch:
        torch = bench.torch
        weights = [torch.from_numpy(a.copy()).requires_grad_() for a in values]
        for weight, gradient in zip(weights, gradients):
            weight.grad = torch.tensor(gradient)
        opponent = torch.optim.AdamW(weights, 1e-3, weight_decay=0.01, fused=True)
        averages = [w.detach().clone() for w in weights]
        updates = 0

        def step() -> None:
            nonlocal updates
            opponent.step()
            updates += 1
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1 - min(0.999, (1 + updates) / (10 + updates)))

        theirs["torch"] = Side(step, lambda _: [a.detach().numpy().copy() for a in (*weights, *averages)])
    ours = Side(lambda: optimizer.step(ema=ema), lambda _: [*(p.data.copy() for p in parameters), *ema.average])
    traffic = 9.0 * 4 * size * size * count  # reads p, g, m, v and the average; writes all but g
    return Case("ops", f"AdamW + EMA, {size * size * count / 1e6:.1f} M weights", ours, theirs, 0.9, bytes=traffic)


def run(bench: Bench) -> None:
    """The suite, and the geometric mean of all its rows."""
    chosen = works()[1:12:4] if bench.settings.quick else works()
    rows = [bench.run(case) for work in chosen for case in cases(bench, work)]
    rows.append(bench.run(optimizer_case(bench)))
    bench.mean("ops", "geometric mean", rows, 1.5)
