"""Top-k attention by blocks of keys: `topk_attention(..., topk_blocks=(block_size, n_blocks))`.

Neighbouring queries share a few blocks of keys, chosen by the weights that the blocks' mean keys
would get; the equations are `importance` and `choose_blocks` in `reference.py`, the kernels in
`triton_kernels/topk_blocks.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.call import (
    TopKAttentionCall,
    TopKAttentionResult,
    TopKBlocksCall,
    TopKImportanceCall,
    shared_fields,
)
from ..core.kernel_op import kernel_op
from ..core.layout import (
    AttentionResults,
    ImportanceResults,
    empty_importance,
    empty_results,
    gradients_of,
)
from ..reference import blocked, n_blocks, seen_keys, top_indices
from ..torch_kernels.topk_blocks import choose_gathered, result_of
from .cross_attention import attend

blocks_op = kernel_op(
    "topk_blocks",
    TopKBlocksCall,
    AttentionResults,
    lambda call, backend: empty_results(call),
    gradients=gradients_of("q", "k", "v", "scale_tensor"),
    saved=("out", "lse", "entropy"),
    constant=lambda call, needs: ("max_probability",),
)
importance_op = kernel_op(
    "topk_importance",
    TopKImportanceCall,
    ImportanceResults,
    lambda call, backend: empty_importance(call),
    gradients={},
)


def run_triton(call: TopKAttentionCall) -> TopKAttentionResult:
    """What the Triton kernels make of a call by blocks."""
    size, n = call.topk_blocks
    every = size * n >= call.Nk
    with torch.no_grad():
        chosen = None if every and not call.return_indices else choose_triton(call)
    if every:  # attention itself
        results = attend(call, "triton")
    else:
        fields = shared_fields(call, "TopKAttentionCall")
        results = blocks_op(TopKBlocksCall(**fields, chosen=chosen), "triton")
    return result_of(call, chosen, results)


def run_torch(call: TopKAttentionCall) -> TopKAttentionResult:
    """What PyTorch's operations make of a call by blocks."""
    with torch.no_grad():
        chosen = choose_gathered(call)
    fields = shared_fields(call, "TopKAttentionCall")
    return result_of(call, chosen, blocks_op(TopKBlocksCall(**fields, chosen=chosen), "torch"))


def choose_triton(call: TopKAttentionCall) -> Tensor:
    """`reference.choose_blocks`, int32, by the kernels."""
    weights = importance_triton(call)
    return top_indices(weights, min(call.topk_blocks[1], n_blocks(call))).to(torch.int32)


def importance_triton(call: TopKAttentionCall) -> Tensor:
    """`reference.importance` of the pooled call, by the kernels."""
    fields = shared_fields(blocked(call), "TopKAttentionCall")
    return importance_op(TopKImportanceCall(**fields, seen=seen_keys(call)), "triton").importance
