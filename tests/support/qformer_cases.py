"""A Q-Former, its calls, and its equations with scores and dense masks."""

from __future__ import annotations

import math

import torch

from support.numerics import assert_as_accurate
from xattn_kernels import QFormer, masks

DIM, VISUAL, Q, T, NK, HEADS, DEPTH, VOCAB, POSITIONS = 24, 20, 5, 6, 7, 3, 4, 13, 9
LENGTHS = torch.tensor([4, 6])
IMAGE_LENGTHS = torch.tensor([7, 3])
OBJECTIVES = ("itc", "itm", "itg")


def qformer(backend=None, spread=0.3, **options) -> QFormer:
    """With weights that are far from their start, so that no term is small beside another."""
    sizes = dict(dim=DIM, depth=DEPTH, heads=HEADS, dim_visual=VISUAL, num_queries=Q)
    text = dict(vocab_size=VOCAB, max_positions=POSITIONS)
    module = QFormer(**sizes | text | dict(backend=backend) | options)
    generator = torch.Generator().manual_seed(1)
    for name, p in module.named_parameters():
        about = 1.0 if name.endswith(("LayerNorm.weight", "layernorm.weight")) else 0.0
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.data.copy_(about + spread * noise)
    return module


def inputs(B=2, T=T, Nk=NK, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """(image features, input_ids); no text has id 0, at which BERT's embeddings have no gradient"""
    return torch.randn(B, Nk, VISUAL, dtype=dtype), torch.randint(1, VOCAB, (B, T))


def with_gradients(call, module, image, autocast=False) -> dict:
    """Output and the gradients of the image and of all parameters, by name."""
    if image is not None:
        image = image.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = call(image)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (out * weight.to(out.device, out.dtype)).sum().backward()
    found = {"output": out.detach()} | ({} if image is None else {"dimage": image.grad})
    return found | {f"d{n}": p.grad for n, p in module.named_parameters() if p.grad is not None}


def assert_same(found: dict, eager: dict, truth: dict, **options) -> None:
    assert found.keys() == truth.keys()
    # a gradient sums terms of either sign, and those of key biases cancel
    size = max(t.abs().max().item() for t in truth.values())
    for name, expected in truth.items():
        assert_as_accurate(found[name].cpu(), eager[name], expected, name, size=size, **options)


def by_equations(state: dict, image, ids, seen, image_seen) -> torch.Tensor:
    """The equations of the class, with scores and dense masks: bool [B, rows, rows], [B, 1, Nk]."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].mT + state[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attend(name, x, keys, seen):
        out, wide = [], DIM // HEADS
        q = linear(f"{name}.attention.query", x)
        k, v = (linear(f"{name}.attention.{n}", keys) for n in ("key", "value"))
        for h in range(HEADS):
            s = slice(h * wide, (h + 1) * wide)
            scores = q[..., s] @ k[..., s].mT / math.sqrt(wide)
            out.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[..., s])
        out = linear(f"{name}.output.dense", torch.cat(out, -1))
        return norm(f"{name}.output.LayerNorm", x + out)

    def feed(name, suffix, x):
        hidden = linear(f"{name}.intermediate{suffix}.dense", x)
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        out = f"{name}.output{suffix}"
        return norm(f"{out}.LayerNorm", x + linear(f"{out}.dense", hidden))

    text = state["embeddings.word_embeddings.weight"][ids]
    text = text + state["embeddings.position_embeddings.weight"][: ids.shape[1]]
    rows = torch.cat((state["query_tokens"].expand(len(ids), -1, -1), text), 1)
    h = norm("layernorm", rows)
    for n in range(DEPTH):
        name = f"encoder.layer.{n}"
        h = attend(f"{name}.attention", h, h, seen)
        queries = h[:, :Q]
        if n % 2 == 0:
            queries = attend(f"{name}.crossattention", queries, image, image_seen)
        h = torch.cat((feed(name, "_query", queries), feed(name, "", h[:, Q:])), 1)
    return h


def allowed(objective: str) -> torch.Tensor:
    """bool [2, Q + T, Q + T] by the definition of the objective, one pair at a time."""
    found = torch.zeros(2, Q + T, Q + T, dtype=torch.bool)
    for b, i, j in torch.cartesian_prod(*(torch.arange(n) for n in found.shape)).tolist():
        if j >= Q + LENGTHS[b]:
            continue
        if objective == "itc":
            found[b, i, j] = (i < Q) == (j < Q)
        elif objective == "itg":
            found[b, i, j] = j < Q or Q <= j <= i
        else:
            found[b, i, j] = True
    return found


def twin(module, objective, image, ids, **options) -> dict:
    seen, image_seen = allowed(objective), (torch.arange(NK) < IMAGE_LENGTHS[:, None])[:, None]
    state = dict(module.named_parameters())

    def call(x):
        return by_equations(state, x, ids, seen, image_seen)

    return with_gradients(call, module, image, **options)


def ours(module, objective, image, ids, **options) -> dict:
    device = module.query_tokens.device
    texts = dict(objective=objective, text_lengths=LENGTHS.to(device))
    mask = masks.padding(IMAGE_LENGTHS).to(device)

    def call(x):
        return module(x, ids.to(device), image_mask=mask, **texts)

    return with_gradients(call, module, image.to(device), **options)
