"""The autoencoder: against the published model's answers, finite differences, and what its sizes and memory should be."""

from __future__ import annotations

import ast
import gc
import importlib.util
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinydiff as td
from tinydiff import io
from tinydiff.models import AutoencoderKL
from tinydiff.models.autoencoder import LECTURE, DiagonalGaussian, stage_table, stages
from tinydiff.nn import no_init

GOLDEN = Path(__file__).parent / "golden"


def _module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, GOLDEN / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases, weight = _module("autoencoder_cases"), _module("unet_cases").weight
STORED = json.loads((GOLDEN / "autoencoder.json").read_text())["cases"]
TINY: dict[str, Any] = cases.CONFIGS["three levels, two layers, four channels"]

# The published model's config.json and its tensors.
FULL: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def build(config: dict[str, Any], dtype: str = "float32") -> AutoencoderKL:
    """With weights that follow from their names."""
    with no_init():
        model = AutoencoderKL.from_config(config)
    model.load_published({name: weight(name, tuple(shape)) for name, shape in published_shapes(model).items()})
    for parameter in model.parameters():
        parameter.data = parameter.data.astype(dtype)
    return model


def published_shapes(model: AutoencoderKL) -> dict[str, list[int]]:
    axes = {"conv": (3, 2, 0, 1), "linear": (1, 0)}
    return {n: [p.shape[i] for i in axes.get(p.layout, range(p.ndim))] for n, p in model.named_parameters()}


def test_full_size_has_the_published_tensors() -> None:
    with no_init():  # takes no memory
        model = AutoencoderKL.from_config(FULL)
    lines = (GOLDEN / "vae_keys.txt").read_text().splitlines()
    expected = {name: ast.literal_eval(shape) for name, shape in (line.split(" ", 1) for line in lines)}
    assert len(expected) == 248
    assert published_shapes(model) == expected
    assert model.num_parameters() == 83_653_863
    assert model.factor == 8


@pytest.mark.parametrize("name", cases.CONFIGS)
def test_published_model(name: str) -> None:
    """Names, shapes and outputs of the published AutoencoderKL, as stored by scripts/make_golden_autoencoder.py."""
    config, stored = cases.CONFIGS[name], STORED[name]
    model = build(config)
    assert published_shapes(model) == stored["shapes"]
    x, z = cases.inputs(config)
    latents, decoded = model.encode(td.tensor(x)), model.decode(td.tensor(z))
    found = {"mean": latents.mean, "logvar": latents.logvar, "decoded": decoded}
    for key, tensor in found.items():
        np.testing.assert_allclose(tensor.numpy(), np.reshape(stored[key], tensor.shape), atol=2e-5, err_msg=key)
    np.testing.assert_allclose(latents.kl().numpy(), stored["kl"], rtol=1e-5)
    assert decoded.shape == (*x.shape[:3], config.get("out_channels", 3))


