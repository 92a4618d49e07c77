"""Fast CPU kernels in Numba, by family. Nothing here is imported until an op first runs one."""
