"""`cross_attention`: the public op and its backends.

The equations are in `reference.py`, the kernels of the `triton` backend in `triton_kernels/` and
those of the `cuda` backend in `csrc/`: `cross_attention`, `cross_attention_backward` and, for the
gradient of a bias, `bias_gradient`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import reference
from ..core.call import AttentionCall, CrossAttentionCall, CrossAttentionResult
from ..core.dispatch import TRITON_DTYPES, Backend, run, triton_device_reasons
from ..core.kernel_op import kernel_op
from ..core.layout import AttentionResults, empty_results, gradients_of
from ..core.tensor_arguments import check_attention
from ..cuda_kernels import launch as cuda
from ..torch_kernels import cross_attention as torch_attention

attend = kernel_op(
    "cross_attention",
    CrossAttentionCall,
    AttentionResults,
    lambda call, backend: empty_results(call),
    gradients=gradients_of("q", "k", "v", "bias", "scale_tensor"),
    saved=("out", "lse", "lse_low", "entropy"),
    constant=lambda call, needs: ("lse_low", "max_probability"),
)


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask=None,
    bias: Tensor | None = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    return_statistics: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
    validate: bool = False,
) -> Tensor | CrossAttentionResult:
    """Attention of `q` over `k`, `v` with any mask, without the score matrix.

        s   = softcap(scale * q k^T) + bias        over the keys that `mask` allows
        p   = softmax(s)        out = dropout(p) v        lse = log(sum(exp(s)))

    Inputs are not cast, under autocast neither; only in a backward that itself runs under autocast,
    against PyTorch's advice, PyTorch casts the products of the eager backend. float32 products are
    IEEE's unless torch's setting for matmul allows TF32; the cuda backend always takes three TF32
    products, which leave out what is below 2**-22 of a term. Second derivatives need
    backend="eager".
    PyTorch's own kernels, the `torch` backend, have no softcap, dropout by seed, lse or statistics;
    some of them read NaN in a query as an output of 0.
    A query without any allowed key gets out = 0, lse = -inf and zero gradients on every backend.
    Keys before the first or after the last interval of their batch element are never used, so
    padding may hold anything there, NaN included.

    Args:
        q: [B, Hq, Nq, D], float32, float16 or bfloat16 (float64 on the eager and torch backends);
            any strides with a contiguous last dimension, an expanded batch included.
        k: [B, Hkv, Nk, D]; Hq must be a multiple of Hkv (grouped-query attention).
        v: [B, Hkv, Nk, Dv].
        mask: a `KeyInterval`, a bool tensor (True = attend) that broadcasts to [B, Hq, Nq, Nk],
            or None.
        bias: floating-point tensor that broadcasts to [B, Hq, Nq, Nk], added to the scores; it is
            never expanded, and its gradient has its own shape.
        scale: float, or a tensor with 1 or Hq values that may require grad; D ** -0.5 by default.
        softcap: c in `c * tanh(scale * q k^T / c)`, or None.
        dropout_p: probability in [0, 1) of dropping an attention weight.
        seed: int or one int64 value on the device of q; the same seed drops the same weights on
            every backend that has dropout. None draws one from torch's generator.
        return_lse: also return lse [B, Hq, Nq] (float32, natural logarithm, differentiable).
        return_statistics: also return lse, the entropy of each row in nats (differentiable) and
            its largest probability (not differentiable), before dropout.
        deterministic: bitwise reproducible gradients; by default what
            `torch.use_deterministic_algorithms` says. Today's kernels are always deterministic.
        backend: "triton", "cuda", "torch" or "eager"; None takes the first but eager that can run.
        validate: check the range of a KeyInterval on a GPU too, which waits for the device; on
            the CPU it is always checked, except under torch.compile. Unchecked, bounds are clamped
            to [0, Nk].

    Returns:
        out [B, Hq, Nq, Dv] in the dtype of q, or a `CrossAttentionResult` when lse or statistics
        are asked for.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype, device or range.
        RuntimeError: the named backend, or every backend, has reasons against this call.

    Source: Vaswani et al., "Attention is all you need" (2017); the tiling is that of Dao,
    "FlashAttention-2" (2023).
    """
    call = check_attention(
        q,
        k,
        v,
        mask=mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        seed=seed,
        return_lse=return_lse,
        return_statistics=return_statistics,
        deterministic=deterministic,
        validate=validate,
    )
    result = run("cross_attention", BACKENDS, call, backend)
    return result if call.return_lse else result.out


def kernel_reasons(call: AttentionCall) -> list[str]:
    """Why no kernel can run this call."""
    reasons = []
    if call.q.dtype not in TRITON_DTYPES:
        reasons.append(f"dtype {call.q.dtype} is not float32, float16 or bfloat16")
    if max(call.D, call.Dv) > 256:
        reasons.append(f"head width {max(call.D, call.Dv)} > 256")
    if min(call.D, call.Dv) < 1:
        reasons.append("Dv is 0")
    for name, t, more in (("bias", call.bias, ()), ("scale", call.scale_tensor, (torch.float64,))):
        if t is not None and t.dtype not in TRITON_DTYPES + more:
            reasons.append(f"the dtype of {name}, {t.dtype}, is none that the kernels read")
    return reasons


def triton_reasons(call: AttentionCall) -> list[str]:
    """Why the Triton kernels cannot run this call."""
    return triton_device_reasons(call.device) + kernel_reasons(call)


def cuda_reasons(call: AttentionCall) -> list[str]:
    """Why the CUDA kernels cannot run this call."""
    reasons = cuda.device_reasons(call.device) + kernel_reasons(call)
    if reasons or torch.compiler.is_compiling():  # a trace would be held to fewer rows
        return reasons
    rows, most = max(call.Nq * call.group, call.Nk), cuda.extension().MOST_ATTENTION_ROWS
    return [f"{rows} queries of a key head, or keys, are more than {most}"] if rows > most else []


def run_kernels(call: CrossAttentionCall, backend: str) -> CrossAttentionResult:
    """What the kernels of a backend make of the call."""
    results = attend(call, backend)
    lse = results.lse if call.return_lse else None
    return CrossAttentionResult(results.out, lse, results.entropy, results.max_probability)


BACKENDS = (
    Backend("triton", triton_reasons, partial(run_kernels, backend="triton")),
    Backend("cuda", cuda_reasons, partial(run_kernels, backend="cuda")),
    Backend("torch", torch_attention.reasons, torch_attention.cross_attention),
    Backend("eager", reference.reasons, reference.cross_attention, by_name=True),
)
cross_attention.backends, cross_attention.check = BACKENDS, check_attention
