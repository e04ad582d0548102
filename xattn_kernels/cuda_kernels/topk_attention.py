"""The launchers of top-k attention: a CUDA kernel chooses keys, and the choice masks attention.

Their arguments and results are those of the launchers in `triton_kernels/topk_attention.py`. Chosen
keys are not gathered: the kernels compute every product, and mask it by the bits of the choice.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..core.call import TopKAttentionCall
from ..core.kernel_op import Gradients, Needs
from ..core.layout import AttentionResults, TopKResults, saves_indices, zero_gradients
from . import cross_attention, launch
from .launch import extension


def new_bits(call: TopKAttentionCall) -> Tensor:
    """Uninitialised int32 [B, Hq, Nq, ceil(Nk / 32)], one bit for each key."""
    return call.q.new_empty((*call.q.shape[:3], -(-call.Nk // 32)), dtype=torch.int32)


def choose(call: TopKAttentionCall) -> Tensor:
    """The chosen keys, as `new_bits`."""
    bits, call = new_bits(call), cross_attention.readable(call)
    if bits.numel():
        params = extension().TopKSelectionParams(
            bits=launch.pointer(bits),
            call=cross_attention.struct_of(call),
            top_k=min(call.top_k, max(call.Nk, 1)),
        )
        launch.submit("topk_selection", params, call.device)
    return bits


def convert(indices: Tensor, bits: Tensor, Nk: int, to_bits: bool) -> None:
    """Fills `bits` from `indices` if `to_bits`, and else `indices` from `bits`; both are
    [B, Hq, Nq, *]."""
    rows = indices.shape[:3].numel()
    if rows and Nk:
        params = extension().TopKIndicesParams(
            indices=launch.pointer(indices),
            bits=launch.pointer(bits),
            rows=rows,
            Nk=Nk,
            top_k=indices.shape[3],
            to_bits=to_bits,
        )
        launch.submit("topk_indices", params, indices.device)
    elif not to_bits:
        indices.fill_(-1)


def forward(call: TopKAttentionCall) -> TopKResults:
    """The results of a call, as `forward` of the Triton kernels returns them."""
    bits, indexed, indices = choose(call), saves_indices(call.Nk, call.top_k), None
    attended = cross_attention.forward(replace(call, mask=bits))
    if indexed or call.return_indices:
        indices = call.q.new_empty((*call.q.shape[:3], call.top_k), dtype=torch.int32)
        convert(indices, bits, call.Nk, False)
    return TopKResults(*attended, None if indexed else bits, indices)


def backward(
    upstream: TopKResults, call: TopKAttentionCall, results: TopKResults, needs: Needs
) -> Gradients:
    """The gradients that `needs` names, as `backward` of the Triton kernels returns them."""
    if results.out.numel() == 0 or call.Nk == 0:
        return zero_gradients(call, needs)
    bits = results.bits
    if bits is None:
        bits = new_bits(call)
        convert(results.indices, bits, call.Nk, True)
    n = len(AttentionResults._fields)
    upstream, attended = AttentionResults(*upstream[:n]), AttentionResults(*results[:n])
    return cross_attention.backward(upstream, replace(call, mask=bits), attended, needs)
