"""Launchers of the CUDA kernels in csrc/: plain tensors and numbers in, plain tensors out."""
