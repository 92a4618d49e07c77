"""The compiled kernels behind ops: what setup.py builds, and the path from an op down to a launch on the simulator."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

import tinydiff as td
from tinydiff import backend, ops, simarray
from tinydiff.backend import module_of
from tinydiff.cudasim import KernelError
from tinydiff.kernels import cuda
from tinydiff.samples import SAMPLES
from tinydiff.testing import recorded_calls

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
CONVOLUTIONS = ["conv2d", "conv2d_input_grad", "conv2d_weight_grad"]


def setup(*arguments, **environment):
    command = [sys.executable, "setup.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


def outcome(device, function, arrays, arguments, dtype):
    """Result, gradients and second gradients, and who computed convolutions."""
    leaves = [td.tensor(a, True, dtype, device) for a in arrays]
    with recorded_calls() as calls:
        result = function(*leaves, **arguments)
        rng = np.random.default_rng(0)
        cotangent = td.tensor(rng.standard_normal(result.shape), True, dtype, device)
        first = td.grad(result, leaves, cotangent, create_graph=True)
        seconds = [td.tensor(rng.standard_normal(g.shape), False, dtype, device) for g in first]
        second = td.grad(list(first), [*leaves, cotangent], seconds)
    return [t.numpy() for t in (result, *first, *second)], {c.who for c in calls if c[0].name in CONVOLUTIONS}


def assert_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(initial=1e-30))


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 2e-5)])
def test_convolutions_of_the_catalogue_run_as_kernels(launching, name, dtype, tolerance):
    for sample in SAMPLES[name]:
        if not all(a.size for a in sample.arrays):
            continue
        found, who = outcome(launching, lambda *x, s=sample: s(*x), sample.arrays, {}, dtype)
        expected, _ = outcome("cpu", lambda *x, s=sample: s(*x), sample.arrays, {}, np.float64)
        assert who == {"cuda"}
        assert_close(found, expected, tolerance)


@pytest.mark.parametrize(
    ("x", "w", "arguments", "version"),
    [
        ((2, 6, 5, 3), (3, 3, 3, 16), {"padding": 1}, "small_c"),
        ((1, 8, 8, 20), (3, 3, 20, 24), {"padding": 1}, "igemm_async_64"),
        ((1, 7, 9, 5), (3, 2, 5, 6), {"stride": (2, 3), "padding": ((0, 1), (2, 0))}, "igemm_simt_64"),
        ((1, 6, 6, 64), (3, 3, 64, 64), {"padding": 1}, "wino_f2"),
    ],
)
def test_the_rules_choice_is_launched(built, monkeypatch, x, w, arguments, version):
    launched = []
    real = cuda.launch
    monkeypatch.setattr(cuda, "launch", lambda name, numbers, *rest: (launched.append(numbers[0]), real(name, numbers, *rest)))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in (x, w)]
    found = ops.conv2d(*[td.tensor(a, device="cudasim") for a in arrays], **arguments).numpy()
    assert [cuda.convrule.VERSIONS[number] for number in launched] == [version]
    assert_close([found], [ops.conv2d(*arrays, **arguments).numpy()], 2e-5)


@pytest.fixture
def launches(monkeypatch):
    """What was launched so far: (name, numbers, arrays)."""
    found = []
    real = cuda.launch

    def launch(name, numbers, arrays, written):
        found.append((name, numbers, arrays))
        real(name, numbers, arrays, written)

    monkeypatch.setattr(cuda, "launch", launch)
    return found


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("bias", [None, (6,), (2, 6)])
def test_bias_residual_and_activation_are_the_kernels_epilogue(launching, launches, activation, bias):
    """One launch forward, whether or not a gradient will be asked for, and one for each gradient; second ones agree too."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in ((2, 5, 4, 5), (3, 3, 5, 6), bias, (2, 5, 4, 6)) if shape]
    slope = rng.standard_normal((2, 5, 4, 6))

    def call(device, dtype=np.float64):
        x, w, *b, residual = leaves = [td.tensor(a, True, dtype, device) for a in arrays]
        return leaves, ops.conv2d(x, w, b[0] if b else None, padding=1, residual=residual, activation=activation)

    results = {}
    for device in ("cpu", launching):
        leaves, y = call(device)
        first = td.grad(y, leaves, td.tensor(slope, device=device))
        directions = [cuda.convrule.DIRECTIONS[numbers[1]] for _, numbers, _ in launches]
        assert directions == ([] if device == "cpu" else ["forward", "input_grad", "weight_grad"])
        leaves, again = call(device)
        gradients = td.grad(again, leaves, td.tensor(slope, device=device), create_graph=True)
        second = td.grad(list(gradients[:2]), leaves[:2], [td.tensor(a, device=device) for a in arrays[:2]])
        results[device] = [t.numpy() for t in (y, *first, *second)]
    assert_close(results[launching], results["cpu"], 1e-12)

    launches.clear()
    with td.no_grad(), recorded_calls() as calls:
        _, y = call(launching, np.float32)
    assert [c[0].name for c in calls] == ["conv2d_activation"] and [name for name, *_ in launches] == ["conv2d"]
    assert_close([y.numpy()], [results["cpu"][0]], 2e-5)


