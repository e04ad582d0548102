"""Random calls of the gated residual, with and without the next norm, and of a linear layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from fuzz.draws import (
    HALVES,
    Reach,
    pick,
    sometimes,
    subset,
)
from support import gated_cases, projection_cases
from support.gated_cases import LAYOUTS, VALUES, GatedCase
from support.projection_cases import ProjectionCase

LENGTHS = pick(1, 2, 3, 5, 0, 17, 33, 64)
WIDTHS = st.one_of(pick(16, 1, 2, 8, 24, 127, 128, 129, 512, 513), st.integers(1, 300))
GATES = pick(0.0, 20.0, -20.0, 1e-4, float("inf"))
MOST = 6000  # elements of x
NEAR = [name for name in LAYOUTS if name != "far_rows"]


@dataclass(frozen=True)
class DrawnGated:
    """A case with a backend and a dtype."""

    case: GatedCase | ProjectionCase
    backend: str
    dtype: torch.dtype

    @property
    def kind(self) -> str:
        op = "gated_projection" if isinstance(self.case, ProjectionCase) else "gated_residual"
        return f"{op} {str(self.dtype)[6:]}"

    def check(self, device: str) -> None:
        cases = projection_cases if isinstance(self.case, ProjectionCase) else gated_cases
        cases.assert_right(self.case, self.backend, self.dtype, device)


@st.composite
def shapes(draw) -> tuple[int, ...]:
    """[..., dim] with up to three leading dimensions."""
    dim, leading = draw(WIDTHS), draw(st.lists(LENGTHS, max_size=3))
    while torch.Size((dim, *leading)).numel() > MOST:
        leading.remove(max(leading))
    return (*leading, dim)


def epsilons(values: str) -> st.SearchStrategy[float]:
    """Without a variance, a small one makes the rounding of a mean as large as anything."""
    return st.just(0.5) if values == "same_in_a_row" else pick(1e-5, 1e-6, 0.5)


@st.composite
def residual_calls(draw, reach: Reach) -> DrawnGated:
    dtype = draw(st.sampled_from(reach.dtypes))
    norm = draw(pick(None, "layer", "rms"))
    c = GatedCase(
        f"fuzz_{draw(st.integers(0, 9999))}", draw(shapes()), norm, vector=draw(st.booleans()),
        mask=draw(sometimes(None, pick("random", "none", "all"))),
        layout=draw(sometimes("plain", st.sampled_from(NEAR))),
        gate=draw(sometimes(None, GATES)), apart=draw(st.booleans()),
        gate_dtype=draw(sometimes(None, pick(torch.float32, *HALVES))),
        h_dtype=draw(sometimes(None, pick(*HALVES))),
    )  # fmt: skip
    c = replace(c, values=draw(sometimes("normal", st.sampled_from(list(VALUES)))))
    leaves = ["x", "h", "gate"]
    if norm is not None:
        c = replace(c, weight=draw(st.booleans()), bias=draw(st.booleans()))
        c = replace(c, eps=draw(epsilons(c.values)))
        c = replace(c, used=draw(sometimes(None, subset(["y", "normed"], least=1))))
        leaves += ["weight"] * c.weight + ["bias"] * c.bias
    return DrawnGated(replace(c, needs=draw(sometimes(None, subset(leaves)))), reach.backend, dtype)


@st.composite
def projection_calls(draw, reach: Reach) -> DrawnGated:
    *shape, dim = draw(shapes())
    bias = draw(st.booleans())
    c = ProjectionCase(
        tuple(shape), dim, draw(WIDTHS), vector=draw(st.booleans()), bias=bias,
        gate=draw(sometimes(None, GATES)), mask=draw(st.booleans()),
        frozen=draw(sometimes("", subset(["x", "a", "gate", "weight", *["bias"] * bias]))),
        turned=len(shape) > 1 and draw(st.booleans()), seed=draw(st.integers(0, 9999)),
    )  # fmt: skip
    return DrawnGated(c, reach.backend, draw(st.sampled_from(reach.dtypes)))


def gated_calls(reach: Reach) -> st.SearchStrategy[DrawnGated]:
    return st.one_of(residual_calls(reach), residual_calls(reach), projection_calls(reach))


@st.composite
def compiled_gated_calls(draw, norm: str | None, vector: bool, dtype: torch.dtype) -> DrawnGated:
    """Rows, gates and values vary, which need no new kernel: an odd number of rows, more than a
    tile has."""
    c = GatedCase(
        f"fuzz_{draw(st.integers(0, 9999))}", (2 * draw(st.integers(17, 60)) + 1, 48), norm,
        vector=vector, mask="random", gate=draw(sometimes(None, GATES)), bias=norm != "rms",
        values=draw(st.sampled_from(list(VALUES))),
    )  # fmt: skip
    return DrawnGated(replace(c, eps=draw(epsilons(c.values))), "triton", dtype)
