"""Faults planted in the kernels, in Rust and in Python: each is seen by a test that `make test` runs.

A fault is a change to a source. `old` must stand there, once, or the source has moved away from the table.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from compilers import needs_cxx
from standin import harness

from flowdppo_ops import _native

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
ROOT = HERE.parent


class Check(NamedTuple):
    """Tests: their file, and pytest's -k. kernels: unit and variant of those that they launch."""

    file: str
    keywords: str
    kernels: tuple[str, str] = ("", "")
    sanitizer: str = "asan"


LOSS, STEP, SDE = ("policy_loss", "f32"), ("policy_loss", "step_f32"), ("sde_step", "f32")
_kernels, _sde = "emulated/test_kernels.py", "emulated/test_kernels_of_sde_step.py"
_of_loss = "float32 and not bfloat16 and not step_loss"
CHECKS = {
    "lengths": Check(_kernels, "test_lengths and not step_loss", LOSS),
    "odd addresses": Check(_kernels, f"test_odd_addresses and {_of_loss}", LOSS),
    "mask cells": Check("test_policy_loss.py", "test_every_mask_cell and float32", LOSS),
    "clip limits": Check("test_policy_loss.py", "test_clip_range_zero", LOSS),
    "clip cells": Check("test_policy_loss.py", "test_every_clip_cell", LOSS),
    "step lengths": Check(_kernels, "test_lengths and step_loss", STEP),
    "step addresses": Check(_kernels, "test_odd_addresses and step_loss and float32 and not bfloat16", STEP),
    "step vectors": Check(_kernels, "test_vectors_of_two_lengths and step_loss", ("policy_loss", "step_mixed")),
    "forms": Check("test_step_parity.py", "test_options or test_old_log_prob or test_reference_kl", STEP),
    "deterministic": Check("test_step_parity.py", "test_deterministic_rows or test_nothing_is_random", STEP),
    "on policy": Check(_kernels, "test_on_policy_is_exact and float32", STEP),
    "shards": Check(_kernels, "test_shards_add_up and step_loss", STEP),
    "sde lengths": Check(_sde, "test_lengths and float32 and not bfloat16 and not float16", SDE),
    "sde orders": Check(_sde, "test_same_bits_in_any_order", SDE),
    "sde deterministic": Check(_sde, "test_deterministic_rows", SDE),
    "sde vectors": Check(_sde, "test_vectors_of_two_lengths and residual", SDE),
    # Not of `make test`: what only ThreadSanitizer sees.
    "races": Check("emulated/test_races.py", "test_no_data_race and not step_loss and not sde_step", LOSS, "tsan"),
    "step races": Check("emulated/test_races.py", "test_no_data_race and step_loss", STEP, "tsan"),
    "sde races": Check("emulated/test_races.py", "of_sde_step", SDE, "tsan"),
    # In Rust and Python.
    "parity": Check("test_policy_loss.py", "test_options or test_variants or test_every_clip_cell"),
    "step parity": Check("test_step_parity.py", "test_options or test_old_log_prob or test_deterministic_rows"),
    "sde parity": Check("test_sde_step.py", "test_parity and float32"),
    "cells": Check("test_policy_loss.py", "cell or nan_kl or clip_range_zero"),
    "sizes": Check("test_policy_loss.py", "test_sizes and float32"),
    "refused": Check("test_errors.py", ""),
    "advantages": Check("test_advantages.py", ""),
}


class Fault(NamedTuple):
    file: str
    old: str
    new: str
    seen_by: str  # of CHECKS


PARTS, REDUCE, STREAM = (f"kernels/common/{name}.cuh" for name in ("parts", "reduce", "stream"))
OBJECTIVE, SCHEDULE, SOURCE = (f"kernels/{name}.cuh" for name in ("objective", "schedule", "transition"))
LOSSES, STEPS = "kernels/policy_loss.cu", "kernels/sde_step.cu"
BEFORE_STEP = "  __syncthreads();\n  return {s_step"
FENCES = (
    "    __threadfence();  // for the block: its writes come before the count\n",
    "    __threadfence();  // the count comes before what the last block reads\n",
)
TAIL = "tail < count; tail += part.threads"

