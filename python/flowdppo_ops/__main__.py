"""`python -m flowdppo_ops COMMAND`. A command is a module whose `add_command(subparsers)` adds a parser. The parser's
default `run(args)` does the work and returns the exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__, _doctor, demo

COMMANDS = (demo, _doctor)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flowdppo_ops", description="Fused policy losses for flow-matching RL."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        command.add_command(commands)
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
