"""Other Triton kernels for the same operation, compiled and counted as ours are.

    python -m tools.machine_code.rivals --arch 80 90 --out benchmarks/results/static

`textbook` is the algorithm without any options, `flex` are the kernels that torch.compile generates
for FlexAttention, and `compare` counts both and ours.
"""
