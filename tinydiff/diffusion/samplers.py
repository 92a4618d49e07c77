"""From noise to pictures: samplers as plain functions.

One convention: every sampler is called as `sampler(denoise, x, schedule, times, …)`. `denoise(x, t)` answers with the clean
picture x_0 that it sees in x at time t (a float, one for all; `denoiser` makes one from any network); x (N, H, W, C) is in the
VP view (x = α·x_0 + σ·ε, about unit variance) at times[0]; `times` are n + 1 decreasing times (`timesteps`). The result is x at
times[-1]. `noise` gives fresh noise shaped as x (`noise_source`); only the stochastic samplers ask for it. `callback(step, t,
x, x0)` sees each step: x at time t and the x_0 seen there.

With ε = (x − α·x_0)/σ, all but `subtract` walk the same family of marginals. euler is ddim at η = 0 and euler_ancestral is
ddpm is ddim at η = 1, step for step on the same times: what tells them apart in the literature is where they put their steps.
"""

from collections.abc import Callable
from inspect import signature
from itertools import pairwise
from math import log, sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tinydiff.names import choose

from .guidance import Predict
from .predictions import Array, add_noise, to_x0
from .schedules import CLEAN, Floats, Schedule
from .timesteps import from_strength, timesteps

Denoise = Callable[[Array, float], Array]
Noise = Callable[[], Array]
Callback = Callable[[int, float, Array, Array], None]
Level = tuple[float, float, float]  # t, α, σ


def denoiser(predict: Predict, schedule: Schedule, kind: str, clip: float | None = None) -> Denoise:
    """denoise(x, t) from a network's predict(x, t) of this kind; `clip` keeps x_0 within ±clip (1 for pictures in [−1, 1])."""

    def denoise(x: Array, t: float) -> Array:
        prediction = predict(x, t)
        if prediction.shape != x.shape:
            raise ValueError(f"the network answered {prediction.shape} to pictures of shape {x.shape}; the two must agree")
        x0 = to_x0(prediction, x, schedule.alpha(t), schedule.sigma(t), kind)
        return x0 if clip is None else np.clip(x0, -clip, clip)

    return denoise


def keep(denoise: Denoise, picture: Array, known: Array) -> Denoise:
    """A `denoise` that knows `picture` (broadcast to x) where `known` is True: inpainting.

    Every sampler walks from x towards the x_0 it is told, so there x stays the picture with noise as time has it, which is what
    the network sees, and ends as the picture (Lugmayr et al. 2022, without going back in time).
    """

    def denoise_rest(x: Array, t: float) -> Array:
        return np.where(known, picture, denoise(x, t))

    return denoise_rest


def _levels(schedule: Schedule, times: ArrayLike) -> list[Level]:
    """(t, α, σ) of each time, as Python numbers so that float32 pictures stay float32."""
    times = np.asarray(times, dtype=np.float64)
    if times.ndim != 1 or times.size < 1 or not (np.diff(times) < 0).all():
        raise ValueError(f"times must be a decreasing list (start, …, end), got {times}")
    return list(zip(times.tolist(), schedule.alpha(times).tolist(), schedule.sigma(times).tolist()))


def _need(noise: Noise | None, sampler: str) -> Noise:
    if noise is None:
        raise ValueError(f"{sampler} adds fresh noise at every step: pass noise=noise_source(seeds, shape)")
    return noise


