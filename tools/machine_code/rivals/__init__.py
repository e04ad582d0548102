"""Other Triton kernels for the same operation, compiled and counted as ours are.

    python -m tools.machine_code.rivals --arch 80 90 --out benchmarks/results/static

`textbook` is the algorithm with nothing around it, `flex` what torch.compile makes of
FlexAttention, `compare` counts both and ours.
"""
