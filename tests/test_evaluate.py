"""Figures of merit against closed forms, and dreams against finite differences."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff import Tensor, data, evaluate, models, random, tensor
from tinydiff import dream as dreaming

CARD = {"task": "classifier", "shape": [28, 28, 1], "class_names": list("0123456789"), "not_a_digit": True, "data": "digits"}


def make_judge(seed: int = 0) -> evaluate.Judge:
    import tinydiff

    tinydiff.manual_seed(seed)
    config = {"num_classes": 11, "widths": [4, 8], "norm_num_groups": 2}
    return evaluate.Judge(models.Classifier.from_config(config).eval(), CARD | {"model": config})


def with_moments(mean: np.ndarray, covariance: np.ndarray, n: int = 500, seed: int = 0) -> np.ndarray:
    """n points whose sample mean and covariance are exactly these."""
    x = np.random.default_rng(seed).standard_normal((n, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / (n - 1))).T
    return x @ np.linalg.cholesky(covariance).T + mean


# FID.


def test_distance_of_gaussians_along_the_axes() -> None:
    """|Δμ|² + Σ(√a − √b)²."""
    x = with_moments(np.array([1.0, 2.0, 3.0]), np.diag([1.0, 4.0, 9.0]))
    y = with_moments(np.array([1.0, 0.0, 3.0]), np.diag([4.0, 4.0, 1.0]), n=300, seed=1)
    assert evaluate.frechet_distance(x, y) == pytest.approx(4 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2)


@given(st.floats(0, math.pi), st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0.1, 3))
def test_distance_of_gaussians_that_lie_askew(angle: float, a: float, b: float, c: float, d: float) -> None:
    """For two by two matrices tr √M = √(tr M + 2 √det M), and det AB = det A det B."""
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    first, second = np.diag([a, b]), turn @ np.diag([c, d]) @ turn.T
    trace = sum(first[i, j] * second[j, i] for i in range(2) for j in range(2))
    expected = a + b + c + d - 2 * math.sqrt(trace + 2 * math.sqrt(a * b * c * d))
    x, y = with_moments(np.zeros(2), first), with_moments(np.zeros(2), second, seed=1)
    assert evaluate.frechet_distance(x, y) == pytest.approx(expected, abs=1e-9)


def test_distance_to_itself_is_nothing_even_when_features_depend_on_each_other() -> None:
    x = np.random.default_rng(0).standard_normal((50, 3)) @ np.random.default_rng(1).standard_normal((3, 8))
    assert evaluate.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert evaluate.frechet_distance(x, x + 1) == pytest.approx(8, abs=1e-6)


def test_fid_of_a_sample_falls_with_its_size_towards_nothing() -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((5000, 4))
    few, many = (evaluate.frechet_distance(rng.standard_normal((n, 4)), reference) for n in (50, 5000))
    assert many < 0.01 < few


def test_one_picture_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="at least two"):
        evaluate.frechet_distance(np.zeros((1, 3)), np.zeros((5, 3)))


# Precision.


def test_precision_counts_points_among_the_others() -> None:
    real = np.arange(10.0)[:, None]  # the third neighbour of an inner point is 2 away, of the outermost 3
    drawn = np.array([[4.4], [-2.9], [-3.1], [11.9], [12.1], [100.0]])
    assert evaluate.precision(drawn, real) == pytest.approx(3 / 6)
    assert evaluate.precision(real, real) == 1


# The judge.


class Oracle:
    """Reads the class off a pixel: a classifier whose accuracy is known."""

    device = "cpu"

    def features(self, x: Tensor) -> Tensor:
        return Tensor(x.numpy()[:, 0, 0, :1])

    def head(self, seen: Tensor) -> Tensor:
        classes = np.rint((seen.numpy() + 1) * 127.5)
        scores = -np.abs(np.arange(11) - classes).astype(np.float32)
        scores[:, 10] = 100  # "none of them" is not an answer here
        return Tensor(scores)

    def named_parameters(self) -> list:
        return []


def test_accuracy_is_the_share_named_rightly_over_any_number_of_batches() -> None:
    judge = evaluate.Judge(Oracle(), CARD)
    labels = np.arange(600) % 10
    pictures = np.zeros((600, 28, 28, 1), np.uint8)
    pictures[:, 0, 0, 0] = labels
    assert judge.accuracy(pictures, labels) == 1
    pictures[:150, 0, 0, 0] = (labels[:150] + 1) % 10
    assert judge.accuracy(pictures, labels) == 0.75


@pytest.mark.parametrize("n", [200, 2000])
def test_real_pictures_to_compare_with_are_others(n: int) -> None:
    train, kept, others = evaluate.real_pictures("digits", None, n)
    assert len(others) == n and len(kept) >= n
    known = {picture.tobytes() for picture in train.images[kept]}
    assert sum(picture.tobytes() in known for picture in others) <= 2  # but for twins among the digits themselves


def test_too_many_real_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 5000"):
        evaluate.real_pictures("digits", None, 5001)


# Dreams.


def test_large_digits_are_judged_as_small_ones() -> None:
    judge, small, large = evaluate.Judge.load(), data.load("digits", "test"), data.load("digits", "test", 64)
    assert judge.accuracy(large.images[:200], large.labels[:200]) > 0.97
    assert evaluate.frechet_distance(judge.look(large.images[:200])[0], judge.look(small.images[:200])[0]) < 0.5
    for shape in ((28, 24, 1), (64, 64, 3)):
        with pytest.raises(ValueError, match=re.escape(f"(28, 28, 1), not {shape}")):
            judge.look(np.zeros((2, *shape), np.uint8))


@pytest.fixture(scope="module")
def judge() -> evaluate.Judge:
    return make_judge()


def test_a_dream_raises_the_probability(judge: evaluate.Judge) -> None:
    start = dreaming.start_picture(judge, seed=1)
    seen: list[float] = []
    found = dreaming.dream(judge, 4, start, steps=40, callback=lambda step, p: seen.append(p))
    assert found.pictures.shape == (41, 28, 28, 1)
    assert seen == found.probabilities and len(seen) == 41
    assert seen[-1] > seen[0]
    for other in (0, 7):  # it is the class asked for that gains
        away = dreaming.dream(judge, other, start, steps=40).pictures[-1:] / np.float32(127.5) - 1
        assert np.exp(dreaming.log_probability(judge, tensor(away), 4).item()) < seen[-1]
    logits = judge.model(tensor(found.pictures[:1] / np.float32(127.5) - 1)).numpy()[0].astype(float)
    assert found.probabilities[0] == pytest.approx(np.exp(logits[4]) / np.exp(logits).sum(), rel=0.02)  # rounded to 8 bits


def test_dreams_repeat_by_seed(judge: evaluate.Judge) -> None:
    start = dreaming.start_picture(judge, seed=1)
    first, again, other = (dreaming.dream(judge, 4, start, steps=3, seed=s).pictures for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_class_that_is_not_there_is_refused(judge: evaluate.Judge) -> None:
    with pytest.raises(ValueError, match="class 10: the classifier knows classes 0 to 9"):
        dreaming.dream(judge, 10, dreaming.start_picture(judge))


def test_a_picture_of_any_size_can_be_the_start(judge: evaluate.Judge, tmp_path: Path) -> None:
    from PIL import Image

    ink = np.full((90, 120, 3), 255, np.uint8)
    ink[40:50] = 0
    Image.fromarray(ink).save(tmp_path / "ink.png")
    start = dreaming.start_picture(judge, tmp_path / "ink.png")
    assert start.shape == (28, 28, 1) and start.dtype == np.float32
    assert start.mean() < 0 and start[14].mean() > 0.9  # bright strokes on black, as the classifier knows them


def test_finite_differences_and_backward_agree(judge: evaluate.Judge) -> None:
    picture = data.load("digits", "test").images[0] / np.float32(127.5) - 1
    found = dreaming.pixel_gradients(judge, picture, 7)
    assert found.differences.shape == found.backward.shape == (28, 28, 1)
    assert np.abs(found.backward).max() > 1e-4
    assert found.worst < 1e-6
    assert found.evaluations == 2 * 784


def test_judging_in_float64_leaves_the_judge_alone(judge: evaluate.Judge) -> None:
    before, generator = judge.hash, random.generator().bit_generator
    state = generator.state
    other = dreaming.in_float64(judge)
    assert generator.state == state  # no random numbers drawn for weights that are replaced
    assert {p.dtype for p in other.model.parameters()} == {np.dtype(np.float64)}
    assert {p.dtype for p in judge.model.parameters()} == {np.dtype(np.float32)}
    assert evaluate.weights_hash(judge.model) == before
