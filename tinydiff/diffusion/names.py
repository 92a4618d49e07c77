"""Choosing one of a few things by its name."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


def choose(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`; an unknown name raises ValueError with the nearest known one, or all of them."""
    if name in table:
        return table[name]
    near = get_close_matches(str(name), table, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(table)}"
    raise ValueError(f"unknown {what} {name!r}: {hint}")
