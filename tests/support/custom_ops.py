"""The custom ops that stand for launches under torch.compile, and what must hold for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xattn_kernels.core.kernel_op import KernelOp, present


class Recorder(TorchDispatchMode):
    """Keeps each call of a custom op of the package."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "xattn_kernels":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def launches(op: KernelOp, call: Any, backend: str, upstream: dict[str, Tensor]) -> list[tuple]:
    """(custom op, arguments) of a call and of its gradients, by those of its results."""
    values = [getattr(call, name) for name in op.names]
    leaves = [t for t in values if isinstance(t, Tensor) and t.requires_grad]
    with Recorder() as recorder:
        results = present(op.forward_op(*values, backend), op.Results)
        pairs = [
            (t, upstream[name])
            for name, t in results._asdict().items()
            if name in upstream and t is not None and t.requires_grad
        ]
        if pairs:
            outputs, gradients = map(list, zip(*pairs, strict=True))
            torch.autograd.grad(outputs, leaves, gradients)
    return recorder.calls


def check(calls: list[tuple]) -> None:
    """opcheck, and of each result the strides: a wrong one shows only after the compiler has relied
    on it."""
    for op, arguments in calls:
        plain = tuple(map(detached, arguments))
        torch.library.opcheck(op, plain)
        real = op(*plain)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = op(*(faked(mode, argument) for argument in plain))
        results = [(t,) if isinstance(t, Tensor) else t for t in (real, fake)]
        for a, b in zip(*results, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), op


def detached(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return type(argument)(map(detached, argument))
    return argument.detach() if isinstance(argument, Tensor) else argument


def faked(mode, argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return type(argument)(faked(mode, a) for a in argument)
    return mode.from_tensor(argument) if isinstance(argument, Tensor) else argument
