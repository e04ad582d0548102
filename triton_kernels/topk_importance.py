"""The importance of blocks of keys, by which top-k attention by blocks chooses: its launcher."""

from .topk_blocks import importance as forward

__all__ = ["forward"]
