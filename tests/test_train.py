"""The training loop: it learns, it goes on exactly, it survives signals and kills, and it stops at what isn't finite."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import tinydiff
from tinydiff import Tensor, data, hooks, tasks, train
from tinydiff.augment import jitter
from tinydiff.kernels import launch
from tinydiff.pipeline import Pipeline, load_model, sample_labels, sheet
from tinydiff.run import Run

TINY_UNET = {
    "block_out_channels": [4, 8],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 2,
    "attention_head_dim": 4,
}
TINY = {"batch_size": 4, "showings": 0, "class_drop": 0.1, **{f"model.{name}": value for name, value in TINY_UNET.items()}}
TINY_CLASSIFIER = {"batch_size": 8, "showings": 0, "model.widths": [4, 8], "model.norm_num_groups": 2}

# A denoiser (TINY, seed 0) and a classifier (TINY_CLASSIFIER, seed 0): losses of the first ten steps of 100, from the first
# version of this package, computed by the ops' NumPy definitions.
GOLDEN = {
    "denoiser": [1.59354, 1.40622, 1.44087, 1.31029, 1.32803, 1.23171, 1.10952, 1.13946, 1.08568, 1.02345],
    "classifier": [2.51645, 2.43193, 2.3827, 2.40207, 2.44288, 2.46171, 2.352, 2.37931, 2.35918, 2.44284],
}


def new_run(folder: Path, task: str = "denoiser", **options: object) -> Run:
    small = TINY if task == "denoiser" else TINY_CLASSIFIER
    return Run.create(folder, tasks.configure(task, "small", {**small, **options}))


def checkpoint(run: Run) -> dict[str, np.ndarray]:
    """Every array of a run's checkpoint, read without the package's own reader."""
    model = load_file(run.path / "model" / "model.safetensors")
    state = load_file(run.path / "state" / "state.safetensors")
    return {f"model/{k}": v for k, v in model.items()} | {f"state/{k}": v for k, v in state.items()}


def assert_same(a: Run, b: Run) -> None:
    left, right = checkpoint(a), checkpoint(b)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)
    rows = [[(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in run.stats] for run in (a, b)]
    assert rows[0] == rows[1]


def stop_at(step: int, number: int = signal.SIGINT) -> train.Report:
    def report(trainer: train.Trainer, row: dict[str, float]) -> None:
        if trainer.step == step:
            os.kill(os.getpid(), number)

    return report


# Learning.


@pytest.mark.parametrize("task", ["denoiser", "classifier"])
def test_first_losses_are_the_golden_ones(task: str, tmp_path: Path) -> None:
    config = tasks.configure(task, "small", TINY if task == "denoiser" else TINY_CLASSIFIER)
    trainer = train.Trainer(tasks.make_task(config), total=100)
    losses = [trainer.advance()["loss"] for _ in range(10)]
    # BLAS kernels round differently, and each step amplifies it a little.
    np.testing.assert_allclose(losses, GOLDEN[task], rtol=1e-4)


def test_a_denoiser_learns(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", steps=60, batch_size=16, lr=5e-3)
    train.train(run)
    losses = [row["loss"] for row in run.stats]
    assert [row["step"] for row in run.stats] == list(range(1, 61))
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:5])


def test_a_classifier_learns(tmp_path: Path) -> None:
    run = new_run(
        tmp_path / "run",
        "classifier",
        **{"model.widths": [16, 24, 32], "model.norm_num_groups": 4, "noisy": 0.0, "augment": False},
        **{"steps": 60, "batch_size": 64, "lr": 5e-3, "ema": 0.9, "showings": 1},
    )
    train.train(run)
    losses = [row["loss"] for row in run.stats]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    assert run.stats[-1]["accuracy"] > 0.3  # a tenth is chance


def test_the_model_is_the_average_of_the_weights(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", "classifier", steps=4, ema=0.5)
    config = run.config
    trainer = train.Trainer(tasks.make_task(config), total=4)
    average = trainer.model.head.weight.data.copy()  # type: ignore[attr-defined]
    for n in range(1, 5):
        trainer.advance()
        decay = min(0.5, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * trainer.model.head.weight.data  # type: ignore[attr-defined]
    train.train(run)
    stored = checkpoint(run)
    np.testing.assert_allclose(stored["model/head.weight"], average.T, rtol=1e-5)  # files hold [out, in]
    np.testing.assert_array_equal(stored["state/weights.head.weight"], trainer.model.head.weight.data)  # type: ignore[attr-defined]
    assert not np.allclose(stored["model/head.weight"].T, stored["state/weights.head.weight"], rtol=1e-5)


def test_the_same_seed_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of the small preset, twice: with enough pictures that kernels share the work out among all threads."""
    used, launched = [], launch._launch
    monkeypatch.setattr(launch, "_launch", lambda function, args, n: used.append(n) or launched(function, args, n))
    config = tasks.configure("denoiser", "small", {"batch_size": 12, "lr": 1e-2})

    def trained() -> dict[str, bytes]:
        trainer = train.Trainer(tasks.make_task(config), total=2)
        for _ in range(2):
            trainer.advance()
        return {name: p.data.tobytes() for name, p in trainer.model.named_parameters()}

    first, second = trained(), trained()
    assert [name for name in first if first[name] != second[name]] == []
    assert any(n > 1 for n in used) == (tinydiff.get_num_threads() > 1)