def test_what_the_activation_was_applied_to_is_kept_for_silus_gradient_alone(launching, launches):
    x, w = (td.tensor(np.ones(shape, np.float32), True, device=launching) for shape in ((1, 4, 4, 2), (3, 3, 2, 2)))
    ops.conv2d(x, w, activation="silu")
    ops.conv2d(x, w, activation="relu")
    with td.no_grad():
        ops.conv2d(x, w, activation="silu")
    assert [arrays["before"] is not None for _, _, arrays in launches] == [True, False, False]


def test_tensor_cores_only_where_rounding_is_allowed(launching):
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 8, 8, 32), (3, 3, 32, 32)))
    exact = ops.conv2d(x.astype(np.float64), w.astype(np.float64), padding=1).numpy()
    errors = {}
    for name in cuda.PRECISIONS:
        with cuda.precision(name):
            found = ops.conv2d(td.tensor(x, device=launching), td.tensor(w, device=launching), padding=1).numpy()
        errors[name] = np.abs(found - exact).max() / np.abs(exact).max()
    assert errors["float32"] < 1e-5 < errors["tf32"] < 2e-3 < errors["bf16"] < 1e-2
    with pytest.raises(ValueError, match="use one of float32, tf32, bf16"), cuda.precision("fp8"):
        pass


def test_layouts_and_misaligned_slices(launching):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 6, 6, 9)).astype(np.float32), rng.standard_normal((3, 3, 8, 4)).astype(np.float32)
    there = td.tensor(x, device=launching), td.tensor(w, device=launching)
    expected = ops.conv2d(x[..., 1:], w, padding=1).numpy()
    assert_close([ops.conv2d(there[0][..., 1:], there[1], padding=1).numpy()], [expected], 1e-5)
    flat = module_of(launching).asarray(np.concatenate([[0], x[..., 1:].ravel()]).astype(np.float32))[1:]
    view = td.Tensor(flat.reshape(2, 6, 6, 8))
    assert view.data.flags.c_contiguous and view.data.data.ptr % 16 == 4
    assert_close([ops.conv2d(view, there[1], padding=1).numpy()], [expected], 1e-5)


def test_what_a_kernel_would_read_wrongly_is_refused():
    a = simarray.zeros((4, 6), np.float32)
    cuda.check(a=a, b=None, c=a[1:])
    for arrays, error, message in (
        ({"a": a[:, 1:]}, ValueError, r"a of shape \(4, 5\) is not C-contiguous; pass xp.ascontiguousarray\(a\)"),
        ({"a": a, "b": a.astype(np.float64)}, TypeError, "not a float32, b float64"),
        ({"a": a.astype(np.int32)}, TypeError, "int32"),
        ({"a": a, "b": np.zeros(3, np.float32)}, TypeError, "different devices can't be mixed"),
        ({"a": simarray.ndarray(np.zeros(17, np.uint8)[1:].view(np.float32))}, ValueError, "no multiple of 4 bytes"),
        ({"a": simarray.ndarray(np.broadcast_to(np.float32(0), (2**16, 2**15)))}, ValueError, "not C-contiguous"),
    ):
        with pytest.raises(error, match=message):
            cuda.check(**arrays)


def test_more_elements_than_indices_are_refused(monkeypatch):
    monkeypatch.setattr(cuda, "LARGEST", 23)
    with pytest.raises(ValueError, match="24 elements, more than 32 bits index; split the batch"):
        cuda.check(a=simarray.zeros((4, 6), np.float32))


def test_arrays_without_memory_or_of_another_gpu_are_refused(monkeypatch):
    a = simarray.zeros((4, 6), np.float32)
    with monkeypatch.context() as patch:
        patch.setattr(simarray.ndarray, "data", property(lambda self: simarray.MemoryPointer(0)))
        with pytest.raises(ValueError, match=r"a of shape \(4, 6\) has no memory: it was freed"):
            cuda.check(a=a)
        cuda.check(a=simarray.zeros((0, 6), np.float32))  # what is empty needs none
    with monkeypatch.context() as patch:
        patch.setattr(simarray.ndarray, "device", property(lambda self: simarray.Device(1)))
        with pytest.raises(TypeError, match="a is on GPU 1, and the current one is 0; move it there"):
            cuda.check(a=a)


