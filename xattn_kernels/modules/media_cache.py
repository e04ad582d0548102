"""`MediaCache`: projected media, with a check that their weights are still the same."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class MediaCache:
    """The keys and values of media, which `cache_media` projects once for any number of calls.

    The modules keep no state between calls: a call reads the media in its argument, a tensor or a
    cache. A cache knows its weights, and a module refuses it with a ValueError if the weights of
    the module are others, were written since, or received a gradient since (after which an
    optimizer may change them without a trace in autograd). This misses only a change through
    `.data` of weights that no gradient reaches. Under torch.compile the check is outside of the
    graph, so that a call with a cache breaks the graph.

    k, v: [B, kv_heads, T * n, dim_head]; under `torch.no_grad()` they carry no gradient.
    """

    k: Tensor = field(repr=False)
    v: Tensor = field(repr=False)
    n_media: int
    tokens_per_media: int
    made_with: Weights | None = field(default=None, repr=False)

    def select(self, index: Tensor) -> MediaCache:
        """The cache of the batch elements `index`, an integer tensor [B'], as beam search needs."""
        return replace(self, k=self.k[index], v=self.v[index])


class Weights:
    """The state of parameters and buffers at the time of this object, to compare with later.

    It holds autograd's count of writes to each tensor, whether the tensor is trained, and whether
    any tensor received a gradient since.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.tensors = tensors(*modules)
        if any(t.is_inference() for t in self.tensors):
            raise ValueError(
                "media cannot be cached with weights created under torch.inference_mode(): nothing "
                "counts their changes; create the module outside of it"
            )
        self.states = [(t._version, t.requires_grad) for t in self.tensors]
        self.received_gradient = False
        for t in self.tensors:
            if t.requires_grad and t.is_leaf:
                # the tensor may outlive this object: its hook must not keep the object alive
                weakref.finalize(self, watch(t, weakref.ref(self)).remove)

    @torch.compiler.disable  # a trace would freeze the counts of its first call
    def check(self, *modules: nn.Module) -> None:
        """Raises ValueError unless the tensors of `modules` are the same ones, unchanged."""
        now = tensors(*modules)
        same = len(now) == len(self.tensors)
        if not same or any(a is not b for a, b in zip(now, self.tensors, strict=True)):
            raise ValueError(
                "media is a cache made with other weights than this module's; use its cache_media"
            )
        if self.received_gradient or self.states != [(t._version, t.requires_grad) for t in now]:
            raise ValueError(
                "media is a cache made before the weights were written, frozen, unfrozen or "
                "received a gradient; call cache_media(media) again"
            )


def tensors(*modules: nn.Module) -> list[Tensor]:
    """Every parameter and buffer of the modules."""
    return [t for m in modules for t in (*m.parameters(), *m.buffers())]


def watch(t: Tensor, weights: weakref.ref):
    """The handle of a hook that marks the weights as soon as `t` receives a gradient.

    Autograd does not count the writes of fused optimizers.
    """

    def mark(_) -> None:
        if (alive := weights()) is not None:
            alive.received_gradient = True

    return t.register_post_accumulate_grad_hook(mark)
