"""f(x): which class a picture shows, and how much it is one at all. Its features also judge generated pictures."""

from __future__ import annotations

from collections.abc import Sequence

from tinydiff import ops
from tinydiff.models.model import Model
from tinydiff.nn import Conv2d, GroupNorm, Linear, ModuleList
from tinydiff.tensor import Tensor


class Classifier(Model):
    """Strided convolutions with GroupNorm and SiLU, the mean over what is left of the picture, and a linear layer.

    Args:
        num_classes: logits; a class for "none of them", if wanted, is one of these.
        widths: channels after each convolution of stride 2, with a plain convolution between them.
    """

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, widths: Sequence[int] = (32, 64, 96), norm_num_groups: int = 8
    ) -> None:
        channels = [in_channels, *widths]
        self.down = ModuleList(Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(channels, widths))
        self.plain = ModuleList(Conv2d(b, b, 3, padding=1) for b in widths)
        self.norm_down = ModuleList(GroupNorm(norm_num_groups, b, activation="silu") for b in widths)
        self.norm_plain = ModuleList(GroupNorm(norm_num_groups, b, activation="silu") for b in widths)
        self.head = Linear(widths[-1], num_classes)

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """(N, H, W, in_channels) to what is seen at each resolution: (N, H/2, W/2, widths[0]), (N, H/4, …), …"""
        maps = []
        for down, norm_down, plain, norm_plain in zip(self.down, self.norm_down, self.plain, self.norm_plain):
            x = norm_down(down(x))
            x = norm_plain(plain(x))
            maps.append(x)
        return maps

    def features(self, x: Tensor) -> Tensor:
        """(N, H, W, in_channels) to (N, widths[-1]): what the last layer decides by."""
        return ops.mean(self.feature_maps(x)[-1], axis=(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, in_channels), pixels in [-1, 1], to logits (N, num_classes)."""
        return self.head(self.features(x))
