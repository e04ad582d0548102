"""`topk_attention`: each query attends to its `top_k` highest-scoring keys, exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from numbers import Integral

import torch
from torch import Tensor

from .. import reference
from ..core.call import TopKAttentionCall, TopKAttentionResult
from ..core.dispatch import Backend, run
from ..core.kernel_op import kernel_op
from ..core.layout import TopKResults, empty_topk, gradients_of
from ..core.tensor_arguments import attention_fields, check_tensors, value_fields
from ..torch_kernels import cross_attention as torch_attention
from ..torch_kernels import topk_attention as torch_topk
from . import topk_blocks as by_blocks
from .cross_attention import attend, cuda_reasons, triton_reasons


def without_mask(call: TopKAttentionCall, results: TopKResults, needs) -> tuple:
    """What the backward is given: the choice is in the mask, and one of its two forms is enough."""
    if results.bits is not None:
        results = results._replace(indices=None)
    return replace(call, mask=None), results


topk_op = kernel_op(
    "topk_attention",
    TopKAttentionCall,
    TopKResults,
    empty_topk,
    gradients=gradients_of("q", "k", "v", "scale_tensor"),
    saved=("out", "lse", "entropy", "bits", "indices"),
    constant=lambda call, needs: ("max_probability", "bits", "indices"),
    keep=without_mask,
)


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    top_k: int | None = None,
    *,
    topk_blocks: tuple[int, int] | None = None,
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

    With `topk_blocks` instead, 64 neighbouring queries of all heads of a group share n_blocks
    blocks of block_size neighbouring keys, and only those are read: an approximation, in which a
    query may miss its highest keys, see `kept_mass`. Those blocks are chosen whose mean keys would
    get most attention, summed over the queries and heads; a query attends to what its mask allows
    of them, and where that is nothing its out is 0.

    Args:
        q, k, v, mask, scale, return_lse, return_statistics, validate: as in `cross_attention`.
        top_k: keys per query, at least 1.
        topk_blocks: (block_size, n_blocks) in place of top_k; block_size is a power of two from 16
            on, n_blocks at least 1.
        return_indices: also return the chosen keys or blocks.
        backend: "triton", "cuda", "torch" (PyTorch's operations on keys that are gathered for a few
            queries at a time) or "eager"; None takes the first but eager that can run.

    Returns:
        out [B, Hq, Nq, Dv] in the dtype of q, or a `TopKAttentionResult` when more is asked for.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype, device or range.
        RuntimeError: the named backend, or every backend, has reasons against this call.

    Source: Zhao et al., "Explicit sparse transformer" (2019), and Gupta et al., "Memory-efficient
    transformers via top-k attention" (2021), both by way of the matrix of scores; blocks by pooled
    keys as in Yuan et al., "Native sparse attention" (2025), without its other branches.
    """
    call = check(
        q, k, v, top_k, topk_blocks=topk_blocks, mask=mask, scale=scale, return_lse=return_lse,
        return_indices=return_indices, return_statistics=return_statistics, validate=validate,
    )  # fmt: skip
    result = run("topk_attention", BACKENDS, call, backend)
    return result if call.return_lse or call.return_indices else result.out


