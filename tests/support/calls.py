"""From a `Case` to tensors, results and gradients, and the comparison of one backend with eager."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from support.cases import Case
from support.magnitudes import magnitudes
from support.mask_kinds import make_mask, shape_of
from support.numerics import FLOOR, assert_as_accurate
from support.values import (
    LAYOUTS,
    VALUES,
    Tensors,
    need_memory,
)
from xattn_kernels import (
    KeyInterval,
    attention_weights,
    cross_attention,
    received_mass,
    reference,
)
from xattn_kernels.core.call import CrossAttentionCall


@dataclass(frozen=True)
class Call:
    """`leaves` are the arguments that may require grad: q, k, v and, where there are, bias, scale,
    the lse of `attention_weights` and the row_weight of `received_mass`."""

    leaves: Tensors
    options: dict[str, Any]
    upstream: Tensors  # the gradients of out, lse, entropy as far as asked for, or of `FIRST`
    op: Callable = cross_attention

    def inputs(self) -> CrossAttentionCall:
        return self.op.check(**self.leaves, **self.options)

    def in_double(self) -> Call:
        """The same numbers in float64, laid out plainly."""
        leaves, upstream = (
            {
                n: t.detach().double().clone(memory_format=torch.contiguous_format)
                for n, t in d.items()
            }
            for d in (self.leaves, self.upstream)
        )
        leaves = {n: t.requires_grad_(self.leaves[n].requires_grad) for n, t in leaves.items()}
        return replace(self, leaves=leaves, upstream=upstream)


FIRST = {attention_weights: "weights", received_mass: "mass"}  # of the others "out"
# (eager in a dtype, eager in float64, magnitudes)
Expected = tuple[Tensors, Tensors, dict[str, float]]
UPSTREAM = {"out": ["out"], "lse": ["out", "lse"], "statistics": ["out", "lse", "entropy"]}


def build(c: Case, dtype: torch.dtype, device: str = "cpu") -> Call:
    """The tensors of `c`: the same seed, hence the same numbers before they are rounded."""
    g = torch.Generator().manual_seed(zlib.crc32(c.name.encode()))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    Dv = c.D if c.Dv is None else c.Dv
    drawn = {
        "q": normal(c.B, c.Hq, c.Nq, c.D),
        "k": normal(c.B, c.Hkv, c.Nk, c.D),
        "v": normal(c.B, c.Hkv, c.Nk, Dv),
    }
    if c.bias is not None:
        drawn["bias"] = normal(*shape_of(c.bias, c))
    for family in c.values.split():
        VALUES[family](drawn)
    rows = {"out": (c.B, c.Hq, c.Nq, Dv), "lse": (c.B, c.Hq, c.Nq), "entropy": (c.B, c.Hq, c.Nq)}
    upstream = {name: normal(*rows[name]) for name in UPSTREAM[c.returns]}

    names = c.layout.split()
    layouts = dict(zip(("q", "k", "v", "out"), names * (4 // len(names)), strict=True))
    if torch.device(device).type == "cuda":
        shapes = {n: tuple(drawn[n].shape) for n in "qkv"} | {"out": rows["out"]}
        need_memory([(layouts[n], shape) for n, shape in shapes.items()], dtype)
    leaves = {name: LAYOUTS[layouts[name]](drawn[name].to(device, dtype)) for name in "qkv"}
    if c.bias is not None:
        leaves["bias"] = drawn["bias"].to(device, c.bias_dtype or dtype)
    options = dict(softcap=c.softcap, dropout_p=c.dropout_p, seed=c.seed)
    options |= dict(return_lse=c.returns == "lse", return_statistics=c.returns == "statistics")
    if isinstance(c.scale, tuple):
        leaves["scale"] = torch.tensor(c.scale, device=device)
    else:
        options["scale"] = c.scale
    if c.mask is not None:
        options["mask"] = make_mask(c.mask, c, g).to(device)
    statistics = torch.promote_types(dtype, torch.float32)
    upstream = {
        name: LAYOUTS[layouts[name]](t.to(device, dtype))
        if name == "out"
        else t.to(device, statistics)
        for name, t in upstream.items()
        if c.used is None or name in c.used.split()
    }
    call = Call({n: t.detach() for n, t in leaves.items()}, options, upstream)
    if c.op == "attention_weights":
        call = weights_call(call, c, normal)
    if c.op == "received_mass":
        call = mass_call(call, c, normal)
    for name, t in call.leaves.items():
        t.requires_grad_(c.needs is None or name in c.needs.split())
    return call


def weights_call(call: Call, c: Case, normal) -> Call:
    """The same scores for `attention_weights`."""
    q, dtype = call.leaves["q"], torch.promote_types(call.leaves["q"].dtype, torch.float32)
    leaves = {n: t for n, t in call.leaves.items() if n != "v"}
    options = {n: t for n, t in call.options.items() if not n.startswith("return_")}
    if c.given_lse:
        # not quite that of the scores, so that a gradient lost in it would show
        x = cross_attention.check(**call.in_double().leaves, **call.options | {"return_lse": True})
        lse = reference.cross_attention(x).lse.detach()
        leaves["lse"] = (lse + 0.1 * normal(*lse.shape).to(q.device)).to(dtype)
    shape = (c.B, c.Nq, c.Nk) if c.average_heads else (c.B, c.Hq, c.Nq, c.Nk)
    upstream = {"weights": normal(*shape).to(q)}
    return Call(leaves, options | {"average_heads": c.average_heads}, upstream, attention_weights)


def mass_call(call: Call, c: Case, normal) -> Call:
    """The same scores for `received_mass`."""
    q, dtype = call.leaves["q"], torch.promote_types(call.leaves["q"].dtype, torch.float32)
    leaves = {n: t for n, t in call.leaves.items() if n != "v"}
    left_out = ("return_lse", "return_statistics", "dropout_p", "seed")
    options = {n: t for n, t in call.options.items() if n not in left_out}
    if c.weighted:
        leaves["row_weight"] = normal(c.B, c.Nq).to(q.device, dtype)
    shape = (c.B, c.Nk) if c.average_heads else (c.B, c.Hkv, c.Nk)
    upstream = {"mass": normal(*shape).to(q.device, dtype)}
    return Call(leaves, options | {"average_heads": c.average_heads}, upstream, received_mass)


def written_out(call: Call) -> Call:
    """With an interval's bounds as full [B, Nq] tensors, for which there is one compiled kernel."""
    mask = call.options.get("mask")
    if not isinstance(mask, KeyInterval):
        return call
    bounds = mask.expand(call.leaves["q"].shape[0], call.leaves["q"].shape[2])
    return replace(
        call,
        options=call.options
        | {"mask": KeyInterval(*(t.clone(memory_format=torch.contiguous_format) for t in bounds))},
    )


