"""Numbers on their way from the device, which nobody has to wait for."""

from __future__ import annotations

import torch
from torch import Tensor


class Pending:
    """The named numbers of one step; a GPU's are copied behind its work, into pinned memory."""

    def __init__(self, step: int, found: dict[str, Tensor], most_keys: dict[str, int]) -> None:
        self.step, self.most_keys = step, most_keys
        by_device: dict[torch.device, dict[str, Tensor]] = {}
        for name, t in found.items():
            by_device.setdefault(t.device, {})[name] = t
        self.names = [name for part in by_device.values() for name in part]
        self.order = list(found)
        self.copies = [copy_of(list(part.values())) for part in by_device.values()]

    def arrived(self) -> bool:
        """Whether reading the numbers would not wait."""
        return all(event is None or event.query() for _, event in self.copies)

    def values(self) -> dict[str, float]:
        """The numbers, waited for if need be."""
        numbers: list[float] = []
        for host, event in self.copies:
            if event is not None:
                event.synchronize()
            numbers += host.tolist()
        found = dict(zip(self.names, numbers, strict=True))
        return {name: found[name] for name in self.order}


def copy_of(tensors: list[Tensor]):
    """(the numbers on the host, an event after which they are there, or None)."""
    numbers = torch.stack([t.detach().reshape(()).float() for t in tensors])
    if numbers.device.type != "cuda":
        return numbers.cpu(), None
    with torch.cuda.device(numbers.device):
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    return host, event
