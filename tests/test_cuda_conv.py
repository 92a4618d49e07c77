"""The CUDA convolutions of csrc/, run on the simulator against the engine's definitions in double precision."""

import ctypes
import itertools
import shutil

import numpy as np
import pytest

import tinydiff as td
from tinydiff.cudasim import Memory, Simulator, build
from tinydiff.kernels import cuda
from tinydiff.kernels.convrule import DIRECTIONS, PRECISIONS, VERSIONS, ConvSize, choose
from tinydiff.kernels.convrule import takes as rule_takes
from tinydiff.ops import conv as definitions

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

FORWARD, INPUT_GRAD, WEIGHT_GRAD = range(3)
FLOAT32, FLOAT64, TF32, BF16 = range(4)
CAN = {  # the precisions of each version
    "direct": [FLOAT32, FLOAT64],
    "small_c": [FLOAT32, FLOAT64],
    "igemm_simt": [FLOAT32],
    "igemm_simt_64": [FLOAT32, FLOAT64],
    "igemm_async": [FLOAT32],
    "igemm_async_64": [FLOAT32],
    "igemm_tc": [TF32, BF16],
    "igemm_tc_64": [TF32, BF16],
    "wino_f2": [FLOAT32],
}
MULTIPLES = {("igemm_async", FLOAT32): 4, ("igemm_tc", TF32): 4, ("igemm_tc", BF16): 8}  # what c and o must be
UNSUPPORTED = -1
ACTIVATIONS = {None: lambda v: v, "silu": lambda v: v / (1 + np.exp(-v)), "relu": lambda v: np.maximum(v, 0)}
NAMES = {FORWARD: "y", INPUT_GRAD: "x", WEIGHT_GRAD: "w"}
TOLERANCE = {FLOAT32: 1e-5, FLOAT64: 1e-13, TF32: 2e-3, BF16: 1e-2}


@pytest.fixture(scope="module")
def simulator():
    folder = build.csrc()
    sources = ["conv2d.cu", *sorted({f"conv_{version.removesuffix('_64')}.cu" for version in VERSIONS})]
    return Simulator.load(build.link([build.kernel_object(folder / name, "fast") for name in sources], "fast"))


def convolve(
    simulator, version, direction, precision, x, w, y, stride, padding, split=0, bias=None, residual=None, act=None, before=None
):
    """Run one direction; the array it writes gives only its shape. Returns the launcher's code and the result.

    `before`, if given, is overwritten with what the activation is applied to.
    """
    (top, _), (left, _) = padding
    (n, h, v, c), (kh, kw, _, o), (_, p, q, _) = x.shape, w.shape, y.shape
    size = [VERSIONS.index(version), direction, precision, n, h, v, c, o, kh, kw, p, q, *stride, top, left, split]
    library = simulator.library
    library.conv2d_workspace.restype = ctypes.c_int64
    scratch = np.zeros(library.conv2d_workspace(*size) // 8 + 1)
    arrays = {"bias": bias, "residual": residual, "before": before, "x": x, "w": w, "y": y, "workspace": scratch}
    written = NAMES[direction], "before", "workspace"
    memory = {}
    for name, array in arrays.items():
        if array is not None:
            fill = np.full_like(array, np.nan) if name in written else array
            memory[name] = Memory(np.ascontiguousarray(fill))
    pointers = [ctypes.c_void_p(memory[name].pointer if name in memory else 0) for name in arrays]
    per_sample = int(bias is not None and bias.ndim == 2)
    with simulator.settings(), simulator.tracked([(k, m, k in written) for k, m in memory.items()]):
        code = library.conv2d(*size, per_sample, list(ACTIVATIONS).index(act), *pointers, ctypes.c_size_t(0))
        assert [str(f) for f in simulator.findings()] == []
    assert {name: m.damage() for name, m in memory.items() if m.damage()} == {}
    if before is not None:
        before[...] = memory["before"].array
    return code, memory[written[0]].array


def expected(direction, x, w, y, stride, padding):
    x, w, y = (np.asarray(a, np.float64) for a in (x, w, y))
    if direction == FORWARD:
        return definitions._conv2d.op.definition(np, x, w, stride=stride, padding=padding)
    if direction == INPUT_GRAD:
        return definitions._conv2d_input_grad.op.definition(np, y, w, input_size=x.shape[1:3], stride=stride, padding=padding)
    return definitions._conv2d_weight_grad.op.definition(np, x, y, kernel_size=w.shape[:2], stride=stride, padding=padding)


def problem(size, kernel, stride, padding, channels, dtype, seed=0):
    n, h, v = size
    c, o = channels
    p, q = definitions.output_size((h, v), kernel, stride, padding)
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in ((n, h, v, c), (*kernel, c, o), (n, p, q, o))]


