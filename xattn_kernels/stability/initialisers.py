"""Initialisers of the projections to queries, keys, values and outputs, and of gates.

Projections are recognised by name: `in_proj_weight` (torch's packed one), `q_proj_weight` and
its kin, and linear layers called as in this package, OpenFlamingo, transformers and OpenCLIP,
also GPT-2's `Conv1D`, whose weights are [in, out], and BERT's `output.dense` beside its attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.arguments import check_module, check_number, check_positive
from .parameters import gate_parameters

LINEAR = {
    "q": ("to_q", "q_proj", "query", "wq", "c_q", "fc_q", "q_attn"),
    "k": ("to_k", "k_proj", "key", "wk", "fc_k"),
    "v": ("to_v", "v_proj", "value", "wv", "fc_v"),
    "kv": ("to_kv", "kv_proj", "c_kv"),
    "out": ("to_out", "out_proj", "o_proj", "wo", "c_proj"),
}
ROLES = {name: role for role, names in LINEAR.items() for name in names}
UNPACKED = {"q_proj_weight": "q", "k_proj_weight": "k", "v_proj_weight": "v"}


class Projection(NamedTuple):
    """The rows of a weight [out, in] and of its bias that make queries, keys, values or outputs."""

    name: str
    role: str
    weight: Tensor
    bias: Tensor | None


def projections(model: nn.Module) -> Iterator[Projection]:
    """The projections of every attention in `model`, one each where several share a matrix."""
    for path, module in model.named_modules():
        above, _, last = path.rpartition(".")
        if last in LINEAR["out"] and not attends(model.get_submodule(above)):
            continue
        weight = weight_of(module)
        if weight is not None and path.endswith("output.dense"):
            if any(map(attends, model.get_submodule(above.rpartition(".")[0]).children())):
                yield Projection(path, "out", weight, module.bias)
        elif weight is not None:
            yield from split_rows(path, roles_of(last, weight), weight, module.bias)
        elif isinstance(module, nn.Sequential) and last == "to_out":  # diffusers adds a dropout
            first = module[0]
            if isinstance(first, nn.Linear):
                yield Projection(path, "out", first.weight, first.bias)
        parameters = dict(module.named_parameters(recurse=False))
        biases = parameters.get("in_proj_bias")
        if "in_proj_weight" in parameters:
            yield from split_rows(path, ("q", "k", "v"), parameters["in_proj_weight"], biases)
        for i, (name, role) in enumerate(UNPACKED.items()):
            if name in parameters:
                bias = None if biases is None else biases.chunk(3)[i]
                yield Projection(path, role, parameters[name], bias)


def weight_of(module: nn.Module) -> Tensor | None:
    """The weight [out, in] of a linear layer, in whichever order it is stored; None of others."""
    if type(module).__name__ == "Conv1D":
        return module.weight.mT
    return module.weight if isinstance(module, nn.Linear) else None


def roles_of(name: str, weight: Tensor) -> tuple[str, ...]:
    """The roles of the equal parts of a weight [out, in], by its module's name."""
    if name == "c_attn":  # in cross-attention GPT-2's has no queries
        n_parts = {3 * weight.shape[1]: 3, 2 * weight.shape[1]: 2}.get(len(weight), 0)
        return ("q", "k", "v")[3 - n_parts :]
    role = ROLES.get(name)
    return () if role is None else ("k", "v") if role == "kv" else (role,)


def attends(module: nn.Module) -> bool:
    """Whether `module` projects queries, as the owner of an output projection must: a
    feed-forward, whose `c_proj` has the same name, does not."""
    queries = (*LINEAR["q"], "c_attn", "in_proj_weight", "q_proj_weight")
    return any(hasattr(module, name) for name in queries)


def split_rows(
    path: str, roles: tuple[str, ...], weight: Tensor, bias: Tensor | None
) -> Iterator[Projection]:
    """A projection for each role, in the order of the equal parts of `weight`."""
    if not roles:
        return
    n = len(roles)
    biases = [None] * n if bias is None else bias.chunk(n)
    for role, w, b in zip(roles, weight.chunk(n), biases, strict=True):
        yield Projection(path, role, w, b)