def check_checkpointing(configured: Callable[[bool], dict[str, Any]]) -> None:
    """The same gradients of a task's first step with checkpointing as without, and a forward pass run again for them."""

    def gradients(checkpointing: bool) -> list[np.ndarray]:
        task = tasks.make_task(configured(checkpointing))
        model = task.build()
        with hooks.profile() as seen:
            task.loss(model, 0).backward()
        assert any(row.phase == "recompute" for row in seen.rows) is checkpointing
        return [p.grad.numpy() for p in model.parameters()]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        np.testing.assert_array_equal(a, b)


def test_checkpointed_training_is_the_same() -> None:
    check_checkpointing(lambda on: tasks.configure("denoiser", "small", {**TINY, "gradient_checkpointing": on}))


def test_showing_changes_nothing(tmp_path: Path) -> None:
    shown, silent = new_run(tmp_path / "a", steps=3, showings=1), new_run(tmp_path / "b", steps=3, showings=0)
    for run in (shown, silent):
        train.train(run)
    assert_same(shown, silent)
    assert len(list(shown.samples.glob("*.png"))) == 1
    assert not list(silent.samples.iterdir())


# Going on.


@pytest.mark.parametrize("task", ["denoiser", "classifier"])
def test_resuming_gives_the_bits_of_never_having_stopped(task: str, tmp_path: Path) -> None:
    whole, parted = new_run(tmp_path / "whole", task, steps=6), new_run(tmp_path / "parted", task, steps=6)
    train.train(whole)
    for step in (2, 3):
        with pytest.raises(train.Interrupted) as stopped:
            train.train(parted, stop_at(step))
        assert (stopped.value.step, stopped.value.signal) == (step, signal.SIGINT)
    train.train(parted)
    assert_same(whole, parted)


def test_another_seed_gives_another_model(tmp_path: Path) -> None:
    runs = [new_run(tmp_path / str(seed), steps=2, seed=seed) for seed in (0, 1)]
    for run in runs:
        train.train(run)
    assert runs[0].stats[0]["loss"] != runs[1].stats[0]["loss"]


