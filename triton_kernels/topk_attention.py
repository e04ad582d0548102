"""Top-k attention: the choice of keys, then attention of what is chosen, in one of two ways.

Of many chosen keys the kernels of `cross_attention` compute every product and mask it by the bits
of the choice; of few among many the rows gather their keys, see `topk_gather.py`. What is saved for
the backward is the choice itself, so that a score that rounds differently there cannot change it:
one bit per key, or the indices where those are fewer bytes.
"""

from dataclasses import replace

from ..core.call import TopKAttentionCall
from ..core.kernel_op import Gradients, Needs
from ..core.layout import (
    AttentionResults,
    TopKResults,
    row_gradient,
    saves_indices,
    zero_gradients,
)
from . import cross_attention, topk_gather
from .configs import gathers
from .topk_candidates import choose
from .topk_selection import to_bits, to_indices


def forward(call: TopKAttentionCall) -> TopKResults:
    """The results of a call by keys. bits int32 [B, Hq, Nq, ceil(Nk / 32)] are there unless
    `saves_indices`; indices int32 [B, Hq, Nq, top_k] there, or where they are asked for."""
    Nk, top_k = call.Nk, call.top_k
    indexed = saves_indices(Nk, top_k)
    if indexed and gathers("forward", Nk, top_k):
        indices = choose(call, top_k, True)
        return TopKResults(*topk_gather.forward(call, indices), None, indices)
    bits = choose(call, min(top_k, Nk), False)
    results = cross_attention.forward(replace(call, mask=bits if Nk else None))
    indices = to_indices(bits, Nk, top_k) if indexed or call.return_indices else None
    return TopKResults(*results, None if indexed else bits, indices)


def backward(
    upstream: TopKResults, call: TopKAttentionCall, results: TopKResults, needs: Needs
) -> Gradients:
    """The gradients that `needs` names, of q, k, v and scale_tensor; the choice is that of the
    forward, its bits or its indices, whichever are saved."""
    Nk, top_k = call.Nk, call.top_k
    if results.out.numel() == 0:
        return zero_gradients(call, needs)
    upstream, attended = attention_part(upstream), attention_part(results)
    if results.bits is not None:
        bits = results.bits
    elif gathers("backward", Nk, top_k):
        upstream = upstream._replace(out=row_gradient(upstream.out, results.out))
        return topk_gather.backward(upstream, call, attended, results.indices, needs)
    else:
        bits = to_bits(results.indices, Nk)
    call = replace(call, mask=bits if Nk else None)
    return cross_attention.backward(upstream, call, attended, needs)


def attention_part(results: TopKResults) -> AttentionResults:
    """The results without the choice."""
    return AttentionResults(*results[: len(AttentionResults._fields)])
