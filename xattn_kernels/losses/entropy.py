"""`entropy_loss`, which pulls the entropy of attention rows to a target against collapse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.arguments import check_bools, check_number
from ..core.call import CrossAttentionResult, TopKAttentionResult
from .pretraining import check_features


def entropy_loss(
    statistics: CrossAttentionResult | TopKAttentionResult | Tensor,
    target: float = 2.0,
    *,
    row_mask: Tensor | None = None,
    per_row: bool = False,
    one_sided: bool = False,
) -> Tensor:
    """The squared distance of attention entropy from `target`, in nats, against its collapse.

        loss = (mean_i entropy_i - target)^2        per_row: mean_i (entropy_i - target)^2

    The gradient flows through the op's differentiable entropy. Rows without keys do not count.

    Args:
        statistics: what `cross_attention` or `topk_attention` returned with
            `return_statistics=True`, or an entropy tensor of any shape.
        target: a number; n equally attended keys have an entropy of log(n).
        row_mask: bool, broadcasts to the entropy; False excludes a row. Pass it with an entropy
            tensor, which does not tell which rows have no key.
        per_row: whether each row has its own distance, so that diffuse rows cannot compensate.
        one_sided: whether an entropy above the target costs nothing.

    Returns:
        A scalar, 0 when no row counts.

    Raises:
        TypeError, ValueError: an argument is not among those named here, or the op was called
            without `return_statistics`.
    """
    entropy, counts = rows_that_count(statistics, row_mask)
    if not math.isfinite(check_number("target", target, "a finite number")):
        raise ValueError(f"target must be a finite number, got {target}")
    check_bools(per_row=per_row, one_sided=one_sided)
    gap, n = (target - entropy).masked_fill(~counts, 0.0), counts.sum().clamp(min=1)
    gap = gap if per_row else gap.sum() / n
    squares = (gap.clamp(min=0.0) if one_sided else gap).square()
    return squares.sum() / n if per_row else squares


def rows_that_count(statistics, row_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The entropy and, in its shape, a bool tensor that is True where a row counts."""
    if isinstance(statistics, Tensor):
        check_features("statistics", statistics, None, "of entropies")
        entropy, counts = statistics, torch.ones_like(statistics, dtype=torch.bool)
    elif isinstance(statistics, (CrossAttentionResult, TopKAttentionResult)):
        entropy = statistics.entropy
        if entropy is None or statistics.lse is None:
            raise ValueError("statistics must be of a call with return_statistics=True")
        counts = statistics.lse.detach() != -math.inf
    else:
        raise TypeError(
            "statistics must be a CrossAttentionResult, a TopKAttentionResult or an entropy "
            f"tensor, got {type(statistics).__name__}"
        )
    if row_mask is None:
        return entropy, counts
    if not isinstance(row_mask, Tensor) or row_mask.dtype != torch.bool:
        got = row_mask.dtype if isinstance(row_mask, Tensor) else type(row_mask).__name__
        raise TypeError(f"row_mask must be a bool tensor, got {got}")
    fits = row_mask.dim() <= counts.dim() and all(
        n in (1, m) for n, m in zip(reversed(row_mask.shape), reversed(counts.shape), strict=False)
    )
    if not fits or row_mask.device != counts.device:
        raise ValueError(
            f"row_mask must broadcast to the entropy, {list(counts.shape)} on {counts.device}, got "
            f"{list(row_mask.shape)} on {row_mask.device}"
        )
    return entropy, counts & row_mask
