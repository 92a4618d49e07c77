"""CLIP: against the published model's answers, its tensors at full size, and what each place may see."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinydiff as td
from tinydiff import io
from tinydiff.models import CLIP, CLIPTextModel, CLIPVisionModel
from tinydiff.models.clip import ends_of
from tinydiff.nn import Module, no_init

GOLDEN = Path(__file__).parent / "golden"


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases, weight = _module(GOLDEN / "clip_cases.py"), _module(GOLDEN / "unet_cases.py").weight
STORED = json.loads((GOLDEN / "clip.json").read_text())["cases"]
CONV: dict[str, Any] = {"hidden_size": 8, "widths": [4, 8], "num_channels": 3, "image_size": 13, "norm_num_groups": 2}

# The published text encoder's config.json, and of the vision encoder's what differs from the defaults.
FULL_TEXT: dict[str, Any] = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.21.0.dev0",
    "vocab_size": 49408,
}
FULL_VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}


def published_shapes(model: Module) -> dict[str, list[int]]:
    axes = {"conv": (3, 2, 0, 1), "linear": (1, 0)}
    return {n: [p.shape[i] for i in axes.get(p.layout, range(p.ndim))] for n, p in model.named_parameters()}


def build(config: dict[str, Any], dtype: str = "float32") -> CLIP:
    """With weights that follow from their names."""
    with no_init():
        model = CLIP.from_config(config)
    model.load_published({name: weight(name, tuple(shape)) for name, shape in published_shapes(model).items()})
    for parameter in model.parameters():
        parameter.data = parameter.data.astype(dtype)
    return model


@pytest.mark.parametrize(
    ("kind", "config", "file", "count"),
    [(CLIPTextModel, FULL_TEXT, "clip_text_keys.txt", 196), (CLIPVisionModel, FULL_VISION, "clip_vision_keys.txt", 391)],
)
def test_full_size_has_the_published_tensors(kind: Any, config: dict[str, Any], file: str, count: int) -> None:
    with no_init():  # takes no memory
        model = kind.from_config(config)
    expected = {n: ast.literal_eval(s) for n, s in (line.split(" ", 1) for line in (GOLDEN / file).read_text().splitlines())}
    assert len(expected) == count
    assert published_shapes(model) == expected


@pytest.mark.parametrize("name", cases.CONFIGS)
def test_published_model(name: str) -> None:
    """Names, shapes and outputs of the published CLIPModel, as stored by scripts/make_golden_clip.py."""
    config, stored = cases.CONFIGS[name], STORED[name]
    model = build(config)
    assert published_shapes(model) == stored["shapes"]
    ids, x = cases.inputs(config)
    pictures = td.tensor(x)
    found = {
        "hidden": model.text_model(ids),
        "text": model.text_features(ids),
        "image_hidden": model.vision_model(pictures),
        "image": model.image_features(pictures),
        "logits": model(ids, pictures),
    }
    for key, tensor in found.items():
        np.testing.assert_allclose(tensor.numpy(), np.reshape(stored[key], tensor.shape), atol=2e-5, err_msg=key)
    np.testing.assert_array_equal(model.text_encoder()(ids).numpy(), found["hidden"].numpy())


@pytest.mark.parametrize("name", cases.CONFIGS)
def test_published_model_live(name: str) -> None:
    """Outputs and gradients in float64 beside the transformers package, where it is installed."""
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = cases.CONFIGS[name]
    script = _module(GOLDEN.parent.parent / "scripts" / "make_golden_clip.py")
    ours, theirs = build(config, "float64"), script.published(config)
    script.filled(theirs, weight)
    ids, x = cases.inputs(config)
    g = np.random.default_rng(2).standard_normal((len(x), len(ids)))
    logits = ours(ids, td.tensor(x.astype("float64")))
    logits.backward(td.tensor(g))
    expected = theirs(torch.from_numpy(ids), torch.from_numpy(x).permute(0, 3, 1, 2).double()).logits_per_image
    expected.backward(torch.from_numpy(g))
    np.testing.assert_allclose(logits.numpy(), expected.detach().numpy(), atol=1e-9)
    parameters = dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        if parameter.grad is None:
            continue
        found = io.to_disk(key, parameters[key].grad.numpy(), parameters[key].layout)
        np.testing.assert_allclose(found, parameter.grad.numpy(), atol=1e-9, err_msg=key)


def test_a_place_sees_itself_and_those_before() -> None:
    config = cases.CONFIGS["plain"]
    model, ids = build(config), cases.inputs(config)[0]
    before = model.text_model(ids).numpy()
    changed = ids.copy()
    changed[:, 4] = (changed[:, 4] + 1) % 38
    after = model.text_model(changed).numpy()
    np.testing.assert_array_equal(after[:, :4], before[:, :4])
    assert (np.abs(after[:, 4:] - before[:, 4:]).max((0, 2)) > 1e-4).all()


def test_pooled_where_the_text_ends() -> None:
    """What is behind the end changes nothing, and more room neither."""
    config = cases.CONFIGS["plain"]
    model, ids = build(config), cases.inputs(config)[0]
    hidden = model.text_model(ids).numpy()
    np.testing.assert_allclose(model.text_model.pooled(ids).numpy(), hidden[np.arange(3), [2, 8, 5]], atol=1e-6)
    garbled = ids.copy()
    garbled[0, 3:] = 7
    np.testing.assert_allclose(model.text_features(garbled).numpy(), model.text_features(ids).numpy(), atol=1e-6)
    np.testing.assert_allclose(model.text_features(ids[:1, :4]).numpy(), model.text_features(ids).numpy()[:1], atol=1e-6)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_pooled_is_one_position_of_all_hidden_states(layers: int) -> None:
    """And so are its gradients: of the last layer no other position is computed."""
    config = cases.CONFIGS["plain"]
    text, vision = (config[f"{part}_config"] | {"num_hidden_layers": layers} for part in ("text", "vision"))
    model = CLIP.from_config(config | {"text_config": text, "vision_config": vision})
    for parameter in model.parameters():
        parameter.data = parameter.data.astype("float64")
    ids, x = cases.inputs(config)
    pictures, words, seer = td.tensor(x.astype("float64")), model.text_model, model.vision_model
    ends, rng = ends_of(ids, words.eos), np.random.default_rng(0)
    hidden = td.ops.stack([words(ids)[i, int(end)] for i, end in enumerate(ends)])
    for pooled, wanted, part in [
        (words.pooled(ids), hidden, words),
        (seer.pooled(pictures), seer.post_layernorm(seer(pictures)[:, 0]), seer),
    ]:
        np.testing.assert_allclose(pooled.numpy(), wanted.numpy(), atol=1e-12)
        cotangent = rng.standard_normal(pooled.shape)
        gradients = (td.grad(result, list(part.parameters()), cotangent) for result in (pooled, wanted))
        for ours, theirs in zip(*gradients):
            np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-10)


@pytest.mark.parametrize("vision", [cases.VISION, CONV])
def test_gradient_against_finite_differences(vision: dict[str, Any]) -> None:
    """Along random directions in all parameters at once."""
    model = CLIP.from_config({"text_config": cases.TEXT, "vision_config": vision, "projection_dim": 4})
    for parameter in model.parameters():
        parameter.data = parameter.data.astype("float64")
    ids, x = cases.inputs(cases.CONFIGS["plain"])
    pictures, rng = td.tensor(x.astype("float64")), np.random.default_rng(0)
    g = rng.standard_normal((2, 3))
    model(ids, pictures).backward(td.tensor(g))
    parameters = model.parameters()
    gradients, start = [p.grad.numpy() for p in parameters], [p.data.copy() for p in parameters]

    def value(step: float, direction: list[np.ndarray]) -> float:
        with td.no_grad():
            for parameter, a, d in zip(parameters, start, direction):
                parameter.assign_(a + step * d)
            return float((model(ids, pictures).numpy() * g).sum())

    for _ in range(2):
        direction = [rng.standard_normal(a.shape) * 0.1 for a in start]
        h = 1e-4
        near = (value(h, direction) - value(-h, direction)) / (2 * h)
        far = (value(2 * h, direction) - value(-2 * h, direction)) / (4 * h)
        found = sum(float((a * d).sum()) for a, d in zip(gradients, direction))
        assert found == pytest.approx((4 * near - far) / 3, rel=1e-6)


def test_position_ids_in_files_are_passed_over() -> None:
    model = build(cases.CONFIGS["plain"])
    state = {name: io.to_disk(name, p.data, p.layout) for name, p in model.named_parameters()}
    model.load_published(state | {"text_model.embeddings.position_ids": np.arange(9)[None]})
    with pytest.raises(ValueError, match=r"unexpected: text_model\.embeddings\.places"):
        model.load_published(state | {"text_model.embeddings.places": np.arange(9)[None]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": cases.TEXT | {"num_attention_heads": 5}}, "num_attention_heads=5 must divide hidden_size=12"),
        ({"text_config": cases.TEXT | {"hidden_act": "gelo"}}, "did you mean 'gelu'"),
        ({"text_config": cases.TEXT | {"vocab_sizes": 3}}, "did you mean 'vocab_size'"),
        ({"vision_config": cases.VISION | {"patch_size": 14}}, "patch_size=14 must be from 1 to image_size=13"),
        ({"projections": 3}, "did you mean 'projection_dim'"),
    ],
)
def test_bad_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CLIP.from_config(cases.CONFIGS["plain"] | change)


def test_bad_inputs() -> None:
    model = build(cases.CONFIGS["plain"])
    for shape in [(1, 10), (1, 0), (3,)]:
        with pytest.raises(ValueError, match="L from 1 to 9"):
            model.text_model(np.zeros(shape, np.int64))
    with pytest.raises(IndexError):
        model.text_model(np.full((1, 3), 40))
    with pytest.raises(ValueError, match=r"takes pictures \(N, 13, 13, 3\), not \(1, 12, 13, 3\)"):
        model.image_features(td.tensor(np.zeros((1, 12, 13, 3), np.float32)))
