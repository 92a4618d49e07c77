"""Diffusion: noise schedules, what networks predict, training's randomness, samplers and guidance, on plain NumPy arrays."""

from .guidance import guide
from .noise import begin_with, noise_source, slerp
from .predictions import KINDS, add_noise, target, to_noise, to_x0
from .samplers import SAMPLERS, ddim, ddpm, denoiser, dpmpp_2m, euler, euler_ancestral, heun, keep, sample, subtract
from .schedules import CLEAN, SCHEDULES, Schedule, make_schedule
from .timesteps import SD1, SPACINGS, from_strength, timesteps
from .training import DISTRIBUTIONS, Example, draw_times, make_example, min_snr_weight

__all__ = [
    "CLEAN",
    "DISTRIBUTIONS",
    "KINDS",
    "SAMPLERS",
    "SCHEDULES",
    "SD1",
    "SPACINGS",
    "Example",
    "Schedule",
    "add_noise",
    "begin_with",
    "ddim",
    "ddpm",
    "denoiser",
    "dpmpp_2m",
    "draw_times",
    "euler",
    "euler_ancestral",
    "from_strength",
    "guide",
    "heun",
    "keep",
    "make_example",
    "make_schedule",
    "min_snr_weight",
    "noise_source",
    "sample",
    "slerp",
    "subtract",
    "target",
    "timesteps",
    "to_noise",
    "to_x0",
]
