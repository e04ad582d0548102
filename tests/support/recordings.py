"""Recorded outputs and gradients of the published modules, and what ours are beside them.

Each file in `data/conformance/` is of one class: a list of cases, with constructor arguments, state
dict, inputs, output and every gradient, computed in float64 by the code that `source` and `commit`
name.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

DATA = Path(__file__).resolve().parents[1] / "data" / "conformance"


def load(*names: str) -> list[dict]:
    """The cases of these files."""
    return [c for name in names for c in torch.load(DATA / f"{name}.pt", weights_only=True)]


def results(case: dict, module: nn.Module, other: dict, prefix: str = "") -> dict[str, Tensor]:
    """Output and the gradients of inputs and parameters, by name, of a module with the recorded
    weights; `other` are the arguments without a gradient, `prefix` what is before their names."""
    state = {name.removeprefix(prefix): t for name, t in case["state_dict"].items()}
    module.load_state_dict(state, strict=True)
    like = next(module.parameters())
    inputs = {n: t.to(like).requires_grad_() for n, t in case["inputs"].items()}
    out = module(**inputs, **other)
    (out * case["grad_output"].to(like)).sum().backward()
    named = inputs | {f"{prefix}{n}": p for n, p in module.named_parameters()}
    return {"output": out.detach()} | {f"d{n}": t.grad for n, t in named.items()}


def recorded(case: dict) -> dict[str, Tensor]:
    """The same of the published module."""
    grads = case["grad_inputs"] | case["grad_params"]
    return {"output": case["output"]} | {f"d{n}": t for n, t in grads.items()}


def assert_is_original(case: dict, found: dict[str, Tensor], zero: Collection[str] = ()) -> None:
    """To 1e-9 of each result's size in float64; the output and what is 0 (`zero`) of 1."""
    truth = recorded(case)
    assert found.keys() == truth.keys()
    for name, expected in truth.items():
        size = 1.0 if name in ("output", *zero) else expected.abs().max().item()
        error = (found[name] - expected).abs().max().item()
        assert error <= 1e-9 * size, f"{name}: error {error:.1e} of {size:.1e}"
