"""What the embedded kernel images say about themselves, without a GPU. `python tests/images.py` prints a table.

Resources are read from the ELF sections of the cubins; memory instructions from their disassembly by nvdisasm
(PyPI: nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

from flowdppo_ops import _native


class Resources(NamedTuple):
    registers: int
    stack: int  # bytes a thread: arrays that are indexed at run time, and spilled registers
    parameters: int  # bytes
    code: int  # bytes


class Memory(NamedTuple):
    """Instructions of a kernel."""

    local: int  # loads and stores of a stack
    loads_in_flight: int  # most 16-byte global loads that an iteration of a loop issues before it uses one of them
    late_loads: int  # most that it issues afterwards: a second trip to memory
    wide_stores: int  # most 16-byte global stores of one loop
    strong_stores: int  # ordered for readers on other multiprocessors, where there are none
    longest_loop: int  # instructions of the longest innermost loop over vectors
    loads_first: bool  # whether the first 16-byte load stands before the first barrier of the block


def cubins() -> dict[str, bytes]:
    return {f"{unit} sm_{cc}": image for unit, cc, is_ptx, image in _native.cuda_images() if not is_ptx}


# ---- ELF -------------------------------------------------------------------------------------------------------------

# Attributes of .nv.info sections, as cuobjdump --dump-elf names them.
_EIATTR_FRAME_SIZE, _EIATTR_CBANK_PARAM_SIZE, _EIATTR_REGCOUNT = 0x11, 0x19, 0x2F


def resources(image: bytes) -> dict[str, Resources]:
    """Per kernel."""
    sections = dict(_sections(image))
    symbols = _symbols(sections[".symtab"], sections[".strtab"])
    registers, stack = {}, {}
    for attribute, value in _attributes(sections[".nv.info"]):
        if attribute in (_EIATTR_REGCOUNT, _EIATTR_FRAME_SIZE):
            symbol, number = struct.unpack("<II", value)
            (registers if attribute == _EIATTR_REGCOUNT else stack)[symbols[symbol]] = number
    out = {}
    for section, content in sections.items():
        if section.startswith(".text."):
            name = section.removeprefix(".text.")
            own = dict(_attributes(sections[f".nv.info.{name}"]))
            (parameters,) = struct.unpack("<H", own[_EIATTR_CBANK_PARAM_SIZE])
            out[name] = Resources(registers[name], stack[name], parameters, len(content))
    return out


def _sections(image: bytes) -> Iterator[tuple[str, bytes]]:
    assert image[:5] == b"\x7fELF\x02", "not a 64-bit ELF file"
    (table,) = struct.unpack_from("<Q", image, 40)
    size, count, names = struct.unpack_from("<HHH", image, 58)
    headers = [struct.unpack_from("<IIQQQQ", image, table + at * size) for at in range(count)]
    texts = headers[names][4]
    for name, kind, _, _, offset, length in headers:
        start = texts + name
        nobits = kind == 8
        yield image[start : image.index(b"\0", start)].decode(), b"" if nobits else image[offset : offset + length]


def _symbols(table: bytes, texts: bytes) -> list[str]:
    starts = [struct.unpack_from("<I", table, at)[0] for at in range(0, len(table), 24)]
    return [texts[start : texts.index(b"\0", start)].decode() for start in starts]


def _attributes(info: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(info):
        form, attribute, value = struct.unpack_from("<BBH", info, at)
        length = value if form == 4 else 0  # else the value itself is all there is
        yield attribute, info[at + 4 : at + 4 + length] if length else info[at + 2 : at + 4]
        at += 4 + length


# ---- disassembly -----------------------------------------------------------------------------------------------------


def disassembler() -> Path | None:
    try:
        files = distribution("nvidia-cuda-nvdisasm").files or []
    except PackageNotFoundError:
        return None
    return next((Path(file.locate()) for file in files if file.name == "nvdisasm"), None)


def memory(image: bytes) -> dict[str, Memory]:
    """Per kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        command = [disassembler(), "--print-code", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    kernels = re.split(r"^\.text\.(\w+):$", text, flags=re.MULTILINE)[1:]
    return {name: _memory(body) for name, body in zip(kernels[::2], kernels[1::2], strict=True)}


class Operation(NamedTuple):
    predicate: str
    name: str
    arguments: str
    targets: tuple[int, ...]  # of a branch

    @property
    def is_wide_load(self) -> bool:
        return self.name.startswith("LDG") and ".128" in self.name

    @property
    def is_wide_store(self) -> bool:
        return self.name.startswith("ST") and ".128" in self.name and not self.name.startswith("STL")

    def registers(self) -> tuple[set[int], set[int]]:
        """Those that it writes, and those that it reads."""
        has_no_result = self.name.startswith(("ST", "BRA", "BRX", "ISETP", "FSETP", "DSETP"))
        first, _, rest = self.arguments.partition(",")
        written = set() if has_no_result else _named(first)
        if self.is_wide_load:
            written = {register + at for register in written for at in range(4)}
        elif re.search(r"WIDE|\.64|^D[A-Z]", self.name):
            written = {register + at for register in written for at in range(2)}
        return written, _named(self.arguments if has_no_result else rest)


def _named(arguments: str) -> set[int]:
    found = re.findall(r"\bR(\d+)((?:\.\w+)*)", arguments)
    return {int(number) + at for number, suffix in found for at in range(2 if ".64" in suffix else 1)}


def _memory(body: str) -> Memory:
    operations = _operations(body)
    local = sum(operation.name.startswith(("LDL", "STL")) for operation in operations)
    strong = sum(operation.name.startswith("ST") and ".STRONG" in operation.name for operation in operations)
    in_flight = late = stores = longest = 0
    for start, end in _innermost_loops(operations):
        loop = operations[start:end]
        stores = max(stores, sum(operation.is_wide_store for operation in loop))
        if any(operation.is_wide_load for operation in loop):
            loads, late_loads = _loads(operations, start, end)
            in_flight, late, longest = max(in_flight, loads), max(late, late_loads), max(longest, end - start)
    kinds = ["load" if operation.is_wide_load else operation.name[:3] for operation in operations]
    loads_first = "BAR" not in kinds or kinds.index("load") < kinds.index("BAR")
    return Memory(local, in_flight, late, stores, strong, longest, loads_first)


def _operations(body: str) -> list[Operation]:
    labels, lines = {}, []
    for line in body.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif operation := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+)?\s*(\S+)\s*([^;]*)(.*)", line):
            lines.append(operation.groups(""))
    operations = []
    for predicate, name, arguments, comment in lines:
        # A jump through a table names its targets in a comment.
        named = re.findall(r"\.L_x_\d+", arguments + comment) if name.startswith(("BRA", "BRX")) else []
        operations.append(Operation(predicate, name, arguments, tuple(labels[label] for label in named)))
    return operations


