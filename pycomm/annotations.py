"""Annotations that are checked: a call with an argument of another type says so, before anything is sent.

``@check_types()`` stands above constructors and functions that people call with arguments of many kinds. Without it a
wrong one comes to light as an AttributeError deep inside, on some ranks after others have begun to wait.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["check_at_least", "check_type", "check_types"]

Function = TypeVar("Function", bound=Callable[..., Any])


def check_types(**advice: str) -> Callable[[Function], Function]:
    """Decorates a function or constructor: its arguments are compared with its annotations before anything happens.

    An ``int`` may be any integral number but a bool, a ``float`` any real one; a tuple may be a list; the elements of
    sequences and mappings count, those of iterables do not.

    Args:
        advice: by an argument's name: what to write instead, appended to the error.

    Raises:
        TypeError: names the argument, says what it is and what it must be.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        hints = functools.cache(lambda: typing.get_type_hints(function))
        name = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError:
                return function(*args, **kwargs)  # Python's own error: something is missing, or one too many
            for argument, value in given.items():
                if argument in hints():
                    check_type(f"{name}: {argument}", value, hints()[argument], advice.get(argument, ""))
            return function(*args, **kwargs)

        return typing.cast(Function, checked)

    return decorate


def check_type(what: str, value: object, expected: Any, advice: str = "") -> None:
    """Raise TypeError unless ``value`` fits the annotation ``expected``; for :func:`check_types`, which see.

    Args:
        what: "function: argument".
    """
    if not _fits(value, expected):
        shown = f"{value!r:.40} ({type(value).__name__})" if isinstance(value, _SHOWN) else _with_article(type(value))
        raise TypeError(f"{what} is {shown}; it must be {_described(expected)}{advice and f': {advice}'}")


def check_at_least(what: str, minimum: int, **values: int) -> None:
    """Raise ValueError for the first of ``values`` that is smaller."""
    for name, number in values.items():
        if number < minimum:
            raise ValueError(f"{what}: {name} is {number}; it must be at least {minimum}")


_SHOWN = (bool, int, float, str, bytes, type(None))
_PLAIN = {bool: "True or False", int: "an integer", float: "a number", str: "a string", type(None): "None"}
_KINDS = {  # what collections.abc calls it -> how it reads
    collections.abc.Sequence: "a sequence of {}",
    collections.abc.Iterable: "an iterable of {}",
    collections.abc.Mapping: "a mapping from {} to {}",
}


def _fits(value: object, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if hint is Any:
        return True
    if hint in (int, float):
        wanted = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, wanted) and not isinstance(value, bool)
    if origin is tuple:
        return isinstance(value, (tuple, list)) and len(value) == len(inner) and all(map(_fits, value, inner))
    if origin is collections.abc.Callable:
        return callable(value)
    if origin is collections.abc.Sequence:
        return (
            isinstance(value, collections.abc.Sequence)
            and not isinstance(value, (str, bytes))
            and all(_fits(item, inner[0]) for item in value)
        )
    if origin is collections.abc.Mapping:
        return isinstance(value, collections.abc.Mapping) and all(
            _fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items()
        )
    if origin is not None:
        return isinstance(value, origin)
    if getattr(hint, "_is_protocol", False):
        return all(hasattr(value, name) for name in vars(hint) if not name.startswith("_"))
    return isinstance(value, hint)


def _described(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_described(one) for one in inner)
    if origin is tuple:
        return f"a tuple ({', '.join(map(_described, inner))})"
    if origin is collections.abc.Callable:
        return "a function"
    if origin is not None:
        return _KINDS[origin].format(*map(_described, inner))
    return _PLAIN.get(hint) or ("anything" if hint is Any else _with_article(hint))


def _with_article(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOUaeiou' else 'a'} {kind.__name__}"