PROBLEMS = [  # (n, h, w), kernel, stride, padding, (c, o)
    ((2, 5, 7), (3, 3), (1, 1), ((1, 1), (1, 1)), (5, 6)),
    ((1, 1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)), (3, 2)),
    ((1, 8, 9), (3, 2), (2, 3), ((0, 1), (2, 0)), (4, 8)),
    ((2, 7, 6), (3, 3), (1, 1), ((1, 0), (2, 1)), (3, 70)),
    ((3, 5, 5), (3, 3), (1, 1), ((0, 2), (1, 1)), (70, 3)),
    ((1, 9, 8), (7, 5), (3, 2), ((3, 2), (1, 3)), (2, 3)),
    ((2, 6, 6), (1, 1), (2, 2), ((0, 0), (0, 0)), (8, 4)),  # phases without a tap
    ((2, 9, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), (16, 132)),  # several blocks either way
    ((2, 7, 9), (3, 3), (2, 1), ((1, 0), (1, 2)), (8, 72)),
    ((2, 9, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), (15, 67)),
]


def takes(version, precision, direction, shape):
    _, kernel, stride, _, channels = shape
    if version == "wino_f2":
        return direction != WEIGHT_GRAD and kernel == (3, 3) and stride == (1, 1)
    if version == "small_c":
        shared = 48 * 1024 // (8 if precision == FLOAT64 else 4) // (kernel[0] * kernel[1])
        few_in, few_out = channels if direction == FORWARD else channels[::-1]
        fits = (few_in <= 4 and few_in * 64 <= shared) or (few_out <= 4 and few_in * few_out <= shared)
        return fits and (direction == FORWARD or (direction == INPUT_GRAD and stride == (1, 1)))
    multiple = MULTIPLES.get((version.removesuffix("_64"), precision), 1)
    return all(c % multiple == 0 for c in channels)


@pytest.mark.parametrize("shape", PROBLEMS)
@pytest.mark.parametrize("direction", [FORWARD, INPUT_GRAD, WEIGHT_GRAD])
@pytest.mark.parametrize(("version", "precision"), [(v, p) for v in VERSIONS for p in CAN[v]])
def test_convolutions_agree_with_the_definitions(simulator, version, precision, direction, shape):
    size, kernel, stride, padding, channels = shape
    x, w, y = problem(size, kernel, stride, padding, channels, np.float64 if precision == FLOAT64 else np.float32)
    answer = expected(direction, x, w, y, stride, padding)
    sizes = ConvSize(*x.shape, channels[1], *kernel, *y.shape[1:3], *stride, padding[0][0], padding[1][0])
    for split in (1, 3) if direction == WEIGHT_GRAD else (0,):
        code, result = convolve(simulator, version, direction, precision, x, w, y, stride, padding, split)
        assert rule_takes(version, DIRECTIONS[direction], sizes, PRECISIONS[precision], (8, 0), True) == (code == 0)
        if not takes(version, precision, direction, shape):
            assert code == UNSUPPORTED
            continue
        assert code == 0
        np.testing.assert_allclose(result, answer, rtol=0, atol=TOLERANCE[precision] * np.abs(answer).max())


