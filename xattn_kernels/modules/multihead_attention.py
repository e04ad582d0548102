"""`MultiheadAttention`: replaces `nn.MultiheadAttention` and stays fused with weights."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..core.call import AttentionWeightsCall, CrossAttentionCall, shared_fields
from ..core.dispatch import (
    choice,
    choose,
    tell,
    without_autocast,
)
from ..core.tensor_arguments import check_attention
from ..masks import KeyInterval
from ..ops.attention_weights import attention_weights
from ..ops.cross_attention import attend, cross_attention, cuda_reasons
from ..torch_kernels import attention_weights as torch_weights
from ..torch_kernels import cross_attention as torch_attention


def _cuda_reasons(x: CrossAttentionCall) -> list[str]:
    """Why the CUDA kernels cannot compute this call; empty when they can."""
    weights = ["attention weights have no CUDA kernel (need_weights=False)"] * x.return_lse
    return cuda_reasons(x) + weights


# "torch" means PyTorch's kernels: the fused ones, or one head at a time if those have reasons.
REASONS = {"torch": lambda x: [], "cuda": _cuda_reasons}
BACKENDS = tuple(
    b._replace(reasons=REASONS.get(b.name, b.reasons)) for b in cross_attention.backends
)


class MultiheadAttention(nn.Module):
    """A multi-head attention with the constructor, call, parameters and results of torch's module.

    The documentation of `nn.MultiheadAttention` holds here, state dicts load both ways, and the
    same seed initialises the same values. The differences:

    - `need_weights=True`, torch's default, allocates no [B, H, Nq, Nk] tensor, neither forward nor
      backward: a kernel computes the head-averaged weights from lse and writes them.
    - `forward(..., mask=KeyInterval)` names the keys of each query without a dense mask.
    - A query whose keys are all masked gets the output bias and weights of 0. torch gives NaN or
      the same, depending on the path it takes.
    - Masks are read by stride and never repeated per head. A bool and a float mask may be mixed,
      and a float mask may have any floating-point dtype.
    - There are no nested tensors, no TorchScript, and no `dropout` of exactly 1.

    On a GPU the Triton kernels run, elsewhere those of PyTorch: its fused attention, or products
    and a softmax for one head at a time if the call needs weights or dropout, which then uses
    torch's generator. `explain` tells which. A padding mask stays a mask, because only its values
    tell whether it is a suffix, and reading them stalls a GPU. Pass `mask=masks.padding(...)` for a
    mask that is one.

    Args:
        backend: "triton", "cuda", "torch" or "eager" for every call; None chooses for each.
        The other arguments are those of torch, with the same defaults.

    Raises:
        ValueError: embed_dim or num_heads is not positive.
        AssertionError: num_heads does not divide embed_dim.
    """

    backend: str | None = None

    def __init__(
        self, embed_dim, num_heads, dropout=0.0, bias=True, add_bias_kv=False, add_zero_attn=False,
        kdim=None, vdim=None, batch_first=False, device=None, dtype=None, *, backend=None,
    ) -> None:  # fmt: skip
        if embed_dim <= 0 or num_heads <= 0:
            raise ValueError(
                f"embed_dim and num_heads must be positive, got {embed_dim} and {num_heads}"
            )
        _require(embed_dim % num_heads == 0, f"{num_heads=} does not divide {embed_dim=}")
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.head_dim = embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self._qkv_same_embed_dim = self.kdim == self.vdim == embed_dim
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, add_zero_attn
        self.backend = _check_backend(backend)

        def parameter(name: str, wanted: bool, *shape: int) -> None:
            empty = torch.empty(shape, device=device, dtype=dtype) if wanted else None
            self.register_parameter(name, nn.Parameter(empty) if wanted else None)

        packed = self._qkv_same_embed_dim
        parameter("in_proj_weight", packed, 3 * embed_dim, embed_dim)
        parameter("q_proj_weight", not packed, embed_dim, embed_dim)
        parameter("k_proj_weight", not packed, embed_dim, self.kdim)
        parameter("v_proj_weight", not packed, embed_dim, self.vdim)
        parameter("in_proj_bias", bias, 3 * embed_dim)
        self.out_proj = NonDynamicallyQuantizableLinear(
            embed_dim, embed_dim, bias=bias, device=device, dtype=dtype
        )
        parameter("bias_k", add_bias_kv, 1, 1, embed_dim)
        parameter("bias_v", add_bias_kv, 1, 1, embed_dim)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Initialises the parameters as torch's module does, in the same order."""
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if getattr(self, name) is not None:
                nn.init.xavier_uniform_(getattr(self, name))
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        if self.bias_k is not None:
            nn.init.xavier_normal_(self.bias_k)
            nn.init.xavier_normal_(self.bias_v)

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, *, backend=None) -> MultiheadAttention:
        """A new module with the same Parameter objects, settings, training mode and hooks.

        Raises TypeError for anything but `nn.MultiheadAttention` itself, since a subclass may use
        its parameters in another way.
        """
        if type(module) is not nn.MultiheadAttention:
            raise TypeError(f"module must be an nn.MultiheadAttention, got {type(module).__name__}")
        new = cls.__new__(cls)
        new.__dict__ = {
            name: value.copy() if isinstance(value, dict | set) else value
            for name, value in vars(module).items()
        }
        new.backend = _check_backend(backend)
        return new

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        mask: KeyInterval | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The output and the weights or None, in the shapes of torch's module.

        Args:
            query: [Nq, B, embed_dim], with `batch_first` [B, Nq, embed_dim], unbatched
                [Nq, embed_dim]; key and value likewise, kdim and vdim wide.
            key_padding_mask: [B, Nk], unbatched [Nk]; bool (True = ignore) or additive float.
            need_weights: whether to return the weights after dropout, [B, Nq, Nk], differentiable.
            attn_mask: [Nq, Nk] or [B * num_heads, Nq, Nk]; bool (True = not allowed) or float.
            average_attn_weights: whether the weights are the mean over heads, or else
                [B, num_heads, Nq, Nk].
            is_causal: a hint that attn_mask, which is still required, is causal (query i sees the
                keys up to i). As in torch the hint replaces attn_mask if there is no padding mask
                and need_weights is False; then only visible keys cost time.
            mask: the keys that each query may see, on top of the other masks. With `add_bias_kv`
                or `add_zero_attn`, whose keys every query sees, it becomes a dense mask.

        Raises:
            AssertionError, RuntimeError: a shape or dtype is wrong, with the error type of torch.
            TypeError, ValueError: `mask` is wrong, or dropout is outside of [0, 1).
        """
        arguments = ForwardArguments(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
            is_causal, mask,
        )  # fmt: skip
        x = _inputs(self, arguments)
        with without_autocast(x.q.device):
            out, weights = self._attend(x, average_attn_weights if need_weights else None)
        # the head axis moves behind the sequence: [B, Nq, H, D], [Nq, B, H, D] or [Nq, H, D]
        if query.dim() == 2:
            out, weights = out[0].transpose(0, 1), None if weights is None else weights[0]
        else:
            out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
        return self.out_proj(out.flatten(-2)), weights

    def _attend(self, x: CrossAttentionCall, average: bool | None):
        """The pair (out, weights) in layout [B, H, N, D]; no weights if `average` is None."""
        backend = choose("MultiheadAttention", BACKENDS, x, self.backend)
        tell(x, backend.name)
        if backend.name == "torch" and torch_attention.reasons(x):
            return torch_weights.attend(replace(x, seed=None), out=True, average_heads=average)
        if backend.name in ("triton", "cuda"):
            results = attend(x, backend.name)
            lse_low = results.lse_low
        else:
            results, lse_low = backend.run(x), None
        if average is None:
            return results.out, None
        weights_call = AttentionWeightsCall(
            **shared_fields(x, "AttentionCall"), lse=results.lse.detach(), lse_low=lse_low,
            lse_is_own=True, average_heads=average,
        )  # fmt: skip
        ops = attention_weights.backends
        chosen = choose("MultiheadAttention", ops, weights_call, backend.name)
        return results.out, chosen.run(weights_call)

    def explain(self, *args, **kwargs) -> None:
        """Prints which backend `forward(*args, **kwargs)` takes for its output, and why."""
        # the draw of a seed would advance torch's generator
        x = _inputs(self, ForwardArguments(*args, **kwargs), seed=0)
        print(choice("MultiheadAttention", BACKENDS, x, self.backend))

    def merge_masks(self, attn_mask, key_padding_mask, query) -> tuple[Tensor | None, int | None]:
        """The merged mask and its type, for the inference path of `nn.TransformerEncoderLayer`.

        The result for query [B, N, E] is (None, None), ([B, N], 1) or ([B, H, N, N], 2).
        """
        if attn_mask is None:
            return key_padding_mask, None if key_padding_mask is None else 1
        B, N, _ = query.shape
        shape = B, self.num_heads, N, N
        merged = attn_mask.view(shape) if attn_mask.dim() == 3 else attn_mask.expand(shape)
        return merged if key_padding_mask is None else merged + key_padding_mask[:, None, None], 2


def replace_multihead_attention(model: nn.Module, *, backend: str | None = None) -> int:
    """Turns each `nn.MultiheadAttention` in `model` into ours, in place, and returns their number.

    The modules keep their identity and change their class, so that they are no longer instances of
    `nn.MultiheadAttention`. The root itself, shared modules, hooks, optimizers and every reference
    to the modules stay valid. Subclasses are not replaced, since they may compute something else;
    `torch.nn.utils.parametrize` makes a subclass too.

    The layers of `nn.Transformer` work as before. In inference (`eval()` without gradients) torch's
    encoder layer may bypass its attention for a kernel of its own;
    `torch.backends.mha.set_fastpath_enabled(False)` prevents that.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    backend = _check_backend(backend)
    replaced = [m for m in model.modules() if type(m) is nn.MultiheadAttention]
    for module in replaced:
        module.__class__ = MultiheadAttention
        module.backend = backend
    return len(replaced)


