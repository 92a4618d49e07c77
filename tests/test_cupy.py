"""What the package asks of CuPy, checked without a GPU: every function, keyword and method that it uses exists there."""

import ast
import inspect
import types
from pathlib import Path

import numpy as np
import pytest

import tinydiff
from tinydiff import simarray
from tinydiff.kernels import gpu

cupy = pytest.importorskip("cupy")
PACKAGE = Path(tinydiff.__file__).parent
MODULES = {"array_module", "module_of"}  # functions that return an array module
# Keywords that CuPy documents and its signatures don't show.
SPECIAL = {
    "pad": {"constant_values"},
    "einsum": {"optimize"},
    "ElementwiseKernel": {"preamble"},
    "ReductionKernel": {"reduce_type", "preamble"},
}


def is_array_module(node):
    return (isinstance(node, ast.Name) and node.id == "xp") or (
        isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", None)) in MODULES
    )


def uses():
    """{(dotted name, keyword or None)}: what sources take from an array module."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Attribute) and is_array_module(node.value)) or node.attr.startswith("__"):
                continue
            name, outer = node.attr, parents[node]
            while isinstance(outer, ast.Attribute) and outer.value is node:
                name, node, outer = f"{name}.{outer.attr}", outer, parents[outer]
            keywords = [k.arg for k in outer.keywords] if isinstance(outer, ast.Call) and outer.func is node else []
            for keyword in [None, *keywords]:
                found.setdefault((name, keyword), f"{path.name}:{node.lineno}")
    return found


USES = uses()


def resolve(name):
    value = cupy
    for part in name.split("."):
        value = getattr(value, part)
    return value


def positional(function):
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def test_the_search_finds_what_is_there():
    assert {("zeros", None), ("sum", "keepdims"), ("pad", "constant_values"), ("add.at", None), ("cuda.Device", None)} <= {*USES}
    assert len(USES) > 70


@pytest.mark.parametrize(("name", "keyword"), sorted(USES, key=str), ids=str)
def test_what_is_used_exists_in_cupy(name, keyword):
    function = resolve(name)
    if keyword is None or keyword in SPECIAL.get(name, ()):
        return
    if isinstance(function, cupy.ufunc):
        assert keyword in ("out", "dtype")
    else:
        assert keyword in inspect.signature(function).parameters


@pytest.mark.parametrize("name", sorted({name for name, _ in USES}))
def test_arguments_come_in_numpys_order(name):
    """Where both have a signature, CuPy's leading parameters are NumPy's, so that what is given by position means the same."""
    function, ours = resolve(name), getattr(np, name, None)
    if "." in name or not isinstance(function, types.FunctionType) or not callable(ours):
        return
    try:
        expected = [
            p.name for p in inspect.signature(ours).parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    except ValueError:  # written in C, without one
        return
    found = [
        p.name for p in inspect.signature(function).parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    given = 3 if name in ("where", "take", "clip") else 2
    renamed = {"arr": "a", "arrays": "tup", "m": "a", "ary": "a", "object": "obj", "start_or_stop": "start"}
    normal = lambda names: [renamed.get(n, n) for n in names[:given]]  # noqa: E731
    shared = min(len(expected), len(found), given)
    assert normal(found)[:shared] == normal(expected)[:shared]


def test_the_simulated_module_has_nothing_that_cupy_lacks():
    """So whatever runs on cudasim (every op, training, drawing) calls no function or method that CuPy has not."""
    ours = {"ALIGNMENT", "Copy", "Device", "Flags", "MemoryPointer", "recorded_copies", "erf"}
    public = {
        name
        for name, value in vars(simarray).items()
        if not name.startswith("_") and name not in ours and not isinstance(value, types.ModuleType)
        if getattr(value, "__module__", "").startswith("tinydiff") or isinstance(value, simarray._Function)
    }
    assert {"zeros", "matmul", "ndarray", "clip", "ogrid"} <= public
    assert [name for name in sorted(public) if not hasattr(cupy, name)] == []
    methods = {name for name in vars(simarray.ndarray) if not name.startswith("_")}
    assert [name for name in sorted(methods) if not hasattr(cupy.ndarray, name)] == []
    operators = {name for name in vars(simarray.ndarray) if name.startswith("__") and callable(getattr(simarray.ndarray, name))}
    assert operators - {"__dir__"} <= {*dir(cupy.ndarray), "__init__"}
    from cupyx.scipy import special

    assert isinstance(special.erf, cupy.ufunc)


HEADERS = "#include <cupy/complex.cuh>\n#include <cupy/carray.cuh>\n#include <cupy/math_constants.h>\n"


def kernel_source(name, dtype):
    """The code that CuPy makes of a kernel: arrays as CArray, the body in a loop over elements; of a sum, a thread's part."""
    kernel = gpu._kernel(cupy, name)
    sums = isinstance(kernel, cupy.ReductionKernel)
    declared, inputs, outputs = [], [], []
    for k, p in enumerate([*kernel.in_params, *kernel.out_params]):
        const, element, at = "const " if k < kernel.nin else "", p.ctype, "_ind.get()"  # of the type T or S, or its own
        result = sums and k >= kernel.nin
        if p.dtype is not None and not p.raw and not result:
            declared.append(f"{const}{element} {p.name}")
            continue
        declared.append(f"{const}CArray<{element}, 1, 1, 1> {'' if p.raw else 'all_'}{p.name}")
        if not p.raw:
            at = "blockIdx.x" if result else at
            (outputs if result else inputs).append(f"{const}{element}& {p.name} = all_{p.name}[{at}];")
    each = f"const {kernel.reduce_type} b = {kernel.map_expr}; a = {kernel.reduce_expr}" if sums else kernel.operation
    body = f"CUPY_FOR(i, _ind.size()) {{ _ind.set(i); {' '.join(inputs)} {each}; }}"
    if sums:
        body = f"{kernel.reduce_type} a = {kernel.identity}; {body} {' '.join(outputs)} {kernel.post_map_expr};"
    signature = f'extern "C" __global__ void {name}({", ".join(declared)}, CIndexer<1> _ind)'
    return f"{HEADERS}typedef {dtype} T;\ntypedef long long S;\n{kernel.preamble}\n{signature} {{ {body} }}"


