"""What cross-attention looked at: weights against the attention op itself, sums against a hand-made case, and who may watch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tinydiff as td
from tinydiff.attention_maps import AttentionMaps, watching
from tinydiff.models import UNet2DConditionModel
from tinydiff.nn import Attention

CONFIG: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 8],
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "cross_attention_dim": 6,
    "attention_head_dim": 2,
}


def network() -> UNet2DConditionModel:
    td.manual_seed(0)
    return UNet2DConditionModel.from_config(CONFIG)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_weights_are_those_of_the_attention() -> None:
    """Values mixed by the weights are what the attention gives to its output layer."""
    td.manual_seed(0)
    attention = Attention(8, 2, 4, context_dim=6)
    x, context = td.tensor(normal(3, 5, 8)), td.tensor(normal(3, 7, 6))
    weights = attention.weights(x, context)
    assert weights.shape == (3, 2, 5, 7)
    np.testing.assert_allclose(weights.numpy().sum(-1), 1, atol=1e-6)
    values = attention.to_v(context).numpy().reshape(3, 7, 2, 4)
    mixed = np.einsum("nhls,nshd->nlhd", weights.numpy(), values).reshape(3, 5, 8)
    np.testing.assert_allclose(attention.to_out(td.tensor(mixed)).numpy(), attention(x, context).numpy(), atol=1e-6)


class Told:
    """An attention whose weights are known."""

    def __init__(self, weights: np.ndarray) -> None:
        self.given = weights

    def weights(self, x: Any, context: Any) -> Any:
        return td.tensor(self.given)


def test_means_of_known_weights() -> None:
    """A layer at 4×2 and one at 2×1, of two samples; an uneven height halves upwards, 4×3 to 2×2."""
    maps = AttentionMaps(2, (4, 2))
    fine = np.zeros((2, 1, 8, 2), np.float32)
    fine[0, 0, :, 0] = 1  # sample 0 looks at token 0 everywhere
    fine[1, 0, :, 1] = 1
    coarse = np.zeros((2, 2, 2, 2), np.float32)
    coarse[:, :, 0, 0] = 1  # the upper half looks at token 0
    coarse[:, :, 1, 1] = 1
    maps.see(Told(fine), None, None)  # type: ignore[arg-type]
    maps.see(Told(coarse), None, None)  # type: ignore[arg-type]
    mean = maps.mean(4, 2)
    assert mean.shape == (2, 4, 2, 2)
    np.testing.assert_allclose(mean.sum(-1), 1)
    np.testing.assert_allclose(mean[0, :, 0, 0], [1, 1 - 0.125, 0.5 + 0.125, 0.5])  # ramps between the centres of 2 rows
    np.testing.assert_allclose(mean[1, :, 1, 0], [0.5, 0.5 - 0.125, 0.125, 0])
    uneven = AttentionMaps(1, (4, 3))
    uneven.see(Told(np.full((1, 1, 4, 2), 0.5, np.float32)), None, None)  # type: ignore[arg-type]
    assert list(uneven.sums) == [(2, 2)]


def test_of_a_guided_batch_the_told_half_is_seen() -> None:
    weights = np.zeros((4, 1, 1, 2), np.float32)
    weights[:2, ..., 0] = weights[2:, ..., 1] = 1
    maps = AttentionMaps(2, (1, 1))
    maps.see(Told(weights), None, None)  # type: ignore[arg-type]
    np.testing.assert_array_equal(maps.mean(1, 1).reshape(2, 2), [[0, 1], [0, 1]])


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_watching_changes_nothing_and_ends(size: tuple[int, int]) -> None:
    model = network()
    x, context = td.tensor(normal(2, *size, 1)), td.tensor(normal(2, 5, 6))
    before = model(x, 3, context).numpy()
    with watching(model, 2, size) as seen:
        np.testing.assert_array_equal(model(x, 3, context).numpy(), before)
    assert seen.count == 7  # a layer for each of 2 + 4 resnets of the blocks, and the middle's
    maps = seen.mean(*size)
    assert maps.shape == (2, *size, 5)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-6)
    model(x, 3, context)
    assert seen.count == 7


def test_nothing_seen() -> None:
    with watching(network(), 1, (8, 8)) as seen, pytest.raises(ValueError, match="no cross-attention was seen"):
        seen.mean(8, 8)
