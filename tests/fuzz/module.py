"""Random calls of `MultiheadAttention`, each judged against the module on the eager backend."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from fuzz.draws import (
    INTERVALS,
    Reach,
    pick,
    sometimes,
)
from support.calls import Tensors
from support.mask_kinds import make_mask, possible
from support.numerics import assert_as_accurate
from xattn_kernels import MultiheadAttention


@dataclass(frozen=True)
class ModuleCase:
    """One call; the names of sizes are those of a `Case`."""

    name: str
    backend: str
    dtype: torch.dtype
    B: int = 1
    Hq: int = 1
    Nq: int = 1
    Nk: int = 1
    D: int = 1
    dropout_p: float = 0.0
    options: tuple[str, ...] = ()  # of the constructor, set to True
    widths: tuple[int | None, int | None] = (None, None)  # kdim, vdim
    padding: str | None = None  # "bool" or "float"
    attn_mask: str | None = None  # the same, with "_3d" one for each head
    mask: str | None = None  # an interval of MASKS
    weights: str | None = "mean"  # or "heads", None
    kind = property(lambda self: f"MultiheadAttention {str(self.dtype)[6:]}")

    def build(self) -> tuple[MultiheadAttention, dict[str, Tensor], dict]:
        """(module, float tensors, the rest of its call); the numbers are exact in the dtype."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        kdim, vdim = self.widths
        module = MultiheadAttention(
            self.Hq * self.D, self.Hq, dropout=self.dropout_p, bias="bias" in self.options,
            add_bias_kv="add_bias_kv" in self.options, kdim=kdim, vdim=vdim,
            add_zero_attn="add_zero_attn" in self.options, batch_first=True, dtype=torch.float64,
        )  # fmt: skip
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.1 * torch.randn_like(p)).copy_(p.to(self.dtype))
        tensors = {
            "query": torch.randn(self.B, self.Nq, self.Hq * self.D),
            "key": torch.randn(self.B, self.Nk, module.kdim),
            "value": torch.randn(self.B, self.Nk, module.vdim),
        }
        masks = {
            "key_padding_mask": self.random_mask(self.padding, self.B, self.Nk),
            "attn_mask": self.random_mask(self.attn_mask, self.Nq, self.Nk),
        }
        masks = {n: t for n, t in masks.items() if t is not None}
        tensors |= {n: t for n, t in masks.items() if t.is_floating_point()}
        call = {n: t for n, t in masks.items() if t.dtype == torch.bool}
        call |= dict(need_weights=bool(self.weights), average_attn_weights=self.weights == "mean")
        if self.mask is not None:
            call["mask"] = make_mask(self.mask, self, torch.Generator().manual_seed(0))
        return module, {n: t.to(self.dtype).double() for n, t in tensors.items()}, call

    def random_mask(self, kind: str | None, *shape: int) -> Tensor | None:
        """In torch's sense: True and -inf are not allowed."""
        if kind is None:
            return None
        if kind.endswith("_3d"):
            shape = (self.B * self.Hq, *shape)
        forbidden = torch.rand(shape) < 0.4
        if kind.startswith("bool"):
            return forbidden
        return torch.randn(shape).masked_fill(forbidden, -torch.inf)

    def run(self, backend: str, dtype: torch.dtype) -> Tensors:
        """out, weights and the gradients of every input, parameter and float mask."""
        module, tensors, call = self.build()
        module, module.backend = module.to(dtype), backend
        leaves = {n: t.to(dtype).requires_grad_() for n, t in tensors.items()}
        torch.manual_seed(1)  # of the dropout
        results = dict(zip(("out", "weights"), module(**leaves, **call), strict=True))
        results = {n: t for n, t in results.items() if t is not None}
        upstream = [torch.randn(t.shape).to(self.dtype).to(dtype) for t in results.values()]
        leaves |= dict(module.named_parameters())
        grads = torch.autograd.grad(
            list(results.values()), list(leaves.values()), upstream, materialize_grads=True
        )
        return results | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}

    def check(self, device: str) -> None:
        ours, eager = (self.run(backend, self.dtype) for backend in (self.backend, "eager"))
        truth = self.run("eager", torch.float64)
        # gradients of q and k cancel, to 0 with one key; their terms are as large as those of v
        sizes = [t.abs().max().item() for n, t in truth.items() if n[0] == "d" and t.numel()]
        for name, t in ours.items():
            size = max(sizes) if name[0] == "d" else 0.0
            assert_as_accurate(t, eager[name], truth[name], f"{self}: {name}", size=size)


@st.composite
def module_calls(draw, reach: Reach) -> ModuleCase:
    length = st.one_of(pick(1, 2, 3, 16, 17), st.integers(1, 24))
    width = sometimes(None, st.integers(1, 20))
    options = st.lists(pick("bias", "add_bias_kv", "add_zero_attn"), unique=True)
    case = dict(
        B=draw(pick(1, 2)), Hq=draw(pick(1, 2, 3)), Nq=draw(length), Nk=draw(length),
        D=draw(st.one_of(pick(16, 1, 3, 24), st.integers(1, 40))),
        widths=draw(st.tuples(width, width)),
        options=tuple(draw(options)), padding=draw(sometimes(None, pick("bool", "float"))),
        attn_mask=draw(sometimes(None, pick("bool", "float", "bool_3d", "float_3d"))),
        weights=draw(pick("mean", "heads", None)),
    )  # fmt: skip
    if reach.flags:  # PyTorch's kernels drop what torch's generator says
        case["dropout_p"] = draw(sometimes(0.0, pick(0.3, 0.9)))
    case = ModuleCase(
        f"fuzz_{draw(st.integers(0, 9999))}", reach.backend,
        draw(st.sampled_from(reach.dtypes)), **case,
    )  # fmt: skip
    mask = draw(sometimes(None, st.sampled_from([m for m in INTERVALS if possible(m, case)])))
    return case if mask is None else replace(case, mask=mask)
