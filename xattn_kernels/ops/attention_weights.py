"""`attention_weights`: the attention probabilities, averaged over the heads as they are written."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import reference
from ..core.arguments import check_bools
from ..core.call import CrossAttentionInputs, check_inputs
from ..core.dispatch import Backend, allow_tf32, run
from ..core.kernel_op import apart, refuse_double_backward
from ..core.layout import empty_rows
from ..torch_kernels import attention_weights as torch_weights
from .cross_attention import attend, triton_reasons


@dataclass(frozen=True)
class AttentionWeightsInputs(CrossAttentionInputs):
    """One checked call; `v` is not used.

    `lse` is a variable like any other: p = exp(s - lse), with a gradient for each of them.
    `own_lse`, without gradient, is known to be lse of these scores: p = softmax(s), a little less
    to compute, and the gradient keeps the precision that the two parts of it would cancel away.
    `own_lse_low` is what its float32 cannot hold, see `attend`.
    """

    lse: Tensor | None
    own_lse: Tensor | None
    own_lse_low: Tensor | None
    average_heads: bool


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
    x = check(
        q,
        k,
        lse=lse,
        mask=mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        seed=seed,
        average_heads=average_heads,
        validate=validate,
    )
    return run("attention_weights", BACKENDS, x, backend)


def check(q, k, *, lse=None, average_heads=True, **options) -> AttentionWeightsInputs:
    """The checked inputs of one call; raises TypeError or ValueError naming the argument."""
    check_bools(average_heads=average_heads)
    x = check_inputs(q, k, k, **options)
    return AttentionWeightsInputs(
        **vars(x),
        lse=check_lse(lse, q),
        own_lse=None,
        own_lse_low=None,
        average_heads=average_heads,
    )


def check_lse(lse, q: Tensor) -> Tensor | None:
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


def run_torch(x: AttentionWeightsInputs) -> Tensor:
    return torch_weights.attend(x, lse=x.lse, out=False, average_heads=x.average_heads)[1]


def run_eager(x: AttentionWeightsInputs) -> Tensor:
    return reference.attention_weights(x, x.lse, x.average_heads).to(x.q.dtype)


def run_triton(x: AttentionWeightsInputs) -> Tensor:
    lse, lse_low = (x.own_lse, x.own_lse_low) if x.lse is None else (x.lse, None)
    if lse is None:  # a forward pass over the narrowest values there are
        narrow = replace(x, v=x.k[..., :16], dropout_p=0.0, seed=None, return_lse=True)
        with torch.no_grad():
            (_, lse, *_), lse_low = attend(narrow)
    scale_tensor = x.scale if isinstance(x.scale, Tensor) else None
    options = (
        math.nan if scale_tensor is not None else x.scale,
        x.softcap or 0.0,
        x.dropout_p,
        x.average_heads,
        x.lse is None,
        allow_tf32(),
    )
    # torch.compile refuses an autograd Function that gets one tensor twice
    q, k = apart(x.q, x.k)
    weights = AttentionWeightsFunction.apply(
        q, k, x.bias, scale_tensor, lse, lse_low, *x.bounds(), x.mask, x.seed, options
    )
    return weights[:, 0] if x.average_heads else weights


BACKENDS = (
    Backend("triton", triton_reasons, run_triton),
    Backend("torch", reference.reasons, run_torch),
    Backend("eager", reference.reasons, run_eager, by_name=True),
)
attention_weights.backends, attention_weights.check = BACKENDS, check


class AttentionWeightsFunction(torch.autograd.Function):
    """Wires the launchers into autograd; nothing is computed here."""

    @staticmethod
    def forward(ctx, q, k, bias, scale, lse, lse_low, start, stop, mask, seed, options):
        launch = forward_op if torch.compiler.is_compiling() else launch_forward
        ctx.save_for_backward(q, k, bias, scale, lse, lse_low, start, stop, mask, seed)
        ctx.options = options
        return launch(q, k, bias, scale, lse, lse_low, start, stop, mask, seed, *options)

    @staticmethod
    def backward(ctx, dweights):
        launch = backward_op if torch.compiler.is_compiling() else launch_backward
        needs, saved = ctx.needs_input_grad[:5], ctx.saved_tensors
        with torch.no_grad():
            grads = launch(dweights, *saved, *ctx.options, needs)
        grads = tuple(g if needed else None for g, needed in zip(grads, needs, strict=True))
        grads = refuse_double_backward("attention_weights", grads, (dweights, *saved[:5]))
        return *grads, *[None] * 6


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
    seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    average_heads: bool,
    own_lse: bool,
    allow_tf32: bool,
) -> Tensor:
    """[B, 1, Nq, Nk] averaged over the heads, or [B, Hq, Nq, Nk]."""
    from ..triton_kernels import attention_weights as kernels

    return kernels.forward(
        q, k, bias, scale_tensor, lse, lse_low, start, stop, mask, seed, scale, softcap,
        dropout_p, average_heads, allow_tf32,
    )  # fmt: skip


def launch_backward(
    dweights: Tensor,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    scale_tensor: Tensor | None,
    lse: Tensor,
    lse_low: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    average_heads: bool,
    own_lse: bool,
    allow_tf32: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dbias, dscale, dlse); those not in `needs` have no elements."""
    from ..triton_kernels import attention_weights as kernels

    return kernels.backward(
        dweights, q, k, bias, scale_tensor, lse, lse_low, start, stop, mask, seed, scale, softcap,
        dropout_p, average_heads, own_lse, allow_tf32, needs,
    )  # fmt: skip


# Under torch.compile and torch.export a launch is one node; an eager call goes straight to it.
forward_op = torch.library.custom_op(
    "xattn_kernels::attention_weights_forward", launch_forward, mutates_args=()
)
backward_op = torch.library.custom_op(
    "xattn_kernels::attention_weights_backward", launch_backward, mutates_args=()
)


@forward_op.register_fake
def fake_forward(q, k, bias, scale_tensor, lse, lse_low, start, stop, mask, seed, scale, softcap,
                 dropout_p, average_heads, own_lse, allow_tf32):  # fmt: skip
    B, Hq, Nq, _ = q.shape
    return q.new_empty((B, 1 if average_heads else Hq, Nq, k.shape[2]))


@backward_op.register_fake
def fake_backward(dweights, q, k, bias, scale_tensor, lse, lse_low, start, stop, mask, seed, scale,
                  softcap, dropout_p, average_heads, own_lse, allow_tf32, needs):  # fmt: skip
    rows = [empty_rows(t, t.shape[3]) for t in (q, k)]
    rest = [None if t is None else t.new_empty(t.shape) for t in (bias, scale_tensor, lse)]
    return tuple(
        t if needed else q.new_empty(0) for t, needed in zip(rows + rest, needs, strict=True)
    )
