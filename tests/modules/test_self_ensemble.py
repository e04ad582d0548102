"""The chunked loss of two heads against that of their whole logits, and what it never makes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from support.largest_tensor import LargestTensor
from support.numerics import assert_as_accurate
from xattn_kernels import SelfEnsemble

pytestmark = pytest.mark.usefixtures("seed")

B, N, DIM, FUSED, VOCAB, IGNORED = 2, 11, 8, 6, 37, -100


def ensemble(**options) -> SelfEnsemble:
    options = dict(dim=DIM, dim_fused=FUSED, vocab_size=VOCAB, chunk_rows=5) | options
    return SelfEnsemble(**options)


def call(dtype=torch.float32, n=N, batch=B):
    h_gpt, h_fuse = (torch.randn(batch, n, width, dtype=dtype) for width in (DIM, FUSED))
    target = torch.randint(VOCAB, (batch, n))
    target[:, 2:4] = IGNORED
    return h_gpt.requires_grad_(), h_fuse.requires_grad_(), target


def whole(module, h_gpt, h_fuse, target, ignore_index=IGNORED, reduction="mean"):
    """The loss from all logits at once, as torch has it."""
    heads = (module.W_G, h_gpt), (module.W_fuse, h_fuse)
    logits = sum(F.linear(h, head.weight, head.bias) for head, h in heads)
    options = dict(ignore_index=ignore_index, reduction=reduction)
    return F.cross_entropy(logits.transpose(1, 2), target, **options)


def results(loss, module, h_gpt, h_fuse, **weighing) -> dict:
    """The loss and every gradient there is, by name."""
    leaves = {"h_gpt": h_gpt, "h_fuse": h_fuse} | dict(module.named_parameters())
    leaves = {n: t for n, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), **weighing)
    return {"loss": loss.detach()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def assert_same(module, h_gpt, h_fuse, target, **options) -> None:
    losses = (
        module.loss(h_gpt, h_fuse, target, **options),
        whole(module, h_gpt, h_fuse, target, **options),
    )
    weighing = dict(grad_outputs=torch.randn_like(losses[0]))
    found, expected = (results(loss, module, h_gpt, h_fuse, **weighing) for loss in losses)
    for name, truth in expected.items():
        assert_as_accurate(found[name], truth, truth, name)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_rows", [1, 5, 22, 1000])
@pytest.mark.parametrize("bias", [False, True])
def test_is_that_of_all_logits(reduction, chunk_rows, bias):
    module = ensemble(chunk_rows=chunk_rows, bias=bias, dtype=torch.float64)
    assert_same(module, *call(torch.float64), reduction=reduction)


def test_another_ignored_word():
    h_gpt, h_fuse, target = call(torch.float64)
    target = target.clamp(min=3)
    assert_same(ensemble(dtype=torch.float64), h_gpt, h_fuse, target, ignore_index=3)


@pytest.mark.parametrize(
    "frozen", ["W_G.weight", "W_fuse.weight", "W_G.weight W_G.bias", "W_fuse.bias"]
)
def test_frozen_heads_have_no_gradient(frozen):
    module = ensemble(bias=True, dtype=torch.float64)
    for name in frozen.split():
        module.get_parameter(name).requires_grad_(False)
    h_gpt, h_fuse, target = call(torch.float64)
    assert_same(module, h_gpt, h_fuse, target)
    module.loss(h_gpt.detach(), h_fuse, target).backward()
    unset = [name for name, p in module.named_parameters() if p.grad is None]
    assert sorted(unset) == sorted(frozen.split()) and h_gpt.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coarser_dtypes(dtype):
    exact = ensemble(bias=True, dtype=torch.float64)
    module = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict(module.state_dict())
    *streams, target = call(dtype)
    ours = results(module.loss(*streams, target), module, *streams)
    eager = results(whole(module, *streams, target), module, *streams)
    streams = [h.detach().double().requires_grad_() for h in streams]
    truth = results(whole(exact, *streams, target), exact, *streams)
    assert ours["loss"].dtype == torch.float32
    eager["loss"] = eager["loss"].float()
    for name, expected in truth.items():
        assert_as_accurate(ours[name], eager[name], expected, name, rounded_to=dtype)


def saved_bytes(loss) -> int:
    """Of what the graph of `loss()` keeps for its backward."""
    total = 0

    def count(t):
        nonlocal total
        total += t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        loss()
    return total


def test_logits_of_all_rows_never_exist():
    rows, vocab, chunk = 400, 500, 20
    module = ensemble(vocab_size=vocab, chunk_rows=chunk)
    h_gpt, h_fuse, target = call(n=rows // B)
    sizes = {}
    for loss in (module.loss, lambda *a: whole(module, *a)):
        with LargestTensor() as largest:
            loss(h_gpt, h_fuse, target).backward()
        kept = saved_bytes(lambda loss=loss: loss(h_gpt, h_fuse, target))
        sizes[loss] = largest.nbytes, kept
    (ours, kept), (theirs, all_kept) = sizes.values()
    assert ours == 4 * chunk * vocab and theirs == 4 * rows * vocab
    assert kept < 4 * rows * vocab // 4 < all_kept


def test_gradients_by_differences():
    h_gpt, h_fuse, target = call(torch.float64, n=3, batch=1)
    module = ensemble(chunk_rows=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: module.loss(a, b, target), (h_gpt, h_fuse))
    loss = module.loss(h_gpt, h_fuse, target)
    (dh,) = torch.autograd.grad(loss, h_gpt, create_graph=True)
    with pytest.raises(RuntimeError, match="take F.cross_entropy of the logits for second"):
        dh.sum().backward()


def test_no_row_counts():
    h_gpt, h_fuse, target = call()
    module, target = ensemble(), target.fill_(IGNORED)
    loss = module.loss(h_gpt, h_fuse, target)
    loss.backward()
    assert loss.isnan() and not h_gpt.grad.any() and not module.W_G.weight.grad.any()
    assert module.loss(h_gpt, h_fuse, target, reduction="sum") == 0


@pytest.mark.parametrize("shape", [(1, 5), (2, 1), (2, 0), (0, 5)], ids=str)
def test_sizes_at_the_edge(shape):
    module, (h_gpt, h_fuse, target) = ensemble(), call(n=shape[1], batch=shape[0])
    loss = module(h_gpt, h_fuse, target, reduction="none")
    loss.sum().backward()
    assert loss.shape == shape and module.W_fuse.weight.grad.isfinite().all()
    assert module(h_gpt, h_fuse).shape == (*shape, VOCAB)


def test_strided_streams_and_logits():
    module, (h_gpt, h_fuse, target) = ensemble(dtype=torch.float64), call(torch.float64)
    shifted = h_gpt[:, :-1], h_fuse[:, :-1], target[:, 1:]
    truth = whole(module, *shifted)
    assert_as_accurate(module(*shifted).detach(), truth, truth)
    logits = module.logits(h_gpt, h_fuse)
    expected = h_gpt @ module.W_G.weight.mT + h_fuse @ module.W_fuse.weight.mT
    assert_as_accurate(logits, expected, expected)


def test_state_dict_and_a_head_shared_with_a_language_model():
    module, other, (h_gpt, h_fuse, target) = ensemble(), ensemble(), call()
    assert list(module.state_dict()) == ["W_G.weight", "W_fuse.weight"]
    other.load_state_dict(copy.deepcopy(module.state_dict()), strict=True)
    assert torch.equal(other(h_gpt, h_fuse, target), module(h_gpt, h_fuse, target))
    words = nn.Embedding(VOCAB, DIM)
    module.W_G.weight = words.weight
    module(h_gpt, h_fuse, target).backward()
    assert words.weight.grad.any()


def test_autocast():
    module, (h_gpt, h_fuse, target) = ensemble(bias=True), call()
    expected = results(module.loss(h_gpt, h_fuse, target), module, h_gpt, h_fuse)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.loss(h_gpt, h_fuse, target)
    found = results(loss, module, h_gpt, h_fuse)
    assert found["loss"].dtype == torch.float32 and 0 < (loss - expected["loss"]).abs() < 0.05
    for name, truth in expected.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - truth).abs().max() < 0.05 * truth.abs().max(), name


def test_compiles_in_one_graph():
    module, (h_gpt, h_fuse, target) = ensemble(bias=True), call()
    expected = results(module(h_gpt, h_fuse, target), module, h_gpt, h_fuse)
    sizes = []

    def note(graph, inputs):
        values = (node.meta.get("val") for node in graph.graph.nodes)
        sizes.extend(t.numel() for t in values if isinstance(t, torch.Tensor))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=note, bw_compiler=note)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    found = results(compiled(h_gpt, h_fuse, target), module, h_gpt, h_fuse)
    assert max(sizes) == VOCAB * DIM < B * N * VOCAB  # the gradient of a head
    for name, truth in expected.items():
        torch.testing.assert_close(found[name], truth)


G, F_, T = torch.zeros(B, N, DIM), torch.zeros(B, N, FUSED), torch.zeros(B, N).long()
WRONG = {
    "vocab_size must be at least 1, got 0": lambda: ensemble(vocab_size=0),
    "chunk_rows must be an int, got float": lambda: ensemble(chunk_rows=2.0),
    "bias must be a bool, got int": lambda: ensemble(bias=1),
    r"h_gpt must be \[B, N, dim\] with dim = 8": lambda: ensemble()(F_, F_),
    r"h_fuse must be \[B, N, dim_fused\] with dim_fused = 6": lambda: ensemble()(G, G, T),
    r"h_gpt and h_fuse must share \[B, N\], got \[1": lambda: ensemble()(G[:1], F_, T),
    "h_gpt must have the dtype of the weights": lambda: ensemble()(G.double(), F_.double()),
    "target must be an int64 tensor, got a torch.int32": lambda: ensemble()(G, F_, T.int()),
    r"target must be \[B, N\] = \[2, 11\], got \[2, 10\]": lambda: ensemble()(G, F_, T[:, 1:]),
    "target must be from 0 to 36, or ignore_index = -1, got 37": lambda: ensemble()(
        G, F_, T + VOCAB, ignore_index=-1
    ),
    "ignore_index must be an int, got NoneType": lambda: ensemble()(G, F_, T, ignore_index=None),
    "reduction must be one of 'mean', 'sum'": lambda: ensemble()(G, F_, T, reduction="max"),
    "reduction needs a target": lambda: ensemble()(G, F_, reduction="sum"),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()
