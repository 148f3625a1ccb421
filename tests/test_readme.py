"""The README's tables name what there is; its code is run by test_docs.py."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import flowdppo_ops

README = Path(__file__).parents[1] / "README.md"


def test_every_argument_is_in_the_table():
    rows = "\n".join(line for line in README.read_text().splitlines() if line.startswith("| `"))
    for function in (flowdppo_ops.loss, flowdppo_ops.step_loss):
        for name in inspect.signature(function).parameters:
            assert f"`{name}`" in rows, f"{name} is missing from the README's tables"


def test_named_files_exist():
    root = README.parent
    for cell in re.findall(r"^\| (`.*?`) \|", README.read_text().split("## Where things are")[1], re.MULTILINE):
        folder = ""
        for path in re.findall(r"`(.*?)`", cell):
            folder = path.rpartition("/")[0] or folder
            assert (root / folder / path.rpartition("/")[2]).exists(), path