@torch.no_grad()
def kept_mass(
    q: Tensor,
    k: Tensor,
    top_k: int | None = None,
    *,
    topk_blocks: tuple[int, int] | None = None,
    mask=None,
    scale: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The share of a query's attention that its chosen keys have: how good the approximation is.

        sum of p_j over the chosen j, p the softmax over all allowed keys

    It is exp(lse of the chosen keys - lse of all), at the cost of both forwards, and 1 for a query
    without any key.

    Args: as in `topk_attention`.

    Returns:
        float32 [B, Hq, Nq] (float64 for float64 inputs), from 0 to 1, NaN for a row whose scores
        are; without gradient.

    Raises:
        As `topk_attention`.
    """
    v = k[..., : min(k.shape[3], 16)]
    options = dict(mask=mask, scale=scale, return_lse=True, backend=backend)
    chosen = topk_attention(q, k, v, top_k, topk_blocks=topk_blocks, **options).lse
    every = topk_attention(q, k, v, max(1, k.shape[2]), **options).lse
    none = every == -math.inf
    return (chosen - every.masked_fill(none, 0.0)).exp().clamp(max=1.0).masked_fill(none, 1.0)


def check(
    q, k, v, top_k=None, *, topk_blocks=None, mask=None, scale=None, return_indices=False,
    return_lse=False, return_statistics=False, validate=False,
) -> TopKAttentionCall:  # fmt: skip
    """The call with these arguments; raises TypeError or ValueError naming the argument."""
    top_k, topk_blocks = check_chosen(top_k, topk_blocks)
    check_tensors(q, k, v)
    Nk = k.shape[2]
    if topk_blocks is not None and isinstance(Nk, int):  # a block of all keys is not padded
        topk_blocks = (min(topk_blocks[0], max(16, 1 << (Nk - 1).bit_length())), topk_blocks[1])
    return TopKAttentionCall(
        **attention_fields(q, k, mask=mask, scale=scale, validate=validate),
        **value_fields(v, return_lse=return_lse, return_statistics=return_statistics),
        top_k=top_k,
        topk_blocks=topk_blocks,
        return_indices=bool(return_indices),
    )


def check_chosen(top_k, topk_blocks) -> tuple[int | None, tuple[int, int] | None]:
    """(top_k, topk_blocks), exactly one of which is not None."""
    if (top_k is None) == (topk_blocks is None):
        raise ValueError(
            f"exactly one of top_k and topk_blocks must be given, got {described(top_k)} and "
            f"topk_blocks={topk_blocks!r}"
        )
    if top_k is None:
        return None, check_topk_blocks(topk_blocks)
    return check_top_k(top_k), None


def described(top_k) -> str:
    """Without the values of a tensor, which somebody may give by mistake."""
    if isinstance(top_k, Tensor):
        return f"top_k=a tensor of shape {list(top_k.shape)}"
    return f"top_k={top_k!r} ({type(top_k).__name__})"


def check_top_k(top_k) -> int:
    """top_k, an int from 1 on."""
    if isinstance(top_k, bool) or not isinstance(top_k, (Integral, torch.SymInt)):
        raise TypeError(f"top_k must be an int >= 1, got {described(top_k)}")
    if top_k < 1:
        raise ValueError(f"top_k must be an int >= 1, got {top_k}")
    return int(top_k)


def check_topk_blocks(topk_blocks) -> tuple[int, int]:
    """(block_size, n_blocks), two ints."""
    allowed = "topk_blocks must be (block_size, n_blocks)"
    if not isinstance(topk_blocks, (tuple, list)) or len(topk_blocks) != 2:
        raise TypeError(f"{allowed}, got {topk_blocks!r}")
    for name, n in zip(("block_size", "n_blocks"), topk_blocks, strict=True):
        if isinstance(n, bool) or not isinstance(n, (Integral, torch.SymInt)):
            raise TypeError(f"{allowed}, two ints, got {name}={n!r}")
    size, n = map(int, topk_blocks)
    if size < 16 or size & (size - 1):
        raise ValueError(f"{allowed} with a power of two >= 16 for block_size, got {size}")
    if n < 1:
        raise ValueError(f"{allowed} with n_blocks >= 1, got {n}")
    return size, n


def cuda_topk_reasons(call: TopKAttentionCall) -> list[str]:
    """Why the CUDA kernels cannot run this call."""
    blocks = ["blocks of keys have no CUDA kernel"] * (call.topk_blocks is not None)
    return cuda_reasons(call) + blocks


def run_triton(call: TopKAttentionCall) -> TopKAttentionResult:
    by_keys = call.topk_blocks is None
    return run_kernels(call, "triton") if by_keys else by_blocks.run_triton(call)


def run_kernels(call: TopKAttentionCall, backend: str) -> TopKAttentionResult:
    """What the kernels of a backend make of a call by keys."""
    if call.top_k >= call.Nk and backend != "torch":  # every allowed key: attention itself
        results = attend(call, backend)
        indices = all_keys(call, backend) if call.return_indices else None
    else:
        results = topk_op(call, backend)
        indices = results.indices if call.return_indices else None
    lse = results.lse if call.return_lse else None
    return TopKAttentionResult(results.out, lse, indices, results.entropy, results.max_probability)


def all_keys(call: TopKAttentionCall, backend: str) -> Tensor:
    """The indices of a call that takes every allowed key."""
    narrow = call.k[..., : min(call.D, 16)]
    with torch.no_grad():
        return topk_op(replace(call, v=narrow, return_statistics=False), backend).indices


def run_torch(call: TopKAttentionCall) -> TopKAttentionResult:
    """What PyTorch's kernels and operations make of the call."""
    chosen = call.top_k or math.prod(call.topk_blocks)
    if chosen >= call.Nk and not call.return_indices and not torch_attention.reasons(call):
        out = torch_attention.cross_attention(call).out
        return TopKAttentionResult(out, None, None, None, None)
    return by_blocks.run_torch(call) if call.topk_blocks else run_kernels(call, "torch")


BACKENDS = (
    Backend("triton", triton_reasons, run_triton),
    Backend("cuda", cuda_topk_reasons, partial(run_kernels, backend="cuda")),
    Backend("torch", torch_topk.reasons, run_torch, note=torch_topk.NOTE),
    Backend("eager", reference.reasons, reference.topk_attention, by_name=True),
)
topk_attention.backends, topk_attention.check = BACKENDS, check
