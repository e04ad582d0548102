"""CoCa's cross-attention against recordings of the published one; both poolers by equations."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from support.modes import modes
from support.numerics import assert_as_accurate
from support.recordings import assert_is_original, load, recorded, results
from xattn_kernels import AttentionPooler, CoCaCrossAttention, masks

pytestmark = pytest.mark.usefixtures("seed")

CASES = load("coca_cross_attention")
WIDTHS = dict(dim=24, context_dim=14, heads=3)
FORMS = [dict(n_queries=1), dict(n_queries=7), dict(n_queries=7, one_kv_head=True, dim_head=8)]

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
each_form = pytest.mark.parametrize("form", FORMS, ids=str)


def run(case: dict, dtype: torch.dtype, backend: str | None, device="cpu") -> dict:
    module = CoCaCrossAttention(**case["config"], backend=backend, device=device, dtype=dtype)
    return results(case, module, {})


@each_case
def test_eager_in_float64_is_the_original(case):
    assert_is_original(case, run(case, torch.float64, "eager"))


@pytest.mark.parametrize("mode", modes("interpreter", "sm_80", "gpu"), indirect=True)
def test_from_the_kernels(mode):
    assert_accurate(CASES[-1], run(CASES[-1], torch.float32, "triton", mode.device))


@each_case
def test_default_off_the_gpu(case, as_users_run_it):
    assert_accurate(case, run(case, torch.float32, None))


def assert_accurate(case: dict, found: dict) -> None:
    truth, eager = recorded(case), run(case, torch.float32, "eager")
    for name, expected in truth.items():
        assert_as_accurate(found[name].cpu(), eager[name], expected, name)


def pooler(form: dict, **options) -> AttentionPooler:
    return AttentionPooler(**WIDTHS | form | options)


def twin(module: AttentionPooler, context: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The pooler in PyTorch's operations alone, one batch element at a time, without its padding:
    torch's own attention for open_clip's form, einsum over query heads for lucidrains'."""
    p = dict(module.named_parameters())
    rows = []
    for tokens, n in zip(context, lengths, strict=True):
        if module.one_kv_head:
            x = F.layer_norm(p["query"], (24,), p["attn.norm.gamma"])
            y = F.layer_norm(tokens[:n], (14,), p["attn.context_norm.gamma"])
            q = (x @ p["attn.to_q.weight"].T).view(-1, 3, 8)
            k, v = (y @ p["attn.to_kv.weight"].T).chunk(2, dim=-1)
            weights = (torch.einsum("ihd,jd->hij", q, k) / 8**0.5).softmax(-1)
            out = torch.einsum("hij,jd->ihd", weights, v).flatten(1) @ p["attn.to_out.weight"].T
            rows.append(F.layer_norm(out, (24,), p["norm.gamma"]))
        else:
            theirs = nn.MultiheadAttention(24, 3, kdim=14, vdim=14, dtype=context.dtype)
            weights = {f"attn.{name}": p[f"attn.{name}"] for name, _ in theirs.named_parameters()}
            weights = {name.removeprefix("attn."): t for name, t in weights.items()}
            q = F.layer_norm(p["query"], (24,), p["ln_q.weight"], p["ln_q.bias"])
            k = F.layer_norm(tokens[:n], (14,), p["ln_k.weight"], p["ln_k.bias"])
            rows.append(torch.func.functional_call(theirs, weights, (q, k, k))[0])
    return torch.stack(rows)


@each_form
@pytest.mark.parametrize("backend", [None, "eager"])
def test_equals_its_twin_with_every_gradient(form, backend):
    module = pooler(form, backend=backend, dtype=torch.float64)
    for name, p in module.named_parameters():
        if p.dim() == 1:  # norms and biases are not those of the start
            nn.init.normal_(p, mean=float("weight" in name or "gamma" in name))
    context = torch.randn(2, 9, 14, dtype=torch.float64, requires_grad=True)
    lengths = [4, 9]
    leaves = {"context": context} | dict(module.named_parameters())
    mask = masks.padding(torch.tensor(lengths))
    outs = module(context, mask=mask), twin(module, context, lengths)
    assert outs[0].shape == (2, form["n_queries"], 24)
    weight = torch.randn_like(outs[0])
    found, expected = (
        [o, *torch.autograd.grad((o * weight).sum(), list(leaves.values()))] for o in outs
    )
    for name, a, b in zip(["out", *leaves], found, expected, strict=True):
        assert_as_accurate(a, b, b, name, size=weight.abs().max().item())


