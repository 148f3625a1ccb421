"""What is tried to make the kernels faster: settings, and what they should do, written down before they are measured.

    python benches/variants.py [FILE]     # the table of README.md; with what came, from the rows of `tune.py --json`

A variant is compiled here, by the NVRTC that PyTorch on CUDA brings along (`cuda.bindings`), without a GPU. Timed by
`tune.py`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from harness import Row, read_json
from runner import SIZES

KERNELS = Path(__file__).parents[1] / "kernels"

# ---- what there is to set --------------------------------------------------------------------------------------------

# With what ships. Of kernels/tuning.cuh, there FLOWDPPO_...; and of `GridPlan` in src/plan.rs.
COMPILED: dict[str, int | str] = {
    "THREADS": 256,
    "MIN_BLOCKS": 2,
    "NARROW_STEPS": 2,
    "WIDE_STEPS": 1,
    "FORWARD_LOADS": "kKeep",
    "BACKWARD_LOADS": "kStream",
    "STORES": "kKeep",
    "BACKWARD_REVERSED": 0,
    "DEPENDENT_LAUNCH": 0,
}
PLANNED: dict[str, int | str] = {"BLOCKS_PER_MULTIPROCESSOR": 16, "MIN_PART": 4096}
SHORT_ROW = 512  # kShortRow
# These add the same numbers up in another order. All others give the same bits.
REORDERING = {"THREADS", "NARROW_STEPS", "WIDE_STEPS", *PLANNED}


class Variant(NamedTuple):
    """`settings`: those that differ from what ships. `sizes` (of `runner.SIZES`) and `cases` (of `CASES`): where
    something is expected of it, and hence where it is timed."""

    name: str
    settings: Mapping[str, int | str]
    expected: str
    sizes: tuple[str, ...]
    cases: tuple[str, ...]

    def setting(self, name: str) -> int | str:
        return self.settings.get(name, (COMPILED | PLANNED)[name])

    @property
    def threads(self) -> int:
        return int(self.setting("THREADS"))

    @property
    def same_bits(self) -> bool:
        return not REORDERING & self.settings.keys()

    @property
    def defines(self) -> tuple[str, ...]:
        """For the compiler. Variants with the same ones share an image."""
        return tuple(f"-DFLOWDPPO_{name}={value}" for name, value in self.settings.items() if name in COMPILED)

    def grid(self, rows: int, numel: int, multiprocessors: int) -> tuple[int, int]:
        """(splits, blocks), as `GridPlan` has them."""
        if numel <= SHORT_ROW:
            return 0, -(-rows // (self.threads // 32))
        wanted = -(-multiprocessors * int(self.setting("BLOCKS_PER_MULTIPROCESSOR")) // rows)
        splits = max(1, min(wanted, -(-numel // int(self.setting("MIN_PART")))))
        return splits, rows * splits


class Case(NamedTuple):
    """A kernel, and the operation of a bench that ends in it."""

    unit: str
    kernel: str  # variant of the unit
    bench: str
    operation: str
    dtype: str
    peer: str  # provider of that operation: the package, called as here


CASES = {
    "loss_f32": Case("policy_loss", "f32", "bench_policy_loss", "policy_loss", "fp32", "fused"),
    "loss_bf16": Case("policy_loss", "bf16", "bench_policy_loss", "policy_loss", "bf16", "fused"),
    "step": Case("policy_loss", "step_bf16_f32", "bench_policy_loss", "step_loss", "bf16+fp32", "fused"),
    "step_residual": Case(
        "policy_loss", "step_bf16_f32_f16", "bench_policy_loss", "step_loss", "bf16+fp32", "fused_residual"
    ),
    "sample": Case("sde_step", "bf16_f32", "bench_sde_step", "sde_step_sample", "bf16+fp32", "fused"),
}

DEFAULT = Variant("default", {}, "", ("sd35", "flux", "wan", "video"), tuple(CASES))

# The arithmetic behind them, for an H200: a copy moves 4.3 TB/s, the L2 gives 5.5 TB/s and holds 60 MB, memory answers
# in 0.8 us under load; 132 multiprocessors then need 26 KB each under way. fp32 tensors of sd35, flux and video have
# 4.2, 16.8 and 310 MB; a forward reads three, a backward reads two and writes one. With 256 threads sd35 has 256 blocks
# of 4096 elements, two to a multiprocessor, 16 elements to a thread; video has 2112 blocks of 37 000. Registers (see
# `tune.py --compile-only`) admit 3 blocks of 256 threads in fp32 and 2 in bf16 and of a step.
VARIANTS = [
    Variant(
        "threads=128",
        {"THREADS": 128, "MIN_BLOCKS": 4, "MIN_PART": 2048},
        "nothing, +- 1 %: 16 elements a thread as before, and 5 blocks where 2 of 256 were: 25 % more under way "
        "than 48 KB, which are enough",
        ("sd35", "video"),
        ("loss_f32", "step"),
    ),
    Variant(
        "threads=512",
        {"THREADS": 512, "MIN_BLOCKS": 1, "MIN_PART": 8192},
        "sd35 0.5 us slower, video 1 %: registers admit one block, and nothing loads while it waits at a barrier",
        ("sd35", "video"),
        ("loss_f32", "step"),
    ),
    Variant(
        "min_blocks=3",
        {"MIN_BLOCKS": 3},
        "nothing, +- 1 %: the forward has 5 loads at once in 3 blocks where it had 8 in 2, 45 KB under way for 48",
        ("sd35", "video"),
        ("loss_bf16",),
    ),
    Variant(
        "narrow_steps=1",
        {"NARROW_STEPS": 1},
        "video 2 % slower: 32 to 36 KB under way are barely enough; sd35 fp32 0.8 us slower each way: 4 round trips to "
        "memory instead of 2, bf16 0.4 us: 2 instead of 1",
        ("sd35", "video"),
        ("loss_f32", "loss_bf16"),
    ),
    Variant(
        "narrow_steps=4",
        {"NARROW_STEPS": 4},
        "sd35 fp32 0.5 us faster each way: one round trip instead of 2; bf16 nothing: half the warps take all of a "
        "part, in one as before; video nothing: 98 KB under way for 72",
        ("sd35", "video"),
        ("loss_f32", "loss_bf16"),
    ),
    Variant(
        "wide_steps=2",
        {"WIDE_STEPS": 2},
        "sd35 0.5 us faster: one round trip instead of 2; video nothing: 80 to 96 KB under way for 48 to 60",
        ("sd35", "video"),
        ("sample", "step_residual"),
    ),
    Variant(
        "forward-streams",
        {"FORWARD_LOADS": "kStream"},
        "sd35 nothing: 13 MB stay in the L2 under any hint; flux fp32 backward 1 us slower, cold: part of the 34 MB it "
        "reads again has made room for the gradient",
        ("sd35", "flux"),
        ("loss_f32", "step"),
    ),
    Variant(
        "backward-keeps",
        {"BACKWARD_LOADS": "kKeep"},
        "flux 0.5 us slower, warm: the next forward finds less of the old policy; video nothing",
        ("flux", "video"),
        ("loss_f32", "step"),
    ),
    Variant(
        "stores-stream",
        {"STORES": "kStream"},
        "flux fp32 pair 1 us faster, warm: 17 MB of gradient make room before the inputs do; video nothing. What reads "
        "the gradient next would pay for it",
        ("flux", "video"),
        ("loss_f32", "step", "sample"),
    ),
    Variant(
        "reversed",
        {"BACKWARD_REVERSED": 1},
        "video backward 5 % faster: 50 of its 930 MB are in the L2 still; flux fp32 1 us, cold; sd35 nothing: all is",
        ("sd35", "flux", "video"),
        ("loss_f32", "loss_bf16", "step"),
    ),
    Variant(
        "dependent",
        {"DEPENDENT_LAUNCH": 1},
        "sd35 pair 1 us faster: the backward's blocks wait where its launch did; video nothing",
        ("sd35", "video"),
        ("loss_f32", "step_residual"),
    ),
    Variant(
        "blocks=8",
        {"BLOCKS_PER_MULTIPROCESSOR": 8},
        "video 1 % slower: the last blocks run 80 us where they ran 40, and not all of that time with a full chip",
        ("video",),
        ("loss_f32", "step", "sample"),
    ),
    Variant(
        "blocks=32",
        {"BLOCKS_PER_MULTIPROCESSOR": 32},
        "video 1 % faster: the half-empty end is 20 us long instead of 40",
        ("video",),
        ("loss_f32", "step", "sample"),
    ),
    Variant(
        "min_part=2048",
        {"MIN_PART": 2048},
        "sd35 fp32 0.5 us slower: 512 blocks do not fit at once (396); flux and wan forward 5 % slower: a block's sums "
        "and ticket, 1.5 us, come after every 2048 elements",
        ("sd35", "flux", "wan"),
        ("loss_f32", "step", "sample"),
    ),
    Variant(
        "min_part=8192",
        {"MIN_PART": 8192},
        "sd35 1 us slower: 128 blocks, one to a multiprocessor, 24 KB under way; flux and wan 0.5 us faster: half "
        "the tickets",
        ("sd35", "flux", "wan"),
        ("loss_f32", "step", "sample"),
    ),
    Variant(
        "together",
        {"BACKWARD_REVERSED": 1, "DEPENDENT_LAUNCH": 1, "BLOCKS_PER_MULTIPROCESSOR": 32},
        "what its parts gain: sd35 pair 1 us, video forward 1 % and backward 6 %",
        ("sd35", "flux", "video"),
        ("loss_f32", "loss_bf16", "step", "step_residual"),
    ),
]

# Compiled and not timed; `expected` is why.
LEFT_OUT = [
    Variant(
        "min_blocks=1",
        {"MIN_BLOCKS": 1},
        "the same code; in two of 10 kernels more registers, 92 for 80 and 96 for 95, and no more loads",
        (),
        (),
    ),
    Variant("min_blocks=3", {"MIN_BLOCKS": 3}, "spills in the kernels of a step: 48 or 49 local accesses", (), ()),
    Variant("min_blocks=4", {"MIN_BLOCKS": 4}, "spills in 8 of 10 kernels: 11 to 212 local accesses", (), ()),
    Variant("wide_steps=2", {"WIDE_STEPS": 2}, "spills in the forward of `step`: 45 local accesses", (), ()),
]


# ---- compiling -------------------------------------------------------------------------------------------------------


class Compiled(NamedTuple):
    image: bytes  # cubin
    compiler: str


def compile_all(variants: Iterable[Variant], arch: str, threads: int) -> dict[tuple[str, tuple[str, ...]], Compiled]:
    """By unit and defines; `threads` at a time. No more entry points than `CASES` need."""
    jobs = list(dict.fromkeys((case.unit, variant.defines) for variant in variants for case in CASES.values()))
    with ThreadPoolExecutor(threads) as pool:  # NVRTC compiles without Python's lock
        return dict(zip(jobs, pool.map(lambda job: compiled(*job, arch), jobs), strict=True))


def compiled(unit: str, defines: tuple[str, ...], arch: str) -> Compiled:
    from cuda.bindings import nvrtc

    version = "{}.{}".format(*called(nvrtc.nvrtcVersion()))
    options = [f"--gpu-architecture={arch}", "--std=c++17", "--fmad=false", *defines]  # as build.rs
    (name, text), *headers = ((name.encode(), text.encode()) for name, text in sources(unit).items())
    contents, names = [text for _, text in headers], [name for name, _ in headers]
    program = called(nvrtc.nvrtcCreateProgram(text, name, len(headers), contents, names))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytes(called(nvrtc.nvrtcGetProgramLogSize(program)))
            called(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"{unit} with {' '.join(defines)}: {log.rstrip(bytes(1)).decode()}")
        image = bytes(called(nvrtc.nvrtcGetCUBINSize(program)))
        called(nvrtc.nvrtcGetCUBIN(program, image))
    finally:
        called(nvrtc.nvrtcDestroyProgram(program))
    return Compiled(image, f"nvrtc {version}")


def called(result):
    """What a call of `cuda.bindings` returned, without its status; RuntimeError where that is not success."""
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"{status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def sources(unit: str) -> dict[str, str]:
    """The unit and all headers, by name; without the entry points that no case needs: most of the time to compile is
    theirs."""
    wanted = {case.kernel for case in CASES.values() if case.unit == unit}
    texts = {str(path.relative_to(KERNELS)): path.read_text() for path in KERNELS.rglob("*.cuh")}
    texts = {f"{unit}.cu": (KERNELS / f"{unit}.cu").read_text()} | texts
    entry = re.compile(rf"^(?:  X|{unit.upper()})\((\w+),[^\\\n]*", re.MULTILINE)  # up to the backslash
    found = {name for text in texts.values() for name in entry.findall(text)}
    if missing := wanted - found:
        raise RuntimeError(f"{unit}.cu has no entry points for {', '.join(sorted(missing))}")
    return {name: entry.sub(lambda line: line[0] if line[1] in wanted else "", text) for name, text in texts.items()}


# ---- what came -------------------------------------------------------------------------------------------------------


def table(variants: Iterable[Variant], rows: Sequence[Row]) -> str:
    """Markdown, a line an attempt: what was expected, what came. `rows`: those of `tune.py`, of one run."""
    lines = ["| variant | expected | came, us: forward + backward |", "|---|---|---|"]
    size_of = {shape: size for size, shape in SIZES.items()}
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(f"{row.op.removeprefix('tune ')} {size_of[row.shape]}", []).append(row)
    for variant in variants:
        came = [line for case, of_case in cases.items() for line in outcomes(variant, case, of_case)]
        lines.append(f"| {variant.name} | {variant.expected} | {'; '.join(came) or 'not measured yet'} |")
    return "\n".join(lines)


def outcomes(variant: Variant, case: str, rows: Sequence[Row]) -> list[str]:
    """Of each cache: the default's medians, then the variant's."""
    p50 = {(row.cache, row.provider, row.pass_): row.p50_us for row in rows}

    def passes(cache: str, provider: str) -> str:
        forward = p50[cache, provider, "forward"]
        both = p50.get((cache, provider, "forward+backward"))
        return f"{forward:.1f}" + ("" if both is None else f" + {both - forward:.1f}")

    return [
        f"{case} {cache} {passes(cache, DEFAULT.name)} -> {passes(cache, variant.name)}"
        for cache in ("cold", "warm")
        if all((cache, name, "forward") in p50 for name in (DEFAULT.name, variant.name))
    ]


if __name__ == "__main__":
    print(table(VARIANTS, read_json(Path(sys.argv[1])) if len(sys.argv) > 1 else []))
