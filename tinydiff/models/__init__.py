"""The networks, built `from_config` and stored with the published names."""

from __future__ import annotations

from tinydiff.models.classifier import Classifier
from tinydiff.models.unet import UNet2DModel

__all__ = ["Classifier", "UNet2DModel"]
