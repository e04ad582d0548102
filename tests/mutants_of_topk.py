"""Mutants of the choice of top keys, of bits as a mask, and of gathered keys."""

from mutation import mutants

TOPK, GATHER = "topk_attention::", "topk_gather::"


def cases(*names: str) -> str:
    return " ".join(f"{TOPK}triton[{name}-interpreter]" for name in names)


def gathered(*names: str) -> str:
    return " ".join(f"{GATHER}triton[{name}-interpreter]" for name in names)


TIES = " ".join(
    f"{TOPK}lower_keys_win_ties[interpreter-{kept}-8]" for kept in ("kept", "recomputed")
)
NAN = TOPK + "what_is_not_finite_makes_its_rows_nan"
LONG = TOPK + "triton_of_long_rows"
GARBAGE = TOPK + "padding_may_hold_anything"
LAUNCHED = GATHER + "long_rows_take_it_by_themselves"

TOP_K = [
    *mutants("topk_selection", "selection_scores",
        ("topk-nan", 'tl.where(s == s, s, float("inf"))', "s", "NaN is never chosen", NAN),
        ("topk-interval", "forbid_outside(s, first, last, j[None, :])", "s",
         "keys outside the interval are chosen", cases("mask_padding", "mask_causal")),
        ("topk-last-key", "j < Nk, D", "j <= Nk, D", "a key behind the last one is loaded",
         GARBAGE + " " + cases("plain")),
    ),
    *mutants("topk_selection", "select_kernel",
        ("topk-wanted", "top_k - n_high, Nk", "top_k - n_high + 1, Nk", "one tie too many", TIES),
        ("topk-ties", "tl.max((n_low > top_k).to(tl.int32)) > 0", "False",
         "all keys equal to the threshold", TIES),
        ("topk-halved", "(new | ~halved)", "new", "a search ends where a guess fell outside",
         cases("plain", "peaked", "ties", "many_keys")),
        ("topk-low-count", "tl.where(enough, found, n_low)", "tl.where(enough, n_low, n_low)",
         "the count of the lower end stays", cases("plain", "many_keys")),
        ("topk-group-scale", "rs = rs[:, None]", "rs = rs[0]", "one scale for all heads",
         cases("scale_group")),
        ("topk-aligned", "begin // BLOCK_K * BLOCK_K", "begin", "words of a start that is not "
         "aligned", LONG),
    ),
    *mutants("topk_selection", "count",
        ("topk-reach", ">= t[:, None], 1.0, 0.0)\n    else", "> t[:, None], 1.0, 0.0)\n    else",
         "the threshold itself does not count", TIES + " " + cases("ties", "equal_keys")),
    ),
    *mutants("topk_selection", "lowest_bits",
        ("topk-lowest", "<= n, wider", "< n, wider", "one of the ties is missing", TIES),
        ("topk-lowest-steps", "static_range(5)", "static_range(4)", "odd widths are not tried",
         TIES),
    ),
    *mutants("topk_selection", "sum_before",
        ("topk-before", "column[None, None, :] < ", "column[None, None, :] <= ",
         "ties of the word itself count as before it", TIES),
    ),
    *mutants("topk_selection", "chosen_words",
        ("topk-used-ties", "wanted -= tl.sum(n_equal, 1)", "wanted -= 0 * tl.sum(n_equal, 1)",
         "ties of earlier tiles are forgotten", TIES),
    ),
    *mutants("topk_selection", "store_words",
        ("topk-index-place", "place += n_bits(words[:, :, None] & ((1 << bit) - 1))",
         "place += 0 * bit", "the keys of a word in one place", gathered("plain", "many_keys")),
        ("topk-index-filled", "filled += tl.sum(n_chosen, 1)", "filled += 0 * tl.sum(n_chosen, 1)",
         "each tile begins at the first place", gathered("many_keys")),
        ("topk-word", "word += k0 // 32", "word += 0 * k0", "every tile at the first word",
         cases("many_keys")),
    ),
    *mutants("topk_selection", "store_no_keys",
        ("topk-no-keys", "place >= filled[:, None]", "place > filled[:, None]",
         "the first place without a key is not written", gathered("mask_empty_rows")),
    ),
    *mutants("topk_selection", "indices_kernel",
        ("topk-indices", "tl.cumsum(chosen, 1) - 1", "tl.cumsum(chosen, 1)", "one place too far",
         cases("plain")),
    ),
    *mutants("topk_selection", "bits_kernel",
        ("topk-bits", "keep & (j >= 0)", "keep", "-1 sets a bit",
         cases("few_of_many_keys") + " " + TOPK + "saved_indices_become_bits_again[interpreter]"),
    ),
    *mutants("scores", "tile_bits",
        ("bits-word", "column < 32 * n", "column < 16 * n", "the next word comes too early",
         cases("many_keys", "long")),
        ("bits-row", "word = tl.load(at, row_mask &", "word = tl.load(at, ~row_mask &",
         "rows that are there have no bits", cases("plain")),
    ),
    *mutants("scores", "clear_gradients",
        ("bits-gradient", "tl.where(chosen, t, 0.0)", "t", "0 * NaN of padding", GARBAGE),
    ),
    *mutants("rows", "turn_bits_kernel",
        ("bits-turned", "n_row_words + word", "n_row_words", "every word of rows at the first",
         cases("long", "mask_causal_long")),
        ("bits-group", "packed_rows(word, hkv, Nq, 32, GROUP)", "packed_rows(word, hkv, Nq, 32, 1)",
         "rows without their group", cases("group_long")),
    ),
    *mutants("cross_attention", "forward_kernel",
        ("bits-aligned", "key_begin // 32 * 32, None", "key_begin, None", "words of a start inside",
         cases("mask_causal_long", "mask_unsorted", "mask_padding_left")),
        ("bits-first-key", "there & (j >= first_key)", "there", "padding before the first key",
         GARBAGE),
    ),
    *mutants("topk_gather", "gather_forward_kernel",
        ("gather-rescale", "scale_rows(acc, alpha + 0.0 * one, CHUNKS_V)", "acc",
         "acc is not rescaled when the maximum grows", gathered("more_than_a_block")),
        ("gather-entropy", "alpha * (a + l * (m - m_new))", "alpha * a",
         "the sum of e log e keeps its old shift", gathered("more_than_a_block")),
    ),
    *mutants("topk_gather", "gather_dq_kernel",
        ("gather-dq-scale", "scale_rows(acc, rs + 0.0 * one, CHUNKS)", "acc",
         "dq without the scale", gathered("plain")),
        ("gather-delta", "row_dot(v_tile, dout_tile, CHUNKS_V) + row_minus_delta",
         "row_dot(v_tile, dout_tile, CHUNKS_V)", "ds without delta", gathered("out_only")),
    ),
    *mutants("topk_gather", "gather_dkdv_kernel",
        ("gather-own", "own[None, :]", "own[None, :] + 1", "the pairs of the key before",
         gathered("plain")),
        ("gather-end", "there = e < end", "there = e <= end", "a pair of the next tile",
         gathered("many_keys", "plain", "group")),
        ("gather-row", "// top_k", "// (top_k + 1)", "rows of other pairs", gathered("plain")),
    ),
    *mutants("topk_gather", "pairs_by_key",
        ("gather-head", "// call.group", "// 1", "every query head has its own keys",
         gathered("group")),
        ("gather-no-key", "heads * call.Nk)", "0)", "-1 is a pair of the first key",
         gathered("mask_empty_rows")),
    ),
]  # fmt: skip
