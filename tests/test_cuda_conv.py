"""The CUDA convolutions of csrc/, run on the simulator against the engine's definitions in double precision."""

import ctypes
import itertools
import shutil

import numpy as np
import pytest

from tinydiff.cudasim import Memory, Simulator, build
from tinydiff.ops import conv as definitions

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

FORWARD, INPUT_GRAD, WEIGHT_GRAD = range(3)
FLOAT32, FLOAT64, TF32, BF16 = range(4)
VERSIONS = ["direct", "igemm_simt", "igemm_simt_64", "igemm_async", "igemm_async_64", "igemm_tc", "igemm_tc_64"]  # enum Version
PRECISIONS = {"direct": [FLOAT32, FLOAT64], "igemm_simt": [FLOAT32], "igemm_simt_64": [FLOAT32, FLOAT64]}
PRECISIONS |= {"igemm_async": [FLOAT32], "igemm_async_64": [FLOAT32], "igemm_tc": [TF32, BF16], "igemm_tc_64": [TF32, BF16]}
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


def convolve(simulator, version, direction, precision, x, w, y, stride, padding, split=0, bias=None, residual=None, act=None):
    """Run one direction; the array it writes gives only its shape. Returns the launcher's code and the result."""
    (top, _), (left, _) = padding
    (n, h, v, c), (kh, kw, _, o), (_, p, q, _) = x.shape, w.shape, y.shape
    size = [VERSIONS.index(version), direction, precision, n, h, v, c, o, kh, kw, p, q, *stride, top, left, split]
    library = simulator.library
    library.conv2d_workspace.restype = ctypes.c_int64
    scratch = np.zeros(library.conv2d_workspace(*size) // 8 + 1)
    arrays = {"bias": bias, "residual": residual, "x": x, "w": w, "y": y, "workspace": scratch}
    written = NAMES[direction]
    memory = {}
    for name, array in arrays.items():
        if array is not None:
            fill = np.full_like(array, np.nan) if name in (written, "workspace") else array
            memory[name] = Memory(np.ascontiguousarray(fill))
    pointers = [ctypes.c_void_p(memory[name].pointer if name in memory else 0) for name in arrays]
    per_sample = int(bias is not None and bias.ndim == 2)
    with simulator.settings(), simulator.tracked([(k, m, k in (written, "workspace")) for k, m in memory.items()]):
        code = library.conv2d(*size, per_sample, list(ACTIVATIONS).index(act), *pointers, ctypes.c_size_t(0))
        assert [str(f) for f in simulator.findings()] == []
    assert {name: m.damage() for name, m in memory.items() if m.damage()} == {}
    return code, memory[written].array


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
    ((1, 9, 8), (7, 5), (3, 2), ((3, 2), (1, 3)), (2, 3)),
    ((2, 6, 6), (1, 1), (2, 2), ((0, 0), (0, 0)), (8, 4)),  # phases without a tap
    ((2, 9, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), (16, 132)),  # several blocks either way
    ((2, 9, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), (15, 67)),
]


def takes(version, precision, channels):
    multiple = MULTIPLES.get((version.removesuffix("_64"), precision), 1)
    return all(c % multiple == 0 for c in channels)


@pytest.mark.parametrize("shape", PROBLEMS)
@pytest.mark.parametrize("direction", [FORWARD, INPUT_GRAD, WEIGHT_GRAD])
@pytest.mark.parametrize(("version", "precision"), [(v, p) for v in VERSIONS for p in PRECISIONS[v]])
def test_convolutions_agree_with_the_definitions(simulator, version, precision, direction, shape):
    size, kernel, stride, padding, channels = shape
    x, w, y = problem(size, kernel, stride, padding, channels, np.float64 if precision == FLOAT64 else np.float32)
    answer = expected(direction, x, w, y, stride, padding)
    for split in (1, 3) if direction == WEIGHT_GRAD else (0,):
        code, result = convolve(simulator, version, direction, precision, x, w, y, stride, padding, split)
        if not takes(version, precision, channels):
            assert code == UNSUPPORTED
            continue
        assert code == 0
        np.testing.assert_allclose(result, answer, rtol=0, atol=TOLERANCE[precision] * np.abs(answer).max())


@pytest.mark.parametrize(("version", "precision"), [(v, p) for v in VERSIONS for p in range(4) if p not in PRECISIONS[v]])
def test_a_version_refuses_a_precision_it_has_not(simulator, version, precision):
    x, w, y = problem((1, 4, 4), (3, 3), (1, 1), ((1, 1), (1, 1)), (8, 8), np.float64 if precision == FLOAT64 else np.float32)
    assert convolve(simulator, version, FORWARD, precision, x, w, y, (1, 1), ((1, 1), (1, 1)))[0] == UNSUPPORTED


@pytest.mark.parametrize(("bias", "residual", "act"), list(itertools.product([None, 1, 2], [False, True], ACTIVATIONS)))
@pytest.mark.parametrize("version", VERSIONS)
def test_epilogues(simulator, version, bias, residual, act):
    size, kernel, stride, padding, _ = PROBLEMS[0]
    c, o = (8, 16) if version != "direct" else (5, 6)
    precision = PRECISIONS[version][0]
    x, w, y = problem(size, kernel, stride, padding, (c, o), np.float32)
    rng = np.random.default_rng(1)
    b = None if bias is None else rng.standard_normal((size[0], o)[-bias:]).astype(np.float32)
    r = rng.standard_normal(y.shape).astype(np.float32) if residual else None
    code, result = convolve(simulator, version, FORWARD, precision, x, w, y, stride, padding, bias=b, residual=r, act=act)
    answer = expected(FORWARD, x, w, y, stride, padding)
    answer = answer + (0 if b is None else b if b.ndim == 1 else b[:, None, None]) + (0 if r is None else r)
    assert code == 0
    np.testing.assert_allclose(result, ACTIVATIONS[act](answer), rtol=0, atol=TOLERANCE[precision] * np.abs(answer).max())
