"""Losses, each the mean over all elements or samples."""

from __future__ import annotations

from typing import Any

from tinydiff import kernels
from tinydiff.backend import Array
from tinydiff.op import fused
from tinydiff.ops.activation import softplus
from tinydiff.ops.elementwise import mul, neg, sub
from tinydiff.ops.indexing import checked_indices, gather_checked
from tinydiff.ops.reduce import log_softmax, mean, sum
from tinydiff.tensor import Tensor, as_tensor


@fused
def mse_loss(input: Tensor, target: Tensor) -> Tensor:
    """The mean of (input - target)². Raises ValueError when the shapes differ: broadcasting here is nearly always a mistake."""
    if input.shape != target.shape:
        raise ValueError(f"mse_loss: input has shape {input.shape}, target {target.shape}; they must agree")
    error = sub(input, target)
    return mean(mul(error, error))


@mse_loss.kernel("cuda")
def _(input: Array, target: Array) -> Any:
    return kernels.gpu.mse_loss(input, target)


@mse_loss.kernel_backward("cuda")
def _(g: Array, input: Array, target: Array, needs: tuple[bool, ...]) -> Any:
    gradient = kernels.gpu.mse_loss_backward(g, input, target)
    return gradient if gradient is NotImplemented else (gradient, -gradient if needs[1] else None)


@fused
def binary_cross_entropy_with_logits(input: Tensor, target: Tensor) -> Tensor:
    """The mean of -[target log σ(input) + (1 - target) log(1 - σ(input))], without overflow.

    Raises ValueError when shapes differ.
    """
    if input.shape != target.shape:
        raise ValueError(
            f"binary_cross_entropy_with_logits: input has shape {input.shape}, target {target.shape}; they must agree"
        )
    return mean(sub(softplus(input), mul(input, target)))


def cross_entropy(logits: Tensor, target: Any) -> Tensor:
    """The mean over samples of -log softmax(logits)[target].

    logits (N, …, classes); target: integer classes (N, …), or probabilities of the logits' shape.
    Raises ValueError for an empty batch or shapes that disagree, IndexError for a class out of range.
    """
    target = target if hasattr(target, "dtype") else as_tensor(target).data
    if logits.size == 0:
        raise ValueError(f"cross_entropy of an empty batch: logits have shape {logits.shape}")
    logs = log_softmax(logits, -1)
    if target.dtype.kind in "iu":
        if target.shape != logits.shape[:-1]:
            raise ValueError(
                f"cross_entropy: classes must have shape {logits.shape[:-1]} for logits {logits.shape}, not {target.shape}"
            )
        classes = checked_indices("cross_entropy", target, logits, logits.shape[-1], wrap=False, what=("class", "classes"))
        return neg(mean(gather_checked(logs, classes[..., None], -1)))
    if target.shape != logits.shape:
        raise ValueError(f"cross_entropy: probabilities must have the logits' shape {logits.shape}, not {target.shape}")
    return neg(mean(sum(mul(logs, as_tensor(target)), -1)))
