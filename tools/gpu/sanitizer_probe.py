"""A small forward and backward of every op, which compute-sanitizer observes.

The sizes are odd so that the last tile of every loop is a partial one.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from xattn_kernels import (
    attention_weights,
    cross_attention,
    gated_residual,
    gated_residual_norm,
    masks,
    topk_attention,
)
from xattn_kernels.cuda_kernels import launch

B, HQ, HKV, NQ, NK, D, DV = 2, 4, 2, 37, 83, 40, 24
SCORED = ("mask", "bias", "scale", "softcap")  # the options that attention_weights takes


def calls(device: str) -> dict[str, dict]:
    """Arguments of calls of `cross_attention` that together use every flag."""
    lengths = torch.tensor([NK, 19], dtype=torch.int32, device=device)
    images = torch.zeros(B, NQ, dtype=torch.bool, device=device)
    images[:, [5, 20]] = True
    bias = torch.randn(1, HQ, NQ, NK, device=device, requires_grad=True)
    scale = torch.full((HQ,), 0.2, device=device, requires_grad=True)
    dense = torch.rand(B, 1, NQ, NK, device=device) < 0.5
    return {
        "plain": {},
        "padding": {"mask": masks.padding(lengths)},
        "media": {"mask": masks.media(images, 40, 2), "return_statistics": True},
        "dense mask": {"mask": dense, "softcap": 5.0},
        "bias and scale": {"bias": bias, "scale": scale},
        "dropout": {"dropout_p": 0.2, "seed": 7, "return_lse": True},
    }


def finite_sum(parts) -> torch.Tensor:
    """The sum of all tensors among `parts`, with the lse of rows without keys as 0."""
    finite = [t.nan_to_num(neginf=0.0).float() for t in parts if t is not None]
    return sum(t.sum() for t in finite)


def attend(device: str, backend: str, name: str, nq: int, nk: int, options: dict) -> None:
    """Runs the attention ops that take these options on one backend."""
    dtype = torch.float32 if "bias" in options else torch.bfloat16
    shapes = ((B, HQ, nq, D), (B, HKV, nk, D), (B, HKV, nk, DV))
    q, k, v = (torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes)
    result = cross_attention(q, k, v, backend=backend, **options)
    parts = [result] if isinstance(result, torch.Tensor) else list(result)
    torch.autograd.grad(finite_sum(parts), (q, k, v))
    if backend != "cuda":
        scored = {key: value for key, value in options.items() if key in SCORED}
        weights = attention_weights(q, k, backend=backend, **scored)
        torch.autograd.grad(weights.float().sum(), (q, k))
    if not options.keys() - {"mask", "return_statistics"}:
        chosen = topk_attention(q, k, v, 9, backend=backend, return_indices=True, **options)
        torch.autograd.grad(finite_sum([t for t in chosen if t is not chosen.indices]), (q, k, v))
    print(f"{backend}, {name}: ran", flush=True)


def add_gated(device: str, backend: str) -> None:
    """Runs the gated residual on one backend, with and without a norm."""
    shapes = ((NQ, DV * 8), (NQ, DV * 8), (1,), (DV * 8,))
    leaves = [torch.randn(s, device=device, requires_grad=True) for s in shapes]
    rows = torch.rand(NQ, device=device) < 0.7
    x, h, gate, weight = leaves
    y = gated_residual(x, h, gate, row_mask=rows, backend=backend)
    pair = gated_residual_norm(x, h, gate, weight, row_mask=rows, backend=backend)
    torch.autograd.grad(finite_sum([y, *pair]), leaves)
    print(f"{backend}, gated residual: ran", flush=True)


def main(device: str) -> int:
    torch.manual_seed(0)
    backends = ["triton"] + ["cuda"] * (launch.extension() is not None)
    for backend in backends if device == "cuda" else ["eager"]:
        for name, options in calls(device).items():
            attend(device, backend, name, NQ, NK, options)
        # few queries beside many keys are split over keys and merged
        attend(device, backend, "few queries", 3, 1501, {"return_statistics": True})
        add_gated(device, backend)
    if device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
