"""The operations, by family. Names and argument order are PyTorch's where it has one; axes are `axis`, channels come last."""

from __future__ import annotations

import sys

from tinydiff import tensor as _tensor
from tinydiff.ops.activation import dropout, geglu, gelu, quick_gelu, relu, sigmoid, silu, softplus, tanh
from tinydiff.ops.attention import scaled_dot_product_attention
from tinydiff.ops.conv import activate, avg_pool2d, conv2d, conv2d_input_grad, conv2d_weight_grad, max_pool2d, upsample_conv2d
from tinydiff.ops.elementwise import (
    abs,
    add,
    astype,
    clip,
    cos,
    div,
    eq,
    erf,
    exp,
    expm1,
    ge,
    gt,
    le,
    log,
    log1p,
    logical_and,
    logical_not,
    logical_or,
    lt,
    maximum,
    minimum,
    mul,
    ne,
    neg,
    pow,
    rsqrt,
    sign,
    sin,
    sqrt,
    sub,
    to,
    where,
)
from tinydiff.ops.indexing import embedding, gather, scatter_add, take, upsample_nearest2d
from tinydiff.ops.linalg import einsum, linear, matmul
from tinydiff.ops.loss import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from tinydiff.ops.mlp import mlp
from tinydiff.ops.norm import group_norm, layer_norm
from tinydiff.ops.reduce import argmax, argmin, cumsum, log_softmax, logsumexp, max, mean, min, softmax, std, sum, var
from tinydiff.ops.shape import (
    broadcast_to,
    concat,
    expand,
    flatten,
    flip,
    getitem,
    pad,
    permute,
    place,
    repeat,
    reshape,
    split,
    squeeze,
    stack,
    sum_to,
    transpose,
    unsqueeze,
)

_not_methods = {
    "where",
    "concat",
    "stack",
    "einsum",
    "embedding",
    "activate",
    "place",
    "sum_to",
    "conv2d_weight_grad",
    "conv2d_input_grad",
}
__all__ = [name for name, value in list(globals().items()) if callable(value) and not name.startswith("_")]
METHODS = frozenset(__all__) - _not_methods
_tensor.ops = sys.modules[__name__]
