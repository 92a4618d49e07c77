"""The same minutes of the same recipe on either engine, judged alike: what speed is worth in quality.

The PyTorch twin gets exactly our recipe: batches, noise, times, loss, learning rates, clipping, optimiser and averaging. The
loss itself is ours: it is computed from the twin's prediction, and its gradient by the prediction is what the twin's backward
starts from, so that a change to the recipe reaches both. (It costs about a thousandth of a step.)
"""

from __future__ import annotations

import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import tinydiff as td
from tinydiff.optim import warmup_cosine
from tinydiff.run import Run
from tinydiff.tasks import configure, make_task
from tinydiff.train import Trainer

ACCURACY, FID = 0.97, 30.0  # at least and at most: what ten minutes on MNIST are to reach


class TwinTrainer:
    """Trains the twin of a task's model: what `tinydiff.train.Trainer` does, in PyTorch at its best."""

    def __init__(self, task: Any, total: int) -> None:
        import torch

        from benchmarks.twin import twin

        self.torch, self.task, self.total, self.step = torch, task, total, 0
        config = self.config = task.config
        self.warmup = Trainer(task, total).warmup
        self.ours = task.build()
        self.model = twin(self.ours).to(memory_format=torch.channels_last)
        self.parameters = list(self.model.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, config["lr"], tuple(config["betas"]), weight_decay=config["weight_decay"], fused=True
        )

    device = "cpu"  # as a task asks a model

    def __call__(self, x: td.Tensor, t: Any, labels: Any = None) -> td.Tensor:
        """Stands in for our model: the twin's answer, as a leaf that our loss can be differentiated by."""
        from benchmarks.twin import channels_first, channels_last

        torch = self.torch
        there = channels_first(x.numpy()).to(memory_format=torch.channels_last)
        times = torch.from_numpy(np.array(t, np.float32))
        self.answer = self.model(there, times, None if labels is None else torch.from_numpy(np.array(labels)))
        self.leaf = td.tensor(channels_last(self.answer), requires_grad=True)
        return self.leaf

    def advance(self) -> dict[str, float]:
        """One step; returns its loss and seconds."""
        from benchmarks.twin import channels_first

        torch, config, started = self.torch, self.config, perf_counter()
        loss = self.task.loss(self, self.step)
        loss.backward()
        assert self.leaf.grad is not None
        self.answer.backward(channels_first(self.leaf.grad.numpy()))
        torch.nn.utils.clip_grad_norm_(self.parameters, config["clip"])
        for group in self.optimizer.param_groups:
            group["lr"] = config["lr"] * warmup_cosine(self.step, self.total, self.warmup)
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - min(config["ema"], (1 + self.step) / (10 + self.step)))
        self.optimizer.zero_grad()
        return {"step": self.step, "loss": loss.item(), "seconds": perf_counter() - started}

    def save(self, run: Run) -> None:
        """Write the averaged weights as a run's model, so that everything that reads runs reads this one."""
        names = [name for name, _ in self.model.named_parameters()]
        weights = {name: average.contiguous().numpy() for name, average in zip(names, self.average)}
        run.save(weights, self.task.card(), weights, {"step": self.step, "steps": self.total, "engine": "torch"})


def train_twin(run: Run, minutes: float) -> int:
    """Train the twin as `run`'s config says; returns the steps that fitted in `minutes`, found as `tinydiff train` does."""
    task, budget = make_task(run.config), 60 * minutes
    trial = TwinTrainer(task, 10_000)
    for _ in range(2):
        trial.advance()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.02 * budget and len(times) < 50):
        times.append(trial.advance()["seconds"])
    trainer = TwinTrainer(task, max(1, int((0.98 * budget - sum(times)) / statistics.median(times))))
    while trainer.step < trainer.total:
        run.append_stats(trainer.advance())
    trainer.save(run)
    return trainer.total


def verdict(accuracy: float, fid: float) -> dict[str, Any]:
    """Both figures, their targets, and whether each is met."""
    targets = {"accuracy_at_least": ACCURACY, "fid_at_most": FID}
    return {"accuracy": accuracy, "fid": fid, **targets, "met": {"accuracy": accuracy >= ACCURACY, "fid": fid <= FID}}


def quality(
    engine: str, data: str, minutes: float, out: Path, n: int = 2000, preset: str = "small", options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Train for `minutes`, draw n pictures (50 DDIM steps, guidance 2) and judge them.

    Writes a run folder at `out` with samples.npz (images, labels). The figures are those of `tinydiff eval`. The
    pictures of both engines are drawn by ours, from weights in the common layout: equal to 1e-4, and drawing isn't timed here.
    """
    from tinydiff.evaluate import Judge, frechet_distance, real_pictures
    from tinydiff.pipeline import Pipeline, sample_labels
    from tinydiff.train import train

    judge = Judge.load()
    config = configure("denoiser", preset, {"data": data, "minutes": minutes, **(options or {})})
    run = Run.create(out, config | {"engine": engine})
    steps = train_twin(run, minutes) if engine == "torch" else train(run).total
    pipeline = Pipeline.load(out)
    labels = sample_labels(range(len(pipeline.class_names)), n)
    drawn = pipeline.draw(labels, range(n))
    np.savez(out / "samples.npz", images=drawn[..., 0] if drawn.shape[-1] == 1 else drawn, labels=labels)
    features, classes = judge.look(drawn)
    train_set, kept, others = real_pictures(data, config["size"], n)
    reference = judge.look(train_set.images[kept])[0]
    return {
        "engine": engine,
        "minutes": minutes,
        "steps": steps,
        "n": n,
        **verdict(float(np.mean(classes == labels)), frechet_distance(features, reference)),
        "floor": frechet_distance(judge.look(others)[0], reference),
        "classifier": judge.hash,
    }
