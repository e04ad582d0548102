"""`attention_weights`: the attention probabilities, averaged over the heads as they are written."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import reference
from ..core.arguments import check_bools
from ..core.call import AttentionCall, AttentionWeightsCall, CrossAttentionCall, shared_fields
from ..core.dispatch import Backend, run
from ..core.kernel_op import kernel_op
from ..core.layout import WeightsResults, empty_weights, gradients_of
from ..core.tensor_arguments import attention_fields, check_tensors
from ..torch_kernels import attention_weights as torch_weights
from .cross_attention import attend, triton_reasons

NARROW = 16  # columns of values, the fewest that the kernels are fast with
weights_op = kernel_op(
    "attention_weights",
    AttentionWeightsCall,
    WeightsResults,
    lambda call, backend: empty_weights(call),
    gradients=gradients_of("q", "k", "bias", "scale_tensor", "lse"),
)


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    lse: Tensor | None = None,
    mask=None,
    bias: Tensor | None = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    average_heads: bool = True,
    backend: str | None = None,
    validate: bool = False,
) -> Tensor:
    """The weights with which `cross_attention` sums the values, by default their mean over heads.

        w = dropout(exp(s - lse))        s as in `cross_attention`; rows without a key are 0

    The mean never exists as [B, Hq, Nq, Nk], neither in the forward nor in the backward. With the
    same seed the dropped weights are those that `cross_attention` drops. Autocast casts nothing,
    except in a backward that itself runs under autocast, on the torch and eager backends.

    Args:
        q, k, mask, bias, scale, softcap, dropout_p, seed, validate: as in `cross_attention`.
        lse: [B, Hq, Nq] float32 (float64 for float64 inputs), what `cross_attention` returned for
            the same arguments; it saves computing it again and receives a gradient. The weights
            of a row then sum to 1 only if it is that row's lse, and as well as float32 holds it:
            beside scores of -1e9 nothing of log(sum) is left.
        average_heads: False returns the weights of every head.
        backend: "triton", "torch" (PyTorch's own kernels, one head at a time, recomputed in the
            backward) or "eager"; None takes the first of triton and torch that can run.

    Returns:
        [B, Nq, Nk], or [B, Hq, Nq, Nk] without averaging, in the dtype of q; summed in float32
        and rounded once. Differentiable in q, k, bias, scale and lse.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype, device or range.
        RuntimeError: the named backend has reasons against this call.

    Source: the average is that of `torch.nn.MultiheadAttention`; recomputing probabilities from lse
    is that of Dao et al., "FlashAttention" (2022).
    """
    call = check(
        q, k, lse=lse, mask=mask, bias=bias, scale=scale, softcap=softcap, dropout_p=dropout_p,
        seed=seed, average_heads=average_heads, validate=validate,
    )  # fmt: skip
    return run("attention_weights", BACKENDS, call, backend)


def check(q, k, *, lse=None, average_heads=True, **options) -> AttentionWeightsCall:
    """The call with these arguments; raises TypeError or ValueError naming the argument."""
    check_bools(average_heads=average_heads)
    check_tensors(q, k, k)
    return AttentionWeightsCall(
        **attention_fields(q, k, **options),
        lse=check_lse(lse, q),
        lse_low=None,
        lse_is_own=False,
        average_heads=average_heads,
    )


def check_lse(lse, q: Tensor) -> Tensor | None:
    """lse, which is [B, Hq, Nq] in the dtype of sums."""
    if lse is None:
        return None
    if not isinstance(lse, Tensor):
        raise TypeError(f"lse must be a tensor or None, got {type(lse).__name__}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    if lse.dtype != dtype:
        raise TypeError(f"lse must be {dtype} for q of {q.dtype}, got {lse.dtype}")
    if lse.shape != q.shape[:3] or lse.device != q.device:
        raise ValueError(
            f"lse must be [B, Hq, Nq] = {list(q.shape[:3])} on {q.device}, got "
            f"{list(lse.shape)} on {lse.device}"
        )
    return lse


def run_torch(call: AttentionWeightsCall) -> Tensor:
    lse = None if call.lse_is_own else call.lse
    return torch_weights.attend(call, lse=lse, out=False, average_heads=call.average_heads)[1]


def run_eager(call: AttentionWeightsCall) -> Tensor:
    return reference.attention_weights(call).to(call.q.dtype)


def run_triton(call: AttentionWeightsCall) -> Tensor:
    if call.lse is None:
        call = with_lse(call)
    weights = weights_op(call, "triton").weights
    return weights[:, 0] if call.average_heads else weights


def with_lse(call: AttentionWeightsCall) -> AttentionWeightsCall:
    """The call with the lse of its scores: a forward pass over the narrowest values there are."""
    narrow = narrow_call(call)
    with torch.no_grad():
        results = attend(narrow, "triton")
    return replace(call, lse=results.lse, lse_low=results.lse_low, lse_is_own=True)


def narrow_call(call: AttentionCall) -> CrossAttentionCall:
    """Attention with the scores of the call, and without dropout."""
    values = dict(return_lse=True, return_statistics=False, deterministic=True)
    shared = shared_fields(call, "AttentionCall") | dict(dropout_p=0.0, seed=None)
    return CrossAttentionCall(**shared, v=call.k[..., :NARROW], **values)


BACKENDS = (
    Backend("triton", triton_reasons, run_triton),
    Backend("torch", reference.reasons, run_torch),
    Backend("eager", reference.reasons, run_eager, by_name=True),
)
attention_weights.backends, attention_weights.check = BACKENDS, check
