"""`topk_attention`: each query attends to its `top_k` highest-scoring keys, exactly."""

from __future__ import annotations

import math
from numbers import Integral

import torch
from torch import Tensor

from . import gathered, reference
from .autograd import apart, refuse_double_backward
from .cross_attention import triton_attend, triton_reasons
from .dispatch import Backend, allow_tf32, run
from .inputs import TopKAttentionInputs, TopKAttentionResult, check_inputs


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    top_k: int,
    *,
    mask=None,
    scale: float | Tensor | None = None,
    return_lse: bool = False,
    return_indices: bool = False,
    return_statistics: bool = False,
    backend: str | None = None,
    validate: bool = False,
) -> Tensor | TopKAttentionResult:
    """Attention over the `top_k` highest-scoring of the keys that the mask allows, per query and
    head.

        s = scale * q k^T        p = softmax of the top_k largest s        out = p v

    The choice is exact: of equal scores those of lower keys are taken, and with fewer allowed keys
    than top_k all of them. It is a choice by scores as they are computed, in float32; the backward
    uses the very keys of the forward, and no gradient flows through the choice. A key whose score
    is -inf counts as not allowed; one that is NaN ranks first, so that the row is NaN. No score is
    kept in memory on the triton backend, in either direction.

    Args:
        q, k, v, mask, scale, return_lse, return_statistics, validate: as in `cross_attention`.
        top_k: keys per query, at least 1.
        return_indices: also return the chosen keys.
        backend: "triton", "sdpa" (PyTorch's operations on keys that are gathered for a few queries
            at a time) or "eager"; None takes the first of triton and sdpa that can run.

    Returns:
        out [B, Hq, Nq, Dv] in the dtype of q, or a `TopKAttentionResult` when more is asked for.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype, device or range.
        RuntimeError: the named backend, or every backend, has reasons against this call.

    Source: Zhao et al., "Explicit sparse transformer" (2019), and Gupta et al., "Memory-efficient
    transformers via top-k attention" (2021), both by way of the matrix of scores.
    """
    x = check(
        q,
        k,
        v,
        top_k,
        mask=mask,
        scale=scale,
        return_lse=return_lse,
        return_indices=return_indices,
        return_statistics=return_statistics,
        validate=validate,
    )
    result = run("topk_attention", BACKENDS, x, backend)
    return result if x.return_lse or x.return_indices else result.out


def check(q, k, v, top_k, *, return_indices=False, **options) -> TopKAttentionInputs:
    """The checked inputs of one call; raises TypeError or ValueError naming the argument."""
    x = check_inputs(q, k, v, **options)
    return TopKAttentionInputs(
        **vars(x), top_k=check_top_k(top_k), return_indices=bool(return_indices)
    )


def check_top_k(top_k) -> int:
    if isinstance(top_k, bool) or not isinstance(top_k, (Integral, torch.SymInt)):
        raise TypeError(f"top_k must be an int >= 1, got {type(top_k).__name__} {top_k!r}")
    if top_k < 1:
        raise ValueError(f"top_k must be an int >= 1, got {top_k}")
    return int(top_k)


def run_triton(x: TopKAttentionInputs) -> TopKAttentionResult:
    start, stop = x.bounds()
    if x.top_k >= x.Nk:  # every allowed key: attention itself
        result, _ = triton_attend(x)
        indices = all_keys(x) if x.return_indices else None
        return TopKAttentionResult(
            result.out, result.lse, indices, result.entropy, result.max_probability
        )
    q, k, v = apart(x.q, x.k, x.v)
    scale_tensor = x.scale if isinstance(x.scale, Tensor) else None
    options = (
        math.nan if scale_tensor is not None else x.scale,
        x.top_k,
        x.return_statistics,
        x.return_indices,
        allow_tf32(),
    )
    out, lse, entropy, max_probability, _, indices = TopKAttentionFunction.apply(
        q, k, v, scale_tensor, start, stop, x.mask, options
    )
    return TopKAttentionResult(
        out,
        lse if x.return_lse else None,
        indices if x.return_indices else None,
        *((entropy, max_probability) if x.return_statistics else (None, None)),
    )


def all_keys(x: TopKAttentionInputs) -> Tensor:
    """The indices of a call that takes every allowed key."""
    with torch.no_grad():
        scale_tensor = x.scale if isinstance(x.scale, Tensor) else None
        scale = math.nan if scale_tensor is not None else x.scale
        launch = forward_op if torch.compiler.is_compiling() else launch_forward
        narrow = x.k[..., : min(x.D, 16)]
        operands = (x.q, x.k, narrow, scale_tensor, *x.bounds(), x.mask)
        return launch(*operands, scale, x.top_k, False, True, allow_tf32())[5]