KERNEL_FAULTS = {
    # How rows are shared, and memory.
    "no barrier inside the block's sum": Fault(
        REDUCE, "  __syncthreads();\n  if (warp == 0) {", "  if (warp == 0) {", "lengths"
    ),
    "no barrier before shared memory is used again": Fault(
        OBJECTIVE, "  __syncthreads();  // before the sums of squares overwrite it\n", "", "races"
    ),
    "no barrier before the block is counted in": Fault(
        PARTS, "  __syncthreads();  // the whole block has written\n", "", "races"
    ),
    "no barrier before the count is known": Fault(
        PARTS, "  __syncthreads();\n  return s_last[0];", "  return s_last[0];", "lengths"
    ),
    "no fence before the count": Fault(PARTS, FENCES[0], "", "races"),
    "no fence after the count": Fault(PARTS, FENCES[1], "", "races"),
    "no fence after the count of a step": Fault(PARTS, FENCES[1], "", "sde races"),
    "a vector read past the end": Fault(
        STREAM, "kSteps > 1 && vector < vectors) {", "vectorised && vector <= vectors) {", "lengths"
    ),
    "a pair of vectors read past the end": Fault(
        STREAM, "      if (vector < whole) {", "      if (vector <= whole) {", "sde lengths"
    ),
    "an element read past the end": Fault(STREAM, TAIL, TAIL.replace("<", "<="), "lengths"),
    "a dropped tail": Fault(STREAM, TAIL, TAIL.replace("count", "0"), "lengths"),
    "a dropped tail of a step": Fault(STREAM, TAIL, TAIL.replace("count", "0"), "sde lengths"),
    "a gradient written past the end": Fault(
        LOSSES, "out.store(at, values)", "out.store(kCount == 1 ? at + 1 : at, values)", "lengths"
    ),
    "a tail of the gradient dropped": Fault(
        LOSSES, "out.store(at, values)", "if (kCount > 1) out.store(at, values)", "lengths"
    ),
    "a stretch rounded down": Fault(
        PARTS, "((numel + splits - 1) / splits + kSplitUnit - 1)", "(numel / splits)", "lengths"
    ),
    "one partial sum for all splits": Fault(
        PARTS, "of_row[part.split * kCount + i] = sums[i]", "of_row[i] = sums[i]", "sde lengths"
    ),
    "tickets that are not reset": Fault(
        PARTS, "atomicInc(ticket, count - 1)", "atomicInc(ticket, 0xffffffffu)", "lengths"
    ),
    "a run that is not added up": Fault(STEPS, "    sum += run;\n", "", "sde lengths"),
    "vectors of means at an odd address": Fault(
        SOURCE, "return mean.aligned(first) && next.aligned(first)", "return mean.aligned(first)", "odd addresses"
    ),
    "vectors of a step at an odd address": Fault(
        SOURCE, "sample.aligned(first) && next.aligned(first)", "sample.aligned(first)", "step addresses"
    ),
    "gradient vectors at an odd address": Fault(
        LOSSES,
        "return output.aligned(first) && uncond.aligned(first);",
        "return output.aligned(first);",
        "step vectors",
    ),
    "vectors of a residual at an odd address": Fault(
        STEPS, "mean.aligned(first) && residual.aligned(first)", "mean.aligned(first)", "sde vectors"
    ),
    # Objectives.
    "> for >= at the threshold": Fault(OBJECTIVE, "kl >= threshold", "kl > threshold", "mask cells"),
    ">= for > at a ratio of 1": Fault(
        OBJECTIVE, "ratio > 1.0 && advantage > 0.0", "ratio >= 1.0 && advantage > 0.0", "mask cells"
    ),
    ">= for > at a clip limit": Fault(
        OBJECTIVE, "ratio > upper && advantage", "ratio >= upper && advantage", "clip limits"
    ),
    "a KL in the space of means": Fault(OBJECTIVE, "transition.b * transition.b", "2.0 * variance", "forms"),
    "a gradient with respect to the mean": Fault(OBJECTIVE, "innovation * transition.b", "innovation", "step lengths"),
    "a deterministic row like any other": Fault(
        OBJECTIVE, "deterministic = step && is_deterministic(transition)", "deterministic = false", "deterministic"
    ),
    "a KL divided by 0": Fault(OBJECTIVE, "(step && kl_divisor == 0.0)", "false", "deterministic"),
    "a reference divided by 0": Fault(OBJECTIVE, "!(step && ref_std == 0.0)", "true", "deterministic"),
    "a guard's scale of 0": Fault(
        OBJECTIVE,
        "no_drift = objective.kind != kGrpoGuard || (step && scale == 0.0)",
        "no_drift = objective.kind != kGrpoGuard",
        "deterministic",
    ),
    # Transitions.
    "no barrier before the step is read": Fault(
        SCHEDULE, BEFORE_STEP, BEFORE_STEP.removeprefix("  __syncthreads();\n"), "step races"
    ),
    "no barrier before the step of sde_step is read": Fault(
        SCHEDULE, BEFORE_STEP, BEFORE_STEP.removeprefix("  __syncthreads();\n"), "sde orders"
    ),
    "half a warp left out of a shuffle": Fault(
        SCHEDULE, "__shfl_sync(0xffffffffu", "__shfl_sync(0x0000ffffu", "step lengths"
    ),
    "lanes that do not come to a shuffle": Fault(
        SCHEDULE, "if (part.thread < kWarpSize) {", "if (part.thread < 5) {", "step lengths"
    ),
    "one step for all warps": Fault(
        PARTS,
        "part.threads == kWarpSize ? static_cast<int>(threadIdx.x) / kWarpSize : 0",
        "0",
        "step lengths",
    ),
    "the step of another row": Fault(SCHEDULE, "[lane], part.row)", "[lane], 0)", "step lengths"),
    "dt for sqrt(-dt)": Fault(SCHEDULE, "noise_level * sqrt(flow", "noise_level * (flow", "step lengths"),
    "cosine for sine": Fault(SCHEDULE, "sinpi(0.5 * noise_level)", "sinpi(0.5 - 0.5 * noise_level)", "forms"),
    "no guidance": Fault(SOURCE, "guided(guidance, v[j], w[j])", "v[j]", "step lengths"),
    "shares of the gradient exchanged": Fault(
        LOSSES, "uncond.store(at, gradient, 1.f - guidance)", "uncond.store(at, gradient, guidance)", "step lengths"
    ),
    "shares of the gradient's tail exchanged": Fault(
        LOSSES,
        "uncond.store(at, gradient, 1.f - ",
        "uncond.store(at, gradient, kCount > 1 ? 1.f - guidance : ",
        "step lengths",
    ),
    "a drift of model outputs without b": Fault(
        SOURCE, "out[j] = b * (v[j] - policy[j])", "out[j] = v[j] - policy[j]", "step lengths"
    ),
    "a cancelling drift": Fault(
        SOURCE,
        "out[j] = b * (v[j] - policy[j])",
        "out[j] = b * v[j] - 1.0000001f * b * policy[j]",
        "on policy",
    ),
    "a residual not in units of std": Fault(
        SOURCE,
        "-unit * (u[j] * inverse_unit - policy[j])",
        "-(u[j] * inverse_unit - policy[j])",
        "forms",
    ),
    "the reference in the form of the old policy": Fault(
        SOURCE, "differences(ref_form,", "differences(old_form,", "forms"
    ),
    "next not read for a residual": Fault(
        SOURCE, "wanted.innovation || old_form == kResidualForm)", "wanted.innovation)", "deterministic"
    ),
    "the elements of a shard for those of all": Fault(
        LOSSES, "p.stage == kObjectiveAlone ? p.row_sums[4 * call.rows]", "false ? 0.0", "shards"
    ),
    "sums of another row": Fault(LOSSES, "p.row_sums + 4 * part.row;", "p.row_sums + 4 * 0;", "shards"),
    "noise on a given latent": Fault(STEPS, "draws(p.call.latents.noise.data)", "draws(true)", "sde lengths"),
    "no guidance in a tail": Fault(
        STEPS, "if (uncond.present) {", "if (uncond.present && kCount > 1) {", "sde lengths"
    ),
    "guidance's other share": Fault(STEPS, "fmaf(-b, guidance, b)", "b * guidance", "sde lengths"),
    "a normalizer that is not asked for": Fault(
        STEPS, "call.log_prob_normalizer ? log(std)", "true ? log(std)", "sde lengths"
    ),
    "a deterministic row divided by its std": Fault(
        STEPS, "step.std == 0.f ? 0.f : 1.f / step.std", "1.f / step.std", "sde deterministic"
    ),
}


