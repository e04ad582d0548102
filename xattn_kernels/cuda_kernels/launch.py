"""The compiled extension: whether it is there, pointers of tensors, and launches."""

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


@cache
def extension() -> ModuleType | None:
    """`xattn_kernels._cuda`, or None where the package was built without it."""
    try:
        return import_module("xattn_kernels._cuda")
    except ModuleNotFoundError as error:
        if error.name != "xattn_kernels._cuda":
            raise
        return None


def device_reasons(device: torch.device) -> list[str]:
    """Why the CUDA kernels cannot run on tensors of `device`."""
    if extension() is None:
        return ["this build of xattn-kernels has no CUDA kernels (see XATTN_BUILD_CUDA)"]
    if device.type == "cuda":
        if torch.version.hip is not None:
            return ["this is a ROCm build of torch"]
        return build_reasons(torch.cuda.get_device_capability(device))
    if device.type == "cpu" and os.environ.get("XATTN_CUDA_ON_CPU") == "1":
        return []
    return [f"tensors are on {device.type}, CUDA kernels need a GPU"]


@cache
def build_reasons(capability: tuple[int, int]) -> list[str]:
    """Why what was built has nothing for a device of this capability, or for its driver."""
    found, _cuda = [], extension()
    oldest = divmod(_cuda.OLDEST_ARCH, 10)
    if capability < oldest:
        text = "compute capability {}.{} < {}.{}, the oldest of this build (XATTN_CUDA_ARCHS)"
        found.append(text.format(*capability, *oldest))
    driver, built = _cuda.driver_version(), _cuda.CUDA_VERSION
    if driver // 1000 < built // 1000:
        versions = (driver // 1000, driver % 1000 // 10, built // 1000, built % 1000 // 10)
        found.append("the driver is for CUDA {}.{}, this build for {}.{}".format(*versions))
    return found


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def submit(op: str, params: Any, device: torch.device) -> None:
    """Launches on torch's current stream of `device`."""
    stream = torch.cuda.current_stream(device)
    getattr(extension(), op)(params, stream.device_index, stream.cuda_stream)


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # an H200's, of which plans without a device are made
    return torch.cuda.get_device_properties(device).multi_processor_count


def splits(choose: Callable[[Any, int], Any], call: Any, device: torch.device) -> Any:
    """What `choose` says of how many blocks share a loop, so that the device has work."""
    return choose(call, multiprocessors(device))


def numbers(t: Tensor | None) -> Any:
    """Neighbouring numbers of any of the dtypes."""
    if t is None:
        return extension().Numbers()
    return extension().Numbers(pointer(t), getattr(extension().DType, DTYPES[t.dtype]))
