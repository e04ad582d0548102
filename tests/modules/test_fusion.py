"""All forms of fusion: state dicts, autocast, compilation, sizes at the edge, wrong arguments."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from support.fusion_cases import (
    EARLY,
    LATE,
    TEXT,
    VISUAL,
    document,
    early,
    late,
    middle,
    randomise,
    tokens,
)
from xattn_kernels import MidFusion

pytestmark = pytest.mark.usefixtures("seed")


def made(name: str, **options) -> nn.Module:
    kind, n = name.split()
    forms = {"early": EARLY, "middle": [{}], "late": LATE}[kind]
    make = {"early": early, "middle": lambda form, **o: middle(**o), "late": late}[kind]
    return randomise(make(forms[int(n)], **options))


NAMES = ["early 0", "early 1", "middle 0", *[f"late {n}" for n in range(len(LATE))]]
each = pytest.mark.parametrize("name", NAMES)


def inputs(name: str, **sizes):
    return document(**sizes) if name.startswith("middle") else tokens(**sizes)


def tensors(outs) -> tuple:
    return (outs,) if isinstance(outs, torch.Tensor) else tuple(outs)


@each
def test_state_dict_and_autocast(name):
    module, other, given = made(name), made(name), inputs(name)
    expected = tensors(module(*given))
    assert not torch.equal(tensors(other(*given))[-1], expected[-1])
    other.load_state_dict(copy.deepcopy(module.state_dict()), strict=True)
    for a, b in zip(tensors(other(*given)), expected, strict=True):
        assert torch.equal(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        outs = tensors(module(*given))
    sum(o.float().square().sum() for o in outs).backward()
    for out, b in zip(outs, expected, strict=True):
        assert 0 < (out - b).abs().max() < 0.05 * b.abs().max()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@each
def test_compiles(name):
    """In one graph, but where a CPU's kernels read the bounds of intervals."""
    module, given = made(name), inputs(name)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=name != "early 1")
    for a, b in zip(tensors(compiled(*given)), tensors(module(*given)), strict=True):
        torch.testing.assert_close(a, b)


@each
@pytest.mark.parametrize("sizes", [(1, 7, 5), (2, 0, 5), (2, 7, 0), (2, 0, 0), (0, 7, 5)], ids=str)
def test_sizes_at_the_edge(name, sizes):
    batch, n_vision, n_text = sizes
    keys = dict(n=n_vision) if name.startswith("middle") else dict(n_vision=n_vision)
    module, given = made(name), inputs(name, batch=batch, n_text=n_text, **keys)
    outs = tensors(module(*given))
    sum(o.square().sum() for o in outs).backward()
    assert all(o.isfinite().all() and len(o) == batch for o in outs)
    assert all(t.grad.isfinite().all() for t in given)
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


V, T, X, M = torch.zeros(3, 7, VISUAL), torch.zeros(3, 5, TEXT), *document()
FEW, LONG = torch.tensor([1, 2]), torch.tensor([1, 8, 2])
WRONG = {
    "depth must be at least 1, got 0": lambda: early(depth=0),
    "heads must divide dim = 24, got 5": lambda: early(heads=5),
    "causal_text must be a bool, got int": lambda: early(causal_text=1),
    "norm_eps must be a positive number": lambda: early(norm_eps=0.0),
    "backend must be one of None, 'triton'": lambda: early(backend="flash"),
    r"vision must be \[B, Nv, dim_visual\] with dim_visual = 14": lambda: early()(V[0], T),
    r"text must be \[B, Nt, dim_text\] with dim_text = 10": lambda: early()(V, V),
    "text must have the dtype of the weights": lambda: late()(V, T.double()),
    "the batch of text, 1, must be that of vision, 3": lambda: late()(V, T[:1]),
    r"vision_lengths must be \[B\] = \[3\] on cpu, got \[2\] on": lambda: early()(
        V, T, vision_lengths=FEW
    ),
    "vision_lengths must be at most 7, not 8": lambda: early()(V, T, vision_lengths=LONG),
    "text_lengths must be an int32 or int64 tensor": lambda: late()(V, T, text_lengths=[1, 2, 3]),
    "layers must have at least one, each an nn.Module": lambda: MidFusion([], dim=8),
    r"layers\[0\] must be an nn.Module, got str": lambda: MidFusion(["a"], dim=8),
    "layers must be a list, each an nn.Module, got Linear": lambda: MidFusion(
        nn.Linear(8, 8), dim=8
    ),
    "every must be at least 1, got 0": lambda: middle(every=0),
    "kv_heads": lambda: middle(kv_heads=2),
    "media must be one cache for each of 2 blocks, got 0": lambda: middle()(X, []),
    "the batch of x, 1, must be that of media, 3": lambda: middle()(X[:1], M),
    "merge must be one of 'concat', 'add', 'product', got 'max'": lambda: late(merge="max"),
    "pool must be one of 'mean', 'attention', got 'max'": lambda: late(pool="max"),
    "heads must be None without pool='attention', else not, got 2": lambda: late(heads=2),
    "else not, got None": lambda: late(pool="attention"),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()
