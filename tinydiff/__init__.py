"""tinydiff: a small autograd engine that builds and trains everything inside Stable Diffusion.

A first look:

    import tinydiff as td

    x = td.tensor([1.0, 2.0, 3.0], requires_grad=True)
    y = (x * x).sum()
    y.backward()
    x.grad                       # tensor([2., 4., 6.], shape=(3,), float32)
"""

from __future__ import annotations

from os import PathLike, fspath

from tinydiff import models, nn, ops, optim
from tinydiff.autograd import checkpoint, enable_grad, grad, hvp, is_grad_enabled, jvp, no_grad, set_grad_enabled, vjp
from tinydiff.backend import get_num_threads, set_num_threads
from tinydiff.draw import draw, steps
from tinydiff.gradcheck import gradcheck, gradgradcheck
from tinydiff.hooks import first_nonfinite, peak_memory, profile
from tinydiff.op import fused, op
from tinydiff.random import manual_seed
from tinydiff.tensor import Tensor, as_tensor, from_dlpack, from_numpy, tensor

__version__ = "0.1.0"


def load(run: str | PathLike[str]) -> nn.Module:
    """The network of a run folder, or a shipped one by its name ("digits", "classifier"), ready to use.

    Raises ValueError when there is none.
    """
    from tinydiff.pipeline import load_model

    return load_model(fspath(run))[0]
