"""Whether pictures show what their prompts say, by the eye of a judge that never saw the model: a classifier for digits, for
coloured shapes a program that reads them back into words, and for all else contrastive encoders with weights of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinydiff import data
from tinydiff.contrastive import AMONG, RANKS, Matcher, one_each, ranks
from tinydiff.data import shapes
from tinydiff.evaluate import Judge
from tinydiff.pipeline import weights_hash
from tinydiff.prompts import TextPipeline

Verdicts = dict[str, np.ndarray]
ASPECTS = ("colour", "shape", "relation")


@dataclass(frozen=True)
class Exam:
    """Prompts to draw, and who judges the pictures.

    Attributes:
        judge: from pictures, uint8 (N, H, W, C), and an order (N,): does picture i show what prompt order[i] says? Its answers by
            name, each (N,) bool; what `chance` is said of comes first.
        facts: what there is to say of the exam, beside the answers.
    """

    prompts: list[str]
    judge: Callable[[np.ndarray, np.ndarray], Verdicts]
    facts: dict[str, Any] = field(default_factory=dict)

    def mark(self, pictures: np.ndarray) -> dict[str, Any]:
        """The share of pictures with each verdict, and by chance: the first verdict where pictures meet each other's prompts."""
        found = self.judge(pictures, np.arange(len(pictures)))
        shuffled = self.judge(pictures, np.random.default_rng(0).permutation(len(pictures)))
        shares = {name: float(seen.mean()) for name, seen in found.items()}
        return shares | {"chance": float(next(iter(shuffled.values())).mean())} | self.facts


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


def judge_by_rank(pictures: np.ndarray, own: np.ndarray, captions: Sequence[str], matcher: Matcher) -> Verdicts:
    """Whether caption own[i] is among the best 10, 5 and 1 that the encoders find for picture i: "recall_10" and so on."""
    places = ranks(matcher.scores(pictures, captions), own)
    return {f"recall_{rank}": places <= rank for rank in sorted(RANKS, reverse=True)}


def exam_of_digits(test: data.Dataset, n: int, eye: Judge) -> Exam:
    """n prompts in phrasings held out of training, judged by a classifier."""
    prompts, labels = digit_prompts(test, n)
    return Exam(prompts, lambda pictures, order: judge_digits(pictures, labels[order], eye))


def exam_of_shapes(test: data.Dataset, n: int) -> Exam:
    """n captions of held-out combinations, judged by what is read in the pictures."""
    assert test.captions is not None
    prompts = test.captions.draw(np.arange(n) % len(test), 0, 0)
    return Exam(prompts, lambda pictures, order: judge_shapes(pictures, [prompts[i] for i in order]))


def exam_by_rank(found: data.Dataset, n: int, matcher: Matcher) -> Exam:
    """n prompts, captions of at most 200 pictures of different meaning in turn, each to be told from the others.

    The facts say how the judge itself fares on the real pictures ("real_recall_10"), which no drawing can be expected to pass.
    """
    pictures, captions = one_each(found, AMONG)
    own = np.arange(n) % len(captions)
    real = judge_by_rank(pictures, np.arange(len(captions)), captions, matcher)["recall_10"]
    facts = {"real_recall_10": float(real.mean()), "among": len(captions)}
    return Exam([captions[i] for i in own], lambda drawn, order: judge_by_rank(drawn, own[order], captions, matcher), facts)


def exams(
    pipeline: TextPipeline, spec: str, n: int, classifier: str | Path, judge: str | Path | None, device: str
) -> tuple[dict[str, Exam], dict[str, str]]:
    """What to examine a run with, n prompts in all, by what the names of the results begin with; and the hash of who judges.

    With `judge`, half of the prompts are captions of training, which the run should know by now, and half ("unseen_") are of the
    test, if that has other pictures. Raises ValueError for a judge that listens with the run's own text encoder, or sees other
    pictures; and for data that needs one, without.
    """
    size = pipeline.card.get("size")
    test = data.load(spec, "test", size)
    if test.captions is None:
        raise ValueError(f"data {spec!r} has no captions to draw; use digits, shapes, pictures, page or pairs:PAGE.html")
    if judge is None and spec.partition(":")[0] == "shapes":
        return {"": exam_of_shapes(test, n)}, {}
    if judge is None and test.labels is not None:
        eye = Judge.load(classifier, device)
        return {"": exam_of_digits(test, n, eye)}, {"classifier": eye.hash}
    if judge is None:
        raise ValueError(
            f"pictures of {spec!r} are judged by encoders that the run never met: give --judge CLIP_RUN, trained with "
            "another --seed than the run's own"
        )
    matcher = Matcher.load(judge, device)
    if weights_hash(matcher.model.text_encoder()) == pipeline.text.hash:
        raise ValueError(f"the judge {judge} has the text encoder that the run itself listens to; train one with another --seed")
    if matcher.shape != pipeline.space.shape:
        raise ValueError(f"the judge {judge} sees pictures of {matcher.shape}, and the run draws {pipeline.space.shape}")
    train, half = data.load(spec, "train", size), n // 2
    given = {"": exam_by_rank(train, n - half, matcher), "unseen_": exam_by_rank(test, half, matcher)}
    if np.array_equal(train.images, test.images):
        given = {"": exam_by_rank(train, n, matcher)}
    return given, {"judge": matcher.hash}


def evaluate_text_to_image(
    run: str | Path,
    n: int,
    classifier: str | Path = "classifier",
    spec: str | None = None,
    judge: str | Path | None = None,
    device: str = "cpu",
    **settings: Any,
) -> dict[str, Any]:
    """Draw n pictures of prompts and judge them. `settings` go to `TextPipeline.draw`.

    Of digits and shapes the prompts are of the test, and training never saw them; the result has accuracy, the share that shows
    what was asked for, and for shapes also the share by aspect. With `judge`, a run of contrastive encoders, it has the share
    of pictures that rank their caption among the best 10, 5 and 1: see `exams`. chance is what the same pictures get when
    judged by each other's prompts, as a model would that doesn't listen.
    Raises ValueError for data that there is no judge for.
    """
    pipeline = TextPipeline.load(run, device)
    spec = spec or pipeline.card["data"]
    given, judged_by = exams(pipeline, spec, n, classifier, judge, device)
    drawn = pipeline.draw([prompt for exam in given.values() for prompt in exam.prompts], range(n), **settings)
    result: dict[str, Any] = {"task": pipeline.card["task"], "n": n}
    for prefix, exam in given.items():
        pictures, drawn = np.split(drawn, [len(exam.prompts)])
        result |= {prefix + name: value for name, value in exam.mark(pictures).items()}
    return result | {"data": spec, "weights": pipeline.hash} | judged_by