BACKENDS = (
    Backend("triton", triton_reasons, run_triton),
    Backend("sdpa", gathered.reasons, gathered.topk_attention, note=gathered.NOTE),
    Backend("eager", reference.reasons, reference.topk_attention, by_name=True),
)
topk_attention.backends, topk_attention.check = BACKENDS, check


class TopKAttentionFunction(torch.autograd.Function):
    """Wires the launchers into autograd; nothing is computed here."""

    @staticmethod
    def forward(ctx, q, k, v, scale, start, stop, mask, options):
        ctx.set_materialize_grads(False)
        launch = forward_op if torch.compiler.is_compiling() else launch_forward
        results = launch(q, k, v, scale, start, stop, mask, *options)
        out, lse, entropy, max_probability, bits, indices = results
        saved = bits if bits.numel() else indices
        ctx.save_for_backward(q, k, v, scale, start, stop, saved, out, lse, entropy)
        ctx.options = options
        ctx.mark_non_differentiable(max_probability, bits, indices)
        return results

    @staticmethod
    def backward(ctx, dout, dlse, dentropy, *_):
        saved = ctx.saved_tensors
        launch = backward_op if torch.compiler.is_compiling() else launch_backward
        with torch.no_grad():
            grads = launch(dout, dlse, dentropy, *saved, *ctx.options, ctx.needs_input_grad[:4])
        grads = tuple(
            g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[:4], strict=True)
        )
        grads = refuse_double_backward("topk_attention", grads, (dout, *saved[:4]))
        return *grads, *[None] * 4


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_tensor: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    mask: Tensor | None,
    scale: float,
    top_k: int,
    statistics: bool,
    with_indices: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, entropy, max_probability, bits, indices); what is not there has no elements."""
    from .triton_kernels import topk_attention as kernels

    return kernels.forward(
        q, k, v, scale_tensor, start, stop, mask, scale, top_k, statistics, with_indices, allow_tf32
    )


def launch_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_tensor: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    selected: Tensor,
    out: Tensor,
    lse: Tensor,
    entropy: Tensor,
    scale: float,
    top_k: int,
    statistics: bool,
    with_indices: bool,
    allow_tf32: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dscale); those not in `needs` have no elements."""
    from .triton_kernels import topk_attention as kernels

    # a traced graph passes zeros where autograd passes None, without statistics of no elements
    dentropy = dentropy if statistics else None
    return kernels.backward(
        dout, dlse, dentropy, q, k, v, scale_tensor, start, stop, selected, out, lse, entropy,
        scale, top_k, allow_tf32, needs,
    )  # fmt: skip


# Under torch.compile and torch.export a launch is one node; an eager call goes straight to it.
forward_op = torch.library.custom_op(
    "xattn_kernels::topk_attention_forward", launch_forward, mutates_args=()
)
backward_op = torch.library.custom_op(
    "xattn_kernels::topk_attention_backward", launch_backward, mutates_args=()
)


@forward_op.register_fake
def fake_forward(
    q, k, v, scale_tensor, start, stop, mask, scale, top_k, statistics, with_indices, allow_tf32
):
    from .triton_kernels import launch as kernels
    from .triton_kernels.topk_attention import saves_indices

    rows, Nk = q.shape[:3], k.shape[2]
    indexed = saves_indices(Nk, top_k)
    shapes = (rows if wanted else (0,) for wanted in (True, statistics, statistics))
    floats = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    shapes = (
        (0,) if indexed else (*rows, -(-Nk // 32)),
        (*rows, top_k) if indexed or with_indices else (0,),
    )
    ints = (q.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return kernels.empty_rows(q, v.shape[3]), *floats, *ints


@backward_op.register_fake
def fake_backward(
    dout, dlse, dentropy, q, k, v, scale_tensor, start, stop, selected, out, lse, entropy, scale,
    top_k, statistics, with_indices, allow_tf32, needs,
):  # fmt: skip
    from .triton_kernels import launch as kernels

    grads = [kernels.empty_rows(t, t.shape[3]) for t in (q, k, v)]
    grads.append(None if scale_tensor is None else scale_tensor.new_empty(scale_tensor.shape))
    return tuple(t if needed else q.new_empty(0) for t, needed in zip(grads, needs, strict=True))
