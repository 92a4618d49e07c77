"""What the package asks of CuPy, checked without a GPU: every function, keyword and method that it uses exists there."""

import ast
import inspect
import types
from pathlib import Path

import numpy as np
import pytest

import tinydiff
from tinydiff import simarray

cupy = pytest.importorskip("cupy")
PACKAGE = Path(tinydiff.__file__).parent
MODULES = {"array_module", "module_of"}  # functions that return an array module
SPECIAL = {"pad": {"constant_values"}, "einsum": {"optimize"}}  # keywords behind a **kwargs of CuPy's, documented there


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
    renamed = {"arr": "a", "arrays": "tup", "m": "a", "ary": "a", "object": "obj"}
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


def test_no_gpu_is_one_sentence():
    try:
        if cupy.cuda.runtime.getDeviceCount():
            pytest.skip("there is one")
    except cupy.cuda.runtime.CUDARuntimeError:
        pass
    with pytest.raises(RuntimeError, match=r"needs an NVIDIA GPU and its driver|the driver finds none"):
        tinydiff.tensor([1.0], device="cuda")
