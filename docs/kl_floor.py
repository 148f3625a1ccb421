"""The KL that storing the old policy causes by itself: the table of residual.md.

    python docs/kl_floor.py            # prints it
    python docs/kl_floor.py --write    # puts it into residual.md

Through the package's own functions: a step is drawn, the old policy is stored in each form and dtype, and `step_loss`
compares it with the very policy that drew the step. Whatever KL it reports is the storage's. Means and model outputs
have unit variance; the step is Flow-SDE at sigma 0.5 and noise level 1, as long as the standard deviation wants it.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import flowdppo_ops

PAGE = Path(__file__).with_name("residual.md")
BEGIN, END = "<!-- kl_floor.py: begin -->\n", "<!-- kl_floor.py: end -->\n"
STDS = (0.5, 0.2, 0.1, 0.05)
FORMS = {
    "mean": "old_prev_sample_mean",
    "model output": "old_model_output",
    "residual": "old_residual",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS, NUMEL = 64, 1 << 16
# What float32 arithmetic leaves, about 1e-14; nothing that anybody compares with 1e-5.
NOTHING = 1e-12


class Floor(NamedTuple):
    kl: float  # nats per latent element
    error: float  # its standard error


def floors(std: float, numel: int = NUMEL, seed: int = 0) -> dict[tuple[str, str], Floor]:
    """By form and dtype."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(ROWS, numel, generator=generator)

    # std = sqrt(-dt) and b = 1.5 dt at sigma 0.5 and noise level 1; a follows from unit variance of the mean below.
    schedule = {"sigma": 0.5, "sigma_next": 0.5 - std**2, "noise_level": 1.0}
    mean, model_output = normal(), normal()
    dt = -(std**2)
    sample = (mean - 1.5 * dt * model_output) / (1 + dt)
    step = flowdppo_ops.sde_step(model_output, sample, noise=normal(), **schedule)

    found = {}
    for dtype_name, dtype in DTYPES.items():
        stored = {
            "mean": step.prev_sample_mean.to(dtype),
            "model output": model_output.to(dtype),
            "residual": flowdppo_ops.encode_residual(step.prev_sample, step.prev_sample_mean, step.std, dtype),
        }
        for form, old in stored.items():
            result = flowdppo_ops.step_loss(
                model_output, sample, step.prev_sample, torch.ones(ROWS), **schedule, **{FORMS[form]: old}
            )
            kl = result.kl.double()
            found[form, dtype_name] = Floor(kl.mean().item(), kl.std().item() / math.sqrt(ROWS))
    return found


def shown(kl: float) -> str:
    mantissa, exponent = f"{kl:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}" if kl >= NOTHING else "below 1e-12"


def table() -> str:
    by_std = {std: floors(std) for std in STDS}
    lines = ["| stored as | bytes | " + " | ".join(f"std {std}" for std in STDS) + " |"]
    lines.append("|---|--:|" + "--:|" * len(STDS))
    for form in FORMS:
        for dtype_name, dtype in DTYPES.items():
            cells = [shown(by_std[std][form, dtype_name].kl) for std in STDS]
            lines.append(f"| {form}, {dtype_name} | {dtype.itemsize} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put it into residual.md")
    args = parser.parse_args()
    text = table()
    print(text, end="")
    if args.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(before + BEGIN + text + END + after)


if __name__ == "__main__":
    main()
