"""Hypothesis draws the same examples every time, few of them and without a clock: a slow machine must not fail a test."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

import tinydiff.kernels.jit  # noqa: F401 (before any module's own njit: Numba settles how it compiles when it is first used)
from tinydiff import backend
from tinydiff.cudasim.build import cache_folder
from tinydiff.kernels import cuda

settings.register_profile("tinydiff", max_examples=25, deadline=None, derandomize=True, database=None)
settings.load_profile("tinydiff")


DEVICES = ["cudasim", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    """Each device beside the CPU; "cuda" where there is one."""
    try:
        return backend.check_device(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def launching(request, device):
    """The same, with the compiled kernels of csrc/."""
    if device == "cudasim":
        request.getfixturevalue("built")
    elif cuda.extension(device) is None:
        pytest.fail("there is a GPU, but no kernels for it: see tinydiff doctor")
    return device


@pytest.fixture(scope="module")
def built():
    """The folder of a _cudasim that setup.py has built from these sources; it stands in the place of an installed one."""
    folder = cache_folder() / "extension"
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder / "objects"]
    root, environment = Path(__file__).parent.parent, os.environ | {"TINYDIFF_CUDA": "0"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "tinydiff").glob("_cudasim*.so")
    spec = importlib.util.spec_from_file_location("tinydiff._cudasim", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = sys.modules.get("tinydiff._cudasim")
    sys.modules["tinydiff._cudasim"] = module
    cuda.extension.cache_clear()
    cuda._simulator.cache_clear()
    yield folder
    if before is None:
        del sys.modules["tinydiff._cudasim"]
    else:
        sys.modules["tinydiff._cudasim"] = before
    cuda.extension.cache_clear()
    cuda._simulator.cache_clear()
