"""The networks, built `from_config` and stored with the published names."""

from __future__ import annotations

from tinydiff.models.autoencoder import AutoencoderKL
from tinydiff.models.classifier import Classifier
from tinydiff.models.unet import UNet2DModel
from tinydiff.models.unet_condition import UNet2DConditionModel

__all__ = ["AutoencoderKL", "Classifier", "UNet2DConditionModel", "UNet2DModel"]
