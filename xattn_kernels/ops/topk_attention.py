"""`topk_attention`: each query attends to its `top_k` highest-scoring keys, exactly."""

from __future__ import annotations

import math
from functools import partial
from numbers import Integral
from types import ModuleType

import torch
from torch import Tensor

from .. import reference
from ..core.call import TopKAttentionInputs, TopKAttentionResult, check_inputs
from ..core.dispatch import Backend, allow_tf32, run
from ..core.kernel_op import apart, refuse_double_backward
from ..core.layout import empty_rows, saves_indices
from ..torch_kernels import cross_attention as torch_attention
from ..torch_kernels import topk_attention as torch_topk
from ..torch_kernels import topk_blocks as torch_blocks
from . import topk_blocks as by_blocks
from .cross_attention import attend, cuda_reasons, triton_reasons


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
    x = check(
        q,
        k,
        v,
        top_k,
        topk_blocks=topk_blocks,
        mask=mask,
        scale=scale,
        return_lse=return_lse,
        return_indices=return_indices,
        return_statistics=return_statistics,
        validate=validate,
    )
    result = run("topk_attention", BACKENDS, x, backend)
    return result if x.return_lse or x.return_indices else result.out


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
    q, k, v, top_k=None, *, topk_blocks=None, return_indices=False, **options
) -> TopKAttentionInputs:
    """The checked inputs of one call; raises TypeError or ValueError naming the argument."""
    top_k, topk_blocks = check_chosen(top_k, topk_blocks)
    plain = check_inputs(q, k, v, **options)
    if topk_blocks is not None and isinstance(plain.Nk, int):  # a block of all keys is not padded
        topk_blocks = (
            min(topk_blocks[0], max(16, 1 << (plain.Nk - 1).bit_length())),
            topk_blocks[1],
        )
    return TopKAttentionInputs(
        **vars(plain),
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
    if isinstance(top_k, bool) or not isinstance(top_k, (Integral, torch.SymInt)):
        raise TypeError(f"top_k must be an int >= 1, got {described(top_k)}")
    if top_k < 1:
        raise ValueError(f"top_k must be an int >= 1, got {top_k}")
    return int(top_k)


def check_topk_blocks(topk_blocks) -> tuple[int, int]:
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


def cuda_topk_reasons(x: TopKAttentionInputs) -> list[str]:
    """Why the CUDA kernels cannot run this call."""
    blocks = ["blocks of keys have no CUDA kernel"] * (x.topk_blocks is not None)
    return cuda_reasons(x) + blocks


def run_triton(x: TopKAttentionInputs) -> TopKAttentionResult:
    return by_blocks.run_triton(x) if x.topk_blocks is not None else run_kernels(x, "triton")


def run_kernels(x: TopKAttentionInputs, backend: str) -> TopKAttentionResult:
    start, stop = x.bounds()
    if x.top_k >= x.Nk:  # every allowed key: attention itself
        result, _ = attend(x, backend)
        indices = all_keys(x, backend) if x.return_indices else None
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
        backend,
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


def all_keys(x: TopKAttentionInputs, backend: str) -> Tensor:
    """The indices of a call that takes every allowed key."""
    with torch.no_grad():
        scale_tensor = x.scale if isinstance(x.scale, Tensor) else None
        scale = math.nan if scale_tensor is not None else x.scale
        launch = forward_op if torch.compiler.is_compiling() else launch_forward
        narrow = x.k[..., : min(x.D, 16)]
        operands = (x.q, x.k, narrow, scale_tensor, *x.bounds(), x.mask)
        return launch(*operands, scale, x.top_k, False, True, allow_tf32(), backend)[5]


def run_gathered(x: TopKAttentionInputs) -> TopKAttentionResult:
    kept = x.top_k or math.prod(x.topk_blocks)
    if kept >= x.Nk and not x.return_indices and not torch_attention.reasons(x):
        return TopKAttentionResult(torch_attention.cross_attention(x).out, None, None, None, None)
    return (torch_topk.topk_attention if x.topk_blocks is None else torch_blocks.topk_blocks)(x)


BACKENDS = (
    Backend("triton", triton_reasons, run_triton),
    Backend("cuda", cuda_topk_reasons, partial(run_kernels, backend="cuda")),
    Backend("torch", torch_topk.reasons, run_gathered, note=torch_topk.NOTE),
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
            needs, backend = ctx.needs_input_grad[:4], ctx.options[-1]
            grads = launch(dout, dlse, dentropy, *saved, *ctx.options[:-1], needs, backend)
        grads = tuple(g if needed else None for g, needed in zip(grads, needs, strict=True))
        grads = refuse_double_backward("topk_attention", grads, (dout, *saved[:4]))
        return *grads, *[None] * 4


def kernels_of(backend: str) -> ModuleType:
    """The launchers `forward` and `backward` of a backend."""
    if backend == "cuda":
        from ..cuda_kernels import topk_attention as kernels
    else:
        from ..triton_kernels import topk_attention as kernels
    return kernels


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
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, entropy, max_probability, bits, indices); what is not there has no elements."""
    return kernels_of(backend).forward(
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
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dscale); those not in `needs` have no elements."""
    # a traced graph passes zeros where autograd passes None, without statistics of no elements
    dentropy = dentropy if statistics else None
    return kernels_of(backend).backward(
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
    q, k, v, scale_tensor, start, stop, mask, scale, top_k, statistics, with_indices,
    allow_tf32, backend="triton",
):  # fmt: skip
    rows, Nk = q.shape[:3], k.shape[2]
    indexed = saves_indices(Nk, top_k)
    shapes = (rows if wanted else (0,) for wanted in (True, statistics, statistics))
    floats = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    shapes = (
        (0,) if indexed else (*rows, -(-Nk // 32)),
        (*rows, top_k) if indexed or with_indices else (0,),
    )
    ints = (q.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return empty_rows(q, v.shape[3]), *floats, *ints


@backward_op.register_fake
def fake_backward(
    dout, dlse, dentropy, q, k, v, scale_tensor, start, stop, selected, out, lse, entropy, scale,
    top_k, statistics, with_indices, allow_tf32, needs, backend="triton",
):  # fmt: skip
    grads = [empty_rows(t, t.shape[3]) for t in (q, k, v)]
    grads.append(None if scale_tensor is None else scale_tensor.new_empty(scale_tensor.shape))
    return tuple(t if needed else q.new_empty(0) for t, needed in zip(grads, needs, strict=True))
