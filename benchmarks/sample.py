"""Sampling: 50 DDIM steps with classifier-free guidance, of one picture and of 64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

import tinydiff as td
from benchmarks.harness import Bench, Case, Side
from benchmarks.train import CLASSES, Batch, build, preset, training_flops
from tinydiff.diffusion import Schedule, ddim, denoiser, guide, make_schedule, timesteps

GUIDANCE = 2.0


def our_sampler(config: dict[str, Any], noise: np.ndarray, labels: np.ndarray, schedule: Schedule, times: np.ndarray) -> Side:
    """As `tinydiff sample` draws."""
    model = build(config).requires_grad_(False)

    def predict(x: np.ndarray, t: np.ndarray, labels: np.ndarray) -> np.ndarray:
        with td.no_grad():
            return model(td.from_numpy(x), t, labels).numpy()

    denoise = denoiser(guide(predict, labels, CLASSES, GUIDANCE), schedule, "v", clip=1.0)
    return Side(lambda: ddim(denoise, noise, schedule, times), lambda x: [x])


def torch_sampler(
    config: dict[str, Any], noise: np.ndarray, labels: np.ndarray, schedule: Schedule, times: np.ndarray, layout: str
) -> Side:
    """The same loop in PyTorch, without leaving it between steps."""
    import torch

    from benchmarks.twin import channels_first, channels_last, twin

    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = twin(build(config)).to(memory_format=memory_format).eval()
    start = channels_first(noise).to(memory_format=memory_format)
    both = torch.cat([torch.full((len(labels),), CLASSES), torch.from_numpy(labels)])
    levels = list(zip(times.tolist(), schedule.alpha(times).tolist(), schedule.sigma(times).tolist()))

    def draw() -> Any:
        x = start
        with torch.inference_mode():
            for (t, a, s), (_, a_next, s_next) in pairwise(levels):
                nothing, told = model(torch.cat([x, x]), torch.full((len(both),), t), both).chunk(2)
                v = nothing + GUIDANCE * (told - nothing)
                x0 = (a * x - s * v).clamp(-1, 1)
                x = a_next * x0 + s_next / s * (x - a * x0)
        return x

    return Side(draw, lambda x: [channels_last(x)])


def case(bench: Bench, name: str, n: int, steps: int, size: int = 28) -> Case:
    """One row."""
    config, rng = preset(name), np.random.default_rng(0)
    noise, labels = rng.standard_normal((n, size, size, 1), np.float32), rng.integers(0, CLASSES, n)
    schedule = make_schedule("cosine")
    times = timesteps(schedule, steps, "trailing")
    arguments = (config, noise, labels, schedule, times)
    theirs = {}
    if bench.torch:
        theirs = {layout: torch_sampler(*arguments, layout) for layout in ("contiguous", "channels_last")}
    batch: Batch = {"x": noise, "t": np.zeros(n, np.float32), "labels": labels}
    flops = training_flops(config, batch) / 3 * 2 * steps  # forward only, twice a step
    title = f"{name}, {steps} DDIM steps with guidance, batch {n}"
    return Case("sample", title, our_sampler(*arguments), theirs, target=2.0, flops=flops, tolerance=1e-3)


def run(bench: Bench) -> None:
    """The suite."""
    for name in ("small", "base"):
        for n in (1,) if bench.settings.quick else (1, 64):
            bench.run(case(bench, name, n, steps=5 if bench.settings.quick else 50))
