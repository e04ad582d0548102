"""The losses of vision-language pretraining: contrast, matching and generation.

    ITC        s_ij = max_n <image_i,n, text_j> / temperature, both of unit length
               (CE(s, targets) + CE(s^T, targets)) / 2
    ITM        CE(mean_n logits_n, match or not) over pairs and their hard negatives
    LM, ITG    CE(logits_i, token_i+1)

`docs/losses.md` has an example of each; `entropy_loss` is in `entropy.py`. All losses are computed
in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.arguments import (
    check_bools,
    check_function,
    check_number,
    check_range,
    kind,
)
from ..core.dispatch import without_autocast

IGNORED = -100  # the default ignore_index of torch


class HardNegatives(NamedTuple):
    """The indices of a similar wrong text for each image, and of a wrong image for each text.

    Both are int64 [B], -1 where every candidate is a positive.
    """

    texts: Tensor
    images: Tensor


class MatchingPairs(NamedTuple):
    """The image and text indices of pairs for ITM, and their labels, int64 [3 B] each.

    The B matches come first, then each image with its negative text, then each text with its
    negative image. `labels` is 1 for a match, 0 for a negative and -100 where no negative exists;
    such a place holds a match, so that the shape is always [3 B].
    """

    images: Tensor
    texts: Tensor
    labels: Tensor


class StageOneLosses(NamedTuple):
    """The losses of BLIP-2's first stage, three scalars and their sum."""

    total: Tensor
    itc: Tensor
    itm: Tensor
    itg: Tensor


def image_text_similarity(image: Tensor, text: Tensor) -> Tensor:
    """The cosine similarity of each image with each text, [B, B_text], in float32 at least.

    Args:
        image: [B, dim], or [B, n, dim] of n queries (Q-Former), of which the most similar counts.
        text: [B_text, dim].

    Raises:
        TypeError, ValueError: a tensor is not one of these.

    Source: Radford et al., "CLIP" (2021); the maximum is that of Li et al., "BLIP-2" (2023).
    """
    check_features("image", image, (2, 3))
    check_features("text", text, (2,))
    if image.shape[-1] != text.shape[-1]:
        raise ValueError(
            f"image and text must share their width, got {image.shape[-1]} and {text.shape[-1]}"
        )
    if image.dim() == 3 and image.shape[1] == 0:
        raise ValueError(f"image must have at least one query, got shape {list(image.shape)}")
    dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    with without_autocast(image.device):
        image, text = (F.normalize(t.to(dtype), dim=-1) for t in (image, text))
        similarity = image @ text.T
    return similarity.amax(1) if image.dim() == 3 else similarity