def subtract(
    denoise: Denoise,
    x: Array,
    schedule: Schedule,
    times: ArrayLike,
    constant: float | None = None,
    callback: Callback | None = None,
) -> Array:
    """The plainest loop there is: predict the noise, subtract a constant C times it, repeat. Only times[0] and n are used.

    It works in the VE view, x_0 + σ_ve·ε, where what is left of the noise falls by C a step; by default C = σ_ve/n, so that
    nothing is left at the end. That makes it Euler's method with equal steps of σ — and shows why one wants a schedule. From
    σ_ve = 15 in 50 steps, C is 0.3: most steps are spent where the picture is still invisible and the network can only answer
    with an average of all pictures, and the last alone covers every level below 0.3, where strokes and edges are settled. The
    other samplers put their steps where the answer changes fastest: ten of dpmpp_2m, at Karras times, beat a hundred of these.
    With a C too small noise remains; with one too large the loop overshoots and draws the noise in negative.
    """
    (_, alpha, sigma), *after = _levels(schedule, times)
    start = sigma / alpha
    c = start / max(len(after), 1) if constant is None else float(constant)
    y = x / alpha
    for step in range(len(after)):
        # Once nothing is left by the count, keep asking at the lowest level that the network knows.
        left = max(start - step * c, float(schedule.sigmas[0]))
        t = float(schedule.time(left))
        x = float(schedule.alpha(t)) * y
        x0 = denoise(x, t)
        if callback:
            callback(step, t, x, x0)
        noise = (y - x0) / left
        y = y - c * noise
    return y


