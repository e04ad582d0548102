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

from .configs import register_bound
from .launch import Call, compiler_options, device_guard
from .scores import (
    LOWEST,
    cut_scores,
    key_ranges,
    row_offsets,
    row_scale,
    run_offsets,
    tile_scores,
)
from .tiles import (
    ALL,
    dot_nt,
    load_tile,
    packed_rows,
    program,
    split_range,
)

MODEL_STEPS = tl.constexpr(8)  # of a search, before every other one halves the integers between


@triton.jit
def to_key(x):
    """int32 in the order of float32 `x`; -0 and 0 are one."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def from_key(key):
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
def selection_scores(
    row_terms, k0, Nk, D: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_Q, BLOCK_K] of the keys from k0 on, -inf where a key is not allowed."""
    q_tile, k, stride_k, b, hkv, scales, masks, row_mask, bounds = row_terms
    scale, scale_tensor, stride_scale, h = scales
    mask, mask_rows, stride_mask = masks
    first, last, full_begin, full_end = bounds
    rs = scale
    if scale_tensor is not None:
        rs = row_scale(scale, scale_tensor, stride_scale, h)[:, None]
    j = k0 + tl.arange(0, BLOCK_K)
    k_tile = load_tile(k, run_offsets(stride_k, b, hkv, k0, BLOCK_K), j < Nk, D, CHUNKS, ALIGN)
    s, _ = tile_scores(
        dot_nt(q_tile, k_tile, CHUNKS, PRECISION), rs, None, None, 0, (0, 0, 0, 0),
        mask, mask_rows, stride_mask, row_mask, j[None, :], Nk,
    )  # fmt: skip
    cut = (k0 < full_begin) | (k0 + BLOCK_K > full_end)
    return cut_scores(s, cut, first, last, j[None, :], ALL)


@triton.jit
def reaches(s, t):
    """Whether scores s reach t. NaN reaches everything, as an infinite score does, so that it is
    chosen: either makes the row's softmax NaN."""
    return (s < t) == 0


