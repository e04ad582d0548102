"""From tensors to kernel arguments: one `Call` describes a call, whichever kernel it launches."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..core.layout import broadcast_strides, row_alignment
from .configs import (
    Config,
    column_chunks,
    lookup,
    register_bound,
    selection,
    tf32_fits,
)

INTERPRETED_ARCH = 90  # whose table rows the interpreter runs
DEFAULT_MULTIPROCESSORS = 132


def compiler_options(max_registers: int | None) -> dict:
    """Options of every launch that the defaults of the Triton at hand must not decide."""
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
    if device.type != "cuda":
        return DEFAULT_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def split_count(programs: int, steps: int, device: torch.device) -> int:
    """How many programs share one loop of `steps` tiles so that the device is filled twice over.

    A split keeps at least four tiles: below that its merge costs more than it hides.
    """
    return max(1, min(2 * multiprocessors(device) // max(programs, 1), steps // 4))


def device_guard(device: torch.device):
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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
class Call:
    """One call's inputs, in the order in which every kernel takes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    scale_tensor: Tensor | None
    start: Tensor | None
    stop: Tensor | None
    mask: Tensor | None  # bool; or int32, see `bits`
    seed: Tensor | None
    scale: float
    softcap: float
    dropout_p: float
    allow_tf32: bool
    p_scale: float = 1.0  # of the probabilities after the softmax, beside that of dropout
    blocks: Blocks | None = None

    B = property(lambda self: self.q.shape[0])
    Hq = property(lambda self: self.q.shape[1])
    Nq = property(lambda self: self.q.shape[2])
    D = property(lambda self: self.q.shape[3])
    Hkv = property(lambda self: self.k.shape[1])
    Nk = property(lambda self: self.k.shape[2])
    DV = property(lambda self: self.v.shape[3])
    group = property(lambda self: self.Hq // self.Hkv)

    @property
    def bits(self) -> bool:
        """Whether the mask is [B, Hq, Nq, ceil(Nk / 32)] words of 32 bits, one for each key; none
        is set outside the intervals, which then only bound the walk over keys."""
        return self.mask is not None and self.mask.dtype == torch.int32

    def plain(self, statistics: bool) -> bool:
        """Whether a score is a product and one scale of its key head, nothing else but bits."""
        mask = None if self.bits else self.mask
        flags = (mask, self.bias, self.softcap or None, self.seed, statistics or None)
        one_scale = self.scale_tensor is None or self.group == 1
        return one_scale and all(flag is None for flag in flags)

    def two_loops(self, config: Config, block: int, statistics: bool) -> bool:
        """Whether a walk over tiles is two loops, see `keys_of_part`: where the tensor cores wait
        for the rest of the code, and each warp has 16 of the `block` rows of a product to itself;
        with fewer the warps should share out its columns, which takes two layouts."""
        short = self.plain(statistics) and self.q.element_size() == 2
        return short and not self.bits and not self.blocks and block >= 16 * config.num_warps

    def config(self, kernel: str, statistics: bool = False) -> Config | None:
        """The table's row for this call; `statistics` also where their gradient is needed."""
        plain = self.plain(statistics)
        rows, itemsize = self.Nq * self.group, self.q.element_size()
        arch = target_arch(self.q.device)
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
        rows, itemsize = self.Nq * self.group, self.q.element_size()
        return selection(self.D, itemsize, rows, triton.cdiv(self.Nk, n_splits))

    def splits(self, programs: int, steps: int, wanted: int | None = None) -> int:
        """`split_count` unless a number is wanted."""
        return wanted or split_count(programs, steps, self.q.device)

    def row_tiles(self, config: Config) -> int:
        return triton.cdiv(self.Nq * self.group, config.block_q)

    def key_tiles(self, config: Config) -> int:
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

    def block_arguments(self, by_key: bool = False) -> dict:
        """What kernels take of `blocks`, all None without."""
        names = ("blocks", "n_chosen", "n_blocks", "BLOCK_SIZE", "QUERIES")
        if not self.blocks:
            return dict.fromkeys(names)
        size, queries, *by_tile = self.blocks
        lists = by_tile[2:] if by_key else by_tile[:2]
        values = (*lists, by_tile[0].shape[3], size, queries)
        return dict(zip(names, values, strict=True))

    def operands(self) -> tuple:
        """q ... p_factor, the run of parameters that all kernels share."""
        mask = self.mask
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
        intervals = (None, (0, 0), None, (0, 0))
        if self.start is not None:
            intervals = (self.start, self.start.stride(), self.stop, self.stop.stride())
        factor = self.p_scale / (1.0 - self.dropout_p)
        stride_scale = (0,)
        if self.scale_tensor is not None and self.scale_tensor.numel() > 1:
            stride_scale = self.scale_tensor.stride()
        return (
            self.q, self.q.stride(), self.k, self.k.stride(), self.v, self.v.stride(),
            self.bias, broadcast_strides(self.bias), mask, broadcast_strides(mask), *intervals,
            None if self.scale_tensor is not None else self.scale, self.scale_tensor, stride_scale,
            self.softcap or None, self.seed, round(self.dropout_p * 2**32),
            None if factor == 1.0 else factor,
        )  # fmt: skip

    def launch(
        self, kernel, config: Config, programs: int, results: tuple, n_splits: int, **constants
    ) -> None:  # fmt: skip
        """Launches `kernel` on `results`, the shared operands, the sizes and its own constants."""
        tiles = [t for t in (*results, self.q, self.k, self.v) if isinstance(t, Tensor)]
        tiles = [t for t in tiles if t.dim() > 3 and t.shape[-1] in (self.D, self.DV)]
        tf32 = self.allow_tf32 and self.q.dtype == torch.float32
        tf32 = tf32 and tf32_fits(target_arch(self.q.device), self.D, self.DV)
        itemsize, widest = self.q.element_size(), max(self.D, self.DV)
        with device_guard(self.q.device):
            kernel[(programs,)](
                *results, *self.operands(), self.B, self.Hkv, self.Nq, self.Nk, n_splits,
                D=self.D, DV=self.DV,
                CHUNKS=column_chunks(self.D, itemsize, widest),
                CHUNKS_V=column_chunks(self.DV, itemsize, widest),
                GROUP=self.group, BLOCK_Q=config.block_q, BLOCK_K=config.block_k,
                ALIGN=row_alignment(*tiles), PRECISION="tf32" if tf32 else "ieee",
                num_warps=config.num_warps, num_stages=config.num_stages,
                **constants, **compiler_options(config.max_registers),
            )  # fmt: skip