def _check_backend(backend: str | None) -> str | None:
    """`backend` itself; raises ValueError unless it is None or a name in BACKENDS."""
    if backend is not None and backend not in [b.name for b in BACKENDS]:
        names = ", ".join(repr(b.name) for b in BACKENDS)
        raise ValueError(f"backend must be None or one of {names}, got {backend!r}")
    return backend


class ForwardArguments(NamedTuple):
    """The arguments of `MultiheadAttention.forward`, in its order and with its defaults."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None = None
    need_weights: bool = True
    attn_mask: Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False
    mask: KeyInterval | None = None


def _inputs(module, arguments: ForwardArguments, seed=None) -> CrossAttentionCall:
    """The checked call of `cross_attention` for the arguments of `module.forward`."""
    query, key, value, key_padding_mask, need_weights, attn_mask, _, is_causal, mask = arguments
    if is_causal and attn_mask is None:
        raise RuntimeError("is_causal is a hint about attn_mask; attn_mask must be given too")
    _check_ranks(query, key, value, key_padding_mask, attn_mask)
    _check_sizes(module, query, key, value, attn_mask)
    if query.dim() == 2 and key_padding_mask is not None:
        key_padding_mask = key_padding_mask[None]
    q, k, v = (_split_heads(module, x) for x in _project(module, query, key, value))
    Nk = k.shape[2]
    k, v = _append_keys(module, k, module.bias_k), _append_keys(module, v, module.bias_v)
    causal = is_causal and key_padding_mask is None and not need_weights
    masks = _as_4d(None if causal else attn_mask, key_padding_mask, q, Nk)
    mask, bias = _mask_and_bias(masks, mask, causal, q, Nk, k.shape[2] - Nk)
    dropout_p = module.dropout if module.training else 0.0
    return check_attention(
        q, k, v, mask=mask, bias=bias, dropout_p=dropout_p, seed=seed, return_lse=need_weights
    )


def _project(module, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """The projections q, k, v in the layout of the inputs.

    Inputs that are the same tensor share one product.
    """
    if module._qkv_same_embed_dim:
        parts = (1, 1, 1) if key is not value else (3,) if query is key else (1, 2)
        weights = module.in_proj_weight.split([n * module.embed_dim for n in parts])
    else:
        parts = (1, 1, 1)
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = [None] * len(parts)
    if module.in_proj_bias is not None:
        biases = module.in_proj_bias.split([n * module.embed_dim for n in parts])
    products = map(F.linear, (query, key, value), weights, biases)
    chunks = (product.chunk(n, dim=-1) for product, n in zip(products, parts, strict=True))
    return [x for chunk in chunks for x in chunk]


def _split_heads(module, x: Tensor) -> Tensor:
    """The view [B, H, N, D] of x [..., embed_dim] in any of the three layouts."""
    x = x.unflatten(-1, (module.num_heads, module.head_dim))
    if x.dim() == 3:
        return x.transpose(0, 1)[None]
    return x.transpose(1, 2) if module.batch_first else x.permute(1, 2, 0, 3)


def _append_keys(module, x: Tensor, learned: Tensor | None) -> Tensor:
    """x [B, H, N, D] with the learned row of `add_bias_kv`, then the zeros of `add_zero_attn`."""
    if learned is not None:
        row = learned.view(1, module.num_heads, 1, module.head_dim)
        x = torch.cat([x, row.to(x.dtype).expand(x.shape[0], -1, -1, -1)], dim=2)
    return F.pad(x, (0, 0, 0, 1)) if module.add_zero_attn else x


def _require(condition: bool, message: str, error: type[Exception] = AssertionError) -> None:
    """Raises `error` unless the condition holds; torch's module raises such types."""
    if not condition:
        raise error(message)