def planted(fault: Fault, folder: Path, tree: str) -> Path:
    """A copy of the project's folder `tree`, with the fault."""
    copied = folder / tree
    shutil.copytree(ROOT / tree, copied, ignore=shutil.ignore_patterns("__pycache__"))
    text = (folder / fault.file).read_text()
    assert text.count(fault.old) == 1, f"{fault.file} has {text.count(fault.old)} times: {fault.old}"
    (folder / fault.file).write_text(text.replace(fault.old, fault.new))
    return copied


def emulate(driver: Path, folder: Path, check: Check, kernels: Path = ROOT / "kernels") -> tuple[int, str]:
    from emulator.build import Part, build

    unit, variant = check.kernels
    library = build(folder / "build", check.sanitizer, [Part(unit, (variant,))], kernels)
    library = library.rename(library.parent / f"{check.sanitizer}-kernels.so")
    given = "-x", "--tb=line", "-k", check.keywords, HERE / check.file
    done = harness.pytest("emulated", driver, library, *given, timeout=600)
    assert "CUDA_ERROR" not in done.stdout, f"the check launches other kernels than {variant}: {done.stdout[-3000:]}"
    return done.returncode, done.stdout


@needs_cxx
@pytest.mark.parametrize("name", KERNEL_FAULTS)
def test_kernels(standin_driver, tmp_path, name):
    fault = KERNEL_FAULTS[name]
    code, said = emulate(standin_driver, tmp_path, CHECKS[fault.seen_by], planted(fault, tmp_path, "kernels"))
    assert seen(code, said), said[-3000:]


