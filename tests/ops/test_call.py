"""Bad input: an error that names the argument, what it was and what is allowed."""

from __future__ import annotations

import pytest
import torch

from xattn_kernels import KeyInterval, cross_attention

B, HQ, HKV, NQ, NK, D = 2, 4, 2, 3, 5, 16


def good(**changes) -> dict:
    tensors = dict(
        q=torch.zeros(B, HQ, NQ, D), k=torch.zeros(B, HKV, NK, D), v=torch.zeros(B, HKV, NK, D)
    )
    return tensors | changes


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def interval(start=0, stop=NK, shape=(B, NQ)) -> KeyInterval:
    return KeyInterval(*(torch.full(shape, n, dtype=torch.int32) for n in (start, stop)))


WIDE = torch.zeros(B, HKV, NK, 2 * D)[..., ::2]
BAD = {
    "q_rank": (
        dict(q=torch.zeros(HQ, NQ, D)),
        ValueError,
        r"q must have 4 dimensions \[B, Hq, Nq, D\], got shape \(4, 3, 16\)",
    ),
    "k_rank": (
        dict(k=torch.zeros(1, B, HKV, NK, D)),
        ValueError,
        r"k must have 4 dimensions .*\(1, 2, 2, 5, 16\)",
    ),
    "v_rank": (
        dict(v=torch.zeros(NK, D)),
        ValueError,
        r"v must have 4 dimensions .*Dv\], got shape \(5, 16\)",
    ),
    "q_list": (dict(q=[1.0]), TypeError, "q must be a tensor, got list"),
    "q_int": (
        dict(q=torch.zeros(B, HQ, NQ, D, dtype=torch.int64)),
        TypeError,
        "q must be a floating-point tensor, got torch.int64",
    ),
    "dtypes": (
        dict(k=torch.zeros(B, HKV, NK, D).half()),
        TypeError,
        "share one dtype, got q torch.float32 and k torch.float16",
    ),
    "v_dtype": (
        dict(v=torch.zeros(B, HKV, NK, D).double()),
        TypeError,
        "share one dtype, got q torch.float32 and v torch.float64",
    ),
    "devices": (
        dict(k=torch.zeros(B, HKV, NK, D, device="meta")),
        ValueError,
        "on one device, got q on cpu and k on meta",
    ),
    "v_device": (
        dict(v=torch.zeros(B, HKV, NK, D, device="meta")),
        ValueError,
        "on one device, got q on cpu and v on meta",
    ),
    "k_strided": (
        dict(k=WIDE),
        ValueError,
        r"last dimension of k must be contiguous .* got stride 2; call .contiguous",
    ),
    "q_transposed": (
        dict(q=torch.zeros(B, HQ, D, NQ).mT),
        ValueError,
        "last dimension of q must be contiguous .*got stride 3",
    ),
    "batch": (
        dict(k=torch.zeros(1, HKV, NK, D)),
        ValueError,
        "share the batch size, got q 2 and k 1",
    ),
    "heads": (
        dict(q=torch.zeros(B, 3, NQ, D)),
        ValueError,
        "multiple of the key heads, got Hq=3 and Hkv=2",
    ),
    "no_heads": (
        dict(k=torch.zeros(B, 0, NK, D)),
        ValueError,
        "multiple of the key heads, got Hq=4 and Hkv=0",
    ),
    "widths": (
        dict(k=torch.zeros(B, HKV, NK, 8)),
        ValueError,
        "share a head width D >= 1, got 16, 8",
    ),
    "no_width": (
        dict(q=torch.zeros(B, HQ, NQ, 0), k=torch.zeros(B, HKV, NK, 0)),
        ValueError,
        "head width D >= 1, got 0, 0",
    ),
    "v_length": (
        dict(v=torch.zeros(B, HKV, NK + 1, D)),
        ValueError,
        r"share \[B, Hkv, Nk\], got \(2, 2, 5\) and \(2, 2, 6\)",
    ),
    "v_heads": (dict(v=torch.zeros(B, HQ, NK, D)), ValueError, r"share \[B, Hkv, Nk\]"),
    "interval_rows": (
        dict(mask=interval(shape=(B, NQ + 1))),
        ValueError,
        r"start \[2, 4\] of the KeyInterval does not .* \[B, Nq\] = \[2, 3\]",
    ),
    "interval_batch": (
        dict(mask=interval(shape=(3, NQ))),
        ValueError,
        r"start \[3, 3\] .* \[B, Nq\] = \[2, 3\]",
    ),
    "interval_device": (
        dict(mask=interval().to("meta")),
        ValueError,
        "mask must be on the device of q, cpu, got meta",
    ),
    "start_below_0": (
        dict(mask=interval(start=-1)),
        ValueError,
        "batch 0, query 0 is -1 <= j < 5; with 5 keys it needs start >= 0",
    ),
    "stop_above_Nk": (
        dict(mask=interval(stop=6)),
        ValueError,
        "is 0 <= j < 6; with 5 keys it needs start >= 0 and stop <= 5",
    ),
    "mask_type": (
        dict(mask=[True]),
        TypeError,
        "mask must be a KeyInterval, a bool tensor or None, got list",
    ),
    "mask_dtype": (
        dict(mask=torch.zeros(NQ, NK)),
        TypeError,
        "mask as a tensor must be bool .* got torch.float32; pass additive .* bias",
    ),
    "mask_shape": (
        dict(mask=torch.ones(NQ, NK + 1, dtype=torch.bool)),
        ValueError,
        r"mask must broadcast to .*Nk\] = \[2, 4, 3, 5\], got shape \[3, 6\]",
    ),
    "mask_heads": (
        dict(mask=torch.ones(B, HKV, 1, 1, dtype=torch.bool)),
        ValueError,
        "mask must broadcast",
    ),
    "mask_rank": (
        dict(mask=torch.ones(1, 1, 1, 1, 1, dtype=torch.bool)),
        ValueError,
        "mask must broadcast",
    ),
    "mask_device": (
        dict(mask=torch.ones(NQ, NK, dtype=torch.bool, device="meta")),
        ValueError,
        "mask must be on the device of q, cpu, got meta",
    ),
    "bias_shape": (
        dict(bias=torch.zeros(NK, NQ)),
        ValueError,
        r"bias must broadcast to .*Nk\] = \[2, 4, 3, 5\], got shape \[5, 3\]",
    ),
    "bias_int": (
        dict(bias=torch.zeros(NQ, NK, dtype=torch.int32)),
        TypeError,
        "bias must be a floating-point tensor, got torch.int32",
    ),
    "bias_type": (dict(bias=0.5), TypeError, "bias must be a floating-point tensor, got float"),
    "bias_device": (
        dict(bias=torch.zeros(NQ, NK, device="meta")),
        ValueError,
        "bias must be on the device of q, cpu, got meta",
    ),
    "scale_shape": (
        dict(scale=torch.ones(3)),
        ValueError,
        r"scale must be a scalar or have shape \[Hq\] = \[4\], got \[3\]",
    ),
    "scale_int": (
        dict(scale=torch.ones(4, dtype=torch.int64)),
        TypeError,
        "scale must be a float or a floating-point tensor, got torch.int64",
    ),
    "scale_device": (
        dict(scale=torch.ones(4, device="meta")),
        ValueError,
        "scale must be on the device of q, cpu, got meta",
    ),
    "softcap_0": (
        dict(softcap=0.0),
        ValueError,
        "softcap must be None or a positive number, got 0.0",
    ),
    "softcap_infinite": (
        dict(softcap=float("inf")),
        ValueError,
        "softcap must be None or a positive number, got inf",
    ),
    "dropout_1": (dict(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "dropout_below_0": (
        dict(dropout_p=-0.1),
        ValueError,
        r"dropout_p must be in \[0, 1\), got -0.1",
    ),
    "dropout_nan": (
        dict(dropout_p=float("nan")),
        ValueError,
        r"dropout_p must be in \[0, 1\), got nan",
    ),
    "seed_shape": (
        dict(dropout_p=0.1, seed=torch.zeros(2, dtype=torch.int64)),
        ValueError,
        r"seed must be .* got torch.int64 of shape \[2\]",
    ),
    "seed_dtype": (
        dict(dropout_p=0.1, seed=torch.zeros(())),
        ValueError,
        "seed must be .* got torch.float32",
    ),
    "backend": (
        dict(backend="flash"),
        ValueError,
        "unknown backend 'flash'; there are 'triton', 'cuda', 'torch', 'eager'",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        cross_attention(**good(**changes))


def test_the_good_input_is_good():
    assert cross_attention(**good(), backend="eager").shape == (B, HQ, NQ, D)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_interval_of_another_dtype(dtype):
    with pytest.raises(TypeError, match=f"stop must be an int32 tensor, not a {dtype} tensor"):
        KeyInterval(int32(0), torch.ones(1, dtype=dtype))


def test_interval_is_checked_on_a_device_only_when_asked():
    """The meta device stands for a GPU: looking at its values fails, so nothing may look."""
    tensors = {n: t.to("meta") for n, t in good().items()}
    outside = interval(stop=99).to("meta")
    cross_attention.check(**tensors, mask=outside)
    with pytest.raises((NotImplementedError, RuntimeError)):
        cross_attention.check(**tensors, mask=outside, validate=True)


@pytest.mark.gpu
def test_interval_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tensors = {n: t.cuda() for n, t in good().items()}
    outside = interval(start=-3, stop=99).to("cuda")
    clamped = cross_attention(**tensors, mask=outside)
    assert torch.equal(clamped, cross_attention(**tensors))
    with pytest.raises(ValueError, match="with 5 keys it needs start >= 0"):
        cross_attention(**tensors, mask=outside, validate=True)


@pytest.mark.parametrize("seed", [5, torch.tensor(5), torch.tensor([5])])
def test_seed_in_each_form(seed):
    tensors = good(v=torch.rand(B, HKV, NK, D))
    expected = cross_attention(**tensors, dropout_p=0.5, seed=5, backend="eager")
    assert torch.equal(
        cross_attention(**tensors, dropout_p=0.5, seed=seed, backend="eager"), expected
    )


def test_without_a_seed_torch_seeds():
    tensors = good(v=torch.rand(B, HKV, NK, D))

    def draw():
        return cross_attention(**tensors, dropout_p=0.5, backend="eager")

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), first) and not torch.equal(second, first)


@pytest.mark.parametrize("shape", [(), (1,), (HQ,)])
def test_scale_in_each_form(shape):
    tensors = {n: torch.randn_like(t) for n, t in good().items()}
    expected = cross_attention(**tensors, scale=0.5, backend="eager")
    found = cross_attention(**tensors, scale=torch.full(shape, 0.5), backend="eager")
    assert torch.equal(found, expected)
