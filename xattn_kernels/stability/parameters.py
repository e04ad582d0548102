"""The parameters of cross-attention and its gates, optimiser groups of them, and freezing."""

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

# The classes and attributes are those of this package, PyTorch (`multihead_attn` of its decoder
# layers), OpenCLIP, OpenFlamingo, VisualGPT, and transformers' Mllama, Idefics, BLIP-2, BERT and
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
    `gate_parameters`. A plain `MultiheadAttention` does not count unless its name says so, as it
    may be self-attention, nor does the `gate_proj` of a feed-forward.

    Args:
        match: (name, parameter) -> whether it is one; it replaces this rule.

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
    """The tanh gates by name: parameters of one number, or of one per channel, that are called
    `gate`, `attn_gate`, `ff_gate`, `gate_...`, or as in Idefics `alpha_cross_attn` and
    `alpha_dense`; raises TypeError if model is no module."""
    check_module("model", model)
    return {
        name: p
        for name, p in model.named_parameters()
        if GATES.search(name.rpartition(".")[2]) and max(p.shape, default=1) == p.numel()
    }


def decayed_names(model: nn.Module) -> set[str]:
    """The names of the parameters with weight decay: no gates, norms, biases or temperatures."""
    norms = {
        f"{name}.{parameter}" if name else parameter
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__
        for parameter, _ in module.named_parameters(recurse=False)
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
    """Parameter groups for any of torch's optimisers, with a higher rate for the new layers and
    weight decay for matrices only.

    Args:
        model: the model whose parameters that require grad are grouped, each once.
        lr: the rate of layers that were trained before.
        xattn_lr: the rate of `xattn_parameters(model, match)`.
        weight_decay: the decay of all parameters but gates, norms, biases and others of fewer than
            two dimensions, whose decay is 0.
        rates: {regular expression: rate}; the first expression that matches within a parameter's
            name precedes lr and xattn_lr.
        match: see `xattn_parameters`.

    Returns:
        Groups {"params", "name", "lr", "weight_decay"}, none of them empty; the name is
        "cross_attention", "other" or the expression, with "/no_decay" where there is no decay.

    Raises:
        TypeError, ValueError: an argument is not among those named here, or no parameter requires
            grad.
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
    new, matrices, groups = xattn_parameters(model, match), decayed_names(model), {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        group = next((r for r in rates if re.search(r, name)), None)
        group = group or ("cross_attention" if name in new else "other")
        rate = rates.get(group, xattn_lr if group == "cross_attention" else lr)
        decay = weight_decay if name in matrices else 0.0
        group += "" if name in matrices else "/no_decay"
        empty = dict(params=[], name=group, lr=rate, weight_decay=decay)
        groups.setdefault(group, empty)["params"].append(p)
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
    """The parameters and modules that `freeze` froze, with methods that keep or undo it."""

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter]) -> None:
        self.model, self.parameters = model, parameters
        frozen = {id(p) for p in parameters}

        def all_frozen(module: nn.Module) -> bool:
            trainable = [p for p in module.parameters() if p.requires_grad and id(p) not in frozen]
            return not trainable and any(True for _ in module.parameters())

        self.before = [(p, p.requires_grad) for p in parameters]
        self.modules = [m for m in model.modules() if all_frozen(m)]
        self.training = [(m, m.training) for top in self.modules for m in top.modules()]

    def train(self, mode: bool = True) -> nn.Module:
        """The model after `model.train(mode)`, but with modules without a trainable parameter in
        evaluation mode: their dropout and running statistics are frozen too."""
        self.model.train(mode)
        for module in self.modules:
            module.eval()
        return self.model

    def undo(self) -> None:
        """Restores which parameters require grad, and the training modes."""
        for p, required in self.before:
            p.requires_grad_(required)
        for module, mode in self.training:
            module.training = mode


def freeze(model: nn.Module, *, but: Match | None = None) -> Frozen:
    """Freezes `model`: no parameter requires grad, and modules without a trainable one evaluate.

    torch's `requires_grad_(False)` freezes a whole module and leaves its dropout on; this function
    is for models with new layers inside frozen ones, as Flamingo's:

        frozen = freeze(model, but=lambda name, p: name in xattn_parameters(model))

    Args:
        but: (name, parameter) -> whether the parameter stays as it is. None: none does.

    Returns:
        A `Frozen`, whose `.train()` replaces `model.train()`, and whose `.undo()` restores all.

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
