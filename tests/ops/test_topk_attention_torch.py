"""Top-k attention in plain PyTorch, the path of a CPU: chunks, memory, derivatives."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from support.cases import Case
from support.largest_tensor import LargestTensor
from support.topk_cases import (
    CASES,
    assert_right,
    case,
    topk_call,
)
from xattn_kernels import (
    cross_attention,
    explain,
    reference,
    topk_attention,
)
from xattn_kernels.torch_kernels import topk_attention as torch_topk


def test_second_derivatives_are_for_eager():
    q, k, v = (torch.randn(1, 1, n, 8, dtype=torch.float64, requires_grad=True) for n in (3, 9, 9))

    def call(*leaves):
        return topk_attention(*leaves, 4, backend="eager")

    assert torch.autograd.gradgradcheck(call, (q, k, v))
    assert torch.autograd.gradcheck(lambda *t: topk_attention(*t, 4, backend="torch"), (q, k, v))
    out = topk_attention(q, k, v, 4, backend="torch")
    grad = torch.autograd.grad(out.sum(), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="backend='eager'"):
        grad.sum().backward()


def test_a_chunk_of_queries_at_a_time(monkeypatch):
    """The path of a CPU, in pieces of one query and of several."""
    c, top_k = case("everything")
    found = []
    for chunk in (1, 2000, 2**22):
        monkeypatch.setattr(torch_topk, "CHUNK", chunk)
        found.append(assert_right(c, top_k, "torch", torch.float64))
    for name, t in found[0].items():
        assert all(torch.allclose(t, other[name], atol=1e-12) for other in found[1:])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("beyond", [0, math.inf], ids=["gathered", "whole"])
def test_both_ways(beyond, name, monkeypatch):
    monkeypatch.setattr(torch_topk, "GATHERED_BEYOND", beyond)
    assert_right(*case(name), "torch", torch.float32)


@pytest.mark.parametrize(
    "values", ["normal", "ties", "one value", "with -inf", "with nan", "zeros"]
)
@pytest.mark.parametrize("top_k", [1, 5, 39, 40])
def test_a_partial_sort_finds_what_a_whole_one_does(top_k, values):
    s = torch.randn(3, 7, 40)
    if values == "ties":
        s = s.round()
    elif values == "one value":
        s = torch.full_like(s, 0.25)
    elif values == "with -inf":
        s = s.round().masked_fill(torch.rand(s.shape) < 0.6, -torch.inf)
    elif values == "with nan":
        s = s.round().masked_fill(torch.rand(s.shape) < 0.1, torch.nan)
    elif values == "zeros":
        s = torch.zeros_like(s) * s  # of both signs
    assert torch.equal(torch_topk.top_indices(s, top_k), reference.top_indices(s, top_k))


@pytest.mark.parametrize("top_k", [4, 40, 200, 499, 500])
def test_memory_of_a_cpu_is_bounded(top_k, monkeypatch):
    monkeypatch.setattr(torch_topk, "CHUNK", 2**14)
    q, k, v = (torch.randn(1, 2, n, 16, requires_grad=True) for n in (256, 500, 500))
    with LargestTensor() as largest:
        call = dict(return_lse=True, backend="torch")
        topk_attention(q, k, v, top_k, **call).out.sum().backward()
    chosen = 4 * 2 * 256 * top_k  # bytes of the indices, which are kept
    assert largest.nbytes <= max(4 * 2**14 * 2, chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_of_a_group_are_not_repeated(dtype):
    q, k = (torch.randn(1, H, N, 16, dtype=dtype) for H, N in ((8, 4), (1, 20000)))
    with LargestTensor() as largest:
        topk_attention(q, k, k, 3, backend="torch")
    assert largest.nbytes <= 4 * 8 * 4 * 20000  # scores of the queries, not the keys of 8 heads


@pytest.mark.parametrize("choice", [dict(top_k=40), dict(topk_blocks=(32, 2))], ids=str)
def test_all_keys_are_attention_itself(choice):
    q, k, v = (torch.randn(2, 2, n, 8) for n in (9, 40, 40))
    found = topk_attention(q, k, v, **choice, backend="torch")
    assert torch.equal(found, cross_attention(q, k, v, backend="torch"))


class Deaf(torch.autograd.Function):
    """Passes no gradient on."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


@pytest.mark.parametrize("choice", [dict(top_k=4), dict(topk_blocks=(16, 1))], ids=str)
def test_no_gradient_arrives(choice):
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (9, 40, 40))
    Deaf.apply(topk_attention(q, k, v, **choice, backend="torch")).sum().backward()
    assert all(t.grad is None or not t.grad.any() for t in (q, k, v))


def test_a_block_is_not_wider_than_all_keys():
    q, k = torch.randn(1, 1, 9, 8), torch.randn(1, 1, 40, 8)
    wide = dict(topk_blocks=(2**40, 1), return_indices=True, backend="torch")
    with LargestTensor() as largest:
        found = topk_attention(q, k, k, **wide)
    assert largest.nbytes < 2**16 and not found.indices.any()
    torch.testing.assert_close(found.out, cross_attention(q, k, k))


def test_explain_says_how(capsys):
    q = torch.randn(1, 1, 3, 16)
    explain(topk_attention, q, q, q, 2)
    said = capsys.readouterr().out
    assert "topk_attention takes" in said and torch_topk.NOTE in said


def test_a_call_of_one_case_is_a_call_of_another_dtype():
    """Backends choose alike, as they choose by float32 scores."""
    c = Case("topk_dtypes", B=1, Nk=200, D=32, returns="out")
    call = topk_call(c, 20, torch.bfloat16)
    found = [call.op(**call.leaves, **call.options, backend=b).indices for b in ("torch", "eager")]
    wide = replace(call, leaves={n: t.detach().float() for n, t in call.leaves.items()})
    found.append(wide.op(**wide.leaves, **wide.options, backend="eager").indices)
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