@pytest.mark.parametrize(
    ("shape", "kernel", "arguments", "message"),
    [
        ((1, 2, 2, 1), (1, 1, 1, 2), {"padding": 30_000, "stride": 20_000}, r"x, padded, of shape \(1, 60002, 60002, 1\)"),
        ((1, 2, 2**20, 1), (1, 1, 1, 2**10), {}, r"the result, with the kernel's border, of shape \(1, 3, 1048577, 1024\)"),
    ],
)
def test_sizes_past_32_bits_are_refused_before_anything_is_allocated(built, monkeypatch, shape, kernel, arguments, message):
    x, w = (td.tensor(np.ones(s, np.float32), device="cudasim") for s in (shape, kernel))
    monkeypatch.setattr(simarray, "empty", None)
    with pytest.raises(ValueError, match=message + " has .* elements, more than 32 bits index; split the batch"):
        ops.conv2d(x, w, **arguments)


def test_too_little_memory_is_one_sentence(built, monkeypatch):
    x, w = (td.tensor(np.ones(s, np.float32), device="cudasim") for s in ((1, 4, 4, 64), (3, 3, 64, 64)))
    real = simarray.empty

    def refuse(smallest):
        def empty(shape, dtype=float):
            if np.prod(shape) >= smallest:
                raise MemoryError("Out of memory allocating 9 bytes")
            return real(shape, dtype)

        return empty

    for smallest, name in ((1, "y, 0 MB"), (10_000, "the workspace of wino_f2, 0 MB")):
        with monkeypatch.context() as patch:
            patch.setattr(simarray, "empty", refuse(smallest))
            message = rf"no room on the GPU for {name} \(Out of memory allocating 9 bytes\); use a smaller batch"
            with pytest.raises(MemoryError, match=message):
                ops.conv2d(x, w, padding=1)
    ops.conv2d(x, w, padding=1)


def test_a_kernel_that_leaves_its_arrays_is_an_error_not_a_crash(built):
    x, w, y = (simarray.zeros(shape, np.float32) for shape in ((1, 4, 4, 2), (3, 3, 2, 2), (1, 4, 4, 2)))
    size = [0, 0, 0, 1, 4, 4, 2, 2, 3, 3, 4, 4, 1, 1, 1, 1, 0, 0, 0]
    arrays = {"bias": None, "residual": None, "before": None, "x": x, "weight": w, "y": y[:, :3]}
    arrays["workspace"] = simarray.zeros(1, np.float32)
    cuda.launch("conv2d", size, arrays | {"y": y}, ["y", "workspace"])
    with pytest.raises(KernelError, match=r"bounds.* y"):
        cuda.launch("conv2d", size, arrays, ["y", "workspace"])
    with pytest.raises(RuntimeError, match="conv2d: this version of the kernel can't do that problem"):
        cuda.launch("conv2d", [99, *size[1:]], arrays | {"y": y}, ["y", "workspace"])


def test_definitions_run_where_the_simulator_is_switched_off(built):
    x, w = (td.tensor(np.ones(shape, np.float32), device="cudasim") for shape in ((1, 4, 4, 2), (3, 3, 2, 2)))
    with cuda.simulated(False), recorded_calls() as calls:
        ops.conv2d(x, w)
    assert [c.who for c in calls] == ["definition"]


def test_a_unet_trains_through_the_simulated_kernels(built):
    losses = {}
    for device in ("cpu", "cudasim"):
        td.manual_seed(0)
        model = td.models.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
        ).to(device)
        rng = np.random.default_rng(0)
        optimizer, losses[device] = td.optim.AdamW(model.parameters(), 1e-2), []
        with recorded_calls() as calls:
            for _ in range(3):
                x, target = (td.tensor(rng.standard_normal((2, 8, 8, 1)), False, np.float32, device) for _ in range(2))
                loss = ops.mse_loss(model(x, np.array([3.0, 500.0])), target)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[device].append(loss.item())
        if device == "cudasim":
            assert {c.who for c in calls if c[0].name in CONVOLUTIONS} == {"cuda"}
    assert losses["cudasim"] == pytest.approx(losses["cpu"], rel=1e-3)
    assert losses["cpu"][0] != losses["cpu"][1]


