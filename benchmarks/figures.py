"""Figures: ratios by case, growth with size, and where a training step's time goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Row

if TYPE_CHECKING:
    from tinydiff.hooks import Profile

SHOWN = 12  # ops with a bar of their own


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The figures of a run's rows, as PNG files in `folder`; those without data are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    if any(row["ratio"] for row in rows):
        made.append(ratios(rows, folder / "ratios.png"))
    if any(row["suite"] == "scaling" and row["ours_ms"] for row in rows):
        made.append(scaling(rows, folder / "scaling.png"))
    return made


def ratios(rows: Sequence[Row], path: Path) -> Path:
    """Their time over ours for each case, with its target."""
    chosen = [row for row in rows if row["ratio"] and row["suite"] != "scaling" and not row.get("algorithm")][::-1]
    figure, axes = _axes(10, 1 + 0.22 * len(chosen))
    places = range(len(chosen))
    colors = ["tab:red" if row["met"] is False else "tab:green" if row["met"] else "tab:blue" for row in chosen]
    axes.barh(places, [row["ratio"] for row in chosen], color=colors)
    for place, row in zip(places, chosen):
        if row["target"] is not None:
            axes.plot([row["target"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(places, [f"{row['suite']}: {row['case']}" for row in chosen], fontsize=7)
    axes.set_xlabel("PyTorch's time over tinydiff's (black: target)")
    figure.savefig(path, dpi=120)
    return path


def scaling(rows: Sequence[Row], path: Path) -> Path:
    """Time per operation against size, a panel for each sweep."""
    from matplotlib.figure import Figure

    sweeps = list(dict.fromkeys(row["sweep"] for row in rows if row.get("sweep")))
    figure = Figure(figsize=(4 * len(sweeps), 3.2), layout="constrained")
    for axes, sweep in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps):
        for side, name in (("ours", "tinydiff"), ("theirs", "PyTorch")):
            points = [
                (row["value"], row[f"{side}_ps_per_flop"])
                for row in rows
                if row.get("sweep") == sweep and row.get(f"{side}_ps_per_flop")
            ]
            if points:
                axes.loglog(*zip(*points), marker="o", label=name)
        axes.set(xlabel=sweep, ylabel="ps per operation")
        axes.legend()
    figure.savefig(path, dpi=120)
    return path


def step_profile(profile: Profile, path: Path, title: str = "where a training step's time goes") -> Path:
    """Bars of the time by op, forward, backward and computed again; and what Python and the tape took."""
    seconds: dict[str, dict[str, float]] = {}
    for row in profile.rows:
        seconds.setdefault(row.op, {}).setdefault(row.phase, 0.0)
        seconds[row.op][row.phase] += row.seconds
    outside = max(0.0, profile.elapsed - sum(row.seconds for row in profile.rows))
    ordered = sorted(seconds, key=lambda name: -sum(seconds[name].values()))
    rest = {phase: sum(seconds[op].get(phase, 0.0) for op in ordered[SHOWN:]) for phase in ("forward", "backward", "recompute")}
    bars = {op: seconds[op] for op in ordered[:SHOWN]} | ({"other ops": rest} if len(ordered) > SHOWN else {})
    bars["optimiser, tape, Python"] = {"outside": outside}
    names = list(bars)[::-1]
    figure, axes = _axes(8, 1 + 0.3 * len(names))
    left = [0.0] * len(names)
    colors = {"forward": "tab:blue", "backward": "tab:orange", "recompute": "tab:green", "outside": "tab:grey"}
    for phase, color in colors.items():
        widths = [100 * bars[name].get(phase, 0.0) / profile.elapsed for name in names]
        if any(widths):
            axes.barh(names, widths, left=left, color=color, label=phase)
            left = [a + b for a, b in zip(left, widths)]
    axes.set(xlabel="% of the step", title=title)
    axes.legend()
    figure.savefig(path, dpi=120)
    return path
