"""Mutants of the kernels of csrc/, each run as it is compiled."""

from dataclasses import replace

from mutants.cuda_gates import GATED, GATES
from mutants.mutation import mutants

CROSS, TOP_K = "cross_attention_cuda::", "topk_attention_cuda::"


def dtypes(flags: str, dtype: str) -> str:
    return f"{CROSS}dtypes[{flags}-{dtype}-cuda_sm_80]"


PLAIN, FLAGS = dtypes("plain", "float16"), dtypes("flags", "float16")
PLAIN32, FLAGS32 = dtypes("plain", "float32"), dtypes("flags", "float32")
PADDING = f"{CROSS}what_padding_holds[padding-statistics-cuda_sm_80]"
STATISTICS = f"{CROSS}splits[statistics-2-cuda_sm_80]"
FAR_BELOW = f"{CROSS}splits[far_below-3-cuda_sm_80]"
MANY_ROWS = f"{CROSS}splits[many_rows-3-cuda_sm_80]"
DROPOUT = f"{CROSS}dropout_has_the_bits_of_the_reference[cuda_sm_80]"
CONFLICTS = f"{CROSS}no_bank_conflicts[64-float16-cuda_sm_80]"
TIES = f"{TOP_K}lower_keys_win_ties[8-float16-cuda_sm_80]"
RANGE = f"{TOP_K}top_k_of_the_whole_range[cuda_sm_80]"

SPLIT = f"{CROSS}splits[plain-3-cuda_sm_80]"
FEW = f"{TOP_K}every_output_is_written[few_of_many_keys-cuda_sm_80]"

FORWARD = [
    *mutants("cross_attention", "Add",
        ("cuda-acc-rescale", "acc[n][2 * r] *= alpha, ", "", "half of acc is not rescaled", PLAIN),
        ("cuda-entropy-rescale", "alpha * a[r] + softmax[r].l", "a[r] + softmax[r].l",
         "the sum of e log e keeps its old shift", STATISTICS),
        ("cuda-entropy-forget", "alpha == 0.f ? 0.f : ", "", "0 * inf after keys far below",
         FAR_BELOW),
        ("cuda-four-lanes", "largest[r], 2));", "largest[r], 1));",
         "the maximum of half of a row's lanes", PLAIN),
    ),
    *mutants("cross_attention", "cross_attention_forward_kernel",
        ("cuda-forward-cut", "!PLAIN || range.Cuts(k0, kKeys)", "!PLAIN",
         "no tile of a plain row is cut", PLAIN),
        ("cuda-forward-keep", "if (!score_rows[i / 2].Keeps(c,", "if (score_rows[i / 2].Keeps(c,",
         "dropout keeps what it should drop", DROPOUT),
        ("cuda-forward-dv", "tiles.Second(stage), shape.Dv)", "tiles.First(stage), shape.Dv)",
         "keys in place of values", PLAIN),
        ("cuda-forward-wait", "ptx::WaitForCopies<1>()", "ptx::WaitForCopies<2>()",
         "a tile is read while it is copied", PLAIN),
        ("cuda-forward-barrier", "shape.Dv);\n    __syncthreads();", "shape.Dv);",
         "a tile is overwritten while others read it", PLAIN),
    ),
    *mutants("cross_attention", "merge_kernel",
        ("cuda-merge-weight", "sum += expf(log_share(part)) *", "sum +=",
         "splits are not weighted by their sums", STATISTICS),
    ),
    *mutants("softmax", "Shift",
        ("cuda-merge-empty", "m == -INFINITY ? 0.f : m", "m", "inf - inf where no split has keys",
         f"{CROSS}splits[masked-40-cuda_sm_80]"),
    ),
    *mutants("softmax", "Merge",
        ("cuda-merge-low", " + lse_low * kLn2", "", "parts without what float32 cannot hold",
         f"{CROSS}splits[low-2-cuda_sm_80]"),
    ),
    *mutants("cross_attention", "Finish",
        ("cuda-empty-zero", "state.l == 0.f", "false", "NaN of other rows where there are no keys",
         f"{CROSS}nan_that_others_see_stays_out_of_a_row_without_keys[1-cuda_sm_80]"),
    ),
]  # fmt: skip