def compile_by_nvrtc(source, architecture):
    """Machine code. Raises RuntimeError with what the compiler said."""
    from cupy.cuda import nvrtc

    folder = Path(cupy.__file__).parent / "_core" / "include"
    runtime = [str(path) for path in Path(cupy.__file__).parent.parent.glob("nvidia/cu13/include")]
    options = [f"-arch=sm_{architecture}", "--std=c++17", "--device-as-default-execution-space"]
    options += [f"-I{path}" for path in [folder, *sorted(folder.glob("cupy/_cccl/*")), *runtime]]
    program = nvrtc.createProgram(source, "kernel.cu", (), ())
    try:
        nvrtc.compileProgram(program, tuple(options))
    except nvrtc.NVRTCError as error:
        raise RuntimeError(nvrtc.getProgramLog(program)) from error
    return nvrtc.getCUBIN(program)


@pytest.fixture(scope="module")
def nvrtc():
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except Exception as error:  # the library is a package of its own
        pytest.skip(f"no NVRTC here: {error}")


@pytest.mark.parametrize("dtype", ["float", "double"])
@pytest.mark.parametrize("name", [*gpu.BODIES, *gpu.SUMS])
def test_kernels_compile_without_a_gpu(nvrtc, name, dtype):
    assert name.encode() in compile_by_nvrtc(kernel_source(name, dtype), "80")


def test_a_kernel_that_is_no_cuda_is_noticed(nvrtc, monkeypatch):
    monkeypatch.setitem(gpu.BODIES, "wrong", gpu.Body("T x", "T y", "y = nonsense(x)"))
    with pytest.raises(RuntimeError, match="nonsense"):
        compile_by_nvrtc(kernel_source("wrong", "float"), "80")


def test_no_gpu_is_one_sentence():
    try:
        if cupy.cuda.runtime.getDeviceCount():
            pytest.skip("there is one")
    except cupy.cuda.runtime.CUDARuntimeError:
        pass
    with pytest.raises(RuntimeError, match=r"needs an NVIDIA GPU and its driver|the driver finds none"):
        tinydiff.tensor([1.0], device="cuda")