def _check_ranks(query, key, value, key_padding_mask, attn_mask) -> None:
    """Raises the errors of torch for tensors of wrong rank and masks of wrong dtype."""
    nested = query.is_nested or key.is_nested or value.is_nested
    _require(not nested, "query, key and value must be padded tensors, got a nested tensor")
    rank = query.dim()
    _require(rank in (2, 3), f"query must be 3-D, or 2-D without a batch, got {rank}-D")
    for name, t, ranks in (
        ("key", key, (rank,)),
        ("value", value, (rank,)),
        ("key_padding_mask", key_padding_mask, (rank - 1,)),
        ("attn_mask", attn_mask, (2, 3)),
    ):
        if t is None:
            continue
        allowed = " or ".join(f"{r}-D" for r in ranks)
        got = f"got {t.dim()}-D"
        _require(t.dim() in ranks, f"{name} must be {allowed} for a {rank}-D query, {got}")
        additive = "mask" not in name or t.dtype == torch.bool or t.dtype.is_floating_point
        _require(additive, f"{name} must be bool or floating-point, got {t.dtype}")


def _check_sizes(module, query, key, value, attn_mask) -> None:
    """Raises the errors of torch for widths, lengths and batches that do not fit."""
    packed, sizes = module._qkv_same_embed_dim, f"got {list(key.shape)} and {list(value.shape)}"
    width = query.shape[-1]
    _require(
        width == module.embed_dim, f"query must be embed_dim={module.embed_dim} wide, got {width}"
    )
    agree = key.shape == value.shape if packed else key.shape[:-1] == value.shape[:-1]
    _require(agree, f"key and value must have the same length and batch, {sizes}")
    widths = (key.shape[-1], value.shape[-1]) == (module.kdim, module.vdim)
    _require(
        widths,
        f"key and value must be kdim={module.kdim} and vdim={module.vdim} wide, {sizes}",
        RuntimeError if packed else AssertionError,
    )
    if query.dim() == 3:
        B, B_key = (x.shape[0 if module.batch_first else 1] for x in (query, key))
        _require(B == B_key, f"key must have the batch of query, {B}, got {B_key}", RuntimeError)
    elif attn_mask is not None and attn_mask.dim() == 3:
        expected = (module.num_heads, query.shape[0], key.shape[0])
        got = f"got {list(attn_mask.shape)}"
        _require(attn_mask.shape == expected, f"attn_mask must be {list(expected)}, {got}")


