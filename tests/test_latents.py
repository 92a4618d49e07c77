"""Diffusion among latents: the spaces, the cache, runs that stand alone; and pictures begun with, painted into and walked
between, in pixels and in latents alike."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from tinydiff import cache, data, images, models, no_grad, tasks, tensor, train
from tinydiff import random as td_random
from tinydiff.cli import main
from tinydiff.diffusion import SAMPLERS, noise_source, slerp
from tinydiff.pipeline import AUTOENCODER, Pipeline, load_model
from tinydiff.reconstruction import reconstruct
from tinydiff.run import Run
from tinydiff.space import Latents, Pixels, cached_moments
from tinydiff.tasks.denoiser import DenoiserTask
from tinydiff.tasks.denoising import latent_unet

TINY_AUTOENCODER = {"steps": 4, "batch_size": 8, "width": 4, "latent": 3, "showings": 1, "model.norm_num_groups": 4, "lr": 1e-2}
TINY_UNET = {"block_out_channels": [8, 8], "norm_num_groups": 2, "attention_head_dim": 4}
TWO_LEVELS = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
TINY = {"batch_size": 4, "showings": 0, **{f"model.{name}": value for name, value in TINY_UNET.items()}}
OPTIONS = [f"--set={name}={json.dumps(value)}" for name, value in TINY.items()]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for this file's latents; that of the kernels stays where it is."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "folder", lambda: folder)
        yield folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An autoencoder (Gaussian and plain) that has hardly learned; a denoiser of pixels, and one of latents."""
    folder = tmp_path_factory.mktemp("runs")
    for name, kl in (("gaussian", 1e-2), ("plain", 0.0)):
        train.train(Run.create(folder / name, tasks.configure("autoencoder", options=TINY_AUTOENCODER | {"kl": kl})))
    for name, options in (
        ("pixels", {f"model.{k}": v for k, v in TWO_LEVELS.items()}),
        ("latents", {"latents": str(folder / "gaussian")}),
    ):
        train.train(Run.create(folder / name, tasks.configure("denoiser", options=TINY | {"steps": 2} | options)))
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(params=["pixels", "latents"])
def drawer(request: pytest.FixtureRequest, runs: dict[str, Path]) -> Pipeline:
    return Pipeline.load(runs[request.param])


def task_of(latents: Path, **options: Any) -> DenoiserTask:
    task = tasks.make_task(tasks.configure("denoiser", options=TINY | {"latents": str(latents)} | options))
    assert isinstance(task, DenoiserTask)
    return task


def digits(n: int = 1) -> np.ndarray:
    return data.load("digits", "test").images[:n]


def apart(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference of two uint8 arrays; one level may be rounding."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# ---------------------------------------------------------------------------------------------------------------- the spaces


@pytest.mark.parametrize("border", [0, 3])
def test_pixels_are_pictures_with_a_border(border: int) -> None:
    space = Pixels((28, 28, 1), border)
    x = space.encode(digits(3))
    assert x.shape == (3, *space.size) == (3, 28 + 2 * border, 28 + 2 * border, 1) and x.dtype == np.float32
    inside = x[:, border : border + 28, border : border + 28]
    np.testing.assert_allclose(inside, digits(3) / 127.5 - 1, atol=1e-6)
    assert (x.sum() - inside.sum()) == pytest.approx(-(x.size - inside.size))  # the border is -1
    np.testing.assert_array_equal(space.decode(x), digits(3))
    mask = digits()[0, :, :, 0] > 100
    assert space.cover(mask).sum() == mask.sum() and space.cover(mask).shape == (*space.size[:2], 1)


def autoencoder(factor: int = 4, channels: int = 1, latent: int = 3, **options: Any) -> models.AutoencoderKL:
    td_random.manual_seed(0)
    levels = factor.bit_length()
    config = {
        "in_channels": channels,
        "out_channels": channels,
        "latent_channels": latent,
        "block_out_channels": [4] * levels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": 2,
    }
    return models.AutoencoderKL.from_config(config | options).eval()


@pytest.mark.parametrize(("shape", "factor", "size"), [((28, 28, 1), 4, (7, 7, 3)), ((13, 18, 3), 8, (2, 3, 3))])
def test_latents_are_shifted_and_scaled(shape: tuple[int, int, int], factor: int, size: tuple[int, int, int]) -> None:
    model = autoencoder(factor, shape[2], scaling_factor=0.5, shift_factor=0.25)
    space = Latents(shape, model)
    pictures = np.random.default_rng(0).integers(0, 256, (70, *shape), np.uint8)  # more than a batch
    with no_grad():
        expected = model.encode(tensor(images.from_uint8(pictures)))
    mean, std = space.moments(pictures)
    assert space.size == size and mean.shape == std.shape == (70, *size)
    np.testing.assert_allclose(mean, (expected.mean.numpy() - 0.25) * 0.5, atol=1e-5)
    np.testing.assert_allclose(std, np.sqrt(np.exp(expected.logvar.numpy())) * 0.5, rtol=1e-4)
    np.testing.assert_array_equal(space.encode(pictures), mean)
    with no_grad():
        back = model.decode(tensor(mean / 0.5 + 0.25), shape[:2]).numpy()
    assert apart(space.decode(mean), images.to_uint8(back)) <= 1


def test_a_latent_is_free_where_any_of_its_pixels_is() -> None:
    space = Latents((10, 10, 1), autoencoder(4))
    mask = np.zeros((10, 10), bool)
    mask[3, 4] = mask[9, 9] = True
    np.testing.assert_array_equal(space.cover(mask)[..., 0], [[0, 1, 0], [0, 0, 0], [0, 0, 1]])


def test_an_autoencoder_of_other_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="the pictures have 3; train one on them"):
        Latents((28, 28, 3), autoencoder())


