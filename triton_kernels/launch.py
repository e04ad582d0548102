"""From a call to kernel arguments: one `Launch` describes a call, whichever kernel it launches."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..core.call import AttentionCall
from ..core.layout import broadcast_strides, row_alignment
from .configs import Config, column_chunks, lookup, register_bound, selection, tf32_fits
from .structs import (
    BlockLists,
    Dropout,
    Operands,
    QueriesAndKeys,
    Scale,
    Scores,
    Sizes,
    Strided,
    Tiling,
    Walk,
)

INTERPRETED_ARCH = 90  # the interpreter runs the table rows of this architecture
DEFAULT_MULTIPROCESSORS = 132
NO_BLOCKS = BlockLists(None, None, None)


def compiler_options(max_registers: int | None) -> dict:
    """The options of every launch that the defaults of the Triton at hand must not decide."""
    options = {"enable_fp_fusion": True}
    if max_registers is not None and torch.version.hip is None:
        options["maxnreg"] = max_registers
    return options


def target_arch(device: torch.device) -> int:
    """Compute capability times ten of `device`, or of the emulator in charge of CPU tensors."""
    if triton.knobs.runtime.interpret:
        return INTERPRETED_ARCH
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    arch = triton.runtime.driver.active.get_current_target().arch
    return arch if isinstance(arch, int) else 80  # AMD names its targets; it takes sm_80's rows


@lru_cache(None)
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    if device.type != "cuda":
        return DEFAULT_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def split_count(programs: int, steps: int, device: torch.device) -> int:
    """How many programs share one loop of `steps` tiles so that the device is filled twice over.

    A split keeps at least four tiles: below that its merge costs more than it hides.
    """
    return max(1, min(2 * multiprocessors(device) // max(programs, 1), steps // 4))


def device_guard(device: torch.device):
    """A context in which `device` is current: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


NOTHING = Strided(None, None)


def strided(t: Tensor | None) -> Strided:
    """A tensor as kernels take it."""
    return NOTHING if t is None else Strided(t, t.stride())


def broadcast(t: Tensor | None) -> Strided:
    """The same of a 4-d tensor whose dimensions of one are broadcast."""
    return NOTHING if t is None else Strided(t, broadcast_strides(t))


class Blocks(NamedTuple):
    """The blocks of `size` keys that tiles of `queries` queries attend to: of each row tile in the
    walk over keys, and which tiles chose a block in the walk over rows."""

    size: int
    queries: int
    chosen: Tensor  # int32 [B, Hkv, T, n], in ascending order, then -1
    counts: Tensor  # int32 [B, Hkv, T], how many are not -1
    tiles: Tensor | None = None  # int32, the T of each choice, sorted by key head and block
    ends: Tensor | None = None  # int64 [B, Hkv, blocks + 1]: where those of each block begin


