"""The README's code runs as printed, and prints what it says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import flowdppo_ops

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_first_call_prints_what_is_shown():
    blocks = BLOCK.findall(README.read_text())
    ran = 0
    for (language, code), (after, shown) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(README), "exec"), {})
        assert after == "text", "a python block is followed by its output"
        assert printed.getvalue() == shown
        ran += 1
    assert ran == 1


def test_every_argument_is_in_the_table():
    import inspect

    rows = "\n".join(line for line in README.read_text().splitlines() if line.startswith("| `"))
    for name in inspect.signature(flowdppo_ops.loss).parameters:
        assert f"`{name}`" in rows or name == "process_group", f"{name} is missing from the README's table"


def test_named_files_exist():
    root = README.parent
    for cell in re.findall(r"^\| (`.*?`) \|", README.read_text().split("## Where things are")[1], re.MULTILINE):
        folder = ""
        for path in re.findall(r"`(.*?)`", cell):
            folder = path.rpartition("/")[0] or folder
            assert (root / folder / path.rpartition("/")[2]).exists(), path
