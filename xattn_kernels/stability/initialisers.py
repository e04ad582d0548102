"""Initialisers that know where queries, keys, values and outputs are in attention modules.

A module's projections are found by name: `in_proj_weight` (torch's packed one), `q_proj_weight` and
its kin, and linear layers called as in this package, OpenFlamingo, transformers and OpenCLIP, also
GPT-2's `Conv1D`, whose weights are [in, out], and BERT's `output.dense` beside its attention.
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
PACKED = {"q_proj_weight": "q", "k_proj_weight": "k", "v_proj_weight": "v"}


class Projection(NamedTuple):
    """Rows of a weight [out, in], and of its bias, that make queries, keys, values or outputs."""

    name: str
    role: str
    weight: Tensor
    bias: Tensor | None


def projections(model: nn.Module) -> Iterator[Projection]:
    """Of every attention in `model`; queries, keys and values that share a matrix come apart."""
    for path, module in model.named_modules():
        above, _, last = path.rpartition(".")
        if last in LINEAR["out"] and not attends(model.get_submodule(above)):
            continue
        weight = weight_of(module)
        if weight is not None and path.endswith("output.dense"):
            if any(map(attends, model.get_submodule(above.rpartition(".")[0]).children())):
                yield Projection(path, "out", weight, module.bias)
        elif weight is not None:
            yield from cut(path, parts_of(last, weight), weight, module.bias)
        elif isinstance(module, nn.Sequential) and last == "to_out":  # diffusers, with its dropout
            first = module[0]
            if isinstance(first, nn.Linear):
                yield Projection(path, "out", first.weight, first.bias)
        own = dict(module.named_parameters(recurse=False))
        biases = own.get("in_proj_bias")
        if "in_proj_weight" in own:
            yield from cut(path, ("q", "k", "v"), own["in_proj_weight"], biases)
        for i, (name, role) in enumerate(PACKED.items()):
            if name in own:
                bias = None if biases is None else biases.chunk(3)[i]
                yield Projection(path, role, own[name], bias)


def weight_of(module: nn.Module) -> Tensor | None:
    """[out, in] of a linear layer, whichever way round it is stored."""
    if type(module).__name__ == "Conv1D":
        return module.weight.mT
    return module.weight if isinstance(module, nn.Linear) else None


def parts_of(name: str, weight: Tensor) -> tuple[str, ...]:
    """The roles of equal parts of a weight [out, in], by its module's name."""
    if name == "c_attn":  # GPT-2's, which has no queries in cross-attention
        n_parts = {3 * weight.shape[1]: 3, 2 * weight.shape[1]: 2}.get(len(weight), 0)
        return ("q", "k", "v")[3 - n_parts :]
    role = ROLES.get(name)
    return () if role is None else ("k", "v") if role == "kv" else (role,)


def attends(module: nn.Module) -> bool:
    """Whether it has queries too: a feed-forward's `c_proj` is none of attention's outputs."""
    queries = (*LINEAR["q"], "c_attn", "in_proj_weight", "q_proj_weight")
    return any(hasattr(module, name) for name in queries)


def cut(path: str, roles: tuple[str, ...], weight: Tensor, bias: Tensor | None):
    if not roles:
        return
    n = len(roles)
    biases = [None] * n if bias is None else bias.chunk(n)
    for role, w, b in zip(roles, weight.chunk(n), biases, strict=True):
        yield Projection(path, role, w, b)


def found(model: nn.Module, *roles: str) -> list[Projection]:
    check_module("model", model)
    chosen = [p for p in projections(model) if p.role in roles]
    if not chosen:
        raise ValueError(f"model must have projections to {' or '.join(roles)}, found none by name")
    return chosen


@torch.no_grad()
def xavier_(model: nn.Module, *, gain: float = 1.0) -> list[str]:
    """Xavier-uniform projections of every attention in `model`, biases 0; returns their names.

    Of a packed matrix each of queries, keys and values has its own fans; `xavier_uniform_` of the
    whole would make them smaller, by sqrt(2) for three square ones.

    Raises TypeError or ValueError: model is no module, or has no projection; gain is not positive.

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural
    networks" (2010).
    """
    check_positive("gain", gain)
    chosen = found(model, "q", "k", "v", "out")
    for p in chosen:
        nn.init.xavier_uniform_(p.weight, gain)
        zero_(p.bias)
    return [f"{p.name}.{p.role}" for p in chosen]


@torch.no_grad()
def small_queries_(model: nn.Module, *, std: float = 0.02) -> list[str]:
    """Normal query projections of a small `std`, biases 0, so that attention begins almost even;
    returns their names.

    Raises TypeError or ValueError: model is no module, or has no projection; std is not positive.
    """
    check_positive("std", std)
    chosen = found(model, "q")
    for p in chosen:
        nn.init.normal_(p.weight, std=std)
        zero_(p.bias)
    return [f"{p.name}.{p.role}" for p in chosen]


@torch.no_grad()
def zero_outputs_(model: nn.Module) -> list[str]:
    """Output projections of 0, so that each attention begins as the identity of its residual;
    returns their names.

    One of both is enough, this or a closed gate: behind a gate of exactly 0 a projection of 0 gets
    no gradient, and the gate, which multiplies 0, gets none either. Such a layer never learns.

    Raises TypeError or ValueError: model is no module, has no output projection, or has one that
        would be 0 behind a gate of 0; see `gates_` for the other order.
    """
    chosen = found(model, "out")
    closed = closed_gates(model)
    for p in chosen:
        if shut := [g for g in closed if gates(g, p.name)]:
            raise ValueError(
                f"{p.name} must not be 0 behind the closed gate {shut[0]}, as neither would get a "
                "gradient; open the gate (gates_(model, value=0.1)) or leave the projection"
            )
    for p in chosen:
        nn.init.zeros_(p.weight)
        zero_(p.bias)
    return [p.name for p in chosen]


@torch.no_grad()
def gates_(model: nn.Module, *, value: float = 0.1) -> list[str]:
    """Sets every tanh gate so that tanh(gate) is `value`: small and open; returns their names.

    0 is Flamingo's beginning, the identity; a small value lets gradients reach what is behind.

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
        if shut := [(g, n) for g in parameters for n in zeros if gates(g, n)]:
            raise ValueError(
                "value must not be 0 for {} while {} is 0, as neither would get a gradient".format(
                    *shut[0]
                )
            )
    for gate in parameters.values():
        nn.init.constant_(gate, math.atanh(value))
    return list(parameters)


def closed_gates(model: nn.Module) -> list[str]:
    return [name for name, gate in gate_parameters(model).items() if not gate.any()]


def gates(gate: str, projection: str) -> bool:
    """Whether the gate is a parameter of a module that the projection is in."""
    owner = gate.rpartition(".")[0]
    return not owner or projection == owner or projection.startswith(f"{owner}.")


def zero_(bias: Tensor | None) -> None:
    if bias is not None:
        nn.init.zeros_(bias)