@pytest.mark.parametrize("direction", [FORWARD, INPUT_GRAD, WEIGHT_GRAD])
@pytest.mark.parametrize(("version", "precision"), [(v, p) for v in VERSIONS for p in CAN[v]])
def test_the_packages_own_path_to_each_version(launching, version, precision, direction):
    """On a GPU all problems; on the simulator, where the test above has gone through them, one."""
    for shape in PROBLEMS if launching == "cuda" else PROBLEMS[7:8]:
        if not takes(version, precision, direction, shape):
            continue
        size, kernel, stride, padding, channels = shape
        x, w, y = problem(size, kernel, stride, padding, channels, np.float64 if precision == FLOAT64 else np.float32)
        there = {name: td.tensor(a, device=launching, dtype=a.dtype).data for name, a in (("x", x), ("w", w), ("y", y))}
        options = {"stride": stride, "padding": padding, "force": version}
        with cuda.precision("float32" if precision == FLOAT64 else PRECISIONS[precision]):
            if direction == FORWARD:
                found = cuda.conv2d(there["x"], there["w"], None, None, **options)
            elif direction == INPUT_GRAD:
                found = cuda.conv2d_input_grad(there["y"], there["w"], input_size=x.shape[1:3], **options)
            else:
                found = cuda.conv2d_weight_grad(there["x"], there["y"], kernel_size=kernel, **options)
        answer = expected(direction, x, w, y, stride, padding)
        np.testing.assert_allclose(found.get(), answer, rtol=0, atol=TOLERANCE[precision] * np.abs(answer).max())


@pytest.mark.parametrize(("version", "precision"), [(v, p) for v in VERSIONS for p in range(4) if p not in CAN[v]])
def test_a_version_refuses_a_precision_it_has_not(simulator, version, precision):
    x, w, y = problem((1, 4, 4), (3, 3), (1, 1), ((1, 1), (1, 1)), (8, 8), np.float64 if precision == FLOAT64 else np.float32)
    assert convolve(simulator, version, FORWARD, precision, x, w, y, (1, 1), ((1, 1), (1, 1)))[0] == UNSUPPORTED


@pytest.mark.parametrize(("bias", "residual", "act"), list(itertools.product([None, 1, 2], [False, True], ACTIVATIONS)))
@pytest.mark.parametrize("version", VERSIONS)
def test_epilogues(simulator, version, bias, residual, act):
    size, kernel, stride, padding, _ = PROBLEMS[0]
    c, o = (8, 16) if version.startswith("igemm") else (3, 6)
    precision = CAN[version][0]
    x, w, y = problem(size, kernel, stride, padding, (c, o), np.float32)
    rng = np.random.default_rng(1)
    b = None if bias is None else rng.standard_normal((size[0], o)[-bias:]).astype(np.float32)
    r = rng.standard_normal(y.shape).astype(np.float32) if residual else None
    before = np.zeros_like(y) if act else None
    code, result = convolve(simulator, version, FORWARD, precision, x, w, y, stride, padding, 0, b, r, act, before)
    answer = expected(FORWARD, x, w, y, stride, padding)
    answer = answer + (0 if b is None else b if b.ndim == 1 else b[:, None, None]) + (0 if r is None else r)
    assert code == 0
    tolerance = TOLERANCE[precision] * np.abs(answer).max()
    np.testing.assert_allclose(result, ACTIVATIONS[act](answer), rtol=0, atol=tolerance)
    if act:
        np.testing.assert_allclose(before, answer, rtol=0, atol=tolerance)


LEVEL = {"image": (1, 64, 64), "kernel": (3, 3), "stride": (1, 1), "channels": (64, 128), "batch": 8}