@triton.jit
def count(
    scores, row_terms, begin, end, Nk, t, D: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """How many scores of each row reach t [BLOCK_Q], int32 [BLOCK_Q]."""
    # [BLOCK_Q, BLOCK_K], float32 as the adders of integers have half the rate and compare as well
    found = tl.full([BLOCK_Q, BLOCK_K], 0.0, tl.float32)
    if len(scores) > 0:
        for n in tl.static_range(len(scores)):
            found += tl.where(reaches(scores[n], t[:, None]), 1.0, 0.0)
    else:
        for k0 in range(begin, end, BLOCK_K):
            s = selection_scores(row_terms, k0, Nk, D, CHUNKS, BLOCK_K, ALIGN, PRECISION)
            found += tl.where(reaches(s, t[:, None]), 1.0, 0.0)
    return tl.sum(found, 1).to(tl.int32)


@triton.jit
def moments(
    scores, row_terms, begin, end, Nk, D: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(count, mean, standard deviation) of the scores above -inf, each [BLOCK_Q], for a guess."""
    # [BLOCK_Q, BLOCK_K]
    found = tl.full([BLOCK_Q, BLOCK_K], 0.0, tl.float32)
    total = tl.full([BLOCK_Q, BLOCK_K], 0.0, tl.float32)
    squares = tl.full([BLOCK_Q, BLOCK_K], 0.0, tl.float32)
    if len(scores) > 0:
        for n in tl.static_range(len(scores)):
            found, total, squares = add_moments(scores[n], found, total, squares)
    else:
        for k0 in range(begin, end, BLOCK_K):
            s = selection_scores(row_terms, k0, Nk, D, CHUNKS, BLOCK_K, ALIGN, PRECISION)
            found, total, squares = add_moments(s, found, total, squares)
    n_row = tl.sum(found, 1)
    n = tl.maximum(n_row, 1.0)
    mean = tl.sum(total, 1) / n
    variance = tl.maximum(tl.sum(squares, 1) / n - mean * mean, 0.0)
    return n_row.to(tl.int32), mean, tl.sqrt(variance)


@triton.jit
def add_moments(s, found, total, squares):
    there = reaches(s, LOWEST)
    s = tl.where(there, s, 0.0)
    return found + tl.where(there, 1.0, 0.0), total + s, squares + s * s


@triton.jit
def rough_log2(n):
    """log2 of an int32 in steps that are straight between powers of two: its float's exponent."""
    return n.to(tl.float32).to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def next_guess(low, high, n_low, n_high, top_k, mean, deviation, z, step):
    """The next threshold [BLOCK_Q] to try: n_low scores, at least top_k, reach `low`, which is
    LOWEST while no guess was low enough, and n_high, fewer, reach `high`, inf while none was high
    enough. It is `high` again where no number lies between them."""
    if (step >= MODEL_STEPS) & (step % 2 == 0):
        a, b = to_key(low), to_key(high)
        guess = from_key((a >> 1) + (b >> 1) + (a & b & 1))  # rounds down, maybe to `low`
    else:
        enclosed = (low > LOWEST) & (high < float("inf"))
        if step % 2 == 0:
            part = (n_low - top_k + 0.5) / tl.maximum(n_low - n_high, 1)
        else:
            a, b = rough_log2(2 * n_low), rough_log2(tl.maximum(2 * n_high, 1))
            part = (a - rough_log2(2 * top_k)) / (a - b)
        inside = low + (high - low) * tl.minimum(tl.maximum(part, 0.03), 0.97)
        # outward from the end that is known, further with each step
        outward = deviation * 0.25 * tl.exp2(step.to(tl.float32))
        outside = tl.where(low > LOWEST, low + outward, high - outward)
        guess = tl.where(enclosed, inside, outside)
        if step == 0:
            guess = mean + z * deviation
        # where that rounds or overflows to something else
        middle = 0.5 * low + 0.5 * tl.minimum(high, -LOWEST)
        guess = tl.where((guess > low) & (guess < high), guess, middle)
    return tl.where((guess > low) & (guess < high), guess, high)


@triton.jit
def search(
    scores, row_terms, begin, end, Nk, row_mask, top_k, D: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(t, how many scores reach t, how many are above t) of each row, [BLOCK_Q]: t is the top_k-th
    score, or below all where there are fewer."""
    n_row, mean, deviation = moments(
        scores, row_terms, begin, end, Nk, D, CHUNKS, BLOCK_Q, BLOCK_K, ALIGN, PRECISION
    )
    top_k = tl.full([], 0, tl.int32) + top_k
    n = tl.maximum(n_row, 1).to(tl.float32)
    z = normal_quantile(tl.minimum(tl.maximum(top_k - 0.5, 0.3), n - 0.3) / n)
    low, high = tl.full([BLOCK_Q], LOWEST, tl.float32), tl.full([BLOCK_Q], float("inf"), tl.float32)
    n_low, n_high = n_row, tl.full([BLOCK_Q], 0, tl.int32)
    step = tl.full([], 0, tl.int32)
    searching = row_mask & (n_low > top_k)
    while tl.max(searching.to(tl.int32)) > 0:
        guess = next_guess(low, high, n_low, n_high, top_k, mean, deviation, z, step)
        found = count(
            scores, row_terms, begin, end, Nk, guess, D, CHUNKS, BLOCK_Q, BLOCK_K, ALIGN, PRECISION
        )  # fmt: skip
        new = searching & (guess < high)
        enough = new & (found >= top_k)
        fewer = new & (found < top_k)
        low, n_low = tl.where(enough, guess, low), tl.where(enough, found, n_low)
        high, n_high = tl.where(fewer, guess, high), tl.where(fewer, found, n_high)
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
    width = tl.zeros_like(word)  # of the longest run of low bits with at most n set ones, below 32
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
def store_words(
    selected, rows, row_mask, words, filled, k0, Nk, top_k, width, BLOCK_K: tl.constexpr,
    INDEXED: tl.constexpr,
):  # fmt: skip
    """Stores the words of a tile or, INDEXED, the keys that they stand for behind the `filled`
    [BLOCK_Q] keys of each of the `rows`, which are `width` apart; returns how many are filled."""
    rows = rows[:, None]
    word = tl.arange(0, BLOCK_K // 32)[None, :]
    if INDEXED:
        n_chosen = n_bits(words)
        place = (filled[:, None] + sum_before(n_chosen))[:, :, None]
        # [BLOCK_Q, BLOCK_K // 32, 32]
        bit = tl.arange(0, 32)[None, None, :]
        place += n_bits(words[:, :, None] & ((1 << bit) - 1))
        chosen = ((words[:, :, None] >> bit) & 1) != 0
        # a row with an infinite score may have chosen more
        keep = row_mask[:, None, None] & chosen & (place < top_k)
        j = k0 + 32 * word[:, :, None] + bit
        tl.store(selected + rows[:, :, None] * width + place, j + 0 * place, keep)
        filled += tl.sum(n_chosen, 1)
    else:
        n_words = tl.cdiv(Nk, 32)
        word += k0 // 32
        there = row_mask[:, None] & (word < n_words)
        tl.store(selected + (rows * n_words + word), words, there)
    return filled


@triton.jit
def store_no_keys(selected, rows, row_mask, filled, top_k, width, BLOCK_Q: tl.constexpr):
    """-1 behind the `filled` [BLOCK_Q] keys of each row."""
    first = tl.min(tl.where(row_mask, filled, top_k))
    for place0 in range(first, top_k, 32):
        place = place0 + tl.arange(0, 32)[None, :]
        rest = row_mask[:, None] & (place >= filled[:, None]) & (place < top_k)
        none = tl.full([BLOCK_Q, 32], -1, tl.int32)
        tl.store(selected + rows[:, None] * width + place, none, rest)


@triton.jit
def select_kernel(
    # int32 [B, Hq, Nq, words], where bit j % 32 of word j // 32 says whether key j is chosen, or,
    # INDEXED, [B, Hq, Nq, n_parts, top_k], the chosen keys in ascending order and then -1
    selected,
    q, stride_q, k, stride_k, v, stride_v,
    bias, stride_bias, mask, stride_mask,  # mask 4-d with broadcast strides, or None
    start, stride_start, stop, stride_stop,  # int32 [B, Nq], or None
    scale, scale_tensor, stride_scale,  # both None for a scale from 0 to 1
    softcap, seed, threshold, p_factor,
    B, Hkv, Nq, Nk, top_k,
    D: tl.constexpr, DV: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_V: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    TILES: tl.constexpr,  # of keys, all of whose scores are kept; 0: computed in every step
    INDEXED: tl.constexpr,
    n_parts,  # programs that each choose top_k of their own part of the keys, or None for one
):  # fmt: skip
    tile, hkv, b, split = program(tl.cdiv(Nq * GROUP, BLOCK_Q), Hkv, B)
    # [BLOCK_Q]
    i, h, row_mask = packed_rows(tile, hkv, Nq, BLOCK_Q, GROUP)
    first, last, begin, end, full_begin, full_end = key_ranges(
        start, stop, stride_start, stride_stop, b, i, row_mask, Nk
    )
    first_key, width = 0, top_k
    if n_parts is not None:
        begin, end = split_range(begin, end, split, n_parts, BLOCK_K)
        first, last, first_key = tl.maximum(first, begin), tl.minimum(last, end), begin
        full_begin, full_end = tl.maximum(full_begin, begin), tl.minimum(full_end, end)
        selected += split * top_k
        width = n_parts * top_k
    # [BLOCK_Q, D]
    q_tile = load_tile(q, row_offsets(stride_q, b, h, i), row_mask, D, CHUNKS, ALIGN)
    mask_rows = row_offsets(stride_mask, b, h, i)[:, None]
    row_terms = (
        q_tile, k, stride_k, b, hkv, (scale, scale_tensor, stride_scale, h),
        (mask, mask_rows, stride_mask), row_mask[:, None], (first, last, full_begin, full_end),
    )  # fmt: skip
    scores = ()
    for n in tl.static_range(TILES):
        scores = scores + (
            selection_scores(
                row_terms, first_key + n * BLOCK_K, Nk, D, CHUNKS, BLOCK_K, ALIGN, PRECISION
            ),
        )

    low, n_low, n_high = search(
        scores, row_terms, begin, end, Nk, row_mask, top_k, D, CHUNKS, BLOCK_Q, BLOCK_K, ALIGN,
        PRECISION,
    )  # fmt: skip
    # more scores reach the threshold than are wanted where several are equal to it
    ties = tl.max((n_low > top_k).to(tl.int32)) > 0
    wanted = tl.where(n_low > top_k, top_k - n_high, Nk)
    filled = tl.full([BLOCK_Q], 0, tl.int32)
    rows = ((b * Hkv * GROUP + h) * Nq + i).to(tl.int64)
    if TILES > 0:
        for n in tl.static_range(TILES):
            words, wanted = chosen_words(scores[n], low, wanted, ties, BLOCK_Q, BLOCK_K)
            filled = store_words(
                selected, rows, row_mask, words, filled, first_key + n * BLOCK_K, Nk, top_k, width,
                BLOCK_K, INDEXED,
            )  # fmt: skip
    else:
        # outside the intervals words are 0, and there is no index
        for k0 in range(begin if INDEXED else 0, end if INDEXED else Nk, BLOCK_K):
            s = tl.full([BLOCK_Q, BLOCK_K], float("-inf"), tl.float32)
            if (k0 + BLOCK_K > begin) & (k0 < end):
                s = selection_scores(row_terms, k0, Nk, D, CHUNKS, BLOCK_K, ALIGN, PRECISION)
            words, wanted = chosen_words(s, low, wanted, ties, BLOCK_Q, BLOCK_K)
            filled = store_words(
                selected, rows, row_mask, words, filled, k0, Nk, top_k, width, BLOCK_K, INDEXED
            )
    if INDEXED:
        store_no_keys(selected, rows, row_mask, filled, top_k, width, BLOCK_Q)


@triton.jit
def indices_kernel(
    indices,  # int32 [B * Hq * Nq, top_k]: the chosen keys in ascending order, then -1
    selected,  # int32 [B * Hq * Nq, n_words]
    n_rows, Nk, top_k, n_words, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # [BLOCK]
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = r < n_rows
    filled = tl.full([BLOCK], 0, tl.int32)
    for k0 in range(0, Nk, BLOCK_K):
        # [BLOCK, BLOCK_K]
        j = (k0 + tl.arange(0, BLOCK_K))[None, :]
        keep = there[:, None] & (j < Nk)
        word = tl.load(selected + r[:, None] * n_words + (j >> 5), keep, 0)
        chosen = (word >> (j & 31)) & 1
        place = filled[:, None] + tl.cumsum(chosen, 1) - 1
        # a row with an infinite score may have chosen more
        keep = keep & (chosen != 0) & (place < top_k)
        tl.store(indices + r[:, None] * top_k + place, j + 0 * place, keep)
        filled += tl.sum(chosen, 1)
    for place0 in range(tl.min(tl.where(there, filled, top_k)), top_k, BLOCK_K):
        place = (place0 + tl.arange(0, BLOCK_K))[None, :]
        rest = there[:, None] & (place >= filled[:, None]) & (place < top_k)
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
        at = selected + r[:, None] * n_words + (j >> 5)
        tl.atomic_or(at, 1 << (j & 31), mask=keep & (j >= 0))


ROWS, COLUMNS = 8, 128  # of a program between bits and indices
MAX_REGISTERS = register_bound(num_warps=4)


def select(call: Call, top_k: int, indexed: bool, n_parts: int = 1) -> Tensor:
    """int32 [B, Hq, Nq, ceil(Nk / 32)] or, indexed, [B, Hq, Nq, n_parts * top_k], see
    `select_kernel`."""
    width = n_parts * top_k if indexed else triton.cdiv(call.Nk, 32)
    selected = call.q.new_empty((*call.q.shape[:3], width), dtype=torch.int32)
    if selected.numel():
        if call.scale_tensor is None and 0.0 < call.scale <= 1.0:  # products have its order
            call = replace(call, scale=None)
        config, tiles = call.selection_config(n_parts)
        programs = call.row_tiles(config) * call.B * call.Hkv * n_parts
        call.launch(
            select_kernel, config, programs, (selected,), top_k, TILES=tiles, INDEXED=indexed,
            n_parts=n_parts if n_parts > 1 else None,
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
