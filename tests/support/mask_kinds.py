"""Every kind of mask by name: a function of a case's sizes and a random generator."""

from __future__ import annotations

import torch
from torch import Tensor

from xattn_kernels import KeyInterval, masks


def integers(g: torch.Generator, high: int, *shape: int) -> Tensor:
    """int32 from 0 to `high`, both possible."""
    return torch.randint(0, high + 1, shape, generator=g, dtype=torch.int32)


def shape_of(letters: str, c) -> tuple[int, ...]:
    """The shape that "B1QK" or "QK" stands for: sizes of the case, or 1."""
    sizes = {"B": c.B, "H": c.Hq, "Q": c.Nq, "K": c.Nk, "1": 1}
    return tuple(sizes[letter] for letter in letters)


def random_bool(letters: str):
    return lambda c, g: torch.rand(shape_of(letters, c), generator=g) > 0.4


def media_locations(c, g) -> Tensor:
    """Images at random places: batch 0 has more than there are keys for, batch 1 a late first."""
    flags = torch.rand(c.B, c.Nq, generator=g) < torch.linspace(0.7, 0.1, c.B)[:, None]
    flags[-1:, : c.Nq // 3] = False
    return flags


def media(**policy):
    return lambda c, g: masks.media(media_locations(c, g), 8, c.Nk // 8, **policy)


def packed(c, g) -> KeyInterval:
    """Four sequences, one without queries and one without keys, then rows of padding."""
    cuts_q, cuts_k = (integers(g, n, 2).sort().values.tolist() for n in (c.Nq - 1, c.Nk))
    cu_q = torch.tensor([0, cuts_q[0], cuts_q[0], cuts_q[1], c.Nq - 1])
    cu_k = torch.tensor([0, cuts_k[0], cuts_k[1], cuts_k[1], c.Nk])
    return masks.packed(cu_q, cu_k, Nq=c.Nq)


def qformer(objective: str, ragged: bool = False):
    def build(c, g):
        queries = c.Nq // 3
        text = c.Nq - queries
        lengths = integers(g, text, c.B) if ragged else None
        return masks.qformer(objective, queries, text, lengths)

    return build


def unsorted(c, g) -> KeyInterval:
    """Bounds drawn independently: about half the rows have start >= stop and see nothing."""
    return KeyInterval(integers(g, c.Nk, c.B, c.Nq), integers(g, c.Nk, c.B, c.Nq))


def nonempty(c, g) -> KeyInterval:
    start, stop = integers(g, c.Nk, 2, c.B, c.Nq).sort(0).values
    start = start.clamp(max=c.Nk - 1)
    return KeyInterval(start, torch.maximum(stop, start + 1))


def in_order(c, g) -> KeyInterval:
    bounds = integers(g, c.Nk, c.B, c.Nq, 2).sort(-1).values.sort(1).values
    return KeyInterval(bounds[..., 0].contiguous(), bounds[..., 1].contiguous())


def empty_rows(c, g) -> KeyInterval:
    """Every second row is empty: start == stop at 0, inside and at Nk, and start > stop."""
    start, stop = torch.zeros(c.B, c.Nq, dtype=torch.int32), integers(g, c.Nk, c.B, c.Nq)
    for row, bounds in enumerate([(0, 0), (c.Nk // 2, c.Nk // 2), (c.Nk, c.Nk), (c.Nk, 0)]):
        start[:, 2 * row :: 8], stop[:, 2 * row :: 8] = bounds
    return KeyInterval(start, stop)


def one_key(c, g) -> KeyInterval:
    key = torch.arange(c.Nq, dtype=torch.int32) * 7 % c.Nk
    return KeyInterval(key, key + 1)


def both_ends(c, g) -> KeyInterval:
    """Neighbouring rows see the first three keys and the last three: nobody sees the middle."""
    late = (torch.arange(c.Nq, dtype=torch.int32) % 2) * (c.Nk - 3)
    return KeyInterval(late, late + 3)


def ragged(c, g) -> KeyInterval:
    """Many keys that all rows see, and at both ends some that not all of them do."""
    i = torch.arange(c.Nq, dtype=torch.int32)
    return KeyInterval((7 * i % 37).clamp(max=c.Nk), (c.Nk - 5 * i % 29).clamp(min=0))


def blocks(c, g) -> KeyInterval:
    """Blocks of rows see thirds of the keys in no order, so the rows of a key are no one block."""
    block = torch.arange(c.Nq, dtype=torch.int32) // 33
    start = block * 7 % 3 * (c.Nk // 3)
    return KeyInterval(start, start + c.Nk // 3)


def empty_batch(c, g) -> KeyInterval:
    stop = torch.full((c.B, 1), c.Nk, dtype=torch.int32)
    stop[0] = 0
    return KeyInterval(torch.zeros((), dtype=torch.int32), stop)


def mixed(c, g) -> KeyInterval:
    """Rows with every key, no key, one key and any interval, in no order."""
    kind = integers(g, 3, c.B, c.Nq)
    start, stop = integers(g, c.Nk, 2, c.B, c.Nq).sort(0).values
    start = start.masked_fill(kind == 0, 0)
    stop = stop.masked_fill(kind == 0, c.Nk)
    stop = torch.where(kind == 1, start, stop)
    stop = torch.where(kind == 2, (start + 1).clamp(max=c.Nk), stop)
    return KeyInterval(start, stop)


def by_row(c, g) -> KeyInterval:
    """Bounds whose memory order is [Nq, B, 2]."""
    bounds = integers(g, c.Nk, c.Nq, c.B, 2).sort(-1).values.transpose(0, 1)
    return KeyInterval(bounds[..., 0], bounds[..., 1])


def bool_empty_rows(c, g) -> Tensor:
    allowed = random_bool("BHQK")(c, g)
    allowed[:, :, ::2] = False
    return allowed


def int32(*values: int) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.int32)


MASKS = {
    "padding": lambda c, g: masks.padding(integers(g, c.Nk, c.B)),
    "padding_left": lambda c, g: masks.padding(integers(g, c.Nk, c.B), side="left", Nk=c.Nk),
    "causal": lambda c, g: masks.causal(c.Nq, c.Nk),
    "window": lambda c, g: masks.window(c.Nq, c.Nk, left=9, right=2),
    "window_left": lambda c, g: masks.window(c.Nq, c.Nk, left=3),
    "media_last": media(),
    "media_all": media(attend="all"),
    "media_all_keys": media(before_first="all_keys"),
    "packed": packed,
    "qformer_itc": qformer("itc"),
    "qformer_itm": qformer("itm"),
    "qformer_itg": qformer("itg"),
    "qformer_ragged": qformer("itg", ragged=True),
    "and": lambda c, g: masks.padding(integers(g, c.Nk, c.B)) & masks.causal(c.Nq, c.Nk),
    "unsorted": unsorted,
    "nonempty": nonempty,
    "in_order": in_order,
    "empty_rows": empty_rows,
    "all_empty": lambda c, g: KeyInterval(int32(c.Nk), int32(0)),
    "empty_batch": empty_batch,
    "mixed": mixed,
    "by_row": by_row,
    "blocks": blocks,
    "ragged": ragged,
    "one_key": one_key,
    "both_ends": both_ends,
    "same_for_all": lambda c, g: KeyInterval(int32(3), int32(c.Nk - 2)),
    "across_tiles": lambda c, g: KeyInterval(int32(31), int32(33)),
    "per_batch": lambda c, g: KeyInterval(int32(1), integers(g, c.Nk, c.B, 1)),
    "per_row": lambda c, g: KeyInterval(integers(g, c.Nk // 2, 1, c.Nq), int32(c.Nk)),
    "bool_BHQK": random_bool("BHQK"),
    "bool_B11K": random_bool("B11K"),
    "bool_B1Q1": random_bool("B1Q1"),
    "bool_1H1K": random_bool("1H1K"),
    "bool_QK": random_bool("QK"),
    "bool_H11": random_bool("H11"),
    "bool_none": lambda c, g: torch.ones((), dtype=torch.bool),
    "bool_all": lambda c, g: torch.zeros((), dtype=torch.bool),
    "bool_empty_rows": bool_empty_rows,
    "bool_by_key": lambda c, g: random_bool("BHKQ")(c, g).transpose(2, 3),
    "bool_expanded": lambda c, g: random_bool("B11K")(c, g).expand(-1, c.Hq, c.Nq, -1),
}


def make_mask(name: str, c, g) -> KeyInterval | Tensor:
    """A key of MASKS; "bool_" and the letters of any shape; several intervals with " & " between;
    with "dense " before it an interval as a bool tensor."""
    if name.startswith("dense "):
        interval = make_mask(name.removeprefix("dense "), c, g)
        return KeyInterval(*interval.expand(c.B, c.Nq)).dense(c.Nk)[:, None]
    first, *others = (
        MASKS.get(n) or random_bool(n.removeprefix("bool_")) for n in name.split(" & ")
    )
    mask = first(c, g)
    for other in others:
        mask = mask & other(c, g)
    return mask


def possible(name: str, c) -> bool:
    """Whether the case's sizes allow the mask."""
    least = {"nonempty": c.Nk, "one_key": c.Nk, "both_ends": c.Nk - 2, "packed": c.Nq,
             "empty_batch": c.B, "across_tiles": c.Nk - 32}  # fmt: skip
    if name.startswith("qformer"):
        return c.Nk >= c.Nq
    return least.get(name, 1) > 0
