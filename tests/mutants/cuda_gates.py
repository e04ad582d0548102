"""Mutants of the CUDA kernels of the gated residual."""

from mutants.mutation import mutants

GATED = "gated_residual_cuda::"
GATED_PLAIN = f"{GATED}float16[plain_one_masked-cuda_sm_80]"
GATED_LAYER = f"{GATED}float16[layer_vector_masked-cuda_sm_80]"
GATED_RMS = f"{GATED}float16[rms_one_ragged-cuda_sm_80]"
GATED_ROWS = f"{GATED}cuda[many_rows-bfloat16-cuda_sm_80]"
WIDEST = f"{GATED}the_widest_row[layer-cuda_sm_80]"

GATES = [
    *mutants("gated_residual", "RowIndex(const RowSizes& rows, int r)",
        ("cuda-gated-row", "r /= rows.sizes[d];", "", "rows of the wrong outer index",
         f"{GATED}dimensions_that_cannot_be_walked_as_one[cuda_sm_80]"),
    ),
    *mutants("gated_residual", "TeamSum",
        ("cuda-gated-team", "if (blockDim.x == kWarpSize) return x;", "return x;",
         "each warp of a row has its own sum", WIDEST),
        ("cuda-gated-barrier", ": 0.f);\n  __syncthreads();", ": 0.f);",
         "a sum is overwritten while others read it", WIDEST),
    ),
    *mutants("gated_residual", "Normalise",
        ("cuda-gated-mean", "y[n][i] -= mean", "y[n][i] -= 0.f", "no mean is taken off",
         GATED_LAYER),
        ("cuda-gated-eps", "columns.dim + eps)", "columns.dim)", "no eps",
         f"{GATED}cuda[large_eps-bfloat16-cuda_sm_80]"),
    ),
    *mutants("gated_residual", "gated_forward_kernel",
        ("cuda-gated-mask", "if (gated) {", "if (true) {", "the row mask is not read",
         GATED_PLAIN),
        ("cuda-gated-rounded", "ToFloat(FromFloat<T>(values[n][i]))", "values[n][i]",
         "the norm of a y that is not rounded",
         f"{GATED}the_norm_is_of_the_y_that_is_returned[cuda_sm_80]"),
        ("cuda-gated-weight",
         "if (params.bias.data != nullptr) values[n][i] += params.bias.Load(c + i);", "",
         "no bias", GATED_LAYER),
    ),
    *mutants("gated_residual", "gated_backward_kernel",
        ("cuda-gated-along", "normed[n][i] * along + mean", "mean",
         "the gradient along the row is kept", GATED_RMS),
        ("cuda-gated-mean-gradient", "normed[n][i] * along + mean", "normed[n][i] * along",
         "the gradient of the mean", GATED_LAYER),
        ("cuda-gated-dgate-mask", "params.gate_parts != nullptr && gated",
         "params.gate_parts != nullptr", "rows that do not count reach the gate", GATED_PLAIN),
        ("cuda-gated-dh-mask", "gated ? gate.At(c + i) * dy[n][i] : 0.f",
         "gate.At(c + i) * dy[n][i]", "dh of rows that do not count", GATED_PLAIN),
        ("cuda-gated-teams", "r += teams)", "r += teams + 1)", "rows that nobody walks",
         f"{GATED}cuda[many_rows_plain-float32-cuda_sm_80]"),
    ),
    *mutants("gated_residual", "StoreColumnSums",
        ("cuda-gated-columns", "team == 0 ? sums[n][i] : total + sums[n][i]", "sums[n][i]",
         "the sums of a block's last team", GATED_LAYER),
    ),
    *mutants("gated_residual", "SumOfParts",
        ("cuda-gated-groups", "group < params.groups", "group < 1", "the sums of the first block",
         GATED_ROWS),
    ),
    *mutants("gated_residual", "gated_sums_kernel",
        ("cuda-gated-tanh-vector", "SumOfParts(params.gate_parts, c, params) * (1.f - t * t)",
         "SumOfParts(params.gate_parts, c, params)", "the derivative of a vector gate",
         GATED_LAYER),
        ("cuda-gated-tanh", "sum * (1.f - t * t)", "sum * (1.f - t)", "that of one gate",
         GATED_PLAIN),
        ("cuda-gated-tiles", "params.groups * params.column_tiles", "params.groups",
         "parts of the first columns", f"{GATED}cuda[plain_one_wide-bfloat16-cuda_sm_80]"),
    ),
]  # fmt: skip