@pytest.mark.parametrize("name", cases.CONFIGS)
def test_published_model_live(name: str) -> None:
    """Outputs and gradients in float64 beside the diffusers package, where it is installed."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    config = cases.CONFIGS[name]
    ours, theirs = build(config, "float64"), diffusers.AutoencoderKL(**config).double().eval()
    theirs.load_state_dict({k: torch.from_numpy(weight(k, tuple(v.shape))).double() for k, v in theirs.state_dict().items()})
    x = cases.inputs(config)[0].astype("float64")
    g = np.random.default_rng(2).standard_normal((*x.shape[:3], config.get("out_channels", 3)))
    loss = td.ops.sum(ours(td.tensor(x)) * td.tensor(g)) + td.ops.sum(ours.encode(td.tensor(x)).kl())
    loss.backward()
    x2, g2 = (torch.from_numpy(np.moveaxis(a, -1, 1).copy()) for a in (x, g))
    latents = theirs.encode(x2).latent_dist
    expected = (theirs.decode(latents.mode()).sample * g2).sum() + latents.kl().sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    parameters = dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        found = io.to_disk(key, parameters[key].grad.numpy(), parameters[key].layout)
        scale = max(1.0, float(parameter.grad.abs().max()))
        np.testing.assert_allclose(found / scale, parameter.grad.numpy() / scale, atol=1e-9, err_msg=key)


def test_older_names_of_the_attention() -> None:
    config = cases.CONFIGS["colour"]
    x, z = (td.tensor(a) for a in cases.inputs(config))
    model = build(config)
    published = {n: io.to_disk(n, p.data, p.layout) for n, p in model.named_parameters()}
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, array in published.items():
        for new, old in older.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = array
    assert sum(name not in published for name in renamed) == 16
    with no_init():
        again = AutoencoderKL.from_config(config)
    again.load_published(renamed)
    np.testing.assert_array_equal(again.encode(x).mean.numpy(), model.encode(x).mean.numpy())
    np.testing.assert_array_equal(again.decode(z).numpy(), model.decode(z).numpy())
    with pytest.raises(ValueError, match=r"unexpected: encoder\.to_middle"):
        again.load_published(renamed | {"encoder.to_middle": np.zeros(3, np.float32)})


def test_gradient_against_finite_differences() -> None:
    """The whole training loss, along random directions in all parameters and pixels at once."""
    config = TINY
    model = build(config, "float64")
    x = np.random.default_rng(0).standard_normal((2, 6, 9, 4))  # neither divides by 4

    def loss(pixels: td.Tensor) -> td.Tensor:
        latents = model.encode(pixels)
        back = model.decode(latents.sample(np.random.default_rng(5)), pixels.shape[1:3])
        return td.ops.mse_loss(back, pixels) + 0.01 * td.ops.mean(latents.kl())

    leaf = td.tensor(x, requires_grad=True)
    loss(leaf).backward()
    gradients = [p.grad.numpy() for p in model.parameters()] + [leaf.grad.numpy()]
    start = [p.data.copy() for p in model.parameters()] + [x]

    def value(step: float, direction: list[np.ndarray]) -> float:
        *weights, pixels = (a + step * d for a, d in zip(start, direction))
        with td.no_grad():
            for parameter, array in zip(model.parameters(), weights):
                parameter.assign_(array)
            return float(loss(td.tensor(pixels)).item())

    rng, h = np.random.default_rng(1), 1e-4
    for _ in range(3):
        direction = [rng.standard_normal(a.shape) for a in start]
        near = (value(h, direction) - value(-h, direction)) / (2 * h)
        far = (value(2 * h, direction) - value(-2 * h, direction)) / (4 * h)
        found = sum(float((a * d).sum()) for a, d in zip(gradients, direction))
        assert found == pytest.approx((4 * near - far) / 3, rel=1e-6)


# ------------------------------------------------------------------------------------------------------------- the bottleneck


def test_gaussian_bottleneck() -> None:
    rng = np.random.default_rng(0)
    moments = np.concatenate([rng.standard_normal((1, 40, 50, 3)), rng.uniform(-2, 1, (1, 40, 50, 3))], -1)
    moments[0, 0, 0, 3:] = [-1e4, 1e4, 0.0]
    gaussian = DiagonalGaussian(td.tensor(moments))
    np.testing.assert_array_equal(gaussian.mode().numpy(), moments[..., :3])
    np.testing.assert_array_equal(gaussian.logvar.numpy()[0, 0, 0], [-30.0, 20.0, 0.0])
    std = np.exp(0.5 * gaussian.logvar.numpy())
    noise = (gaussian.sample(rng).numpy() - moments[..., :3]) / std
    assert abs(noise.mean()) < 0.05 and noise.std() == pytest.approx(1, abs=0.05)  # 6,000 of them
    # The divergence, by integrating p·ln(p/q) for one number.
    one = DiagonalGaussian(td.tensor([[[[0.7, -1.2]]]], dtype="float64"))
    t = np.linspace(-12, 12, 200_001)
    p = np.exp(-((t - 0.7) ** 2) / (2 * np.exp(-1.2))) / np.sqrt(2 * np.pi * np.exp(-1.2))
    q = np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi)
    with np.errstate(all="ignore"):
        integrand = np.where(p > 0, p * np.log(p / q), 0.0)
    assert one.kl().item() == pytest.approx(float(integrand.sum() * (t[1] - t[0])), rel=1e-6)


def test_samples_follow_the_seed() -> None:
    gaussian = DiagonalGaussian(td.tensor(np.zeros((2, 3, 3, 4), np.float32)))
    td.manual_seed(3)
    first = gaussian.sample().numpy()
    assert first.dtype == np.float32
    td.manual_seed(3)
    np.testing.assert_array_equal(gaussian.sample().numpy(), first)
    assert np.abs(gaussian.sample().numpy() - first).max() > 0.1


def test_scale_and_back() -> None:
    model = build(cases.CONFIGS["colour"] | {"scaling_factor": 0.5, "shift_factor": 2.0})
    np.testing.assert_allclose(model.scale(np.array([2.0, 4.0])), [0.0, 1.0])
    np.testing.assert_allclose(model.unscale(model.scale(np.array([2.0, -7.0]))), [2.0, -7.0])
    assert build(cases.CONFIGS["colour"]).scale(1.0) == 0.18215


# ------------------------------------------------------------------------------------------------------------- sizes


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 21), st.integers(1, 21))
def test_any_size(height: int, width: int) -> None:
    """Sizes that the factor doesn't divide: as the picture whose last row and column are repeated, cut back."""
    model = build(TINY)
    x = np.random.default_rng([height, width]).standard_normal((1, height, width, 4)).astype(np.float32)
    up = [-(-n // 4) * 4 for n in (height, width)]
    padded = np.pad(x, ((0, 0), (0, up[0] - height), (0, up[1] - width), (0, 0)), mode="edge")
    z = model.encode(td.tensor(x)).mode()
    assert z.shape == (1, up[0] // 4, up[1] // 4, 3)
    np.testing.assert_array_equal(z.numpy(), model.encode(td.tensor(padded)).mode().numpy())
    back = model(td.tensor(x)).numpy()
    np.testing.assert_array_equal(back, model.decode(z).numpy()[:, :height, :width])


def test_the_lecture() -> None:
    sizes = [f"{h}×{w}×{c}" for _, h, w, c in stages(LECTURE)]
    way = ["512×512×3", "512×512×3", "256×256×6", "128×128×12", "64×64×24", "64×64×24"]
    assert sizes == [*way, "64×64×4", *reversed(way)]
    table = stage_table(LECTURE)
    assert "latents                64×64×4        16,384" in table
    assert table.endswith("in the latents: 48")
    assert stages(LECTURE, 100, 60)[6] == ("latents", 13, 8, 4)


def test_stages_are_what_the_network_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table beside the sizes met on the way through the lecture's network."""
    model = AutoencoderKL.from_config(LECTURE | {"norm_num_groups": 1})
    met = []
    for name, module in model.named_modules():
        if name.count(".") == 2 and "_blocks." in name:
            last = list(module.resnets)[-1]
            monkeypatch.setattr(last, "forward", _spy(last.forward, met), raising=False)
    x = td.tensor(np.zeros((1, 24, 40, 3), np.float32))
    with td.no_grad():
        met.append(model.encode(x).mode().shape[1:])
        model.decode(td.tensor(np.zeros((1, 3, 5, 4), np.float32)))
    rows = stages(LECTURE, 24, 40)
    assert met == [tuple(size) for what, *size in rows if "block" in what or what == "latents"]


def _spy(forward: Any, met: list[Any]) -> Any:
    def spying(*args: Any) -> Any:
        y = forward(*args)
        met.append(y.shape[1:])
        return y

    return spying


# ------------------------------------------------------------------------------------------------------------- the rest


def test_every_parameter_matters() -> None:
    model = build(TINY)
    x = td.tensor(cases.inputs(TINY)[0])
    latents = model.encode(x)
    loss = td.ops.mse_loss(model.decode(latents.sample()), x) + td.ops.mean(latents.kl())
    loss.backward()
    for name, parameter in model.named_parameters():
        if name.endswith("to_k.bias"):  # shifts all of a query's scores alike, which softmax ignores
            continue
        assert parameter.grad is not None and np.abs(parameter.grad.numpy()).max() > 0, name


def test_checkpointing_same_bits_less_memory() -> None:
    model = build(TINY | {"block_out_channels": [16, 16, 16], "layers_per_block": 3})
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 32, 32, 4)).astype(np.float32)
    g = rng.standard_normal(x.shape).astype(np.float32)

    def gradients_and_memory() -> tuple[list[np.ndarray], int]:
        model.zero_grad()
        td.manual_seed(0)
        gc.collect()
        tracemalloc.start()
        output = model.decode(model.encode(td.tensor(x)).sample())
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        output.backward(g)
        return [p.grad.numpy().copy() for p in model.parameters()], held

    gradients_and_memory()  # compiles the kernels, which also takes memory
    plain, plain_memory = gradients_and_memory()
    model.gradient_checkpointing = True
    again, memory = gradients_and_memory()
    for a, b in zip(plain, again):
        np.testing.assert_array_equal(a, b)
    assert memory < 0.4 * plain_memory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn='gelu' is not supported"),
        ({"latents_mean": [0.0]}, "latents_mean=.* is not supported"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "use 'DownEncoderBlock2D' 3 times"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "use 'UpDecoderBlock2D' 3 times"),
        ({"scaling_factor": 0.0}, "scaling_factor=0.0 must be positive"),
        ({"latent_chanels": 4}, "did you mean 'latent_channels'"),
        ({"norm_num_groups": 3}, "num_groups=3 must divide"),
    ],
)
def test_bad_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoencoderKL.from_config(TINY | change)


