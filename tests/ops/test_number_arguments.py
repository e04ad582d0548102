"""Numbers, seeds and names of a wrong type or range are refused by name, before anything runs."""

import re

import pytest
import torch

from support.modes import modes
from xattn_kernels import (
    MultiheadAttention,
    cross_attention,
    explain,
    replace_multihead_attention,
)

Q = torch.zeros(1, 2, 3, 16)
SEED = "seed must be an int of 64 bits or one int64 value on cpu, got "
REFUSED = [
    (dict(scale="1"), TypeError, "scale must be a number or a floating-point tensor, got str '1'"),
    (dict(scale=True), TypeError, "scale must be a number or a floating-point tensor, got bool"),
    (dict(softcap=True), TypeError, "softcap must be None or a positive number, got bool True"),
    (dict(softcap=torch.ones(())), TypeError, "softcap must be None or a positive number, got Ten"),
    (dict(dropout_p="a"), TypeError, "dropout_p must be a number in [0, 1), got str 'a'"),
    (dict(dropout_p=torch.tensor(0.1)), TypeError, "dropout_p must be a number in [0, 1), got Ten"),
    (dict(seed="x"), TypeError, SEED + "str 'x'"),
    (dict(dropout_p=0.1, seed=1.5), TypeError, SEED + "float 1.5"),
    (dict(dropout_p=0.1, seed=2**63), ValueError, SEED + str(2**63)),
    (dict(mask=torch.zeros(3, 3, dtype=torch.uint8)), TypeError, "call .bool() on it"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=lambda x: str(x)[:30])
def test_refused(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        cross_attention(Q, Q, Q, backend="eager", **options)


def test_numbers_of_numpy():
    np = pytest.importorskip("numpy")
    options = dict(scale=np.float32(0.5), dropout_p=np.float32(0.5), softcap=np.float32(2))
    x = cross_attention.check(Q, Q, Q, **options, seed=np.int64(3))
    assert {type(n) for n in (x.scale, x.dropout_p, x.softcap)} == {float}
    out = cross_attention(Q, Q, Q, **options, seed=np.int64(3), backend="eager")
    assert out.isfinite().all()


@pytest.mark.parametrize("mode", modes("interpreter", "sm_90", "gpu"), indirect=True)
def test_numbers_of_numpy_reach_the_kernels(mode):
    np = pytest.importorskip("numpy")
    q = torch.randn(1, 2, 3, 16, device=mode.device, dtype=torch.float16)
    outs = []
    for number in (float, np.float32):
        options = dict(scale=number(0.5), dropout_p=number(0.5), softcap=number(2))
        outs.append(cross_attention(q, q, q, **options, seed=3, backend="triton"))
    assert torch.equal(*outs)


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
def test_every_seed_of_64_bits(seed):
    assert cross_attention(Q, Q, Q, dropout_p=0.5, seed=seed, backend="eager").isfinite().all()


def test_modules_and_tools():
    with pytest.raises(
        ValueError, match="backend must be None or one of 'triton', 'cuda', 'torch', 'eager'"
    ):
        MultiheadAttention(16, 4, backend="zz")
    model = torch.nn.TransformerDecoderLayer(16, 4)
    with pytest.raises(ValueError, match="got 'zz'"):
        replace_multihead_attention(model, backend="zz")
    assert type(model.self_attn) is torch.nn.MultiheadAttention
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        replace_multihead_attention("x")
    with pytest.raises(TypeError, match=r"MultiheadAttention has explain\(\) of its own"):
        explain(MultiheadAttention(16, 4), Q)
