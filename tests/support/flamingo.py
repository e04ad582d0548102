"""Gated cross-attention blocks of several models, a call of them, and their definition."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from xattn_kernels import GatedCrossAttentionBlock

B, N, T, n, DIM, VISUAL = 2, 9, 3, 4, 24, 12
SIZES = dict(dim=DIM, dim_visual=VISUAL, dim_head=8, heads=4)
LLAMA = dict(kv_heads=2, qk_norm=True, norm="rms", norm_eps=0.01, ff="swiglu", ff_mult=3.5)
FLAVOURS = {
    "flamingo": {},
    "flamingo_all": dict(only_attend_immediate_media=False),
    "llama_meta": LLAMA | dict(without_media="empty", ff_without_media=False),
    "llama_hugging_face": LLAMA | dict(without_media="all", ff_without_media=False),
    "llama_all_previous": LLAMA
    | dict(without_media="all", ff_without_media=False, only_attend_immediate_media=False),
    "idefics": dict(norm="rms", ff="swiglu", vector_gate=True, without_media="empty", qk_norm=True),
    "idefics_all": dict(vector_gate=True, norm="rms", only_attend_immediate_media=False),
}


def block(flavour="flamingo", dtype=torch.float64, **options):
    """Its gates open, no parameter at its default."""
    module = GatedCrossAttentionBlock(**SIZES, **FLAVOURS[flavour], **options, dtype=dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


def call(dtype=torch.float64):
    """x, media and locations: text before the first media; more media tokens than media."""
    locations = torch.zeros(B, N, dtype=torch.bool)
    locations[0, [2, 3, 6]] = True
    locations[1, [1, 4, 5, 7]] = True
    x, media = torch.randn(B, N, DIM, dtype=dtype), torch.randn(B, T, n, VISUAL, dtype=dtype)
    return x.requires_grad_(), media.requires_grad_(), locations


def brute_force(m, flavour: str, x, media, locations):
    """The block by its definition, with a dense mask filled in by loops."""
    o = SimpleNamespace(
        **dict(ff="gelu", norm="layer", norm_eps=1e-5, without_media=None) | FLAVOURS[flavour]
    )
    immediate = getattr(o, "only_attend_immediate_media", True)
    allowed = torch.zeros(B, 1, N, T * n, dtype=torch.bool, device=x.device)
    averaged = torch.zeros(B, 1, N, 1, dtype=torch.bool, device=x.device)
    seen = torch.zeros(B, N, 1, dtype=torch.bool, device=x.device)
    for b in range(B):
        for i in range(N):
            count = int(locations[b, : i + 1].sum())
            for j in range(T):
                if (j == count - 1) if immediate else (j < count):
                    allowed[b, 0, i, j * n : (j + 1) * n] = seen[b, i] = True
            if not seen[b, i] and o.without_media != "empty":
                averaged[b, 0, i] = o.without_media is None and (count > T or not immediate)
                allowed[b, 0, i] = averaged[b, 0, i] or o.without_media == "all"

    def norm(module, t):
        t = t - t.mean(-1, keepdim=True) if o.norm == "layer" else t
        t = t / (t.square().mean(-1, keepdim=True) + o.norm_eps).sqrt() * module.weight
        return t + module.bias if o.norm == "layer" else t

    def heads(t):
        return t.unflatten(-1, (-1, 8)).transpose(1, 2)

    q = heads(norm(m.attn.norm, x) @ m.attn.to_q.weight.T)
    k, v = map(heads, (media.flatten(1, 2) @ m.attn.to_kv.weight.T).chunk(2, -1))
    if m.attn.q_norm is not None:
        q, k = norm(m.attn.q_norm, q), norm(m.attn.k_norm, k)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = torch.where(averaged, 0.0, q @ k.mT / 8**0.5)
    p = torch.where(allowed, s, -1e30).softmax(-1) * allowed
    h = (p @ v).transpose(1, 2).flatten(2) @ m.attn.to_out.weight.T
    y = x + m.attn_gate.tanh() * h
    h = norm(m.ff[0], y) @ m.ff[1].weight.T
    if o.ff == "swiglu":
        h = F.silu(h[..., : h.shape[-1] // 2]) * h[..., h.shape[-1] // 2 :]
    h = (F.gelu(h) if o.ff == "gelu" else h) @ m.ff[3].weight.T
    return y + m.ff_gate.tanh() * (h if getattr(o, "ff_without_media", True) else h * seen)


def run(f, module, x, media, *rest):
    """Output and every gradient, by name."""
    leaves = {"x": x, "media": media} | dict(module.named_parameters())
    out = f(x, media, *rest)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device)
    grads = torch.autograd.grad((out * weight.view_as(out)).sum(), list(leaves.values()))
    return {"out": out} | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}
