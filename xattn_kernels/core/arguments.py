"""Checks of plain arguments, whose errors name the argument, what it was and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real

import torch
from torch import Tensor, nn


def check_number(name: str, value, allowed: str) -> float:
    """The number as a float, also of NumPy's and of torch's symbolic numbers."""
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be {allowed}, got {type(value).__name__} {value!r}")
    return float(value)  # Triton and autograd take no NumPy numbers


def check_positive(name: str, value: float) -> None:
    if not 0.0 < check_number(name, value, "a number") < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value}")


def check_sizes(**sizes: int) -> None:
    check_ints(sizes, 1)


def check_counts(**counts: int) -> None:
    check_ints(counts, 0)


def check_ints(ints: Mapping[str, int], least: int) -> None:
    for name, n in ints.items():
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"{name} must be an int, got {kind(n)}")
        if n < least:
            raise ValueError(f"{name} must be at least {least}, got {n}")


def check_bools(**flags: bool) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {kind(flag)}")


def check_choice(name: str, value, *allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_function(name: str, f, allowed: str = "a function") -> None:
    if not callable(f):
        raise TypeError(f"{name} must be {allowed}, got {kind(f)}")


def check_rule(name: str, rule) -> None:
    if rule is not None:
        check_function(name, rule, "a function or None")


def check_mapping(name: str, value, contents: str) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping of {contents}, got {kind(value)}")


def check_module(name: str, module) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {kind(module)}")


def check_several(name: str, items, item_type: type, what: str) -> list:
    """The items of an iterable as a list: at least one, all of `item_type`, which errors call
    `what`. The iterable may be a generator, which is read once."""
    if not isinstance(items, Iterable) or isinstance(items, (str, Tensor)):
        raise TypeError(f"{name} must be a list, each {what}, got {kind(items)}")
    items = list(items)
    if not items:
        raise ValueError(f"{name} must have at least one, each {what}, got none")
    for i, item in enumerate(items):
        if not isinstance(item, item_type):
            raise TypeError(f"{name}[{i}] must be {what}, got {kind(item)}")
    return items


def check_range(name: str, indices: Tensor, count: int, ignored: int | None = None) -> None:
    """Raises ValueError unless indices on a CPU are from 0 to count - 1 or `ignored`; indices on a
    GPU are not checked, as reading them would wait for it."""
    if type(indices) is not Tensor or not indices.is_cpu or torch.compiler.is_compiling():
        return
    wrong = (indices < 0) | (indices >= count)
    wrong = indices[wrong if ignored is None else wrong & (indices != ignored)]
    if wrong.numel():
        allowed = "" if ignored is None else f", or ignore_index = {ignored}"
        raise ValueError(f"{name} must be from 0 to {count - 1}{allowed}, got {wrong[0].item()}")


def kind(value) -> str:
    """What errors call a value: its type, or the dtype of a tensor."""
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
