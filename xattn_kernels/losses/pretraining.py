"""Losses of vision-language training: contrast, matching and generation.

    ITC        s_ij = max_n <image_i,n, text_j> / temperature, both of unit length
               (CE(s, targets) + CE(s^T, targets)) / 2
    ITM        CE(mean_n logits_n, match or not) over pairs and their hard negatives
    LM, ITG    CE(logits_i, token_i+1)

Entropy has a file of its own; `docs/losses.md` has an example of each. Everything is computed in
float32 at least.
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

IGNORED = -100  # torch's default ignore_index


class HardNegatives(NamedTuple):
    """For each image the index of a text that is not its own, for each text that of an image;
    int64 [B], -1 where every candidate is a positive."""

    texts: Tensor
    images: Tensor


class MatchingPairs(NamedTuple):
    """Pairs for ITM: int64 [3 B] each, the B matches first, then every image with its negative
    text, then every text with its negative image. `labels` is 1 for a match, 0 for a negative and
    -100 where there was no negative (its pair is then a match, for the shape's sake)."""

    images: Tensor
    texts: Tensor
    labels: Tensor


class StageOneLosses(NamedTuple):
    """The three losses of BLIP-2's first stage and their sum."""

    total: Tensor
    itc: Tensor
    itm: Tensor
    itg: Tensor


def image_text_similarity(image: Tensor, text: Tensor) -> Tensor:
    """Cosine similarity of each image with each text, [B, B_text] in float32 or finer.

    Args:
        image: [B, dim], or [B, n, dim] of n queries (Q-Former), of which the most similar counts.
        text: [B_text, dim].

    Raises:
        TypeError, ValueError: a tensor that is not of these.

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
    kind = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    with without_autocast(image.device):
        image, text = (F.normalize(t.to(kind), dim=-1) for t in (image, text))
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
    """Image-text contrast: each image finds its text among all texts, each text its image.

        loss = (CE(s / temperature, targets) + CE(s^T / temperature, targets)) / 2

    Args:
        image, text: as in `image_text_similarity`; element i of one belongs to i of the other.
        temperature: positive number, or a tensor of one value that may require grad.
        ids: integers [B]; elements of equal id are positives of each other, and the target spreads
            evenly over them. None: only i and i.
        label_smoothing: share of the target that goes evenly to all, in [0, 1).

    Returns:
        A scalar, 0 for B = 0.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: Radford et al., "CLIP" (2021); Li et al., "BLIP-2" (2023), which smooths by 0.1.
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
    """For each image a similar text that is not its own, and the other way round.

    Args:
        similarity: [B, B] of images (rows) and texts, as `image_text_similarity` gives it.
        ids: integers [B]; elements of equal id are no negatives of each other.
        sample: draw them by softmax(similarity / temperature) of the negatives; False takes the
            most similar, of equals the first.
        temperature: of the draw, a positive number or tensor.
        generator: of the draw, torch's own by default.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: Li et al., "Align before fuse" (2021), and "BLIP-2" (2023), which draw.
    """
    check_bools(sample=sample)
    check_features("similarity", similarity, (2,), "[B, B]")
    same, scaled = positives(similarity, ids), check_temperature(temperature, similarity)
    logits = (similarity / scaled).masked_fill(same, -math.inf)
    options = dict(sample=sample, generator=generator)
    return HardNegatives(most_similar(logits, **options), most_similar(logits.T, **options))


def most_similar(logits: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
    """A column for each row, by its logits; -1 for a row of -inf."""
    if not len(logits):
        return torch.zeros(0, dtype=torch.int64, device=logits.device)
    none = (logits == -math.inf).all(1)
    if sample:
        p = logits.masked_fill(none[:, None], 0.0).softmax(1, dtype=torch.float32)
        found = torch.multinomial(p, 1, generator=generator)[:, 0]
    else:
        found = logits.argmax(1)
    return found.masked_fill(none, -1)


def matching_pairs(negatives: HardNegatives) -> MatchingPairs:
    """The pairs whose ITM logits `itm_loss` takes, of the indices that `hard_negatives` found.

    Raises TypeError: negatives are none of these.
    """
    if not isinstance(negatives, HardNegatives):
        raise TypeError(f"negatives must be HardNegatives, got {kind(negatives)}")
    own = torch.arange(len(negatives.texts), device=negatives.texts.device)
    there = [own >= 0, negatives.texts >= 0, negatives.images >= 0]
    images = torch.cat((own, own, torch.where(there[2], negatives.images, own)))
    texts = torch.cat((own, torch.where(there[1], negatives.texts, own), own))
    match = torch.zeros_like(images)
    match[: len(own)] = 1
    return MatchingPairs(images, texts, match.masked_fill(~torch.cat(there), IGNORED))


def itm_loss(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Image-text matching: cross-entropy of "no match" and "match".

    Args:
        logits: [N, 2], or [N, n, 2] of n queries (Q-Former), whose mean counts.
        labels: int64 [N]: 1 for a match, 0 for none, -100 to leave a pair out.
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
    """Language modelling, which is also image-grounded text generation (ITG): the logits of each
    position predict the token after it.

    Args:
        logits: [B, n_prefix + N, V].
        labels: int64 [B, N], the tokens themselves; `ignore_index` where one does not count.
        n_prefix: positions before the text (visual tokens of a language model), of which the last
            predicts the first token. Without any nothing predicts it.
        ignore_index: label of what is left out.
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
    """ITC, ITM with hard negatives and ITG of one batch, and their sum: BLIP-2's first stage.

    Args:
        image, text, temperature, ids: as in `itc_loss`.
        match: called with the int64 indices [3 B] of images and texts that `matching_pairs` gives;
            returns the ITM logits of these pairs, [3 B, 2] or [3 B, n, 2].
        lm_logits, labels: as in `lm_loss`.
        label_smoothing: of ITC and ITG.
        sample, generator: as in `hard_negatives`.

    Raises:
        TypeError, ValueError: as the losses.

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
    """torch's is 0 / 0 where no label counts."""
    options = dict(ignore_index=ignore_index, label_smoothing=label_smoothing)
    total = F.cross_entropy(logits, labels, reduction="sum", **options)
    return total / (labels != ignore_index).sum().clamp(min=1)


def positives(similarity: Tensor, ids: Tensor | None) -> Tensor:
    """bool [B, B]: which text belongs to which image."""
    B, of_texts = similarity.shape
    if B != of_texts:
        raise ValueError(
            f"there must be one text for each image, similarity [B, B], got {B} images and "
            f"{of_texts} texts"
        )
    own = torch.eye(B, dtype=torch.bool, device=similarity.device)
    if ids is None:
        return own
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex():
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids must be an integer tensor [B], got {got}")
    if tuple(ids.shape) != (B,) or ids.device != similarity.device:
        raise ValueError(
            f"ids must be [B] = [{B}] on {similarity.device}, got {list(ids.shape)} on {ids.device}"
        )
    return own | (ids[:, None] == ids)


def check_features(name: str, t, ranks: tuple[int, ...] | None, dims: str = "") -> None:
    dims = dims or " or ".join({2: "[B, dim]", 3: "[B, n, dim]"}[r] for r in ranks)
    if not isinstance(t, Tensor) or not t.is_floating_point():
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} must be a floating-point tensor {dims}, got {got}")
    if ranks is not None and t.dim() not in ranks:
        raise ValueError(f"{name} must be {dims}, got shape {list(t.shape)}")


def check_labels(labels, shape, logits: Tensor, ignore_index: int = IGNORED) -> None:
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
    if not 0.0 <= check_number("label_smoothing", label_smoothing, "a number in [0, 1)") < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")


def check_temperature(temperature: float | Tensor, similarity: Tensor) -> float | Tensor:
    """The values of a tensor are not looked at: that would wait for the device."""
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
