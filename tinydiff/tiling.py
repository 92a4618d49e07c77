"""Pictures too large for memory through an autoencoder, strip by strip, with the result of the whole.

GroupNorm's statistics and the middle's attention see the whole picture, so tiles that go through the network one by one get other
colours than the picture would. Here one *layer* at a time goes over all tiles: these are strips of full width, overlapping by the
rows that the next convolution looks at, their results lie in a temporary file, and statistics are gathered while it is written.
So nothing is computed twice and nothing is approximated: there is no seam, and no shift of colour, but float32's rounding.

Memory depends on the width of the picture and not on its height: a few times `strip_bytes`, the picture and the result. The
files take, with the published model's widths, up to 1 kB of disk for each pixel in `encode` and 2 kB in `decode`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np

from tinydiff import autograd, ops
from tinydiff.models.autoencoder import AutoencoderKL, DiagonalGaussian, pad_to_multiple
from tinydiff.models.blocks import Downsample2D, ResnetBlock2D, SpatialAttention, Upsample2D
from tinydiff.nn import Conv2d, GroupNorm, Linear, Module
from tinydiff.ops.conv import activate, output_size, padding_pairs, pair
from tinydiff.tensor import Tensor

STRIP_BYTES = 1 << 26


def encode(
    model: AutoencoderKL, x: np.ndarray, strip_bytes: int = STRIP_BYTES, folder: str | Path | None = None
) -> DiagonalGaussian:
    """`model.encode` of one picture x (1, H, W, C) of any size.

    Args:
        strip_bytes: how large the arrays are that are worked on at once.
        folder: where the temporary files go; by default where the system has them.

    Raises ValueError for more than one picture, OSError when the disk is full.
    """
    padded = pad_to_multiple(Tensor(_one(x)), model.factor).data
    return DiagonalGaussian(Tensor(_through(model.encoder_layers(), padded, strip_bytes, folder)))


def decode(
    model: AutoencoderKL,
    z: np.ndarray,
    size: tuple[int, int] | None = None,
    strip_bytes: int = STRIP_BYTES,
    folder: str | Path | None = None,
) -> np.ndarray:
    """`model.decode` of one picture's latents z (1, h, w, C), not scaled; the other arguments are as in `encode`."""
    x = _through(model.decoder_layers(), _one(z), strip_bytes, folder)
    return x if size is None else x[:, : size[0], : size[1]]


def _one(x: np.ndarray) -> np.ndarray:
    if x.ndim != 4 or x.shape[0] != 1:
        raise ValueError(f"tiling takes one picture, (1, H, W, C); got shape {x.shape}")
    return x


def _through(layers: Iterator[Module], x: np.ndarray, strip_bytes: int, folder: str | Path | None) -> np.ndarray:
    if strip_bytes < 1:
        raise ValueError(f"strip_bytes must be positive, got {strip_bytes}")
    with autograd.no_grad():
        strips = _Strips(x.shape[1:], x.dtype, strip_bytes, folder)
        for rows in strips.cut(x.shape[2] * x.shape[3]):
            strips.append(x[:, rows[0] : rows[1]])
        for layer in layers:
            strips = _run(layer, strips)
        return strips.rows(0, strips.shape[0]).data


class _File:
    """A temporary file that goes when nobody refers to it."""

    def __init__(self, folder: str | Path | None) -> None:
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as this object)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()


class _Strips:
    """What a layer made of the picture: rows in a file, with the mean and the squared deviations of each channel.

    A norm is only noted, and applied to the rows that are read.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, strip_bytes: int, folder: str | Path | None) -> None:
        self.shape, self.dtype, self.strip_bytes, self.folder = shape, np.dtype(dtype), strip_bytes, folder
        self.stored = _File(folder)
        self.count = 0
        self.mean = self.squares = np.zeros(shape[2])
        self.normed: Callable[[Tensor], Tensor] = lambda x: x

    def like(self, *shape: int) -> _Strips:
        """A new one, empty."""
        return _Strips(shape, self.dtype, self.strip_bytes, self.folder)

    def cut(self, numbers: int) -> Iterator[tuple[int, int]]:
        """All rows as pairs (first, last + 1), with at most `strip_bytes` in a strip if a row has so many `numbers`."""
        height = max(1, self.strip_bytes // (numbers * self.dtype.itemsize))
        return ((a, min(a + height, self.shape[0])) for a in range(0, self.shape[0], height))

    def append(self, rows: np.ndarray) -> None:
        """Write the next rows (1, h, W, C), and count them in by Chan, Golub & LeVeque's update (1979)."""
        try:
            self.stored.file.write(np.ascontiguousarray(rows).data)
        except OSError as error:
            raise OSError(f"no room for temporary files in {self.folder or tempfile.gettempdir()}: {error.strerror}") from error
        # float32 within a row of pixels, float64 between them
        mean = rows.mean(2).mean((0, 1), dtype=np.float64)
        centred = rows - mean.astype(rows.dtype)
        squares = (centred * centred).sum(2).sum((0, 1), dtype=np.float64)
        before, more = self.count, rows.shape[1] * rows.shape[2]
        self.count += more
        difference = mean - self.mean
        self.mean = self.mean + difference * (more / self.count)
        self.squares = self.squares + squares + difference**2 * (before * more / self.count)

    def rows(self, first: int, last: int) -> Tensor:
        """Rows first … last - 1, (1, h, W, C), with the norm applied."""
        rows = np.empty((1, last - first, *self.shape[1:]), self.dtype)
        self.stored.file.seek(first * rows[0, 0].nbytes if rows.size else 0)
        self.stored.file.readinto(rows.data)  # type: ignore[attr-defined]
        return self.normed(Tensor(rows))

    def through_norm(self, norm: GroupNorm) -> _Strips:
        """The same rows, normed by the statistics of all of them."""
        groups = (norm.num_groups, -1)
        mean = self.mean.reshape(groups).mean(1, keepdims=True)
        deviations = (self.mean.reshape(groups) - mean) ** 2
        variance = (self.squares.reshape(groups) / self.count + deviations).mean(1, keepdims=True)
        scale = norm.weight.data * np.broadcast_to(1 / np.sqrt(variance + norm.eps), deviations.shape).reshape(-1)
        shift = norm.bias.data - scale * np.broadcast_to(mean, deviations.shape).reshape(-1)
        factors = Tensor(scale.astype(self.dtype)), Tensor(shift.astype(self.dtype))
        view = copy.copy(self)
        view.normed = lambda x: activate(x * factors[0] + factors[1], norm.activation)
        return view