# The build.


def test_what_has_not_changed_is_not_compiled_again(built):
    done = setup("build_ext", "--build-lib", built, "--build-temp", built / "objects", TINYDIFF_CUDA="0")
    assert done.returncode == 0
    assert " -shared " in done.stdout and " -c " not in done.stdout


@pytest.fixture(scope="module")
def script():
    """setup.py as a module: its functions, with nothing built."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_what_includes_a_changed_header_is_compiled_again(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("inner.h").write_text("const int number = 1;")
    Path("outer.h").write_text('#include "inner.h"\n')
    Path("one.cpp").write_text('#include "outer.h"\n')
    Path("other.cpp").write_text("int other() { return 2; }\n")
    jobs = [(["g++"], Path("one.cpp")), (["g++"], Path("other.cpp"))]
    before = script.compile_all(jobs, tmp_path / "objects")
    assert script.compile_all(jobs, tmp_path / "objects") == before and len(list((tmp_path / "objects").iterdir())) == 2
    Path("inner.h").write_text("const int number = 2;")
    after = script.compile_all(jobs, tmp_path / "objects")
    assert after[0] != before[0] and after[1] == before[1]
    assert script.compile_all([(["g++", "-O1"], Path("other.cpp"))], tmp_path / "objects")[0] != after[1]


@pytest.mark.parametrize(("processors", "gigabytes", "expected"), [(8, 64, 8), (8, 3, 3), (8, 0.5, 1), (1, 64, 1)])
def test_no_more_compilers_at_once_than_processors_and_memory_allow(script, monkeypatch, processors, gigabytes, expected):
    pages = {"SC_AVPHYS_PAGES": int(gigabytes * 2**18), "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(script.os, "sysconf", pages.get)
    monkeypatch.setattr(script.os, "sched_getaffinity", lambda _: range(processors))
    assert script.workers() == expected


def test_one_architecture_by_default_and_all_on_request(script, tmp_path, monkeypatch):
    monkeypatch.delenv("TINYDIFF_CUDA_ARCH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script.architectures() == ["80"]
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 8.9\necho 9.0\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
    assert script.architectures() == ["89"]
    for asked, expected in (("80,90", ["80", "90"]), ("all", ["75", "80", "86", "89", "90", "100", "120"])):
        monkeypatch.setenv("TINYDIFF_CUDA_ARCH", asked)
        assert script.architectures() == expected
    monkeypatch.setenv("TINYDIFF_CUDA_ARCH", "hopper")
    with pytest.raises(SystemExit, match="TINYDIFF_CUDA_ARCH=hopper: use 80, or 80,90, or all"):
        script.architectures()


def test_without_compilers_the_record_says_why(tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    done = setup(
        "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "objects", PATH=str(empty), TINYDIFF_CUDA="auto"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "tinydiff" / "build.json").read_text())
    assert {name: entry["built"] for name, entry in record.items()} == {"tinydiff._cudasim": False, "tinydiff._cuda": False}
    assert "g++ is not on the PATH" in record["tinydiff._cudasim"]["why"]
    assert "nvcc is not on the PATH" in record["tinydiff._cuda"]["why"]
    done = setup("build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "objects", PATH=str(empty), TINYDIFF_CUDA="1")
    assert done.returncode and "TINYDIFF_CUDA=1, but nvcc is not on the PATH" in done.stderr


def test_a_compiler_that_fails_is_no_error_either(tmp_path):
    done = setup("build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "objects", CXX="false", TINYDIFF_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "false failed" in json.loads((tmp_path / "tinydiff" / "build.json").read_text())["tinydiff._cudasim"]["why"]


def test_the_sdist_holds_every_source(tmp_path):
    done = setup("-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    needed = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cu", ".cpp"}}
    assert {"csrc/launch.h", "csrc/sim/sim.h", "csrc/bindings.cpp"} <= needed <= inside
    assert {"setup.py", "tests/catalogue.py", "tests/cudacheck/example.cu", "benchmarks/harness.py"} <= inside


def test_without_a_driver_the_error_is_cudas_sentence():
    """Of the extension that nvcc built, where it was built and there is no GPU: its import and its launches return."""
    module = pytest.importorskip("tinydiff._cuda")
    try:
        backend.check_device("cuda")
    except RuntimeError:
        code = module.softmax(0, 1, 1, 0, 0, 0, 0)
        assert code > 0 and "CUDA" in module.error_message(code)
        with pytest.raises(TypeError, match="incompatible function arguments"):
            module.softmax("x")
    else:
        pytest.skip("there is a GPU")
