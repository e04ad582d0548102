"""The cross-entropy of summed linear heads, in chunks of rows: no tensor holds all logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.kernel_op import refuse_double_backward


class ChunkedCrossEntropy(torch.autograd.Function):
    """The autograd wiring of the launchers, which do the work."""

    @staticmethod
    def forward(ctx, target, ignore_index, chunk_rows, n_heads, *tensors):
        launch = forward_op if torch.compiler.is_compiling() else launch_forward
        loss, lse = launch(list(tensors), target, n_heads, ignore_index, chunk_rows)
        ctx.save_for_backward(target, lse, *tensors)
        ctx.options = n_heads, ignore_index, chunk_rows
        ctx.mark_non_differentiable(lse)
        return loss, lse

    @staticmethod
    def backward(ctx, dloss, _):
        target, lse, *tensors = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[4:])
        launch = backward_op if torch.compiler.is_compiling() else launch_backward
        with torch.no_grad():
            grads = launch(dloss, tensors, target, lse, *ctx.options, needs)
        grads = tuple(g if needed else None for g, needed in zip(grads, needs, strict=True))
        sources, instead = (dloss, *tensors), "take F.cross_entropy of the logits"
        grads = refuse_double_backward("chunked cross-entropy", grads, sources, instead)
        return None, None, None, None, *grads


def launch_forward(
    tensors: list[Tensor], target: Tensor, n_heads: int, ignore_index: int, chunk_rows: int
) -> tuple[Tensor, Tensor]:
    """The (loss, lse) of each row, both [N], in float32 at least; an ignored row has loss 0.

    tensors: n_heads hidden states [N, dim_i], as many weights [V, dim_i], then the biases [V] of
    the heads that have one, all of one dtype; target [N].
    """
    counted = target != ignore_index
    labels = target.masked_fill(~counted, 0)
    lse = target.new_empty(target.shape, dtype=wide(tensors[0]))
    loss = torch.empty_like(lse)
    for rows in chunks(len(target), chunk_rows):
        s = summed_logits(tensors, n_heads, rows)
        lse[rows] = s.logsumexp(dim=-1)
        loss[rows] = lse[rows] - s.gather(1, labels[rows, None])[:, 0]
    return loss.masked_fill_(~counted, 0.0), lse


def launch_backward(
    dloss: Tensor,
    tensors: list[Tensor],
    target: Tensor,
    lse: Tensor,
    n_heads: int,
    ignore_index: int,
    chunk_rows: int,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of `tensors`, one without elements for each that `needs` excludes.

    The logits are computed again. Gradients of weights and biases add up in float32 at least.
    """
    counted = target != ignore_index
    labels = target.masked_fill(~counted, 0)
    dloss = dloss.masked_fill(~counted, 0.0)  # a mean over no row has an inf or nan gradient
    hidden, weights = tensors[:n_heads], tensors[n_heads : 2 * n_heads]
    grads = [
        torch.zeros_like(t, dtype=t.dtype if i < n_heads else wide(t)) if needed else t.new_empty(0)
        for i, (t, needed) in enumerate(zip(tensors, needs, strict=True))
    ]
    for rows in chunks(len(target), chunk_rows):
        ds = summed_logits(tensors, n_heads, rows)
        ds.sub_(lse[rows, None]).exp_()
        ds.scatter_add_(1, labels[rows, None], ds.new_full((), -1.0).expand(len(ds), 1))
        ds.mul_(dloss[rows, None])
        for grad, needed in zip(grads[2 * n_heads :], needs[2 * n_heads :], strict=True):
            if needed:
                grad += ds.sum(dim=0)
        ds = ds.to(hidden[0].dtype)
        for i, (h, weight) in enumerate(zip(hidden, weights, strict=True)):
            if needs[i]:
                grads[i][rows] = ds @ weight
            if needs[n_heads + i]:
                add_product(grads[n_heads + i], ds.mT, h[rows])
    return [g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)]


def summed_logits(tensors: list[Tensor], n_heads: int, rows: slice) -> Tensor:
    """The sum over heads of hidden @ weight^T + bias, a new tensor [rows, V] to write into."""
    hidden, weights = tensors[:n_heads], tensors[n_heads : 2 * n_heads]
    s = (hidden[0][rows] @ weights[0].mT).to(wide(hidden[0]))
    for h, weight in zip(hidden[1:], weights[1:], strict=True):
        add_product(s, h[rows], weight.mT)
    for bias in tensors[2 * n_heads :]:
        s += bias
    return s


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a @ b to `total`, without a temporary product if the dtypes agree."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def chunks(n: int, size: int) -> Iterator[slice]:
    """The slices of at most `size` elements that cover range(n)."""
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


def wide(t: Tensor) -> torch.dtype:
    """The dtype in which sums of `t` are kept: float64 for float64, else float32."""
    return t.dtype if t.dtype == torch.float64 else torch.float32


forward_op = torch.library.custom_op(
    "xattn_kernels::chunked_cross_entropy_forward", launch_forward, mutates_args=()
)
backward_op = torch.library.custom_op(
    "xattn_kernels::chunked_cross_entropy_backward", launch_backward, mutates_args=()
)


@forward_op.register_fake
def fake_forward(tensors, target, n_heads, ignore_index, chunk_rows):
    rows = [target.new_empty(target.shape, dtype=wide(tensors[0])) for _ in range(2)]
    return rows[0], rows[1]


@backward_op.register_fake
def fake_backward(dloss, tensors, target, lse, n_heads, ignore_index, chunk_rows, needs):
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if n else t.new_empty(0)
        for t, n in zip(tensors, needs, strict=True)
    ]
