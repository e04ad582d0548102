"""The masks of cross-attention: one interval of keys per query.

In a `KeyInterval(start, stop)` query `i` of batch `b` attends to the keys
`start[b, i] <= j < stop[b, i]`. Each constructor lowers its mask to such an interval at once, and
intervals combine with `&`. A mask that is no interval is a bool tensor or a bias.

    padding, causal, window   ragged keys, autoregression (bottom-right aligned), local attention
    media                     text among images: Flamingo, Idefics, Mllama
    packed                    sequences of different lengths laid end to end
    qformer                   the three objectives of BLIP-2's Q-Former

Sizes are ints. Lengths are int32 or int64 tensors, whose device the mask gets; the other
constructors take a `device`. No constructor waits for a device (except `packed` without `Nq`), so
values are checked on the CPU only; `KeyInterval.check` reads them on any device. A wrong type
raises TypeError, a wrong value ValueError.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["KeyInterval", "padding", "causal", "window", "media", "packed", "qformer"]

Device = torch.device | str | None
MOST = 2**31 - 1  # the largest int32 bound


@dataclass(frozen=True, eq=False, repr=False)
class KeyInterval:
    """A mask: query `i` of batch `b` attends to the keys `start[b, i] <= j < stop[b, i]`.

    start, stop: int32 tensors on one device that broadcast to `[B, Nq]` (0-d, `[Nq]`, `[1, Nq]`,
        `[B, 1]` or `[B, Nq]`) and with each other; they are neither copied nor expanded.
        A row with `start >= stop` sees nothing.

    >>> start = torch.tensor([0, 2], dtype=torch.int32)
    >>> KeyInterval(start, start + 2) & padding(torch.tensor([3]))
    KeyInterval(0:2, 2:3; shape=(1, 2), device=cpu)
    >>> _.dense(4).long()
    tensor([[[1, 1, 0, 0],
             [0, 0, 1, 0]]])
    """

    start: Tensor
    stop: Tensor

    def __post_init__(self) -> None:
        for name, bound in (("start", self.start), ("stop", self.stop)):
            if not isinstance(bound, Tensor) or bound.dtype != torch.int32:
                raise TypeError(f"{name} must be an int32 tensor, not {_kind(bound)}")
            if bound.dim() > 2:
                raise ValueError(f"{name} {list(bound.shape)} does not broadcast to [B, Nq]")
        _check_fit("start", self.start, "stop", self.stop)

    @property
    def shape(self) -> torch.Size:
        """The common shape of start and stop, before it broadcasts to `[B, Nq]`."""
        return torch.broadcast_shapes(self.start.shape, self.stop.shape)

    @property
    def device(self) -> torch.device:
        """The device of both tensors."""
        return self.start.device

    def __and__(self, other: KeyInterval) -> KeyInterval:
        """The keys that both allow, `max(starts) <= j < min(stops)`."""
        if not isinstance(other, KeyInterval):
            raise TypeError(f"& needs two KeyIntervals, not {_kind(other)}; or combine dense(Nk)")
        _check_fit("the left KeyInterval", self, "the right one", other)
        start = torch.maximum(self.start, other.start)
        return KeyInterval(start, torch.minimum(self.stop, other.stop))

    def dense(self, Nk: int) -> Tensor:
        """The mask as a bool tensor `[*shape, Nk]`, True = attend. For tests and pictures."""
        keys = torch.arange(_size("Nk", Nk), dtype=torch.int32, device=self.device)
        return (self.start[..., None] <= keys) & (keys < self.stop[..., None])

    def visible_fraction(self, Nk: int) -> Tensor:
        """The mean share of `Nk` keys that a query sees, 0-d float32; 0 without rows or keys."""
        Nk = _size("Nk", Nk)
        visible = (self.stop.clamp(0, Nk) - self.start.clamp(0, Nk)).clamp(min=0)
        return visible.sum(dtype=torch.int64) / max(visible.numel() * Nk, 1)

    def to(self, device: Device, non_blocking: bool = False) -> KeyInterval:
        """The same intervals on another device."""
        bounds = (self.start, self.stop)
        return KeyInterval(*(x.to(device=device, non_blocking=non_blocking) for x in bounds))

    def expand(self, B: int, Nq: int) -> tuple[Tensor, Tensor]:
        """The bounds `(start, stop)` as `[B, Nq]` views, with stride 0 where they broadcast."""
        for name, bound in (("start", self.start), ("stop", self.stop)):
            sizes = (B, Nq)[2 - bound.dim() :]
            if any(n != 1 and n != size for n, size in zip(bound.shape, sizes, strict=True)):
                shape = f"{name} {list(bound.shape)} of the KeyInterval"
                raise ValueError(f"{shape} does not broadcast to [B, Nq] = {[B, Nq]}")
        return self.start.expand(B, Nq), self.stop.expand(B, Nq)

    def check(self, Nk: int) -> None:
        """Raises ValueError for a row with `start < 0` or `stop > Nk`; waits for the device."""
        outside = (self.start < 0) | (self.stop > Nk)
        if not outside.any():
            return
        row = tuple(outside.nonzero()[0].tolist())
        start, stop = (bound.expand(self.shape)[row].item() for bound in (self.start, self.stop))
        names = ("batch", "query")[2 - len(row) :]
        where = ", ".join(f"{name} {i}" for name, i in zip(names, row, strict=True)) or "every row"
        raise ValueError(
            f"the KeyInterval at {where} is {start} <= j < {stop}; with {Nk} keys it needs "
            f"start >= 0 and stop <= {Nk}"
        )

    def __repr__(self) -> str:
        facts = f"shape={tuple(self.shape)}, device={self.device}"
        if type(self.start) is not Tensor or self.device.type == "meta":  # no values to show
            return f"KeyInterval({facts})"
        start, stop = (bound.expand(self.shape).flatten() for bound in (self.start, self.stop))
        rows = [f"{a}:{b}" for a, b in torch.stack([start, stop], 1)[:8].tolist()]
        return f"KeyInterval({', '.join(rows + ['...'] * (start.numel() > 8))}; {facts})"


def padding(key_lengths: Tensor, *, side: str = "right", Nk: int | None = None) -> KeyInterval:
    """The mask of the `key_lengths[b]` real keys of batch `b`; the others are padding.

        0 <= j < key_lengths[b]            side="right": the padding is on the right
        Nk - key_lengths[b] <= j < Nk      side="left", which needs Nk

    key_lengths: integer tensor `[B]`. Returns bounds that broadcast to `[B, 1]`.

    >>> padding(torch.tensor([3, 1])).dense(4)[:, 0].long()
    tensor([[1, 1, 1, 0],
            [1, 0, 0, 0]])
    """
    _one_of("side", side, "right", "left")
    Nk = Nk if Nk is None else _size("Nk", Nk)
    lengths = check_lengths("key_lengths", key_lengths, most=Nk)[:, None]
    if side == "right":
        return KeyInterval(lengths.new_zeros(()), lengths)
    if Nk is None:
        raise ValueError("padding(side='left') needs Nk, the number of keys")
    return KeyInterval(Nk - lengths, lengths.new_full((), Nk))


def causal(Nq: int, Nk: int, *, device: Device = None) -> KeyInterval:
    """The mask by which a query sees the keys up to its position; the last one is at the last key.

        0 <= j <= i + Nk - Nq      (bottom-right aligned, as in FlashAttention 2.1 and later)

    With `Nq > Nk` the first `Nq - Nk` rows see nothing. Returns bounds that broadcast to `[Nq]`.

    >>> causal(2, 4).dense(4).long()
    tensor([[1, 1, 1, 0],
            [1, 1, 1, 1]])
    """
    return window(Nq, Nk, right=0, device=device)


def window(
    Nq: int, Nk: int, left: int | None = None, right: int | None = None, *, device: Device = None
) -> KeyInterval:
    """The mask by which a query sees `left` keys before its position and `right` keys after it.

        i + Nk - Nq - left <= j <= i + Nk - Nq + right      (bottom-right aligned; None: no limit)

    This is the sliding window of Longformer (arXiv 2004.05150) and of Mistral (arXiv 2310.06825,
    with `right=0`). Returns bounds that broadcast to `[Nq]`.

    >>> window(2, 4, left=1, right=0).dense(4).long()
    tensor([[0, 1, 1, 0],
            [0, 0, 1, 1]])
    """
    Nq, Nk = _size("Nq", Nq), _size("Nk", Nk)
    position = torch.arange(Nq, dtype=torch.int32, device=device) + (Nk - Nq)
    start, stop = position.new_zeros(()), position.new_full((), Nk)
    if left is not None:  # the reach is cut first: it may be any large number
        start = (position - min(_size("left", left, None), Nk)).clamp(min=0)
    if right is not None:
        stop = (position + min(_size("right", right, None), Nq) + 1).clamp(0, Nk)
    return KeyInterval(start, stop)


def media(
    media_locations: Tensor,
    tokens_per_media: int,
    n_media: int,
    attend: str = "last",
    before_first: str = "none",
) -> KeyInterval:
    """The mask of text among images: a token sees the last image so far, or all images so far.

    The keys are `n_media` images of `t = tokens_per_media` keys each, end to end. With
    `c = sum(media_locations[b, :i + 1])`, the number of images so far in the text:

        (c - 1) t <= j < c t             attend="last"; no key where c > n_media
        0 <= j < min(c, n_media) t       attend="all"
        0 <= j < n_media t               before_first="all_keys", where c = 0 (no key with "none")

    media_locations: bool `[B, Nq]`, True at the one token that stands for an image and sees it.
    Returns bounds that broadcast to `[B, Nq]`. With attend="last" a row with `c > n_media` sees
    nothing. OpenFlamingo and lucidrains' Flamingo give such rows the mean of all values (all their
    scores are one fill value), and so too, with attend="all", the rows before the first image. To
    decode, build the mask of the whole text and keep the last n rows of the result of `expand`:
    `KeyInterval(*(bound[:, -n:] for bound in mask.expand(B, Nq)))`.

    Sources: Flamingo (arXiv 2204.14198, section 2.3). Before the first image, Flamingo, Idefics and
    Meta's Llama 3.2 Vision see nothing, Llama 3.2 Vision in transformers sees all keys.

    >>> media(torch.tensor([[False, True, False, True]]), 2, 2).dense(4).long()
    tensor([[[0, 0, 0, 0],
             [1, 1, 0, 0],
             [1, 1, 0, 0],
             [0, 0, 1, 1]]])
    """
    if not isinstance(media_locations, Tensor) or media_locations.dtype != torch.bool:
        raise TypeError(f"media_locations must be a bool tensor, not {_kind(media_locations)}")
    if media_locations.dim() != 2:
        raise ValueError(f"media_locations must be [B, Nq], not {list(media_locations.shape)}")
    _one_of("attend", attend, "last", "all")
    _one_of("before_first", before_first, "none", "all_keys")
    tokens, n_media = _size("tokens_per_media", tokens_per_media), _size("n_media", n_media)
    _size("tokens_per_media * n_media", tokens * n_media)
    count = media_locations.cumsum(-1, dtype=torch.int32)
    # The counts are clamped before the product, which could overflow. An empty interval lies at 0
    # or Nk, in order with its neighbours: elsewhere it would widen the keys that its tile visits.
    stop = count.clamp(max=n_media) * tokens
    start = (count - 1).clamp(0, n_media) * tokens if attend == "last" else stop.new_zeros(())
    if before_first == "all_keys":
        stop = torch.where(count == 0, n_media * tokens, stop)
    return KeyInterval(start, stop)


def packed(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, Nq: int | None = None) -> KeyInterval:
    """The mask of sequences laid end to end: a query sees the keys of its own sequence.

        cu_k[s] <= j < cu_k[s + 1]      with the s for which  cu_q[s] <= i < cu_q[s + 1]

    cu_seqlens_q, cu_seqlens_k: integer tensors `[S + 1]` of cumulative lengths, beginning
        with 0, as in FlashAttention's varlen functions; a sequence may be empty on either side.
    Nq: the number of query rows, by default `cu_seqlens_q[-1]`, whose read waits for the device.
        Rows after the last sequence see nothing.

    The batch size is 1. Returns bounds of shape `[Nq]`.

    >>> packed(torch.tensor([0, 2, 3]), torch.tensor([0, 1, 4])).dense(4).long()
    tensor([[1, 0, 0, 0],
            [1, 0, 0, 0],
            [0, 1, 1, 1]])
    """
    cu_q = _cumulative("cu_seqlens_q", cu_seqlens_q)
    cu_k = _cumulative("cu_seqlens_k", cu_seqlens_k)
    if len(cu_q) != len(cu_k):
        raise ValueError(f"cu_seqlens_q has {len(cu_q)} entries, cu_seqlens_k has {len(cu_k)}")
    _check_fit("cu_seqlens_q", cu_q, "cu_seqlens_k", cu_k)
    Nq = int(cu_q[-1]) if Nq is None else _size("Nq", Nq)
    if _readable(cu_q) and Nq < cu_q[-1]:
        raise ValueError(f"Nq must be at least cu_seqlens_q[-1] = {cu_q[-1]}, not {Nq}")
    rows = torch.arange(Nq, dtype=torch.int32, device=cu_q.device)
    # The last sequence that begins at or before a row is not empty and contains the row.
    sequence = torch.searchsorted(cu_q, rows, right=True) - 1
    return KeyInterval(cu_k[sequence], cu_k[(sequence + 1).clamp(max=len(cu_k) - 1)])


def qformer(
    objective: str,
    num_queries: int,
    text_length: int,
    text_lengths: Tensor | None = None,
    *,
    device: Device = None,
) -> KeyInterval:
    """The mask of self-attention in BLIP-2's Q-Former, whose rows and keys are `[queries; text]`.

    With `Q = num_queries` and `T = text_length`, a query row and row `Q + t` of the text see:

        "itc"   0 <= j < Q        Q <= j < Q + T     contrastive: neither sees the other
        "itm"   0 <= j < Q + T    0 <= j < Q + T     matching: everything sees everything
        "itg"   0 <= j < Q        0 <= j <= Q + t    generation: causal text, sees the queries

    text_lengths: integer tensor `[B]`, the length of the real text in each batch element; the
        tokens after it are padding that no row sees.

    Returns bounds that broadcast to `[Q + T]`, or with text_lengths to `[B, Q + T]`.
    Source: BLIP-2 (arXiv 2301.12597, section 3.2 and figure 2).

    >>> qformer("itg", 2, 1).dense(3).long()
    tensor([[1, 1, 0],
            [1, 1, 0],
            [1, 1, 1]])
    """
    _one_of("objective", objective, "itc", "itm", "itg")
    Q, T = _size("num_queries", num_queries), _size("text_length", text_length)
    if text_lengths is not None:
        real = check_lengths("text_lengths", text_lengths, most=T)
        device = real.device if device is None else device
    row = torch.arange(Q + T, dtype=torch.int32, device=device)
    text = (row >= Q).int()
    if objective == "itc":
        mask = KeyInterval(text * Q, Q + text * T)
    else:
        stop = row.new_full((), Q + T) if objective == "itm" else (row + 1).clamp(min=Q)
        mask = KeyInterval(row.new_zeros(()), stop)
    return mask if text_lengths is None else mask & padding(Q + real)


def _kind(value: object) -> str:
    """The type of `value` for an error message, with the dtype of a tensor."""
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__


def _one_of(name: str, value: str, *allowed: str) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")


def _size(name: str, value: int, most: int | None = MOST) -> int:
    """`value` itself; raises unless it is an int from 0 to `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, not {_kind(value)}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, not {value}")
    if most is not None and isinstance(value, int) and value > most:
        raise ValueError(f"{name} must be at most {most}, since bounds are int32, not {value}")
    return value


def check_lengths(name: str, value: Tensor, most: int | None = None) -> Tensor:
    """`value` as int32; raises unless it is an integer tensor [B] of, on a CPU, 0 to `most`."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor, not {_kind(value)}")
    if value.dim() != 1:
        raise ValueError(f"{name} must have 1 dimension, not shape {list(value.shape)}")
    if _readable(value) and value.numel():
        if value.min() < 0:
            raise ValueError(f"{name} must be at least 0, not {value.min()}")
        most = MOST if most is None else most
        if value.max() > most:
            raise ValueError(f"{name} must be at most {most}, not {value.max()}")
    return value.int()


def _cumulative(name: str, value: Tensor) -> Tensor:
    """`value` as int32; raises unless its values begin with 0 and never decrease."""
    value = check_lengths(name, value).contiguous()
    if not len(value) or _readable(value) and (value[0] != 0 or (value.diff() < 0).any()):
        raise ValueError(f"{name} must begin with 0 and never decrease, not {value.tolist()}")
    return value


def _readable(value: Tensor) -> bool:
    """Whether the values can be read without waiting for a device or breaking a graph."""
    return type(value) is Tensor and value.is_cpu and not torch.compiler.is_compiling()


def _check_fit(a_name: str, a: object, b_name: str, b: object) -> None:
    """Raises unless two tensors or KeyIntervals are on one device and broadcast together."""
    if a.device != b.device:
        raise ValueError(f"{a_name} is on {a.device}, but {b_name} is on {b.device}")
    pairs = zip(reversed(a.shape), reversed(b.shape), strict=False)
    if any(m != n and m != 1 and n != 1 for m, n in pairs):
        raise ValueError(f"{a_name} {list(a.shape)} and {b_name} {list(b.shape)} do not broadcast")
