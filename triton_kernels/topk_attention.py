"""Top-k attention: the selection, then the kernels of `cross_attention` with its bits as the mask.

What is saved for the backward is the selection itself, so that a score that rounds differently
there cannot change it: one bit per key, or the indices where those are fewer bytes.
"""

from torch import Tensor

from . import cross_attention, cross_attention_backward
from .launch import Call
from .topk_selection import select, to_bits, to_indices


def saves_indices(Nk: int, top_k: int) -> bool:
    """Whether a row's indices are fewer bytes than its bits."""
    return 4 * top_k < Nk // 8


def forward(
    q, k, v, scale_tensor, start, stop, mask, scale, top_k, statistics, with_indices, allow_tf32
) -> tuple[Tensor, ...]:
    """(out, lse, entropy, max_probability, bits, indices): what was not asked for has no elements.

    Arguments as `cross_attention.forward` takes them. bits int32 [B, Hq, Nq, ceil(Nk / 32)], or
    without elements where `saves_indices`; indices int32 [B, Hq, Nq, top_k], there or with
    `with_indices`.
    """
    call = Call(q, k, v, None, scale_tensor, start, stop, mask, None, scale, 0.0, 0.0, allow_tf32)
    Nk = call.Nk
    bits = select(call, min(top_k, Nk))
    out, lse, _, entropy, max_probability = cross_attention.forward(
        q, k, v, None, scale_tensor, start, stop, bits if Nk else None, None, scale, 0.0, 0.0,
        statistics, allow_tf32,
    )  # fmt: skip
    indices = bits.new_empty(0)
    if with_indices or saves_indices(Nk, top_k):
        indices = to_indices(bits, Nk, top_k)
    if saves_indices(Nk, top_k):
        bits = bits.new_empty(0)
    return out, lse, entropy, max_probability, bits, indices


def backward(
    dout, dlse, dentropy, q, k, v, scale_tensor, start, stop, selected, out, lse, entropy,
    scale, top_k, allow_tf32, needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dscale); those that are not in the four `needs` have no elements.

    selected: the indices or the bits of `forward`, whichever are saved; the rest as in
    `cross_attention_backward.backward`.
    """
    Nk = k.shape[2]
    bits = to_bits(selected, Nk) if saves_indices(Nk, top_k) else selected
    dq, dk, dv, _, dscale = cross_attention_backward.backward(
        dout, dlse, dentropy, q, k, v, None, scale_tensor, start, stop, bits if Nk else None, None,
        out, lse, lse.new_empty(0), entropy, scale, 0.0, 0.0, allow_tf32,
        [*needs[:3], False, needs[3]],
    )  # fmt: skip
    return dq, dk, dv, dscale
