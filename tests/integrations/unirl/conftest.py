"""The integration, freshly imported on UniRL or on what stands in for it."""

from __future__ import annotations

import os

import pytest
from trainers import unirl as standin_unirl
from unirl_modules import SOURCES, on, real_modules


@pytest.fixture(params=["stand-in", "UniRL"] if SOURCES in os.environ else ["stand-in"])
def unirl(request, monkeypatch):
    """The integration, freshly imported on one of the two."""
    modules = standin_unirl.modules() if request.param == "stand-in" else real_modules()
    yield from on(modules, monkeypatch)


@pytest.fixture
def standin(monkeypatch):
    yield from on(standin_unirl.modules(), monkeypatch)


@pytest.fixture
def real(monkeypatch):
    yield from on(real_modules(), monkeypatch)


@pytest.fixture
def september(monkeypatch):
    yield from on(standin_unirl.modules(september=True), monkeypatch)


@pytest.fixture(params=["standin", "september"])
def june_or_september(request):
    return request.getfixturevalue(request.param)
