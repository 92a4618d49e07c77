"""Figures, drawn with matplotlib (loaded when the first one is) and written as PNG, with their `settings` as metadata.

Names and captions are a user's: they are drawn as they are, never read as mathematics, which "$" would begin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinydiff.images import png_text
from tinydiff.io import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tinydiff.dream import PixelGradients

Settings = Mapping[str, Any] | None
LONGEST = 32  # characters of a label


def blank(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def save(figure: Figure, path: str | Path, settings: Settings = None) -> None:
    """Write it, atomically."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", pil_kwargs={"pnginfo": png_text(settings)})
    write_atomic(path, buffer.getvalue())


def loss_curve(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """The loss of each step in `rows` (of a run's stats), and its mean over the last fiftieth of the run."""
    steps = np.array([row["step"] for row in rows])
    losses = np.array([row["loss"] for row in rows], np.float64)
    if not len(losses):
        raise ValueError("there is no step to draw a loss curve of")
    window = max(1, len(losses) // 50)
    sums = np.cumsum(np.concatenate([[0.0], losses]))
    figure = blank(7, 3.5)
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.8", linewidth=0.6, label="each step")
    means = (sums[window:] - sums[:-window]) / window
    axes.plot(steps[window - 1 :], means, color="C0", label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss", yscale="log", xlim=(0, steps[-1]))
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    save(figure, path)


def probability_curve(probabilities: Sequence[float], name: str, path: str | Path, settings: Settings = None) -> None:
    """P(class | picture) at each step of a dream."""
    figure = blank(7, 3.5)
    axes = figure.subplots()
    axes.plot(probabilities)
    axes.set(xlabel="step", ylim=(-0.02, 1.02), xlim=(0, len(probabilities) - 1))
    axes.set_ylabel(f"P({name} | picture)", parse_math=False)
    axes.grid(alpha=0.3)
    save(figure, path, settings)


def pixel_gradient_figure(
    found: PixelGradients, picture: np.ndarray, name: str, path: str | Path, settings: Settings = None
) -> None:
    """The picture (H, W, C) in [-1, 1], its gradient by finite differences and by backward, and their difference."""
    figure = blank(11, 3.4)
    ways = f"by {found.evaluations:,} evaluations, or by one backward pass"
    figure.suptitle(f"How log P({name}) changes with each pixel: {ways}", parse_math=False)
    largest = float(np.abs(found.backward).max())
    difference = found.differences - found.backward
    worst = float(np.abs(difference).max())
    panels = (
        (picture, 1.0, "gray", "the picture"),
        (found.differences, largest, "RdBu_r", f"finite differences: {1000 * found.seconds_differences:.0f} ms"),
        (found.backward, largest, "RdBu_r", f"one backward pass: {1000 * found.seconds_backward:.1f} ms"),
        (difference, worst, "RdBu_r", f"their difference: at most {worst:.1e}"),
    )
    for axes, (values, limit, colours, title) in zip(figure.subplots(1, 4), panels):
        shown = axes.imshow(values.mean(-1), cmap=colours, vmin=-limit, vmax=limit)
        axes.set_title(title, fontsize=9)
        axes.axis("off")
        bar = figure.colorbar(shown, ax=axes, shrink=0.7)
        bar.ax.tick_params(labelsize=7)
    save(figure, path, settings)


def _short(text: str) -> str:
    """Its beginning: a long label would leave no room for what it labels."""
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def score_map(
    scores: np.ndarray,
    pictures: np.ndarray,
    captions: Sequence[str],
    path: str | Path,
    names: Sequence[str] = (),
    settings: Settings = None,
) -> None:
    """How well each caption fits each picture: cosines (N, M) of N pictures, uint8 (N, H, W, C), with M captions, as a heat map.

    The best caption of each picture has a frame. `names` are written beside the pictures. Long texts are cut.
    """
    from matplotlib.patches import Rectangle

    n, m = scores.shape
    captions, names = [_short(caption) for caption in captions], [_short(name) for name in names] or [""] * n
    figure = blank(1.8 + 0.07 * max(10, *map(len, names)) + 0.75 * m, 1.6 + 0.75 * n)
    axes = figure.subplots()
    shown = axes.imshow(scores, cmap="viridis", aspect="auto")
    axes.set_xticks(range(m), captions, rotation=40, ha="right", fontsize=8, parse_math=False)
    axes.set_yticks(range(n), names, fontsize=8, parse_math=False)
    axes.tick_params(axis="y", pad=62, length=0)
    for row, picture in enumerate(pictures):
        beside = axes.inset_axes((-1.4, row - 0.42, 0.84, 0.84), transform=axes.transData)
        beside.imshow(picture if picture.shape[-1] == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=255)
        beside.axis("off")
        for column, score in enumerate(scores[row]):
            bright = score > (scores.min() + scores.max()) / 2
            axes.text(column, row, f"{score:.2f}", ha="center", va="center", fontsize=8, color="black" if bright else "white")
        corner = (int(scores[row].argmax()) - 0.5, row - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=1.5))
    figure.colorbar(shown, ax=axes, label="cosine", shrink=0.8)
    save(figure, path, settings)


def attention_figure(
    rows: Sequence[tuple[np.ndarray, Sequence[str], np.ndarray]], path: str | Path, settings: Settings = None
) -> None:
    """A row for each (picture (H, W, C) uint8, words, maps (H, W, words)): the picture, then where each word was looked at.

    Within a row all maps have one scale, so a word that was looked at little stays dark.
    """
    columns = 1 + max(len(words) for _, words, _ in rows)
    figure = blank(1.2 * columns, 1.45 * len(rows))
    for (picture, words, maps), axes in zip(rows, figure.subplots(len(rows), columns, squeeze=False)):
        for plot in axes:
            plot.axis("off")
        axes[0].imshow(picture if picture.shape[-1] == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=255)
        for plot, word, seen in zip(axes[1:], words, np.moveaxis(maps, -1, 0)):
            plot.imshow(seen, cmap="inferno", vmin=maps.min(), vmax=maps.max())
            plot.set_title(word, fontsize=8, parse_math=False)
    save(figure, path, settings)
