"""Code shared by the kernels of all operators."""