def test_config_round_trip() -> None:
    model = build(TINY)
    again = AutoencoderKL.from_config(json.loads(json.dumps(model.config)))
    assert again.config.keys() == model.config.keys()
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-9)])
def test_twin(dtype: str, tolerance: float) -> None:
    """Outputs and all gradients of the PyTorch twin that benchmarks compare with, from equal weights."""
    pytest.importorskip("torch")
    from benchmarks import twin

    ours = build(TINY, dtype)
    theirs = twin.twin(ours)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 16, 24, TINY["in_channels"])).astype(dtype)
    latents = ours.encode(td.tensor(x))
    back = ours.decode(latents.mean + td.ops.exp(0.5 * latents.logvar))
    g = rng.standard_normal(back.shape).astype(dtype)
    back.backward(g)
    mean, logvar = theirs.encode(twin.channels_first(x))
    expected = theirs.decode(mean + (0.5 * logvar).exp())
    expected.backward(twin.channels_first(g))
    np.testing.assert_allclose(latents.mean.numpy(), twin.channels_last(mean), atol=tolerance)
    np.testing.assert_allclose(back.numpy(), twin.channels_last(expected), atol=tolerance)
    found = twin.gradients(ours)
    for key, parameter in theirs.named_parameters():
        scale = max(1.0, float(parameter.grad.abs().max()))
        np.testing.assert_allclose(found.pop(key) / scale, parameter.grad.numpy() / scale, atol=tolerance, err_msg=key)
    assert not found
