"""Machine code as loops and counts: disassembly, flow graph, the main loop, instructions by unit.

The main loop of a kernel is the one whose exclusive blocks, those in no loop inside it, do the most
tensor-core work, or the most arithmetic where the kernel has no tensor-core instruction. Its
instructions fall into these parts:

- `always`: the shortest way, in instructions, from the loop's head back to it. Code that a forward
  branch can jump over is not on it.
- `one_warp`: blocks off that way that issue tcgen05 products. One warp of a block runs them, in
  every iteration.
- `sometimes`: the other blocks off that way, such as the mask of a tile that an interval cuts. Of
  two arms that exclude each other it holds the longer one. Blocks of a loop inside, which on
  sm_100 only repeat a wait, are left out.
- `cut`: where two loops do the same tensor-core work, of which the shorter one is the main loop (of
  tiles that no interval cuts), the shortest way through the other one.

A predicated instruction counts, as it takes an issue slot whether its predicate holds or not.
"""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

TENSOR = "HMMA IMMA DMMA QMMA OMMA HGMMA QGMMA IGMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA"
UNITS = {
    "tensor": TENSOR,
    "exp": "MUFU",
    "float": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 HFMA2 HADD2 HMUL2",
    "integer": "IMAD IADD IADD3 VIADD LEA LOP3 SHF SHL SHR BMSK SGXT IABS ISETP IMNMX VIMNMX"
    " VIMNMX3 VIADDMNMX PLOP3 POPC FLO BREV P2R R2P I2FP",
    "select": "SEL FSEL FSETP FSET FMNMX FMNMX3 FCHK HSETP2 HMNMX2",
    "convert": "F2FP F2F F2I I2F PRMT I2I FRND F2IP I2IP",
    "move": "MOV MOV32I CS2R S2R S2UR R2UR LDC ULDC LDCU UMOV",
    "uniform": "UIADD3 UIMAD ULEA ULOP3 USHF USEL UISETP USGXT UPLOP3 UPRMT UIMNMX UVIMNMX UFLO"
    " UPOPC UFMUL UFADD UFFMA UFSEL UFSETP UF2FP UIABS UI2F VOTEU UP2UR UR2UP UBMSK UBREV UVIADD",
    "shuffle": "SHFL REDUX CREDUX VOTE MATCH",
    "shared": "LDS LDSM STS STSM ATOMS LDTM STTM UTCCP",
    "global": "LDG STG LDGSTS LD ST ATOM ATOMG RED UBLKCP UTMALDG UTMASTG UTMAREDG REDG CCTL",
    "local": "LDL STL",
    "barrier": "BAR SYNCS DEPBAR LDGDEPBAR WARPSYNC WARPGROUP FENCE MEMBAR ERRBAR UTCBAR"
    " UTMACMDFLUSH ARRIVES NANOSLEEP UTCATOMSWS ELECT ACQBULK ENDCOLLECTIVE",
    "branch": "BRA BRX JMP CALL RET EXIT BSSY BSYNC BREAK BPT KILL YIELD",
}
UNIT_OF = {opcode: unit for unit, opcodes in UNITS.items() for opcode in opcodes.split()}
# The shapes of one warp's products; each of the four warps of a warpgroup issues the group's.
MMA_SHAPE = re.compile(r"^[HQI]MMA\.(16)(8)(\d+)\b")
GMMA_SHAPE = re.compile(r"^[HQI]GMMA\.(\d+)x(\d+)x(\d+)\b")
SASS_LABEL = re.compile(r"^(\.L\w+):")
SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;&?]*)")
SASS_TARGET = re.compile(r"(.*?)`\((\.L\w+)\)")
PTX_LABEL = re.compile(r"^\s*(\$?\w+):")
PTX_LINE = re.compile(r"^\s*(@!?[%$]\w+\s+)?([a-z][\w.:]*)\s*([^;]*);")


