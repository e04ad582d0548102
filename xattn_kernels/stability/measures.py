"""Measurements of the monitor, as tensors on the device for which nothing here waits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ..core.call import TopKAttentionCall
from .layers import (
    ObservedCall,
    Watch,
    counts,
    sides,
)
from .parameters import gate_parameters
from .row_statistics import row_statistics

EMPTY = -math.inf  # the lse of a row without keys


@dataclass
class LayerSums:
    """Sums and maxima over the calls of a layer in one step, as tensors on its device."""

    most_keys: int
    sums: Tensor  # the number of rows with a key, their entropies, their largest probabilities
    peaks: Tensor  # the largest probability, the largest score
    norms: list[Tensor | None]  # the mean lengths of the features of queries and of keys

    def add(self, other: LayerSums) -> LayerSums:
        """The sums of both, with the norms of `other` where this has none."""
        norms = [b if a is None else a for a, b in zip(self.norms, other.norms, strict=True)]
        return LayerSums(
            max(self.most_keys, other.most_keys),
            self.sums + other.sums,
            torch.maximum(self.peaks, other.peaks),
            norms,
        )


class AttentionLook:
    """The sums of every layer that attends between `start` and `stop`."""

    def __init__(self, model: nn.Module, layers: Callable[[str, nn.Module], bool] | None) -> None:
        self.model, self.layers = model, layers
        self.seen: dict[str, LayerSums] = {}
        self.watch = Watch(model, self._on_call)

    def start(self) -> None:
        self.seen = {}
        self.watch.start()

    def stop(self) -> None:
        self.watch.stop()

    def values(self, measured: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """(`measured` and the values of the model and of its layers, the most keys by layer)."""
        values = measured | model_values(self.model)
        for name, layer in self.seen.items():
            values |= layer_values(name, layer)
        return values, {name: layer.most_keys for name, layer in self.seen.items()}

    def _on_call(self, call: ObservedCall) -> None:
        if not torch.is_grad_enabled() or not call.inputs.q.numel() or not call.inputs.Nk:
            return
        if counts(call, self.layers):
            new, old = layer_sums(call), self.seen.get(call.name)
            self.seen[call.name] = new if old is None else old.add(new)


@torch.no_grad()
def model_values(model: nn.Module) -> dict[str, Tensor]:
    """The norm of the trainable parameters, and the mean |tanh| of each gate."""
    parameters = [p.detach() for p in model.parameters() if p.requires_grad]
    gates = gate_parameters(model).items()
    values = {"parameter_norm": total_norm(parameters)} if parameters else {}
    return values | {f"gates/{name}": gate.float().tanh().abs().mean() for name, gate in gates}


@torch.no_grad()
def layer_sums(call: ObservedCall) -> LayerSums:
    """The sums of one call."""
    x = call.inputs
    s = row_statistics(x, call.backend)
    has_keys = s.lse != EMPTY
    score = torch.where(has_keys, s.lse + s.max_probability.log(), EMPTY)
    sums = torch.stack([has_keys.sum().to(s.lse.dtype), s.entropy.sum(), s.max_probability.sum()])
    most_keys = x.Nk
    if isinstance(x, TopKAttentionCall):
        most_keys = min(most_keys, x.top_k or math.prod(x.topk_blocks))
    norms = [None if t is None else feature_norm(t) for t in sides(call)]
    return LayerSums(most_keys, sums, torch.stack([s.max_probability.max(), score.max()]), norms)


def feature_norm(t: Tensor) -> Tensor:
    """The mean length of the features [..., dim]."""
    return t.detach().float().norm(dim=-1).mean()


def layer_values(name: str, layer: LayerSums) -> dict[str, Tensor]:
    """The values of a layer by name; NaN or -inf where no row has a key, see `without_rows`."""
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
    """The values without those of attention in layers where no row had a key."""
    empty = tuple(f"attention/{n}/" for n in layers if values[f"attention/{n}/rows"] == 0)
    return {name: value for name, value in values.items() if not name.startswith(empty)}


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The norm of all tensors together, also where they are sharded over processes."""
    norm = get_total_norm(tensors)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


@torch.no_grad()
def gradient_norms(model: nn.Module, xattn_ids: set[int]) -> dict[str, Tensor]:
    """The norms of all gradients and of those of cross-attention, whose parameters have these ids;
    {} where there are no gradients."""
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for p in model.parameters():
        if p.grad is not None:
            parts[id(p) in xattn_ids].append(p.grad)
    norms = {in_xattn: total_norm(grads) for in_xattn, grads in parts.items() if grads}
    if not norms:
        return {}
    total = {"grad_norm/total": total_norm(list(norms.values()))}
    return total | ({"grad_norm/cross_attention": norms[True]} if True in norms else {})
