"""Times variants of the kernels (variants.py) beside each other, the package and a copy, on a GPU, in one process.

    python benches/tune.py [--only reversed dependent] [--cases loss_f32] [--sizes video] [--json FILE]
    python benches/tune.py --compile-only     # what the compiler says of each variant; needs no GPU

Each variant is compiled, gives the default's bits (or, where it adds in another order, its numbers) and float64's, and
is then timed in CUDA graphs as in the other benches. See "Tuning" in README.md.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from devices import Cuda
from harness import Effort, Row, WrongAnswer, percentiles, write_json
from runner import SIZES, Operation, Provider, bytes_of, check, measured, noted
from torch import Tensor
from variants import CASES, DEFAULT, LEFT_OUT, VARIANTS, Case, Variant, called, compile_all, table

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # what a launch takes, and what an image says about itself
import images
from emulator.call import EmulatedLoss, EmulatedStepLoss, Launch
from emulator.call_sde_step import EmulatedSdeStep

SAME_NUMBERS = 1e-6  # of the largest value, plus one rounding to the dtype of the result
MACHINE = Cuda


# ---- launching -------------------------------------------------------------------------------------------------------


class Module:
    """A variant's image on the current device: what `emulator.call.Server` is to the emulated kernels."""

    def __init__(self, image: bytes, variant: Variant, device: torch.device, multiprocessors: int):
        from cuda.bindings import driver

        self.driver, self.variant, self.device, self.multiprocessors = driver, variant, device, multiprocessors
        self.context = called(driver.cuCtxGetCurrent())
        self.module = called(driver.cuModuleLoadData(image))
        self.functions: dict[str, Any] = {}

    def launch(self, kernel: str, argument: ctypes.Structure, blocks: int) -> None:
        driver = self.driver
        called(driver.cuCtxSetCurrent(self.context))  # the thread of a backward may have none yet
        if kernel not in self.functions:
            self.functions[kernel] = called(driver.cuModuleGetFunction(self.module, kernel.encode()))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self.variant.threads, 1, 1
        config.hStream = driver.CUstream(stream_of(self.device))
        if self.variant.setting("DEPENDENT_LAUNCH") and "backward" in kernel:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        called(driver.cuLaunchKernelEx(config, self.functions[kernel], ctypes.addressof(parameters), 0))


def stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


TICKETS: dict[tuple[torch.device, int], Tensor] = {}  # 0 before and after every launch; variants take turns


class DeviceLaunch(Launch):
    """A launch on tensors where they are."""

    server: Module

    def point(self, at: int, tensor: Tensor, offset: int = 0) -> None:
        assert tensor.is_contiguous()
        assert offset == 0
        ctypes.c_size_t.from_buffer(self.argument, at).value = tensor.data_ptr()

    def output(self, name: str, dtype: torch.dtype, count: int, fill: int | Tensor = 0) -> None:
        device = self.server.device
        if name == "tickets":
            if (device, count) not in TICKETS:
                TICKETS[device, count] = torch.zeros(count, dtype=dtype, device=device)
            tensor = TICKETS[device, count]
        else:
            tensor = torch.empty(count, dtype=dtype, device=device)
        self.point(self.at(name), tensor)
        self.outputs[name] = tensor

    def run(self, kernel: str, blocks: int, seed: int, shared: int = -1) -> dict[str, Tensor]:
        self.server.launch(kernel, self.argument, blocks)
        return self.outputs


class OnDevice:
    """With the variant's grid."""

    new_launch = DeviceLaunch

    def plan(self, rows: int, numel: int) -> tuple[int, int]:
        return self.server.variant.grid(rows, numel, self.server.multiprocessors)


class Loss(OnDevice, EmulatedLoss):
    pass


class StepLoss(OnDevice, EmulatedStepLoss):
    def __call__(self, model_output: Tensor, sample: Tensor, prev_sample: Tensor, advantages: Tensor, **options: Any):
        latents = {"model_output": model_output, "sample": sample, "prev_sample": prev_sample}
        return super().__call__(**latents, advantages=advantages, **options)


class Step(OnDevice, EmulatedSdeStep):
    def __call__(self, model_output: Tensor, sample: Tensor, **options: Any):
        return super().__call__(model_output=model_output, sample=sample, row_dims=1, **options)


