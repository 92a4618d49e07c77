"""The randomness of training: at which times the network practises, what it is asked, and how much each answer counts.

A distribution of t is written as its quantile function (the time below which a share u of the draws lies), so that one
uniform number a sample decides, plain or stratified alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tinydiff.names import choose

from .predictions import KINDS, Array, add_noise, target
from .schedules import Floats, Schedule


def normal_quantile(u: ArrayLike) -> Floats:
    """The quantile function of the standard normal distribution, elementwise."""
    # 0 and 1 themselves have infinite quantiles.
    u = np.clip(np.asarray(u, dtype=np.float64), 2.0**-53, 1 - 2.0**-53)
    inverse = NormalDist().inv_cdf
    return np.array([inverse(float(value)) for value in u.flat]).reshape(u.shape)


def uniform(u: Floats, schedule: Schedule) -> Floats:
    """Every integer t equally often (Ho et al. 2020)."""
    return np.minimum(np.floor(u * schedule.timesteps), schedule.timesteps - 1)


def lognormal(u: Floats, schedule: Schedule, mean: float = -1.2, std: float = 1.2) -> Floats:
    """ln σ_ve normal (Karras et al. 2022, table 1): practises where a picture's features are decided. Clipped to the schedule."""
    return np.maximum(schedule.time(np.exp(mean + std * normal_quantile(u))), 0)


def logit_normal(u: Floats, schedule: Schedule, mean: float = 0.0, std: float = 1.0) -> Floats:
    """ln(τ/(1 − τ)) normal, with τ = t/(T − 1) (Esser et al. 2024, section 3.1): fewer draws at both ends."""
    return (schedule.timesteps - 1) / (1 + np.exp(-(mean + std * normal_quantile(u))))


DISTRIBUTIONS: dict[str, Callable[..., Floats]] = {"uniform": uniform, "lognormal": lognormal, "logit_normal": logit_normal}


def draw_times(
    rng: np.random.Generator,
    n: int,
    schedule: Schedule,
    distribution: str = "uniform",
    stratified: bool = False,
    **options: float,
) -> Floats:
    """Times t (n,) float64 in [0, T−1] for a training batch; fractional but for "uniform".

    `stratified` draws one number for the whole batch and spreads it evenly (Kingma et al. 2021, appendix I): every t has the
    same probability as before, and the loss of a batch varies less. `options` are those of the distribution: mean, std.
    """
    quantile = choose(DISTRIBUTIONS, distribution, "distribution of t")
    if stratified:
        # Shuffled, so that the i-th sample of a batch is not always the i-th noisiest.
        u = rng.permutation((rng.random() + np.arange(n) / max(n, 1)) % 1)
    else:
        u = rng.random(n)
    return quantile(u, schedule, **options)


def min_snr_weight(kind: str, alpha: ArrayLike, sigma: ArrayLike, gamma: float = 5.0) -> Floats:
    """Weight of each sample's squared error (Hang et al. 2023): an error of x_0 counts min(SNR, γ), whatever is predicted.

    As an error of x_0 is 1/SNR of the noise's and 1/(SNR + 1) of v's squared, the weight is divided accordingly.
    """
    choose(KINDS, kind, "prediction kind")
    if gamma <= 0:
        raise ValueError(f"min-SNR: gamma = {gamma}; it must be positive (the paper uses 5)")
    a, s = np.asarray(alpha, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    with np.errstate(divide="ignore"):
        snr = a**2 / s**2
        share = np.minimum(1, gamma / snr)  # min(SNR, γ)/SNR, finite at either end
    if kind == "x0":
        return np.minimum(snr, gamma)
    return share if kind == "noise" else share * a**2 / (a**2 + s**2)


@dataclass(frozen=True)
class Example:
    """A training batch of N: what goes in, what should come out, and how much it counts."""

    x: Array  # (N, …) noisy pictures
    t: NDArray[np.float32]  # (N,) times
    target: Array  # (N, …)
    weight: NDArray[Any]  # (N,) in the pictures' dtype; mean(weight · mean_pixels((prediction − target)²)) is the loss


def make_example(
    x0: Array,
    rng: np.random.Generator,
    schedule: Schedule,
    kind: str = "v",
    distribution: str = "uniform",
    stratified: bool = False,
    gamma: float | None = None,
    **options: float,
) -> Example:
    """Noise the pictures x0 (N, H, W, C), float, for one training step. `gamma` turns min-SNR weighting on."""
    if not np.issubdtype(x0.dtype, np.floating):
        raise TypeError(f"pictures have dtype {x0.dtype}; scale them to [-1, 1] as float32 first")
    t = draw_times(rng, len(x0), schedule, distribution, stratified, **options)
    noise = rng.standard_normal(x0.shape, dtype=np.float32).astype(x0.dtype, copy=False)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    weight = np.ones(len(x0)) if gamma is None else min_snr_weight(kind, alpha, sigma, gamma)
    return Example(
        add_noise(x0, noise, alpha, sigma), t.astype(np.float32), target(kind, x0, noise, alpha, sigma), weight.astype(x0.dtype)
    )