def itc_loss(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    ids: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The image-text contrastive loss: each image finds its text, and each text its image.

        loss = (CE(s / temperature, targets) + CE(s^T / temperature, targets)) / 2

    Args:
        image, text: as in `image_text_similarity`; image i belongs to text i.
        temperature: a positive number, or a tensor of one value that may require grad.
        ids: integers [B]; elements of equal id are positives of each other, and the target spreads
            evenly over them. With None only image i and text i are.
        label_smoothing: the share of the target that spreads over all candidates, in [0, 1).

    Returns:
        A scalar, 0 for B = 0.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: Radford et al., "CLIP" (2021); Li et al., "BLIP-2" (2023), with a smoothing of 0.1.
    """
    check_smoothing(label_smoothing)
    similarity = image_text_similarity(image, text)
    same = positives(similarity, ids)
    logits = similarity / check_temperature(temperature, similarity)
    if not len(logits):
        return logits.sum()
    targets = same.to(logits.dtype)
    targets = targets / targets.sum(1, keepdim=True)
    options = dict(label_smoothing=label_smoothing)
    return (
        F.cross_entropy(logits, targets, **options) + F.cross_entropy(logits.T, targets, **options)
    ) / 2


@torch.no_grad()
def hard_negatives(
    similarity: Tensor,
    *,
    ids: Tensor | None = None,
    sample: bool = False,
    temperature: float | Tensor = 0.07,
    generator: torch.Generator | None = None,
) -> HardNegatives:
    """The indices of a similar wrong text for each image, and of a wrong image for each text.

    Args:
        similarity: [B, B] of images (rows) and texts, as `image_text_similarity` gives it.
        ids: integers [B]; elements of equal id are no negatives of each other.
        sample: whether to draw from the softmax of similarity / temperature over the negatives.
            False takes the most similar one, and of equals the first.
        temperature: a positive number or a tensor of one value, for the draw.
        generator: the random generator of the draw; None is torch's default one.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: Li et al., "Align before fuse" (2021) and "BLIP-2" (2023), both with a draw.
    """
    check_bools(sample=sample)
    check_features("similarity", similarity, (2,), "[B, B]")
    same, scaled = positives(similarity, ids), check_temperature(temperature, similarity)
    logits = (similarity / scaled).masked_fill(same, -math.inf)
    options = dict(sample=sample, generator=generator)
    return HardNegatives(most_similar(logits, **options), most_similar(logits.T, **options))


def most_similar(logits: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
    """The drawn or largest column of each row, int64 [B]; -1 for a row of -inf."""
    if not len(logits):
        return torch.zeros(0, dtype=torch.int64, device=logits.device)
    none = (logits == -math.inf).all(1)
    if sample:
        p = logits.masked_fill(none[:, None], 0.0).softmax(1, dtype=torch.float32)
        columns = torch.multinomial(p, 1, generator=generator)[:, 0]
    else:
        columns = logits.argmax(1)
    return columns.masked_fill(none, -1)


def matching_pairs(negatives: HardNegatives) -> MatchingPairs:
    """The pairs whose ITM logits `itm_loss` takes, from the result of `hard_negatives`.

    Raises TypeError unless `negatives` is a `HardNegatives`.
    """
    if not isinstance(negatives, HardNegatives):
        raise TypeError(f"negatives must be HardNegatives, got {kind(negatives)}")
    index = torch.arange(len(negatives.texts), device=negatives.texts.device)
    has_text, has_image = negatives.texts >= 0, negatives.images >= 0
    images = torch.cat((index, index, torch.where(has_image, negatives.images, index)))
    texts = torch.cat((index, torch.where(has_text, negatives.texts, index), index))
    labels = torch.zeros_like(images)
    labels[: len(index)] = 1
    exists = torch.cat((index >= 0, has_text, has_image))
    return MatchingPairs(images, texts, labels.masked_fill(~exists, IGNORED))


def itm_loss(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """The image-text matching loss: the cross-entropy of "no match" and "match".

    Args:
        logits: [N, 2], or [N, n, 2] of n queries (Q-Former), whose mean counts.
        labels: int64 [N]: 1 for a match, 0 for none, -100 to exclude a pair.
        label_smoothing: in [0, 1).

    Returns:
        The mean over the pairs that count, 0 when there are none.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: Li et al., "BLIP-2" (2023).
    """
    check_smoothing(label_smoothing)
    check_features("logits", logits, (2, 3), "[N, 2] or [N, n, 2]")
    if logits.shape[-1] != 2:
        raise ValueError(f"logits must be [N, 2] or [N, n, 2], got {list(logits.shape)}")
    check_labels(labels, logits.shape[:1], logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.mean(1) if logits.dim() == 3 else logits
    return mean_cross_entropy(logits, labels, IGNORED, label_smoothing)


def lm_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    n_prefix: int = 0,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The language modelling loss: the logits of each position predict the token after it.

    It is also the loss of image-grounded text generation (ITG).

    Args:
        logits: [B, n_prefix + N, V].
        labels: int64 [B, N], the tokens themselves; `ignore_index` where one does not count.
        n_prefix: the number of positions before the text (visual tokens of a language model). The
            last of them predicts the first token, which nothing predicts if n_prefix is 0.
        ignore_index: the label of excluded tokens.
        label_smoothing: in [0, 1).

    Returns:
        The mean over the tokens that count, 0 when there are none.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: Li et al., "BLIP-2" (2023), both stages.
    """
    check_smoothing(label_smoothing)
    for name, n in dict(n_prefix=n_prefix, ignore_index=ignore_index).items():
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"{name} must be an int, got {type(n).__name__}")
    check_features("logits", logits, (3,), "[B, n_prefix + N, V]")
    B, n = logits.shape[:2]
    if not 0 <= n_prefix <= n:
        raise ValueError(f"n_prefix must be from 0 to the {n} positions of logits, got {n_prefix}")
    check_labels(labels, (B, n - n_prefix), logits, ignore_index)
    labels = labels if n_prefix else labels[:, 1:]
    logits = logits[:, max(n_prefix - 1, 0) : -1].flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return mean_cross_entropy(logits, labels.flatten(), ignore_index, label_smoothing)


