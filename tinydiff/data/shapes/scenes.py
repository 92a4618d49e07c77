"""Scenes of one or two coloured shapes, as words: "a small red circle above a large blue square", both ways.

"X above Y" and "Y below X" are one scene. Which scenes are held out of training is a rule, `Scene.held_out`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tinydiff.data.split import held_out

COLOURS = {
    "red": (220, 30, 30),
    "orange": (250, 140, 10),
    "yellow": (250, 215, 30),
    "green": (30, 165, 60),
    "blue": (35, 85, 225),
    "purple": (150, 50, 190),
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "large")
RELATIONS = {"above": "below", "left of": "right of"}  # and what the second thing is to the first
TRIALS = 8  # until a false caption may be used


@dataclass(frozen=True)
class Thing:
    """A shape of some colour; `size` None says nothing of its size."""

    colour: str
    shape: str
    size: str | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("colour", self.colour, COLOURS), ("shape", self.shape, SHAPES), ("size", self.size, SIZES)):
            if value not in known and not (name == "size" and value is None):
                raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(known)}")

    def __str__(self) -> str:
        words = f"{self.size} {self.colour} {self.shape}" if self.size else f"{self.colour} {self.shape}"
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Scene:
    """One thing, or two of which the first is `relation` ("above" or "left of") the second."""

    first: Thing
    relation: str | None = None
    second: Thing | None = None

    def __post_init__(self) -> None:
        if (self.relation is None) != (self.second is None) or self.relation not in (None, *RELATIONS):
            raise ValueError(
                f"a scene is one thing, or two with a relation ({' or '.join(RELATIONS)}); got {self.relation!r}, {self.second}"
            )

    def __str__(self) -> str:
        return f"{self.first} {self.relation} {self.second}" if self.second else str(self.first)

    @property
    def things(self) -> tuple[Thing, ...]:
        """One or two."""
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def without_sizes(self) -> Scene:
        """The same, with nothing said of sizes."""
        second = None if self.second is None else replace(self.second, size=None)
        return Scene(replace(self.first, size=None), self.relation, second)

    @property
    def held_out(self) -> bool:
        """Whether this combination is kept for the test, in all sizes: every tenth pair is, by `split.held_out` of its words
        without sizes, such as "a red circle above a blue square". Things alone are all for training.
        """
        return self.second is not None and held_out(str(self.without_sizes))

    def captions(self) -> tuple[str, ...]:
        """Ways to say it: with the sizes, as far as they are known, and without."""
        return tuple(dict.fromkeys(caption for scene in (self, self.without_sizes) for caption in scene._phrasings()))

    def _phrasings(self) -> tuple[str, ...]:
        x, y = self.first, self.second
        if self.relation is None:
            return str(x), f"a picture of {x}"
        if self.relation == "above":
            return f"{x} above {y}", f"{y} below {x}", f"{x} is above {y}", f"{y} under {x}"
        return f"{x} left of {y}", f"{y} right of {x}", f"{x} to the left of {y}", f"{y} to the right of {x}"


# -------------------------------------------------------------------------------------------------------------- from words

_THING = rf"(?:(?:a|an|the)\s+)?(?:({'|'.join(SIZES)})\s+)?({'|'.join(COLOURS)})\s+({'|'.join(SHAPES)})"
_RELATION = r"\s+(?:is\s+)?(above|below|under|(?:to\s+the\s+)?(?:left|right)\s+of)\s+"
_SCENE = re.compile(rf"(?:a\s+picture\s+of\s+)?{_THING}(?:{_RELATION}{_THING})?\.?")


def parse(caption: str) -> Scene:
    """The scene that a caption speaks of. Raises ValueError for other words than `Scene.captions` uses."""
    match = _SCENE.fullmatch(caption.strip().lower())
    if match is None:
        raise ValueError(
            f'{caption!r} is not understood; write it like "a small red circle above a large blue square" or "a green star" '
            f"(colours: {', '.join(COLOURS)}; shapes: {', '.join(SHAPES)})"
        )
    size, colour, shape, words, other_size, other_colour, other_shape = match.groups()
    first = Thing(colour, shape, size)
    if words is None:
        return Scene(first)
    second = Thing(other_colour, other_shape, other_size)
    word = words.split()[-2] if words.endswith("of") else words
    relation = "above" if word in ("above", "below", "under") else "left of"
    return Scene(first, relation, second) if word in ("above", "left") else Scene(second, relation, first)


# ------------------------------------------------------------------------------------------------------------------ chance


def draw_scene(rng: np.random.Generator, split: str | None = None, alone: float = 0.25) -> Scene:
    """A scene by chance, of one split or of both; `alone` is the share of single things (which the test has none of).

    Two things differ in colour or in shape. All scenes of a kind are equally likely.
    """

    def one_of(known: tuple[str, ...]) -> str:
        return known[int(rng.random() * len(known))]

    def thing() -> Thing:
        return Thing(one_of(tuple(COLOURS)), one_of(SHAPES), one_of(SIZES))

    if split != "test" and rng.random() < alone:
        return Scene(thing())
    while True:
        scene = Scene(thing(), one_of(tuple(RELATIONS)), thing())
        first, second = scene.without_sizes.things
        if first != second and (split is None or scene.held_out == (split == "test")):
            return scene


def swaps(scene: Scene) -> list[Scene]:
    """The same words, falsely put together: colours, shapes or sizes exchanged, or the relation turned around."""
    if scene.second is None:
        return []
    x, y = scene.first, scene.second
    found = [Scene(y, scene.relation, x)]
    for name in ("colour", "shape", "size"):
        ours, theirs = {name: getattr(x, name)}, {name: getattr(y, name)}
        found.append(Scene(replace(x, **theirs), scene.relation, replace(y, **ours)))
    return [other for other in dict.fromkeys(found) if other != scene]


def _changes(scene: Scene) -> list[tuple[int | None, str, list[str]]]:
    """What can be said otherwise: of which thing (None: of the scene), which of its words, and what it might be instead."""
    known = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}
    found: list[tuple[int | None, str, list[str]]] = []
    for place, thing in enumerate(scene.things):
        for name, words in known.items():
            own = getattr(thing, name)
            if own is not None:
                found.append((place, name, [word for word in words if word != own]))
    if scene.relation is not None:
        found.append((None, "relation", [word for word in RELATIONS if word != scene.relation]))
    return found


def _changed(scene: Scene, place: int | None, name: str, word: str) -> Scene:
    if place is None:
        return replace(scene, relation=word)
    thing = replace(scene.things[place], **{name: word})
    return replace(scene, first=thing) if place == 0 else replace(scene, second=thing)


def near_misses(scene: Scene) -> list[Scene]:
    """All scenes in which one word is another: a colour, a shape, a size, or the relation."""
    return [_changed(scene, place, name, word) for place, name, words in _changes(scene) for word in words]


def candidates(scene: Scene, rng: np.random.Generator, n: int = 100) -> list[str]:
    """n captions of one wording, of which the first is the scene's own and all others are false: first its `swaps`, then up to
    half of n with one word wrong, and the rest by chance.
    """
    misses = near_misses(scene)
    misses = [misses[i] for i in rng.permutation(len(misses))]
    chosen = dict.fromkeys([scene, *swaps(scene), *misses][: max(n // 2, 1)])
    while len(chosen) < n:
        chosen[draw_scene(rng, alone=0.0 if scene.second else 1.0)] = None
    return [str(other) for other in chosen]


def misleading(said: Sequence[str], caption: str, rng: np.random.Generator, n: int) -> list[str]:
    """Up to n captions worded as `caption` but false, of `said`, all that `Scene.captions` says of one scene: every second with
    words exchanged, the others with one word wrong, each kind as often. None speaks of a held-out scene.
    """
    scene, wording = parse(said[0]), said.index(caption)
    exchanged, changes = swaps(scene), _changes(scene)
    found = []
    for i in range(n):
        for which, word in rng.random((TRIALS, 2)):
            if i % 2 == 0 and exchanged:
                other = exchanged[int(which * len(exchanged))]
            else:
                place, name, known = changes[int(which * len(changes))]
                other = _changed(scene, place, name, known[int(word * len(known))])
            words = other.captions()
            if wording < len(words) and words[wording] not in said and not other.held_out:
                found.append(words[wording])
                break
    return found
