"""`SelfEnsemble`: one loss of the words of a language model and of its fusion with an image."""

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
    """Two heads over one vocabulary: one on the language stream, one on the fused stream.

        logits = W_G h_gpt + W_fuse h_fuse

    The language model thus keeps a path to the words that fusion cannot overwrite. The parameters
    are `W_G.weight` [vocab_size, dim], which may be the head of a language model, and
    `W_fuse.weight`.

    Args:
        dim, dim_fused: widths of the two streams; dim_fused=None means dim.
        vocab_size: number of words.
        bias: whether both heads have a bias; the head of GPT-2 has none.
        chunk_rows: number of rows whose logits exist at a time in the loss.

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
        factory = dict(bias=bias, device=device, dtype=dtype)
        self.W_G = nn.Linear(dim, vocab_size, **factory)
        self.W_fuse = nn.Linear(dim_fused, vocab_size, **factory)

    def forward(self, h_gpt: Tensor, h_fuse: Tensor, target: Tensor | None = None, **options):
        """The `logits` of the two streams, or with a target their `loss` with `options`."""
        if target is not None:
            return self.loss(h_gpt, h_fuse, target, **options)
        if options:
            raise TypeError(f"{', '.join(options)} needs a target")
        return self.logits(h_gpt, h_fuse)

    def logits(self, h_gpt: Tensor, h_fuse: Tensor) -> Tensor:
        """The logits [B, N, vocab_size] of h_gpt [B, N, dim] and h_fuse [B, N, dim_fused]."""
        check_streams(self, h_gpt, h_fuse)
        return self.W_G(h_gpt) + self.W_fuse(h_fuse)

    def loss(
        self, h_gpt: Tensor, h_fuse: Tensor, target: Tensor, *, ignore_index=-100, reduction="mean"
    ) -> Tensor:
        """The cross-entropy of `logits`, computed for `chunk_rows` rows at a time.

        Beside inputs and gradients, forward and backward need memory for chunk_rows x vocab_size
        logits, which the backward computes again. Sums and the result are float32, or float64 for
        float64. The loss uses the weights of the heads without calling the heads: hooks on them do
        not run.

        Args:
            h_gpt, h_fuse: as in `logits`; the rows that predict, h[:, :-1] of a causal model.
            target: int64 [B, N], the word of each row, token[:, 1:] for a causal model.
            ignore_index: the target of rows that do not count.
            reduction: "mean" over the rows that count (nan if none does), "sum", or "none" for
                [B, N] with 0 in rows that do not count.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape, dtype or device, or on a
                CPU a target is no word.
            RuntimeError: a second derivative is requested.
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
    """Raises unless the streams fit the heads of `module` and each other."""
    check_tensor("h_gpt", h_gpt, "[B, N, dim]", module.W_G.in_features, module.W_G.weight)
    width, weight = module.W_fuse.in_features, module.W_fuse.weight
    check_tensor("h_fuse", h_fuse, "[B, N, dim_fused]", width, weight)
    if h_gpt.shape[:2] != h_fuse.shape[:2]:
        shapes = f"{list(h_gpt.shape)} and {list(h_fuse.shape)}"
        raise ValueError(f"h_gpt and h_fuse must share [B, N], got {shapes}")


def check_target(target, h: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raises unless `target` holds a word or `ignore_index` for each row of `h`."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {kind(ignore_index)}")
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        raise TypeError(f"target must be an int64 tensor, got {kind(target)}")
    if target.shape != h.shape[:2]:
        raise ValueError(f"target must be [B, N] = {list(h.shape[:2])}, got {list(target.shape)}")
    if target.device != h.device:
        raise ValueError(f"target must be on the device of h_gpt, {h.device}, got {target.device}")
    check_range("target", target, vocab_size, ignore_index)
