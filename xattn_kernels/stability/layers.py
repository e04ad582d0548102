"""Which layers attend: found while a model runs, from the calls of the ops themselves."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.arguments import check_module, check_rule
from ..core.call import (
    CrossAttentionInputs,
    CrossAttentionResult,
    TopKAttentionInputs,
    TopKAttentionResult,
)
from ..core.dispatch import OBSERVERS
from .row_statistics import row_statistics

ATTENTION = (CrossAttentionInputs, TopKAttentionInputs)  # but no op that only looks at weights
Sides = tuple[Tensor | None, Tensor | None]


class Call(NamedTuple):
    """One call of an op: the checked inputs, and the innermost module that made it with its
    arguments."""

    name: str
    module: nn.Module
    arguments: tuple[Any, ...]
    inputs: CrossAttentionInputs
    backend: str


class Watch:
    """Hooks on every module of `model` that name the module behind each call of an op.

    `told(call)` runs before the op does. Between `start()` and `stop()` only are there any hooks,
    and they do nothing in what torch.compile traces.
    """

    def __init__(self, model: nn.Module, told: Callable[[Call], None]) -> None:
        self.model, self.told = model, told
        self.stack: list[tuple[str, nn.Module, tuple]] = []
        self.before: tuple = ()
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
            OBSERVERS.set(self.before)

    def enter(self, name: str, module, args, kwargs) -> None:
        if not self.stack:
            self.before = OBSERVERS.get()
            OBSERVERS.set((*self.before, self._observe))
        self.stack.append((name, module, (*args, *kwargs.values())))

    def leave(self, *_) -> None:
        if self.stack:
            self.stack.pop()
            if not self.stack:
                OBSERVERS.set(self.before)

    def _observe(self, inputs, backend: str) -> None:
        if type(inputs) in ATTENTION and self.stack:
            self.told(Call(*self.stack[-1], inputs, backend))


class Hook:
    """Calls `f` with what it was made with and what it gets; in a copy or a pickle of the module
    that it hangs on, which nobody watches, it becomes `nothing`."""

    def __init__(self, f: Callable, *first) -> None:
        self.f, self.first = f, first

    def __call__(self, *args) -> None:
        if not torch.compiler.is_compiling():
            self.f(*self.first, *args)

    def __deepcopy__(self, memo) -> Callable:
        return nothing

    def __reduce__(self) -> tuple:
        return operator.itemgetter(0), ((nothing,),)


def nothing(*_) -> None:
    """A hook without effect."""


def sides(call: Call) -> Sides:
    """(queries' side, keys' side), as a method `attention_sides` of the layer finds them among its
    arguments, else the first two floating-point tensors [..., N, dim]; None for what there is
    not."""
    if (own := getattr(call.module, "attention_sides", None)) is not None:
        return own(*call.arguments)
    found = [
        t for t in call.arguments
        if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 1 and t.numel()
    ]  # fmt: skip
    queries, keys = (*found, None, None)[:2]
    return queries, keys


def attends_to_itself(call: Call) -> bool:
    """Whether queries and keys are made of one tensor, as in `module(x, x, x)`."""
    queries, keys = sides(call)
    return queries is not None and queries is keys


@contextmanager
def attention_statistics(
    model: nn.Module, *, layers: Callable[[str, nn.Module], bool] | None = None
) -> Iterator[dict[str, CrossAttentionResult | TopKAttentionResult]]:
    """Inside, each forward of `model` leaves lse, entropy and largest probability of its attention
    layers in a dict by layer name, differentiable, for `entropy_loss`:

        with attention_statistics(model) as found:
            loss = model(batch)
        loss = loss + 0.01 * sum(entropy_loss(s) for s in found.values())

    It costs a second pass over the scores of these layers; whoever calls the op with
    `return_statistics=True` has them for nothing. What torch.compile made of a model is not
    seen; nor must a layer be inside of an activation checkpoint, whose second run has no dict.

    Args:
        model: any module; calls of the ops by it and what is in it count.
        layers: (name, module) -> whether a layer counts. None: all whose queries and keys do not
            come from one argument.

    Yields:
        {name: result}, `out` None; of a layer that is called again the last call.

    Raises:
        TypeError: model is no module, or layers no function.
    """
    check_module("model", model)
    check_rule("layers", layers)
    found: dict = {}

    def told(call: Call) -> None:
        if counts(call, layers):
            found[call.name] = row_statistics(call.inputs, call.backend)._replace(out=None)

    watch = Watch(model, told)
    watch.start()
    try:
        yield found
    finally:
        watch.stop()


def counts(call: Call, layers: Callable[[str, nn.Module], bool] | None) -> bool:
    return not attends_to_itself(call) if layers is None else bool(layers(call.name, call.module))
