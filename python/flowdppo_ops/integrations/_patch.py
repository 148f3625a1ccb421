"""Replacing attributes of a trainer: `enable` checks the trainer and replaces them, `disable` puts the originals
back."""

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
    """The trainer has other names or parameters than the integration was written for. Nothing has been replaced."""


class Replacement(NamedTuple):
    """The new value of an attribute of a module or class, or of a key of a dict."""

    owner: Any
    name: str
    value: Any


def wants_strict(strict: bool | None) -> bool:
    """`strict`; None reads FLOWDPPO_OPS_STRICT, where "0" means False, "1" or nothing True."""
    return _environment.wants_strict() if strict is None else bool(strict)


class Patch:
    """The replacements of one integration. Its module's `enable`, `disable`, `enabled` and `fallbacks` are methods.

    Args:
        trainer: the trainer's name, for messages.
        tested: the versions or commits that the integration was tested with, for messages.

    Attributes:
        strict: the setting of the replacements in place; None while nothing is replaced.
        fallbacks: reason -> number of calls that the trainer's own function ran.
    """

    def __init__(self, trainer: str, tested: str) -> None:
        self.trainer = trainer
        self.tested = tested
        self.strict: bool | None = None
        self.fallbacks: Counter[str] = Counter()
        self._replaced: list[tuple[Replacement, Any]] = []  # with what was there
        self._said: set[str] = set()

    def replaces(self, replacements: Callable[[bool], Iterable[Replacement]]) -> Callable[[bool], Any]:
        """Decorator. The function takes `strict` and returns the replacements that `enable` makes."""
        self._replacements = replacements
        return replacements

    def enable(self, strict: bool | None = None) -> None:
        """Makes the trainer call the fused functions. A second call with another `strict` changes the setting.

        Args:
            strict: True reproduces the trainer's numbers to rounding, False computes what the formulas say where the
                two differ (the last table of docs/trainers.md). None reads FLOWDPPO_OPS_STRICT, by default "1".

        Raises:
            Incompatible: the trainer cannot be imported, or has other names or parameters than those tested. Nothing is
                replaced then.
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
        """Puts the originals back. If other code has replaced one since, that stays, and a warning is logged."""
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
        """Reason -> number of calls for which the trainer's own function ran, or for which a value was assumed."""
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
        """The trainer's own attribute or key, whether or not it is replaced now."""
        for one, before in self._replaced:
            if one.owner is owner and one.name == name:
                return before
        if name not in _held(owner):
            raise self.incompatible(_name(owner, name), "absent", "what the integration replaces")
        return _held(owner)[name]

    def check_parameters(
        self, what: str, function: Callable[..., Any], wanted: Iterable[str], later: tuple[str, ...] = ()
    ) -> None:
        """Raises Incompatible unless the function has the parameters `wanted`, in this order, and no other: the
        replacement would ignore an unknown one. Those in `later` may be absent: later versions added them."""
        found = tuple(inspect.signature(function).parameters)
        wanted = tuple(name for name in wanted if name in found or name not in later)
        if found != wanted:
            raise self.incompatible(what, f"({', '.join(found)})", f"({', '.join(wanted)})")

    def replacement(
        self, owner: Any, name: str, function: Callable[..., Any], prefix: str = "", later: tuple[str, ...] = ()
    ) -> Replacement:
        """The replacement of `owner.name` by `function`, which has the same parameters; see `with_fallback`. `later`:
        see `check_parameters`."""
        own = self.original(owner, name)
        self.check_parameters(_name(owner, name), own, inspect.signature(function).parameters, later)
        return Replacement(owner, name, self.with_fallback(own, function, prefix))

    def with_fallback(
        self, own: Callable[..., Any], function: Callable[..., Any], prefix: str = ""
    ) -> Callable[..., Any]:
        """A function that calls `function` and, if that returns a string, the trainer's `own`.

        The string is the reason why `function` cannot run the call. Such calls are counted under `prefix + reason`, and
        the first of each reason is logged.
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
    """The owner's own attributes or keys; a `staticmethod` or property is not unwrapped."""
    return owner if isinstance(owner, dict) else vars(owner)


def _put(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


def _name(owner: Any, name: str) -> str:
    return f"{getattr(owner, '__qualname__', getattr(owner, '__name__', repr(owner)))}.{name}"
