"""The C++ compiler that some tests need: Inductor's, the emulator's, the stand-in driver's."""

from __future__ import annotations

import os
import shutil

import pytest


def cxx() -> str | None:
    """Its path, or None."""
    wanted = os.environ.get("CXX")
    return shutil.which(wanted) if wanted else shutil.which("g++") or shutil.which("c++")


needs_cxx = pytest.mark.skipif(cxx() is None, reason="needs a C++ compiler: g++, c++ or $CXX")
