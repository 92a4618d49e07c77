"""What each noise schedule, and each way of drawing t in training, does to a digit: one picture."""

from io import BytesIO

import numpy as np

from .predictions import Array, add_noise
from .schedules import SCHEDULES, make_schedule
from .training import DISTRIBUTIONS

COLUMNS = 12  # pictures a row


def draw_schedules(digit: Array, base: str = "cosine", seed: int = 0) -> bytes:
    """A PNG of every schedule and every distribution of t, on `digit` (H, W) or (H, W, 1) in [−1, 1].

    Above, a row a schedule: the digit at evenly spaced t, beside the log-SNR that t means. Below, a row a distribution under
    the schedule `base`: the digit at evenly spaced quantiles — an equal share of training is spent near each picture — beside
    the density of log-SNR. All pictures share one noise, so that rows differ by the schedule alone.
    """
    picture = np.asarray(digit, dtype=np.float32)
    if picture.ndim == 3 and picture.shape[-1] == 1:
        picture = picture[..., 0]
    if picture.ndim != 2 or picture.size == 0:
        raise ValueError(f"digit has shape {np.shape(digit)}; give one grey picture (H, W) or (H, W, 1)")
    from matplotlib.figure import Figure  # slow to import, and only needed here

    noise = np.random.default_rng(seed).standard_normal(picture.shape, dtype=np.float32)

    schedules = {name: make_schedule(name) for name in SCHEDULES}
    chosen = make_schedule(base)
    shares = (np.arange(COLUMNS) + 0.5) / COLUMNS
    rows = {
        **{name: (schedule, np.linspace(0, schedule.timesteps - 1, COLUMNS)) for name, schedule in schedules.items()},
        **{name: (chosen, quantile(shares, chosen)) for name, quantile in DISTRIBUTIONS.items()},
    }

    figure = Figure(figsize=(15, 1.12 * len(rows) + 1.3), dpi=110, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[len(SCHEDULES), len(DISTRIBUTIONS)], squeeze=False)[:, 0]
    above.suptitle("Schedules: the digit at evenly spaced t, from 0 (left) to T − 1", fontsize=11)
    below.suptitle(
        f"Distributions of t in training ({base} schedule): an equal share of the draws around each picture", fontsize=11
    )
    plots = []
    for part, names in ((above, list(SCHEDULES)), (below, list(DISTRIBUTIONS))):
        strip, plot = part.subfigures(1, 2, width_ratios=[COLUMNS * 0.9, 4], squeeze=False)[0]
        axes = strip.subplots(len(names), 1, squeeze=False)[:, 0]
        for name, ax in zip(names, axes):
            schedule, times = rows[name]
            alpha, sigma = schedule.alpha(times), schedule.sigma(times)
            tiles = add_noise(np.repeat(picture[None], COLUMNS, 0), np.repeat(noise[None], COLUMNS, 0), alpha, sigma)
            ax.imshow(np.concatenate(list(tiles), axis=1), cmap="gray", vmin=-2, vmax=2)
            ax.set_ylabel(name.replace("_", "\n"), rotation=0, ha="right", va="center", fontsize=10)
            ax.set_xticks(
                (np.arange(COLUMNS) + 0.5) * picture.shape[1],
                [f"{level:.2g}" if level < 10 else f"{level:.0f}" for level in sigma / alpha],
                fontsize=7,
            )
            ax.tick_params(length=0, pad=1)
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
        axes[-1].set_xlabel("σ/α of each picture under it", fontsize=8)
        plots.append(plot.subplots())

    levels, density = plots
    for name, schedule in schedules.items():
        t = np.arange(schedule.timesteps)
        levels.plot(t / (schedule.timesteps - 1), schedule.log_snr(t), label=name)
    levels.set(xlabel="t / (T − 1)", ylabel="ln SNR", ylim=(-15, 15))
    levels.axhline(0, color="0.8", zorder=0)

    u = (np.arange(20_000) + 0.5) / 20_000  # quantiles of equal shares: their histogram is the density, with no luck in it
    for name, quantile in DISTRIBUTIONS.items():
        density.hist(
            chosen.log_snr(quantile(u, chosen)), bins=np.linspace(-12, 12, 80).tolist(), density=True, histtype="step", label=name
        )
    density.set(xlabel="ln SNR", ylabel="density of the draws", xlim=(12, -12))
    for ax in plots:
        ax.legend(fontsize=8, frameon=False)
        ax.spines[["top", "right"]].set_visible(False)

    out = BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
