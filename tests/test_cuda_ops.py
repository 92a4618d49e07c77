"""The ops and the optimiser that have CUDA kernels besides convolution: that these run, and give what the CPU gives."""

import shutil

import numpy as np
import pytest

import tinydiff as td
from tinydiff import nn, ops, optim, simarray
from tinydiff.kernels import cuda
from tinydiff.samples import SAMPLES
from tinydiff.testing import definition_only

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

LAUNCHERS = {
    "group_norm": ["group_norm", "group_norm_backward"],
    "layer_norm": ["layer_norm", "layer_norm_backward"],
    "softmax": ["softmax", "softmax_backward"],
    "log_softmax": ["softmax", "softmax_backward"],
    "scaled_dot_product_attention": ["attention", "attention_backward"],
}
SAMPLED = [pytest.param(name, sample, id=f"{name}-{i}") for name in LAUNCHERS for i, sample in enumerate(SAMPLES[name])]


@pytest.fixture
def launched(monkeypatch):
    """The names of the launchers that run."""
    names = []
    real = cuda.run
    monkeypatch.setattr(cuda, "run", lambda name, *rest: (names.append(name), real(name, *rest)))
    return names


def outcome(device, function, arrays, dtype):
    """Result, and first gradients."""
    leaves = [td.tensor(a, True, dtype, device) for a in arrays]
    result = function(*leaves)
    cotangent = td.tensor(np.random.default_rng(0).standard_normal(result.shape), False, dtype, device)
    return [t.numpy() for t in (result, *td.grad(result, leaves, cotangent))]


def assert_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(initial=0.1))


def has_kernel(name, sample):
    axis = sample.args[1] if "softmax" in name and len(sample.args) > 1 else -1
    return all(a.size for a in sample.arrays) and axis in (-1, sample.arrays[0].ndim - 1)


@pytest.mark.parametrize(("name", "sample"), SAMPLED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 2e-5)])
def test_the_catalogue_runs_as_kernels(launching, launched, name, sample, dtype, tolerance):
    found = outcome(launching, sample, sample.arrays, dtype)
    assert launched == (LAUNCHERS[name] if has_kernel(name, sample) else [])
    assert_close(found, outcome("cpu", sample, sample.arrays, np.float64), tolerance)


ROWS = np.random.default_rng(0).standard_normal((9, 70))
CALLS = {
    "group_norm": lambda x: ops.group_norm(x, 7, activation="silu"),
    "layer_norm": ops.layer_norm,
    "softmax": ops.softmax,
    "log_softmax": ops.log_softmax,
    "scaled_dot_product_attention": lambda x: ops.scaled_dot_product_attention(*[x.reshape(1, 1, 9, 70)] * 3).reshape(9, 70),
}


@pytest.mark.parametrize("name", CALLS)
def test_any_layout_in_memory(launching, launched, name):
    """Every second row, and a gradient that is one row, repeated."""
    results = []
    for device in ("cpu", launching):
        x = td.tensor(np.stack([ROWS, ROWS], 1), True, np.float32, device)
        y = CALLS[name](x[:, 1])
        g = td.grad(y, x, td.tensor(ROWS[0], dtype=np.float32, device=device).expand(y.shape))
        results.append([y.numpy(), g.numpy()])
    assert launched == LAUNCHERS[name]
    assert_close(results[1], results[0], 2e-5)


@pytest.mark.parametrize("name", CALLS)
def test_second_gradients_come_from_the_composition(launching, name):
    results = []
    for device in ("cpu", launching):
        x = td.tensor(ROWS, True, np.float64, device)
        g, h = (td.tensor(np.roll(ROWS, k, 1), dtype=np.float64, device=device) for k in (1, 2))
        first = td.grad(CALLS[name](x), x, g, create_graph=True)
        results.append([first.numpy(), td.grad(first, x, h).numpy()])
    assert_close(results[1], results[0], 1e-10)


def test_what_no_kernel_takes_is_computed_by_definitions(built, launched):
    x = td.tensor(ROWS, device="cudasim")
    ops.softmax(x, 0)
    with pytest.raises(ValueError, match="weight must have shape"):
        ops.layer_norm(x, td.tensor(np.ones(69), device="cudasim", dtype=np.float32))
    with pytest.raises(ValueError, match="unknown activation 'gelu'"):
        ops.group_norm(x, 7, activation="gelu")
    with pytest.raises(ValueError, match="num_groups=8 must divide"):
        ops.group_norm(x, 8)
    with cuda.simulated(False):
        ops.softmax(x)
    assert launched == []
    ops.softmax(x)
    assert launched == ["softmax"]


