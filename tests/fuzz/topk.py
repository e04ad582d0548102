"""Random calls of top-k attention: scores kept or computed again, keys masked or gathered; and by
blocks of keys."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from hypothesis import strategies as st

from fuzz.draws import (
    INTERVALS,
    QKV_VALUES,
    Reach,
    layouts,
    mask_names,
    pick,
    scales,
    sizes,
    sometimes,
    subset,
)
from support import block_cases
from support.calls import UPSTREAM, written_out
from support.cases import Case
from support.mask_kinds import possible
from support.topk_cases import judge, topk_call

TOP_KS = pick(1, 2, 3, 5, 8, 16, 31, 32, 33, 64)
VALUES = [name for name in QKV_VALUES if name != "overflow"]


@dataclass(frozen=True)
class DrawnTopK:
    """`kept`: scores stay in registers; `gathered`: in both directions, from saved indices."""

    case: Case
    top_k: int
    backend: str
    dtype: torch.dtype
    kept: bool = True
    gathered: bool = False
    kind = property(lambda self: f"topk_attention {str(self.dtype)[6:]}")

    def check(self, device: str) -> None:
        call = written_out(topk_call(self.case, self.top_k, self.dtype, device))
        with ExitStack() as patches:
            if self.backend == "triton":
                from xattn_kernels.triton_kernels import configs, topk_attention

                if not self.kept:
                    patches.enter_context(patch.object(configs, "KEPT_TILES", ()))
                if self.gathered:
                    always = {"forward": 0, "backward": 0}
                    patches.enter_context(patch.object(configs, "GATHERED_BEYOND", always))
                    patches.enter_context(
                        patch.object(topk_attention, "saves_indices", lambda Nk, k: k < Nk)
                    )
            judge(call, self.case, self.top_k, self.backend, self.dtype)


@dataclass(frozen=True)
class DrawnBlocks:
    case: Case
    blocks: tuple[int, int]
    backend: str
    dtype: torch.dtype
    kind = property(lambda self: f"topk_attention of blocks {str(self.dtype)[6:]}")

    def check(self, device: str) -> None:
        call = block_cases.blocks_call(self.case, self.blocks, self.dtype, device)
        block_cases.judge(written_out(call), self.case, self.blocks, self.backend, self.dtype)


@st.composite
def topk_calls(draw, reach: Reach) -> DrawnTopK | DrawnBlocks:
    lengths, _ = draw(sizes(reach))
    c = Case(f"fuzz_{draw(st.integers(0, 9999))}", **lengths)
    c = replace(c, mask=draw(mask_names(c)), layout=draw(layouts(c, reach)))
    c = replace(c, values=draw(sometimes("normal", st.sampled_from(VALUES))))
    c = replace(c, scale=draw(scales(c, reach)), returns=draw(pick(*UPSTREAM)))
    c = replace(c, used=draw(sometimes(None, subset(UPSTREAM[c.returns], least=1))))
    leaves = ["q", "k", "v", *["scale"] * isinstance(c.scale, tuple)]
    c = replace(c, needs=draw(sometimes(None, subset(leaves))))
    if reach.backend != "cuda" and draw(st.booleans()):
        blocks = (draw(pick(16, 32, 64)), draw(st.integers(1, 5)))
        return DrawnBlocks(c, blocks, reach.backend, draw(st.sampled_from(reach.dtypes)))
    top_k = draw(st.one_of(TOP_KS, st.integers(1, c.Nk + 3)))
    dtype, kept, gathered = draw(st.sampled_from(reach.dtypes)), draw(st.booleans()), False
    if reach.backend == "triton":
        gathered = draw(st.booleans())
    return DrawnTopK(c, top_k, reach.backend, dtype, kept, gathered)


@st.composite
def compiled_topk_calls(draw, dtype: torch.dtype, kept: bool, gathered: bool) -> DrawnTopK:
    """Batch, heads, lengths, intervals, numbers and top_k vary, which need no new kernel."""
    odd = st.integers(1, 63).map(lambda n: 2 * n + 1)
    c = Case(
        f"fuzz_{draw(st.integers(0, 9999))}", B=draw(pick(2, 3)), Hq=3, Hkv=3, Nq=draw(odd),
        Nk=draw(odd), D=32, values=draw(sometimes("normal", st.sampled_from(VALUES))),
    )  # fmt: skip
    c = replace(c, mask=draw(st.sampled_from([m for m in INTERVALS if possible(m, c)])))
    top_k = 2 * draw(st.integers(1, 40)) + 1
    return DrawnTopK(c, top_k, "triton", dtype, kept, gathered)


@st.composite
def compiled_block_calls(draw, dtype: torch.dtype) -> DrawnBlocks:
    """As `compiled_topk_calls`; blocks of 16 keys."""
    drawn = draw(compiled_topk_calls(dtype, True, False))
    return DrawnBlocks(drawn.case, (16, 2 * draw(st.integers(1, 3)) + 1), "triton", dtype)