def _innermost_loops(operations: list[Operation]) -> list[tuple[int, int]]:
    """First operation, and one past the branch back to it, where there is no other such pair inside."""
    loops = [(to, at + 1) for at, operation in enumerate(operations) for to in operation.targets if to <= at]
    return [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]


def _loads(operations: list[Operation], start: int, end: int) -> tuple[int, int]:
    """Wide loads of an iteration: most that are issued before one of them is used, and those that may come after.

    Along every path through the loop, from its first operation on, the branch back not taken.
    """
    # At an operation: registers that a load of this iteration fills, whether one was read, and how many loads there
    # were until then.
    states: dict[int, tuple[frozenset[int], bool, int]] = {start: (frozenset(), False, 0)}
    most, late, waiting = 0, set(), [start]
    while waiting:
        at = waiting.pop()
        loaded, used, count = states[at]
        operation = operations[at]
        written, read = operation.registers()
        used = used or bool(read & loaded)
        if operation.is_wide_load:
            loaded |= written
            count += not used
            late |= {at} if used else set()
        elif not operation.predicate:
            loaded -= written
        most = max(most, count)
        jumps = bool(operation.targets) and not operation.predicate and not re.search(r"\bU?P\d", operation.arguments)
        followers = operation.targets if jumps and ".DIV" not in operation.name else (*operation.targets, at + 1)
        for follower in followers:
            if not max(at, start) < follower < end:
                continue
            before = states.get(follower, (frozenset(), False, 0))
            after = (before[0] | loaded, before[1] or used, max(before[2], count))
            if follower not in states or after != before:
                states[follower] = after
                waiting.append(follower)
    return most, len(late)


if __name__ == "__main__":
    titles = ("registers", "stack", "code", "local", "loads", "late", "stores", "strong", "loop", "first")
    print(f"{'image':20}{'kernel':42}" + "".join(f"{title:>10}" for title in titles))
    for image_name, content in cubins().items():
        instructions = memory(content) if disassembler() else {}
        for kernel, r in sorted(resources(content).items()):
            numbers = (r.registers, r.stack, r.code, *instructions.get(kernel, ()))
            print(f"{image_name:20}{kernel:42}" + "".join(f"{number:10}" for number in numbers))
