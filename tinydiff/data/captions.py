"""What is said of pictures: a few phrasings of one meaning for each, and which of them a training step hears."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Captions:
    """Phrasings for each of N pictures; pictures of which the same is said share a meaning.

    Attributes:
        phrasings: for each meaning, its captions: at least one.
        meaning: int64 (N,): an index into `phrasings` for each picture.
    """

    phrasings: tuple[tuple[str, ...], ...]
    meaning: np.ndarray

    def __post_init__(self) -> None:
        if self.meaning.dtype != np.int64 or self.meaning.ndim != 1:
            raise ValueError(f"meanings must be int64 (N,), got {self.meaning.dtype} {self.meaning.shape}")
        if len(self.meaning) and not (self.meaning.min() >= 0 and self.meaning.max() < len(self.phrasings)):
            raise ValueError(
                f"meanings run from {self.meaning.min()} to {self.meaning.max()}, but there are {len(self.phrasings)}"
            )
        for number, group in enumerate(self.phrasings):
            if not group or not all(caption.strip() for caption in group):
                raise ValueError(f"meaning {number} has no caption, or an empty one: {group}")

    @classmethod
    def of(cls, captions: Iterable[Sequence[str]]) -> Captions:
        """From each picture's own phrasings: where two pictures have the same ones, they share a meaning."""
        numbers: dict[tuple[str, ...], int] = {}
        meaning = [numbers.setdefault(tuple(group), len(numbers)) for group in captions]
        return cls(tuple(numbers), np.array(meaning, np.int64))

    def __len__(self) -> int:
        return len(self.meaning)

    def __getitem__(self, index: int) -> tuple[str, ...]:
        """All phrasings for one picture."""
        return self.phrasings[self.meaning[index]]

    def draw(self, index: np.ndarray, seed: int, step: int) -> list[str]:
        """A caption for each of the pictures `index`, drawn from its phrasings: a function of the arguments alone."""
        chances = np.random.default_rng([seed, step, 0xCA]).random(len(index))
        groups = [self[i] for i in index]
        return [group[int(chance * len(group))] for group, chance in zip(groups, chances)]

    def every(self) -> list[str]:
        """All captions there are, each once, in order: what a vocabulary is made from."""
        return list(dict.fromkeys(caption for group in self.phrasings for caption in group))


def a(noun: str) -> str:
    """With its article: "a seven", "an eight", "the flag of Malta"; as it is where it takes none ("scissors", "Saturn")."""
    first, last = noun.split(" ")[0], noun.split(" ")[-1]
    if noun.startswith("flag of "):
        return f"the {noun}"
    plural = last.endswith("s") and not last.endswith(("ss", "us", "is"))
    if noun[0].isupper() or plural:
        return noun
    eight = first.isdecimal() and (first.startswith("8") or first in ("11", "18"))
    return f"{'an' if eight or (noun[0] in 'aeiou' and not noun.startswith(('one', 'uni', 'eu', 'ewe'))) else 'a'} {noun}"


def fill(templates: Sequence[str], words: Mapping[str, str]) -> tuple[str, ...]:
    """Each template with the words in it: "draw me {a_word}" with {"a_word": "a seven"}."""
    return tuple(dict.fromkeys(template.format_map(words) for template in templates))


# ----------------------------------------------------------------------------------------------------------------- digits

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

DIGIT_TRAINING = (
    "{word}",
    "{digit}",
    "{a_word}",
    "{a_digit}",
    "a handwritten {word}",
    "a handwritten {digit}",
    "the number {word}",
    "the number {digit}",
    "the digit {word}",
    "the digit {digit}",
    "a picture of {a_word}",
    "a picture of {a_digit}",
    "a picture of the number {digit}",
    "{a_word} in white on black",
    "{a_digit} in white on black",
    "{a_word} written with a pen",
    "{a_digit} written with a pen",
    "somebody wrote {a_word}",
    "somebody wrote {a_digit}",
    "this is {a_word}",
    "this is {a_digit}",
    "a drawing of {a_word}",
    "please write {a_digit}",
    "show {a_word}",
)

DIGIT_HELD_OUT = (
    "draw me {a_word}",
    "draw me {a_digit}",
    "{digit}, by hand",
    "{word}, by hand",
    "I would like {a_word}",
    "a scribbled {digit}",
    "a scribbled {word}",
    "can you paint {a_digit}?",
    "can you paint {a_word}?",
    "some image showing {a_digit}",
    "an image showing {a_word}",
    "the numeral {digit}",
    "the figure {word}",
    "a photo of {a_word} on paper",
    "my child's first {word}",
    "handwriting: {digit}",
    "handwriting: {word}",
    "it looks like {a_word}",
    "it looks like {a_digit}",
    "{a_word}, quickly jotted down",
)


def digit_captions(labels: np.ndarray, split: str) -> Captions:
    """Captions for pictures of digits, `labels` (N,) int64; the phrasings of the test are never used in training."""
    templates = DIGIT_TRAINING if split == "train" else DIGIT_HELD_OUT
    phrasings = []
    for digit, word in enumerate(NUMBER_WORDS):
        words = {"digit": str(digit), "word": word, "a_digit": a(str(digit)), "a_word": a(word)}
        phrasings.append(fill(templates, words))
    return Captions(tuple(phrasings), labels)


# ------------------------------------------------------------------------------------------------------- things with names

NAME_TRAINING = (
    "{name}",
    "{a_name}",
    "a picture of {a_name}",
    "a drawing of {a_name}",
    "an icon of {a_name}",
    "this is {a_name}",
)
NAME_HELD_OUT = ("draw me {a_name}", "{name}, drawn with thick lines", "an emoji showing {a_name}", "a sketch: {name}")


def name_captions(names: Sequence[str], index: np.ndarray, split: str) -> Captions:
    """Captions for pictures of things that have a name: picture i shows `names[index[i]]`, where `index` is (N,) int64."""
    templates = NAME_TRAINING if split == "train" else NAME_HELD_OUT
    return Captions(tuple(fill(templates, {"name": name, "a_name": a(name)}) for name in names), index)
