"""The install needs no compiler: everything on the CPU is Python, compiled by Numba on first use."""

from setuptools import setup

setup()
