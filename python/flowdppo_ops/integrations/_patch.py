"""What an integration replaces in a trainer: checked first, put in place once, taken back exactly."""

from __future__ import annotations

import functools
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from .. import _environment

log = logging.getLogger("flowdppo_ops")


class Incompatible(RuntimeError):
    """A trainer's surface is not the one an integration was written for. Nothing has been replaced."""


class Replacement(NamedTuple):
    """`owner` is a module, a class or a dict; `name` an attribute or a key that it has itself."""

    owner: Any
    name: str
    value: Any


def wants_strict(strict: bool | None) -> bool:
    """`strict`, or for None what FLOWDPPO_OPS_STRICT says: "1" or not set is True, "0" False."""
    return _environment.wants_strict() if strict is None else bool(strict)


class Patch:
    """The replacements of one integration. Its module's `enable`, `disable`, `enabled` and `fallbacks` are methods.

    Args:
        trainer: its name, as users write it.
        tested: the versions or commits the integration was tested with; every `Incompatible` names them.

    Attributes:
        strict: of the replacements in place; None while there are none.
        fallbacks: reason -> how often a call went to the trainer's own function.
    """

    def __init__(self, trainer: str, tested: str) -> None:
        self.trainer = trainer
        self.tested = tested
        self.strict: bool | None = None
        self.fallbacks: Counter[str] = Counter()
        self._replaced: list[tuple[Replacement, Any]] = []  # with what was there
        self._said: set[str] = set()

    def replaces(self, replacements: Callable[[bool], Iterable[Replacement]]) -> Callable[[bool], Any]:
        """Decorator of the function that says, by `strict`, what `enable` replaces."""
        self._replacements = replacements
        return replacements

    def enable(self, strict: bool | None = None) -> None:
        """Replaces what this module names. Twice is once; the other `strict` replaces the first.

        Args:
            strict: True reproduces the trainer to rounding, False does what the maths says where the two differ
                (`flowdppo_ops.integrations.DEFECTS`); None reads FLOWDPPO_OPS_STRICT, "1" where it is not set.

        Raises:
            Incompatible: the trainer cannot be imported, or is not what this was written for; nothing is replaced then.
        """
        strict = wants_strict(strict)
        if self.strict == strict:
            return
        found = list(self._replacements(strict))
        self.disable()
        for one in found:
            self._replaced.append((one, _held(one.owner)[one.name]))
            _put(*one)
        self.strict = strict
        self.say_once(logging.INFO, f"flowdppo_ops: {self.trainer} runs fused, strict={strict} ({len(found)} replaced)")

    def disable(self) -> None:
        """Puts back exactly what was there. What somebody else has replaced since stays, with a warning."""
        while self._replaced:
            one, before = self._replaced.pop()
            if _held(one.owner).get(one.name) is one.value:
                _put(one.owner, one.name, before)
            else:
                log.warning("flowdppo_ops: %s of %s was replaced by another party and stays", one.name, self.trainer)
        self.strict = None

    def enabled(self) -> bool:
        """Whether the replacements are in place."""
        return self.strict is not None

    def count_fallbacks(self) -> dict[str, int]:
        """Why a call went to the trainer's own function, or took a number as it does -> how many calls did."""
        return dict(self.fallbacks)

    def incompatible(self, what: str, found: object, wanted: object) -> Incompatible:
        return Incompatible(
            f"flowdppo_ops: {self.trainer}'s {what} is {found}, wanted {wanted}; tested with {self.tested}"
        )

    def module(self, name: str) -> Any:
        """Imports a module of the trainer."""
        try:
            return import_module(name)
        except ImportError as error:
            raise self.incompatible(f"module {name}", f"not importable ({error})", "a module") from error

    def attribute(self, owner: Any, name: str) -> Any:
        """An attribute of a module or a class of the trainer."""
        found = getattr(owner, name, None)
        if found is None:
            raise self.incompatible(_name(owner, name), "absent", "what the integration replaces or calls")
        return found

    def original(self, owner: Any, name: str) -> Any:
        """What a replacement has displaced, or what is there when nothing has."""
        for one, before in self._replaced:
            if one.owner is owner and one.name == name:
                return before
        if name not in _held(owner):
            raise self.incompatible(_name(owner, name), "absent", "what the integration replaces")
        return _held(owner)[name]

    def check_parameters(
        self, what: str, function: Callable[..., Any], wanted: Iterable[str], later: tuple[str, ...] = ()
    ) -> None:
        """The names of a function's parameters, in order; all of them, for an unknown one would be lost on the way.
        Those in `later` came with a later version of the trainer."""
        found = tuple(inspect.signature(function).parameters)
        wanted = tuple(name for name in wanted if name in found or name not in later)
        if found != wanted:
            raise self.incompatible(what, f"({', '.join(found)})", f"({', '.join(wanted)})")

    def replacement(
        self, owner: Any, name: str, function: Callable[..., Any], prefix: str = "", later: tuple[str, ...] = ()
    ) -> Replacement:
        """By a function with the same parameters, which may leave calls to the trainer's: see `with_fallback`. `later`:
        see `check_parameters`."""
        own = self.original(owner, name)
        self.check_parameters(_name(owner, name), own, inspect.signature(function).parameters, later)
        return Replacement(owner, name, self.with_fallback(own, function, prefix))

    def with_fallback(
        self, own: Callable[..., Any], function: Callable[..., Any], prefix: str = ""
    ) -> Callable[..., Any]:
        """`function`; and where that returns a string, the reason why it does not serve a call, the trainer's own.

        Such calls are counted, the reason after `prefix`; the first of each reason is logged.
        """

        @functools.wraps(own)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if not isinstance(result, str):
                return result
            self.fall_back(prefix + result)
            return own(*args, **kwargs)

        return call

    def fall_back(self, reason: str) -> None:
        self.fallbacks[reason] += 1
        self.say_once(logging.WARNING, f"flowdppo_ops: {self.trainer}'s own function runs: {reason}")

    def say_once(self, level: int, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            log.log(level, line)


def _held(owner: Any) -> Mapping[str, Any]:
    """What the owner itself holds, descriptors as they are."""
    return owner if isinstance(owner, dict) else vars(owner)


def _put(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


def _name(owner: Any, name: str) -> str:
    return f"{getattr(owner, '__qualname__', getattr(owner, '__name__', repr(owner)))}.{name}"
