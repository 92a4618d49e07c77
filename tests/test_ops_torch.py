"""PyTorch, where it is installed, as a second opinion on names, argument order, values, first and second gradients."""

import numpy as np
import pytest

import tinydiff as td
from tinydiff.samples import SAMPLES

torch = pytest.importorskip("torch")
F = torch.nn.functional
SDPBackend, sdpa_kernel = torch.nn.attention.SDPBackend, torch.nn.attention.sdpa_kernel


def first(x):
    """Channels last to channels first."""
    return x.movedim(-1, 1)


def last(x):
    return x.movedim(1, -1)


def conv2d(x, w, bias=None, stride=1, padding=0, residual=None, activation=None):
    if isinstance(padding, int):
        padding = (padding, padding)
    if isinstance(padding[0], int):
        padding = ((padding[0], padding[0]), (padding[1], padding[1]))
    (top, bottom), (left, right) = padding
    y = last(F.conv2d(F.pad(first(x), (left, right, top, bottom)), w.permute(3, 2, 0, 1), None, stride))
    if bias is not None:
        y = y + (bias if bias.ndim == 1 else bias[:, None, None, :])
    y = y if residual is None else y + residual
    return y if activation is None else getattr(F, activation)(y)


def group_norm(x, groups, weight=None, bias=None, eps=1e-5, activation=None):
    y = last(F.group_norm(first(x), groups, weight, bias, eps))
    return y if activation is None else getattr(F, activation)(y)


def attention(q, k, v, mask=None, is_causal=False, scale=None, heads=None):
    if heads is not None:
        parts = [x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
        return attention(*parts, mask, is_causal, scale).transpose(1, 2).flatten(2)
    if is_causal:
        causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        mask = causal if mask is None else mask & causal
    with sdpa_kernel(SDPBackend.MATH):  # the one with second derivatives
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return out if mask is None else torch.where(mask.any(-1, keepdim=True), out, 0.0)


THEIRS = {
    **{name: getattr(torch, name) for name in ("exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "sin", "cos", "erf", "tanh")},
    **{
        name: getattr(torch, name)
        for name in ("sigmoid", "relu", "abs", "neg", "maximum", "minimum", "where", "einsum", "matmul")
    },
    **{name: getattr(torch, name) for name in ("add", "sub", "mul", "div", "pow")},
    "silu": F.silu,
    "gelu": lambda x, approximate="none": F.gelu(x, approximate=approximate),
    "softplus": F.softplus,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "softmax": lambda x, axis=-1: F.softmax(x, axis),
    "log_softmax": lambda x, axis=-1: F.log_softmax(x, axis),
    "clip": lambda x, low, high: x if low is high is None else torch.clip(x, low, high),
    "permute": lambda x, *axes: x.permute(*axes),
    "reshape": lambda x, *shape: x.reshape(*shape),
    "expand": lambda x, *shape: x.expand(*shape),
    "repeat": lambda x, *times: x.repeat(*times),
    "concat": lambda xs, axis=0: torch.cat(xs, axis),
    "stack": lambda xs, axis=0: torch.stack(xs, axis),
    "split": lambda x, size, axis=0: list(torch.split(x, size, axis)),
    "gather": lambda x, axis, index: torch.gather(x, axis, index % x.shape[axis]),
    "scatter_add": lambda x, axis, index, src: torch.scatter_add(x, axis, index % x.shape[axis], src),
    "embedding": lambda indices, weight: F.embedding(indices % weight.shape[0], weight),
    "linear": lambda x, w, bias=None, residual=0.0: F.linear(x, w.T, bias) + residual,
    "conv2d": conv2d,
    "group_norm": group_norm,
    "layer_norm": lambda x, weight=None, bias=None, eps=1e-5: F.layer_norm(x, x.shape[-1:], weight, bias, eps),
    "max_pool2d": lambda x, size, stride=None: last(F.max_pool2d(first(x), size, stride)),
    "avg_pool2d": lambda x, size, stride=None: last(F.avg_pool2d(first(x), size, stride)),
    "scaled_dot_product_attention": attention,
    "mse_loss": F.mse_loss,
    "cross_entropy": lambda x, y: F.cross_entropy(x.movedim(-1, 1), y if y.dtype == torch.int64 else y.movedim(-1, 1)),
    "binary_cross_entropy_with_logits": F.binary_cross_entropy_with_logits,
}
CASES = [pytest.param(name, s, id=f"{name}-{k}") for name in sorted(THEIRS) for k, s in enumerate(SAMPLES[name])]


@pytest.mark.parametrize("name, sample", CASES)
def test_pytorch_agrees(name, sample):
    if name in ("max_pool2d", "avg_pool2d") and sample.arrays[0].size == 0:
        pytest.skip("PyTorch takes no empty batch here")
    if name in ("maximum", "minimum", "add", "sub", "mul", "div") and len(sample.arrays) == 1:
        pytest.skip("PyTorch does not take numbers everywhere")
    if name == "pow" and any(0 in a for a in sample.arrays[1:]):
        pytest.skip("PyTorch's mixed second derivative at exponent 0 is not what differences give")
    leaves = [torch.tensor(a, requires_grad=True) for a in sample.arrays]
    args = [
        torch.tensor(a % 4 if name in ("gather", "scatter_add") else a) if isinstance(a, np.ndarray) else a
        for a in sample.bind(leaves)
    ]
    theirs = THEIRS[name](*args, **sample.params)
    inputs = [td.tensor(a, True) for a in sample.arrays]
    ours = sample(*inputs)
    theirs, ours = (list(r) if isinstance(r, list | tuple) else [r] for r in (theirs, ours))
    rng = np.random.default_rng(0)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.numpy(), b.detach().numpy(), rtol=1e-9, atol=1e-10)
    cotangents = [rng.standard_normal(r.shape) for r in ours]
    found = td.grad(ours, inputs, cotangents, create_graph=True)
    wanted = torch.autograd.grad(theirs, leaves, [torch.tensor(c) for c in cotangents], create_graph=True, materialize_grads=True)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a.numpy(), b.detach().numpy(), rtol=1e-8, atol=1e-9)
    pairs = [(a, b) for a, b in zip(found, wanted) if a.requires_grad and b.requires_grad]
    if pairs:
        vectors = [rng.standard_normal(a.shape) for a, _ in pairs]
        second = td.grad([a for a, _ in pairs], inputs, vectors)
        theirs_second = torch.autograd.grad(
            [b for _, b in pairs], leaves, [torch.tensor(v) for v in vectors], allow_unused=True, materialize_grads=True
        )
        for a, b in zip(second, theirs_second, strict=True):
            np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-7, atol=1e-8)
