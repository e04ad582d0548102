"""Top-k attention by blocks of keys: `topk_attention(..., topk_blocks=(block_size, n_blocks))`.

Neighbouring queries share a few blocks of keys, chosen by the weights that the blocks' mean keys
would get; the equations are `importance` and `choose_blocks` in `reference.py`, the kernels in
`triton_kernels/topk_blocks.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.call import TopKAttentionInputs, TopKAttentionResult
from ..core.dispatch import allow_tf32
from ..core.kernel_op import apart, refuse_double_backward
from ..core.layout import empty_rows
from ..reference import (
    QUERIES_PER_CHOICE,
    blocked,
    n_blocks,
    seen_keys,
    top_indices,
)
from ..torch_kernels.topk_blocks import result_of
from .cross_attention import attend


def run_triton(x: TopKAttentionInputs) -> TopKAttentionResult:
    every = x.topk_blocks[0] * x.topk_blocks[1] >= x.Nk
    with torch.no_grad():
        blocks = None if every and not x.return_indices else choose_triton(x)
    if every:  # attention itself
        result, _ = attend(x)
        return result_of(x, blocks, result.out, *result[1:])
    scale_tensor = x.scale if isinstance(x.scale, Tensor) else None
    options = (
        math.nan if scale_tensor is not None else x.scale,
        x.topk_blocks[0],
        QUERIES_PER_CHOICE,
        x.return_statistics,
        allow_tf32(),
    )
    results = TopKBlocksFunction.apply(
        *apart(x.q, x.k, x.v), scale_tensor, *x.bounds(), x.mask, blocks, options
    )
    return result_of(x, blocks, *results)


def choose_triton(x: TopKAttentionInputs) -> Tensor:
    """`reference.choose_blocks`, int32, by the kernels."""
    weights = importance_triton(x)
    return top_indices(weights, min(x.topk_blocks[1], n_blocks(x))).to(torch.int32)


def importance_triton(x: TopKAttentionInputs) -> Tensor:
    """`reference.importance` of the pooled call, by the kernels."""
    scale_tensor = x.scale if isinstance(x.scale, Tensor) else None
    interval, mask = blocked(x)
    start, stop = (None, None) if interval is None else interval.expand(x.B, x.Nq)
    launch = importance_op if torch.compiler.is_compiling() else launch_importance
    return launch(
        x.q, x.k, seen_keys(x), scale_tensor, start, stop, mask,
        math.nan if scale_tensor is not None else x.scale, x.topk_blocks[0], QUERIES_PER_CHOICE,
        allow_tf32(),
    )  # fmt: skip


class TopKBlocksFunction(torch.autograd.Function):
    """Wires the launchers into autograd; nothing is computed here."""

    @staticmethod
    def forward(ctx, q, k, v, scale, start, stop, mask, blocks, options):
        ctx.set_materialize_grads(False)
        launch = forward_op if torch.compiler.is_compiling() else launch_forward
        results = launch(q, k, v, scale, start, stop, mask, blocks, *options)
        ctx.save_for_backward(q, k, v, scale, start, stop, mask, blocks, *results[:3])
        ctx.options = options
        ctx.mark_non_differentiable(results[3])  # max_probability
        return results

    @staticmethod
    def backward(ctx, dout, dlse, dentropy, _):
        saved = ctx.saved_tensors
        launch = backward_op if torch.compiler.is_compiling() else launch_backward
        with torch.no_grad():
            grads = launch(dout, dlse, dentropy, *saved, *ctx.options, ctx.needs_input_grad[:4])
        grads = tuple(
            g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[:4], strict=True)
        )
        grads = refuse_double_backward("topk_attention", grads, (dout, *saved[:4]))
        return *grads, *[None] * 5


def launch_importance(
    q: Tensor,
    k: Tensor,
    seen: Tensor,
    scale_tensor: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    mask: Tensor | None,
    scale: float,
    size: int,
    queries: int,
    allow_tf32: bool,
) -> Tensor:
    """`importance` of `reference.py`."""
    from ..triton_kernels import topk_blocks as kernels

    return kernels.importance(
        q, k, seen, scale_tensor, start, stop, mask, scale, size, queries, allow_tf32
    )


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_tensor: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    mask: Tensor | None,
    blocks: Tensor,
    scale: float,
    size: int,
    queries: int,
    statistics: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, entropy, max_probability); what is not there has no elements."""
    from ..triton_kernels import topk_blocks as kernels

    return kernels.forward(
        q, k, v, scale_tensor, start, stop, mask, blocks, scale, size, queries, statistics,
        allow_tf32,
    )  # fmt: skip


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
    mask: Tensor | None,
    blocks: Tensor,
    out: Tensor,
    lse: Tensor,
    entropy: Tensor,
    scale: float,
    size: int,
    queries: int,
    statistics: bool,
    allow_tf32: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dscale); those not in `needs` have no elements."""
    from ..triton_kernels import topk_blocks as kernels

    dentropy = dentropy if statistics else None  # a traced graph passes zeros of no elements
    return kernels.backward(
        dout, dlse, dentropy, q, k, v, scale_tensor, start, stop, mask, blocks, out, lse, entropy,
        scale, size, queries, allow_tf32, needs,
    )  # fmt: skip


# Under torch.compile and torch.export a launch is one node; an eager call goes straight to it.
importance_op, forward_op, backward_op = (
    torch.library.custom_op(f"xattn_kernels::topk_blocks_{name}", launch, mutates_args=())
    for name, launch in (
        ("importance", launch_importance),
        ("forward", launch_forward),
        ("backward", launch_backward),
    )
)


@importance_op.register_fake
def fake_importance(q, k, seen, scale_tensor, start, stop, mask, scale, size, queries, allow_tf32):
    tiles, blocks = (-(-n // per) for n, per in ((q.shape[2], queries), (k.shape[2], size)))
    return q.new_empty((*k.shape[:2], tiles, blocks), dtype=torch.float32)


@forward_op.register_fake
def fake_forward(
    q, k, v, scale_tensor, start, stop, mask, blocks, scale, size, queries, statistics, allow_tf32
):
    shapes = (q.shape[:3] if wanted else (0,) for wanted in (True, statistics, statistics))
    floats = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return empty_rows(q, v.shape[3]), *floats


@backward_op.register_fake
def fake_backward(
    dout, dlse, dentropy, q, k, v, scale_tensor, start, stop, mask, blocks, out, lse, entropy,
    scale, size, queries, statistics, allow_tf32, needs,
):  # fmt: skip
    grads = [empty_rows(t, t.shape[3]) for t in (q, k, v)]
    grads.append(None if scale_tensor is None else scale_tensor.new_empty(scale_tensor.shape))
    return tuple(t if needed else q.new_empty(0) for t, needed in zip(grads, needs, strict=True))