def test_names_are_those_of_the_originals():
    full = {n: list(p.shape) for n, p in pooler(FORMS[0]).state_dict().items()}
    assert full == {
        "query": [1, 24], "attn.q_proj_weight": [24, 24], "attn.k_proj_weight": [24, 14],
        "attn.v_proj_weight": [24, 14], "attn.in_proj_bias": [72], "attn.out_proj.weight": [24, 24],
        "attn.out_proj.bias": [24], "ln_q.weight": [24], "ln_q.bias": [24], "ln_k.weight": [14],
        "ln_k.bias": [14],
    }  # fmt: skip
    same = AttentionPooler(dim=24, heads=3).state_dict()
    assert list(same["attn.in_proj_weight"].shape) == [72, 24] and len(same["query"]) == 256


def test_loads_under_the_names_of_the_whole_model():
    module, other = pooler(FORMS[2]), pooler(FORMS[2])
    state = {
        n.replace("query", "img_queries").replace("attn.", "img_attn_pool.", 1): t
        for n, t in module.state_dict().items()
        if not n.startswith("norm.")
    }
    state |= {f"img_attn_pool_norm.{n}": t for n, t in module.norm.state_dict().items()}
    nn.ModuleDict({"pool": other}).load_state_dict({f"pool.{n}": t for n, t in state.items()})
    assert "img_queries" in state  # the caller's own dict keeps its names
    context = torch.randn(2, 5, 14)
    assert torch.equal(other(context), module(context))


@each_form
def test_state_dict_copies_and_autocast(form):
    module, other, context = pooler(form), pooler(form), torch.randn(2, 9, 14)
    other.load_state_dict(copy.deepcopy(module.state_dict()), strict=True)
    expected = module(context)
    assert torch.equal(other(context), expected)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(context)
    out.float().sum().backward()
    assert 0 < (out - expected).abs().max() < 0.1
    assert all(p.grad.isfinite().all() for p in module.parameters())


@each_form
def test_compiles_in_one_graph(form):
    module, context = pooler(form), torch.randn(2, 9, 14)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(context), module(context))


@each_form
@pytest.mark.parametrize("shape", [(1, 9, 14), (2, 1, 14), (2, 0, 14), (0, 9, 14)], ids=str)
def test_sizes_at_the_edge(form, shape):
    module, context = pooler(form), torch.randn(shape, requires_grad=True)
    out = module(context)
    out.sum().backward()
    assert out.shape == (shape[0], form["n_queries"], 24)
    assert out.isfinite().all() and context.grad.isfinite().all()


C, CO = torch.zeros(2, 9, 14), CoCaCrossAttention
WRONG = {
    "dim must be at least 1, got 0": lambda: pooler({}, dim=0),
    "n_queries must be an int, got float": lambda: pooler({}, n_queries=1.5),
    "heads must divide dim = 24, got 5": lambda: pooler({}, heads=5),
    "dim_head must be None without one_kv_head, got 8": lambda: pooler({}, dim_head=8),
    "one_kv_head must be a bool, got int": lambda: pooler({}, one_kv_head=1),
    "backend must be one of None, 'triton'": lambda: pooler({}, backend="flash"),
    r"context must be \[B, Nk, context_dim\] with context_dim = 14": lambda: pooler({})(C[0]),
    "context must have the dtype of the weights": lambda: pooler(FORMS[2])(C.double()),
    "mask must be a KeyInterval or None, got a torch.bool": lambda: pooler({})(C, mask=C.bool()),
    "ff_mult must be at least 1, got 0": lambda: CO(dim=8, ff_mult=0),
    "norm_context must be a bool, got str": lambda: CO(dim=8, norm_context="yes"),
    r"x must be \[B, N, dim\] with dim = 8": lambda: CO(dim=8)(C, C),
    "the batch of x, 1, must be that of context, 2": lambda: CO(dim=14)(C[:1], C),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()
