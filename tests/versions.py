"""Runs the tests of the operators on the versions of Python, PyTorch and NumPy that users have.

    python tests/versions.py [--torch 2.6 newest] [--folder FOLDER]

One wheel, an environment for each row of `VERSIONS`, and a table at the end; exit code 1 if a test failed. An
environment has 3 to 6 GB and takes minutes to fill; it is deleted when its tests have run, unless `--folder` keeps it.
A Python that this machine does not have is named in the table.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Python, PyTorch and NumPy.
VERSIONS = (
    ("3.10", "2.6.0", "1.26.*"),
    ("3.12", "2.7.1", "2.*"),
    ("3.11", "2.8.0", "1.26.*"),
    ("3.13", "2.9.1", "2.*"),
    ("3.12", "2.10.0", "2.*"),
    ("3.13", "newest", "2.*"),
)
TESTS = ["library", "autograd_limits", "generators", "saved_tensors", "operator_refusals", "refusals"]
TESTS += [
    "refusals_numpy",
    "reference_limits",
    "threads",
    "policy_loss",
    "policy_loss_gradients",
    "step_parity",
    "sde_step",
    "numpy",
    "golden",
]
SHOW = "import platform, torch, numpy; print(platform.python_version(), torch.__version__, numpy.__version__)"


def interpreter(version: str) -> str | None:
    """A Python of this version: in PATH, or of pyenv."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for python in (f"python{version}", *map(str, pyenv)):
        found = shutil.which(python)
        if found and subprocess.run([found, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
            return found
    return None


def run(folder: Path, wheel: Path, python: str, torch: str, numpy: str) -> tuple[str, bool]:
    """A row of the table, and whether all tests passed."""
    start = time.monotonic()
    if not (folder / "bin" / "python").exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
    here = folder / "bin" / "python"
    packages = ["torch" if torch == "newest" else f"torch=={torch}", f"numpy=={numpy}"]
    packages += ["pytest", "pytest-timeout", "hypothesis", "allpairspy"]
    subprocess.run([here, "-m", "pip", "install", "--quiet", *packages, "setuptools", wheel], check=True)
    shown = subprocess.run([here, "-c", SHOW], capture_output=True, text=True, check=True).stdout.split()
    tests = [str(ROOT / "tests" / f"test_{name}.py") for name in TESTS]
    pytest = [here, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", *tests]
    done = subprocess.run(pytest, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout)
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout.strip().splitlines()[-1])
    result = ", ".join(f"{count} {what}" for count, what in counts)
    return f"| {' | '.join(shown)} | {result} | {time.monotonic() - start:.0f} s |", done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--torch", nargs="+", default=[""], help="only versions of PyTorch that begin like one of these"
    )
    parser.add_argument("--folder", type=Path, help="keeps the environments there")
    options = parser.parse_args()
    rows, good = [], True
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--wheel-dir", temporary, ROOT], check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        for version, torch, numpy in VERSIONS:
            if not torch.startswith(tuple(options.torch)):
                continue
            python = interpreter(version)
            if python is None:
                rows.append(f"| {version} | {torch} | {numpy} | left out: no Python {version} here | |")
                continue
            environment = folder / f"python{version}-torch{torch}"
            row, passed = run(environment, wheel, python, torch, numpy)
            rows.append(row)
            good = good and passed
            if options.folder is None:
                shutil.rmtree(environment)
    print("| Python | PyTorch | NumPy | tests | took |", "|---|---|---|---|--:|", *rows, sep="\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