def _convolve(x: _Strips, conv: Conv2d, residual: Callable[[int, int], Tensor] | None = None, upsampled: bool = False) -> _Strips:
    """conv(x), or conv of x with each pixel doubled; `residual(first, last)` are rows to add."""
    (vertical, _), (paddings, sides) = pair("stride", conv.stride), padding_pairs(conv.padding)
    times = 2 if upsampled else 1
    height, width, _ = (times * x.shape[0], times * x.shape[1], x.shape[2])
    kernel, channels = conv.weight.shape[0], conv.weight.shape[3]
    out = x.like(*output_size((height, width), conv.weight.shape[:2], pair("stride", conv.stride), (paddings, sides)), channels)
    for first, last in out.cut(max(width * vertical * x.shape[2], out.shape[1] * channels)):
        # The rows under the kernel, as far as there are any.
        top, bottom = first * vertical - paddings[0], (last - 1) * vertical - paddings[0] + kernel
        above, below = max(top, 0), min(bottom, height)
        if upsampled:
            piece = ops.upsample_nearest2d(x.rows(above // 2, -(-below // 2)))[:, above % 2 : above % 2 + below - above]
        else:
            piece = x.rows(above, below)
        borders = ((above - top, bottom - below), sides)
        added = None if residual is None else residual(first, last)
        out.append(ops.conv2d(piece, conv.weight, conv.bias, conv.stride, borders, added).data)
    return out


def _project(x: _Strips, linear: Linear) -> _Strips:
    out = x.like(*x.shape[:2], linear.weight.shape[1])
    for rows in out.cut(x.shape[1] * max(x.shape[2], out.shape[2])):
        out.append(linear(x.rows(*rows)).data)
    return out


@singledispatch
def _run(layer: Module, x: _Strips) -> _Strips:
    """The layer's result for the whole picture."""
    raise TypeError(f"tiling does not know the layer {type(layer).__name__}")


@_run.register
def _(layer: Conv2d, x: _Strips) -> _Strips:
    return _convolve(x, layer)


@_run.register
def _(layer: GroupNorm, x: _Strips) -> _Strips:
    return x.through_norm(layer)


@_run.register
def _(layer: Downsample2D, x: _Strips) -> _Strips:
    return _convolve(x, layer.conv)


@_run.register
def _(layer: Upsample2D, x: _Strips) -> _Strips:
    return _convolve(x, layer.conv, upsampled=True)


@_run.register
def _(layer: ResnetBlock2D, x: _Strips) -> _Strips:
    h = _convolve(x.through_norm(layer.norm1), layer.conv1)
    shortcut = layer.conv_shortcut
    return _convolve(
        h.through_norm(layer.norm2), layer.conv2, lambda *rows: x.rows(*rows) if shortcut is None else shortcut(x.rows(*rows))
    )


@_run.register
def _(layer: SpatialAttention, x: _Strips) -> _Strips:
    normed, (width, channels) = x.through_norm(layer.group_norm), x.shape[1:]
    k, v = _project(normed, layer.to_k), _project(normed, layer.to_v)

    def heads(pixels: Tensor) -> Tensor:
        return ops.permute(ops.reshape(pixels, (-1, layer.heads, layer.head_dim)), (1, 0, 2))

    out = x.like(*x.shape)
    square = int((x.strip_bytes / x.dtype.itemsize) ** 0.5)  # as many queries as keys at a time
    blocks = list(x.cut(width * max(channels, square)))
    for rows in blocks:
        q = heads(layer.to_q(normed.rows(*rows)))
        attended = ops.permute(_attend(q, ((heads(k.rows(*part)), heads(v.rows(*part))) for part in blocks)), (1, 0, 2))
        out.append((x.rows(*rows) + layer.to_out(ops.reshape(attended, (1, -1, width, channels)))).data)
    return out


def _attend(q: Tensor, blocks: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """softmax(q kᵀ/√size) v over keys and values that come in blocks (Milakov & Gimelshein 2018). All are (heads, L, size)."""
    q = q * q.shape[-1] ** -0.5
    zero = Tensor(np.zeros((*q.shape[:2], 1), q.dtype))
    top, total, result = zero - np.inf, zero, zero
    for k, v in blocks:
        scores = ops.matmul(q, ops.transpose(k, -1, -2))
        greatest = ops.maximum(top, ops.max(scores, axis=-1, keepdims=True))
        faded, weights = ops.exp(top - greatest), ops.exp(scores - greatest)
        total = total * faded + ops.sum(weights, axis=-1, keepdims=True)
        result = result * faded + ops.matmul(weights, v)
        top = greatest
    return result / total