FUNCTIONS = {"policy_loss": Loss, "step_loss": StepLoss, "sde_step_sample": Step}


def provider(case: Case, operation: Operation, variant: Variant, module: Module) -> Provider:
    """The package's own call, `operation.providers[case.peer]`, with the function of the package replaced."""
    call = operation.providers[case.peer]()
    return Provider(variant.name, partial(call.func, FUNCTIONS[case.operation](module), *call.args[1:]))


# ---- timing ----------------------------------------------------------------------------------------------------------


def tune(
    name: str,
    shape: tuple[int, ...],
    variants: Sequence[Variant],
    module: Callable[[str, Variant], Module],
    machine: Cuda,
    effort: Effort,
    facts: dict[str, str],
    failures: list[str],
) -> list[Row]:
    """One case and shape: a row per mode, pass and provider, which are the variants, the package, and the copy.

    `variants`: the default first, without which nothing is timed. Of another that cannot be launched, or gives a wrong
    answer, `failures` says so.
    """
    case = CASES[name]
    one = torch.ones((), device=machine.device)  # given, so that nothing is launched between forward and backward
    operation: Operation = importlib.import_module(case.bench).OPERATIONS[case.operation]
    operation = dataclasses.replace(operation, name=f"tune {name}", cotangents=lambda _: [one])
    i = operation.make_inputs(shape, case.dtype, machine.device)
    package = Provider(case.peer, operation.providers[case.peer]())
    expected, wanted = operation.expected(i, case.peer), []
    check(operation, package, i, expected)
    peers = [package]
    for variant in variants:
        with noted(failures, variant.name):
            peer = provider(case, operation, variant, module(case.unit, variant))
            check(operation, peer, i, expected)
            got = results(operation, peer, i)
            wanted = wanted or got
            compare(variant, operation, wanted, got)
            peers.append(peer)
            continue
        if variant is DEFAULT:
            return []
        for tickets in TICKETS.values():  # it may have left some
            tickets.zero_()

    rows = []
    right = dict.fromkeys((peer.name for peer in peers), expected)
    for mode in machine.modes(getattr(i, operation.copied).nbytes):
        if mode.timing != "graph":
            continue
        timed = measured(operation, machine, mode, peers, {}, i, right, effort, failures)
        rows += [
            Row(
                op=operation.name,
                shape=shape,
                dtype=case.dtype,
                provider=peer,
                pass_=pass_,
                **percentiles(us),
                repeats=len(us),
                bytes=bytes_of(operation, i, "copy" if peer == "copy" else case.peer, pass_),
                threads=torch.get_num_threads(),
                cores_elsewhere=timed.cores_elsewhere,
                timing=mode.timing,
                cache=mode.cache,
                **facts,
            )
            for (peer, pass_), us in timed.samples.items()
        ]
    return rows


def results(operation: Operation, peer: Provider, i: Any) -> list[Tensor]:
    operation.forget(i)
    return [output.detach().clone() for output in operation.run(operation.passes[-1], peer.call, i)]


def compare(variant: Variant, operation: Operation, wanted: list[Tensor], got: list[Tensor]) -> None:
    """With the default variant's: its bits, or where sums are made in another order its numbers."""
    for what, one, other in zip(operation.results, got, wanted, strict=False):
        if variant.same_bits:
            if not torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)):
                raise WrongAnswer(f"{variant.name}: {what} has other bits than the default's")
            continue
        error = ((one.double() - other.double()).abs().max() / other.double().abs().max()).item()
        if not error <= SAME_NUMBERS + torch.finfo(one.dtype).eps:
            raise WrongAnswer(f"{variant.name}: {what} is {error:.1e} away from the default's")


# ---- what the compiler says ------------------------------------------------------------------------------------------


