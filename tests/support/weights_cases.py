"""Named calls of `attention_weights`, and their comparison with the reference in float64."""

from __future__ import annotations

import torch

from support.numerics import assert_as_accurate
from xattn_kernels import KeyInterval, attention_weights, cross_attention

B, HQ, HKV, NQ, NK, D = 2, 2, 1, 19, 37, 24


def interval():
    """Random intervals, some of them empty, one of them everything."""
    start = torch.randint(0, NK, (B, NQ), dtype=torch.int32)
    stop = (start + torch.randint(-9, 25, (B, NQ), dtype=torch.int32)).clamp(0, NK)
    start[0, 0], stop[0, 0] = 0, NK
    return KeyInterval(start, stop)


def some_rows_empty(*shape):
    mask = torch.rand(shape) < 0.5
    mask[..., 1, :] = False
    return mask


CASES = {
    "plain": lambda: {},
    "interval": lambda: {"mask": interval()},
    "padding": lambda: {"mask": torch.arange(NK) < torch.tensor([NK, 0]).view(B, 1, 1, 1)},
    "mask": lambda: {"mask": some_rows_empty(B, 1, NQ, NK)},
    "mask_per_head": lambda: {"mask": some_rows_empty(HQ, NQ, NK)},
    "bias": lambda: {"bias": torch.randn(HQ, NQ, NK)},
    "bias_of_keys": lambda: {"bias": torch.randn(B, 1, 1, NK)},
    "bias_infinite": lambda: {
        "bias": torch.zeros(NQ, NK).masked_fill(some_rows_empty(NQ, NK).logical_not(), -torch.inf),
    },
    "bias_lowest": lambda: {"bias": torch.randn(NQ, NK).index_fill(0, torch.arange(0, 9), -1e9)},
    "mask_and_bias": lambda: {"mask": some_rows_empty(B, 1, NQ, NK), "bias": torch.randn(2, 1, NK)},
    "softcap": lambda: {"softcap": 1.5},
    "scale": lambda: {"scale": 0.3},
    "scale_tensor": lambda: {"scale": 0.1 + 0.2 * torch.rand(1)},
    "scale_per_head": lambda: {"scale": 0.1 + 0.2 * torch.rand(HQ)},
    "dropout": lambda: {"dropout_p": 0.3, "seed": 7},
    "everything": lambda: {
        "mask": interval(), "bias": torch.randn(B, HQ, NQ, NK), "softcap": 3.0,
        "scale": 0.1 + 0.2 * torch.rand(HQ), "dropout_p": 0.2, "seed": 2**40 + 1,
    },
}  # fmt: skip


def run(tensors, options, backend, dtype):
    """The weights and every gradient, by name."""

    def leaf(t):
        is_float = isinstance(t, torch.Tensor) and t.is_floating_point()
        return t.detach().to(dtype).requires_grad_() if is_float else t

    named = {name: leaf(t) for name, t in (tensors | options).items()}
    if "lse" in named and dtype != torch.float64:
        named["lse"] = tensors["lse"].detach().float().requires_grad_()
    weights = attention_weights(**named, backend=backend)
    torch.manual_seed(1)
    weights.backward(torch.randn(weights.shape).to(dtype))
    leaves = {n: t for n, t in named.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    return {"weights": weights} | {f"d{name}": t.grad for name, t in leaves.items()}


def assert_matches_reference(tensors, options, backend, dtype):
    truth = run(tensors, options, "eager", torch.float64)
    eager, ours = (run(tensors, options, name, dtype) for name in ("eager", backend))
    for name, value in truth.items():
        size = terms_of_dscale(tensors, options) if name == "dscale" else 0.0
        assert_as_accurate(ours[name], eager[name], value, name, size=size)


def terms_of_dscale(tensors, options):
    """The size of what is summed in dscale, which may cancel: terms of one row share an error."""
    bias = options.get("bias", torch.zeros(())).expand(B, HQ, NQ, NK)
    ds = run(tensors, options | {"bias": bias}, "eager", torch.float64)["dbias"]
    qk = tensors["q"].double() @ tensors["k"].double().repeat_interleave(HQ // HKV, 1).mT
    return (ds * qk).abs().sum(-1).square().sum().sqrt().item()


def make(dtype=torch.float32, Hq=HQ, Hkv=HKV):
    """q [B, Hq, NQ, D] and k [B, Hkv, NK, D], exact in `dtype`, in the memory order of a module."""
    shapes = {"q": (B, NQ, Hq, D), "k": (B, NK, Hkv, D)}
    return {name: torch.randn(s).to(dtype).float().transpose(1, 2) for name, s in shapes.items()}


def exact_in(dtype, t):
    """A float tensor with numbers that `dtype` has; anything else as it is."""
    is_float = isinstance(t, torch.Tensor) and t.is_floating_point()
    return t.to(dtype).float() if is_float else t


def assert_case(case, backend, dtype, lse, average):
    tensors = make(dtype)
    options = {name: exact_in(dtype, t) for name, t in CASES[case]().items()}
    if lse:
        # not quite the softmax's own, so that a gradient lost in it would show
        exact = cross_attention(
            tensors["q"], tensors["k"], tensors["k"], return_lse=True, backend="eager", **options
        ).lse
        tensors["lse"] = exact + 0.1 * torch.randn_like(exact)
    assert_matches_reference(tensors, options | {"average_heads": average}, backend, dtype)