@pytest.mark.parametrize(
    ("changes", "direction", "precision", "capability", "aligned", "chosen"),
    [
        ({}, "forward", "float32", (8, 0), True, ("wino_f2", "float32")),
        ({}, "forward", "float32", (7, 5), False, ("wino_f2", "float32")),
        ({}, "weight_grad", "float32", (8, 0), True, ("igemm_async", "float32")),
        ({"channels": (32, 128)}, "forward", "float32", (8, 0), True, ("igemm_async", "float32")),
        ({"channels": (32, 128)}, "forward", "float32", (7, 5), True, ("igemm_simt", "float32")),
        ({"channels": (32, 128)}, "forward", "float32", (8, 0), False, ("igemm_simt", "float32")),
        ({"channels": (32, 130)}, "forward", "float32", (8, 0), True, ("igemm_simt", "float32")),
        ({"channels": (32, 64)}, "forward", "float32", (8, 0), True, ("igemm_async_64", "float32")),
        ({"channels": (32, 128), "batch": 1}, "forward", "float32", (8, 0), True, ("igemm_async_64", "float32")),
        ({"stride": (2, 2)}, "input_grad", "float32", (8, 0), True, ("igemm_async_64", "float32")),
        ({"stride": (2, 2), "channels": (128, 128)}, "input_grad", "float32", (8, 0), True, ("igemm_async", "float32")),
        ({}, "forward", "tf32", (8, 0), True, ("igemm_tc", "tf32")),
        ({}, "forward", "tf32", (7, 5), True, ("wino_f2", "float32")),
        ({"channels": (64, 132)}, "forward", "bf16", (9, 0), True, ("wino_f2", "float32")),
        ({"channels": (64, 136)}, "forward", "bf16", (9, 0), True, ("igemm_tc", "bf16")),
        ({}, "forward", "float64", (8, 0), True, ("igemm_simt_64", "float64")),
        ({"channels": (3, 64)}, "forward", "tf32", (8, 0), True, ("small_c", "float32")),
        ({"channels": (3, 64)}, "weight_grad", "float32", (8, 0), True, ("igemm_simt_64", "float32")),
        ({"channels": (64, 3)}, "input_grad", "float64", (8, 0), True, ("small_c", "float64")),
        ({"channels": (64, 4), "stride": (2, 2)}, "input_grad", "float32", (8, 0), True, ("igemm_async_64", "float32")),
        ({"channels": (2000, 1)}, "forward", "float32", (8, 0), True, ("igemm_simt_64", "float32")),
        ({"kernel": (3, 17)}, "forward", "tf32", (8, 0), True, ("direct", "float32")),
    ],
)
def test_the_rule(changes, direction, precision, capability, aligned, chosen):
    _, h, v = LEVEL["image"]
    kernel, stride, (c, o), n = ((LEVEL | changes)[name] for name in ("kernel", "stride", "channels", "batch"))
    p, q = definitions.output_size((h, v), kernel, stride, ((1, 1), (1, 1)))
    size = ConvSize(n, h, v, c, o, *kernel, p, q, *stride, 1, 1)
    assert choose(direction, size, precision, capability, aligned) == chosen


def test_what_the_rule_chooses_takes_the_problem(simulator):
    """Over problems of all kinds, and with few multiprocessors, so that large tiles are chosen for small problems too."""
    rng = np.random.default_rng(0)
    met = set()
    for _ in range(200):
        kernel = rng.choice([(1, 1), (3, 3), (3, 3), (5, 4), (17, 2)])
        stride = rng.choice([(1, 1), (1, 1), (2, 2), (3, 1)])
        c, o = rng.choice([1, 4, 7, 8, 72, 72, 72], 2)
        pad, (h, v) = 1 if max(kernel) < 17 else 8, rng.integers(2, 7, 2)
        direction, precision = int(rng.integers(3)), int(rng.integers(4))
        padding, stride, kernel = ((pad, pad), (pad, pad)), tuple(map(int, stride)), tuple(map(int, kernel))
        if min(h, v) + 2 * pad < max(kernel):
            continue
        x, w, y = problem(
            (1, int(h), int(v)), kernel, stride, padding, (int(c), int(o)), np.float64 if precision == FLOAT64 else np.float32
        )
        size = ConvSize(*x.shape, w.shape[3], *kernel, *y.shape[1:3], *stride, pad, pad)
        capability = ((7, 5), (8, 0))[rng.integers(2)]
        version, chosen = choose(DIRECTIONS[direction], size, PRECISIONS[precision], capability, True, multiprocessors=1)
        met.add(version)
        code, result = convolve(simulator, version, direction, PRECISIONS.index(chosen), x, w, y, stride, padding)
        assert code == 0
        answer = expected(direction, x, w, y, stride, padding)
        scale = max(1, np.abs(answer).max())
        np.testing.assert_allclose(result, answer, rtol=0, atol=TOLERANCE[PRECISIONS.index(chosen)] * scale)
    assert met == set(VERSIONS)
