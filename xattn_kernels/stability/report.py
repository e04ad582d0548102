"""Reports of the monitor: the values of one step, and warnings of those beyond their limits."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

from ..core.arguments import check_number


class StabilityWarning(NamedTuple):
    """A value beyond its limit. `layer` is a module's name, or "" for the model; `statistic` is the
    field of `Thresholds` whose limit was passed, or "finite" for NaN and infinity."""

    step: int
    layer: str
    statistic: str
    value: float
    limit: float
    message: str


class StabilityReport(NamedTuple):
    """The values of one step and the warnings about them.

    The names of values are attention/<layer>/{rows, entropy, max_probability, peak_probability,
    max_score}, features/<layer>/{query_norm, key_norm, scale_ratio}, gates/<parameter> (the mean
    of |tanh|), grad_norm/{total, cross_attention}, parameter_norm and loss.
    """

    step: int
    values: dict[str, float]
    warnings: list[StabilityWarning]


@dataclass(frozen=True)
class Thresholds:
    """The limits of values, beyond which there are warnings; None never warns.

    entropy: the least mean entropy of a layer, in nats, for layers whose entropy can exceed it
        (log Nk).
    max_probability: the most that the mean over rows of a row's largest probability may be.
    peak_probability: the most that the largest probability of all rows may be. One sharp row among
        thousands is not unusual, so the default is None.
    max_score: the largest score before the softmax.
    gradient_norm: the largest norm of all gradients.
    scale_ratio: (least, most) of the key norm over the query norm.
    """

    entropy: float | None = 0.5
    max_probability: float | None = 0.99
    peak_probability: float | None = None
    max_score: float | None = 100.0
    gradient_norm: float | None = 100.0
    scale_ratio: tuple[float, float] | None = (0.1, 10.0)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and field.name != "scale_ratio":
                check_number(field.name, value, "a number or None")
        ratio = self.scale_ratio
        if ratio is not None:
            pair = isinstance(ratio, (tuple, list)) and len(ratio) == 2
            numbers = pair and all(isinstance(r, (int, float)) for r in ratio)
            if not numbers or not 0 <= ratio[0] < ratio[1]:
                raise ValueError(f"scale_ratio must be (least, most) or None, got {ratio!r}")

    def warnings(
        self, step: int, values: dict[str, float], most_keys: dict[str, int]
    ) -> list[StabilityWarning]:
        """The warnings of one step; `most_keys` is how many keys a row of each layer may have."""
        warnings = []
        for name, value in values.items():
            layer, statistic = place_of(name)
            message = self._message(statistic, value, most_keys.get(layer, 0))
            if message is None:
                continue
            limit, text = message
            statistic = statistic if math.isfinite(value) else "finite"
            text = f"{layer}: {text}" if layer else text
            warnings.append(StabilityWarning(step, layer, statistic, value, limit, text))
        return warnings

    def _message(self, statistic: str, value: float, keys: int) -> tuple[float, str] | None:
        """(the limit that `value` is beyond, a sentence), or None where it is within."""
        if not math.isfinite(value):
            return math.inf, f"{statistic} is {value}"
        limit = getattr(self, statistic, None)
        if limit is None:
            return None
        if statistic == "scale_ratio":
            outside = value < limit[0], value > limit[1]
            beyond = [n for n, out in zip(limit, outside, strict=True) if out]
            text = f"keys' features are {value:.3g} times as long as queries'"
            return (beyond[0], f"{text}, allowed {limit[0]} to {limit[1]}") if beyond else None
        if statistic == "entropy":
            low = value < limit < math.log(max(keys, 1))
            return (limit, f"attention collapses, entropy {value:.3g} < {limit}") if low else None
        # a single key always has probability 1
        if value > limit and not (keys == 1 and statistic.endswith("probability")):
            return limit, f"{WORDS[statistic]} {value:.4g} > {limit}"
        return None


WORDS = {
    "max_probability": "attention collapses, mean largest probability",
    "peak_probability": "attention is sharp, largest probability",
    "max_score": "attention scores explode,",
    "gradient_norm": "gradients explode, their norm is",
}
MODEL_STATISTICS = {
    "grad_norm/total": "gradient_norm",
    "grad_norm/cross_attention": "xattn_gradient_norm",
}


def place_of(name: str) -> tuple[str, str]:
    """(layer, statistic) of a value's name; a gate is a statistic of the model."""
    prefix, _, rest = name.partition("/")
    if prefix in ("attention", "features"):
        layer, _, statistic = rest.rpartition("/")
        return layer, statistic
    return "", MODEL_STATISTICS.get(name, name)
