"""Modules on top of the ops; every public name is also at the top of the package."""

from .gated_cross_attention import GatedCrossAttentionBlock
from .masked_cross_attention import MaskedCrossAttention
from .media_cache import MediaCache
from .multihead_attention import MultiheadAttention, replace_multihead_attention
from .perceiver_resampler import PerceiverResampler
from .sparse_cross_attention import SparseCrossAttention

__all__ = [
    "GatedCrossAttentionBlock",
    "MaskedCrossAttention",
    "MediaCache",
    "MultiheadAttention",
    "PerceiverResampler",
    "SparseCrossAttention",
    "replace_multihead_attention",
]
