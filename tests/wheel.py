"""Builds the wheel and the sdist that are published, checks them, and runs the wheel as a user would.

    python tests/wheel.py [--out dist]

The wheel is abi3 and links against glibc 2.17 (by zig, from PyPI), so that it installs on every Linux that PyTorch
supports. It is installed from its file, without an index, where PATH has no compiler and no cargo; there
the README's first call and the doctor run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = "manylinux_2_17"
LARGEST = 20 << 20  # bytes
TOOLS = ("maturin[zig]>=1.11,<2", "auditwheel", "abi3audit", "twine")


def run(*command: str | Path, **options: object) -> str:
    print("$", *(Path(word).name if isinstance(word, Path) else word for word in command), flush=True)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options)
    print(done.stdout)
    return done.stdout


def environment(folder: Path, *packages: str) -> Path:
    """The scripts of a new environment with these packages."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", *packages], check=True)
    return folder / "bin"


def build(folder: Path, out: Path) -> Path:
    """The checked wheel."""
    (nvrtc,) = re.findall(r'"(nvidia-cuda-nvrtc-cu12==[\d.]+)', (ROOT / "pyproject.toml").read_text())
    tools = environment(folder / "tools", *TOOLS, nvrtc)
    environ = {**os.environ, "VIRTUAL_ENV": str(tools.parent), "PATH": f"{tools}:{os.environ['PATH']}"}
    for old in out.glob("flowdppo_ops-*"):
        old.unlink()
    options = ("--release", "--locked", "--sdist", "--zig", "--compatibility", PLATFORM, "--out", str(out))
    run(tools / "maturin", "build", *options, cwd=ROOT, env=environ)
    (wheel,) = out.glob("*.whl")
    (sdist,) = out.glob("*.tar.gz")
    assert f'platform tag:\n"{PLATFORM}' in run(tools / "auditwheel", "show", wheel)
    run(tools / "abi3audit", "--strict", "--summary", wheel)
    run(tools / "twine", "check", "--strict", wheel, sdist)
    print(f"{wheel.name}: {wheel.stat().st_size / (1 << 20):.1f} MiB")
    assert wheel.stat().st_size < LARGEST
    return wheel


def first_call() -> str:
    """The README's first block of Python."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[0]


def try_out(folder: Path, wheel: Path) -> None:
    """The first call with PyTorch, the doctor with and without it."""
    bare = {"PATH": "/nonexistent", "HOME": str(folder)}
    for packages in (("numpy",), ("numpy", "torch")):
        scripts = environment(folder / "-".join(packages), *packages)
        install = ("install", "--quiet", "--no-index", "--no-deps", wheel)
        subprocess.run([scripts / "pip", *install], check=True, env=bare)
        run(scripts / "python", "-m", "flowdppo_ops", "doctor", cwd=folder, env=bare)
        if "torch" in packages:
            run(scripts / "python", "-c", first_call(), cwd=folder, env=bare)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for wheel and sdist")
    out = parser.parse_args().out.resolve()
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        try_out(Path(folder), build(Path(folder), out))


if __name__ == "__main__":
    main()