BACKWARD = [
    *mutants("cross_attention_backward", "row_terms_kernel",
        ("cuda-delta-dlse", "delta -= params.dlse[r]", "delta += params.dlse[r]",
         "the sign of dlse", PLAIN),
        ("cuda-delta-entropy", "params.dentropy[r] * params.entropy[r]", "params.dentropy[r]",
         "delta without the entropy", STATISTICS),
        ("cuda-empty-lse", "empty ? INFINITY :", "false ? INFINITY :",
         "inf - inf in a row without keys",
         f"{CROSS}cuda[cuda_sm_80-mask_bool_empty_rows-float16]"),
    ),
    *mutants("cross_attention_backward", "dq_kernel",
        ("cuda-dq-cut", "PLAIN && range.Cuts(k0, kKeys)", "false",
         "keys outside a row's interval have gradients", PLAIN),
        ("cuda-dq-minus-delta", "dp[n][i] + row.minus_delta", "dp[n][i] - row.minus_delta",
         "the sign of delta", PLAIN),
    ),
    *mutants("cross_attention_backward", "dkdv_kernel",
        ("cuda-dkdv-cut", "PLAIN && cut", "false",
         "rows give gradients to keys that they do not see", PLAIN),
        ("cuda-dkdv-whole", "bounds[t].z < last_key", "bounds[t].z < k0",
         "a tile cut by a stop counts as whole",
         f"{CROSS}cuda[cuda_sm_80-whole_tiles_padding-float16]"),
        ("cuda-dkdv-last-rows", "(t + 1) * kRows > shape.Nq", "t * kRows > shape.Nq",
         "rows that are not there are as if they saw every key",
         f"{CROSS}an_infinite_key_stays_out_of_rows_that_are_not_there[plain-float16-cuda_sm_80]"),
        ("cuda-dkdv-kept", "kept ? pair.p : 0.f", "pair.p", "dv without dropout", FLAGS),
        ("cuda-dkdv-scale", "pair.ds * score_row.scale", "pair.ds", "dk without each head's scale",
         f"{CROSS}splits[heads-3-cuda_sm_80]"),
        ("cuda-dkdv-one-scale", "one_scale ? scale : 1.f", "1.f", "dk without the scale",
         FLAGS),
        ("cuda-dkdv-factor", "dv, c.keep_scale,", "dv, 1.f,",
         "dv without 1 / (1 - dropout_p)", FLAGS),
    ),
    *mutants("cross_attention_backward", "tile_bounds_kernel",
        ("cuda-bounds-rows", "row < ROWS;", "row < 16;", "bounds of a tile's first rows",
         PLAIN),
        ("cuda-bounds-batch", "b = n / n_tiles", "b = 0", "bounds of the first batch element",
         f"{CROSS}cuda[cuda_sm_80-mask_media_last_long-float32]"),
    ),
    *mutants("cross_attention_backward", "sum_splits_kernel",
        ("cuda-splits-last", "n < call.n_splits", "n + 1 < call.n_splits",
         "the last split is left out", SPLIT),
        ("cuda-splits-head", "h = row / call.N % call.H", "h = row / call.N / call.H",
         "gradients of the wrong head", f"{CROSS}splits[heads-3-cuda_sm_80]"),
    ),
    *mutants("bias_gradient", "dbias_kernel",
        ("cuda-dbias-over", "size[3] == shape.Nk ? 1 : kKeys", "1",
         "a bias of one column gets the first one's gradient", MANY_ROWS),
        ("cuda-dbias-skip", "j0 >= range.end ||", "j0 > range.begin ||",
         "tiles behind a tile's first key are left out", FLAGS),
    ),
]  # fmt: skip

WALKS = [
    *mutants("attention_rows", "KeysOf",
        ("cuda-keys-clamp", "c.start.strides[1]], 0)", "c.start.strides[1]], -8)",
         "a start below 0 is a key",
         f"{CROSS}bounds_outside_of_the_keys_are_clamped[cuda_sm_80]"),
    ),
    *mutants("attention_rows", "Find",
        ("cuda-tiles-meet", "bounds.x < k1_", "bounds.x <= k0_",
         "tiles that begin inside are left out", PLAIN),
    ),
    *mutants("attention_rows", "SplitRange",
        ("cuda-split-end", "begin + each", "begin + each - 1", "a split's last key is left out",
         f"{CROSS}splits[plain-2-cuda_sm_80]"),
    ),
    *mutants("attention_rows", "CopyKeys",
        ("cuda-copy-last", "j0 + n < last ?", "j0 + n <= last ?", "a key beyond the last is read",
         PADDING),
    ),
    *mutants("attention_scores", "Philox",
        ("cuda-philox-rounds", "round < 10", "round < 7", "Philox4x32-7", DROPOUT),
        ("cuda-philox-halves", "static_cast<uint32_t>(seed >> 32)", "0u",
         "half of the seed", DROPOUT),
    ),
    *mutants("attention_scores", "PairGradient",
        ("cuda-tanh", "1.f - tanh * tanh", "1.f - tanh", "the derivative of the softcap", FLAGS),
        ("cuda-entropy-term", "log2_p * kLn2", "log2_p", "dentropy in log2 units", STATISTICS),
    ),
    *mutants("tile", "SplitTf32",
        ("cuda-tf32-small", "is_finite ? ptx::ToTf32(", "false ? ptx::ToTf32(",
         "products of plain TF32", PLAIN32),
    ),
    *mutants("tile", "At(int row, int chunk)",
        ("cuda-swizzle", "(chunk ^ (row & 7))", "chunk", "banks conflict", CONFLICTS),
    ),
    *mutants("tile", "Copy",
        ("cuda-copy-columns", "max(width - column, 0), kChunk)", "kChunk, kChunk)",
         "columns beyond the width are read", PLAIN),
    ),
]  # fmt: skip