# ------------------------------------------------------------------------------------------------------------------ training


def test_latents_are_drawn_anew_each_step(runs: dict[str, Path]) -> None:
    task = task_of(runs["gaussian"], batch_size=2000)
    model = load_model(runs["gaussian"], "autoencoder")[0]
    assert isinstance(model, models.AutoencoderKL)
    pictures = images.from_uint8(task.data.images[task.indices(0)])
    with no_grad():
        found = model.encode(tensor(pictures))
    noise = (model.unscale(task.clean(0)) - found.mean.numpy()) / np.exp(found.logvar.numpy() / 2)
    assert abs(noise.mean()) < 0.02 and noise.std() == pytest.approx(1, abs=0.02)
    np.testing.assert_array_equal(task.clean(0), task.clean(0))
    again = task_of(runs["gaussian"], batch_size=2000, seed=1)
    assert not np.array_equal(task.indices(0), again.indices(0))
    assert task.clean(0).std() == pytest.approx(1, abs=0.05)  # what the factors are measured for


def test_latents_of_a_plain_bottleneck_are_its_mode(runs: dict[str, Path]) -> None:
    task = task_of(runs["plain"])
    model = load_model(runs["plain"], "autoencoder")[0]
    assert isinstance(model, models.AutoencoderKL)
    with no_grad():
        found = model.encode(tensor(images.from_uint8(task.data.images[task.indices(5)]))).mode().numpy()
    np.testing.assert_allclose(task.clean(5), model.scale(found), atol=1e-5)


def test_the_network_fits_the_latents(runs: dict[str, Path]) -> None:
    config = json.loads((runs["latents"] / "model" / "config.json").read_text())
    assert config["shape"] == [28, 28, 1]
    assert [config["model"][name] for name in ("sample_size", "in_channels", "out_channels")] == [7, 3, 3]
    assert config["model"]["down_block_types"] == ["DownBlock2D", "AttnDownBlock2D"]  # 7 × 7 places are halved once
    assert config["model"]["layers_per_block"] == 1


@pytest.mark.parametrize(("side", "levels"), [(7, 2), (16, 2), (32, 3), (64, 3)])
def test_more_places_are_halved_more_often(side: int, levels: int) -> None:
    config = latent_unet((side, side, 4), [32, 64, 96])
    assert config["block_out_channels"] == [32, 64, 96][:levels]
    model = models.UNet2DModel.from_config(config | {"in_channels": 4, "out_channels": 4, "layers_per_block": 1})
    assert [block.attentions is not None for block in model.down_blocks] == [False] * (levels - 1) + [True]