@pytest.mark.parametrize("name", CALLS)
def test_what_a_kernel_can_not_do_is_one_sentence(built, launched, monkeypatch, name):
    """Too many elements, arrays freed, or on another GPU, forward and backward; nothing is launched."""
    x = td.tensor(ROWS, True, np.float32, "cudasim")
    y, g = CALLS[name](x), td.tensor(ROWS, dtype=np.float32, device="cudasim")
    launched.clear()
    for target, value, error, message in (
        ((cuda, "LARGEST"), ROWS.size - 1, ValueError, "has 630 elements, more than 32 bits index; split the batch"),
        ((simarray.ndarray, "data"), property(lambda a: simarray.MemoryPointer(0)), ValueError, "has no memory: it was freed"),
        (
            (simarray.ndarray, "device"),
            property(lambda a: simarray.Device(1)),
            TypeError,
            "is on GPU 1, and the current one is 0",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(*target, value)
            with pytest.raises(error, match=message):
                CALLS[name](x)
            with pytest.raises(error, match=message):
                td.grad(y, x, g, retain_graph=True)
    assert launched == []


@pytest.mark.parametrize("name", CALLS)
def test_too_little_memory_is_one_sentence(built, launched, monkeypatch, name):
    x = td.tensor(ROWS, True, np.float32, "cudasim")
    y, g = CALLS[name](x), td.tensor(ROWS, dtype=np.float32, device="cudasim")
    launched.clear()

    def full(shape, dtype=float):
        raise MemoryError("Out of memory allocating 9 bytes")

    monkeypatch.setattr(simarray, "empty", full)
    for call in (lambda: CALLS[name](x), lambda: td.grad(y, x, g)):
        with pytest.raises(MemoryError, match=r"no room on the GPU for \w+, 0 MB \(Out of memory .*\); use a smaller batch"):
            call()
    assert launched == []


def test_adamw_refuses_what_a_kernel_would_read_wrongly(built, launched, monkeypatch):
    p = nn.Parameter(simarray.zeros(7, np.float32))
    optimizer, p.grad = optim.AdamW([p]), td.tensor(np.ones(7, np.float32), device="cudasim")
    with monkeypatch.context() as patch:
        patch.setattr(simarray.ndarray, "data", property(lambda a: simarray.MemoryPointer(0)))
        with pytest.raises(ValueError, match=r"parameter of shape \(7,\) has no memory: it was freed"):
            optimizer.step()
    p.grad = td.tensor(np.ones(7, np.float32))
    with pytest.raises(TypeError, match="different devices can't be mixed: cpu, cudasim"):
        optimizer.step()
    assert launched == []


def test_adamw_and_the_average_are_one_launch(launching, launched):
    """Several sizes, a parameter without a gradient, a gradient in another layout, and float64, which the kernel leaves alone."""
    results = []
    for device in ("cpu", launching):
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal(shape) for shape in ((40, 70), (3,), (1, 1), (5, 4))]
        dtypes = [np.float32, np.float32, np.float32, np.float64]
        parameters = [nn.Parameter(td.tensor(a, dtype=t, device=device).data) for a, t in zip(arrays, dtypes)]
        optimizer, ema = optim.AdamW(parameters, 0.05, weight_decay=0.1), optim.EMA(parameters, 0.9)
        for step in range(3):
            for p in parameters:
                p.grad = td.Tensor(td.tensor(rng.standard_normal(p.shape[::-1]), dtype=p.dtype, device=device).data.T)
            if step == 1:
                parameters[1].grad = None
            optimizer.step(ema=ema)
        results.append([p.numpy() for p in parameters] + list((optimizer.state_dict() | ema.state_dict()).values()))
    assert launched == ["adamw"] * 3
    for a, b in zip(*results):
        np.testing.assert_allclose(b, a, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("lengths", "sizes", "mask", "causal"),
    [
        ((1, 1), (4, 4), None, False),
        ((70, 130), (8, 8), None, False),  # queries and keys, several tiles of each
        ((130, 70), (24, 40), None, True),
        ((70, 130), (64, 33), (2, 1, 1, 130), False),
        ((33, 70), (72, 128), (33, 70), True),
    ],
)
def test_attention_over_several_tiles(launching, launched, lengths, sizes, mask, causal, dtype):
    """The definition's results and gradients in float64, of heads as a model has them, and a query that sees nothing."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, length, 3, size)) for length, size in zip((*lengths, lengths[1]), (sizes[0], *sizes))]
    allowed = None if mask is None else rng.random(mask) < 0.7
    if mask == lengths:
        allowed[5] = False

    def attend(q, k, v):
        heads = [ops.permute(a, (0, 2, 1, 3)) for a in (q, k, v)]
        return ops.permute(ops.scaled_dot_product_attention(*heads, allowed, causal), (0, 2, 1, 3))

    found = outcome(launching, attend, arrays, dtype)
    fits = max(sizes) <= (64 if dtype == np.float64 else 128)
    assert [name for name in launched if "attention" in name] == (LAUNCHERS["scaled_dot_product_attention"] if fits else [])
    with definition_only(ops.scaled_dot_product_attention.op):
        expected = outcome("cpu", attend, arrays, np.float64)
    assert_close(found, expected, 2e-5 if dtype == np.float32 else 1e-12)


def test_a_training_step_runs_through_the_kernels(launching, launched):
    """A residual block with attention and a head of layers, and AdamW with an average: the CPU's losses."""

    class Model(nn.Module):
        def __init__(self):
            self.conv, self.attention, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Attention(8, 2, 4), nn.Linear(8, 5)
            self.norm, self.last = nn.GroupNorm(4, 8), nn.LayerNorm(8)

        def forward(self, x):
            x = self.conv(x)
            x = ops.group_norm(x, 4, self.norm.weight, self.norm.bias, activation="silu")
            x = ops.reshape(x, (x.shape[0], -1, 8))
            return self.linear(self.last(x + self.attention(x)).mean(1))

    losses = {}
    for device in ("cpu", launching):
        td.manual_seed(0)
        rng = np.random.default_rng(0)
        model, losses[device] = Model().to(device), []
        optimizer, ema = optim.AdamW(model.parameters(), 1e-2), optim.EMA(model.parameters())
        for _ in range(3):
            x = td.tensor(rng.standard_normal((2, 4, 4, 3)), dtype=np.float32, device=device)
            loss = ops.cross_entropy(model(x), rng.integers(5, size=2))
            loss.backward()
            optimizer.step(ema=ema)
            optimizer.zero_grad()
            losses[device].append(loss.item())
    kernels = {name for names in LAUNCHERS.values() for name in names}
    assert set(launched) >= kernels | {"conv2d", "adamw"}
    assert losses[launching] == pytest.approx(losses["cpu"], rel=1e-4)
    assert losses["cpu"][0] != losses["cpu"][2]
