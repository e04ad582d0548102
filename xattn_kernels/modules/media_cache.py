"""`MediaCache`: projected media, and the proof that the weights behind them are still the same."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class MediaCache:
    """Keys and values of media, projected once by `cache_media` for any number of calls.

    The modules keep nothing between calls: each call sees the media that it is given, as a tensor
    or as a cache. A cache knows the weights it was made with, and a module refuses it with a
    ValueError when its weights are others, were written since, or received a gradient since (after
    which an optimizer may have changed them without autograd's notice). Only a change through
    `.data` of weights that no gradient reaches escapes that. Under torch.compile this check is
    outside of the graph, which a call with a cache breaks there.

    k, v: [B, kv_heads, T * n, dim_head]; made under `torch.no_grad()` they carry no gradient.
    """

    k: Tensor = field(repr=False)
    v: Tensor = field(repr=False)
    n_media: int
    tokens_per_media: int
    made_with: Weights | None = field(default=None, repr=False)

    def select(self, index: Tensor) -> MediaCache:
        """The cache of the batch elements `index`, an integer tensor [B']: beams that moved."""
        return replace(self, k=self.k[index], v=self.v[index])


class Weights:
    """Parameters and buffers as they were when this was made: autograd's count of the writes to
    each, whether it is trained, and whether any received a gradient since."""

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
                # the tensor outlives this object and must neither keep it nor call it then
                weakref.finalize(self, watch(t, weakref.ref(self)).remove)

    @torch.compiler.disable  # a trace would take the counts of today for those of every call
    def check(self, *modules: nn.Module) -> None:
        """Raises ValueError unless the tensors of `modules` are these, unchanged."""
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
    """Every parameter and buffer."""
    return [t for m in modules for t in (*m.parameters(), *m.buffers())]


def watch(t: Tensor, weights: weakref.ref):
    """Marks the weights when `t` receives a gradient; fused optimizers do not count as a write."""

    def mark(_) -> None:
        if (found := weights()) is not None:
            found.received_gradient = True

    return t.register_post_accumulate_grad_hook(mark)