@dataclass(frozen=True)
class Instruction:
    """An instruction, the label that it may branch to, and whether the next one may follow it."""

    opcode: str  # with its modifiers
    predicate: str = ""
    target: str | None = None
    falls: bool = True

    @property
    def root(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def unit(self) -> str:
        if self.predicate == "@!PT":  # padding that never executes
            return "other"
        if self.opcode.startswith("IMAD.MOV"):
            return "move"
        return UNIT_OF.get(self.root, "other")

    @property
    def macs(self) -> int:
        """The multiply-adds of one warp, 0 where the opcode does not contain the shape."""
        for shape, warps in ((MMA_SHAPE, 1), (GMMA_SHAPE, 4)):
            if match := shape.match(self.opcode):
                m, n, k = map(int, match.groups())
                return m * n * k // warps
        return 0


@dataclass(frozen=True)
class Code:
    """The flow graph of a program: straight-line blocks, and the blocks that may follow each."""

    blocks: tuple[tuple[Instruction, ...], ...]
    successors: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Loop:
    head: int
    latches: frozenset[int]
    body: frozenset[int]
    exclusive: frozenset[int]  # the body without those of loops inside


@dataclass(frozen=True)
class MainLoop:
    """The instructions of one iteration in parts, which the module describes."""

    always: tuple[Instruction, ...]
    one_warp: tuple[Instruction, ...]
    sometimes: tuple[Instruction, ...]
    cut: tuple[Instruction, ...] = ()


def disassemble(cubin: bytes) -> str:
    """The text that Triton's nvdisasm prints of a kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse_sass(text: str) -> Code:
    """The flow graph of a disassembly; a call of a subroutine is one instruction."""

    def instruction(predicate: str, opcode: str, operands: str) -> Instruction:
        predicate = "" if predicate == "@PT" else predicate
        root, target, falls = opcode.partition(".")[0], None, True
        if root in ("BRA", "JMP", "CALL") and (to := SASS_TARGET.match(operands)):
            target = to[2]
            # `BRA P3, label` and `BRA.U UP0, label` are conditional as well
            falls = bool(predicate or to[1].strip())
        elif root in ("EXIT", "RET", "KILL", "BRX", "JMX"):
            falls = bool(predicate)
        return Instruction(opcode, predicate, target, falls)

    return parse(text, SASS_LABEL, SASS_LINE, instruction)


def parse_ptx(text: str) -> Code:
    """The flow graph of a kernel's PTX."""

    def instruction(predicate: str, opcode: str, operands: str) -> Instruction:
        target = operands.strip() if opcode.partition(".")[0] == "bra" else None
        falls = bool(predicate) or opcode not in ("ret", "exit", "trap") and target is None
        return Instruction(opcode, predicate, target, falls)

    return parse(text, PTX_LABEL, PTX_LINE, instruction)


def parse(
    text: str, a_label: re.Pattern, a_line: re.Pattern, instruction: Callable[..., Instruction]
) -> Code:
    """The flow graph of lines that are labels, or predicate, opcode and operands."""
    program: list[str | Instruction] = []
    for line in text.splitlines():
        if label := a_label.match(line):
            program.append(label[1])
        elif match := a_line.match(line):
            program.append(instruction((match[1] or "").strip(), match[2], match[3]))
    return graph(program)


def graph(program: list[str | Instruction]) -> Code:
    """The flow graph of labels and instructions in program order."""
    blocks: list[list[Instruction]] = [[]]
    block_of = {}
    for item in program:
        if isinstance(item, str):
            if blocks[-1]:
                blocks.append([])
            block_of[item] = len(blocks) - 1
        else:
            blocks[-1].append(item)
            if item.target is not None or not item.falls:
                blocks.append([])
    successors = []
    for n, block in enumerate(blocks):
        last = block[-1] if block else Instruction("")
        after = [n + 1] if last.falls and n + 1 < len(blocks) else []
        if last.target in block_of:
            after.append(block_of[last.target])
        successors.append(tuple(dict.fromkeys(after)))
    return Code(tuple(map(tuple, blocks)), tuple(successors))


def dominators(code: Code) -> dict[int, set[int]]:
    """For each reachable block the blocks that every way from the entry to it passes."""
    order, seen, stack = [], set(), [0]
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            order.append(n)
            stack.extend(code.successors[n])
    before = {n: [m for m in order if n in code.successors[m]] for n in order}
    dominated_by = {n: set(order) for n in order} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for n in order[1:]:
            new = {n} | set.intersection(*(dominated_by[m] for m in before[n]))
            changed |= new != dominated_by[n]
            dominated_by[n] = new
    return dominated_by


def loops(code: Code) -> list[Loop]:
    """The natural loops: the blocks that reach a branch back to a block that dominates it."""
    dominated_by = dominators(code)
    latches: dict[int, set[int]] = {}
    for n in dominated_by:
        for head in code.successors[n]:
            if head in dominated_by[n]:
                latches.setdefault(head, set()).add(n)
    before: dict[int, list[int]] = {n: [] for n in dominated_by}
    for n in dominated_by:
        for m in code.successors[n]:
            before[m].append(n)
    bodies = {}
    for head, tails in latches.items():
        body, stack = {head}, list(tails)
        while stack:
            n = stack.pop()
            if n not in body:
                body.add(n)
                stack.extend(before[n])
        bodies[head] = body
    natural = []
    for head, body in bodies.items():
        inner = [b for h, b in bodies.items() if h != head and h in body]
        exclusive = frozenset(body.difference(*inner))
        natural.append(Loop(head, frozenset(latches[head]), frozenset(body), exclusive))
    return natural


def shortest_way(code: Code, loop: Loop) -> set[int]:
    """The blocks from the head of `loop` to a branch back to it with the fewest instructions."""
    best, came_from = {loop.head: len(code.blocks[loop.head])}, {}
    queue = [(best[loop.head], loop.head)]
    while queue:
        length, n = heapq.heappop(queue)
        if n in loop.latches:
            way = {n}
            while n != loop.head:
                n = came_from[n]
                way.add(n)
            return way
        for m in code.successors[n]:
            if m in loop.body and m != loop.head:
                further = length + len(code.blocks[m])
                if further < best.get(m, further + 1):
                    best[m], came_from[m] = further, n
                    heapq.heappush(queue, (further, m))
    raise AssertionError("a loop without a way back to its head")


def heaviest_loops(code: Code, weight: Callable[[Instruction], int]) -> list[Loop]:
    """The loops whose exclusive blocks weigh the most, smallest first; none if all weigh 0."""
    weights = {
        loop: sum(weight(i) for n in loop.exclusive for i in code.blocks[n]) for loop in loops(code)
    }
    most = max(weights.values(), default=0)
    heaviest = [loop for loop, total in weights.items() if total == most > 0]
    return sorted(heaviest, key=lambda loop: len(loop.body))


def one_iteration(code: Code, loop: Loop) -> MainLoop:
    """The instructions that one iteration of `loop` executes."""
    way = shortest_way(code, loop)
    always, one_warp, sometimes = [], [], []
    for n in sorted(loop.body):
        if n in way:
            always.extend(code.blocks[n])
        elif any(i.root.startswith("UTC") for i in code.blocks[n]):
            one_warp.extend(code.blocks[n])
        elif n in loop.exclusive:
            sometimes.extend(code.blocks[n])
    return MainLoop(tuple(always), tuple(one_warp), tuple(sometimes))


def main_loop(code: Code) -> MainLoop | None:
    """One iteration of the main loop, None for a kernel without one."""
    heaviest = heaviest_loops(code, lambda i: i.unit == "tensor")
    if not heaviest:
        heaviest = heaviest_loops(code, lambda i: i.unit in ("float", "exp"))[:1]
    if not heaviest:
        return None
    iterations = (one_iteration(code, loop) for loop in heaviest)
    whole, *others = sorted(iterations, key=lambda loop: len(loop.always))
    return replace(whole, cut=others[-1].always) if others else whole


def tensor_loops(code: Code) -> list[MainLoop]:
    """One iteration of every loop whose exclusive blocks use tensor cores, the shortest first."""
    iterations = [
        one_iteration(code, loop)
        for loop in loops(code)
        if any(i.unit == "tensor" for n in loop.exclusive for i in code.blocks[n])
    ]
    return sorted(iterations, key=lambda loop: len(loop.always))


def count_units(instructions: tuple[Instruction, ...]) -> dict[str, int]:
    """The number of instructions per unit, in the order of UNITS, then "other", without zeros."""
    counts = Counter(i.unit for i in instructions)
    return {unit: counts[unit] for unit in [*UNITS, "other"] if counts[unit]}
