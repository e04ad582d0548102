"""What a look of the monitor found, and what of it is beyond its limits."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

from ..core.arguments import check_number


class StabilityWarning(NamedTuple):
    """A value beyond its limit: of `layer` (a module's name, or "" for the model), and which of
    `Thresholds` it passed ("finite" for NaN and infinity)."""

    step: int
    layer: str
    statistic: str
    value: float
    limit: float
    message: str


class StabilityReport(NamedTuple):
    """`values` by name: attention/<layer>/{rows, entropy, max_probability, peak_probability,
    max_score}, features/<layer>/{query_norm, key_norm, scale_ratio}, gates/<parameter> (|tanh|,
    the mean of a vector), grad_norm/{total, cross_attention}, parameter_norm, loss."""

    step: int
    values: dict[str, float]
    warnings: list[StabilityWarning]


@dataclass(frozen=True)
class Thresholds:
    """Beyond which values there are warnings; None: never.

    entropy: least mean entropy of a layer, in nats; of layers that could have more (log Nk).
    max_probability: most of the mean over rows of a row's largest probability.
    peak_probability: most of the largest probability of all rows. One sharp row of thousands is
        nothing unusual, so there is no default.
    max_score: largest score before the softmax.
    gradient_norm: of all gradients.
    scale_ratio: (least, most) of key norm by query norm.
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
        """Of the values of one step; `most_keys` is how many keys a row of each layer may have."""
        found = []
        for name, value in values.items():
            layer, statistic = place_of(name)
            message = self._message(statistic, value, most_keys.get(layer, 0))
            if message is None:
                continue
            limit, text = message
            statistic = statistic if math.isfinite(value) else "finite"
            text = f"{layer}: {text}" if layer else text
            found.append(StabilityWarning(step, layer, statistic, value, limit, text))
        return found

    def _message(self, statistic: str, value: float, keys: int) -> tuple[float, str] | None:
        """(the limit that `value` is beyond, in words), or None."""
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
        # one key has all the probability there is
        if value > limit and not (keys == 1 and statistic.endswith("probability")):
            return limit, f"{WORDS[statistic]} {value:.4g} > {limit}"
        return None


WORDS = {
    "max_probability": "attention collapses, mean largest probability",
    "peak_probability": "attention is sharp, largest probability",
    "max_score": "attention scores explode,",
    "gradient_norm": "gradients explode, their norm is",
}
OF_MODEL = {"grad_norm/total": "gradient_norm", "grad_norm/cross_attention": "xattn_gradient_norm"}


def place_of(name: str) -> tuple[str, str]:
    """(layer, statistic) of a value's name; a gate is a statistic of the model."""
    kind, _, rest = name.partition("/")
    if kind in ("attention", "features"):
        layer, _, statistic = rest.rpartition("/")
        return layer, statistic
    return "", OF_MODEL.get(name, name)
