"""What the monitor measures: tensors on the device, which nothing here waits for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ..core.call import TopKAttentionInputs
from .layers import (
    Call,
    Watch,
    counts,
    sides,
)
from .parameters import gate_parameters
from .row_statistics import row_statistics

EMPTY = -math.inf


@dataclass
class LayerSums:
    """Of the calls of a layer in one step: tensors on its device, not yet looked at."""

    most_keys: int
    sums: Tensor  # rows with a key, their entropies, their largest probabilities
    peaks: Tensor  # largest probability, largest score
    norms: list[Tensor | None]  # of queries' and keys' side

    def add(self, other: LayerSums) -> LayerSums:
        norms = [b if a is None else a for a, b in zip(self.norms, other.norms, strict=True)]
        return LayerSums(
            max(self.most_keys, other.most_keys),
            self.sums + other.sums,
            torch.maximum(self.peaks, other.peaks),
            norms,
        )


class AttentionLook:
    """The sums of every layer that attends, between `start` and `stop`."""

    def __init__(self, model: nn.Module, layers: Callable[[str, nn.Module], bool] | None) -> None:
        self.model, self.layers = model, layers
        self.seen: dict[str, LayerSums] = {}
        self.watch = Watch(model, self._told)

    def start(self) -> None:
        self.seen = {}
        self.watch.start()

    def stop(self) -> None:
        self.watch.stop()

    def values(self, found: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """(what was found already, of the model and of its layers, most keys by layer)."""
        found = found | model_values(self.model)
        for name, layer in self.seen.items():
            found |= layer_values(name, layer)
        return found, {name: layer.most_keys for name, layer in self.seen.items()}

    def _told(self, call: Call) -> None:
        if not torch.is_grad_enabled() or not call.inputs.q.numel() or not call.inputs.Nk:
            return
        if counts(call, self.layers):
            new, old = layer_sums(call), self.seen.get(call.name)
            self.seen[call.name] = new if old is None else old.add(new)


@torch.no_grad()
def model_values(model: nn.Module) -> dict[str, Tensor]:
    """The norm of what trains, and the gates."""
    parameters = [p.detach() for p in model.parameters() if p.requires_grad]
    gates = gate_parameters(model).items()
    found = {"parameter_norm": total_norm(parameters)} if parameters else {}
    return found | {f"gates/{name}": gate.float().tanh().abs().mean() for name, gate in gates}


@torch.no_grad()
def layer_sums(call: Call) -> LayerSums:
    x = call.inputs
    s = row_statistics(x, call.backend)
    there = s.lse != EMPTY
    score = torch.where(there, s.lse + s.max_probability.log(), EMPTY)
    sums = torch.stack([there.sum().to(s.lse.dtype), s.entropy.sum(), s.max_probability.sum()])
    most = x.Nk
    if isinstance(x, TopKAttentionInputs):
        most = min(most, x.top_k or math.prod(x.topk_blocks))
    norms = [None if t is None else feature_norm(t) for t in sides(call)]
    return LayerSums(most, sums, torch.stack([s.max_probability.max(), score.max()]), norms)


def feature_norm(t: Tensor) -> Tensor:
    """The mean length of the features [..., dim]."""
    return t.detach().float().norm(dim=-1).mean()


def layer_values(name: str, layer: LayerSums) -> dict[str, Tensor]:
    """Without any row that has a key, `without_rows` takes the first four away again."""
    n, entropy, max_probability = layer.sums.unbind()
    values = {
        f"attention/{name}/rows": n,
        f"attention/{name}/entropy": entropy / n,
        f"attention/{name}/max_probability": max_probability / n,
        f"attention/{name}/peak_probability": layer.peaks[0],
        f"attention/{name}/max_score": layer.peaks[1],
    }
    queries, keys = layer.norms
    if queries is not None and keys is not None:
        values[f"features/{name}/query_norm"] = queries
        values[f"features/{name}/key_norm"] = keys
        values[f"features/{name}/scale_ratio"] = keys / (queries + 1e-8)
    return values


def without_rows(values: dict[str, float], layers: Iterable[str]) -> dict[str, float]:
    """The values but those of attention in layers of which no row had a key."""
    empty = tuple(f"attention/{n}/" for n in layers if values[f"attention/{n}/rows"] == 0)
    return {name: value for name, value in values.items() if not name.startswith(empty)}


def total_norm(tensors: list[Tensor]) -> Tensor:
    norm = get_total_norm(tensors)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


@torch.no_grad()
def gradient_norms(model: nn.Module, ours: set[int]) -> dict[str, Tensor]:
    """Of all gradients, and of those of cross-attention (`ours`: id); {} where there are none."""
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for p in model.parameters():
        if p.grad is not None:
            parts[id(p) in ours].append(p.grad)
    norms = {of_ours: total_norm(grads) for of_ours, grads in parts.items() if grads}
    if not norms:
        return {}
    found = {"grad_norm/total": total_norm(list(norms.values()))}
    return found | ({"grad_norm/cross_attention": norms[True]} if True in norms else {})
