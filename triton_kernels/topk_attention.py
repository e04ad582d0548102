"""Top-k attention: the choice of keys, then attention of what is chosen, in one of two ways.

Of many chosen keys the kernels of `cross_attention` compute every product and mask it by the bits
of the choice; of few among many the rows gather their keys, see `topk_gather.py`. What is saved for
the backward is the choice itself, so that a score that rounds differently there cannot change it:
one bit per key, or the indices where those are fewer bytes.
"""

from torch import Tensor

from ..core.layout import saves_indices, zero_gradients
from . import cross_attention, cross_attention_backward, topk_gather
from .configs import gathers
from .launch import Call
from .topk_candidates import choose
from .topk_selection import to_bits, to_indices


def forward(
    q, k, v, scale_tensor, start, stop, mask, scale, top_k, statistics, with_indices, allow_tf32
) -> tuple[Tensor, ...]:
    """(out, lse, entropy, max_probability, bits, indices): what was not asked for has no elements.

    Arguments as `cross_attention.forward` takes them. bits int32 [B, Hq, Nq, ceil(Nk / 32)], or
    without elements where `saves_indices`; indices int32 [B, Hq, Nq, top_k], there or with
    `with_indices`.
    """
    call = Call(q, k, v, None, scale_tensor, start, stop, mask, None, scale, 0.0, 0.0, allow_tf32)
    Nk, indexed = call.Nk, saves_indices(call.Nk, top_k)
    if indexed and gathers("forward", Nk, top_k):
        indices = choose(call, top_k, True)
        results = topk_gather.forward(call, indices, statistics)
        return *results, indices.new_empty(0), indices
    bits = choose(call, min(top_k, Nk), False)
    out, lse, _, entropy, max_probability = cross_attention.forward(
        q, k, v, None, scale_tensor, start, stop, bits if Nk else None, None, scale, 0.0, 0.0,
        statistics, allow_tf32,
    )  # fmt: skip
    empty = bits.new_empty(0)
    indices = to_indices(bits, Nk, top_k) if indexed or with_indices else empty
    return out, lse, entropy, max_probability, bits.new_empty(0) if indexed else bits, indices


def backward(
    dout, dlse, dentropy, q, k, v, scale_tensor, start, stop, selected, out, lse, entropy,
    scale, top_k, allow_tf32, needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dscale); those that are not in the four `needs` have no elements.

    selected: the indices or the bits of `forward`, whichever are saved; the rest as in
    `cross_attention_backward.backward`.
    """
    Nk, indexed = k.shape[2], saves_indices(k.shape[2], top_k)
    if out.numel() == 0:
        return zero_gradients((q, k, v, scale_tensor), needs, 3)
    if dout is None:
        dout = out.new_zeros(out.shape)
    elif dout.stride(3) != 1:
        dout = dout.contiguous()
    if indexed and gathers("backward", Nk, top_k):
        call = Call(
            q, k, v, None, scale_tensor, start, stop, None, None, scale, 0.0, 0.0, allow_tf32
        )
        dentropy = None if dentropy is None else dentropy.contiguous()
        grads = topk_gather.backward(call, dout, dlse, dentropy, selected, out, lse, entropy, needs)
        none = q.new_empty
        return tuple(t if n else none(0) for t, n in zip(grads, needs, strict=True))
    bits = to_bits(selected, Nk) if indexed else selected
    dq, dk, dv, _, dscale = cross_attention_backward.backward(
        dout, dlse, dentropy, q, k, v, None, scale_tensor, start, stop, bits if Nk else None, None,
        out, lse, lse.new_empty(0), entropy, scale, 0.0, 0.0, allow_tf32,
        [*needs[:3], False, needs[3]],
    )  # fmt: skip
    return dq, dk, dv, dscale
