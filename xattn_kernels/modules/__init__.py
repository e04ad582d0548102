"""Modules on top of the ops; every public name is also at the top of the package."""

from .multihead_attention import MultiheadAttention, replace_multihead_attention

__all__ = ["MultiheadAttention", "replace_multihead_attention"]
