"""`received_mass`: how much attention each key receives, and its gradient.

The forward is a kernel over tiles of keys. The gradient is that of an attention that is there
already: sum_j g_j R_j = sum_i w_i out_i, where out is attention to values v_j = g_j of one column,
so that w is the gradient of out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..core.arguments import check_bools
from ..core.call import CrossAttentionInputs, check_inputs
from ..core.dispatch import Backend, allow_tf32, run
from ..core.kernel_op import apart, refuse_double_backward
from ..torch_kernels import attention_weights as torch_weights
from ..torch_kernels.topk_attention import chunks
from .attention_weights import check_lse
from .cross_attention import attend, triton_reasons
from .cross_attention import backward_op as attention_backward_op
from .cross_attention import forward_op as attention_forward_op
from .cross_attention import launch_backward as launch_attention_backward
from .cross_attention import launch_forward as launch_attention_forward

COLUMNS = 16  # of the values of the gradient: the narrowest that the kernels multiply


@dataclass(frozen=True)
class ReceivedMassInputs(CrossAttentionInputs):
    """One checked call; `v` is not used. `row_weight` is [B, Nq] in the dtype of the sums; `lse`
    has no gradient."""

    lse: Tensor | None
    row_weight: Tensor | None
    average_heads: bool

    def part(self, batch: slice, rows: slice) -> ReceivedMassInputs:
        w = self.row_weight
        cut = replace(self, lse=None, row_weight=None if w is None else w[batch, rows])
        return super(ReceivedMassInputs, cut).part(batch, rows)


def received_mass(
    q: Tensor,
    k: Tensor,
    *,
    row_weight: Tensor | None = None,
    lse: Tensor | None = None,
    mask=None,
    bias: Tensor | None = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    average_heads: bool = True,
    backend: str | None = None,
    validate: bool = False,
) -> Tensor:
    """How much attention each key receives: the sum over queries of its attention weights.

        R_j = sum_i w_i p_ij        p as in `cross_attention`, before dropout

    Without `row_weight` the masses of a batch element sum to its queries that see any key. The
    weights never exist as a matrix on the triton backend, neither in the forward nor in the
    backward; the torch backend makes those of a few queries at a time.

    Args:
        q, k, mask, bias, scale, softcap, validate: as in `cross_attention`.
        row_weight: floating-point, broadcastable to [B, Nq]; w_i, by default 1. Zeros and ones
            choose queries. Differentiable.
        lse: [B, Hq, Nq] float32 (float64 for float64 inputs), what `cross_attention` returned for
            the same arguments: it saves the triton backend a pass over the keys; the others take
            the softmax itself. Gradients are the softmax's either way; a given lse has none.
        average_heads: False returns the mass of each key head, the mean of its query heads.
        backend: "triton", "torch" or "eager"; None takes the first but eager that can run.

    Returns:
        [B, Nk], or [B, Hkv, Nk] without averaging, in float32 (float64 for float64 inputs).
        Differentiable in q, k, bias, scale and row_weight.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype, device or range.
        RuntimeError: the named backend has reasons against this call.

    Source: the column sums of the attention matrix, as e.g. Zhang et al., "H2O: heavy-hitter
    oracle" (2023) rank keys by; computed from lse as Dao et al., "FlashAttention" (2022) do theirs.
    """
    x = check(
        q,
        k,
        row_weight=row_weight,
        lse=lse,
        mask=mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        average_heads=average_heads,
        validate=validate,
    )
    mass = run("received_mass", BACKENDS, x, backend)
    return mass.mean(1) if x.average_heads else mass


def check(q, k, *, row_weight=None, lse=None, average_heads=True, **options) -> ReceivedMassInputs:
    """The checked inputs of one call; raises TypeError or ValueError naming the argument."""
    check_bools(average_heads=average_heads)
    x = check_inputs(q, k, k, **options)
    lse = check_lse(lse, q)
    return ReceivedMassInputs(
        **vars(x),
        lse=None if lse is None else lse.detach(),
        row_weight=check_row_weight(row_weight, q),
        average_heads=average_heads,
    )


def check_row_weight(w, q: Tensor) -> Tensor | None:
    """[B, Nq] in the dtype of the sums, expanded."""
    if w is None:
        return None
    if not isinstance(w, Tensor):
        raise TypeError(f"row_weight must be a tensor or None, got {type(w).__name__}")
    if not w.is_floating_point():
        raise TypeError(f"row_weight must be floating-point, got {w.dtype}")
    B, _, Nq, _ = q.shape
    fits = w.dim() <= 2 and all(
        n in (1, most) for n, most in zip(reversed(w.shape), (Nq, B), strict=False)
    )
    if not fits or w.device != q.device:
        raise ValueError(
            f"row_weight must broadcast to [B, Nq] = {[B, Nq]} on {q.device}, got "
            f"{list(w.shape)} on {w.device}"
        )
    return w.to(sum_dtype(q)).expand(B, Nq)


def sum_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def over_heads(weights: Tensor, x: ReceivedMassInputs) -> Tensor:
    """[B, Hkv, Nk] of weights [B, Hq, Nq, Nk]."""
    weights = weights.to(sum_dtype(x.q))
    if x.row_weight is not None:
        weights = weights * x.row_weight[:, None, :, None]
    return weights.sum(2).unflatten(1, (x.Hkv, x.Hq // x.Hkv)).mean(2)


def run_eager(x: ReceivedMassInputs) -> Tensor:
    return over_heads(reference.attention_weights(x, None, False), x)


def run_torch(x: ReceivedMassInputs) -> Tensor:
    """The weights of some queries at a time, each head recomputed in the backward."""
    mass = x.k.new_zeros((x.B, x.Hkv, x.Nk), dtype=sum_dtype(x.q))
    for rows in chunks(x.Nq, x.B * x.Hq * x.Nk):
        part = x.part(slice(None), rows)
        _, weights = torch_weights.attend(part, out=False, average_heads=False)
        mass = mass + over_heads(weights, part)
    return mass


def run_triton(x: ReceivedMassInputs) -> Tensor:
    lse, lse_low = x.lse, None
    if lse is None:  # a forward pass over the narrowest values there are
        narrow = replace(x, v=x.k[..., :COLUMNS], return_lse=True)
        with torch.no_grad():
            (_, lse, *_), lse_low = attend(narrow)
    scale_tensor = x.scale if isinstance(x.scale, Tensor) else None
    options = (math.nan if scale_tensor is not None else x.scale, x.softcap or 0.0, allow_tf32())
    q, k = apart(x.q, x.k)
    return ReceivedMassFunction.apply(
        q, k, x.bias, scale_tensor, x.row_weight, lse, lse_low, *x.bounds(), x.mask, options
    )


BACKENDS = (
    Backend("triton", triton_reasons, run_triton),
    Backend("torch", reference.reasons, run_torch),
    Backend("eager", reference.reasons, run_eager, by_name=True),
)
received_mass.backends, received_mass.check = BACKENDS, check


class ReceivedMassFunction(torch.autograd.Function):
    """Wires the launchers into autograd."""

    @staticmethod
    def forward(ctx, q, k, bias, scale, row_weight, lse, lse_low, start, stop, mask, options):
        launch = forward_op if torch.compiler.is_compiling() else launch_forward
        ctx.save_for_backward(q, k, bias, scale, row_weight, start, stop, mask)
        ctx.options = options
        weight = None if row_weight is None else row_weight.detach()
        return launch(q, k, bias, scale, lse, lse_low, start, stop, mask, weight, *options)

    @staticmethod
    def backward(ctx, dmass):
        compiling = torch.compiler.is_compiling()
        forward = attention_forward_op if compiling else launch_attention_forward
        backward = attention_backward_op if compiling else launch_attention_backward
        q, k, bias, scale, row_weight, *bounds, mask = ctx.saved_tensors
        *options, tf32 = ctx.options
        needs = ctx.needs_input_grad[:5]
        with torch.no_grad():
            v, dout = values_of(dmass, q), gradients_of(row_weight, q)
            call = (q, k, v, bias, scale, *bounds, mask, None)
            settings = (*options, 0.0, False, tf32)
            out, *rows = forward(*call, *settings)
            wanted = [*needs[:2], False, *needs[2:4]]
            dq, dk, _, dbias, dscale = backward(
                dout, None, None, *call, out, *rows[:3], *settings, wanted
            )
            drow_weight = out[..., :2].to(sum_dtype(q)).sum((1, 3))
        grads = (dq, dk, dbias, dscale, drow_weight)
        grads = tuple(g if needed else None for g, needed in zip(grads, needs, strict=True))
        sources = (dmass, q, k, bias, scale, row_weight)
        return *refuse_double_backward("received_mass", grads, sources), *[None] * 6


def two_parts(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(large, small) of a dtype that may be narrower than that of their sum, `t`."""
    large = t.to(dtype)
    small = torch.where(large.isfinite(), t - large.to(t.dtype), 0.0).to(dtype)
    return large, small


