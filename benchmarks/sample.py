"""Sampling: 50 DDIM steps with classifier-free guidance, of one picture and of 64."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

import tinydiff as td
from benchmarks.harness import Bench, Case, Side
from benchmarks.train import CLASSES, TINY, Batch, build, preset, training_flops
from tinydiff.diffusion import Schedule, ddim, denoiser, guide, make_schedule, timesteps

GUIDANCE = 2.0


def our_sampler(
    config: dict[str, Any],
    noise: np.ndarray,
    labels: np.ndarray,
    schedule: Schedule,
    times: np.ndarray,
    device: str = "cpu",
) -> Side:
    """As `tinydiff sample` draws."""
    model = cache(lambda: build(config).requires_grad_(False).to(device))

    def predict(x: np.ndarray, t: np.ndarray, labels: np.ndarray) -> np.ndarray:
        with td.no_grad():
            return model()(td.from_numpy(x).to(device), t, labels).numpy()

    denoise = denoiser(guide(predict, labels, CLASSES, GUIDANCE), schedule, "v", clip=1.0)
    return Side(lambda: ddim(denoise, noise, schedule, times), lambda x: [x])


def torch_sampler(
    config: dict[str, Any],
    noise: np.ndarray,
    labels: np.ndarray,
    schedule: Schedule,
    times: np.ndarray,
    layout: str,
    device: str = "cpu",
) -> Side:
    """The same loop in PyTorch, without leaving it between steps."""
    import torch

    from benchmarks.twin import channels_first, channels_last, twin

    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    torch.backends.cudnn.allow_tf32 = False
    model = twin(build(config)).to(device, memory_format=memory_format).eval()
    start = channels_first(noise).to(device, memory_format=memory_format)
    both = torch.cat([torch.full((len(labels),), CLASSES), torch.from_numpy(labels)]).to(device)
    levels = list(zip(times.tolist(), schedule.alpha(times).tolist(), schedule.sigma(times).tolist()))

    def draw() -> Any:
        x = start
        with torch.inference_mode():
            for (t, a, s), (_, a_next, s_next) in pairwise(levels):
                nothing, told = model(torch.cat([x, x]), torch.full((len(both),), t, device=device), both).chunk(2)
                v = nothing + GUIDANCE * (told - nothing)
                x0 = (a * x - s * v).clamp(-1, 1)
                x = a_next * x0 + s_next / s * (x - a * x0)
        return x.cpu()

    return Side(draw, lambda x: [channels_last(x)])


def case(bench: Bench, name: str, n: int, steps: int, size: int = 28, **changes: Any) -> Case:
    """One row: of a preset, or with `changes`."""
    config, rng = preset(name, **changes), np.random.default_rng(0)
    noise, labels = rng.standard_normal((n, size, size, 1), np.float32), rng.integers(0, CLASSES, n)
    schedule = make_schedule("cosine")
    times = timesteps(schedule, steps, "trailing")
    arguments = (config, noise, labels, schedule, times)
    theirs, device = {}, bench.settings.device
    if bench.torch:
        theirs = {layout: torch_sampler(*arguments, layout, device) for layout in ("contiguous", "channels_last")}
    batch: Batch = {"x": noise, "t": np.zeros(n, np.float32), "labels": labels}
    flops = training_flops(config, batch) / 3 * 2 * steps  # forward only, twice a step
    title = f"{name}, {steps} DDIM steps with guidance, batch {n}"
    reference = None if device == "cpu" else our_sampler(*arguments)
    ours = our_sampler(*arguments, device)
    return Case("sample", title, ours, theirs, 2.0, flops, counted=True, tolerance=1e-3, reference=reference)


def run(bench: Bench) -> None:
    """The suite; on the simulated GPU a tiny network is checked."""
    if bench.settings.device == "cudasim":
        bench.run(case(bench, "small", 1, steps=2, size=8, **TINY))
        return
    for name in ("small", "base"):
        for n in (1,) if bench.settings.quick else (1, 64):
            bench.run(case(bench, name, n, steps=5 if bench.settings.quick else 50))
