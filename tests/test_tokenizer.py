"""The tokeniser: CLIP's own numbers, there and back on any text, what it learns, and files that strangers made."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff.tokenizer import BOS, BYTES, END, EOS, Tokenizer

STORED = json.loads((Path(__file__).parent / "golden" / "tokenizer.json").read_text(encoding="utf-8"))
CAPTIONS = ["a hungry dinosaur", "a soaring bird", "a burning sword", "a hungry bird", "the dinosaur"] * 3
SMALL = Tokenizer.train(CAPTIONS, 560, 16)


def letters(text: str) -> str:
    """A text without what the tokeniser may change: composed, small, and with no white space."""
    small = "".join(character.lower() for character in unicodedata.normalize("NFC", text))
    return re.sub(r"[\s\x85]", "", small)


def clips_own() -> Tokenizer:
    """CLIP's numbers for the merges that the stored captions need; the symbols between are made up."""
    alphabet = sorted(BYTES)
    vocab = {symbol: number for number, symbol in enumerate([*alphabet, *(symbol + END for symbol in alphabet)])}
    merges = [tuple(pair) for pair in STORED["merges"].values()]
    vocab |= {f"unused {number}": number for number in range(512, 49406)}
    for rank, pair in STORED["merges"].items():
        del vocab[f"unused {512 + int(rank)}"]
        vocab["".join(pair)] = 512 + int(rank)
    return Tokenizer(vocab | {BOS: 49406, EOS: 49407}, merges)


def test_clips_own_numbers() -> None:
    """As the published tokeniser gave them: stored by scripts/make_golden_tokenizer.py."""
    tokenizer = clips_own()
    assert len(STORED["ids"]) >= 15
    for caption, numbers in STORED["ids"].items():
        assert [tokenizer.bos, *tokenizer.encode(caption), tokenizer.eos] == numbers, caption
    row = tokenizer("an astronaut riding a horse")
    assert row.shape == (1, 77) and row.dtype == np.int64
    assert row[0].tolist() == [49406, 550, 18376, 6765, 320, 4558] + [49407] * 71


@given(st.text(max_size=60))
def test_there_and_back(text: str) -> None:
    kept = text.replace("<|", "")  # what says BOS or EOS stands for these
    assert letters(SMALL.decode(SMALL.encode(kept))) == letters(kept)


@given(st.text(max_size=40), st.integers(3, 12))
def test_rows(text: str, length: int) -> None:
    tokenizer = Tokenizer(SMALL.vocab, SMALL.merges, length)
    numbers = tokenizer.encode(text)
    if len(numbers) > length - 2:
        with pytest.warns(UserWarning, match=f"has {len(numbers)} tokens and {length - 2} fit; dropped: "):
            row = tokenizer(text)[0].tolist()
    else:
        row = tokenizer(text)[0].tolist()
        assert tokenizer.dropped(text) == ""
    kept = numbers[: length - 2]
    assert row == [tokenizer.bos, *kept, *[tokenizer.eos] * (length - 1 - len(kept))]


def test_what_is_dropped() -> None:
    assert SMALL.dropped("a hungry dinosaur " * 4 + "a bird and then some") == "and then some"
    assert SMALL.decode(SMALL("A  Soaring\tBIRD")[0]) == "a soaring bird"


def test_markers_in_a_text() -> None:
    assert SMALL.encode(f"{EOS} {BOS}a") == [SMALL.eos, SMALL.bos, *SMALL.encode("a")]


def test_learning() -> None:
    """The most frequent pair first; equally frequent ones by the alphabet; none that is met once."""
    tokenizer = Tokenizer.train(["abab abab cd", "cd ce"], 600)
    # ab: 2 words × 2; then "ab" + "ab</w>" … : counted by hand.
    assert tokenizer.merges == [("a", "b"), ("a", "b</w>"), ("ab", "ab</w>"), ("c", "d</w>")]
    assert tokenizer.encode("abab cd ce") == [tokenizer.vocab[s] for s in ("abab</w>", "cd</w>", "c", "e</w>")]
    assert len(Tokenizer.train(["abab abab"] * 9, 515).merges) == 1
    # Every word of captions said often enough is one token.
    for word in ("hungry", "soaring", "burning", "dinosaur", "bird", "sword", "the", "a"):
        assert len(SMALL.encode(word)) == 1, word


@given(st.lists(st.text("abc ", max_size=12), max_size=12), st.randoms(use_true_random=False))
def test_learning_knows_no_order(captions: list[str], rng: random.Random) -> None:
    first = Tokenizer.train(captions, 540)
    shuffled = list(captions)
    rng.shuffle(shuffled)
    assert Tokenizer.train(shuffled, 540).merges == first.merges


@given(st.lists(st.text("abcd ", max_size=10), max_size=10))
def test_learning_against_counting_afresh(captions: list[str]) -> None:
    """Beside a trainer that counts all pairs anew for each merge."""
    words = [[*word[:-1], word[-1] + END] for caption in captions for word in caption.split()]
    expected: list[tuple[str, str]] = []
    while len(expected) < 20:
        counts: dict[tuple[str, str], int] = {}
        for word in words:
            for pair in zip(word, word[1:]):  # noqa: RUF007
                counts[pair] = counts.get(pair, 0) + 1
        if not counts or max(counts.values()) < 2:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        expected.append(best)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    assert Tokenizer.train(captions, 534).merges == expected


def test_files(tmp_path: Path) -> None:
    SMALL.save(tmp_path / "tokenizer")
    again = Tokenizer.load(tmp_path / "tokenizer", 16)
    assert (again.vocab, again.merges, again.length) == (SMALL.vocab, SMALL.merges, 16)
    lines = (tmp_path / "tokenizer" / "merges.txt").read_text().split("\n")
    assert lines[0] == "#version: 0.2" and lines[1] == " ".join(SMALL.merges[0]) and lines[-1] == ""


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.json", b"[1]", "expected an object"),
        ("vocab.json", b'{"a": "1"}', "'a' has the number '1'; expected an integer"),
        ("vocab.json", b'{"a": true}', "expected an integer"),
        ("vocab.json", b'{"a": 1}', "numbers them 0 to 0"),
        ("vocab.json", b'{"a": 0}', r"lacks '<\|startoftext\|>' and \d+ more"),
        ("merges.txt", b"#version: 0.2\na\n", "line 2: 'a' is no merge"),
        ("merges.txt", b"a b c\n", "line 1: 'a b c' is no merge"),
        ("merges.txt", b"a b\na b\n", "line 2: 'a b' comes a second time"),
        ("merges.txt", b"\xff\n", "not UTF-8"),
        ("merges.txt", b"z z\n", "lacks 'zz'"),
    ],
)
def test_bad_files(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    SMALL.save(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        Tokenizer.load(tmp_path)


def test_bad_calls() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        Tokenizer(SMALL.vocab, SMALL.merges, 2)
    with pytest.raises(ValueError, match="take 514"):
        Tokenizer.train(CAPTIONS, 513)
    with pytest.raises(ValueError, match="half a character"):
        SMALL.encode("a\ud800")
    with pytest.raises(ValueError, match="is no token"):
        SMALL.decode([len(SMALL)])
