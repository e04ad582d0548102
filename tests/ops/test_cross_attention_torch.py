"""The `torch` backend: every case against eager, its zeros, its memory and its speed."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from support.calls import (
    assert_right,
    build,
    expected,
    run,
)
from support.cases import BY_NAME, CASES, Case
from support.largest_tensor import LargestTensor
from support.numerics import assert_as_accurate
from support.values import reserve
from xattn_kernels import (
    KeyInterval,
    cross_attention,
    masks,
    reference,
)
from xattn_kernels.torch_kernels import cross_attention as torch_attention

# Several blocks of rows, whose keys overlap.
BLOCKS = dict(B=2, Nq=2 * torch_attention.BLOCK_ROWS + 30, Nk=300)
BLOCKED = [
    *[
        Case(f"blocks_{mask}", mask=mask, **BLOCKS)
        for mask in ("causal", "window", "media_all", "nonempty", "in_order", "packed")
    ],
    Case("blocks_group", mask="causal", **BLOCKS | dict(Hq=4, Hkv=2)),
    Case("blocks_widths", mask="window", D=24, Dv=8, **BLOCKS),
    Case("blocks_scale", mask="media_last", scale=(0.3, -0.2), **BLOCKS),
    *[
        Case(f"blocks_bias_{bias}", bias=bias, mask=mask, **BLOCKS)
        for bias, mask in (
            ("1HQK", "causal"), ("K", "media_last"), ("B1Q1", "per_batch"), ("H11", None),
        )
    ],
    Case("blocks_bias_group", bias="1HQK", mask="media_last", **BLOCKS | dict(Hq=4, Hkv=2)),
    *[Case(f"bias_{mask}", bias="BHQK", mask=mask) for mask in ("all_empty", "empty_batch")],
    Case("bias_no_keys", bias="BHQK", Nk=0),
    Case("one_key_one_row", mask="all_empty", bias="1111", Nq=1, Nk=1),
]  # fmt: skip


def within_reach(c: Case) -> Case:
    return replace(c, returns="out", softcap=None, dropout_p=0.0)


# An infinite score makes its row NaN; torch's kernel then leaves some of what it meets finite.
FINITE = [c for c in CASES if c.values != "infinite_k"]
OURS = {replace(c, name=""): c for c in map(within_reach, FINITE + BLOCKED)}.values()
CALLS = [
    *[
        (c, dtype)
        for c in OURS
        for dtype in (torch.float32, torch.bfloat16)
        # torch's kernel copies bfloat16 keys together with the memory between them
        if (c.name, dtype) != ("layout_far_tiles", torch.bfloat16)
    ],
    *[(within_reach(c), dtype) for c in BLOCKED for dtype in (torch.float16, torch.float64)],
]


def media(B: int, Nq: int, n_media: int, empty_rows: int = 0) -> KeyInterval:
    """Images of 64 keys spread over the text, in each batch element at other places."""
    g = torch.Generator().manual_seed(0)
    flags = torch.zeros(B, Nq, dtype=torch.bool)
    flags[:, empty_rows] = True
    for b in range(B):
        later = torch.randperm(Nq - empty_rows - 1, generator=g)[: n_media - 1]
        flags[b, later + empty_rows + 1] = True
    return masks.media(flags, 64, n_media)


def qkv(B: int, H: int, Nq: int, Nk: int, D: int = 16) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, N, D, generator=g).requires_grad_() for N in (Nq, Nk, Nk)]


@pytest.mark.parametrize("case, dtype", CALLS, ids=lambda value: str(value).split(".")[-1])
def test_as_accurate_as_eager(case, dtype):
    assert not torch_attention.reasons(build(case, dtype).inputs())
    assert_right(case, "torch", dtype)


@pytest.mark.parametrize("needed", ["q", "k", "v", "bias", "scale"])
def test_one_gradient_alone(needed):
    case = within_reach(replace(BY_NAME["everything_37"], name="alone", Nq=300, mask="causal"))
    call = build(case, torch.float32)
    leaves = {n: t.detach().requires_grad_(n == needed) for n, t in call.leaves.items()}
    out = cross_attention(**leaves, **call.options, backend="torch")
    (alone,) = torch.autograd.grad(out, leaves[needed], call.upstream["out"])
    eager, truth, size = (results["d" + needed] for results in expected(case, torch.float32))
    assert_as_accurate(alone, eager, truth, size=size, rounded_to=torch.float32)


@pytest.mark.parametrize("mask", ["causal", "media_last", "nonempty"])
def test_backward_may_run_twice_but_not_through_itself(mask):
    call = build(Case("twice", mask=mask, Nq=300, Nk=300, returns="out"), torch.float32)
    out = cross_attention(**call.leaves, **call.options, backend="torch")
    leaves, dout = list(call.leaves.values()), call.upstream["out"]
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    second = torch.autograd.grad(out, leaves, dout, create_graph=True)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match=r"differentiate twice|not implemented"):
        torch.autograd.grad(second[0].sum(), leaves)


@pytest.mark.parametrize("mask", ["causal", "media_last"])
def test_checkpointed(mask):
    call = build(Case("checkpointed", mask=mask, Nq=300, Nk=300, returns="out"), torch.float32)
    leaves, dout = list(call.leaves.values()), call.upstream["out"]

    def attend(*tensors):
        return cross_attention(*tensors, **call.options, backend="torch")

    plain = torch.autograd.grad(attend(*leaves), leaves, dout)
    again = torch.autograd.grad(checkpoint(attend, *leaves, use_reentrant=False), leaves, dout)
    assert all(map(torch.equal, plain, again))


@pytest.mark.parametrize("mask", ["empty_rows", "both_ends", "all_empty", "empty_batch"])
def test_what_no_interval_joins_is_never_touched(mask):
    """NaN in rows that see nothing and in keys that nobody sees; their gradients are exactly 0."""
    call = build(Case("untouched", mask=mask, Nq=33, Nk=48, returns="out"), torch.float32)
    seen = call.options["mask"].dense(48).expand(2, 33, 48)
    empty, unseen = ~seen.any(2), ~seen.any(1)
    leaves = {n: t.detach().clone() for n, t in call.leaves.items()}
    for name, nobody in (("q", empty), ("k", unseen), ("v", unseen)):
        leaves[name].masked_fill_(nobody[:, None, :, None], torch.nan).requires_grad_()
    out = cross_attention(**leaves, **call.options, backend="torch")
    grads = torch.autograd.grad(out, list(leaves.values()), call.upstream["out"])
    for t, nobody in zip((out, *grads), (empty, empty, unseen, unseen), strict=True):
        assert t.isfinite().all() and not t.transpose(1, 2)[nobody].any()
        assert nobody.all() or t.any()


BIG = 2048
EVERY_64 = torch.arange(BIG)[None] % 64 == 9
GROWING = {
    "media": masks.media(EVERY_64, 64, 32),
    "packed": masks.packed(*2 * [torch.arange(0, BIG + 1, 128)]),
    "causal": masks.causal(BIG, BIG),
    "window": masks.window(BIG, BIG, 200, 100),
    "all_images": masks.media(EVERY_64, 64, 32, attend="all"),
}


@pytest.mark.parametrize("kind", GROWING)
def test_memory_does_not_grow_with_the_score_matrix(kind):
    tensors = qkv(1, 1, BIG, BIG)
    own = tensors[0].nbytes
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with LargestTensor() as largest:
        with saved_tensors_hooks(pack, lambda t: t):
            out = cross_attention(*tensors, mask=GROWING[kind], backend="torch")
        out.backward(torch.ones_like(out))
    assert largest.nbytes <= torch_attention.BLOCK_ROWS * BIG * 4
    # q, k, v, the output in parts, lse, and the intervals
    assert sum(saved.values()) <= 5 * own


def test_gradient_of_a_bias_forms_few_scores_at_once():
    q, k, v = qkv(1, 2, BIG, 512)
    bias = torch.zeros(2, 1, 512, requires_grad=True)
    with LargestTensor() as largest:
        cross_attention(q, k, v, bias=bias, backend="torch").sum().backward()
    assert largest.nbytes <= max(q.nbytes, 2 * torch_attention.BLOCK_ROWS * 512 * 4)


@pytest.mark.parametrize("Nq", [9, 300])
@pytest.mark.parametrize(
    "flags",
    [
        dict(mask="bool_empty_rows"),
        dict(mask="bool_empty_rows", bias="1HQK"),
        dict(mask="bool_all"),
        dict(bias="BHQK", values="bias_infinite"),
        dict(bias="BHQK", values="bias_infinite", mask="causal"),
    ],
    ids=lambda flags: "-".join(map(str, flags.values())),
)
@pytest.mark.parametrize("fixed_bias", [True, False])
def test_nan_that_arrives_at_a_row_without_keys_stays_there(flags, fixed_bias, Nq):
    """No interval says that such a row has no keys; its gradients are those of a dout of 0."""
    call = build(Case("nan_arrives", Nq=Nq, returns="out", **flags), torch.float32)
    x = cross_attention.check(**call.leaves, **call.options)
    empty = (reference.scores(x) == -torch.inf).all(-1)
    assert empty.any()
    if fixed_bias and "bias" in call.leaves:
        call.leaves["bias"].requires_grad_(False)
    found = []
    for arriving in (0.0, torch.nan):
        call.upstream["out"][empty] = arriving
        found.append(run(call, "torch"))
    for name, t in found[0].items():
        assert torch.equal(found[1][name], t), name
    assert not found[1]["dq"][empty].any()


def test_reasons():
    def reasons(**options):
        return "; ".join(
            torch_attention.reasons(cross_attention.check(*qkv(1, 2, 3, 4), **options))
        )

    assert reasons() == ""
    assert "softcap" in reasons(softcap=2.0)
    assert "seed" in reasons(dropout_p=0.1, seed=3)
    assert reasons(return_lse=True) == "torch's kernels return no lse"
    assert "entropy" in reasons(return_statistics=True)
    float8 = [t.detach().to(torch.float8_e5m2) for t in qkv(1, 2, 3, 4)]
    assert "float8" in torch_attention.reasons(cross_attention.check(*float8))[0]
    q = torch.ones(1, 1, 1, 1)
    far = reserve((1, 1, 3, 1), (2**32, 2**32, 2**30, 1), q)
    assert "32 bits" in torch_attention.reasons(cross_attention.check(q, far, far))[0]
    on_meta = [t.to("meta") for t in qkv(1, 2, 3, 4)]
    meta_mask = masks.causal(3, 4, device="meta")
    assert "meta" in torch_attention.reasons(cross_attention.check(*on_meta, mask=meta_mask))[0]
    with pytest.raises(RuntimeError, match=r"'torch' cannot run this call: .*softcap"):
        cross_attention(*qkv(1, 2, 3, 4), softcap=1.0, backend="torch")


@pytest.mark.slow
@pytest.mark.parametrize(
    "B, H, Nq, n_media, empty_rows, factor",
    [(1, 8, 2048, 33, 0, 6.0), (2, 16, 2048, 8, 32, 3.0), (8, 8, 256, 6, 0, 1.0)],
    ids=["flamingo-32shot", "flamingo-train", "openflamingo-mmc4"],
)
def test_faster_than_a_dense_mask(B, H, Nq, n_media, empty_rows, factor):
    """Forward and backward in turns, processor time of one thread: neighbours disturb it least."""
    mask = media(B, Nq, n_media, empty_rows)
    q, k, v = qkv(B, H, Nq, 64 * n_media, D=64)
    dense, dout = mask.dense(64 * n_media)[:, None], torch.randn_like(q)
    variants = (
        lambda: cross_attention(q, k, v, mask=mask, backend="torch"),
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=dense),
    )
    times = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(7):
        for variant, taken in zip(variants, times, strict=True):
            begin = time.process_time()
            torch.autograd.grad(variant(), (q, k, v), dout)
            taken.append(time.process_time() - begin)
    torch.set_num_threads(threads)
    ours, theirs = (median(taken[1:]) for taken in times)
    assert theirs >= factor * ours, f"{theirs / ours:.2f} times, not {factor}"
