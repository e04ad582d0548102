"""What the tensors of a call hold, and how they lie in memory."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Tensors = dict[str, Tensor]
SPARE = 2**30  # bytes for all that is not far apart


def reserve(shape: tuple[int, ...], strides: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros of any strides: on a CPU address space, of which only touched pages cost memory."""
    elements = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if not like.is_cpu:
        return like.new_zeros(elements).as_strided(shape, strides)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, elements * like.element_size(), flags=flags)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(shape, strides)


def far_apart(B: int, H: int, N: int, width: int) -> tuple[int, ...]:
    """The last row of a head, the next head and the next batch are each 2^31 elements away."""
    row = (2**31 // max(N - 1, 1) + 16) // 16 * 16
    return row * N * H, row * N, row, 1


def far_batches(B: int, H: int, N: int, width: int) -> tuple[int, ...]:
    """Batches lie 2^30 elements apart: the stride fits 32 bits, the third one's offset does not."""
    return 2**30, N * width, width, 1


def far_heads(B: int, H: int, N: int, width: int) -> tuple[int, ...]:
    """The same of heads."""
    return 2**30 * H, 2**30, width, 1


FAR = {f.__name__: f for f in (far_apart, far_batches, far_heads)}


def spread(name: str) -> Callable[[Tensor], Tensor]:
    """The layout of FAR called `name`."""
    return lambda t: reserve(t.shape, FAR[name](*t.shape), t).copy_(t) if t.numel() else t


def need_memory(tensors: list[tuple[str, tuple[int, ...]]], dtype: torch.dtype) -> None:
    """Skips the test where a GPU's free memory does not hold these layouts of these shapes."""
    far = [(n, FAR[layout](*n)) for layout, n in tensors if layout in FAR and 0 not in n]
    elements = sum(sum((n - 1) * s for n, s in zip(*t, strict=True)) for t in far)
    if not far:
        return
    torch.cuda.empty_cache()
    free, needed = torch.cuda.mem_get_info()[0], elements * dtype.itemsize + SPARE
    if needed > free:
        pytest.skip(f"needs {needed / 2**30:.1f} GiB of GPU memory, {free / 2**30:.1f} are free")


def sliced(t: Tensor) -> Tensor:
    """Inside a larger tensor, at an offset and with strides that nothing divides."""
    B, H, N, width = t.shape
    return t.new_zeros(B, H, N + 2, width + 3)[:, :, 1:-1, 1:-2].copy_(t)


def padded(t: Tensor) -> Tensor:
    """Aligned where it begins, and in no other row."""
    return torch.nn.functional.pad(t, (0, 3), value=torch.nan)[..., :-3]


def one_of_two(t: Tensor) -> Tensor:
    """Half of a joint projection [B, N, 2, H, width]."""
    return torch.stack([t, -t]).permute(1, 3, 0, 2, 4).contiguous()[:, :, 0].transpose(1, 2)


# How a tensor [B, H, N, width] lies in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "BHND": lambda t: t,
    "BNHD": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "NBHD": lambda t: t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "BN2HD": one_of_two,
    "sliced": sliced,
    "padded": padded,
    "expanded_batch": lambda t: t[:1].expand_as(t),
    "expanded_heads": lambda t: t[:, :1].expand_as(t),
    **{name: spread(name) for name in FAR},
}


def ties(t: Tensors) -> None:
    """Small whole numbers: many scores are equal, the largest too."""
    t["q"], t["k"] = (t[name].round().clamp(-1, 1) for name in "qk")


def equal_keys(t: Tensors) -> None:
    t["k"] = t["k"][:, :, :1].expand_as(t["k"]).clone()


def overflow(t: Tensors) -> None:
    """q k^T exceeds what float16 holds; the case's scale brings it back."""
    t["q"], t["k"] = 120 * t["q"], 120 * t["k"]


def peaked(t: Tensors) -> None:
    """One key takes nearly everything."""
    t["q"] = 20 * t["q"]


def tiny(t: Tensors) -> None:
    """Values that are subnormal in float16."""
    t["v"] = 1e-6 * t["v"]


def bias_4d(t: Tensors) -> Tensor:
    """The bias [B or 1, Hq or 1, Nq or 1, Nk or 1]."""
    return t["bias"][(None,) * (4 - t["bias"].dim())]


def bias_infinite(t: Tensors) -> None:
    """-inf here and there, and in whole rows."""
    bias_4d(t)[..., 1::3] = -torch.inf
    bias_4d(t)[:, :, ::2] = -torch.inf


def bias_lowest(t: Tensors) -> None:
    """Float16's most negative number, as many libraries write a mask, in a part of the rows."""
    bias_4d(t)[..., 1::2, 2:] = torch.finfo(torch.float16).min


def bias_lowest_rows(t: Tensors) -> None:
    """The same in whole rows, where nothing of log(sum) is left in a float32 lse."""
    bias_4d(t)[..., 1::2, :] = torch.finfo(torch.float16).min


def bias_minus_1e9(t: Tensors) -> None:
    """float32's way of writing a mask (-inf in float16), in whole rows; added to the lowest it is
    float32's lowest number."""
    bias_4d(t)[..., ::2, :] = -1e9
    bias_4d(t)[..., 1::4, :] = torch.finfo(torch.float32).min


def bias_lowest_keys(t: Tensors) -> None:
    """float32's lowest number before the first keys that count, over more than a tile."""
    bias_4d(t)[..., :100] = torch.finfo(torch.float32).min


def bias_by_key(t: Tensors) -> None:
    """The same numbers with the last dimension not contiguous."""
    t["bias"] = bias_4d(t).mT.contiguous().mT


def put(name: str, value: float) -> Callable[[Tensors], None]:
    """One number of one row of one tensor."""

    def change(t: Tensors) -> None:
        at = bias_4d(t) if name == "bias" else t[name]
        if at.numel():
            at[0, 0, 1 % at.shape[2], 2 % at.shape[3]] = value

    return change


VALUES: dict[str, Callable[[Tensors], None]] = {"normal": lambda t: None} | {
    f.__name__: f
    for f in (
        ties, equal_keys, overflow, peaked, tiny, bias_infinite, bias_lowest, bias_lowest_rows,
        bias_lowest_keys, bias_minus_1e9, bias_by_key,
    )
}  # fmt: skip
VALUES |= {f"nan_{name}": put(name, torch.nan) for name in ("q", "k", "v", "bias")}
VALUES |= {f"infinite_{name}": put(name, torch.inf) for name in ("q", "k", "v")}