def test_minutes_become_a_number_of_steps_once(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", "classifier", minutes=0.03)
    with pytest.raises(train.Interrupted):
        train.train(run, stop_at(1, signal.SIGTERM))
    found = run.load_state()
    assert found is not None and found[1]["step"] == 1 and found[1]["steps"] >= 2
    fixed = new_run(tmp_path / "fixed", "classifier", steps=found[1]["steps"])
    train.train(run)
    train.train(fixed)
    assert_same(run, fixed)  # the steps that were timed left no trace


@pytest.mark.parametrize(("minutes", "steps"), [(10.0, 499), (0.5, 10)])
def test_the_pictures_are_in_the_minutes(minutes: float, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 1 s, pictures of 5 s, four times and once in the trial, and a glance of 1 s every ten steps: 98 % of 600 s, less
    12 tried steps, less 26 s, by 1.1 s. Of 30 s the pictures would take almost all, and are counted as half: 98 %, less 3 tried
    steps, less 15 s, by 1.1 s.
    """
    now = [0.0]

    class Trainer:
        def __init__(self, task: object, total: int, device: str) -> None: ...

        def advance(self) -> dict[str, float]:
            return {"seconds": 1.0}

        def show(self, folder: Path) -> None:
            assert folder.is_dir()
            now[0] += 5

        def glance(self, folder: Path) -> None:
            now[0] += 1

    task = SimpleNamespace(config={"showings": 4}, epoch=10.0)
    monkeypatch.setattr(train, "Trainer", Trainer)
    monkeypatch.setattr(train, "perf_counter", lambda: now[0])
    assert train.calibrate(task, minutes, train._Stop()) == steps  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("epoch", "total", "ends"),
    [(4.0, 12, {4, 8, 12}), (2.5, 9, {3, 5, 8}), (10.0, 9, set()), (0.5, 3, {1, 2, 3}), (2.0, 402, set(range(6, 403, 6)))],
)
def test_epochs_end_where_all_was_seen(epoch: float, total: int, ends: set[int]) -> None:
    """The last has 201 epochs: every third, so that no more than 100 are left."""
    assert train.epoch_ends(epoch, total) == ends


def test_interrupted_before_the_first_step_it_does_not_say_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def calibrate(task: object, minutes: float, stop: object, device: str) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return 1

    monkeypatch.setattr(train, "calibrate", calibrate)
    run = new_run(tmp_path / "run", "classifier")
    with pytest.raises(train.Interrupted, match=r"SIGINT before the first step$"):
        train.train(run)
    assert run.load_state() is None


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", "classifier", steps=1)
    train.train(run)
    before = checkpoint(run)
    with pytest.raises(ValueError, match="finished: all of its 1 steps are done"):
        train.train(run)
    assert all(np.array_equal(before[k], v) for k, v in checkpoint(run).items())


def test_handlers_of_signals_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    run = new_run(tmp_path / "run", "classifier", steps=3)
    with pytest.raises(train.Interrupted):
        train.train(run, stop_at(1))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


# In a process of its own.

PROGRAM = """
import sys
from tinydiff import train
from tinydiff.cli import main
train.SECONDS_BETWEEN_CHECKPOINTS = float(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


def start(every: float, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(every), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def settings(task: str) -> list[str]:
    small = TINY if task == "denoiser" else TINY_CLASSIFIER
    return [part for name, value in small.items() for part in ("--set", f"{name}={json.dumps(value)}")]


def wait_for(process: subprocess.Popen[str], run: Path, rows: int) -> None:
    """Until `run` has logged so many steps."""
    for _ in range(3000):
        if process.poll() is not None:
            raise AssertionError(f"ended early: {process.communicate()}")
        stats = run / "stats.jsonl"
        if stats.exists() and stats.read_bytes().count(b"\n") >= rows:
            return
        time.sleep(0.02)
    raise AssertionError("no progress in a minute")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(number: int, code: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(60, "train", "classifier", "--out", out, "--steps", 100_000, *settings("classifier"))
    wait_for(process, out, 3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"tinydiff train classifier --out {out} --resume" in errors
    assert "Traceback" not in errors
    found = Run.open(out).load_state()
    assert found is not None
    assert found[1]["step"] == len(Run.open(out).stats) >= 3  # the step was finished, and saved


def test_a_kill_at_any_moment_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    moments = random.Random(0)
    out, steps = tmp_path / "killed", 40
    command = ["train", "classifier", "--out", out]
    process = start(0, *command, "--steps", steps, *settings("classifier"))  # a checkpoint after every step
    for _ in range(3):
        wait_for(process, out, 2 if not (out / "stats.jsonl").exists() else len(Run.open(out).stats) + 2)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.communicate()
        found = Run.open(out).load_state()
        assert found is not None
        load_model(out)
        if found[1]["step"] == steps:
            break
        process = start(0, *command, "--resume")
    else:
        assert process.communicate()[1] is not None and process.returncode == 0
    whole = new_run(tmp_path / "whole", "classifier", steps=steps)
    train.train(whole)
    assert_same(whole, Run.open(out))


# What isn't finite.


def test_a_loss_that_is_not_finite_stops_with_the_op(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", steps=20, lr=1e30, warmup=0, clip=1e30)
    with pytest.raises(FloatingPointError) as error:
        train.train(run)
    message = str(error.value)
    assert "the loss is" in message and ".py:" in message  # the op's name comes with the line of its call
    found = run.load_state()
    assert found is not None and found[1]["step"] == 0  # the last checkpoint is as it was
    assert all(np.isfinite(v).all() for v in checkpoint(run).values())
    assert "the loss is" in (run.path / "log.txt").read_text()


# Tasks.


class Recorder:
    """A network that answers zeros and remembers what it was asked."""

    device = "cpu"

    def __init__(self) -> None:
        self.asked: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def __call__(self, x: Tensor, t: np.ndarray, labels: np.ndarray) -> Tensor:
        self.asked.append((x.numpy(), t, labels))
        return Tensor(np.zeros(x.shape, np.float32))


def loss_of_zeros(step: int = 0, **options: object) -> tuple[float, Recorder]:
    network = Recorder()
    task = tasks.make_task(tasks.configure("denoiser", "small", {**TINY, "batch_size": 512, **options}))
    return float(task.loss(network, step).item()), network  # type: ignore[arg-type]


def test_the_loss_of_answering_nothing() -> None:
    """The mean square of the target: 1 for the noise, that of the pixels for the picture, and in between for v."""
    pixels = data.load("digits").images
    of_pixels = float(np.mean((pixels / 127.5 - 1) ** 2))
    assert loss_of_zeros(predict="noise")[0] == pytest.approx(1, abs=0.01)
    assert loss_of_zeros(predict="x0")[0] == pytest.approx(of_pixels, abs=0.02)
    assert of_pixels < loss_of_zeros(predict="v")[0] < 1


def test_min_snr_weights_the_loss() -> None:
    """For noise, min(SNR, γ)/SNR: with γ = 1, it is 1 where the noise is above the picture and 1/SNR below."""
    loss, network = loss_of_zeros(predict="noise", min_snr=1.0, schedule="linear")
    t = network.asked[0][1].astype(int)
    alpha2 = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t]
    assert loss == pytest.approx(np.minimum(1, (1 - alpha2) / alpha2).mean(), rel=0.02)


def test_classes_are_withheld_as_often_as_asked() -> None:
    labels = [loss_of_zeros(class_drop=share)[1].asked[0][2] for share in (0.0, 0.25, 1.0)]
    assert (labels[0] < 10).all() and (labels[2] == 10).all()
    assert (labels[1] == 10).mean() == pytest.approx(0.25, abs=0.08)


def test_padding_frames_the_pictures() -> None:
    x = loss_of_zeros(pad=2, predict="v")[1].asked[0][0]
    assert x.shape == (512, 32, 32, 1)


def test_steps_see_different_randomness_and_the_same_step_the_same() -> None:
    first, again, second = (loss_of_zeros(step)[1].asked[0] for step in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not any(np.array_equal(a, b) for a, b in zip(first, second))


def test_a_config_that_lacks_something_is_refused() -> None:
    config = tasks.configure("denoiser", "small", TINY)
    del config["predict"], config["lr"]
    with pytest.raises(ValueError, match="lacks lr, predict"):
        tasks.make_task(config)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lrr": 1}, "unknown option of denoiser 'lrr'.*'lr'"),
        ({"lr": "fast"}, "lr = 'fast'"),
        ({"lr": -1.0}, "must be positive"),
        ({"steps": 0}, "steps = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"batch_size": True}, "batch_size = True"),
        ({"lr": None}, "lr = None"),
        ({"seed": None}, "seed = None"),
        ({"size": "large"}, "size = 'large': it should be like 28"),
        ({"min_snr": "five"}, "min_snr = 'five': it should be like 5.0"),
        ({"betas": [0.9]}, r"betas = \[0.9\]"),
        ({"betas": [0.9, "much"]}, "betas = "),
        ({"minutes": float("inf")}, "minutes"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tasks.configure("denoiser", "small", options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"predict": "nois"}, "'noise'"),
        ({"times": "unifrom"}, "'uniform'"),
        ({"schedule": "cosin"}, "'cosine'"),
        ({"data": "digit"}, "digits"),
    ],
)
def test_bad_choices_suggest_the_nearest(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tasks.make_task(tasks.configure("denoiser", "small", {**TINY, **options}))


# Augmentation, against moves that NumPy makes exactly.


class Extreme:
    """A generator whose uniform numbers are all the upper bound."""

    def uniform(self, low: float, high: float, size: object) -> np.ndarray:
        return np.full(size, high)  # type: ignore[call-overload]


def moved(**amounts: float) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).random((3, 8, 8, 2)).astype(np.float32)
    return x, jitter(x, Extreme(), **({"degrees": 0, "scale": 0, "shift": 0} | amounts))  # type: ignore[arg-type]


def test_no_jitter_is_the_identity() -> None:
    x, y = moved()
    np.testing.assert_allclose(y, x, atol=1e-6)


def test_jitter_shifts_in_background() -> None:
    x, y = moved(shift=3.0)
    np.testing.assert_allclose(y[:, :5, :5], x[:, 3:, 3:], atol=1e-6)
    assert (y[:, 5:] == -1).all() and (y[:, :, 5:] == -1).all()


def test_jitter_turns() -> None:
    x, y = moved(degrees=90.0)
    np.testing.assert_allclose(y, np.rot90(x, -1, (1, 2)), atol=1e-5)


# Pictures from a trained model.


@pytest.fixture(scope="module")
def drawer(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    run = new_run(tmp_path_factory.mktemp("drawer") / "run", steps=2, pad=2)
    train.train(run)
    return Pipeline.load(run.path)


def test_a_picture_depends_on_its_own_seed_and_class_alone(drawer: Pipeline) -> None:
    labels, seeds = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]
    together = drawer.draw(labels, seeds, steps=3, sampler="ddpm")
    assert together.shape == (5, 28, 28, 1) and together.dtype == np.uint8
    np.testing.assert_array_equal(together, drawer.draw(labels, seeds, steps=3, sampler="ddpm"))
    for i in range(5):
        alone = drawer.draw(labels[i : i + 1], seeds[i : i + 1], steps=3, sampler="ddpm")[0]
        assert np.abs(alone.astype(int) - together[i].astype(int)).max() <= 1
    parts = drawer.draw(labels, seeds, steps=3, sampler="ddpm", batch_size=2)
    assert np.abs(parts.astype(int) - together.astype(int)).max() <= 1
    assert np.abs(together[0].astype(int) - together[1].astype(int)).max() > 1


@pytest.mark.parametrize("sampler", ["subtract", "ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m"])
def test_every_sampler_draws_and_films(drawer: Pipeline, sampler: str) -> None:
    frames: list[np.ndarray] = []
    drawn = drawer.draw([1, 2], [0, 1], sampler=sampler, steps=3, frames=frames)
    assert len(frames) == 4 and all(frame.shape == (2, 28, 28, 1) for frame in frames)
    np.testing.assert_array_equal(frames[-1], drawn)
    assert (frames[0] != drawn).any()


def test_guidance_matters_and_nothing_asked_is_the_null_class(drawer: Pipeline) -> None:
    plain, guided = (drawer.draw([3], [0], steps=2, guidance=g) for g in (1.0, 3.0))
    assert (plain != guided).any()
    np.testing.assert_array_equal(drawer.draw(None, [0], steps=2), drawer.draw([10], [0], steps=2, guidance=1.0))


@pytest.mark.parametrize(
    ("labels", "options", "words"),
    [
        ([1, 2], {}, "2 labels for 1 seeds"),
        ([11], {}, "classes are 0 to 9"),
        ([-1], {}, "classes are 0 to 9"),
        ([1], {"sampler": "dim"}, "'ddim'"),
        ([1], {"sampler": "euler", "eta": 0.5}, "eta = 0.5 is for the sampler ddim"),
        ([1], {"steps": 0}, "steps = 0"),
        ([1], {"guidance": float("nan")}, "guidance"),
    ],
)
def test_what_cannot_be_drawn_is_said(drawer: Pipeline, labels: list[int], options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        drawer.draw(labels, [0], **options)


def test_models_are_found_or_the_fix_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such run folder.*tinydiff train"):
        Pipeline.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no model yet"):
        Pipeline.load(tmp_path)
    run = new_run(tmp_path / "run", "classifier", steps=1)
    train.train(run)
    with pytest.raises(ValueError, match="holds a classifier, and a denoiser is needed"):
        Pipeline.load(run.path)


def test_names_of_shipped_models_win_over_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train.train(new_run(Path("classifier"), "classifier", steps=1))
    assert load_model("./classifier")[0].num_parameters() < load_model("classifier")[0].num_parameters()


def test_labels_are_spread_evenly_and_a_sheet_has_a_row_for_each() -> None:
    assert sample_labels([3, 5, 7], 8).tolist() == [3, 3, 3, 5, 5, 5, 7, 7]
    pictures = np.full((8, 2, 2, 1), 255, np.uint8)
    whole = sheet(pictures, sample_labels([3, 5, 7], 8))
    assert whole.shape == (3 * 3 - 1, 3 * 3 - 1, 1)
    assert whole[:2, :2].all() and not whole[6:, 6:].any()  # the third row is one short
    assert sheet(pictures[:4], None).shape == (5, 5, 1)
