"""From a `Case` to tensors, results and gradients, and the comparison of one backend with eager."""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cases import Case
from mask_kinds import MASKS, shape_of
from numerics import assert_as_accurate
from xattn_kernels import KeyInterval, cross_attention, reference
from xattn_kernels.inputs import CrossAttentionInputs

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """`leaves` are the arguments that require grad: q, k, v and, where there are, bias, scale."""

    leaves: Tensors
    options: dict[str, Any]
    upstream: Tensors  # the gradients of out, lse, entropy, as far as asked for

    def inputs(self) -> CrossAttentionInputs:
        return cross_attention.check(**self.leaves, **self.options)

    def in_double(self) -> Call:
        """The same numbers in float64, laid out plainly."""
        leaves, upstream = (
            {
                n: t.detach().double().clone(memory_format=torch.contiguous_format)
                for n, t in d.items()
            }
            for d in (self.leaves, self.upstream)
        )
        return Call({n: t.requires_grad_() for n, t in leaves.items()}, self.options, upstream)


def reserve(shape: tuple[int, ...], strides: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros of any strides: on a CPU address space, of which only touched pages cost memory."""
    elements = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if not like.is_cpu:
        return like.new_zeros(elements).as_strided(shape, strides)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, elements * like.element_size(), flags=flags)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(shape, strides)


def far_apart(t: Tensor) -> Tensor:
    """The last row of a head, the next head and the next batch are each 2^31 elements away."""
    B, H, N, width = t.shape
    row = (2**31 // max(N - 1, 1) + 16) // 16 * 16
    return reserve(t.shape, (row * N * H, row * N, row, 1), t).copy_(t)


def far_batches(t: Tensor) -> Tensor:
    """Batches lie 2^30 elements apart: the stride fits 32 bits, the third one's offset does not."""
    B, H, N, width = t.shape
    return reserve(t.shape, (2**30, N * width, width, 1), t).copy_(t)


def sliced(t: Tensor) -> Tensor:
    """Inside a larger tensor, at an offset and with strides that nothing divides."""
    B, H, N, width = t.shape
    return t.new_zeros(B, H, N + 2, width + 3)[:, :, 1:-1, 1:-2].copy_(t)


def padded(t: Tensor) -> Tensor:
    """Aligned where it begins, and in no other row."""
    return torch.cat([t, t[..., :3]], 3)[..., :-3]


def one_of_two(t: Tensor) -> Tensor:
    """Half of a joint projection [B, N, 2, H, width]."""
    return torch.stack([t, -t]).permute(1, 3, 0, 2, 4).contiguous()[:, :, 0].transpose(1, 2)


# How a tensor [B, H, N, width] lies in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "BHND": lambda t: t,
    "BNHD": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "NBHD": lambda t: t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "BN2HD": one_of_two,
    "sliced": sliced,
    "padded": padded,
    "expanded_batch": lambda t: t[:1].expand_as(t),
    "expanded_heads": lambda t: t[:, :1].expand_as(t),
    "far_apart": far_apart,
    "far_batches": far_batches,
}


def ties(t: Tensors) -> None:
    """Small whole numbers: many scores are equal, the largest too."""
    t["q"], t["k"] = (t[name].round().clamp(-1, 1) for name in "qk")


def equal_keys(t: Tensors) -> None:
    t["k"] = t["k"][:, :, :1].expand_as(t["k"]).clone()


def overflow(t: Tensors) -> None:
    """q k^T exceeds what float16 holds; the case's scale brings it back."""
    t["q"], t["k"] = 120 * t["q"], 120 * t["k"]


def peaked(t: Tensors) -> None:
    """One key takes nearly everything."""
    t["q"] = 20 * t["q"]


def tiny(t: Tensors) -> None:
    """Values that are subnormal in float16."""
    t["v"] = 1e-6 * t["v"]


def bias_infinite(t: Tensors) -> None:
    """-inf here and there, and in whole rows."""
    t["bias"][..., 1::3] = -torch.inf
    t["bias"][:, :, ::2] = -torch.inf


def bias_lowest(t: Tensors) -> None:
    """Float16's most negative number, as many libraries write a mask, in a part of the rows."""
    t["bias"][..., 1::2, 2:] = torch.finfo(torch.float16).min


def bias_lowest_rows(t: Tensors) -> None:
    """The same in whole rows, where nothing of log(sum) is left in a float32 lse."""
    t["bias"][..., 1::2, :] = torch.finfo(torch.float16).min


def bias_minus_1e9(t: Tensors) -> None:
    """float32's way of writing a mask (-inf in float16), in whole rows; added to the lowest it is
    float32's lowest number."""
    t["bias"][..., ::2, :] = -1e9
    t["bias"][..., 1::4, :] = torch.finfo(torch.float32).min


def bias_lowest_keys(t: Tensors) -> None:
    """float32's lowest number before the first keys that count, over more than a tile."""
    t["bias"][..., :100] = torch.finfo(torch.float32).min


def bias_by_key(t: Tensors) -> None:
    """The same numbers with the last dimension not contiguous."""
    t["bias"] = t["bias"].transpose(2, 3).contiguous().transpose(2, 3)


