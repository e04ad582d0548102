"""Fused cross-attention for vision-language models."""

from . import masks
from .attention_weights import attention_weights
from .cross_attention import cross_attention
from .dispatch import explain
from .gated_projection import gated_projection
from .gated_residual import GatedResidualNormResult, gated_residual, gated_residual_norm
from .inputs import CrossAttentionResult, TopKAttentionResult
from .masks import KeyInterval
from .modules import (
    GatedCrossAttentionBlock,
    MaskedCrossAttention,
    MediaCache,
    MultiheadAttention,
    PerceiverResampler,
    SparseCrossAttention,
    replace_multihead_attention,
)
from .topk_attention import kept_mass, topk_attention

__version__ = "0.1.0"
__all__ = [
    "CrossAttentionResult",
    "GatedCrossAttentionBlock",
    "GatedResidualNormResult",
    "KeyInterval",
    "MaskedCrossAttention",
    "MediaCache",
    "MultiheadAttention",
    "PerceiverResampler",
    "SparseCrossAttention",
    "TopKAttentionResult",
    "attention_weights",
    "cross_attention",
    "explain",
    "gated_projection",
    "gated_residual",
    "gated_residual_norm",
    "kept_mass",
    "masks",
    "replace_multihead_attention",
    "topk_attention",
]
