"""Triton kernels and their launchers; importing this package imports triton."""

from tileloss.kernels.passes import TritonPasses

__all__ = ["TritonPasses"]
