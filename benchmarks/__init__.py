"""Benchmarks of cross-attention in the shapes of real models, of results that were checked first.

    python -m benchmarks run     any workloads, providers, modes, device, dtype within a time budget
    python -m benchmarks main    an interleaved document of real photographs and real text
    python -m benchmarks warm    compile everything in parallel, time nothing

Each suite has a folder of `workloads` (shapes), cases (workloads with tensors) and `providers`,
which compute them. The suites share `harness`, which imports none of them: `truth` compares results
with float64, `timing` and `memory` measure, `rows` are the records, `plots` draws them.
"""