def values_of(dmass: Tensor, q: Tensor) -> Tensor:
    """[B, Hkv, Nk, COLUMNS]: g in two parts, twice, for the two parts of w; see the module."""
    large, small = two_parts(dmass * (dmass.shape[1] / q.shape[1]), q.dtype)
    return F.pad(torch.stack((large, small, large, small), -1), (0, COLUMNS - 4))


def gradients_of(row_weight: Tensor | None, q: Tensor) -> Tensor:
    """[B, Hq, Nq, COLUMNS]: w in two parts, each beside both of g."""
    if row_weight is None:
        one = F.pad(q.new_ones(2), (0, COLUMNS - 2))
        return one.expand(*q.shape[:3], COLUMNS)
    large, small = two_parts(row_weight, q.dtype)
    columns = F.pad(torch.stack((large, large, small, small), -1), (0, COLUMNS - 4))
    return columns[:, None].expand(*q.shape[:3], COLUMNS)


def launch_forward(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    scale_tensor: Tensor | None,
    lse: Tensor,
    lse_low: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    scale: float,
    softcap: float,
    allow_tf32: bool,
) -> Tensor:
    """float32 [B, Hkv, Nk]."""
    from ..triton_kernels import received_mass as kernels

    return kernels.forward(
        q, k, bias, scale_tensor, lse, lse_low, start, stop, mask, row_weight, scale, softcap,
        allow_tf32,
    )  # fmt: skip


# Under torch.compile and torch.export a launch is one node; an eager call goes straight to it.
forward_op = torch.library.custom_op(
    "xattn_kernels::received_mass_forward", launch_forward, mutates_args=()
)


@forward_op.register_fake
def fake_forward(q, k, bias, scale_tensor, lse, lse_low, start, stop, mask, row_weight, scale,
                 softcap, allow_tf32):  # fmt: skip
    return k.new_empty(k.shape[:3], dtype=torch.float32)
