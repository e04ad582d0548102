"""One autograd Function and two custom ops for any pair of launchers.

An op has a module of its name for each backend that has kernels, `<backend>_kernels/<op>.py`, with

    forward(call) -> results                            a NamedTuple; what the call does not want
                                                        is None
    backward(upstream, call, results, needs) -> grads   upstream and results as the forward's,
                                                        `needs` names fields of the call, and
                                                        grads has the gradient of each

Eager calls go straight to them, from an autograd Function. Under torch.compile and torch.export a
launch is one node, a custom op whose schema is that of the call's fields; only there, where no
result may be missing, does a bool tensor stand for None, which no result is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any, get_type_hints

import torch
from torch import Tensor

SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    int | None: "SymInt?",
    tuple[int, int] | None: "SymInt[]?",
    bool: "bool",
    str | None: "str?",
}
Needs = Collection[str]
Gradients = Mapping[str, Tensor]


@cache
def launchers_of(backend: str, op: str) -> ModuleType:
    """The module with `forward` and `backward` of an op."""
    package = __package__.rpartition(".")[0]
    return import_module(f"{package}.{backend}_kernels.{op}")


@dataclass(frozen=True)
class KernelOp:
    """An op of two launchers; made by `kernel_op`, and called with a call and a backend's name."""

    op: str
    apply: Callable  # of the autograd Function, on the fields of a call and the backend
    forward_op: Callable
    backward_op: Callable
    names: tuple[str, ...]
    Results: type

    def __call__(self, call: Any, backend: str) -> Any:
        """The results, differentiable once."""
        values = [getattr(call, name) for name in self.names]
        if not torch.compiler.is_compiling():
            # A transform's tensors have no memory that a kernel could read.
            if backend != "torch" and torch._C._are_functorch_transforms_active():
                raise RuntimeError(
                    f"{self.op}: torch.func cannot transform the kernels; use backend='eager'"
                )
            return self.Results(*self.apply(*values, backend))
        return present(self.forward_op(*values, backend), self.Results)


def present(results: Tensor | tuple[Tensor, ...], Results: type) -> Any:
    """The results of a custom op, with None in place of what stands for it."""
    results = (results,) if isinstance(results, Tensor) else results
    return Results(*(None if t.dtype == torch.bool else t for t in results))


