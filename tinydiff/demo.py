"""The first thing to run: train on the shipped digits, then draw with what was trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tinydiff import data, figures, images
from tinydiff.dream import pixel_gradients
from tinydiff.evaluate import Judge
from tinydiff.pipeline import Pipeline, sheet
from tinydiff.prompts import TextPipeline
from tinydiff.run import Run

COLUMNS = 8
GUIDANCE = 2.0
STEPS = 50


def draw_all(run: Run, folder: Path, judge: Judge, seed: int = 0) -> dict[str, Path]:
    """Write what a trained digit denoiser can show; returns what each picture is, and where.

    A grid with a row for each digit, a film of noise becoming these digits, the loss curve, and the pixel gradient of the judge.
    """
    paths = {
        "digits, a row for each": folder / "digits.png",
        "noise becoming digits": folder / "film.gif",
        "the loss": folder / "loss.png",
        "pixel gradients, two ways": folder / "gradient.png",
    }
    grid, film, loss, gradient = paths.values()
    pipeline = Pipeline.load(run.path)
    classes = len(pipeline.class_names)
    labels = np.repeat(np.arange(classes), COLUMNS)
    frames: list[np.ndarray] = []
    seeds = range(seed, seed + len(labels))
    drawn = pipeline.draw(labels, seeds, steps=STEPS, guidance=GUIDANCE, frames=frames)
    settings = {
        "class": list(range(classes)),
        "seeds": f"{seeds[0]}-{seeds[-1]}",
        "sampler": "ddim",
        "steps": STEPS,
        "guidance": GUIDANCE,
        "weights": pipeline.hash,
    }
    images.save_png(grid, sheet(drawn, labels, 2), settings)
    images.save_gif(film, [sheet(frame, labels, 2) for frame in frames], 0.06, hold=2.0)
    figures.loss_curve(run.stats, loss)

    test = data.load(pipeline.card["data"], "test")
    assert test.labels is not None
    picture, target = images.from_uint8(test.images[0]), int(test.labels[0])
    found = pixel_gradients(judge, picture, target)
    figures.pixel_gradient_figure(found, picture, test.class_names[target], gradient)
    return paths


def draw_words(run: Run, folder: Path, prompts: list[str], seed: int = 0) -> Path:
    """Draw a row of pictures for each prompt into words.png of `folder`, with where each word was looked at in attention.png."""
    pipeline = TextPipeline.load(run.path)
    labels = np.repeat(np.arange(len(prompts)), COLUMNS)
    seeds = range(seed, seed + len(labels))
    drawn = pipeline.draw([prompts[label] for label in labels], seeds, steps=STEPS)
    settings = {"prompt": prompts, "seeds": f"{seeds[0]}-{seeds[-1]}", "steps": STEPS, "weights": pipeline.hash}
    images.save_png(folder / "words.png", sheet(drawn, labels, 2), settings)
    looks = [pipeline.look(prompt, seed, steps=STEPS) for prompt in prompts]
    figures.attention_figure(looks, folder / "attention.png", settings | {"seeds": str(seed)})
    return folder / "words.png"
