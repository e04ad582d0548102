"""Checks of the tensors of attention: each raises naming the argument, what it was and what is
allowed. `attention_fields` makes the fields of a call of them."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..masks import KeyInterval
from .arguments import check_number
from .call import CrossAttentionCall
from .dispatch import allow_tf32


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises unless q, k and v agree in rank, sizes, heads, dtype, device and layout."""
    for name, t in {"q": q, "k": k, "v": v}.items():
        check_tensor(name, t, q)
    if q.shape[3] < 1 or k.shape[3] != q.shape[3]:
        raise ValueError(f"q and k must share a head width D >= 1, got {q.shape[3]}, {k.shape[3]}")
    if min(q.shape[1], k.shape[1]) < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"the query heads must be a multiple of the key heads, got Hq={q.shape[1]} and "
            f"Hkv={k.shape[1]} (the layout is [B, heads, sequence, width])"
        )
    if v.shape[1:3] != k.shape[1:3]:
        raise ValueError(
            f"k and v must share [B, Hkv, Nk], got {tuple(k.shape[:3])} and {tuple(v.shape[:3])}"
        )


def check_tensor(name: str, t: Tensor, q: Tensor) -> None:
    """Raises unless `t` is a 4-d tensor like q in dtype, device and batch size."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dim() != 4:
        heads = "Hq, Nq, D" if name == "q" else "Hkv, Nk, " + ("D" if name == "k" else "Dv")
        raise ValueError(f"{name} must have 4 dimensions [B, {heads}], got shape {tuple(t.shape)}")
    if not t.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor, got {t.dtype}")
    if t.dtype != q.dtype:
        raise TypeError(f"q, k and v must share one dtype, got q {q.dtype} and {name} {t.dtype}")
    if t.device != q.device:
        raise ValueError(
            f"q, k and v must be on one device, got q on {q.device} and {name} on {t.device}"
        )
    if t.shape[3] > 1 and t.stride(3) != 1:
        raise ValueError(
            f"the last dimension of {name} must be contiguous (stride 1), got stride "
            f"{t.stride(3)}; call .contiguous() on it"
        )
    if t.shape[0] != q.shape[0]:
        raise ValueError(
            f"q, k and v must share the batch size, got q {q.shape[0]} and {name} "
            f"{t.shape[0]} (expand() makes a broadcast batch without a copy)"
        )


def view_4d(name: str, t: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """`t` as a 4-d view broadcastable to [B, Hq, Nq, Nk]; raises when it is not."""
    full = (*q.shape[:3], k.shape[2])
    if t.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {t.device}")
    fits = t.dim() <= 4 and all(
        n in (1, f) for n, f in zip(reversed(t.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name} must broadcast to [B, Hq, Nq, Nk] = {list(full)}, got shape {list(t.shape)}"
        )
    return t.reshape((1,) * (4 - t.dim()) + tuple(t.shape))


def check_mask(
    mask, q: Tensor, k: Tensor, validate: bool = False, name: str = "mask"
) -> tuple[KeyInterval | None, Tensor | None]:
    """Sorts `mask` into (interval, bool mask). The range check reads values, so a GPU waits."""
    if mask is None:
        return None, None
    if isinstance(mask, KeyInterval):
        if mask.start.device != q.device:
            raise ValueError(
                f"{name} must be on the device of q, {q.device}, got {mask.start.device}"
            )
        mask.expand(q.shape[0], q.shape[2])
        if validate or (q.device.type == "cpu" and not torch.compiler.is_compiling()):
            mask.check(k.shape[2])
        return mask, None
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"{name} must be a KeyInterval, a bool tensor or None, got {type(mask).__name__}"
        )
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{name} as a tensor must be bool (True = attend), got {mask.dtype}; "
            + ("pass additive values as bias" if mask.is_floating_point() else "call .bool() on it")
        )
    return None, view_4d(name, mask, q, k)


def check_bias(bias, q: Tensor, k: Tensor) -> Tensor | None:
    if bias is None:
        return None
    if not isinstance(bias, Tensor) or not bias.dtype.is_floating_point:
        got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"bias must be a floating-point tensor, got {got}")
    return view_4d("bias", bias, q, k)


def check_scale(scale, q: Tensor) -> tuple[float | None, Tensor | None]:
    """(number, tensor of 1 or Hq values), one of which is None."""
    if scale is None:
        return q.shape[3] ** -0.5, None
    if not isinstance(scale, Tensor):
        return check_number("scale", scale, "a number or a floating-point tensor"), None
    if not scale.dtype.is_floating_point:
        raise TypeError(f"scale must be a float or a floating-point tensor, got {scale.dtype}")
    if scale.device != q.device:
        raise ValueError(f"scale must be on the device of q, {q.device}, got {scale.device}")
    if tuple(scale.shape) not in ((), (1,), (q.shape[1],)):
        raise ValueError(
            f"scale must be a scalar or have shape [Hq] = [{q.shape[1]}], got {list(scale.shape)}"
        )
    return None, scale.reshape(-1)


def check_dropout(dropout_p: float, seed, q: Tensor) -> tuple[float, Tensor | None]:
    """(p, seed tensor). Without a seed one is drawn from torch's generator of q's device."""
    p = check_number("dropout_p", dropout_p, "a number in [0, 1)")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    check_seed(seed, q)
    if p == 0.0:
        return 0.0, None
    if seed is None:
        return p, torch.randint(2**62, (1,), dtype=torch.int64, device=q.device)
    if not isinstance(seed, Tensor):
        return p, torch.full((1,), int(seed), dtype=torch.int64, device=q.device)
    return p, seed.reshape(1)


def check_seed(seed, q: Tensor) -> None:
    allowed = f"seed must be an int of 64 bits or one int64 value on {q.device}"
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != q.device:
            raise ValueError(
                f"{allowed}, got {seed.dtype} of shape {list(seed.shape)} on {seed.device}"
            )
    elif seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, (Integral, torch.SymInt)):
            raise TypeError(f"{allowed}, got {type(seed).__name__} {seed!r}")
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"{allowed}, got {seed}")


def check_softcap(softcap) -> float | None:
    allowed = "None or a positive number"
    c = None if softcap is None else check_number("softcap", softcap, allowed)
    if c is not None and not 0.0 < c < float("inf"):
        raise ValueError(f"softcap must be {allowed}, got {softcap}")
    return c


def attention_fields(
    q: Tensor, k: Tensor, *, mask=None, bias=None, scale=None, softcap=None, dropout_p=0.0,
    seed=None, validate=False,
) -> dict[str, Any]:  # fmt: skip
    """The fields of an `AttentionCall` whose q and k are checked."""
    interval, mask = check_mask(mask, q, k, validate)
    start, stop = (None, None) if interval is None else interval.expand(q.shape[0], q.shape[2])
    dropout_p, seed = check_dropout(dropout_p, seed, q)
    bias = check_bias(bias, q, k)
    scale, scale_tensor = check_scale(scale, q)
    return dict(
        q=q,
        k=k,
        bias=bias,
        scale_tensor=scale_tensor,
        start=start,
        stop=stop,
        mask=mask,
        seed=seed,
        scale=scale,
        softcap=check_softcap(softcap),
        dropout_p=dropout_p,
        allow_tf32=allow_tf32(),
    )


def value_fields(
    v: Tensor, *, return_lse=False, return_statistics=False, deterministic=None
) -> dict[str, Any]:
    """The fields that a `CrossAttentionCall` has beside those of an `AttentionCall`."""
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return dict(
        v=v,
        return_lse=return_lse or return_statistics,
        return_statistics=return_statistics,
        deterministic=deterministic,
    )


def check_attention(
    q, k, v, *, return_lse=False, return_statistics=False, deterministic=None, **options
) -> CrossAttentionCall:
    """The call of `cross_attention` with these arguments.

    Raises TypeError or ValueError naming the argument, what it was and what is allowed.
    """
    check_tensors(q, k, v)
    values = value_fields(
        v,
        return_lse=return_lse,
        return_statistics=return_statistics,
        deterministic=deterministic,
    )
    return CrossAttentionCall(**attention_fields(q, k, **options), **values)
