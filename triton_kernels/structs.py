"""What kernels take: tensors with their strides, and what belongs together, as one argument each.

A launcher fills them, kernels read their fields by name and hand them whole to helpers. A pointer
or number that is None is known when a kernel is compiled, and costs nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Strided(NamedTuple):
    """A tensor, whose rows are contiguous where it has rows; both fields are None without one."""

    ptr: Any
    stride: Any  # of each dimension, in elements


class Operands(NamedTuple):
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, DV]."""

    q: Strided
    k: Strided
    v: Strided


class QueriesAndKeys(NamedTuple):
    """q [B, Hq, Nq, D], k [B, Hkv, Nk, D]."""

    q: Strided
    k: Strided


class Intervals(NamedTuple):
    """int32 [B, Nq], the bounds of the queries' key intervals."""

    start: Strided
    stop: Strided


class Scale(NamedTuple):
    """A number, or a tensor of one value or of one for each query head; the other is None."""

    number: Any
    ptr: Any
    stride: Any


class Scores(NamedTuple):
    """What makes scores of products; a call may lack each but the scale.

    bias and mask, which is bytes, broadcast to [B, Hq, Nq, Nk] by stride; bits are `Launch.bits`,
    or those by key; start and stop are int32 [B, Nq]; softcap is a number.
    """

    bias: Strided
    mask: Strided
    bits: Strided
    start: Strided
    stop: Strided
    scale: Scale
    softcap: Any


class Dropout(NamedTuple):
    """seed int64 [1] and the least Philox word that is kept, both None without dropout; `factor`,
    None for 1, multiplies the probabilities after the softmax."""

    seed: Any
    threshold: Any
    factor: Any


class Sizes(NamedTuple):
    B: Any
    Hkv: Any
    Nq: Any
    Nk: Any


class PairSizes(NamedTuple):
    """The shape of a tensor that broadcasts to [B, Hq, Nq, Nk]."""

    B: Any
    H: Any
    Nq: Any
    Nk: Any


class RowResults(NamedTuple):
    """float32 [n_splits, B, Hq, Nq], natural logarithms; all but lse may be None.

    lse_low, in log2 units, is what float32 cannot hold of lse.
    """

    lse: Any
    lse_low: Any
    entropy: Any
    max_probability: Any


class RowTerms(NamedTuple):
    """float32 [B, Hq, Nq], what the backward knows of a row, see `delta_kernel`; of them lse_low,
    minus_delta and dentropy may be None."""

    lse: Any
    lse_low: Any
    minus_delta: Any
    dentropy: Any


class Upstream(NamedTuple):
    """What reaches the backward: dout [B, Hq, Nq, DV], the row terms, and the gradient of returned
    weights, 4-d with broadcast strides, or None."""

    dout: Strided
    rows: RowTerms
    dweights: Strided


class BlockLists(NamedTuple):
    """`Blocks` as a walk takes them, all None without: over keys the chosen blocks of each tile of
    queries and how many they are; over rows the tiles that chose a block, and where they begin."""

    ids: Any
    counts: Any
    n_blocks: Any


class Tiling(NamedTuple):
    """Constants of a kernel: head widths and the chunks that cover them, query heads of a key head,
    rows and keys of a tile, elements by which every row's offset can be divided, and the precision
    of products."""

    D: Any
    DV: Any
    CHUNKS: Any
    CHUNKS_V: Any
    GROUP: Any
    BLOCK_Q: Any
    BLOCK_K: Any
    ALIGN: Any
    PRECISION: Any


class Walk(NamedTuple):
    """Constants of a kernel's walk: two loops for one, see `keys_of_part`; the keys of a block and
    the queries that share their blocks, both None without blocks."""

    TWO_LOOPS: Any
    BLOCK_SIZE: Any
    QUERIES: Any


class Pair(NamedTuple):
    """Batch, query head, query and key of pairs, each of a shape that broadcasts to the tile's."""

    b: Any
    h: Any
    i: Any
    j: Any


class KeyRange(NamedTuple):
    """Which keys some rows see: each row's interval [first, last), of shape [BLOCK_Q, 1], the keys
    [begin, end) of any row, and the keys [full_begin, full_end) of every row."""

    first: Any
    last: Any
    begin: Any
    end: Any
    full_begin: Any
    full_end: Any


class SearchedRows(NamedTuple):
    """A tile of rows whose highest keys are searched: q_tile [BLOCK_Q, D], the keys `Strided`,
    batch and key head, the head of each row, the `Scores` and offsets of the rows in their mask,
    which rows exist [BLOCK_Q, 1], and the `KeyRange`."""

    q_tile: Any
    k: Strided
    b: Any
    hkv: Any
    h: Any
    s: Scores
    mask_rows: Any
    row_mask: Any
    keys: KeyRange


class Enclosure(NamedTuple):
    """The ends of a search, each [BLOCK_Q]: n_low scores, at least top_k, reach `low`, which is
    LOWEST while no guess was low enough, and n_high, fewer, reach `high`, inf while none was high
    enough."""

    low: Any
    high: Any
    n_low: Any
    n_high: Any


class Indexing(NamedTuple):
    """Where the chosen keys of a tile of rows are stored: the number of each row [BLOCK_Q], which
    rows exist, how many keys a row has at most, and how far rows are apart."""

    rows: Any
    row_mask: Any
    top_k: Any
    width: Any
