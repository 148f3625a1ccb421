"""Times a training step of a denoising transformer, to say how much of it the loss chain is: eager, compiled, fused.

    python benches/bench_training_step.py [--sizes small] [--providers eager fused] [--threads 2] [--json FILE]
    python benches/bench_training_step.py --device cuda --json FILE

One micro-batch: forward of an SD3 transformer with random weights in bfloat16 (diffusers' class), the chain from its
output to the loss, backward to the parameters. The chains are the providers of `bench_policy_loss.py`'s `step_loss`,
and `fixed`: none, the backward starts from a gradient that is there already. Each chain's loss and gradient are
compared with float64 before anything is timed. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from bench_policy_loss import OPERATIONS, StepInputs, make_step_inputs
from counting import Counts, count
from devices import Cpu, Cuda, Mode
from harness import Call, Clock, Effort, Row, measure, percentiles, write_json
from runner import (
    CHECKED_CALLS,
    UNSEEN,
    Outputs,
    add_machine_options,
    check_outputs,
    not_quiet,
    noted,
    overwrite,
    poison,
    set_up,
)
from torch import Tensor

CHAINS = OPERATIONS["step_loss"]  # what follows the model: Flow-SDE
FIXED = "fixed"
USUAL = ("eager", "compile", "fused", "fused_residual")
DTYPE = "bf16+fp32"  # the model's weights and output, and the rest
PASS = "forward+backward"


class Model(NamedTuple):
    """An SD3 transformer, and the micro-batch it is trained on."""

    latents: tuple[int, ...]  # rows, channels, height, width; patches are 2 x 2
    layers: int
    heads: int
    head_width: int
    prompt: tuple[int, int]  # tokens and their width, from the text encoders
    pooled: int  # width of the prompts' other embedding
    dual: int  # how many of the first layers have SD3.5's second attention

    def config(self) -> dict[str, Any]:
        """Of diffusers' `SD3Transformer2DModel`."""
        return {
            "sample_size": self.latents[2],
            "in_channels": self.latents[1],
            "out_channels": self.latents[1],
            "num_layers": self.layers,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_width,
            "caption_projection_dim": self.heads * self.head_width,
            "joint_attention_dim": self.prompt[1],
            "pooled_projection_dim": self.pooled,
            "dual_attention_layers": tuple(range(self.dual)),
            "qk_norm": "rms_norm",
        }


MODELS = {
    "small": Model((8, 16, 32, 32), 2, 4, 32, (77, 256), 128, 1),  # what two CPU threads step in a tenth of a second
    "medium": Model((16, 16, 64, 64), 24, 24, 64, (333, 4096), 2048, 13),  # SD3.5-medium, 512 px
}

# operation -> the parameters that get a gradient, by their names. Trainers with LoRA adapt the attention alone: the
# backward forms fewer gradients, and the chain's share grows.
TRAINED = {"training_step": "", "training_step_attention": ".attn"}


# ---- the step --------------------------------------------------------------------------------------------------------


def sd3_transformer() -> type[torch.nn.Module]:
    try:
        from diffusers import SD3Transformer2DModel
    except (ImportError, RuntimeError) as error:  # its lazy imports fail with a RuntimeError
        sys.exit(f"bench_training_step: needs diffusers, pip install '.[bench]': {error}")
    return SD3Transformer2DModel


class Chain(NamedTuple):
    name: str
    call: Callable[[StepInputs], Outputs]
    cotangents: Sequence[Tensor | None]
    own_graphs: bool = False  # their memory is allocated once and kept: nothing tells a call's


