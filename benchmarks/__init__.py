"""Benchmarks of cross-attention: real models' shapes, every provider that can, right before fast.

    python -m benchmarks run     any workloads, providers, modes, device, dtype within a time budget
    python -m benchmarks main    an interleaved document of real photographs and real text
    python -m benchmarks warm    compile everything in parallel, time nothing
    python -m benchmarks gpu     everything a machine with a GPU can prove, in ten minutes

`workloads` are shapes, a `case` is a workload with tensors, `providers` compute it, `check` holds
each against float64, `timing` and `memory` measure, `rows` are what is kept, `plots` draws them.
"""
