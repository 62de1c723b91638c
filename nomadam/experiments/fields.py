"""Typed fields of dataclasses: checked when they are made, read from text when overridden."""

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

Scalar = bool | int | float | str | None


def require(holds: bool, field: str, value: object, allowed: str) -> None:
    """Raise the user's `ValueError` for a field unless the condition holds.

    Args:
        holds: the condition.
        field: dotted path of the field, as ``--set`` takes it.
        value: what the field was given.
        allowed: the allowed range in words.

    Raises:
        ValueError: naming the field, the value and the range.

    Example:
        >>> require(0 > 1, "steps", 0, "at least 1")
        Traceback (most recent call last):
        ...
        ValueError: steps = 0: must be at least 1
    """
    if not holds:
        raise ValueError(f"{field} = {value!r}: must be {allowed}")


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """The resolved annotation of each field of a dataclass, in their order.

    Example:
        >>> @dataclasses.dataclass
        ... class Point:
        ...     x: float
        >>> field_types(Point)
        {'x': <class 'float'>}
    """
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def check_types(instance: Any, prefix: str = "") -> None:
    """Check every field of a dataclass against its annotation and store it in its own type.

    An integer given for a float becomes a float and a list a tuple, so that equal settings
    have equal JSON. It is called from ``__post_init__``, of frozen dataclasses too.

    Args:
        instance: the dataclass instance, modified in place.
        prefix: what stands before the field's name in messages, such as ``"optimizer."``.

    Raises:
        ValueError: naming the field, the value and the type that it must have.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Point:
        ...     x: float
        ...     def __post_init__(self):
        ...         check_types(self, "point.")
        >>> Point(1)
        Point(x=1.0)
        >>> Point("1")
        Traceback (most recent call last):
        ...
        ValueError: point.x = '1': must be a finite number
    """
    for name, annotation in field_types(type(instance)).items():
        value = checked(getattr(instance, name), annotation, prefix + name)
        object.__setattr__(instance, name, value)


def checked(value: Any, annotation: Any, field: str) -> Any:
    """The value in the annotation's own type, or a `ValueError` that names the field.

    Args:
        value: any value.
        annotation: bool, int, float, str, a Literal, a union of these with None,
            ``tuple[X, ...]``, ``Mapping[str, Scalar]``, or a class.
        field: dotted path for the message.

    Raises:
        ValueError: where the value is not of this type; NaN and infinities are refused too.

    Example:
        >>> checked([1, 2], tuple[float, ...], "schedule.milestones")
        (1.0, 2.0)
    """
    for choice in _choices(annotation):
        try:
            return _as_type(value, choice, field)
        except TypeError:
            continue
    raise ValueError(f"{field} = {value!r}: must be {describe(annotation)}")


def parse(text: str, annotation: Any, field: str) -> Any:
    """Read a value of the annotated type from text, as ``--set field=text`` gives it.

    Args:
        text: the text; tuples are comma-separated, ``none`` is None where None is allowed.
        annotation: the field's type, as in `checked`.
        field: dotted path for the message.

    Raises:
        ValueError: where the text is no value of this type.

    Example:
        >>> parse("3e-4", float, "optimizer.lr"), parse("none", int | None, "seed")
        (0.0003, None)
        >>> parse("many", int, "steps")
        Traceback (most recent call last):
        ...
        ValueError: steps = 'many': must be an integer
    """
    for choice in _choices(annotation):
        try:
            return _as_type(_from_text(text, choice), choice, field)
        except (TypeError, ValueError):
            continue
    raise ValueError(f"{field} = {text!r}: must be {describe(annotation)}")


def scalar_from_text(text: str) -> Scalar:
    """Read a number, true, false or none from text; anything else is the text itself.

    Example:
        >>> [scalar_from_text(text) for text in ("3", "1e-8", "true", "none", "gsnr")]
        [3, 1e-08, True, None, 'gsnr']
    """
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def describe(annotation: Any) -> str:
    """The allowed values of a type in words, for messages.

    Example:
        >>> describe(int | None)
        'none or an integer'
    """
    words = {
        bool: "true or false",
        int: "an integer",
        float: "a finite number",
        str: "text",
        types.NoneType: "none",
    }
    described = []
    for choice in _choices(annotation):
        origin = typing.get_origin(choice)
        if origin is Literal:
            described.append("one of " + ", ".join(map(str, typing.get_args(choice))))
        elif origin is tuple:
            described.append("a list, each " + describe(typing.get_args(choice)[0]))
        elif origin is Mapping:
            described.append("a mapping from names to numbers, text, true, false or none")
        else:
            described.append(words.get(choice) or f"a {choice.__name__}")
    return " or ".join(described)


def _choices(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        # None first, so that the text "none" is not taken for a string.
        return tuple(
            sorted(typing.get_args(annotation), key=lambda kind: kind is not types.NoneType)
        )
    return (annotation,)


def _as_type(value: Any, kind: Any, field: str) -> Any:
    """The value as this one type; TypeError where it is not of it."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        if isinstance(value, str) and value in typing.get_args(kind):
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(checked(item, typing.get_args(kind)[0], field) for item in value)
    elif origin is Mapping:
        if isinstance(value, dict):
            for name, item in value.items():
                checked(name, str, f"{field} (a name)")
                checked(item, Scalar, f"{field}.{name}")
            return dict(value)
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if math.isfinite(value):
                return float(value)
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(value, kind):
        return value
    raise TypeError(field)


def _from_text(text: str, kind: Any) -> Any:
    text = text.strip()
    origin = typing.get_origin(kind)
    if kind is types.NoneType:
        return None if text.lower() in ("none", "null") else text
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in (int, float):
        return kind(text)
    if origin is tuple:
        items = [item for item in text.strip("()[]").split(",") if item.strip()]
        return [_from_text(item, typing.get_args(kind)[0]) for item in items]
    if origin is Mapping:
        return json.loads(text)
    return text
