"""Which keys are a row's `top_k` highest, exactly: the kernels that find and write them down.

A row's threshold is searched for: the k-th largest score is the largest t that at least k scores
reach, and every step counts the scores that reach a guess. The first guess is that of a normal
distribution, later ones interpolate between the two counts that enclose k, and halving the integers
whose order is that of float32 bounds the search, so it ends for any scores. While a row tile's
scores fit the registers they are computed once and stay there; of longer rows the products are
computed again in each step, which costs the tensor cores less than a trip to memory would cost.
No score is written anywhere: the result is one bit per key.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.call import TopKAttentionCall
from .configs import register_bound
from .launch import Launch, compiler_options, device_guard
from .scores import (
    LOWEST,
    cut_scores,
    key_ranges,
    pair_rows,
    row_offsets,
    row_scale,
    run_offsets,
    tile_scores,
)
from .structs import Enclosure, Indexing, KeyRange, SearchedRows
from .tiles import ALL, dot_nt, load_tile, packed_rows, program, split_range

# A search trusts its model for so many steps; then every other step halves the integers between.
MODEL_STEPS = tl.constexpr(8)


@triton.jit
def to_key(x):
    """int32 in the order of float32 `x`; -0 and 0 are one."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def from_key(key):
    """The float32 whose `to_key` is `key`."""
    bits = tl.where(key < 0, (-key) | -0x80000000, key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def normal_quantile(p):
    """The number that a normal variable exceeds with probability p, to 3 digits (Abramowitz and
    Stegun, 26.2.22): only the number of steps depends on it."""
    q = tl.minimum(p, 1.0 - p)
    t = tl.sqrt(-2.0 * tl.log(q))
    z = t - (2.30753 + 0.27061 * t) / (1.0 + t * (0.99229 + 0.04481 * t))
    return tl.where(p < 0.5, z, -z)


@triton.jit
def selection_scores(rows, k0, Nk, T: tl.constexpr):
    """The scores [BLOCK_Q, BLOCK_K] of some `SearchedRows` and the keys from k0 on, -inf where a
    key is not allowed."""
    PRECISION: tl.constexpr = T.PRECISION
    CHUNKS: tl.constexpr = T.CHUNKS
    s, keys = rows.s, rows.keys
    rs = s.scale.number
    if s.scale.ptr is not None:
        rs = row_scale(s.scale, rows.h)[:, None]
    j = k0 + tl.arange(0, T.BLOCK_K)
    run = run_offsets(rows.k.stride, rows.b, rows.hkv, k0, T.BLOCK_K)
    k_tile = load_tile(rows.k.ptr, run, j < Nk, T.D, CHUNKS, T.ALIGN)
    score, _ = tile_scores(
        dot_nt(rows.q_tile, k_tile, CHUNKS, PRECISION), rs, s, None, rows.mask_rows,
        rows.row_mask, j[None, :], Nk,
    )  # fmt: skip
    cut = (k0 < keys.full_begin) | (k0 + T.BLOCK_K > keys.full_end)
    return cut_scores(score, cut, keys.first, keys.last, j[None, :], ALL)


@triton.jit
def reaches(s, t):
    """Whether scores s reach t. NaN reaches everything, as an infinite score does, so that it is
    chosen: either makes the row's softmax NaN."""
    return (s < t) == 0


@triton.jit
def count(scores, rows, begin, end, Nk, t, T: tl.constexpr):
    """How many scores of each row reach t [BLOCK_Q], int32 [BLOCK_Q]."""
    BLOCK_Q: tl.constexpr = T.BLOCK_Q
    BLOCK_K: tl.constexpr = T.BLOCK_K
    # [BLOCK_Q, BLOCK_K], float32 as the adders of integers have half the rate and compare as well
    counts = tl.full([BLOCK_Q, BLOCK_K], 0.0, tl.float32)
    if len(scores) > 0:
        for n in tl.static_range(len(scores)):
            counts += tl.where(reaches(scores[n], t[:, None]), 1.0, 0.0)
    else:
        for k0 in range(begin, end, BLOCK_K):
            score = selection_scores(rows, k0, Nk, T)
            counts += tl.where(reaches(score, t[:, None]), 1.0, 0.0)
    return tl.sum(counts, 1).to(tl.int32)


@triton.jit
def moments(scores, rows, begin, end, Nk, T: tl.constexpr):
    """(count, mean, standard deviation) of the scores above -inf, each [BLOCK_Q], for a guess."""
    BLOCK_Q: tl.constexpr = T.BLOCK_Q
    BLOCK_K: tl.constexpr = T.BLOCK_K
    # [BLOCK_Q, BLOCK_K]
    counts = tl.full([BLOCK_Q, BLOCK_K], 0.0, tl.float32)
    total = tl.full([BLOCK_Q, BLOCK_K], 0.0, tl.float32)
    squares = tl.full([BLOCK_Q, BLOCK_K], 0.0, tl.float32)
    if len(scores) > 0:
        for n in tl.static_range(len(scores)):
            counts, total, squares = add_moments(scores[n], counts, total, squares)
    else:
        for k0 in range(begin, end, BLOCK_K):
            score = selection_scores(rows, k0, Nk, T)
            counts, total, squares = add_moments(score, counts, total, squares)
    n_row = tl.sum(counts, 1)
    n = tl.maximum(n_row, 1.0)
    mean = tl.sum(total, 1) / n
    variance = tl.maximum(tl.sum(squares, 1) / n - mean * mean, 0.0)
    return n_row.to(tl.int32), mean, tl.sqrt(variance)


@triton.jit
def add_moments(s, counts, total, squares):
    """The sums of `moments` with those of the scores s."""
    counted = reaches(s, LOWEST)
    s = tl.where(counted, s, 0.0)
    return counts + tl.where(counted, 1.0, 0.0), total + s, squares + s * s


@triton.jit
def rough_log2(n):
    """log2 of an int32 in steps that are straight between powers of two: its float's exponent."""
    return n.to(tl.float32).to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def next_guess(enclosed, top_k, mean, deviation, z, step):
    """The next threshold [BLOCK_Q] to try, by the ends of the search, an `Enclosure`. It is `high`
    again where no number lies between them."""
    low, high, n_low, n_high = enclosed.low, enclosed.high, enclosed.n_low, enclosed.n_high
    if (step >= MODEL_STEPS) & (step % 2 == 0):
        a, b = to_key(low), to_key(high)
        guess = from_key((a >> 1) + (b >> 1) + (a & b & 1))  # rounds down, maybe to `low`
    else:
        both_known = (low > LOWEST) & (high < float("inf"))
        if step % 2 == 0:
            part = (n_low - top_k + 0.5) / tl.maximum(n_low - n_high, 1)
        else:
            a, b = rough_log2(2 * n_low), rough_log2(tl.maximum(2 * n_high, 1))
            part = (a - rough_log2(2 * top_k)) / (a - b)
        inside = low + (high - low) * tl.minimum(tl.maximum(part, 0.03), 0.97)
        # outward from the end that is known, further with each step
        outward = deviation * 0.25 * tl.exp2(step.to(tl.float32))
        outside = tl.where(low > LOWEST, low + outward, high - outward)
        guess = tl.where(both_known, inside, outside)
        if step == 0:
            guess = mean + z * deviation
        # where that rounds or overflows to something else
        middle = 0.5 * low + 0.5 * tl.minimum(high, -LOWEST)
        guess = tl.where((guess > low) & (guess < high), guess, middle)
    return tl.where((guess > low) & (guess < high), guess, high)


@triton.jit
def search(scores, rows, begin, end, Nk, row_mask, top_k, T: tl.constexpr):
    """(t, how many scores reach t, how many are above t) of each row, [BLOCK_Q]: t is the top_k-th
    score, or below all where there are fewer."""
    BLOCK_Q: tl.constexpr = T.BLOCK_Q
    n_row, mean, deviation = moments(scores, rows, begin, end, Nk, T)
    top_k = tl.full([], 0, tl.int32) + top_k
    n = tl.maximum(n_row, 1).to(tl.float32)
    z = normal_quantile(tl.minimum(tl.maximum(top_k - 0.5, 0.3), n - 0.3) / n)
    low = tl.full([BLOCK_Q], LOWEST, tl.float32)
    high = tl.full([BLOCK_Q], float("inf"), tl.float32)
    n_low, n_high = n_row, tl.full([BLOCK_Q], 0, tl.int32)
    step = tl.full([], 0, tl.int32)
    searching = row_mask & (n_low > top_k)
    while tl.max(searching.to(tl.int32)) > 0:
        enclosed = Enclosure(low, high, n_low, n_high)
        guess = next_guess(enclosed, top_k, mean, deviation, z, step)
        n_guess = count(scores, rows, begin, end, Nk, guess, T)
        new = searching & (guess < high)
        enough = new & (n_guess >= top_k)
        fewer = new & (n_guess < top_k)
        low, n_low = tl.where(enough, guess, low), tl.where(enough, n_guess, n_low)
        high, n_high = tl.where(fewer, guess, high), tl.where(fewer, n_guess, n_high)
        searching = new & (n_low > top_k)
        step += 1
    return low, n_low, n_high


@triton.jit
def packed_bits(chosen, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """int32 [BLOCK_Q, BLOCK_K // 32] of bool [BLOCK_Q, BLOCK_K]."""
    bits = tl.reshape(chosen.to(tl.int32), [BLOCK_Q, BLOCK_K // 32, 32])
    return tl.sum(bits << tl.arange(0, 32)[None, None, :], 2)


@triton.jit
def n_bits(word):
    """How many bits of an int32 are set."""
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24) & 0xFF


@triton.jit
def lowest_bits(word, n):
    """The n lowest of the set bits, all of them where there are fewer."""
    # `width` becomes that of the longest run of low bits with at most n set ones, below 32.
    width = tl.zeros_like(word)
    for STEP in tl.static_range(5):
        wider = width + (16 >> STEP)
        width = tl.where(n_bits(word & ((1 << wider) - 1)) <= n, wider, width)
    return tl.where(n_bits(word) <= n, word, word & ((1 << width) - 1))


@triton.jit
def sum_before(n):
    """For each column of n [ROWS, columns] the sum of those before it: there are few, and Triton
    3.6 aborts on a scan in some of the layouts that they get."""
    column = tl.arange(0, n.shape[1])
    before = column[None, None, :] < column[None, :, None]
    return tl.sum(tl.where(before, n[:, None, :], 0), 2)


@triton.jit
def chosen_words(s, t, wanted, ties, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """(int32 [BLOCK_Q, BLOCK_K // 32], how many are still wanted): the bits of the scores that
    reach t [BLOCK_Q]; with `ties`, the first ones only of those equal to t, as many as wanted."""
    words = packed_bits(reaches(s, t[:, None]), BLOCK_Q, BLOCK_K)
    if ties:
        equal = packed_bits(s == t[:, None], BLOCK_Q, BLOCK_K)
        n_equal = n_bits(equal)
        left = wanted[:, None] - sum_before(n_equal)
        words = (words & ~equal) | lowest_bits(equal, tl.maximum(left, 0))
        wanted -= tl.sum(n_equal, 1)
    return words, wanted


@triton.jit
def store_words(selected, place, words, filled, k0, Nk, T: tl.constexpr, INDEXED: tl.constexpr):
    """Stores the words of a tile or, INDEXED, the keys that they stand for behind the `filled`
    [BLOCK_Q] keys of each row, whose place is an `Indexing`; returns how many are filled."""
    rows, row_mask = place.rows[:, None], place.row_mask
    word = tl.arange(0, T.BLOCK_K // 32)[None, :]
    if INDEXED:
        n_chosen = n_bits(words)
        column = (filled[:, None] + sum_before(n_chosen))[:, :, None]
        # [BLOCK_Q, BLOCK_K // 32, 32]
        bit = tl.arange(0, 32)[None, None, :]
        column += n_bits(words[:, :, None] & ((1 << bit) - 1))
        chosen = ((words[:, :, None] >> bit) & 1) != 0
        # a row with an infinite score may have chosen more
        keep = row_mask[:, None, None] & chosen & (column < place.top_k)
        j = k0 + 32 * word[:, :, None] + bit
        tl.store(selected + rows[:, :, None] * place.width + column, j + 0 * column, keep)
        filled += tl.sum(n_chosen, 1)
    else:
        n_words = tl.cdiv(Nk, 32)
        word += k0 // 32
        exists = row_mask[:, None] & (word < n_words)
        tl.store(selected + (rows * n_words + word), words, exists)
    return filled


@triton.jit
def store_no_keys(selected, place, filled, T: tl.constexpr):
    """-1 behind the `filled` [BLOCK_Q] keys of each row."""
    BLOCK_Q: tl.constexpr = T.BLOCK_Q
    first = tl.min(tl.where(place.row_mask, filled, place.top_k))
    for column0 in range(first, place.top_k, 32):
        column = column0 + tl.arange(0, 32)[None, :]
        rest = place.row_mask[:, None] & (column >= filled[:, None]) & (column < place.top_k)
        none = tl.full([BLOCK_Q, 32], -1, tl.int32)
        tl.store(selected + place.rows[:, None] * place.width + column, none, rest)


@triton.jit
def select_kernel(
    # int32 [B, Hq, Nq, words], where bit j % 32 of word j // 32 says whether key j is chosen, or,
    # INDEXED, [B, Hq, Nq, n_parts, top_k], the chosen keys in ascending order and then -1
    selected,
    x,  # QueriesAndKeys
    s,  # Scores without a bias; its scale is None for one from 0 to 1, which keeps the order
    n,  # Sizes
    top_k,
    n_parts,  # programs that each choose top_k of their own part of the keys, or None for one
    T: tl.constexpr,  # Tiling
    TILES: tl.constexpr,  # so many tiles of keys keep their scores; 0: every step computes them
    INDEXED: tl.constexpr,
):
    CHUNKS: tl.constexpr = T.CHUNKS
    BLOCK_Q: tl.constexpr = T.BLOCK_Q
    BLOCK_K: tl.constexpr = T.BLOCK_K
    tile, hkv, b, split = program(tl.cdiv(n.Nq * T.GROUP, BLOCK_Q), n.Hkv, n.B)
    # [BLOCK_Q]
    i, h, row_mask = packed_rows(tile, hkv, n.Nq, BLOCK_Q, T.GROUP)
    keys = key_ranges(s, b, i, row_mask, n.Nk)
    first, last, begin, end, full_begin, full_end = keys
    first_key, width = 0, top_k
    if n_parts is not None:
        begin, end = split_range(begin, end, split, n_parts, BLOCK_K)
        first, last, first_key = tl.maximum(first, begin), tl.minimum(last, end), begin
        full_begin, full_end = tl.maximum(full_begin, begin), tl.minimum(full_end, end)
        selected += split * top_k
        width = n_parts * top_k
    # [BLOCK_Q, D]
    q_rows = row_offsets(x.q.stride, b, h, i)
    q_tile = load_tile(x.q.ptr, q_rows, row_mask, T.D, CHUNKS, T.ALIGN)
    keys = KeyRange(first, last, begin, end, full_begin, full_end)
    rows = SearchedRows(
        q_tile, x.k, b, hkv, h, s, pair_rows(s.mask, b, h, i, 1), row_mask[:, None], keys
    )
    scores = ()
    for tile_index in tl.static_range(TILES):
        scores = scores + (selection_scores(rows, first_key + tile_index * BLOCK_K, n.Nk, T),)

    low, n_low, n_high = search(scores, rows, begin, end, n.Nk, row_mask, top_k, T)
    # more scores reach the threshold than are wanted where several are equal to it
    ties = tl.max((n_low > top_k).to(tl.int32)) > 0
    wanted = tl.where(n_low > top_k, top_k - n_high, n.Nk)
    filled = tl.full([BLOCK_Q], 0, tl.int32)
    place = Indexing(((b * n.Hkv * T.GROUP + h) * n.Nq + i).to(tl.int64), row_mask, top_k, width)
    if TILES > 0:
        for tile_index in tl.static_range(TILES):
            words, wanted = chosen_words(
                scores[tile_index], low, wanted, ties, BLOCK_Q, BLOCK_K
            )  # fmt: skip
            k0 = first_key + tile_index * BLOCK_K
            filled = store_words(selected, place, words, filled, k0, n.Nk, T, INDEXED)
    else:
        # outside the intervals words are 0, and there is no index
        for k0 in range(begin if INDEXED else 0, end if INDEXED else n.Nk, BLOCK_K):
            score = tl.full([BLOCK_Q, BLOCK_K], float("-inf"), tl.float32)
            if (k0 + BLOCK_K > begin) & (k0 < end):
                score = selection_scores(rows, k0, n.Nk, T)
            words, wanted = chosen_words(score, low, wanted, ties, BLOCK_Q, BLOCK_K)
            filled = store_words(selected, place, words, filled, k0, n.Nk, T, INDEXED)
    if INDEXED:
        store_no_keys(selected, place, filled, T)


@triton.jit
def indices_kernel(
    indices,  # int32 [B * Hq * Nq, top_k]: the chosen keys in ascending order, then -1
    selected,  # int32 [B * Hq * Nq, n_words]
    n_rows, Nk, top_k, n_words, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # [BLOCK]
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = r < n_rows
    filled = tl.full([BLOCK], 0, tl.int32)
    for k0 in range(0, Nk, BLOCK_K):
        # [BLOCK, BLOCK_K]
        j = (k0 + tl.arange(0, BLOCK_K))[None, :]
        keep = exists[:, None] & (j < Nk)
        word = tl.load(selected + r[:, None] * n_words + (j >> 5), keep, 0)
        chosen = (word >> (j & 31)) & 1
        place = filled[:, None] + tl.cumsum(chosen, 1) - 1
        # a row with an infinite score may have chosen more
        keep = keep & (chosen != 0) & (place < top_k)
        tl.store(indices + r[:, None] * top_k + place, j + 0 * place, keep)
        filled += tl.sum(chosen, 1)
    for place0 in range(tl.min(tl.where(exists, filled, top_k)), top_k, BLOCK_K):
        place = (place0 + tl.arange(0, BLOCK_K))[None, :]
        rest = exists[:, None] & (place >= filled[:, None]) & (place < top_k)
        tl.store(
            indices + r[:, None] * top_k + place, tl.full([BLOCK, BLOCK_K], -1, tl.int32), rest
        )


@triton.jit
def bits_kernel(
    selected,  # int32 [B * Hq * Nq, n_words], zeros before
    indices,  # int32 [B * Hq * Nq, top_k]
    n_rows, top_k, n_words, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # [BLOCK]
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for place0 in range(0, top_k, BLOCK_K):
        # [BLOCK, BLOCK_K]
        place = (place0 + tl.arange(0, BLOCK_K))[None, :]
        keep = (r < n_rows)[:, None] & (place < top_k)
        j = tl.load(indices + r[:, None] * top_k + place, keep, -1)
        # whatever their order, the bits are the same
        words = selected + r[:, None] * n_words + (j >> 5)
        tl.atomic_or(words, 1 << (j & 31), mask=keep & (j >= 0))


# A program that turns bits into indices, or back, has so many rows and columns.
ROWS, COLUMNS = 8, 128
MAX_REGISTERS = register_bound(num_warps=4)


def select(call: TopKAttentionCall, top_k: int, indexed: bool, n_parts: int = 1) -> Tensor:
    """int32 [B, Hq, Nq, ceil(Nk / 32)] or, indexed, [B, Hq, Nq, n_parts * top_k], see
    `select_kernel`."""
    width = n_parts * top_k if indexed else triton.cdiv(call.Nk, 32)
    selected = call.q.new_empty((*call.q.shape[:3], width), dtype=torch.int32)
    if selected.numel():
        if call.scale_tensor is None and 0.0 < call.scale <= 1.0:  # products have its order
            call = replace(call, scale=None)
        launch = Launch(call)
        config, tiles = launch.selection_config(n_parts)
        programs = launch.row_tiles(config) * call.B * call.Hkv * n_parts
        launch.run(
            select_kernel, programs, config,
            selected, launch.queries_and_keys(), launch.scores(), launch.sizes(), top_k,
            n_parts if n_parts > 1 else None, T=launch.tiling(config), TILES=tiles,
            INDEXED=indexed,
        )  # fmt: skip
    return selected


def to_indices(selected: Tensor, Nk: int, top_k: int) -> Tensor:
    """int32 [B, Hq, Nq, top_k] of the bits of `select`."""
    indices = selected.new_empty((*selected.shape[:3], top_k))
    n_rows = indices.numel() // top_k
    if n_rows:
        with device_guard(selected.device):
            indices_kernel[(triton.cdiv(n_rows, ROWS),)](
                indices, selected, n_rows, Nk, top_k, selected.shape[3],
                BLOCK=ROWS, BLOCK_K=COLUMNS, **compiler_options(MAX_REGISTERS),
            )  # fmt: skip
    return indices


def to_bits(indices: Tensor, Nk: int) -> Tensor:
    """The bits of `select` again, of `to_indices`."""
    selected = indices.new_zeros((*indices.shape[:3], triton.cdiv(Nk, 32)))
    n_rows, top_k = indices.numel() // indices.shape[3], indices.shape[3]
    if selected.numel():
        with device_guard(indices.device):
            bits_kernel[(triton.cdiv(n_rows, ROWS),)](
                selected, indices, n_rows, top_k, selected.shape[3],
                BLOCK=ROWS, BLOCK_K=COLUMNS, **compiler_options(MAX_REGISTERS),
            )  # fmt: skip
    return selected
