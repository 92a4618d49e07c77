"""Scenes of coloured shapes: words and back, pictures and back, what is held out, and what is false."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from tinydiff import data
from tinydiff.data import shapes
from tinydiff.data.shapes import Scene, Thing
from tinydiff.data.shapes.scenes import near_misses

things = st.builds(Thing, st.sampled_from([*shapes.COLOURS]), st.sampled_from(shapes.SHAPES), st.sampled_from(shapes.SIZES))
scenes = st.one_of(st.builds(Scene, things), st.builds(Scene, things, st.sampled_from([*shapes.RELATIONS]), things))
seeds = st.integers(0, 2**32)
slow = settings(deadline=None, max_examples=60)


RED_ABOVE_BLUE = Scene(Thing("red", "circle", "small"), "above", Thing("blue", "square", "large"))
GREEN_LEFT_OF_YELLOW = Scene(Thing("green", "triangle"), "left of", Thing("yellow", "star"))
WORDS = ["a", "small", "red", "circle", "above", "left", "of", "blue", "star", "pink"]


# ------------------------------------------------------------------------------------------------------------------- words


@given(scenes)
def test_every_caption_is_understood_as_its_scene(scene: Scene) -> None:
    captions = scene.captions()
    assert len(set(captions)) == len(captions) >= 4
    assert all(shapes.parse(caption) in (scene, scene.without_sizes) for caption in captions)
    assert shapes.parse(captions[0]) == scene
    assert shapes.parse(captions[-1]) == scene.without_sizes


@pytest.mark.parametrize(
    ("caption", "scene"),
    [
        ("a small red circle above a large blue square", RED_ABOVE_BLUE),
        ("A large blue square below a small red circle.", RED_ABOVE_BLUE),
        ("a green triangle left of a yellow star", GREEN_LEFT_OF_YELLOW),
        ("the yellow star is to the right of a green triangle", GREEN_LEFT_OF_YELLOW),
        ("an orange circle", Scene(Thing("orange", "circle"))),
    ],
)
def test_captions_are_understood(caption: str, scene: Scene) -> None:
    assert shapes.parse(caption) == scene


@given(st.one_of(st.text(), st.lists(st.sampled_from(WORDS)).map(" ".join)))
def test_other_words_are_refused_in_one_line(text: str) -> None:
    try:
        shapes.parse(text)
    except ValueError as error:
        assert "is not understood; write it like" in str(error)
        assert "\n" not in str(error)


def test_impossible_things_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown colour 'pink'; choose from red, orange"):
        Thing("pink", "circle")
    with pytest.raises(ValueError, match="unknown size 'huge'"):
        Thing("red", "circle", "huge")
    with pytest.raises(ValueError, match="one thing, or two with a relation"):
        Scene(Thing("red", "circle"), "above")
    with pytest.raises(ValueError, match="'below'"):
        Scene(Thing("red", "circle"), "below", Thing("red", "star"))


# ------------------------------------------------------------------------------------------------------------------ splits


def test_held_out_combinations_never_appear_in_training() -> None:
    train = [shapes.draw_scene(np.random.default_rng([0, i]), "train") for i in range(6000)]
    test = [shapes.draw_scene(np.random.default_rng([1, i]), "test") for i in range(1000)]
    said = {caption for scene in train for caption in scene.captions()}
    assert not any(caption in said for scene in test for caption in scene.captions())
    # but every part of what is held out does, in either place
    parts = {(place, thing) for scene in train if scene.second for place, thing in enumerate(scene.things)}
    assert all((place, thing) in parts for scene in test for place, thing in enumerate(scene.things))
    share = np.mean([shapes.draw_scene(np.random.default_rng([2, i]), alone=0.0).held_out for i in range(4000)])
    assert 0.08 < share < 0.12
    assert all(len(scene.things) == 2 for scene in test)
    assert 0.2 < np.mean([len(scene.things) == 1 for scene in train]) < 0.3


@given(scenes)
def test_what_is_held_out_does_not_depend_on_sizes(scene: Scene) -> None:
    assert scene.held_out == scene.without_sizes.held_out
    assert scene.second is not None or not scene.held_out


def test_an_example_is_a_function_of_seed_and_number() -> None:
    scene, picture = shapes.example(3, 70)
    again, same = shapes.example(3, 70)
    assert (scene, picture.tobytes()) == (again, same.tobytes())
    assert picture.tobytes() not in {shapes.example(3, 71)[1].tobytes(), shapes.example(4, 70)[1].tobytes()}
    loaded = data.load("shapes:80")
    assert loaded.captions is not None
    assert np.array_equal(loaded.images[70], shapes.example(0, 70)[1])
    assert loaded.captions[70] == shapes.example(0, 70)[0].captions()
    assert len(data.load("shapes:80", "test")) == 8
    assert data.load("shapes:10", size=64).images.shape == (10, 64, 64, 3)


def test_all_words_are_drawn_equally_often() -> None:
    drawn = [shapes.draw_scene(np.random.default_rng([5, i])) for i in range(3000)]
    for name, known in (("colour", shapes.COLOURS), ("shape", shapes.SHAPES), ("size", shapes.SIZES)):
        counts = Counter(getattr(thing, name) for scene in drawn for thing in scene.things)
        assert set(counts) == set(known)
        assert max(counts.values()) < 1.2 * min(counts.values())


@pytest.mark.parametrize("spec", ["shapes:0", "shapes:-1", "shapes:many", "shapes:1.5", "shapes:99999999"])
def test_counts_that_are_none(spec: str) -> None:
    with pytest.raises(ValueError, match="how many there are to be, from 1 to 1,000,000"):
        data.load(spec)


@pytest.mark.parametrize("size", [1, 33, 48, 512])
def test_sizes_that_shapes_do_not_have(size: int) -> None:
    with pytest.raises(ValueError, match="32, 64, 96"):
        data.load("shapes:1", size=size)


# ---------------------------------------------------------------------------------------------------------------- pictures


@slow
@given(scenes, seeds)
def test_a_picture_holds_its_colours_on_white_and_nothing_is_cut_off(scene: Scene, seed: int) -> None:
    picture = shapes.draw(scene, 32, np.random.default_rng(seed))
    assert picture.dtype == np.uint8
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (border == 255).all()
    present = {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}
    assert {shapes.COLOURS[thing.colour] for thing in scene.things} <= present


@slow
@given(things, st.sampled_from([*shapes.RELATIONS]), st.sampled_from(["red", "green", "blue"]), seeds)
def test_things_lie_as_the_relation_says(thing: Thing, relation: str, colour: str, seed: int) -> None:
    if thing.colour in ("red", "green", "blue"):
        thing = Thing("yellow", thing.shape, thing.size)
    picture = shapes.draw(Scene(thing, relation, Thing(colour, "circle", "small")), 64, np.random.default_rng(seed)).astype(int)
    mine = np.argwhere((picture == shapes.COLOURS[thing.colour]).all(2))
    other = np.argwhere((picture == shapes.COLOURS[colour]).all(2))
    axis = 0 if relation == "above" else 1
    assert mine[:, axis].max() < other[:, axis].min()


# ----------------------------------------------------------------------------------------------------------------- reading


def blurred(picture: np.ndarray, pixels: float) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(pixels)))


def noised(picture: np.ndarray, deviation: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, deviation, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


@lru_cache(maxsize=2)
def examples(size: int) -> list[tuple[Scene, np.ndarray]]:
    return [shapes.example(7, i, size, "test" if i % 2 else "train") for i in range(100)]


@pytest.mark.parametrize(
    ("size", "blur", "noise", "least"),
    [(32, 0, 0, 0.99), (64, 0, 0, 0.99), (32, 0.8, 0, 0.97), (32, 0, 25, 0.97), (64, 1.5, 25, 0.97)],
)
def test_pictures_are_read_as_what_was_drawn(size: int, blur: float, noise: float, least: float) -> None:
    right = [shapes.read(noised(blurred(picture, blur), noise, i)) == scene for i, (scene, picture) in enumerate(examples(size))]
    assert np.mean(right) >= least


def test_small_shapes_side_by_side_are_not_one_large_shape() -> None:
    right = []
    for caption in ("a small orange triangle above a small purple square", "a small red triangle above a small red circle"):
        scene = shapes.parse(caption)
        right += [shapes.read(shapes.draw(scene, 32, np.random.default_rng(seed))) == scene for seed in range(40)]
    assert np.mean(right) >= 0.98


def test_a_picture_made_without_our_drawing_is_read() -> None:
    rows, columns = np.mgrid[:64, :64]
    picture = np.full((64, 64, 3), 250, np.uint8)
    picture[(rows - 15) ** 2 + (columns - 30) ** 2 < 7**2] = (200, 50, 40)
    picture[36:58, 24:46] = (50, 90, 210)
    assert str(shapes.read(picture)) == "a small red circle above a large blue square"
    assert str(shapes.read(picture[:, ::-1])) == "a small red circle above a large blue square"
    assert str(shapes.read(picture[::-1])) == "a large blue square above a small red circle"
    assert str(shapes.read(picture.transpose(1, 0, 2))) == "a small red circle left of a large blue square"


def test_the_background_need_not_be_quite_white() -> None:
    tinted = [shapes.read((picture * (0.9, 0.94, 0.92)).astype(np.uint8)) == scene for scene, picture in examples(32)[:40]]
    assert np.mean(tinted) >= 0.97
    assert shapes.read((examples(32)[1][1] * 0.7).astype(np.uint8)) is None


def test_what_is_no_scene_is_not_read() -> None:
    generator = np.random.default_rng(0)
    ramp = np.broadcast_to(np.linspace(0, 255, 32).astype(np.uint8)[:, None], (32, 32))
    _, picture = shapes.example(0, 0)
    crowded = picture.copy()
    for k, (row, column) in enumerate([(4, 4), (4, 27), (27, 4), (27, 27), (15, 15)]):
        crowded[row - 3 : row + 4, column - 3 : column + 4] = [*shapes.COLOURS.values()][k]
    nonsense = {
        "white": np.full((32, 32, 3), 255),
        "black": np.zeros((32, 32, 3)),
        "grey": np.full((32, 32, 3), 128),
        "noise": generator.integers(0, 256, (32, 32, 3)),
        "a gradient": np.stack([ramp, ramp[::-1], ramp], 2),
        "stripes": np.tile(np.array([[220, 30, 30], [255, 255, 255]]), (32, 16, 1)),
        "five things": crowded,
        "faint": 255 - (255 - picture.astype(int)) // 4,
        "a bar across": np.where((np.arange(32) // 4 == 4)[:, None, None], (220, 30, 30), 255) + np.zeros((32, 32, 3)),
    }
    read = {name: shapes.read(x.astype(np.uint8)) for name, x in nonsense.items()}
    assert {name for name, found in read.items() if found is not None} == set()


def test_other_arrays_are_refused() -> None:
    for array in (
        np.zeros((32, 32, 3)),
        np.zeros((33, 33, 3), np.uint8),
        np.zeros((32, 64, 3), np.uint8),
        np.zeros((32, 32), np.uint8),
    ):
        with pytest.raises(ValueError, match=re.escape(str(array.shape))):
            shapes.read(array)


def test_false_captions_do_not_agree() -> None:
    """Of each picture: the truth agrees in everything, a false caption fails in the very part that is false."""
    checked = Counter()
    for scene, picture in examples(32)[:60]:
        shown = shapes.read(picture)
        assert all(shapes.agreement(shown, scene).values())
        assert all(shapes.agreement(shown, scene.without_sizes).values())
        for false in (*shapes.swaps(scene), *near_misses(scene)):
            wrong = [name for name, good in shapes.agreement(shown, false).items() if not good]
            assert wrong, (scene, false)
            checked.update(wrong)
    assert min(checked[name] for name in ("colour", "shape", "size", "relation")) > 50


def test_what_agrees_is_told_apart() -> None:
    red, blue, green = Thing("red", "circle", "small"), Thing("blue", "square", "large"), Thing("green", "square", "large")
    shown = Scene(red, "above", blue)

    def wrong(wanted: Scene) -> set[str]:
        return {name for name, good in shapes.agreement(shown, wanted).items() if not good}

    assert wrong(shown) == set()
    assert wrong(Scene(blue, "above", red)) == {"relation"}
    assert wrong(Scene(red, "left of", blue)) == {"relation"}
    assert wrong(Scene(red, "above", green)) == {"colour"}
    assert wrong(Scene(Thing("red", "star", "small"), "above", blue)) == {"shape"}
    assert wrong(Scene(Thing("red", "circle", "large"), "above", blue)) == {"size"}
    assert wrong(Scene(Thing("red", "circle"), "above", blue)) == set()
    assert wrong(Scene(red)) == {"colour", "shape", "size", "relation"}
    assert set(shapes.agreement(None, shown).values()) == {False}


# --------------------------------------------------------------------------------------------------------------- negatives


@given(scenes)
def test_swaps_use_the_same_words_and_say_something_else(scene: Scene) -> None:
    for other in shapes.swaps(scene):
        assert other != scene
        assert sorted(str(other).replace("an ", "a ").split()) == sorted(str(scene).replace("an ", "a ").split())


def test_swaps_of_a_scene() -> None:
    found = {str(other) for other in shapes.swaps(shapes.parse("a small red circle above a large blue square"))}
    assert found == {
        "a large blue square above a small red circle",
        "a small blue circle above a large red square",
        "a small red square above a large blue circle",
        "a large red circle above a small blue square",
    }


@given(scenes, seeds)
@settings(deadline=None, max_examples=30)
def test_only_the_first_candidate_is_true(scene: Scene, seed: int) -> None:
    n = 100 if scene.second else 40
    found = shapes.candidates(scene, np.random.default_rng(seed), n)
    assert len(set(found)) == len(found) == n
    assert [shapes.parse(caption) == scene for caption in found] == [True] + [False] * (n - 1)
    assert {str(other) for other in shapes.swaps(scene)} <= set(found)
