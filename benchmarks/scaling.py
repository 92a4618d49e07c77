"""How a training step's time grows with resolution, channels and batch, and what threads gain.

Each sweep is of time per operation over a decade. One point more, below each decade, shows where a step has so little
arithmetic that Python is in charge (see `overhead`).
"""

from __future__ import annotations

from typing import Any

from benchmarks.harness import Bench, Row
from benchmarks.train import Batch, make_batch, preset, step_case

SWEEPS = {"resolution": (8, 16, 32, 64, 128, 160), "channels": (16, 32, 64, 128, 256, 320), "batch": (1, 4, 8, 16, 32, 40)}
REST = {  # of each sweep's networks and batches, so that a decade begins with some milliseconds of arithmetic
    "resolution": {"channels": 64, "batch": 16},
    "channels": {"resolution": 64, "batch": 8},
    "batch": {"resolution": 32, "channels": 64},
}
LARGEST_SPREAD = 2.0


def network(channels: int) -> dict[str, Any]:
    """The small preset at one width throughout, whose heads divide every width of the sweep."""
    return preset("small", block_out_channels=[channels, channels, channels], attention_head_dim=16)


def measure(bench: Bench, what: str, value: int) -> Row:
    """A step with one of the three changed."""
    chosen = REST[what] | {what: value}
    config = network(chosen["channels"])
    batch = make_batch(chosen["batch"], config, chosen["resolution"])
    case = step_case(bench, f"{what} {value}", config, batch, target=None)
    case.suite, case.extra = "scaling", {"sweep": what, "value": value, "flops": case.flops}
    row = bench.run(case)
    for side in ("ours", "theirs"):
        if row[f"{side}_ms"] and case.flops:
            row[f"{side}_ps_per_flop"] = 1e9 * row[f"{side}_ms"] / case.flops
    return row


def compare_threads(bench: Bench, name: str, config: dict[str, Any], batch: Batch) -> None:
    """A step on one thread and on all, and each side's speedup."""
    rows: list[Row] = []
    counts = (1, bench.threads)
    for count in counts:
        with bench.on_threads(count):
            case = step_case(bench, f"{name}, {count} thread{'s' if count > 1 else ''}", config, batch, target=None)
            case.suite = "scaling"
            rows.append(bench.run(case))
    one, every = rows
    times = {side: (one[f"{side}_ms"], every[f"{side}_ms"]) for side in ("ours", "theirs")}
    speedups = {side: alone / together for side, (alone, together) in times.items() if alone and together}
    summary: Row = {"suite": "scaling", "case": f"{name}: speedup from 1 to {counts[1]} threads"}
    summary["remark"] = " ".join(f"{side} {value:.2f}" for side, value in speedups.items())
    bench.add(summary | {f"{side}_speedup": value for side, value in speedups.items()})


def run(bench: Bench) -> None:
    """The suite: a row per point, and for each sweep how far the time per operation spreads; then one thread against all."""
    for what, values in SWEEPS.items():
        rows = [measure(bench, what, value) for value in (values[:3] if bench.settings.quick else values)]
        summary: Row = {"suite": "scaling", "case": f"{what}: spread of time per operation", "remark": ""}
        for side in ("ours", "theirs"):
            found = [
                row[f"{side}_ps_per_flop"] for row in rows if 10 * row["value"] >= values[-1] and row.get(f"{side}_ps_per_flop")
            ]
            if found:
                summary[f"{side}_spread"] = max(found) / min(found)
                summary["remark"] += f"{side} {summary[f'{side}_spread']:.2f} "
        if "ours_spread" in summary:
            summary["met"] = summary["ours_spread"] <= LARGEST_SPREAD
            summary["remark"] += f"(at most {LARGEST_SPREAD:g}: {'met' if summary['met'] else 'not met'})"
        bench.add(summary)
    for name in ("small", "base") if bench.threads > 1 else ():
        n, config = 4 if bench.settings.quick else 64, preset(name)
        compare_threads(bench, f"{name}, batch {n}", config, make_batch(n, config))
