"""The oracle against loops over plain numbers, finite differences and published Philox output."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from support.calls import build, run
from support.cases import BY_NAME, Case
from support.numerics import FLOOR
from xattn_kernels import cross_attention
from xattn_kernels.reference import philox_keep

PLAIN = (
    "out_only", "no_keys", "group_2", "widths_20_7", "mask_empty_rows", "mask_bool_B11K", "bias_QK",
    "bias_infinite", "scale_heads_signs", "softcap", "dropout", "everything_3",
)  # fmt: skip


def allowed(mask, c: Case, b: int, h: int, i: int, j: int) -> bool:
    if mask is None:
        return True
    if isinstance(mask, torch.Tensor):
        return bool(mask.expand(c.B, c.Hq, c.Nq, c.Nk)[b, h, i, j])
    start, stop = mask.expand(c.B, c.Nq)
    return bool(start[b, i] <= j < stop[b, i])


def row_by_hand(call, c: Case, b: int, h: int, i: int):
    """(out, lse, entropy, max_probability) of one row, one key at a time."""
    numbers, o = (
        {name: t.tolist() for name, t in call.leaves.items() if name in "qkv"},
        call.options,
    )
    q, group = numbers["q"][b][h][i], h // (c.Hq // c.Hkv)
    if isinstance(c.scale, tuple):
        scale = call.leaves["scale"].expand(c.Hq)[h].item()
    else:
        scale = c.D**-0.5 if c.scale is None else c.scale
    bias = call.leaves["bias"].expand(c.B, c.Hq, c.Nq, c.Nk) if c.bias else None
    s = {}
    for j, k in enumerate(numbers["k"][b][group]):
        if not allowed(o.get("mask"), c, b, h, i, j):
            continue
        s[j] = scale * sum(x * y for x, y in zip(q, k, strict=True))
        if c.softcap:
            s[j] = c.softcap * math.tanh(s[j] / c.softcap)
        s[j] += bias[b, h, i, j].item() if bias is not None else 0.0
    total = sum(math.exp(x) for x in s.values())
    if total == 0:
        return [0.0] * (c.Dv or c.D), -math.inf, 0.0, 0.0
    p = {j: math.exp(x) / total for j, x in s.items()}
    seed = torch.tensor(o["seed"])
    keep = philox_keep(seed, c.dropout_p, c.B, c.Hq, c.Nq, c.Nk)[b, h, i].tolist()
    out = [0.0] * (c.Dv or c.D)
    for j, weight in p.items():
        for d, value in enumerate(numbers["v"][b][group][j]):
            out[d] += keep[j] * weight / (1 - c.dropout_p) * value
    entropy = -sum(x * math.log(x) for x in p.values() if x > 0)
    return out, math.log(total), entropy, max(p.values())


@pytest.mark.parametrize("name", PLAIN)
def test_forward_by_hand(name):
    c = replace(BY_NAME[name], returns="statistics")
    call = build(c, torch.float64)
    result = cross_attention(**call.leaves, **call.options, backend="eager")
    for b in range(c.B):
        for h in range(c.Hq):
            for i in range(c.Nq):
                expected = row_by_hand(call, c, b, h, i)
                for ours, theirs in zip(result, expected, strict=True):
                    theirs = torch.tensor(theirs, dtype=torch.float64)
                    torch.testing.assert_close(
                        ours[b, h, i], theirs, atol=FLOOR[torch.float64], rtol=1e-10
                    )


@pytest.mark.parametrize(
    "name", ["out_only", "group_2", "mask_bool_QK", "bias_B11K", "scale_number"]
)
def test_agrees_with_torch(name):
    c = BY_NAME[name]
    call = build(c, torch.float64)
    q, k, v = (call.leaves[n] for n in "qkv")
    mask = call.leaves.get("bias", call.options.get("mask"))
    theirs = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=call.options["scale"], enable_gqa=True
    )
    ours = cross_attention(**call.leaves, **call.options, backend="eager")
    torch.testing.assert_close(getattr(ours, "out", ours), theirs)


SMALL = dict(B=2, Hq=2, Hkv=1, Nq=4, Nk=5, D=3, Dv=2)
GRADCHECKED = {
    "plain": {},
    "empty_rows": dict(mask="empty_rows"),
    "bool": dict(mask="bool_empty_rows"),
    "bias": dict(bias="1HQK"),
    "bias_of_keys": dict(bias="K", mask="causal"),
    "scale": dict(scale=(0.7,)),
    "scale_of_heads": dict(scale=(0.7, -0.4)),
    "softcap": dict(softcap=0.8),
    "dropout": dict(dropout_p=0.4),
    "everything": dict(
        mask="unsorted", bias="BHQK", scale=(0.7, -0.4), softcap=0.8, dropout_p=0.3
    ),
}  # fmt: skip


def differentiable(flags: dict):
    """(function of the leaves alone, leaves): finite results only, as finite differences need."""
    call = build(Case("gradcheck", **SMALL, **flags), torch.float64).in_double()
    names = list(call.leaves)

    def function(*leaves):
        arguments = dict(zip(names, leaves, strict=True))
        result = cross_attention(**arguments, **call.options, backend="eager")
        lse = torch.where(result.lse.isfinite(), result.lse, 0.0)
        return result.out, lse, result.entropy

    return function, list(call.leaves.values())


@pytest.mark.parametrize("flags", GRADCHECKED.values(), ids=GRADCHECKED)
def test_gradients(flags):
    """out, lse and entropy with respect to q, k, v, bias and scale."""
    assert torch.autograd.gradcheck(*differentiable(flags))


@pytest.mark.parametrize("flags", [{}, GRADCHECKED["everything"]], ids=["plain", "everything"])
def test_second_gradients(flags):
    assert torch.autograd.gradgradcheck(*differentiable(flags), atol=1e-4)


@pytest.mark.parametrize("name", ["everything_3", "bias_infinite", "mask_empty_rows", "softcap"])
def test_stated_gradients_are_those_of_autograd(name):
    """The formulas at the top of reference.py, which the kernels follow, eq. ds among them."""
    c = BY_NAME[name]
    call = build(c, torch.float64).in_double()
    found = run(call, "eager")
    by_hand = stated_gradients(call, found)
    assert by_hand.keys() == {n for n in found if n.startswith("d")}
    for n, gradient in by_hand.items():
        torch.testing.assert_close(gradient.reshape(found[n].shape), found[n], msg=n)


@torch.no_grad()
def stated_gradients(call, found) -> dict[str, torch.Tensor]:
    from xattn_kernels import reference

    x = call.inputs()
    dout, dlse, dentropy = (call.upstream[n][..., None] for n in ("out", "lse", "entropy"))
    dout = dout[..., 0]
    group = x.Hq // x.Hkv
    k, v = (t.repeat_interleave(group, 1) for t in (x.k, x.v))
    s, lse, entropy = reference.scores(x), found["lse"][..., None], found["entropy"][..., None]
    p = (s - lse).exp().nan_to_num(0.0)
    keep = torch.ones_like(p)
    if x.dropout_p:
        keep = philox_keep(x.seed, x.dropout_p, *p.shape) / (1 - x.dropout_p)
    dp = keep * (dout @ v.mT)
    delta = (dout * found["out"]).sum(-1, keepdim=True)
    surprise = torch.where(p > 0, s - lse + entropy, 0.0)
    ds = p * (dp - delta + dlse - dentropy * surprise)
    grads = {"dv": (p * keep).mT @ dout}
    if x.bias is not None:
        grads["dbias"] = ds.sum_to_size(x.bias.shape)
    if x.softcap:
        s = s if x.bias is None else s - x.bias
        ds = ds * torch.where(ds != 0, 1 - (s / x.softcap) ** 2, 0.0)
    scale = x.scale_of_heads(x.q.dtype)
    grads["dq"], grads["dk"] = scale * ds @ k, scale * ds.mT @ x.q
    if x.scale_tensor is not None:
        scale = x.scale_tensor
        grads["dscale"] = ((x.q * grads["dq"]).sum((0, 2, 3)) / scale).sum_to_size(scale.shape)
    for n in ("dk", "dv"):
        grads[n] = grads[n].unflatten(1, (-1, group)).sum(2)
    order = ("dq", "dk", "dv", "dbias", "dscale")
    return {n: grads[n] for n in order if n in grads}


def philox_words(counter, key) -> list[int]:
    """Philox4x32-10 in Python's integers, written from the paper's round function."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        (h0, l0), (h1, l1) = (
            divmod(m * x, 2**32) for m, x in ((0xD2511F53, c[0]), (0xCD9E8D57, c[2]))
        )
        c = [h1 ^ c[1] ^ k0, l1, h0 ^ c[3] ^ k1, l0]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    """Random123's own test vectors (Salmon et al. 2011, kat_vectors: philox4x32 10)."""
    assert philox_words(counter, key) == [int(w, 16) for w in words.split()]


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 123, 2**62, -1])
def test_philox_keep_is_word_0_of_the_stated_counter(seed):
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    for p in (1e-9, 0.3, 0.999):
        keep = philox_keep(torch.tensor(seed), p, 2, 3, 4, 5)
        for b, h, i, j in ((0, 0, 0, 0), (1, 2, 3, 4), (1, 0, 2, 1), (0, 2, 1, 3)):
            expected = philox_words((j, i, h, b), key)[0] >= round(p * 2**32)
            assert keep[b, h, i, j].item() == expected
    assert torch.equal(
        philox_keep(torch.tensor(seed), 0.3, 2, 1, 4, 5, first_head=2),
        philox_keep(torch.tensor(seed), 0.3, 2, 3, 4, 5)[:, 2:],
    )


@pytest.mark.parametrize("p", [0.01, 0.25, 0.9])
def test_drop_rate(p):
    """Within five standard deviations, over the whole and along each index on its own."""
    keep = philox_keep(torch.tensor(7), p, 4, 8, 64, 256)
    for dims in [(0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)]:
        n = math.prod(keep.shape[d] for d in dims)
        rate = (~keep).double().mean(dims)
        assert (rate - p).abs().max() < 5 * math.sqrt(p * (1 - p) / n)
    for d in range(4):  # neighbours are independent
        both = (~keep.narrow(d, 1, keep.shape[d] - 1)) & ~keep.narrow(d, 0, keep.shape[d] - 1)
        rate = both.double().mean().item()
        assert abs(rate - p * p) < 5 * math.sqrt(p * p / both.numel())


def test_dropout_keeps_the_expectation():
    q = torch.zeros(1, 4, 256, 16)
    v = torch.ones(1, 4, 256, 16)
    out = cross_attention(q, v, v, dropout_p=0.5, seed=3, backend="eager")
    assert abs(out.mean().item() - 1) < 5 * math.sqrt(1 / (4 * 256 * 256))