def run(call: Call, backend: str) -> Tensors:
    """out, lse, entropy, max_probability as far as asked for, or the weights, or the mass; then
    "d" + name for each leaf that requires grad."""
    result = call.op(**call.leaves, **call.options, backend=backend)
    first = FIRST.get(call.op, "out")
    found = {first: result} if isinstance(result, Tensor) else result._asdict()
    found = {name: t for name, t in found.items() if t is not None}
    if "max_probability" in found:
        assert not found["max_probability"].requires_grad
    needed = {n: t for n, t in call.leaves.items() if t.requires_grad}
    if not needed:
        assert not any(t.requires_grad for t in found.values())
        return found
    outputs = [name for name in call.upstream if found[name].requires_grad]
    if not outputs:  # lse alone, which does not depend on v
        return found | {f"d{n}": torch.zeros_like(t) for n, t in needed.items()}
    grads = torch.autograd.grad(
        [found[name] for name in outputs],
        list(needed.values()),
        [call.upstream[name] for name in outputs],
        materialize_grads=first not in call.upstream,
    )
    return found | {f"d{n}": g for n, g in zip(needed, grads, strict=True)}


def compute_expected(call: Call) -> Expected:
    exact = call.in_double()
    return run(call, "eager"), run(exact, "eager"), magnitudes(exact, call.leaves["q"].dtype)


@lru_cache(None)
def expected(c: Case, dtype: torch.dtype, device: str = "cpu") -> Expected:
    return compute_expected(build(c, dtype, device))


def assert_right(c: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> Tensors:
    """Every result and gradient of the backend is as accurate as eager's in the same dtype."""
    ours = run(build(c, dtype, device), backend)
    assert_agrees(ours, c, dtype, device)
    return ours


def assert_agrees(ours: Tensors, c: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    assert_as_expected(ours, expected(c, dtype, device), c, dtype)


def assert_as_expected(
    ours: Tensors, reference: Expected, c: Case, dtype: torch.dtype, floors: float = 1.0
) -> None:
    eager, truth, size = reference
    assert ours.keys() == truth.keys()
    for name, t in ours.items():
        coarser = max(dtype, t.dtype, key=FLOOR.get)  # of the terms and of their sum
        of_terms = dict(size=size[name], rounded_to=coarser) if name in size else {}
        of_terms["floors"] = floors
        assert_as_accurate(t, eager[name], truth[name], f"{c}: {name}", **of_terms)
