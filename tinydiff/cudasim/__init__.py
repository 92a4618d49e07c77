"""CUDA kernels on a CPU: compile a .cu file with g++, run it on NumPy arrays, and hear of its races, divergent barriers and
accesses out of bounds, with their source lines.

    kernels = tinydiff.cudasim.compile("reverse.cu")
    kernels.reverse.check(x, y, grid=4, block=64, shared=256)

A kernel file includes csrc/launch.h and nothing else, and is CUDA under nvcc as it stands. Needs g++.
"""

from tinydiff.cudasim.build import CompileError
from tinydiff.cudasim.kernels import Kernel, Kernels, compile
from tinydiff.cudasim.simulator import SCHEDULES, Finding, KernelError, Memory, Requests, Simulator

__all__ = [
    "SCHEDULES",
    "CompileError",
    "Finding",
    "Kernel",
    "KernelError",
    "Kernels",
    "Memory",
    "Requests",
    "Simulator",
    "compile",
]
