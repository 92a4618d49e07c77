"""The networks, built `from_config` and stored with the published names."""

from __future__ import annotations

from tinydiff.models.autoencoder import AutoencoderKL
from tinydiff.models.classifier import Classifier
from tinydiff.models.clip import CLIP, CLIPTextModel, CLIPVisionModel, ConvVisionModel
from tinydiff.models.unet import UNet2DModel
from tinydiff.models.unet_condition import UNet2DConditionModel

__all__ = [
    "CLIP",
    "AutoencoderKL",
    "CLIPTextModel",
    "CLIPVisionModel",
    "Classifier",
    "ConvVisionModel",
    "UNet2DConditionModel",
    "UNet2DModel",
]
