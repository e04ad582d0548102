"""`attention_map`: where chosen queries look, as pictures of the image's own grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..core.call import AttentionWeightsCall
from ..core.dispatch import run
from .attention_weights import BACKENDS
from .attention_weights import check as check_weights


def attention_map(
    q: Tensor,
    k: Tensor,
    *,
    rows: Sequence[int] | Tensor,
    grid: tuple[int, int],
    first_key: int = 0,
    lse: Tensor | None = None,
    mask=None,
    bias: Tensor | None = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    average_heads: bool = True,
    backend: str | None = None,
    validate: bool = False,
) -> Tensor:
    """The weights of a few queries over the tokens of one image, on the grid of its patches.

    They are `attention_weights` of these rows alone: memory grows with the rows that are asked for,
    and not with Nq.

    Args:
        q, k, mask, bias, scale, softcap, validate: as in `cross_attention`, of all queries.
        rows: indices of queries, ints or an int32 or int64 tensor [R], or [B, R] for each batch
            element its own. Negative ones count from the end.
        grid: (h, w), rows and columns of patches.
        first_key: key of the first patch; the others follow it row by row. With several images, or
            a class token before them, it chooses the image.
        lse: [B, Hq, Nq] float32, as in `attention_weights`; saves computing it for these rows.
        average_heads: False returns the weights of every head.
        backend: as in `attention_weights`.

    Returns:
        [B, R, h, w], or [B, Hq, R, h, w] without averaging, in the dtype of q; as differentiable as
        `attention_weights`. A map sums to the share of attention that its image has.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype, device or range. Of rows
            on a GPU the range is not looked at: that would wait for it.
        RuntimeError: the named backend has reasons against this call.
    """
    options = dict(mask=mask, bias=bias, scale=scale, softcap=softcap, validate=validate)
    call = check_weights(q, k, lse=lse, average_heads=average_heads, **options)
    h, w = check_grid(grid, first_key, call.Nk)
    weights = run("attention_map", BACKENDS, of_rows(call, check_rows(rows, call)), backend)
    return weights[..., first_key : first_key + h * w].unflatten(-1, (h, w))


def of_rows(call: AttentionWeightsCall, rows: Tensor) -> AttentionWeightsCall:
    """The call of these rows [B, R] alone."""
    batch = torch.arange(call.B, device=call.device)[:, None]

    def cut(t: Tensor | None) -> Tensor | None:
        """[B or 1, H, Nq or 1, n] -> [B, H, R or 1, n]; of one for all rows there is no other."""
        if t is None or t.shape[2] == 1 != call.Nq:
            return t
        return t.expand(call.B, -1, -1, -1)[batch, :, rows].transpose(1, 2)

    start, stop = (None if t is None else t[batch, rows] for t in (call.start, call.stop))
    q, mask, bias = cut(call.q), cut(call.mask), cut(call.bias)
    lse = None if call.lse is None else cut(call.lse[..., None])[..., 0]
    return replace(call, q=q, start=start, stop=stop, mask=mask, bias=bias, lse=lse)


def check_grid(grid, first_key, Nk: int) -> tuple[int, int]:
    def is_int(n) -> bool:
        return isinstance(n, int) and not isinstance(n, bool)

    if not isinstance(grid, (tuple, list)) or len(grid) != 2 or not all(map(is_int, grid)):
        raise TypeError(f"grid must be (h, w), two ints, got {grid!r}")
    if min(grid) < 1:
        raise ValueError(f"grid must be of at least one row and column, got {tuple(grid)}")
    if not is_int(first_key):
        raise TypeError(f"first_key must be an int, got {type(first_key).__name__}")
    h, w = grid
    if not 0 <= first_key <= Nk - h * w:
        raise ValueError(
            f"first_key must be from 0 to Nk - h w = {Nk} - {h * w}, got {first_key} with a grid "
            f"of {h} x {w}"
        )
    return h, w


def check_rows(rows, call: AttentionWeightsCall) -> Tensor:
    """int64 [B, R] on the device of q, from 0 on."""
    if not isinstance(rows, Tensor):
        if not isinstance(rows, Sequence) or not all(type(i) is int for i in rows):
            raise TypeError(f"rows must be ints or an integer tensor, got {rows!r}")
        check_indices(rows, call.Nq)
        rows = torch.tensor([i % call.Nq for i in rows], dtype=torch.int64, device=call.device)
    if rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"rows must be ints or an int32 or int64 tensor, got {rows.dtype}")
    if (
        rows.dim() not in (1, 2)
        or rows.dim() == 2
        and len(rows) != call.B
        or rows.device != call.device
    ):
        raise ValueError(
            f"rows must be [R] or [B, R] with B = {call.B} on {call.device}, got "
            f"{list(rows.shape)} on {rows.device}"
        )
    if rows.is_cpu and not torch.compiler.is_compiling():
        check_indices(rows.flatten().tolist(), call.Nq)
    return torch.where(rows < 0, rows + call.Nq, rows).long().expand(call.B, -1)


def check_indices(rows: Sequence[int], Nq: int) -> None:
    for i in rows:
        if not -Nq <= i < Nq:
            raise ValueError(f"rows must be from {-Nq} to {Nq - 1}, got {i}")
