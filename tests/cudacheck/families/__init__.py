"""One module for each group of kernels; each lists its FAMILIES."""
