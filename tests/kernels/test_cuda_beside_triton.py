"""The two independent implementations on the same inputs: dropout bits and chosen keys."""

from __future__ import annotations

import pytest
import torch

from ops.test_topk_attention import quantised
from support.modes import enter
from support.numerics import assert_as_accurate
from xattn_kernels import cross_attention, topk_attention

PAIRS = [
    pytest.param("sm_80", "cuda_sm_80", marks=pytest.mark.emulated),
    pytest.param("sm_90", "cuda_sm_90", marks=pytest.mark.emulated),
    pytest.param("gpu", "cuda_gpu", marks=pytest.mark.gpu),
]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
in_pairs = pytest.mark.parametrize(("triton", "cuda"), PAIRS)


def on_both(triton: str, cuda: str, call):
    """`call(backend, device)` by each."""
    found = []
    for name, backend in ((triton, "triton"), (cuda, "cuda")):
        with enter(name) as mode:
            found.append(call(backend, mode.device))
    return found


@in_pairs
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1 - 2**-33])
def test_dropout_bits(triton, cuda, dropout_p):
    """With v the identity out is what dropout keeps."""

    def kept(backend, device):
        g = torch.Generator().manual_seed(0)
        q, k = (torch.randn(2, 3, 40, 16, generator=g).to(device, torch.float16) for _ in "qk")
        v = torch.eye(40, device=device, dtype=torch.float16).expand(2, 3, 40, 40)
        seed = torch.tensor([-(2**40) - 7], device=device)
        return cross_attention(q, k, v, dropout_p=dropout_p, seed=seed, backend=backend) != 0

    assert torch.equal(*on_both(triton, cuda, kept))


def normal(device: str) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, n, 64, generator=g).to(device) for n in (40, 300, 300)]


@in_pairs
@pytest.mark.parametrize("numbers", [normal, quantised])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
def test_chosen_keys(triton, cuda, dtype, numbers):
    """The same, or keys of the same score but for its rounding; scores that are exact have none."""
    q, k, v = (t.to(dtype) for t in numbers("cpu"))

    def chosen(backend, device):
        given = (t.to(device) for t in (q, k, v))
        found = topk_attention(*given, 17, return_indices=True, backend=backend)
        return found.indices.long().cpu()

    ours, other = on_both(triton, cuda, chosen)
    if numbers is quantised:
        assert torch.equal(ours, other)
    scores = q.double() @ k.double().mT / 8
    ours, other = (scores.gather(3, keys).sort(3).values for keys in (ours, other))
    assert_as_accurate(ours, other, other, rounded_to=torch.float32)
