"""The conditional UNet: against the published model's answers, its tensors at full size, finite differences, and its text."""

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

import tinydiff as td
from tinydiff import io
from tinydiff.models import UNet2DConditionModel
from tinydiff.nn import no_init

GOLDEN = Path(__file__).parent / "golden"


def _module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, GOLDEN / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases, weight = _module("unet_condition_cases"), _module("unet_cases").weight
STORED = json.loads((GOLDEN / "unet_condition.json").read_text())["cases"]
TINY: dict[str, Any] = cases.CONFIGS["three levels, two layers, three channels"] | {"layers_per_block": 1}

# The published model's config.json and its tensors.
FULL: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}


def published_shapes(model: UNet2DConditionModel) -> dict[str, list[int]]:
    axes = {"conv": (3, 2, 0, 1), "linear": (1, 0)}
    return {n: [p.shape[i] for i in axes.get(p.layout, range(p.ndim))] for n, p in model.named_parameters()}


def build(config: dict[str, Any], dtype: str = "float32") -> UNet2DConditionModel:
    """With weights that follow from their names."""
    with no_init():
        model = UNet2DConditionModel.from_config(config)
    parameters = dict(model.named_parameters())
    shapes = published_shapes(model)
    model.load_state_dict(
        {key: io.from_disk(key, weight(key, tuple(shape)), parameters[key].layout) for key, shape in shapes.items()}
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.astype(dtype)
    return model


def batch(dtype: str = "float32", n: int = 2, size: int = 6) -> tuple[np.ndarray, ...]:
    """Pictures, times, texts' vectors and a cotangent."""
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, n, size, size, TINY["in_channels"])).astype(dtype)
    return x, np.linspace(1, 900, n), rng.standard_normal((n, 5, TINY["cross_attention_dim"])).astype(dtype), g


def test_full_size_has_the_published_tensors() -> None:
    with no_init():  # takes no memory
        model = UNet2DConditionModel.from_config(FULL)
    lines = (GOLDEN / "unet_keys.txt").read_text().splitlines()
    expected = {name: ast.literal_eval(shape) for name, shape in (line.split(" ", 1) for line in lines)}
    assert len(expected) == 686
    assert published_shapes(model) == expected
    assert model.num_parameters() == 859_520_964


@pytest.mark.parametrize("name", cases.CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("float64", 2e-6)])
def test_published_model(name: str, dtype: str, tolerance: float) -> None:
    """Names, shapes and outputs of the published model, as stored by scripts/make_golden_unet_condition.py (7 decimals)."""
    config, stored = cases.CONFIGS[name], STORED[name]
    model = build(config, dtype)
    assert published_shapes(model) == stored["shapes"]
    x, t, context, labels = cases.inputs(config)
    answer = model(td.tensor(x.astype(dtype)), t, td.tensor(context.astype(dtype)), labels).numpy()
    assert answer.dtype == dtype
    np.testing.assert_allclose(answer, np.reshape(stored["output"], answer.shape), atol=tolerance)


@pytest.mark.parametrize("name", cases.CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-9)])
def test_twin(name: str, dtype: str, tolerance: float) -> None:
    """Outputs and all gradients of the PyTorch twin that benchmarks compare with, from equal weights."""
    torch = pytest.importorskip("torch")
    from benchmarks import twin

    config = cases.CONFIGS[name]
    ours = build(config, dtype)
    theirs = twin.twin(ours)
    x, t, context, labels = cases.inputs(config)
    x, context = x.astype(dtype), context.astype(dtype)
    g = np.random.default_rng(1).standard_normal((*x.shape[:3], ours.config["out_channels"])).astype(dtype)
    leaf, said = td.tensor(x, requires_grad=True), td.tensor(context, requires_grad=True)
    answer = ours(leaf, t, said, labels)
    answer.backward(g)
    x2, said2 = twin.channels_first(x).requires_grad_(), torch.from_numpy(context).requires_grad_()
    times = torch.from_numpy(np.broadcast_to(np.asarray(t, np.float64), len(x)).copy())
    expected = theirs(x2, times, said2, None if labels is None else torch.from_numpy(labels))
    expected.backward(twin.channels_first(g))
    np.testing.assert_allclose(answer.numpy(), twin.channels_last(expected), atol=tolerance)
    np.testing.assert_allclose(leaf.grad.numpy(), twin.channels_last(x2.grad), atol=tolerance)
    np.testing.assert_allclose(said.grad.numpy(), said2.grad.numpy(), atol=tolerance)
    found = twin.gradients(ours)
    for key, parameter in theirs.named_parameters():
        scale = max(1.0, float(parameter.grad.abs().max()))
        np.testing.assert_allclose(found.pop(key) / scale, parameter.grad.numpy() / scale, atol=tolerance, err_msg=key)
    assert not found


