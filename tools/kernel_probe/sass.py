"""Machine code of NVIDIA GPUs: instructions, registers and the loops of the control-flow graph."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_.x]*)"
    r"\s*([^;]*);?.*?/\* 0x([0-9a-f]{16}) \*/"
)
CONTROL_WORD = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
JUMPS = ("BRA", "BRX", "BRXU", "EXIT", "RET", "CALL", "JMP")


@dataclass
class Instruction:
    """opcode: full dotted name; stall: cycles the compiler makes the warp wait; wait: mask of scoreboards awaited."""

    address: int
    opcode: str
    arguments: str
    predicate: str
    stall: int = 0
    wait: int = 0

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]


def cuobjdump(cubin: bytes, option: str) -> str:
    """Output of the disassembler that ships inside the Triton wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def parse(listing: str) -> list[Instruction]:
    """Instructions of a `cuobjdump -sass` listing, with the control bits of the line below each."""
    found: list[Instruction] = []
    for line in listing.splitlines():
        if match := LINE.match(line):
            found.append(Instruction(int(match[1], 16), match[3], match[4].strip(), (match[2] or "").strip()))
        elif found and (match := CONTROL_WORD.match(line)):
            word = int(match[1], 16)
            found[-1].stall = (word >> 41) & 0xF
            found[-1].wait = (word >> 52) & 0x3F
    return found


def resources(text: str) -> dict[str, int]:
    """Registers a thread, stack and local bytes, static shared bytes of a `cuobjdump -res-usage` listing."""

    def figure(key: str) -> int:
        match = re.search(rf"\b{key}:(\d+)", text)
        return int(match[1]) if match else 0

    return {
        "registers": figure("REG"),
        "local": figure("LOCAL") + figure("STACK"),
        "static_shared": figure("SHARED"),
    }


def find_loops(code: list[Instruction]) -> list[list[int]]:
    """Natural loops as lists of instruction indices.

    Address intervals would not do: Hopper code keeps barrier spin-waits and other cold blocks out of line, and their
    jump back looks like an enormous loop. So: basic blocks, dominators, back edges.
    """
    starts, ends, successors = _blocks(code)
    predecessors, order, root = _order(successors)
    dominator = _dominators(predecessors, order, root)
    loops: dict[int, set[int]] = {}
    rank = set(order)
    for block in order[1:]:
        for target in successors[block]:
            if _dominates(dominator, root, target, block):
                body, work = {target}, [block]
                while work:
                    member = work.pop()
                    if member not in body:
                        body.add(member)
                        work += [p for p in predecessors[member] if p in rank]
                loops.setdefault(target, set()).update(body)
    return [sorted(i for b in body for i in range(starts[b], ends[b] + 1)) for body in loops.values()]


def _blocks(code: list[Instruction]) -> tuple[list[int], list[int], list[list[int]]]:
    """First and last instruction of each basic block, and the blocks that may follow it."""
    index = {instruction.address: k for k, instruction in enumerate(code)}
    jumps: dict[int, tuple[int | None, bool]] = {}
    leaders = {0}
    for k, instruction in enumerate(code):
        if instruction.base not in JUMPS:
            continue
        match = re.search(r"0x([0-9a-f]+)", instruction.arguments) if instruction.base == "BRA" else None
        target = index.get(int(match[1], 16)) if match else None
        conditional = (
            bool(instruction.predicate)
            or instruction.opcode.startswith(("BRA.DIV", "CALL"))
            or bool(re.match(r"!?U?P[T0-9]", instruction.arguments))
        )
        jumps[k] = (target, conditional)
        leaders.update(leader for leader in (target, k + 1) if leader is not None and leader < len(code))
    starts = sorted(leaders)
    block_of = {start: n for n, start in enumerate(starts)}
    ends = [start - 1 for start in starts[1:]] + [len(code) - 1]
    successors = []
    for n, end in enumerate(ends):
        target, falls_through = jumps.get(end, (None, True))
        following = [block_of[target]] if target is not None else []
        if falls_through and n + 1 < len(starts):
            following.append(n + 1)
        successors.append(following)
    return starts, ends, successors


def _order(successors: list[list[int]]) -> tuple[list[list[int]], list[int], int]:
    """Predecessors, blocks in reverse post-order, and a virtual root that also leads to code entered only by
    indirect branches (warp-specialised partitions, call targets). Extends `successors` by the root."""
    root = len(successors)
    successors.append([0])
    predecessors: list[list[int]] = [[] for _ in successors]
    for block, following in enumerate(successors):
        for target in following:
            predecessors[target].append(block)
    post: list[int] = []
    seen = {root}

    def visit(first: int) -> None:
        stack = [(first, iter(successors[first]))]
        while stack:
            block, rest = stack[-1]
            target = next((t for t in rest if t not in seen), None)
            if target is None:
                post.append(block)
                stack.pop()
            else:
                seen.add(target)
                stack.append((target, iter(successors[target])))

    visit(root)
    post.pop()
    for block in range(root):
        if block not in seen:
            seen.add(block)
            successors[root].append(block)
            predecessors[block].append(root)
            visit(block)
    return predecessors, [root, *reversed(post)], root


def _dominators(predecessors: list[list[int]], order: list[int], root: int) -> dict[int, int]:
    """Immediate dominators (Cooper, Harvey & Kennedy 2001)."""
    rank = {block: position for position, block in enumerate(order)}
    dominator = {root: root}

    def meet(a: int, b: int) -> int:
        while a != b:
            while rank[a] > rank[b]:
                a = dominator[a]
            while rank[b] > rank[a]:
                b = dominator[b]
        return a

    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [p for p in predecessors[block] if p in dominator]
            new = known[0]
            for other in known[1:]:
                new = meet(new, other)
            if dominator.get(block) != new:
                dominator[block] = new
                changed = True
    return dominator


def _dominates(dominator: dict[int, int], root: int, above: int, block: int) -> bool:
    while block != above and block != root:
        block = dominator[block]
    return block == above
