"""Kernels that die on purpose in machines of their own, with the guard and without."""
