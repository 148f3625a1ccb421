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
    loads_in_flight: int  # most 16-byte global loads of one loop before arithmetic needs the first
    wide_stores: int  # most 16-byte global stores of one loop


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


def _memory(body: str) -> Memory:
    labels, operations = {}, []
    for line in body.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(operations)
        elif operation := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([^;]+)", line):
            operations.append(operation[1])
    local = sum(op.startswith(("LDL", "STL")) for op in operations)
    in_flight = stores = 0
    for start, end in _innermost_loops(labels, operations):
        loop = operations[start:end]
        stores = max(stores, sum(op.startswith("STG") and ".128" in op for op in loop))
        in_flight = max(in_flight, _loads_in_flight(loop))
    return Memory(local, in_flight, stores)


def _innermost_loops(labels: dict[str, int], operations: list[str]) -> list[tuple[int, int]]:
    """First operation, and one past the branch back to it, where there is no other such pair inside."""
    loops = []
    for at, operation in enumerate(operations):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", operation)
        if target and labels[target[1]] < at:
            loops.append((labels[target[1]], at + 1))
    return [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]


def _loads_in_flight(loop: list[str]) -> int:
    """Most 16-byte loads between two floating-point operations."""
    longest = current = 0
    for operation in loop:
        if operation.startswith("LDG") and ".128" in operation:
            current += 1
            longest = max(longest, current)
        elif re.match(r"(FADD|FFMA|FMUL|HADD|HFMA)", operation):
            current = 0
    return longest


if __name__ == "__main__":
    print(f"{'image':27}{'kernel':42}{'registers':>10}{'stack':>7}{'local':>7}{'loads':>7}{'stores':>8}{'code':>9}")
    for image_name, content in cubins().items():
        instructions = memory(content) if disassembler() else {}
        for kernel, r in sorted(resources(content).items()):
            m = instructions.get(kernel, ("",) * 3)
            print(f"{image_name:27}{kernel:42}{r.registers:10}{r.stack:7}{m[0]:7}{m[1]:7}{m[2]:8}{r.code:9}")
