"""Installing the package as users do, on a machine without CUDA: in fresh environments, with the kernels inside.

Minutes, and the package index: `pytest -m install`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [pytest.mark.install, pytest.mark.timeout(900)]

# No torch there: the package must do without. Equal means: ratio 1, loss minus the mean advantage.
SMOKE = """
import sys, numpy as np, flowdppo_ops
from flowdppo_ops import _native
mean = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4)
loss, grad = flowdppo_ops.numpy.loss(mean, mean, np.float32([1, 3]), std=0.5, prev_sample=mean + 1)
assert loss == -2 and np.isfinite(grad).all() and grad.shape == mean.shape, (loss, grad)
assert "torch" not in sys.modules
images = {}
for unit, cc, is_ptx, _ in _native.cuda_images():
    images.setdefault(unit, []).append("%s_%d" % ("compute" if is_ptx else "sm", cc))
units = ["policy_loss", "sde_step"]
assert sorted(images) in ([], units) and len(set(map(str, images.values()))) <= 1, images
print("images:", *images.get("policy_loss", []))
"""
ALL_IMAGES = "images: sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 compute_80"


@pytest.fixture(scope="module")
def build_folder(tmp_path_factory):
    """Of Cargo, for all tests here: the crates we depend on are compiled once."""
    return tmp_path_factory.mktemp("target")


class Environment:
    """A fresh virtual environment."""

    def __init__(self, folder: Path, build_folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        self.python = folder / "bin" / "python"
        cleared = ("PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "PYO3_PYTHON")
        self.variables = {
            name: value
            for name, value in os.environ.items()
            if name not in cleared and not name.startswith(("FLOWDPPO_", "MATURIN_"))
        }
        # A python3 in PATH without NVRTC, as on a user's machine; only rustc and friends besides.
        self.variables |= {"CARGO_TARGET_DIR": str(build_folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}

    def run(self, *command: str | Path, fails: bool = False, **variables: str) -> str:
        """Standard output and error."""
        done = subprocess.run(
            command, env=self.variables | variables, cwd=self.python.parent, capture_output=True, text=True, timeout=600
        )
        text = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, f"{' '.join(map(str, command))} ended with {done.returncode}:\n{text}"
        return text

    def pip(self, *arguments: str | Path, **options) -> str:
        return self.run(self.python, "-m", "pip", "--disable-pip-version-check", *arguments, **options)


@pytest.fixture
def environment(tmp_path, build_folder):
    return Environment(tmp_path / "venv", build_folder)


def test_pip_install(environment):
    environment.pip("install", ROOT)
    assert ALL_IMAGES in environment.run(environment.python, "-c", SMOKE)
    # NVRTC belongs to the build alone.
    assert "nvidia" not in environment.pip("list")


# Beside this Python, which need not be in PATH.
UV = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.mark.skipif(UV is None, reason="uv is not installed")
def test_uv_pip_install(environment):
    # The machine's certificates, as pip takes them, and not uv's own.
    environment.run(UV, "pip", "install", "--python", environment.python, ROOT, UV_SYSTEM_CERTS="1")
    assert ALL_IMAGES in environment.run(environment.python, "-c", SMOKE)


def test_source_distribution(environment, tmp_path):
    requirements = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    maturin = re.findall(r'"(maturin[^"]*)"', requirements)
    environment.pip("install", *maturin)
    environment.run(
        environment.python.parent / "maturin", "sdist", "--manifest-path", ROOT / "Cargo.toml", "--out", tmp_path
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.split("/", 1)[1] for name in content.getnames()}
    wanted = {"build.rs", "kernels/policy_loss.cu", ".cargo/config.toml", "LICENSE", "python/flowdppo_ops/__init__.py"}
    assert wanted <= names
    environment.pip("install", archive)
    assert ALL_IMAGES in environment.run(environment.python, "-c", SMOKE)


def test_other_architectures_and_no_kernels(environment):
    environment.pip("install", ROOT, FLOWDPPO_ARCHS="sm_90,compute_90")
    assert "images: sm_90 compute_90\n" in environment.run(environment.python, "-c", SMOKE)
    environment.pip("install", "--force-reinstall", "--no-deps", ROOT, FLOWDPPO_KERNELS="none")
    assert "images:\n" in environment.run(environment.python, "-c", SMOKE)
    assert 'FLOWDPPO_ARCHS has "90", wanted e.g. sm_90' in environment.pip(
        "install", "--force-reinstall", "--no-deps", ROOT, FLOWDPPO_ARCHS="90", fails=True
    )


def test_a_missing_compiler_is_explained(environment):
    """Without build isolation nobody brings NVRTC."""
    environment.pip("install", "maturin>=1.9,<2")
    text = environment.pip("install", "--no-build-isolation", "--no-deps", ROOT, fails=True)
    assert "pip install nvidia-cuda-nvrtc-cu12==" in text
    assert "FLOWDPPO_KERNELS=none" in text
