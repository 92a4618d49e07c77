"""Few combinations in which every two values of any two axes meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def pairwise(axes: Mapping[str, Sequence[Any]], valid: Callable[[Row], bool], *, tries: int = 30) -> list[Row]:
    """Rows (one value an axis) that hold every pair of values that some valid row can hold, as far as `tries` finds it.

    Greedy and deterministic: each row starts from a pair that is still missing and takes, axis by axis, the value that
    brings the most missing pairs.
    """
    rng = random.Random(0)
    names = list(axes)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(axes[names[a]]))
        for j in range(len(axes[names[b]]))
    }
    rows: list[Row] = []
    while missing:
        pair = min(missing)
        # half of the tries are blind, for what cannot be had stays missing and draws the others
        candidates = [_complete(dict(pair), axes, names, missing if n % 2 else set(), rng) for n in range(tries)]
        good = [c for c in candidates if valid(_row(c, axes, names))]
        if not good:
            missing.discard(pair)  # no row holds it, or hardly any
            continue
        best = max(good, key=lambda choice: len(_pairs(choice) & missing))
        missing -= _pairs(best)
        rows.append(_row(best, axes, names))
    return rows


def _complete(
    choice: dict[int, int], axes: Mapping[str, Sequence[Any]], names: list[str], missing: set, rng: random.Random
) -> dict[int, int]:
    rest = [a for a in range(len(names)) if a not in choice]
    rng.shuffle(rest)
    for axis in rest:
        values = list(range(len(axes[names[axis]])))
        rng.shuffle(values)
        choice[axis] = max(values, key=lambda v: sum(_pair((axis, v), other) in missing for other in choice.items()))
    return choice


def _pair(one: tuple[int, int], other: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    return (one, other) if one[0] < other[0] else (other, one)


def _pairs(choice: dict[int, int]) -> set:
    return set(itertools.combinations(sorted(choice.items()), 2))


def _row(choice: dict[int, int], axes: Mapping[str, Sequence[Any]], names: list[str]) -> Row:
    return {name: axes[name][choice[i]] for i, name in enumerate(names)}
