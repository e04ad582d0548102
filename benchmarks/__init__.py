"""Benchmarks of cross-attention: real models' shapes, every provider that can, right before fast.

    python -m benchmarks run     any workloads, providers, modes, device, dtype within a time budget
    python -m benchmarks main    an interleaved document of real photographs and real text
    python -m benchmarks warm    compile everything in parallel, time nothing

Each suite has a folder of `workloads` (shapes), cases (workloads with tensors) and `providers`,
which compute them. What suites share is in `harness`: `truth` holds results against float64,
`timing` and `memory` measure, `rows` are what is kept, `plots` draws them.
"""
