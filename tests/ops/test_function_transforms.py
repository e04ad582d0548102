"""What torch.func can do with the kernels: gradients; what it cannot names the backend that can."""

from __future__ import annotations

import pytest
import torch

from support.modes import modes
from xattn_kernels import (
    attention_weights,
    cross_attention,
    gated_projection,
    gated_residual,
    received_mass,
    topk_attention,
)

pytestmark = pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
OPS = {
    "cross_attention": lambda q, k, v: cross_attention(q, k, v, backend="triton"),
    "attention_weights": lambda q, k, v: attention_weights(q, k, backend="triton"),
    "received_mass": lambda q, k, v: received_mass(q, k, backend="triton"),
    "topk_attention": lambda q, k, v: topk_attention(q, k, v, 4, backend="triton"),
    "gated_residual": lambda q, k, v: gated_residual(k, v, q[0, 0, 0, :1], backend="triton"),
    "gated_projection": lambda q, k, v: gated_projection(
        k, v, q[0, 0, 0, :1], k[0, 0, :16], backend="triton"
    ),
}


def tensors(mode) -> list[torch.Tensor]:
    """q [1, 2, 5, 16], k and v [1, 2, 20, 16]."""
    torch.manual_seed(0)
    return [torch.randn(1, 2, n, 16, device=mode.device) for n in (5, 20, 20)]


@pytest.mark.parametrize("name", OPS)
def test_a_transform_of_the_kernels_is_refused(mode, name):
    op, q_k_v = OPS[name], tensors(mode)
    transforms = {
        "grad": lambda: torch.func.grad(lambda *t: op(*t).sum())(*q_k_v),
        "jvp": lambda: torch.func.jvp(op, tuple(q_k_v), tuple(q_k_v)),
        "vmap": lambda: torch.func.vmap(op)(*(t.expand(2, *t.shape) for t in q_k_v)),
    }
    for transform in transforms.values():
        with pytest.raises(RuntimeError, match="cannot transform the kernels; use backend='eager'"):
            transform()


def test_keys_chosen_in_pytorch_have_gradients_and_no_more(mode):
    def op(*q_k_v: torch.Tensor) -> torch.Tensor:
        return topk_attention(*q_k_v, 4, backend="torch").square().sum()

    leaves = [t.requires_grad_() for t in tensors(mode)]
    wanted = torch.autograd.grad(op(*leaves), leaves)
    found = torch.func.grad(op, argnums=(0, 1, 2))(*tensors(mode))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match="no double backward; use backend='eager'"):
        torch.func.grad(lambda *t: torch.func.grad(op)(*t).sum())(*tensors(mode))
    with pytest.raises(RuntimeError, match="no forward mode; use backend='eager'"):
        torch.func.jvp(op, tuple(tensors(mode)), tuple(tensors(mode)))
    with pytest.raises(RuntimeError, match="cannot map it; use backend='eager'"):
        torch.func.vmap(op)(*(t.expand(2, *t.shape) for t in tensors(mode)))
