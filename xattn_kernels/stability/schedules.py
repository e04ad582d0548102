"""Schedules of learning rates, trainable layers and dropout over the steps of a training."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..core.arguments import (
    check_choice,
    check_module,
    check_number,
    check_several,
    check_sizes,
    kind,
)
from .parameters import CLASSES, NAMES


def warmup_cosine(
    optimizer: torch.optim.Optimizer,
    *,
    warmup_steps: int,
    total_steps: int,
    xattn_warmup_steps: int | None = None,
    min_ratio: float = 0.0,
    last_epoch: int = -1,
) -> LambdaLR:
    """torch's `LambdaLR` with a linear warm-up from 0, then half a cosine down to `min_ratio`.

        factor = step / warmup                                           step < warmup
        factor = min_ratio + (1 - min_ratio) (1 + cos(pi t)) / 2         t from 0 to 1

    After `total_steps` the factor stays at min_ratio. A step is one of the optimiser, not an epoch.

    Args:
        optimizer: the optimiser whose rates are scheduled.
        warmup_steps: the steps of the warm-up, at least 0 and less than total_steps.
        total_steps: the steps until the rate is lowest, at least 1.
        xattn_warmup_steps: the steps of the warm-up of groups whose name begins with
            "cross_attention", as `optimizer_groups` calls them; None: warmup_steps.
        min_ratio: the least factor, from 0 to 1.
        last_epoch: as in torch's schedulers.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: Loshchilov and Hutter, "SGDR" (2017), without restarts; Vaswani et al. (2017).
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {kind(optimizer)}")
    check_sizes(total_steps=total_steps)
    if not 0.0 <= check_number("min_ratio", min_ratio, "a number from 0 to 1") <= 1.0:
        raise ValueError(f"min_ratio must be from 0 to 1, got {min_ratio}")
    xattn_steps = warmup_steps if xattn_warmup_steps is None else xattn_warmup_steps
    for name, n in dict(warmup_steps=warmup_steps, xattn_warmup_steps=xattn_steps).items():
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"{name} must be an int, got {type(n).__name__}")
        if not 0 <= n < total_steps:
            raise ValueError(
                f"{name} must be from 0 to total_steps - 1 = {total_steps - 1}, got {n}"
            )
    factors = []
    for group in optimizer.param_groups:
        new = str(group.get("name", "")).startswith("cross_attention")
        warmup = xattn_steps if new else warmup_steps
        sizes = dict(warmup=warmup, total=total_steps, least=min_ratio)
        factors.append(partial(warmup_cosine_factor, **sizes))
    return LambdaLR(optimizer, factors, last_epoch)


def warmup_cosine_factor(step: int, warmup: int, total: int, least: float) -> float:
    """The factor of the rate at `step`, by the equations of `warmup_cosine`."""
    if step < warmup:
        return step / warmup
    t = min(1.0, (step - warmup) / (total - warmup))
    return least + (1.0 - least) * 0.5 * (1.0 + math.cos(math.pi * t))


