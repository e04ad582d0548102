"""Copies of a step's numbers on the host, which arrive without anyone waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopies:
    """The named numbers of one step, copied from a GPU into pinned memory behind its work."""

    def __init__(self, step: int, tensors: dict[str, Tensor], most_keys: dict[str, int]) -> None:
        self.step, self.most_keys = step, most_keys
        by_device: dict[torch.device, dict[str, Tensor]] = {}
        for name, t in tensors.items():
            by_device.setdefault(t.device, {})[name] = t
        self.names = [name for same_device in by_device.values() for name in same_device]
        self.order = list(tensors)
        self.copies = [copy_to_host(list(group.values())) for group in by_device.values()]

    def arrived(self) -> bool:
        """Whether `values` would return without waiting."""
        return all(event is None or event.query() for _, event in self.copies)

    def values(self) -> dict[str, float]:
        """The numbers by name, in the order of the tensors; waits for those that are on the way."""
        numbers: list[float] = []
        for host, event in self.copies:
            if event is not None:
                event.synchronize()
            numbers += host.tolist()
        by_name = dict(zip(self.names, numbers, strict=True))
        return {name: by_name[name] for name in self.order}


def copy_to_host(tensors: list[Tensor]) -> tuple[Tensor, torch.cuda.Event | None]:
    """(the numbers as float32 on the host, an event after which they are valid, or None)."""
    numbers = torch.stack([t.detach().reshape(()).float() for t in tensors])
    if numbers.device.type != "cuda":
        return numbers.cpu(), None
    with torch.cuda.device(numbers.device):
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    return host, event
