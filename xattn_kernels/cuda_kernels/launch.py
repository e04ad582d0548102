"""The compiled extension: its import, pointers of tensors, and launches."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def load() -> tuple[ModuleType | None, list[str]]:
    """`xattn_kernels._cuda`, or None and the reason why it cannot be imported."""
    try:
        return import_module("xattn_kernels._cuda"), []
    except ImportError as error:  # If the file exists, the message is the loader's.
        if isinstance(error, ModuleNotFoundError) and error.name == "xattn_kernels._cuda":
            return None, ["this build of xattn-kernels has no CUDA kernels (see XATTN_BUILD_CUDA)"]
        return None, [f"the CUDA kernels of this build do not load: {error}"]


EXTENSION, MISSING_EXTENSION = load()  # A trace of torch.compile cannot import it.


def extension() -> ModuleType | None:
    return EXTENSION


def device_reasons(device: torch.device) -> list[str]:
    """Why the CUDA kernels cannot run on tensors of `device`."""
    on_cpu = device.type == "cpu" and os.environ.get("XATTN_CUDA_ON_CPU") == "1"
    if device.type != "cuda" and not on_cpu:
        return [f"tensors are on {device.type}, CUDA kernels need a GPU"]
    if torch.version.hip is not None:
        return ["this is a ROCm build of torch"]
    if MISSING_EXTENSION or on_cpu:
        return list(MISSING_EXTENSION)
    return build_reasons(*torch.cuda.get_device_capability(device))


@torch.compiler.assume_constant_result  # The result depends on the machine only.
def build_reasons(major: int, minor: int) -> list[str]:
    """Why this build has no code for a device of this capability, or for its driver."""
    reasons, _cuda = [], extension()
    oldest = divmod(_cuda.OLDEST_ARCH, 10)
    if (major, minor) < oldest:
        text = "compute capability {}.{} < {}.{}, the oldest of this build (XATTN_CUDA_ARCHS)"
        reasons.append(text.format(major, minor, *oldest))
    driver, built = driver_version(), _cuda.CUDA_VERSION
    if driver // 1000 < built // 1000:
        versions = (driver // 1000, driver % 1000 // 10, built // 1000, built % 1000 // 10)
        reasons.append("the driver is for CUDA {}.{}, this build for {}.{}".format(*versions))
    return reasons


@cache
def driver_version() -> int:
    return extension().driver_version()


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def submit(op: str, params: Any, device: torch.device) -> None:
    """Launches an op on the current stream that torch has for `device`."""
    stream = torch.cuda.current_stream(device)
    getattr(extension(), op)(params, stream.device_index, stream.cuda_stream)


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # Plans without a device are made for an H200.
    return torch.cuda.get_device_properties(device).multi_processor_count


def splits(choose: Callable[[Any, int], Any], call: Any, device: torch.device) -> Any:
    """The number of blocks that share a loop, as `choose` suggests it for this device."""
    return choose(call, multiprocessors(device))


def numbers(t: Tensor | None) -> Any:
    """The struct of contiguous numbers of any of the dtypes, or of None."""
    if t is None:
        return extension().Numbers()
    dtype = getattr(extension().DType, DTYPES[t.dtype])
    return extension().Numbers(data=pointer(t), dtype=dtype)
