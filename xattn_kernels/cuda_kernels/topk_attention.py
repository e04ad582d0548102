"""The launchers of top-k attention: a CUDA kernel chooses keys, and the choice masks attention.

Their arguments and results are those of the launchers in `triton_kernels/topk_attention.py`. Chosen
keys are not gathered: the kernels compute every product, and mask it by the bits of the choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.layout import saves_indices, zero_gradients
from . import cross_attention, launch
from .launch import extension


def choose(q, k, scale_tensor, start, stop, mask, scale, top_k) -> Tensor:
    """The chosen keys, as int32 [B, Hq, Nq, ceil(Nk / 32)] with one bit for each key."""
    bits = q.new_empty((*q.shape[:3], -(-k.shape[2] // 32)), dtype=torch.int32)
    if bits.numel():
        scale_tensor = cross_attention.as_float32(scale_tensor)
        call = cross_attention.call_of(
            q, k, k, None, scale_tensor, start, stop, mask, None, scale, 0.0, 0.0
        )
        params = extension().TopKSelectionParams(bits=launch.pointer(bits), call=call, top_k=top_k)
        launch.submit("topk_selection", params, q.device)
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


def forward(
    q, k, v, scale_tensor, start, stop, mask, scale, top_k, statistics, with_indices,
    allow_tf32=False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(out, lse, entropy, max_probability, bits, indices). The arguments are those of `forward` of
    the Triton kernels."""
    Nk = k.shape[2]
    indexed = saves_indices(Nk, top_k)
    bits = choose(q, k, scale_tensor, start, stop, mask, scale, min(top_k, max(Nk, 1)))
    out, lse, _, entropy, max_probability = cross_attention.forward(
        q, k, v, None, scale_tensor, start, stop, bits, None, scale, 0.0, 0.0, statistics
    )
    empty = bits.new_empty(0)
    indices = empty
    if indexed or with_indices:
        indices = q.new_empty((*q.shape[:3], top_k), dtype=torch.int32)
        convert(indices, bits, Nk, False)
    return out, lse, entropy, max_probability, bits.new_empty(0) if indexed else bits, indices


def backward(
    dout, dlse, dentropy, q, k, v, scale_tensor, start, stop, selected, out, lse, entropy,
    scale, top_k, allow_tf32, needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dscale). The arguments are those of `backward` of the Triton kernels."""
    Nk = k.shape[2]
    if out.numel() == 0 or Nk == 0:
        return zero_gradients((q, k, v, scale_tensor), needs, 3)
    bits = selected
    if saves_indices(Nk, top_k):
        bits = q.new_empty((*q.shape[:3], -(-Nk // 32)), dtype=torch.int32)
        convert(selected, bits, Nk, True)
    dq, dk, dv, _, dscale = cross_attention.backward(
        dout, dlse, dentropy, q, k, v, None, scale_tensor, start, stop, bits, None, out, lse,
        lse.new_empty(0), entropy, scale, 0.0, 0.0, allow_tf32, [*needs[:3], False, needs[3]],
    )  # fmt: skip
    return dq, dk, dv, dscale
