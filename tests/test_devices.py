"""The simulated GPU: arrays as strict as CuPy's, every op on them as on the CPU, and training without a hidden copy."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from catalogue import LARGE, ODD, every

import tinydiff as td
from tinydiff import backend, nn, ops, simarray
from tinydiff.kernels import cuda
from tinydiff.op import REGISTRY
from tinydiff.samples import SAMPLES, Sample
from tinydiff.testing import definition_only

CALLS = [pytest.param(sample, id=f"{name}-{k}") for name, samples in sorted(SAMPLES.items()) for k, sample in enumerate(samples)]
DIFFERENTIABLE = [call for call in CALLS if call.values[0].differentiable]


def on(device, sample, dtype=np.float64):
    """The sample's call and its leaves on a device."""

    leaves = [td.tensor(a, sample.differentiable, dtype, device) for a in sample.arrays]
    given = [a for a in (*sample.args, *sample.params.values()) if isinstance(a, np.ndarray)]
    others = {id(a): td.tensor(a, device=device).data for a in given}

    def call(*values):
        params = {name: others.get(id(value), value) for name, value in sample.params.items()}
        results = sample.function(*[others.get(id(arg), arg) for arg in sample.bind(values)], **params)
        return list(results) if isinstance(results, list | tuple) else [results]

    return call, leaves


def drawn(tensors, seed, device):
    """A standard normal tensor for each."""
    rng = np.random.default_rng(seed)
    return [td.tensor(rng.standard_normal(t.shape), dtype=t.dtype, device=device) for t in tensors]


def assert_same(found, expected, device="cudasim"):
    for a, b in zip(found, expected, strict=True):
        assert a.device == device and b.device == "cpu"
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-11, atol=1e-12)


# Every op.


@pytest.mark.parametrize("sample", [c for c in CALLS if not c.id.startswith("to-")])
def test_results_are_the_cpus(sample, device):
    outcomes = []
    for where in (device, "cpu"):
        call, leaves = on(where, sample)
        outcomes.append(call(*leaves))
    assert_same(*outcomes, device)


@pytest.mark.parametrize("sample", [c for c in DIFFERENTIABLE if not c.id.startswith("to-")])
def test_first_and_second_gradients_are_the_cpus(sample, device):
    outcomes = []
    for where in (device, "cpu"):
        call, leaves = on(where, sample)
        results = call(*leaves)
        cotangents = [c.requires_grad_() for c in drawn(results, 1, where)]
        first = td.grad(results, leaves, cotangents, create_graph=True)
        wanted = [t for t in first if t.requires_grad]
        second = td.grad(wanted, [*leaves, *cotangents], drawn(wanted, 2, where)) if wanted else []
        outcomes.append([*first, *second])
    assert_same(*outcomes, device)


@pytest.mark.parametrize(("name", "args", "params"), [*every(LARGE), *every(ODD)])
def test_calls_at_the_sizes_of_kernels_are_the_cpus(device, name, args, params):
    """In float32; on the simulated GPU by definitions, for its kernels take long, and smaller calls go through them elsewhere."""
    sample, outcomes = Sample(getattr(ops, name, None) or REGISTRY[name], args, params, True), []
    for where, dtype in ((device, np.float32), ("cpu", np.float64)):
        with cuda.simulated(False), definition_only(*(REGISTRY.values() if where == "cpu" else ())):
            call, leaves = on(where, sample, dtype)
            results = call(*leaves)
            outcomes.append([*results, *td.grad(results, leaves, drawn(results, 1, where))])
    for found, expected in zip(*outcomes, strict=True):
        assert found.device == device and found.dtype == np.float32 and found.shape == expected.shape
        largest = np.abs(expected.numpy()).max(initial=0.1)
        np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-3, atol=2e-5 * largest)


@pytest.mark.parametrize("sample", [c for c in DIFFERENTIABLE if not c.id.startswith("to-")])
def test_no_op_copies_between_host_and_device(sample):
    """Forward, backward and backward of backward; but for checking indices, which on a GPU must be waited for."""
    call, leaves = on("cudasim", sample, np.float32)
    cotangents = [c.requires_grad_() for c in drawn(call(*leaves), 1, "cudasim")]
    seconds = drawn(leaves, 2, "cudasim")
    with simarray.recorded_copies() as copies:
        results = call(*leaves)
        first = td.grad(results, leaves, cotangents, create_graph=True)
        wanted = [(t, second) for t, second in zip(first, seconds) if t.requires_grad]
        if wanted:
            td.grad([t for t, _ in wanted], leaves, [second for _, second in wanted])
    checks = [c for c in copies if "indexing.py" in c.line and c.direction == "to host" and c.bytes == 1]
    assert [c for c in copies if c not in checks] == []