def kernel_op(
    op: str,
    Call: type,
    Results: type,
    fake: Callable[[Any, str], Any],
    *,
    gradients: Mapping[str, Callable[[Tensor], Tensor]],
    saved: Collection[str] = (),
    constant: Callable[[Any, Needs], Collection[str]] = lambda call, needs: (),
    without_launch: Callable[[Any, Any], Gradients] = lambda upstream, call: {},
    keep: Callable[[Any, Any, Needs], tuple[Any, Any]] = lambda call, results, _: (call, results),
    launchers: Callable[[str], Any] | None = None,
) -> KernelOp:
    """The op of the launchers `forward` and `backward` of the modules named `op`.

    Args:
        op: the name of the launchers' modules, and of the custom ops, with _forward and _backward.
        Call: the dataclass of a call; its fields' types decide the schema.
        Results: the NamedTuple that the launchers return.
        fake: the results of a call on a backend, without values; None for what is not wanted.
        gradients: which fields may have a gradient, and for each what makes an empty one like it.
        saved: the results that the backward is given; the others are None there.
        constant: the results of a call that have no derivative, given the fields that want one.
        without_launch: gradients that the upstream gives as they are, or None for no gradient.
        keep: the call and the results that are kept for the backward, given the fields that want a
            gradient; what it does not need is None.
        launchers: what has `forward` and `backward` for a backend, in place of the op's modules.
    """
    launchers = launchers or partial(launchers_of, op=op)
    names = tuple(f.name for f in fields(Call))
    types = get_type_hints(Call)
    tensors = tuple(n for n in names if types[n] in (Tensor, Tensor | None))
    schema = ", ".join(f"{SCHEMA_TYPES[types[n]]} {n}" for n in names)
    n_results = len(Results._fields)

    def build(values) -> Any:
        call = object.__new__(Call)
        call.__dict__.update(zip(names, values, strict=True))
        return call

    def run_forward(*values) -> tuple:
        *values, backend = values
        return launchers(backend).forward(build(values))

    def run_backward(upstream, call, results, needs, backend) -> Gradients:
        with torch.no_grad():
            return launchers(backend).backward(upstream, call, results, needs)

    def filled(results, values) -> Tensor | tuple[Tensor, ...]:
        like = next(v for v in values if isinstance(v, Tensor))
        none = [like.new_empty(0, dtype=torch.bool) for t in results if t is None]
        results = tuple(none.pop() if t is None else t for t in results)
        return results if len(results) > 1 else results[0]

    def op_forward(*values):
        return filled(run_forward(*values), values)

    def op_backward(upstream, results, needs, *values):
        *values, backend = values
        wanted = [n for n, need in zip(gradients, needs, strict=True) if need]
        given = (Results(*upstream), build(values), Results(*results))
        grads = run_backward(*given, wanted, backend)
        return [grads[n] for n in wanted]

    forward_op = torch.library.custom_op(
        f"xattn_kernels::{op}_forward",
        op_forward,
        mutates_args=(),
        schema=f"({schema}, str backend) -> ({', '.join(['Tensor'] * n_results)})",
    )
    backward_op = torch.library.custom_op(
        f"xattn_kernels::{op}_backward",
        op_backward,
        mutates_args=(),
        schema=f"(Tensor?[] upstream, Tensor?[] results, bool[] needs, {schema}, str backend)"
        " -> Tensor[]",
    )

    @forward_op.register_fake
    def _(*values):
        return filled(fake(build(values[:-1]), values[-1]), values)

    @backward_op.register_fake
    def _(upstream, results, needs, *values):
        named = dict(zip(names, values, strict=False))
        pairs = zip(gradients.items(), needs, strict=True)
        return [empty_like(named[n]) for (n, empty_like), need in pairs if need]

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        *values, ctx.backend = inputs
        call, results = build(values), Results(*output)
        needs = [n for n, need in zip(names, ctx.needs_input_grad, strict=False) if need]
        ctx.is_present = [t is not None for t in output]
        ctx.mark_non_differentiable(
            *(t for n in constant(call, needs) if (t := getattr(results, n)) is not None)
        )
        call, results = keep(call, results, needs)
        values = [getattr(call, n) for n in names]
        kept = (getattr(results, n) for n in saved)
        ctx.save_for_backward(*(getattr(call, n) for n in tensors), *kept)
        ctx.plain = {n: v for n, v in zip(names, values, strict=True) if n not in tensors}

    def differentiate(ctx, upstream, launch) -> tuple:
        """The gradients of the fields of a call, of which `launch` gives those that it is asked."""
        saved_tensors = ctx.saved_tensors  # once: a checkpoint gives them once
        kept = saved_tensors[len(tensors) :]
        named = ctx.plain | dict(zip(tensors, saved_tensors, strict=False))
        call = build([named[n] for n in names])
        results = Results(**(dict.fromkeys(Results._fields) | dict(zip(saved, kept, strict=True))))
        upstream = Results(
            *(g if p else None for g, p in zip(upstream, ctx.is_present, strict=True))
        )
        needs = [
            n
            for n, need in zip(names, ctx.needs_input_grad, strict=False)
            if need and n in gradients
        ]
        if all(g is None for g in upstream):
            return (None,) * (len(names) + 1)
        ready = without_launch(upstream, call)
        grads = {n: ready[n] for n in needs if n in ready}
        needs = [n for n in needs if n not in ready]
        if needs:
            launched = launch(upstream, call, results, needs, ctx.backend)
            grads |= {n: launched[n] for n in needs}
        grads = tuple(map(grads.get, names))
        sources = (*upstream, *(named[n] for n in gradients if named[n] is not None))
        return *refuse_double_backward(op, grads, sources), None

    def launch_op(upstream, call, results, needs, backend) -> Gradients:
        values = [getattr(call, n) for n in names]
        wanted = [n in needs for n in gradients]
        grads = backward_op(list(upstream), list(results), wanted, *values, backend)
        return dict(zip((n for n in gradients if n in needs), grads, strict=True))

    class Function(torch.autograd.Function):
        """Wires the launchers into autograd; nothing is computed here."""

        @staticmethod
        def forward(*values):
            return run_forward(*values)

        @staticmethod
        def backward(ctx, *upstream):
            return differentiate(ctx, upstream, run_backward)

        @staticmethod
        def vmap(info, in_dims, *values):
            raise RuntimeError(f"{op}: torch.vmap cannot map it; use backend='eager'")

        @staticmethod
        def jvp(ctx, *tangents):
            raise RuntimeError(f"{op}: it has no forward mode; use backend='eager'")

    Function.setup_context = staticmethod(setup_context)
    if gradients:

        def setup_op(ctx, inputs, output):
            setup_context(ctx, inputs, present(output, Results))

        forward_op.register_autograd(
            lambda ctx, *upstream: differentiate(ctx, upstream, launch_op), setup_context=setup_op
        )
    return KernelOp(op, Function.apply, forward_op, backward_op, names, Results)


def refuse_double_backward(
    op: str, grads: tuple, sources: tuple, instead: str = "use backend='eager'"
) -> tuple:
    """The gradients; differentiating them again, by way of `sources`, is an error that says so."""
    if not torch.is_grad_enabled():
        return grads
    return RefuseDoubleBackward.apply(op, instead, len(grads), *grads, *sources)


class RefuseDoubleBackward(torch.autograd.Function):
    """Identity on the first n of the tensors, without a derivative."""

    @staticmethod
    def forward(op, instead, n, *tensors):
        return tuple(None if g is None else g.view_as(g) for g in tensors[:n])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, ctx.instead = inputs[:2]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.op}: the kernels have no double backward; {ctx.instead} for second derivatives"
        )
