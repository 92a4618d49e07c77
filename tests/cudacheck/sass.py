"""Machine code as nvdisasm prints it: the loops of each kernel, and what the hottest one is made of."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_SECTION = re.compile(r"\.text\.(\w+):")
_LABEL = re.compile(r"(\.L\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L\w+)\)")
MULTIPLIES = ("FFMA", "DFMA", "HMMA", "FFMA2")
# Memory instructions whose width matters: in global memory, in shared memory, from one to the other.
MOVES = ("LDG", "STG", "LDS", "STS", "LDGSTS", "LDSM")


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers, such as LDG.E.128
    target: str  # the label a branch goes to, or empty

    @property
    def kind(self) -> str:
        """The opcode without modifiers, but for the width of what it moves: FFMA, LDS.128, LDG (4 bytes)."""
        name, *modifiers = self.opcode.split(".")
        width = next((m for m in ("128", "64", "U16", "U8", "S16", "S8") if m in modifiers), "") if name in MOVES else ""
        return f"{name}.{width}" if width else name


@dataclass(frozen=True)
class Loop:
    """From the instruction that a branch goes back to up to that branch. `depth`: 1 for a loop in no other.

    `mix` counts its own instructions; those of a loop inside it are that one's.
    """

    first: int
    last: int
    depth: int
    mix: Counter[str]

    @property
    def size(self) -> int:
        return self.mix.total()

    @property
    def multiplications(self) -> int:
        return sum(self.mix[kind] for kind in MULTIPLIES)


def functions(listing: str) -> dict[str, tuple[list[Instruction], dict[str, int]]]:
    """The instructions of each kernel by symbol, and the index of the instruction that follows each label."""
    found: dict[str, tuple[list[Instruction], dict[str, int]]] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if section := _SECTION.match(line):
            instructions, labels = found.setdefault(section[1], ([], {}))
        elif label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            predicate, opcode, operands = instruction.groups()
            target = _TARGET.search(operands)
            # ptxas puts loads that are never executed around asynchronous copies: padding, like a NOP.
            instructions.append(Instruction("NOP" if predicate == "@!PT" else opcode, target[1] if target else ""))
    return found


def loops(instructions: list[Instruction], labels: dict[str, int]) -> list[Loop]:
    """All loops, outer ones first."""
    ends: dict[int, int] = {}  # branches back to one place make one loop
    for i, instruction in enumerate(instructions):
        first = labels.get(instruction.target, i)
        if first < i:
            ends[first] = i
    spans = sorted(ends.items(), key=lambda span: (span[0], -span[1]))
    found = []
    for first, last in spans:
        inside = [(a, b) for a, b in spans if first <= a and b <= last and (a, b) != (first, last)]
        own = [i for i in range(first, last + 1) if not any(a <= i <= b for a, b in inside)]
        depth = sum(a <= first and last <= b for a, b in spans)
        mix = Counter(instructions[i].kind for i in own)
        found.append(Loop(first, last, depth, mix))
    return found


def hottest(found: list[Loop]) -> Loop | None:
    """The loop where a kernel spends its time, by a static guess; None without a loop.

    It is the one with most multiplications, else with most instructions; a level of nesting counts ten times.
    """
    return max(found, key=lambda loop: (loop.multiplications * 10**loop.depth, loop.size * 10**loop.depth), default=None)


def describe(loop: Loop | None) -> str:
    """Such as "581: 512 FFMA, 32 LDS.128, 2 LDG.128, 1 BAR, 34 other"; empty without a loop."""
    if loop is None:
        return ""
    named = [k for k in loop.mix if k in MULTIPLIES or k.split(".")[0] in (*MOVES, "BAR", "MUFU", "SHFL", "NOP")]
    parts = [f"{loop.mix[k]} {k}" for k in sorted(named, key=lambda k: (-loop.mix[k], k))]
    if rest := loop.size - sum(loop.mix[k] for k in named):
        parts.append(f"{rest} other")
    return f"{loop.size}: {', '.join(parts)}"
