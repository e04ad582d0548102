"""Named calls of `cross_attention` that every backend has to get right.

A `Case` says in words what is special about a call; `calls.py` turns it into tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch

from support.mask_kinds import MASKS


@dataclass(frozen=True)
class Case:
    """One call. `layout` and `values` are keys of LAYOUTS and VALUES in `values.py`, or several
    with spaces between: layouts of q, k, v and dout, values one after the other."""

    name: str
    B: int = 2
    Hq: int = 2
    Hkv: int = 2
    Nq: int = 5
    Nk: int = 40
    D: int = 16
    Dv: int | None = None  # D
    layout: str = "BHND"
    mask: str | None = None  # see `make_mask` in `mask_kinds.py`
    bias: str | None = None  # its shape in letters, such as "B1QK" or "K"
    bias_dtype: torch.dtype | None = None  # that of q
    scale: tuple[float, ...] | float | None = None  # a tuple is a tensor of one or Hq values
    softcap: float | None = None
    dropout_p: float = 0.0
    seed: int = 2**40 + 123
    returns: str = "statistics"  # or "lse", "out"
    used: str | None = None  # the outputs that get a gradient, such as "out lse"; all
    needs: str | None = None  # the inputs that require one, such as "q bias"; all
    values: str = "normal"
    op: str = "cross_attention"  # or "attention_weights", "received_mass", with the following
    average_heads: bool = True
    given_lse: bool = False  # of attention_weights
    weighted: bool = False  # of received_mass: it is given a row_weight

    def __str__(self) -> str:
        return self.name


# More rows for a key head than one tile takes, so that dq and dk, dv have kernels of their own.
LONG = dict(Nq=70, Hq=1, Hkv=1, B=1)

SIZES = [
    Case("no_queries", Nq=0),
    Case("no_keys", Nk=0),
    Case("no_keys_masked", Nk=0, mask="per_row"),
    Case("nothing", Nq=0, Nk=0),
    Case("no_batch", B=0),
    Case("narrow", D=1, Dv=3),
    *[
        Case(f"{q}x{k}", B=1, Hq=h, Hkv=1, Nq=q, Nk=k)
        for q, k, h in [
            (1, 1, 1), (1, 31, 2), (3, 34, 1), (1, 136, 4), (31, 257, 1), (34, 1, 2), (136, 33, 1),
            (257, 3, 1), (64, 64, 1), (65, 128, 1), (15, 129, 1), (16, 32, 1), (17, 31, 1),
        ]
    ],
    Case("many_tiles", B=1, Hq=1, Hkv=1, Nq=300, Nk=150, mask="blocks"),
    *[
        Case(f"whole_tiles_{m}", B=1, Hq=1, Hkv=1, Nq=150, Nk=280, mask=m, returns="out")
        for m in (None, "padding", "causal", "blocks", "ragged")
    ],
    Case("whole_tiles_group", B=1, Hq=3, Hkv=1, Nq=90, Nk=150, mask="causal", returns="out"),
    Case("out_only", returns="out"),
    Case("out_only_long", returns="out", **LONG),
    Case("lse_only", returns="lse"),
    Case("lse_only_long", returns="lse", **LONG),
]  # fmt: skip

WIDTHS = [
    *[Case(f"width_{d}", B=1, D=d) for d in (8, 24, 32, 40, 64, 72, 80, 96, 128, 160, 256)],
    *[
        Case(f"widths_{d}_{e}", B=1, D=d, Dv=e)
        for d, e in [(64, 32), (16, 80), (20, 7), (96, 160), (96, 256), (112, 112)]
    ],
    *[Case(f"width_{d}_long", D=d, Dv=e, **LONG) for d, e in [(24, 40), (80, 80), (96, 17)]],
]

HEADS = [
    *[Case(f"group_{h // n}", Hq=h, Hkv=n, B=1) for h, n in [(2, 1), (6, 2), (8, 2), (8, 1)]],
    *[Case(f"group_{g}_long", Hq=2 * g, Hkv=2, B=1, Nq=70 // g, returns="out") for g in (2, 3, 4)],
    Case("group_8_long", Hq=8, Hkv=1, B=1, Nq=19, mask="nonempty"),
    Case("batches_long", **LONG | dict(B=2, Hq=2, Hkv=2), returns="lse"),
]

PLACED = [
    *[
        Case(f"layout_{layout}", layout=layout, Hq=4, mask="nonempty")
        for layout in ("BNHD", "NBHD", "BN2HD", "sliced", "expanded_batch", "expanded_heads")
    ],
    *[
        Case(f"layout_{layout}_long", layout=layout, Nq=40, Hq=4, B=1, D=24)
        for layout in ("BNHD", "sliced", "far_apart")
    ],
    Case("layout_far_apart", layout="far_apart", mask="nonempty"),
    Case("layout_far_tiles", layout="far_apart", **LONG | dict(Nq=65, Nk=65)),
    Case("layout_far_batches", layout="far_batches", B=3, returns="out"),
    Case("layout_far_heads", layout="far_heads", B=1, Hq=3, Hkv=3, returns="out"),
    Case("layout_far_heads_long", layout="far_heads", returns="out", **LONG | dict(Hq=3, Hkv=3)),
]

MASKED = [
    *[Case(f"mask_{m}", mask=m, Nq=40 if m.startswith("qformer") else 13, Hkv=1,
           B=1 if m == "packed" else 2) for m in MASKS],
    *[
        Case(f"mask_{m}_long", mask=m, Nq=75, Nk=75, Hq=1, Hkv=1, B=1 if m == "packed" else 2)
        for m in ("causal", "packed", "media_last", "unsorted", "empty_rows", "both_ends",
                  "all_empty", "blocks", "bool_BHQK", "bool_B11K", "bool_empty_rows", "qformer_itg")
    ],
]  # fmt: skip

BIASED = [
    *[
        Case(f"bias_{b or 'scalar'}", bias=b, Nq=7)
        for b in ("BHQK", "1HQK", "B11K", "QK", "B1Q1", "H11", "K", "1", "", "BH1K")
    ],
    *[Case(f"bias_{b}_long", bias=b, **LONG | dict(Nk=70)) for b in ("BHQK", "1111", "Q1", "K")],
    Case("bias_float32", bias="B1QK", bias_dtype=torch.float32),
    Case("bias_infinite", bias="BHQK", Nq=9, values="bias_infinite"),
    Case("bias_infinite_long", bias="BHQK", values="bias_infinite", **LONG),
    Case("bias_lowest", bias="B1QK", values="bias_lowest"),
    Case("bias_lowest_rows", bias="B1QK", values="bias_lowest_rows"),
    Case("bias_lowest_rows_long", bias="Q1", values="bias_lowest_rows", **LONG),
    Case("bias_minus_1e9", bias="B1QK", values="bias_minus_1e9"),
    Case("bias_minus_1e9_long", bias="QK", values="bias_minus_1e9", dropout_p=0.3, **LONG),
    Case("bias_lowest_keys", bias="B11K", Nk=150, values="bias_lowest_keys"),
    Case("bias_lowest_keys_long", bias="K", values="bias_lowest_keys", **LONG | dict(Nk=150)),
    Case("bias_masked", bias="H1K", mask="empty_rows", Nq=16),
    Case("bias_across_tiles", bias="BHQK", mask="across_tiles"),
    Case("bias_by_key", bias="BHQK", values="bias_by_key"),
]

SCALED = [
    Case("scale_number", scale=0.7),
    Case("scale_zero", scale=0.0),
    Case("scale_negative", scale=-0.3),
    Case("scale_negative_lse", scale=-0.3, returns="lse"),
    Case("scale_zero_lse", scale=0.0, returns="lse"),
    # the lowest score times such a scale is out of float32's range
    *[
        Case(f"mask_{m}_scale_{n}", scale=n**0.5, mask=m, returns="lse")
        for m, n in (("empty_rows", 3), ("empty_rows", 5), ("both_ends", 7), ("unsorted", 2))
    ],
    Case("scale_tensor", scale=(0.4,)),
    Case("scale_heads", scale=(0.4, 0.1)),
    Case("scale_heads_signs", Hq=3, Hkv=1, scale=(-0.4, 0.0, 0.2)),
    Case("scale_heads_long", **LONG | dict(Hq=2, scale=(-0.4, 0.2))),
    Case("scale_heads_alone_long", **LONG | dict(Hq=2, Hkv=2, scale=(-0.4, 0.2))),
    Case("scale_shared_long", **LONG | dict(Hq=2, Hkv=2, scale=(0.3,))),
    Case("softcap", softcap=2.0),
    Case("softcap_tight", softcap=0.2, scale=1.0, **LONG),
    Case("softcap_wide", softcap=50.0),
]

DROPPED = [
    Case("dropout", dropout_p=0.3),
    Case("dropout_most", dropout_p=0.9, Hq=4),
    Case("dropout_little", dropout_p=1e-3, returns="out"),
    Case("dropout_long", dropout_p=0.5, **LONG | dict(Hq=3)),
    Case("dropout_masked", dropout_p=0.5, mask="empty_rows", Nq=16),
]

VALUED = [
    Case("ties", values="ties", Nk=70),
    Case("equal_keys", values="equal_keys"),
    Case("overflow", values="overflow", scale=3e-5, D=32),
    Case("overflow_long", values="overflow", scale=3e-5, D=32, **LONG),
    Case("peaked", values="peaked"),
    Case("tiny", values="tiny"),
    *[
        Case(f"{v}_{length}", values=v, bias="BHQK" if v == "nan_bias" else None, Nq=n, B=1, Hq=2)
        for v in ("nan_q", "nan_k", "nan_v", "nan_bias", "infinite_q", "infinite_k", "infinite_v")
        for length, n in (("short", 5), ("long", 67))
    ],
    *[
        Case(f"softcap_{v}_{length}", values=v, softcap=50.0, Nq=n, B=1, Hq=2, Hkv=1)
        for v in ("infinite_q", "infinite_k")
        for length, n in (("short", 5), ("long", 35))
    ],
]

FLAGS = {
    "interval": dict(mask="unsorted"),
    "bool": dict(mask="bool_B11K"),
    "bias": dict(bias="1HQK"),
    "scale": dict(scale=(0.3, -0.2)),
    "softcap": dict(softcap=1.5),
    "dropout": dict(dropout_p=0.4),
    "statistics": dict(returns="statistics"),
    "group": dict(Hkv=1),
    "long": dict(Nq=67),
}
PAIRS = [
    Case(f"{a}_and_{b}", **dict(B=1, returns="out", Nq=6, Nk=37) | FLAGS[a] | FLAGS[b])
    for a, b in combinations(FLAGS, 2)
    if {a, b} != {"interval", "bool"}
]
EVERYTHING = [
    Case(f"everything_{n}", Nq=n, Hq=4, mask="unsorted", bias="BHQK", softcap=3.0, dropout_p=0.2,
         scale=(0.3, 0.2, 0.5, -0.1), D=24, Dv=40, layout="BNHD")
    for n in (3, 37)
]  # fmt: skip

CASES = [
    *SIZES, *WIDTHS, *HEADS, *PLACED, *MASKED, *BIASED, *SCALED, *DROPPED, *VALUED, *PAIRS,
    *EVERYTHING,
]  # fmt: skip
BY_NAME = {c.name: c for c in CASES}
assert len(BY_NAME) == len(CASES)