# The tensor.


def test_there_and_back():
    x = td.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    y = x.to("cudasim")
    assert (y.device, x.device, y.to("cudasim") is y) == ("cudasim", "cpu", True)
    assert y.to("cpu").tolist() == y.tolist() == x.tolist()
    assert not np.shares_memory(y.numpy(), x.numpy())
    (gradient,) = td.grad([(y * y).to("cpu").sum()], [x])
    assert gradient.device == "cpu" and gradient.tolist() == [[2, 4], [6, 8]]


def test_made_on_a_device():
    x = td.tensor([1.0, 2.0], True, device="cudasim")
    assert x.device == "cudasim" and x.dtype == np.float32 and x.is_leaf
    assert td.tensor(x).device == "cudasim" and td.tensor(x, device="cpu").device == "cpu"
    assert "on cudasim" in repr(x) and "1., 2." in repr(x) and "cudasim" not in repr(x.to("cpu"))
    (x * x).sum().backward()
    assert x.grad.device == "cudasim" and x.grad.tolist() == [2, 4]
    assert x.sum().data.shape == () and isinstance(x.sum().data, simarray.ndarray)
    assert (x.sum().item(), float(x[0]), int(x[1]), bool(x[0] > 2)) == (3.0, 1.0, 2, False)


def test_devices_do_not_mix():
    here, there = td.tensor([1.0]), td.tensor([1.0], device="cudasim")
    for call in (lambda: here + there, lambda: ops.concat([here, there]), lambda: ops.linear(there[None], here[None])):
        with pytest.raises(TypeError, match=r"can't be mixed: cpu, cudasim; move one with .to"):
            call()
    with pytest.raises(TypeError, match="can't be mixed"):
        there * np.ones(1, np.float32)
    with pytest.raises(TypeError, match="can't be mixed"):
        ops.where(td.tensor([True]), there, there)
    with pytest.raises(TypeError, match="which copies"):
        np.asarray(there)
    with pytest.raises(TypeError, match="ufunc"):
        np.exp(there.data)


def test_numbers_indices_and_masks_of_the_host_are_welcome():
    x = td.tensor([[1.0, 2.0], [3.0, 4.0]], device="cudasim")
    assert (x * 2 + np.float64(1)).dtype == np.float32
    assert ops.mse_loss(x.sum(), 0.0).item() == 100
    assert ops.take(x, [1, -1]).tolist() == [[3, 4], [3, 4]]
    assert ops.embedding(np.array([1]), x).tolist() == [[3, 4]]
    assert ops.where(np.array([True, False]), x, 0.0).tolist() == [[1, 0], [3, 0]]
    assert ops.where(x > 2, 1.0, 0.0).tolist() == [[0, 0], [1, 1]]
    assert x[np.array([1])].tolist() == [[3, 4]]
    assert abs(ops.cross_entropy(x, np.array([1, 0])).item() - 0.81326) < 1e-4
    with pytest.raises(IndexError, match="index 2 is out of range"):
        ops.take(x, td.tensor([0, 2], device="cudasim"))
    with pytest.raises(IndexError, match="class -1 is out of range"):
        ops.cross_entropy(x, [-1, 0])
    q = x.reshape(1, 1, 2, 2)
    lower = np.tri(2, dtype=bool)
    assert (
        ops.scaled_dot_product_attention(q, q, q, lower).tolist()
        == ops.scaled_dot_product_attention(q, q, q, None, True).tolist()
    )


@pytest.mark.parametrize("size", [7, 5000])
def test_dropout_draws_the_same_everywhere_and_copies_nothing(size):
    results = []
    for device in ("cpu", "cudasim"):
        td.manual_seed(4)
        x = td.tensor(np.ones((3, size), np.float32), True, device=device)
        with simarray.recorded_copies() as copies:
            y = ops.dropout(x, 0.5)
            results.append([y, td.grad(y, x, x.detach())])
        assert not copies
    for a, b in zip(*results):
        assert a.numpy().tobytes() == b.numpy().tobytes() and 0 < (a.numpy() == 0).mean() < 1


def test_assignment_comes_from_anywhere():
    x = td.tensor([1.0, 2.0], device="cudasim")
    with td.no_grad():
        assert x.assign_(np.array([3.0, 4.0])).tolist() == [3, 4]
        assert x.assign_(td.tensor([5.0, 6.0])).tolist() == [5, 6]
        assert x.assign_(td.tensor([7.0, 8.0], device="cudasim")).tolist() == [7, 8]
    assert x.device == "cudasim" and x.dtype == np.float32


