"""Layers that attend, observed through the calls of the ops while a model runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.arguments import check_module, check_rule
from ..core.call import (
    CrossAttentionCall,
    CrossAttentionResult,
    TopKAttentionCall,
    TopKAttentionResult,
)
from ..core.dispatch import OBSERVERS
from .row_statistics import row_statistics

ATTENTION = (CrossAttentionCall, TopKAttentionCall)  # but no op that returns weights alone
Sides = tuple[Tensor | None, Tensor | None]


class ObservedCall(NamedTuple):
    """One call of an op: its checked inputs, and the innermost module that called it with the
    arguments of that module."""

    name: str
    module: nn.Module
    arguments: tuple[Any, ...]
    inputs: CrossAttentionCall
    backend: str


class Watch:
    """Hooks on every module of `model` that name the module behind each call of an op.

    `on_call(call)` runs before the op does. The hooks exist between `start()` and `stop()` only,
    and they do nothing while torch.compile traces.
    """

    def __init__(self, model: nn.Module, on_call: Callable[[ObservedCall], None]) -> None:
        self.model, self.on_call = model, on_call
        self.stack: list[tuple[str, nn.Module, tuple]] = []
        self.outer_observers: tuple = ()
        self.handles: list = []

    def start(self) -> None:
        if self.handles:
            return
        for name, module in self.model.named_modules():
            enter = Hook(self.enter, name or type(module).__name__)
            self.handles += [
                module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
                module.register_forward_hook(Hook(self.leave), always_call=True),
            ]

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self.stack:  # stopped within a forward
            self.stack.clear()
            OBSERVERS.set(self.outer_observers)

    def enter(self, name: str, module, args, kwargs) -> None:
        if not self.stack:
            self.outer_observers = OBSERVERS.get()
            OBSERVERS.set((*self.outer_observers, self._observe))
        self.stack.append((name, module, (*args, *kwargs.values())))

    def leave(self, *_) -> None:
        if self.stack:
            self.stack.pop()
            if not self.stack:
                OBSERVERS.set(self.outer_observers)

    def _observe(self, inputs, backend: str) -> None:
        if type(inputs) in ATTENTION and self.stack:
            self.on_call(ObservedCall(*self.stack[-1], inputs, backend))


class Hook:
    """A function with its first arguments bound, which becomes `nothing` in a copy or a pickle of
    its module, as nobody watches that."""

    def __init__(self, function: Callable, *first_arguments) -> None:
        self.function, self.first_arguments = function, first_arguments

    def __call__(self, *args) -> None:
        if not torch.compiler.is_compiling():
            self.function(*self.first_arguments, *args)

    def __deepcopy__(self, memo) -> Callable:
        return nothing

    def __reduce__(self) -> tuple:
        return operator.itemgetter(0), ((nothing,),)


def nothing(*_) -> None:
    """A hook without effect."""


def sides(call: ObservedCall) -> Sides:
    """(queries' side, keys' side) among the layer's arguments, None for a side that is missing.

    A layer with a method `attention_sides` chooses them itself; of another they are the first two
    floating-point tensors [..., N, dim].
    """
    if (choose_sides := getattr(call.module, "attention_sides", None)) is not None:
        return choose_sides(*call.arguments)
    features = [
        t for t in call.arguments
        if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 1 and t.numel()
    ]  # fmt: skip
    queries, keys = (*features, None, None)[:2]
    return queries, keys


def attends_to_itself(call: ObservedCall) -> bool:
    """Whether queries and keys are made of one tensor, as in `module(x, x, x)`."""
    queries, keys = sides(call)
    return queries is not None and queries is keys


@contextmanager
def attention_statistics(
    model: nn.Module, *, layers: Callable[[str, nn.Module], bool] | None = None
) -> Iterator[dict[str, CrossAttentionResult | TopKAttentionResult]]:
    """A context in which each forward of `model` leaves lse, entropy and largest probability of its
    attention layers in a dict by layer name, differentiable, for `entropy_loss`:

        with attention_statistics(model) as statistics:
            loss = model(batch)
        loss = loss + 0.01 * sum(entropy_loss(s) for s in statistics.values())

    It costs a second pass over the scores of these layers; a call of the op itself with
    `return_statistics=True` returns them without one. A compiled model is not observed, and no
    layer may be inside an activation checkpoint, whose second run has no dict.

    Args:
        model: any module; calls of the ops by it and by its submodules count.
        layers: (name, module) -> whether a layer counts. None: all layers count whose queries and
            keys do not come from one argument.

    Yields:
        {name: result}, `out` None; the last call of a layer that is called several times.

    Raises:
        TypeError: model is no module, or layers no function.
    """
    check_module("model", model)
    check_rule("layers", layers)
    statistics: dict = {}

    def on_call(call: ObservedCall) -> None:
        if counts(call, layers):
            statistics[call.name] = row_statistics(call.inputs, call.backend)._replace(out=None)

    watch = Watch(model, on_call)
    watch.start()
    try:
        yield statistics
    finally:
        watch.stop()


def counts(call: ObservedCall, layers: Callable[[str, nn.Module], bool] | None) -> bool:
    """Whether a call is one of those layers, or where `layers` is None no self-attention."""
    return not attends_to_itself(call) if layers is None else bool(layers(call.name, call.module))
