"""Static checks of the embedded kernel images: what a GPU would only show as a slow kernel, or as a wrong argument."""

from __future__ import annotations

import os
import re
from pathlib import Path

import images
import pytest

from flowdppo_ops import _native

ROOT = Path(__file__).resolve().parent.parent
CUBINS, ENTRY_POINTS = images.cubins(), dict(_native.cuda_entry_points())
UNITS = ("policy_loss", "sde_step")


def entry_points(unit: str) -> dict[str, int]:
    """Of one image: bytes of the argument by name."""
    return {name: size for name, size in ENTRY_POINTS.items() if next(filter(name.startswith, UNITS)) == unit}


pytestmark = pytest.mark.skipif(not _native.cuda_images(), reason="built without kernels (FLOWDPPO_KERNELS=none)")
# Loads of an iteration that may come after the first wait, by kernel, and why.
LATE_LOADS: dict[str, int] = {}
each_cubin = pytest.mark.parametrize("name", CUBINS)


@pytest.mark.skipif("FLOWDPPO_ARCHS" in os.environ, reason="FLOWDPPO_ARCHS chose other architectures")
def test_every_architecture_is_there():
    wanted = {(80, False), (86, False), (89, False), (90, False), (100, False), (120, False), (80, True)}
    built = [(unit, cc, is_ptx) for unit, cc, is_ptx, _ in _native.cuda_images()]
    assert sorted(built) == sorted((unit, *image) for unit in UNITS for image in wanted)


@each_cubin
def test_resources(name):
    resources = images.resources(CUBINS[name])
    assert resources.keys() == entry_points(name.split()[0]).keys()
    for kernel, (registers, stack, parameters, _) in resources.items():
        assert stack == 0, f"{kernel} has {stack} bytes of stack a thread"
        assert parameters == ENTRY_POINTS[kernel], f"{kernel} takes {parameters} bytes, the launcher gives others"
        # Blocks of 256 threads on 65536 registers: at least two, to load while the other one adds up.
        assert 65536 // (256 * registers) >= 2, f"{kernel} needs {registers} registers"


@pytest.mark.skipif(images.disassembler() is None, reason="nvdisasm is not installed (pip install '.[test]')")
@each_cubin
def test_memory_instructions(name):
    memory = images.memory(CUBINS[name])
    assert memory.keys() == entry_points(name.split()[0]).keys()
    for kernel, found in memory.items():
        assert found.local == 0, f"{kernel} spills: {found.local} local loads and stores"
        assert found.loads_in_flight >= 4, f"{kernel} has {found.loads_in_flight} loads of 16 bytes under way, wanted 4"
        late, allowed = found.late_loads, LATE_LOADS.get(kernel, 0)
        assert late <= allowed, f"{kernel} issues {late} loads after it has waited for the first, allowed {allowed}"
        writes_latents = "_forward_" not in kernel or "sde_step" in kernel
        assert not writes_latents or found.wide_stores >= 1, f"{kernel} has no stores of 16 bytes"
        assert found.strong_stores == 0, f"{kernel} has {found.strong_stores} stores of a stronger order than needed"
        # What a block forms for all of its threads, in float64, it forms while its first loads are under way. Where
        # every mix of dtypes is taken there are no registers for that.
        assert found.loads_first or "mixed" in kernel, f"{kernel} issues its first load after a barrier"


@pytest.mark.parametrize("unit", UNITS)
def test_ptx(unit):
    images_of_unit = [image for name, _, is_ptx, image in _native.cuda_images() if is_ptx and name == unit]
    (text,) = (image.rstrip(b"\0").decode() for image in images_of_unit)
    assert "\n.target sm_80\n" in text
    for kernel, parameters in entry_points(unit).items():
        assert f"{kernel}_param_0[{parameters}]" in text
    assert ".local" not in text
    # Without a rounding mode a product and a sum may be fused: --fmad=false writes `.rn` everywhere, see build.rs.
    assert not re.search(r"\b(add|sub|mul)\.f(32|64)\b", text)
    # What drivers of CUDA 12.9 take; a newer compiler's needs a newer driver.
    assert re.search(r"^\.version (\S+)$", text, re.MULTILINE)[1] == "8.8"


def test_the_message_about_a_missing_compiler_names_the_build_requirement():
    requirement = re.search(r'const REQUIREMENT: &str = "(\S+)";', (ROOT / "build.rs").read_text())[1]
    assert f'"{requirement}; ' in (ROOT / "pyproject.toml").read_text()