@pytest.mark.parametrize(
    ("side", "looking"), [(7, [True, True]), (8, [True, True]), (16, [False, True]), (32, [False, False, True])]
)
def test_words_are_looked_at_on_every_small_map(side: int, looking: list[bool]) -> None:
    config = latent_unet((side, side, 4), [32, 64, 96], "CrossAttn")
    sizes = {"in_channels": 4, "out_channels": 4, "layers_per_block": 1, "cross_attention_dim": 16}
    model = models.UNet2DConditionModel.from_config(config | sizes)
    assert [block.attentions is not None for block in model.down_blocks] == looking
    assert [block.attentions is not None for block in model.up_blocks] == looking[::-1]


def test_resuming_needs_no_autoencoder_and_gives_the_same_bits(runs: dict[str, Path], tmp_path: Path, own_cache: Path) -> None:
    shutil.copytree(runs["gaussian"], tmp_path / "ae")
    options = TINY | {"steps": 6, "latents": str(tmp_path / "ae")}
    whole, parts = (Run.create(tmp_path / name, tasks.configure("denoiser", options=options)) for name in ("whole", "parts"))
    train.train(whole)

    def stop(trainer: train.Trainer, row: dict[str, float]) -> None:
        if trainer.step == 3:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(train.Interrupted):
        train.train(parts, stop)
    shutil.rmtree(tmp_path / "ae")
    for file in own_cache.glob("latents-*"):
        file.unlink()  # encoded again by the copy
    train.train(Run.open(parts.path))
    for file in ("model/model.safetensors", "state/state.safetensors"):
        a, b = load_file(whole.path / file), load_file(parts.path / file)
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert [row["loss"] for row in whole.stats] == [row["loss"] for row in parts.stats]


# ----------------------------------------------------------------------------------------------------------------- the cache


def latents_file(folder: Path) -> Path:
    (file,) = folder.glob("latents-*.safetensors")
    return file


def test_pictures_are_encoded_once(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "folder", lambda: tmp_path)
    first = task_of(runs["gaussian"])
    assert latents_file(tmp_path).stat().st_size > first.mean.nbytes + first.std.nbytes
    with monkeypatch.context() as patch:
        patch.setattr(Latents, "moments", lambda *_: pytest.fail("encoded again"))
        second = task_of(runs["gaussian"])
    np.testing.assert_array_equal(first.clean(3), second.clean(3))
    task_of(runs["plain"])  # other weights, other latents
    assert isinstance(first.space, Latents)
    others = digits(12)
    mean, _ = cached_moments(first.space, others, first.weights)  # other pictures
    np.testing.assert_array_equal(mean, first.space.encode(others))
    mean, _ = cached_moments(first.space, others[::-1], first.weights)  # the same in another order
    np.testing.assert_array_equal(mean, first.space.encode(others[::-1]))
    assert len(list(tmp_path.glob("latents-*.safetensors"))) == 4


@pytest.mark.parametrize("damage", ["cut", "flipped", "values", "foreign"])
def test_a_broken_cache_is_made_again(
    runs: dict[str, Path], damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "folder", lambda: tmp_path)
    whole = task_of(runs["gaussian"])
    file = latents_file(tmp_path)
    good = file.read_bytes()
    if damage == "cut":
        file.write_bytes(good[: len(good) // 2])
    elif damage == "flipped":
        bad = bytearray(good)
        bad[-5] ^= 0x10
        file.write_bytes(bytes(bad))
    elif damage == "values":  # a whole file, with whole metadata, of other numbers
        arrays = load_file(file)
        arrays["mean"] = arrays["mean"] + 1
        save_file(arrays, file, metadata(good))
    else:
        file.write_bytes(b"not ours at all")
    assert file.read_bytes() != good
    again = task_of(runs["gaussian"])
    np.testing.assert_array_equal(again.mean, whole.mean)
    np.testing.assert_array_equal(again.std, whole.std)
    found = file.read_bytes()
    assert metadata(found) == metadata(good) and found[-1000:] == good[-1000:] and len(found) == len(good)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]  # nothing half-written is left


def metadata(file: bytes) -> dict[str, str]:
    return json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])["__metadata__"]


def test_without_a_cache_everything_works(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = task_of(runs["gaussian"]).clean(0)
    (tmp_path / "file").write_text("a file where the folder should be")
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "file")
    np.testing.assert_array_equal(task_of(runs["gaussian"]).clean(0), expected)


