"""Random calls: what is drawn for each backend, and how one call is judged.

A drawn call is a `Case` with a backend and a dtype; printed, it can be pasted into `cases.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product

import torch
from hypothesis import strategies as st

from support.calls import UPSTREAM
from support.cases import Case
from support.mask_kinds import MASKS, possible
from support.values import LAYOUTS

INTERVALS = [name for name in MASKS if not name.startswith("bool")]
BOOLS = [name for name in MASKS if name.startswith("bool")]
SHAPES = ["".join(letters) for letters in product("1B", "1H", "1Q", "1K")]
BORDERS = [0, 1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]
WIDTHS = [16, 1, 3, 8, 20, 24, 32, 40, 64, 80, 96, 128, 160, 256]
SEEDS = [2**40 + 123, 0, 7, -1, 2**63 - 1]
QKV_VALUES = ["normal", "ties", "equal_keys", "overflow", "peaked", "tiny"]
BIAS_VALUES = [
    "normal", "bias_by_key", "bias_infinite", "bias_lowest", "bias_lowest_rows", "bias_minus_1e9",
    "bias_lowest_keys",
]  # fmt: skip
NOT_FINITE = ("nan_q", "nan_k", "nan_v", "nan_bias", "infinite_q", "infinite_k", "infinite_v")


@dataclass(frozen=True)
class Drawn:
    """`twist` says in what other way the same numbers are to be computed, see `judge.py`."""

    case: Case
    backend: str
    dtype: torch.dtype
    splits: int | None = None
    twist: str | None = None
    kind = property(lambda self: f"{self.case.op} {str(self.dtype)[6:]}")

    def __repr__(self) -> str:
        said = [
            f"{f.name}={getattr(self.case, f.name)!r}"
            for f in fields(Case)[1:]
            if getattr(self.case, f.name) != f.default
        ]
        case = f'Case("{self.case.name}", {", ".join(said)})'
        rest = f", splits={self.splits}, twist={self.twist!r}" if self.splits or self.twist else ""
        return f'{case}, "{self.backend}", {self.dtype}{rest}'

    def _repr_pretty_(self, printer, cycle) -> None:  # hypothesis would say every default
        printer.text(repr(self))


@dataclass(frozen=True)
class Reach:
    """What a backend takes, and how many tiles of 32 x 32 are few enough to wait for."""

    backend: str
    dtypes: tuple[torch.dtype, ...]
    bias_dtypes: tuple[torch.dtype, ...]
    tiles: int
    flags: bool = True  # softcap, dropout, lse, statistics
    longest: int = 140
    not_finite: Sequence[str] = NOT_FINITE
    bias_values: Sequence[str] = tuple(BIAS_VALUES)


HALVES = (torch.float16, torch.bfloat16)
INTERPRETED = Reach("triton", (torch.float32, torch.float16), (torch.float32, *HALVES), tiles=2)
CUDA = Reach("cuda", (torch.float32, *HALVES), (torch.float32, *HALVES), tiles=20, longest=300)
# torch's kernels read NaN or infinity in a query or a key as 0 in some places, see the docstring;
# a float32 score beside -1e9 is a multiple of 64, whichever way it is rounded
TORCH = Reach(
    "torch", (torch.float32, torch.float64, *HALVES), (torch.float32, torch.float64, *HALVES),
    tiles=40, flags=False, longest=600, not_finite=("nan_v", "infinite_v"),
    bias_values=[name for name in BIAS_VALUES if name != "bias_minus_1e9"],
)  # fmt: skip


def sometimes(usual, others) -> st.SearchStrategy:
    """`usual` in about two of three draws."""
    return st.integers(0, 2).flatmap(lambda n: others if n == 2 else st.just(usual))


def pick(*values) -> st.SearchStrategy:
    return st.sampled_from(values)


def subset(names: Sequence[str], least: int = 0) -> st.SearchStrategy:
    return st.lists(st.sampled_from(names), min_size=least, unique=True).map(" ".join)


@st.composite
def sizes(draw, reach: Reach) -> tuple[dict[str, int | None], int | None]:
    """(sizes of a case, splits): drawn freely, then cut to what is quick enough."""
    length = st.one_of(st.sampled_from(BORDERS), st.integers(0, reach.longest))
    width = st.one_of(st.sampled_from(WIDTHS), st.integers(1, 100))
    splits = draw(sometimes(None, pick(2, 3, 7))) if reach.backend != "torch" else None
    most = reach.tiles // (splits or 1) * draw(pick(1, 1, 1, 4))
    Nq, Nk, group = draw(length), draw(length), draw(pick(1, 1, 2, 3, 4, 8))

    def tiles() -> int:
        return max(1, -(-Nq * group // 32) * -(-Nk // 32))

    if tiles() > most:
        group = 1
    if tiles() > most:
        Nk = Nk % 40
    if tiles() > most:
        Nq = Nq % 40
    Hkv = min(draw(pick(1, 2, 3)), max(1, most // tiles()))
    B = min(draw(pick(1, 2, 3, 0)), max(1, most // tiles() // Hkv))
    D, Dv = draw(width), draw(sometimes(None, width))
    return dict(B=B, Hq=Hkv * group, Hkv=Hkv, Nq=Nq, Nk=Nk, D=D, Dv=Dv), splits


@st.composite
def broadcast_shapes(draw) -> str:
    """Letters of any of the 16 patterns, leading ones left out or not."""
    letters = draw(st.sampled_from(SHAPES))
    return letters.lstrip("1") if draw(st.booleans()) else letters


@st.composite
def mask_names(draw, c: Case) -> str | None:
    intervals = st.sampled_from([name for name in INTERVALS if possible(name, c)])
    kind = draw(pick("none", "interval", "interval", "and", "dense", "bool", "shape"))
    if kind == "none":
        return None
    if kind == "and":
        return " & ".join(draw(st.lists(intervals, min_size=2, max_size=3)))
    if kind == "bool":
        return draw(st.sampled_from(BOOLS))
    if kind == "shape":
        return "bool_" + draw(broadcast_shapes())
    return ("dense " if kind == "dense" else "") + draw(intervals)


@st.composite
def value_names(draw, c: Case, reach: Reach, dtype: torch.dtype) -> str:
    """NaN and infinities only where nothing hides them: beside a mask a tile that is skipped and a
    zero that meets NaN differ, and a probability of 16 bits may be 0 before an infinite value."""
    names = [draw(sometimes("normal", st.sampled_from(QKV_VALUES)))]
    if c.bias is not None:
        # beside 65504 a score of the float64 truth is rounded as much as ours, another way
        no = "bias_lowest" if dtype == torch.float64 else "nothing"
        biases = [n for n in reach.bias_values if not n.startswith(no)]
        names.append(draw(sometimes("normal", st.sampled_from(biases))))
    if c.mask is None and all(n in ("normal", "bias_by_key") for n in names):
        no = {"nan_bias"} if c.bias is None else set()
        no |= {"infinite_v"} if dtype in HALVES else set()
        wild = [n for n in reach.not_finite if n not in no]
        names.append(draw(pick("normal", "normal", *wild)))
    return " ".join(n for n in names if n != "normal") or "normal"


@st.composite
def scales(draw, c: Case, reach: Reach) -> tuple[float, ...] | float | None:
    if "overflow" in c.values:
        return 3e-5
    if "peaked" in c.values:  # a float32 score of 400 leaves 5 digits to any probability
        return None
    wild = set(NOT_FINITE) & set(c.values.split())
    zero = [0.0] * (not wild or reach.backend != "torch")  # PyTorch's kernels: 0 * NaN is 0
    number = pick(0.7, -0.3, 1.0, 0.05, 3**0.5, *zero)
    kind = draw(pick("default", "default", "number", "one", "heads"))
    if kind == "default":
        return None
    n = {"number": 0, "one": 1, "heads": c.Hq}[kind]
    return tuple(draw(number) for _ in range(n)) if n else draw(number)


@st.composite
def layouts(draw, c: Case, reach: Reach) -> str:
    names = pick(*[n for n in LAYOUTS if not n.startswith("far")])
    kinds = ["plain", "plain", "same", "same", "each", "each"]
    # in PyTorch's kernels a reason, in the emulator more than the 2^37 bytes that a tensor may have
    narrow = reach.backend == "torch" and min(c.D, c.D if c.Dv is None else c.Dv) <= 1
    kinds += ["far"] * (not narrow and (reach.backend != "cuda" or c.B * c.Hq <= 8))
    kind = draw(pick(*kinds))
    if kind == "each":
        return " ".join(draw(st.tuples(names, names, names, names)))
    return {"plain": "BHND", "far": "far_apart"}.get(kind) or draw(names)


@st.composite
def calls(draw, reach: Reach, op: str = "cross_attention") -> Drawn:
    lengths, splits = draw(sizes(reach))
    c = Case(f"fuzz_{draw(st.integers(0, 9999))}", op=op, **lengths)
    dtype = draw(st.sampled_from(reach.dtypes))
    c = replace(c, mask=draw(mask_names(c)), bias=draw(sometimes(None, broadcast_shapes())))
    c = replace(c, values=draw(value_names(c, reach, dtype)), layout=draw(layouts(c, reach)))
    if c.bias is not None:
        c = replace(c, bias_dtype=draw(sometimes(None, st.sampled_from(reach.bias_dtypes))))
    c = replace(c, scale=draw(scales(c, reach)))
    if reach.flags or op != "cross_attention":
        c = replace(c, softcap=draw(sometimes(None, pick(2.0, 0.2, 50.0))))
        # what is dropped of a row that is not finite is 0 or NaN, as the order of products has it
        if op != "received_mass" and not set(NOT_FINITE) & set(c.values.split()):
            p = draw(sometimes(0.0, pick(0.3, 0.9, 1e-3, 0.5)))
            c = replace(c, dropout_p=p, seed=draw(pick(*SEEDS)))
    leaves = ["q", "k", *["bias"] * (c.bias is not None), *["scale"] * isinstance(c.scale, tuple)]
    if op == "attention_weights":
        c = replace(c, average_heads=draw(st.booleans()), given_lse=draw(st.booleans()))
        leaves += ["lse"] * c.given_lse
    elif op == "received_mass":
        c = replace(c, average_heads=draw(st.booleans()), weighted=draw(st.booleans()))
        leaves += ["row_weight"] * c.weighted
    else:
        c = replace(c, returns=draw(pick(*UPSTREAM)) if reach.flags else "out")
        leaves.append("v")
        # without a gradient of out, eager has zeros for dv where the kernels have 0 * NaN
        if not set(NOT_FINITE) & set(c.values.split()):
            c = replace(c, used=draw(sometimes(None, subset(UPSTREAM[c.returns], least=1))))
    c = replace(c, needs=draw(sometimes(None, subset(leaves))))
    return Drawn(c, reach.backend, dtype, splits, draw(sometimes(None, twists(c, reach))))


def twists(c: Case, reach: Reach) -> st.SearchStrategy:
    """The ways that this case allows."""
    found = [None]
    if c.mask is not None and "bool" not in c.mask and "dense" not in c.mask:
        found += ["dense", *["garbage"] * ("expanded" not in c.layout)]
    if c.B > 1 and c.dropout_p == 0.0 and reach.backend != "torch":
        found.append("flipped")
    return st.sampled_from(found)
