"""Whether pictures show what their prompts say, by the eye of a judge that never saw the model: a classifier for digits, and for
coloured shapes a program that reads them back into words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinydiff import data
from tinydiff.data import shapes
from tinydiff.evaluate import Judge
from tinydiff.prompts import TextPipeline

Verdicts = dict[str, np.ndarray]
ASPECTS = ("colour", "shape", "relation")


def digit_prompts(test: data.Dataset, n: int) -> tuple[list[str], np.ndarray]:
    """n prompts with their labels (n,): all classes in turn, and all of a class's phrasings in turn."""
    assert test.captions is not None
    phrasings = test.captions.phrasings
    labels = np.arange(n) % len(phrasings)
    return [phrasings[label][i // len(phrasings) % len(phrasings[label])] for i, label in enumerate(labels)], labels


def judge_digits(pictures: np.ndarray, labels: np.ndarray, judge: Judge) -> Verdicts:
    """Whether the judge names the class that was asked for: "accuracy", (n,) bool."""
    return {"accuracy": judge.look(pictures)[1] == labels}


def judge_shapes(pictures: np.ndarray, prompts: Sequence[str]) -> Verdicts:
    """Whether what is read in each picture agrees in colour, shape and relation ("accuracy"), in each of these, and in size."""
    found = [shapes.agreement(shapes.read(picture), shapes.parse(prompt)) for picture, prompt in zip(pictures, prompts)]
    verdicts = {name: np.array([each[name] for each in found], bool) for name in (*ASPECTS, "size")}
    return {"accuracy": np.logical_and.reduce([verdicts[name] for name in ASPECTS])} | verdicts


def evaluate_text_to_image(
    run: str | Path, n: int, classifier: str | Path = "classifier", spec: str | None = None, device: str = "cpu", **settings: Any
) -> dict[str, Any]:
    """Draw n pictures of test prompts, which training never saw, and judge them. `settings` go to `TextPipeline.draw`.

    Gives accuracy: the share that shows what was asked for; and chance: the same pictures judged by each other's prompts, which
    is what a model that doesn't listen would get. For shapes also the share by aspect.
    Raises ValueError for data that there is no judge for.
    """
    pipeline = TextPipeline.load(run, device)
    spec = spec or pipeline.card["data"]
    test = data.load(spec, "test", pipeline.card.get("size"))
    judge: Callable[[np.ndarray, np.ndarray], Verdicts]
    if spec.partition(":")[0] == "shapes":
        assert test.captions is not None
        prompts = test.captions.draw(np.arange(n) % len(test), 0, 0)
        hash_of_judge = None

        def judge(pictures: np.ndarray, order: np.ndarray) -> Verdicts:
            return judge_shapes(pictures, [prompts[i] for i in order])
    elif spec.partition(":")[0] in ("digits", "mnist"):
        eye = Judge.load(classifier, device)
        prompts, labels = digit_prompts(test, n)
        hash_of_judge = eye.hash

        def judge(pictures: np.ndarray, order: np.ndarray) -> Verdicts:
            return judge_digits(pictures, labels[order], eye)
    else:
        raise ValueError(f"there is no judge for pictures of {spec!r}; digits, mnist:DIR and shapes have one")
    drawn = pipeline.draw(prompts, range(n), **settings)
    verdicts = judge(drawn, np.arange(n))
    shuffled = judge(drawn, np.random.default_rng(0).permutation(n))
    return {
        "task": pipeline.card["task"],
        "n": n,
        **{name: float(found.mean()) for name, found in verdicts.items()},
        "chance": float(shuffled["accuracy"].mean()),
        "data": spec,
        "weights": pipeline.hash,
        **({"classifier": hash_of_judge} if hash_of_judge else {}),
    }