def test_checkpoint_jvp_and_hvp():
    for device in ("cpu", "cudasim"):
        x = td.tensor([0.3, 0.7], True, np.float64, device)
        y = td.checkpoint(lambda t: (t.exp() * t).sum(), x)
        assert td.grad(y, x).numpy() == pytest.approx([1.3 * np.exp(0.3), 1.7 * np.exp(0.7)])
        assert td.jvp(lambda t: t * t, x, td.tensor([1.0, 0.0], dtype=np.float64, device=device))[1].tolist() == [0.6, 0]
        assert td.hvp(lambda t: (t * t * t).sum(), x, x.detach())[1].numpy() == pytest.approx([6 * 0.09, 6 * 0.49])


# The array.


def test_arrays_are_strict():
    a = simarray.asarray(np.arange(6.0).reshape(2, 3))
    for call in (
        lambda: a + np.ones(3),
        lambda: np.ones(3) + a,
        lambda: np.add(a, 1),
        lambda: np.asarray(a),
        lambda: np.sum(a),
        lambda: simarray.concatenate([a, np.ones((1, 3))]),
        lambda: a[np.array([0])],
        lambda: a.__iadd__(np.ones(3)),
        lambda: a.__setitem__(0, np.ones(3)),
        lambda: simarray.where(np.array([True]), a, a),
        lambda: simarray.exp(np.ones(3)),
    ):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(ValueError, match="bound"):
        simarray.clip(a, None, None)
    with pytest.raises(AttributeError):
        simarray.fft  # noqa: B018


def test_arrays_are_aligned_and_views_are_views():
    a = simarray.asarray(np.arange(7.0, dtype=np.float32))
    assert a.data.ptr % simarray.ALIGNMENT == 0 and (a * 2).data.ptr % simarray.ALIGNMENT == 0 and a.flags.owndata
    part = a[1:]
    assert part.data.ptr == a.data.ptr + 4 and part.base is a and not part.flags.owndata
    assert part[1:].base is a and a.reshape(7, 1).base is a and simarray.broadcast_to(a, (2, 7)).base is a
    part[0] = 9
    assert a.tolist()[1] == 9
    a += 1
    assert part.tolist()[0] == 10
    assert a.copy().base is None and simarray.exp(a).base is None and a.sum().shape == ()


def test_memory_that_nobody_wrote_is_nan():
    assert np.isnan(simarray.empty((3, 5), np.float32).get()).all()
    assert np.isnan(simarray.empty(4).get()).all()


def test_copies_are_counted():
    host = np.ones((2, 3), np.float32)
    with simarray.recorded_copies() as copies:
        a = simarray.asarray(host)
        b = (a + 1.0)[0].sum()
        assert copies[-1][:2] == ("to device", 24) and len(copies) == 1
        b.item()
        a.get()
        bool(b > 0)
        a.tolist()
        a.set(host)
    assert [c[:2] for c in copies[1:]] == [("to host", 4), ("to host", 24), ("to host", 1), ("to host", 24), ("to device", 24)]
    assert all("test_devices.py" in c.line for c in copies)


def test_unknown_devices():
    with pytest.raises(ValueError, match="unknown device 'tpu'; use one of cpu, cuda, cudasim"):
        td.tensor([1.0]).to("tpu")


def test_a_missing_gpu_is_one_sentence(monkeypatch):
    backend._check_gpu.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match=r"needs CuPy .*pip install 'tinydiff\[cuda\]'"):
        td.tensor([1.0], device="cuda")
    backend._check_gpu.cache_clear()


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (
            "cudaErrorInsufficientDriver: CUDA driver version is insufficient",
            r"and its driver \(CUDA driver version is insuff.*\)",
        ),
        (0, "needs a GPU, and the driver finds none: see CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_missing_driver_is_one_sentence(monkeypatch, count, message):
    """A module that answers as CuPy does where it is installed and the driver, or the GPU, is not."""

    class CUDARuntimeError(RuntimeError):
        pass

    def devices():
        if isinstance(count, str):
            raise CUDARuntimeError(count)
        return count

    runtime = SimpleNamespace(getDeviceCount=devices, CUDARuntimeError=CUDARuntimeError)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    for call in (
        lambda: td.tensor([1.0], device="cuda"),
        lambda: td.tensor([1.0]).to("cuda"),
        lambda: nn.Linear(1, 1).to("cuda"),
    ):
        backend._check_gpu.cache_clear()
        with pytest.raises(RuntimeError, match=message):
            call()
    backend._check_gpu.cache_clear()


def test_every_op_of_ours_was_tried():
    assert {name for name, op in REGISTRY.items() if op.__wrapped_module__.startswith("tinydiff.")} <= set(SAMPLES)
