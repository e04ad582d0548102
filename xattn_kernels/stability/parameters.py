"""Which parameters are those of cross-attention, gates or norms; optimiser groups; freezing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import nn

from ..core.arguments import (
    check_mapping,
    check_module,
    check_number,
    check_rule,
    kind,
)

# Classes and attributes of this package, PyTorch (`multihead_attn` of its decoder layers),
# OpenCLIP, OpenFlamingo, VisualGPT, and transformers' Mllama, Idefics, BLIP-2, BERT and
# encoder-decoders.
CLASSES = re.compile("CrossAttention|QFormer|Perceiver|Resampler|AttentionPool|SRAU")
NAMES = re.compile(
    "cross_?att|xatt|encoder_attn|enc_dec_attn|EncDecAttention|multihead_attn|attn_pool|fc_alpha"
)
GATES = re.compile(r"(^|_)gate($|_)|^alpha_(cross_attn|dense)$")
Match = Callable[[str, nn.Parameter], bool]


def xattn_parameters(model: nn.Module, match: Match | None = None) -> dict[str, nn.Parameter]:
    """The parameters of cross-attention by name, in the order of `model.named_parameters()`.

    These are the parameters in modules of a class that is called `...CrossAttention...`,
    `...QFormer...`, `...Perceiver...`, `...Resampler...`, `...AttentionPool...` or `SRAU`, those
    with `cross_attn`, `crossattention`, `xattn`, `encoder_attn`, `enc_dec_attn`, `EncDecAttention`,
    `multihead_attn` (torch's decoder layer), `attn_pool` or `fc_alpha` in their name, and
    `gate_parameters`. A plain `MultiheadAttention` is none, unless its name says so: it may be
    self-attention; nor is the `gate_proj` of a feed-forward.

    Args:
        match: (name, parameter) -> whether it is one, in place of this rule.

    Raises:
        TypeError: model is no module, or match no function.
    """
    check_module("model", model)
    check_rule("match", match)
    if match is None:
        inside = [n for n, m in model.named_modules() if CLASSES.search(type(m).__name__)]
        prefixes, gates = tuple(f"{n}." if n else "" for n in inside), gate_parameters(model)
        match = lambda n, p: n.startswith(prefixes) or n in gates or bool(NAMES.search(n))  # noqa: E731
    return {name: p for name, p in model.named_parameters() if match(name, p)}


def gate_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The tanh gates by name: parameters of one number or one per channel that are called `gate`,
    `attn_gate`, `ff_gate`, `gate_...`, or as in Idefics `alpha_cross_attn` and `alpha_dense`."""
    check_module("model", model)
    return {
        name: p
        for name, p in model.named_parameters()
        if GATES.search(name.rpartition(".")[2]) and max(p.shape, default=1) == p.numel()
    }


def decays(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay is for: no gates, norms, biases, temperatures."""
    norms = {
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__
        for own, _ in module.named_parameters(recurse=False)
    }
    plain = {n for n, p in model.named_parameters() if p.dim() > 1 and n not in norms}
    return {n for n in plain if "bias" not in n.rpartition(".")[2]} - gate_parameters(model).keys()


def optimizer_groups(
    model: nn.Module,
    *,
    lr: float = 1e-5,
    xattn_lr: float = 1e-4,
    weight_decay: float = 0.05,
    rates: Mapping[str, float] | None = None,
    match: Match | None = None,
) -> list[dict]:
    """Parameter groups for any of torch's optimisers: a higher rate for the new layers, weight
    decay for matrices only.

    Args:
        model: its parameters that require grad are taken, each once.
        lr: rate of what was trained before.
        xattn_lr: rate of `xattn_parameters(model, match)`.
        weight_decay: of all but gates, norms, biases and other parameters of fewer than two
            dimensions, which have 0.
        rates: {regular expression: rate}; the first that is found in a parameter's name counts,
            before lr and xattn_lr.
        match: see `xattn_parameters`.

    Returns:
        Groups {"params", "name", "lr", "weight_decay"}, none of them empty; the name is
        "cross_attention", "other" or the expression, with "/no_decay" where there is no decay.

    Raises:
        TypeError, ValueError: an argument is not among those named here, or nothing is trainable.
    """
    rates = check_rates(rates)
    for name, rate in {
        "lr": lr,
        "xattn_lr": xattn_lr,
        "weight_decay": weight_decay,
        **rates,
    }.items():
        if not 0.0 <= check_number(name, rate, "a number") < float("inf"):
            raise ValueError(f"{name} must be at least 0 and finite, got {rate}")
    new, matrices, groups = xattn_parameters(model, match), decays(model), {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        kind = next((r for r in rates if re.search(r, name)), None)
        kind = kind or ("cross_attention" if name in new else "other")
        rate = rates.get(kind, xattn_lr if kind == "cross_attention" else lr)
        decay = weight_decay if name in matrices else 0.0
        kind += "" if name in matrices else "/no_decay"
        empty = dict(params=[], name=kind, lr=rate, weight_decay=decay)
        groups.setdefault(kind, empty)["params"].append(p)
    if not groups:
        raise ValueError("model must have a parameter that requires grad")
    return list(groups.values())


def check_rates(rates: Mapping[str, float] | None) -> dict[str, float]:
    if rates is None:
        return {}
    check_mapping("rates", rates, "regular expressions to rates")
    for expression in rates:
        if not isinstance(expression, str):
            raise TypeError(f"rates must be by regular expressions, got {kind(expression)}")
        try:
            re.compile(expression)
        except re.error as error:
            text = f"rates must be by regular expressions, got {expression!r}: {error}"
            raise ValueError(text) from error
    return dict(rates)


class Frozen:
    """What `freeze` did, and how to keep it and take it back."""

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter]) -> None:
        self.model, self.parameters = model, parameters
        frozen = {id(p) for p in parameters}

        def still(module: nn.Module) -> bool:
            own = [p for p in module.parameters() if p.requires_grad and id(p) not in frozen]
            return not own and any(True for _ in module.parameters())

        self.before = [(p, p.requires_grad) for p in parameters]
        self.modules = [m for m in model.modules() if still(m)]
        self.training = [(m, m.training) for top in self.modules for m in top.modules()]

    def train(self, mode: bool = True) -> nn.Module:
        """`model.train(mode)`, but modules without any trainable parameter stay in evaluation:
        their dropout and running statistics too are part of what is frozen."""
        self.model.train(mode)
        for module in self.modules:
            module.eval()
        return self.model

    def undo(self) -> None:
        """Every parameter requires grad as before; training modes are as before."""
        for p, required in self.before:
            p.requires_grad_(required)
        for module, mode in self.training:
            module.training = mode


def freeze(model: nn.Module, *, but: Match | None = None) -> Frozen:
    """Freezes `model`: no parameter requires grad, and what has none left is in evaluation mode.

    torch's `requires_grad_(False)` freezes a module whole and leaves its dropout on; this is for
    models with new layers inside frozen ones, as Flamingo's:

        frozen = freeze(model, but=lambda name, p: name in xattn_parameters(model))

    Args:
        but: (name, parameter) -> whether it stays as it is. None: none does.

    Returns:
        A `Frozen`: `.train()` in place of `model.train()`, and `.undo()`.

    Raises:
        TypeError: model is no module, or `but` no function.
    """
    check_module("model", model)
    check_rule("but", but)
    keep = but or (lambda name, p: False)
    frozen = Frozen(model, [p for n, p in model.named_parameters() if not keep(n, p)])
    for p in frozen.parameters:
        p.requires_grad_(False)
    for module in frozen.modules:
        module.eval()
    return frozen
