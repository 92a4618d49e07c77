"""Pictures strip by strip: the same as the whole picture at once, in less memory, with nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinydiff as td
from tinydiff import tiling
from tinydiff.models import AutoencoderKL

SMALL: dict[str, Any] = {
    "block_out_channels": [4, 8, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 4,
}
TOLERANCE = 3e-4  # of the worst pixel or latent, of about 1 and up to 7; the next grey of 8 bits is 26 times as far
ROUNDING = 1e-5  # root mean square: 3e-6 by where Winograd's tiles fall, and 40 times that for the worst of 3 million


def build(config: dict[str, Any]) -> AutoencoderKL:
    """With norms that don't just start at 1 and 0, and attention that matters."""
    td.manual_seed(0)
    model = AutoencoderKL.from_config(config)
    rng = np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = (parameter.data + 0.5 * rng.standard_normal(parameter.shape)).astype(np.float32)
        elif ".to_" in name:
            parameter.data = parameter.data * np.float32(2)
    return model.requires_grad_(False)


def picture(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Light above and noisy below, so that no strip's statistics are the picture's."""
    rng = np.random.default_rng([height, width])
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([np.cos(0.01 * (i + 1) * x + 0.02 * y) - 2 * y / height + 1 for i in range(channels)], -1)
    noise = rng.standard_normal((height, width, channels)) * (y / height)[..., None]
    return np.clip(smooth + 0.5 * noise, -1, 1)[None].astype(np.float32)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert np.sqrt(np.mean((found - expected) ** 2, dtype=np.float64)) < ROUNDING


def test_tiled_is_untiled_at_1024() -> None:
    model = build(SMALL)
    x = picture(1024, 1024)
    with td.no_grad():
        whole = model.encode(td.tensor(x))
        back = model.decode(whole.mode()).numpy()
    z = tiling.encode(model, x, strip_bytes=1 << 21)
    close(z.mean.numpy(), whole.mean.numpy())
    close(z.logvar.numpy(), whole.logvar.numpy())
    close(tiling.decode(model, whole.mean.numpy(), strip_bytes=1 << 21), back)
    # The picture is such that it matters: by itself the lower half would come out otherwise.
    with td.no_grad():
        half = model.encode(td.tensor(x[:, 512:])).mean.numpy()
    assert np.abs(half - whole.mean.numpy()[:, 64:]).max() > 200 * TOLERANCE


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 20), st.sampled_from([1, 3, 4]), st.booleans())
def test_any_size_in_any_strips(height: int, width: int, power: int, channels: int, plain: bool) -> None:
    """From one row at a time up to all at once."""
    config = {"in_channels": channels, "out_channels": channels, "block_out_channels": [4, 8, 8], "layers_per_block": 2}
    types = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    extra = {"use_quant_conv": not plain, "use_post_quant_conv": not plain, "mid_block_add_attention": not plain}
    model = build(SMALL | config | types | extra)
    x = picture(height, width, channels)
    with td.no_grad():
        whole = model.encode(td.tensor(x)).mean.numpy()
        back = model.decode(td.tensor(whole), (height, width)).numpy()
    # Over few pixels a channel may hardly vary, and then a norm enlarges what rounding there is.
    tolerance = 4e-4
    np.testing.assert_allclose(tiling.encode(model, x, 1 << power).mean.numpy(), whole, atol=tolerance)
    np.testing.assert_allclose(tiling.decode(model, whole, (height, width), 1 << power), back, atol=tolerance)


def test_statistics_far_from_zero() -> None:
    """A channel's mean of 1,000 beside a deviation of 1: sums of squares in float32 would lose it."""
    rng = np.random.default_rng(0)
    values = (1000 + rng.standard_normal((1, 64, 50, 4)) * [1, 2, 3, 4] + np.arange(64).reshape(1, -1, 1, 1)).astype(np.float32)
    strips = tiling._Strips((64, 50, 4), np.float32, 1, None)
    for first in range(0, 64, 7):
        strips.append(values[:, first : first + 7])
    exact = values.astype(np.float64)
    np.testing.assert_allclose(strips.mean, exact.mean((0, 1, 2)), rtol=1e-7)
    np.testing.assert_allclose(strips.squares / strips.count, exact.var((0, 1, 2)), rtol=1e-5)


def test_memory_does_not_grow_with_the_height() -> None:
    """Peak resident memory while decoding a picture eight times as high, in a process of its own."""
    code = (
        "import resource, numpy as np, tinydiff as td; from tinydiff import tiling;"
        f"model = td.models.AutoencoderKL.from_config({SMALL | {'block_out_channels': [32, 32, 32, 32]}});"
        "run = lambda h: tiling.decode(model, np.zeros((1, h, 32, 4), np.float32), strip_bytes=1 << 20);"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024;"
        "run(32); first = peak(); run(256); print(peak() - first)"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    # The picture of 2048×256×3 takes 6 MB, one of its widest layers 67 MB.
    assert int(done.stdout) < 35e6


def test_bad_input(tmp_path: Path) -> None:
    model = build(SMALL)
    with pytest.raises(ValueError, match=r"one picture, .* \(2, 8, 8, 3\)"):
        tiling.encode(model, np.zeros((2, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="strip_bytes must be positive, got 0"):
        tiling.encode(model, picture(8, 8), strip_bytes=0)
    tiling.encode(model, picture(32, 32), folder=tmp_path)
    assert not list(tmp_path.iterdir())
