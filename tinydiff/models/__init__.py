"""The networks, built `from_config` and stored with the published names."""

from __future__ import annotations

from tinydiff.models.classifier import Classifier
from tinydiff.models.model import Model
from tinydiff.models.unet import UNet2DModel

MODELS: dict[str, type[Model]] = {cls.__name__: cls for cls in (Classifier, UNet2DModel)}
