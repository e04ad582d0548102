"""The kernels that ours are compared with: a rival counts for nothing if it is wrong."""

from __future__ import annotations

import os
import re

import pytest
import torch

pytest.importorskip("triton")

from support.numerics import assert_as_accurate
from tools.machine_code import page as static_document
from tools.machine_code.rivals import compare, textbook
from tools.machine_code.triton_report import PRODUCTS, RESULTS

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


@pytest.mark.slow
@pytest.mark.compile
def test_flex_attention_is_compiled_without_a_device():
    """Its kernels are counted from torch's own source, which another torch may write otherwise."""
    rows = {row.kernel: row for row in compare.rows_of_flex(80, 64)}
    assert list(rows) == ["forward", "dq", "dkdv"]
    for row in rows.values():
        assert row.always["tensor"] * row.num_warps * 16 * 8 * 16 == (
            sum(PRODUCTS[row.kernel]) * 64 * row.block_q * row.block_k
        )
        assert row.per_1000 < row.per_1000_masked


def test_the_page_is_what_the_results_say():
    text = static_document.PAGE.read_text()
    (triton,) = re.findall(r"Triton\s+(\d+\.\d+\.\d+)\.", text)
    assert static_document.page(RESULTS, triton) == text, "run python -m tools.machine_code.page"
