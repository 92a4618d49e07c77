"""Training an autoencoder and judging it: figures beside naive loops, the loss beside its parts, the commands whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import tinydiff as td
from tinydiff import data, images, metrics
from tinydiff.cli import cli
from tinydiff.models import AutoencoderKL, Classifier
from tinydiff.pipeline import load_model
from tinydiff.reconstruction import evaluate_autoencoder, fidelity, measure_latents, reconstruct, side_by_side
from tinydiff.run import Run
from tinydiff.tasks import configure, make_task
from tinydiff.tasks.autoencoder import AutoencoderTask, perceptual
from tinydiff.train import Trainer, train

FAST = {"steps": 6, "batch_size": 8, "width": 4, "model.norm_num_groups": 4, "showings": 1}


def pair(shape: tuple[int, ...] = (2, 14, 17, 3)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.random(shape)
    return x, np.clip(x + 0.2 * rng.standard_normal(shape), 0, 1)


# ------------------------------------------------------------------------------------------------------------------ metrics


def test_mse_and_psnr() -> None:
    x, y = pair()
    expected = [np.mean([(a - b) ** 2 for a, b in zip(p.flat, q.flat)]) for p, q in zip(x, y)]
    np.testing.assert_allclose(metrics.mse(x, y), expected)
    np.testing.assert_allclose(metrics.psnr(x, y), [10 * math.log10(1 / e) for e in expected])
    assert metrics.psnr(x, x).tolist() == [math.inf, math.inf]
    black, grey = np.zeros((1, 5, 5, 1), np.uint8), np.full((1, 5, 5, 1), 51, np.uint8)  # 51/255 = 1/5
    assert metrics.mse(black, grey).tolist() == pytest.approx([0.04])
    assert metrics.psnr(black, grey).tolist() == pytest.approx([13.9794], abs=1e-4)


def naive_ssim(x: np.ndarray, y: np.ndarray, radius: int) -> float:
    """One channel, window by window, straight from the definition."""
    weights = {
        (i, j): math.exp(-(i * i + j * j) / (2 * 1.5**2)) for i in range(-radius, radius + 1) for j in range(-radius, radius + 1)
    }
    whole = sum(weights.values())
    found = []
    for r in range(radius, x.shape[0] - radius):
        for c in range(radius, x.shape[1] - radius):
            at = {k: (w / whole, x[r + k[0], c + k[1]], y[r + k[0], c + k[1]]) for k, w in weights.items()}
            mx, my = (sum(v[0] * v[i] for v in at.values()) for i in (1, 2))
            vx = sum(w * (a - mx) ** 2 for w, a, _ in at.values())
            vy = sum(w * (b - my) ** 2 for w, _, b in at.values())
            cov = sum(w * (a - mx) * (b - my) for w, a, b in at.values())
            c1, c2 = 1e-4, 9e-4
            found.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2)))
    return sum(found) / len(found)


def test_ssim() -> None:
    x, y = pair()
    for i in range(2):
        expected = np.mean([naive_ssim(x[i, :, :, c], y[i, :, :, c], 5) for c in range(3)])
        assert metrics.ssim(x, y)[i] == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(metrics.ssim(x, x), 1)
    small = x[:1, :6, :5, :1], y[:1, :6, :5, :1]  # the window shrinks to 5×5
    assert metrics.ssim(*small)[0] == pytest.approx(naive_ssim(small[0][0, :, :, 0], small[1][0, :, :, 0], 2), rel=1e-9)
    with pytest.raises(ValueError, match="as many of the same shape"):
        metrics.ssim(x, y[:1])


@pytest.mark.parametrize("count", [200, 30])  # more pictures than pixels, and fewer
@pytest.mark.parametrize("numbers", [1, 7])
def test_pca(count: int, numbers: int) -> None:
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((10, 48))
    train, test = (0.5 + 0.02 * rng.standard_normal((n, 10)) @ mixing for n in (count, 5))
    mean = train.mean(0)
    axes = np.linalg.svd(train - mean)[2][:numbers]
    expected = mean + (test - mean) @ axes.T @ axes
    found = metrics.pca_reconstruct(train.reshape(-1, 4, 4, 3), test.reshape(-1, 4, 4, 3), numbers)
    assert ((expected > 0) & (expected < 1)).all()
    np.testing.assert_allclose(found.reshape(5, -1), expected, atol=1e-5)
    with pytest.raises(ValueError, match="components, not 49"):
        metrics.pca_reconstruct(train.reshape(-1, 4, 4, 3), test.reshape(-1, 4, 4, 3), 49)


# --------------------------------------------------------------------------------------------------------------------- task


def task_of(**options: Any) -> AutoencoderTask:
    task = make_task(configure("autoencoder", options=FAST | options))
    assert isinstance(task, AutoencoderTask)
    return task


def test_the_loss_is_its_parts() -> None:
    task = task_of(kl=1.0, perceptual=0.5)
    model = task.build()
    x = td.tensor(task.batch(3)[0])
    latents = model.encode(x)
    z = latents.mean.numpy() + np.exp(latents.logvar.numpy() / 2) * task.rng(3).standard_normal(latents.mean.shape, np.float32)
    back = model.decode(td.tensor(z), (28, 28))
    mean, logvar = latents.mean.numpy(), latents.logvar.numpy()
    kl = 0.5 * (mean**2 + np.exp(logvar) - logvar - 1).sum() / 8
    mse = np.mean((back.numpy() - x.numpy()) ** 2)
    judge = load_model("classifier")[0]
    seen = []
    for a, b in zip(judge.feature_maps(back), judge.feature_maps(x)):
        a, b = (m.numpy() / np.sqrt((m.numpy() ** 2).sum(-1, keepdims=True)) for m in (a, b))
        seen.append(((a - b) ** 2).sum(-1).mean())
    expected = mse + kl / 784 + 0.5 * np.mean(seen)
    assert task.loss(model, 3).item() == pytest.approx(float(expected), rel=1e-4)
    assert min(kl / 784, 0.5 * np.mean(seen)) > 1e-3 * expected  # so that each is seen


def test_a_plain_bottleneck_draws_no_noise() -> None:
    task = task_of(kl=0.0)
    model = task.build()
    x = td.tensor(task.batch(0)[0])
    expected = np.mean((model(x).numpy() - x.numpy()) ** 2)
    loss = task.loss(model, 0)
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)
    loss.backward()
    assert not model.quant_conv.bias.grad.numpy()[4:].any()  # logvar's half


def test_perceptual_gradient_reaches_the_picture_only() -> None:
    td.manual_seed(0)
    classifier = Classifier(widths=[8, 8]).requires_grad_(False)
    x, y = (td.tensor(np.random.default_rng(i).standard_normal((2, 12, 12, 1)).astype(np.float32)) for i in range(2))
    leaf = td.tensor(x.numpy(), requires_grad=True)
    perceptual(classifier, leaf, y).backward()
    assert np.abs(leaf.grad.numpy()).max() > 0
    assert all(p.grad is None for p in classifier.parameters())
    assert perceptual(classifier, y, y).item() == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 3}, "option factor = 3: choose 1, 2, 4"),
        ({"kl": -1.0}, "option kl = -1.0: it is a weight"),
        ({"latent": 0}, "option latent = 0: it must be at least 1"),
        ({"showings": 0}, "option showings = 0"),
        ({"perceptual": 1.0, "classifier": "nowhere"}, "nowhere: no such run folder"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_of(**options)


@pytest.mark.parametrize(("factor", "widths"), [(1, [16]), (4, [16, 32, 64]), (16, [16, 32, 64, 64, 64])])
def test_factor_and_latent(factor: int, widths: list[int]) -> None:
    task = make_task(configure("autoencoder", options={"factor": factor, "latent": 3}))
    model = task.build()
    assert model.config["block_out_channels"] == widths
    assert model.encode(td.tensor(np.zeros((1, 28, 28, 1), np.float32))).mean.shape == (1, *2 * [-(-28 // factor)], 3)


def test_the_lecture_preset(tmp_path: Path) -> None:
    for i in range(10):
        Image.new("RGB", (512, 512), (i, 2 * i, 3 * i)).save(tmp_path / f"{i}.png")
    task = make_task(configure("autoencoder", "lecture", {"data": f"folder:{tmp_path}", "size": 512}))
    assert "encoder block 3       64×64×24        98,304" in task.notes[-1]
    assert task.notes[-1].endswith("in the latents: 48")
    assert task.build().config["block_out_channels"] == [3, 6, 12, 24]


# -------------------------------------------------------------------------------------------------------------- what is kept


def test_latents_are_measured_and_kept(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", configure("autoencoder", options=FAST | {"kl": 0.0}))
    train(run)
    model, card = load_model(run.path, "autoencoder")
    pictures = data.load("digits").images[:2000]
    z = model.encode(td.tensor(images.from_uint8(pictures))).mode().numpy()
    assert model.config["scaling_factor"] == pytest.approx(1 / z.std(), rel=1e-4)
    assert model.config["shift_factor"] == pytest.approx(z.mean(), abs=1e-5)
    np.testing.assert_allclose(card["latents"]["std"], z.std((0, 1, 2)), rtol=1e-4)
    scaled = model.scale(z)
    assert scaled.std() == pytest.approx(1, rel=1e-4) and abs(scaled.mean()) < 1e-4
    row = run.stats[-1]
    found = fidelity(data.load("digits", "test").images[:500], reconstruct(model, data.load("digits", "test").images[:500]))
    assert {name: row[name] for name in found} == pytest.approx(found, rel=1e-4)
    with Image.open(run.samples / "step-000006.png") as sheet:
        assert sheet.size == ((8 * 29 - 1) * 2, (8 * 29 - 1) * 2)  # 4 rows of originals, 4 of what came back


def test_nonsense_in_the_card(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", configure("autoencoder", options=FAST))
    train(run)
    path = run.path / "model" / "config.json"
    card = json.loads(path.read_text())
    for name, value, message in (
        ("latent_channels", 10**9, "model.latent_channels is 1000000000"),
        ("scaling_factor", 0, "scaling_factor=0 must be positive"),
        ("up_block_types", [], "up_block_types"),
    ):
        path.write_text(json.dumps(card | {"model": card["model"] | {name: value}}))
        with pytest.raises(ValueError, match=f"describes no model: .*{message}"):
            load_model(run.path)


def test_checkpointed_training_is_the_same() -> None:
    def gradients(checkpointing: bool) -> list[np.ndarray]:
        task = task_of(gradient_checkpointing=checkpointing)
        model = task.build()
        assert model.gradient_checkpointing is checkpointing
        task.loss(model, 0).backward()
        return [p.grad.numpy() for p in model.parameters()]

    for a, b in zip(gradients(False), gradients(True)):
        np.testing.assert_array_equal(a, b)


def test_a_dead_channel_is_found() -> None:
    td.manual_seed(0)
    model = AutoencoderKL(1, 1, block_out_channels=(4,), norm_num_groups=2)
    weight = model.quant_conv.weight
    weight.data = weight.data.copy()
    weight.data[..., 2] *= 1e-4
    pictures = data.load("digits").images[:50]
    assert measure_latents(model, pictures, sampled=False)["dead"] == [2]
    # The noise of the Gaussian spreads a channel that carries nothing.
    assert measure_latents(model, pictures, sampled=True)["dead"] == [2]
    found = measure_latents(model, pictures, sampled=True)
    z = model.encode(td.tensor(images.from_uint8(pictures))).sample(np.random.default_rng(0)).numpy()
    np.testing.assert_allclose(found["std"], z.std((0, 1, 2)), rtol=0.02)
    assert found["scaling_factor"] == pytest.approx(1 / z.std(), rel=0.02)
    assert found["std"][2] > 0.5


def test_a_dead_channel_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinydiff.reconstruction.DEAD", 0.999)
    arguments = ["train", "autoencoder", "--steps", "1", "--batch-size", "2", "--set", "width=8", "--out", str(tmp_path / "a")]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert "warning: 3 channels of the latents carry nothing; train longer" in done.stderr


def test_side_by_side() -> None:
    pictures = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(64, 1).repeat(64, 2) * 40
    sheet = side_by_side(pictures, pictures / 255.0 + 0.1, columns=2)
    assert sheet.shape == (4 * 65 - 1, 2 * 65 - 1, 1)
    assert [int(sheet[65 * r, 65 * c, 0]) for r in range(4) for c in range(2)] == [0, 40, 26, 66, 80, 120, 106, 146]


def test_resumed_to_the_same_bits(tmp_path: Path) -> None:
    whole, parts = (Run.create(tmp_path / name, configure("autoencoder", options=FAST)) for name in ("whole", "parts"))
    expected = train(whole)
    begun = Trainer(make_task(parts.config), 6)
    for _ in range(3):
        begun.advance()
    begun.save(parts)
    found = train(parts)
    for a, b in zip(found.model.parameters(), expected.model.parameters()):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert load_model(parts.path)[1] == load_model(whole.path)[1]


def test_commands(tmp_path: Path) -> None:
    """Train and evaluate, on colours that transparency is laid over."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (20, 20, 4), np.uint8), "RGBA").save(folder / f"{i:02d}.png")
    runner = CliRunner()
    arguments = ["train", "autoencoder", "--data", f"folder:{folder}", "--size", "16", "--factor", "4", "--latent", "2"]
    arguments += ["--steps", "6", "--batch-size", "4", "--set", "width=8", "--set", "showings=2", "--out"]
    done = runner.invoke(cli, [*arguments, str(tmp_path / "a")], catch_exceptions=False)
    assert done.exit_code == 0
    assert "numbers in the picture / in the latents: 24" in done.output
    assert "psnr" in done.output and "ssim" in done.output
    # Half-way, after the 18 training pictures were seen once, and at the end.
    assert [path.name for path in sorted((tmp_path / "a" / "samples").iterdir())] == [f"step-{n:06d}.png" for n in (3, 5, 6)]
    done = runner.invoke(cli, ["eval", str(tmp_path / "a"), "--json"], catch_exceptions=False)
    result = json.loads(done.output)
    assert result["numbers"] == 32 and result["n"] == 2 and result["mse_pca"] is None  # 18 pictures have no 32 components
    assert result == {"run": str(tmp_path / "a")} | evaluate_autoencoder(tmp_path / "a")
    assert runner.invoke(cli, ["eval", str(tmp_path / "a"), "--data", "digits"]).exception is not None
