"""Training of whole systems: mixtures of data sets, BLIP-2's two stages, and a test of whether a
model uses its images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.arguments import (
    check_bools,
    check_function,
    check_mapping,
    check_module,
    check_number,
    check_several,
    kind,
)
from .parameters import Frozen, freeze

VISION_NAMES = (
    "pixel_values", "image", "images", "media", "vision", "vision_x", "visual_features",
    "vision_features", "image_features", "image_embeds",
)  # fmt: skip


class DatasetMixture:
    """Mixes data sets: every update takes a batch of each, and their gradients add up with weights.

        g = sum_d weight_d grad loss_d

    Each loss is differentiated before the next is computed, so that only one graph at a time is in
    memory. A data set that ends starts again, independently of the others.

    Args:
        loaders: {name: iterable of batches}, each of which can be iterated again.
        weights: {name: positive number}, with the same names.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: Alayrac et al., "Flamingo" (2022), section 2.4.
    """

    def __init__(self, loaders: Mapping[str, Iterable], weights: Mapping[str, float]) -> None:
        check_mapping("loaders", loaders, "iterables by name")
        check_mapping("weights", weights, "numbers by name")
        if not loaders or set(loaders) != set(weights):
            raise ValueError(
                f"weights must have the names of loaders, {list(loaders)}, got {list(weights)}"
            )
        for name, loader in loaders.items():
            if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
                raise TypeError(f"loaders[{name!r}] must be an iterable, got {kind(loader)}")
        for name, weight in weights.items():
            if not 0.0 < check_number(f"weights[{name!r}]", weight, "a number") < math.inf:
                raise ValueError(f"weights[{name!r}] must be a positive number, got {weight}")
        self.loaders, self.weights = dict(loaders), dict(weights)
        self.running: dict[str, Iterator] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """{name: batch} without end; a second iteration continues where the first stopped."""
        while True:
            yield {name: self._next(name) for name in self.loaders}

    def _next(self, name: str) -> Any:
        for _ in range(2):
            if name not in self.running:
                self.running[name] = iter(self.loaders[name])
            try:
                return next(self.running[name])
            except StopIteration:
                del self.running[name]
        raise ValueError(f"loaders[{name!r}] must have a batch, and be iterable again")

    def backward(
        self,
        batches: Mapping[str, Any],
        loss_of: Callable[[str, Any], Tensor],
        *,
        model: nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> dict[str, Tensor]:
        """Adds weight * gradient of every loss to the parameters' gradients.

        Args:
            batches: one element of an iteration over this object.
            loss_of: (name, batch) -> the loss of that batch, a scalar.
            model: a `DistributedDataParallel`, which then exchanges gradients once.
            scaler: the scaler of the losses, for float16.

        Returns:
            {name: loss}, detached and without their weights.

        Raises:
            TypeError, ValueError: a loss is no scalar, or batches are not of these data sets.
        """
        if set(batches) != set(self.loaders):
            raise ValueError(
                f"batches must be of {list(self.loaders)}, got those of {list(batches)}"
            )
        losses, last = {}, list(batches)[-1]
        for name, batch in batches.items():
            waits = name != last and hasattr(model, "no_sync")
            with model.no_sync() if waits else nullcontext():
                loss = loss_of(name, batch)
                if not isinstance(loss, Tensor) or loss.numel() != 1:
                    raise TypeError(f"loss_of({name!r}, ...) must be a tensor of one value")
                weighted = self.weights[name] * loss
                (weighted if scaler is None else scaler.scale(weighted)).backward()
            losses[name] = loss.detach()
        return losses


class Stage(NamedTuple):
    """A stage of a training: the frozen modules, the trained ones, the latter's parameters by name,
    and whether each of these required grad before."""

    frozen: tuple[Frozen, ...]
    trained: tuple[nn.Module, ...]
    trainable: dict[str, nn.Parameter]
    required: dict[str, bool]

    def train(self) -> None:
        """Sets trained modules to training mode and frozen ones to evaluation mode."""
        for part in (*self.frozen, *self.trained):
            part.train()

    def undo(self) -> None:
        """Restores which parameters require grad, and the modes of the frozen modules."""
        for name, p in self.trainable.items():
            p.requires_grad_(self.required[name])
        for part in reversed(self.frozen):
            part.undo()


def alignment_stage(*, vision_encoder: nn.Module, qformer: nn.Module) -> Stage:
    """BLIP-2's first stage: the Q-Former learns from frozen images, by `stage_one_losses`.

    The caller trains the heads (the projections of ITC and ITM) that are not in `qformer`.

    Raises TypeError: an argument is no module.

    Source: Li et al., "BLIP-2" (2023), section 3.2; 250k steps there.
    """
    return stage({"vision_encoder": vision_encoder}, {"qformer": qformer})


def generation_stage(
    *,
    vision_encoder: nn.Module,
    qformer: nn.Module,
    projection: nn.Module,
    language_model: nn.Module,
    train_qformer: bool = False,
) -> Stage:
    """BLIP-2's second stage: a projection of the Q-Former into a frozen language model learns by
    `lm_loss(..., n_prefix=number of queries)`.

    Args:
        vision_encoder, language_model: frozen.
        qformer: trained or frozen, see train_qformer.
        projection: trained.
        train_qformer: whether the Q-Former learns too, as in the published code.

    Raises TypeError: an argument is no module, or train_qformer no bool.

    Source: Li et al., "BLIP-2" (2023), section 3.3; 80k steps there.
    """
    check_bools(train_qformer=train_qformer)
    frozen = {"vision_encoder": vision_encoder, "language_model": language_model}
    trained = {"projection": projection}
    (trained if train_qformer else frozen)["qformer"] = qformer
    return stage(frozen, trained)


def stage(frozen: dict[str, nn.Module], trained: dict[str, nn.Module]) -> Stage:
    """Freezes modules and makes others trainable; a parameter of both trains."""
    for name, module in (frozen | trained).items():
        check_module(name, module)
    trainable = {f"{n}.{k}": p for n, m in trained.items() for k, p in m.named_parameters()}
    required = {name: p.requires_grad for name, p in trainable.items()}
    frozen_modules = tuple(freeze(m) for m in frozen.values())
    for p in trainable.values():
        p.requires_grad_(True)
    return Stage(frozen_modules, tuple(trained.values()), trainable, required)


class BlindBaseline(NamedTuple):
    """The losses with and without images; `gap` is blind_loss - loss, and `ignored` tells whether
    it is below the threshold."""

    loss: float
    blind_loss: float
    gap: float
    ignored: bool


@torch.no_grad()
def blind_baseline(
    model: Callable[..., Any],
    batch: Mapping[str, Any],
    *,
    vision: str | Sequence[str] | None = None,
    blank: float | str | Callable[[Tensor], Tensor] = 0.0,
    threshold: float = 0.1,
) -> BlindBaseline:
    """The losses of a model on a batch with its images and without, which tell if it uses them.

    Args:
        model: `model(**batch)` returns the loss, or an object or mapping with a `loss`. A module is
            set to evaluation mode for both, and back to its modes afterwards.
        batch: the keyword arguments of the model.
        vision: the names of the images among them; None: all usual names that the batch has.
        blank: the replacement of the images: a number (0 is the mean image where pixels are
            normalised), "other" for the image of the next element of the batch, which looks like
            an image, or a function of the tensor.
        threshold: the images count as ignored if the two losses differ by less.

    Raises:
        TypeError, ValueError: an argument is not among those named here.
    """
    check_function("model", model)
    check_mapping("batch", batch, "arguments by name")
    names = [vision] if isinstance(vision, str) else vision
    if names is not None:
        names = check_several("vision", names, str, "a name")
    names = [n for n in VISION_NAMES if n in batch] if names is None else names
    missing = [n for n in names if not isinstance(batch.get(n), Tensor)]
    if not names or missing:
        raise ValueError(
            f"vision must name tensors of the batch, {list(batch)}, got {missing or 'none known'}"
        )
    if not 0.0 <= check_number("threshold", threshold, "a number"):
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    blind = {**batch, **{n: blanked(batch[n], blank) for n in names}}
    modes = [(m, m.training) for m in model.modules()] if isinstance(model, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        loss, blind_loss = (loss_in(model(**b)) for b in (batch, blind))
    finally:
        for module, mode in modes:
            module.training = mode
    gap = blind_loss - loss
    return BlindBaseline(loss, blind_loss, gap, abs(gap) < threshold)


def blanked(images: Tensor, blank) -> Tensor:
    """What replaces the images, of their shape; see `blind_baseline`."""
    if callable(blank):
        return blank(images)
    if blank == "other":
        if len(images) < 2:
            raise ValueError(f"blank='other' needs a batch of at least 2, got {len(images)}")
        return images.roll(1, 0)
    return torch.full_like(images, check_number("blank", blank, "a number, 'other' or a function"))


def loss_in(result) -> float:
    """The loss in what a model returned; raises TypeError if it is no tensor of one value."""
    loss = result["loss"] if isinstance(result, Mapping) else getattr(result, "loss", result)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(f"model must give a loss of one value, got {type(loss).__name__}")
    return loss.item()
