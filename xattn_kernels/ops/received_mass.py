"""`received_mass`: how much attention each key receives, and its gradient.

The forward is a kernel over tiles of keys. The gradient is that of an attention that is there
already: sum_j g_j R_j = sum_i w_i out_i, where out is attention to values v_j = g_j of one column,
so that w is the gradient of out.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import reference
from ..core.arguments import check_bools
from ..core.call import ReceivedMassCall
from ..core.dispatch import Backend, run
from ..core.kernel_op import kernel_op
from ..core.layout import MassResults, empty_mass, gradients_of, sum_dtype
from ..core.tensor_arguments import attention_fields, check_tensors
from ..torch_kernels import attention_weights as torch_weights
from ..torch_kernels.topk_attention import chunks
from .attention_weights import check_lse, narrow_call
from .cross_attention import attend, triton_reasons

mass_op = kernel_op(
    "received_mass",
    ReceivedMassCall,
    MassResults,
    lambda call, backend: empty_mass(call),
    gradients=gradients_of("q", "k", "bias", "scale_tensor", "row_weight"),
    keep=lambda call, results, _: (replace(call, lse=None, lse_low=None), results),
)


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
    call = check(
        q, k, row_weight=row_weight, lse=lse, mask=mask, bias=bias, scale=scale, softcap=softcap,
        average_heads=average_heads, validate=validate,
    )  # fmt: skip
    mass = run("received_mass", BACKENDS, call, backend)
    return mass.mean(1) if call.average_heads else mass


def check(
    q, k, *, row_weight=None, lse=None, mask=None, bias=None, scale=None, softcap=None,
    average_heads=True, validate=False,
) -> ReceivedMassCall:  # fmt: skip
    """The call with these arguments; raises TypeError or ValueError naming the argument."""
    check_bools(average_heads=average_heads)
    check_tensors(q, k, k)
    shared = attention_fields(
        q, k, mask=mask, bias=bias, scale=scale, softcap=softcap, validate=validate
    )
    lse = check_lse(lse, q)
    return ReceivedMassCall(
        **shared,
        lse=None if lse is None else lse.detach(),
        lse_low=None,
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


def over_heads(weights: Tensor, call: ReceivedMassCall) -> Tensor:
    """[B, Hkv, Nk] of weights [B, Hq, Nq, Nk]."""
    weights = weights.to(sum_dtype(call.q))
    if call.row_weight is not None:
        weights = weights * call.row_weight[:, None, :, None]
    return weights.sum(2).unflatten(1, (call.Hkv, call.group)).mean(2)


def run_eager(call: ReceivedMassCall) -> Tensor:
    return over_heads(reference.probabilities(call), call)


def run_torch(call: ReceivedMassCall) -> Tensor:
    """The weights of some queries at a time, each head recomputed in the backward."""
    mass = call.k.new_zeros((call.B, call.Hkv, call.Nk), dtype=sum_dtype(call.q))
    # Without queries there is one part, so that the result has its zero gradients.
    for rows in chunks(call.Nq, call.B * call.Hq * call.Nk) if call.Nq else (slice(0, 0),):
        part = call.part(slice(None), rows)
        _, weights = torch_weights.attend(part, out=False, average_heads=False)
        mass = mass + over_heads(weights, part)
    return mass


def run_triton(call: ReceivedMassCall) -> Tensor:
    if call.lse is None:
        with torch.no_grad():
            results = attend(narrow_call(call), "triton")
        call = replace(call, lse=results.lse, lse_low=results.lse_low)
    return mass_op(call, "triton").mass


BACKENDS = (
    Backend("triton", triton_reasons, run_triton),
    Backend("torch", reference.reasons, run_torch),
    Backend("eager", reference.reasons, run_eager, by_name=True),
)
received_mass.backends, received_mass.check = BACKENDS, check
