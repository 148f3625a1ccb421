"""Prints the table of docs/trainers.md: where a trainer does not do what the maths says. `--write` puts it there."""

from __future__ import annotations

import argparse
from pathlib import Path

from flowdppo_ops.integrations import DEFECTS

PAGE = Path(__file__).with_name("trainers.md")
BEGIN, END = "<!-- made by trainers_table.py -->\n", "<!-- end -->\n"


def table() -> str:
    lines = ["| trainer | behaviour | effect | `strict=True` | `strict=False` |", "|---|---|---|---|---|"]
    for defect in DEFECTS:
        cells = (defect.trainer, defect.behaviour, defect.effect, defect.strict, defect.fixed)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put it into trainers.md")
    args = parser.parse_args()
    text = table()
    print(text, end="")
    if args.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(before + BEGIN + text + END + after)


if __name__ == "__main__":
    main()
