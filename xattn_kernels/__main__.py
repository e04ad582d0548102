"""`python -m xattn_kernels`: versions, devices, and which backends can run on each device."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import __version__
from .core.dispatch import explain
from .cuda_kernels import launch
from .ops.attention_weights import attention_weights
from .ops.cross_attention import cross_attention
from .ops.gated_residual import gated_residual
from .ops.topk_attention import topk_attention

# The variables that the dispatch reads; they are shown when set, as they change the choice.
SWITCHES = ("TRITON_INTERPRET", "XATTN_TRITON_ON_CPU", "XATTN_CUDA_ON_CPU")
# the arguments of a plain call of each op
CALLS = {
    cross_attention: lambda t: (t, t, t),
    attention_weights: lambda t: (t, t),
    topk_attention: lambda t: (t, t, t, 1),
    gated_residual: lambda t: (t, t, t.new_zeros(1)),
}
GIB = 2**30


def versions() -> list[str]:
    """One line for each part of the software."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    if torch.version.hip:
        built_for = f"HIP {torch.version.hip}"
    return [
        f"xattn-kernels {__version__}  ({Path(__file__).parent})",
        f"python        {platform.python_version()}  ({platform.platform()})",
        f"torch         {torch.__version__}  ({built_for})",
        f"triton        {triton}",
        f"CUDA kernels  {cuda_kernels()}",
        *(f"{name}={os.environ[name]}" for name in SWITCHES if name in os.environ),
    ]


def cuda_kernels() -> str:
    """What the CUDA kernels were compiled with and for, or why they are missing."""
    if (_cuda := launch.extension()) is None:
        return "; ".join(launch.MISSING_EXTENSION)
    major, minor = divmod(_cuda.CUDA_VERSION // 10, 100)
    oldest = "{}.{}".format(*divmod(_cuda.OLDEST_ARCH, 10))
    return f"of CUDA {major}.{minor}, for compute capability {oldest} and later"


def devices() -> list[tuple[torch.device, str]]:
    """Each device that torch sees, with a description of it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    vectors = torch.backends.cpu.get_cpu_capability()
    cpu = f"{platform.machine()} {vectors}, {torch.get_num_threads()} threads, {memory:.1f} GiB"
    described = [(torch.device("cpu"), cpu)]
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        capability = f"capability {p.major}.{p.minor}"
        gpu = f"{p.name}, {capability}, {p.multi_processor_count} SMs"
        described.append((torch.device("cuda", index), f"{gpu}, {p.total_memory / GIB:.1f} GiB"))
    return described


def explain_on(device: torch.device) -> None:
    """Prints for each op which backends can run a plain call on `device`."""
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    t = torch.zeros(1, 1, 1, 64, dtype=dtype, device=device)
    for op, arguments in CALLS.items():
        explain(op, *arguments(t))


def main() -> None:
    print(*versions(), sep="\n")
    for device, description in devices():
        print(f"\n{device}: {description}")
        explain_on(device)


if __name__ == "__main__":
    main()
