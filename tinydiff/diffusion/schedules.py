"""How much noise there is at which time: α_t and σ_t, for every t.

A noisy picture is x_t = α_t·x_0 + σ_t·ε with α² + σ² = 1 (the variance-preserving, "VP", view: a picture of unit variance
keeps it). Divided by α it reads x_0 + σ_ve·ε with σ_ve = σ/α (the variance-exploding, "VE", view of Karras et al. 2022):
the same family, so one increasing table of σ_ve describes a schedule completely.

Times are t = 0 … T−1 from least to most noise, as in Ho et al. 2020. Two extensions make samplers and training simpler:
t may be fractional (σ_ve is interpolated linearly, as Stable Diffusion's Euler sampler does), and t = −1, one step
before the first noise, is the clean picture.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tinydiff.names import choose

CLEAN = -1.0  # the time of a picture without noise

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Schedule:
    """Noise levels of T timesteps. `sigmas`: σ_ve of t = 0 … T−1, float64 of shape (T,), positive and increasing."""

    name: str
    sigmas: Floats

    def __post_init__(self) -> None:
        sigmas = np.array(self.sigmas, dtype=np.float64)
        if sigmas.ndim != 1 or sigmas.size < 2:
            raise ValueError(
                f"schedule {self.name!r}: sigmas have shape {sigmas.shape}; give one value per timestep, at least two"
            )
        if not (np.isfinite(sigmas).all() and sigmas[0] > 0 and (np.diff(sigmas) > 0).all()):
            raise ValueError(f"schedule {self.name!r}: sigmas must be finite, positive and increasing")
        sigmas.flags.writeable = False
        object.__setattr__(self, "sigmas", sigmas)

    @property
    def timesteps(self) -> int:
        """T, the number of timesteps."""
        return self.sigmas.size

    def sigma_ve(self, t: ArrayLike) -> Floats:
        """σ/α at times t in [−1, T−1], any shape. Raises ValueError outside."""
        t = np.asarray(t, dtype=np.float64)
        if not ((t >= CLEAN) & (t <= self.timesteps - 1)).all():
            raise ValueError(f"schedule {self.name!r}: t = {t} is outside −1 (clean) … {self.timesteps - 1}")
        return np.interp(t, np.arange(-1, self.timesteps), np.concatenate(([0.0], self.sigmas)))

    def alpha(self, t: ArrayLike) -> Floats:
        """α_t = √ᾱ_t, the factor of the picture."""
        return 1 / np.sqrt(1 + self.sigma_ve(t) ** 2)

    def sigma(self, t: ArrayLike) -> Floats:
        """σ_t = √(1 − ᾱ_t), the factor of the noise."""
        sigma = self.sigma_ve(t)
        return sigma / np.sqrt(1 + sigma**2)

    def log_snr(self, t: ArrayLike) -> Floats:
        """ln(α_t²/σ_t²); infinite for the clean picture."""
        with np.errstate(divide="ignore"):
            return -2 * np.log(self.sigma_ve(t))

    def time(self, sigma_ve: ArrayLike) -> Floats:
        """The t at which σ/α is `sigma_ve`: the inverse of `sigma_ve()`. Levels above the last are taken as the last."""
        sigma_ve = np.asarray(sigma_ve, dtype=np.float64)
        if not (sigma_ve >= 0).all():
            raise ValueError(f"schedule {self.name!r}: sigma must be at least 0, got {sigma_ve}")
        return np.interp(sigma_ve, np.concatenate(([0.0], self.sigmas)), np.arange(-1.0, self.timesteps))


def sigmas_of_betas(betas: Floats) -> Floats:
    """σ_ve from the variances β_t of the noise added at each step: ᾱ_t = Π (1 − β), σ_ve = √((1 − ᾱ)/ᾱ)."""
    if not ((betas > 0) & (betas < 1)).all():
        raise ValueError(
            f"betas must lie between 0 and 1, got {betas.min():.4g} to {betas.max():.4g}; change beta_start and beta_end"
        )
    # Summed logarithms and expm1 keep the digits of 1 − ᾱ where it is tiny.
    return np.sqrt(np.expm1(-np.cumsum(np.log1p(-betas))))


def linear(timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Floats:
    """β rises linearly (Ho et al. 2020)."""
    return sigmas_of_betas(np.linspace(beta_start, beta_end, timesteps))


def scaled_linear(timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Floats:
    """√β rises linearly (Rombach et al. 2022; the defaults are Stable Diffusion 1's)."""
    return sigmas_of_betas(np.linspace(beta_start**0.5, beta_end**0.5, timesteps) ** 2)


def cosine(timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Floats:
    """ᾱ falls as cos²((t/T + s)/(1 + s)·π/2) (Nichol & Dhariwal 2021). `max_beta` keeps the last step from erasing everything."""
    alpha_bar = np.cos((np.arange(timesteps + 1) / timesteps + offset) / (1 + offset) * np.pi / 2) ** 2
    return sigmas_of_betas(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta))


def karras(timesteps: int = 1000, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Floats:
    """σ_ve^(1/ρ) rises linearly (Karras et al. 2022, equation 5). ρ = 1 gives equal steps of σ; a larger ρ, more small ones."""
    if not (0 < sigma_min < sigma_max and rho > 0):
        raise ValueError(f"karras: need 0 < sigma_min < sigma_max and rho > 0, got {sigma_min}, {sigma_max} and {rho}")
    sigmas = np.linspace(sigma_min ** (1 / rho), sigma_max ** (1 / rho), timesteps) ** rho
    sigmas[0], sigmas[-1] = sigma_min, sigma_max  # a root and its power may differ in the last digit
    return sigmas


SCHEDULES: dict[str, Callable[..., Floats]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "karras": karras,
}


def make_schedule(name: str = "cosine", timesteps: int = 1000, **options: float) -> Schedule:
    """The named schedule. `options` are those of its function above. Raises ValueError for an unknown name."""
    build = choose(SCHEDULES, name, "schedule")
    if timesteps < 2:
        raise ValueError(f"schedule {name!r}: timesteps = {timesteps}; at least 2 are needed")
    return Schedule(name, build(timesteps, **options))
