"""`SelfEnsemble`: the words of a language model and of its fusion with an image, in one loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.arguments import (
    check_bools,
    check_choice,
    check_range,
    check_sizes,
    kind,
)
from ..core.dispatch import autocasts, without_autocast
from ..losses.chunked_cross_entropy import ChunkedCrossEntropy
from .masked_cross_attention import check_tensor


class SelfEnsemble(nn.Module):
    """Two heads over one vocabulary, of the language stream before fusion and of the fused one.

        logits = W_G h_gpt + W_fuse h_fuse

    What the language model knows has a way to the words that fusion cannot overwrite. Parameters
    `W_G.weight` [vocab_size, dim], which may be a language model's own head, and `W_fuse.weight`.

    Args:
        dim, dim_fused: widths of the two streams; dim_fused=None is dim.
        vocab_size: number of words.
        bias: both heads have one; GPT-2's has none.
        chunk_rows: rows whose logits exist at a time while the loss is computed.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: Luo et al., "A frustratingly simple approach for end-to-end image captioning" (2022).
    """

    def __init__(
        self, *, dim, vocab_size, dim_fused=None, bias=False, chunk_rows=256, device=None,
        dtype=None,
    ) -> None:  # fmt: skip
        dim_fused = dim if dim_fused is None else dim_fused
        check_sizes(dim=dim, vocab_size=vocab_size, dim_fused=dim_fused, chunk_rows=chunk_rows)
        check_bools(bias=bias)
        super().__init__()
        self.chunk_rows = chunk_rows
        made = dict(bias=bias, device=device, dtype=dtype)
        self.W_G = nn.Linear(dim, vocab_size, **made)
        self.W_fuse = nn.Linear(dim_fused, vocab_size, **made)

    def forward(self, h_gpt: Tensor, h_fuse: Tensor, target: Tensor | None = None, **options):
        """`logits(h_gpt, h_fuse)`, or with a target `loss(h_gpt, h_fuse, target, **options)`."""
        if target is not None:
            return self.loss(h_gpt, h_fuse, target, **options)
        if options:
            raise TypeError(f"{', '.join(options)} needs a target")
        return self.logits(h_gpt, h_fuse)

    def logits(self, h_gpt: Tensor, h_fuse: Tensor) -> Tensor:
        """h_gpt [B, N, dim], h_fuse [B, N, dim_fused] -> [B, N, vocab_size]."""
        check_streams(self, h_gpt, h_fuse)
        return self.W_G(h_gpt) + self.W_fuse(h_fuse)

    def loss(
        self, h_gpt: Tensor, h_fuse: Tensor, target: Tensor, *, ignore_index=-100, reduction="mean"
    ) -> Tensor:
        """Cross-entropy of `logits`, which are made for `chunk_rows` rows at a time, twice.

        Memory beside inputs and gradients is that of chunk_rows x vocab_size, forward and
        backward. Sums are float32's, and so is the result, float64's for float64. The heads'
        weights are used without calling them: hooks on them do not run.

        Args:
            h_gpt, h_fuse: as in `logits`; the rows that predict, so h[:, :-1] of a causal model.
            target: int64 [B, N], the word of each row, here token[:, 1:].
            ignore_index: target of rows that do not count.
            reduction: "mean" over the rows that count (nan if none does), "sum", or "none",
                [B, N] with 0 for rows that do not count.

        Raises:
            TypeError, ValueError: an argument of a wrong type, shape, dtype or device; on a CPU
                also a target that is no word.
            RuntimeError: a second derivative is asked for.
        """
        check_streams(self, h_gpt, h_fuse)
        check_target(target, h_gpt, self.W_G.out_features, ignore_index)
        check_choice("reduction", reduction, "mean", "sum", "none")
        heads = self.W_G, self.W_fuse
        biases = [head.bias for head in heads if head.bias is not None]
        tensors = [h_gpt.flatten(0, 1), h_fuse.flatten(0, 1), *(h.weight for h in heads), *biases]
        device = h_gpt.device
        if autocasts(device):
            dtype = torch.get_autocast_dtype(device.type)
            tensors = [t.to(dtype) if t.dtype != torch.float64 else t for t in tensors]
        options = ignore_index, self.chunk_rows, len(heads)
        with without_autocast(device):
            rows, _ = ChunkedCrossEntropy.apply(target.flatten(), *options, *tensors)
        if reduction == "none":
            return rows.view(target.shape)
        total = rows.sum()
        return total if reduction == "sum" else total / (target != ignore_index).sum()

    def extra_repr(self) -> str:
        return f"chunk_rows={self.chunk_rows}"


def check_streams(module: SelfEnsemble, h_gpt, h_fuse) -> None:
    check_tensor("h_gpt", h_gpt, "[B, N, dim]", module.W_G.in_features, module.W_G.weight)
    width, weight = module.W_fuse.in_features, module.W_fuse.weight
    check_tensor("h_fuse", h_fuse, "[B, N, dim_fused]", width, weight)
    if h_gpt.shape[:2] != h_fuse.shape[:2]:
        shapes = f"{list(h_gpt.shape)} and {list(h_fuse.shape)}"
        raise ValueError(f"h_gpt and h_fuse must share [B, N], got {shapes}")


def check_target(target, h: Tensor, vocab_size: int, ignore_index: int) -> None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {kind(ignore_index)}")
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        raise TypeError(f"target must be an int64 tensor, got {kind(target)}")
    if target.shape != h.shape[:2]:
        raise ValueError(f"target must be [B, N] = {list(h.shape[:2])}, got {list(target.shape)}")
    if target.device != h.device:
        raise ValueError(f"target must be on the device of h_gpt, {h.device}, got {target.device}")
    check_range("target", target, vocab_size, ignore_index)
