"""The capacity and the rates of a multiprocessor: occupancy, and a bound from instruction counts.

Limits of residency are those of the CUDA C++ programming guide, table "Technical specifications per
compute capability"; registers are allocated to a warp in units of 256, and a block takes 1 KiB of
shared memory beyond what it asks for.

The bound says which fraction of the tensor cores' dense peak the main loop cannot exceed. Per
iteration of one block, in cycles of a multiprocessor, each unit on its own and all overlapped:

- issue: four schedulers, one warp instruction per cycle each;
- tensor: the multiply-adds that the instructions do over the architecture's rate;
- exp, fma, imad, alu: 32 lanes per warp instruction over the results per cycle of the guide's table
  "Throughput of native arithmetic instructions" (exponentials and other MUFU; float32 add,
  multiply, fma, and integer multiply-add, which shares their pipe; the latter alone, which has half
  of that pipe where it is 128 wide; compare, select, logic, shift, convert). A packed instruction
  (FFMA2 and its like) does two results per lane. 12.0 does integers in its float32 pipe; 128 per
  cycle for all of alu is the most it can be, not a published figure, as is 64 for F2FP conversions;
- shared: 128 bytes per cycle, without bank conflicts and without what asynchronous copies write
  and wgmma and tcgen05 read.

bound = (multiply-adds that the tile needs, in cycles) / (the busiest unit's cycles). Latency,
waiting, memory and work outside the loop are not in it, so a kernel reaches less. It compares
kernels and names the unit to relieve; it predicts no time.

Dense multiply-adds per cycle and multiprocessor, 16-bit inputs with float32 sums, are what the
vendor's peak, boost clock and multiprocessor count give: A100 312 TFLOP/s, 108 at 1.41 GHz: 1024.
L40S 362, 142 at 2.52: 512. H100 SXM 989, 132 at 1.83: 2048. B200 2250, 148 at 1.85: 4096. RTX PRO
6000 504, 188 at 2.6: 512. (GeForce parts of 8.9 and 12.0 have half.) TF32 has half of the 16-bit
rate. mma.sync runs below the peak where there are warpgroup products: 62.9 % on Hopper
(arXiv 2402.13499); for 10.0, without a published figure, the A100's rate is assumed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .sass import Instruction, MainLoop


@dataclass(frozen=True)
class Multiprocessor:
    warps: int
    blocks: int
    shared: int  # bytes
    tensor: int  # multiply-adds per cycle, 16-bit inputs
    tensor_sync: int  # the same of mma.sync
    fma: int  # float32 results per cycle
    registers: int = 65536
    exp: int = 16
    imad: int = 64
    alu: int = 64
    tensor_memory: int = 512  # columns, where there is one


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 << 10, 1024, 1024, 64),
    89: Multiprocessor(48, 24, 100 << 10, 512, 512, 128),
    90: Multiprocessor(64, 32, 228 << 10, 2048, 1288, 128),
    100: Multiprocessor(64, 32, 228 << 10, 4096, 1024, 128),
    120: Multiprocessor(48, 24, 100 << 10, 512, 512, 128, alu=128),
}
SCHEDULERS = 4
SHARED_BYTES = 128  # per cycle
MATRICES = re.compile(r"\.(?:x)?([24])\b")


def blocks_per_multiprocessor(
    arch: int, num_warps: int, registers: int, shared: int, tensor_memory: int = 0
) -> int:
    """The number of blocks that are resident at once."""
    has = MULTIPROCESSORS[arch]
    per_warp = -(-registers * 32 // 256) * 256
    # warps are spread over the schedulers, each of which has a quarter of the registers
    warps = has.registers // SCHEDULERS // per_warp * SCHEDULERS
    limits = [has.blocks, has.warps // num_warps, warps // num_warps]
    limits.append(has.shared // (shared + 1024))
    if tensor_memory:
        limits.append(has.tensor_memory // tensor_memory)
    return min(limits)


def shared_bytes(instruction: Instruction) -> int:
    """The bytes that a warp's instruction moves from or to shared memory; 0 for others."""
    if instruction.predicate == "@!PT" or instruction.root not in ("LDS", "LDSM", "STS", "STSM"):
        return 0
    if instruction.root in ("LDSM", "STSM"):  # 8x8 matrices of 16-bit elements
        count = MATRICES.search(instruction.opcode)
        return 128 * int(count[1]) if count else 128
    for bits in (128, 64):
        if f".{bits}" in instruction.opcode:
            return 32 * bits // 8
    return 128


def pipe(instruction: Instruction) -> str | None:
    """The arithmetic pipe of an instruction: "exp", "fma", "alu" or None."""
    if instruction.unit == "exp" or instruction.root in ("I2F", "F2I", "F2F"):
        return "exp"
    if instruction.unit == "float" or instruction.root == "IMAD":
        return "fma"
    return "alu" if instruction.unit in ("integer", "select", "convert") else None


def tensor_cycles(arch: int, instructions: list[Instruction], needed: int, tf32: bool) -> float:
    """The cycles of the tensor-core `instructions` of a block that needs `needed` multiply-adds.

    The opcode of a tcgen05 product does not contain its shape, so such products count as all
    multiply-adds that the others leave.
    """
    has, half = MULTIPROCESSORS[arch], 2 if tf32 else 1
    sync = sum(i.macs for i in instructions if i.root in ("HMMA", "QMMA"))
    group = sum(i.macs for i in instructions if i.root in ("HGMMA", "QGMMA"))
    if any(i.root.startswith("UTC") and i.unit == "tensor" for i in instructions):
        group += max(needed - sync, 0)
    return half * (sync / has.tensor_sync + group / has.tensor)


def cycles(arch: int, loop: MainLoop, num_warps: int, needed: int, tf32: bool) -> dict[str, float]:
    """The cycles of each unit for one iteration of a block that needs `needed` multiply-adds."""
    has = MULTIPROCESSORS[arch]
    rates = {"exp": has.exp, "fma": has.fma, "imad": has.imad, "alu": has.alu}
    by_unit = dict.fromkeys(("issue", "tensor", *rates, "shared"), 0.0)
    products: list[Instruction] = []
    for part, warps in ((loop.always, num_warps), (loop.one_warp, 1)):
        by_unit["issue"] += len(part) * warps / SCHEDULERS
        products += [i for i in part if i.unit == "tensor"] * warps
        for i in part:
            if unit := pipe(i):
                results = 2 if i.root.endswith("2") and i.root[0] == "F" and unit == "fma" else 1
                by_unit[unit] += 32 * warps * results / rates[unit]
            if i.root == "IMAD":
                by_unit["imad"] += 32 * warps / rates["imad"]
            by_unit["shared"] += shared_bytes(i) * warps / SHARED_BYTES
    by_unit["tensor"] = tensor_cycles(arch, products, needed, tf32)
    return by_unit


def bound(arch: int, by_unit: dict[str, float], needed: int, tf32: bool) -> tuple[float, str]:
    """(the fraction of the tensor cores' peak that cannot be exceeded, the unit that sets it)."""
    limiter = max(by_unit, key=by_unit.__getitem__)
    useful = needed * (2 if tf32 else 1) / MULTIPROCESSORS[arch].tensor
    return min(1.0, useful / by_unit[limiter]), limiter
