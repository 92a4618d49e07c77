"""The training loop, one for every model: batch, loss, backward, clip, AdamW with averaged weights, statistics, checkpoints.

All randomness of step i comes from (seed, i), so a run that was stopped, or killed, goes on to bit for bit the weights that it
would have had (with the same number of threads: sums are grouped by thread).
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any

import numpy as np

from tinydiff import io, random
from tinydiff.backend import to_numpy
from tinydiff.nn import Module
from tinydiff.optim import EMA, AdamW, clip_scale, grad_norm, warmup_cosine
from tinydiff.run import Run
from tinydiff.tasks import Task, make_task

SECONDS_BETWEEN_CHECKPOINTS = 60.0
MOST_GLANCES = 100  # in one training
Report = Callable[["Trainer", dict[str, float]], None]


class Interrupted(Exception):
    """Training was asked to stop by `signal`; it is saved at `step`, if there was one."""

    def __init__(self, run: Run, step: int, number: int) -> None:
        when = f"after step {step}, and saved in {run.path}" if step else "before the first step"
        super().__init__(f"stopped by {signal.Signals(number).name} {when}")
        self.run, self.step, self.signal = run, step, number


class Trainer:
    """A model on its way: weights, optimiser, averages and step. `advance` does one step of `total`."""

    def __init__(self, task: Task, total: int, device: str = "cpu") -> None:
        config = self.config = task.config
        self.task, self.total, self.step, self.seconds = task, total, 0, 0.0
        self.model: Module = task.build().to(device)
        parameters = self.model.parameters()
        self.optimizer = AdamW(parameters, config["lr"], tuple(config["betas"]), weight_decay=config["weight_decay"])
        self.ema = EMA(parameters, config["ema"])

    @property
    def warmup(self) -> int:
        """Steps over which the learning rate rises."""
        return min(self.config["warmup"], max(1, self.total // 10))

    def gradients(self) -> float:
        """Run this step forward and backward; returns the loss."""
        random.manual_seed(int(np.random.SeedSequence([self.config["seed"], self.step]).generate_state(1)[0]))
        with np.errstate(all="ignore"):  # what isn't finite is looked for below, and said better than by NumPy
            loss = self.task.loss(self.model, self.step)
            loss.backward()
        return float(loss.item())

    def advance(self) -> dict[str, float]:
        """One step; returns its statistics. Raises FloatingPointError, with nothing changed, if loss or gradient isn't finite."""
        started = perf_counter()
        loss = self.gradients()
        norm = grad_norm(self.optimizer.parameters)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.optimizer.zero_grad()
            self._explain(f"step {self.step}: the loss is {loss} and the gradient's norm {norm}")
        lr = self.config["lr"] * warmup_cosine(self.step, self.total, self.warmup)
        self.optimizer.step(lr, self.ema, clip_scale(norm, self.config["clip"]))
        self.optimizer.zero_grad()
        self.step += 1
        seconds = perf_counter() - started
        self.seconds += seconds
        return {"step": self.step, "loss": loss, "grad_norm": norm, "lr": lr, "seconds": seconds}

    def _explain(self, what: str) -> None:
        """Run the step again under the finder and raise with the op that went wrong first."""
        from tinydiff import hooks

        try:
            with hooks.first_nonfinite():
                self.gradients()
        except FloatingPointError as error:
            raise FloatingPointError(f"{what}. {error}") from None
        finally:
            self.model.zero_grad()
        raise FloatingPointError(f"{what}, though every op's result is finite: their sum overflows; lower the learning rate")

    def show(self, folder: Path) -> dict[str, float]:
        """The task's pictures and figures, made with the averaged weights."""
        with self._averaged():
            return self.task.show(self.model, self.step, folder)

    def glance(self, folder: Path) -> None:
        """As `show`, in a hurry."""
        with self._averaged():
            self.task.glance(self.model, self.step, folder)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        self.ema.swap()
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()
            self.ema.swap()

    def save(self, run: Run) -> None:
        """Write a checkpoint: the averaged weights as the model, everything as the state."""
        averages = {id(p): average for p, average in zip(self.ema.parameters, self.ema.average)}
        named = list(self.model.named_parameters())
        model = {name: io.to_disk(name, averages[id(p)], p.layout) for name, p in named}
        arrays = {f"weights.{name}": to_numpy(p.data) for name, p in named}
        arrays |= {f"optimizer.{name}": array for name, array in self.optimizer.state_dict().items()}
        arrays |= {f"ema.{name}": array for name, array in self.ema.state_dict().items()}
        state = {"step": self.step, "steps": self.total, "seconds": self.seconds}
        run.save(model, self.task.card(), arrays, state)

    def restore(self, arrays: io.Weights, state: dict[str, Any]) -> None:
        """Continue from what `save` wrote. Raises ValueError when it doesn't fit the model."""

        def part(prefix: str) -> io.Weights:
            return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}

        self.model.load_state_dict(part("weights."))
        self.optimizer.load_state_dict(part("optimizer."))
        self.ema.load_state_dict(part("ema."))
        self.step, self.total, self.seconds = state["step"], state["steps"], state["seconds"]