def require_projections(model: nn.Module, *roles: str) -> list[Projection]:
    """The projections of these roles; raises ValueError where the model has none."""
    check_module("model", model)
    chosen = [p for p in projections(model) if p.role in roles]
    if not chosen:
        raise ValueError(f"model must have projections to {' or '.join(roles)}, found none by name")
    return chosen


@torch.no_grad()
def xavier_(model: nn.Module, *, gain: float = 1.0) -> list[str]:
    """Makes attention projections in `model` Xavier-uniform, their biases 0; returns their names.

    Queries, keys and values in one packed matrix each have their own fans; `xavier_uniform_` of
    the whole matrix would make them smaller, by sqrt(2) if the three are square.

    Raises TypeError or ValueError: model is no module or has no projection, or gain is not
        positive.

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural
    networks" (2010).
    """
    check_positive("gain", gain)
    chosen = require_projections(model, "q", "k", "v", "out")
    for p in chosen:
        nn.init.xavier_uniform_(p.weight, gain)
        zero_(p.bias)
    return [f"{p.name}.{p.role}" for p in chosen]


@torch.no_grad()
def small_queries_(model: nn.Module, *, std: float = 0.02) -> list[str]:
    """Makes the query projections normal with a small `std` and their biases 0, so that attention
    begins almost uniform; returns their names.

    Raises TypeError or ValueError: model is no module or has no projection, or std is not positive.
    """
    check_positive("std", std)
    chosen = require_projections(model, "q")
    for p in chosen:
        nn.init.normal_(p.weight, std=std)
        zero_(p.bias)
    return [f"{p.name}.{p.role}" for p in chosen]


@torch.no_grad()
def zero_outputs_(model: nn.Module) -> list[str]:
    """Makes the output projections 0, so that each block begins as the identity; returns their
    names.

    Either this or a closed gate is enough: behind a gate of exactly 0 a projection of 0 gets no
    gradient, and the gate, which multiplies 0, gets none either. Such a layer never learns.

    Raises TypeError or ValueError: model is no module, has no output projection, or has one that
        would be 0 behind a gate of 0; see `gates_` for the other order.
    """
    chosen = require_projections(model, "out")
    closed = closed_gates(model)
    for p in chosen:
        if closed_here := [g for g in closed if governs(g, p.name)]:
            raise ValueError(
                f"{p.name} must not be 0 behind the closed gate {closed_here[0]}, as neither would "
                "get a gradient; open the gate (gates_(model, value=0.1)) or leave the projection"
            )
    for p in chosen:
        nn.init.zeros_(p.weight)
        zero_(p.bias)
    return [p.name for p in chosen]


@torch.no_grad()
def gates_(model: nn.Module, *, value: float = 0.1) -> list[str]:
    """Sets every tanh gate so that tanh(gate) is `value`; returns their names.

    Flamingo begins with 0, the identity; a small value lets gradients reach the layers behind it.

    Raises TypeError or ValueError: model is no module or has no gate, value is not between -1 and
        1, or it is 0 and the projection behind a gate is 0 too.
    """
    if not -1.0 < check_number("value", value, "a number between -1 and 1") < 1.0:
        raise ValueError(f"value must be between -1 and 1, got {value}")
    parameters = gate_parameters(model)
    if not parameters:
        raise ValueError("model must have a gate, found none by name")
    if value == 0.0:
        zeros = [p.name for p in projections(model) if p.role == "out" and not p.weight.any()]
        if dead := [(g, n) for g in parameters for n in zeros if governs(g, n)]:
            raise ValueError(
                "value must not be 0 for {} while {} is 0, as neither would get a gradient".format(
                    *dead[0]
                )
            )
    for gate in parameters.values():
        nn.init.constant_(gate, math.atanh(value))
    return list(parameters)


def closed_gates(model: nn.Module) -> list[str]:
    return [name for name, gate in gate_parameters(model).items() if not gate.any()]


def governs(gate: str, projection: str) -> bool:
    """Whether the gate is a parameter of a module that contains the projection."""
    owner = gate.rpartition(".")[0]
    return not owner or projection == owner or projection.startswith(f"{owner}.")


def zero_(bias: Tensor | None) -> None:
    if bias is not None:
        nn.init.zeros_(bias)