@needs_cxx
@pytest.mark.parametrize("name", sorted({fault.seen_by for fault in KERNEL_FAULTS.values()}))
def test_checks_of_kernels_pass_without_a_fault(standin_driver, tmp_path, name):
    code, said = emulate(standin_driver, tmp_path, CHECKS[name])
    assert code == 0, said[-3000:]


def seen(code: int, said: str) -> bool:
    """Whether a test failed, or a sanitizer or the emulator ended the process; nothing else that pytest ends with."""
    ended = "ERROR: AddressSanitizer", "WARNING: ThreadSanitizer", "runtime error: ", "EMULATOR: "
    return (code == 1 and "FAILED" in said) or (code != 0 and any(reason in said for reason in ended))


# ---- Rust and Python -------------------------------------------------------------------------------------------------

_rust, _schedule, _plan = "src/cpu/objective.rs", "src/cpu/schedule.rs", "src/plan.rs"
_check, _python = "python/flowdppo_ops/_checks.py", "python/flowdppo_ops"
RUST_FAULTS = {
    "> for >= at the threshold": Fault(_rust, "kl >= threshold ||", "kl > threshold ||", "cells"),
    "a NaN of the KL is always high": Fault(_rust, "&& objective.keep_nan_kl == 0", "", "cells"),
    ">= for > at a ratio of 1": Fault(_rust, "(ratio > 1.0 && advantage", "(ratio >= 1.0 && advantage", "cells"),
    "<= for < at a ratio of 1": Fault(_rust, "(ratio < 1.0 && advantage", "(ratio <= 1.0 && advantage", "cells"),
    ">= for > at the upper clip limit": Fault(_rust, "(ratio > upper && adv", "(ratio >= upper && adv", "cells"),
    "<= for < at the lower clip limit": Fault(_rust, "(ratio < lower && adv", "(ratio <= lower && adv", "cells"),
    "clip limits exchanged": Fault(_rust, "if ratio > upper { upper } else { lower }", "lower", "cells"),
    "a product with 1 / numel": Fault(
        _rust, "sums.d / divisor, sums.cross", "sums.d * (1.0 / divisor), sums.cross", "cells"
    ),
    "a deterministic row with a density": Fault(
        _rust, "transition.is_some_and(|step| step.is_deterministic())", "false", "step parity"
    ),
    "no centre of GRPO-Guard": Fault(_rust, "(log_ratio + centre) * scale", "log_ratio * scale", "parity"),
    "a blocked row's gradient": Fault(
        _rust, "if blocked { 0.0 } else { open_loss * scale }", "open_loss * scale", "cells"
    ),
    "no weights on a clipped row": Fault(_rust, "blocked_loss * outer * weights", "blocked_loss * outer", "parity"),
    "a biased deviation": Fault(_rust, "squares * rows / (rows - 1.0)", "squares", "parity"),
    "a gradient with respect to the mean": Fault(_rust, "innovation * b }", "innovation }", "step parity"),
    "sigma_max at no sigma": Fault(_schedule, "if sigma == 1.0 {", "if sigma == 2.0 {", "step parity"),
    "cosine for sine": Fault(_schedule, "FRAC_PI_2).sin()", "FRAC_PI_2).cos()", "step parity"),
    "dt for sqrt(-dt)": Fault(_schedule, "round((-dt).sqrt())", "round(-dt)", "step parity"),
    "b without its drift": Fault(_schedule, "half_rate.mul_add(1.0 - sigma, 1.0) * dt", "dt", "sde parity"),
    "a chunk that begins one too late": Fault(
        _plan, "let start = chunk * CHUNK;", "let start = chunk * (CHUNK + 1);", "sizes"
    ),
    "a tail of squares dropped": Fault(
        "src/cpu/sde_step.rs", "next[full..]).enumerate()", "next[full..]).enumerate().skip(1)", "sde parity"
    ),
}
PYTHON_FAULTS = {
    "rows of another shape": Fault(_check, "if came != wanted:", "if len(came) != len(wanted):", "refused"),
    "both log-prob sources": Fault(
        _check,
        'if replay == (arguments["log_prob"] is not None):',
        'if not replay and arguments["log_prob"] is None:',
        "refused",
    ),
    "no old log-prob": Fault(
        _check, '        checks.require("old_log_prob", "it is', '        ("old_log_prob", "it is', "refused"
    ),
    "a row vector of another length": Fault(_check, "have == want or have == 1", "True", "refused"),
    "no rows": Fault(
        _check,
        'if 0 in row_shape:\n            raise ValueError(f"{self.where}',
        'if False:\n            raise ValueError(f"{self.where}',
        "refused",
    ),
    "a biased deviation of groups": Fault(
        f"{_python}/advantages.py", "(members * columns - 1)", "(members * columns)", "advantages"
    ),
    "a group of one divided by its deviation": Fault(
        f"{_python}/advantages.py", "alone = (members == 1)", "alone = (members == 0)", "advantages"
    ),
    "the KL for the ratio": Fault(
        f"{_python}/result.py", "self._field(_RATIO)", "self._field(_KL)", "cells"
    ),  # parity does not see it: the reference returns the same class
    "keep of a NaN": Fault(f"{_python}/result.py", "self._field(_KEEP) != 0", "self._field(_KEEP) >= 0", "cells"),
}


