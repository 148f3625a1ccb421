"""`python -m flowdppo_ops demo`: fine-tune a small image generator with each of the three objectives.

A flow-matching model learns scikit-learn's 8x8 digits, then online RL pushes the odd digits towards mirror symmetry, a
reward that pays for losing the digit once it is pushed too far. Flow-DPPO, Flow-GRPO and GRPO-Guard start from the same
model with the same seeds. Flow-DPPO runs once more with the symmetric mask, and with no mask at all.

    data.py     the digits; which are fine-tuned and which held out
    model.py    velocity model, flow-matching pretraining
    rollout.py  stochastic sampling, what is kept of it, KL to another model
    train.py    the RL loop: the file to read
    score.py    reward, and the scores that the reward does not see
    compare.py  objectives and their settings, the whole run, seconds in the loss
    report.py   table and plots
    frontier.py `--frontier`: objectives x widths of the trust region x epochs per rollout x seeds
    frontier_report.py  its statistics, tables and figures

Importing this package needs none of the demo's dependencies: the command line does, and says what is missing.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

EXTRAS = ("torch", "sklearn", "matplotlib", "tqdm")
NOT_OF_FRONTIER = ("seeds", "iterations", "epochs", "device", "loss", "fused", "threads")


def add_command(commands: argparse._SubParsersAction) -> None:
    summary = "Fine-tune a small digit generator with Flow-DPPO, Flow-GRPO and GRPO-Guard"
    parser = commands.add_parser(
        "demo",
        help=summary,
        description=f"{summary}. Writes a table, curves and plots. A minute or two on a CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    seeds = "how many seeds, or which ones: 3 is 0,1,2; '7,' is 7"
    parser.add_argument("--seeds", type=_seeds, default="3", metavar="N", help=seeds)
    parser.add_argument("--iterations", type=_whole, default=8, metavar="N", help="rollouts per fine-tuning")
    parser.add_argument("--epochs", type=_whole, default=16, metavar="N", help="passes over each rollout")
    parser.add_argument("--pretrain-steps", type=_whole, default=2000, metavar="N", help="flow-matching updates")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    parser.add_argument("--loss", choices=("fused", "reference"), default="fused", help="which loss trains")
    starts = "it starts at the model's output, or at the step's mean"
    parser.add_argument("--fused", choices=("step", "loss"), default="step", help=starts)
    # One thread: on two cores that others were using as well, two threads took 4 to 9 times as long.
    parser.add_argument("--threads", type=_whole, default=1, metavar="N", help="CPU threads")
    parser.add_argument("--out", default="demo-out", metavar="DIR", help="folder for the results")
    frontier = parser.add_argument_group("a grid of fine-tunings instead: an hour on two cores; goes on where it ended")
    what = "reward over KL for every objective, width of the trust region, epochs per rollout and seed"
    frontier.add_argument("--frontier", action="store_true", help=what)
    frontier.add_argument("--quick", action="store_true", help="a smaller grid: minutes")
    frontier.add_argument("--workers", type=_whole, metavar="N", help="fine-tunings at a time, one thread each")
    parser.set_defaults(run=lambda args: _run(parser, args))


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    missing = [name for name in EXTRAS if find_spec(name) is None]
    if missing:
        print(f"demo: {', '.join(missing)} not installed: pip install 'flowdppo-ops[demo]'", file=sys.stderr)
        return 2
    import torch

    if args.frontier:
        from .frontier import run
    else:
        from .compare import run

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda is not available here")
    alone = [f"--{name}" for name in ("quick", "workers") if getattr(args, name) and not args.frontier]
    defaults = parser.parse_args([])
    alone += [f"--{name}" for name in NOT_OF_FRONTIER if args.frontier and vars(args)[name] != vars(defaults)[name]]
    if alone:
        parser.error(f"argument {alone[0]}: {'not with' if args.frontier else 'only with'} --frontier")
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        run(args)
    finally:
        torch.set_num_threads(threads)
    return 0


LARGEST = 2**31 - 1  # of a whole number: PyTorch's generators and thread counts hold it


def _whole(text: str, least: int = 1, most: int = LARGEST) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{text!r}, wanted a whole number of at least {least} and at most {most}")
    return number


def _seeds(text: str) -> list[int]:
    if "," not in text:
        return list(range(_whole(text, most=1000)))
    try:
        seeds = [_whole(part, least=0) for part in text.split(",") if part.strip()]
    except argparse.ArgumentTypeError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(
            f"{text!r}, wanted a count, or different whole numbers with commas between, at most {LARGEST}"
        )
    return seeds