def stage_one_losses(
    image: Tensor,
    text: Tensor,
    match: Callable[[Tensor, Tensor], Tensor],
    lm_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    ids: Tensor | None = None,
    label_smoothing: float = 0.1,
    sample: bool = True,
    generator: torch.Generator | None = None,
) -> StageOneLosses:
    """The ITC, ITM and ITG losses of a batch and their sum: the first stage of BLIP-2.

    Args:
        image, text, temperature, ids: as in `itc_loss`.
        match: a function that takes the int64 indices [3 B] of images and of texts from
            `matching_pairs` and returns the ITM logits of these pairs, [3 B, 2] or [3 B, n, 2].
        lm_logits, labels: as in `lm_loss`.
        label_smoothing: for ITC and ITG, in [0, 1).
        sample, generator: as in `hard_negatives`.

    Raises:
        TypeError, ValueError: the errors of the losses.

    Source: Li et al., "BLIP-2" (2023).
    """
    check_function("match", match)
    options = dict(temperature=temperature, ids=ids)
    itc = itc_loss(image, text, label_smoothing=label_smoothing, **options)
    similarity = image_text_similarity(image.detach(), text.detach())
    negatives = hard_negatives(similarity, sample=sample, generator=generator, **options)
    pairs = matching_pairs(negatives)
    itm = itm_loss(match(pairs.images, pairs.texts), pairs.labels)
    itg = lm_loss(lm_logits, labels, label_smoothing=label_smoothing)
    return StageOneLosses(itc + itm + itg, itc, itm, itg)


def mean_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float
) -> Tensor:
    """The mean over the labels that count, 0 if none does, where torch's mean is 0 / 0."""
    options = dict(ignore_index=ignore_index, label_smoothing=label_smoothing)
    total = F.cross_entropy(logits, labels, reduction="sum", **options)
    return total / (labels != ignore_index).sum().clamp(min=1)


def positives(similarity: Tensor, ids: Tensor | None) -> Tensor:
    """A bool tensor [B, B], True where a text (column) belongs to an image (row)."""
    B, n_texts = similarity.shape
    if B != n_texts:
        raise ValueError(
            f"there must be one text for each image, similarity [B, B], got {B} images and "
            f"{n_texts} texts"
        )
    same_index = torch.eye(B, dtype=torch.bool, device=similarity.device)
    if ids is None:
        return same_index
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex():
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids must be an integer tensor [B], got {got}")
    if tuple(ids.shape) != (B,) or ids.device != similarity.device:
        raise ValueError(
            f"ids must be [B] = [{B}] on {similarity.device}, got {list(ids.shape)} on {ids.device}"
        )
    return same_index | (ids[:, None] == ids)


def check_features(name: str, t, ranks: tuple[int, ...] | None, dims: str = "") -> None:
    """Raises unless `t` is a floating-point tensor of a rank in `ranks` (None: any)."""
    dims = dims or " or ".join({2: "[B, dim]", 3: "[B, n, dim]"}[r] for r in ranks)
    if not isinstance(t, Tensor) or not t.is_floating_point():
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} must be a floating-point tensor {dims}, got {got}")
    if ranks is not None and t.dim() not in ranks:
        raise ValueError(f"{name} must be {dims}, got shape {list(t.shape)}")


def check_labels(labels, shape, logits: Tensor, ignore_index: int = IGNORED) -> None:
    """Raises unless `labels` are int64 class indices of this shape beside `logits`."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be an int64 tensor, got {got}")
    if tuple(labels.shape) != tuple(shape) or labels.device != logits.device:
        raise ValueError(
            f"labels must be {list(shape)} on {logits.device}, got {list(labels.shape)} on "
            f"{labels.device}"
        )
    check_range("labels", labels, logits.shape[-1], ignore_index)


def check_smoothing(label_smoothing: float) -> None:
    """Raises unless the label smoothing is a number in [0, 1)."""
    if not 0.0 <= check_number("label_smoothing", label_smoothing, "a number in [0, 1)") < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")


def check_temperature(temperature: float | Tensor, similarity: Tensor) -> float | Tensor:
    """The temperature as a number or as a 0-d tensor like `similarity`.

    Raises for a wrong type, shape or number. The value of a tensor is not read, which would wait
    for the device.
    """
    if not isinstance(temperature, Tensor):
        if not 0.0 < check_number("temperature", temperature, "a number or a tensor") < math.inf:
            raise ValueError(f"temperature must be a positive number, got {temperature}")
        return temperature
    if not temperature.is_floating_point() or temperature.numel() != 1:
        raise ValueError(
            "temperature must be a floating-point tensor of one value, got "
            f"{temperature.dtype} of shape {list(temperature.shape)}"
        )
    return temperature.reshape(()).to(similarity.device, similarity.dtype)
