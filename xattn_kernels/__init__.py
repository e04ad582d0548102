"""Fused cross-attention for vision-language models."""

from . import masks
from .attention_weights import attention_weights
from .cross_attention import cross_attention
from .dispatch import explain
from .inputs import CrossAttentionResult
from .masks import KeyInterval
from .modules import MultiheadAttention, replace_multihead_attention

__version__ = "0.1.0"
__all__ = [
    "CrossAttentionResult",
    "KeyInterval",
    "MultiheadAttention",
    "attention_weights",
    "cross_attention",
    "explain",
    "masks",
    "replace_multihead_attention",
]
