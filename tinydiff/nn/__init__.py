"""Layers and the module tree they form, as in PyTorch, channels last."""

from __future__ import annotations

from tinydiff.nn import init
from tinydiff.nn.layers import Attention, Conv2d, Dropout, Embedding, GroupNorm, LayerNorm, Linear
from tinydiff.nn.module import Module, ModuleList, Parameter, Sequential, no_init