def ddim(
    denoise: Denoise,
    x: Array,
    schedule: Schedule,
    times: ArrayLike,
    eta: float = 0.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Array:
    """Song et al. 2021, equation 12. `eta` 0: deterministic; 1: as much fresh noise as ddpm; between: between."""
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim: eta = {eta}; choose between 0 (deterministic) and 1 (ddpm)")
    fresh = _need(noise, "ddim with eta > 0") if eta > 0 else None
    for step, ((t, a, s), (_, a_next, s_next)) in enumerate(pairwise(_levels(schedule, times))):
        x0 = denoise(x, t)
        if callback:
            callback(step, t, x, x0)
        std = eta * s_next / s * sqrt(1 - (a / a_next) ** 2)
        x = a_next * x0 + sqrt(s_next**2 - std**2) / s * (x - a * x0)
        if fresh and std > 0:
            x = x + std * fresh()
    return x


def ddpm(
    denoise: Denoise,
    x: Array,
    schedule: Schedule,
    times: ArrayLike,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Array:
    """Ancestral sampling, Ho et al. 2020: draw from q(x_s | x_t, x_0), equations 6 and 7, for any s before t."""
    fresh = _need(noise, "ddpm")
    for step, ((t, a, s), (_, a_next, s_next)) in enumerate(pairwise(_levels(schedule, times))):
        x0 = denoise(x, t)
        if callback:
            callback(step, t, x, x0)
        beta = 1 - (a / a_next) ** 2  # the noise that was added between the two times
        x = (a_next * beta / s**2) * x0 + (a / a_next * (s_next / s) ** 2) * x
        if s_next > 0:
            x = x + s_next / s * sqrt(beta) * fresh()
    return x


def euler(denoise: Denoise, x: Array, schedule: Schedule, times: ArrayLike, callback: Callback | None = None) -> Array:
    """Euler's method for dx/dσ = (x − x_0)/σ in the VE view (Karras et al. 2022, algorithm 1 without the correction)."""
    for step, ((t, a, s), (_, a_next, s_next)) in enumerate(pairwise(_levels(schedule, times))):
        x0 = denoise(x, t)
        if callback:
            callback(step, t, x, x0)
        y, sigma, sigma_next = x / a, s / a, s_next / a_next
        x = a_next * (y + (sigma_next - sigma) / sigma * (y - x0))
    return x


def euler_ancestral(
    denoise: Denoise,
    x: Array,
    schedule: Schedule,
    times: ArrayLike,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Array:
    """Euler past the next level σ' to σ_down, then up again with fresh noise: σ_up² = σ'²(σ² − σ'²)/σ², σ_down² = σ'² − σ_up²."""
    fresh = _need(noise, "euler_ancestral")
    for step, ((t, a, s), (_, a_next, s_next)) in enumerate(pairwise(_levels(schedule, times))):
        x0 = denoise(x, t)
        if callback:
            callback(step, t, x, x0)
        y, sigma, sigma_next = x / a, s / a, s_next / a_next
        up = sigma_next * sqrt(1 - (sigma_next / sigma) ** 2)
        down = sigma_next**2 / sigma
        y = y + (down - sigma) / sigma * (y - x0)
        x = a_next * (y + up * fresh() if up > 0 else y)
    return x


def heun(denoise: Denoise, x: Array, schedule: Schedule, times: ArrayLike, callback: Callback | None = None) -> Array:
    """Euler's step, then the mean of the slopes at its two ends (Karras et al. 2022, algorithm 1). Two evaluations a step."""
    for step, ((t, a, s), (t_next, a_next, s_next)) in enumerate(pairwise(_levels(schedule, times))):
        x0 = denoise(x, t)
        if callback:
            callback(step, t, x, x0)
        y, sigma, sigma_next = x / a, s / a, s_next / a_next
        slope = (y - x0) / sigma
        y_next = y + (sigma_next - sigma) * slope
        if sigma_next > 0:  # at the clean picture the slope has no value
            slope_next = (y_next - denoise(a_next * y_next, t_next)) / sigma_next
            y_next = y + (sigma_next - sigma) * ((slope + slope_next) / 2)
        x = a_next * y_next
    return x


def dpmpp_2m(denoise: Denoise, x: Array, schedule: Schedule, times: ArrayLike, callback: Callback | None = None) -> Array:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2: second order from the last two x_0, one evaluation a step.

    Its variable is λ = ln(α/σ). The first step has no predecessor and the last may reach λ = ∞: both are of first order.
    """
    levels = _levels(schedule, times)
    x0_before: Array | None = None
    h_before = 0.0
    for step, ((t, a, s), (_, a_next, s_next)) in enumerate(pairwise(levels)):
        x0 = denoise(x, t)
        if callback:
            callback(step, t, x, x0)
        shrink = (s_next / a_next) / (s / a)  # e^{−h}
        guess = x0
        if step < len(levels) - 2:
            h = -log(shrink)
            if x0_before is not None:
                guess = x0 + h / (2 * h_before) * (x0 - x0_before)
            x0_before, h_before = x0, h
        x = s_next / s * x + a_next * (1 - shrink) * guess
    return x


SAMPLERS: dict[str, Callable[..., Array]] = {
    "subtract": subtract,
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
}


def sample(
    name: str,
    denoise: Denoise,
    noise: Noise,
    schedule: Schedule,
    steps: int = 50,
    spacing: str | None = None,
    spacing_options: dict[str, Any] | None = None,
    picture: Array | None = None,
    strength: float = 1.0,
    callback: Callback | None = None,
    **options: Any,
) -> Array:
    """Draw pictures with the named sampler: its noise, times and start in one call.

    The first noise of `noise` is the start; `picture` (N, H, W, C) with a strength below 1 starts from it, noised to where the
    remaining steps begin. `spacing` is "trailing" unless given; for subtract "karras", whose start σ_ve ≤ 80 keeps its C in
    reason under any schedule. `spacing_options` go to `timesteps`, `options` to the sampler (eta, constant).
    Raises ValueError for an unknown sampler or spacing.
    """
    sampler = choose(SAMPLERS, name, "sampler")
    if "noise" in signature(sampler).parameters:
        options["noise"] = noise
    times: Floats = timesteps(
        schedule, steps, spacing or ("karras" if name == "subtract" else "trailing"), **(spacing_options or {})
    )
    x = noise()
    if picture is not None:
        times = from_strength(times, strength)
        if times[0] == CLEAN:
            return picture
        x = add_noise(picture, x, schedule.alpha(times[0]), schedule.sigma(times[0]))
    elif strength != 1:
        raise ValueError(f"strength = {strength} needs a picture to start from")
    return sampler(denoise, x, schedule, times, callback=callback, **options)