def on_the_cpu(package: Path, check: Check) -> tuple[int, str]:
    """pytest with another copy of the package. `package`: where its folder is."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", "--no-header"]
    command += [*(["-k", check.keywords] if check.keywords else []), HERE / check.file]
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def cargo(tmp_path_factory):
    """Builds what is in a folder, without kernels; the crates that it depends on are compiled once."""
    target = tmp_path_factory.mktemp("target")
    variables = {"FLOWDPPO_KERNELS": "none", "CARGO_TARGET_DIR": str(target)}
    variables |= {f"CARGO_PROFILE_RELEASE_{name}": value for name, value in RELEASE.items()}

    def build(folder: Path) -> Path:
        for path in ("Cargo.toml", "Cargo.lock", "build.rs", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / path, folder)
        for tree in {"kernels", "python", "src", ".cargo"} - {path.name for path in folder.iterdir()}:
            shutil.copytree(ROOT / tree, folder / tree)
        command = ["cargo", "build", "--release", "--locked", "--quiet"]
        done = subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        shutil.copy(target / "release" / "lib_native.so", folder / "python" / "flowdppo_ops" / "_native.abi3.so")
        return folder / "python"

    return build


RELEASE = {"LTO": "off", "CODEGEN_UNITS": "16", "INCREMENTAL": "true"}  # a fault changes a file or two


@pytest.mark.skipif(shutil.which("cargo") is None or sys.platform != "linux", reason="needs cargo, and Linux")
@pytest.mark.parametrize("name", RUST_FAULTS)
def test_rust(cargo, tmp_path, name):
    fault = RUST_FAULTS[name]
    planted(fault, tmp_path, "src")
    code, said = on_the_cpu(cargo(tmp_path), CHECKS[fault.seen_by])
    assert seen(code, said), said[-3000:]


@pytest.mark.parametrize("name", PYTHON_FAULTS)
def test_python(tmp_path, name):
    fault = PYTHON_FAULTS[name]
    package = planted(fault, tmp_path, "python")
    if not list(package.glob("flowdppo_ops/_native*.so")):  # as the package is installed, not built in place
        shutil.copy(_native.__file__, package / "flowdppo_ops")
    code, said = on_the_cpu(package, CHECKS[fault.seen_by])
    assert seen(code, said), said[-3000:]


OF_CPU = sorted({fault.seen_by for fault in (RUST_FAULTS | PYTHON_FAULTS).values()})


@pytest.mark.parametrize("name", OF_CPU)
def test_checks_pass_without_a_fault(name):
    code, said = on_the_cpu(Path(_native.__file__).parent.parent, CHECKS[name])
    assert code == 0, said[-3000:]
