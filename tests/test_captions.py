"""Captions: which is drawn, what shares a meaning, and that the test's phrasings are new."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff import data
from tinydiff.data import Captions
from tinydiff.data.captions import DIGIT_HELD_OUT, DIGIT_TRAINING, NUMBER_WORDS, a, digit_captions, name_captions

captions = st.lists(
    st.lists(st.sampled_from(["a dog", "a cat", "two dogs", "ein Hund", "犬"]), min_size=1, unique=True), min_size=1
)


@given(captions)
def test_the_same_phrasings_are_one_meaning(each: list[list[str]]) -> None:
    made = Captions.of(each)
    assert len(made) == len(each)
    for i, x in enumerate(each):
        assert made[i] == tuple(x)
        for j, y in enumerate(each):
            assert (made.meaning[i] == made.meaning[j]) == (x == y)
    assert set(made.every()) == {caption for group in each for caption in group}
    assert len(set(made.every())) == len(made.every())


@given(captions, st.integers(0, 2**32), st.integers(0, 10**6))
def test_a_step_draws_each_picture_one_of_its_own(each: list[list[str]], seed: int, step: int) -> None:
    made = Captions.of(each)
    index = np.arange(len(each))[::-1]
    drawn = made.draw(index, seed, step)
    assert all(caption in each[i] for i, caption in zip(index, drawn))
    assert drawn == made.draw(index, seed, step)


def test_all_phrasings_are_drawn_equally_often() -> None:
    made = Captions.of([["a", "b", "c", "d"]])
    index = np.zeros(500, np.int64)
    drawn = [caption for step in range(20) for caption in made.draw(index, 0, step)]
    counts = [drawn.count(letter) for letter in "abcd"]
    assert min(counts) > 2300  # of 10,000; a standard deviation is 43
    assert made.draw(index, 0, 1) != made.draw(index, 0, 2)
    assert made.draw(index, 0, 1) != made.draw(index, 1, 1)


@pytest.mark.parametrize(
    ("phrasings", "meaning", "match"),
    [
        ((("a",),), np.array([0, 1]), "meanings run from 0 to 1, but there are 1"),
        ((("a",),), np.array([0.0]), "must be int64"),
        ((("a",), ()), np.array([0]), "meaning 1 has no caption"),
        ((("a", " "),), np.array([0]), "or an empty one"),
    ],
)
def test_captions_that_make_no_sense(phrasings: tuple[tuple[str, ...], ...], meaning: np.ndarray, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Captions(phrasings, meaning)


def test_a_data_set_needs_a_caption_for_each_picture() -> None:
    pictures = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="2 images have captions for 1"):
        data.Dataset(pictures, None, "x", captions=Captions.of([["a"]]))


def test_articles() -> None:
    expected = "a zero, a one, an eight, an 8, an 80, an 11, a 7, a unicorn, an umbrella, an astronaut, scissors, a bus, Saturn"
    nouns = ["zero", "one", "eight", "8", "80", "11", "7", "unicorn", "umbrella", "astronaut", "scissors", "bus", "Saturn"]
    assert ", ".join(map(a, nouns)) == expected
    assert a("flag of Malta") == "the flag of Malta"


# ------------------------------------------------------------------------------------------------------------------ digits


def named_digit(caption: str) -> int:
    """The one digit that a caption speaks of."""
    found = {int(d) for d in re.findall(r"\d", caption)}
    found |= {NUMBER_WORDS.index(word) for word in re.findall(r"[a-z]+", caption) if word in NUMBER_WORDS}
    assert len(found) == 1, caption
    return found.pop()


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_caption_of_a_digit_names_it_and_no_other(split: str) -> None:
    digits = data.load("digits", split)
    assert digits.captions is not None
    assert digits.labels is not None
    assert np.array_equal(digits.captions.meaning, digits.labels)
    for digit, group in enumerate(digits.captions.phrasings):
        assert [named_digit(caption) for caption in group] == [digit] * len(group)


def test_twenty_phrasings_of_each_digit_are_never_trained_on() -> None:
    labels = np.arange(10)
    train, test = digit_captions(labels, "train"), digit_captions(labels, "test")
    assert all(len(group) == 20 for group in test.phrasings)
    assert not set(train.every()) & set(test.every())
    assert not set(DIGIT_TRAINING) & set(DIGIT_HELD_OUT)
    assert {"a handwritten seven", "the number 7"} <= set(train[7])
    assert {"draw me a seven", "7, by hand"} <= set(test[7])
    assert "draw me an eight" in test[8]


def test_named_things_have_other_phrasings_in_the_test() -> None:
    index = np.array([1, 0, 1])
    train, test = name_captions(["owl", "flag of Malta"], index, "train"), name_captions(["owl", "flag of Malta"], index, "test")
    assert "a picture of an owl" in train[1]
    assert "an icon of the flag of Malta" in train[0]
    assert not set(train.every()) & set(test.every())