SELECTION = [
    *mutants("topk_attention", "Ordered",
        ("cuda-ordered-negative", "bits >> 31 ? ~bits :", "bits >> 31 ? bits :",
         "negative scores in the wrong order", RANGE),
    ),
    *mutants("topk_attention", "Ordered",
        ("cuda-ordered-nan", "if (s != s) return 0xffffffff;", "", "NaN by its bits",
         f"{TOP_K}what_is_not_finite[nan-cuda_sm_80]"),
        equivalent="Each NaN that arithmetic makes is 0x7fffffff on every architecture so far, "
        "whose place is the same; PTX does not promise it.",
    ),
    *mutants("topk_attention", "Refine",
        ("cuda-refine-ties", "choice.ties -= above", "choice.ties -= above - 1",
         "one key too many", TIES),
        ("cuda-refine-early", "count == choice.ties) {", "count >= choice.ties) {",
         "all that agree in the first bits", TIES),
    ),
    *mutants("topk_attention", "TakeKeys",
        ("cuda-ties-highest", "0x80000000u >> __clz(equal)", "equal & (~equal + 1)",
         "the highest of equal keys are taken", TIES),
    ),
    *mutants("topk_attention", "topk_selection_kernel",
        ("cuda-words-outside", "w * 32 >= end", "w * 32 > end + 32", "words that nobody writes",
         f"{TOP_K}every_output_is_written[mask_padding-cuda_sm_80]"),
        ("cuda-agrees", "u[n][i] >> 8 >> shift == choice.threshold", "true",
         "each step counts all scores", TIES),
    ),
]  # fmt: skip


INDICES = [
    *mutants("topk_attention", "topk_indices_kernel",
        ("cuda-index-place", "__popc(word & (lane_bit - 1))", "__popc(word & lane_bit) - 1",
         "keys of a word in one place", TIES),
        ("cuda-index-none", "n = n_written + lane; n < params.top_k",
         "n = n_written + lane + 1; n < params.top_k",
         "the first index that is none is not written",
         f"{TOP_K}every_output_is_written[mask_padding-cuda_sm_80]"),
        ("cuda-bits-first", "j >= 0)", "j > 0)", "key 0 is never a bit",
         f"{TOP_K}the_first_and_the_last_key_are_kept_as_indices[cuda_sm_80]"),
        ("cuda-bits-zero", "bits[w] = 0;", ";", "bits that are not cleared", FEW),
    ),
]  # fmt: skip

LAUNCHERS = [
    *mutants("cross_attention", "backward",
        ("cuda-launch-dbias", "dbias.sum(0)", "dbias[0]", "dbias of the first split", MANY_ROWS),
        ("cuda-launch-entropy", "None if dentropy is None else results.entropy", "None",
         "no entropy beside its gradient", STATISTICS),
    ),
    *mutants("cross_attention", "struct_of",
        ("cuda-launch-threshold", "round(call.dropout_p * 2**32)", "int(call.dropout_p * 2**31)",
         "half of the drops", DROPOUT),
        ("cuda-launch-scales", "scale_tensor.stride(0) if per_head else 0", "0",
         "every head has the first one's scale", f"{CROSS}splits[heads-2-cuda_sm_80]"),
    ),
    *mutants("topk_attention", "backward",
        ("cuda-launch-indices", "convert(results.indices, bits, call.Nk, True)",
         "convert(results.indices, bits.zero_(), call.Nk, False)", "no bits from indices", FEW),
    ),
    *mutants("gated_residual", "write_gradients",
        ("cuda-launch-aligned", "if t is None or aligned(t, y.dtype) else fresh(t)", "",
         "wide rows at odd places",
         f"{GATED}gradients_of_the_widest_row_may_lie_anywhere[cuda_sm_80]"),
        ("cuda-launch-walks", "> _cuda.MAX_ROW_DIMS", "> 99", "more walks than there are places",
         f"{GATED}dimensions_that_cannot_be_walked_as_one[cuda_sm_80]"),
    ),
]  # fmt: skip

SHARED = [  # what both kinds of launchers call
    *mutants("layout", "row_gradient",
        ("cuda-launch-contiguous", "dout.stride(3) == 1", "True", "dout read as if it were rows",
         f"{CROSS}a_gradient_may_have_any_strides[cuda_sm_80]"),
        folder="xattn_kernels/core",
        mode="emulated",
    ),
]  # fmt: skip


def of_launchers(table: list) -> list:
    return [replace(m, folder="xattn_kernels/cuda_kernels", mode="emulated") for m in table]


def of_csrc(table: list) -> list:
    return [replace(m, folder="csrc", mode="emulated") for m in table]


CUDA = of_csrc([*FORWARD, *BACKWARD, *WALKS, *SELECTION, *INDICES, *GATES])
CUDA += [*of_launchers(LAUNCHERS), *SHARED]
