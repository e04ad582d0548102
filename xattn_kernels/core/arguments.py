"""Checks of plain arguments: each raises naming the argument, what it was and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real

import torch
from torch import Tensor, nn


def check_number(name: str, value, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be {allowed}, got {type(value).__name__} {value!r}")
    return float(value)  # Triton and autograd know no numbers of numpy


def check_positive(name: str, value: float) -> None:
    if not 0.0 < check_number(name, value, "a number") < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value}")


def check_sizes(**sizes: int) -> None:
    check_ints(sizes, 1)


def check_counts(**counts: int) -> None:
    check_ints(counts, 0)


def check_ints(named: Mapping[str, int], least: int) -> None:
    for name, n in named.items():
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


def check_mapping(name: str, given, what: str) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must be a mapping of {what}, got {kind(given)}")


def check_module(name: str, module) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {kind(module)}")


def check_several(name: str, things, of: type, what: str) -> list:
    """The list of an iterable, which may be one that ends; at least one thing, all of a type."""
    if not isinstance(things, Iterable) or isinstance(things, (str, Tensor)):
        raise TypeError(f"{name} must be a list, each {what}, got {kind(things)}")
    things = list(things)
    if not things:
        raise ValueError(f"{name} must have at least one, each {what}, got none")
    for i, thing in enumerate(things):
        if not isinstance(thing, of):
            raise TypeError(f"{name}[{i}] must be {what}, got {kind(thing)}")
    return things


def check_range(name: str, indices: Tensor, count: int, ignored: int | None = None) -> None:
    """Of indices from 0 to count - 1, on a CPU alone: reading a GPU's would wait for it."""
    if type(indices) is not Tensor or not indices.is_cpu or torch.compiler.is_compiling():
        return
    wrong = (indices < 0) | (indices >= count)
    wrong = indices[wrong if ignored is None else wrong & (indices != ignored)]
    if wrong.numel():
        allowed = "" if ignored is None else f", or ignore_index = {ignored}"
        raise ValueError(f"{name} must be from 0 to {count - 1}{allowed}, got {wrong[0].item()}")


def kind(value) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
