"""The kernels that ours are compared with: a rival counts for nothing if it is wrong."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.rivals import textbook
from numerics import assert_as_accurate

TILE = dict(BLOCK_Q=32, BLOCK_K=16)


def eager(q, k, v, dout, causal: bool) -> list:
    """(out, dq, dk, dv) in the dtype of the inputs."""
    q, k, v = (t.detach().clone().requires_grad_() for t in (q, k, v))
    s = q @ k.transpose(-1, -2) * 0.2
    if causal:
        s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), float("-inf"))
    out = s.softmax(-1) @ v
    return [out, *torch.autograd.grad(out, (q, k, v), dout)]


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1 is not set"
)
@pytest.mark.parametrize(("causal", "Nk"), [(True, 64), (False, 48)])
def test_textbook_is_right(causal: bool, Nk: int):
    torch.manual_seed(0)
    q, dout = torch.randn(2, 2, 64, 16, dtype=torch.float16)
    k, v = torch.randn(2, 2, Nk, 16, dtype=torch.float16)
    out, lse = textbook.forward(q, k, v, 0.2, causal, **TILE)
    ours = [out, textbook.dq(dout, out, lse, q, k, v, 0.2, causal, **TILE)]
    ours += textbook.dkdv(dout, out, lse, q, k, v, 0.2, causal, **TILE)
    rough = eager(q, k, v, dout, causal)
    truth = eager(*(t.double() for t in (q, k, v, dout)), causal)
    for name, *results in zip(("out", "dq", "dk", "dv"), ours, rough, truth, strict=True):
        assert_as_accurate(*results, name)