class MicroBatch:
    """A transformer, its prompts, and what its trainer holds; `inputs.model_output` is what came out the first time."""

    def __init__(self, kind: type[torch.nn.Module], model: Model, trained: str, device: torch.device):
        torch.manual_seed(0)
        with device:
            self.transformer = kind(**model.config()).to(device).bfloat16()
            rows = model.latents[0]
            self._prompt = torch.randn(rows, *model.prompt, dtype=torch.bfloat16)
            self._pooled = torch.randn(rows, model.pooled, dtype=torch.bfloat16)
        for name, parameter in self.transformer.named_parameters():
            parameter.requires_grad_(trained in name)
        with torch.no_grad():
            self.inputs: StepInputs = make_step_inputs("flow_sde", model.latents, DTYPE, device, self._velocity)

    def _velocity(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.transformer(
            hidden_states=sample.bfloat16(),
            encoder_hidden_states=self._prompt,
            pooled_projections=self._pooled,
            timestep=timestep,
            return_dict=False,
        )[0]

    def run(
        self,
        chain: Chain,
        forwarded: Callable[[Tensor], None] = lambda _: None,
        returned: Callable[[Tensor], None] = lambda _: None,
    ) -> Outputs:
        """A step; `forwarded` is called with the model's output, `returned` with the gradient that comes back to it."""
        self.forget()
        output = self._velocity(self.inputs.sample, self.inputs.timestep)
        output.register_hook(returned)
        forwarded(output.detach())
        outputs = chain.call(self.inputs._replace(model_output=output))
        torch.autograd.backward(outputs, chain.cotangents)
        return outputs

    def forget(self) -> None:
        self.transformer.zero_grad()


def make_chains(names: Sequence[str], i: StepInputs) -> list[Chain]:
    """`fixed` first; its gradient is the right one, so that the model's backward sees the same numbers."""
    gradient = CHAINS.expected(i, FIXED)[-1].to(i.model_output.dtype)
    fixed = Chain(FIXED, lambda i: (i.model_output,), [gradient])
    made = CHAINS.make_providers(names)
    return [fixed, *(Chain(one.name, one.call, CHAINS.cotangents(i), one.in_graph is not None) for one in made)]


def check(batch: MicroBatch, chain: Chain) -> None:
    """The chain's loss, and the gradient that the model gets, are those of float64 for the output that it gave."""
    seen: list[Tensor] = []

    def forwarded(output: Tensor) -> None:
        seen.append(output)
        poison(output)

    for _ in range(CHECKED_CALLS):
        seen.clear()
        outputs = batch.run(chain, forwarded, seen.append)
        output, gradient = seen
        expected = CHAINS.expected(batch.inputs._replace(model_output=output.requires_grad_()), chain.name)
        check_outputs(CHAINS, chain.name, (*outputs, gradient), expected)
        overwrite((*outputs, gradient))


# ---- times and counts ------------------------------------------------------------------------------------------------


def chain_marks(batch: MicroBatch, chain: Chain, machine: Cpu | Cuda) -> list:
    """A step; when the model's output was there, and when the gradient came back to it."""
    marks: list = []
    batch.run(chain, *[lambda _: marks.append(machine.mark())] * 2)
    return marks


def chain_clock(machine: Cpu | Cuda) -> Clock:
    """Microseconds of the chain inside each step; its calls are `chain_marks`."""

    def clock(call: Call, repeats: int) -> list[float]:
        marks = [call() for _ in range(repeats)]
        machine.synchronize()
        return [machine.elapsed_us(*pair) for pair in marks]

    return clock


def counts(chain: Chain, call: Call, forget: Call, latent_elements: int, machine: Cpu | Cuda) -> dict[str, int | None]:
    """The counts of a row."""
    seen = Counts() if chain.name in UNSEEN else count(call, latent_elements)
    costs = machine.costs(call, forget)
    return (costs._replace(peak_bytes=None) if chain.own_graphs else costs)._asdict() | seen._asdict()


def bench(
    op: str,
    kind: type[torch.nn.Module],
    model: Model,
    effort: Effort,
    facts: dict[str, str],
    machine: Cpu | Cuda,
    names: Sequence[str],
    failures: list[str],
) -> list[Row]:
    """A row per timing and provider: "call", on a GPU "host" too, of the whole step; "chain" of that part inside it.

    A chain whose answer is wrong, or that cannot be run, is not timed; `failures` says which, and why.
    """
    batch = MicroBatch(kind, model, TRAINED[op], machine.device)
    i, elements = batch.inputs, math.prod(model.latents)
    fixed, *others = make_chains(names, i)
    whole = {FIXED: counts(fixed, partial(batch.run, fixed), batch.forget, elements, machine)}
    alone: dict[str, dict[str, int | None]] = {FIXED: {}}
    chains = [fixed]
    for chain in others:
        with noted(failures, chain.name):
            check(batch, chain)
            whole[chain.name] = counts(chain, partial(batch.run, chain), batch.forget, elements, machine)
            call = partial(CHAINS.run, PASS, chain.call, i)
            alone[chain.name] = counts(chain, call, partial(CHAINS.forget, i), elements, machine)
            chains.append(chain)
        CHAINS.forget(i)

    steps = {chain.name: [partial(batch.run, chain)] for chain in chains}
    inside = {chain.name: partial(chain_marks, batch, chain, machine) for chain in chains}
    timings = ("call",) if machine.name == "cpu" else ("call", "host")
    timed = {timing: machine.measure(Mode(timing, "warm", 1), steps, effort) for timing in timings}
    timed["chain"] = measure(inside, effort, chain_clock(machine))

    parameters = sum(one.numel() for one in batch.transformer.parameters())
    model_facts = f"layers={model.layers} heads={model.heads}x{model.head_width} parameters={parameters}"
    return [
        Row(
            op=op,
            shape=model.latents,
            dtype=DTYPE,
            provider=name,
            pass_=PASS,
            **percentiles(us),
            repeats=len(us),
            bytes=i.model_output.nbytes if name == FIXED else CHAINS.bytes_moved(i, name, PASS),
            threads=torch.get_num_threads(),
            cores_elsewhere=one.cores_elsewhere,
            timing=timing,
            **(alone if timing == "chain" else whole)[name],
            **facts | {"environment": f"{facts['environment']} {model_facts}".lstrip()},
        )
        for timing, one in timed.items()
        for name, us in one.samples.items()
    ]


# ---- the share -------------------------------------------------------------------------------------------------------


class Share(NamedTuple):
    """Of one provider, from medians, in microseconds and parts of its own step."""

    beyond_us: float  # the step less the step of `fixed`
    spread_us: float  # p80 less p20 of these two steps, the larger: less than this says nothing
    beyond: float
    chain_us: float  # from the model's output to its gradient, inside the step, less the same of `fixed`
    chain: float


def shares(rows: Sequence[Row]) -> dict[str, Share]:
    """Of one operation and size: by provider, without `fixed`."""
    by = {(row.timing, row.provider): row for row in rows}
    fixed, nothing = by["call", FIXED], by["chain", FIXED]
    found = {}
    for name in dict.fromkeys(row.provider for row in rows if row.provider != FIXED):
        step = by["call", name]
        beyond, chain = step.p50_us - fixed.p50_us, by["chain", name].p50_us - nothing.p50_us
        spread = max(one.p80_us - one.p20_us for one in (step, fixed))
        found[name] = Share(beyond, spread, beyond / step.p50_us, chain, chain / step.p50_us)
    return found


def report(rows: Sequence[Row]) -> str:
    """One operation and size as a table; after a sign, what a provider has beyond `fixed`."""
    by = {(row.timing, row.provider): row for row in rows}
    found, first = shares(rows), rows[0]
    lines = [
        "",
        f"{first.op} {list(first.shape)} {first.dtype}  {first.environment}",
        f"  {'provider':<16}{'p20 ms':>10}{'p50 ms':>10}{'p80 ms':>10}{'host ms':>10}{'beyond ms':>11}{'share':>8}"
        f"{'chain ms':>10}{'share':>8}{'ops':>7}{'syncs':>7}{'launches':>10}{'waits':>7}{'peak MB':>9}",
    ]
    for name in (FIXED, *found):
        step, share = by["call", name], found.get(name)
        times = [step.p20_us, step.p50_us, step.p80_us, by["host", name].p50_us if ("host", name) in by else None]
        cells = "".join(" " * 10 if us is None else f"{us / 1e3:10.3f}" for us in times)
        if share:
            cells += f"{share.beyond_us / 1e3:+11.3f}{share.beyond:8.2%}{share.chain_us / 1e3:+10.3f}{share.chain:8.2%}"
        else:
            cells += f"{'':19}{by['chain', name].p50_us / 1e3:10.3f}{'':8}"
        lines.append(f"  {name:<16}{cells}{counted(step, by['call', FIXED] if share else None)}".rstrip())
    unsure = [name for name, share in found.items() if abs(share.beyond_us) < share.spread_us]
    if unsure:
        lines.append(
            f"  less beyond fixed than a step's own spread: {', '.join(unsure)}; the chain's time is its share"
        )
    return "\n".join(lines + not_quiet(list(rows)))


def counted(step: Row, fixed: Row | None) -> str:
    """Operators, waits, launches and memory of a step, or what it has beyond `fixed`; empty where nothing was seen."""

    def cell(of: Callable[[Row], int | None], width: int, unit: float = 1) -> str:
        number, less = of(step), of(fixed) if fixed else 0
        if number is None or less is None:
            return " " * width
        return f"{(number - less) / unit:{'+' if fixed else ''}{width}.0f}"

    def waits(row: Row) -> int | None:
        return max((n for n in (row.sync_warnings, row.stream_syncs) if n is not None), default=None)

    columns = ((lambda row: row.ops, 7), (lambda row: row.host_syncs, 7), (lambda row: row.launches, 10), (waits, 7))
    return "".join(cell(*column) for column in columns) + cell(lambda row: row.peak_bytes, 9, 1e6)


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(prog="bench_training_step", description=__doc__.splitlines()[0])
    add_machine_options(parser)
    parser.add_argument("--ops", nargs="+", choices=TRAINED, default=list(TRAINED), help="default: both")
    parser.add_argument("--sizes", nargs="+", choices=MODELS, help="default: small on cpu, medium on cuda")
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=CHAINS.providers,
        default=list(USUAL),
        help=f"beside {FIXED}; default: {' '.join(USUAL)}",
    )
    args = parser.parse_args(argv)
    machine, facts = set_up(parser, args, args.providers)
    kind = sd3_transformer()
    rows: list[Row] = []
    failures: list[str] = []
    sizes = args.sizes or ["small" if args.device == "cpu" else "medium"]
    for op, size in itertools.product(args.ops, sizes):
        # No blocks: a step outlasts one, and a call is a step however short the chain in it. Three calls a round.
        effort = Effort(machine.quick.rounds if args.quick else machine.full.rounds // 2, block_us=0, settle_us=0)
        of_case: list[str] = []
        with noted(of_case, "all"), machine.session():
            new = bench(op, kind, MODELS[size], effort, facts, machine, args.providers, of_case)
            print(report(new), flush=True)
            rows += new
            if args.json:
                write_json(rows, args.json)  # after each: a run that is cut short leaves what it has
        failures += [f"{op} {size}: {failure}" for failure in of_case]
    if failures:
        sys.exit("\n".join(f"{parser.prog}: {failure}" for failure in failures))
    return rows


if __name__ == "__main__":
    main()
