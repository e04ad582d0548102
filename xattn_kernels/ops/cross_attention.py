"""`cross_attention`: the public op, its autograd Function and its custom ops.

The equations are in `reference.py`, the kernels of the `triton` backend in `triton_kernels/` and
those of the `cuda` backend in `csrc/`: `cross_attention`, `cross_attention_backward` and, for the
gradient of a bias, `bias_gradient`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import reference
from ..core.call import CrossAttentionInputs, CrossAttentionResult, check_inputs
from ..core.dispatch import (
    TRITON_DTYPES,
    Backend,
    allow_tf32,
    run,
    triton_device_reasons,
)
from ..core.kernel_op import apart, refuse_double_backward
from ..core.layout import empty_rows
from ..cuda_kernels import launch as cuda
from ..torch_kernels import cross_attention as torch_attention


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
    x = check_inputs(
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
    result = run("cross_attention", BACKENDS, x, backend)
    return result if x.return_lse else result.out


def kernel_reasons(x: CrossAttentionInputs) -> list[str]:
    """Why no kernel can run this call."""
    found = []
    if x.q.dtype not in TRITON_DTYPES:
        found.append(f"dtype {x.q.dtype} is not float32, float16 or bfloat16")
    if max(x.D, x.Dv) > 256:
        found.append(f"head width {max(x.D, x.Dv)} > 256")
    if min(x.D, x.Dv) < 1:
        found.append("Dv is 0")
    for name, t, more in (("bias", x.bias, ()), ("scale", x.scale, (torch.float64,))):
        if isinstance(t, Tensor) and t.dtype not in TRITON_DTYPES + more:
            found.append(f"the dtype of {name}, {t.dtype}, is none that the kernels read")
    return found


def triton_reasons(x: CrossAttentionInputs) -> list[str]:
    """Why the Triton kernels cannot run this call."""
    return triton_device_reasons(x.q.device) + kernel_reasons(x)


def cuda_reasons(x: CrossAttentionInputs) -> list[str]:
    """Why the CUDA kernels cannot run this call."""
    found = cuda.device_reasons(x.q.device) + kernel_reasons(x)
    if found or torch.compiler.is_compiling():  # a trace would be held to fewer rows
        return found
    rows, most = max(x.Nq * x.Hq // max(x.Hkv, 1), x.Nk), cuda.extension().MOST_ATTENTION_ROWS
    return [f"{rows} queries of a key head, or keys, are more than {most}"] if rows > most else []


def triton_run(x: CrossAttentionInputs) -> CrossAttentionResult:
    return attend(x)[0]


def cuda_run(x: CrossAttentionInputs) -> CrossAttentionResult:
    return attend(x, "cuda")[0]


def attend(
    x: CrossAttentionInputs, backend: str = "triton"
) -> tuple[CrossAttentionResult, Tensor | None]:
    """(result, what float32 cannot hold of its lse where there is a bias); see the launcher."""
    start, stop = x.bounds()
    q, k, v = apart(x.q, x.k, x.v)
    scale_tensor = x.scale if isinstance(x.scale, Tensor) else None
    options = (
        math.nan if scale_tensor is not None else x.scale,
        x.softcap or 0.0,
        x.dropout_p,
        x.return_statistics,
        allow_tf32(),
        backend,
    )
    out, lse, lse_low, *statistics = CrossAttentionFunction.apply(
        q, k, v, x.bias, scale_tensor, start, stop, x.mask, x.seed, options
    )
    statistics = statistics if x.return_statistics else (None, None)
    result = CrossAttentionResult(out, lse if x.return_lse else None, *statistics)
    return result, None if x.bias is None else lse_low


BACKENDS = (
    Backend("triton", triton_reasons, triton_run),
    Backend("cuda", cuda_reasons, cuda_run),
    Backend("torch", torch_attention.reasons, torch_attention.cross_attention),
    Backend("eager", reference.reasons, reference.cross_attention, by_name=True),
)
cross_attention.backends, cross_attention.check = BACKENDS, check_inputs


class CrossAttentionFunction(torch.autograd.Function):
    """Wires the launchers into autograd; nothing is computed here."""

    @staticmethod
    def forward(ctx, q, k, v, bias, scale, start, stop, mask, seed, options):
        ctx.set_materialize_grads(False)
        launch = forward_op if torch.compiler.is_compiling() else launch_forward
        results = launch(q, k, v, bias, scale, start, stop, mask, seed, *options)
        ctx.save_for_backward(q, k, v, bias, scale, start, stop, mask, seed, *results[:4])
        ctx.options = options
        ctx.mark_non_differentiable(results[2], results[4])  # lse_low, max_probability
        return results

    @staticmethod
    def backward(ctx, dout, dlse, _, dentropy, __):
        saved = ctx.saved_tensors
        launch = backward_op if torch.compiler.is_compiling() else launch_backward
        with torch.no_grad():
            needs, backend = ctx.needs_input_grad[:5], ctx.options[-1]
            grads = launch(dout, dlse, dentropy, *saved, *ctx.options[:-1], needs, backend)
        grads = tuple(g if needed else None for g, needed in zip(grads, needs, strict=True))
        grads = refuse_double_backward("cross_attention", grads, (dout, *saved[:5]))
        return *grads, *[None] * 5


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale_tensor: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    statistics: bool,
    allow_tf32: bool,
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, lse_low, entropy, max_probability); what is not asked for has no elements."""
    if backend == "cuda":
        from ..cuda_kernels import cross_attention as kernels
    else:
        from ..triton_kernels import cross_attention as kernels
    return kernels.forward(
        q, k, v, bias, scale_tensor, start, stop, mask, seed, scale, softcap, dropout_p,
        statistics, allow_tf32,
    )  # fmt: skip


