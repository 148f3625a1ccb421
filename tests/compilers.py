"""The C++ compiler that some tests need: Inductor's, the emulator's, the stand-in driver's."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest


def cxx() -> str | None:
    """Its path, or None."""
    wanted = os.environ.get("CXX")
    return shutil.which(wanted) if wanted else shutil.which("g++") or shutil.which("c++")


def sanitizer_library(name: str) -> str:
    """The compiler's own libasan.so, libtsan.so, ..., to be loaded before a program that was built without."""
    command = [cxx(), f"-print-file-name=lib{name}.so"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


needs_cxx = pytest.mark.skipif(cxx() is None, reason="needs a C++ compiler: g++, c++ or $CXX")
