"""Choosing one of a few things by its name."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


def choose(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`; an unknown name raises ValueError with the nearest known one, or all of them."""
    if name in table:
        return table[name]
    raise ValueError(f"unknown {what} {name!r}: {suggestion(name, table)}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """What to say after a name that isn't known: the nearest that is, or all of them."""
    known = list(known)
    near = get_close_matches(str(name), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
