"""Every mask constructor against a predicate written from its definition, one key at a time."""

import doctest

import pytest
import torch

pytest.importorskip("hypothesis", reason="masks are drawn by hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from xattn_kernels import masks
from xattn_kernels.masks import KeyInterval

quick = settings(max_examples=50, deadline=None, derandomize=True)
sizes = st.integers(0, 6)
lengths = st.lists(sizes, min_size=1, max_size=4)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def assert_mask(mask, B, Nq, Nk, visible):
    """`visible(b, i, j)` for each key of each query is what `mask` says, within the keys."""
    mask.check(Nk)
    start, stop = mask.expand(B, Nq)
    assert start.dtype == stop.dtype == torch.int32
    expected = [[[visible(b, i, j) for j in range(Nk)] for i in range(Nq)] for b in range(B)]
    assert KeyInterval(start, stop).dense(Nk).tolist() == expected


@quick
@given(lengths, sizes, st.sampled_from([torch.int32, torch.int64]))
def test_padding(key_lengths, spare, dtype):
    B, Nk = len(key_lengths), max(key_lengths) + spare
    tensor = torch.tensor(key_lengths, dtype=dtype)
    assert_mask(masks.padding(tensor), B, 2, Nk, lambda b, i, j: j < key_lengths[b])
    left = masks.padding(tensor, side="left", Nk=Nk)
    assert_mask(left, B, 2, Nk, lambda b, i, j: j >= Nk - key_lengths[b])


@quick
@given(sizes, sizes)
def test_causal(Nq, Nk):
    # Query i stands as far from the last query as the last key it sees from the last key.
    assert_mask(masks.causal(Nq, Nk), 2, Nq, Nk, lambda b, i, j: Nk - 1 - j >= Nq - 1 - i)


@quick
@given(sizes, sizes, *[st.one_of(st.none(), sizes, st.just(2**63 - 1))] * 2)
def test_window(Nq, Nk, left, right):
    def visible(b, i, j):
        distance = j - (i + Nk - Nq)
        return (left is None or distance >= -left) and (right is None or distance <= right)

    assert_mask(masks.window(Nq, Nk, left, right), 2, Nq, Nk, visible)


rows_of_flags = st.integers(0, 8).flatmap(
    lambda Nq: st.lists(st.lists(st.booleans(), min_size=Nq, max_size=Nq), min_size=1, max_size=3)
)


@quick
@given(
    rows_of_flags,
    st.integers(0, 3),
    st.integers(0, 4),
    st.sampled_from(["last", "all"]),
    st.sampled_from(["none", "all_keys"]),
)
def test_media(locations, t, n_media, attend, before_first):
    def visible(b, i, j):
        seen = [image for image in range(sum(locations[b])) if position(b, image) <= i]
        if not seen:
            return before_first == "all_keys"
        return any(j // t == image for image in (seen[-1:] if attend == "last" else seen))

    def position(b, image):
        return [i for i, is_media in enumerate(locations[b]) if is_media][image]

    tensor = torch.tensor(locations, dtype=torch.bool).reshape(len(locations), -1)
    mask = masks.media(tensor, t, n_media, attend, before_first)
    assert_mask(mask, *tensor.shape, n_media * t, visible)


def test_media_with_more_images_in_the_text_than_among_the_keys():
    locations = torch.tensor([[False, True, True, True, True, False]])
    last, so_far = (masks.media(locations, 5, 2, attend=attend) for attend in ("last", "all"))
    # The empty rows stay in order with their neighbours and do not widen their tile's range.
    assert last.start.tolist() == [[0, 0, 5, 10, 10, 10]]
    assert last.stop.tolist() == [[0, 5, 10, 10, 10, 10]]
    assert so_far.start.tolist() == 0
    assert so_far.stop.tolist() == [[0, 5, 10, 10, 10, 10]]


def test_media_of_many_images_does_not_overflow():
    mask = masks.media(torch.ones(1, 3, dtype=torch.bool), 2**30, 1)
    assert mask.stop.tolist() == [[2**30] * 3]


@quick
@given(st.lists(st.tuples(sizes, sizes), max_size=5), sizes, st.booleans())
def test_packed(segments, spare, told):
    of_q = [s for s, (n_q, _) in enumerate(segments) for _ in range(n_q)]
    of_k = [s for s, (_, n_k) in enumerate(segments) for _ in range(n_k)]
    cu_q, cu_k = (
        torch.tensor([0, *(segment[side] for segment in segments)]).cumsum(0) for side in (0, 1)
    )
    Nq = len(of_q) + spare if told else None
    mask = masks.packed(cu_q, cu_k.int(), Nq=Nq)

    def visible(b, i, j):
        return i < len(of_q) and of_q[i] == of_k[j]

    assert_mask(mask, 1, len(of_q) + spare * told, len(of_k), visible)


@quick
@given(st.sampled_from(["itc", "itm", "itg"]), sizes, lengths, sizes, st.booleans())
def test_qformer(objective, Q, text_lengths, spare, ragged):
    T = max(text_lengths) + spare

    def visible(b, i, j):
        if ragged and j >= Q + text_lengths[b]:
            return False
        if objective == "itm":
            return True
        if i < Q:
            return j < Q
        return j >= Q if objective == "itc" else j < Q or j <= i

    mask = masks.qformer(objective, Q, T, torch.tensor(text_lengths) if ragged else None)
    assert_mask(mask, len(text_lengths), Q + T, Q + T, visible)


@st.composite
def intervals(draw, B=3, Nq=4, low=-3, high=9):
    def bound():
        shape = draw(st.sampled_from([(), (Nq,), (1,), (1, Nq), (B, 1), (B, Nq)]))
        n = torch.Size(shape).numel()
        values = draw(st.lists(st.integers(low, high), min_size=n, max_size=n))
        return int32(*values).reshape(shape)

    return KeyInterval(bound(), bound())


@quick
@given(intervals(), intervals(), sizes)
def test_intersection_and_visible_fraction_are_those_of_the_dense_masks(a, b, Nk):
    def dense(mask):
        return KeyInterval(*mask.expand(3, 4)).dense(Nk)

    assert torch.equal(dense(a & b), dense(a) & dense(b))
    assert a.dense(Nk).shape == (*a.shape, Nk)
    fraction = a.visible_fraction(Nk)
    assert fraction.dtype == torch.float32 and fraction.shape == ()
    count = dense(a).sum().item()
    assert fraction.item() == pytest.approx(count / (12 * Nk) if Nk else 0)


@quick
@given(intervals(), sizes)
def test_check_names_the_first_row_that_leaves_the_keys(mask, Nk):
    start, stop = (bound.expand(mask.shape) for bound in (mask.start, mask.stop))
    rows = [tuple(row) for row in torch.ones(mask.shape).nonzero().tolist()]
    bad = [row for row in rows if start[row] < 0 or stop[row] > Nk]
    if not bad:
        return mask.check(Nk)
    names = ["batch", "query"][2 - len(mask.shape) :]
    where = ", ".join(f"{name} {i}" for name, i in zip(names, bad[0], strict=True)) or "every row"
    first, last = start[bad[0]], stop[bad[0]]
    with pytest.raises(ValueError, match=rf"at {where} is {first} <= j < {last}; with {Nk} keys"):
        mask.check(Nk)


def test_expand_returns_views():
    start, stop = masks.padding(torch.tensor([3, 1])).expand(2, 5)
    assert start.shape == stop.shape == (2, 5)
    assert start.stride() == (0, 0) and stop.stride() == (1, 0)


def test_repr_shows_the_rows():
    assert repr(masks.causal(2, 4)) == "KeyInterval(0:3, 0:4; shape=(2,), device=cpu)"
    many = repr(masks.causal(9, 9).to("cpu"))
    assert many.endswith("0:8, ...; shape=(9,), device=cpu)")
    assert repr(masks.causal(2, 4).to("meta")) == "KeyInterval(shape=(2,), device=meta)"


def build_each(device):
    """One mask of each constructor with tensors on `device`."""
    two = torch.ones(2, dtype=torch.int64, device=device)
    locations = torch.ones(2, 3, dtype=torch.bool, device=device)
    mask = masks.padding(two) & masks.padding(two, side="left", Nk=4)
    mask = mask & masks.causal(3, 4, device=device) & masks.window(3, 4, 1, 1, device=device)
    mask = mask & masks.media(locations, 2, 2) & masks.media(locations, 2, 2, "all", "all_keys")
    mask = mask & masks.packed(two.cumsum(0) - 1, two.cumsum(0) - 1, Nq=3)
    for objective in ("itc", "itm", "itg"):
        mask = mask & masks.qformer(objective, 1, 2, two)
        mask = mask & masks.qformer(objective, 1, 2, device=device)
    return mask


def test_nothing_waits_for_the_device():
    # A meta tensor has no values, so whoever looks at one fails.
    mask = build_each("meta")
    assert mask.device.type == "meta" and mask.shape == (2, 3)
    assert mask.dense(4).shape == (2, 3, 4) and mask.visible_fraction(4).shape == ()


def test_constructors_and_intervals_trace_into_one_graph():
    def fraction(x, mask):
        start, stop = (build_each(x.device) & mask).expand(2, 3)
        return x * KeyInterval(start, stop).dense(4), mask

    x, mask = torch.ones(()), masks.causal(3, 4)
    compiled, returned = torch.compile(fraction, fullgraph=True, backend="eager")(x, mask)
    assert torch.equal(compiled, fraction(x, mask)[0])
    assert isinstance(returned, KeyInterval)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_nothing_waits():
    expected = build_each("cpu")
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = build_each("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(mask.dense(4).cpu(), expected.dense(4))


one, two, three = int32(1), int32(1, 1), int32(1, 1, 1)
cu = int32(0, 2, 3)
flags = torch.ones(2, 3, dtype=torch.bool)
causal = masks.causal(2, 3)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (TypeError, "start must be an int32 tensor, not int", lambda: KeyInterval(0, one)),
        (TypeError, "stop must be an int32 .* torch.int64", lambda: KeyInterval(one, one.long())),
        (ValueError, r"stop \[1, 1, 1\] .* \[B, Nq\]", lambda: KeyInterval(one, one[None, None])),
        (ValueError, r"start \[2\] and stop \[3\] do not", lambda: KeyInterval(two, three)),
        (ValueError, "start is on cpu, but stop is on", lambda: KeyInterval(one, one.to("meta"))),
        (TypeError, "needs two KeyIntervals, not a torch.bool", lambda: causal & flags),
        (ValueError, "left KeyInterval is on cpu", lambda: causal & causal.to("meta")),
        (ValueError, r"\[2\] and the right one \[3\]", lambda: causal & masks.causal(3, 3)),
        (ValueError, r"stop \[2\] .* \[B, Nq\] = \[2, 3\]", lambda: causal.expand(2, 3)),
        (ValueError, "Nk must be at least 0, not -1", lambda: causal.dense(-1)),
        (ValueError, "Nk must be at most 2147483647", lambda: masks.causal(1, 2**31)),
        (ValueError, "key_lengths must be at most 214", lambda: masks.padding(two.long() + 2**32)),
        (ValueError, "tokens_per_media .* at most 21", lambda: masks.media(flags, 2**30, 3)),
        (TypeError, "Nk must be an int, not float", lambda: causal.visible_fraction(2.0)),
        (ValueError, "stop <= 2", lambda: causal.check(2)),
        (TypeError, "key_lengths must be .* not list", lambda: masks.padding([1])),
        (TypeError, "key_lengths .* torch.float32", lambda: masks.padding(two.float())),
        (ValueError, r"key_lengths .* \[1, 2\]", lambda: masks.padding(two[None])),
        (ValueError, "key_lengths must be at least 0, not -1", lambda: masks.padding(-two)),
        (ValueError, "key_lengths must be at most 0, not 1", lambda: masks.padding(two, Nk=0)),
        (ValueError, "side .* 'right', 'left', not 'up'", lambda: masks.padding(two, side="up")),
        (ValueError, "needs Nk", lambda: masks.padding(two, side="left")),
        (ValueError, "Nq must be at least 0", lambda: masks.causal(-1, 3)),
        (TypeError, "Nk must be an int, not bool", lambda: masks.causal(1, True)),
        (TypeError, "Nk must be an int, not a torch.int32 tensor", lambda: masks.causal(1, one)),
        (ValueError, "left must be at least 0, not -1", lambda: masks.window(2, 3, left=-1)),
        (ValueError, "right must be at least 0", lambda: masks.window(2, 3, right=-1)),
        (TypeError, "media_locations .* torch.int64", lambda: masks.media(flags.long(), 2, 2)),
        (TypeError, "media_locations .* not list", lambda: masks.media([[True]], 2, 2)),
        (ValueError, r"media_locations .* \[3\]", lambda: masks.media(flags[0], 2, 2)),
        (ValueError, "tokens_per_media must be", lambda: masks.media(flags, -1, 2)),
        (TypeError, "n_media must be an int", lambda: masks.media(flags, 1, 2.0)),
        (ValueError, "attend .* 'last', 'all', not 'x'", lambda: masks.media(flags, 2, 2, "x")),
        (ValueError, "before_first .* not 'x'", lambda: masks.media(flags, 2, 2, "all", "x")),
        (ValueError, "cu_seqlens_q has 3 entries, .*_k has 2", lambda: masks.packed(cu, cu[:2])),
        (ValueError, "cu_seqlens_q .*begin with 0", lambda: masks.packed(cu + 1, cu)),
        (ValueError, "cu_seqlens_k .*never decrease", lambda: masks.packed(cu, int32(0, 2, 1))),
        (ValueError, "cu_seqlens_q .*begin with 0.* not", lambda: masks.packed(cu[:0], cu[:0])),
        (ValueError, r"cu_seqlens_q\[-1\] = 3, not 2", lambda: masks.packed(cu, cu, Nq=2)),
        (ValueError, "cu_seqlens_q is on cpu", lambda: masks.packed(cu, cu.to("meta"), Nq=3)),
        (TypeError, "cu_seqlens_k must be .* torch.float32", lambda: masks.packed(cu, cu.float())),
        (ValueError, "objective .* not 'ITC'", lambda: masks.qformer("ITC", 2, 3)),
        (ValueError, "num_queries must be at least 0", lambda: masks.qformer("itc", -2, 3)),
        (TypeError, "text_length must be an int", lambda: masks.qformer("itc", 2, two)),
        (ValueError, "text_lengths must be at most 0", lambda: masks.qformer("itc", 2, 0, two)),
    ],
)
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_examples_in_the_docstrings():
    failed, attempted = doctest.testmod(masks)
    assert attempted >= 8 and not failed
