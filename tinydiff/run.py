"""A run folder: all that one training leaves behind.

    config.json    the settings it was started with        samples/   pictures drawn on the way
    stats.jsonl    one row a logged step                    model/     model.safetensors (the weights to use) + config.json
    log.txt        what was said, with times                state/     state.safetensors: all that resuming needs

A kill at any moment leaves the last complete checkpoint readable, because a checkpoint is one rename: `state.safetensors` holds
the arrays *and* (in its metadata, as JSON) the step, the random generators and so on, so the two can never disagree. The model is
written just before it: a model may be newer than the state, never older, and resuming from the state draws the same model again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinydiff import io


class Run:
    """A run folder at `path`, made by `Run.create` and found again by `Run.open`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.samples = self.path / "samples"
        self.model = self.path / "model"
        self._config = self.path / "config.json"
        self._stats = self.path / "stats.jsonl"
        self._log = self.path / "log.txt"
        self._model = self.model / "model.safetensors"
        self._model_config = self.model / "config.json"
        self._state = self.path / "state" / "state.safetensors"

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any]) -> Run:
        """Start a run folder. Raises FileExistsError if there is a run already, OSError if it can't be written."""
        run = cls(path)
        if run._config.exists():
            raise FileExistsError(f"{run.path} already holds a run; continue it with --resume or choose another folder")
        if run.path.is_dir() and any(not path.name.startswith(".") for path in run.path.iterdir()):
            raise FileExistsError(f"{run.path} is not empty and not a run; choose another folder")
        run._make(run.path)
        io.write_json(run._config, config)
        run._make(run.samples, run._model.parent, run._state.parent)
        return run

    def _make(self, *folders: Path) -> None:
        for folder in folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(f"cannot make the folder {folder}: {error.strerror}") from error

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Find a run folder again. Raises FileNotFoundError when `path` holds none."""
        run = cls(path)
        if not run._config.is_file():
            raise FileNotFoundError(f"{run.path} is not a run folder (it has no config.json)")
        return run

    @property
    def config(self) -> dict[str, Any]:
        """The settings that the run was started with."""
        return io.read_json(self._config)

    @property
    def stats(self) -> list[dict[str, Any]]:
        """The rows logged so far."""
        return io.read_jsonl(self._stats) if self._stats.exists() else []

    def append_stats(self, row: Mapping[str, Any]) -> None:
        """Log one row (`step` and figures)."""
        io.append_jsonl(self._stats, row)

    def log(self, text: str) -> None:
        """Add a line to log.txt, with the time (UTC)."""
        io.append_line(self._log, f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}")

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def save(
        self,
        model: Mapping[str, np.ndarray],
        model_config: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        state: Mapping[str, Any],
    ) -> None:
        """Write a checkpoint: the weights to use, and all that resuming needs as arrays and plain data.

        Args:
            model: weights in the published layout (see `io.to_disk`); model_config: what builds the model again.
            arrays: the training's own arrays (raw weights, EMA, optimiser moments), by name.
            state: the rest as JSON values; must hold `step`, an int.
        """
        if not isinstance(state.get("step"), int):
            raise ValueError(f"a state needs the step as an int, got {state.get('step')!r}")
        packed = json.dumps(state, allow_nan=False)
        self._make(self.samples, self.model, self._state.parent)  # a kill during `create` may have left one out
        io.write_json(self._model_config, model_config)
        io.save_weights(self._model, model, {"step": str(state["step"]), "hash": io.hash_weights(model)})
        io.save_weights(self._state, arrays, {"state": packed})

    def load_model(self) -> tuple[io.Weights, dict[str, Any]]:
        """The weights to use, in the published layout, and the configuration of their model."""
        if not self._model.is_file():
            raise FileNotFoundError(f"{self.path} has no model yet: its training saved no checkpoint")
        return io.load_weights(self._model), io.read_json(self._model_config)

    def load_state(self) -> tuple[io.Weights, dict[str, Any]] | None:
        """The arrays and the plain data of the last checkpoint; None when there is none."""
        if not self._state.is_file():
            return None
        arrays, metadata = io.load_weights(self._state), io.load_metadata(self._state)
        try:
            state = json.loads(metadata["state"])
            if isinstance(state["step"], int):
                return arrays, state
        except (KeyError, TypeError, ValueError, RecursionError):
            pass
        raise ValueError(f"{self._state} holds no training state; restore the file or start the run again")

    def rewind(self, step: int) -> None:
        """Make the folder what it was at the checkpoint of `step`: drop later rows and what a kill left half-written."""
        rows = [row for row in self.stats if row.get("step", 0) <= step]
        io.write_atomic(self._stats, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        for left_over in [*self.path.glob(".*tmp*"), *self.path.glob("*/.*tmp*")]:
            left_over.unlink(missing_ok=True)