def cross_attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules of which `xattn_parameters` counts every parameter, by name.

    They are in the order of `model.named_modules()`. A module without parameters is no layer, nor
    is a list or dict of modules, whose elements are; raises TypeError if model is no module.
    """
    check_module("model", model)
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = name.startswith(tuple(f"{n}." for n in layers))
        counts = CLASSES.search(type(module).__name__) or NAMES.search(name.rpartition(".")[2])
        container = isinstance(module, (nn.ModuleList, nn.ModuleDict))
        has_parameters = any(True for _ in module.parameters())
        if name and counts and not inside and not container and has_parameters:
            layers[name] = module
    return layers


class LayerwiseWarmup:
    """Unfreezes layers one after the other: of n layers the first floor(n step / warmup) + 1 train.

    A layer that waits does not require grad and has no gradient, so that optimisers skip it; with
    its gate closed it is the identity meanwhile. Parameters that required no grad at construction
    stay frozen. `DistributedDataParallel` records once which parameters require grad, so either
    all layers are awake before a model is wrapped in it, or `find_unused_parameters` is on.

    Args:
        layers: modules in the order in which they wake, such as
            `list(cross_attention_layers(model).values())`.
        warmup_steps: the number of steps until all layers are awake, at least 1.
        order: "first" wakes the first layer first, "last" the last one.

    Raises:
        TypeError, ValueError: an argument is not among those named here.
    """

    def __init__(self, layers: Iterable[nn.Module], *, warmup_steps: int, order="first") -> None:
        check_sizes(warmup_steps=warmup_steps)
        check_choice("order", order, "first", "last")
        ordered = check_several("layers", layers, nn.Module, "an nn.Module")
        ordered = ordered if order == "first" else ordered[::-1]
        self.layers = [[p for p in m.parameters() if p.requires_grad] for m in ordered]
        self.warmup_steps, self.steps = warmup_steps, 0
        self._apply()

    @property
    def awake(self) -> int:
        """The number of layers that train."""
        n = len(self.layers)
        return min(n, n * self.steps // self.warmup_steps + 1)

    def step(self) -> None:
        """Counts a step; call it after each step of the optimiser."""
        self.steps += 1
        self._apply()

    def _apply(self) -> None:
        for i, parameters in enumerate(self.layers):
            for p in parameters:
                p.requires_grad_(i < self.awake)
                if i >= self.awake:
                    p.grad = None

    def state_dict(self) -> dict:
        """The number of steps: {"steps"}."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Continues where `state_dict` was taken."""
        self.steps = state["steps"]
        self._apply()


class AttentionDropout:
    """Sets the dropout of attention weights, from `start` to `end` on a line over `total_steps`.

    It sets the attribute `dropout` or `dropout_p`, if that is a number, of every module whose class
    is called `...Attention...`, such as torch's and this package's `MultiheadAttention`; modules
    that attend to top keys only are left out, as they have no dropout. Each new value is a new
    graph for torch.compile, hence `every`.

    Args:
        model: a model with at least one such module.
        start, end: the dropout of the first step and after the last one, in [0, 1).
        total_steps: the number of steps until `end` is reached, at least 1.
        every: the number of steps from one change to the next.

    Raises:
        TypeError, ValueError: an argument is not among those named here.
    """

    def __init__(
        self, model: nn.Module, *, total_steps: int, start=0.3, end=0.1, every: int = 1
    ) -> None:
        check_module("model", model)
        check_sizes(total_steps=total_steps, every=every)
        for name, p in dict(start=start, end=end).items():
            if not 0.0 <= check_number(name, p, "a number in [0, 1)") < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {p}")
        self.targets = [
            (module, name)
            for module in model.modules()
            for name in ("dropout", "dropout_p")
            if re.search("Attention", type(module).__name__)
            and not chooses_keys(module)
            and type(getattr(module, name, None)) in (int, float)
        ]
        if not self.targets:
            raise ValueError("model must have attention with a dropout of its weights")
        self.start, self.end, self.total_steps, self.every = start, end, total_steps, every
        self.steps = 0
        self._apply()

    @property
    def value(self) -> float:
        """The dropout of this step."""
        t = min(1.0, self.steps // self.every * self.every / self.total_steps)
        if self.steps >= self.total_steps:
            t = 1.0
        return self.start + (self.end - self.start) * t

    def step(self) -> None:
        """Counts a step; call it after each step of the optimiser."""
        self.steps += 1
        self._apply()

    def _apply(self) -> None:
        for module, name in self.targets:
            setattr(module, name, self.value)

    def state_dict(self) -> dict:
        """The number of steps: {"steps"}."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Continues where `state_dict` was taken."""
        self.steps = state["steps"]
        self._apply()


def chooses_keys(module: nn.Module) -> bool:
    """Whether the module attends to top keys or top blocks only."""
    return any(getattr(module, name, None) is not None for name in ("top_k", "topk_blocks"))