class _Stop:
    """Inside the block, Ctrl-C and SIGTERM only set `signal`; a second one acts at once, as without the block."""

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, *exception: Any) -> None:
        self._put_back()


def calibrate(task: Task, minutes: float, stop: _Stop, device: str = "cpu") -> int:
    """How many steps fit in `minutes` beside the pictures drawn on the way, from timing both after the kernels are compiled.

    The time of the trial counts as spent.
    """
    budget = 60 * minutes
    trainer = Trainer(task, 10_000, device)
    for _ in range(2):
        trainer.advance()
    times: list[float] = []
    while (len(times) < 3 or (sum(times) < 0.02 * budget and len(times) < 50)) and stop.signal is None:
        times.append(trainer.advance()["seconds"])
    if not times or stop.signal is not None:
        return 1
    pictures, glance, count = 0.0, 0.0, task.config["showings"]
    if count:
        with tempfile.TemporaryDirectory() as folder:
            started = perf_counter()
            trainer.show(Path(folder))
            shown = perf_counter()
            trainer.glance(Path(folder))
            glance = perf_counter() - shown
        # However short the training, half of it goes to steps.
        pictures = min((1 + count) * (shown - started) + glance, budget / 2)
    # Two hundredths go to checkpoints.
    return max(1, int((0.98 * budget - sum(times) - pictures) / (statistics.median(times) + glance / max(task.epoch, 1))))


def epoch_ends(epoch: float, total: int) -> set[int]:
    """The steps that end an epoch of so many steps; of more than `MOST_GLANCES`, only every second, or third, …"""
    epochs = int(total / epoch)
    stride = max(1, -(-epochs // MOST_GLANCES))
    return {math.ceil(epoch * i) for i in range(stride, epochs + 1, stride)}


def train(run: Run, report: Report | None = None, task: Task | None = None, device: str = "cpu") -> Trainer:
    """Train what `run`'s config describes, from its last checkpoint if it has one.

    The number of steps is settled once, at the start; a run that goes on keeps it. `report` sees the statistics of each step.
    `task` is the one that the config describes, if it is at hand. A run may go on on another `device` than it began on.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM, when the checkpoint of the steps done is written.
        FloatingPointError: loss or gradient not finite; the last checkpoint stays as it was.
        ValueError: nothing left to do, or a config that makes no sense.
    """
    config = run.config
    found = run.load_state()
    task = task or make_task(config, None if found is None else run.model)
    with _Stop() as stop:
        if found is None:
            run.rewind(0)
            total = config["steps"] or calibrate(task, config["minutes"], stop, device)
            if stop.signal is not None:
                raise Interrupted(run, 0, stop.signal)
            trainer = Trainer(task, total, device)
            run.log(f"{config['task']} of {trainer.model.num_parameters():,} parameters, {total} steps, {os.cpu_count()} CPUs")
            task.store(run.model)
            trainer.save(run)
        else:
            arrays, state = found
            if state["step"] >= state["steps"]:
                raise ValueError(
                    f"{run.path} is finished: all of its {state['steps']} steps are done, so nothing is left to resume"
                )
            trainer = Trainer(task, state["steps"], device)
            trainer.restore(arrays, state)
            run.rewind(trainer.step)
            run.log(f"resumed after step {trainer.step} of {trainer.total}")
        _loop(trainer, run, stop, report)
    return trainer


def _loop(trainer: Trainer, run: Run, stop: _Stop, report: Report | None) -> None:
    count = trainer.config["showings"]
    showings = {max(1, round(trainer.total * i / count)) for i in range(1, count + 1)}
    glances = epoch_ends(trainer.task.epoch, trainer.total)
    saved = perf_counter()
    while trainer.step < trainer.total and stop.signal is None:
        try:
            row = trainer.advance()
        except FloatingPointError as error:
            run.log(f"stopped: {error}")
            raise
        if trainer.step in showings:
            row |= trainer.show(run.samples)
            run.log(", ".join(f"{name} {value:.6g}" for name, value in row.items()))
        elif trainer.step in glances:
            trainer.glance(run.samples)
        run.append_stats(row)
        if report is not None:
            report(trainer, row)
        if perf_counter() - saved > SECONDS_BETWEEN_CHECKPOINTS and trainer.step < trainer.total:
            trainer.save(run)
            saved = perf_counter()
    trainer.save(run)
    if stop.signal is not None and trainer.step < trainer.total:
        run.log(f"stopped by {signal.Signals(stop.signal).name} after step {trainer.step} of {trainer.total}")
        raise Interrupted(run, trainer.step, stop.signal)
    run.log(f"finished {trainer.total} steps in {trainer.seconds:.0f} s")
