"""Modules on top of the ops; every public name is also at the top of the package."""

from .attention_pooler import AttentionPooler, CoCaCrossAttention
from .fusion import (
    EarlyFusion,
    FusedPair,
    FusedTokens,
    LateFusion,
    MidFusion,
)
from .gated_cross_attention import GatedCrossAttentionBlock
from .masked_cross_attention import MaskedCrossAttention
from .media_cache import MediaCache
from .multihead_attention import MultiheadAttention, replace_multihead_attention
from .perceiver_resampler import PerceiverResampler
from .qformer import QFormer
from .self_ensemble import SelfEnsemble
from .sparse_cross_attention import SparseCrossAttention
from .stable_cross_attention import NormalizedCrossAttention, StableCrossAttention
from .visualgpt import SRAU, VisualGPTBlock

__all__ = [
    "SRAU",
    "AttentionPooler",
    "CoCaCrossAttention",
    "EarlyFusion",
    "FusedPair",
    "FusedTokens",
    "GatedCrossAttentionBlock",
    "LateFusion",
    "MaskedCrossAttention",
    "MediaCache",
    "MidFusion",
    "MultiheadAttention",
    "NormalizedCrossAttention",
    "PerceiverResampler",
    "QFormer",
    "SelfEnsemble",
    "SparseCrossAttention",
    "StableCrossAttention",
    "VisualGPTBlock",
    "replace_multihead_attention",
]
