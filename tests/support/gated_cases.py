"""Calls of `gated_residual` and `gated_residual_norm`, and their comparison with eager."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from support.numerics import FLOOR, assert_as_accurate
from support.values import reserve
from xattn_kernels import gated_residual, gated_residual_norm

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class GatedCase:
    """`layout` of x and h, whose `values` are of one of VALUES; `gate` 0, a large number, or None
    for random values; `scalar`: one gate is a tensor without dimensions; `used` and `needs` name
    results with a gradient and inputs that want one, None: all."""

    name: str
    shape: tuple[int, ...] = (2, 5, 24)
    norm: str | None = None
    vector: bool = False
    scalar: bool = False
    mask: str | None = None  # random, none, all
    layout: str = "plain"
    values: str = "normal"
    gate: float | None = None
    gate_dtype: torch.dtype | None = None
    apart: bool = False  # gate, weight and bias are columns of a matrix
    h_dtype: torch.dtype | None = None
    weight: bool = True
    bias: bool = True
    eps: float = 1e-5
    used: str | None = None
    needs: str | None = None

    def __str__(self) -> str:
        return self.name


def transposed(t: Tensor) -> Tensor:
    """Rows in the opposite order of memory: [N, B, dim] seen as [B, N, dim]."""
    return t.transpose(0, -2).contiguous().transpose(0, -2)


def sliced(t: Tensor) -> Tensor:
    """Every other row of a wider tensor, at an odd offset."""
    wide = t.new_zeros(*t.shape[:-2], 2 * t.shape[-2], t.shape[-1] + 3)
    return wide[..., ::2, 1:-2].copy_(t)


def padded(t: Tensor) -> Tensor:
    """Rows of an odd distance, the first one aligned."""
    return t.new_zeros(*t.shape[:-1], t.shape[-1] + 3)[..., : t.shape[-1]].copy_(t)


def expanded(t: Tensor) -> Tensor:
    """One row for all; the caller's numbers change accordingly."""
    return t[..., :1, :].expand(t.shape)