def _as_4d(attn_mask, key_padding_mask, q: Tensor, Nk: int) -> list[Tensor]:
    """The masks of torch that are not None, as views that broadcast to [B, H, Nq, Nk]."""
    B, H, Nq, _ = q.shape
    views = []
    if attn_mask is not None:
        expected = (B * H, Nq, Nk)[3 - attn_mask.dim() :]
        message = f"attn_mask must be {list(expected)}, got {list(attn_mask.shape)}"
        _require(attn_mask.shape == expected, message, RuntimeError)
        dense = attn_mask.dim() == 3
        views.append(attn_mask.unflatten(0, (B, H)) if dense else attn_mask[None, None])
    if key_padding_mask is not None:
        _require(
            key_padding_mask.shape == (B, Nk),
            f"key_padding_mask must be {[B, Nk]}, got {list(key_padding_mask.shape)}",
        )
        views.append(key_padding_mask[:, None, None])
    return views


def _mask_and_bias(
    masks: list[Tensor], interval, causal: bool, q: Tensor, Nk: int, appended: int
) -> tuple[KeyInterval | Tensor | None, Tensor | None]:
    """The mask (True = attend) and bias of `cross_attention` for 4-d masks (True = forbidden).

    The mask is the interval or else one bool mask. All others are added up in the bias, so padding
    together with a causal mask needs at most [B, 1, Nq, Nk]. Appended keys come after the Nk keys
    of the masks. Every query sees them, unless the causal hint hides them.
    """
    B, _, Nq, _ = q.shape
    if interval is not None and not isinstance(interval, KeyInterval):
        raise TypeError(f"mask must be a KeyInterval or None, got {type(interval).__name__}")
    if interval is not None and appended:
        masks = [*masks, ~KeyInterval(*interval.expand(B, Nq)).dense(Nk)[:, None]]
        interval = None
    if appended:
        masks = [F.pad(m, (0, appended)) for m in masks]
    if causal:
        stop = torch.arange(1, Nq + 1, dtype=torch.int32, device=q.device).clamp(max=Nk + appended)
        rows = KeyInterval(torch.zeros_like(stop), stop)
        interval = rows if interval is None else interval & rows
    bools = [m for m in masks if m.dtype == torch.bool]
    mask = ~bools.pop(0) if interval is None and bools else interval
    terms = [m for m in masks if m.dtype != torch.bool]
    terms += [torch.zeros_like(m, dtype=q.dtype).masked_fill(m, float("-inf")) for m in bools]
    return mask, reduce(torch.add, terms) if terms else None
