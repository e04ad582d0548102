"""Launchers of the CUDA kernels in csrc/. They take tensors and numbers, and return tensors."""
