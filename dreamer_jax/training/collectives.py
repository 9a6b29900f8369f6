"""What a compiled step sends between devices: read from the program that XLA will run.

XLA's own cost analysis counts a loop's body once. Here every collective is counted as often as it runs: a scan's trip
count stands in the condition of its loop. A loop without a constant there (further rounds of the expert exchange, which
balanced routing does not need) counts as never entered.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
_KINDS = ("ragged-all-to-all", "all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(_KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) ?\(.*\{$")


class Collective(NamedTuple):
    """One instruction of the program."""

    kind: str
    devices: int
    """Size of the groups that exchange."""
    runs: int
    """How often it runs in a step."""
    in_loop: bool
    """Whether it stands in a loop: over microbatches or depths."""
    size: int
    """Bytes of its result on one device."""

    @property
    def sent(self) -> float:
        """Bytes that one device sends in a step, by the usual ring algorithms."""
        share = (self.devices - 1) / self.devices
        # The result of a reduce-scatter is one part of what is sent; an all-reduce is one, and then an all-gather.
        whole = {"reduce-scatter": self.size * self.devices, "all-reduce": 2 * self.size}.get(self.kind, self.size)
        return float(self.runs * whole * (1 if self.kind == "collective-permute" else share))


def collectives(program: str) -> list[Collective]:
    """All collectives of an optimised HLO text, largest first; those that no step runs are left out."""
    computations = dict(_computations(program))
    found: dict[Any, Collective] = {}

    def visit(name: str, runs: int, in_loop: bool, in_fusion: bool) -> None:
        for line in computations.get(name, ()):
            if loop := _LOOP.search(line):
                visit(loop[2], runs * _trips(line, loop[1], computations), True, in_fusion)
            for called in _called(line):
                visit(called, runs, in_loop, True)
            if match := _COLLECTIVE.search(line):
                size = _result_bytes(match[1], bool(match[3]))
                # Fusions hold the pieces of a collective that overlaps with other work; each repeats it whole.
                key = (match[1], match[2], re.findall(r'op_name="[^"]*"', line)[:1]) if in_fusion else line
                found[str(key)] = Collective(match[2], _group_size(line), runs, in_loop, size)

    visit(next(name for name in computations if name.startswith("ENTRY ")), 1, False, False)
    return sorted((c for c in found.values() if c.runs and c.devices > 1), key=lambda c: -c.sent)


def _computations(program: str) -> Iterator[tuple[str, list[str]]]:
    """(name, lines) of each computation; the entry's name begins with "ENTRY "."""
    name: str = ""
    lines: list[str] = []
    for line in program.splitlines():
        if header := _HEADER.match(line):
            name, lines = (header[1] or "") + header[2], []
        elif line.strip() == "}" and name:  # kernels bring lines of their own that begin with a brace
            yield name, lines
            name = ""
        elif name:
            lines.append(line)


def _called(line: str) -> list[str]:
    branches = _BRANCHES.search(line)
    return _CALLED.findall(line) + (re.findall(r"%?([\w.\-]+)", branches[1]) if branches else [])


def _trips(loop: str, condition: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs: as its line says, or the constant that its counter is compared with; 0 without either."""
    if known := re.search(r"known_trip_count\W+n\W+(\d+)", loop):
        return int(known[1])
    lines = computations[condition]
    lines = lines + [inner for line in lines for called in _called(line) for inner in computations.get(called, ())]
    constants = [int(n) for line in lines for n in re.findall(r"= s(?:32|64)\[\]\S* constant\((\d+)\)", line)]
    return max(constants, default=0)


def _group_size(line: str) -> int:
    if explicit := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(explicit[1].split(","))
    if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(counted[2])
    return 2  # a permutation names pairs


def _result_bytes(shape: str, started: bool) -> int:
    sizes = [
        math.prod(int(n) for n in dimensions.split(",") if n) * _BYTES.get(kind, 4)
        for kind, dimensions in _ARRAY.findall(shape)
    ]
    # The result of a "-start" begins with its operands.
    return sizes[-1] if started else sum(sizes)