# ----------------------------------------------------------------------------------------------------------- the whole chain


def test_train_sample_and_eval_with_the_autoencoder_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {name.removeprefix("model."): value for name, value in TINY_AUTOENCODER.items() if name != "steps"}
    groups = f"--set=model.norm_num_groups={names.pop('norm_num_groups')}"
    settings = [f"--set={name}={json.dumps(value)}" for name, value in names.items()]
    ae, run, moved = (str(tmp_path / name) for name in ("ae", "run", "moved"))
    assert main(["train", "autoencoder", "--out", ae, "--steps", "3", groups, *settings]) == 0
    assert (
        main(["train", "denoiser", "--latents", ae, "--out", run, "--steps", "2", "--set=showings=1", *OPTIONS[:1], *OPTIONS[2:]])
        == 0
    )
    assert (tmp_path / "run" / "samples" / "step-000002.png").is_file()
    shutil.rmtree(ae)
    Path(run).rename(moved)
    out, npz = tmp_path / "grid.png", tmp_path / "grid.npz"
    drawing = ["--class", "1,2", "--n", "4", "--steps", "2"]
    assert main(["sample", moved, *drawing, "--out", str(out), "--npz", str(npz), "--gif", str(tmp_path / "film.gif")]) == 0
    with Image.open(out) as sheet:
        assert sheet.size == (57 * 2, 57 * 2)  # two rows of two, enlarged
    with np.load(npz) as found:
        assert found["images"].shape == (4, 28, 28)
    capsys.readouterr()
    assert main(["eval", moved, "--n", "20", "--steps", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["n"] == 20 and result["fid"] > result["floor"] and 0 <= result["accuracy"] <= 1


def test_another_autoencoder_in_the_run_is_noticed(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["latents"], tmp_path / "run")
    folder = tmp_path / "run" / "model" / AUTOENCODER
    shutil.copy(runs["plain"] / "model" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(ValueError, match="the denoiser was trained with"):
        Pipeline.load(tmp_path / "run")
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"autoencoder is missing.*copy the whole folder"):
        Pipeline.load(tmp_path / "run")


# ------------------------------------------------------------------------------------------------------- beginning with a picture


def stays(drawer: Pipeline, picture: np.ndarray) -> np.ndarray:
    """What a picture is to a drawer that leaves it alone."""
    if isinstance(drawer.space, Pixels):
        return picture
    back = reconstruct(drawer.space.model, picture[None])  # type: ignore[attr-defined]
    return np.rint(back[0] * 255).astype(np.uint8)


def test_at_strength_0_the_picture_comes_back(drawer: Pipeline) -> None:
    picture = digits()[0]
    (found,) = drawer.draw([3], [0], steps=4, picture=picture, strength=0.0)
    assert apart(found, stays(drawer, picture)) <= (0 if isinstance(drawer.space, Pixels) else 1)


def test_at_strength_1_the_picture_is_forgotten(drawer: Pipeline) -> None:
    first, second = (drawer.draw([3], [0], steps=4, picture=picture, strength=1.0) for picture in digits(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, drawer.draw([3], [0], steps=4))


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_the_weaker_the_nearer(drawer: Pipeline, sampler: str) -> None:
    picture = digits()[0]
    drawn = [drawer.draw([3], [0], steps=8, sampler=sampler, picture=picture, strength=s)[0] for s in (0.25, 0.5, 1.0)]
    away = [float(np.square(x.astype(float) - stays(drawer, picture)).mean()) for x in drawn]
    assert 0 < away[0] < away[1] < away[2]


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_what_is_not_masked_stays(drawer: Pipeline, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = digits()[0]
    mask = np.zeros((28, 28), bool)
    mask[8:20, :10] = True
    decode, ends = drawer.space.decode, []
    monkeypatch.setattr(drawer.space, "decode", lambda x: ends.append(x) or decode(x))
    drawn = drawer.draw([3, 4], [0, 1], steps=4, sampler=sampler, picture=picture, mask=mask)
    free = drawer.space.cover(mask)[..., 0]
    known = drawer.space.encode(picture[None])[0]
    np.testing.assert_allclose(ends[-1][:, ~free], np.stack([known[~free]] * 2), atol=1e-5)
    assert np.abs(ends[-1][:, free] - known[free]).max() > 0.05
    assert apart(drawn[0][mask], drawn[1][mask]) > 1  # each seed its own
    if isinstance(drawer.space, Pixels):
        np.testing.assert_array_equal(drawn[:, ~mask], np.stack([picture[~mask]] * 2))


def test_masks_of_nothing_and_of_all(drawer: Pipeline) -> None:
    picture = digits()[0]
    nothing, everything = np.zeros((28, 28), bool), np.ones((28, 28), bool)
    (kept,) = drawer.draw([3], [0], steps=4, picture=picture, mask=nothing)
    assert apart(kept, stays(drawer, picture)) <= (0 if isinstance(drawer.space, Pixels) else 1)
    np.testing.assert_array_equal(
        drawer.draw([3], [0], steps=4, picture=picture, mask=everything), drawer.draw([3], [0], steps=4)
    )


def test_what_is_known_is_noised_as_time_has_it(runs: dict[str, Path]) -> None:
    """After the step to time t the known part is α·picture + σ·(the noise it began with): what the network was trained to see."""
    drawer = Pipeline.load(runs["pixels"])
    picture = digits()[0]
    seen: list[tuple[np.ndarray, float]] = []
    answer = drawer._predict

    def predict(x: np.ndarray, t: np.ndarray, condition: np.ndarray) -> np.ndarray:
        seen.append((x[-1:], float(t[0])))
        return answer(x, t, condition)

    drawer._predict = predict  # type: ignore[method-assign]
    drawer.draw([3], [0], steps=5, picture=picture, mask=np.zeros((28, 28), bool))
    noise = (seen[1][0] - drawer.schedule.alpha(seen[1][1]) * drawer.space.encode(picture[None])) / drawer.schedule.sigma(
        seen[1][1]
    )
    for x, t in seen[1:]:
        expected = drawer.schedule.alpha(t) * drawer.space.encode(picture[None]) + drawer.schedule.sigma(t) * noise
        np.testing.assert_allclose(x, expected, atol=1e-4)
    assert noise.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strength": 0.5}, "needs a picture"),
        ({"mask": np.ones((28, 28), bool)}, "needs a picture"),
        ({"picture": digits()[0], "strength": 1.5}, "strength = 1.5; choose between 0"),
        ({"picture": digits()[0], "strength": -0.1}, "strength = -0.1; choose between 0"),
        ({"picture": digits()[0].repeat(3, 2)}, r"\(28, 28, 3\)"),
        ({"picture": digits()[0].astype(np.float32)}, "float32"),
        ({"picture": digits()[0], "mask": np.ones((14, 28), bool)}, r"mask has shape \(14, 28\)"),
        ({"noise": np.zeros((2, 7, 7, 3), np.float32)}, "noise has shape"),
    ],
)
def test_what_cannot_be_begun_with_is_said(drawer: Pipeline, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        drawer.draw([3], [0], steps=2, **options)


# ------------------------------------------------------------------------------------------------------ from one to another


def test_slerp_keeps_the_deviation_of_noise() -> None:
    a, b = noise_source([3, 17], (28, 28, 1))()
    way = slerp(a, b, [0, 0.25, 0.5, 1])
    assert way.dtype == np.float32
    np.testing.assert_allclose(way[0], a, atol=1e-6)
    np.testing.assert_allclose(way[-1], b, atol=1e-6)
    np.testing.assert_allclose(way.std((1, 2, 3)), 1, atol=0.05)
    assert ((a + b) / 2).std() < 0.8  # what the straight line would do
    quarter = np.float32([[1, 0], [0, 1]])
    np.testing.assert_allclose(slerp(*quarter, [1 / 3]), [[np.cos(np.pi / 6), np.sin(np.pi / 6)]], atol=1e-6)
    np.testing.assert_allclose(slerp(a, a, [0.3]), a[None], atol=1e-6)


@pytest.mark.parametrize("name", ["pixels", "latents"])
def test_a_film_goes_from_one_picture_to_the_next(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    npz, gif = tmp_path / "way.npz", tmp_path / "way.gif"
    options = ["--class", "3", "--steps", "3", "--seeds", "3,17", "--npz", str(npz)]
    assert main(["sample", str(runs[name]), *options]) == 0
    with np.load(npz) as found:
        ends = found["images"]
    assert main(["sample", str(runs[name]), *options, "--interpolate", "4", "--gif", str(gif)]) == 0
    with np.load(npz) as found:
        way = found["images"]
    assert len(way) == 5
    assert apart(way[0], ends[0]) <= 1 and apart(way[-1], ends[1]) <= 1
    assert all(apart(a, b) > 1 for a, b in pairwise(way))
    with Image.open(gif) as film:
        assert getattr(film, "n_frames", 0) == 5


# ----------------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pictures to begin with, and masks."""
    folder = tmp_path_factory.mktemp("files")
    mask = np.zeros((28, 28), np.uint8)
    mask[:14] = 255
    for name, array in {
        "digit": digits()[0, :, :, 0],
        "large": digits()[0, :, :, 0].repeat(2, 0).repeat(2, 1),
        "coloured": np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8),
        "mask": mask,
        "large_mask": mask.repeat(2, 0).repeat(2, 1),
    }.items():
        Image.fromarray(array).save(folder / f"{name}.png")
    return {path.stem: str(path) for path in folder.iterdir()}


@pytest.mark.parametrize(("init", "mask"), [("digit", "mask"), ("large", "large_mask")])
def test_pictures_and_masks_are_read_and_scaled(
    init: str, mask: str, runs: dict[str, Path], files: dict[str, str], tmp_path: Path
) -> None:
    npz = tmp_path / "painted.npz"
    arguments = ["sample", str(runs["pixels"]), "--class", "3", "--n", "2", "--steps", "3", "--init", files[init]]
    assert main([*arguments, "--mask", files[mask], "--npz", str(npz)]) == 0
    with np.load(npz) as found:
        drawn = found["images"]
    if init == "digit":
        np.testing.assert_array_equal(drawn[:, 14:], digits()[[0, 0], 14:, :, 0])
    assert apart(drawn[:, 14:], np.stack([drawn[0, 14:]] * 2)) == 0 and apart(drawn[0, :14], drawn[1, :14]) > 1


def test_settings_of_a_picture_begun_with_are_in_its_png(runs: dict[str, Path], files: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    arguments = ["sample", str(runs["latents"]), "--class", "3", "--n", "1", "--steps", "3", "--init", files["digit"]]
    assert main([*arguments, "--out", str(out)]) == 0
    found = images.read_png_metadata(out)
    assert found["init"] == files["digit"] and found["strength"] == "0.6"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--strength", "0.5"], "--init"),
        (["--mask", "{mask}"], "--init"),
        (["--init", "{digit}", "--strength", "1.5"], "1.5"),
        (["--init", "{digit}", "--mask", "{large_mask}"], "56 × 56"),
        (["--init", "{folder}/none.png"], "no such file"),
        (["--interpolate", "3", "--n", "1"], "two or more"),
        (["--interpolate", "3", "--n", "2", "--sampler", "ddpm"], "choose ddim"),
        (["--interpolate", "3", "--n", "2", "--class", "1,2"], "one class"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    options: list[str],
    words: str,
    runs: dict[str, Path],
    files: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [option.format(folder=tmp_path, **files) for option in options]
    capsys.readouterr()
    assert main(["sample", str(runs["pixels"]), "--class", "3", "--out", str(tmp_path / "out.png"), *options]) in (1, 2)
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert words in line and not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--latents", "{pixels}"], "holds a denoiser, and an autoencoder is needed here"),
        (["--latents", "{pixels}/nowhere"], "no such run folder"),
        (["--latents", "{gaussian}", "--set", "pad=2"], "pad = 2"),
        (["--latents", "{gaussian}", "--data", "shapes:50"], "the pictures have 3"),
        (["--latents", "{gaussian}", "--preset", "bas"], "base"),
    ],
)
def test_latents_that_make_no_sense_are_one_line(
    options: list[str], words: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [option.format(**runs) for option in options]
    capsys.readouterr()
    assert main(["train", "denoiser", "--out", str(tmp_path / "run"), "--steps", "1", *options]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and not (tmp_path / "run").exists()
