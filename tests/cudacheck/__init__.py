"""The checks of the CUDA kernels: `python -m tests.cudacheck`.

A kernel family (families/*.py) says which problems it solves and what the answers are; the frame combines the problems with
alignments, schedules and copies pairwise, runs each on the simulator, and then switches off every barrier, wait, predicate
and guard in turn (MUTANT in csrc/), for each of which some check must fail.
"""
