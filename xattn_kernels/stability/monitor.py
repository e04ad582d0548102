"""`StabilityMonitor`: statistics of cross-attention in training, measured every so many steps."""

from __future__ import annotations

import logging
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from ..core.arguments import (
    check_counts,
    check_function,
    check_module,
    check_rule,
    check_sizes,
    kind,
)
from .host_copies import HostCopies
from .measures import AttentionLook, gradient_norms, without_rows
from .parameters import Match, xattn_parameters
from .report import StabilityReport, Thresholds

LOGGER = logging.getLogger("xattn_kernels.stability")


class StabilityMonitor:
    """Watches the cross-attention of a model in training, without a matrix of weights.

        monitor = StabilityMonitor(model, every=100)
        for batch in loader:
            loss = model(batch)
            loss.backward()  # with a GradScaler, scaler.unscale_(optimizer) after it
            monitor.step(loss)  # before gradients are clipped
            ...

    At step 0 and every `every` steps it measures, for each layer that attends (recognised by its
    calls of the package's ops), the mean entropy, the mean and the largest of the rows' largest
    probabilities, the largest score, the feature norms of both sides and their ratio; the gates;
    the norms of all gradients and of those of cross-attention; and whether loss, gradients and
    trained parameters are finite. Loss and gradients are checked every `nan_every` steps as well.

    The training itself does not change: entropy comes from a separate pass, without gradients and
    values. Between these steps the model has no hooks. Nothing waits for the device: the results of
    a GPU are read with a later step, when they have arrived. Calls of a layer without gradients
    (validation) do not count. A compiled model shows its gates, gradients and loss only.

    Attributes:
        history: {name: deque of (step, value)}, the last 1,000 of each.
        last: the last `StabilityReport`, or None.

    Args:
        model: any module, with ops or modules of this package in it.
        every: the number of steps from one look to the next.
        nan_every: the number of steps from one check of loss and gradients to the next; None checks
            them with each look only.
        thresholds: the limits of the values, beyond which there are warnings.
        callbacks: functions that are called with every `StabilityReport`, such as writers.
        logger: receives the warnings, and the values at level INFO. None: the logger
            "xattn_kernels.stability".
        layers: (name, module) -> whether a layer counts. None: all layers count whose queries and
            keys do not come from one argument.
        match: (name, parameter) -> whether it is one of cross-attention, see `xattn_parameters`.
        first_step: the number of the first step, where a training is continued.

    Raises:
        TypeError, ValueError: an argument is not among those named here.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 100,
        nan_every: int | None = 10,
        thresholds: Thresholds | None = None,
        callbacks: Iterable[Callable[[StabilityReport], None]] = (),
        logger: logging.Logger | None = None,
        layers: Callable[[str, nn.Module], bool] | None = None,
        match: Match | None = None,
        first_step: int = 0,
    ) -> None:
        check_model(model, layers, match)
        check_sizes(every=every, nan_every=every if nan_every is None else nan_every)
        check_counts(first_step=first_step)
        self.callbacks = check_receivers(thresholds, callbacks, logger)
        self.model, self.every, self.nan_every = model, every, nan_every
        self.thresholds = thresholds or Thresholds()
        self.logger, self.match = logger or LOGGER, match
        self.history: dict[str, deque] = defaultdict(lambda: deque(maxlen=1000))
        self.last: StabilityReport | None = None
        self.steps, self.pending = first_step, deque()
        self.xattn_ids: set[int] | None = None  # of the parameters of cross-attention
        self.attention = AttentionLook(model, layers)
        self._hook()

    def step(self, loss: Tensor | None = None) -> StabilityReport | None:
        """The report of this step if its numbers have arrived already, else None; call it after
        each backward.

        It counts the step, measures if the step is one to look at, and passes on the reports of
        earlier steps whose numbers have arrived.

        Args:
            loss: the loss of this step, a tensor of one value, which is checked to be finite.

        Raises:
            TypeError: loss is no such tensor.
        """
        check_loss(loss)
        now, self.steps = self.steps, self.steps + 1
        looks = now % self.every == 0
        if looks or self.nan_every is not None and now % self.nan_every == 0:
            self.pending.append(self._look(now, loss, whole=looks))
        if looks:
            self.attention.stop()
        self._hook()
        self.flush(wait=False)
        return self.last if self.last is not None and self.last.step == now else None

    def flush(self, *, wait: bool = True) -> None:
        """Passes on the reports whose numbers have arrived, and with `wait` all others too."""
        while self.pending and (wait or self.pending[0].arrived()):
            self.last = self._report(self.pending.popleft())
            log(self.logger, self.last, self.model)
            for callback in self.callbacks:
                callback(self.last)

    def close(self) -> None:
        """Flushes, and removes the hooks from the model."""
        self.flush()
        self.attention.stop()

    def __enter__(self) -> StabilityMonitor:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _hook(self) -> None:
        if self.steps % self.every == 0:
            self.attention.start()

    def _look(self, step: int, loss: Tensor | None, whole: bool) -> HostCopies:
        """All numbers of one step, on their way to the host."""
        tensors: dict[str, Tensor] = {} if loss is None else {"loss": loss.detach().reshape(())}
        if whole or self.xattn_ids is None:
            self.xattn_ids = {id(p) for p in xattn_parameters(self.model, self.match).values()}
        tensors |= gradient_norms(self.model, self.xattn_ids)
        return HostCopies(step, *self.attention.values(tensors) if whole else (tensors, {}))

    def _report(self, copies: HostCopies) -> StabilityReport:
        values = without_rows(copies.values(), copies.most_keys)
        for name, value in values.items():
            self.history[name].append((copies.step, value))
        warnings = self.thresholds.warnings(copies.step, values, copies.most_keys)
        return StabilityReport(copies.step, values, warnings)


def check_model(model, layers, match) -> None:
    check_module("model", model)
    check_rule("layers", layers)
    check_rule("match", match)


def check_receivers(thresholds, callbacks, logger) -> tuple[Callable, ...]:
    """The callbacks as a tuple; raises TypeError if one of the three is of a wrong type."""
    if thresholds is not None and not isinstance(thresholds, Thresholds):
        raise TypeError(f"thresholds must be Thresholds, got {kind(thresholds)}")
    if logger is not None and not isinstance(logger, (logging.Logger, logging.LoggerAdapter)):
        raise TypeError(f"logger must be a logging.Logger or None, got {kind(logger)}")
    if not isinstance(callbacks, Iterable):
        raise TypeError(f"callbacks must be a list of functions, got {kind(callbacks)}")
    callbacks = tuple(callbacks)
    for i, callback in enumerate(callbacks):
        check_function(f"callbacks[{i}]", callback, "a function of a report")
    return callbacks


def check_loss(loss: Tensor | None) -> None:
    if loss is not None and (not isinstance(loss, Tensor) or loss.numel() != 1):
        got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss must be a tensor of one value or None, got {got}")


def log(logger: logging.Logger, report: StabilityReport, model: nn.Module) -> None:
    """Logs the values and warnings of a report, and which gradients are not finite."""
    text = ", ".join(f"{name} {value:.4g}" for name, value in report.values.items())
    logger.info("step %d: %s", report.step, text)
    for warning in report.warnings:
        worst = warning.statistic in ("gradient_norm", "finite")
        level = logging.ERROR if worst else logging.WARNING
        logger.log(level, "step %d: %s", report.step, warning.message)
    if not math.isfinite(report.values.get("grad_norm/total", 0.0)):
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        names = [n for n, g in grads.items() if not g.isfinite().all()]
        logger.error("step %d: gradients not finite now: %s", report.step, names[:10])