def test_published_model_live() -> None:
    """The same where diffusers is installed, at sizes and with weights of their own, gradients included."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    config = {k: v for k, v in FULL.items() if not k.startswith("_")} | {
        "block_out_channels": [16, 32, 32, 32],
        "norm_num_groups": 8,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
    }
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**config)
    with no_init():
        ours = UNet2DConditionModel.from_config(config)
    layouts = {name: parameter.layout for name, parameter in ours.named_parameters()}
    ours.load_state_dict({n: io.from_disk(n, v.detach().numpy(), layouts[n]) for n, v in theirs.state_dict().items()})
    rng = np.random.default_rng(3)
    x, g = rng.standard_normal((2, 2, 16, 8, 4)).astype(np.float32)
    t, context = np.array([17.0, 640.0]), rng.standard_normal((2, 9, 12)).astype(np.float32)
    leaf, text = td.tensor(x, requires_grad=True), td.tensor(context, requires_grad=True)
    answer = ours(leaf, t, text)
    answer.backward(g)
    x2 = torch.from_numpy(np.moveaxis(x, -1, 1).copy()).requires_grad_()
    text2 = torch.from_numpy(context).requires_grad_()
    expected = theirs(x2, torch.from_numpy(t), text2).sample
    expected.backward(torch.from_numpy(np.moveaxis(g, -1, 1).copy()))
    np.testing.assert_allclose(answer.numpy(), expected.detach().movedim(1, -1).numpy(), atol=1e-4)
    np.testing.assert_allclose(leaf.grad.numpy(), x2.grad.movedim(1, -1).numpy(), atol=1e-4)
    np.testing.assert_allclose(text.grad.numpy(), text2.grad.numpy(), atol=1e-4)
    for name, parameter in ours.named_parameters():
        wanted = dict(theirs.named_parameters())[name].grad.numpy()
        found = io.to_disk(name, parameter.grad.data, parameter.layout)
        np.testing.assert_allclose(found, wanted, atol=1e-4 * max(1.0, np.abs(wanted).max()), err_msg=name)


def test_gradient_against_finite_differences() -> None:
    """Along random directions in all parameters, pixels and text vectors at once."""
    model = build(TINY, "float64")
    x, t, context, g = batch("float64")
    leaf, text = td.tensor(x, requires_grad=True), td.tensor(context, requires_grad=True)
    model(leaf, t, text).backward(g)
    gradients = [p.grad.numpy() for p in model.parameters()] + [leaf.grad.numpy(), text.grad.numpy()]
    start = [p.data.copy() for p in model.parameters()] + [x, context]

    def value(step: float, direction: list[np.ndarray]) -> float:
        *weights, pixels, vectors = (a + step * d for a, d in zip(start, direction))
        with td.no_grad():
            for parameter, array in zip(model.parameters(), weights):
                parameter.assign_(array)
            return float((model(td.tensor(pixels), t, td.tensor(vectors)).numpy() * g).sum())

    rng = np.random.default_rng(1)
    for _ in range(3):
        direction = [rng.standard_normal(a.shape) for a in start]
        h = 3e-5
        near = (value(h, direction) - value(-h, direction)) / (2 * h)
        far = (value(2 * h, direction) - value(-2 * h, direction)) / (4 * h)
        expected = (4 * near - far) / 3  # of fourth order in h
        found = sum(float((a * d).sum()) for a, d in zip(gradients, direction))
        assert found == pytest.approx(expected, rel=1e-7)


def test_every_parameter_matters() -> None:
    model = build(TINY)
    x, t, context, g = batch(n=3)
    model(td.tensor(x), t, td.tensor(context)).backward(g)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and np.abs(parameter.grad.numpy()).max() > 0, name


def test_samples_do_not_see_each_other() -> None:
    model = build(TINY)
    x, t, context, _ = batch(n=3)
    together = model(td.tensor(x), t, td.tensor(context)).numpy()
    for i in range(3):
        alone = model(td.tensor(x[i : i + 1]), t[i : i + 1], td.tensor(context[i : i + 1])).numpy()
        np.testing.assert_allclose(together[i], alone[0], atol=1e-5)


def test_the_text_and_the_time_condition_the_answer() -> None:
    model = build(TINY)
    x, t, context, _ = batch()
    answer = model(td.tensor(x), t, td.tensor(context)).numpy()
    assert np.abs(model(td.tensor(x), t, td.tensor(context[::-1].copy())).numpy() - answer).max() > 1e-3
    assert np.abs(model(td.tensor(x), t + 40, td.tensor(context)).numpy() - answer).max() > 1e-4
    # Attention has no order of its own: what the places of words mean is the text encoder's to say.
    shuffled = model(td.tensor(x), t, td.tensor(context[:, ::-1].copy())).numpy()
    np.testing.assert_allclose(shuffled, answer, atol=1e-5)


@pytest.mark.parametrize("size", [(7, 7), (5, 9), (1, 3)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    x = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    assert build(TINY)(td.tensor(x), 5, td.tensor(batch()[2])).shape == x.shape


def test_checkpointing_same_bits_less_memory() -> None:
    model = build(TINY | {"block_out_channels": [16, 16, 16], "layers_per_block": 3})
    x, t, context, g = batch(n=4, size=16)
    text = td.tensor(context, requires_grad=True)

    def gradients_and_memory() -> tuple[list[np.ndarray], int]:
        model.zero_grad()
        text.grad = None
        gc.collect()
        tracemalloc.start()
        output = model(td.tensor(x), t, text)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        output.backward(g)
        return [p.grad.numpy().copy() for p in (*model.parameters(), text)], held

    gradients_and_memory()  # compiles the kernels, which also takes memory
    plain, plain_memory = gradients_and_memory()
    model.gradient_checkpointing = True
    again, memory = gradients_and_memory()
    for a, b in zip(plain, again):
        np.testing.assert_array_equal(a, b)
    assert memory < 0.6 * plain_memory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dual_cross_attention": True}, "dual_cross_attention=True is not supported"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type='UNetMidBlock2D' is not supported"),
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, "unknown block type 'AttnDownBlock2D'"),
        ({"up_block_types": ["UpBlock2D"]}, "must be as many"),
        ({"attention_head_dim": 3}, "3 heads must divide the width 8"),
        ({"attention_head_dim": [2, 2]}, "attention_head_dim has 2 entries; give one number, or 3"),
        ({"cross_attention_dims": 4}, "did you mean 'cross_attention_dim'"),
    ],
)
def test_bad_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet2DConditionModel.from_config(TINY | change)


@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 5, 6), (2, 6)])
def test_bad_context(shape: tuple[int, ...]) -> None:
    x, t, *_ = batch()
    with pytest.raises(ValueError, match=r"needs context .* of shape \(2, …, 6\)"):
        build(TINY)(td.tensor(x), t, td.tensor(np.zeros(shape, np.float32)))


def test_config_round_trip() -> None:
    model = build(TINY)
    again = UNet2DConditionModel.from_config(json.loads(json.dumps(model.config)))
    assert again.config.keys() == model.config.keys()
    assert published_shapes(again) == published_shapes(model)