def far_rows(t: Tensor) -> Tensor:
    """Rows of the last dimension but one together span 2^31 elements."""
    apart = (2**31 // max(t.shape[-2] - 1, 1) + 16) // 16 * 16
    strides = [apart, 1]
    for n in reversed(t.shape[1:-1]):
        strides.insert(0, strides[0] * n)
    return reserve(t.shape, tuple(strides), t).copy_(t)


def far_from_zero(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """A mean much larger than what varies around it."""
    return x + 40, h


def same_in_a_row(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """No variance at all, where the gate is one number."""
    return tuple(t[..., :1].repeat_interleave(t.shape[-1], -1) for t in (x, h))


VALUES = {
    "normal": lambda x, h: (x, h), "tiny": lambda x, h: (1e-6 * x, 1e-6 * h),
    "small_x": lambda x, h: (1e-2 * x, h), "large_x": lambda x, h: (300 * x, 1e-3 * h),
    "far_from_zero": far_from_zero, "same_in_a_row": same_in_a_row,
}  # fmt: skip
LAYOUTS = {
    "plain": lambda t: t, "transposed": transposed, "sliced": sliced, "padded": padded,
    "expanded": expanded, "far_rows": far_rows,
}  # fmt: skip
FORMS = {"plain": None, "layer": "layer", "rms": "rms"}


def cases() -> list[GatedCase]:
    found = []
    for name, norm in FORMS.items():
        for gate in ("one", "vector"):
            form = GatedCase(
                f"{name}_{gate}", norm=norm, vector=gate == "vector", bias=norm != "rms"
            )
            named = dict(
                base={}, masked=dict(mask="random"), no_row=dict(mask="none"),
                all_rows=dict(mask="all"), transposed=dict(layout="transposed", mask="random"),
                wide=dict(shape=(3, 600)), ragged=dict(shape=(70, 37), mask="random"),
                zero=dict(gate=0.0), twenty=dict(gate=20.0), minus_twenty=dict(gate=-20.0),
            )  # fmt: skip
            found += [replace(form, name=f"{form.name}_{n}", **more) for n, more in named.items()]
    many = GatedCase("", vector=True, norm="layer", mask="random")
    found += [
        replace(many, name=name, **more)
        for name, more in dict(
            sliced=dict(layout="sliced"), padded=dict(layout="padded", shape=(2, 5, 64)),
            expanded=dict(layout="expanded"),
            far_rows=dict(layout="far_rows", shape=(2, 3, 16), norm=None),
            far_rows_norm=dict(layout="far_rows", shape=(2, 3, 16)),
            four_dimensions=dict(shape=(2, 3, 2, 16), layout="transposed"),
            one_row=dict(shape=(24,)), one_column=dict(shape=(5, 1)), one_number=dict(shape=(1, 1)),
            no_rows=dict(shape=(2, 0, 24)), no_rows_plain=dict(shape=(0, 24), norm=None),
            many_tiles=dict(shape=(150, 1100)), many_tiles_plain=dict(shape=(530, 300), norm=None),
            many_rows=dict(shape=(2, 300, 16)), many_rows_plain=dict(shape=(2, 2100, 4), norm=None),
            no_weight=dict(weight=False), no_bias=dict(bias=False), large_eps=dict(eps=0.5),
            neither=dict(weight=False, bias=False),
            only_y=dict(used="y"), only_normed=dict(used="normed"),
            needs_x=dict(needs="x"), needs_h=dict(needs="h"), needs_gate=dict(needs="gate"),
            needs_weight=dict(needs="weight"), y_needs_bias=dict(needs="bias", used="y"),
            needs_bias=dict(needs="bias gate"),
            needs_x_plain=dict(needs="x", norm=None), needs_h_plain=dict(needs="h", norm=None),
            needs_gate_plain=dict(needs="gate", norm=None),
            scalar_gate=dict(scalar=True, vector=False),
            scalar_gate_plain=dict(scalar=True, vector=False, norm=None),
            no_eps=dict(eps=0.0, shape=(3, 40)), no_eps_one=dict(eps=0.0, vector=False),
            columns_apart=dict(apart=True), gate_float32=dict(gate_dtype=torch.float32),
            narrower_h=dict(h_dtype=torch.bfloat16, norm="rms"),
        ).items()
    ]  # fmt: skip
    return found


CASES = cases()
BY_NAME = {c.name: c for c in CASES}


@dataclass(frozen=True)
class GatedCall:
    """`leaves` are the arguments that may require grad; `upstream` the gradients of y, normed."""

    case: GatedCase
    leaves: Tensors
    row_mask: Tensor | None
    upstream: Tensors

    def run(self, backend: str) -> Tensors:
        """y and, of the form with a norm, normed; then "d" + name of each leaf that wants one."""
        c, options = self.case, dict(row_mask=self.row_mask, backend=backend)
        if c.norm is None:
            found = {"y": gated_residual(**self.leaves, **options)}
        else:
            result = gated_residual_norm(**self.leaves, norm=c.norm, eps=c.eps, **options)
            found = result._asdict()
        wanted = {n: t for n, t in self.leaves.items() if t.requires_grad}
        outputs = [n for n in self.upstream if found[n].requires_grad]
        if not outputs:  # y alone, which does not depend on weight and bias
            return found | {f"d{n}": torch.zeros_like(t) for n, t in wanted.items()}
        grads = torch.autograd.grad(
            [found[n] for n in outputs], list(wanted.values()), [self.upstream[n] for n in outputs],
            materialize_grads=True,
        )  # fmt: skip
        return found | {f"d{n}": g for n, g in zip(wanted, grads, strict=True)}

    def in_double(self) -> GatedCall:
        leaves, upstream = (
            {n: t.detach().double().contiguous() for n, t in d.items()}
            for d in (self.leaves, self.upstream)
        )
        for n, t in leaves.items():
            t.requires_grad_(self.leaves[n].requires_grad)
        return replace(self, leaves=leaves, upstream=upstream)


def build(c: GatedCase, dtype: torch.dtype, device: str = "cpu") -> GatedCall:
    """The tensors of `c`: the same seed, hence the same numbers before they are rounded."""
    g = torch.Generator().manual_seed(zlib.crc32(c.name.encode()))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    dim, lay = c.shape[-1], LAYOUTS[c.layout] if len(c.shape) > 1 else LAYOUTS["plain"]
    x, h = VALUES[c.values](normal(*c.shape), normal(*c.shape))
    leaves = {"x": lay(x.to(device, dtype))}
    narrow = c.h_dtype if c.h_dtype and torch.promote_types(dtype, c.h_dtype) == dtype else dtype
    leaves["h"] = lay(h.to(device, narrow))
    gate = 0.6 * normal(dim) if c.vector else 0.6 * normal(1)
    gate = gate[0] if c.scalar else gate
    gate = gate if c.gate is None else torch.full_like(gate, c.gate)
    leaves["gate"] = gate.to(device, c.gate_dtype or dtype)
    if c.norm is not None and c.weight:
        leaves["weight"] = (1 + 0.3 * normal(dim)).to(device, dtype)
    if c.norm is not None and c.bias:
        leaves["bias"] = normal(dim).to(device, dtype)
    if c.apart:
        leaves |= {
            n: t[..., None].repeat_interleave(3, -1)[..., 1]
            for n, t in leaves.items()
            if n not in "xh"
        }
    row_mask = None
    if c.mask is not None:
        seen = {"random": torch.rand(c.shape[:-1], generator=g) < 0.6}.get(c.mask)
        row_mask = torch.full(c.shape[:-1], c.mask == "all") if seen is None else seen
        row_mask = row_mask.to(device)
        # what a row that does not count holds does not matter
        leaves["h"] = leaves["h"].masked_fill(~row_mask[..., None], torch.nan)
        leaves["h"] = lay(leaves["h"]) if c.layout != "expanded" else leaves["h"]
    outputs = ("y",) if c.norm is None else ("y", "normed")
    upstream = {n: lay(normal(*c.shape).to(device, dtype)) for n in outputs}
    upstream = {n: t for n, t in upstream.items() if c.used is None or n in c.used.split()}
    for n, t in leaves.items():
        t.requires_grad_(c.needs is None or n in c.needs.split())
    return GatedCall(c, leaves, row_mask, upstream)


@torch.no_grad()
def magnitudes(call: GatedCall) -> dict[str, float]:
    """The size of what is summed in each result, of a call in float64: independent terms. `parts`
    are those of n, which is left of y when the mean is taken away."""
    c, y = call.case, call.run("eager")["y"]
    dy = call.upstream.get("y", torch.zeros_like(y)).abs()
    dnormed = call.upstream.get("normed", torch.zeros_like(y)).abs()
    weight = call.leaves.get("weight", torch.ones(())).abs()
    found, parts, total = {}, torch.zeros_like(y), dy
    if c.norm is not None and y.numel():
        spread = y.var(-1, unbiased=False, keepdim=True)
        spread = spread if c.norm == "layer" else y.square().mean(-1, keepdim=True)
        factor, dn = torch.rsqrt(spread + c.eps), weight * dnormed
        parts = factor * y.abs()
        away = parts * (parts * dn).mean(-1, keepdim=True) + dn.mean(-1, keepdim=True)
        total = dy + factor * (dn + away)
        found["normed"] = (parts * weight).max().item()
    h = call.leaves["h"].nan_to_num(0.0)
    terms = dict(dgate=total * h, dweight=parts * dnormed, dbias=dnormed, dx=total, dh=total)
    for name, t in terms.items():
        t = t.reshape(-1, t.shape[-1]).square()
        summed = t.sum() if name == "dgate" and not c.vector else t.sum(0)
        t = t if name in ("dx", "dh") else summed
        found[name] = t.sqrt().max().item() if t.numel() else 0.0
    return found


def assert_right(c: GatedCase, backend: str, dtype: torch.dtype, device: str = "cpu") -> Tensors:
    """Each result and gradient is as accurate as eager's in the same dtype; returns them."""
    call = build(c, dtype, device)
    ours, eager = call.run(backend), call.run("eager")
    exact = call.in_double()
    truth, size = exact.run("eager"), magnitudes(exact)
    assert ours.keys() == truth.keys()
    for name, t in ours.items():
        of = call.leaves.get(name[1:]) if name.startswith("d") else call.leaves["x"]
        assert (t.shape, t.dtype) == (of.shape, of.dtype), name
        coarser = max(dtype, c.h_dtype or dtype, t.dtype, key=FLOOR.get)
        terms = dict(size=size[name], rounded_to=coarser) if name in size else {}
        assert_as_accurate(t, eager[name], truth[name], f"{c}: {name}", **terms)
    return ours
