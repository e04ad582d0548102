"""Mutants of blocks of keys, and of keys that are searched in parts."""

from mutants.mutation import mutants

BLOCKS, PARTS = "topk_blocks::", "topk_candidates::"


def blocks(*names: str) -> str:
    return " ".join(f"{BLOCKS}triton[{name}-interpreter]" for name in names)


def parts(*names: str) -> str:
    return " ".join(f"{PARTS}triton[recomputed-{name}-interpreter]" for name in names)


IMPORTANCE = BLOCKS + "importance"
TIES = PARTS + "ties_across_parts"

BLOCK = [
    *mutants("tiles", "in_blocks",
        ("blocks-inside", "k0 % SIZE", "0 * k0", "every tile of a block is its first",
         blocks("large_blocks")),
    ),
    *mutants("tiles", "blocks_of_tile",
        ("blocks-queries", "(W.QUERIES * T.GROUP)", "(2 * W.QUERIES * T.GROUP)",
         "two tiles, one choice", blocks("long", "group_long")),
    ),
    *mutants("cross_attention", "forward_kernel",
        ("blocks-head", "b * n.Hkv + hkv,", "b * n.Hkv,", "the blocks of the first head",
         blocks("plain", "small_blocks", "sliced")),
        ("blocks-last-key", "(keys.end if ids is not None else key_end)", "key_end",
         "keys behind as many as are chosen", blocks("small_blocks", "long")),
        ("blocks-first-key", "if s.bits.ptr is not None or ids is not None:",
         "if s.bits.ptr is not None:", "padding before the first key",
         BLOCKS + "padding_may_hold_anything"),
    ),
    *mutants("cross_attention_backward", "dkdv_kernel",
        ("blocks-rows", "* PER_CHOICE + t % PER_CHOICE", "* PER_CHOICE",
         "every tile of a choice is its first", blocks("long")),
        ("blocks-ends", "(tl.cdiv(n.Nk, W.BLOCK_SIZE) + 1)", "tl.cdiv(n.Nk, W.BLOCK_SIZE)",
         "the ends of another head", blocks("plain", "small_blocks")),
    ),
    *mutants("cross_attention_backward", "dkdv_kernel",
        ("blocks-bounds", "tl.minimum(t, n_tiles - 1)", "t", "bounds of a tile behind the last one",
         BLOCKS + "compiled[mask_causal_long-sm_90]"),
        mode="emulated",
    ),
    *mutants("cross_attention_backward", "backward_dq",
        ("blocks-not-chosen", "call.start is not None or launch.blocks", "call.start is not None",
         "dk and dv of other blocks are not written", BLOCKS + "every_output_is_written"),
    ),
    *mutants("topk_blocks", "pool_kernel",
        ("pool-count", "tl.maximum(count, 1.0)", "SIZE", "keys that are not there count",
         IMPORTANCE),
        ("pool-seen", "j < Nk, 0) != 0", "j < Nk, 0) >= 0", "padding is pooled", IMPORTANCE),
    ),
    *mutants("topk_blocks", "importance_kernel",
        ("importance-allowed", 'tl.where(allowed != 0, total, float("-inf"))', "total",
         "blocks that nobody sees are chosen", blocks("mask_all_empty", "mask_one_key")),
        ("importance-rows", "(tile + 1) * PER_TILE", "tile * PER_TILE + 1",
         "the rows of the first tile alone", IMPORTANCE),
        ("importance-tile", "+ tile) * n.Nk", "+ 0 * tile) * n.Nk", "every tile in one place",
         IMPORTANCE),
    ),
    *mutants("topk_blocks", "backward",
        ("blocks-tiles", "% chosen.shape[2])", "% 1)", "every block is that of the first tile",
         blocks("long")),
    ),
    *mutants("launch", "Launch",
        ("blocks-border", "rows & -rows", "rows", "row tiles cross the border of a choice",
         BLOCKS + "compiled[group_out-sm_90]"),
        mode="emulated",
    ),
    *mutants("topk_selection", "select_kernel",
        ("parts-end", "tl.minimum(last, end)", "last", "the next part's keys as well",
         PARTS + "a_part_that_keeps_more_tiles_than_it_has"),
        ("parts-place", "selected += split * top_k", "selected += 0 * split",
         "every part in the place of the first", parts("plain")),
    ),
    *mutants("topk_candidates", "candidates_kernel",
        ("parts-ties", "<= wanted)", "< wanted)", "one tie is missing", TIES),
        ("parts-none", 'tl.where(exists, s, float("-inf"))', "s", "-1 is a candidate",
         parts("mask_empty_rows", "mask_unsorted")),
        ("parts-columns", "d = d0 + ", "d = 0 * d0 + ", "the first columns again and again",
         parts("plain")),
        ("parts-nan", "reaches(s, t) & (s != t)", "(s > t)", "NaN is never chosen",
         PARTS + "what_is_not_finite_makes_its_rows_nan"),
    ),
]  # fmt: skip