def resident(registers: int, threads: int) -> int:
    """Blocks of a multiprocessor of sm_90: of 65536 registers a warp takes 256 at a time; 2048 threads, 32 blocks."""
    per_warp = -(-registers * 32 // 256) * 256
    return min(65536 // per_warp * 32 // threads, 2048 // threads, 32)


def static_report(variants: Sequence[Variant], arch: str, threads: int) -> str:
    """A line per variant and kernel. `loads`, `local`: instructions; those of absent tensors are there as well."""
    compiled = compile_all(variants, arch, threads)
    lines = [
        f"{arch}, {next(iter(compiled.values())).compiler}",
        f"{'variant':<18}{'kernel':<42}{'registers':>9}{'stack':>6}{'local':>6}{'loads':>6}{'stores':>7}{'blocks':>7}",
    ]
    seen = set()
    for variant in variants:
        for unit in dict.fromkeys(case.unit for case in CASES.values()):
            if (unit, variant.defines) in seen:
                continue
            seen.add((unit, variant.defines))
            image = compiled[unit, variant.defines].image
            memory = images.memory(image) if images.disassembler() else {}
            for kernel, of in sorted(images.resources(image).items()):
                local, loads, stores = memory.get(kernel, ("",) * 3)
                blocks = resident(of.registers, variant.threads)
                lines.append(
                    f"{variant.name:<18}{kernel:<42}{of.registers:>9}{of.stack:>6}{local:>6}{loads:>6}{stores:>7}"
                    f"{blocks:>7}"
                )
    return "\n".join(lines)


# ---- command line ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> list[Row]:
    names = [variant.name for variant in VARIANTS]
    parser = argparse.ArgumentParser(prog="tune", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, metavar="VARIANT", help=f"of {', '.join(names)}")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: those where a variant should matter")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    parser.add_argument("--quick", action="store_true", help="few repeats: to see that it works, not for numbers")
    parser.add_argument("--compile-only", action="store_true", help="what the compiler says of each; needs no GPU")
    parser.add_argument("--arch", default=None, help="default: that of the GPU; sm_90 with --compile-only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    parser.add_argument("--commit", help="what git would say, for a copy of the tree without it")
    args = parser.parse_args(argv)
    chosen = [variant for variant in VARIANTS if variant.name in (args.only or names)]
    if args.compile_only:
        left_out = [] if args.only else LEFT_OUT
        print(static_report([DEFAULT, *chosen, *left_out], args.arch or "sm_90", args.jobs))
        return []
    if not torch.cuda.is_available():
        parser.exit(2, f"tune: torch {torch.__version__} finds no usable CUDA device; --compile-only needs none\n")

    machine = MACHINE()
    properties = torch.cuda.get_device_properties(machine.device)
    arch = args.arch or f"sm_{properties.major}{properties.minor}"
    images_of = compile_all([DEFAULT, *chosen], arch, args.jobs)
    facts = machine.facts() | ({"commit": args.commit} if args.commit else {})
    facts["environment"] += f" {next(iter(images_of.values())).compiler}"
    print(
        f"{facts['device']}, torch {facts['torch']}, flowdppo_ops {facts['flowdppo_ops']} at {facts['commit']}  "
        f"{facts['environment']}"
    )
    torch.zeros(1, device=machine.device)  # the device's context, in which modules are loaded
    modules: dict[tuple[str, str], Module] = {}

    def module(unit: str, variant: Variant) -> Module:
        if (unit, variant.name) not in modules:
            image = images_of[unit, variant.defines].image
            modules[unit, variant.name] = Module(image, variant, machine.device, properties.multi_processor_count)
        return modules[unit, variant.name]

    rows: list[Row] = []
    failures: list[str] = []
    effort = machine.quick if args.quick else machine.full
    for name in args.cases:
        for size in args.sizes or DEFAULT.sizes:
            concerned = [v for v in chosen if name in v.cases and (args.sizes or size in v.sizes)]
            if not concerned:
                continue
            of_case: list[str] = []
            with machine.session(), noted(of_case, "nothing timed"):
                rows += tune(name, SIZES[size], [DEFAULT, *concerned], module, machine, effort, facts, of_case)
            failures += [f"{name} {size}: {failure}" for failure in of_case]
            print(f"{name} {size}: {len(concerned)} variants", flush=True)
            if args.json:
                write_json(rows, args.json)  # after each case: a run that is cut short leaves what it has
    print(table(chosen, rows))
    if failures:
        sys.exit("\n".join(f"tune: {failure}" for failure in failures))
    return rows


if __name__ == "__main__":
    main()