def put(name: str, value: float) -> Callable[[Tensors], None]:
    """One number of one row of one tensor."""

    def change(t: Tensors) -> None:
        t[name][0, 0, 1, 2] = value

    return change


VALUES: dict[str, Callable[[Tensors], None]] = {"normal": lambda t: None} | {
    f.__name__: f
    for f in (
        ties, equal_keys, overflow, peaked, tiny, bias_infinite, bias_lowest, bias_lowest_rows,
        bias_lowest_keys, bias_minus_1e9, bias_by_key,
    )
}  # fmt: skip
VALUES |= {f"nan_{name}": put(name, torch.nan) for name in ("q", "k", "v", "bias")}
VALUES |= {f"infinite_{name}": put(name, torch.inf) for name in ("q", "k", "v")}
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
    VALUES[c.values](drawn)
    rows = {"out": (c.B, c.Hq, c.Nq, Dv), "lse": (c.B, c.Hq, c.Nq), "entropy": (c.B, c.Hq, c.Nq)}
    upstream = {name: normal(*rows[name]) for name in UPSTREAM[c.returns]}

    place = LAYOUTS[c.layout]
    leaves = {name: place(drawn[name].to(device, dtype)) for name in "qkv"}
    if c.bias is not None:
        leaves["bias"] = drawn["bias"].to(device, c.bias_dtype or dtype)
    options = dict(softcap=c.softcap, dropout_p=c.dropout_p, seed=2**40 + 123)
    options |= dict(return_lse=c.returns == "lse", return_statistics=c.returns == "statistics")
    if isinstance(c.scale, tuple):
        leaves["scale"] = torch.tensor(c.scale, device=device)
    else:
        options["scale"] = c.scale
    if c.mask is not None:
        options["mask"] = MASKS[c.mask](c, g).to(device)
    upstream = {
        name: place(t.to(device, dtype)) if name == "out" else t.float().to(device)
        for name, t in upstream.items()
    }
    return Call({n: t.detach().requires_grad_() for n, t in leaves.items()}, options, upstream)


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
    """out, lse, entropy, max_probability as far as asked for, then "d" + name for each leaf."""
    result = cross_attention(**call.leaves, **call.options, backend=backend)
    found = {"out": result} if isinstance(result, Tensor) else result._asdict()
    found = {name: t for name, t in found.items() if t is not None}
    if "max_probability" in found:
        assert not found["max_probability"].requires_grad
    grads = torch.autograd.grad(
        [found[name] for name in call.upstream],
        list(call.leaves.values()),
        list(call.upstream.values()),
    )
    return found | {f"d{n}": g for n, g in zip(call.leaves, grads, strict=True)}


@torch.no_grad()
def magnitudes(call: Call) -> dict[str, float]:
    """For each gradient of a call in float64 the size of what is summed in it.

    Rounding is relative to the terms, not to their sum, which may cancel to nothing: terms of one
    row of scores share an error and add up, errors of different rows are independent.
    """
    x = call.inputs()
    s = reference.scores(x)
    p, lse, entropy, _ = reference.softmax(s)
    v, k = (t.repeat_interleave(x.Hq // x.Hkv, 1) for t in (x.v, x.k))
    dout = call.upstream["out"]
    dp = dout @ v.mT
    kept = reference.drop(p, x)
    terms = kept * dp.abs() + p * (kept * dp.abs()).sum(-1, keepdim=True)
    for name, row in (
        ("lse", torch.ones_like(s)),
        ("entropy", (s - lse[..., None]).abs() + entropy[..., None]),
    ):
        if name in call.upstream:
            terms = terms + p * (row * call.upstream[name].abs()[..., None]).nan_to_num(0, 0, 0)
    qk = x.q @ k.mT
    scale = x.scale.view(1, -1, 1, 1) if isinstance(x.scale, Tensor) else x.scale
    over = [d for d in range(4) if x.bias is not None and x.bias.shape[d] == 1]
    sizes = {
        "dq": (scale * terms) @ k.abs(),
        "dk": ((scale * terms).square().mT @ x.q.square()).sqrt(),
        "dv": (kept.square().mT @ dout.square()).sqrt(),
        "dbias": terms.square().sum(over).sqrt(),
        "dscale": (terms * qk.abs()).sum(-1).square().sum((0, 2)).sqrt(),
    }
    sizes = {name: t[t.isfinite()].abs() for name, t in sizes.items()}
    return {name: t.max().item() if t.numel() else 0.0 for name, t in sizes.items()}


@lru_cache(None)
def expected(c: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensors, Tensors, dict]:
    """(eager in `dtype`, eager in float64, magnitudes)."""
    call = build(c, dtype, device)
    exact = call.in_double()
    return run(call, "eager"), run(exact, "eager"), magnitudes(exact)


def assert_right(c: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> Tensors:
    """Every result and gradient of the backend is as accurate as eager's in the same dtype."""
    ours = run(build(c, dtype, device), backend)
    assert_agrees(ours, c, dtype, device)
    return ours


def assert_agrees(ours: Tensors, c: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    eager, truth, size = expected(c, dtype, device)
    assert ours.keys() == truth.keys()
    for name, t in ours.items():
        of_terms = dict(size=size[name], rounded_to=dtype) if name in size else {}
        assert_as_accurate(t, eager[name], truth[name], f"{c}: {name}", **of_terms)
