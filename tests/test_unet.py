"""The UNet and the classifier: against the published model's answers, PyTorch twins and finite differences."""

from __future__ import annotations

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
from tinydiff.models import Classifier, UNet2DModel

GOLDEN = Path(__file__).parent / "golden"
_spec = importlib.util.spec_from_file_location("unet_cases", GOLDEN / "unet_cases.py")
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)
STORED = json.loads((GOLDEN / "unet.json").read_text())["cases"]

TINY: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [4, 8, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 4,
    "num_class_embeds": 3,
}


def build(config: dict[str, Any], dtype: str = "float32", kind: type = UNet2DModel) -> Any:
    td.manual_seed(0)
    model = kind.from_config(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.astype(dtype)
    return model


def batch(config: dict[str, Any], n: int = 2, size: int = 7, dtype: str = "float32") -> tuple[Any, ...]:
    """Pictures, times, labels and a cotangent."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, size, size, config["in_channels"])).astype(dtype)
    labels = np.arange(n) % config["num_class_embeds"] if config.get("num_class_embeds") else None
    return x, np.linspace(1, 900, n), labels, rng.standard_normal((*x.shape[:3], config["out_channels"])).astype(dtype)


@pytest.mark.parametrize("name", cases.CONFIGS)
def test_published_model(name: str) -> None:
    """Names, shapes and outputs of the published UNet2DModel, as stored by scripts/make_golden.py."""
    config, stored = cases.CONFIGS[name], STORED[name]
    model = UNet2DModel.from_config(config)
    parameters = dict(model.named_parameters())
    shapes = {key: list(io.to_disk(key, p.data, p.layout).shape) for key, p in parameters.items()}
    assert shapes == stored["shapes"]
    model.load_state_dict(
        {key: io.from_disk(key, cases.weight(key, tuple(shape)), parameters[key].layout) for key, shape in shapes.items()}
    )
    x, t, labels = cases.inputs(config)
    answer = model(td.tensor(x), t, labels).numpy()
    np.testing.assert_allclose(answer, np.reshape(stored["output"], answer.shape), atol=1e-5)


@pytest.mark.parametrize("name", cases.CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-9)])
def test_unet_twin(name: str, dtype: str, tolerance: float) -> None:
    """Outputs and all gradients of the PyTorch twin, from equal weights."""
    torch = pytest.importorskip("torch")
    from benchmarks import twin

    config = cases.CONFIGS[name]
    ours = build(config, dtype)
    theirs = twin.twin(ours)
    x, t, labels, g = batch(config, size=8, dtype=dtype)
    leaf = td.tensor(x, requires_grad=True)
    answer = ours(leaf, t, labels)
    answer.backward(g)
    x2 = twin.channels_first(x).requires_grad_()
    expected = theirs(x2, torch.from_numpy(t), None if labels is None else torch.from_numpy(labels))
    expected.backward(twin.channels_first(g))
    assert answer.dtype == dtype
    np.testing.assert_allclose(answer.numpy(), twin.channels_last(expected), atol=tolerance)
    np.testing.assert_allclose(leaf.grad.numpy(), twin.channels_last(x2.grad), atol=tolerance)
    found = twin.gradients(ours)
    for key, parameter in theirs.named_parameters():
        scale = max(1.0, float(parameter.grad.abs().max()))
        np.testing.assert_allclose(found.pop(key) / scale, parameter.grad.numpy() / scale, atol=tolerance, err_msg=key)
    assert not found


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-9)])
def test_classifier_twin(dtype: str, tolerance: float) -> None:
    torch = pytest.importorskip("torch")
    from benchmarks import twin

    ours = build({"widths": [8, 16], "norm_num_groups": 4}, dtype, Classifier)
    theirs = twin.twin(ours)
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((5, 11, 11, 1)).astype(dtype), rng.integers(0, 10, 5)
    loss = td.ops.cross_entropy(ours(td.tensor(x)), labels)
    loss.backward()
    expected = torch.nn.functional.cross_entropy(theirs(twin.channels_first(x)), torch.from_numpy(labels))
    expected.backward()
    assert abs(loss.item() - expected.item()) < tolerance
    found = twin.gradients(ours)
    for key, parameter in theirs.named_parameters():
        np.testing.assert_allclose(found[key], parameter.grad.numpy(), atol=tolerance, err_msg=key)


def test_gradient_against_finite_differences() -> None:
    """Along random directions in all parameters and pixels at once, at 7×7 → 4×4 → 2×2 and back."""
    model = build(TINY, "float64")
    x, t, labels, g = batch(TINY, dtype="float64")
    leaf = td.tensor(x, requires_grad=True)
    model(leaf, t, labels).backward(g)
    gradients = [p.grad.numpy() for p in model.parameters()] + [leaf.grad.numpy()]
    start = [p.data.copy() for p in model.parameters()] + [x]

    def value(step: float, direction: list[np.ndarray]) -> float:
        *weights, pixels = (a + step * d for a, d in zip(start, direction))
        with td.no_grad():
            for parameter, array in zip(model.parameters(), weights):
                parameter.assign_(array)
            return float((model(td.tensor(pixels), t, labels).numpy() * g).sum())

    rng = np.random.default_rng(1)
    for _ in range(3):
        direction = [rng.standard_normal(a.shape) for a in start]
        h = 1e-4
        # Fourth-order central differences: the truncation error, h⁴, is then far below what is asked.
        near = (value(h, direction) - value(-h, direction)) / (2 * h)
        far = (value(2 * h, direction) - value(-2 * h, direction)) / (4 * h)
        expected = (4 * near - far) / 3
        found = sum(float((a * d).sum()) for a, d in zip(gradients, direction))
        assert found == pytest.approx(expected, rel=1e-7)


def test_every_parameter_matters() -> None:
    model = build(TINY)
    x, t, labels, g = batch(TINY, n=3)
    model(td.tensor(x), t, labels).backward(g)
    for name, parameter in model.named_parameters():
        if name.endswith("to_k.bias"):  # shifts all of a query's scores alike, which softmax ignores
            continue
        assert parameter.grad is not None and np.abs(parameter.grad.numpy()).max() > 0, name


@pytest.mark.parametrize("size", [(7, 7), (5, 9), (8, 6), (1, 3)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    model = build(TINY)
    x = np.random.default_rng(0).standard_normal((2, *size, 1)).astype(np.float32)
    assert model(td.tensor(x), 5, np.array([0, 1])).shape == x.shape


def test_samples_do_not_see_each_other() -> None:
    model = build(TINY)
    x, t, labels, _ = batch(TINY, n=3)
    together = model(td.tensor(x), t, labels).numpy()
    for i in range(3):
        alone = model(td.tensor(x[i : i + 1]), t[i : i + 1], labels[i : i + 1]).numpy()
        np.testing.assert_allclose(together[i], alone[0], atol=1e-5)


def test_class_and_time_condition_the_answer() -> None:
    model = build(TINY)
    x, t, labels, _ = batch(TINY)
    answer = model(td.tensor(x), t, labels).numpy()
    assert np.abs(model(td.tensor(x), t, (labels + 1) % 3).numpy() - answer).max() > 1e-4
    assert np.abs(model(td.tensor(x), t + 40, labels).numpy() - answer).max() > 1e-4
    np.testing.assert_array_equal(model(td.tensor(x), 7, labels).numpy(), model(td.tensor(x), [7, 7], labels).numpy())


def test_classes_given_or_not() -> None:
    x, t, labels, _ = batch(TINY)
    with pytest.raises(ValueError, match="needs class_labels"):
        build(TINY)(td.tensor(x), t)
    with pytest.raises(ValueError, match="no class_embedding"):
        build(TINY | {"num_class_embeds": None})(td.tensor(x), t, labels)
    with pytest.raises(IndexError):
        build(TINY)(td.tensor(x), t, labels + 3)


def test_checkpointing_same_bits_less_memory() -> None:
    config = TINY | {"block_out_channels": [16, 16, 16], "layers_per_block": 3}
    model = build(config)
    x, t, labels, g = batch(config, n=4, size=16)

    def gradients_and_memory() -> tuple[list[np.ndarray], int]:
        model.zero_grad()
        gc.collect()
        tracemalloc.start()
        output = model(td.tensor(x), t, labels)
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
    assert memory < 0.6 * plain_memory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn='gelu' is not supported"),
        ({"down_block_types": ["CrossAttnDownBlock2D"] * 3}, "unknown block type 'CrossAttnDownBlock2D'"),
        ({"up_block_types": ["UpBlock2D"]}, "must be as many"),
        ({"block_out_chanels": [4]}, "did you mean 'block_out_channels'"),
        ({"norm_num_groups": 3}, "num_groups=3 must divide"),
    ],
)
def test_bad_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet2DModel.from_config(TINY | change)


def test_config_round_trip() -> None:
    model = build(TINY)
    again = UNet2DModel.from_config(json.loads(json.dumps(model.config)))
    assert again.config.keys() == model.config.keys()
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