@dataclass(frozen=True)
class Launch:
    """How a call is launched: its rows of the table, its tiles and splits, its kernel arguments."""

    call: AttentionCall
    blocks: Blocks | None = None
    p_scale: float = 1.0  # multiplies the probabilities after the softmax, beside dropout's factor

    B = property(lambda self: self.call.B)
    Hkv = property(lambda self: self.call.Hkv)
    Nq = property(lambda self: self.call.Nq)
    Nk = property(lambda self: self.call.Nk)
    D = property(lambda self: self.call.D)
    DV = property(lambda self: self.call.Dv)
    group = property(lambda self: self.call.group)
    device = property(lambda self: self.call.device)
    itemsize = property(lambda self: self.call.q.element_size())

    @property
    def bits(self) -> bool:
        """Whether the mask is [B, Hq, Nq, ceil(Nk / 32)] words of 32 bits, one for each key; none
        is set outside the intervals, which then only bound the walk over keys."""
        return self.call.mask is not None and self.call.mask.dtype == torch.int32

    def plain(self, statistics: bool) -> bool:
        """Whether a score is a product and one scale of its key head, nothing else but bits."""
        call = self.call
        mask = None if self.bits else call.mask
        flags = (mask, call.bias, call.softcap, call.seed, statistics or None)
        one_scale = call.scale_tensor is None or self.group == 1
        return one_scale and all(flag is None for flag in flags)

    def two_loops(self, config: Config, block: int, statistics: bool) -> bool:
        """Whether a walk over tiles is two loops, see `keys_of_part`: where the tensor cores wait
        for the rest of the code, and each warp has 16 of the `block` rows of a product to itself;
        with fewer the warps should share out its columns, which takes two layouts."""
        short = self.plain(statistics) and self.itemsize == 2
        return short and not self.bits and not self.blocks and block >= 16 * config.num_warps

    def config(self, kernel: str, statistics: bool = False) -> Config | None:
        """The table's row for this call; `statistics` also where their gradient is needed."""
        plain = self.plain(statistics)
        rows, itemsize = self.Nq * self.group, self.itemsize
        arch = target_arch(self.device)
        if not self.blocks:
            return lookup(kernel, arch, self.D, self.DV, itemsize, plain, rows, self.bits)
        rows = min(rows, self.blocks.queries * self.group)
        config = lookup(kernel, arch, self.D, self.DV, itemsize, plain, rows, bits=True)
        if config is None:
            return None
        bound = register_bound(config.num_warps)
        block_k = min(config.block_k, self.blocks.size)
        config = replace(config, block_k=block_k, max_registers=bound)
        return self.within(config, self.blocks.queries)

    def within(self, config: Config, queries: int) -> Config:
        """The configuration with row tiles that do not cross the border of `queries` queries."""
        rows = queries * self.group
        return replace(config, block_q=min(config.block_q, rows & -rows))

    def selection_config(self, n_splits: int = 1) -> tuple[Config, int]:
        """(configuration, tiles of keys whose scores are kept) of one of n_splits parts of the
        keys, see `configs.selection`."""
        rows = self.Nq * self.group
        return selection(self.D, self.itemsize, rows, triton.cdiv(self.Nk, n_splits))

    def splits(self, programs: int, steps: int, wanted: int | None = None) -> int:
        """`split_count` unless a number is wanted."""
        return wanted or split_count(programs, steps, self.device)

    def row_tiles(self, config: Config) -> int:
        """Tiles of the packed rows of a key head."""
        return triton.cdiv(self.Nq * self.group, config.block_q)

    def key_tiles(self, config: Config) -> int:
        """Tiles of keys."""
        return triton.cdiv(self.Nk, config.block_k)

    def key_steps(self, config: Config) -> int:
        """Tiles of keys that a row tile walks, at most."""
        if not self.blocks:
            return self.key_tiles(config)
        return self.blocks.chosen.shape[3] * self.blocks.size // config.block_k

    def row_steps(self, config: Config) -> int:
        """Row tiles that a tile of keys walks, on average where it is chosen by some."""
        if not self.blocks:
            return self.row_tiles(config)
        chosen = self.blocks.chosen.shape[3] * self.blocks.size
        return triton.cdiv(self.row_tiles(config) * chosen, self.Nk)

    def block_lists(self, by_key: bool = False) -> BlockLists:
        """What a walk over keys, or over rows, takes of `blocks`."""
        if not self.blocks:
            return NO_BLOCKS
        size, queries, chosen, counts, tiles, ends = self.blocks
        ids = (tiles, ends) if by_key else (chosen, counts)
        return BlockLists(*ids, chosen.shape[3])

    def walk(self, two_loops: bool = False) -> Walk:
        """The constants of a walk."""
        size, queries = self.blocks[:2] if self.blocks else (None, None)
        return Walk(two_loops, size, queries)

    def operands(self) -> Operands:
        """q, k and v."""
        return Operands(strided(self.call.q), strided(self.call.k), strided(self.call.v))

    def queries_and_keys(self) -> QueriesAndKeys:
        """q and k."""
        return QueriesAndKeys(strided(self.call.q), strided(self.call.k))

    def scale(self) -> Scale:
        """The scale, a number or a tensor."""
        tensor = self.call.scale_tensor
        if tensor is None:
            return Scale(self.call.scale, None, None)
        return Scale(None, tensor, tensor.stride() if tensor.numel() > 1 else (0,))

    def scores(self) -> Scores:
        """Everything that makes scores of products."""
        call, mask, bits = self.call, NOTHING, NOTHING
        if self.bits:
            bits = strided(call.mask)
        elif call.mask is not None:
            mask = broadcast(call.mask.view(torch.uint8))
        start, stop = strided(call.start), strided(call.stop)
        return Scores(broadcast(call.bias), mask, bits, start, stop, self.scale(), call.softcap)

    def dropout(self) -> Dropout:
        """The dropout, and what multiplies probabilities after the softmax."""
        factor = self.p_scale / (1.0 - self.call.dropout_p)
        threshold = None if self.call.seed is None else round(self.call.dropout_p * 2**32)
        return Dropout(self.call.seed, threshold, None if factor == 1.0 else factor)

    def sizes(self) -> Sizes:
        """B, Hkv, Nq and Nk."""
        return Sizes(self.B, self.Hkv, self.Nq, self.Nk)

    def tiling(self, config: Config, *rows: Tensor) -> Tiling:
        """The constants of a kernel; `rows`: its tensors of rows beside q, k and v."""
        call = self.call
        inputs = (call.q, call.k, *((call.v,) if hasattr(call, "v") else ()))
        tf32 = call.allow_tf32 and call.q.dtype == torch.float32
        tf32 = tf32 and tf32_fits(target_arch(self.device), self.D, self.DV)
        itemsize, widest = self.itemsize, max(self.D, self.DV)
        return Tiling(
            D=self.D,
            DV=self.DV,
            CHUNKS=column_chunks(self.D, itemsize, widest),
            CHUNKS_V=column_chunks(self.DV, itemsize, widest),
            GROUP=self.group,
            BLOCK_Q=config.block_q,
            BLOCK_K=config.block_k,
            ALIGN=row_alignment(*rows, *inputs),
            PRECISION="tf32" if tf32 else "ieee",
        )

    def run(self, kernel, programs: int, config: Config, *arguments, **constants) -> None:
        """Launches a kernel with the options of its configuration."""
        with device_guard(self.device):
            kernel[(programs,)](
                *arguments,
                **constants,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                **compiler_options(config.max_registers),
            )
