"""Kernel families: one file each, with its maths, Triton kernels, launcher and operator registration."""
