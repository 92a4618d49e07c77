"""What to train: everything that differs from one kind of model to another. The loop that trains them all is in `train`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinydiff.names import choose
from tinydiff.tasks.autoencoder import AutoencoderTask
from tinydiff.tasks.base import COMMON, Config, Task
from tinydiff.tasks.classifier import ClassifierTask
from tinydiff.tasks.clip import ClipTask
from tinydiff.tasks.denoiser import DenoiserTask
from tinydiff.tasks.text_to_image import TextToImageTask

# What the options that are None by default look like otherwise.
EXAMPLES: Config = {"size": 28, "steps": 1000, "min_snr": 5.0, "latents": "RUN"}

TASKS: dict[str, type[Task]] = {
    "denoiser": DenoiserTask,
    "classifier": ClassifierTask,
    "autoencoder": AutoencoderTask,
    "clip": ClipTask,
    "text-to-image": TextToImageTask,
}


def configure(task: str, preset: str = "small", options: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a run: the task's defaults, the preset, then `options` ("model.KEY" reaches into the network's).

    Raises ValueError for an unknown task, preset or option, or a value of the wrong kind.
    """
    chosen = choose(TASKS, task, "task")
    config: Config = {"task": task, "preset": preset, **COMMON, **chosen.DEFAULTS, "model": {}}
    config |= choose(chosen.presets(options or {}), preset, f"preset of {task}")
    config["model"] = dict(config["model"])
    for name, value in (options or {}).items():
        if name.startswith("model."):
            config["model"][name.removeprefix("model.")] = value
            continue
        like = EXAMPLES.get(name, choose(config, name, f"option of {task}"))
        if not (_same_kind(like, value) or (value is None and name in EXAMPLES)):
            raise ValueError(f"option {name} = {value!r}: it should be like {like!r}")
        config[name] = value
    for name in ("batch_size", "lr", "clip", "minutes" if config["steps"] is None else "steps"):
        if not 0 < config[name] < math.inf:
            raise ValueError(f"option {name} = {config[name]}: it must be positive")
    if config["seed"] < 0:
        raise ValueError(f"option seed = {config['seed']}: it must be at least 0")
    return config


def _same_kind(before: Any, value: Any) -> bool:
    if isinstance(before, list):
        return isinstance(value, list) and len(value) == len(before) and all(map(_same_kind, before, value))
    if isinstance(before, float):
        return isinstance(value, float | int) and not isinstance(value, bool)
    return isinstance(value, type(before)) and isinstance(value, bool) == isinstance(before, bool)


def make_task(config: Config, parts: Path | None = None) -> Task:
    """The task that a configuration describes, with its data loaded; `parts` is the model's folder of a run that goes on.

    Raises ValueError for a configuration that lacks something.
    """
    chosen = choose(TASKS, config.get("task", ""), "task")
    missing = [name for name in {**COMMON, **chosen.DEFAULTS, "model": {}} if name not in config]
    if missing:
        raise ValueError(f"the configuration of this run lacks {', '.join(missing)}; was it made by another version?")
    return chosen(config, parts)