def launch_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale_tensor: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    entropy: Tensor,
    scale: float,
    softcap: float,
    dropout_p: float,
    statistics: bool,
    allow_tf32: bool,
    needs: list[bool],
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbias, dscale); those not in `needs` have no elements."""
    if backend == "cuda":
        from ..cuda_kernels import cross_attention as kernels
    else:
        from ..triton_kernels import cross_attention_backward as kernels
    # a traced graph passes zeros where autograd passes None, without statistics of no elements
    dentropy = dentropy if statistics else None
    return kernels.backward(
        dout, dlse, dentropy, q, k, v, bias, scale_tensor, start, stop, mask, seed, out, lse,
        lse_low, entropy, scale, softcap, dropout_p, allow_tf32, needs,
    )  # fmt: skip


# Under torch.compile and torch.export a launch is one node; an eager call goes straight to the
# launcher, which saves the custom op's own dispatch on every call.
forward_op = torch.library.custom_op(
    "xattn_kernels::cross_attention_forward", launch_forward, mutates_args=()
)
backward_op = torch.library.custom_op(
    "xattn_kernels::cross_attention_backward", launch_backward, mutates_args=()
)


@forward_op.register_fake
def fake_forward(
    q, k, v, bias, scale_tensor, start, stop, mask, seed, scale, softcap, dropout_p, statistics,
    allow_tf32, backend="triton",
):  # fmt: skip
    wanted = (True, bias is not None, statistics, statistics)
    shapes = (q.shape[:3] if w else (0,) for w in wanted)
    rows = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return empty_rows(q, v.shape[3]), *rows


@backward_op.register_fake
def fake_backward(
    dout, dlse, dentropy, q, k, v, bias, scale_tensor, start, stop, mask, seed, out, lse, lse_low,
    entropy, scale, softcap, dropout_p, statistics, allow_tf32, needs, backend="triton",
):  # fmt: skip
    rows = [empty_rows(t, t.shape[3]) for t in (q, k, v)]
    rest = [None if t is None else t.new_empty(t.shape) for t in (bias, scale_tensor)]
    return tuple(
        t if needed else q.new_empty(0) for t, needed in zip(rows + rest, needs, strict=True)
    )
