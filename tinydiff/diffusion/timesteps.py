"""At which times a sampler evaluates the network: n steps out of the schedule's T.

Every spacing gives n + 1 decreasing times; step i goes from times[i] to times[i + 1], and the last one is where the sampler
stops (the clean picture unless `final` says otherwise). What Stable Diffusion 1 does for each sampler is in `SD1`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from tinydiff.names import choose

from .schedules import CLEAN, Floats, Schedule, karras

EDM_SIGMA_MAX = 80.0  # Karras et al. 2022, table 1: beyond it a picture in [−1, 1] leaves no trace


def leading(schedule: Schedule, steps: int, offset: int = 0) -> Floats:
    """0, k, 2k, … with k = T // n, plus `offset`: never reaches the noisiest level (Song et al. 2021; Stable Diffusion 1)."""
    return (np.arange(float(steps)) * (schedule.timesteps // steps))[::-1] + offset


def linspace(schedule: Schedule, steps: int) -> Floats:
    """n equal steps from T − 1 to 0, both included; fractional."""
    return np.linspace(schedule.timesteps - 1, 0, steps)


def linspace_open(schedule: Schedule, steps: int) -> Floats:
    """n + 1 rounded equal steps from T − 1 to 0, without the last (DPM-Solver++)."""
    return np.linspace(schedule.timesteps - 1, 0, steps + 1)[:-1].round()


def trailing(schedule: Schedule, steps: int) -> Floats:
    """T − 1, T − 1 − T/n, …: begins at the noisiest level whatever n is (Lin et al. 2024, table 2)."""
    return np.linspace(schedule.timesteps, 0, steps + 1)[:-1].round() - 1


def karras_sigmas(
    schedule: Schedule, steps: int, rho: float = 7.0, sigma_min: float | None = None, sigma_max: float | None = None
) -> Floats:
    """Times of the Karras et al. 2022 noise levels. The range is the schedule's own, up to σ_ve = 80, unless given."""
    low = schedule.sigmas[0] if sigma_min is None else sigma_min
    high = min(schedule.sigmas[-1], EDM_SIGMA_MAX) if sigma_max is None else sigma_max
    first, last = schedule.sigmas[0], schedule.sigmas[-1]
    if not first <= low < high <= last:
        raise ValueError(
            f"karras spacing: sigmas {low:.4g} to {high:.4g} must lie inside the schedule's {first:.4g} to {last:.4g}"
        )
    return schedule.time(karras(steps, low, high, rho)[::-1] if steps > 1 else high).reshape(-1)


SPACINGS: dict[str, Callable[..., Floats]] = {
    "leading": leading,
    "linspace": linspace,
    "linspace_open": linspace_open,
    "trailing": trailing,
    "karras": karras_sigmas,
}

# Keyword arguments of `timesteps` that reproduce Stable Diffusion 1's samplers.
SD1: dict[str, dict[str, Any]] = {
    "ddpm": {"spacing": "leading", "offset": 1},
    "ddim": {"spacing": "leading", "offset": 1, "final": 0.0},
    "euler": {"spacing": "linspace"},
    "euler_ancestral": {"spacing": "linspace"},
    "heun": {"spacing": "linspace"},
    "dpmpp_2m": {"spacing": "linspace_open"},
}


def timesteps(schedule: Schedule, steps: int, spacing: str = "trailing", final: float = CLEAN, **options: float) -> Floats:
    """n + 1 decreasing times, float64 of shape (steps + 1,), the last one being `final` (−1: clean; 0: the first noise level).

    `options` are those of the spacing: offset for leading; rho, sigma_min and sigma_max for karras.
    Raises ValueError for an unknown spacing or a number of steps that the schedule can't give.
    """
    space = choose(SPACINGS, spacing, "timestep spacing")
    if not 1 <= steps <= schedule.timesteps:
        raise ValueError(f"steps = {steps}; choose between 1 and {schedule.timesteps}")
    times = space(schedule, steps, **options)
    if not (times[-1] >= 0 and times[0] <= schedule.timesteps - 1 and (np.diff(times) < 0).all()):
        raise ValueError(
            f"{spacing} spacing can't place {steps} steps with {options} inside 0 … {schedule.timesteps - 1}; take fewer"
        )
    if times[-1] <= final:  # a walk that already ends at the final level has one step fewer
        times = times[:-1]
    return np.append(times, final)


def from_strength(times: Floats, strength: float) -> Floats:
    """The part of `times` that a picture-to-picture run walks: it starts at step n − int(n·strength)."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength = {strength}; choose between 0 (keep the picture) and 1 (start from noise alone)")
    steps = len(times) - 1
    return times[steps - int(steps * strength) :]
