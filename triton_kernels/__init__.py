"""Triton kernels and their launchers: plain tensors and numbers in, plain tensors out."""
