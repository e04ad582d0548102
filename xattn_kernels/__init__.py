"""Fused cross-attention for vision-language models."""

from . import masks
from .cross_attention import cross_attention
from .dispatch import explain
from .inputs import CrossAttentionResult
from .masks import KeyInterval

__version__ = "0.1.0"
__all__ = ["CrossAttentionResult", "KeyInterval", "cross_attention", "explain", "masks"]
